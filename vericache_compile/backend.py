"""The torch.compile backend: captured graph in, callable out. The only file that imports both halves."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile import optimized_module
from vericache_compile.config import Config, make_config
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.estimate import Measured, bytes_per_weight, measure
from vericache_compile.kernels import block_attention, native
from vericache_compile.load import Auto, count_weights
from vericache_compile.machine import bandwidths
from vericache_compile.model_state import ATTRIBUTE, Compilation, ModelState, state_of
from vericache_compile.observers import make_observers
from vericache_compile.passes.bind_scalars import scalar_inputs
from vericache_compile.passes.pipeline import Observer, plan_capture
from vericache_compile.passes.program import batch_of, is_weight
from vericache_compile.plan import CapturedPlan, DecodePlan, Site, Staging
from vericache_compile.runtime.ghosts import can_spell
from vericache_compile.runtime.planner import Machine, ring_bytes
from vericache_compile.runtime.session import Session

log = logging.getLogger("vericache_compile")


def vericache(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one captured graph. `mode` is accepted and not used; `options` are the fields of `Config`.

    Raises OptionError for a bad option, and with `strict` UnsupportedGraph where a graph is not taken.
    """
    _keep_compiling()
    config = make_config(options)
    parameters = parameters_of(example_inputs)
    made = compilation_of(example_inputs, parameters, config)
    observers = make_observers(config, made.dumps_failed)
    began = time.perf_counter()
    try:
        return _take(gm, example_inputs, parameters, config, observers)
    except UnsupportedGraph as reason:
        for observer in observers:
            observer.refused(gm, reason)
        if config.strict:
            raise
        return _leave(gm, example_inputs, parameters, config, reason)
    finally:
        made.seconds += time.perf_counter() - began


def parameters_of(example_inputs: Sequence[Any]) -> list[int]:
    """Which inputs of a captured graph are parameters."""
    return [i for i, x in enumerate(example_inputs) if isinstance(x, torch.nn.Parameter)]


def compilation_of(inputs: Sequence[Any], parameters: Sequence[int], config: Config) -> Compilation:
    """The compilation of the model that the inputs at `parameters` belong to.

    Looked up in every call: Dynamo runs one compiled graph for all models of the same make.
    """
    state = state_of([inputs[i] for i in parameters[:1]])
    if state is None:
        own = [inputs[i] for i in parameters]
        state = state_of(own) or ModelState()
        for parameter in own:
            setattr(parameter, ATTRIBUTE, state)
    return state.compilation(config)


def _keep_compiling() -> None:
    """Raise Dynamo's recompile limits before this frame reaches them, in all threads.

    Past its limit Dynamo would run the model's own code, uncompiled, on caches whose data only this backend holds. A
    setting is its thread's own, while graphs are everybody's: other threads have the default.
    """
    current = torch._guards.CompileContext.current_compile_id()
    compiled = (current.frame_compile_id or 0) + 1 if current is not None else 0
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        others = vars(torch._dynamo.config).get("_config", {}).get(name)
        if others is not None and compiled + 1 >= others.default:
            others.default *= 2
        if compiled + 1 >= (limit := getattr(torch._dynamo.config, name)):
            setattr(torch._dynamo.config, name, 2 * limit)
            log.debug("raised torch._dynamo.config.%s to %d", name, 2 * limit)


