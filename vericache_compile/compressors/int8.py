"""int8: every token stays, a byte per number. Symmetric, round to nearest: scale = max |x| / 127."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.packed import PackedSide
from vericache_compile.compressors.quantizer import Codes
from vericache_compile.compressors.rounding import ByteQuantizer


@dataclass(frozen=True)
class Int8(ByteQuantizer):
    """Whole numbers from -127 to 127."""

    name: ClassVar[str] = "int8"
    largest: ClassVar[float] = 127.0
    code_dtype: ClassVar[torch.dtype] = torch.int8

    def encode(self, steps: Tensor) -> Tensor:
        """Nearest whole numbers, int8, of float32 steps."""
        return steps.round().to(self.code_dtype)

    def packed(self, keys: Codes, values: Codes) -> tuple[PackedSide, PackedSide]:
        """Both sides with a scale per group of a token's channels, and no zero."""
        return _side(*keys), _side(*values)


def _side(codes: Tensor, scale: Tensor) -> PackedSide:
    tokens, size = codes.shape[1:]
    return PackedSide(codes, scale, None, tokens, size, 8, 1, size // scale.shape[2])
