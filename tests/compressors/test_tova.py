"""TOVA against the paper's rule: one query, all heads together, the same tokens for all."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.tova import Tova
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_scores(keys: Tensor, queries: Tensor) -> list[float]:
    """Attention of the last of queries [H, w, D] over keys [K, S, D], averaged over the heads."""
    heads, tokens = queries.shape[0], keys.shape[1]
    total = [0.0] * tokens
    for head in range(heads):
        own = keys[head * keys.shape[0] // heads].double()
        logits = [float(queries[head, -1].double() @ key) / math.sqrt(keys.shape[2]) for key in own]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        total = [t + weight / sum(weights) / heads for t, weight in zip(total, weights, strict=True)]
    return total


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=scores.__getitem__)[-count:])


@pytest.mark.parametrize("heads", [2, 6])
def test_scores_and_choice_equal_the_naive_loops(random_row: Row, heads: int) -> None:
    keys, values, queries = random_row(61, heads=heads)
    method = Tova(keep=0.25)
    expected = naive_scores(keys, queries)[:60]
    found = method.score(keys, values, queries, 60)
    torch.testing.assert_close(found, torch.tensor([expected, expected]), atol=1e-6, rtol=1e-5)

    region = method.compress(keys, values, queries)
    assert (region.covered, region.slots) == (60, 15)
    assert torch.equal(region.keys, keys[:, best(expected, 15)])
    assert torch.equal(region.values, values[:, best(expected, 15)])


def test_extend_scores_the_chunk_by_the_newest_query(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    region = Tova(keep=0.25).compress(keys[:, :41], values[:, :41], queries[:, :3])
    longer = region.extend(keys[:, 40:], values[:, 40:], queries)
    assert (longer.covered, longer.slots) == (60, 15)
    kept = best(naive_scores(keys[:, 40:], queries), 5)
    assert torch.equal(longer.keys[:, 10:], keys[:, 40:][:, kept])


def test_one_token_stays_exact(random_row: Row) -> None:
    keys, values, queries = random_row(1)
    assert Tova().compress(keys, values, queries).covered == 0
    assert Tova().queries == 1


def test_a_keep_out_of_range_is_an_option_error() -> None:
    with pytest.raises(OptionError, match="keep"):
        Tova(keep=0)
