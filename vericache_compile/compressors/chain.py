"""Drop, then quantise what stays: more tokens in fewer bits for the same bytes.

Zhang et al., arXiv 2412.12706 (QPruningKV). The first method chooses tokens, the second stores them. Chosen tokens
that do not fill a group of the second wait beside it, as they are; they are quantised when later ones join.

Shapes: K KV heads, S tokens, N slots, D head size, Dv value head size, w queries, H query heads.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.compressors.around import Around
from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.facts import KINDS, Facts
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.quantizer import QuantizedKV, Quantizer
from vericache_compile.compressors.scorer import Chooser
from vericache_compile.errors import OptionError


class ChainKV(CompressedKV):
    """Chosen tokens of [0, covered): whole groups quantised, the rest of them waiting."""

    def __init__(self, held: CompressedKV, keys: Tensor, values: Tensor, covered: int, method: Chain) -> None:
        """`held` stands for the first chosen tokens; keys [K, N', D] and values [K, N', Dv], owned, for the others."""
        self.held, self.keys, self.values, self.covered, self.method = held, keys, values, covered, method

    @property
    def slots(self) -> int:
        """Tokens chosen (N)."""
        return self.held.slots + self.keys.shape[1]

    @property
    def in_order(self) -> bool:
        """As the quantiser stores them."""
        return self.held.in_order

    @property
    def nbytes(self) -> int:
        """Bytes allocated, quantised and waiting."""
        return self.held.nbytes + self.keys.nbytes + self.values.nbytes

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, N, D] and values [K, N, Dv], dequantised anew at each call."""
        keys, values = self.held.materialize()
        return torch.cat([keys, self.keys], dim=1), torch.cat([values, self.values], dim=1)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also cover keys [K, S, D] and values [K, S, Dv]; they compete among themselves, by queries [H, w, D]."""
        joining = self.method.drop.joining(self.covered)
        tokens = joining.covers_more(keys.shape[1])
        keys, values = joining.keep_best(keys, values, queries, tokens)
        keys, values = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
        held = self.held.extend(keys, values, None)
        used = held.covered - self.held.covered
        return type(self)(held, keys[:, used:].clone(), values[:, used:].clone(), self.covered + tokens, self.method)


@dataclass(frozen=True)
class Chain(Around):
    """`drop` chooses tokens, `quantise` stores them; its residual is not kept, `drop` leaves a window to the tail.

    The quantiser is told nothing, since chosen tokens do not stand side by side.
    """

    name: ClassVar[str] = "chain"
    around: ClassVar[str] = "drop"
    paper: ClassVar[str] = "arXiv 2412.12706"

    drop: Chooser
    quantise: Quantizer

    def knowing(self, facts: Facts) -> Self:
        """The chain with `drop` told of one row of one site."""
        if not self.wants & KINDS:
            return self
        told = copy.copy(self)
        vars(told)["drop"] = self.drop.knowing(facts)
        return told

    def for_layer(self, layer: int, layers: int) -> Compressor:
        """The chain of both as they are at site `layer`."""
        return replace(self, drop=self.drop.for_layer(layer, layers))

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> ChainKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by the last queries [H, w, D]; covers what `drop` covers."""
        covered = self.drop.covers(keys.shape[1])
        keys, values = self.drop.keep_best(keys, values, queries, covered)
        groups = keys.shape[1] // self.quantise.multiple * self.quantise.multiple
        codes = self.quantise.quantize(keys[:, :groups], values[:, :groups])
        held = QuantizedKV(*codes, groups, self.quantise)
        return ChainKV(held, keys[:, groups:].clone(), values[:, groups:].clone(), covered, self)


def make_chain(first: Compressor, second: Compressor) -> Compressor:
    """The chain of both, or the second alone after `none`.

    Raises OptionError unless the first drops tokens and the second quantises.
    """
    if isinstance(first, NoCompression):
        return second
    fix = "write one that drops tokens | one that quantises, as in snapkv(keep=0.5) | kivi(bits=4)"
    if not isinstance(first, Chooser):
        found = f"{first.name!r} does not keep the same number of tokens, as they were, in all heads"
        raise OptionError(found, "a compressor before |", fix)
    if not isinstance(second, Quantizer):
        found = f"{second.name!r} does not quantise tokens that do not stand side by side"
        raise OptionError(found, "a compressor after |", fix)
    return Chain(first, second)
