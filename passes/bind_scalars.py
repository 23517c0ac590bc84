"""Replace scalar inputs by their values: Dynamo lifts a float attribute that changed between models to an input.

    scaling: f64[]; scale = scaling.item(); sdpa(..., scale=scale)    ->    sdpa(..., scale=0.25)

A plan made so is for these values only; the backend keeps one plan per set of values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from vericache_compile.passes.program import Program, example, is_weight


def scalar_inputs(module: GraphModule) -> tuple[int, ...]:
    """Indices of the inputs that hold one float, lifted from an attribute."""
    nodes = module.graph.find_nodes(op="placeholder", sort=True)
    return tuple(i for i, node in enumerate(nodes) if _is_scalar(node))


def _is_scalar(node: Node) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.dim() == 0 and value.dtype is torch.float64 and not is_weight(node)


def bind_scalars(program: Program) -> int:
    """Replace what scalar inputs are read for by `program.scalars`; returns how many reads were replaced."""
    bound = 0
    inputs = program.placeholders
    for index, value in program.scalars.items():
        for user in list(inputs[index].users):
            if user.op == "call_method" and user.target == "item":
                bound += _replace(user, value)
                program.module.graph.erase_node(user)
    program.module.recompile()
    return bound


def _replace(node: Node, value: float) -> int:
    def swap(argument: Any) -> Any:
        return value if argument is node else argument

    users = list(node.users)
    for user in users:
        user.args = torch.fx.node.map_arg(user.args, swap)
        user.kwargs = torch.fx.node.map_arg(user.kwargs, swap)
    return len(users)