def _take(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    parameters: Sequence[int],
    config: Config,
    observers: Sequence[Observer],
) -> Callable[..., Any]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs):
        raise UnsupportedGraph(
            "gradients are wanted", "the captured graph", "call under torch.no_grad() or torch.inference_mode()"
        )
    check_parameters(parameters)
    scalars, buffered = scalar_inputs(gm), tuple(buffers_of(gm, example_inputs))
    plans: dict[tuple[float, ...], CapturedPlan | DecodePlan | UnsupportedGraph] = {}
    first = list(observers)

    def plan_for(inputs: Sequence[Any], batch: int) -> CapturedPlan | DecodePlan:
        floats = [float(inputs[i]) for i in scalars]
        key = (batch, *floats, *(part for i in buffered for part in identity_of(inputs[i])))
        if key not in plans:
            made = compilation_of(inputs, parameters, config)
            values = dict(zip(scalars, floats, strict=True))
            low = config.draft_dtype_on(inputs[parameters[0]].device)
            watching = first or make_observers(config, made.dumps_failed)
            window, inductor = config.window, config.inductor
            staging = staging_of(config, inputs, parameters, batch)
            buffers = {i: inputs[i] for i in buffered if not inputs[i].is_inference()}
            how = (values, low, staging, watching, buffers)
            try:
                plans[key] = plan_capture(gm, batch, window, inductor, made.compiled, *how)
                made.session.table.captured = True
            except UnsupportedGraph as reason:
                plans[key] = reason
                for observer in () if first else watching:  # a refusal of the first is told by `vericache`
                    observer.refused(gm, reason)
        planned = plans[key]
        if isinstance(planned, UnsupportedGraph):
            raise planned.with_traceback(None)
        return planned

    plan = plan_for(example_inputs, batch_of(gm, example_inputs))
    captured = plan.captured if isinstance(plan, DecodePlan) else plan
    buffered = tuple(i for i in buffered if i not in captured.roles.counters)  # they say something else in each call
    check_sites(captured.sites)
    compressor = compilation_of(example_inputs, parameters, config).session.compressor
    compressor.check_model(captured.sites, [example_inputs[i].shape for i in parameters])
    if block_attention.takes(example_inputs[parameters[0]].device, captured.sites[0].dtype):
        native.start_build()
    _tell(compilation_of(example_inputs, parameters, config), plan)
    tokens = captured.roles.tokens
    first.clear()

    def run(*inputs: Any) -> Any:
        made = compilation_of(inputs, parameters, config)
        session = made.session
        if not isinstance(held := session.housing.home.weigh, Auto) or held.measured is not made.measured:
            let_weigh(made, inputs, parameters, captured.sites)
        try:
            chosen = plan_for(inputs, inputs[tokens].shape[0])
        except UnsupportedGraph as reason:  # taken for one model or batch, and not for another that runs it
            if config.strict:
                raise
            _tell_left(compilation_of(inputs, parameters, config), reason, "as captured")
            return gm.forward(*session.with_data(inputs))
        return session.run(chosen, inputs)

    return run


def let_weigh(made: Compilation, inputs: Sequence[Any], parameters: Sequence[int], sites: Sequence[Site]) -> None:
    """Have a session weigh where full KV lives, where there is something to weigh; the inputs at `parameters` are the
    model's."""
    session, device = made.session, inputs[parameters[0]].device
    if session.housing.home.weighs(device):
        measured, weights = measured_for(made, sites), count_weights([inputs[i] for i in parameters])
        weigh = Auto(made.config, measured, weights, device, session.counts, session.casts)
        session.housing.home = replace(session.housing.home, weigh=weigh)


def measured_for(made: Compilation, sites: Sequence[Site]) -> Measured:
    """What the compressor of a compilation takes at its sites, measured once, and again when decode steps show which of
    them slide. Of a prefill's those slide whose tensors it cuts."""
    known = made.measured
    sites = [site if site.kept is None or site.window else replace(site, window=site.kept + 1) for site in sites]
    if known is None or sum(bool(site.window) for site in sites) > sum(bool(site.window) for site in known.sites):
        known = made.measured = measure(made.session.compressor, sites)
    return known


def staging_of(config: Config, inputs: Sequence[Any], parameters: Sequence[int], batch: int) -> Staging | None:
    """The ring for full KV as long as these inputs'; None where full KV is on the device for good.

    Where its size is not given, as large as what comes over the link while a round drafts.
    """
    weights = [inputs[i] for i in parameters]
    device = weights[0].device
    if not config.moves_on(device):
        return None
    columns = max((x.shape[2] for x in inputs if isinstance(x, Tensor) and x.dim() == 4), default=0) + config.window
    if config.staging_bytes is not None:
        return Staging(config.staging_bytes, columns)
    found = bandwidths(device)
    reads = sum(weight.numel() * bytes_per_weight(config, weight.dtype, device, batch) for weight in weights)
    machine = Machine(0, found.memory_gbps, config.link_gbps or found.link_gbps)
    per_byte = ring_bytes(1, config.window, machine)
    return Staging(int(per_byte * reads), columns, per_byte)


