"""Expected attention against its formula with whole rotation matrices, one key at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.expected_attention import ODD, ExpectedAttention
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]
SIZE = 16


def angles(count: int) -> Tensor:
    return torch.arange(count)[:, None] * 1000.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2))


def table(count: int) -> tuple[Tensor, Tensor]:
    """Llama's order of channels: i turns with i + D / 2."""
    cos, sin = angles(count).cos(), angles(count).sin()
    return torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)


def matrix(position: int) -> Tensor:
    """The rotation [D, D] at a position."""
    out = torch.zeros(SIZE, SIZE)
    for i, angle in enumerate(angles(position + 1)[position].tolist()):
        j = i + SIZE // 2
        out[i, i] = out[j, j] = math.cos(angle)
        out[i, j], out[j, i] = -math.sin(angle), math.sin(angle)
    return out


@pytest.fixture
def rotation() -> Rotation:
    return Rotation((torch.arange(SIZE) + SIZE // 2) % SIZE, table)


def naive(keys: Tensor, values: Tensor, queries: Tensor, first: int, horizon: int, rotated: bool) -> Tensor:
    """Scores [K, C] by queries [H, w, D] of the positions from `first` on."""
    heads, window, _ = queries.shape
    group, end = heads // keys.shape[0], first + window
    mean_turn = torch.stack([matrix(p) for p in range(end, end + horizon)]).mean(0) if rotated else torch.eye(SIZE)
    weights = torch.zeros(heads, keys.shape[1])
    for h in range(heads):
        held = []
        for i in range(window):
            if first + i >= ODD:
                held.append(matrix(first + i).T @ queries[h, i] if rotated else queries[h, i])
        stacked = torch.stack(held)
        mu = mean_turn @ stacked.mean(0)
        sigma = mean_turn @ torch.cov(stacked.T, correction=0) @ mean_turn.T
        for j, key in enumerate(keys[h // group]):
            weights[h, j] = mu @ key / math.sqrt(SIZE) + key @ sigma @ key / (2 * SIZE)
    shares = weights.softmax(1).view(keys.shape[0], group, -1).mean(1)
    return shares * values.norm(dim=2)


@pytest.mark.parametrize("first", [0, 50])
@pytest.mark.parametrize("rotated", [True, False])
def test_scores_equal_the_formula(random_row: Row, rotation: Rotation, first: int, rotated: bool) -> None:
    keys, values, queries = random_row(20, queries=12)
    facts = Facts(end=first + 12, rotation=rotation if rotated else None)
    method = ExpectedAttention(horizon=9, sinks=0).knowing(facts)
    expected = naive(keys, values, queries, first, 9, rotated)
    torch.testing.assert_close(method.score(keys, values, queries, 20), expected, atol=1e-5, rtol=1e-4)


def test_the_best_and_the_first_stay(random_row: Row) -> None:
    keys, values, queries = random_row(100)
    method = ExpectedAttention(keep=0.2, window=20, sinks=4)
    region = method.compress(keys, values, queries)
    assert (region.covered, region.slots) == (80, 16)
    assert torch.equal(region.materialize()[0][:, :4], keys[:, :4])
    scores = method.score(keys, values, queries, 80)
    for head in range(2):
        best = sorted(range(80), key=lambda j: -float(scores[head, j]))[:16]
        assert torch.equal(region.materialize()[1][head], values[head, sorted(best)])


def test_tokens_that_join_have_no_sinks(random_row: Row) -> None:
    keys, values, queries = random_row(300)
    keys[:, 200:204] = -5 * queries.mean(1).view(2, 2, 16).mean(1, keepdim=True)  # what no query will look for
    region = ExpectedAttention(keep=0.1, window=10).compress(keys[:, :210], values[:, :210], queries)
    longer = region.extend(keys[:, 200:300], values[:, 200:300], queries)
    held = longer.materialize()[0][:, region.slots :]
    assert held.shape[1] == 10
    assert not (held == keys[:, 200:201]).all(-1).any()


def test_what_it_was_told_stays_with_the_method_alone(rotation: Rotation) -> None:
    method = ExpectedAttention()
    told = method.knowing(Facts(end=9, rotation=rotation))
    assert told == method
    assert told.facts.rotation is rotation
    assert method.facts.rotation is None
    assert told.later.facts.rotation is rotation


@pytest.mark.parametrize("wrong", [{"sample": 0}, {"horizon": 0}, {"sinks": -1}, {"keep": True}, {"window": True}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ExpectedAttention(**wrong)  # type: ignore[arg-type]
