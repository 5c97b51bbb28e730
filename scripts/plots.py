"""Figures from stored results alone, as PNG and PDF: `python -m scripts.plots`."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness.evidence.rows import Row
from scripts import common
from scripts.figures.acceptance import acceptance
from scripts.figures.axis_curves import axes
from scripts.figures.components import components
from scripts.figures.context import context
from scripts.figures.lengths import acceptance_density
from scripts.figures.pareto import pareto
from scripts.figures.selections import overlap, recall, similarity
from scripts.figures.split import split
from scripts.figures.style import COLOURS, MARKERS, STYLE
from scripts.figures.tradeoff import kept_tokens, tradeoff

__all__ = ["CAPTIONS", "COLOURS", "FIGURES", "MARKERS", "STYLE", "main", "write"]

FIGURES = {
    "pareto": pareto,
    "tradeoff": tradeoff,
    "kept_tokens": kept_tokens,
    "context": context,
    "acceptance_density": acceptance_density,
    "split": split,
    "components": components,
    "acceptance": acceptance,
    "axes": axes,
    "overlap": overlap,
    "similarity": similarity,
    "recall": recall,
}
"""File name -> what draws it from the rows, or returns None where they hold nothing to draw."""

CAPTIONS = {
    "pareto": "Decoding speed-up against each kind of loss, a point for each setting with 95% intervals; the numbered "
    "settings on the staircase are those that no other beats in both, and the band is the noise floor, what dense "
    "verification itself differs from AR.",
    "tradeoff": "Decoding speed-up over AR against the quality difference to dense verification, with 95% intervals.",
    "kept_tokens": "Speed-up over dense verification and quality against the context tokens kept per KV head; dotted "
    "is the limit by bytes read.",
    "context": "Speed-up over dense verification and over AR against the length of the prompt, for settings that were "
    "measured at several lengths; dotted is the limit by bytes read, dashed dense verification.",
    "acceptance_density": "Acceptance length of sparse verification against the share of the work it does, axis by "
    "axis; dashed is dense verification of the same runs.",
    "split": "The speed-up over dense verification (diamond) as the product of tokens per step and steps per second, "
    "on a logarithmic scale, with 95% intervals.",
    "components": "Where the time of the mean step goes, dense above sparse.",
    "acceptance": "Acceptance length of dense and sparse verification, and the share of steps by their new tokens.",
    "axes": "Agreement, KL, acceptance length, step time and quality against density, a column for each axis of "
    "sparsity and one for several together.",
    "overlap": "Share of the selected blocks that two draft tokens have in common, by layer and distance.",
    "similarity": "Jaccard similarity of the blocks that every two layers select.",
    "recall": "Share of the attention mass that the selected blocks hold, by layer, beside that of the best blocks.",
}
"""File name -> one sentence that says what the figure shows, for pages that hold it."""


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw every figure that the rows allow and write it to `folder` as PNG and PDF, each atomically."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure is None:
            continue
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not again for every file
        for suffix, options in (("png", {"dpi": 160}), ("pdf", {"metadata": {"CreationDate": None}})):
            buffer = io.BytesIO()
            with plt.rc_context(STYLE):
                figure.savefig(buffer, format=suffix, bbox_inches="tight", **options)
            written.append(_replace(folder / f"{name}.{suffix}", buffer.getvalue()))
        plt.close(figure)
    return written


def _replace(file: Path, content: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
        stream.write(content)
    Path(stream.name).chmod(0o644)
    os.replace(stream.name, file)
    return file


def main(argv: Sequence[str] | None = None) -> int:
    """Write the figures; 2 where there is nothing to show."""
    loaded = common.load(common.parser("scripts.plots", "Figures from stored results alone.", "figures"), argv)
    if loaded is None:
        return 2
    arguments, rows = loaded
    written = write(rows, common.out_folder(arguments))
    if not written:
        print("no finished run has both a dense and a sparse arm; run with arms=[ar,dense,sparse]", file=sys.stderr)
        return 2
    for file in written:
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
