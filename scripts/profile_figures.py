"""Figures and summary of a redundancy profile, from the content of profile.json alone. No torch."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scripts.figures.style import STYLE, mark

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Profile = Mapping[str, Any]
Floats = NDArray[np.float64]
MAP = "cividis"
"""Colour map that reads the same with every common colour blindness."""
_FLOOR = 1e-7
"""Least KL divergence on a logarithmic scale, in nats."""


def heads(profile: Profile) -> Figure:
    """KL divergence without each query head, a panel a context, and how few heads carry most of it."""
    contexts = _part(profile, "heads")
    figure, axes = _panels(len(contexts) + 1)
    maps = {name: _array(part["kl"]) for name, part in contexts.items()}
    _maps(figure, axes[: len(maps)], maps, "query head")
    last = axes[len(maps)]
    for index, (name, kl) in enumerate(maps.items()):
        ordered = np.sort(kl.flatten())[::-1]
        shares = 100 * np.arange(1, ordered.size + 1) / ordered.size
        carried = 100 * ordered.cumsum() / max(ordered.sum(), _FLOOR)
        last.plot(shares, carried, color=mark(index)[0], linewidth=1.8, label=_tokens(name))
    last.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle="--")
    last.set_xlabel("heads, strongest first [%]")
    last.set_ylabel("share of the summed KL [%]")
    last.set_title("how few heads carry most", loc="left")
    last.legend()
    return _titled(figure, profile, "attention heads, each left out alone")


def blocks(profile: Profile) -> Figure:
    """Attention mass by rank, by layer and by position of a block, and KL divergence without each decile."""
    from matplotlib.ticker import LogLocator

    contexts = _part(profile, "blocks")
    axes_of = profile["axes"]
    figure, (ranked, layered, placed, ablated) = _panels(4)
    nearly = axes_of["holding"].index(0.9)
    for index, (name, part) in enumerate(contexts.items()):
        style: dict[str, Any] = {"color": mark(index)[0], "linewidth": 1.8, "label": _tokens(name)}
        by_rank = 100 * _array(part["by_rank"])
        shares = [100 * share for share in axes_of["by_rank"]]
        ranked.plot(shares, by_rank.mean(0), **style)
        ranked.fill_between(shares, by_rank.min(0), by_rank.max(0), color=mark(index)[0], alpha=0.12, linewidth=0)
        layered.plot(100 * _array(part["holding"])[:, nearly], **style, marker=mark(index)[1], markersize=4)
        by_position = _array(part["by_position"]).mean(0)
        middles = 100 * (np.arange(by_position.size) + 0.5) / by_position.size
        placed.plot(middles, 100 * by_position, **style, marker=mark(index)[1], markersize=4)
        deciles = np.arange(1, len(part["decile_kl"]) + 1)
        ablated.plot(deciles, _floored(part["decile_kl"]), **style, marker=mark(index)[1], markersize=5)
    ranked.set_xscale("log")
    ranked.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"])
    ranked.minorticks_off()
    _label(ranked, "mass by rank (band: range of layers)", "blocks, strongest first [%]", "mass on blocks [%]")
    _label(layered, "fewest blocks with 90% of the mass", "layer", "blocks [%]")
    layered.set_ylim(0, 1.06 * layered.get_ylim()[1])
    _whole(layered.xaxis)
    placed.set_yscale("log")
    placed.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    placed.yaxis.set_major_formatter("{x:g}")
    placed.yaxis.set_minor_formatter("")
    _label(placed, "mass by position, mean of layers", "position in the context [%]", "mass on blocks [%]")
    ablated.set_yscale("log")
    ablated.set_xticks(range(1, 11))
    _label(ablated, "a tenth of the blocks left out in all layers", "decile by mass, 1 = strongest", "KL [nats]")
    ranked.legend()
    return _titled(figure, profile, f"KV blocks of {profile['block_size']} positions")


def channels(profile: Profile) -> Figure:
    """KL divergence without each group of FFN channels, a panel a context, and its mean over the layers."""
    contexts = _part(profile, "channels")
    figure, axes = _panels(len(contexts) + 1)
    maps = {name: _array(part["kl"]) for name, part in contexts.items()}
    _maps(figure, axes[: len(maps)], maps, "group, 1 = strongest", first=1)
    last = axes[len(maps)]
    for index, (name, kl) in enumerate(maps.items()):
        _range(last, kl, index, _tokens(name))
    last.set_yscale("log")
    last.set_xticks(range(1, int(profile["groups"]) + 1))
    _label(last, "median of layers (bar: 10th to 90th percentile)", "group, 1 = strongest", "KL [nats]")
    last.legend()
    return _titled(
        figure, profile, f"{profile['groups']} groups of FFN channels by gate magnitude, each left out alone"
    )


def experts(profile: Profile) -> Figure | None:
    """KL divergence without each expert, a panel a context, and without each rank; None for a model without experts."""
    contexts = _part(profile, "experts")
    if not contexts:
        return None
    figure, axes = _panels(len(contexts) + 1)
    _maps(
        figure,
        axes[:-1],
        {name: _array(part["expert_kl"]) for name, part in contexts.items()},
        "expert",
        "layer with experts",
    )
    last = axes[-1]
    for index, (name, part) in enumerate(contexts.items()):
        _range(last, _array(part["rank_kl"]), index, _tokens(name))
    last.set_yscale("log")
    last.set_xticks(range(1, len(next(iter(contexts.values()))["rank_kl"][0]) + 1))
    title = "one expert per token left out (bar: 10th to 90th pct)"
    _label(last, title, "rank of the expert, 1 = strongest", "KL [nats]")
    last.legend()
    return _titled(figure, profile, "routed experts, each left out alone (white: no token used it)")


FIGURES: dict[str, Callable[[Profile], Figure | None]] = {
    "heads": heads,
    "blocks": blocks,
    "channels": channels,
    "experts": experts,
}


def write(profile: Profile, folder: Path) -> list[Path]:
    """Draw every figure that the profile allows as PNG and PDF, each written atomically; the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    with plt.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure = draw(profile)
            if figure is None:
                continue
            for suffix, options in (("png", {"dpi": 160}), ("pdf", {"metadata": {"CreationDate": None}})):
                buffer = io.BytesIO()
                figure.savefig(buffer, format=suffix, **options)
                written.append(_replace(folder / f"{name}.{suffix}", buffer.getvalue()))
            plt.close(figure)
    return written


