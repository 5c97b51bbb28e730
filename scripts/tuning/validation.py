"""The chosen setting against the default on examples that tuning never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from harness.fields import ConfigError
from scripts.tuning.measure import Estimate, Table, against
from tasks.base import Example, TaskError


@dataclass(frozen=True, slots=True)
class HeldBack:
    """Where the examples for validation start (`task.offset`), and how many there are."""

    offset: int
    examples: int


def held_back(
    stream: Iterable[Example],
    tuned: Sequence[Example],
    ready: Callable[[int], Sequence[Example]],
    start: int,
    wanted: int,
) -> HeldBack:
    """The first offset from which no example shares a cluster with those that settings are tuned on.

    Args:
        stream: every example of the source from `start` on.
        tuned: the examples to tune on.
        ready: offset -> the examples that a run from there would use; raises TaskError where there are none.
        start: offset of the tuning examples.
        wanted: how many examples to validate on.

    Raises:
        ConfigError: there are not that many.
    """
    places = {example.id: place for place, example in enumerate(stream)}
    used = {example.cluster for example in tuned}
    place = max(places[example.id] for example in tuned) + 1
    while True:
        try:
            found = list(ready(start + place))
        except TaskError:
            found = []
        shared = [example for example in found if example.cluster in used]
        if not shared:
            break
        place = places[shared[-1].id] + 1
    if len(found) < wanted:
        raise ConfigError(
            f"--validate={wanted}: {len(found)} examples are left beyond the {len(tuned)} to tune on; choose at most "
            f"that, 0 for none, or fewer --examples"
        )
    return HeldBack(start + place, len(found))


@dataclass(frozen=True, slots=True)
class Verdict:
    """Tuned against default on the same held-back examples.

    Attributes:
        default, tuned: (speed-up, loss) of each.
        speed: ratio of the two speed-ups.
        loss: tuned less default.
        examples, clusters: that were measured.
    """

    default: tuple[Estimate, Estimate]
    tuned: tuple[Estimate, Estimate]
    speed: Estimate
    loss: Estimate
    examples: int
    clusters: int

    @property
    def beats(self) -> bool:
        """Faster beyond its 95% interval, at equal or smaller loss by the point estimate."""
        return self.speed.ci is not None and self.speed.ci[0] > 1 and self.loss.value <= 0

    def words(self) -> str:
        """What was found, plainly."""
        rest = f"on {self.examples} held-back examples ({self.clusters} clusters)"
        faster, safe = self.speed.value > 1, self.loss.value <= 0
        if self.beats:
            unsure = self.loss.ci is None or self.loss.ci[1] > 0
            more = ", though the interval of the loss does not exclude a larger one" if unsure else ""
            return f"tuned beats the default {rest}: faster, at equal or smaller loss{more}"
        if faster and safe:
            return f"tuned is ahead of the default {rest}, but its speed is within the interval of chance"
        if faster:
            return f"tuned does not beat the default {rest}: faster, but its loss is larger"
        return f"tuned does not beat the default {rest}: it is not faster" + ("" if safe else " and loses more")

    def plain(self) -> dict[str, Any]:
        """As JSON keeps it."""
        pairs = {"default": self.default, "tuned": self.tuned}
        return {
            "examples": self.examples,
            "clusters": self.clusters,
            **{name: {"speed": one.plain(), "loss": two.plain()} for name, (one, two) in pairs.items()},
            "speed_ratio": self.speed.plain(),
            "loss_difference": self.loss.plain(),
            "beats": self.beats,
            "verdict": self.words(),
        }


def judge(default: Table, tuned: Table) -> Verdict:
    """Compare two whole runs, paired by example."""
    speed, loss = against(tuned, default)
    sides = [(table.speed(), table.loss()) for table in (default, tuned)]
    return Verdict(sides[0], sides[1], speed, loss, len(tuned), len(set(tuned.clusters)))
