"""A variant as a program that runs by itself on random inputs, for bug reports: no weights and no tokens are in it.

verify's can also check itself: one pass over a window must give what the captured step gives token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import torch
from torch.fx import Node

from vericache_compile.dump.source import module_source
from vericache_compile.passes.evaluate import bind_symbols, concrete, least_room
from vericache_compile.passes.program import Program, example, placeholders
from vericache_compile.plan import Output

COLUMNS = 64
"""Cached columns that the program starts with, or as many as a buffer written in place has beside a window."""


def repro(program: Program, mode: str) -> str:
    """The text of one variant's program."""
    variant = program.variants[mode]
    constants = [node.name for graph in (variant, program.module) for node in graph.graph.find_nodes(op="get_attr")]
    columns = _columns(program)
    values = {
        "MODE": mode,
        "COLUMNS": columns,
        "WINDOW": program.window,
        "FITS": columns > 0,
        "BATCH": program.batch,
        "VOCABULARY": _vocabulary(program),
        "CONSTANTS": constants,
        "INPUTS": [_variant_input(node) for node in placeholders(variant)],
        "CAPTURED": list(_captured_inputs(program, columns)),
        "RETURNED": list(_returned(program)),
    }
    lines = "\n".join(f"{name} = {_literal(value)}" for name, value in values.items())
    classes = [module_source("variant", variant), module_source("captured", program.module)]
    template = files("vericache_compile.dump").joinpath("repro_template.txt").read_text(encoding="utf-8")
    parts = {"@MODE@": mode, "@VALUES@": lines, "@CLASSES@": "\n\n\n".join(classes)}
    for name, text in parts.items():
        template = template.replace(name, text)
    return template


def _literal(value: object) -> str:
    """A value as Python, a list one item to a line."""
    if not isinstance(value, list) or not value:
        return repr(value)
    return "\n".join(["[", *(f"    {item!r}," for item in value), "]"])


def _variant_input(node: Node) -> tuple[Any, ...]:
    """(role, captured input's index, or None for a value of its own), shape, type, device."""
    value = example(node)
    own = node.meta.get("cast") is not None
    source = node.meta.get("role") or (None if own else node.meta.get("captured_input"))
    if not isinstance(value, torch.Tensor):
        return source, None, None, None
    return source, tuple(map(int, value.shape)), value.dtype, str(value.device)


def _columns(program: Program) -> int:
    """Cached columns to start with; 0 where buffers have no room for a window beside any, or do not say."""
    if not program.found_roles.counters:
        return COLUMNS
    return min(COLUMNS, max((least_room(program) or 0) - program.window, 0))


def _captured_inputs(program: Program, columns: int) -> Iterator[tuple[Any, ...]]:
    """(kind, shape, type, device) with so many columns cached; ("size", value, more per further column)."""
    roles, inputs, cached = program.found_roles, program.placeholders, program.cached
    env, longer = bind_symbols(program, columns), bind_symbols(program, columns + 1)
    kinds = {roles.tokens: "tokens", roles.positions: "positions", roles.mask: "mask", roles.shown: "shown"}
    kinds |= dict.fromkeys(roles.counters, "counter")
    for index, node in enumerate(inputs):
        value = example(node)
        if not isinstance(value, torch.Tensor):
            size = concrete(value, env)
            yield "size", size, concrete(value, longer) - size
            continue
        kind = kinds.get(index) or ("cache" if node in cached else "weight")
        yield kind, tuple(concrete(size, env) for size in value.shape), value.dtype, str(value.device)


def _returned(program: Program) -> Iterator[int | None]:
    """For each output of the captured step the input that it is in the next one; None for a row."""
    for role in program.outputs:
        past = program.sites[role.layer].site.past if role.kind in (Output.KEYS, Output.VALUES) else None
        length = role.source if role.kind is Output.LENGTH else None
        yield length if past is None else past[role.kind is Output.VALUES]


def _vocabulary(program: Program) -> int:
    logits = program.returned[program.rows[program.logits]]
    return int(example(logits).shape[-1])
