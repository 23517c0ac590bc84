"""KVzip: a layer's budget goes to the keys that its context's repetition drew on; what came later stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vericache_compile.compressors.adakv import AdaKV
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.kvzip import KVzip

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def kept_of(region: object, keys: Tensor) -> list[list[int]]:
    """Which tokens each head of a region keeps."""
    read, counts = region.materialize()[0], region.head_slots  # type: ignore[attr-defined]
    own = [read[head, read.shape[1] - count :] for head, count in enumerate(counts)]
    return [(held[:, None] == keys[head][None]).all(-1).int().argmax(1).tolist() for head, held in enumerate(own)]


def test_the_best_of_all_heads_stay(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    repeated = torch.rand(2, 60, generator=torch.Generator().manual_seed(0))
    repeated[0] *= 3
    region = KVzip(keep=0.25, window=20).knowing(Facts(repeated=repeated)).compress(keys, values, queries)
    scored = [(float(repeated[head, j]), head, j) for head in range(2) for j in range(40)]
    best = sorted(scored, reverse=True)[:20]
    expected = [sorted(j for _, head, j in best if head == own) for own in range(2)]
    assert kept_of(region, keys) == expected
    assert len(expected[0]) > len(expected[1])


def test_tokens_that_were_never_repeated_stay(random_row: Row) -> None:
    keys, values, queries = random_row(100)
    repeated = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    region = (
        KVzip(keep=0.2, window=10).knowing(Facts(repeated=repeated)).compress(keys[:, :60], values[:, :60], queries)
    )
    assert region.nbytes == (2 * 6 + 2 * 20) * 28 * 4
    assert all(set(range(30, 50)) <= set(kept) for kept in kept_of(region, keys))
    longer = region.knowing(Facts(repeated=repeated[:, :0])).extend(keys[:, 60:], values[:, 60:], queries)
    assert longer.nbytes == region.nbytes + 2 * 40 * 28 * 4


def test_without_a_repetition_the_last_queries_vote(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    region = KVzip(keep=0.25, window=20).compress(keys, values, queries)
    expected = AdaKV(keep=0.25, window=20, kernel=1, floor=0.0).compress(keys, values, queries)
    assert torch.equal(region.materialize()[0], expected.materialize()[0])
