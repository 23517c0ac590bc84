"""Where the Triton kernels are tried: in the interpreter, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of the tensors that kernels get."""
    if request.param == "interpreter":
        triton_interpreter.use(monkeypatch)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return torch.device("cuda")
