"""SamKV: whole blocks, the first, the last, and those whose mean key the mean query matches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.samkv import SamKV
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive(keys: Tensor, queries: Tensor, block: int, blocks: int) -> list[list[int]]:
    """Tokens per KV head, the first and the last block among them."""
    kv_heads, tokens, _ = keys.shape
    group, out = queries.shape[0] // kv_heads, []
    for head in range(kv_heads):
        seen = [queries[h, i] for h in range(head * group, (head + 1) * group) for i in range(queries.shape[1])]
        query = sum(seen) / len(seen)
        rated = [float(query @ (sum(keys[head, s : s + block]) / block)) for s in range(0, tokens, block)]
        middle = sorted(range(1, len(rated) - 1), key=lambda p: -rated[p])[: blocks - 2]
        best = sorted([0, *middle, len(rated) - 1])
        out.append([p * block + i for p in best for i in range(block)])
    return out


def test_blocks_equal_the_naive_loops(random_row: Row) -> None:
    keys, values, queries = random_row(100, queries=6)
    region = SamKV(keep=0.4, block=8, window=6).compress(keys, values, queries)
    assert (region.covered, region.slots) == (88, 40)
    expected = naive(keys[:, :88], queries, 8, 5)
    for head in range(2):
        assert torch.equal(region.materialize()[0][head], keys[head, expected[head]])
        assert torch.equal(region.materialize()[1][head], values[head, expected[head]])


def test_first_and_last_block_stay_of_any_budget(random_row: Row) -> None:
    keys, values, queries = random_row(200)
    region = SamKV(keep=0.01, block=16, window=8).compress(keys, values, queries)
    assert torch.equal(region.materialize()[0], torch.cat([keys[:, :16], keys[:, 176:192]], dim=1))


def test_tokens_that_join_have_no_first_and_last_block(random_row: Row) -> None:
    keys, values, queries = random_row(250)
    region = SamKV(keep=0.2, block=8, window=2).compress(keys[:, :90], values[:, :90], queries)
    longer = region.extend(keys[:, 88:250], values[:, 88:250], queries)
    assert longer.covered == 88 + 160
    assert longer.slots == region.slots + 4 * 8


@pytest.mark.parametrize("wrong", [{"block": 0}, {"initial": -1}, {"local": -1}, {"window": 0}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        SamKV(**wrong)  # type: ignore[arg-type]
