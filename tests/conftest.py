"""Fixtures that the tests share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest
import torch
import triton_interpreter
from models import plain_tokens_of
from transformers import AutoModelForCausalLM, PreTrainedModel


def pytest_collection_finish() -> None:
    """Tracing makes many small objects, beside torch's many that stay: a tenth of all time was the collector's."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 100)


@pytest.fixture(scope="session")
def plain_tokens() -> Callable[..., torch.Tensor]:
    """Plain greedy tokens of a tiny model: (name, prompt tokens, batch, new tokens, layers=2)."""
    return plain_tokens_of


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo() -> Iterator[None]:
    """The tests of a file share what Dynamo captures: models of one make and options run one graph."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def own_captures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests marked so share nothing."""
    own = request.node.get_closest_marker("own_captures")
    if own:
        torch._dynamo.reset()
    yield
    if own:
        torch._dynamo.reset()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels serve the CPU, in Triton's interpreter."""
    triton_interpreter.use(monkeypatch)


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedModel:
    """SmolLM2-135M-Instruct in float32, fetched when missing; greedy runs never stop early."""
    from vericache_compile import demo_model_path

    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 2
    return model


@pytest.fixture(scope="session")
def document_ids() -> torch.Tensor:
    """Real text that ships with Python as SmolLM2 tokens [1, T], at least 8,000 of them."""
    import argparse
    import inspect

    from transformers import AutoTokenizer

    from vericache_compile import demo_model_path

    ids = AutoTokenizer.from_pretrained(demo_model_path())(inspect.getsource(argparse), return_tensors="pt").input_ids
    assert ids.shape[1] >= 8000, "the document is too short"
    return ids
