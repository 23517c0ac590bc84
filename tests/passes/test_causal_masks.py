"""A prefill's mask that is causal is left to is_causal: then no numbers are held for each pair of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Captured, Toy, calls_of, capture, node_named, run_until
from models import make_prompt, make_tiny
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile.passes import pipeline
from vericache_compile.passes.find_attention import NAMES
from vericache_compile.passes.program import Program, example, is_integer
from vericache_compile.plan import CapturedPlan

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


class Narrow(Prefill):
    """Its scores are added to in bfloat16, which holds both numbers."""

    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        shown = super().mask(ids)
        return torch.where(shown, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)


class Filled(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        shown = super().mask(ids).clone()
        shown[:, :, 5:, 3] = False
        return shown


class FilledThroughAView(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        shown = super().mask(ids).clone()
        shown[..., :7].fill_(True)
        return shown


class FilledByOut(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        shown = super().mask(ids).clone()
        torch.logical_or(shown, torch.arange(ids.shape[1]) < 7, out=shown)
        return shown


class Padded(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        return super().mask(ids) & (more[0] != 0)[:, None, None]


class Weighted(Prefill):
    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        return torch.where(super().mask(ids), 0 * self.place.weight[0, 0], LOW)


def prefill(
    model: Prefill, *, tokens: int = TOKENS, batch: int = 2, lengths: int = 1, padded: bool = False
) -> Captured:
    """The first call; of several lengths, which make the number of tokens symbolic, with a padding mask or without."""
    calls = [torch.randint(model.vocabulary, (batch, tokens + n)) for n in range(lengths)]
    more = [[torch.ones_like(ids)] if padded else [] for ids in calls]
    return capture(model, lambda model: [model(ids, *own) for ids, own in zip(calls, more, strict=True)])[-1]


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
@pytest.mark.parametrize("model", [Prefill, Additive, Narrow])
def test_a_causal_mask_is_left_to_is_causal(model: type[Prefill], lengths: int) -> None:
    dtype = torch.bfloat16 if model is Narrow else torch.float32
    captured = prefill(model().to(dtype), lengths=lengths)
    program = taken(captured)
    assert program.captured is not None
    assert program.unpadded is None, "padding is nothing to it"
    assert {"expand", "masked_fill", "le"}.isdisjoint(calls_of(program.captured))
    assert is_left(program.captured)
    made = program.captured(Store(), *captured.inputs)
    plain = captured.module(*captured.inputs)
    torch.testing.assert_close(made[0], plain[program.rows[0]])


@pytest.mark.parametrize("lengths", [1, 2])
def test_a_mask_with_padding_is_left_out_where_there_is_none(lengths: int) -> None:
    captured = prefill(Padded(), lengths=lengths, padded=True)
    program = taken(captured)
    assert program.captured is not None
    assert program.unpadded is not None
    assert [is_left(program.captured), is_left(program.unpadded)] == [False, True]
    assert "ne" not in calls_of(program.unpadded)
    as_captured, without = (module(Store(), *captured.inputs)[0] for module in (program.captured, program.unpadded))
    assert torch.equal(as_captured, captured.module(*captured.inputs)[program.rows[0]])
    torch.testing.assert_close(without, as_captured)


def shows_window(column: Tensor, token: Tensor) -> Tensor:
    return (column <= token) & (column > token - 300 - 280)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Prefill(lambda column, token: (column <= token) & (column > token - 20)), id="window"),
        pytest.param(Prefill(lambda column, token: (column <= token) & (column > token - 600)), id="wider window"),
        pytest.param(Prefill(lambda column, token: (column <= token) & (column > token - 6000)), id="widest window"),
        pytest.param(Prefill(shows_window), id="a window of two constants"),
        pytest.param(Prefill(lambda k, t: (k <= t) & (t // 16 - k // 16 < 25)), id="a window of chunks"),
        pytest.param(Prefill(lambda k, t: (k <= t) & ((t - k) >> 5 < 16)), id="a window shifted"),
        pytest.param(Prefill(lambda k, t: (k <= t) & ((t - k).float().log2() < 8.7)), id="a logarithmic window"),
        pytest.param(Prefill(lambda k, t: k.half() <= t.half()), id="places by half()"),
        pytest.param(Prefill(lambda k, t: k.to(torch.float16) <= t.to(torch.float16)), id="places of 11 bits"),
        pytest.param(Prefill(lambda k, t: k.to(torch.int16).to(torch.int64) <= t), id="places of 16 bits"),
        pytest.param(Prefill(lambda column, token: (column <= token) | (column < 7)), id="prefix"),
        pytest.param(Prefill(lambda column, token: (column <= token) | (column < TOKENS)), id="all"),
        pytest.param(Prefill(lambda column, token: (column <= token) & (column // 16 == token // 16)), id="chunks"),
        pytest.param(Prefill(lambda column, token: column < token), id="strictly before"),
        pytest.param(Filled(), id="changed in place"),
        pytest.param(FilledThroughAView(), id="a view changed in place"),
        pytest.param(FilledByOut(), id="written to by out="),
        pytest.param(Weighted(), id="of a weight"),
    ],
)
def test_any_other_mask_stays(model: Prefill) -> None:
    program = taken(prefill(model))
    assert program.captured is not None
    assert program.unpadded is None
    assert not is_left(program.captured)
    assert calls_of(program.captured).count("arange") == calls_of(program.module).count("arange")


class Returning(Prefill):
    """Returns the mask that it attends under."""

    def mask(self, ids: Tensor, *more: Tensor) -> Tensor:
        return more[0] if more else super().mask(ids)

    def forward(self, ids: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        mask = self.mask(ids)
        return *super().forward(ids, mask), mask[:, 0].float()


def test_a_mask_that_the_model_returns_is_still_made() -> None:
    captured = prefill(Returning())
    program = taken(captured)
    assert program.captured is not None
    assert is_left(program.captured)
    made = program.captured(Store(), *captured.inputs)
    assert torch.equal(made[-1], torch.ones(TOKENS, TOKENS).tril().expand(2, -1, -1))


def test_what_is_proved_pins_no_size() -> None:
    """Not even to a number of tokens that masks are computed for."""
    captured = prefill(Padded(), tokens=69, lengths=2, padded=True)
    shapes = [example(node).node.shape_env for node in captured.module.graph.nodes if is_integer(node)]
    before = [len(each.guards) for each in shapes]
    assert taken(captured).unpadded is not None
    assert before
    assert [len(each.guards) for each in shapes] == before


def test_few_tokens_of_a_known_number_keep_their_mask() -> None:
    program = taken(prefill(Prefill(), tokens=3))
    assert program.captured is not None
    assert not is_left(program.captured)


class Watched:
    """A module that notes when it runs."""

    def __init__(self, name: str, module: GraphModule, ran: list[str]) -> None:
        self.name, self.module, self.ran = name, module, ran

    def __call__(self, *given: Any) -> Any:
        self.ran.append(self.name)
        return self.module(*given)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which modules of plans ran as captured."""
    names: list[str] = []

    def watched(*given: Any) -> CapturedPlan:
        plan = make(*given)
        assert plan.unpadded is not None
        own: Any = {name: Watched(name, getattr(plan, name), names) for name in ("module", "unpadded")}
        return replace(plan, **own)

    make = pipeline._captured_plan
    monkeypatch.setattr(pipeline, "_captured_plan", watched)
    return names


