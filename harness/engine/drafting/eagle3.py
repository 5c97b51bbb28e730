"""Drafts of an EAGLE-3 head (arXiv 2503.01840).

With tokens t_0, t_1, ... and the target's features f_0, f_1, ... after each of them, pair i is (t_{i + 1}, f_i); it
stands at position i, and the head's output for it predicts t_{i + 2}. A drafter's features are those from which a token
was predicted, so pair i is one observed token and its own row. Where the target has not been, a pair is a draft token
and the head's output for the pair before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

import torch
from torch import Tensor
from torch.nn import functional

from harness.engine.drafting.draft import Draft
from harness.engine.drafting.eagle3_memory import make_memory
from harness.engine.drafting.expansion import Growth, Pace, grow, room
from harness.engine.model.eagle3 import Eagle3Head
from harness.engine.sampling import Sampling, distribution
from sparse.cost import Cost, HeadShape

_TOGETHER = 16
"""Observed tokens that run with the root at most, so that weights are read once; of earlier ones only keys and values
are computed, as nothing else of them is ever read."""

_CHUNK = 1024
"""Observed tokens that run together; bounds the memory that a long prompt takes."""


class Eagle3Drafter:
    """Grows drafts with an EAGLE-3 head.

    The keys and values of the head's layer are kept: those of observed tokens stay, those of drafts are overwritten.
    Observed tokens are run when the next draft is wanted.

    Args:
        head: in evaluation mode.
        embedding: of the target, [vocab, hidden]; not read where the head has its own.
        growth: how far drafts grow.
        sample: draw draft tokens from the head's distribution so transformed; None takes the most probable ones.
        pace: ends drafts early.
        window: observed tokens that the head attends to, the last ones; None for all. Heads are trained on windows far
            shorter than the longest prompts.

    Attributes:
        reads_features: it reads hidden states of the target.
        spent: least work of its passes since the last reset.

    Raises:
        ValueError: the embedding does not fit the head.
    """

    reads_features = True

    def __init__(
        self,
        head: Eagle3Head,
        embedding: Tensor,
        growth: Growth,
        *,
        sample: Sampling | None = None,
        pace: Pace | None = None,
        window: int | None = None,
    ) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1")
        shape = head.shape
        embedding = embedding if head.embed_tokens is None else head.embed_tokens.weight.detach()
        if embedding.shape != (shape.vocab, shape.hidden):
            wanted = f"{shape.vocab} tokens and width {shape.hidden}"
            raise ValueError(f"the head reads embeddings of {wanted}, not {list(embedding.shape)}")
        self._head = head
        self._embedding = embedding
        self._growth = growth
        self._sample = sample
        self._pace = pace
        self._window = window
        self._targets = head.targets
        self._ids: list[int] = self._targets.tolist()
        self._memory = make_memory(head)
        self._random = Random()
        self._prompt: tuple[int, ...] = ()
        self._prompt_end: list[tuple[Sequence[int], Tensor]] = []
        self._waiting: list[tuple[Sequence[int], Tensor]] = []
        self._length = 0
        self._states: Tensor | None = None
        self._paths: dict[int, tuple[int, ...]] = {}
        self._sizes = HeadShape(
            hidden=shape.hidden,
            features=shape.features,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            ffn=shape.ffn,
            vocab=shape.draft_vocab,
            itemsize=head.norm.weight.element_size(),
        )
        self.spent = Cost()

    @torch.inference_mode()
    def reset(self, prompt: Sequence[int], features: Tensor | None = None, seed: int = 0) -> None:
        """Start over after ``prompt``; its keys and values are computed once and reused while it stays the same.

        Raises:
            ValueError: there are no features, or not those of ``prompt[1:]``.
        """
        rows = self._checked(prompt[1:], features)
        self.spent = Cost()
        if tuple(prompt) != self._prompt:
            self._prompt, self._prompt_end, self._length = (), [], 0
            unseen = 0 if self._window is None else max(0, len(prompt) - 2 - self._window)
            self._length = unseen
            self._remember(prompt[1 + unseen : -1], rows[unseen:-1])
            self._prompt = tuple(prompt)
            self._prompt_end = [(prompt[-1:], rows[-1:].clone())] if len(prompt) > 1 else []
        self._length = max(len(prompt) - 2, 0)
        self._waiting = list(self._prompt_end)
        self._states = None
        self._random = Random(f"{seed} draft")

    def observe(self, tokens: Sequence[int], features: Tensor | None = None) -> None:
        """Append tokens that are now part of the sequence.

        Raises:
            ValueError: there are no features, or not those of ``tokens``.
        """
        if tokens:
            self._waiting.append((tokens, self._checked(tokens, features)))

    @torch.inference_mode()
    def propose(self, limit: int) -> Draft:
        """What the head expects; empty before the second token of a sequence."""
        if limit < 1:
            return Draft()
        root = self._catch_up()
        if root is None:
            return Draft()
        self._states, self._paths = root, {-1: ()}
        draft = grow(
            self._growth,
            self._distribution(root)[0],
            self._extend,
            limit,
            random=None if self._sample is None else self._random,
            pace=self._pace,
        )
        return self._in_target(draft)

    def _checked(self, tokens: Sequence[int], features: Tensor | None) -> Tensor:
        if features is None:
            raise ValueError("an EAGLE-3 head reads features of the target, but the step has no taps")
        if features.shape != (len(tokens), self._head.shape.features):
            raise ValueError(
                f"{len(tokens)} tokens need features of width {self._head.shape.features}, got {list(features.shape)}"
            )
        return features

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        numbers = torch.tensor(tokens, dtype=torch.int64, device=self._embedding.device)
        return functional.embedding(numbers, self._embedding).to(self._head.norm.weight.dtype)

    def _fuse(self, features: Tensor) -> Tensor:
        return self._head.fuse(features.to(self._head.norm.weight.dtype))

    def _remember(self, tokens: Sequence[int], features: Tensor) -> None:
        """Store keys and values of observed tokens [n] with features [n, features]."""
        memory = self._memory
        memory.reserve(self._length + len(tokens))
        self.spent += self._sizes.remember(len(tokens))
        for first in range(0, len(tokens), _CHUNK):
            part = slice(first, first + _CHUNK)
            embeddings, states = self._embed(tokens[part]), self._fuse(features[part])
            memory.store(self._length, embeddings, states)
            self._length += len(states)

    def _catch_up(self) -> Tensor | None:
        """Run the observed tokens; the head's state after the last one, [1, hidden], if there is any."""
        if not self._waiting:
            return None if self._states is None else self._states[:1]
        tokens = [token for part, _ in self._waiting for token in part]
        features = torch.cat([rows for _, rows in self._waiting])
        together = min(len(tokens), _TOGETHER, len(tokens) if self._window is None else self._window)
        self._remember(tokens[:-together], features[:-together])
        place, memory = self._length, self._memory
        memory.reserve(place + together - 1 + room(self._growth))
        embeddings, states = self._embed(tokens[-together:]), self._fuse(features[-together:])
        self._length, self._waiting = place + together - 1, []
        paths = [tuple(range(1 + token)) for token in range(together)]
        outputs = memory.run(embeddings, states, place, 0, paths, self._begin())
        self._length += 1
        self.spent += self._sizes.remember(together - 1, alone=False)
        self.spent += self._sizes.run(1, self._length - self._begin(), fused=1)
        return outputs[-1:]

    def _extend(self, numbers: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Run draft tokens through the head; see :data:`~harness.engine.drafting.expansion.Extend`."""
        assert self._states is not None
        memory, states = self._memory, self._states
        done = states.shape[0] - 1  # the root's state stands first, then those of the draft tokens
        paths = [(*self._paths[parent], done + new) for new, parent in enumerate(parents)]
        self._paths.update(zip(numbers, paths, strict=True))
        embeddings = self._embed([self._ids[token] for token in tokens])
        before = states[[_before(path) for path in paths]]
        # The root's own place belongs to the observed ones, so draft tokens stand right behind it.
        outputs = memory.run(embeddings, before, self._length, done, paths, self._begin())
        self._states = torch.cat((self._states, outputs))
        self.spent += self._sizes.run(len(paths), self._length + done + len(paths) - self._begin())
        return self._distribution(outputs)

    def _begin(self) -> int:
        """First observed token that is seen."""
        return 0 if self._window is None else max(0, self._length - self._window)

    def _distribution(self, states: Tensor) -> Tensor:
        """Distribution over draft tokens after states [n, hidden]: [n, draft_vocab], fp32."""
        logits = self._memory.logits(states)
        return logits.float().softmax(-1) if self._sample is None else distribution(logits, self._sample)

    def _in_target(self, draft: Draft) -> Draft:
        """A draft over the draft vocabulary with the target's token numbers."""
        proposals = draft.proposals
        if proposals is not None:
            whole = proposals.new_zeros(proposals.shape[0], self._head.shape.vocab)
            proposals = whole.index_copy_(1, self._targets, proposals)
        return replace(draft, tokens=tuple(self._ids[token] for token in draft.tokens), proposals=proposals)


def _before(path: tuple[int, ...]) -> int:
    """Where the state before the last token of a path stands among the states."""
    return path[-2] + 1 if len(path) > 1 else 0
