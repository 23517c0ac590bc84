"""Variants read tokens, positions, lengths and paddings; the cached data only at their attentions."""

from __future__ import annotations

import difflib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Toy, calls_of, capture, run_until, run_variant, take_steps, tiny_decode, toy_decode
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.program import example, placeholders, returned
from vericache_compile.passes.split_modes import LEADING, STATE, is_decode, split_modes


def changes(before: GraphModule, after: GraphModule) -> tuple[list[str], list[str]]:
    """Calls that a pass removed, and calls that it added."""
    lines = list(difflib.ndiff(calls_of(before), calls_of(after)))
    return [x[2:] for x in lines if x[0] == "-"], [x[2:] for x in lines if x[0] == "+"]


def test_a_variant_attends_where_the_graph_appended_and_attended() -> None:
    program = run_until(toy_decode(Toy()), "split_modes")
    removed, added = changes(program.module, program.variants["verify"])
    position = ["arange", "add", "getitem"]
    assert [x for x in removed if x != "size"] == [*position, "cat", "cat", "scaled_dot_product_attention"]
    assert added == ["attend.default"]


def test_attend_reads_this_call_then_the_cache_then_lengths_and_pads() -> None:
    program = run_until(toy_decode(Toy()), "split_modes")
    variant, [nodes] = program.variants["draft"], program.sites
    [call] = (node for node in variant.graph.nodes if node.target is torch.ops.vericache.attend.default)
    names = [node.name for node in (nodes.query, nodes.key, nodes.value)]
    assert [str(a) for a in call.args[:7]] == [*names, "l_k_", "l_v_", "lengths", "pads"]
    assert call.args[7:] == (nodes.site.scale, 0, None)


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("llama", "generate"),
        ("gpt2", "plain"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (("llama", "masked"), ("llama", "plain"), ("gpt2", "generate"), ("gpt2", "masked"))
        ),
    ],
)
def test_nothing_of_the_past_but_the_cache_is_read(name: str, loop: str) -> None:
    program = run_until(tiny_decode(name, 3, loop), "split_modes", batch=3)
    roles = program.found_roles
    past = {i for nodes in program.sites for i in nodes.site.past}
    for variant in program.variants.values():
        inputs = placeholders(variant)
        assert [node.meta["role"] for node in inputs[:4]] == list(LEADING)
        kept = {node.meta["captured_input"] for node in inputs[4:]}
        assert kept == past | set(roles.weights), "neither mask nor length nor captured positions"
        assert not any(isinstance(example(node), torch.SymInt) for node in inputs)
        assert len(returned(variant)) == 1


def test_splitting_again_gives_the_same_variants() -> None:
    program = run_until(toy_decode(Toy()), "split_modes")
    first = {mode: module.print_readable(False) for mode, module in program.variants.items()}
    split_modes(program)
    assert {mode: module.print_readable(False) for mode, module in program.variants.items()} == first
    assert first["draft"] == first["verify"]


class Recorder:
    """A store of cached keys and values, per site, that remembers what it was handed."""

    def __init__(self, cached: list[tuple[Tensor, Tensor]]) -> None:
        self.cached = cached
        self.held: list[tuple[int, Tensor, Tensor, Tensor]] = []

    def past(self, layer: int, side: int) -> Tensor:
        return self.cached[layer][side]

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.held.append((layer, q, k, v))


def test_the_captured_graph_hands_its_keys_and_values_to_the_store() -> None:
    captured = tiny_decode("llama", 3)
    program = run_until(captured, "split_captured", batch=3)
    assert changes(program.module, program.captured) == ([], ["past", "past", "append"] * 3)
    pasts = [nodes.site.past for nodes in program.sites]
    store = Recorder([(captured.inputs[keys], captured.inputs[values]) for keys, values in pasts])
    without = [torch.empty(0) if any(i in past for past in pasts) else x for i, x in enumerate(captured.inputs)]
    made = program.captured(store, *without)
    plain = captured.module(*captured.inputs)
    assert len(made) == 1
    assert torch.equal(made[0], plain[program.rows[0]])
    assert [layer for layer, *_ in store.held] == [0, 1, 2]
    caches = {(role.kind, role.layer): value for value, role in zip(plain, program.outputs, strict=True)}
    for layer, q, k, v in store.held:
        assert q.shape == (3, 4, 1, 16)
        assert torch.equal(caches["keys", layer][:, :, -1:], k)
        assert torch.equal(caches["values", layer][:, :, -1:], v)


