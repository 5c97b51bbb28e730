"""The target as teacher of an EAGLE-3 head (arXiv 2503.01840): passages, features, soft labels.

The target runs once over each passage and gives both the features that the head reads and, restricted to the tokens
that the head proposes, the distributions that it is trained towards. Where the target's most likely token is none of
those, a position does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.engine.model.eagle3 import Eagle3Head, Eagle3Shape, feature_layers

_ROWS = 256
"""Rows whose logits over the whole vocabulary exist at a time."""
_CALM = 0.2
"""What an untrained head's last norm is scaled by: confident wrong guesses would have to be unlearned first."""


@dataclass(frozen=True, slots=True)
class Passage:
    """Tokens to train on.

    Attributes:
        tokens: token ids, at least three.
        answer: where the target's own answer begins; the length where there is none.
    """

    tokens: tuple[int, ...]
    answer: int

    @property
    def kind(self) -> str:
        """``answers`` or ``text``."""
        return "answers" if self.answer < len(self.tokens) else "text"


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded passages: ids [batch, n] and weights [batch, n], fp32, of the prediction after each position."""

    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the target says about a batch.

    Attributes:
        embeddings: [batch, n, hidden], of the tokens.
        features: [batch, n, features], of three layers side by side.
        labels: [batch, n, draft_vocab]: distribution of the next token over those that the head proposes.
        weights: [batch, n], fp32; 0 also where the most likely token is none of them.
    """

    embeddings: Tensor
    features: Tensor
    labels: Tensor
    weights: Tensor


class Teacher:
    """The target of a head that proposes some of its tokens.

    Args:
        model: a library model in evaluation mode.
        tokens: [draft_vocab], int64, ascending: what the head proposes.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        weight = model.get_output_embeddings().weight.detach()
        others = torch.ones(weight.shape[0], dtype=torch.bool)
        others[tokens] = False
        self.tokens = tokens
        self.device: torch.device = weight.device
        self.dtype: torch.dtype = weight.dtype
        self._body = model.get_decoder()
        self._layers = feature_layers(model.config.num_hidden_layers)
        self._proposed, self._others = weight[tokens.to(self.device)], weight[others.to(self.device)]
        self._order = torch.cat((tokens, others.nonzero().flatten())).to(self.device)

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, features and last states of [batch, n] ids."""
        found = self._body(input_ids=ids.to(self.device), output_hidden_states=True, use_cache=False)
        features = torch.cat([found.hidden_states[layer] for layer in self._layers], -1)
        return found.hidden_states[0], features, found.last_hidden_state

    @torch.no_grad()
    def teach(self, batch: Batch) -> Lesson:
        """Features and soft labels of a batch."""
        embeddings, features, last = self._read(batch.ids)
        rows = last.flatten(0, 1)
        labels = torch.empty(rows.shape[0], len(self._proposed), dtype=self.dtype, device=self.device)
        weights = batch.weights.to(self.device).flatten().clone()
        for first in range(0, len(rows), _ROWS):
            part = slice(first, first + _ROWS)
            logits = rows[part] @ self._proposed.T
            if len(self._others):
                weights[part] *= logits.amax(-1) >= (rows[part] @ self._others.T).amax(-1)
            torch.softmax(logits, -1, out=labels[part])
        return Lesson(embeddings, features, labels.view(*batch.ids.shape, -1), weights.view(batch.ids.shape))

    @torch.no_grad()
    def exam(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings, features, and [batch, n] the target's most likely next token after each position."""
        embeddings, features, last = self._read(batch.ids)
        best = []
        for rows in torch.split(last.flatten(0, 1), _ROWS):
            best.append(torch.cat((rows @ self._proposed.T, rows @ self._others.T), -1).argmax(-1))
        return embeddings, features, self._order[torch.cat(best)].view(batch.ids.shape)

    def new_head(self, config: Any, seed: int) -> Eagle3Head:
        """An untrained head of the target's own sizes, fp32, that begins near the target's late states.

        Output weights are the target's own, and so is the last norm, scaled down. The features of the highest layer
        pass through; all else is random, small where it writes to the state.

        Args:
            config: of the target.
            seed: of the random part.
        """
        hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
        rope = getattr(config, "rope_parameters", None) or {}
        shape = Eagle3Shape(
            hidden=hidden,
            features=3 * hidden,
            heads=heads,
            kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(config, "head_dim", None) or hidden // heads),
            ffn=int(config.intermediate_size),
            vocab=int(config.vocab_size),
            draft_vocab=len(self.tokens),
            eps=float(config.rms_norm_eps),
            theta=float(rope.get("rope_theta") or 10000.0),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = Eagle3Head(shape)
        head.set_vocabulary(self.tokens.cpu())
        with torch.no_grad():
            head.fc.weight.mul_(0.1)
            head.fc.weight[:, 2 * hidden :] += torch.eye(hidden)
            head.midlayer.self_attn.o_proj.weight.mul_(0.1)
            head.midlayer.mlp.down_proj.weight.mul_(0.1)
            head.lm_head.weight.copy_(self._proposed)
            head.norm.weight.copy_(self._body.norm.weight * _CALM)
        return head.to(self.device)


def make_batch(passages: Sequence[Passage], prompt_weight: float) -> Batch:
    """Passages side by side; padding weighs nothing, and neither does what would follow the last token."""
    length = max(len(one.tokens) for one in passages)
    ids = torch.zeros(len(passages), length, dtype=torch.int64)
    weights = torch.zeros(len(passages), length)
    for row, one in enumerate(passages):
        count = len(one.tokens)
        ids[row, :count] = torch.tensor(one.tokens)
        answering = one.kind == "answers"
        weights[row, : count - 1] = prompt_weight if answering else 1.0
        if answering:
            weights[row, max(0, one.answer - 1) : count - 1] = 1.0
    return Batch(ids, weights)
