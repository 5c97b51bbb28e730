"""What each drafter's drafts are worth: acceptance, the time that drafting takes and the speed-ups, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.evidence.labels import NO_DRAFTS, identity, name_of, natural, setting_labels
from harness.evidence.rows import Row
from scripts.cells import (
    ARROW,
    NOTHING,
    Column,
    Grid,
    bounds,
    change,
    described,
    estimate,
    grids_of,
    lines,
    number,
    percent,
    plain,
)
from scripts.figures.style import Place, by_place

TITLE = ": drafters"
HEAD = (
    "Acceptance length (AL): new tokens per forward pass of the target, the bonus token included (METHOD section 8), "
    "pooled over all steps and, in brackets, the mean of the requests' own means."
)
LEGEND = (
    "Drafted: draft tokens per step. New tokens: share of the dense arm's steps by their new tokens, in per cent. "
    "Draft time: drafting's share of decoding seconds. Ratios are decoding throughputs with 95% intervals, against AR "
    "in batches of the same size. A chain is named by its length, a tree by its size (children per token \u00d7 "
    "depth). Where runs differ in drafter, decoding and batch size alone, their drafters are not repeated at other "
    "settings. A dash was not measured."
)
FORCED_NOTE = (
    "forced oracle: acceptance was chosen, and outputs are those of the given continuation; time is measured, "
    "acceptance and quality say nothing about a drafter or about sparsity"
)
ARMS = ("dense", "sparse")
_DRAFTERS = ("lookup", "suffix", "selfsparse", "model", "eagle3", "combined", "oracle")
_LAST = 4
_COMPARED = ("draft", "decode", "engine.batch_size", "engine.wave", "calibration", "file_hashes")
"""What runs of a comparison may differ in; a draft model adds to the hashes."""


def compared(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    """Runs with drafts of the tasks, models and devices where drafter, decoding or batch size vary, in reading order.

    Runs that differ in nothing else stand together. Others are left out where theirs already stands in such a group,
    so that a sweep of budgets does not hide the drafters. `setting` is without what `drafting` says.
    """
    found = {}
    for place, members in by_place([row for row in rows if _drafts(row)]).items():
        if len({row.drafting for row in members}) < 2:
            continue
        groups: dict[str, list[Row]] = {}
        for row in members:
            groups.setdefault(identity(row.config, _COMPARED), []).append(row)
        fair = [row for group in groups.values() if len({row.drafting for row in group}) > 1 for row in group]
        told = {row.drafting for row in fair}
        chosen = fair + [row for row in members if row.drafting not in told]
        settings = setting_labels([_without_drafting(row.config) for row in chosen])
        shown = [replace(row, setting=setting) for row, setting in zip(chosen, settings, strict=True)]
        found[place] = sorted(shown, key=_order)
    return found


def _drafts(row: Row) -> bool:
    return row.drafting.drafter != NO_DRAFTS and any(row.arms.get(arm) for arm in ARMS)


def _without_drafting(config: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in config.items() if key not in ("draft", "decode")}
    engine = rest.get("engine")
    if isinstance(engine, Mapping):
        rest["engine"] = {key: value for key, value in engine.items() if f"engine.{key}" not in _COMPARED}
    return rest


def _order(row: Row) -> tuple[Any, ...]:
    name = name_of(row.config, "draft")
    place = _DRAFTERS.index(name) if name in _DRAFTERS else len(_DRAFTERS)
    return natural(row.setting), place, *(natural(text) for text in row.drafting), row.start


def shares(histogram: Sequence[int], last: int = _LAST) -> dict[str, float]:
    """Share of the steps by new tokens, "1" to "4+"; empty without steps. Steps without one are told where there are.

    Args:
        histogram: entry i counts the steps that yielded i new tokens.
        last: from here on counted together.
    """
    steps = sum(histogram)
    if not steps:
        return {}
    counts = {str(new): count for new, count in enumerate([*histogram, *[0] * last][:last]) if new or count}
    counts[f"{last}+"] = sum(histogram[last:])
    return {new: count / steps for new, count in counts.items()}


def _shares(row: Row) -> str:
    told = [f"{new}: {100 * share:.0f}" for new, share in shares(row.histogram("dense")).items()]
    middle = len(told) // 2
    return lines(", ".join(told[:middle]) + ",", ", ".join(told[middle:])) if told else NOTHING


def _length(arm: str) -> Column:
    def cell(row: Row) -> str:
        pooled, own = row.acceptance_length(arm), row.request_acceptance_length(arm)
        return NOTHING if pooled is None else f"{number(pooled)}\n({number(own)})"

    return Column(f"AL\n{arm}", cell)


def _draft_time(row: Row) -> str:
    told = [percent(row.drafted("time_share", arm), 0) for arm in ARMS]
    return NOTHING if set(told) == {NOTHING} else f"{told[0]}\n{ARROW} {told[1]}"


_NUMBERS = (
    Column(
        f"drafted\ndense\n{ARROW} sparse",
        lambda row: change(row.drafted("tokens_per_step", "dense"), row.drafted("tokens_per_step", "sparse"), 1),
    ),
    _length("dense"),
    _length("sparse"),
    Column("new tokens\n% of steps", _shares),
    Column(f"draft time\ndense\n{ARROW} sparse", _draft_time),
    Column("dense\n/ AR", lambda row: estimate(row.dense_vs_ar)),
    Column("sparse\n/ AR", lambda row: estimate(row.sparse_vs_ar)),
    Column("sparse\n/ dense", lambda row: estimate(row.sparse_vs_dense)),
)
_SETTING = Column("sparse arm", lambda row: row.setting, right=False)
FULL = (
    Column("task", lambda row: row.task, right=False),
    Column("drafter", lambda row: row.drafting.drafter, right=False),
    Column("decoding", lambda row: row.drafting.decoding or "greedy", right=False),
    Column("batch", lambda row: row.drafting.batch.removeprefix("batch ") or "1"),
    _SETTING,
    Column("n", lambda row: str(row.examples)),
    Column("prompt\ntokens", lambda row: number(row.prompt_tokens, 0)),
    *_NUMBERS,
    Column("mark", lambda row: "\n".join(row.marks), right=False, optional=True),
)
SCREEN = (
    Column("task\ndrafter", lambda row: lines(row.task, *row.drafting, *row.marks), right=False),
    _SETTING,
    Column("n\nprompt", lambda row: lines(str(row.examples), number(row.prompt_tokens, 0))),
    *_NUMBERS,
)
COMPACT = (SCREEN[0], *_NUMBERS[1:3], *_NUMBERS[4:])


def grids(rows: Sequence[Row]) -> list[Grid]:
    """One table for each model and device with drafters to compare, a row for each run; a dash was not measured."""
    shown = _shown(rows)
    return grids_of(shown, _columns(shown), TITLE)


def screen_grids(rows: Sequence[Row], *, compact: bool) -> list[Grid]:
    """The same in fewer columns, what says which run it is stacked in the first."""
    return grids_of(_shown(rows), COMPACT if compact else SCREEN, TITLE)


def _shown(rows: Sequence[Row]) -> list[Row]:
    return [row for members in compared(rows).values() for row in members]


def _columns(shown: Sequence[Row]) -> list[Column]:
    """FULL without decoding and batch size where these are the usual ones everywhere."""
    usual = {"decoding"} if not any(row.drafting.decoding for row in shown) else set()
    usual |= {"batch"} if not any(row.drafting.batch for row in shown) else set()
    return [column for column in FULL if column.name not in usual]


def cautions(rows: Sequence[Row]) -> list[str]:
    """What forced acceptance does not say, where any of the runs has it."""
    return [FORCED_NOTE] if any(row.forced for row in rows) else []


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as plain numbers with whole histograms ("1:12 2:4"), a mapping for each run."""
    return [plain(_values(row)) for row in _shown(rows)]


def _values(row: Row) -> dict[str, Any]:
    flat: dict[str, Any] = {
        **described(row),
        "drafter": row.drafting.drafter,
        "decoding": row.drafting.decoding or "greedy",
        "batch_size": row.drafting.batch.removeprefix("batch ") or "1",
        "examples": row.examples,
        "prompt_tokens_median": row.prompt_tokens,
    }
    for arm in ARMS:
        flat |= {
            f"{arm}_draft_tokens_per_step": row.drafted("tokens_per_step", arm),
            f"{arm}_draft_accepted": row.drafted("accepted", arm),
            f"{arm}_draft_time_share": row.drafted("time_share", arm),
            f"{arm}_acceptance_length": row.acceptance_length(arm),
            f"{arm}_acceptance_length_per_request": row.request_acceptance_length(arm),
            f"{arm}_histogram": " ".join(f"{new}:{count}" for new, count in enumerate(row.histogram(arm)) if count),
        }
    for name in ("dense_vs_ar", "sparse_vs_ar", "sparse_vs_dense"):
        flat |= bounds(name, getattr(row, name))
    return flat
