"""RotateKV: deal channels out so that outliers lie apart, rotate each hand by a Hadamard matrix, then quantise tokens.

Su et al., arXiv 2501.16383, section 3: a rotation spreads an outlier channel over all it is mixed with, and does so
best where each block that is rotated holds few of them. Channels of all heads together are sorted by mean size and
dealt out in turn; every block of a power of two is turned by the orthonormal Walsh-Hadamard matrix. Then each token is
rounded in groups of channels, as KIVI rounds values. The first tokens, where attention sinks, stay as they are.

The order is that of the row's own first tokens; the paper calibrates it. Keys are rotated as before RoPE, and turned by
position again when they are read. Blocks are turned by a product with the matrix: at up to 256 channels that is faster
than the fast transform's passes.

Shapes: K KV heads, S tokens, D head size, C = K * D channels of all heads, h channels in a block, c in a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor

from vericache_compile.compressors.constants import constant
from vericache_compile.compressors.dense import check_count
from vericache_compile.compressors.fitted import Fit, Fitted
from vericache_compile.compressors.kivi import Quantized, dequantize_values, quantize_values
from vericache_compile.compressors.planes import GROUP
from vericache_compile.compressors.quantizer import Codes, channel_group
from vericache_compile.errors import OptionError

LARGEST: Final = 256
"""Channels of a rotation, at most."""


@dataclass(frozen=True)
class RotateKV(Fitted):
    """Quantise whole groups of 32 tokens; at least the last `residual` stay exact in the tail."""

    name: ClassVar[str] = "rotatekv"
    parameters: ClassVar[tuple[str, ...]] = ("bits",)
    paper: ClassVar[str] = "arXiv 2501.16383"
    needs: ClassVar[tuple[str, ...]] = ("pre_rope",)

    bits: int = 4
    group: int = 32
    """At most so many channels share a scale."""
    sinks: int = 4
    residual: int = 32

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (2, 4):
            raise OptionError(f"bits={self.bits!r}", f"compressor {self.name!r}", "give 2 or 4")
        check_count("group", self.group, 1, self.name)
        check_count("sinks", self.sinks, 0, self.name)
        check_count("residual", self.residual, 0, self.name)

    @property
    def multiple(self) -> int:
        """32 tokens, which fill whole bytes."""
        return GROUP

    def fit(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Fit:
        """The order of channels of keys [K, S, D] and values [K, S, Dv], shaped [K, D] and [K, Dv]; int16."""
        return tuple(deal(flatten_heads(x).abs().mean(dim=(0, 1))).view(x.shape[0], -1) for x in (keys, values))

    def encode(self, keys: Tensor, values: Tensor, fit: Fit) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv]; S is a multiple of 32."""
        made = []
        for x, order in zip((keys, values), fit, strict=True):
            turned = turn(flatten_heads(x).index_select(2, order.flatten().long()))
            channels = channel_group(turned.shape[2], self.group)
            made.append(quantize_values(turned.to(x.dtype), self.bits, GROUP, channels))
        return made[0], made[1]

    def decode(self, keys: Codes, values: Codes, fit: Fit) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes."""
        made = []
        for codes, order in zip((keys, values), fit, strict=True):
            turned = dequantize_values(*Quantized(*codes), self.bits)
            dealt = turn(turned.float())[0].index_select(1, order.flatten().long().argsort())
            made.append(torch.unflatten(dealt.to(turned.dtype), 1, order.shape).transpose(0, 1))
        return made[0], made[1]


def flatten_heads(x: Tensor) -> Tensor:
    """x [K, S, D] in float32 as [1, S, K * D]."""
    return x.float().transpose(0, 1).flatten(1).unsqueeze(0)


def block_size(channels: int) -> int:
    """Channels of a rotation: the largest power of two that divides them, at most 256."""
    return min(channels & -channels, LARGEST)


def deal(sizes: Tensor) -> Tensor:
    """Order of channels, int16 [C], by their sizes [C]: sorted from the largest, dealt out to the blocks in turn."""
    hand = block_size(len(sizes))
    return sizes.argsort(descending=True, stable=True).view(hand, -1).T.flatten().to(torch.int16)


def turn(x: Tensor) -> Tensor:
    """x [1, S, C] with each block of channels turned; doing it twice gives x again."""
    size = block_size(x.shape[2])
    return (torch.unflatten(x, 2, (-1, size)) @ hadamard(x.device, size)).flatten(2)


@constant
def hadamard(size: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, float32 [h, h]; h is a power of two."""
    made = torch.ones(1, 1, dtype=torch.float32)
    while made.shape[0] < size:
        made = torch.cat([torch.cat([made, made], 1), torch.cat([made, -made], 1)])
    return made / math.sqrt(size)
