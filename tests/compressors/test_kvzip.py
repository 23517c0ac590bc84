"""KVzip: the budget goes to the keys that the context's repetition drew on; what came later stays."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.adakv import AdaKV
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.kvzip import KVzip
from vericache_compile.errors import OptionError

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


def test_sites_share_one_budget(random_row: Row) -> None:
    generator = torch.Generator().manual_seed(0)
    everywhere = tuple(torch.rand(2, 60, generator=generator) * scale for scale in (1, 2, 4))
    scored = sorted((float(x[head, j]) for x in everywhere for head in range(2) for j in range(40)), reverse=True)
    least, shared = scored[3 * 2 * 10 - 1], dict[object, Tensor]()
    for layer, own in enumerate(everywhere):
        keys, values, queries = random_row(60, seed=layer)
        facts = Facts(layer=layer, repeated=own, everywhere=everywhere, shared=shared)
        region = KVzip(keep=0.25, window=20).knowing(facts).compress(keys, values, queries)
        expected = [[j for j in range(40) if float(own[head, j]) >= least] for head in range(2)]
        assert list(region.head_slots) == [len(kept) for kept in expected]
        assert kept_of(region, keys) == [kept or kept_of(region, keys)[head] for head, kept in enumerate(expected)]
    assert len(shared) == 1
    alone = KVzip(keep=0.25, window=20, per_layer=True).knowing(facts).compress(keys, values, queries)
    assert sum(alone.head_slots or ()) == 20 < sum(region.head_slots or ())


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


def test_values_out_of_range_are_option_errors() -> None:
    with pytest.raises(OptionError, match="per_layer=1"):
        KVzip(per_layer=1)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="window=0"):
        KVzip(window=0)


def test_sinks_stay_whatever_the_budget(random_row: Row) -> None:
    """Also where a budget of a few tokens is less than they are."""
    keys, values, _ = random_row(10)
    generator, shared = torch.Generator().manual_seed(0), {}
    sites = (torch.rand(2, 10, generator=generator) for _ in range(3))
    everywhere = tuple(site.index_fill_(1, torch.arange(4), math.inf) for site in sites)
    for repeated in everywhere:
        facts = Facts(repeated=repeated, everywhere=everywhere, shared=shared)
        kept = KVzip(keep=0.2).knowing(facts).share(keys, values, None, 10).tolist()
        assert {*range(4), *range(10, 14)} <= set(kept)
