"""Equal regions are traced once, and what comes out is what tracing the whole graph at once gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Captured, Toy, run_until, run_variant, take_steps, tiny_decode, toy_decode
from torch import Tensor, nn
from torch.fx import Graph, Node

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.ops import ATTEND, LAYER
from vericache_compile.passes import trace_regions
from vericache_compile.passes.partition import structure_key
from vericache_compile.passes.program import Program


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The regions that have been traced."""
    seen: list[Any] = []
    real = trace_regions._Unrolled._trace

    def trace(self: Any, *region: Any) -> Any:
        seen.append(region[0])
        return real(self, *region)

    monkeypatch.setattr(trace_regions._Unrolled, "_trace", trace)
    return seen


def at_once(captured: Captured, monkeypatch: pytest.MonkeyPatch, batch: int) -> Program:
    """The program of a graph of which all is one region."""

    def whole(graph: Graph) -> list[list[Node]]:
        return [[node for node in graph.nodes if node.op not in ("placeholder", "output")]]

    with monkeypatch.context() as patched:
        patched.setattr(trace_regions, "_regions", whole)
        return run_until(captured, "expand_window", batch=batch)


def assert_rows_are_those_of_steps(program: Program, captured: Captured) -> None:
    steps = take_steps(program, captured, 4)
    made = run_variant(program, "verify", captured, steps, 4)
    for token, expected in enumerate(steps.rows):
        for rows, one in zip(made, expected, strict=True):
            torch.testing.assert_close(rows[token], one, rtol=1e-5, atol=1e-5)
    [token] = run_variant(program, "draft", captured, steps, 0)
    assert torch.equal(token, steps.rows[0][0].argmax(-1))


