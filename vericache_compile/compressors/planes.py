"""Codes of 2 to 6 bits in whole bytes: a 3-bit code is a plane of its low 2 bits and a plane of its high bit.

Shapes: K KV heads (or groups of them), S tokens, D channels, g = 32 tokens in a group.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from vericache_compile.compressors.quantizer import pack, unpack
from vericache_compile.errors import OptionError

GROUP: Final = 32
"""Tokens that are packed together: they fill whole bytes at every width."""
PLANES: Final = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
"""Widths of the bit planes that codes are packed in, lowest bits first."""


def check_bits(bits: int, method: str) -> None:
    """Raise OptionError unless `bits` is from 2 to 6."""
    if not isinstance(bits, int) or bits not in PLANES:
        raise OptionError(f"bits={bits!r}", f"compressor {method!r}", "give a whole number from 2 to 6")


def pack_planes(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [K, S, D] below 2^bits, packed into uint8 [K, S / g, g * bits / 8, D]; g divides S."""
    heads, tokens, size = codes.shape
    packed, low = [], 0
    for width in PLANES[bits]:
        plane = (codes >> low) & (2**width - 1)
        packed.append(pack(plane.view(heads, tokens // GROUP, GROUP, size), width))
        low += width
    return torch.cat(packed, dim=2)


def unpack_planes(packed: Tensor, bits: int) -> Tensor:
    """Codes, uint8 [K, S, D], from packed uint8 [K, S / g, g * bits / 8, D]."""
    widths = PLANES[bits]
    planes = torch.split(packed, [GROUP * width // 8 for width in widths], dim=2)
    codes, low = unpack(planes[0], widths[0]), widths[0]
    for plane, width in zip(planes[1:], widths[1:], strict=True):
        codes = codes | unpack(plane, width) << low
        low += width
    return codes.flatten(1, 2)
