"""Compile each distinct segment once (Inductor, or eagerly), and lay the program out as steps over numbered slots.

segments s0, s1, s2 and sites 0, 1   ->   steps  run s0 | attend 0 | run s1 | attend 1 | run s2
with transfers, lookahead 1          ->          prefetch 0 | run s0 | wait 0 | attend 0 | prefetch 1 | run s1 | ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from vericache_compile.ops import ATTEND, EXPERTS_MM, LAYER, PREFETCH, WAIT
from vericache_compile.passes.program import Program, SegmentGraph, placeholders, returned
from vericache_compile.plan import Act, Compiled, SegmentedProgram, Step


@dataclass(frozen=True)
class NodeStep:
    """A step before its values have slots."""

    act: Act
    run: Compiled | None
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    layer: int = -1
    side: int = 0


def lower(program: Program, *, inductor: bool) -> int:
    """Fill `program.segmented`; returns how many segments had to be compiled (0 when an earlier capture had them)."""
    made = 0
    for mode, segments in program.segments.items():
        runs: list[Compiled] = []
        for segment in segments:
            key = f"{'inductor' if inductor else 'eager'}:{segment.key}"
            if key not in program.compiled:
                compilable = inductor and segment.outputs
                program.compiled[key] = _compile(segment.module) if compilable else _eager(segment.module)
                made += 1
            runs.append(program.compiled[key])
        steps = _list_steps(program.variants[mode], segments, runs)
        distinct = len({segment.key for segment in segments})
        program.segmented[mode] = _lay_out(mode, program.variants[mode], steps, distinct)
    return made


def _compile(module: GraphModule) -> Compiled:
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.virtualized import V

    inputs = [node.meta["val"] for node in placeholders(module)]
    mode = next(value.fake_mode for value in inputs if isinstance(value, FakeTensor))
    with tracing(None), torch.no_grad(), V.set_fake_mode(mode):
        compiled: Compiled = compile_fx_inner(module, inputs)
    return compiled


def _eager(module: GraphModule) -> Compiled:
    def run(inputs: list[Tensor]) -> Sequence[Tensor]:
        made: Sequence[Tensor] = module(*inputs)
        return made

    return run


def _list_steps(variant: GraphModule, segments: list[SegmentGraph], runs: list[Compiled]) -> list[NodeStep]:
    """Segments and attentions in turn, prefetches where the graph has them; segments that make nothing are left out."""
    between: list[list[NodeStep]] = [[]]
    for node in variant.graph.nodes:
        if node.target is PREFETCH:
            between[-1].append(NodeStep(Act.PREFETCH, None, (), (), _layer(node, 1)))
        elif node.target is ATTEND:
            between.append([])
    steps: list[NodeStep] = []
    sites = [node for node in variant.graph.nodes if node.target is ATTEND]
    for i, (segment, run) in enumerate(zip(segments, runs, strict=True)):
        steps += between[i]
        if segment.outputs:
            steps.append(NodeStep(Act.RUN, run, segment.inputs, segment.outputs))
        if i < len(sites):
            steps += _attention_steps(sites[i])
    return steps


def _attention_steps(site: Node) -> list[NodeStep]:
    """The waits of one site, if it has any, and its attention: q, k, v, sinks where it has them, what waits bring."""
    waits = [node for node in site.args[3:5] if isinstance(node, Node) and node.target is WAIT]
    layer, given = _layer(site, LAYER), (*site.args[:3], *site.args[10:11])
    read = [node for node in given if isinstance(node, Node)]
    steps = [NodeStep(Act.WAIT, None, (), (node,), layer, side) for side, node in enumerate(waits)]
    return [*steps, NodeStep(Act.ATTEND, None, (*read, *waits), (site,), layer)]


def _layer(node: Node, place: int) -> int:
    layer = node.args[place]
    assert isinstance(layer, int), f"{node.name} has no layer"
    return layer


def _lay_out(mode: str, variant: GraphModule, steps: list[NodeStep], distinct: int) -> SegmentedProgram:
    """Number the values that steps read and make, and say after which step each is dead."""
    inputs = placeholders(variant)
    roles = {node.meta["role"]: node for node in inputs if node.meta["role"]}
    leading = [roles["tokens"], roles["positions"]]
    values = [value for step in steps for value in (*step.inputs, *step.outputs)]
    rows = returned(variant)
    slot = {node: i for i, node in enumerate(dict.fromkeys([*leading, *values, *rows]))}
    weights = [node for node in inputs if node in slot and node not in leading]
    last = {node: i for i, step in enumerate(steps) for node in (*step.inputs, *step.outputs)}
    for node in (*leading, *weights, *rows):
        last.pop(node, None)

    def slots(nodes: Sequence[Node]) -> tuple[int, ...]:
        return tuple(slot[node] for node in nodes)

    return SegmentedProgram(
        mode=mode,
        steps=tuple(
            Step(
                step.act,
                step.run,
                slots(step.inputs),
                slots(step.outputs),
                slots([node for node, at in last.items() if at == i]),
                step.layer,
                step.side,
            )
            for i, step in enumerate(steps)
        ),
        slots=len(slot),
        tokens=slot[leading[0]],
        positions=slot[leading[1]],
        weights=tuple((slot[node], node.meta["captured_input"], node.meta.get("cast")) for node in weights),
        outputs=slots(rows),
        distinct=distinct,
        waits_for_host=any(node.target is EXPERTS_MM for node in variant.graph.nodes),
    )
