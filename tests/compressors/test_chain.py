"""Drop, then quantise: the first method's choice, in the second one's bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_kivi import naive_keys, naive_values
from test_snapkv import naive_scores
from torch import Tensor

from vericache_compile.compressors.chain import Chain, make_chain
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.h2o import H2O
from vericache_compile.compressors.int8 import Int8
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.knorm import Knorm
from vericache_compile.compressors.qpruningkv import QPruningKV
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def through(method: Kivi, x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values, quantised and read back."""
    return method.dequantize(*method.quantize(*x))


def test_whole_groups_are_quantised_and_the_rest_waits(random_row: Row) -> None:
    keys, values, queries = random_row(112, queries=12)
    drop, quantise = SnapKV(keep=0.5, window=12), Kivi(bits=2, group=16)
    region = Chain(drop, quantise).compress(keys, values, queries)
    chosen = drop.compress(keys, values, queries)
    assert (region.covered, region.slots) == (100, 50)
    for read, plain, coded in zip(
        region.materialize(),
        (chosen.keys, chosen.values),
        through(quantise, (chosen.keys[:, :48], chosen.values[:, :48])),
        strict=True,
    ):
        assert torch.equal(read[:, :48], coded)
        assert torch.equal(read[:, 48:], plain[:, 48:])


def test_what_waits_is_quantised_when_more_joins(random_row: Row) -> None:
    keys, values, _ = random_row(160)
    drop, quantise = Knorm(keep=0.5, window=0), Kivi(bits=4, group=16)
    region = Chain(drop, quantise).compress(keys[:, :100], values[:, :100], None)
    longer = region.extend(keys[:, 100:], values[:, 100:], None)
    chosen = drop.compress(keys[:, :100], values[:, :100], None).extend(keys[:, 100:], values[:, 100:], None)
    assert (longer.covered, longer.slots) == (160, 80)
    for read, coded in zip(longer.materialize(), through(quantise, (chosen.keys, chosen.values)), strict=True):
        assert torch.equal(read, coded)


@pytest.mark.parametrize("tokens", [0, 1, 5, 40])
def test_short_rows(random_row: Row, tokens: int) -> None:
    keys, values, _ = random_row(tokens)
    region = Chain(Streaming(), Kivi()).compress(keys, values, None)
    assert (region.covered, region.slots) == (tokens, Streaming().slots(tokens))


def test_a_byte_quantiser_takes_every_token(random_row: Row) -> None:
    keys, values, _ = random_row(45)
    region = Chain(Knorm(keep=0.2, window=0), Int8()).compress(keys, values, None)
    assert region.keys.shape[1] == 0
    assert region.nbytes == 2 * 9 * (16 + 4 + 12 + 4)


def test_qpruningkv_is_snapkv_and_kivi(random_row: Row) -> None:
    keys, values, queries = random_row(160, queries=32)
    named, built = QPruningKV(keep=0.3, bits=2), Chain(SnapKV(keep=0.3), Kivi(bits=2))
    assert named.queries == built.queries == 32
    regions = [method.compress(keys, values, queries) for method in (named, built)]
    assert all(map(torch.equal, regions[0].materialize(), regions[1].materialize()))
    assert regions[0].nbytes == regions[1].nbytes


def test_qpruningkv_equals_the_naive_loops(random_row: Row) -> None:
    """The best of each head by pooled attention of the last queries, group by group in a few bits."""
    keys, values, queries = random_row(160, queries=32, value_size=32)
    region = QPruningKV(keep=0.5, bits=2).compress(keys, values, queries)
    scores = torch.tensor(naive_scores(keys, queries, 7, 32))
    kept = scores.topk(64, dim=1).indices.sort(dim=1).values
    chosen = [torch.stack([x[head][kept[head]] for head in range(2)]) for x in (keys, values)]
    naive = (naive_keys(chosen[0], 2, 32), naive_values(chosen[1], 2, 32))
    assert (region.covered, region.slots) == (128, 64)
    for read, expected in zip(region.materialize(), naive, strict=True):
        torch.testing.assert_close(read, expected, atol=1e-5, rtol=1e-5)


def test_tokens_that_join_are_given_no_sinks(random_row: Row) -> None:
    keys, values, _ = random_row(200)
    region = Chain(Streaming(keep=0.1), Int8()).compress(keys[:, :100], values[:, :100], None)
    longer = region.extend(keys[:, 100:], values[:, 100:], None)
    kept = torch.cat([keys[:, :4], keys[:, 94:100], keys[:, 190:]], dim=1)
    assert longer.slots == 20
    torch.testing.assert_close(longer.materialize()[0], kept, atol=0.05, rtol=0)


def test_what_a_chain_is_told_its_first_method_knows(random_row: Row) -> None:
    keys, values, queries = random_row(50)
    chain = Chain(H2O(keep=0.2, refresh=64), Int8())
    assert (chain.wants, chain.refresh) == ({"queries", "attention"}, 64)
    drawn = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    facts = Facts(attention=drawn)
    expected = H2O(keep=0.2).knowing(facts).compress(keys, values, queries)
    region = chain.knowing(facts).compress(keys, values, queries)
    torch.testing.assert_close(region.materialize()[0], expected.materialize()[0], atol=0.05, rtol=0)
    assert chain.drop.facts is not facts


def test_methods_in_the_wrong_place_are_option_errors() -> None:
    with pytest.raises(OptionError, match="'kivi' does not keep the same number"):
        make_chain(Kivi(), SnapKV())
    with pytest.raises(OptionError, match="'snapkv' does not quantise"):
        make_chain(SnapKV(), SnapKV())


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"bits": 3}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))) as caught:
        QPruningKV(**wrong)  # type: ignore[arg-type]
    assert caught.value.where == "compressor 'qpruningkv'"
