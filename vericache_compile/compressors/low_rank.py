"""What the methods share that store tokens in fewer coordinates: x = z B^T, z = x B, columns of B orthonormal.

B holds the principal directions of the second moment of x. That is where the papers' training ends: of all maps through
r coordinates, x -> x B B^T has the least squared error (Eckart and Young 1936), and a projection of the hidden states
by weights W B, as they train it, gives the same z. Nothing is trained, so nothing is left to a start or a rate.

Keys are taken as before RoPE, and what is rebuilt is turned again: a turn by the position makes fast pairs of channels
fill their plane, which costs rank.

Shapes: K KV heads, S tokens, D head size, G groups of heads, n = K / G * D channels of a group, r rank.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vericache_compile.calibration import Calibration
from vericache_compile.compressors.dense import check_count, is_number
from vericache_compile.compressors.fitted import Fit, FittedKV
from vericache_compile.compressors.learned import Learned
from vericache_compile.compressors.observed import observe
from vericache_compile.compressors.quantizer import Codes
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.errors import OptionError

STEP = 8
"""Ranks are multiples of it."""


class Bases(NamedTuple):
    """The fit."""

    order: Tensor
    """KV heads, one group after the other: int64 [K]."""
    keys: Tensor
    """[G, n, r], in the dtype of the cache."""
    values: Tensor
    """[1, K * Dv, r]: all heads together."""


@dataclass(frozen=True)
class LowRank(Learned):
    """Keep a fraction of the coordinates; at least the last `residual` tokens stay exact in the tail."""

    name: ClassVar[str] = "low_rank"
    needs: ClassVar[tuple[str, ...]] = ("layers", "pre_rope", "calibration")

    rank: float = 0.5
    """Fraction of the channels that coordinates are kept for, in (0, 1]; rounded up to a multiple of 8."""
    sinks: int = 4
    residual: int = 32
    calibration: str | None = None
    """A file that `vericache calibrate` wrote; without one a row's bases are of its own first tokens."""

    def __post_init__(self) -> None:
        if not is_number(self.rank) or not 0 < self.rank <= 1:
            fix = "give the fraction to keep, in (0, 1]"
            raise OptionError(f"rank={self.rank!r}", f"compressor {self.name!r}", fix)
        check_count("sinks", self.sinks, 0, self.name)
        check_count("residual", self.residual, 0, self.name)
        self.load()

    @abstractmethod
    def order(self, moment: Tensor, heads: int) -> tuple[Tensor, int]:
        """KV heads [K], group after group, and how many are in a group, by the second moment of keys [K * D, K * D]."""

    def bases(self, keys: Tensor, values: Tensor, heads: int, dtype: torch.dtype) -> Bases:
        """Whole bases, best directions first, by the second moments of keys and values [K * D, K * D]."""
        order, group = self.order(keys, heads)
        size = keys.shape[0] // heads
        channels = (order.unsqueeze(1) * size + torch.arange(size, device=keys.device)).view(heads // group, -1)
        own = torch.stack([keys[each][:, each] for each in channels])
        return Bases(order, principal(own).to(dtype), principal(values.unsqueeze(0)).to(dtype))

    def fit(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Fit:
        """Bases for keys [K, S, D] and values [K, S, Dv]; queries are not read."""
        whole = self.bases(second_moment(keys), second_moment(values), keys.shape[0], keys.dtype)
        return self.cut(whole, self.rank, self.rank, copy=True)

    def cut(self, whole: Bases, keys: float, values: float, *, copy: bool = False) -> Bases:
        """The first directions of whole bases: fractions of them for keys and for values."""
        parts = [whole.keys[..., : rank_of(keys, whole.keys)], whole.values[..., : rank_of(values, whole.values)]]
        return Bases(whole.order, *(part.clone() if copy else part for part in parts))

    def given(self, held: Calibration, layer: int, layers: int) -> Fit:
        """The bases that a file has for a site."""
        whole = Bases(*(held.part(f"{layer}.{part}") for part in Bases._fields))
        return self.cut(whole, *self.shares(held, layer))

    def shares(self, held: Calibration, layer: int) -> tuple[float, float]:
        """Fractions of the directions that keys and values of a site keep."""
        return self.rank, self.rank

    def learn(self, model: Any, ids: Tensor, turned: Sequence[Rotation | None]) -> dict[str, Tensor]:
        """Whole bases of every layer, by the tokens ids [N, T]."""
        moments: dict[int, tuple[Tensor, Tensor]] = {}
        shapes: dict[int, tuple[int, torch.dtype]] = {}
        for layer, seen in observe(model, ids, turned):
            more = second_moment(seen.keys), second_moment(seen.values)
            held = moments.get(layer)
            moments[layer] = more if held is None else (held[0] + more[0], held[1] + more[1])
            shapes[layer] = seen.keys.shape[0], seen.keys.dtype
        learned: dict[str, Tensor] = {}
        for layer, (keys, values) in moments.items():
            bases = self.bases(keys, values, *shapes[layer])
            learned |= {f"{layer}.{part}": tensor for part, tensor in bases._asdict().items()}
        return learned

    def encode(self, keys: Tensor, values: Tensor, fit: Fit) -> tuple[Codes, Codes]:
        """Coordinates of keys [K, S, D] and values [K, S, Dv]."""
        bases = Bases(*fit)
        grouped = group_heads(keys.index_select(0, bases.order), bases.keys.shape[0])
        return self.store(grouped @ bases.keys, group_heads(values, 1) @ bases.values)

    def decode(self, keys: Codes, values: Codes, fit: Fit) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv] from their coordinates."""
        bases = Bases(*fit)
        z_keys, z_values = self.read(keys, values)
        return self._keys(z_keys, bases), split_heads(z_values @ bases.values.mT, len(bases.order))

    def attends(self, dtype: torch.dtype) -> bool:
        """In float32: products in 16 bits round scores, and are fast enough at rebuilding."""
        return dtype is torch.float32

    def attend(self, region: FittedKV, query: Tensor, tail: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """[H, Dv] for query [H, D]: values are summed up as coordinates, and only the sums are rebuilt."""
        assert region.codes is not None, "asked of regions that have codes"
        bases, heads = Bases(*region.fit), len(region.sinks.keys)
        z_keys, z_values = self.read(*region.codes)
        rebuilt = self._keys(z_keys, bases)
        keys = torch.cat([region.sinks.keys, self.as_cached(rebuilt, region.sinks.keys.shape[1]), tail[0]], dim=1)
        grouped = torch.unflatten(query.to(keys.dtype), 0, (heads, -1)) * scale
        weights = (grouped @ keys.mT).softmax(dim=2).to(z_values.dtype)
        first, inner, last = torch.split(weights, [x.shape[1] for x in (region.sinks.keys, rebuilt, tail[0])], dim=2)
        basis = torch.unflatten(bases.values[0], 0, (heads, -1)).mT  # [K, r, Dv]
        out: Tensor = first @ region.sinks.values + inner @ z_values @ basis + last @ tail[1]
        return out.flatten(0, 1)

    def _keys(self, coordinates: Tensor, bases: Bases) -> Tensor:
        """Keys [K, S, D] from coordinates [G, S, r]."""
        return split_heads(coordinates @ bases.keys.mT, len(bases.order)).index_select(0, bases.order.argsort())

    def store(self, keys: Tensor, values: Tensor) -> tuple[Codes, Codes]:
        """What is stored of coordinates [G, S, r] of keys and [1, S, r] of values."""
        return (keys,), (values,)

    def read(self, keys: Codes, values: Codes) -> tuple[Tensor, Tensor]:
        """Coordinates [G, S, r] of keys and [1, S, r] of values, from what is stored."""
        return keys[0], values[0]


def rank_of(share: float, basis: Tensor) -> int:
    """How many directions of a basis [G, n, n] are kept: a share of n, rounded up to a multiple of 8, at most n."""
    size = basis.shape[1]
    return min(math.ceil((share * size - 1e-6) / STEP) * STEP, size)  # 1e-6: as in `budget`


def second_moment(x: Tensor) -> Tensor:
    """Sum over tokens of the products of channels, float32 [K * D, K * D], of x [K, S, D]; not finite counts as 0."""
    flat = x.transpose(0, 1).flatten(1).float().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return flat.T @ flat


def principal(moment: Tensor) -> Tensor:
    """Eigenvectors [G, n, n] of symmetric moments [G, n, n], the largest eigenvalue's first."""
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors.flip(-1)


def group_heads(x: Tensor, groups: int) -> Tensor:
    """x [K, S, D] as [G, S, n]: heads of a group side by side."""
    return torch.unflatten(x, 0, (groups, -1)).transpose(1, 2).flatten(2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """The inverse: [K, S, D] from x [G, S, n]."""
    return torch.unflatten(x, 2, (heads // x.shape[0], -1)).transpose(1, 2).flatten(0, 1)