@pytest.mark.parametrize(("name", "batch"), [("llama", 1), ("gpt2", 3)])
def test_layers_that_are_alike_are_traced_once(
    name: str, batch: int, traced: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = tiny_decode(name, batch)
    program = run_until(captured, "expand_window", batch=batch)
    assert len(traced) == 6  # per variant what is before the layers, the layers, and what is after the last attention
    whole = at_once(captured, monkeypatch, batch)
    for mode, variant in program.variants.items():
        layers = [node.args[LAYER] for node in variant.graph.nodes if node.target is ATTEND]
        assert layers == [0, 1, 2]
        assert len(variant.graph.nodes) == len(whole.variants[mode].graph.nodes)
        assert structure_key(variant) == structure_key(whole.variants[mode])


class Layered(Toy):
    """Four attentions in a row; tests say what is done between them."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Hidden states [B, T, H * D] after a layer; `made`: the embedded tokens, twice, and those of layers before."""
        return torch.tanh(x)

    def last(self, x: Tensor, made: list[Tensor]) -> tuple[Tensor, ...]:
        """What is returned before the cache."""
        return (self.to_logits(x + made[0]),)

    def forward(self, ids: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Logits, more rows, and the grown cache; given are k, v four times."""
        first = self.embed(ids) + self.place(self.positions(ids, cache[0]))
        x, made = first * 2, [first, first.float()]
        grown: list[Tensor] = []
        for layer in range(4):
            q, new_k, new_v = self.project(x)
            grown += [self.append(cache[2 * layer], new_k), self.append(cache[2 * layer + 1], new_v)]
            x = x + self.attend(q, *grown[-2:]).transpose(1, 2).flatten(2)
            x = self.between(layer, x, made)
            made.append(x)
        return *self.last(x, made), *grown


def layered_decode(model: Layered, batch: int) -> Captured:
    generator = torch.Generator().manual_seed(3)
    more = [torch.randn(batch, model.kv_heads, 6, model.size, generator=generator) for _ in range(6)]
    return toy_decode(model, *more, batch=batch)


class Scaled(Layered):
    """A constant of one layer that others do not have."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Scales after layer 1."""
        return torch.tanh(x * 3) if layer == 1 else torch.tanh(x)


class Wider(Layered):
    """A weight of one layer that is wider than in others."""

    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.size
        sizes = (width, width, 2 * width, width)
        self.up = nn.ParameterList(torch.randn(size, width) / width for size in sizes)

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Up and down again."""
        return torch.nn.functional.linear(x, self.up[layer]).relu() @ self.up[layer]


class Marked(Layered):
    """Layers change in place what was made before the first of them."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Leaves a mark."""
        made[0].mul_(layer + 2)
        return torch.tanh(x)


class Viewed(Layered):
    """The same, through a view."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Leaves a mark."""
        made[0][:, -1:][..., layer] = x[..., 0]
        return torch.tanh(x)


class Own(Layered):
    """Layers change in place what they have made."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Adds to itself."""
        x += made[0]
        return x.tanh_()


class Tokenless(Layered):
    """Returns rows that are the same for all tokens."""

    def last(self, x: Tensor, made: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits, and a weight."""
        return self.to_logits(x), self.to_kv.weight[None, :1, :8].expand(x.shape[0], -1, -1) * 2


class Skipping(Layered):
    """The last layer reads what earlier ones of one kind made, and so do logits."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Reads further back."""
        return torch.tanh(x + 2 * made[2] - made[3] if layer == 3 else x)

    def last(self, x: Tensor, made: list[Tensor]) -> tuple[Tensor, ...]:
        """Of all layers, each in its own measure."""
        return (self.to_logits(made[2] - 3 * made[3] + 5 * made[4] + 0.1 * x),)


class Twice(Layered):
    """One tensor under two names until the first layer, two tensors from there on."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Reads both."""
        return torch.tanh(0.5 * x + made[-1] - 0.25 * made[0])


class Branching(Layered):
    """Graphs and tensors held as constants by each layer."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """One of two graphs, by what a weight holds."""
        x = torch.cond(self.to_q.weight.sum() > 1e9, lambda y: y * 2.0, lambda y: y - 1.0, (x,))
        return torch.tanh(x * torch.tensor([1.5] * 32)) * a_table()


@torch.compiler.assume_constant_result
def a_table() -> Tensor:
    """A constant of the graph."""
    return torch.linspace(0.5, 1.5, 32)


class Rectified(Layered):
    """Changes in place that only an argument tells, of what an earlier region made."""

    def between(self, layer: int, x: Tensor, made: list[Tensor]) -> Tensor:
        """Rectifies what all layers read."""
        y = torch.tanh(x) + made[0]
        torch.nn.functional.relu(made[0], inplace=True)
        return y - made[0]


class Autocast(Layered):
    """Enters a context before the first layer, and leaves it after the last."""

    def forward(self, ids: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """All under autocast that is off."""
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return super().forward(ids, *cache)


class Early(Layered):
    """Tokens by the third layer, other rows by the fourth."""

    def last(self, x: Tensor, made: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits, and a narrower head."""
        return self.to_logits(made[4]), self.to_logits(x)[..., :20]


def test_logits_that_leave_out_an_attention_are_refused() -> None:
    captured = layered_decode(Early(), batch=1)
    with pytest.raises(UnsupportedGraph, match="logits that do not read all attentions"):
        run_until(captured, "expand_window")


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (Layered, 3),
        (Own, 3),
        (Scaled, 4),
        (Wider, 4),
        (Tokenless, 3),
        (Skipping, 3),
        (Twice, 4),
        (Branching, 5),
        (Marked, 1),
        (Viewed, 1),
        (Rectified, 1),
        (Autocast, 1),
    ],
)
def test_only_regions_that_are_alike_share_a_trace(
    model: type[Layered], count: int, traced: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = layered_decode(model(), batch=3)
    program = run_until(captured, "expand_window", batch=3)
    if count == 1:  # all at once, after the cut that did not come out
        whole = at_once(captured, monkeypatch, batch=3).variants["verify"]
        assert structure_key(program.variants["verify"]) == structure_key(whole)
    else:
        assert len(traced) == 2 * count
    assert_rows_are_those_of_steps(program, captured)
