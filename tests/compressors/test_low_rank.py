"""ReCalKV and CSKV: nothing is nearer in as many coordinates, similar heads share a basis, whole bases lose nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import make_prompt, make_tiny
from noted import note_gradients
from test_kivi import naive_keys, naive_values
from torch import Tensor

from vericache_compile.calibration import Calibration
from vericache_compile.compressors.cskv import CSKV
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.low_rank import Bases, LowRank, rank_of
from vericache_compile.compressors.recalkv import ReCalKV, allot, cka, group_similar
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]
BOTH = pytest.mark.parametrize("method", [ReCalKV, CSKV])


def best(x: Tensor, rank: int) -> Tensor:
    """The nearest tokens [S, n] of that rank, by a singular value decomposition (Eckart and Young)."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).float()


def joined(x: Tensor) -> Tensor:
    return x.transpose(0, 1).flatten(1)


@BOTH
def test_numbers_are_the_nearest_of_their_rank(random_row: Row, method: type[LowRank]) -> None:
    keys, values, _ = random_row(104)
    read_keys, read_values = method(rank=0.5, residual=0).compress(keys, values, None).materialize()
    torch.testing.assert_close(joined(read_keys)[4:], best(joined(keys)[4:], 16), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(joined(read_values)[4:], best(joined(values)[4:], 16), atol=1e-4, rtol=1e-4)
    assert torch.equal(read_keys[:, :4], keys[:, :4])


@BOTH
def test_a_whole_basis_loses_nothing(random_row: Row, method: type[LowRank]) -> None:
    keys, values, _ = random_row(90)
    read_keys, read_values = method(rank=1).compress(keys, values, None).materialize()
    torch.testing.assert_close(read_keys, keys[:, :58], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(read_values, values[:, :58], atol=1e-4, rtol=1e-4)


@BOTH
def test_bytes_are_the_coordinates_and_the_bases(random_row: Row, method: type[LowRank]) -> None:
    keys, values, _ = random_row(136, size=64, value_size=64, dtype=torch.bfloat16)
    region = method(rank=0.25).compress(keys, values, None)
    assert region.covered == 104
    assert region.nbytes == 2 * (2 * 100 * 32 + 2 * 128 * 32 + 2 * 4 * 128) + 2 * 8


@BOTH
def test_a_region_of_turned_keys_attends_as_what_is_rebuilt_does(random_row: Row, method: type[LowRank]) -> None:
    keys, values, queries = random_row(104)

    def table(count: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(count), 1e4 ** -(torch.arange(8) / 8)).repeat(1, 2)
        return angles.cos(), angles.sin() * torch.tensor([-1.0] * 8 + [1.0] * 8)

    rotation = Rotation(torch.arange(16).roll(8), table)
    region = method(rank=0.5).knowing(Facts(rotation=rotation, position=5)).compress(keys, values, None)
    tail = keys[:, region.covered :], values[:, region.covered :]
    k, v = (torch.cat(pair, dim=1) for pair in zip(region.materialize(), tail, strict=True))
    grouped = torch.unflatten(queries[:, -1], 0, (len(k), -1))
    expected = ((grouped @ k.mT * 0.3).softmax(dim=2) @ v).flatten(0, 1)
    assert region.attends
    torch.testing.assert_close(region.attend(queries[:, -1], tail, 0.3), expected, atol=1e-5, rtol=1e-5)


@BOTH
def test_later_tokens_are_read_by_the_same_bases(random_row: Row, method: type[LowRank]) -> None:
    keys, values, _ = random_row(160)
    keys = keys @ torch.diag(torch.tensor([9.0] * 4 + [0.01] * 12))
    region = method(sinks=0).compress(keys[:, :96], values[:, :96], None)
    longer = region.extend(keys[:, 64:160], values[:, 64:160], None)
    assert longer.covered == 160
    assert all(map(torch.equal, longer.fit, region.fit))
    assert float((longer.materialize()[0] - keys).norm()) < 0.02 * float(keys.norm())


def test_ranks_are_multiples_of_eight_up_to_all() -> None:
    basis = torch.empty(1, 100, 100)
    assert [rank_of(share, basis) for share in (0.01, 0.08, 0.081, 0.5, 0.96, 1)] == [8, 8, 16, 56, 96, 100]


def test_heads_that_are_alike_form_a_group() -> None:
    """Heads 0, 2 and 1, 3 hold the same tokens up to a rotation, which linear CKA does not see."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 200, 8, generator=generator)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    keys = torch.stack([first, second, first @ turn, second @ turn])
    moment = joined(keys).T @ joined(keys)
    naive = torch.empty(4, 4)
    for i in range(4):
        for j in range(4):
            cross, own, other = (a.T @ b for a, b in ((keys[i], keys[j]), (keys[i], keys[i]), (keys[j], keys[j])))
            naive[i, j] = cross.norm() ** 2 / (own.norm() * other.norm())
    torch.testing.assert_close(cka(moment, 4), naive)
    assert group_similar(naive, 2).tolist() == [0, 2, 1, 3]
    values = keys.flip(0)
    region = ReCalKV(rank=0.5, heads=2, residual=0, sinks=0).compress(keys, values, None)
    assert Bases(*region.fit).keys.shape == (2, 16, 8)
    torch.testing.assert_close(region.materialize()[0], keys, atol=1e-4, rtol=1e-4)


def test_ranks_follow_fisher_information_and_keep_their_mean() -> None:
    shares = allot(torch.tensor([[1.0, 2.0], [3.0, 100.0]]), 0.5)
    assert float(shares.mean()) == pytest.approx(0.5, abs=1e-6)
    assert shares[1, 1] == 1
    assert shares.min() == 0.25
    torch.testing.assert_close(allot(torch.ones(3, 2), 0.3), torch.full((3, 2), 0.3, dtype=torch.float64))
    assert allot(torch.tensor([[0.0, 1.0]]), 0.4).isfinite().all()


def test_keys_and_values_have_each_their_own_rank() -> None:
    """Fisher information 1, 1, 1 and 3, on average half: shares of a third, and of all for the last layer's values."""
    whole = {"1.order": torch.arange(2), "1.keys": torch.eye(64)[None], "1.values": torch.eye(64)[None]}
    held = Calibration("", "recalkv", {}, "", {"fisher": torch.tensor([[1.0, 1.0], [1.0, 3.0]]), **whole})
    assert ReCalKV(rank=0.5).shares(held, 1) == pytest.approx((1 / 3, 1))
    fit = Bases(*ReCalKV(rank=0.5).given(held, 1, 2))
    assert (fit.keys.shape, fit.values.shape) == ((1, 64, 24), (1, 64, 64))


def test_fisher_information_is_the_squares_of_gradients() -> None:
    """Of keys first, then of values, layer by layer."""
    model, ids = make_tiny("llama", layers=3), make_prompt(48)["input_ids"].view(2, 24)
    naive = [[float(part.square().sum()) for part in layer[2:]] for layer in note_gradients(model, ids)]
    torch.testing.assert_close(ReCalKV().learn(model, ids, ())["fisher"], torch.tensor(naive), rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_cskvs_coordinates_equal_the_naive_loops(random_row: Row, bits: int) -> None:
    """All heads together by the bases, quantised there: keys per coordinate, values per token, 32 numbers a group."""
    keys, values, _ = random_row(64, size=64, value_size=64)
    region = CSKV(rank=0.5, bits=bits, residual=0, sinks=0).compress(keys, values, None)
    bases = Bases(*region.fit)
    flat = [x.transpose(0, 1).reshape(1, 64, 128) for x in (keys, values)]
    naive = (naive_keys(flat[0] @ bases.keys, bits, 32), naive_values(flat[1] @ bases.values, bits, 32))
    for read, codes, basis in zip(region.materialize(), naive, (bases.keys, bases.values), strict=True):
        rebuilt = (codes @ basis.mT).view(64, 2, 64).transpose(0, 1)
        torch.testing.assert_close(read, rebuilt, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_cskv_quantises_its_coordinates(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(160, size=64, value_size=64)
    plain, coded = (CSKV(bits=b, residual=0, sinks=0).compress(keys, values, None) for b in (16, bits))
    fit = sum(part.nbytes for part in coded.fit)
    assert coded.covered == 160
    assert coded.nbytes - fit < (plain.nbytes - fit) * (bits + 4) / 32
    for read, exact in zip(coded.materialize(), plain.materialize(), strict=True):
        assert float((read - exact).norm()) < {2: 0.5, 4: 0.15}[bits] * float(exact.norm())


@BOTH
def test_numbers_that_are_not_finite_are_no_crash(random_row: Row, method: type[LowRank]) -> None:
    keys, values, _ = random_row(90)
    keys[1, 5, 2], values[0, 7, 1] = float("nan"), float("inf")
    read_keys, read_values = method().compress(keys, values, None).materialize()
    assert not read_keys[:, 5].isfinite().all()
    assert not read_values[:, 7].isfinite().all()
    assert read_keys[:, 20].isfinite().all()


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (ReCalKV, {"rank": 0}),
        (ReCalKV, {"heads": 0}),
        (CSKV, {"rank": 1.5}),
        (CSKV, {"bits": 8}),
        (CSKV, {"sinks": -1}),
    ],
)
def test_values_out_of_range_are_option_errors(method: type[LowRank], wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        method(**wrong)  # type: ignore[arg-type]
