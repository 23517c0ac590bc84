"""Rotary position embedding (RoPE) as numbers: cosines and sines per position, and which channels turn together.

Su et al., arXiv 2104.09864: at position p channels (i, j) of a key turn by an angle p * f. Here a rotated key is
x * cos + x[pairs] * sin, whatever order a model keeps its channels in; a channel that does not turn is its own pair
with sin 0. What cos and sin are is the model's own affair, scaling included: they are read off its graph.

Shapes: P positions, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Table = Callable[[int], tuple[Tensor, Tensor]]
"""Count -> cos and sin [count, D], float32, of the positions from 0 on."""


class Rotation:
    """Turns keys and queries to their positions, and back."""

    def __init__(self, pairs: Tensor, table: Table) -> None:
        """`pairs` [D], int64: the channel that each channel turns with, or itself."""
        self.pairs = pairs
        self._table = table
        self._cos = self._sin = torch.empty(0)

    def at(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin [count, D] of the positions from `first` on."""
        if first + count > self._cos.shape[0]:
            room = 1 << (first + count - 1).bit_length()  # so that a growing cache asks seldom
            self._cos, self._sin = self._table(room)
        return self._cos[first : first + count], self._sin[first : first + count]

    def rotate(self, x: Tensor, first: int) -> Tensor:
        """x [*, P, D], in float32, turned to the positions from `first` on."""
        cos, sin = self.at(first, x.shape[-2])
        return turn(x.float(), self.pairs, cos, sin)

    def unrotate(self, x: Tensor, first: int) -> Tensor:
        """x [*, P, D] of the positions from `first` on, in float32, as it was before: the transposed turn, unscaled."""
        cos, sin = self.at(first, x.shape[-2])
        size = cos.square() + sin.square()
        return turn(x.float(), self.pairs, cos / size, sin.index_select(1, self.pairs) / size)

    def mean(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """The mean turn over `count` positions: cos and sin [D] to `turn` by."""
        cos, sin = self.at(first, count)
        return cos.mean(dim=0), sin.mean(dim=0)


def turn(x: Tensor, pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., N, D] * cos + x[pairs] * sin over the last axis."""
    paired = x.flatten(0, -2).index_select(1, pairs).view(x.shape)  # an index takes five times as long on the CPU
    return (x * cos).addcmul_(paired, sin)
