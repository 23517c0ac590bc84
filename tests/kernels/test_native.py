"""The build of the CPU's kernels, and what is said where there is none."""

from __future__ import annotations

import logging
from typing import NoReturn

import pytest
import torch

from vericache_compile.kernels import block_attention, native
from vericache_compile.kernels.row_invariant_linear import is_row_invariant


def test_a_build_that_fails_is_said_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppCodeCache

    def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("no compiler today")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    with caplog.at_level(logging.WARNING, "vericache_compile"):
        assert native._build() is None
    [record] = caplog.records
    assert all(part in record.getMessage() for part in ("no compiler today", "where:", "fix:", "vericache doctor"))


def test_an_environment_variable_leaves_everything_to_torch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("VERICACHE_KERNELS", "0")
    assert native._build() is None
    assert not caplog.records
    monkeypatch.setattr(native, "load", lambda: None)
    assert not block_attention.serves(torch.zeros(1, 1, 1, 16))
    assert not is_row_invariant(torch.zeros(4, 4))
