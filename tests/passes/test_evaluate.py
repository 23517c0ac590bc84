"""Masks and positions are computed in scenes, from lengths and padding alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, node_named, run_until, tiny_decode, toy_decode
from torch import Tensor

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.evaluate import (
    Scene,
    batch_symbols,
    bind_symbols,
    bounds,
    captured_past,
    evaluate,
    holds_at,
    scenes,
)
from vericache_compile.passes.program import Program


def test_a_mask_is_what_the_model_would_compute() -> None:
    program = run_until(tiny_decode("llama", 3), "split_captured", batch=3)
    [mask] = evaluate(program, [program.sites[0].mask], Scene(4, (0, 2, 1)))
    shown = [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert torch.equal(mask, torch.tensor(shown).bool()[:, None, None])


def test_evaluating_leaves_the_graph_as_it_was() -> None:
    program = run_until(tiny_decode("llama", 3), "split_captured", batch=3)
    before = program.module.print_readable(False)
    first, again = (evaluate(program, [program.sites[0].mask], Scene(4, (0, 2, 1)))[0] for _ in range(2))
    assert torch.equal(first, again)
    assert program.module.print_readable(False) == before


def test_every_symbol_of_the_past_is_bound() -> None:
    program = run_until(tiny_decode("llama", 3), "split_captured", batch=3)
    past = {i for node in program.cached for i in node.meta["example_value"].shape[2].node.expr.free_symbols}
    env = bind_symbols(program, 41)
    assert {env.pop(symbol) for symbol in past} == {41}
    assert set(env.values()) == {42}, "the padding mask has a column for the new token"
    assert batch_symbols(program) == set(), "the batch is not symbolic in this graph"


class Windowed(Toy):
    """Sees the last `window` columns only."""

    window = 300

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        seen = torch.arange(k.shape[2]) > k.shape[2] - 1 - self.window
        return F.scaled_dot_product_attention(q, k, v, seen[None, None, None], enable_gqa=True)


def test_scenes_reach_past_the_constants_of_a_computation() -> None:
    program = run_until(toy_decode(Windowed(), batch=3), "split_captured", batch=3)
    lengths = [scene.past for scene in scenes(program, [program.sites[0].mask])]
    assert min(lengths) == 2, "Dynamo's graph is for two columns or more"
    assert {5, 9, 70, 1000} < set(lengths)
    assert any(300 < past < 310 for past in lengths)


class Switching(Toy):
    """Spells its mask in another way from 12 columns on, as a graph of its own."""

    def attend_masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = torch.arange(k.shape[2]) > -1
        return F.scaled_dot_product_attention(q, k, v, seen[None, None, None], enable_gqa=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return Toy.attend(self, q, k, v) if k.shape[2] < 12 else self.attend_masked(q, k, v)


def test_scenes_are_calls_that_the_graph_is_for() -> None:
    short = run_until(toy_decode(Switching(), columns=6), "split_captured")
    assert bounds(short) == (2, 10)
    assert max(scene.past for scene in scenes(short, [])) == 10
    assert [holds_at(short, past) for past in (1, 2, 10, 11)] == [False, True, True, False]
    long = run_until(toy_decode(Switching(), columns=30), "split_captured")
    assert bounds(long) == (11, None)
    assert min(scene.past for scene in scenes(long, [])) == 11


def test_a_graph_of_one_length_is_for_that_length() -> None:
    program = run_until(toy_decode(Toy(), dynamic=False), "split_captured")
    assert captured_past(program) == 6
    assert bounds(program) == (6, 6)


def test_scenes_pad_rows_where_the_graph_takes_a_padding_mask() -> None:
    def pads(program: Program) -> set[tuple[int, ...]]:
        return {scene.pads for scene in scenes(program, [])}

    padded = run_until(tiny_decode("llama", 3), "split_captured", batch=3)
    assert {(0, 0, 0), (0, 3, 1), (1, 3, 0), (4, 4, 4)} <= pads(padded)
    plain = run_until(tiny_decode("llama", 3, "plain"), "split_captured", batch=3)
    assert pads(plain) == {(0, 0, 0)}


class Odd(Toy):
    """A mask [B, S + 1] that depends on cached keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        shown = self.shown(torch.arange(k.shape[2])[None], *more)
        return F.scaled_dot_product_attention(q, k, v, shown[:, None, None], enable_gqa=True)

    def shown(self, columns: Tensor, ids: Tensor, past: Tensor) -> Tensor:
        return F.pad(past[:, 0, :, 0], (0, 1)) != 0

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        return super().forward(ids, k, v, ids, k)


class ByWeight(Odd):
    """Hides columns by a learned number."""

    def shown(self, columns: Tensor, ids: Tensor, past: Tensor) -> Tensor:
        return columns > self.to_logits.bias[0]


class ByToken(Odd):
    """Hides columns by the token."""

    def shown(self, columns: Tensor, ids: Tensor, past: Tensor) -> Tensor:
        return columns != ids


class ByTable(Odd):
    """Looks columns up in a short table."""

    def shown(self, columns: Tensor, ids: Tensor, past: Tensor) -> Tensor:
        return torch.ones(64).bool()[columns]


@pytest.mark.parametrize(
    ("model", "found", "line"),
    [
        (Odd, "depends on cached keys or values", "past[:, 0, :, 0]"),
        (ByWeight, "depends on weights", "self.to_logits.bias[0]"),
        (ByToken, "depends on tokens", ""),
        (ByTable, "fails at 70 cached columns", "torch.ones(64)"),
    ],
)
def test_what_depends_on_more_is_refused(model: type[Toy], found: str, line: str) -> None:
    program = run_until(toy_decode(model()), "split_captured")
    mask = node_named(program.module, "scaled_dot_product_attention").args[3]
    with pytest.raises(UnsupportedGraph, match=found) as error:
        [evaluate(program, [mask], scene) for scene in scenes(program, [mask])]
    assert line in error.value.where
