"""A region of which every draft step reads a choice of its own, by its query: what it holds is an index, no tokens.

The tokens are read from the full cache. Where nobody offers to (`Facts.read`), the region keeps a copy of its own.

Shapes: H query heads, K KV heads, S tokens, N slots read, D head size, Dv value head size.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.facts import Facts, Read, reader_of
from vericache_compile.compressors.none import NoCompression


class Recalled:
    """Where tokens [0, covered) of a row are read."""

    def __init__(self, read: Read | None, own: tuple[Tensor, ...]) -> None:
        self.read, self.own = read, own

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, facts: Facts) -> Recalled:
        """Of the row that keys [K, S, D] and values [K, S, Dv] begin."""
        if facts.read is not None:
            return cls(facts.read, ())
        return cls(None, tuple(x.clone(memory_format=torch.contiguous_format) for x in (keys, values)))

    def and_of(self, keys: Tensor, values: Tensor, facts: Facts) -> Recalled:
        """Also of the tokens that follow."""
        if self.read is not None:
            return Recalled(facts.read or self.read, ())
        return Recalled(None, tuple(torch.cat(pair, dim=1) for pair in zip(self.own, (keys, values), strict=True)))

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [K, N, D] and values [K, N, Dv] of tokens [K, N]."""
        return (self.read or reader_of(*self.own))(tokens)


class IndexedKV(CompressedKV):
    """An index over the tokens [0, covered); of these a draft step reads `slots`."""

    def __init__(
        self, index: tuple[Tensor, ...], latest: Tensor, recalled: Recalled, covered: int, method: Indexer
    ) -> None:
        """`latest` [H, D] is the newest query: what `materialize` chooses by."""
        self.index, self.latest, self.covered, self.method = index, latest, covered, method
        self.recalled, self.own = recalled, recalled.own

    @property
    def nbytes(self) -> int:
        """Bytes of the index, and of the tokens where they are its own."""
        return sum(x.nbytes for x in (*self.index, self.latest, *self.own))

    @abstractmethod
    def choose(self, query: Tensor) -> Tensor:
        """Tokens [K, N], ascending, that a draft step with this query [H, D] reads."""

    def select(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [K, N, D] and values [K, N, Dv] for this query [H, D]."""
        return self.recalled(self.choose(query))

    def materialize(self) -> tuple[Tensor, Tensor]:
        """What the newest query that it was made with reads."""
        return self.select(self.latest)


class Indexer(Compressor):
    """A method whose regions are indexes, but for the first layers, which read everything."""

    whole: int
    """So many first layers."""

    @property
    def queries(self) -> int:
        """The newest, for a region that is read without one."""
        return 1

    def for_layer(self, layer: int, layers: int) -> Compressor:
        """Itself, but for the first layers."""
        return NoCompression() if layer < self.whole else self


def newest(queries: Tensor | None, name: str) -> Tensor:
    """The newest of queries [H, w, D], owned: [H, D]."""
    assert queries is not None, f"{name} chooses by queries: pass them"
    return queries[:, -1].clone(memory_format=torch.contiguous_format)


def group_mean(query: Tensor, directions: Tensor) -> Tensor:
    """Products [K, n], float32, of query [H, D] with directions [K, n, D]: the mean over the heads of a KV head."""
    grouped = query.float().reshape(directions.shape[0], -1, query.shape[1]).mean(dim=1)
    products: Tensor = directions.float() @ grouped.unsqueeze(-1)
    return products.squeeze(-1)
