"""The exactness ladder for every drafter, chain and tree, alone and in a batch (DESIGN section 5, steps 1 and 4)."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from harness.engine.acceptance_sampled import Sampled
from harness.engine.decoding import Decoded, Decoder, Prefix, StopRule
from harness.engine.drafting.base import Drafter
from harness.engine.drafting.oracle import OracleDrafter
from harness.engine.model.step import Segment
from harness.engine.model.verification import Verification
from harness.engine.sampling import Sampling, distribution
from sparse.budget import Sparsity
from sparse.cost import trace_bytes, trace_flops
from tests.drafters import CASES, GROWTHS, LAYERS, Case, target
from tests.engine.tiny import library_model, repetitive_prompt

DENSE = Sparsity()
NEW = 26
LENGTHS = (110, 61, 150, 83, 97, 72)
SAMPLING = Sampling(temperature=0.8, top_k=4)
DRAWS = 240


@cache
def generated(row: int) -> list[int]:
    """What the library's generate() says after the prompt of a row."""
    prompt = repetitive_prompt(LENGTHS[row], row)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = library_model("llama", num_hidden_layers=LAYERS).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def prefixes(engine: Decoder, rows: int) -> list[Prefix]:
    return [engine.prefill(repetitive_prompt(LENGTHS[row], row), row) for row in range(rows)]


def drafted(case: Case, form: str, rows: int, batch: int) -> list[Decoded]:
    """Greedy decodes of ``rows`` prompts, ``batch`` of them at a time, twice: drafters are reset in between."""
    made = target(rows)
    engine, drafters = made.decoder(batch), case.make(made, rows, GROWTHS[form], None)
    prompts = prefixes(engine, rows)
    tell(drafters)
    first = engine.decode_all(prompts, drafters, DENSE, NEW)
    again = engine.decode_all(prompts, drafters, DENSE, NEW)
    assert [one.output for one in again] == [one.output for one in first]
    return again


