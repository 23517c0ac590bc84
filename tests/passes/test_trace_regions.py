"""Equal regions are traced once, and what comes out is what tracing the whole graph at once gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Captured, Toy, run_until, run_variant, take_steps, tiny_decode, toy_decode
from torch import Tensor, nn

from vericache_compile.ops import ATTEND
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
    whole = staticmethod(lambda graph: iter([[n for n in graph.nodes if n.op not in ("placeholder", "output")]]))
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
        layers = [node.args[trace_regions.LAYER] for node in variant.graph.nodes if node.target is ATTEND]
        assert layers == [0, 1, 2]
        assert len(variant.graph.nodes) == len(whole.variants[mode].graph.nodes)
        assert structure_key(variant) == structure_key(whole.variants[mode])


class Layered(Toy):
    """Four attentions in a row; tests say what is done between them."""

    def between(self, layer: int, x: Tensor, first: Tensor) -> Tensor:
        """Hidden states [B, T, H * D] after a layer; `first` are the embedded tokens."""
        return torch.tanh(x)

    def last(self, x: Tensor, first: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        """What is returned before the cache."""
        return (self.to_logits(x + first),)

    def forward(self, ids: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        """Logits, more rows, and the grown cache; given are k, v four times."""
        first = self.embed(ids) + self.place(self.positions(ids, cache[0]))
        x = first * 2
        grown: list[Tensor] = []
        for layer in range(4):
            q, new_k, new_v = self.project(x)
            grown += [self.append(cache[2 * layer], new_k), self.append(cache[2 * layer + 1], new_v)]
            x = x + self.attend(q, *grown[-2:]).transpose(1, 2).flatten(2)
            x = self.between(layer, x, first)
        return *self.last(x, first, cache[0]), *grown


def layered_decode(model: Layered, batch: int) -> Captured:
    generator = torch.Generator().manual_seed(3)
    more = [torch.randn(batch, model.kv_heads, 6, model.size, generator=generator) for _ in range(6)]
    return toy_decode(model, *more, batch=batch)


class Scaled(Layered):
    """A constant of one layer that others do not have."""

    def between(self, layer: int, x: Tensor, first: Tensor) -> Tensor:
        """Scales after layer 1."""
        return torch.tanh(x * 3) if layer == 1 else torch.tanh(x)


class Wider(Layered):
    """A weight of one layer that is wider than in others."""

    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.size
        sizes = (width, width, 2 * width, width)
        self.up = nn.ParameterList(torch.randn(size, width) / width for size in sizes)

    def between(self, layer: int, x: Tensor, first: Tensor) -> Tensor:
        """Up and down again."""
        return torch.nn.functional.linear(x, self.up[layer]).relu() @ self.up[layer]


class Marked(Layered):
    """Layers change in place what was made before the first of them."""

    def between(self, layer: int, x: Tensor, first: Tensor) -> Tensor:
        """Leaves a mark."""
        first.mul_(layer + 2)
        return torch.tanh(x)


class Viewed(Layered):
    """The same, through a view."""

    def between(self, layer: int, x: Tensor, first: Tensor) -> Tensor:
        """Leaves a mark."""
        first[:, -1:][..., layer] = x[..., 0]
        return torch.tanh(x)


class Own(Layered):
    """Layers change in place what they have made."""

    def between(self, layer: int, x: Tensor, first: Tensor) -> Tensor:
        """Adds to itself."""
        x += first
        return x.tanh_()


class Tokenless(Layered):
    """Returns rows that are the same for all tokens."""

    def last(self, x: Tensor, first: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        """Logits, and a weight."""
        return self.to_logits(x), self.to_kv.weight[None, :1, :8].expand(first.shape[0], -1, -1) * 2


@pytest.mark.parametrize(
    ("model", "count"),
    [(Layered, 3), (Own, 3), (Scaled, 4), (Wider, 4), (Marked, 1), (Viewed, 1), (Tokenless, 3)],
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
