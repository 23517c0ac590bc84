"""Where the Triton kernels serve, and what is said where they do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from vericache_compile.kernels import launch

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What was found out before is found out again."""
    for found in (launch.installed, launch.suits):
        found.cache_clear()
    yield
    for found in (launch.installed, launch.suits):
        found.cache_clear()


def have(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, installed: bool = True) -> None:
    """A GPU, with or without triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object() if installed else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_of_today_is_served(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, (9, 0))
    assert launch.takes(GPU, dtype)
    assert not launch.takes(GPU, torch.float64)
    assert not launch.takes(torch.device("cpu"), dtype)


def test_an_environment_variable_leaves_all_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    have(monkeypatch, (9, 0))
    monkeypatch.setenv("VERICACHE_KERNELS", "0")
    assert not launch.takes(GPU, torch.float32)
    assert not caplog.records


@pytest.mark.parametrize(
    ("capability", "installed", "said"), [((7, 5), True, "compute capability 7.5"), ((9, 0), False, "not installed")]
)
def test_where_they_do_not_serve_it_is_said_once(
    capability: tuple[int, int],
    installed: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    have(monkeypatch, capability, installed=installed)
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        assert not any(launch.takes(GPU, torch.float32) for _ in range(3))
    [told] = caplog.records
    assert all(part in told.getMessage() for part in (said, "where:", "fix:"))


@pytest.mark.parametrize(("size", "padded"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128)])
def test_sizes_are_padded_to_powers_of_two(size: int, padded: int) -> None:
    assert launch.pad_size(size) == padded
