"""KVReviver: candidates are exact, the others are read back from a count sketch as the naive one reads them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.kvreviver import KVReviver
from vericache_compile.compressors.window_attention import mean_attention
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def naive(x: Tensor, method: KVReviver, width: int) -> Tensor:
    """Tokens [E, D] of one head, put into buckets one by one and read back."""
    count = len(x)
    bucket, sign = method.hashes(count, width, x.device)
    mean = sum(x) / count
    buckets = [[torch.zeros_like(x[0]) for _ in range(width)] for _ in range(method.rows)]
    for row in range(method.rows):
        for j in range(count):
            buckets[row][int(bucket[row, j])] += float(sign[row, j]) * (x[j] - mean)
    out = []
    for j in range(count):
        read = [float(sign[row, j]) * buckets[row][int(bucket[row, j])] for row in range(method.rows)]
        out.append(mean + sum(read) / method.rows / (1 + (count - 1) / (method.rows * width)))
    return torch.stack(out)


def test_tokens_equal_the_naive_sketch(random_row: Row) -> None:
    keys, values, queries = random_row(120)
    method = KVReviver(keep=0.3, window=20, vague=0.4, rows=2)
    region = method.compress(keys, values, queries)
    width, exact = 6, 30 - 12
    assert (region.covered, region.slots, region.counts) == (100, 100, (82,))
    scores = mean_attention(keys, queries, 20)
    read = region.materialize()
    for head in range(2):
        best = sorted(range(100), key=lambda j: -float(scores[head, j]))[:exact]
        others = [j for j in range(100) if j not in best]
        for side, x in enumerate((keys, values)):
            assert torch.equal(read[side][head, :exact], x[head, sorted(best)])
            expected = naive(x[head, others], method, width)
            torch.testing.assert_close(read[side][head, exact:], expected, atol=1e-5, rtol=1e-5)


def test_a_token_alone_is_revived_exactly(random_row: Row) -> None:
    keys, _, _ = random_row(1)
    method = KVReviver()
    torch.testing.assert_close(method.revive(method.sketch(keys, 5), 1), keys)


def test_what_is_read_back_is_nearer_than_the_mean_alone(random_row: Row) -> None:
    keys, _, _ = random_row(400)
    method = KVReviver()
    revived = method.revive(method.sketch(keys, 60), 400)
    apart = keys - keys.mean(1, keepdim=True)
    assert (revived - keys).square().mean() < 0.9 * apart.square().mean()


def test_bytes_are_the_fraction_kept(random_row: Row) -> None:
    keys, values, queries = random_row(1032, size=64, value_size=64)
    region = KVReviver(keep=0.2).compress(keys, values, queries)
    assert region.nbytes == pytest.approx(0.2 * 2 * 1000 * 128 * 4, rel=0.02)


@pytest.mark.parametrize(("covered", "sketched"), [(0, 0), (1, 0), (2, 0), (4, 0), (5, 0), (6, 5), (8, 7), (32, 28)])
def test_a_run_takes_no_more_than_its_tokens(random_row: Row, covered: int, sketched: int) -> None:
    """Five tokens' worth at least where there is a sketch of three rows; fewer stay as they are."""
    keys, values, queries = random_row(32 + covered)
    region = KVReviver().compress(keys, values, queries)
    assert (region.covered, region.counts) == (covered, (sketched,))
    assert region.nbytes == (covered if not sketched else max(5, covered // 4)) * 2 * (16 + 12) * 4
    if not sketched:
        assert torch.equal(region.materialize()[0], keys[:, :covered])
        assert torch.equal(region.extend(keys[:, :3], values[:, :3], queries).materialize()[1][:, -3:], values[:, :3])


@pytest.mark.parametrize("keep", [1.0, 0.9999])
def test_keeping_all_makes_no_sketch(random_row: Row, keep: float) -> None:
    keys, values, queries = random_row(1032)
    region = KVReviver(keep=keep).compress(keys, values, queries)
    assert region.nbytes == 1000 * 2 * (16 + 12) * 4
    assert torch.equal(region.materialize()[1], values[:, :1000])


def test_another_seed_hashes_otherwise() -> None:
    first, second = (KVReviver(seed=seed).hashes(100, 10, torch.device("cpu")) for seed in (0, 1))
    assert not torch.equal(first[0], second[0])
    assert set(first[1].flatten().tolist()) == {1.0, -1.0}


@pytest.mark.parametrize("wrong", [{"vague": 1.0}, {"rows": 0}, {"seed": -1}, {"window": 0}, {"keep": 0}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        KVReviver(**wrong)  # type: ignore[arg-type]