def tell(drafters: list[Drafter]) -> None:
    for row, drafter in enumerate(drafters):
        if isinstance(drafter, OracleDrafter):
            drafter.expect(generated(row))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("form", GROWTHS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_output_is_that_of_generate(case: Case, form: str, batch: int) -> None:
    """Ladder step 1. Six prompts in a batch of four: two enter when others have left."""
    rows = 1 if batch == 1 else len(LENGTHS)
    decoded = drafted(case, form, rows, batch)
    for row, one in enumerate(decoded):
        assert one.output == generated(row)
        assert sum(new * count for new, count in one.histogram.items()) == NEW - 1
        assert sum(one.histogram.values()) == len(one.step_seconds) == len(one.transcript)
        growth = GROWTHS[form]
        most = growth.size * (2 if case.name == "suffix and model" else 1)
        assert all(taken.draft.depth <= growth.depth and len(taken.draft) <= most for taken in one.transcript)
    proposed = [taken.draft for one in decoded for taken in one.transcript]
    assert any(len(draft) for draft in proposed) == (case.name != "none")
    if form == "tree" and case.name not in ("none",):
        assert any(not draft.is_chain for draft in proposed)
    if case.name == "the target as its own draft model" and form == "chain":
        full = [taken.kept == 1 + GROWTHS[form].depth for taken in decoded[0].transcript[:-2]]
        assert all(full) and len(full) > 2


def test_batches_share_time_and_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over the sequences of a batch are those of the loop, by a clock that ticks whenever it is read."""
    made, ticks, together = target(4), itertools.count(), list[list[int]]()
    shape, stop, begin = made.step.weights.shape, StopRule(), Verification.begin

    def note(run: Verification, rows: list[int], tokens: int) -> None:
        together.append(rows)
        begin(run, rows, tokens)

    engine = Decoder(made.step, made.cache, stop=stop, clock=lambda: float(next(ticks)), prefill_chunk=64, batch=3)
    case = next(case for case in CASES if case.name == "lookup")
    prompts, drafters = prefixes(engine, 4), case.make(made, 4, GROWTHS["chain"], None)
    monkeypatch.setattr(Verification, "begin", note)
    began = next(ticks)
    decoded = engine.decode_all(prompts, drafters, DENSE, NEW)
    elapsed = next(ticks) - began
    trace = decoded[0].trace
    assert all(one.trace is trace for one in decoded) and [one.leads for one in decoded] == [True, False, False, False]
    assert trace.rows == sum(1 + len(taken.draft) for one in decoded for taken in one.transcript)
    longest = max(len(one.step_seconds) for one in decoded)
    assert longest < trace.steps == len(together) < sum(map(len, together))
    for one in decoded:
        assert one.share == pytest.approx(len(one.step_seconds) / sum(map(len, together)))
    assert sum(one.share for one in decoded) == pytest.approx(1)
    assert sum(one.bytes for one in decoded) == pytest.approx(trace_bytes(shape, DENSE.attention, trace))
    assert sum(one.flops for one in decoded) == pytest.approx(trace_flops(shape, DENSE.attention, trace))

    left = [iter(one.step_seconds) for one in decoded]
    durations = [{next(left[row]) for row in rows} for rows in together]
    assert all(len(seen) == 1 for seen in durations) and not any(list(rest) for rest in left)
    seconds, own, around = sum(one.seconds for one in decoded), Counter[int](), 3 * len(decoded) + 3
    for rows, (duration,) in zip(together, durations, strict=True):
        own.update(dict.fromkeys(rows, duration / len(rows)))
    assert 0 < seconds - own.total() <= trace.steps + around, "a tick between steps, and a few around the loop"
    assert elapsed - around <= seconds <= elapsed
    loop = (seconds - len(decoded)) / own.total()  # each drafter took a tick for its prompt
    for row, one in enumerate(decoded):
        assert one.seconds == pytest.approx(1 + own[row] * loop) and one.ttft_seconds == prompts[row].seconds
    apart = sum(one.draft_seconds + one.accept_seconds for one in decoded)
    assert trace.steps < apart < seconds - sum(trace.seconds.values())


@cache
def truth() -> tuple[int, dict[tuple[int, int], float]]:
    """The prefill's token, and the target's own distribution over the two tokens after it."""
    made = target()
    prefix = made.decoder(rule=Sampled(SAMPLING)).prefill(repetitive_prompt(LENGTHS[0]), seed=5)

    def after(tokens: list[int]) -> torch.Tensor:
        made.cache.truncate(0, len(prefix.prompt))
        logits = made.step.run([Segment(0, [prefix.first, *tokens])], made.cache).logits
        return distribution(logits[-1:], SAMPLING)[0].double()

    pairs = {}
    first = after([])
    for one in first.nonzero().flatten().tolist():
        second = after([one])
        pairs |= {(one, two): float(first[one] * second[two]) for two in second.nonzero().flatten().tolist()}
    return prefix.first, pairs


def draws(case: Case, form: str, batch: int, sample: Sampling | None, count: int) -> Counter[tuple[int, int]]:
    """The two tokens after the prefill's, drawn ``count`` times with different seeds."""
    made = target(batch)
    engine = made.decoder(batch, Sampled(SAMPLING))
    drafters = case.make(made, batch, GROWTHS[form], sample)
    tell(drafters)
    prompts = [engine.prefill(repetitive_prompt(LENGTHS[0]), row, seed=5) for row in range(batch)]
    assert all(prefix.first == truth()[0] for prefix in prompts)
    found: Counter[tuple[int, int]] = Counter()
    for start in range(0, count, batch):
        seeded = [replace(prefix, seed=1000 + start + row) for row, prefix in enumerate(prompts)]
        for one in engine.decode_all(seeded, drafters, DENSE, 5):
            found[one.output[1], one.output[2]] += 1
    return found


def p_value(found: Counter[tuple[int, int]]) -> float:
    """Chi-square of the drawn pairs against the target's own distribution; rare pairs are pooled."""
    pairs, total = truth()[1], found.total()
    assert set(found) <= set(pairs), "a token of probability zero was drawn"
    common = {pair for pair, share in pairs.items() if share * total >= 5}
    cells = [(found[pair], pairs[pair] * total) for pair in common]
    rest = (total - sum(seen for seen, _ in cells), total - sum(expected for _, expected in cells))
    cells += [rest] if rest[1] >= 1 else []
    statistic = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


WAYS = [(case, drawn) for case in CASES for drawn in ((False, True) if case.draws else (False,))]


def way(value: object) -> str | None:
    return value.name if isinstance(value, Case) else {True: "drawn", False: "chosen"}.get(value)  # type: ignore[call-overload]


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("form", [pytest.param("chain", marks=pytest.mark.slow), "tree"])
@pytest.mark.parametrize("case, drawn", WAYS, ids=way)
def test_sampled_output_has_the_targets_distribution(case: Case, form: str, drawn: bool, batch: int) -> None:
    """Ladder step 4, through the whole decoder; tests/engine/test_acceptance.py has the long runs over a toy target."""
    found = draws(case, form, batch, SAMPLING if drawn else None, DRAWS)
    assert p_value(found) > 0.001


def test_a_distribution_that_is_not_the_targets_is_found_out() -> None:
    """The same test with another temperature: it can fail."""
    made = target()
    engine = made.decoder(rule=Sampled(replace(SAMPLING, temperature=1.6)))
    prefix = made.decoder(rule=Sampled(SAMPLING)).prefill(repetitive_prompt(LENGTHS[0]), seed=5)
    found: Counter[tuple[int, int]] = Counter()
    drafter = next(case for case in CASES if case.name == "none").make(made, 1, GROWTHS["chain"], None)[0]
    for seed in range(DRAWS):
        one = engine.decode(replace(prefix, seed=seed), drafter, DENSE, 3)
        found[one.output[1], one.output[2]] += 1
    assert p_value(found) < 1e-6


@pytest.mark.parametrize("form", GROWTHS)
def test_draws_depend_on_the_example_alone(form: str) -> None:
    """Seeds per example: neither the batch nor the order of the examples changes what is drawn."""
    case = next(case for case in CASES if case.name == "model")

    def outputs(order: list[int], batch: int) -> dict[int, list[int]]:
        made = target(len(order))
        engine = made.decoder(batch, Sampled(SAMPLING))
        prompts = [
            engine.prefill(repetitive_prompt(LENGTHS[number], number), row, seed=77 + number)
            for row, number in enumerate(order)
        ]
        drafters = case.make(made, len(order), GROWTHS[form], SAMPLING)
        decoded = engine.decode_all(prompts, drafters, DENSE, NEW)
        return {number: one.output for number, one in zip(order, decoded, strict=True)}

    alone = outputs([0, 1, 2, 3], 1)
    assert outputs([3, 1, 0, 2], 3) == alone and outputs([2, 0], 2) == {2: alone[2], 0: alone[0]}
    assert len({tuple(output) for output in alone.values()}) == 4
