"""Distributions and draws against slow definitions."""

from bisect import bisect_right
from itertools import accumulate
from math import exp, inf
from random import Random
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from harness.engine.sampling import Sampling, distribution, draw


def fixed(number: float) -> Random:
    """Gives the same number for ever."""
    return Mock(spec=Random, random=lambda: number)


ALMOST_ONE = 1 - 2**-53


def slow_distribution(logits: list[float], sampling: Sampling) -> list[float]:
    """One row by the definition, token by token; the row has no equal logits."""
    largest = max(logits)
    weights = [exp((logit - largest) / sampling.temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])[: sampling.top_k]
    total, reached = sum(weights[token] for token in order), 0.0
    kept = set()
    for token in order:
        if sampling.top_p == 1 or reached < sampling.top_p * total:
            kept.add(token)
            reached += weights[token]
    return [weights[token] / reached if token in kept else 0.0 for token in range(len(logits))]


def random_logits(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


@settings(deadline=None)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 23),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from((0.05, 0.8, 1.0, 3.0)),
    top_p=st.sampled_from((0.003, 0.37, 0.91, 1.0)),
    top_k=st.sampled_from((None, 1, 2, 7, 40)),
)
def test_distribution_equals_its_definition(
    rows: int, vocab: int, seed: int, temperature: float, top_p: float, top_k: int | None
) -> None:
    logits, sampling = random_logits(rows, vocab, seed), Sampling(temperature, top_p, top_k)
    found = distribution(logits, sampling)
    expected = torch.tensor([slow_distribution(row, sampling) for row in logits.tolist()])
    assert torch.equal(found > 1e-30, expected > 1e-30)  # below, fp32 may round to nothing
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.sum(-1), torch.ones(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("top_k", [None, 3001])
def test_a_nucleus_of_any_width_is_found_in_every_row(top_k: int | None) -> None:
    vocab = 9001
    scales = torch.tensor([20.0, 0.0, 0.7, 4.0, 1.5])[:, None]  # nuclei of a few tokens up to most of the vocabulary
    logits = random_logits(5, vocab, 0, 1.0) * scales + torch.arange(vocab) * 1e-6
    sampling = Sampling(top_p=0.9, top_k=top_k)
    found = distribution(logits, sampling)
    sizes = (found > 0).sum(-1)
    expected = torch.tensor([slow_distribution(row, sampling) for row in logits.double().tolist()])
    assert ((expected > 0).sum(-1) - sizes).abs().max() <= 1  # the border moves with rounding
    assert sizes.min() < 20 and sizes.max() > 2500
    assert (found.double() - expected).abs().max() < 1e-3 / sizes.max()


def test_top_p_is_reached_by_the_smallest_set() -> None:
    logits = torch.tensor([[0.4, 0.1, 0.3, 0.2]]).log()
    for top_p, kept in ((0.01, 1), (0.399, 1), (0.401, 2), (0.699, 2), (0.701, 3), (0.899, 3), (0.901, 4)):
        assert int((distribution(logits, Sampling(top_p=top_p)) > 0).sum()) == kept
    assert int((distribution(torch.zeros(1, 4), Sampling(top_p=0.5)) > 0).sum()) == 2  # exactly reached
    after_top_k = distribution(logits, Sampling(top_p=0.56, top_k=2))  # 0.4 of 0.7 is 0.571: one token suffices
    assert after_top_k.tolist() == [[1, 0, 0, 0]]


def test_top_k_keeps_k_of_equal_logits() -> None:
    found = distribution(torch.zeros(3, 11), Sampling(top_k=4))
    assert ((found > 0).sum(-1) == 4).all() and found.max() == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_distributions_are_fp32_whatever_the_logits(dtype: torch.dtype) -> None:
    logits = random_logits(3, 301, 1).to(dtype)
    found = distribution(logits, Sampling(0.7))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (logits.double() / 0.7).softmax(-1).float(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 1e-4])
def test_the_coldest_sampling_is_greedy(temperature: float) -> None:
    logits = random_logits(6, 97, 2, 100.0)
    expected = torch.nn.functional.one_hot(logits.argmax(-1), 97).float()
    assert torch.equal(distribution(logits, Sampling(temperature)), expected)


def test_forbidden_tokens_stay_forbidden() -> None:
    logits = torch.tensor([[0.0, -inf, 1.0, -inf, -inf]])
    for sampling in (Sampling(0.5), Sampling(top_k=4), Sampling(top_p=0.99)):
        found = distribution(logits, sampling)
        assert (found > 0).tolist() == [[True, False, True, False, False]]


@pytest.mark.parametrize(
    "values, name",
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": inf}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": 0}, "top_k"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**values)  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    weights=st.lists(st.sampled_from((0.0, 1e-30, 0.25, 1.0, 3.5)), min_size=1, max_size=40).filter(any),
    number=st.one_of(st.floats(0, ALMOST_ONE), st.sampled_from((0.0, 0.5, ALMOST_ONE))),
)
def test_a_draw_inverts_the_running_sum_and_is_never_impossible(weights: list[float], number: float) -> None:
    probabilities = torch.tensor(weights)
    token = draw(probabilities, fixed(number))
    assert weights[token] > 0
    running = list(accumulate(probabilities.double().tolist()))
    if number * running[-1] < running[-1]:
        assert token == bisect_right(running, number * running[-1])


def test_draws_at_both_ends_skip_impossible_tokens() -> None:
    probabilities = torch.tensor([0.0, 0.0, 0.3, 0.0, 0.6, 0.1, 0.0, 0.0])
    assert draw(probabilities, fixed(0.0)) == 2
    assert draw(probabilities, fixed(ALMOST_ONE)) == 5
    assert draw(probabilities, fixed(1.0)) == 4  # beyond the end, as rounding may have it: the most probable token


def test_a_running_sum_that_is_not_monotonic_draws_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "searchsorted", lambda *args, **options: torch.tensor(1))  # as a parallel scan may
    assert draw(torch.tensor([0.2, 0.0, 0.8]), fixed(0.2)) == 2


def test_draws_follow_the_probabilities() -> None:
    probabilities, random, count = torch.tensor([0.05, 0.0, 0.6, 0.35]), Random(0), 20_000
    drawn = torch.bincount(torch.tensor([draw(probabilities, random) for _ in range(count)]), minlength=4) / count
    assert drawn[1] == 0
    deviation = (probabilities * (1 - probabilities) / count).sqrt()
    assert ((drawn - probabilities).abs() <= 3.5 * deviation).all()


@pytest.mark.parametrize("weights", [[0.0, 0.0], [0.5, float("nan")]])
def test_nothing_is_drawn_from_nothing(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="sum to"):
        draw(torch.tensor(weights), Random(0))
