"""Say how a model would run, without compiling it: its graphs are captured and go through the passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule

from vericache_compile.backend import buffers_of, check_parameters, check_sites, parameters_of, staging_of
from vericache_compile.config import Config, make_config
from vericache_compile.dump.describe import describe_segments, describe_sites
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.estimate import Measured, measure, weight_bytes
from vericache_compile.observers import make_observers
from vericache_compile.passes import pipeline
from vericache_compile.passes.bind_scalars import scalar_inputs
from vericache_compile.passes.lower import lower
from vericache_compile.passes.program import Program, batch_of, copy_module

AT_TOKENS = 4096
"""Cached tokens for which bytes per step are given."""
NEW_TOKENS = 4
"""Enough for Dynamo to see that the cache grows."""
BREAK = "move what stops the capture (print, .item(), branches on values) out of forward"


@dataclass
class Explanation:
    """How a model's graphs run under vericache; bytes count all rows of the batch where nothing else is said."""

    model: str
    batch: int = 1
    window: int = 0
    compressor: str = ""
    graphs: list[dict[str, Any]] = field(default_factory=list)
    """In the order of capture: number, runs_as (decode, captured, not taken), nodes."""
    sites: list[dict[str, Any]] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    """Of the captured decode step, of draft and of verify."""
    segments: dict[str, dict[str, int]] = field(default_factory=dict)
    """Per variant: total, and distinct (each is compiled once)."""
    cache_bytes_per_token: dict[str, float] = field(default_factory=dict)
    """Of one row: full, and compressed."""
    bytes_per_step: dict[str, int] = field(default_factory=dict)
    """Estimated bytes read and written by one full decode step, one draft step and one verify pass."""
    not_taken: list[dict[str, Any]] = field(default_factory=list)
    """graph, found, where, fix; graph breaks first."""

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self)


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Capture what a call of the model runs, put it through the passes, and compile nothing.

    A model with `generate` is called as `model.generate(*args, **kwargs)` for four tokens, any other as
    `model(*args, **kwargs)`; each graph runs once, uncompiled. `options` are the backend's. Dynamo is reset before
    and after, so other compiled models are captured anew. Raises OptionError, and whatever the model raises.
    """
    recorder = _Recorder(make_config(options))
    original = getattr(model, "_orig_mod", model)
    with _compiled_with(original, recorder), torch.no_grad():
        if hasattr(original, "generate"):
            count = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
            generate: Callable[..., Any] = original.generate  # type: ignore[assignment]
            generate(*args, **{**kwargs, **count})
        else:
            original(*args, **kwargs)
    return recorder.explanation(type(original).__name__)


@contextmanager
def _compiled_with(model: torch.nn.Module, backend: Callable[..., Any]) -> Iterator[None]:
    """Calls of the model go through Dynamo and this backend while this is open."""
    held = model._compiled_call_impl
    torch._dynamo.reset()
    try:
        model.compile(backend=backend)
        yield
    finally:
        model._compiled_call_impl = held
        torch._dynamo.reset()


class _Recorder:
    """A backend that puts graphs through the passes, keeps what came of it, and runs them as they are."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.graphs: list[dict[str, Any]] = []
        self.breaks: list[dict[str, Any]] = []
        self.refusals: list[dict[str, Any]] = []
        self.decode: Program | None = None
        self.captured: Program | None = None
        self.dumps_failed: set[str] = set()

    def __call__(self, module: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        number = len(self.graphs)
        self._note_break(number, module)
        graph = {"graph": number, "nodes": len(module.graph.nodes), "runs_as": "not taken"}
        self.graphs.append(graph)
        observers = make_observers(self.config, self.dumps_failed)
        try:
            check_parameters(parameters_of(example_inputs))
            program = take(module, example_inputs, self.config, observers)
            sites = [nodes.site for nodes in program.sites]
            check_sites(sites)
            shapes = [example_inputs[i].shape for i in parameters_of(example_inputs)]
            self.config.make_compressor().check_model(sites, shapes)
        except UnsupportedGraph as reason:
            for observer in observers:
                observer.refused(module, reason)
            self.refusals.append(_row(number, reason))
        else:
            graph["runs_as"] = "decode" if program.variants else "captured"
            self.captured = program
            self.decode = program if program.variants else self.decode
        forward: Callable[..., Any] = module.forward
        return forward

    def _note_break(self, number: int, module: GraphModule) -> None:
        cause: Any = getattr(module, "compile_subgraph_reason", None)
        if cause is not None and cause.graph_break:
            frame = cause.user_stack[-1] if cause.user_stack else None
            where = "the model" if frame is None else f'File "{frame.filename}", line {frame.lineno}: {frame.line}'
            found = f"a graph break: {str(cause.reason).splitlines()[0]}"
            self.breaks.append({"graph": number, "found": found, "where": where, "fix": BREAK})

    def explanation(self, model: str) -> Explanation:
        """What was recorded."""
        made = Explanation(model, window=self.config.window, compressor=str(self.config.make_compressor()))
        made.graphs = self.graphs
        made.not_taken = _distinct([*self.breaks, *self.refusals])
        program = self.decode or self.captured
        if program is not None:
            made.batch, made.sites = program.batch, describe_sites(program)
            sites = [nodes.site for nodes in program.sites]
            measured = measure(self.config.make_compressor(), sites)
            full = sum(site.bytes_per_token for site in sites)
            made.cache_bytes_per_token = {"full": full, "compressed": measured.draft}
            if self.decode is not None:
                _add_variants(made, self.decode, measured)
        if self.decode is None and not made.not_taken:
            made.not_taken = [_row(None, _no_decode(model))]
        return made


def take(
    module: GraphModule, example_inputs: Sequence[Any], config: Config, observers: Sequence[pipeline.Observer] = ()
) -> Program:
    """A captured graph after all passes but `lower`, which compiles; raises UnsupportedGraph."""
    scalars = {i: float(example_inputs[i]) for i in scalar_inputs(module)}
    buffers, parameters = buffers_of(module, example_inputs), parameters_of(example_inputs)
    program = Program(copy_module(module), batch_of(module, example_inputs), config.window, scalars, buffers)
    low = config.draft_dtype_on(example_inputs[parameters[0]].device)
    staging = staging_of(config, example_inputs, parameters, program.batch)
    passes = pipeline.decode_passes(config.inductor, low, staging)
    pipeline.run_all(program, tuple(each for each in passes if getattr(each, "func", each) is not lower), observers)
    return program


def _add_variants(made: Explanation, program: Program, measured: Measured) -> None:
    variants, weights = program.variants, program.found_roles.weights
    made.nodes = {"captured": len(program.module.graph.nodes)}
    made.nodes |= {name: len(module.graph.nodes) for name, module in variants.items()}
    for name in variants:
        keys = [segment["key"] for segment in describe_segments(program, name)]
        made.segments[name] = {"total": len(keys), "distinct": len(set(keys))}
    read = {name: weight_bytes(module, weights) for name, module in variants.items()}
    full, compressed = (program.batch * size for size in measured.read(AT_TOKENS))
    written = program.batch * int(made.cache_bytes_per_token["full"])
    made.bytes_per_step = {
        "at_tokens": AT_TOKENS,
        "full": int(read["verify"] + full + written),
        "draft": int(read["draft"] + compressed + written),
        "verify": int(read["verify"] + full + program.window * written),
        "weights": read["verify"],
        "draft_weights": read["draft"],
    }


def _no_decode(model: str) -> UnsupportedGraph:
    fix = "call with a cache whose length Dynamo takes for dynamic (torch._dynamo.maybe_mark_dynamic(keys, 2))"
    return UnsupportedGraph("no decode step over a cache of any length was captured", model, fix)


def _row(number: int | None, reason: UnsupportedGraph) -> dict[str, Any]:
    return {"graph": number, **reason.parts}


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first row of each finding."""
    return list({row["found"]: row for row in reversed(rows)}.values())[::-1]
