"""Hand torch's structured trace (TORCH_TRACE=DIR, read by tlparse) our plan and graphs as artifacts.

Costs nothing where no trace is taken: torch asks for a payload only when somebody listens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

from torch._logging._internal import trace_structured
from torch.fx import GraphModule

from vericache_compile.dump.describe import describe_program, graphs_of
from vericache_compile.dump.source import module_source
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.program import Program

log = logging.getLogger(__name__)


class Trace:
    """An observer of the pipeline that adds artifacts to the compilation that torch is tracing."""

    def after(self, name: str, count: int, program: Program) -> None:
        """Nothing: a trace gets what came of it, a dump every step."""

    def done(self, program: Program) -> None:
        """vericache_plan, and each graph."""
        _add("vericache_plan", "json", lambda: json.dumps(describe_program(program), indent=1))
        for name, module in graphs_of(program).items():
            _add_graph(name, module)

    def refused(self, module: GraphModule, reason: UnsupportedGraph) -> None:
        """vericache_not_taken: the reason, the line, and what to do."""
        _add("vericache_not_taken", "string", lambda: str(reason))


def _add_graph(name: str, module: GraphModule) -> None:
    _add(f"vericache_{name}", "string", lambda: module_source(name, module))


def _add(name: str, encoding: str, payload: Callable[[], str]) -> None:
    try:
        trace_structured(
            "artifact", lambda: {"name": name, "encoding": encoding}, payload_fn=payload, expect_trace_id=False
        )
    except Exception as error:  # noqa: BLE001 - looking at a run must not end it
        fix = "unset TORCH_TRACE, and report it; the model runs all the same"
        log.warning("vericache: %s: %s\n  where: the artifact %s\n  fix: %s", type(error).__name__, error, name, fix)
