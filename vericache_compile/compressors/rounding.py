"""Symmetric rounding of one token's channels in groups: x = code * scale, scale = max |x| / the largest code.

Shapes: K KV heads, S tokens, D head size, c channels in a group (of which D / c).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.dense import check_count
from vericache_compile.compressors.quantizer import Codes, Quantizer, channel_group


class Scaled(NamedTuple):
    """Codes and their scales."""

    codes: Tensor
    """[K, S, D], a byte each."""
    scale: Tensor
    """[K, S, D / c], in the dtype of the cache."""


@dataclass(frozen=True)
class ByteQuantizer(Quantizer):
    """A byte per number, a scale per token and group of channels; covers every token."""

    largest: ClassVar[float]
    """The largest code."""
    code_dtype: ClassVar[torch.dtype]

    group: int = 32
    """At most so many channels share a scale: the largest divisor of the head size."""
    residual: int = 0

    def __post_init__(self) -> None:
        check_count("group", self.group, 1, self.name)
        check_count("residual", self.residual, 0, self.name)

    @abstractmethod
    def encode(self, steps: Tensor) -> Tensor:
        """Codes, in `code_dtype`, of float32 numbers within [-largest, largest]."""

    def quantize(self, keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv]."""
        return self._round(keys), self._round(values)

    def dequantize(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes."""
        return _scale_up(*keys), _scale_up(*values)

    def _round(self, x: Tensor) -> Scaled:
        """x [K, S, D]; codes fit the scale as stored. A group that is not finite reads back as NaN."""
        channels = channel_group(x.shape[2], self.group)
        grouped = x.float().reshape(*x.shape[:2], x.shape[2] // channels, channels)
        scale = (grouped.abs().amax(dim=3) / self.largest).to(x.dtype)
        steps = (grouped / scale.float().unsqueeze(3)).nan_to_num_(nan=0.0)  # 0 / 0 in a group of zeros
        return Scaled(self.encode(steps.clamp_(-self.largest, self.largest)).flatten(2), scale)


def _scale_up(codes: Tensor, scale: Tensor) -> Tensor:
    """x [K, S, D] from its codes, in the dtype of the scale."""
    grouped = codes.to(scale.dtype).view(*scale.shape, codes.shape[2] // scale.shape[2])
    return grouped.mul_(scale.unsqueeze(3)).flatten(2)
