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
from harness.engine.drafting.expansion import Growth, Pace, grow, room
from harness.engine.model.eagle3 import Attend, Eagle3Head
from harness.engine.sampling import Sampling, distribution
from sparse.cost import Cost, HeadShape

_ROOM = 512
"""Positions that storage starts with."""

_CHUNK = 1024
"""Observed tokens that run together; bounds the memory that a long prompt takes."""


class _Memory:
    """Keys and values of a head's layer, each [kv_heads, room, head_dim], and rotary tables; the room doubles."""

    def __init__(self, head: Eagle3Head) -> None:
        self._head = head
        weight = head.norm.weight
        self._keys = weight.new_empty(head.shape.kv_heads, 0, head.shape.head_dim)
        self._values = self._keys
        self.cos, self.sin = head.rotary(torch.arange(0, device=weight.device))

    def reserve(self, size: int) -> None:
        """Make room for ``size`` positions; what is stored stays."""
        heads, room, head_dim = self._keys.shape
        if size <= room:
            return
        larger = max(room, _ROOM)
        while larger < size:
            larger *= 2
        keys, values = self._keys.new_empty(2, heads, larger, head_dim).unbind()
        keys[:, :room], values[:, :room] = self._keys, self._values
        self._keys, self._values = keys, values
        self.cos, self.sin = self._head.rotary(torch.arange(larger, device=keys.device))

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store [n, kv_heads, head_dim] at ``start`` and the following places."""
        stop = start + keys.shape[0]
        self._keys[:, start:stop] = keys.transpose(0, 1)
        self._values[:, start:stop] = values.transpose(0, 1)

    def attention(self, start: int, mask: Tensor | None, begin: int) -> Attend:
        """Attention of new places from ``start`` on to everything before them and among them.

        Args:
            start: places before them.
            mask: [n, start + n - begin], additive; None if they see everything.
            begin: first place that is seen.
        """

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self.write(start, keys, values)
            rows, (heads, _, head_dim) = queries.shape[0], self._keys.shape
            stop = start + rows
            grouped = queries.view(rows, heads, -1, head_dim).transpose(0, 1).reshape(1, heads, -1, head_dim)
            groups = grouped.shape[2] // rows
            mixed = functional.scaled_dot_product_attention(
                grouped,
                self._keys[None, :, begin:stop],
                self._values[None, :, begin:stop],
                attn_mask=None if mask is None else mask.repeat_interleave(groups, dim=0)[None, None],
                scale=1.0,
            )
            return mixed.view(heads, rows, groups, head_dim).transpose(0, 1).reshape(queries.shape)

        return attend


class Eagle3Drafter:
    """Grows drafts with an EAGLE-3 head.

    The keys and values of the head's layer are kept: those of observed tokens stay, those of drafts are overwritten.
    Observed tokens are run when the next draft is wanted. Of all but the last one only keys and values are computed, as
    nothing else of them is ever read.

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
        self._memory = _Memory(head)
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
            places = slice(self._length, self._length + len(states))
            keys, values = self._head.keys_values(embeddings, states, memory.cos[places], memory.sin[places])
            memory.write(self._length, keys, values)
            self._length = places.stop

    def _catch_up(self) -> Tensor | None:
        """Run the observed tokens; the head's state after the last one, [1, hidden], if there is any."""
        if not self._waiting:
            return None if self._states is None else self._states[:1]
        tokens = [token for part, _ in self._waiting for token in part]
        features = torch.cat([rows for _, rows in self._waiting])
        self._remember(tokens[:-1], features[:-1])
        place, memory = self._length, self._memory
        memory.reserve(place + room(self._growth))
        here = slice(place, place + 1)
        embeddings, states = self._embed(tokens[-1:]), self._fuse(features[-1:])
        root: Tensor = self._head(
            embeddings, states, memory.cos[here], memory.sin[here], memory.attention(place, None, self._begin())
        )
        self._length, self._waiting = place + 1, []
        self.spent += self._sizes.run(1, self._length - self._begin(), fused=1)
        return root

    def _extend(self, numbers: Sequence[int], tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Run draft tokens through the head; see :data:`~harness.engine.drafting.expansion.Extend`."""
        assert self._states is not None
        memory, states = self._memory, self._states
        done = states.shape[0] - 1  # the root's state stands first, then those of the draft tokens
        paths = [(*self._paths[parent], done + new) for new, parent in enumerate(parents)]
        self._paths.update(zip(numbers, paths, strict=True))
        if len(paths) == 1:
            ahead, before = self._length + len(paths[0]) - 1, _before(paths[0])
            cos, sin = memory.cos[ahead : ahead + 1], memory.sin[ahead : ahead + 1]
            states = states[before : before + 1]
        else:
            positions = torch.tensor([self._length + len(path) - 1 for path in paths], device=states.device)
            cos, sin = memory.cos[positions], memory.sin[positions]
            states = states[[_before(path) for path in paths]]
        start, mask = self._length + done, self._mask(paths, done)
        outputs = self._head(
            self._embed([self._ids[token] for token in tokens]),
            states,
            cos,
            sin,
            memory.attention(start, mask, self._begin()),
        )
        self._states = torch.cat((self._states, outputs))
        self.spent += self._sizes.run(len(paths), start + len(paths) - self._begin())
        return self._distribution(outputs)

    def _mask(self, paths: list[tuple[int, ...]], done: int) -> Tensor | None:
        """Additive mask [n, positions] by which tokens see all observed ones and their own path; None for a chain."""
        drafted = done + len(paths)
        if len(paths) == 1 and len(paths[0]) == drafted:
            return None
        weight = self._head.norm.weight
        seen = [row * drafted + place for row, path in enumerate(paths) for place in path]
        hidden = weight.new_full((len(paths) * drafted,), float("-inf"))
        hidden[torch.tensor(seen, device=weight.device)] = 0
        observed = weight.new_zeros(len(paths), self._length - self._begin())
        return torch.cat((observed, hidden.view(len(paths), drafted)), dim=1)

    def _begin(self) -> int:
        """First observed token that is seen."""
        return 0 if self._window is None else max(0, self._length - self._window)

    def _distribution(self, states: Tensor) -> Tensor:
        """Distribution over draft tokens after states [n, hidden]: [n, draft_vocab], fp32."""
        logits = self._head.logits(states)
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
