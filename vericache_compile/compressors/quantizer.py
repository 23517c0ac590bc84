"""What the methods that quantise share: regions of codes that grow by whole groups, and packing below a byte.

Layout of packed codes: a byte holds 8 / bits tokens of one channel, those that lie g * bits / 8 apart in a group of
tokens. Unpacking is then one shift with the channels innermost and contiguous, for reads and writes alike: no
interleaving, full vectors, and Inductor fuses it with the scaling into one loop.

Shapes: K KV heads, S tokens, D head size, Dv value head size, g tokens in a group.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.packed import PackedSide

Codes = tuple[Tensor, ...]
"""Tensors that hold one side, codes and scales: the first dimension is the KV head, the second grows with the tokens.
A NamedTuple, where its parts are worth names."""


class QuantizedKV(CompressedKV):
    """Every token of [0, covered), as codes: the first ones that its tensors have room for."""

    def __init__(self, keys: Codes, values: Codes, covered: int, method: Quantizer, room: int | None = None) -> None:
        """`room` is how many tokens the tensors are for; None for those that are covered."""
        self._keys, self._values, self.covered, self.method = keys, values, covered, method
        self.room = covered if room is None else room

    @property
    def keys(self) -> Codes:
        """Codes of the keys that are held."""
        return _first(self._keys, self.covered, self.room)

    @property
    def values(self) -> Codes:
        """Codes of the values that are held."""
        return _first(self._values, self.covered, self.room)

    @property
    def slots(self) -> int:
        """Keys that attention reads from this region: every covered token."""
        return self.covered

    @property
    def in_order(self) -> bool:
        """As the method stores them."""
        return self.method.in_order

    @property
    def nbytes(self) -> int:
        """Bytes allocated for codes and scales."""
        return sum(part.nbytes for part in (*self._keys, *self._values))

    @property
    def packed(self) -> tuple[PackedSide, PackedSide] | None:
        """Keys and values as a kernel can read them, where the method has such a form."""
        if (sides := self.method.packed(self._keys, self._values)) is None:
            return None
        keys, values = (side._replace(tokens=self.covered) for side in sides)
        return keys, values

    def leave_room(self, tokens: int) -> None:
        """Where the tensors are full, move to larger ones, for so many tokens more, rounded up to whole groups."""
        if self.covered and self.room == self.covered:
            self.room += -(-tokens // self.method.multiple) * self.method.multiple
            self._keys, self._values = (_roomy(side, self.covered, self.room) for side in (self._keys, self._values))

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, covered, D] and values [K, covered, Dv], dequantised anew at each call."""
        return self.method.dequantize(self.keys, self.values)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Cover the whole groups of keys [K, S, D] and values [K, S, Dv] too; queries are not read.

        Tokens short of a group are left to the tail. Groups are independent: the region is bit for bit what
        quantising all tokens at once would have given.
        """
        tokens = keys.shape[1] // self.method.multiple * self.method.multiple
        more_keys, more_values = self.method.quantize(keys[:, :tokens], values[:, :tokens])
        covered = self.covered + tokens
        if not self.covered < self.room >= covered:
            return type(self)(join(self.keys, more_keys), join(self.values, more_values), covered, self.method)
        for side, more in ((self._keys, more_keys), (self._values, more_values)):
            for held, part in zip(side, more, strict=True):
                begin = held.shape[1] * self.covered // self.room
                held[:, begin : begin + part.shape[1]] = part
        return type(self)(self._keys, self._values, covered, self.method, self.room)


class Quantizer(Compressor):
    """A method that keeps every token, in fewer bits."""

    residual: int = 0
    """Least number of recent tokens left to the tail."""
    in_order: ClassVar[bool] = True
    """Whether tokens are stored in the order of the text."""

    @property
    def least_tail(self) -> int:
        """The residual."""
        return self.residual

    @property
    def multiple(self) -> int:
        """Tokens are quantised by so many (g)."""
        return 1

    @abstractmethod
    def quantize(self, keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and of values [K, S, Dv], in storages of their own; g divides S, which may be 0."""

    @abstractmethod
    def dequantize(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv], in the dtype of the cache, from their codes."""

    def packed(self, keys: Codes, values: Codes) -> tuple[PackedSide, PackedSide] | None:
        """Both sides as a kernel can read them; None where no kernel knows the form."""
        return None

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> QuantizedKV:
        """Compress keys [K, S, D] and values [K, S, Dv]; queries are not read.

        Covers the largest multiple of the group that is at most S - residual, so none of a short row.
        """
        covered = max(keys.shape[1] - self.residual, 0) // self.multiple * self.multiple
        return QuantizedKV(*self.quantize(keys[:, :covered], values[:, :covered]), covered, self)


def channel_group(channels: int, group: int) -> int:
    """Channels that share a scale: the largest divisor of `channels` that is at most `group`."""
    return max(size for size in range(1, min(channels, group) + 1) if channels % size == 0)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [K, S / g, g, D] below 2^bits, packed into uint8 [K, S / g, g * bits / 8, D]."""
    kv_heads, groups, group, size = codes.shape
    per_byte = 8 // bits
    parts = codes.view(kv_heads, groups, per_byte, group // per_byte, size)
    return (parts << _shifts(bits, codes.device)).sum(dim=2, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [K, S / g, g, D], from packed uint8 [K, S / g, g * bits / 8, D]."""
    parts: Tensor = (packed.unsqueeze(2) >> _shifts(bits, packed.device)) & (2**bits - 1)
    return parts.flatten(2, 3)


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where each code of a byte starts: uint8 [8 / bits, 1, 1]."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).view(-1, 1, 1)


def _first(side: Codes, tokens: int, room: int) -> Codes:
    """Of tensors for `room` tokens the part of the first `tokens`."""
    if tokens == room:
        return side
    return _alike(side, (part[:, : part.shape[1] * tokens // room] for part in side))


def _roomy(side: Codes, tokens: int, room: int) -> Codes:
    """What is held of `tokens` tokens, in tensors for `room`, which can be written to in any mode."""
    with torch.inference_mode(False):
        made = [part.new_zeros((part.shape[0], part.shape[1] * room // tokens, *part.shape[2:])) for part in side]
    for part, larger in zip(side, made, strict=True):
        larger[:, : part.shape[1]] = part
    return _alike(side, made)


def join(held: Codes, more: Codes) -> Codes:
    """Both, one after the other along the tokens, in new storages; as the kind of tuple that `held` is."""
    return _alike(held, (torch.cat(pair, dim=1) for pair in zip(held, more, strict=True)))


def _alike(side: Codes, parts: Iterable[Tensor]) -> Codes:
    """Parts as the kind of tuple that `side` is."""
    made: Codes = getattr(type(side), "_make", tuple)(parts)
    return made
