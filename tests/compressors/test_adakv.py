"""AdaKV: heads share a layer's budget by their scores, and memory is what they keep, without padding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.adakv import AdaKV
from vericache_compile.compressors.head_budget import SharedKV, share_out
from vericache_compile.compressors.snapkv import SnapKV, score_tokens
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_share(scores: Tensor, count: int, floor: float) -> list[list[int]]:
    """Positions kept per head, ascending: each head's own first, then the best of what is left."""
    heads = scores.shape[0]
    kept: list[list[int]] = []
    for head in scores.tolist():
        kept.append(sorted(range(len(head)), key=head.__getitem__, reverse=True)[: int(floor * count)])
    left = [(float(scores[h, t]), h, t) for h in range(heads) for t in range(scores.shape[1]) if t not in kept[h]]
    for _, head, token in sorted(left, reverse=True)[: heads * count - sum(map(len, kept))]:
        kept[head].append(token)
    return [sorted(tokens) for tokens in kept]


def sharpen(keys: Tensor) -> Tensor:
    """Keys of which head 0 draws much attention to few tokens."""
    keys = keys.clone()
    keys[0, ::9] *= 4
    return keys


def heads_of(region: SharedKV) -> list[tuple[Tensor, Tensor]]:
    """Per head its keys and values, as attention reads them."""
    keys, values = region.materialize()
    return [(keys[h, region.slots - n :], values[h, region.slots - n :]) for h, n in enumerate(region.head_slots)]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_the_choice_equals_the_naive_loops(random_row: Row, floor: float) -> None:
    keys, values, queries = random_row(68, heads=6)
    keys = sharpen(keys)
    region = AdaKV(keep=0.25, window=8, floor=floor).compress(keys, values, queries)
    scores = score_tokens(keys, queries, 7, 8)
    kept = naive_share(scores, 15, floor)
    assert region.covered == 60
    assert region.head_slots == tuple(map(len, kept))
    for head, (own_keys, own_values) in enumerate(heads_of(region)):
        assert torch.equal(own_keys, keys[head, kept[head]])
        assert torch.equal(own_values, values[head, kept[head]])


def test_heads_keep_different_counts_and_the_bytes_are_those_of_an_even_share(random_row: Row) -> None:
    keys, values, queries = random_row(68)
    keys = sharpen(keys)
    region = AdaKV(keep=0.25, window=8).compress(keys, values, queries)
    assert len(set(region.head_slots)) > 1
    assert min(region.head_slots) >= 3
    assert region.nbytes == SnapKV(keep=0.25, window=8).compress(keys, values, queries).nbytes == 30 * 28 * 4


def test_an_even_floor_is_snapkv(random_row: Row) -> None:
    keys, values, queries = random_row(68)
    region = AdaKV(keep=0.25, window=8, floor=1.0).compress(keys, values, queries)
    assert torch.equal(region.materialize()[0], SnapKV(keep=0.25, window=8).compress(keys, values, queries).keys)


def test_extend_shares_out_the_chunk(random_row: Row) -> None:
    keys, values, queries = random_row(108)
    keys = sharpen(keys)
    method = AdaKV(keep=0.25, window=8)
    region = method.compress(keys[:, :68], values[:, :68], queries)
    longer = region.extend(keys[:, 60:], values[:, 60:], queries)
    kept = naive_share(score_tokens(keys[:, 60:], queries, 7), 12, 0.2)
    assert longer.covered == 108
    for head, ((before, _), (after, _)) in enumerate(zip(heads_of(region), heads_of(longer), strict=True)):
        assert torch.equal(after, torch.cat([before, keys[head, 60:][kept[head]]]))


@pytest.mark.parametrize("tokens", [0, 1, 32])
def test_a_row_within_the_window_stays_exact(random_row: Row, tokens: int) -> None:
    region = AdaKV().compress(*random_row(tokens))
    assert (region.covered, region.slots, region.nbytes) == (0, 0, 0)
    assert region.materialize()[1].shape == (2, 0, 12)


def test_no_head_goes_below_its_floor() -> None:
    scores = torch.stack([torch.rand(50) + 1, torch.rand(50)])
    kept = share_out(scores, 10, 0.3)
    assert len(kept) == 20
    assert (kept // 50).bincount().tolist() == [17, 3]


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"window": 0}, {"kernel": 2}, {"floor": 1.5}, {"floor": -0.1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        AdaKV(**wrong)  # type: ignore[arg-type]
