"""ClusterKV: every draft step reads the clusters of keys that its query points to.

Liu et al., arXiv 2412.03213, section 4: the keys after the sinks are clustered by their direction (k-means, cosine). At
each step clusters are ranked by the product of query and centroid, and taken in that order until the budget is used up;
the last one is cut short. Sinks are always read, the first layers read everything. Tokens that join later are clustered
among themselves. Query heads that share a KV head share clusters: the mean of their products. Where the paper starts
its clusters at random tokens they start at evenly spaced ones; a token that is as like two centroids counts for both
means. Tokens are read from the full cache.

Shapes: H query heads, K KV heads, S tokens, C tokens covered, N clusters, D head size, Dv value head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count, check_keep
from vericache_compile.compressors.recall import IndexedKV, Indexer, Recalled, group_mean, newest

SCRATCH: Final = 2**24
"""Products of tokens and centroids that are computed at once; for a moment there are twice as many."""


class ClusteredKV(IndexedKV):
    """Centroids [K, N, D] and the cluster of every token [K, C], int32, of [0, covered)."""

    method: ClusterKV

    @property
    def slots(self) -> int:
        """Tokens read."""
        return min(max(budget(self.method.keep, self.covered), self.method.sinks), self.covered)

    def choose(self, query: Tensor) -> Tensor:
        """Tokens [K, N], ascending: the sinks, then cluster after cluster by the product of its centroid and query."""
        centroids, cluster = self.index
        order = group_mean(query, centroids).argsort(dim=1, descending=True)
        rank = order.argsort(dim=1).gather(1, cluster.long())
        rank[:, : self.method.sinks] = -1
        turns = rank * self.covered + torch.arange(self.covered, device=rank.device)
        return turns.topk(self.slots, dim=1, largest=False, sorted=False).indices.sort(dim=1).values

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also over keys [K, S, D] and values [K, S, Dv], clustered among themselves."""
        centroids, cluster = self.method.cluster(keys, 0)
        held = self.index[0].shape[1]
        index = (torch.cat([self.index[0], centroids], dim=1), torch.cat([self.index[1], cluster + held], dim=1))
        recalled = self.recalled.and_of(keys, values, self.method.facts)
        return type(self)(index, newest(queries, self.method.name), recalled, self.covered + keys.shape[1], self.method)


@dataclass(frozen=True)
class ClusterKV(Indexer):
    """Read the fraction `keep` of the tokens, by clusters, chosen anew at every step."""

    name: ClassVar[str] = "clusterkv"
    parameters: ClassVar[tuple[str, ...]] = ("keep",)
    paper: ClassVar[str] = "arXiv 2412.03213"
    needs: ClassVar[tuple[str, ...]] = ("queries", "layers", "read")

    keep: float = 0.2
    """Fraction of the tokens that a step reads, in (0, 1]."""
    tokens: int = 80
    """Tokens in a cluster, on average."""
    sinks: int = 16
    """First tokens, which are always read."""
    whole: int = 2
    """So many first layers read everything."""
    iterations: int = 20
    """Of k-means."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        for option, least in (("tokens", 1), ("sinks", 0), ("whole", 0), ("iterations", 0)):
            check_count(option, getattr(self, option), least, self.name)

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> ClusteredKV:
        """Cluster keys [K, S, D] and values [K, S, Dv]; queries [H, w, D]. Covers all."""
        recalled = Recalled.of(keys, values, self.facts)
        index = self.cluster(keys, self.sinks)
        return ClusteredKV(index, newest(queries, self.name), recalled, keys.shape[1], self)

    def cluster(self, keys: Tensor, sinks: int) -> tuple[Tensor, Tensor]:
        """Centroids [K, N, D] of keys [K, S, D] after the sinks, and the cluster of every token [K, S], int32."""
        points = keys[:, sinks:].float()
        count = max(points.shape[1] // self.tokens, min(points.shape[1], 1))
        if count == 0:  # all are sinks: one cluster that nobody reads from
            return torch.zeros_like(keys[:, :1]), keys.new_zeros(keys.shape[:2], dtype=torch.int32)
        starts = torch.arange(count, device=keys.device) * points.shape[1] // count
        centroids, parts = points[:, starts], torch.split(points, tokens_at_once(points, count), dim=1)
        for _ in range(self.iterations):
            directions, sums = F.normalize(centroids, dim=2), torch.zeros_like(centroids)
            members = torch.zeros_like(centroids[..., :1])
            for part in parts:
                likeness = directions @ part.mT
                own = likeness.eq_(likeness.amax(dim=1, keepdim=True))  # a CPU takes ten times as long to say which
                members += own.sum(dim=2, keepdim=True)
                sums += own @ part
            centroids = torch.where(members > 0, sums / members.clamp(min=1), centroids)
        own = F.pad(nearest(points, centroids), (keys.shape[1] - points.shape[1], 0))
        return centroids.to(keys.dtype), own.to(torch.int32)


def nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """For each of points [K, S, D] the centroid [K, N, D] whose direction is most like its own: [K, S]."""
    directions = F.normalize(centroids.float(), dim=2).mT
    parts = torch.split(points, tokens_at_once(points, centroids.shape[1]), dim=1)
    own = [(part.float() @ directions).max(dim=2).indices for part in parts]  # a CPU takes longer for argmax
    return torch.cat(own, dim=1)


def tokens_at_once(points: Tensor, count: int) -> int:
    """How many of points [K, S, D] are compared with `count` centroids at once."""
    return max(SCRATCH // (len(points) * max(count, 1)), 1)
