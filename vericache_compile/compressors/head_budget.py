"""One budget for all heads of a layer: a head whose scores are high keeps more than the others.

What AdaKV and KVzip are made of, and `ada | scorer`, which gives any scoring method such a budget (Feng et al., arXiv
2407.11550, section 3 and algorithm 1): the highest scores of a layer stay, whatever head they are in; `floor` of a
head's even share is its own in any case.

How many each head keeps depends on the data: the host waits for these counts, once per site and compression.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, T tokens kept in all heads together, D head size,
Dv value head size, w queries.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from torch import Tensor

from vericache_compile.compressors.around import Around
from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.dense import is_number
from vericache_compile.compressors.facts import KINDS, Facts
from vericache_compile.compressors.ragged import RaggedKV, join_heads
from vericache_compile.compressors.scorer import Chooser, Scorer
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

    def __init__(self, chosen: Chosen, covered: int, method: HeadSharing) -> None:
        super().__init__(*chosen, covered)
        self.method = method

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also cover keys [K, S, D] and values [K, S, Dv]; they compete among themselves, by queries [H, w, D]."""
        joining = self.method.later if self.covered else self.method
        tokens = joining.covers_more(keys.shape[1])
        more = joining.choose(keys, values, queries, tokens)
        joined = Chosen(
            join_heads(self.keys, self.counts, more.keys, more.counts),
            join_heads(self.values, self.counts, more.values, more.counts),
            tuple(mine + theirs for mine, theirs in zip(self.counts, more.counts, strict=True)),
        )
        return type(self)(joined, self.covered + tokens, self.method)


class HeadSharing(Compressor):
    """A method whose heads share out one budget per layer."""

    @abstractmethod
    def covers(self, tokens: int) -> int:
        """How many of a row's first tokens the region stands for; the others stay in the tail."""

    @abstractmethod
    def share(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Places, ascending, in the flattened [K, C], of those that stay of the first C = `covered` >= 1 tokens."""

    @property
    def later(self) -> HeadSharing:
        """The method as it chooses among tokens that join."""
        return self

    def covers_more(self, tokens: int) -> int:
        """How many of the tokens that have gathered in the tail join the region."""
        return tokens

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> SharedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by the queries [H, w, D] of the last w >= 1 tokens.

        Covers `covers(S)` tokens, which may be none.
        """
        covered = self.covers(keys.shape[1])
        return SharedKV(self.choose(keys, values, queries, covered), covered, self)

    def choose(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Chosen:
        """What stays of the first `covered` tokens of keys [K, S, D] and values [K, S, Dv]; waits for the counts."""
        assert queries is not None or not self.queries, f"{self.name} scores tokens by the last queries: pass them"
        heads = keys.shape[0]
        if covered == 0:
            return Chosen(keys.new_empty(0, keys.shape[2]), values.new_empty(0, values.shape[2]), (0,) * heads)
        kept = self.share(keys, values, queries, covered)
        counts = (kept // covered).bincount(minlength=heads).tolist()
        rows = kept // covered * keys.shape[1] + kept % covered
        return Chosen(_take(keys, rows), _take(values, rows), tuple(counts))


@dataclass(frozen=True)
class Ada(Around, HeadSharing):
    """Any method that scores tokens per head, its budget shared out among the heads of a layer by its scores."""

    name: ClassVar[str] = "ada"
    around: ClassVar[str] = "scorer"
    paper: ClassVar[str] = "arXiv 2407.11550"
    needs: ClassVar[tuple[str, ...]] = ("count",)

    scorer: Scorer
    floor: float = 0.2
    """Fraction of an even share that each head keeps in any case, in [0, 1]; 1 shares evenly."""

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, Scorer) or type(self.scorer).select is not Scorer.select:
            fix = "write one that keeps each head's best tokens, as in ada | snapkv(keep=0.2), or knorm, or h2o"
            raise OptionError(f"{self.scorer.name!r} cannot share its budget out", "a compressor after ada |", fix)
        check_floor(self.floor, self.name)

    @property
    def later(self) -> Ada:
        """With the scorer as it chooses among tokens that join."""
        return self if self.scorer.later is self.scorer else self._with(self.scorer.later)

    def for_layer(self, layer: int, layers: int) -> Ada:
        """With the scorer as it is at site `layer`; a budget per layer comes before `ada`."""
        own = self.scorer.for_layer(layer, layers)
        return self if own is self.scorer else self._with(own)

    def knowing(self, facts: Facts) -> Self:
        """With the scorer told of one row of one site."""
        return self._with(self.scorer.knowing(facts)) if self.wants & KINDS else self

    def covers(self, tokens: int) -> int:
        """What the scorer covers."""
        return self.scorer.covers(tokens)

    def covers_more(self, tokens: int) -> int:
        """What the scorer covers of tokens that join."""
        return self.scorer.covers_more(tokens)

    def share(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Places, ascending, in the flattened [K, C]: the scorer's highest scores, as many as its heads keep."""
        scores = self.scorer.score(keys, values, queries, covered)
        return share_out(scores, self.scorer.slots(covered), self.floor)

    def _with(self, scorer: Chooser) -> Self:
        made = copy.copy(self)
        vars(made)["scorer"] = scorer
        return made


def share_out(scores: Tensor, count: int, floor: float) -> Tensor:
    """Places [K * count], ascending, in the flattened scores [K, C]: of each head int(floor * count), else the best."""
    scores, safe = scores.float(), int(floor * count)
    if safe:
        own = scores.topk(safe, dim=1).indices
        scores = scores.scatter(1, own, float("inf"))
    return scores.flatten().topk(scores.shape[0] * count, sorted=False).indices.sort().values


def check_floor(floor: float, method: str) -> None:
    """Raise OptionError unless `floor` is a fraction in [0, 1]."""
    if not is_number(floor) or not 0 <= floor <= 1:
        raise OptionError(f"floor={floor!r}", f"compressor {method!r}", "give a fraction in [0, 1]")


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [K, S, D] flattened to [K * S, D], as an owned copy."""
    return x.flatten(0, 1).index_select(0, rows)
