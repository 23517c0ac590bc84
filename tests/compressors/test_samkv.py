"""SamKV: whole blocks; of each document the first, the last, and those whose mean key its own query matches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.samkv import SamKV
from vericache_compile.compressors.spec import parse
from vericache_compile.errors import OptionError
from vericache_compile.testing import check_tokens

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]
END = 7
"""The separator."""


def naive(keys: Tensor, queries: Tensor, block: int, blocks: int, starts: tuple[int, ...] = (0,)) -> list[list[int]]:
    """Tokens per KV head, by the module's words, in loops; documents begin at the blocks `starts`."""
    kv_heads, tokens, size = keys.shape
    group, count, out = queries.shape[0] // kv_heads, tokens // block, []
    stops = [*starts[1:], count]
    first = {*starts, *(stop - 1 for stop in stops)}
    for head in range(kv_heads):
        seen = [queries[h, i] for h in range(head * group, (head + 1) * group) for i in range(queries.shape[1])]
        query = sum(seen) / len(seen)
        mean = [sum(keys[head, p * block : (p + 1) * block]) / block for p in range(count)]
        mean = [own - sum(mean) / count for own in mean]
        rated = []
        for p in range(count):
            document = next((a, z) for a, z in zip(starts, stops, strict=True) if a <= p < z)
            others = [o for o in first if not document[0] <= o < document[1]]
            personal = query
            if others:
                weights = [math.exp(float(query @ mean[o]) / math.sqrt(size)) for o in others]
                said = sum(w / sum(weights) * mean[o] for w, o in zip(weights, others, strict=True))
                personal = query + 0.5 * query.norm() * said / said.norm()
            rated.append(float(personal @ mean[p]))
        best = sorted(range(count), key=lambda p: (p not in first, -rated[p]))[:blocks]
        out.append([p * block + i for p in sorted(best) for i in range(block)])
    return out


def test_blocks_equal_the_naive_loops(random_row: Row) -> None:
    keys, values, queries = random_row(100, queries=6)
    region = SamKV(keep=0.4, block=8, window=6).compress(keys, values, queries)
    assert (region.covered, region.slots) == (88, 40)
    expected = naive(keys[:, :88], queries, 8, 5)
    for head in range(2):
        assert torch.equal(region.materialize()[0][head], keys[head, expected[head]])
        assert torch.equal(region.materialize()[1][head], values[head, expected[head]])


@pytest.mark.parametrize("complement", [0.5, 0.0])
def test_a_document_is_asked_by_what_the_others_say(random_row: Row, complement: float) -> None:
    keys, values, queries = random_row(206, queries=6)
    ids = [0] * 206
    ids[50] = ids[119] = END  # the next documents begin at tokens 51 and 120: at blocks 7 and 15
    method = SamKV(keep=0.5, block=8, window=6, separator=END, complement=complement)
    region = method.knowing(Facts(ids=ids)).compress(keys, values, queries)
    assert (region.covered, region.slots) == (200, 13 * 8)
    expected = naive(keys[:, :200], queries, 8, 13, (0, 7, 15))
    same = [torch.equal(region.materialize()[0][head], keys[head, expected[head]]) for head in range(2)]
    assert all(same) == bool(complement), "without the others a document is asked by the question alone"


def test_first_and_last_blocks_of_many_documents_share_a_budget_that_is_too_small(random_row: Row) -> None:
    keys, values, queries = random_row(206, queries=6)
    ids = [0, *[*[0] * 23, END] * 8, *[0] * 13]  # separators at tokens 24, 48, ...: eight documents
    method = SamKV(keep=0.2, block=8, window=6, separator=END)
    region = method.knowing(Facts(ids=ids)).compress(keys, values, queries)
    starts = (0, *(-(-(i + 1) // 8) for i in range(206) if ids[i] == END and i < 192))
    expected = naive(keys[:, :200], queries, 8, 5, starts)
    for head in range(2):
        assert torch.equal(region.materialize()[0][head], keys[head, expected[head]])


@pytest.mark.parametrize("ids", [None, [0] * 100])
def test_a_prompt_without_separators_is_one_document(random_row: Row, ids: list[int] | None) -> None:
    keys, values, queries = random_row(100, queries=6)
    one = SamKV(keep=0.4, block=8, window=6).compress(keys, values, queries)
    method = SamKV(keep=0.4, block=8, window=6, separator=END).knowing(Facts(ids=ids))
    assert torch.equal(method.compress(keys, values, queries).materialize()[0], one.materialize()[0])


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


def test_tokens_are_asked_for_only_to_find_separators() -> None:
    assert "ids" not in parse("samkv", {}).wants
    assert "ids" in parse("samkv(separator=7)", {}).wants
    assert "ids" in parse("samkv(separator=7, keep=0.5) | kivi(bits=4)", {}).wants


def test_documents_of_a_padded_batch_give_plain_tokens() -> None:
    check_tokens(f"samkv(separator={END}, block=4, window=8, refresh=16)", 2, tokens=300, batch=3, count=40)


@pytest.mark.parametrize(
    "wrong",
    [{"block": 0}, {"initial": -1}, {"local": -1}, {"window": 0}, {"separator": -1}, {"complement": -0.1}],
)
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        SamKV(**wrong)  # type: ignore[arg-type]