def markdown(profile: Profile) -> str:
    """A summary in words and tables."""
    lines = [
        f"# Redundancy profile of {profile['model']}",
        "",
        f"{profile['device']}, {profile['dtype']}, {_text(profile)}.",
        "KL is that of the draft tokens' distributions from the intact step, in nats.",
        "",
        "| context | heads for 90% of the KL | weakest half of the heads, KL each | blocks for 90% / 99% of the mass "
        "| KL without the strongest tenth of blocks | without the weakest half's worst tenth |",
        "|---|---|---|---|---|---|",
    ]
    held = profile["axes"]["holding"]
    for name, part in profile["contexts"].items():
        kl = np.sort(_array(part["heads"]["kl"]).flatten())[::-1]
        few = int((kl.cumsum() < 0.9 * kl.sum()).sum()) + 1
        holding = _array(part["blocks"]["holding"]).mean(0)
        deciles = part["blocks"]["decile_kl"]
        lines.append(
            f"| {name} | {few / kl.size:.0%} | {fmean(kl[kl.size // 2 :]):.1e} | "
            f"{holding[held.index(0.9)]:.0%} / {holding[held.index(0.99)]:.0%} | {deciles[0]:.2g} | "
            f"{max(deciles[len(deciles) // 2 :]):.1e} |"
        )
    lines += ["", *_group_table("FFN channel group", _part(profile, "channels"), "kl")]
    if _part(profile, "experts"):
        lines += ["", *_group_table("rank of the expert", _part(profile, "experts"), "rank_kl")]
    lines += ["", *(f"![{name}]({name}.png)" for name in FIGURES if _part(profile, name))]
    return "\n".join(lines) + "\n"


