"""AdaKV: SnapKV's scores, and a budget that the heads of a layer share out by them.

Feng et al., arXiv 2407.11550, section 3 and algorithm 1: a layer's budget goes to its highest scores whatever head they
are in, so that a head whose attention is spread keeps more; `floor` of a head's even share is its own in any case.

How many each head keeps depends on the data: the host waits for these counts, once per site and compression.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, T tokens kept in all heads together, D head size,
Dv value head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Self

from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.dense import budget, check_count, check_keep, is_number
from vericache_compile.compressors.ragged import RaggedKV, join_heads
from vericache_compile.compressors.snapkv import score_tokens
from vericache_compile.errors import OptionError


class Chosen(NamedTuple):
    """What stays of some tokens."""

    keys: Tensor
    """[T, D], head by head."""
    values: Tensor
    """[T, Dv]."""
    counts: tuple[int, ...]
    """Per head [K]; they add up to T."""


class SharedKV(RaggedKV):
    """The tokens of [0, covered) that won a share of the layer's budget."""

    def __init__(self, chosen: Chosen, covered: int, method: AdaKV) -> None:
        super().__init__(*chosen, covered)
        self.method = method

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also cover keys [K, S, D] and values [K, S, Dv]; they compete among themselves, by queries [H, w, D]."""
        more = self.method.choose(keys, values, queries, keys.shape[1])
        joined = Chosen(
            join_heads(self.keys, self.counts, more.keys, more.counts),
            join_heads(self.values, self.counts, more.values, more.counts),
            tuple(mine + theirs for mine, theirs in zip(self.counts, more.counts, strict=True)),
        )
        return type(self)(joined, self.covered + keys.shape[1], self.method)


@dataclass(frozen=True)
class AdaKV(Compressor):
    """Keep the fraction `keep` of a layer's tokens before the last `window`, shared out among its heads by score."""

    name: ClassVar[str] = "adakv"
    parameters: ClassVar[tuple[str, ...]] = ("keep",)
    paper: ClassVar[str] = "arXiv 2407.11550"
    needs: ClassVar[tuple[str, ...]] = ("queries", "count")

    keep: float = 0.2
    window: int = 32
    """Queries that vote, and tokens left to the tail."""
    kernel: int = 7
    """Width of the pooling over tokens; odd."""
    floor: float = 0.2
    """Fraction of an even share that each head keeps in any case, in [0, 1]; 1 shares evenly."""
    refresh: int = field(default=0, kw_only=True, repr=False)
    """Choose anew among all tokens after so many; 0: never."""

    def __post_init__(self) -> None:
        where = f"compressor {self.name!r}"
        check_keep(self.keep, self.name)
        check_count("window", self.window, 1, self.name)
        check_count("refresh", self.refresh, 0, self.name)
        check_count("kernel", self.kernel, 1, self.name)
        if self.kernel % 2 == 0:
            raise OptionError(f"kernel={self.kernel}", where, "give an odd width")
        if not is_number(self.floor) or not 0 <= self.floor <= 1:
            raise OptionError(f"floor={self.floor!r}", where, "give a fraction in [0, 1]")

    @property
    def queries(self) -> int:
        """The window."""
        return self.window

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> SharedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by the queries [H, w, D] of the last w >= 1 tokens.

        Covers S - window tokens, or none of a row no longer than the window.
        """
        covered = max(keys.shape[1] - self.window, 0)
        return SharedKV(self.choose(keys, values, queries, covered), covered, self)

    def choose(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Chosen:
        """What stays of the first `covered` tokens of keys [K, S, D] and values [K, S, Dv]; waits for the counts."""
        assert queries is not None, f"{self.name} scores tokens by the last queries: pass them"
        heads = keys.shape[0]
        if covered == 0:
            return Chosen(keys.new_empty(0, keys.shape[2]), values.new_empty(0, values.shape[2]), (0,) * heads)
        kept = self.share(keys, queries, covered)
        counts = (kept // covered).bincount(minlength=heads).tolist()
        rows = kept // covered * keys.shape[1] + kept % covered
        return Chosen(_take(keys, rows), _take(values, rows), tuple(counts))

    def share(self, keys: Tensor, queries: Tensor, covered: int) -> Tensor:
        """Places, ascending, in the flattened [K, C], of those that stay of the first C = `covered` tokens."""
        scores = score_tokens(keys, queries[:, -self.window :], self.kernel, keys.shape[1] - covered)
        return share_out(scores, budget(self.keep, covered), self.floor)


def share_out(scores: Tensor, count: int, floor: float) -> Tensor:
    """Places [K * count], ascending, in the flattened scores [K, C]: of each head int(floor * count), else the best."""
    safe = int(floor * count)
    if safe:
        own = scores.topk(safe, dim=1).indices
        scores = scores.scatter(1, own, float("inf"))
    return scores.flatten().topk(scores.shape[0] * count, sorted=False).indices.sort().values


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [K, S, D] flattened to [K * S, D], as an owned copy."""
    return x.flatten(0, 1).index_select(0, rows)
