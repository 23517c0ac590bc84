"""A region whose heads keep different numbers of tokens: stored one head after the other, without padding.

Shapes: K KV heads, T tokens kept in all heads together, N the most of one head, D head size, Dv value head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV


class RaggedKV(CompressedKV):
    """Keys [T, D] and values [T, Dv], those of head 0 first; how to extend them is the method's."""

    def __init__(self, keys: Tensor, values: Tensor, counts: tuple[int, ...], covered: int) -> None:
        """Takes over `keys` and `values`: contiguous tensors of their own; counts [K] add up to T."""
        assert keys.shape[0] == values.shape[0] == sum(counts), "keys, values and counts must agree"
        self.keys, self.values, self.counts, self.covered = keys, values, counts, covered

    @property
    def slots(self) -> int:
        """The most keys that one head reads (N)."""
        return max(self.counts)

    @property
    def head_slots(self) -> tuple[int, ...]:
        """Keys that each head reads [K]."""
        return self.counts

    @property
    def as_cached(self) -> tuple[int, ...]:
        """All slots."""
        return self.counts

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.keys.nbytes + self.values.nbytes

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, N, D] and values [K, N, Dv], each head's at the right end; zeros before them."""
        return self._spread(self.keys), self._spread(self.values)

    def _spread(self, flat: Tensor) -> Tensor:
        out = flat.new_zeros(len(self.counts), self.slots, flat.shape[1])
        for head, own in enumerate(torch.split(flat, list(self.counts))):
            out[head, self.slots - len(own) :] = own
        return out


def join_heads(held: Tensor, counts: Sequence[int], more: Tensor, more_counts: Sequence[int]) -> Tensor:
    """Both flat tensors [T, D], head by head one after the other."""
    pairs = zip(torch.split(held, list(counts)), torch.split(more, list(more_counts)), strict=True)
    return torch.cat([part for pair in pairs for part in pair])
