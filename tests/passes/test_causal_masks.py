"""A prefill's mask that is causal is left to is_causal: then no numbers are held for each pair of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Captured, Toy, calls_of, capture, node_named, run_until
from models import make_prompt, make_tiny
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile.passes.find_attention import NAMES
from vericache_compile.passes.program import Program, output_node

TOKENS = 80
LOW = torch.finfo(torch.float32).min


class Prefill(Toy):
    """A model's first call; `shows` says what a mask shows of columns [1, T] to tokens [T, 1]."""

    def __init__(self, shows: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.shows = shows or (lambda column, token: column <= token)

    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        return self.shows(place[None], place[:, None]).expand(ids.shape[0], 1, -1, -1)

    def forward(self, ids: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(ids) + self.place(torch.arange(ids.shape[1])[None])
        q, k, v = self.project(x)
        x = x + F.scaled_dot_product_attention(q, k, v, self.mask(ids, *more), enable_gqa=True).transpose(1, 2).flatten(
            2
        )
        return self.to_logits(x), k, v


class Additive(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        return torch.zeros(ids.shape[1], ids.shape[1]).masked_fill(~super().mask(ids), LOW)


class Filled(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        shown = super().mask(ids).clone()
        shown[:, :, 5:, 3] = False
        return shown


class Padded(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        return super().mask(ids) & (more[0] != 0)[:, None, None]


class Weighted(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        return torch.where(super().mask(ids), 0 * self.place.weight[0, 0], LOW)


def prefill(model: Prefill, *more: Tensor, tokens: int = TOKENS, batch: int = 2, lengths: int = 1) -> Captured:
    """The first call; of several lengths, which make the number of tokens symbolic."""
    calls = [torch.randint(model.vocabulary, (batch, tokens + n)) for n in range(lengths)]
    return capture(model, lambda model: [model(ids, *more) for ids in calls])[-1]


def taken(captured: Captured) -> Program:
    return run_until(captured, "split_captured", batch=2)


def is_left(module: GraphModule) -> bool:
    """Whether the attention is masked by is_causal and not by a mask."""
    attention = node_named(module, "scaled_dot_product_attention")
    given = dict(zip(NAMES, attention.args, strict=False)) | attention.kwargs
    assert (given.get("attn_mask") is None) == bool(given.get("is_causal"))
    return bool(given.get("is_causal"))


class Store:
    """Takes keys and values."""

    def append(self, *given: Any) -> None:
        """Forget them."""


@pytest.mark.parametrize("lengths", [1, 2])
@pytest.mark.parametrize("model", [Prefill, Additive])
def test_a_causal_mask_is_left_to_is_causal(model: type[Prefill], lengths: int) -> None:
    captured = prefill(model(), lengths=lengths)
    program = taken(captured)
    assert program.captured is not None
    assert program.unpadded is None, "padding is nothing to it"
    assert {"expand", "masked_fill", "le"}.isdisjoint(calls_of(program.captured))
    assert is_left(program.captured)
    made = program.captured(Store(), *captured.inputs)
    plain = captured.module(*captured.inputs)
    torch.testing.assert_close(made[0], plain[program.rows[0]])


def test_a_mask_with_padding_is_left_out_where_there_is_none() -> None:
    padding = torch.ones(2, TOKENS, dtype=torch.int64)
    captured = prefill(Padded(), padding)
    program = taken(captured)
    assert program.captured is not None
    assert program.unpadded is not None
    assert [is_left(program.captured), is_left(program.unpadded)] == [False, True]
    assert "ne" not in calls_of(program.unpadded)
    as_captured, without = (module(Store(), *captured.inputs)[0] for module in (program.captured, program.unpadded))
    assert torch.equal(as_captured, captured.module(*captured.inputs)[program.rows[0]])
    torch.testing.assert_close(without, as_captured)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Prefill(lambda column, token: (column <= token) & (column > token - 20)), id="window"),
        pytest.param(Prefill(lambda column, token: (column <= token) & (column > token - 600)), id="wider window"),
        pytest.param(Prefill(lambda column, token: (column <= token) & (column > token - 6000)), id="widest window"),
        pytest.param(Prefill(lambda column, token: (column <= token) | (column < 7)), id="prefix"),
        pytest.param(Prefill(lambda column, token: (column <= token) | (column < TOKENS)), id="all"),
        pytest.param(Prefill(lambda column, token: (column <= token) & (column // 16 == token // 16)), id="chunks"),
        pytest.param(Prefill(lambda column, token: column < token), id="strictly before"),
        pytest.param(Filled(), id="changed in place"),
        pytest.param(Weighted(), id="of a weight"),
    ],
)
def test_any_other_mask_stays(model: Prefill) -> None:
    program = taken(prefill(model))
    assert program.captured is not None
    assert program.unpadded is None
    assert not is_left(program.captured)
    assert calls_of(program.captured).count("arange") == calls_of(program.module).count("arange")


def test_a_mask_that_the_model_returns_is_still_made() -> None:
    class Returning(Prefill):
        def forward(self, ids: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
            return *super().forward(ids), self.mask(ids).float().sum(-1)

    program = taken(prefill(Returning()))
    assert program.captured is not None
    assert is_left(program.captured)
    assert output_node(program.captured).all_input_nodes


def test_few_tokens_of_a_known_number_keep_their_mask() -> None:
    program = taken(prefill(Prefill(), tokens=12))
    assert program.captured is not None
    assert not is_left(program.captured)


@pytest.mark.parametrize("padded", [False, True])
def test_a_transformers_model_with_a_padding_mask(padded: bool) -> None:
    """Plain decoding leaves the mask out where nothing is padded; so does a prefill, then to the bit."""
    from transformers import DynamicCache

    model = make_tiny("llama", positions=256)
    prompt = make_prompt(TOKENS, 2)
    if padded:
        prompt["attention_mask"][1, :9] = 0

    def ask(model: Any) -> Tensor:
        with torch.no_grad():
            made: Tensor = model(**prompt, past_key_values=DynamicCache()).logits
        return made

    plain = ask(model)
    model.compile(backend="vericache", options={"inductor": False})
    ours = ask(model)
    model._compiled_call_impl = None
    if padded:
        torch.testing.assert_close(ours[0], plain[0])
        torch.testing.assert_close(ours[1, 9:], plain[1, 9:])
    else:
        assert torch.equal(ours, plain)