@pytest.mark.own_captures
@pytest.mark.parametrize(
    ("hidden", "module"),
    [
        pytest.param(slice(0), "unpadded", id="none"),
        pytest.param(slice(9), "module", id="on the left"),
        pytest.param(slice(-9, None), "module", id="on the right"),
        pytest.param(slice(20, 30), "module", id="a hole"),
    ],
)
def test_calls_with_padding_run_with_their_mask(hidden: slice, module: str, ran: list[str]) -> None:
    """Plain decoding leaves the mask out where nothing is padded; so does a prefill, then to the bit."""
    model = make_tiny("llama", positions=256)
    prompt = make_prompt(TOKENS, 2)
    prompt["attention_mask"][:] = 1
    prompt["attention_mask"][1, hidden] = 0
    shown = prompt["attention_mask"] != 0

    def ask(model: Any) -> Tensor:
        with torch.no_grad():
            made: Tensor = model(**prompt, use_cache=True).logits
        return made

    plain = ask(model)
    model.compile(backend="vericache", options={"inductor": False})
    ours = ask(model)
    model._compiled_call_impl = None
    assert ran == [module]
    torch.testing.assert_close(ours[shown], plain[shown])
    assert bool(shown.all()) == (module == "unpadded")
    assert module == "module" or torch.equal(ours, plain)
