"""SnapKV: keep the tokens that the last queries of the prompt attend to.

Li et al., arXiv 2404.14469, section 4: attention of an observation window of queries, pooled so that
neighbours of an important token come along, top-k per head. With grouped queries the group votes together.

Shapes: H query heads, K KV heads, G = H / K, S tokens, N slots kept, D head size, Dv value head size,
w queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.dense import DenseKV, budget, check_count, check_keep
from vericache_compile.errors import OptionError


class SelectedKV(DenseKV):
    """The tokens of [0, covered) with the highest scores: per KV head its own, in ascending order."""

    def __init__(self, keys: Tensor, values: Tensor, covered: int, method: SnapKV) -> None:
        super().__init__(keys, values, covered)
        self.method = method

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also cover all of keys [K, S, D] and values [K, S, Dv], scored by later queries [H, w, D].

        What the region holds already stays; the chunk competes only with itself, for keep * S slots.
        """
        assert queries is not None, "snapkv scores tokens by recent queries: pass the last ones"
        tokens = keys.shape[1]
        if tokens > 0:
            scores = score_tokens(keys, queries[:, -self.method.window :], self.method.kernel)
            kept = select_tokens(scores, self.method.keep)
            keys, values = take_tokens(keys, kept), take_tokens(values, kept)
        return type(self)(
            torch.cat([self.keys, keys], dim=1),
            torch.cat([self.values, values], dim=1),
            self.covered + tokens,
            self.method,
        )


@dataclass(frozen=True)
class SnapKV(Compressor):
    """Keep a fraction of the tokens before the last `window`; those stay exact in the tail."""

    name: ClassVar[str] = "snapkv"
    parameters: ClassVar[tuple[str, ...]] = ("keep",)
    paper: ClassVar[str] = "arXiv 2404.14469"

    keep: float = 0.2
    window: int = 32
    """Queries that vote, and tokens left to the tail."""
    kernel: int = 7
    """Width of the pooling over tokens; odd."""
    queries: int = field(init=False, repr=False)
    """As `Compressor.queries`: the window."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        check_count("window", self.window, 1, self.name)
        check_count("kernel", self.kernel, 1, self.name)
        if self.kernel % 2 == 0:
            raise OptionError(f"kernel={self.kernel}", f"compressor {self.name!r}", "give an odd width")
        object.__setattr__(self, "queries", self.window)

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> SelectedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by the queries [H, w, D] of the last w >= 1 tokens.

        Covers S - window tokens, or none of a row no longer than the window. Of more queries than the window
        the last ones vote; fewer vote alone.
        """
        assert queries is not None, "snapkv scores tokens by the last queries of the prompt: pass them"
        covered = max(keys.shape[1] - self.window, 0)
        if covered == 0:
            return SelectedKV(keys[:, :0].clone(), values[:, :0].clone(), 0, self)
        scores = score_tokens(keys, queries[:, -self.window :], self.kernel, unscored=self.window)
        kept = select_tokens(scores, self.keep)
        return SelectedKV(take_tokens(keys, kept), take_tokens(values, kept), covered, self)


def score_tokens(keys: Tensor, queries: Tensor, kernel: int, unscored: int = 0) -> Tensor:
    """Pooled mean attention [K, S - unscored], in float32, that queries [H, w, D] pay to keys [K, S, D].

    Scale is 1 / sqrt(D); query head h belongs to KV head h // G. With `unscored` = 0 the queries come after
    all the keys. Otherwise they are those of the last w <= unscored tokens: causal among these, and the last
    `unscored` keys take their share of the softmax but get no score. Pooling and the means over window and
    group are linear, so their order does not matter.
    """
    kv_heads, size = keys.shape[0], keys.shape[2]
    rows = queries.shape[1]
    assert rows > 0, "snapkv needs at least one query"
    assert queries.shape[0] % kv_heads == 0, "query heads must share the KV heads evenly"
    assert unscored == 0 or rows <= unscored < keys.shape[1], "queries must lie among the unscored tokens"
    grouped = queries.reshape(kv_heads, -1, rows, size)
    future = torch.ones(rows, rows, dtype=torch.bool, device=keys.device).triu(1)
    scores = []
    for head_keys, head_queries in zip(keys, grouped, strict=True):  # one at a time: the logits are [G, w, S]
        logits = head_queries.float() * size**-0.5 @ head_keys.float().T
        if unscored:
            logits[..., -rows:].masked_fill_(future, float("-inf"))
        attention = logits.softmax(dim=-1)
        scores.append(attention[..., : keys.shape[1] - unscored].mean(dim=(0, 1)))
    return F.avg_pool1d(torch.stack(scores), kernel, stride=1, padding=kernel // 2)


def select_tokens(scores: Tensor, keep: float) -> Tensor:
    """Indices [K, N] of the highest of scores [K, S], ascending; N = keep * S rounded up."""
    return scores.topk(budget(keep, scores.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values


def take_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """Tokens `indices` [K, N] of x [K, S, D], as an owned copy [K, N, D]."""
    return x.take_along_dim(indices.unsqueeze(-1), dim=1)
