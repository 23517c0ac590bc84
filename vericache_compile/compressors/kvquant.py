"""KVQuant: a codebook that fits the numbers; keys per channel, values per token, outliers apart.

Hooper et al., arXiv 2401.18079, section 3. A key channel's range, without its outliers, is fixed beforehand; a value
token's is its own. Numbers scaled to [-1, 1] are rounded to the nearest of 2^bits levels, found by k-means in one
dimension (section 3.3), one codebook for a layer's keys and one for its values. A small part of each vector, what lies
farthest out, is stored apart (section 3.4), and the first tokens stay as they are (section 3.5).

Ranges and levels come from a calibration file, where k-means weighs numbers by their Fisher information as the paper
does, or else from the row's own first tokens, unweighted: started at quantiles, so nothing is random.

Keys are quantised as before RoPE (section 3.2), and turned again when they are read. Outliers of a key channel are
sought in blocks of 128 tokens, those of a value in all heads of a token together.

Shapes: K KV heads, S tokens, D head size, n outliers of a vector, b = 128 tokens in a block, L = 2^bits levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.calibration import Calibration
from vericache_compile.compressors.dense import check_count, is_number
from vericache_compile.compressors.fitted import Fit
from vericache_compile.compressors.learned import Learned
from vericache_compile.compressors.levels import nearest
from vericache_compile.compressors.observed import sample
from vericache_compile.compressors.outliers import Outliers, largest, outlier_count, put_outliers, take_outliers
from vericache_compile.compressors.planes import check_bits, pack_planes, unpack_planes
from vericache_compile.compressors.quantizer import Codes
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.errors import OptionError

BLOCK: Final = 128
SEEN: Final = 2048
"""Tokens, evenly spread, that say the range of a key channel: all of fewer, and never twice as many."""
SAMPLES: Final = 16384
"""Numbers, evenly spread over tokens and channels, that k-means looks at: about so many."""
TURNS: Final = 20
"""Of k-means."""


class Keys(NamedTuple):
    """Codes and outliers of keys."""

    packed: Tensor
    """uint8 [K, S / 32, 4 * bits, D]."""
    numbers: Tensor
    """[K, S / b, n, D]."""
    places: Tensor


class Values(NamedTuple):
    """Codes, outliers and ranges of values; the heads of a token are one vector of K * Dv."""

    packed: Tensor
    """uint8 [1, S / 32, 4 * bits, K * Dv]."""
    numbers: Tensor
    """[1, S, n]."""
    places: Tensor
    low: Tensor
    """[1, S, 1], in the dtype of the cache."""
    high: Tensor


class Ranges(NamedTuple):
    """The fit."""

    key_levels: Tensor
    """float32 [L], ascending, within [-1, 1]."""
    value_levels: Tensor
    low: Tensor
    """Of each key channel, [K, 1, D], in the dtype of the cache."""
    high: Tensor


@dataclass(frozen=True)
class KVQuant(Learned):
    """Quantise whole blocks of 128 tokens; at least the last `residual` stay exact in the tail."""

    name: ClassVar[str] = "kvquant"
    parameters: ClassVar[tuple[str, ...]] = ("bits",)
    paper: ClassVar[str] = "arXiv 2401.18079"
    needs: ClassVar[tuple[str, ...]] = ("layers", "pre_rope", "calibration")

    bits: int = 4
    outliers: float = 0.02
    """Fraction of each vector that is stored apart; at least one number. The paper has 0.01, of longer vectors."""
    sinks: int = 1
    residual: int = 32
    calibration: str | None = None
    """A file that `vericache calibrate` wrote, with the same bits and outliers."""

    def __post_init__(self) -> None:
        check_bits(self.bits, self.name)
        check_count("sinks", self.sinks, 0, self.name)
        check_count("residual", self.residual, 0, self.name)
        if not is_number(self.outliers) or not 0 < self.outliers < 1:
            fix = "give a fraction between 0 and 1"
            raise OptionError(f"outliers={self.outliers!r}", f"compressor {self.name!r}", fix)
        self.load()
        if self.held is not None:
            self.given(self.held, 0, len(self.held.model["sites"]))

    @property
    def multiple(self) -> int:
        """128 tokens: a block."""
        return BLOCK

    def fit(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Fit:
        """Ranges and levels of keys [K, S, D] and values [K, S, Dv]; queries are not read."""
        return fit_ranges(keys, values, None, self.bits, self.outliers)

    def given(self, held: Calibration, layer: int, layers: int) -> Fit:
        """The ranges and levels that a file has for a site; raises OptionError where bits or outliers differ."""
        made = Ranges(*(held.part(f"{layer}.{part}") for part in Ranges._fields))
        if len(made.key_levels) != 2**self.bits:
            fix = f"calibrate again with kvquant(bits={self.bits})"
            raise OptionError(f"{len(made.key_levels)} levels for bits={self.bits}", held.where, fix)
        if (theirs := held.parameter("outliers")) != self.outliers:
            fix = f"give outliers={theirs}, or calibrate again with kvquant(outliers={self.outliers})"
            raise OptionError(f"ranges of outliers={theirs} for outliers={self.outliers}", held.where, fix)
        return made

    def typed(self, fit: Fit, dtype: torch.dtype) -> Fit:
        """The ranges in the dtype of the cache; levels stay float32."""
        ranges = Ranges(*fit)
        return ranges._replace(low=ranges.low.to(dtype), high=ranges.high.to(dtype))

    def learn(self, model: Any, ids: Tensor, turned: Sequence[Rotation | None]) -> dict[str, Tensor]:
        """Ranges and levels of every layer, by up to 2,048 of the tokens ids [N, T]."""
        made: dict[str, Tensor] = {}
        for layer, seen in sample(model, ids, turned).items():
            squares = (seen.key_gradients.float().square(), seen.value_gradients.float().square())
            ranges = fit_ranges(seen.keys, seen.values, squares, self.bits, self.outliers)
            made |= {f"{layer}.{part}": tensor for part, tensor in ranges._asdict().items()}
        return made

    def encode(self, keys: Tensor, values: Tensor, fit: Fit) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv]; S is a multiple of 128."""
        ranges = Ranges(*fit)
        scaled = scale_down(keys, ranges.low, ranges.high)
        blocks = torch.unflatten(scaled, 1, (keys.shape[1] // BLOCK, BLOCK))
        places = largest(blocks.abs(), outlier_count(self.outliers, BLOCK), 2)
        apart = take_outliers(torch.unflatten(keys, 1, blocks.shape[1:3]), places, 2)
        made = Keys(pack_planes(nearest(scaled, ranges.key_levels), self.bits), *apart)
        outer, low, high, scaled = split_values(values, self.outliers)
        return made, Values(pack_planes(nearest(scaled, ranges.value_levels), self.bits), *outer, low, high)

    def decode(self, keys: Codes, values: Codes, fit: Fit) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their codes."""
        ranges, k, v = Ranges(*fit), Keys(*keys), Values(*values)
        kept = scale_up(ranges.key_levels[unpack_planes(k.packed, self.bits).int()], ranges.low, ranges.high)
        blocks = torch.unflatten(kept, 1, (kept.shape[1] // BLOCK, BLOCK))
        put_outliers(blocks, Outliers(k.numbers, k.places), 2)
        flat = scale_up(ranges.value_levels[unpack_planes(v.packed, self.bits).int()], v.low, v.high)
        put_outliers(flat, Outliers(v.numbers, v.places), 2)
        return kept, torch.unflatten(flat, 2, (kept.shape[0], -1)).squeeze(0).transpose(0, 1)


def fit_ranges(
    keys: Tensor, values: Tensor, weights: tuple[Tensor, Tensor] | None, bits: int, outliers: float
) -> Ranges:
    """Ranges and levels of keys [K, S, D] and values [K, S, Dv], by weights shaped as they are, or none."""
    channels = keys[:, :: max(keys.shape[1] // SEEN, 1)].transpose(1, 2).contiguous()
    skipped = int(outliers / 2 * channels.shape[2])
    ends = (channels.topk(skipped + 1, dim=2, largest=most).values[..., -1] for most in (False, True))
    low, high = (end[:, None].clone() for end in ends)
    some = slice(None, None, max(values.numel() // (4 * SAMPLES), 1))  # tokens: k-means looks at few numbers of each
    scaled = (scale_down(keys[:, some], low, high), split_values(values[:, some], outliers)[3])
    mass: tuple[Tensor | None, Tensor | None] = (None, None)
    if weights is not None:
        mass = (weights[0][:, some], weights[1][:, some].transpose(0, 1).flatten(1)[None])
    levels = [k_means(x, own, 2**bits) for x, own in zip(scaled, mass, strict=True)]
    return Ranges(levels[0], levels[1], low, high)


def split_values(values: Tensor, fraction: float) -> tuple[Outliers, Tensor, Tensor, Tensor]:
    """Outliers, low and high [1, S, 1], and all scaled [1, S, K * Dv], of values [K, S, Dv]: token by token."""
    flat = values.transpose(0, 1).flatten(1).unsqueeze(0)
    mean = flat.mean(dim=2, keepdim=True, dtype=torch.float32).to(flat.dtype)
    places = largest((flat - mean).abs(), outlier_count(fraction, flat.shape[2]), 2)
    inner = flat.scatter(2, places, mean.expand_as(places))
    low, high = inner.amin(dim=2, keepdim=True), inner.amax(dim=2, keepdim=True)  # aminmax takes seven times as long
    return take_outliers(flat, places, 2), low, high, scale_down(flat, low, high)


def scale_down(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x in float32, so that [low, high] becomes [-1, 1]; where that is one point, 0 there and far out beside it."""
    middle, half = (high.float() + low.float()) / 2, (high.float() - low.float()) / 2
    return ((x.float() - middle) / half).nan_to_num_(nan=0.0)


def scale_up(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The inverse, in the dtype of the range."""
    middle, half = (high.float() + low.float()) / 2, (high.float() - low.float()) / 2
    return torch.addcmul(middle, x, half).to(low.dtype)


def k_means(x: Tensor, weights: Tensor | None, count: int) -> Tensor:
    """`count` levels, float32 ascending, with the least weighted squared distance to the numbers of x.

    A number outside [-1, 1], as most outliers are, counts as the end that it lies beyond: without these, random numbers
    are read better in 2 and 3 bits, and mostly worse in 4 and more. Lloyd's iteration, from quantiles; a level that no
    number is nearest to stays. A cell is a run of the numbers in order, so its mean is a difference of running sums.
    """
    step = max(x.numel() // SAMPLES, 1)
    while math.gcd(step, x.shape[-1]) > 1:  # every channel has its turn
        step += 1
    numbers, order = x.reshape(-1)[::step].clamp(-1, 1).sort()
    mass = torch.ones_like(numbers) if weights is None else weights.reshape(-1)[::step].float()[order]
    sums = F.pad(torch.stack([mass, mass * numbers]).double().cumsum(dim=1), (1, 0))
    at = [(2 * i + 1) * len(numbers) // (2 * count) for i in range(count)]
    levels = numbers[torch.tensor(at, device=x.device)]
    for _ in range(TURNS):
        ends = F.pad(torch.searchsorted(numbers, (levels[1:] + levels[:-1]) / 2, right=True), (1, 0))
        ends = F.pad(ends, (0, 1), value=len(numbers))
        total, moment = sums[:, ends].diff(dim=1)
        levels = torch.where(total > 0, (moment / total).float(), levels)
    return levels
