"""What the methods that drop tokens share: score every token, keep the best, leave the rest out.

A method is a `Scorer` with a `score` of its own, or a `Chooser` where no fraction is kept. What it holds stays: tokens
that join later compete among themselves, for the same fraction.

Shapes: K KV heads, S tokens, C tokens scored (C <= S), N slots kept, D head size, Dv value head size,
w queries, H query heads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.dense import DenseKV, budget, check_count, check_keep
from vericache_compile.compressors.facts import take_tokens


class SelectedKV(DenseKV):
    """The tokens of [0, covered) that a method chose: per KV head its own, in ascending order."""

    def __init__(self, keys: Tensor, values: Tensor, covered: int, method: Chooser, exact: int = 0) -> None:
        super().__init__(keys, values, covered)
        self.method, self._exact = method, exact

    @property
    def exact(self) -> int:
        """Its last tokens, up to the last that was dropped (as far as its method knows)."""
        return self._exact

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also cover keys [K, S, D] and values [K, S, Dv], scored by later queries [H, w, D].

        What the region holds already stays; the chunk competes only with itself.
        """
        joining = self.method.joining(self.covered)
        tokens = joining.covers_more(keys.shape[1])
        keys, values = joining.keep_best(keys, values, queries, tokens)
        more = keys.shape[1]
        return type(self)(
            torch.cat([self.keys, keys], dim=1),
            torch.cat([self.values, values], dim=1),
            self.covered + tokens,
            self.method,
            self.exact + more if more == tokens else joining.newest(more, tokens),
        )


class Chooser(Compressor):
    """A method that keeps some tokens as they are."""

    region: ClassVar[type[SelectedKV]] = SelectedKV

    @abstractmethod
    def choose(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Indices [K, N], ascending, of those that stay of the first C = `covered` >= 1 tokens.

        Of keys [K, S, D] and values [K, S, Dv], by the latest queries [H, w, D]. With C < S these belong to the last
        w tokens of the S, and tokens [C, S) stay exact; with C = S they come after all, or are the last themselves.
        """

    def for_layer(self, layer: int, layers: int) -> Chooser:
        """The method as it is at site `layer` of `layers`: itself, unless sites have budgets of their own."""
        return self

    @property
    def later(self) -> Chooser:
        """The method as it chooses among tokens that join: itself, but for what it keeps of a row's first tokens."""
        return self

    def joining(self, covered: int) -> Chooser:
        """The method as it chooses among tokens that join a region of `covered`: of none, the row's first are there."""
        return self.later if covered else self

    def covers(self, tokens: int) -> int:
        """How many of a row's first tokens the region stands for; the others stay in the tail."""
        return tokens

    def covers_more(self, tokens: int) -> int:
        """How many of the tokens that have gathered in the tail join the region."""
        return tokens

    def newest(self, kept: int, tokens: int) -> int:
        """How many of `kept` tokens, chosen of so many, are the newest ones side by side, whatever the data."""
        return kept if kept == tokens else 0

    def keep_best(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> tuple[Tensor, Tensor]:
        """Owned keys [K, N, D] and values [K, N, Dv]: the best of the first `covered` tokens."""
        assert queries is not None or not self.queries, f"{self.name} scores tokens by the last queries: pass them"
        if covered == 0:
            return keys[:, :0].clone(), values[:, :0].clone()
        kept = self.choose(keys, values, queries, covered)
        return take_tokens(keys, kept), take_tokens(values, kept)

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> SelectedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by the queries [H, w, D] of the last w tokens.

        Covers `covers(S)` tokens. Queries may be None where the method reads none.
        """
        covered = self.covers(keys.shape[1])
        keys, values = self.keep_best(keys, values, queries, covered)
        return self.region(keys, values, covered, self, self.newest(keys.shape[1], covered))


@dataclass(frozen=True)
class Scorer(Chooser):
    """Keep the fraction `keep` of the tokens: those that score highest."""

    parameters: ClassVar[tuple[str, ...]] = ("keep",)

    keep: float = 0.2
    """Fraction of the covered tokens that stay, in (0, 1]."""
    refresh: int = field(default=0, kw_only=True, repr=False)
    """Choose anew among all tokens after so many; 0: never."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        check_count("refresh", self.refresh, 0, self.name)

    @abstractmethod
    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C] of the first C = `covered` >= 1 tokens; the arguments are those of `choose`."""

    def slots(self, tokens: int) -> int:
        """Slots for `tokens` covered tokens (N for C)."""
        return budget(self.keep, tokens)

    def select(self, scores: Tensor) -> Tensor:
        """Indices [K, N], ascending, of the tokens that stay, by scores [K, C]."""
        return top_tokens(scores, self.slots(scores.shape[1]))

    def choose(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Indices [K, N], ascending, of the best of the first `covered` tokens."""
        return self.select(self.score(keys, values, queries, covered))


@dataclass(frozen=True)
class WindowScorer(Scorer):
    """A scorer that leaves the most recent tokens exact, in the tail: none are covered of a row within the window."""

    window: int = 32
    """Least number of recent tokens left to the tail."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1 if "queries" in self.needs else 0, self.name)

    @property
    def queries(self) -> int:
        """The window, for a method that reads queries."""
        return self.window if "queries" in self.needs else 0

    @property
    def least_tail(self) -> int:
        """The window."""
        return self.window

    def covers(self, tokens: int) -> int:
        """All tokens but the window."""
        return max(tokens - self.window, 0)


def top_tokens(scores: Tensor, count: int) -> Tensor:
    """Indices [K, count] of the highest of scores [K, C], ascending."""
    return scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values
