"""What the methods share that first look at a row and then store it: a codebook, an order of channels, a basis.

The fit is made of the first tokens that a region covers, or given by a calibration file, and kept for those that join
later. Besides, the first `sinks` tokens of a row may stay as they are: much attention goes there whatever is asked.

Shapes: K KV heads, S tokens, D head size, Dv value head size, s sinks, w queries, H query heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.quantizer import Codes, join

Fit = tuple[Tensor, ...]
"""What a method has learned of a row; () before it has seen one."""


class Pair(NamedTuple):
    """Keys [K, S, D] and values [K, S, Dv]."""

    keys: Tensor
    values: Tensor


class FittedKV(CompressedKV):
    """Sinks as they are, then every token of [s, covered) as codes."""

    def __init__(
        self, sinks: Pair, codes: tuple[Codes, Codes] | None, covered: int, method: Fitted, fit: Fit, *, lent: bool
    ) -> None:
        """`codes` of keys and values, None where nothing is covered; a `lent` fit is not this region's own."""
        self.sinks, self.codes, self.covered, self.method, self.fit, self.lent = (
            sinks,
            codes,
            covered,
            method,
            fit,
            lent,
        )

    @property
    def slots(self) -> int:
        """Keys that attention reads from this region: every covered token."""
        return self.covered

    @property
    def nbytes(self) -> int:
        """Bytes allocated for sinks, codes, and the fit where it is this region's own."""
        codes = [part for side in self.codes or () for part in side]
        return sum(part.nbytes for part in (*self.sinks, *codes, *(() if self.lent else self.fit)))

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, covered, D] and values [K, covered, Dv], read anew from their codes at each call."""
        if self.codes is None:
            return self.sinks.keys, self.sinks.values
        keys, values = self.method.decode(*self.codes, self.fit)
        keys = self.method.as_cached(keys, self.sinks.keys.shape[1])
        return torch.cat([self.sinks.keys, keys], dim=1), torch.cat([self.sinks.values, values], dim=1)

    @property
    def attends(self) -> bool:
        """Where there is something, whether the method does."""
        return self.codes is not None and self.method.attends(self.sinks.keys.dtype)

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """As the method does it: [H, Dv]."""
        return self.method.attend(self, query, tail, scale)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Cover the whole groups of keys [K, S, D] and values [K, S, Dv] too, by the fit that is held."""
        if self.codes is None:
            return self._begin(keys, values, queries)
        tokens = keys.shape[1] // self.method.multiple * self.method.multiple
        more = self.method.encode(self.method.as_stored(keys[:, :tokens], self.covered), values[:, :tokens], self.fit)
        codes = (join(self.codes[0], more[0]), join(self.codes[1], more[1]))
        covered = self.covered + tokens
        return type(self)(Pair(*_owned(self.sinks)), codes, covered, self.method, self._passed_on(), lent=self.lent)

    def _begin(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        given = self._passed_on() or None
        return type(self)(*self.method.start(keys, values, queries, given, residual=0), lent=self.lent)

    def _passed_on(self) -> Fit:
        """The fit for a region that follows this one."""
        return self.fit if self.lent else tuple(part.clone() for part in self.fit)


class Fitted(Compressor):
    """A method that keeps every token, by what it has learned of the first ones."""

    residual: int = 32
    """Least number of recent tokens left to the tail."""
    sinks: int = 0
    """First tokens of a row that stay as they are."""

    parameters: ClassVar[tuple[str, ...]] = ()

    @property
    def least_tail(self) -> int:
        """The residual."""
        return self.residual

    @property
    def multiple(self) -> int:
        """Tokens are stored by so many."""
        return 1

    @abstractmethod
    def fit(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Fit:
        """What to keep of keys [K, S, D], values [K, S, Dv] (S >= 1) and the last queries [H, w, D]; owned tensors."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor, fit: Fit) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv], owned; `multiple` divides S, which may be 0."""

    @abstractmethod
    def decode(self, keys: Codes, values: Codes, fit: Fit) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv], in the dtype of the cache, from their codes."""

    def attends(self, dtype: torch.dtype) -> bool:
        """Whether regions of this dtype attend themselves."""
        return False

    def attend(self, region: FittedKV, query: Tensor, tail: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """`CompressedKV.attend` of a region that has codes."""
        raise AssertionError("a method that does not say that it attends")

    def as_stored(self, keys: Tensor, first: int) -> Tensor:
        """Keys [K, S, D] of a row's tokens from `first` on, as the method learns, encodes and decodes them.

        As before RoPE, where the method needs that and the runtime knows how keys were turned; else as cached.
        """
        rotation = self.facts.rotation
        return keys if rotation is None else rotation.unrotate(keys, self._position(first)).to(keys.dtype)

    def as_cached(self, keys: Tensor, first: int) -> Tensor:
        """The inverse of `as_stored`."""
        rotation = self.facts.rotation
        return keys if rotation is None else rotation.rotate(keys, self._position(first)).to(keys.dtype)

    def _position(self, token: int) -> int:
        """Of a token of the row."""
        return self.facts.position + token - self.facts.token

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> FittedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by a fit of their own, and where a method reads queries by the
        last ones [H, w, D].

        Covers the sinks and after them whole multiples, or nothing; at least `residual` tokens are not covered.
        """
        return FittedKV(*self.start(keys, values, queries, None, self.residual), lent=False)

    def start(
        self, keys: Tensor, values: Tensor, queries: Tensor | None, given: Fit | None, residual: int
    ) -> tuple[Pair, tuple[Codes, Codes] | None, int, Fitted, Fit]:
        """What a region is made of: sinks, codes, covered tokens, method, and the fit (`given`, or one made here)."""
        groups = max(keys.shape[1] - residual - self.sinks, 0) // self.multiple * self.multiple
        if groups == 0:
            return Pair(*_owned((keys[:, :0], values[:, :0]))), None, 0, self, given or ()
        rest = slice(self.sinks, self.sinks + groups)
        stored, others = self.as_stored(keys[:, rest], self.sinks), values[:, rest]
        fit = self.fit(stored, others, queries) if given is None else given
        first = Pair(*_owned((keys[:, : self.sinks], values[:, : self.sinks])))
        return first, self.encode(stored, others, fit), rest.stop, self, fit


def _owned(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return (part.clone(memory_format=torch.contiguous_format) for part in tensors)
