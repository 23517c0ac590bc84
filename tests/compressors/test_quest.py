"""Quest: bounds of pages, the pages a query reads, and the cache that it reads them from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.facts import Facts, reader_of
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.quest import Quest
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive(keys: Tensor, query: Tensor, page: int, pages: int) -> list[list[int]]:
    """The tokens of the best pages per KV head, by the mean over its query heads of each page's bound."""
    kv_heads, tokens, size = keys.shape
    group, out = query.shape[0] // kv_heads, []
    for head in range(kv_heads):
        bounds = []
        for start in range(0, tokens - page + 1, page):
            own = keys[head, start : start + page]
            low, high = own.min(0).values.tolist(), own.max(0).values.tolist()
            total = 0.0
            for q in query[head * group : (head + 1) * group].tolist():
                total += sum(max(q[c] * low[c], q[c] * high[c]) for c in range(size))
            bounds.append(total / group)
        best = sorted(sorted(range(len(bounds)), key=lambda p: -bounds[p])[:pages])
        out.append([p * page + i for p in best for i in range(page)])
    return out


def test_a_step_reads_the_pages_that_its_query_can_match_best(random_row: Row) -> None:
    keys, values, queries = random_row(83)
    region = Quest(keep=0.5, page=8).compress(keys, values, queries)
    assert (region.covered, region.slots) == (80, 40)
    for query in queries.unbind(1):
        expected = naive(keys[:, :80], query, 8, 5)
        read = region.select(query)
        for head in range(2):
            assert torch.equal(read[0][head], keys[head, expected[head]])
            assert torch.equal(read[1][head], values[head, expected[head]])


def test_no_key_of_a_page_passes_its_bound(random_row: Row) -> None:
    keys, _, queries = random_row(64)
    low, high = Quest(page=8).bounds(keys)
    for query in queries.unbind(1):
        grouped = query.view(2, 2, 16)
        bound = grouped.clamp(min=0) @ high.mT + grouped.clamp(max=0) @ low.mT
        assert ((grouped @ keys.mT).view(2, 2, 8, 8).amax(-1) <= bound + 1e-4).all()


def test_a_region_holds_bounds_alone_where_the_full_cache_can_be_read(random_row: Row) -> None:
    keys, values, queries = random_row(160)
    facts = Facts(read=reader_of(keys, values))
    region = Quest(page=16).knowing(facts).compress(keys[:, :96], values[:, :96], queries)
    assert region.nbytes == (2 * 2 * 6 * 16 + 4 * 16) * 4
    longer = region.knowing(facts).extend(keys[:, 96:], values[:, 96:], queries)
    alone = Quest(page=16).compress(keys, values, queries)
    assert all(map(torch.equal, longer.select(queries[:, 0]), alone.select(queries[:, 0])))
    assert all(map(torch.equal, longer.index, alone.index))


def test_three_pages_are_read_at_least(random_row: Row) -> None:
    keys, values, queries = random_row(200)
    assert Quest(keep=0.01, page=8).compress(keys, values, queries).slots == 24
    assert Quest(keep=0.01, page=8).compress(keys[:, :9], values[:, :9], queries).slots == 8
    assert Quest(keep=0.01, page=8).compress(keys[:, :7], values[:, :7], queries).slots == 0


def test_the_first_layers_read_everything() -> None:
    assert [type(Quest(whole=2).for_layer(layer, 4)) for layer in range(4)] == [NoCompression] * 2 + [Quest] * 2


@pytest.mark.parametrize("wrong", [{"page": 0}, {"whole": -1}, {"keep": 0}, {"page": True}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Quest(**wrong)
