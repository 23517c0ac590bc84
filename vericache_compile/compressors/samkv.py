"""SamKV: keep the first block, the last, and the blocks that the question's queries look for.

After arXiv 2508.11661, which chooses blocks of a retrieved document by a query that the other documents sharpen, and
then computes the kept tokens anew, for caches that were made document by document. Here the whole prompt was prefilled
together: there is one context, nothing to sharpen and nothing to compute anew, and the full KV, against which lossless
is meant, is that of full prefill. What is left is its choice of blocks. No code of it is public; the choices made are:
the query is the mean of the last `window`, and of the group's heads; a block is its mean key, rated by their product.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, P blocks, N slots kept, D head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count
from vericache_compile.compressors.recall import group_mean
from vericache_compile.compressors.scorer import WindowScorer, top_tokens


@dataclass(frozen=True)
class SamKV(WindowScorer):
    """Keep a fraction of the whole blocks before the last `window` tokens; what is short of a block stays exact."""

    name: ClassVar[str] = "samkv"
    paper: ClassVar[str] = "arXiv 2508.11661"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    keep: float = 0.15
    block: int = 32
    """Tokens in a block."""
    initial: int = 1
    """First blocks, which always stay."""
    local: int = 1
    """Last blocks, which always stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block", self.block, 1, self.name)
        check_count("initial", self.initial, 0, self.name)
        check_count("local", self.local, 0, self.name)

    @property
    def later(self) -> SamKV:
        """Neither first nor last blocks among those that join later."""
        return replace(self, initial=0, local=0)

    def covers(self, tokens: int) -> int:
        """The whole blocks before the window."""
        return self.covers_more(super().covers(tokens))

    def covers_more(self, tokens: int) -> int:
        """Whole blocks."""
        return tokens // self.block * self.block

    def slots(self, tokens: int) -> int:
        """Whole blocks: the fraction kept, and at least the first and the last."""
        blocks = tokens // self.block
        return min(max(budget(self.keep, blocks), self.initial + self.local), blocks) * self.block

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C], float32, equal within a block, of keys [K, S, D] by the last of queries [H, w, D]."""
        assert queries is not None
        means = keys[:, :covered].float().reshape(keys.shape[0], -1, self.block, keys.shape[2]).mean(dim=2)
        rated = group_mean(queries[:, -self.window :].float().mean(dim=1), means)
        rated[:, : self.initial] = float("inf")
        rated[:, rated.shape[1] - min(self.local, rated.shape[1]) :] = float("inf")
        return rated.repeat_interleave(self.block, dim=1)

    def select(self, scores: Tensor) -> Tensor:
        """Indices [K, N] of the tokens of the best blocks, by scores [K, C]."""
        best = top_tokens(scores[:, :: self.block], self.slots(scores.shape[1]) // self.block)
        inside = torch.arange(self.block, device=scores.device)
        return (best[..., None] * self.block + inside).flatten(1)
