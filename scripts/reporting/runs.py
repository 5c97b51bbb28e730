"""The table of all runs, and what the page tells of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from harness.evidence import StoredRun
from harness.evidence.labels import data_label, flatten, name_of, natural, task_label
from harness.evidence.rows import Estimate, Row
from scripts.cells import NOTHING, number, percent
from scripts.reporting import charts
from scripts.reporting.overview import Runs, minute, quality_difference, quality_floor, reference_difference

_NOT_TOLD = ("results_dir", "rerun", "stale", "track", "hydra", "file_hashes")


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: its text, a second line below, and what it is sorted by (None comes last in either direction)."""

    text: str
    below: str = ""
    key: float | str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table of runs: a `number` is sorted as such and set to the right, a `text` can be searched."""

    title: str
    hint: str
    kind: Literal["text", "number", "time"]
    cell: Callable[[Row, StoredRun], Cell]


@dataclass(frozen=True, slots=True)
class Difference:
    """A key of the configuration, its value, and the value that most peers have, or all that they have."""

    key: str
    value: str
    usual: str


@dataclass(frozen=True, slots=True)
class Detail:
    """All that is told of one run."""

    row: Row
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...]
    peers: int
    config: str
    provenance: tuple[tuple[str, str], ...]
    histograms: tuple[charts.Histogram, ...]
    stacks: tuple[charts.Stack, ...]
    components: tuple[tuple[str, list[float | None]], ...]
    paths: tuple[tuple[str, int], ...]


def _text(value: Callable[[Row], str]) -> Callable[[Row, StoredRun], Cell]:
    return lambda row, _: Cell(value(row), key=value(row))


def _plain(value: Callable[[Row], float | None], digits: int) -> Callable[[Row, StoredRun], Cell]:
    return lambda row, _: Cell(number(value(row), digits), key=value(row))


def _estimate(value: Callable[[Row], Estimate]) -> Callable[[Row, StoredRun], Cell]:
    return lambda row, _: estimated(value(row))


def estimated(value: Estimate, digits: int = 2, *, sign: bool = False, scale: float = 1.0) -> Cell:
    """A value above its 95% interval."""
    if value.value is None:
        return Cell(NOTHING)
    bounds = [number(scale * bound, digits, sign=sign) for bound in value.ci or ()]
    below = f"[{', '.join(bounds)}]" if bounds else ""
    return Cell(number(scale * value.value, digits, sign=sign), below, scale * value.value)


def _difference(block: Callable[[Row, StoredRun], Mapping[str, Any]], digits: int) -> Callable[[Row, StoredRun], Cell]:
    def cell(row: Row, run: StoredRun) -> Cell:
        told = block(row, run)
        bounds, least = told.get("ci95"), told.get("mdd")
        shown = estimated(Estimate(told.get("delta"), tuple(bounds) if bounds else None), digits, sign=True)
        parts = [shown.below, f"\u00b1{number(least, digits)}" if least is not None else ""]
        return Cell(shown.text, " ".join(part for part in parts if part), shown.key)

    return cell


COLUMNS = (
    Column("task", "task and data", "text", lambda row, _: Cell(row.task, row.data, f"{row.task} {row.data}")),
    Column("model", "model", "text", _text(lambda row: row.model)),
    Column("setting", "what is sparse, and what else tells the run from its peers", "text", _text(lambda r: r.setting)),
    Column("drafter", "who drafts, decoding, batch", "text", _text(lambda row: ", ".join(filter(None, row.drafting)))),
    Column("status", "ok, partial, invalid or failed", "text", _text(lambda row: row.status)),
    Column("marks", "what to know before use", "text", _text(lambda r: ", ".join(m for m in r.marks if m != r.status))),
    Column("n", "examples", "number", _plain(lambda row: row.examples, 0)),
    Column("AL", "new tokens per verification of the sparse arm", "number", _plain(lambda row: row.acceptance, 2)),
    Column("dense / AR", "ratio of decoding throughputs", "number", _estimate(lambda row: row.dense_vs_ar)),
    Column("sparse / AR", "ratio of decoding throughputs", "number", _estimate(lambda row: row.sparse_vs_ar)),
    Column("sparse / dense", "ratio of decoding throughputs", "number", _estimate(lambda row: row.sparse_vs_dense)),
    Column("limit", "the most that sparse / dense could be, by bytes", "number", _plain(lambda row: row.limit, 2)),
    Column("quality", "sparse less dense, points; \u00b1 detectable", "number", _difference(quality_difference, 1)),
    Column("floor", "dense less AR, points; \u00b1 detectable", "number", _difference(quality_floor, 1)),
    Column(
        "log-prob",
        "of the reference, sparse less dense, nats per token; \u00b1 detectable",
        "number",
        _difference(reference_difference, 4),
    ),
    Column(
        "agreement %",
        "tokens of the dense output that sparse verification would choose too",
        "number",
        lambda row, _: estimated(row.agreement, 1, scale=100.0),
    ),
    Column("start", "UTC", "time", lambda row, _: Cell(minute(row.start), key=row.start)),
)


def columns(rows: Sequence[Row], runs: Runs) -> list[Column]:
    """Those of COLUMNS that say something of any run."""
    return [
        column
        for column in COLUMNS
        if any(column.cell(row, runs[row.fingerprint]).text not in ("", NOTHING) for row in rows)
    ]


def details(rows: Sequence[Row], runs: Runs, shown: Sequence[Column] = COLUMNS) -> list[Detail]:
    """What the page tells of each run, in the order of the rows; cells of the columns `shown`."""
    flat = {row.fingerprint: _told(row) for row in rows}
    peers: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        peers.setdefault(_place(row), []).append(row.fingerprint)
    found = []
    for row in rows:
        members = [flat[name] for name in peers[_place(row)]]
        cells = tuple(column.cell(row, runs[row.fingerprint]) for column in shown)
        found.append(_detail(row, runs[row.fingerprint], flat[row.fingerprint], members, cells))
    return found


def _detail(
    row: Row, run: StoredRun, own: dict[str, Any], members: Sequence[dict[str, Any]], cells: tuple[Cell, ...]
) -> Detail:
    stacked = charts.stacks(row)
    paths = (run.summary or {}).get("paths") or {}
    return Detail(
        row=row,
        cells=cells,
        differences=tuple(differences(own, members)),
        peers=len(members),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        provenance=tuple(_provenance(run)),
        histograms=tuple(charts.histograms(row)),
        stacks=tuple(stacked),
        components=tuple(charts.components(stacked)),
        paths=tuple((str(name), int(count)) for name, count in paths.items()),
    )


def _told(row: Row) -> dict[str, Any]:
    return flatten({key: value for key, value in row.config.items() if key not in _NOT_TOLD})


def _place(row: Row) -> tuple[str, ...]:
    return task_label(row.config), data_label(row.config), name_of(row.config, "model")


def differences(own: dict[str, Any], members: Sequence[dict[str, Any]]) -> list[Difference]:
    """The keys of a flat configuration whose value less than most of the peers have, and what these have.

    Args:
        members: flat configurations of the same task, data and model, `own` among them; those that lack a key do not
            count for it.
    """
    found = []
    for key, value in own.items():
        counts = Counter(str(member[key]) for member in members if key in member)
        if len(counts) > 1 and 2 * counts[str(value)] <= counts.total():
            (first, most), *_ = others = [item for item in counts.most_common() if item[0] != str(value)]
            names = [first] if 2 * most > counts.total() else sorted((name for name, _ in others), key=natural)
            found.append(Difference(key, str(value), ", ".join(names)))
    return found


def _provenance(run: StoredRun) -> list[tuple[str, str]]:
    """Everything but packages and command line, which the page tells elsewhere."""
    proven = {key: value for key, value in run.provenance.items() if key not in ("packages", "argv")}
    told = [(key.replace("_", " "), value) for key, value in flatten(proven).items() if value not in (None, "", [])]
    return [(key, percent(value, 0) if key == "other load" else str(value)) for key, value in told]
