"""Ghosts: cache tensors of the right shape without data, which name the sequence they stand for.

A ghost is expanded along its columns from one NaN-filled column, so reading it as data gives NaN, never a wrong
number. The NaNs carry (sequence, epoch, row, place, check) in the payload bits that IEEE 754 leaves free. They are
signaling NaNs: an operation that only moves data keeps every bit, so that a copied or permuted cache is still
recognised; arithmetic sets their quiet bit, so that a cache changed by it is not (IEEE 754-2019, section 6.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vericache_compile.plan import Site

FORMATS = {
    torch.float32: (torch.int32, 0x7FA00000, 21),
    torch.bfloat16: (torch.int16, 0x7FA0, 5),
    torch.float16: (torch.int16, 0x7D00, 8),
}
"""dtype -> (integer view, signaling NaN with one payload bit set, payload bits below it that are free)."""
FIELDS = (("sequence", 24), ("epoch", 16), ("row", 12), ("place", 12), ("check", 12))
BITS = sum(bits for _, bits in FIELDS)
MIX = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: the top bits of a product with it depend on all bits of the other factor."""


@dataclass(frozen=True)
class Name:
    """What a ghost's row spells."""

    sequence: int
    epoch: int
    row: int
    place: int
    """Which cache tensor: twice the layer, plus one for values."""

    @property
    def check(self) -> int:
        """Twelve check bits over the rest; any one bit of it changes them."""
        return self._pack(FIELDS[:-1]) * MIX >> 52 & 0xFFF ^ 0xA5A

    def to_bits(self) -> int:
        """All fields in one integer of BITS bits."""
        return self._pack(FIELDS)

    def _pack(self, fields: tuple[tuple[str, int], ...]) -> int:
        value = 0
        for field, bits in fields:
            value = value << bits | getattr(self, field) & (1 << bits) - 1
        return value


def can_spell(site: Site) -> bool:
    """Whether a site's cache tensors have enough elements, of a known type, to spell a name."""
    form = FORMATS.get(site.dtype)
    return form is not None and min(site.cached_sizes) * form[2] >= BITS


def spell(names: list[list[Name]], heads: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One column per place [P, B, K, 1, D]; row b of place p spells names[p][b] in every head."""
    view, empty, free = FORMATS[dtype]
    rows = [[_elements(name.to_bits(), size, empty, free) for name in place] for place in names]
    with torch.inference_mode(False):
        row = torch.tensor(rows, dtype=view, device=device).view(dtype)
        return row[:, :, None, None, :].expand(-1, -1, heads, -1, -1).contiguous()


def _elements(bits: int, size: int, empty: int, free: int) -> list[int]:
    count = -(-BITS // free)
    used = [empty | bits >> free * (count - 1 - i) & (1 << free) - 1 for i in range(count)]
    return used + [empty] * (size - count)


def read(tensor: Tensor) -> list[Name] | None:
    """The names that a tensor [B, K, S, D] spells, row by row; None when it is not a ghost."""
    form = FORMATS.get(tensor.dtype)
    if form is None or tensor.dim() != 4 or 0 in tensor.shape:
        return None
    view, empty, free = form
    count = -(-BITS // free)
    if tensor.shape[3] < count:
        return None
    first, last = (tensor[:, 0, column, :count].contiguous().view(view).tolist() for column in (0, -1))
    names = [_decode(row, empty, free) for row in first]
    if first != last or any(name is None for name in names):
        return None
    return [name for name in names if name is not None]


def _decode(elements: list[int], empty: int, free: int) -> Name | None:
    if any(element >> free != empty >> free for element in elements):
        return None
    value = 0
    for element in elements:
        value = value << free | element & (1 << free) - 1
    spelled: dict[str, int] = {}
    for field, bits in reversed(FIELDS):
        spelled[field] = value & (1 << bits) - 1
        value >>= bits
    name = Name(spelled["sequence"], spelled["epoch"], spelled["row"], spelled["place"])
    return name if name.check == spelled["check"] and not value else None


def is_hollow(tensor: Tensor) -> bool:
    """Whether a cache tensor [B, K, S, D] has NaN where its first or last column should hold data."""
    return bool(tensor.shape[2] and tensor[:, :, (0, -1)].isnan().any())