def _group_table(title: str, contexts: Mapping[str, Any], key: str) -> list[str]:
    """Median KL over the layers without each group, strongest first."""
    columns = len(next(iter(contexts.values()))[key][0])
    lines = [f"| context | {' | '.join(f'{title} {at + 1}' if not at else str(at + 1) for at in range(columns))} |"]
    lines.append("|---" * (columns + 1) + "|")
    for name, part in contexts.items():
        medians = np.median(_array(part[key]), axis=0)
        lines.append(f"| {name} | {' | '.join(f'{value:.1e}' for value in medians)} |")
    return lines


def _part(profile: Profile, part: str) -> dict[str, Any]:
    """One part of the profile by context, where it was measured."""
    return {name: found[part] for name, found in profile["contexts"].items() if part in found}


def _array(values: Any) -> Floats:
    return np.asarray(values, dtype=np.float64)


def _floored(values: Any) -> Floats:
    return np.maximum(_array(values), _FLOOR)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A grid of panels, two wide."""
    import matplotlib.pyplot as plt

    deep = -(-count // 2)
    figure, grid = plt.subplots(deep, 2, figsize=(10.4, 3.7 * deep + 0.6), squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def _maps(
    figure: Figure, axes: Sequence[Axes], maps: Mapping[str, Floats], across: str, up: str = "layer", first: int = 0
) -> None:
    """Heat maps of KL by layer on one logarithmic scale; zeros stay white."""
    from matplotlib.colors import LogNorm

    positive = np.concatenate([kl[kl > 0] for kl in maps.values()])
    high = float(positive.max()) if positive.size else 1.0
    low = max(_FLOOR, min(float(np.quantile(positive, 0.01)) if positive.size else _FLOOR, high / 10))
    norm = LogNorm(low, max(high, 10 * low))
    image = None
    for axis, (name, kl) in zip(axes, maps.items(), strict=True):
        extent = (first - 0.5, first + kl.shape[1] - 0.5, kl.shape[0] - 0.5, -0.5)
        shown = np.where(kl > 0, np.maximum(kl, low), np.nan)
        image = axis.imshow(shown, aspect="auto", cmap=MAP, norm=norm, extent=extent, interpolation="nearest")
        axis.grid(False)
        if kl.shape[1] <= 16:
            axis.set_xticks(range(first, first + kl.shape[1]))
        _whole(axis.yaxis)
        _label(axis, f"context of {_tokens(name)}", across, up)
    if image is not None:
        figure.colorbar(image, ax=list(axes), label="KL [nats]", extend="min", pad=0.02)


def _range(axis: Axes, kl: Floats, index: int, label: str) -> None:
    """Median over the layers of each column with the 10th to 90th percentile, beside those of the other contexts."""
    low, middle, high = np.maximum(np.quantile(kl, (0.1, 0.5, 0.9), axis=0), _FLOOR)
    places = np.arange(1, kl.shape[1] + 1) + 0.12 * index
    axis.errorbar(
        places,
        middle,
        yerr=[middle - low, high - middle],
        color=mark(index)[0],
        marker=mark(index)[1],
        markersize=5,
        capsize=2.5,
        linewidth=1.4,
        label=label,
    )


def _whole(axis: Axis) -> None:
    """Ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _label(axis: Axes, title: str, across: str, up: str) -> None:
    axis.set_title(title, loc="left")
    axis.set_xlabel(across)
    axis.set_ylabel(up)


def _tokens(context: str) -> str:
    return f"{context} tokens"


def _titled(figure: Figure, profile: Profile, what: str) -> Figure:
    """The title: what is shown, the model and where it ran, the text."""
    where = f"{profile['model']}, {profile['dtype']}, on {profile['device']}"
    figure.suptitle(f"{what}\n{where}\n{_text(profile)}", fontsize=11)
    return figure


def _text(profile: Profile) -> str:
    """The text and how it was run over, in words."""
    count = profile["windows"]
    return f"{profile['text']}, {count} window{'s' * (count > 1)} per context, steps of {profile['rows']} tokens"


def _replace(file: Path, content: bytes) -> Path:
    """Write through a temporary file in the same folder and a rename."""
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as stream:
        stream.write(content)
    Path(stream.name).chmod(0o644)
    os.replace(stream.name, file)
    return file
