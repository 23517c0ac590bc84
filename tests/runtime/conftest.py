"""What the tests of the run time share: sites without a model, and full caches of random numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vericache_compile.plan import Site
from vericache_compile.runtime.caches import FullKV


@pytest.fixture(scope="session")
def make_sites() -> Callable[..., list[Site]]:
    """Sites of four query and two KV heads, whose past are inputs 0, 1, 2, ..."""

    def make(count: int = 2, *, size: int = 16, value_size: int = 16, dtype: torch.dtype = torch.float32) -> list[Site]:
        return [
            Site(layer, 4, 2, size, value_size, size**-0.5, dtype, (2 * layer, 2 * layer + 1)) for layer in range(count)
        ]

    return make


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """Append random keys and values to columns [begin, end) of every row and site."""

    def fill(full: FullKV, begin: int, end: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        full.reserve(end, torch.device("cpu"))
        for site in full.sites:
            shape = (full.batch, site.kv_heads, end - begin)
            k, v = (
                torch.randn(*shape, size, generator=generator).to(site.dtype)
                for size in (site.head_size, site.value_size)
            )
            full.append(site.layer, k, v, [begin] * full.batch)

    return fill
