"""SparK: the most salient channels of each token are exact, the others have the right sign and the mean saliency."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.spark import SparK, pack_bits, unpack_bits
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive_keys(keys: Tensor, queries: Tensor, share: float) -> Tensor:
    """One token at a time."""
    out = keys.clone()
    kv_heads, tokens, size = keys.shape
    group = queries.shape[0] // kv_heads
    for head in range(kv_heads):
        own = queries[head * group : (head + 1) * group]
        norms = [sum(float(query[:, c].norm()) for query in own) / group for c in range(size)]
        for token in range(tokens):
            saliency = [float(keys[head, token, c]) ** 2 * norms[c] for c in range(size)]
            ranked = sorted(range(size), key=lambda c, s=saliency: -s[c])  # type: ignore[misc]
            lost = ranked[math.ceil(share * size) :]
            mean = sum(saliency[c] for c in lost) / max(len(lost), 1)
            for c in lost:
                out[head, token, c] = math.copysign(math.sqrt(mean / norms[c]), float(keys[head, token, c]))
    return out


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_numbers_equal_the_naive_loops(random_row: Row, share: float) -> None:
    keys, values, queries = random_row(50)
    region = SparK(channels=share, window=8).compress(keys, values, queries)
    read_keys, read_values = region.materialize()
    assert region.covered == 42
    torch.testing.assert_close(read_keys, naive_keys(keys[:, :42], queries, share), atol=1e-5, rtol=1e-4)
    assert torch.equal(read_values, values[:, :42])


def test_values_keep_what_is_large_or_varies(random_row: Row) -> None:
    keys, values, queries = random_row(40)
    read = SparK(value_channels=0.5, window=8).compress(keys, values, queries).materialize()[1]
    values = values[:, :32]
    saliency = 0.7 * values.abs() + 0.3 * values.var(1, correction=0, keepdim=True)
    for head in range(2):
        for token in range(32):
            kept = saliency[head, token].topk(6).indices
            expected = torch.zeros(12)
            expected[kept] = values[head, token, kept]
            assert torch.equal(read[head, token], expected)


def test_of_more_queries_the_last_weigh(random_row: Row) -> None:
    keys, values, queries = random_row(60, queries=20)
    method = SparK(window=4)
    whole, last = (method.compress(keys, values, asked).materialize()[0] for asked in (queries, queries[:, -4:]))
    assert torch.equal(whole, last)
    assert not torch.equal(whole, method.compress(keys, values, queries[:, :4]).materialize()[0])


def test_bytes_are_the_numbers_kept_two_bits_a_channel_and_a_mean(random_row: Row) -> None:
    keys, values, queries = random_row(164, size=64, value_size=64, dtype=torch.bfloat16)
    region = SparK(channels=0.25, window=100).compress(keys, values, queries)
    vectors = 2 * 64
    fit = 2 * 2 * 64 * 4
    assert region.nbytes - fit == vectors * (16 * 2 + 64 // 8 + 64 // 8 + 2) + vectors * 64 * 2


@pytest.mark.parametrize("size", [1, 8, 12, 17])
def test_bits_come_back(size: int) -> None:
    flags = torch.rand(2, 5, size, generator=torch.Generator().manual_seed(0)) < 0.5
    assert pack_bits(flags).shape == (2, 5, -(-size // 8))
    assert torch.equal(unpack_bits(pack_bits(flags), size), flags)


def test_later_tokens_are_weighed_by_the_first_queries(random_row: Row) -> None:
    keys, values, queries = random_row(90)
    region = SparK(window=8).compress(keys[:, :50], values[:, :50], queries)
    longer = region.extend(keys[:, 42:80], values[:, 42:80], queries.flip(2))
    assert longer.covered == 80
    torch.testing.assert_close(longer.materialize()[0], naive_keys(keys[:, :80], queries, 0.5), atol=1e-5, rtol=1e-4)


def test_queries_that_ask_nothing_lose_nothing_but_numbers(random_row: Row) -> None:
    keys, values, queries = random_row(40)
    read = SparK(window=8).compress(keys, values, torch.zeros_like(queries)).materialize()[0]
    assert read.isfinite().all()


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"value_channels": 1.5}, {"window": 0}, {"sinks": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, int]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        SparK(**wrong)
