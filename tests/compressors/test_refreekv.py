"""ReFreeKV: tokens are added in rank order until enough of the attention's norm is there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.refreekv import ReFreeKV
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_choice(keys: Tensor, queries: Tensor, threshold: float, sinks: int) -> list[int]:
    """Positions kept of keys [K, S, D] by the last of queries [H, w, D]."""
    heads, tokens = queries.shape[0], keys.shape[1]
    rows = []
    for head in range(heads):
        own, query = keys[head * keys.shape[0] // heads].double(), queries[head, -1].double()
        weights = [math.exp(float(query @ key) / math.sqrt(len(query))) for key in own]
        rows.append([weight / sum(weights) for weight in weights])
    order = [*range(min(sinks, tokens)), *range(tokens - 1, sinks - 1, -1)]
    whole = sum(math.sqrt(sum(x * x for x in row)) for row in rows) / heads
    for count in range(1, tokens + 1):
        kept = order[:count]
        norm = sum(math.sqrt(sum(row[token] ** 2 for token in kept)) for row in rows) / heads
        if 1 - norm / whole <= threshold:
            return sorted(kept)
    return list(range(tokens))


@pytest.mark.parametrize("threshold", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("tokens", [1, 3, 60])
def test_the_choice_equals_the_naive_loops(random_row: Row, tokens: int, threshold: float) -> None:
    keys, values, queries = random_row(tokens, seed=tokens)
    region = ReFreeKV(threshold=threshold).compress(keys, values, queries)
    kept = naive_choice(keys, queries, threshold, 4)
    assert (region.covered, region.slots) == (tokens, len(kept))
    assert torch.equal(region.keys, keys[:, kept])
    assert torch.equal(region.values, values[:, kept])


def test_the_count_follows_the_data(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    near = keys.clone()
    near[:, -1] = queries[:, -1].view(2, 2, 16).mean(dim=1) * 20
    assert ReFreeKV().compress(near, values, queries).slots < ReFreeKV().compress(keys, values, queries).slots


def test_extend_ranks_the_chunk_alone(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    method = ReFreeKV(threshold=0.3)
    region = method.compress(keys[:, :30], values[:, :30], queries)
    longer = region.extend(keys[:, 30:], values[:, 30:], queries)
    kept = naive_choice(keys[:, 30:], queries, 0.3, 0)
    assert (longer.covered, longer.slots) == (60, region.slots + len(kept))
    assert torch.equal(longer.keys[:, region.slots :], keys[:, 30:][:, kept])


def test_the_first_layers_keep_everything(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    method = ReFreeKV(threshold=0.5)
    slots = [method.for_layer(layer, 4).compress(keys, values, queries).slots for layer in range(4)]
    assert slots[:2] == [60, 60]
    assert slots[2] == slots[3] < 60
    whole = method.for_layer(0, 4).compress(keys[:, :30], values[:, :30], queries)
    assert torch.equal(whole.extend(keys[:, 30:], values[:, 30:], queries).materialize()[0], keys)


def test_a_threshold_of_nothing_keeps_everything_and_so_does_nan(random_row: Row) -> None:
    keys, values, queries = random_row(60)
    keys[:, -1] = queries[:, -1].view(2, 2, 16).mean(dim=1) * 20  # float32 sees no more than this token's attention
    assert ReFreeKV(threshold=0).compress(keys, values, queries).slots == 60
    keys[0, 7] = float("nan")
    assert ReFreeKV().compress(keys, values, queries).slots == 60


@pytest.mark.parametrize(
    "wrong", [{"threshold": -0.1}, {"threshold": 1}, {"sinks": -1}, {"whole": -1}, {"threshold": False}]
)
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ReFreeKV(**wrong)  # type: ignore[arg-type]
