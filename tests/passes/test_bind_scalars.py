"""A float that Dynamo made an input becomes a constant again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Captured, Toy, capture, run_until
from torch import Tensor

from vericache_compile.passes.bind_scalars import bind_scalars, scalar_inputs
from vericache_compile.passes.program import Program, copy_module


class Scaled(Toy):
    """Scales scores by an attribute."""

    scale = 0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)


@pytest.fixture
def lifted() -> Captured:
    """The graph of a model whose scale has changed since it was compiled first."""
    model, ids = Scaled(), torch.tensor([[3]])

    def drive(compiled: Scaled) -> None:
        for scale in (0.5, 0.25, 0.125):
            compiled.scale = scale
            k, v = torch.randn(2, 1, 2, 6, 8)
            compiled(ids, k, v)

    return capture(model, drive)[-1]


def test_a_scale_is_bound_to_its_value(lifted: Captured) -> None:
    [index] = scalar_inputs(lifted.module)
    assert lifted.inputs[index].item() == 0.125
    program = run_until(lifted, "find_attention", scalars={index: 0.125})
    assert program.sites[0].site.scale == 0.125
    assert not program.placeholders[index].users
    assert bind_scalars(program) == 0, "nothing is left to bind"


def test_a_bound_graph_computes_what_it_did(lifted: Captured) -> None:
    [index] = scalar_inputs(lifted.module)
    program = Program(copy_module(lifted.module), 1, 4, {index: 0.125})
    assert bind_scalars(program) == 1
    for bound, plain in zip(program.module(*lifted.inputs), lifted.module(*lifted.inputs), strict=True):
        assert torch.equal(bound, plain)


def test_weights_are_no_scalars() -> None:
    class Gated(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
            return self.to_logits(x) * self.gate

    k, v = torch.randn(2, 1, 2, 6, 8)
    [call] = capture(Gated(), lambda model: model(torch.tensor([[3]]), k, v))
    assert scalar_inputs(call.module) == ()
