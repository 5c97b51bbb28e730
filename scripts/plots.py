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
from scripts.figures.selections import overlap, recall, similarity
from scripts.figures.style import COLOURS, MARKERS, STYLE
from scripts.figures.tradeoff import kept_tokens, tradeoff

__all__ = ["COLOURS", "FIGURES", "MARKERS", "STYLE", "main", "write"]

FIGURES = {
    "tradeoff": tradeoff,
    "kept_tokens": kept_tokens,
    "overlap": overlap,
    "similarity": similarity,
    "recall": recall,
    "axes": axes,
    "components": components,
    "acceptance": acceptance,
}
"""File name -> what draws it from the rows, or returns None where they hold nothing to draw."""


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
        for suffix, options in (("png", {"dpi": 160}), ("pdf", {"metadata": {"CreationDate": None}})):
            buffer = io.BytesIO()
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
