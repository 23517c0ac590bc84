"""StreamingLLM: the first tokens, on which attention rests its surplus weight, and the most recent ones.

Xiao et al., arXiv 2309.17453, section 3.2. The paper renumbers positions inside its cache; here keys stay as
they were cached (post-RoPE, true positions): a draft has to resemble the model that reads the full KV.

Shapes: K KV heads, S tokens, C tokens scored, D head size, Dv value head size, w queries, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count
from vericache_compile.compressors.facts import take_tokens
from vericache_compile.compressors.scorer import Scorer, SelectedKV, top_tokens


class StreamingKV(SelectedKV):
    """The first `sinks` tokens of [0, covered) and the most recent ones."""

    method: Streaming

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Cover keys [K, S, D] and values [K, S, Dv] too; queries are not read.

        The budget grows by at most S slots, so the region holds exactly what compressing all tokens at once
        would have kept.
        """
        covered = self.covered + keys.shape[1]
        keys, values = torch.cat([self.keys, keys], dim=1), torch.cat([self.values, values], dim=1)
        scores = self.method.score(keys, values, queries, keys.shape[1])
        count = self.method.slots(covered)
        kept, exact = top_tokens(scores, count), self.method.newest(count, covered)
        return type(self)(take_tokens(keys, kept), take_tokens(values, kept), covered, self.method, exact)


@dataclass(frozen=True)
class Streaming(Scorer):
    """Keep a fraction of the tokens: the first `sinks`, the rest from the end."""

    name: ClassVar[str] = "streaming"
    paper: ClassVar[str] = "arXiv 2309.17453"
    region: ClassVar[type[SelectedKV]] = StreamingKV

    sinks: int = 4
    """First tokens, which always stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sinks", self.sinks, 0, self.name)

    @property
    def later(self) -> Streaming:
        """The most recent ones: a row's first tokens were first once."""
        return replace(self, sinks=0)

    def newest(self, kept: int, tokens: int) -> int:
        """All but the sinks."""
        return kept if kept == tokens else max(kept - self.sinks, 0)

    def slots(self, tokens: int) -> int:
        """Slots for `tokens` tokens: the fraction kept, at least the sinks and one recent token."""
        return min(tokens, max(self.sinks + 1, budget(self.keep, tokens)))

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C], int64: later tokens above earlier ones, sinks above all."""
        positions = torch.arange(covered, device=keys.device)
        ranks = positions + covered * (positions < self.sinks)
        return ranks.expand(keys.shape[0], covered)
