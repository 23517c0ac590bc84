"""CSKV: channels of keys and values shrunk to fewer coordinates per layer, beside an exact window of recent tokens.

Wang et al., arXiv 2409.10593, section 2. All heads of a layer share one basis for keys and one for values; coordinates
may be quantised on top, keys per coordinate and values per token as KIVI does (their section 2.4). They start from an
SVD and train the two maps to rebuild keys and values; we take where that ends, see `low_rank`. The exact window is the
tail.

Shapes: S tokens, r coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.kivi import (
    Quantized,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from vericache_compile.compressors.low_rank import LowRank
from vericache_compile.compressors.planes import GROUP
from vericache_compile.compressors.quantizer import Codes, channel_group
from vericache_compile.errors import OptionError

WHOLE = 16


@dataclass(frozen=True)
class CSKV(LowRank):
    """Keep the fraction `rank` of the coordinates, in 2 or 4 bits or (16) as they are."""

    name: ClassVar[str] = "cskv"
    parameters: ClassVar[tuple[str, ...]] = ("bits",)
    paper: ClassVar[str] = "arXiv 2409.10593"

    bits: int = WHOLE
    """2 or 4, or 16 for coordinates in the dtype of the cache."""

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (2, 4, WHOLE):
            raise OptionError(f"bits={self.bits!r}", f"compressor {self.name!r}", "give 2, 4 or 16")
        super().__post_init__()

    @property
    def multiple(self) -> int:
        """32 tokens where they are quantised."""
        return 1 if self.bits == WHOLE else GROUP

    def order(self, moment: Tensor, heads: int) -> tuple[Tensor, int]:
        """All heads in one group."""
        return torch.arange(heads, device=moment.device), heads

    def store(self, keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
        """Codes of coordinates [1, S, r], or these as they are."""
        if self.bits == WHOLE:
            return super().store(keys, values)
        channels = channel_group(values.shape[2], GROUP)
        return quantize_keys(keys, self.bits, GROUP), quantize_values(values, self.bits, GROUP, channels)

    def read(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Coordinates [1, S, r] of keys and values."""
        if self.bits == WHOLE:
            return super().read(keys, values)
        return dequantize_keys(*Quantized(*keys), self.bits), dequantize_values(*Quantized(*values), self.bits)
