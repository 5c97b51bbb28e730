"""Training-time test of an EAGLE-3 head (arXiv 2503.01840, section 3.2): the head run ahead of every position at once.

An anchor is a position up to which the head reads true target features. Step 1 runs the head on those; step j runs it
on its own states of step j - 1, one token further. In step j an anchor attends to the step-1 pairs up to itself and to
its own states of the steps since, as in drafting. One softmax spans both parts, and no mask over steps is ever built.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.engine.model.eagle3 import Eagle3Head

_ROWS = 1024
"""Rows whose logits exist at a time."""


def unrolled(head: Eagle3Head, embeddings: Tensor, features: Tensor, unroll: int) -> list[Tensor]:
    """States of the head in every step of the unrolling.

    Args:
        head: in the dtype of the inputs.
        embeddings: [batch, n, hidden], of the tokens.
        features: [batch, n, features], of the target at the same positions.
        unroll: steps; fewer where the sequence is too short for them.

    Returns:
        Step j from 1 on: [batch, n - j, hidden]; row t has read features up to position t and tokens up to t + j, so
        that its logits predict token t + j + 1.
    """
    length, found = features.shape[1], []
    chain = _Chain()
    cos, sin = head.rotary(torch.arange(length, device=features.device))
    states = head.fuse(features[:, : length - 1])
    for step in range(1, min(unroll, length - 1) + 1):
        count = length - step
        at = slice(step - 1, step - 1 + count)
        states = head(embeddings[:, step:], states[:, :count], cos[at], sin[at], chain)
        found.append(states)
    return found


class _Chain:
    """Keys and values of the steps so far, and the attention of the next one."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Anchors [batch, m, heads, head_dim] over what they see; keys and values [batch, m, kv_heads, head_dim]."""
        group = queries.shape[2] // keys.shape[2]
        self._keys.append(keys.repeat_interleave(group, 2).transpose(1, 2))
        self._values.append(values.repeat_interleave(group, 2).transpose(1, 2))
        count = queries.shape[1]
        all_keys = [part[:, :, :count] for part in self._keys]
        all_values = [part[:, :, :count] for part in self._values]
        mix: Any = _FlashMix.apply if queries.device.type == "cpu" else _explicit_mix
        mixed: Tensor = mix(queries.transpose(1, 2), *all_keys, *all_values)
        return mixed.transpose(1, 2)


