"""TurboQuant: rotate at random, then quantise each coordinate with the best codebook for a normal distribution.

Zandieh et al., arXiv 2504.19874, section 3.1 (the variant for mean squared error): a vector's norm is stored; its
direction, turned by a fixed random rotation, has coordinates that are nearly independent and normal with variance 1 / D
whatever the data. One scalar codebook of Lloyd and Max then serves all, and nothing is calibrated. The variant with a
one-bit sketch of the residual is not built.

Codes are packed by groups of 32 tokens; a 3-bit code is a plane of its low 2 bits and a plane of its high bit.
Rotation and codebook are functions of the head size and the seed, made once per process: no region counts them.

Shapes: K KV heads, S tokens, D head size, g = 32 tokens in a group, L = 2^bits levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.dense import check_count
from vericache_compile.compressors.quantizer import Codes, Quantizer, pack, unpack
from vericache_compile.errors import OptionError

GROUP: Final = 32
PLANES: Final = {2: (2,), 3: (2, 1), 4: (4,)}
"""Widths of the bit planes that codes are packed in, lowest bits first."""


class Rotated(NamedTuple):
    """Packed codes of unit vectors, and their norms."""

    packed: Tensor
    """uint8 [K, S / g, g * bits / 8, D]."""
    norms: Tensor
    """[K, S], in the dtype of the cache."""


@dataclass(frozen=True)
class TurboQuant(Quantizer):
    """Quantise whole groups of 32 tokens; at least the last `residual` stay exact in the tail."""

    name: ClassVar[str] = "turboquant"
    parameters: ClassVar[tuple[str, ...]] = ("bits",)
    paper: ClassVar[str] = "arXiv 2504.19874"

    bits: int = 4
    residual: int = 32
    """Least number of recent tokens left to the tail."""
    seed: int = 0
    """Of the rotation."""

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in PLANES:
            raise OptionError(f"bits={self.bits!r}", f"compressor {self.name!r}", "give 2, 3 or 4")
        check_count("residual", self.residual, 0, self.name)
        check_count("seed", self.seed, 0, self.name)

    @property
    def multiple(self) -> int:
        """32 tokens, which fill whole bytes."""
        return GROUP

    def quantize(self, keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv]; S is a multiple of 32."""
        return self._encode(keys), self._encode(values)

    def dequantize(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes."""
        return self._decode(*keys), self._decode(*values)

    def _encode(self, x: Tensor) -> Rotated:
        kv_heads, tokens, size = x.shape
        norms = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32)
        turned = x.float() @ rotation(size, self.seed).to(x.device).T
        steps = turned * (math.sqrt(size) / norms.unsqueeze(2))
        levels = codebook(self.bits).to(x.device)
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(steps.nan_to_num_(nan=0.0), middles).to(torch.uint8)
        packed, low = [], 0
        for width in PLANES[self.bits]:
            plane = (codes >> low) & (2**width - 1)
            packed.append(pack(plane.view(kv_heads, tokens // GROUP, GROUP, size), width))
            low += width
        return Rotated(torch.cat(packed, dim=2), norms.to(x.dtype))

    def _decode(self, packed: Tensor, norms: Tensor) -> Tensor:
        size = packed.shape[3]
        widths = PLANES[self.bits]
        planes = torch.split(packed, [GROUP * width // 8 for width in widths], dim=2)
        codes, low = torch.zeros_like(unpack(planes[0], widths[0])), 0
        for plane, width in zip(planes, widths, strict=True):
            codes |= unpack(plane, width) << low
            low += width
        steps = codebook(self.bits).to(packed.device)[codes.flatten(1, 2).int()]
        scaled = steps * (norms.float() / math.sqrt(size)).unsqueeze(2)
        return (scaled @ rotation(size, self.seed).to(packed.device)).to(norms.dtype)


@cache
def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float32 [D, D]: the Q of a normal matrix's QR, signs by R's diagonal (Haar)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode(False):
        q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
        made: Tensor = (q * r.diagonal().sign()).float()
        return made


@cache
def codebook(bits: int) -> Tensor:
    """The levels [L], float32 ascending, that represent a standard normal number best, by Lloyd's iteration.

    A level is the mean of the normal distribution between the middles to its neighbours; that is repeated until it
    stands still (Lloyd 1982, Max 1960).
    """
    count = 2**bits
    levels = [4 * (i + 0.5) / count - 2 for i in range(count)]
    for _ in range(2000):
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
        levels = [_mean_between(a, b) for a, b in pairwise(edges)]
    with torch.inference_mode(False):
        return torch.tensor(levels)


def _mean_between(low: float, high: float) -> float:
    """The mean of a standard normal number that lies in [low, high]."""
    at_low, at_high = (math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high))
    below_low, below_high = (math.erfc(-x / math.sqrt(2)) / 2 for x in (low, high))
    return (at_low - at_high) / (below_high - below_low)
