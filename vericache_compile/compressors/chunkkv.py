"""ChunkKV: keep whole chunks of neighbouring tokens, the same ones in all heads of a layer.

Liu et al., arXiv 2502.00299, section 3: the last queries' attention to each token, summed over the heads, and its mean
over a chunk, decide. Tokens short of a chunk stay exact, in the tail. With `reuse` > 1 groups of so many adjacent
layers share the choice of the first of them, which saves the scoring (section 3.3).

Shapes: H query heads, K KV heads, S tokens, C tokens scored, N slots kept, D head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count
from vericache_compile.compressors.scorer import WindowScorer, top_tokens
from vericache_compile.compressors.window_attention import mean_attention
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class ChunkKV(WindowScorer):
    """Keep a fraction of the whole chunks before the last `window` tokens, whose queries vote."""

    name: ClassVar[str] = "chunkkv"
    paper: ClassVar[str] = "arXiv 2502.00299"
    needs: ClassVar[tuple[str, ...]] = ("queries", "shared")

    chunk: int = 10
    """Tokens in a chunk; at most the window."""
    reuse: int = 1
    """Adjacent layers that share a choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("chunk", self.chunk, 1, self.name)
        check_count("reuse", self.reuse, 1, self.name)
        if self.chunk > self.window:
            fix = f"give at most window={self.window}"
            raise OptionError(f"chunk={self.chunk}", f"compressor {self.name!r}", fix)

    @property
    def wants(self) -> frozenset[str]:
        """What layers share only where some do."""
        return super().wants - ({"shared"} if self.reuse == 1 else set())

    def covers(self, tokens: int) -> int:
        """The whole chunks before the window."""
        return self.covers_more(super().covers(tokens))

    def covers_more(self, tokens: int) -> int:
        """Whole chunks."""
        return tokens // self.chunk * self.chunk

    def choose(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Indices [K, N]: its own, or those of its group's first layer."""
        shared = self.facts.shared
        if shared is None:
            return super().choose(keys, values, queries, covered)
        group = (self, self.facts.layer // self.reuse, covered)
        if group not in shared:
            shared[group] = super().choose(keys, values, queries, covered)[:1]
        return shared[group].expand(keys.shape[0], -1)

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C], equal for all K: mean attention of the last of queries [H, w, D] to keys [K, S, D]."""
        assert queries is not None
        behind = keys.shape[1] - covered  # a window at first, less than a chunk when tokens join later
        unscored = behind if behind >= self.window else 0
        attention = mean_attention(keys, queries[:, -self.window :], unscored)[:, :covered]
        return attention.mean(dim=0, keepdim=True).expand_as(attention)

    def select(self, scores: Tensor) -> Tensor:
        """Indices [K, N] of the tokens of the best chunks, by scores [K, C] that are equal for all K."""
        chunks = scores[:1].reshape(1, -1, self.chunk).mean(dim=2)
        best = top_tokens(chunks, budget(self.keep, chunks.shape[1]))
        inside = torch.arange(self.chunk, device=scores.device)
        return (best[..., None] * self.chunk + inside).flatten(1).expand(scores.shape[0], -1)
