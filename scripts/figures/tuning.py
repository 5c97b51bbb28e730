"""A tuning study: every trial by loss and speed-up, its Pareto front, the default and the chosen setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scripts.figures.style import COLOURS, GREY, STYLE, legend_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINES = {"ar": "AR", "dense": "dense verification"}
_LONGEST = 3.0
"""Losses beyond this many times the largest one of the front are left to the edge of the figure."""


def figure(document: Mapping[str, Any]) -> Figure:
    """Speed-up over loss; bars are 95% intervals of the front, crosses are trials that were stopped early.

    Args:
        document: what scripts.tune writes as <study>.json.
    """
    import matplotlib.pyplot as plt

    trials = {one["number"]: one for one in document["trials"] if one["speed"] and one["loss"]}
    front = [trials[number] for number in document["front"]]
    with plt.rc_context(STYLE):
        made, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
        _cloud(axis, [one for one in trials.values() if one["state"] == "pruned"], "x", "stopped early")
        _cloud(axis, [one for one in trials.values() if one["state"] == "measured"], "o", "all examples")
        _front(axis, front)
        for number, marker, label, colour in (
            (document["default"], "*", "default", COLOURS[1]),
            (document["chosen"]["number"], "D", "chosen", COLOURS[2]),
        ):
            place = [trials[number]["loss"]["value"]], [trials[number]["speed"]["value"]]
            size = 15 if marker == "*" else 8
            axis.plot(*place, marker, markersize=size, color=colour, label=label, markeredgecolor="white", zorder=5)
        if document["limit"] is not None:
            axis.axvline(document["limit"], color=GREY, linestyle="--", linewidth=1.1, label="largest loss allowed")
        axis.axhline(1.0, color="#999999", linewidth=1)
        _fit(axis, document, trials)
        axis.set_xlabel(document["loss"])
        axis.set_ylabel(f"decoding speed-up over {BASELINES[document['speed']]}")
        axis.set_title(
            f"{document['task']}, {document['model']}, {document['examples']} examples\n{document['device']}",
            loc="left",
        )
        handles, labels = axis.get_legend_handles_labels()
        made.legend(handles, labels, loc="outside lower center", ncols=legend_columns(made, handles))
    return made


def _cloud(axis: Axes, trials: Sequence[Mapping[str, Any]], marker: str, label: str) -> None:
    if trials:
        losses = [one["loss"]["value"] for one in trials]
        speeds = [one["speed"]["value"] for one in trials]
        axis.plot(losses, speeds, marker, color=GREY, alpha=0.55, markersize=5, label=label)


def _front(axis: Axes, front: Sequence[Mapping[str, Any]]) -> None:
    """The front as steps: what is reached at each loss."""
    losses, speeds = ([one[key]["value"] for one in front] for key in ("loss", "speed"))
    bars = [_bars(front, key) for key in ("loss", "speed")]
    axis.errorbar(
        losses, speeds, xerr=bars[0], yerr=bars[1], fmt="o", color=COLOURS[0], markersize=6, capsize=2.5, linewidth=1
    )
    axis.step(losses[::-1], speeds[::-1], where="post", color=COLOURS[0], linewidth=1.4, label="Pareto front")


def _bars(front: Sequence[Mapping[str, Any]], key: str) -> list[list[float]]:
    """[2][n] distances from the value to the ends of its interval."""
    below, above = [], []
    for one in front:
        value = one[key]["value"]
        low, high = one[key]["ci95"] or (value, value)
        below.append(max(value - low, 0.0))
        above.append(max(high - value, 0.0))
    return [below, above]


def _fit(axis: Axes, document: Mapping[str, Any], trials: Mapping[int, Mapping[str, Any]]) -> None:
    """Keep the front readable where a few trials lost far more."""
    losses = [trials[number]["loss"]["value"] for number in (*document["front"], document["default"])]
    known = [one["loss"]["value"] for one in trials.values()]
    most = _LONGEST * max([*losses, document["limit"] or 0.0])
    if max(known) > most > 0:
        axis.set_xlim(right=most)
        beyond = sum(loss > most for loss in known)
        axis.annotate(
            f"{beyond} more \u2192", (1.0, 0.02), xycoords="axes fraction", ha="right", color=GREY, fontsize=8.5
        )
