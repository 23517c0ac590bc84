"""What the tests of every compression method share: random rows, and a look at the bytes of a region."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV


def find_tensors(value: object) -> Iterator[Tensor]:
    """Every tensor that a region holds."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from find_tensors(item)
    elif isinstance(value, CompressedKV):
        yield from find_tensors(tuple(vars(value).values()))


@pytest.fixture(scope="session")
def random_row() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Keys [K, S, D], values [K, S, Dv], queries [H, w, D]; the first two are views of a longer cache."""

    def draw(
        tokens: int,
        *,
        kv_heads: int = 2,
        heads: int = 4,
        queries: int = 8,
        size: int = 16,
        value_size: int = 12,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        keys, values = normal(kv_heads, tokens + 3, size), normal(kv_heads, tokens + 3, value_size)
        return keys[:, :tokens], values[:, :tokens], normal(heads, queries, size)

    return draw


@pytest.fixture(scope="session")
def storages() -> Callable[[CompressedKV], dict[int, int]]:
    """Address and bytes of each storage that a region holds."""

    def look(region: CompressedKV) -> dict[int, int]:
        held = [tensor.untyped_storage() for tensor in find_tensors(region)]
        return {storage.data_ptr(): storage.nbytes() for storage in held}

    return look


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


@pytest.fixture(scope="session")
def raw_bytes() -> Callable[[CompressedKV], list[Tensor]]:
    """A copy of every byte of a region."""
    return lambda region: [_bytes_of(tensor) for tensor in find_tensors(region)]
