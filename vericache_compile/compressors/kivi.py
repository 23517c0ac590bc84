"""KIVI: every token stays, in 4 or 2 bits per number. Keys are quantised per channel, values per token.

Liu et al., arXiv 2402.02750, section 3 and algorithm 1: outliers of keys sit in fixed channels, those of
values do not. So a group of tokens of one key channel shares a scale, and a group of channels of one value
token does. Asymmetric, round to nearest: scale = (max - min) / (2^bits - 1), x = code * scale + min.

Shapes: K KV heads, S tokens, D head size, Dv value head size, g tokens in a group, c channels in a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.dense import check_count
from vericache_compile.compressors.packed import PackedSide
from vericache_compile.compressors.quantizer import Codes, Quantizer, channel_group, pack, unpack
from vericache_compile.errors import OptionError


class Quantized(NamedTuple):
    """Packed codes with their scales and zeros, the latter two in the dtype of the cache."""

    packed: Tensor
    """uint8 [K, S / g, g * bits / 8, D]."""
    scale: Tensor
    """Keys [K, S / g, D]; values [K, S, Dv / c]."""
    zero: Tensor
    """Shaped as the scale."""


@dataclass(frozen=True)
class Kivi(Quantizer):
    """Quantise whole groups of tokens; at least the last `residual` stay exact in the tail."""

    name: ClassVar[str] = "kivi"
    parameters: ClassVar[tuple[str, ...]] = ("bits",)
    paper: ClassVar[str] = "arXiv 2402.02750"

    bits: int = 4
    group: int = 32
    """Tokens that share a key scale, and at most so many channels that share a value scale."""
    residual: int = 32
    """Least number of recent tokens left to the tail."""

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (2, 4):
            raise OptionError(f"bits={self.bits!r}", f"compressor {self.name!r}", "give 2 or 4")
        check_count("group", self.group, 1, self.name)
        check_count("residual", self.residual, 0, self.name)
        if self.group % (8 // self.bits):
            fix = f"give a multiple of {8 // self.bits}: so many {self.bits}-bit codes fill a byte"
            raise OptionError(f"group={self.group}", f"compressor {self.name!r}", fix)

    @property
    def multiple(self) -> int:
        """The group."""
        return self.group

    def quantize(self, keys: Tensor, values: Tensor) -> tuple[Quantized, Quantized]:
        """Quantise keys [K, S, D] and values [K, S, Dv]; S is a multiple of the group."""
        return (
            quantize_keys(keys, self.bits, self.group),
            quantize_values(values, self.bits, self.group, channel_group(values.shape[2], self.group)),
        )

    def dequantize(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes."""
        return dequantize_keys(*Quantized(*keys), self.bits), dequantize_values(*Quantized(*values), self.bits)

    def packed(self, keys: Codes, values: Codes) -> tuple[PackedSide, PackedSide]:
        """Keys with a scale per channel of a group, values with a scale per group of a token's channels."""
        k, v = Quantized(*keys), Quantized(*values)
        tokens, size = v.scale.shape[1], v.packed.shape[3]
        return (
            PackedSide(*k, tokens, k.packed.shape[3], self.bits, self.group, 0),
            PackedSide(*v, tokens, size, self.bits, self.group, size // v.scale.shape[2]),
        )


def quantize_keys(keys: Tensor, bits: int, group: int) -> Quantized:
    """Keys [K, S, D] per channel, in groups of `group` tokens; S is a multiple of it."""
    kv_heads, tokens, size = keys.shape
    codes, scale, zero = _round_to_nearest(keys.reshape(kv_heads, tokens // group, group, size), 2, bits)
    return Quantized(pack(codes, bits), scale, zero)


def quantize_values(values: Tensor, bits: int, group: int, channels: int) -> Quantized:
    """Values [K, S, Dv] per token, in groups of `channels` channels; `group` divides S and is for packing."""
    kv_heads, tokens, size = values.shape
    codes, scale, zero = _round_to_nearest(values.reshape(kv_heads, tokens, size // channels, channels), 3, bits)
    return Quantized(pack(codes.view(kv_heads, tokens // group, group, size), bits), scale, zero)


def dequantize_keys(packed: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Keys [K, S, D] from packed uint8 [K, S / g, g * bits / 8, D], scale and zero [K, S / g, D].

    Pure tensor arithmetic in the dtype of the scale: Inductor makes one loop of it, eager two large passes.
    """
    codes = unpack(packed, bits).to(scale.dtype)
    return torch.addcmul(zero.unsqueeze(2), codes, scale.unsqueeze(2)).flatten(1, 2)


def dequantize_values(packed: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Values [K, S, Dv] from packed uint8 [K, S / g, g * bits / 8, Dv], scale and zero [K, S, Dv / c].

    As `dequantize_keys`; product and sum apart, since eager addcmul does not vectorise over a repeated scale.
    """
    channels = packed.shape[3] // scale.shape[2]
    codes = unpack(packed, bits).view(*scale.shape, channels)
    return (codes * scale.unsqueeze(3)).add_(zero.unsqueeze(3)).flatten(2, 3)


def _round_to_nearest(x: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 shaped as x, scale and zero without `dim`, whose whole extent is one group.

    Codes are chosen for the scale as stored, rounded to the dtype of x. A group that holds NaN or an infinity
    gets a scale that is not finite, and so reads back as NaN or infinity, never as a wrong finite number.
    """
    low, high = x.amin(dim=dim, keepdim=True), x.amax(dim=dim, keepdim=True)  # a CPU takes longer for aminmax
    levels = 2**bits - 1
    scale = ((high.float() - low.float()) / levels).to(x.dtype)
    steps = (x.float() - low.float()).div_(scale.float())
    steps.nan_to_num_(nan=0.0)  # 0 / 0 in a constant group; and a cast of NaN to integers is undefined
    return steps.round_().clamp_(0, levels).to(torch.uint8), scale.squeeze(dim), low.squeeze(dim)
