"""How close sparse verification stays to dense on the dense trajectory, teacher forced (METHOD section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from harness.engine.acceptance import accept_greedy
from harness.engine.decoding import Decoded


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
