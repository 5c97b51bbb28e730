"""The figures of `scripts.plots` as images inside the page, each with what to look for."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from harness.evidence.rows import Row
from scripts import plots

DPI = 130
_SIZE_OF_PNG = slice(16, 24)
SHOWS: dict[str, str] = getattr(plots, "CAPTIONS", {})

LOOK_FOR = {
    "pareto": (
        "What can be had together",
        "Look for settings on the staircase whose interval of loss lies within the band, the noise floor, and whose "
        "interval of speed-up lies above the dashed line, dense verification.",
    ),
    "tradeoff": (
        "Speed-up and quality",
        "Look for points above the dashed line, which is dense verification, whose horizontal interval stays near "
        "zero. A point above it whose interval reaches far to the left is not yet a gain. Hollow points are stale.",
    ),
    "kept_tokens": (
        "Budget of context tokens",
        "Look for the smallest budget whose quality interval is narrow and holds zero, for the speed-up there, and for "
        "how far that lies below its limit by bytes.",
    ),
    "context": (
        "Length of the prompt",
        "Look for a gain that grows with the prompt as its limit does. A curve that stays flat while the limit rises "
        "saves bytes without saving time.",
    ),
    "acceptance_density": (
        "Acceptance and density",
        "Look for the density below which acceptance leaves the dense line: from there on a faster step pays for fewer "
        "tokens.",
    ),
    "split": (
        "Two factors of the speed-up",
        "Look for which factor a speed-up comes from. Steps per second are what sparsity is meant to raise; tokens per "
        "step below 1 are acceptance that it lost.",
    ),
    "components": (
        "Where the time of a step goes",
        "Look for whether the component that was made sparse is the one that shrank, and whether choosing (select) "
        "eats what is saved.",
    ),
    "acceptance": (
        "Acceptance of the drafters",
        "Look for drafters whose acceptance falls under sparse verification: they lose twice.",
    ),
    "axes": (
        "Density, fidelity and time of each axis",
        "Look for how far agreement falls before step time does, and for the distance of the time from its "
        "limit by bytes.",
    ),
    "overlap": (
        "Do the tokens of a draft choose alike?",
        "Look for a fall with distance: where it is steep, sharing the first token's selection costs fidelity.",
    ),
    "similarity": (
        "Do layers choose alike?",
        "Look for bright squares along the diagonal: their layers can share one retrieval. Layers that are dark "
        "everywhere should stay anchors.",
    ),
    "recall": (
        "Is the right context chosen?",
        "Look for the distance to the best that the same budget could hold: it is lost to the score, the rest to the "
        "budget.",
    ),
}
"""Name in plots.FIGURES -> title, and what to look for."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure as it stands in the page; sizes are pixels of the image, so that nothing moves while it is decoded."""

    name: str
    title: str
    caption: str
    uri: str
    width: int
    height: int


def drawings(rows: Sequence[Row]) -> list[Drawing]:
    """Every figure that the rows allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = []
    for name, draw in plots.FIGURES.items():
        figure = draw(rows)
        if figure is None:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight", dpi=DPI, metadata={"Software": None})
        plt.close(figure)
        found.append(_drawing(name, buffer.getvalue()))
    return found


def _drawing(name: str, image: bytes) -> Drawing:
    size = image[_SIZE_OF_PNG]
    title, look_for = LOOK_FOR.get(name, (name.replace("_", " ").capitalize(), ""))
    caption = " ".join(part for part in (SHOWS.get(name, ""), look_for) if part)
    uri = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    return Drawing(name, title, caption, uri, int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big"))
