"""fp8: every token stays, as float8 e4m3 (OCP 8-bit floating point, Micikevicius et al., arXiv 2209.05433, table 1).

The scale puts a group's largest number at 448, the largest of e4m3: small numbers keep 4 significant bits, where int8
has steps of the same size for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.rounding import ByteQuantizer


@dataclass(frozen=True)
class Fp8(ByteQuantizer):
    """float8_e4m3fn."""

    name: ClassVar[str] = "fp8"
    paper: ClassVar[str] = "arXiv 2209.05433"
    largest: ClassVar[float] = 448.0
    code_dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn

    def encode(self, steps: Tensor) -> Tensor:
        """Nearest float8_e4m3fn of float32 steps, which are within its range: beyond it the cast gives NaN."""
        return steps.to(self.code_dtype)
