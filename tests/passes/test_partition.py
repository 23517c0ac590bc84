"""Variants are cut at their attentions; equal layers are one segment, unequal ones are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import Toy, Twin, run_until, tiny_decode, toy_decode
from models import OLDER
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from vericache_compile.ops import ATTEND
from vericache_compile.passes.partition import cut, structure_key
from vericache_compile.passes.program import placeholders, returned

ops = torch.ops.vericache


def trace(function: Callable[..., Any], *inputs: Tensor, roles: tuple[str, ...] = ()) -> GraphModule:
    """A small program as a graph of aten; its first inputs play `roles`."""
    module = make_fx(function, tracing_mode="fake")(*inputs)
    for i, node in enumerate(placeholders(module)):
        node.meta["role"] = roles[i] if i < len(roles) else None
    return module


X, SEEN, W = torch.ones(2, 4), torch.ones(1, 2, 1, 4), torch.ones(4, 4)
CACHE, LENGTHS = torch.ones(1, 2, 3, 4), torch.ones(1).long()


def two_layers(x: Tensor, lengths: Tensor, past: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """Two layers of the same kind and an ending."""
    for layer, w in enumerate((w0, w1)):
        y = (x @ (w * 2)).view(1, 2, 1, 4)
        x = x + ops.attend(y, y + 1, y, past, past, lengths, lengths, 0.5, layer).view(2, 4)
    return x @ (w2 * 2)


def first(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """What comes before the first attention."""
    y = (x @ (w * 2)).view(1, 2, 1, 4)
    return y, y + 1


def middle(o: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What comes between two."""
    x = x + o.view(2, 4)
    y = (x @ (w * 2)).view(1, 2, 1, 4)
    return x, y, y + 1


def last(o: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor]:
    """What comes after the last."""
    return ((x + o.view(2, 4)) @ (w * 2),)


def test_segments_are_the_programs_between_attentions() -> None:
    inputs = (X, LENGTHS, CACHE, W, W.clone(), W.clone())
    segments = cut(trace(two_layers, *inputs, roles=("tokens", "lengths")))
    expected = [trace(first, X, W), trace(middle, SEEN, X, W), trace(last, SEEN, X, W)]
    assert [segment.key for segment in segments] == [structure_key(module) for module in expected]


def test_what_depends_on_weights_alone_is_computed_where_it_is_read() -> None:
    def shared(x: Tensor, lengths: Tensor, past: Tensor, w: Tensor) -> Tensor:
        doubled = w * 2
        y = (x @ doubled).view(1, 2, 1, 4)
        return ops.attend(y, y, y, past, past, lengths, lengths, 0.5, 0).view(2, 4) @ doubled

    segments = cut(trace(shared, X, LENGTHS, CACHE, W, roles=("tokens", "lengths")))
    assert [len(segment.outputs) for segment in segments] == [1, 1], "only activations cross"
    assert all("mul" in str(segment.module.graph) for segment in segments)


def test_what_an_attention_or_the_caller_reads_is_made_by_a_segment() -> None:
    def odd(x: Tensor, lengths: Tensor, past: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        k = (w * 2)[None, :2, None]
        return ops.attend(x.view(1, 2, 1, 4), k, k, past, past, lengths, lengths, 0.5, 0), w * 3

    variant = trace(odd, X, LENGTHS, CACHE, W, roles=("tokens", "lengths"))
    segments = cut(variant)
    [site] = (node for node in variant.graph.nodes if node.target is ATTEND)
    made = [node for segment in segments for node in segment.outputs]
    assert {*site.args[:3], *returned(variant)} <= {*made, site}


def test_attentions_side_by_side_leave_an_empty_segment() -> None:
    program = run_until(toy_decode(Twin(), torch.zeros(1, 2, 6, 8), torch.ones(1, 2, 6, 8)), "partition")
    assert [len(segment.outputs) > 0 for segment in program.segments["draft"]] == [True, False, True]


def test_the_layers_of_a_model_are_one_segment() -> None:
    program = run_until(tiny_decode("llama", 3), "partition", batch=3)
    for segments in program.segments.values():
        keys = [segment.key for segment in segments]
        assert keys[1] == keys[2]
        assert len(set(keys)) == 3


def test_cutting_again_gives_equal_keys() -> None:
    program = run_until(tiny_decode("llama", 1), "partition")
    for mode, segments in program.segments.items():
        assert [segment.key for segment in cut(program.variants[mode])] == [segment.key for segment in segments]


@pytest.mark.parametrize(
    ("name", "batch", "loop"),
    [
        ("llama", 1, "masked"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in (
                ("llama", 3, "plain"),
                ("llama", 1, "plain"),
                ("llama", 3, "masked"),
                ("gpt2", 1, "masked"),
                ("gpt2", 1, "plain"),
                ("gpt2", 3, "plain"),
            )
        ),
    ],
)
def test_positions_given_or_computed_and_masks_make_no_difference(name: str, batch: int, loop: str) -> None:
    def keys(loop: str) -> set[str]:
        program = run_until(tiny_decode(name, batch, loop), "partition", batch=batch)
        return {segment.key for segments in program.segments.values() for segment in segments}

    if name == "llama" and batch > 1 and OLDER:
        pytest.skip("older transformers expand RoPE's frequencies over the rows of given positions")
    assert keys(loop) == keys("generate")


def halved(x: Tensor) -> Tensor:
    return x * 0.5


KEY = structure_key(trace(halved, X))


def test_equal_programs_have_equal_keys() -> None:
    assert structure_key(trace(lambda other: other * 0.5, X + 1)) == KEY


@pytest.mark.parametrize(
    ("function", "example"),
    [
        (lambda x: x * 0.25, X),
        (lambda x: x / 2, X),
        (halved, X.double()),
        (halved, X.t().contiguous().t()),
        (halved, X[:1]),
        (lambda x: (x * 0.5, x), X),
    ],
    ids=["a constant", "an operator", "a type", "strides", "a shape", "what is returned"],
)
def test_programs_that_differ_have_keys_that_differ(function: Callable[..., Any], example: Tensor) -> None:
    assert structure_key(trace(function, example)) != KEY


def test_constants_count_by_their_values() -> None:
    def key(constant: Tensor) -> str:
        module = trace(lambda x: x + 1, X)
        module.register_buffer("held", constant)
        add = next(node for node in module.graph.nodes if node.op == "call_function")
        with module.graph.inserting_before(add):
            add.args = (add.args[0], module.graph.get_attr("held"))
        return structure_key(module)

    assert key(torch.arange(4.0)) == key(torch.arange(4.0))
    assert key(torch.arange(4.0)) != key(torch.arange(4.0) + 1)
    assert key(torch.arange(100.0)) != key(torch.arange(100.0) + 1)
    assert key(torch.tensor(1.0, dtype=torch.bfloat16)) != key(torch.tensor(2.0, dtype=torch.bfloat16))


def test_a_toy_has_one_segment_more_than_attentions() -> None:
    program = run_until(toy_decode(Toy()), "partition")
    assert {mode: len(segments) for mode, segments in program.segments.items()} == {"draft": 2, "verify": 2}
