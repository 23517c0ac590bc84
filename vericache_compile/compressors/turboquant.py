"""TurboQuant: rotate at random, then quantise each coordinate with the best codebook for a normal distribution.

Zandieh et al., arXiv 2504.19874, section 3.1 (the variant for mean squared error): a vector's norm is stored; its
direction, turned by a fixed random rotation, has coordinates that are nearly independent and normal with variance 1 / D
whatever the data. One scalar codebook of Lloyd and Max then serves all, and nothing is calibrated. The variant with a
one-bit sketch of the residual is not built.

Codes are packed by groups of 32 tokens.
Rotation and codebook are functions of the head size and the seed (see `constants`).

Shapes: K KV heads, S tokens, D head size, g = 32 tokens in a group, L = 2^bits levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.constants import constant
from vericache_compile.compressors.dense import check_count, check_seed
from vericache_compile.compressors.levels import nearest
from vericache_compile.compressors.planes import GROUP, check_bits, pack_planes, unpack_planes
from vericache_compile.compressors.quantizer import Codes, Quantizer


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
        check_bits(self.bits, self.name)
        check_count("residual", self.residual, 0, self.name)
        check_seed(self.seed, self.name)

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
        size = x.shape[2]
        norms = torch.linalg.vector_norm(x, dim=2, dtype=torch.float32)
        turned = x.float() @ rotation(x.device, size, self.seed).T
        steps = turned * (math.sqrt(size) / norms.unsqueeze(2))
        codes = nearest(steps.nan_to_num_(nan=0.0), codebook(x.device, self.bits))
        return Rotated(pack_planes(codes, self.bits), norms.to(x.dtype))

    def _decode(self, packed: Tensor, norms: Tensor) -> Tensor:
        size = packed.shape[3]
        steps = codebook(packed.device, self.bits)[unpack_planes(packed, self.bits).int()]
        scaled = steps * (norms.float() / math.sqrt(size)).unsqueeze(2)
        return (scaled @ rotation(packed.device, size, self.seed)).to(norms.dtype)


@constant
def rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float32 [D, D]: the Q of a normal matrix's QR, signs by R's diagonal (Haar)."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    made: Tensor = (q * r.diagonal().sign()).float()
    return made


@constant
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
    return torch.tensor(levels, dtype=torch.float32)


def _mean_between(low: float, high: float) -> float:
    """The mean of a standard normal number that lies in [low, high]."""
    at_low, at_high = (math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high))
    below_low, below_high = (math.erfc(-x / math.sqrt(2)) / 2 for x in (low, high))
    return (at_low - at_high) / (below_high - below_low)
