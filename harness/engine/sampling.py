"""From logits to a distribution over tokens, and from a distribution to a token."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

_COLDEST = 1e-30  # fp32 logits divided by less could overflow, and are as good as greedy here already
_FIRST_WIDTH = 256  # tokens in which the nucleus is sought first; sorting the whole vocabulary costs seven times more


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn; the default is the model's own distribution.

    Attributes:
        temperature: logits are divided by it.
        top_p: then only the fewest most probable tokens whose mass reaches it stay (nucleus, arXiv 1904.09751).
        top_k: before that, only so many of the most probable tokens stay; None for all.

    Raises:
        ValueError: a temperature that is not positive and finite, top_p outside (0, 1], top_k below one.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be above 0 and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens are drawn from: temperature, then top-k, then top-p over what is left.

    Of equally probable tokens at the border of top-k or top-p any may stay; the most probable token always does.

    Args:
        logits: [n, vocab], any floating dtype.
        sampling: temperature and truncation.

    Returns:
        [n, vocab], fp32; every row sums to 1.
    """
    scaled = logits.float() / max(sampling.temperature, _COLDEST)
    if sampling.top_k is None or sampling.top_k >= scaled.shape[-1]:
        whole = scaled.softmax(-1)
        return whole if sampling.top_p == 1 else _normalised(_nucleus(whole, sampling.top_p, _FIRST_WIDTH))
    largest, places = scaled.topk(sampling.top_k)
    kept = _normalised(_reaching(largest.softmax(-1), sampling.top_p))
    return torch.zeros_like(scaled).scatter_(-1, places, kept)


def draw(probabilities: Tensor, random: Random) -> int:
    """A token drawn with one uniform number; never one of probability zero.

    Args:
        probabilities: [vocab], not negative; need not sum to 1.
        random: gives the number.

    Raises:
        ValueError: no token has a positive probability, or one is not a number.
    """
    cumulative = probabilities.cumsum(0, dtype=torch.float64)
    total = float(cumulative[-1])
    if not total > 0:
        raise ValueError(f"cannot draw a token: the probabilities sum to {total}")
    token = int(torch.searchsorted(cumulative, random.random() * total, right=True))
    if token < cumulative.shape[0] and probabilities[token] > 0:
        return token
    return int(probabilities.argmax())  # the number was rounded up to the total


def _nucleus(probabilities: Tensor, top_p: float, width: int) -> Tensor:
    """``probabilities`` [n, vocab] without what lies outside top-p; the nucleus is sought in the ``width`` largest."""
    width = min(width, probabilities.shape[-1])
    largest, places = probabilities.topk(width)
    kept = torch.zeros_like(probabilities).scatter_(-1, places, _reaching(largest, top_p))
    if width < probabilities.shape[-1]:
        short = largest.sum(-1, dtype=torch.float64) < top_p
        if bool(short.any()):
            kept[short] = _nucleus(probabilities[short], top_p, 16 * width)
    return kept


def _reaching(descending: Tensor, top_p: float) -> Tensor:
    """``descending`` [n, k] with zeros behind the place where its running sum reaches ``top_p``."""
    if top_p == 1:
        return descending
    before = descending.cumsum(-1, dtype=torch.float64) - descending
    return descending.masked_fill(before >= top_p, 0)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)
