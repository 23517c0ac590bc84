"""Quest: every draft step reads the pages of the cache whose keys its query can match best.

Tang et al., arXiv 2406.10774, section 3: of each page of keys the least and largest value per channel are kept. A
query's product with any key of the page is at most sum_c max(q_c low_c, q_c high_c); the pages where that is largest
are read, whole. The first layers read everything. Query heads that share a KV head share pages: the mean of their
bounds. Nothing is dropped: the draft's own memory is the bounds, and tokens are read from the full cache.

Shapes: H query heads, K KV heads, G = H / K, S tokens, P pages, D head size, Dv value head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count, check_keep
from vericache_compile.compressors.recall import IndexedKV, Indexer, Recalled, newest
from vericache_compile.compressors.scorer import top_tokens

LEAST = 3
"""Pages that are read at least."""


class PagedKV(IndexedKV):
    """Bounds (low, high) [K, P, D] of every page of [0, covered)."""

    method: Quest

    @property
    def slots(self) -> int:
        """Tokens read: whole pages."""
        pages = self.covered // self.method.page
        return min(max(budget(self.method.keep, pages), LEAST), pages) * self.method.page

    def choose(self, query: Tensor) -> Tensor:
        """Tokens [K, N], ascending, of the pages with the largest bounds for query [H, D]."""
        page = self.method.page
        low, high = self.index
        grouped = query.float().reshape(low.shape[0], -1, query.shape[1])
        bounds = grouped.clamp(min=0) @ high.float().transpose(1, 2) + grouped.clamp(max=0) @ low.float().transpose(
            1, 2
        )
        best = top_tokens(bounds.mean(dim=1), self.slots // page)
        inside = torch.arange(page, device=best.device)
        return (best.unsqueeze(-1) * page + inside).flatten(1)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also over the whole pages of keys [K, S, D] and values [K, S, Dv]."""
        tokens = keys.shape[1] // self.method.page * self.method.page
        keys, values = keys[:, :tokens], values[:, :tokens]
        index = tuple(torch.cat(pair, dim=1) for pair in zip(self.index, self.method.bounds(keys), strict=True))
        recalled = self.recalled.and_of(keys, values, self.method.facts)
        return type(self)(index, newest(queries, self.method.name), recalled, self.covered + tokens, self.method)


@dataclass(frozen=True)
class Quest(Indexer):
    """Read the fraction `keep` of the pages, chosen anew at every step."""

    name: ClassVar[str] = "quest"
    parameters: ClassVar[tuple[str, ...]] = ("keep",)
    paper: ClassVar[str] = "arXiv 2406.10774"
    needs: ClassVar[tuple[str, ...]] = ("queries", "layers", "read")

    keep: float = 0.2
    """Fraction of the pages that a step reads, in (0, 1]; at least three pages."""
    page: int = 16
    """Tokens in a page."""
    whole: int = 2
    """So many first layers read everything."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        check_count("page", self.page, 1, self.name)
        check_count("whole", self.whole, 0, self.name)

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> PagedKV:
        """Index the whole pages of keys [K, S, D] and values [K, S, Dv]; queries [H, w, D]."""
        tokens = keys.shape[1] // self.page * self.page
        keys, values = keys[:, :tokens], values[:, :tokens]
        recalled = Recalled.of(keys, values, self.facts)
        return PagedKV(self.bounds(keys), newest(queries, self.name), recalled, tokens, self)

    def bounds(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """The least and largest [K, P, D] of each page of keys [K, P * page, D]."""
        kv_heads, tokens, size = keys.shape
        paged = keys.reshape(kv_heads, tokens // self.page, self.page, size)
        return (paged.amin(dim=2), paged.amax(dim=2))
