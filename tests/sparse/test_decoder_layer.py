"""The kernels for halves of decoder layers against the naive reference; memory that nothing may read is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparse.budget import AttentionBudget
from sparse.ops.decoder_layer import naive, native, structures
from sparse.ops.decoder_layer.native import MIX, PAGE, PROJECT
from sparse.scoring import block_scores
from sparse.selection import Selection
from sparse.tree import survival_weights
from tests.sparse.decoder_layers import (
    NAN,
    TOLERANCE,
    FeedForward,
    Half,
    OneSequence,
    attend,
    attention,
    feed_forward,
    need,
    normal,
    random_tree,
    segments_of,
    worst_row,
)

FORMATS = tuple(TOLERANCE)
ROWS = (1, 7, 16, 17, 33, 61)


@pytest.fixture(params=FORMATS, ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """A format that runs here."""
    need(request.param)
    torch.manual_seed(0)
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The number of threads for a test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    "outputs, inputs, bias",
    [(1, 1, False), (15, 33, True), (32, 48, True), (40, 50, False), (96, 31, False), (200, 576, True)],
)
def test_a_linear_map_equals_the_reference(
    outputs: int, inputs: int, bias: bool, paired: bool, dtype: torch.dtype
) -> None:
    """Every output within the rounding of its own terms, with and without a norm before, of a view too."""
    weight, norm = normal(outputs, inputs, dtype=dtype), normal(inputs, dtype=dtype)
    added = normal(outputs) if bias else None
    packed, truth = native.PackedLinear(weight, added, paired=paired), naive.Linear(weight, added)
    assert packed.paired == (paired and outputs % 32 == 0) and packed.outputs == outputs
    sizes = naive.Linear(weight.abs(), None if added is None else added.abs())
    limit = 1e-6 if dtype is torch.float32 else 1.01 * 2**-8
    assert packed(normal(0, inputs, dtype=dtype)).shape == (0, outputs)
    for count in ROWS:
        rows = normal(2 * count, inputs, dtype=dtype)[::2]
        found = packed(rows)
        assert found.dtype is dtype and found.shape == (count, outputs)
        assert ((found - truth(rows)).abs() <= limit * sizes(rows.abs())).all()
        normed = naive.normed(rows, norm, 1e-5)
        found = native.linear(packed, rows, norm, 1e-5)
        assert ((found - truth(normed)).abs() <= 2 * limit * sizes(normed.abs())).all()


def test_what_does_not_fit_is_refused(dtype: torch.dtype) -> None:
    packed = native.PackedLinear(normal(40, 50, dtype=dtype))
    for rows in (normal(3, 49, dtype=dtype), normal(3, 50).half(), normal(50, dtype=dtype), normal(1, 3, 50)):
        with pytest.raises(ValueError, match="do not fit"):
            packed(rows)
    with pytest.raises(ValueError, match="not packed as a pair"):
        native.FeedForwardLayer(normal(50), packed, packed, 1e-5)
    with pytest.raises(RuntimeError, match="do not run on this CPU"):
        native._check(2)
    with pytest.raises(MemoryError):
        native._check(3)


def test_what_the_kernels_fit() -> None:
    fits = {(dim, kind) for dim in (2, 7, 8, 32, 48, 64, 512, 544) for kind in FORMATS if native.fits(dim, kind, PAGE)}
    assert {dim for dim, kind in fits if kind is torch.bfloat16} == {32, 64, 512}
    assert {dim for dim, kind in fits if kind is torch.float32} == {2, 8, 32, 48, 64, 512}
    assert not native.fits(64, torch.float32, 128) and not native.available(torch.float64)
    assert [native.padded_rows(rows) for rows in (1, 16, 17)] == [16, 16, 32]


def poison_memory(half: Half) -> None:
    """What the kernels keep between calls becomes NaN."""
    attend(half, torch.full((70, half.hidden), NAN, dtype=half.dtype), [OneSequence(half, 600, 70)])


def check(half: Half, hidden: Tensor, sequences: list[OneSequence]) -> Tensor:
    """The kernels against the reference: what they add, and what they store. Returns the truth."""
    poison_memory(half)
    found = attend(half, hidden, sequences)
    truth = naive.attention_half(hidden, half.truth, [one.rows for one in sequences])
    assert worst_row(found, truth, hidden) < TOLERANCE[half.dtype]
    for one in sequences:
        stored, expected = one.stored((one.keys, one.values)).double(), one.stored(one.clean)
        errors = (stored - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert errors.max() < TOLERANCE[half.dtype]
    return truth


SHAPES = [
    # hidden, KV heads, groups, head_dim, head norms, biases
    (48, 1, 1, 64, False, True),
    (80, 2, 3, 64, True, False),
    (33, 1, 8, 128, False, False),
    (96, 3, 1, 128, True, True),
    (41, 2, 3, 8, True, True),
]
STEPS = [
    [(0, 7, "chain")],
    [(0, 33, "tree")],
    [(PAGE - 1, 1, "chain")],
    [(PAGE, 16, "chain")],
    [(PAGE - 3, 17, "tree")],
    [(2 * PAGE + 15, 61, "tree")],
    [(16, 16, "tree"), (15, 7, "chain"), (PAGE + 1, 1, "chain"), (0, 1, "chain"), (300, 17, "tree")],
]


def sequences_of(half: Half, step: list[tuple[int, int, str]]) -> list[OneSequence]:
    return [
        OneSequence(half, start, count, random_tree(count) if form == "tree" else None) for start, count, form in step
    ]


@pytest.mark.parametrize("step", STEPS, ids=str)
@pytest.mark.parametrize("hidden, kv_heads, groups, dim, norms, bias", SHAPES)
def test_dense_attention_equals_the_reference(
    hidden: int,
    kv_heads: int,
    groups: int,
    dim: int,
    norms: bool,
    bias: bool,
    step: list[tuple[int, int, str]],
    dtype: torch.dtype,
) -> None:
    if not native.fits(dim, dtype, PAGE):
        pytest.skip("heads of this size run in fp32 only")
    half = attention(dtype, hidden=hidden, kv_heads=kv_heads, groups=groups, head_dim=dim, norms=norms, bias=bias)
    sequences = sequences_of(half, step)
    states = normal(sum(one.count for one in sequences), hidden, dtype=dtype)
    truth = check(half, states, sequences)
    if any(one.tree for one in sequences):
        chains = [replace(one.rows, tree=None) for one in sequences]
        assert worst_row(naive.attention_half(states, half.truth, chains), truth, states) > 3 * TOLERANCE[dtype]


GIVEN = [
    # start, tokens, block size, blocks per KV head, of which count, whole blocks that the selection did not know
    (PAGE + 37, 7, 16, 6, (6, 1), 0),
    (2 * PAGE, 17, 16, 20, (3, 17), 2),
    (3 * PAGE - 1, 33, 32, 9, None, 3),
    (PAGE + 130, 61, 64, 3, (2, 1), 0),
    (140, 1, 64, 1, (0, 1), 0),
    (95, 16, 16, 3, None, 1),
]


@pytest.mark.parametrize("form", ["chain", "tree"])
@pytest.mark.parametrize("start, count, size, most, counts, unknown", GIVEN)
def test_given_blocks_are_all_that_is_read(
    start: int,
    count: int,
    size: int,
    most: int,
    counts: tuple[int, ...] | None,
    unknown: int,
    form: str,
    dtype: torch.dtype,
) -> None:
    """Unequal budgets, old tails, and NaN in every position that no one chose."""
    half = attention(dtype, norms=True)
    tail = (start // size - unknown) * size
    blocks = torch.stack([torch.randperm(tail // size)[:most] for _ in range(2)])
    valid = None if counts is None else torch.arange(most)[None] < torch.tensor(counts)[:, None]
    selection = Selection(blocks, valid, blocks.numel() if counts is None else sum(counts))
    tree = random_tree(count) if form == "tree" else None
    one = OneSequence(half, start, count, tree, selection, tail, size)
    chosen = selection.mask(tail // size).repeat_interleave(size, dim=1)
    unread = torch.zeros(2, one.keys.shape[0] * PAGE, dtype=torch.bool)
    unread[:, :tail] = ~chosen
    one.poison(unread)
    hidden = normal(count, half.hidden, dtype=dtype)
    truth = check(half, hidden, [one])
    for changed in (
        {"selection": None},
        {"selection": Selection((blocks + 1) % (tail // size), valid, 0)},
        *([{"tail": tail + size}] if unknown else []),
        *([{"selection": Selection(blocks, None, 0)}] if valid is not None else []),
    ):
        other = naive.attention_half(hidden, half.truth, [replace(one.rows, **changed)])
        assert worst_row(other, truth, hidden) > 3 * TOLERANCE[dtype]


CHOSEN = [
    # start, tokens, KV heads, groups, block size, kept, sinks, window
    (PAGE + 37, 7, 2, 3, 16, 5, 1, 1),
    (2 * PAGE + 16, 17, 1, 8, 32, 4, 0, 0),
    (900, 1, 3, 1, 64, 3, 2, 1),
    (PAGE * 19 + 5, 9, 1, 2, 16, 40, 0, 3),
]


@pytest.mark.parametrize("query", ["first", "mean", "weighted", "max"])
@pytest.mark.parametrize("score", structures.SCORES)
@pytest.mark.parametrize("gqa", ["mean", "max"])
@pytest.mark.parametrize("start, count, kv_heads, groups, size, kept, sinks, window", CHOSEN)
def test_the_kernel_chooses_the_best_blocks(
    start: int,
    count: int,
    kv_heads: int,
    groups: int,
    size: int,
    kept: int,
    sinks: int,
    window: int,
    gqa: str,
    score: str,
    query: str,
    dtype: torch.dtype,
) -> None:
    """By score, for the queries as they were stored; the others are not read."""
    half = attention(dtype, kv_heads=kv_heads, groups=groups)
    budget = AttentionBudget(
        topk=kept, block_size=size, sinks=sinks, window=window, gqa=gqa, score=score, query=query, survival=0.6
    )
    tree = random_tree(count)
    one = OneSequence(half, start, count, tree, block_size=size)
    summaries, whole = {name: one.summary(name, size) for name in budget.summaries}, start // size
    shares = survival_weights(count, 1.0 if query == "mean" else 0.6, torch.device("cpu"), tree)
    blocks = torch.full((kv_heads, kept), -1, dtype=torch.int64)
    hidden = normal(count, half.hidden, dtype=dtype)

    def run() -> Tensor:
        found, (segments, keep) = hidden.clone(), segments_of([one])
        first, *second = (stored.data_ptr() for stored in summaries.values())
        segments[0].summary, segments[0].second = first, second[0] if second else None
        segments[0].summary_stride = one.keys.shape[0] * PAGE // size
        segments[0].shares = shares.data_ptr() if query in ("mean", "weighted") else None
        segments[0].whole, segments[0].sinks, segments[0].window = whole, sinks, window
        segments[0].blocks, segments[0].chosen, segments[0].tail = blocks.data_ptr(), kept, whole * size
        jobs = native.Jobs()
        choice = {"score": score, "every_row": query == "max", "reduce_max": gqa == "max"}
        jobs.attend(half.layer, segments, block_size=size, keep=keep, **choice)
        jobs.run(found)
        return found

    found = run()
    queries = one.queries[:, : count * groups].double()
    scores = block_scores(
        queries, {name: stored[..., :whole].double() for name, stored in summaries.items()}, budget, groups, tree
    )
    scores[:, :sinks] = scores[:, whole - window :] = torch.inf
    ranked = scores.sort(descending=True).values
    picked = torch.gather(scores, 1, blocks)
    assert (picked.min(1).values >= ranked[:, kept - 1] - 1e-5 * scores[:, sinks : whole - window].abs().max()).all()
    assert (blocks.diff() > 0).all() and blocks.min() >= 0 and blocks.max() < whole
    one.selection, one.tail = naive.choose(queries, summaries, budget, groups, start, tree), whole * size
    assert torch.equal(one.selection.mask(whole).nonzero()[:, 1].view(kv_heads, kept), blocks)
    truth = naive.attention_half(hidden, half.truth, [one.rows])
    assert worst_row(found, truth, hidden) < TOLERANCE[dtype]
    unread = torch.zeros(kv_heads, one.keys.shape[0] * PAGE, dtype=torch.bool)
    unread[:, : whole * size] = ~one.selection.mask(whole).repeat_interleave(size, dim=1)
    one.poison(unread)
    assert torch.equal(run(), found)


def test_dense_and_sparse_sequences_run_together(dtype: torch.dtype) -> None:
    """Each as it does alone, bit by bit."""
    half = attention(dtype, bias=True)
    sequences = sequences_of(half, [(40, 3, "chain"), (300, 17, "tree"), (PAGE, 1, "chain")])
    blocks = torch.tensor([[9, 2, 5], [17, 0, 3]])
    sequences[1] = OneSequence(half, 300, 17, sequences[1].tree, Selection(blocks, None, 6), 288)
    hidden = normal(21, half.hidden, dtype=dtype)
    parts = hidden.split([one.count for one in sequences])
    alone = [attend(half, own, [one]) for own, one in zip(parts, sequences, strict=True)]
    assert torch.equal(attend(half, hidden, sequences), torch.cat(alone))
    check(half, hidden, sequences)


def test_projecting_first_changes_nothing(dtype: torch.dtype, threads: int) -> None:
    half = attention(dtype, norms=True)
    sequences = sequences_of(half, [(40, 3, "chain"), (300, 17, "tree")])
    hidden = normal(20, half.hidden, dtype=dtype)
    expected = attend(half, hidden, sequences)
    for one in sequences:
        one.queries.fill_(NAN)
    assert torch.equal(attend(half, hidden, sequences, parts=[PROJECT]), hidden)
    own = hidden.split([3, 17])
    for states, one in zip(own, sequences, strict=True):
        queries = naive.project(states, half.truth, one.rows.positions)[0]
        truth = naive.grouped(queries, half.truth.kv_heads)
        found = one.queries[:, : one.count * half.groups].double()
        assert ((found - truth).norm(dim=-1) / truth.norm(dim=-1)).max() < TOLERANCE[dtype]
    assert torch.equal(attend(half, hidden, sequences, parts=[MIX]), expected)


@pytest.mark.parametrize("hidden, width, bias", [(48, 16, True), (41, 176, False), (576, 1536, False)])
def test_feed_forward_halves_equal_the_reference(
    hidden: int, width: int, bias: bool, dtype: torch.dtype, threads: int
) -> None:
    half = feed_forward(dtype, hidden, width, bias=bias)
    for count in ROWS if hidden < 100 else (17,):
        run_alone(half, torch.full((70, hidden), NAN, dtype=dtype))
        states = normal(count, hidden, dtype=dtype)
        assert worst_row(run_alone(half, states), half.truth(states), states) < TOLERANCE[dtype]


def run_alone(half: FeedForward, hidden: Tensor) -> Tensor:
    """The feed-forward half by the kernels."""
    found, jobs = hidden.clone(), native.Jobs()
    jobs.feed_forward(half.layer)
    jobs.run(found)
    return found


def two_layers(dtype: torch.dtype) -> tuple[list[Half], list[FeedForward]]:
    return (
        [attention(dtype, norms=True), attention(dtype, bias=True)],
        [feed_forward(dtype, 80, 176), feed_forward(dtype, 80, 48, bias=True)],
    )


def test_jobs_run_together_as_one_by_one(dtype: torch.dtype, threads: int) -> None:
    """Bit by bit; their seconds add up by stage, and the queue is empty afterwards."""
    attentions, feeds = two_layers(dtype)
    layers = [sequences_of(half, [(300, 17, "tree"), (40, 3, "chain")]) for half in attentions]
    hidden, jobs, kept = normal(20, 80, dtype=dtype), native.Jobs(), []
    expected = hidden
    for half, feed, sequences in zip(attentions, feeds, layers, strict=True):
        expected = run_alone(feed, attend(half, expected, sequences))
        segments, keep = segments_of(sequences)
        kept.append(keep)
        jobs.attend(half.layer, segments, block_size=16, keep=keep)
        jobs.feed_forward(feed.layer)
    found, seconds = hidden.clone(), structures.stage_seconds()
    assert len(jobs) == 4
    jobs.run(found, seconds)
    assert len(jobs) == 0 and torch.equal(found, expected)
    spent = dict(zip(structures.STAGES, seconds, strict=True))
    assert min(spent["linear"], spent["attention"], spent["ffn"]) > 0 and 0 <= spent["select"] < sum(seconds) / 2
    jobs.feed_forward(feeds[0].layer)
    jobs.run(found, seconds)
    after = dict(zip(structures.STAGES, seconds, strict=True))
    assert after["ffn"] > spent["ffn"] and after["attention"] == spent["attention"]


def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, threads: int) -> None:
    """61 tokens of a text in steps of any size, with other sequences before them, through two layers: the same bits."""
    attentions, feeds = two_layers(dtype)
    start, total, other = PAGE - 20, 61, 5
    prompt = [OneSequence(half, start, total) for half in attentions]
    hidden = normal(total, 80, dtype=dtype)
    head = native.PackedLinear(normal(77, 80, dtype=dtype))

    def run(sizes: list[int], beside: int) -> tuple[Tensor, Tensor]:
        caches = [(one.keys.clone(), one.values.clone()) for one in prompt]
        place, outputs = 0, []
        for size in sizes:
            states = torch.cat((normal(beside, 80, dtype=dtype), hidden[place : place + size]))
            for half, feed, (keys, values) in zip(attentions, feeds, caches, strict=True):
                one = OneSequence(half, start + place, size)
                one.keys, one.values = keys, values
                around = [OneSequence(half, 33, beside)] if beside else []
                states = run_alone(feed, attend(half, states, [*around, one]))
            outputs.append(native.linear(head, states, attentions[0].truth.norm, 1e-5)[beside:])
            place += size
        stored = [prompt[0].stored(cache) for cache in caches]
        return torch.cat(outputs), torch.cat(stored)

    torch.set_num_threads(1)
    expected = run([1] * total, 0)
    torch.set_num_threads(threads)
    assert all(part.isfinite().all() for part in expected)
    for sizes in ([total], [7] * 8 + [5], [16, 17, 28], [33, 28], [2, 15, 44]):
        for beside in (0, other):
            found = run(sizes, beside)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), (sizes, beside)