def identity_of(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is another one, or changed in place: masks are proved for what it holds."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def buffers_of(gm: GraphModule, inputs: Sequence[Any]) -> dict[int, Tensor]:
    """The model's buffers of whole numbers or truth values, which masks are made from, by input; none made in inference
    mode, whose changes nobody counts."""
    nodes = gm.graph.find_nodes(op="placeholder", sort=True)
    held = {i: x for i, x in enumerate(inputs) if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter)}
    counted = {i: x for i, x in held.items() if not x.is_inference()}
    return {i: x for i, x in counted.items() if is_weight(nodes[i]) and not x.is_floating_point()}


def check_parameters(parameters: Sequence[int]) -> None:
    """Raise UnsupportedGraph where a graph has no parameter among its inputs."""
    if not parameters:
        raise UnsupportedGraph(
            "no parameters among the inputs", "the captured graph", "compile the model, not a function of its outputs"
        )


def check_sites(sites: Sequence[Site]) -> None:
    """Raise UnsupportedGraph where the caller's cache tensors cannot carry a name in place of data."""
    for site in sites:
        if not can_spell(site):
            raise UnsupportedGraph(
                f"a cache of {site.dtype} with {min(site.cached_sizes)} elements per head",
                f"layer {site.layer}",
                "use float32, bfloat16 or float16, with heads of at least 16 elements",
            )


def _leave(
    gm: GraphModule, example_inputs: Sequence[Any], parameters: Sequence[int], config: Config, reason: UnsupportedGraph
) -> Callable[..., Any]:
    """The graph under plain Inductor, with real data for ghosts, and one warning per reason."""
    made = compilation_of(example_inputs, parameters, config)
    made.graphs["not taken"] += 1
    _tell_left(made, reason, "under plain Inductor")
    if config.inductor:
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(gm, _with_room_for_data(gm, example_inputs, made.session))
    else:
        compiled = gm.forward

    def run(*inputs: Any) -> Any:
        session = compilation_of(inputs, parameters, config).session
        return compiled(*session.with_data(inputs))

    return run


def _tell_left(made: Compilation, reason: UnsupportedGraph, how: str) -> None:
    if reason.found not in made.reasons:
        made.reasons.append(reason.found)
        log.warning("vericache: graph not taken, it runs %s: %s", how, reason)


def _with_room_for_data(gm: GraphModule, example_inputs: Sequence[Any], session: Session) -> list[Any]:
    """Example inputs in which fake tensors with strides of their own stand for ghosts, which have none along S.

    A graph that is not taken gets real, contiguous keys and values in their place.
    """
    given = list(example_inputs)
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder", sort=True)):
        if session.is_ghost(given[i]):
            fake = node.meta["example_value"]
            with fake.fake_mode:
                given[i] = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
    return given


def _tell(made: Compilation, plan: CapturedPlan | DecodePlan) -> None:
    """Count the graph; once a decode step was taken, say in one line what was seen and how it will run."""
    decode = isinstance(plan, DecodePlan)
    made.sites = plan.captured.sites if isinstance(plan, DecodePlan) else plan.sites
    made.graphs["decode" if decode else "captured"] += 1
    if made.told or not decode:
        return
    made.told = True
    full = sum(site.bytes_per_token for site in made.sites)
    compressed = round(measured_for(made, made.sites).draft)
    left = f", not taken: {'; '.join(made.reasons)}" if made.reasons else ""
    log.info(
        "vericache: graphs seen %d, attention sites taken %d of %d%s, compressor %s, window %d, "
        "cache bytes per token %d full, %d compressed",
        sum(made.graphs.values()),
        len(made.sites),
        len(made.sites),
        left,
        made.session.compressor,
        made.config.window,
        full,
        compressed,
    )


def reset() -> None:
    """Called by torch.compiler.reset(). Sequences live on with the caller's caches; nothing else is global."""


vericache.reset = reset  # type: ignore[attr-defined]


def _show_log() -> None:
    """Let the one line reach the terminal where the program has not set up logging."""
    if log.level == logging.NOTSET and not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)


_show_log()
optimized_module.install()
