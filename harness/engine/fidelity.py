"""How close sparse verification stays to dense on the dense trajectory, teacher forced (METHOD section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.acceptance import accept_greedy
from harness.engine.decoding import Decoded, StepTaken
from harness.engine.drafting.draft import Draft


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Sums over the steps of one decode.

    Attributes:
        tokens: tokens compared: those that the dense decode kept.
        agreeing: of these, tokens for which the sparse step's most probable token is the dense one's.
        kl: sum of KL(dense || sparse) over the compared tokens, in nats.
        steps: steps compared.
        flips: steps whose draft the sparse step would have accepted to another length; None where acceptance is not
            greedy, or forced.
    """

    tokens: int
    agreeing: int
    kl: float
    steps: int
    flips: int | None


def compare(dense: Sequence[Tensor], sparse: Sequence[Tensor], decoded: Decoded, greedy: bool = True) -> Fidelity:
    """Compare two replays of one decode.

    Args:
        dense, sparse: logits per step, each [rows, vocab], from ``Decoder.replay`` over ``decoded``.
        decoded: what was replayed.
        greedy: whether its drafts were accepted by the target's greedy choices.
    """
    tokens = agreeing = flips = 0
    kl = 0.0
    for ours, theirs, taken in zip(dense, sparse, decoded.transcript, strict=True):
        choices, others, rows = ours.argmax(-1).tolist(), theirs.argmax(-1).tolist(), taken.rows
        tokens += taken.kept
        agreeing += sum(choices[row] == others[row] for row in rows)
        lengths = [len(accept_greedy(taken.draft, opinions).path) for opinions in (choices, others)]
        flips += lengths[0] != lengths[1]
        log_dense = functional.log_softmax(ours[rows].float(), -1)
        log_sparse = functional.log_softmax(theirs[rows].float(), -1)
        kl += float(functional.kl_div(log_sparse, log_dense, reduction="sum", log_target=True))
    return Fidelity(tokens, agreeing, kl, len(decoded.transcript), flips if greedy else None)


def forced(tokens: Sequence[int], depth: int) -> Decoded:
    """A decode that kept ``tokens``: each step's draft holds the next ``depth`` of them and is accepted whole.

    Its replay shows verification every token of a given text in steps as long as real ones.

    Args:
        tokens: the text, at least one token.
        depth: draft tokens of a step; 0 goes token by token.
    """
    transcript, position = [], 0
    while position < len(tokens) - 1:
        draft = tokens[position + 1 : min(position + 1 + depth, len(tokens) - 1)]
        transcript.append(StepTaken(Draft.chain(list(draft)), tuple(range(len(draft))), len(draft) + 1))
        position += len(draft) + 1
    return Decoded(list(tokens), transcript=transcript)


def log_probability(tokens: Sequence[int], first: Tensor, steps: Sequence[Tensor]) -> float:
    """Sum of the natural log-probabilities of ``tokens`` after a prompt (teacher forced, METHOD section 8).

    Args:
        tokens: a text, at least one token.
        first: logits [vocab] after the prompt: the prefill's, as it also gives the first token when decoding.
        steps: logits per step of the replay of :func:`forced`, each [rows, vocab].
    """
    rows = torch.cat([first[None].float(), *(step.float() for step in steps)])
    wanted = torch.tensor(list(tokens), device=rows.device)
    return float(functional.log_softmax(rows, -1).gather(1, wanted[:, None]).double().sum())
