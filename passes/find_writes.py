"""Find how a cache of fixed size is written in place: which buffer, from what, and at which column.

    at = arange(1) + counter                          in place of
    counter.add_(1)                                       keys = cat([past_k, k_new], -2)
    buffer.index_copy_(2, at, k_new)
    o = scaled_dot_product_attention(q, buffer, ...)      o = scaled_dot_product_attention(q, keys, ...)

A counter is a tensor of the caller's that holds the past length. That `at` is what it says is found by running it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vericache_compile.passes.program import Program, ancestors, example, mutates, unsupported

FIX = "use transformers' DynamicCache (the default)"
TRIED = (0, 5, 300)
"""Past lengths that the column is computed for."""


@dataclass(frozen=True)
class Write:
    """One buffer's write in a call."""

    call: Node
    new: Node
    """What is written [B, K, T, D]."""
    at: Node
    """Columns that it is written to [T]."""


def find_write(buffer: Node) -> Write | None:
    """The only call that changes a buffer in place, if it writes columns; raises UnsupportedGraph for any other."""
    calls = [user for user in buffer.users if mutates(user) and user.args[0] is buffer]
    if not calls:
        return None
    call = calls[0]
    is_write = call.target == "index_copy_" and len(call.args) == 4 and call.args[1] in (2, -2) and not call.users
    if len(calls) > 1 or not is_write:
        raise unsupported("a cache that is updated in place, not by one index_copy_ of columns", call, FIX)
    _, _, at, new = call.args
    assert isinstance(at, Node) and isinstance(new, Node), "columns and what is written to them are tensors"
    return Write(call, new, at)


def find_counters(program: Program, writes: list[Write]) -> tuple[list[Node], list[Node]]:
    """The counters that say where one token is written, and all calls that change them; raises UnsupportedGraph."""
    counters: dict[Node, None] = {}
    for write in writes:
        own = [node for node in ancestors([write.at]) if node.op == "placeholder"]
        if len(own) != 1 or not _is_counter(own[0]) or not all(_lands_at(program, write.at, own[0], k) for k in TRIED):
            raise unsupported("a cache that is updated in place at a column that is not its length", write.call, FIX)
        counters[own[0]] = None
    changes = []
    for counter in counters:
        added = [user for user in counter.users if mutates(user)]
        if [(user.target, user.args[1:]) for user in added] != [("add_", (1,))] or added[0].users:
            raise unsupported("a length of a cache that is not counted up by the tokens of a call", counter, FIX)
        changes += added
    return list(counters), changes


def _is_counter(node: Node) -> bool:
    value = example(node)
    return isinstance(value, Tensor) and value.dim() == 0 and value.dtype == torch.int64


def _lands_at(program: Program, at: Node, counter: Node, past: int) -> bool:
    """Whether the column that a token is written to is the number of columns before it."""
    interpreter = Interpreter(program.module)
    needed = set(ancestors([at]))
    value: Any = torch.tensor(past)
    interpreter.env[counter] = value
    for node in program.module.graph.nodes:
        if node in needed and node is not counter:
            interpreter.env[node] = interpreter.run_node(node)
        elif mutates(node) and node.args[0] is counter:
            interpreter.env[counter] = value = value + 1
    found = interpreter.env[at]
    return isinstance(found, Tensor) and found.flatten().tolist() == [past]
