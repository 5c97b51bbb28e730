"""The worst examples of a run: what dense and sparse verification wrote, and where they part (METHOD section 8)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from harness.evidence import Record, RecordError, StoredRun
from harness.evidence.metrics import first_difference
from harness.evidence.records import complete
from harness.evidence.rows import Row

LOSS, EARLY = "largest loss", "parts earliest"


@dataclass(frozen=True, slots=True)
class Text:
    """An output: what both arms share, the first word that differs, the rest; `ends` where the other one goes on."""

    same: str
    parting: str = ""
    rest: str = ""
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Pair:
    """One example side by side.

    Attributes:
        why: LOSS, EARLY or both.
        place: index of the first differing token, the one of the prefill being 0; None where all are equal.
        lengths: tokens, dense and sparse.
        tokens: ids of the tokens at `place`, None behind the end; empty where texts are left out.
        grades: name, dense and sparse.
        texts: dense and sparse; None where they are left out.
    """

    example: str
    why: tuple[str, ...]
    prompt_tokens: int
    place: int | None
    lengths: tuple[int, int]
    tokens: tuple[int | None, ...]
    loss: float | None
    grades: tuple[tuple[str, float, float], ...]
    texts: tuple[Text, Text] | None


@dataclass(frozen=True, slots=True)
class Worst:
    """The worst examples of a run, and how many of all there are on either side."""

    row: Row
    pairs: tuple[Pair, ...]
    examples: int
    lost: int
    gained: int
    identical: int


def records_of(run: StoredRun) -> list[Record]:
    """The records of a run as far as they can be read; none where there is no file. Changes nothing on disk."""
    try:
        lines = (run.path / "records.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        try:
            records.append(Record.from_json(json.loads(line)))
        except (json.JSONDecodeError, RecordError):
            break
    return records


def worst(row: Row, run: StoredRun, *, most: int, texts: bool) -> Worst | None:
    """The `most` examples of the largest loss and as many that part earliest; None without records of both arms.

    Where tokens are drawn at random outputs part by chance, so that only the losses are shown.
    """
    both = list(complete(records_of(run), ("dense", "sparse")).values())
    if not row.counted or not both:
        return None
    pairs = [_pair(arms["dense"], arms["sparse"], row.metric, texts=texts) for arms in both]
    losing = [pair for pair in pairs if pair.loss is not None and pair.loss > 0]
    losing.sort(key=lambda pair: -(pair.loss or 0.0))
    parting = [pair for pair in pairs if pair.place is not None and row.divergence is not None]
    parting.sort(key=lambda pair: (pair.place or 0, -(pair.loss or 0.0)))
    chosen: dict[str, tuple[Pair, list[str]]] = {}
    for why, ranked in ((LOSS, losing), (EARLY, parting)):
        for pair in ranked[:most]:
            chosen.setdefault(pair.example, (pair, []))[1].append(why)
    shown = [replace(pair, why=tuple(why)) for pair, why in chosen.values()]
    gained = sum(1 for pair in pairs if pair.loss is not None and pair.loss < 0)
    return Worst(row, tuple(shown), len(pairs), len(losing), gained, sum(pair.place is None for pair in pairs))


def _pair(dense: Record, sparse: Record, metric: str, *, texts: bool) -> Pair:
    place = first_difference(dense.output_ids, sparse.output_ids)
    ids = [_at(record.output_ids, place) for record in (dense, sparse)] if texts and place is not None else []
    grades = tuple((name, value, sparse.grade[name]) for name, value in dense.grade.items() if name in sparse.grade)
    known = metric in dense.grade and metric in sparse.grade
    return Pair(
        example=dense.example_id,
        why=(),
        prompt_tokens=dense.prompt_tokens,
        place=place,
        lengths=(len(dense.output_ids), len(sparse.output_ids)),
        tokens=tuple(ids),
        loss=dense.grade[metric] - sparse.grade[metric] if known else None,
        grades=grades,
        texts=parted(dense.text, sparse.text) if texts else None,
    )


def _at(ids: Sequence[int], place: int) -> int | None:
    return ids[place] if place < len(ids) else None


def parted(dense: str, sparse: str) -> tuple[Text, Text]:
    """Both texts cut behind the last whole word that they share and behind the first word that differs."""
    if dense == sparse:
        return Text(dense), Text(sparse)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(dense, sparse, strict=False)))
    if any(shared < len(text) and not text[shared].isspace() for text in (dense, sparse)):
        shared -= len(re.search(r"\S*$", dense[:shared]).group())  # type: ignore[union-attr]
    return _cut(dense, shared), _cut(sparse, shared)


def _cut(text: str, shared: int) -> Text:
    word = re.match(r"\s*\S*", text[shared:])
    stop = shared + (word.end() if word else 0)
    return Text(text[:shared], text[shared:stop], text[stop:], ends=stop == shared)
