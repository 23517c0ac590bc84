"""GEAR: quantise, and store apart what that does worst: a few outliers exactly, the rest of the error at low rank.

Kang et al., arXiv 2403.05527, section 3: X = D + L + S. S holds the largest and smallest numbers of each vector (of a
key channel over a block of tokens, of a value token over its channels), which are replaced by the vector's mean before
the rest is quantised as KIVI does (D). L = Q P^T is the low-rank part of what is left, per head, by power iteration
from a seeded start: Q = R P, P = R^T Q, both made orthonormal in the last turn.

Their L spans the whole prompt; ours spans a block of 128 tokens, so that a region grows by blocks that are independent
of each other.

Shapes: K KV heads, S tokens, D head size, b = 128 tokens in a block, n outliers of a vector, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.constants import constant
from vericache_compile.compressors.dense import check_count, check_seed, is_number
from vericache_compile.compressors.kivi import (
    Quantized,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)
from vericache_compile.compressors.outliers import Outliers, largest, outlier_count, put_outliers, take_outliers
from vericache_compile.compressors.quantizer import Codes, Quantizer, channel_group
from vericache_compile.errors import OptionError

BLOCK: Final = 128
TURNS: Final = 3
"""Power iterations."""


class Geared(NamedTuple):
    """One side; all but the codes and places in the dtype of the cache."""

    packed: Tensor
    """As KIVI's."""
    scale: Tensor
    zero: Tensor
    numbers: Tensor
    """Outliers: keys [K, S / b, n, D]; values [K, S / b, b, n]."""
    places: Tensor
    left: Tensor
    """Q [K, S / b, b, r]."""
    right: Tensor
    """P [K, S / b, D, r]."""


@dataclass(frozen=True)
class Gear(Quantizer):
    """Quantise whole blocks of 128 tokens; at least the last `residual` stay exact in the tail."""

    name: ClassVar[str] = "gear"
    parameters: ClassVar[tuple[str, ...]] = ("bits",)
    paper: ClassVar[str] = "arXiv 2403.05527"

    bits: int = 4
    group: int = 32
    """Tokens that share a key scale, and at most so many channels that share a value scale; divides 128."""
    outliers: float = 0.02
    """Fraction of each vector that is stored apart: half of it from each end, at least one number."""
    rank: int = 2
    residual: int = 32
    """Least number of recent tokens left to the tail."""
    seed: int = 0
    """Of the power iteration's start."""

    def __post_init__(self) -> None:
        where = f"compressor {self.name!r}"
        if not isinstance(self.bits, int) or self.bits not in (2, 4):
            raise OptionError(f"bits={self.bits!r}", where, "give 2 or 4")
        for option, least in (("group", 4), ("rank", 1), ("residual", 0)):
            check_count(option, getattr(self, option), least, self.name)
        check_seed(self.seed, self.name)
        if BLOCK % self.group:
            raise OptionError(f"group={self.group}", where, f"give a divisor of {BLOCK}, from 4 up")
        if not is_number(self.outliers) or not 0 < self.outliers < 1:
            raise OptionError(f"outliers={self.outliers!r}", where, "give a fraction between 0 and 1")

    @property
    def multiple(self) -> int:
        """128 tokens: a block."""
        return BLOCK

    def quantize(self, keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv]; S is a multiple of 128."""
        return self._encode(keys, dim=2), self._encode(values, dim=3)

    def dequantize(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes."""
        made = (self._decode(Geared(*keys), dim=2), self._decode(Geared(*values), dim=3))
        return made[0].flatten(1, 2), made[1].flatten(1, 2)

    def _encode(self, x: Tensor, dim: int) -> Geared:
        """Codes of x [K, S, D]; vectors run along `dim` of its blocks [K, S / b, b, D]."""
        blocks = torch.unflatten(x, 1, (x.shape[1] // BLOCK, BLOCK))
        count = outlier_count(self.outliers / 2, blocks.shape[dim])
        places = torch.cat([largest(side, count, dim) for side in (blocks, -blocks)], dim)
        apart = take_outliers(blocks, places, dim)
        means = blocks.mean(dim, keepdim=True, dtype=torch.float32).to(x.dtype)
        plain = blocks.scatter(dim, places, means.expand_as(places)).flatten(1, 2)
        if dim == 2:
            codes = quantize_keys(plain, self.bits, self.group)
        else:
            codes = quantize_values(plain, self.bits, self.group, channel_group(x.shape[2], self.group))
        error = blocks.float() - put_outliers(self._read(codes, dim), apart, dim).float()
        left, right = low_rank(error, min(self.rank, x.shape[2]), self.seed)
        factors = (part.to(x.dtype).clone(memory_format=torch.contiguous_format) for part in (left, right))
        return Geared(*codes, *apart, *factors)

    def _decode(self, codes: Geared, dim: int) -> Tensor:
        base = self._read(Quantized(*codes[:3]), dim).add_(codes.left @ codes.right.mT)
        return put_outliers(base, Outliers(codes.numbers, codes.places), dim)

    def _read(self, codes: Quantized, dim: int) -> Tensor:
        """What KIVI's codes say, [K, S / b, b, D]."""
        flat = (dequantize_keys if dim == 2 else dequantize_values)(*codes, self.bits)
        return torch.unflatten(flat, 1, (flat.shape[1] // BLOCK, BLOCK))


def low_rank(error: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """Q [..., b, r], orthonormal, and P [..., D, r], so that Q P^T is near the best rank-r part of `error` [..., b, D].

    Algorithm 2 of the paper; what is not finite counts as no error.
    """
    error = error.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    right = start(error.device, error.shape[-1], rank, seed).expand(*error.shape[:-2], -1, -1)
    for turn in range(TURNS):
        last = turn == TURNS - 1
        left = error @ (torch.linalg.qr(right).Q if last else right)
        left = torch.linalg.qr(left).Q if last else left
        right = error.mT @ left
    return left, right


@constant
def start(size: int, rank: int, seed: int) -> Tensor:
    """Where the power iteration begins: uniform numbers, float32 [D, r]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, rank, generator=generator, dtype=torch.float32)
