"""What a sliding layer's draft cache has before its window: nothing, however many tokens that stands for."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from vericache_compile.compressors.dense import DenseKV


class OutOfWindow(DenseKV):
    """Tokens that no later token of a sliding layer attends to: covered, without a slot."""

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, covered: int) -> Self:
        """For one row of a site, with its head count, sizes and type: keys [K, any, D], values [K, any, E]."""
        no_keys, no_values = (x.new_empty(x.shape[0], 0, x.shape[2]) for x in (keys, values))
        return cls(no_keys, no_values, covered)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also covers the next S tokens: keys [K, S, D], values [K, S, E]."""
        return self.like(keys, values, self.covered + keys.shape[1])
