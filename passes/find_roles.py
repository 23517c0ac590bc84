"""Find which graph input is what: tokens, positions, padding mask, counted lengths, weights.

Before: placeholders in Dynamo's order. After: `program.roles` names them by index; nothing in the graph changes.
Structure decides, not names: tokens index the embedding that has as many rows as the logits have columns; a
two-dimensional integer input that reaches an attention mask is the padding mask; another of the tokens' shape holds
positions; an integer that is returned grown by the tokens of the call is the past length, as a cache counts it that
drops its oldest columns. Any other input has no role, and a decode step that needs it is refused later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vericache_compile.passes.find_attention import find_calls
from vericache_compile.passes.program import (
    Program,
    ancestors,
    example,
    expression,
    is_integer,
    is_weight,
    row_width,
    target_name,
    unsupported,
)
from vericache_compile.plan import Roles

SHAPES = {"view", "reshape", "to", "contiguous", "long", "int", "squeeze", "unsqueeze", "add"}
"""Calls through which an index reaches its embedding."""
LEAVE_OUT = "leave out token_type_ids and other per-token inputs"


def find_roles(program: Program) -> int:
    """Set `program.roles`; returns the number of inputs that have one. Raises UnsupportedGraph without tokens."""
    inputs = program.placeholders
    weights = tuple(i for i, node in enumerate(inputs) if is_weight(node))
    integers = [i for i, node in enumerate(inputs) if i not in weights and _is_row_input(node)]
    reach_mask = set(ancestors([side for call in find_calls(program) for side in call.sides]))
    tokens = _find_tokens(program, integers)
    batch, count = example(inputs[tokens]).shape
    mask: int | None = None
    positions: int | None = None
    for i in integers:
        if i != tokens and inputs[i] in reach_mask:
            mask = _only(program, mask, i, "padding mask")
        elif i != tokens and str(example(inputs[i]).shape[1]) == str(count):
            positions = _only(program, positions, i, "position input")
    known = batch if isinstance(batch, int) else program.batch
    per_call = count if isinstance(count, int) else None
    lengths = tuple(i for i, node in enumerate(inputs) if is_integer(node) and _is_returned(program, node, count))
    program.roles = Roles(known, per_call, tokens, positions, mask, weights, lengths)
    return 1 + len(weights) + len(lengths) + (mask is not None) + (positions is not None)


def _is_returned(program: Program, length: Node, count: Any) -> bool:
    """Whether an integer input is returned grown by the number of tokens."""
    grown = expression(example(length)) + expression(count)
    integers = [value for value in program.returned if isinstance(value, Node) and is_integer(value)]
    return any(expression(example(value)) == grown and length in ancestors([value]) for value in integers)


def _is_row_input(node: Node) -> bool:
    value = example(node)
    is_rows = isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
    return is_rows and bool(node.users)


def _only(program: Program, held: int | None, new: int, what: str) -> int:
    if held is not None:
        raise unsupported(f"a second {what}", program.placeholders[new], LEAVE_OUT)
    return new


def _find_tokens(program: Program, integers: list[int]) -> int:
    """The input that indexes the embedding as large as the vocabulary, or the only one that indexes any."""
    rows = {i: _embedding_rows(program.placeholders[i]) for i in integers}
    candidates = [i for i in integers if rows[i]]
    vocabulary = {row_width(value) for value in program.returned}
    found = [i for i in candidates if rows[i] in vocabulary] or candidates
    if not found:
        raise unsupported(
            "no input of token ids [batch, tokens] that indexes an embedding",
            None,
            "pass input_ids (inputs_embeds is not taken)",
        )
    if len(found) > 1:
        raise unsupported("two inputs that may both be the tokens", program.placeholders[found[1]], LEAVE_OUT)
    return found[0]


def _embedding_rows(node: Node) -> int:
    """Rows of the embedding that this input indexes (0 when it indexes none)."""
    for user in node.users:
        if not user.args or user.args[0] is not node:
            continue
        if user.target is torch.nn.functional.embedding:
            weight = user.args[1]
            return int(example(weight).shape[0]) if isinstance(weight, Node) else 0
        if target_name(user) in SHAPES and (rows := _embedding_rows(user)):
            return rows
    return 0