class Named(Toy):
    """Variables with the names of the inputs that variants add."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        tokens = ids.view(-1, 1)
        return super().forward(tokens, k, v)

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        positions = torch.arange(1) + past.shape[2]
        lengths = positions.view(1, 1)
        return lengths.contiguous()


class Flat(Toy):
    """One-dimensional positions."""

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return torch.arange(past.shape[2], past.shape[2] + 1)


class InPlace(Toy):
    """Changes hidden states in place, where nobody reads the result of the call."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        x = x + 1
        x.mul_(2)
        x += 1
        return self.to_logits(x)


@pytest.mark.parametrize("model", [Toy, Named, Flat, InPlace])
def test_a_variant_computes_what_the_graph_did(model: type[Toy]) -> None:
    captured = toy_decode(model())
    program = run_until(captured, "split_modes")
    steps = take_steps(program, captured, 1)
    [logits] = run_variant(program, "draft", captured, steps, 0)
    assert torch.equal(logits, steps.rows[0][0])


@pytest.mark.parametrize(("dynamic", "expected"), [(True, True), (False, False)])
def test_a_decode_step_has_a_past_of_any_length(dynamic: bool, expected: bool) -> None:
    assert is_decode(run_until(toy_decode(Toy(), dynamic=dynamic), "split_captured")) is expected


class Scaled(Toy):
    """Scales logits by the length."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x) * past.shape[2]


class Peeking(Toy):
    """Reads cached keys outside of attention."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x) * past.mean()


class Shaded(Toy):
    """Reads the padding mask outside of attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, (more[0] != 0)[:, None, None], enable_gqa=True)

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x) * more[0].float().mean()


class Biased(Toy):
    """Takes one more input."""

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        return self.to_logits(x) * more[0]


class Counter(Toy):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        self.count.add_(1)
        return self.to_logits(x) + self.count


class Adding(Toy):
    """Reads an input in a call that overwrites something else."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        logits, k, v = super().forward(ids, k, v)
        logits += more[0]
        return logits, k, v


class Recurrent(Toy):
    """A layer's state that each step overwrites."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        logits, k, v = super().forward(ids, k, v)
        more[0].copy_(0.5 * more[0] + logits.mean())
        return logits * more[0], k, v


class Summing(Toy):
    """Returns a number for the whole batch."""

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        logits, k, v = super().forward(ids, k, v)
        return logits, k, v, logits.sum()


PADDING = torch.ones(1, 7, dtype=torch.int64)
REFUSED = [
    (Scaled, (), "the past length in a computation other than positions and masks", "* past.shape[2]"),
    (Peeking, (), "cached keys or values in a computation other than attention", "past.mean()"),
    (Shaded, (PADDING,), "the padding mask in a computation other than attention and positions", "more[0].float()"),
    (Biased, (torch.ones(29),), "an input that is neither weight, token, position, mask nor cache", "* more[0]"),
    (Adding, (torch.ones(29),), "an input that is neither weight, token, position, mask nor cache", "+= more[0]"),
    (Recurrent, (torch.ones(29),), STATE, "more[0].copy_"),
    (Counter, (), "a weight or buffer that changes in place", "self.count.add_"),
    (Summing, (), "an output without one row per sequence", "logits.sum()"),
]


@pytest.mark.parametrize(("model", "more", "found", "line"), REFUSED)
def test_a_graph_is_refused_with_its_reason_and_source_line(
    model: type[Toy], more: tuple[Tensor, ...], found: str, line: str
) -> None:
    with pytest.raises(UnsupportedGraph) as error:
        run_until(toy_decode(model(), *more), "split_modes")
    assert error.value.found == found
    assert line in error.value.where


def test_one_position_for_a_whole_batch_is_that_of_its_first_row() -> None:
    program = run_until(toy_decode(Flat(), batch=3), "split_modes", batch=3)
    assert program.in_step
    assert calls_of(program.variants["verify"])[:2] == ["narrow", "view"]


class NewestLogits(Toy):
    """Gives logits of the newest tokens only, as many as it is asked for."""

    def finish(self, x: Tensor, past: Tensor, *more: Any) -> Tensor:
        return self.to_logits(x[:, -more[0] :])


def test_how_many_of_one_tokens_logits_are_kept_matters_to_no_variant() -> None:
    def ask(model: Any) -> None:
        for count in (3, 2, 4):
            k, v = torch.randn(2, 1, 2, 6, 8)
            torch._dynamo.maybe_mark_dynamic(k, 2)
            torch._dynamo.maybe_mark_dynamic(v, 2)
            model(torch.tensor([[3]]), k, v, count)

    asked = capture(NewestLogits(), ask)[-1]
    assert any(isinstance(value, int) and value == 4 for value in asked.inputs), "the count is an input"
    program = run_until(asked, "split_modes")
    for variant in program.variants.values():
        assert all(isinstance(node.meta["example_value"], Tensor) for node in placeholders(variant))
