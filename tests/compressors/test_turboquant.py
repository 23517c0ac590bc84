"""TurboQuant: the rotation is orthogonal, the codebook is Lloyd's and Max's, the packing loses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.turboquant import TurboQuant, codebook, rotation
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]
MAX_1960 = {
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}
"""Max, Quantizing for minimum distortion, table I: the positive levels for 4, 8 and 16."""
DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}
"""Of a standard normal number, from the same table."""

CPU = torch.device("cpu")


def naive(x: Tensor, bits: int, seed: int) -> Tensor:
    """One vector and coordinate at a time."""
    size = x.shape[2]
    turn, levels = rotation(CPU, size, seed).double(), codebook(CPU, bits).tolist()
    out = torch.empty_like(x)
    for head in range(x.shape[0]):
        for token in range(x.shape[1]):
            vector = x[head, token].double()
            norm = float(vector.norm())
            coordinates = [float(row @ vector) / norm * math.sqrt(size) for row in turn]
            chosen = [min(levels, key=lambda level, c=coordinate: abs(level - c)) for coordinate in coordinates]
            back = turn.T @ torch.tensor(chosen, dtype=torch.float64) * norm / math.sqrt(size)
            out[head, token] = back.to(x.dtype)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_numbers_equal_the_naive_loops(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(64)
    read = TurboQuant(bits=bits, residual=0, seed=3).compress(keys, values, None).materialize()
    torch.testing.assert_close(read[0], naive(keys, bits, 3), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(read[1], naive(values, bits, 3), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_codebook_is_that_of_max(bits: int) -> None:
    levels = codebook(CPU, bits)
    half = 2**bits // 2
    torch.testing.assert_close(levels[half:], torch.tensor(MAX_1960[bits]), atol=6e-4, rtol=6e-4)
    torch.testing.assert_close(levels, -levels.flip(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_the_error_is_that_of_the_codebook_whatever_the_data(bits: int) -> None:
    keys = torch.zeros(1, 64, 128)
    keys[0, torch.arange(64), torch.arange(64)] = torch.linspace(0.1, 50, 64)
    read, _ = TurboQuant(bits=bits, residual=0).compress(keys, keys, None).materialize()
    error = (read - keys).square().sum(2) / keys.square().sum(2)
    assert float(error.mean()) == pytest.approx(DISTORTION[bits], rel=0.15)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_rotation_is_orthogonal_and_seeded(size: int) -> None:
    turn = rotation(CPU, size, 1)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size), atol=1e-5, rtol=0)
    rotation.cache_clear()
    assert torch.equal(turn, rotation(CPU, size, 1))
    assert size == 1 or not torch.equal(turn, rotation(CPU, size, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_bytes_are_the_bits_and_a_norm_per_vector(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(96, size=64, value_size=64, dtype=torch.bfloat16)
    assert TurboQuant(bits=bits).compress(keys, values, None).nbytes == 2 * 2 * 64 * (64 * bits // 8 + 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_extending_gives_what_quantising_at_once_gives(random_row: Row, bits: int) -> None:
    keys, values, _ = random_row(160)
    method = TurboQuant(bits=bits)
    region = method.compress(keys[:, :100], values[:, :100], None)
    longer = region.extend(keys[:, 64:150], values[:, 64:150], None)
    whole = method.compress(keys, values, None)
    assert (region.covered, longer.covered, whole.covered) == (64, 128, 128)
    assert torch.equal(longer.keys[0], whole.keys[0])
    assert torch.equal(longer.values[0], whole.values[0])


def test_zeros_are_exact_and_nan_spoils_its_vector_only(random_row: Row) -> None:
    keys, values, _ = random_row(32)
    keys[0, 3], keys[1, 5, 2] = 0.0, float("nan")
    read, _ = TurboQuant(residual=0).compress(keys, values, None).materialize()
    assert not read[0, 3].any()
    assert read[1, 5].isnan().all()
    read[1, 5] = 0
    assert read.isfinite().all()


@pytest.mark.parametrize("wrong", [{"bits": 1}, {"bits": 7}, {"bits": 2.5}, {"residual": -1}, {"seed": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        TurboQuant(**wrong)  # type: ignore[arg-type]
