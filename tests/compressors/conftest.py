"""What the tests of every compression method share: random rows, and a look at the bytes of a region."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from vericache_compile import testing
from vericache_compile.compressors.base import CompressedKV


@pytest.fixture(scope="session")
def random_row() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Keys [K, S, D], values [K, S, Dv], queries [H, w, D]; the first two are views of a longer cache."""
    return testing.random_row


@pytest.fixture(scope="session")
def storages() -> Callable[[CompressedKV], dict[int, int]]:
    """Address and bytes of each storage that a region holds."""
    return testing.storages
