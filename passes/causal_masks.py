"""Find the masks of a prefill that say no more than `is_causal` does where no row is padded, and leave them to it.

    mask = (arange(T) <= arange(T)[:, None]).expand(B, 1, T, T)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask)      keeps flash attention away, and holds [T, T] numbers

transformers leaves such a mask out where it is not traced. It is proved by running the mask's own subgraph with other
numbers of tokens in place of T, so no [T, T] numbers are made for it. CALLS compare places and numbers added to them,
so what a mask shows has changed its rule, if it ever does, within as many tokens as its constants are together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

from vericache_compile.passes.evaluate import EXPECTED, concrete, constants
from vericache_compile.passes.find_attention import ATTENTION, NAMES
from vericache_compile.passes.program import Program, ancestors, example, mutates, target_name
from vericache_compile.passes.prove_mask import hides

PLACES = {"arange", "add", "sub", "to", "float", "int", "long", "bool", "size", "getitem"}
COMPARISONS = {"le", "lt", "ge", "gt", "eq", "ne", "tril", "triu", "invert"}
LOGIC = {f"{kind}{each}" for kind in ("", "logical_", "bitwise_") for each in ("and", "or", "not")}
FILLS = {"ones", "zeros", "full", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like", "where"}
SHAPES = {"expand", "expand_as", "unsqueeze", "contiguous", "clone", "masked_fill"}
CALLS = PLACES | COMPARISONS | LOGIC | FILLS | SHAPES
"""What a mask may be made by, without the underscores of operators; any other is left as it is."""
NARROW = (torch.float16, torch.bfloat16, torch.int16, torch.int8, torch.uint8)
"""Types that do not tell all places apart: scores may be added to in them, nothing is compared in them."""
COUNTS = (9, 70, 300)
"""Numbers of tokens that each mask is computed for, besides those that its constants give."""
FEWEST = 5
"""A mask over fewer tokens, where their number is known, is left as it is: the number may as well be an axis."""
LARGEST = 1000
"""So is one whose constants are more than this together, the number of tokens left aside: a sliding window's, say."""


def causal_masks(program: Program) -> dict[Node, bool]:
    """The masks of attention over an empty cache that show column c to token t, where no row is padded, exactly when
    c <= t; and of each whether it is made of the padding mask."""
    if any(nodes.site.past is not None or nodes.site.in_place for nodes in program.sites):
        return {}
    roles, inputs = program.found_roles, program.placeholders
    padding = None if roles.mask is None else inputs[roles.mask]
    masks = dict.fromkeys(nodes.mask for nodes in program.sites if nodes.attention.target is ATTENTION)
    made = {mask: set(ancestors([mask])) for mask in masks if mask is not None}
    return {mask: padding in parts for mask, parts in made.items() if _is_causal(program, mask, parts)}


def leave_to_is_causal(call: Node) -> None:
    """Let a call of scaled_dot_product_attention mask by `is_causal` in place of the mask that it is given."""
    given: dict[str, Any] = dict(zip(NAMES, call.args, strict=False)) | call.kwargs
    call.args = tuple(given.pop(name) for name in NAMES[:3])
    call.kwargs = given | {"attn_mask": None, "is_causal": True}


def _is_causal(program: Program, mask: Node, parts: set[Node]) -> bool:
    size = example(program.placeholders[program.found_roles.tokens]).shape[1]
    tokens = size if isinstance(size, int) else None
    others = [c for c in constants([mask], ()) if c != tokens]
    if (tokens is not None and tokens < FEWEST) or sum(others) > LARGEST:
        return False
    calls = [node for node in parts if node.op != "placeholder"]
    known = all(target_name(node).strip("_") in CALLS for node in calls)
    widened = any(not _is_narrow(node) and any(map(_is_narrow, node.all_input_nodes)) for node in calls)
    if not known or widened or _is_changed(program, parts):
        return False
    counts = sorted({*COUNTS, *(c + 3 for c in others if c > COUNTS[0]), sum(others) + 3})
    try:
        return all(_shows_what_came(_compute(program, mask, parts, tokens, count), count) for count in counts)
    except (*EXPECTED, TypeError, ArithmeticError):  # it is made of more, or cannot be computed for these
        return False


def _is_narrow(node: Node) -> bool:
    return getattr(example(node), "dtype", None) in NARROW


def _is_changed(program: Program, parts: set[Node]) -> bool:
    """Whether anything changes in place a tensor that a mask is made of, or that is made of such a one."""
    tensors = {node for node in parts if isinstance(example(node), Tensor)}
    changes = [node for node in program.module.graph.nodes if mutates(node)]
    return any(not tensors.isdisjoint(ancestors([node])) for node in changes)


def _compute(program: Program, mask: Node, parts: set[Node], tokens: int | None, count: int) -> Tensor:
    """A mask for `count` tokens, in place of `tokens` where these are known, in rows that are not padded; raises
    ValueError where it depends on anything else."""
    roles, inputs = program.found_roles, program.placeholders
    shape = zip(example(inputs[roles.tokens]).shape, (program.batch, count), strict=True)
    sizes = {size.node.expr: number for size, number in shape if isinstance(size, torch.SymInt)}

    def counted(argument: Any) -> Any:
        return count if type(argument) is int and argument == tokens else argument

    interpreter = Interpreter(program.module)
    for node in program.module.graph.nodes:
        if node not in parts:
            continue
        value = example(node)
        if node.op != "placeholder":
            args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
            run = getattr(interpreter, node.op)
            interpreter.env[node] = run(node.target, map_aggregate(args, counted), map_aggregate(kwargs, counted))
        elif roles.mask is not None and node is inputs[roles.mask]:
            interpreter.env[node] = torch.ones((program.batch, count), dtype=value.dtype, device=value.device)
        elif isinstance(value, torch.SymInt) and value.node.expr.free_symbols <= sizes.keys():
            interpreter.env[node] = concrete(value, sizes)
        else:
            raise ValueError(node.name)
    made: Tensor = interpreter.env[mask]
    return made


def _shows_what_came(mask: Tensor, count: int) -> bool:
    if mask.shape[-2:] != (count, count):
        return False
    came = torch.ones((count, count), dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        return torch.equal(mask, came.expand_as(mask))
    return mask.is_floating_point() and bool(torch.where(came, mask == 0, mask <= hides(mask)).all())
