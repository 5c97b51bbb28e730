"""Two numbers of a trial, its speed-up and its loss, and what differs between two trials on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from harness.evidence import bootstrap
from harness.evidence.bootstrap import Floats, Interval
from harness.evidence.differences import timed_together
from harness.evidence.records import Record, complete
from harness.fields import ConfigError

Speed = Literal["ar", "dense"]
Loss = Literal["kl", "agreement", "reference", "quality"]
LOSSES: Mapping[str, str] = {
    "kl": "KL to dense, nats per token",
    "agreement": "share of tokens that differ from dense",
    "reference": "lost log-probability of the reference, nats per token",
    "quality": "lost quality, points",
}
LEVEL = 0.95
ONE_SE = 0.6827
"""Level of an interval of one standard error to both sides; `bootstrap.interval` widens it where clusters are few."""

_RESAMPLES_OF_ONE_SE = 1000


class NotMeasured(ConfigError):
    """The records of a whole run hold no loss; one line."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval, None with fewer than two clusters."""

    value: float
    ci: Interval | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {"value": self.value, "ci95": None if self.ci is None else list(self.ci)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Estimate:
        """The inverse of `plain`."""
        bounds = plain.get("ci95")
        return cls(float(plain["value"]), None if bounds is None else (float(bounds[0]), float(bounds[1])))


@dataclass(frozen=True, slots=True)
class Table:
    """What a trial measured per example.

    Attributes:
        names: example ids.
        clusters: a label for each; examples of one label were timed together or share an article.
        columns: [examples, 6] tokens and seconds of the sparse arm, tokens and seconds of the baseline, summed loss and
            its weight.
    """

    names: tuple[str, ...]
    clusters: tuple[str, ...]
    columns: Floats

    def __len__(self) -> int:
        return len(self.names)

    def check(self, loss: str) -> Table:
        """The same table; raises NotMeasured where no example weighs anything."""
        if not self.columns[:, 5].sum() > 0:
            raise NotMeasured(f"--loss={loss}: the runs did not measure it; use analysis=fidelity or another loss")
        return self

    def totals(self) -> Floats:
        """[clusters, 6]."""
        return bootstrap.cluster_totals(self.columns, list(self.clusters))

    def speed(self) -> Estimate:
        """Ratio of the pooled throughputs."""
        return _estimate(self.totals()[:, :4], bootstrap.ratio_of_rates)

    def loss(self) -> Estimate:
        """Pooled loss."""
        return _estimate(self.totals()[:, 4:], bootstrap.mean_difference)


@dataclass(frozen=True, slots=True)
class Measure:
    """Which speed-up and which loss: `metric` is the primary one of the task (loss=quality)."""

    speed: Speed
    loss: Loss
    metric: str

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that both need; a loss compares with dense."""
        return ("ar", "dense", "sparse") if self.speed == "ar" else ("dense", "sparse")

    def table(self, records: Sequence[Record]) -> Table:
        """The examples that have every arm."""
        rows = list(complete(list(records), self.arms).values())
        columns = [self._row(arms) for arms in rows]
        clusters = timed_together([arms["sparse"] for arms in rows])
        names = tuple(arms["sparse"].example_id for arms in rows)
        return Table(names, tuple(clusters), np.array(columns, dtype=np.float64).reshape(len(rows), 6))

    def _row(self, arms: Mapping[str, Record]) -> tuple[float, ...]:
        sparse, base = arms["sparse"], arms[self.speed]
        return (sparse.tokens, sparse.seconds, base.tokens, base.seconds, *self._lost(sparse, arms["dense"]))

    def _lost(self, sparse: Record, dense: Record) -> tuple[float, float]:
        """Summed loss of an example and its weight; an example on which nothing could be compared weighs nothing."""
        if self.loss == "quality":
            return dense.grade[self.metric] - sparse.grade[self.metric], 1.0
        if self.loss == "reference":
            pairs = [dense.reference.get("logprob"), sparse.reference.get("logprob"), sparse.reference.get("tokens")]
            before, after, tokens = pairs
            return (0.0, 0.0) if before is None or after is None or not tokens else (before - after, float(tokens))
        tokens, lost = sparse.fidelity.get("tokens"), sparse.fidelity.get("kl")
        if self.loss == "agreement" and tokens:
            agreeing = sparse.fidelity.get("agreeing")
            lost = None if agreeing is None else tokens - agreeing
        return (0.0, 0.0) if lost is None or not tokens else (float(lost), float(tokens))


def against(left: Table, right: Table, *, level: float = LEVEL) -> tuple[Estimate, Estimate]:
    """(ratio of the speed-ups, difference of the losses) of two trials on the examples that both have.

    Each trial's speed-up is over its own baseline, so that a machine that was slower for one of them does not count.
    """
    places = {name: index for index, name in enumerate(right.names)}
    shared = [index for index, name in enumerate(left.names) if name in places]
    others = [places[left.names[index]] for index in shared]
    columns = np.hstack([left.columns[shared], right.columns[others]])
    totals = bootstrap.cluster_totals(columns, [left.clusters[index] for index in shared])
    return _estimate(totals, _ratio_of_speeds, level), _estimate(totals, _difference_of_losses, level)


def excess(table: Table, default: Table, limit: float | None, *, level: float = ONE_SE) -> Estimate:
    """By how much a loss is above `limit`, with an interval, of one standard error unless another level is asked for.

    None stands for the loss of the default setting, compared on the examples that both have.
    """
    if limit is None:
        return against(table, default, level=level)[1]
    loss = _estimate(table.totals()[:, 4:], bootstrap.mean_difference, level)
    return Estimate(loss.value - limit, None if loss.ci is None else (loss.ci[0] - limit, loss.ci[1] - limit))


def _ratio_of_speeds(totals: Floats) -> Floats:
    """[..., 12] -> [...]."""
    ratio: Floats = bootstrap.ratio_of_rates(totals[..., :4]) / bootstrap.ratio_of_rates(totals[..., 6:10])
    return ratio


def _difference_of_losses(totals: Floats) -> Floats:
    """[..., 12] -> [...]."""
    return bootstrap.mean_difference(totals[..., 4:6]) - bootstrap.mean_difference(totals[..., 10:12])


def _estimate(totals: Floats, statistic: bootstrap.Statistic, level: float = LEVEL) -> Estimate:
    value = float(statistic(totals.sum(axis=0)))
    resamples = bootstrap.RESAMPLES if level == LEVEL else _RESAMPLES_OF_ONE_SE
    return Estimate(value, bootstrap.interval(totals, statistic, level=level, resamples=resamples))