def _explicit_mix(queries: Tensor, *parts: Tensor) -> Tensor:
    """Attention of [batch, heads, m, head_dim] over the first step's pairs, causally, and the own chain.

    Args:
        queries: scaled and rotated.
        parts: keys of each step, then values of each step, like the queries.
    """
    keys, values = parts[: len(parts) // 2], parts[len(parts) // 2 :]
    count = queries.shape[2]
    later = torch.ones(count, count, dtype=torch.bool, device=queries.device).triu(1)
    scores = (queries @ keys[0].transpose(-1, -2)).masked_fill(later, float("-inf"))
    own = [(queries * key).sum(-1, keepdim=True) for key in keys[1:]]
    chances = torch.cat((scores, *own), -1).softmax(-1, dtype=torch.float32).to(queries.dtype)
    mixed = chances[..., :count] @ values[0]
    for place, value in enumerate(values[1:]):
        mixed = mixed + chances[..., count + place, None] * value
    return mixed


class _FlashMix(torch.autograd.Function):
    """:func:`_explicit_mix` without a matrix of scores.

    The first part is flash attention, whose log-sum-exp joins it to the chain. Its backward pass needs no more than the
    output and the log-sum-exp, so that with those of the whole softmax it gives the gradients of the first part.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, *parts: Tensor) -> Tensor:
        keys, values = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed: Tensor
        mixed, norm = flash(queries, keys[0], values[0], 0.0, True, scale=1.0)
        if len(keys) > 1:
            own = torch.stack([(queries * key).sum(-1).float() for key in keys[1:]], -1)
            total = torch.logsumexp(torch.cat((norm[..., None], own), -1), -1)
            mixed = mixed * (norm - total).exp()[..., None].to(mixed.dtype)
            shares = (own - total[..., None]).exp().to(mixed.dtype)
            for place, value in enumerate(values[1:]):
                mixed.addcmul_(shares[..., place, None], value)
            norm = total
            ctx.shares = shares
        ctx.save_for_backward(queries, mixed, norm, *parts)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        grad = grads[0].contiguous()
        queries, mixed, norm, *parts = ctx.saved_tensors
        keys, values = parts[: len(parts) // 2], parts[len(parts) // 2 :]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        to_queries, to_key, to_value = flash(grad, queries, keys[0], values[0], mixed, norm, 0.0, True, scale=1.0)
        to_keys, to_values = [to_key], [to_value]
        if len(keys) > 1:
            joint = (grad * mixed).sum(-1, keepdim=True)
            for place, (key, value) in enumerate(zip(keys[1:], values[1:], strict=True)):
                share = ctx.shares[..., place, None]
                score = share * ((grad * value).sum(-1, keepdim=True) - joint)
                to_queries = to_queries.addcmul(score, key)
                to_keys.append(score * queries)
                to_values.append(share * grad)
        return to_queries, *to_keys, *to_values


class _SoftCrossEntropy(torch.autograd.Function):
    """Weighted cross entropy of a linear map against soft labels that several rows share.

    Logits exist for some rows at a time. All that depends on the labels goes through their own product with the weight,
    once per label, so that a row costs three products and a softmax.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor, rows: Tensor, scales: Tensor) -> Tensor:
        pulled = (labels @ weight)[rows]
        loss = -((states * pulled).sum(-1, dtype=torch.float32) * scales).sum()
        scale = scales[:, None].to(states.dtype)
        scaled, pushed = states * scale, torch.empty_like(states)
        targets = torch.zeros(labels.shape[0], states.shape[1], dtype=torch.float32, device=states.device)
        targets.index_add_(0, rows, scaled.float())
        to_weight = -(labels.T @ targets.to(states.dtype)).float()
        for part in map(slice, range(0, len(rows), _ROWS), range(_ROWS, len(rows) + _ROWS, _ROWS)):
            logits = states[part] @ weight.T
            chances = logits.softmax(-1)
            total = logits[:, 0].float() - chances[:, 0].float().clamp_min(torch.finfo(torch.float32).tiny).log()
            loss += (total * scales[part]).sum()
            torch.mm(chances, weight, out=pushed[part])
            to_weight += chances.T @ scaled[part]
        ctx.save_for_backward((pushed - pulled) * scale, to_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        to_states, to_weight = ctx.saved_tensors
        grad = grads[0].to(to_states.dtype)
        return to_states * grad, to_weight * grad, None, None, None


def unrolled_loss(head: Eagle3Head, steps: list[Tensor], labels: Tensor, weights: Tensor, decay: float) -> Tensor:
    """Cross entropy of all steps against the target's distributions.

    Args:
        head: gives the logits.
        steps: from :func:`unrolled`.
        labels: [batch, n, draft_vocab]: the target's distribution of the token after each position, over the tokens
            that the head proposes.
        weights: [batch, n], fp32: of each position; 0 leaves it out.
        decay: step j counts decay ** (j - 1).

    Returns:
        fp32 scalar: the weighted sum over steps of the weighted mean over positions, in nats.
    """
    batch, length = weights.shape
    places = torch.arange(batch * length, device=weights.device).view(batch, length)
    states, rows, scales = [], [], []
    for number, step in enumerate(steps):
        weight = weights[:, number + 1 :]
        counted = weight > 0
        states.append(step[counted])
        rows.append(places[:, number + 1 :][counted])
        scales.append(weight[counted] * (decay**number / weight.sum().clamp_min(1e-9)))
    normed = head.norm(torch.cat(states))
    apply: Any = _SoftCrossEntropy.apply
    loss: Tensor = apply(normed, head.lm_head.weight, labels.flatten(0, 1), torch.cat(rows), torch.cat(scales))
    return loss
