"""Find how a cache of fixed size is written in place: which buffer, from what, and at which column.

    at = arange(1) + counter                          in place of
    counter.add_(1)                                       keys = cat([past_k, k_new], -2)
    buffer.index_copy_(2, at, k_new)
    o = scaled_dot_product_attention(q, buffer, ...)      o = scaled_dot_product_attention(q, keys, ...)

Or `buffer[:, :, input_pos] = k_new`. A counter is a tensor of the caller's that holds the past length; a call counts it
up, or the caller sets it anew. That `at` is what it says is found by running it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vericache_compile.passes.evaluate import LONGEST, constants
from vericache_compile.passes.program import (
    Program,
    ancestors,
    changed,
    example,
    expression,
    mutates,
    target_name,
    unsupported,
)

FIX = "use transformers' DynamicCache (the default), or write each token by keys[:, :, input_pos] = k, input_pos [1]"
TRIED = (0, 5, 300)
"""Past lengths that the column is computed for in a buffer of unknown size, beside those near constants."""
ALL = (slice(None), slice(None))


@dataclass(frozen=True)
class Write:
    """One buffer's write in a call."""

    call: Node
    new: Node
    """What is written [B, K, T, D]."""
    at: Node
    """Columns that it is written to [T]."""


def find_write(buffer: Node) -> Write | None:
    """The only call that changes a buffer [B, K, C, D] in place, if it writes columns before anyone reads the buffer;
    raises UnsupportedGraph for any other."""
    calls = [user for user in buffer.users if mutates(user) and changed(user) is buffer]
    if not calls:
        return None
    call = calls[0]
    at, new = _written(call)
    if len(calls) > 1 or not _fits(buffer, at, new):
        raise unsupported("a cache that is updated in place, not by one write of columns", call, FIX)
    if any(user < call for user in buffer.users):
        raise unsupported("a cache that is read before it is updated in place", call, FIX)
    assert isinstance(at, Node) and isinstance(new, Node), "they have shapes that fit"
    return Write(call, new, at)


def _written(call: Node) -> tuple[object, object]:
    """The columns that a call writes to, and what it writes there; None twice for any other call."""
    name, arguments = target_name(call), call.args[1:]
    if name == "index_copy_" and len(arguments) == 3 and arguments[0] in (2, -2):
        return arguments[1], arguments[2]
    if name in ("setitem", "index_put_") and len(arguments) == 2 and isinstance(index := arguments[0], (list, tuple)):
        every = ALL if call.target is operator.setitem else (None, None)
        if len(index) == 3 and tuple(index[:2]) == every:
            return index[2], arguments[1]
    return None, None


def _fits(buffer: Node, at: object, new: object) -> bool:
    """Whether tensors are columns [T] and their content [B, K, T, D], written without any repetition."""
    values = [example(node) if isinstance(node, Node) else None for node in (buffer, at, new)]
    shapes = [list(map(expression, value.shape)) if isinstance(value, Tensor) else [] for value in values]
    held, columns, given = shapes
    return len(columns) == 1 and len(held) == 4 and given == [*held[:2], *columns, *held[3:]]


def find_counters(program: Program, writes: list[Write]) -> dict[Node, Node | None]:
    """The counters that say where one token is written, each with the call that counts it up, None where the caller
    sets it; raises UnsupportedGraph."""
    counters: dict[Node, Node | None] = {}
    for write in writes:
        own = [node for node in ancestors([write.at]) if node.op == "placeholder"]
        if len(own) != 1 or not _is_counter(own[0]) or not _lands_at_its_length(program, write, own[0]):
            raise unsupported("a cache that is updated in place at a column that is not its length", write.call, FIX)
        counters[own[0]] = None
    for counter in counters:
        added = [user for user in counter.users if mutates(user) and changed(user) is counter]
        is_known = [(user.target, user.args[1:]) for user in added] in ([], [("add_", (1,))])
        if not is_known or any(user.users for user in added):
            raise unsupported("a length of a cache that is not counted up by the tokens of a call", counter, FIX)
        counters[counter] = added[0] if added else None
    return counters


def _is_counter(node: Node) -> bool:
    value = example(node)
    return isinstance(value, Tensor) and value.shape in ((), (1,)) and value.dtype == torch.int64


def _lands_at_its_length(program: Program, write: Write, counter: Node) -> bool:
    """Whether a token is written to the column that is the number of those before it, for each that the buffer has."""
    buffer = write.call.args[0]
    assert isinstance(buffer, Node), "a write is found by its buffer"
    room = example(buffer).shape[2]
    near = {known + more for known in constants([write.at], ()) if known < LONGEST for more in range(-3, 4)}
    lengths = range(room) if isinstance(room, int) else sorted(past for past in near.union(TRIED) if past >= 0)
    past = torch.tensor(list(lengths), device=example(counter).device)
    try:
        found = torch.func.vmap(lambda own: _column(program, write, counter, own))(past)
    except RuntimeError:  # it cannot be computed for some length, or not for several at once
        return False
    return torch.equal(found.flatten(1), past[:, None])


def _column(program: Program, write: Write, counter: Node, past: Tensor) -> Tensor:
    """The columns [1] that a token is written to when the counter holds `past` []."""
    interpreter = Interpreter(program.module)
    needed = set(ancestors([write.at])) - {counter}
    interpreter.env[counter] = past.reshape(example(counter).shape).clone()
    for node in program.module.graph.nodes:
        if node is write.call:
            break
        if node in needed or (mutates(node) and changed(node) is counter):
            interpreter.env[node] = interpreter.run_node(node)
    found: Tensor = interpreter.env[write.at]
    return found
