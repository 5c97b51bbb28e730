"""What one arm did on one example, as it is written to records.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class RecordError(ValueError):
    """A stored record does not have the fields or the types of a `Record`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One example decoded by one arm.

    `output_ids` holds the kept new tokens. The first of them comes from the prefill that all arms share and is charged
    to `ttft_seconds`, so `tokens` = len(output_ids) - 1 tokens were decoded within `seconds`. `histogram[i]` counts the
    steps that yielded i new tokens, the bonus token included (METHOD section 8). `component_seconds` splits the time of
    verification, `density` says per axis what was read of what dense execution reads, `layer_density` the same layer by
    layer; `unique_experts` counts distinct routed experts per step of each MoE layer, `pairs` (token, expert) pairs by
    fate, `stale` steps by the age of the selection they reused. `fidelity` and `selections` come from the untimed
    replay of the dense trajectory; `reference` counts the `tokens` of the reference answer and sums their `logprob`
    in nats under this arm's verification. Examples of one `wave` were decoded in shared steps: they share seconds and
    bytes, and the counts `paths`, `pairs` and `stale` of all of them stand in the first one's record. `drafted` counts
    draft tokens.
    """

    example_id: str
    arm: str
    output_ids: tuple[int, ...]
    text: str
    grade: dict[str, float]
    seconds: float
    ttft_seconds: float
    steps: int
    histogram: tuple[int, ...]
    paths: dict[str, int]
    prompt_sha: str
    prompt_tokens: int
    truncated_tokens: int = 0
    cluster: str = ""
    wave: str = ""
    drafted: int = 0
    step_ms: tuple[float, ...] = ()
    draft_seconds: float = 0.0
    accept_seconds: float = 0.0
    component_seconds: dict[str, float] = field(default_factory=dict)
    density: dict[str, float | None] = field(default_factory=dict)
    layer_density: dict[str, list[float | None]] = field(default_factory=dict)
    unique_experts: list[float] = field(default_factory=list)
    pairs: dict[str, int] = field(default_factory=dict)
    stale: dict[str, int] = field(default_factory=dict)
    fidelity: dict[str, float | None] = field(default_factory=dict)
    selections: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)
    bytes_per_step: float | None = None
    flops_per_step: float | None = None

    @property
    def tokens(self) -> int:
        """Tokens decoded after the prefill, from the histogram."""
        return sum(new * count for new, count in enumerate(self.histogram))

    @property
    def group(self) -> str:
        """Cluster that is resampled as a whole; the example itself where none was named."""
        return self.cluster or self.example_id

    def to_json(self) -> dict[str, Any]:
        """Plain types only; `from_json` is the exact inverse."""
        row = {name: getattr(self, name) for name in self.__slots__}
        for name in _SEQUENCES:
            row[name] = list(row[name])
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Record:
        """Read one line's object back.

        Raises:
            RecordError: it is no object, a required field is missing, or a sequence or mapping has another type.
        """
        if not isinstance(row, Mapping):
            raise RecordError(f"unreadable record: {row!r} is no object")
        known = {name: row[name] for name in cls.__slots__ if name in row}
        try:
            for name in _SEQUENCES:
                if name in known:
                    known[name] = tuple(known[name])
            for name in _MAPPINGS:
                if name in known:
                    known[name] = dict(known[name])
            return cls(**known)
        except (TypeError, ValueError) as error:
            raise RecordError(f"unreadable record of example {row.get('example_id')!r}: {error}") from None


_SEQUENCES = ("output_ids", "histogram", "step_ms")
_MAPPINGS = (
    "grade",
    "paths",
    "component_seconds",
    "density",
    "layer_density",
    "pairs",
    "stale",
    "fidelity",
    "selections",
    "reference",
)


def complete(records: list[Record], arms: tuple[str, ...]) -> dict[str, dict[str, Record]]:
    """Examples that have a record of every arm: {example_id: {arm: Record}}, in the order of first appearance."""
    by_example: dict[str, dict[str, Record]] = {}
    for record in records:
        by_example.setdefault(record.example_id, {})[record.arm] = record
    return {key: rows for key, rows in by_example.items() if all(arm in rows for arm in arms)}
