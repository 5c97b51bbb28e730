"""Device functions that find the largest keys of a tile without sorting them; for other kernels to call.

A key is a uint32 that stands for a number; larger keys rank first, equal keys rank by their position.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

MOST_KEYS = 32768
"""Keys that one program ranks at most: they lie in its registers, and their counts fit into 16 bits."""


@triton.jit
def ordered_bits(values):
    """Keys, uint32, that order as ``values``, fp32, do; both zeros are equal."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def largest(keys, keep, LOWEST: tl.constexpr, PASSES: tl.constexpr):
    """Which of ``keys`` are the ``keep`` largest, equal keys by position.

    The smallest key that is kept is built up from its highest bits, two bits a pass: one sum counts the keys at or
    above its three candidates. A prefix sum then numbers the kept ones.

    Args:
        keys: [lanes], uint32, lanes a power of two up to ``MOST_KEYS``; bits below ``LOWEST`` are zero. Lanes that
            stand for nothing hold zeros and come last.
        keep: int32 scalar, at most the lanes that stand for something.
        LOWEST: number of the lowest bit that tells keys apart.
        PASSES: half of the bits from there up to the highest one.

    Returns:
        kept [lanes], bool, and slots [lanes], int32: place of a kept key among the kept ones, in order of position.
    """
    smallest = tl.full([], 0, tl.uint32)
    for step in range(PASSES):
        shift = LOWEST + 2 * (PASSES - 1 - step)
        one = tl.full([], 1, tl.uint32) << shift
        first = (keys >= (smallest | one)).to(tl.int64)
        second = (keys >= (smallest | (one << 1))).to(tl.int64)
        third = (keys >= (smallest | (one << 1) | one)).to(tl.int64)
        counts = tl.sum(first | (second << 16) | (third << 32), axis=0)
        digit = ((counts & 0xFFFF) >= keep).to(tl.uint32)
        digit += (((counts >> 16) & 0xFFFF) >= keep).to(tl.uint32)
        digit += ((counts >> 32) >= keep).to(tl.uint32)
        smallest = smallest | (digit << shift)
    above, equal = keys > smallest, keys == smallest
    missing = keep - tl.sum(above.to(tl.int32), axis=0)
    both = above.to(tl.int64) | (equal.to(tl.int64) << 32)
    before = tl.cumsum(both, axis=0) - both
    equal_before = (before >> 32).to(tl.int32)
    kept = above | (equal & (equal_before < missing))
    return kept, (before & 0xFFFFFFFF).to(tl.int32) + tl.minimum(equal_before, missing)
