"""SnapKV against loops that follow the paper one query, one key, one head at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.compressors.dense import budget
from vericache_compile.compressors.scorer import SelectedKV
from vericache_compile.compressors.snapkv import SnapKV, score_tokens
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def attention_row(query: Tensor, keys: Tensor) -> list[float]:
    """Softmax of one query over keys [S, D], in Python floats."""
    logits = [float(query @ key) / math.sqrt(len(query)) for key in keys]
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def naive_scores(keys: Tensor, queries: Tensor, kernel: int, unscored: int) -> list[list[float]]:
    """Scores [K][S - unscored], by queries of the last tokens if `unscored`, of later ones if not."""
    keys, queries = keys.double(), queries.double()
    kv_heads, tokens, _ = keys.shape
    heads, rows, _ = queries.shape
    scored = tokens - unscored
    scores = [[0.0] * scored for _ in range(kv_heads)]
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        mean = [0.0] * scored
        for row in range(rows):
            visible = tokens - rows + row + 1 if unscored else tokens
            attention = attention_row(queries[head, row], keys[kv_head, :visible])
            mean = [total + weight / rows for total, weight in zip(mean, attention[:scored], strict=True)]
        for token in range(scored):
            nearby = range(token - kernel // 2, token + kernel // 2 + 1)
            pooled = sum(mean[other] for other in nearby if 0 <= other < scored) / kernel
            scores[kv_head][token] += pooled / (heads // kv_heads)
    return scores


def number_values(values: Tensor) -> Tensor:
    """Values that say their position."""
    return torch.arange(values.shape[1], dtype=values.dtype).view(1, -1, 1).expand_as(values)


def kept_positions(region: SelectedKV) -> Tensor:
    return region.values[..., 0].long()


def assert_best(positions: Tensor, scores: list[list[float]]) -> None:
    """No token left out scores higher than one kept (up to the rounding of float32)."""
    for kept, head_scores in zip(positions.tolist(), scores, strict=True):
        left_out = [score for token, score in enumerate(head_scores) if token not in kept]
        assert min(head_scores[token] for token in kept) >= max(left_out, default=0.0) - 1e-7


@pytest.mark.parametrize("heads", [2, 4, 6])
@pytest.mark.parametrize(("tokens", "rows"), [(60, 8), (60, 3), (60, 1), (9, 8), (11, 8)])
def test_scores_and_choice_equal_the_naive_loops(random_row: Row, tokens: int, rows: int, heads: int) -> None:
    keys, values, queries = random_row(tokens, heads=heads, queries=rows, seed=tokens + rows)
    method = SnapKV(keep=0.25, window=8)

    expected = naive_scores(keys, queries, kernel=7, unscored=8)
    scores = score_tokens(keys, queries, kernel=7, unscored=8)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-5)

    region = method.compress(keys, number_values(values), queries)
    assert (region.covered, region.slots) == (tokens - 8, budget(0.25, tokens - 8))
    assert_best(kept_positions(region), expected)


@pytest.mark.parametrize(("tokens", "rows"), [(40, 8), (40, 1), (5, 8), (1, 2)])
def test_extend_scores_the_chunk_alone_and_covers_all_of_it(random_row: Row, tokens: int, rows: int) -> None:
    keys, values, queries = random_row(50, seed=tokens)
    old = SnapKV(keep=0.25, window=8).compress(keys, number_values(values), queries)
    chunk, chunk_values, recent = random_row(tokens, queries=rows, seed=tokens + 1)

    region = old.extend(chunk, number_values(chunk_values), recent)

    expected = naive_scores(chunk, recent, kernel=7, unscored=0)
    assert (region.covered, region.slots) == (42 + tokens, old.slots + budget(0.25, tokens))
    assert torch.equal(region.keys[:, : old.slots], old.keys)
    assert_best(kept_positions(region)[:, old.slots :], expected)


@settings(deadline=None)
@given(tokens=st.integers(0, 90), more=st.integers(0, 20), rows=st.integers(1, 12), keep=st.floats(0.01, 1.0))
def test_indices_ascend_and_counts_follow_the_budget(
    random_row: Row, tokens: int, more: int, rows: int, keep: float
) -> None:
    keys, values, queries = random_row(tokens, queries=rows)
    region = SnapKV(keep=keep, window=10).compress(keys, number_values(values), queries)

    covered = tokens - 10 if tokens > 10 else 0
    assert (region.covered, region.slots) == (covered, budget(keep, covered))
    positions = kept_positions(region)
    assert (positions.diff(dim=1) > 0).all()
    assert (positions < covered).all()
    taken = keys.take_along_dim(positions.unsqueeze(-1), dim=1)
    assert torch.equal(region.keys, taken)

    chunk, chunk_values, _ = random_row(more, seed=1)
    longer = region.extend(chunk, number_values(chunk_values), queries)
    assert (longer.covered, longer.slots) == (covered + more, budget(keep, covered) + budget(keep, more))
    assert (kept_positions(longer)[:, region.slots :].diff(dim=1) > 0).all()


def test_keeping_all_keeps_the_row_in_order(random_row: Row) -> None:
    keys, values, queries = random_row(50)
    region = SnapKV(keep=1.0, window=8).compress(keys, values, queries)
    assert torch.equal(region.keys, keys[:, :42])
    assert torch.equal(region.values, values[:, :42])


def test_heads_choose_their_own_tokens() -> None:
    keys = torch.zeros(2, 40, 4)
    keys[0, 10], keys[1, 25] = 9.0, 9.0
    values = number_values(torch.zeros(2, 40, 4))
    region = SnapKV(keep=0.2, window=5).compress(keys, values, torch.ones(4, 5, 4))
    assert kept_positions(region).tolist() == [list(range(7, 14)), list(range(22, 29))]


def test_of_more_queries_than_the_window_only_the_last_vote(random_row: Row) -> None:
    keys, values, queries = random_row(60, queries=20)
    method = SnapKV(keep=0.3, window=8)
    all_given, last_given = (
        method.compress(keys, values, queries),
        method.compress(keys, values, queries[:, -8:]),
    )
    assert torch.equal(all_given.keys, last_given.keys)


def test_large_bfloat16_logits_are_scored_in_float32(random_row: Row) -> None:
    keys, _, queries = random_row(60, dtype=torch.bfloat16)
    scores = score_tokens(keys * 20, queries * 20, kernel=7, unscored=8)
    assert scores.dtype == torch.float32
    expected = score_tokens((keys * 20).float(), (queries * 20).float(), kernel=7, unscored=8)
    assert torch.equal(scores, expected)


def test_not_a_number_does_not_crash(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    keys[0, 3], keys[1, 5] = float("nan"), float("inf")
    region = SnapKV(window=8).compress(keys, values, queries)
    assert region.slots == budget(0.2, 52)


def test_missing_queries_are_named(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    with pytest.raises(AssertionError, match="last queries"):
        SnapKV().compress(keys, values, None)
    region = SnapKV().compress(keys, values, queries)
    with pytest.raises(AssertionError, match="last queries"):
        region.extend(keys, values, None)


def test_it_asks_for_as_many_queries_as_its_window() -> None:
    assert SnapKV().queries == 32
    assert SnapKV(window=8).queries == 8


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"keep": 2}, {"window": 0}, {"kernel": 4}, {"kernel": 0}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        SnapKV(**wrong)  # type: ignore[arg-type]
