"""No compression: the draft reads what verification reads. The ceiling of acceptance, the plainest test.

Shapes: K KV heads, S tokens, D head size, Dv value head size, w queries, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.dense import DenseKV


class UncompressedKV(DenseKV):
    """Every token of [0, covered)."""

    @property
    def exact(self) -> int:
        """All of them."""
        return self.covered

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Append keys [K, S, D] and values [K, S, Dv]; queries are not read."""
        return type(self)(
            torch.cat([self.keys, keys], dim=1),
            torch.cat([self.values, values], dim=1),
            self.covered + keys.shape[1],
        )


@dataclass(frozen=True)
class NoCompression(Compressor):
    """Keep everything."""

    name: ClassVar[str] = "none"

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> UncompressedKV:
        """Copy keys [K, S, D] and values [K, S, Dv]; covers all S tokens, queries are not read."""
        contiguous = torch.contiguous_format
        return UncompressedKV(
            keys.clone(memory_format=contiguous), values.clone(memory_format=contiguous), keys.shape[1]
        )
