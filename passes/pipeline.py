"""The ordered passes, and run(): run each, lint, check, log what it did."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.bind_scalars import bind_scalars
from vericache_compile.passes.check import check
from vericache_compile.passes.evaluate import bounds
from vericache_compile.passes.expand_window import expand_window
from vericache_compile.passes.find_attention import find_attention
from vericache_compile.passes.find_roles import find_roles
from vericache_compile.passes.find_rotation import find_rotation
from vericache_compile.passes.hoist_prefetch import hoist_prefetch
from vericache_compile.passes.insert_transfers import insert_transfers
from vericache_compile.passes.lift_positions import lift_positions
from vericache_compile.passes.lower import lower
from vericache_compile.passes.partition import partition
from vericache_compile.passes.program import Program, copy_module
from vericache_compile.passes.prove_mask import prove_mask
from vericache_compile.passes.spell_products import spell_products
from vericache_compile.passes.split_modes import is_decode, split_captured, split_modes
from vericache_compile.plan import CapturedPlan, Compiled, DecodePlan, Staging

log = logging.getLogger(__name__)

Pass = Callable[[Program], int]


class Observer(Protocol):
    """Who is shown the program on its way; passes know nothing of it, and it changes nothing."""

    def after(self, name: str, count: int, program: Program) -> None:
        """Called with the captured graph ("captured", its number of nodes), then after each pass with its count."""

    def done(self, program: Program) -> None:
        """Called once, after the last pass."""

    def refused(self, module: GraphModule, reason: UnsupportedGraph) -> None:
        """Called instead, with the graph as Dynamo gave it, where it is not taken."""


FIND: tuple[Pass, ...] = (bind_scalars, find_roles, find_attention, split_captured)
"""What every captured graph goes through."""


def decode_passes(
    inductor: bool, draft_dtype: torch.dtype | None = None, staging: Staging | None = None
) -> tuple[Pass, ...]:
    """The passes that make draft and verify of a decode step, in order.

    `staging` is what full KV comes to that lives outside the device; None where it is on the device for good.
    """
    transfers: tuple[Pass, ...] = ()
    if staging is not None:
        transfers = (insert_transfers, partial(hoist_prefetch, staging=staging))
    return (
        prove_mask,
        lift_positions,
        find_rotation,
        split_modes,
        expand_window,
        partial(spell_products, inductor=inductor, draft_dtype=draft_dtype),
        *transfers,
        partition,
        partial(lower, inductor=inductor),
    )


def run(program: Program, passes: tuple[Pass, ...], observers: Sequence[Observer] = ()) -> None:
    """Run passes in order; after each, lint and check the program, and show it to the observers."""
    for each in passes:
        name = each.func.__name__ if isinstance(each, partial) else getattr(each, "__name__", str(each))
        count = each(program)
        check(program, name)
        log.debug("%s: %d", name, count)
        for observer in observers:
            observer.after(name, count, program)


def run_all(program: Program, decode: tuple[Pass, ...], observers: Sequence[Observer] = ()) -> bool:
    """Run FIND and, on a decode step, the passes `decode`; returns whether it is one. Raises UnsupportedGraph."""
    for observer in observers:
        observer.after("captured", len(program.module.graph.nodes), program)
    run(program, FIND, observers)
    if taken := is_decode(program):
        run(program, decode, observers)
    for observer in observers:
        observer.done(program)
    return taken


def plan_capture(
    module: GraphModule,
    batch: int,
    window: int,
    inductor: bool,
    compiled: dict[str, Compiled],
    scalars: dict[int, float] | None = None,
    draft_dtype: torch.dtype | None = None,
    staging: Staging | None = None,
    observers: Sequence[Observer] = (),
    buffers: dict[int, Tensor] | None = None,
) -> CapturedPlan | DecodePlan:
    """Run the pipeline on a captured graph; raises UnsupportedGraph where a graph cannot be taken.

    `compiled` holds compiled segments by structure and is added to; `scalars` are the values of scalar
    inputs, `buffers` those of the model's buffers; `draft_dtype` is the type that draft reads weights in (None: as they
    are); `staging` is that of `decode_passes`. Observers are told all but a refusal, which may also have reasons that
    the caller alone knows.
    """
    program = Program(copy_module(module), batch, window, scalars or {}, buffers or {}, compiled)
    decode = run_all(program, decode_passes(inductor, draft_dtype, staging), observers)
    captured = _captured_plan(program, staging)
    if not decode:
        return captured
    return DecodePlan(
        captured=captured,
        draft=program.segmented["draft"],
        verify=program.segmented["verify"],
        window=window,
        logits=program.logits,
        position_rule=program.position_rule,
        position_limit=program.position_limit,
        rotations=tuple(program.rotations),
        column_limit=column_limit(program),
        in_step=program.in_step,
    )


def column_limit(program: Program) -> int | None:
    """The first column whose token would run another graph, or fail in the model's own mask; None where none would."""
    held = bounds(program)
    assert held is not None, "a decode step is for some number of columns"
    limits = (None if held[1] is None else held[1] + 1, program.column_limit)
    return min((limit for limit in limits if limit is not None), default=None)


def _captured_plan(program: Program, staging: Staging | None) -> CapturedPlan:
    assert program.captured is not None, "split_captured has not run"
    sites = tuple(nodes.site for nodes in program.sites)
    past = any(site.past is not None for site in sites)
    graphs = (program.captured, program.unpadded)
    return CapturedPlan(*graphs, program.found_roles, sites, tuple(program.outputs), past, staging)
