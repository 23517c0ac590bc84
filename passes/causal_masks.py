"""Find the masks of a prefill that say no more than `is_causal` does where no row is padded.

    mask = (arange(T) <= arange(T)[:, None]).expand(B, 1, T, T)
    o = scaled_dot_product_attention(q, k, v, attn_mask=mask)      keeps flash attention away, and holds [T, T] numbers

transformers leaves such a mask out where it is not traced. It is proved by running the mask's own subgraph with other
numbers of tokens in place of T, past every constant that it is computed with, so no [T, T] numbers are made for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node
from torch.fx.node import map_aggregate

from vericache_compile.passes.evaluate import EXPECTED, concrete, constants
from vericache_compile.passes.find_attention import ATTENTION
from vericache_compile.passes.program import Program, ancestors, example, mutates
from vericache_compile.passes.prove_mask import hides

COUNTS = (9, 70, 300)
"""Numbers of tokens that each mask is computed for."""
FEWEST = 64
"""A mask over fewer tokens, where their number is known, is left as it is: small, and the number may be another's."""
LARGEST = 5000
"""So is one computed with a larger constant than this, the number of tokens left aside."""


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


def _is_causal(program: Program, mask: Node, parts: set[Node]) -> bool:
    tokens = example(program.placeholders[program.found_roles.tokens]).shape[1]
    others = {c for c in constants([mask], ()) if c != tokens}
    if (isinstance(tokens, int) and tokens < FEWEST) or max(others, default=0) > LARGEST:
        return False
    if any(mutates(user) for part in parts for user in part.users):
        return False
    counts = (*COUNTS, *(c + 3 for c in sorted(others) if c > COUNTS[0]))
    try:
        return all(_shows_what_came(_compute(program, mask, parts, count), count) for count in counts)
    except EXPECTED:  # it depends on more than the number of tokens, or cannot be computed for these
        return False


def _compute(program: Program, mask: Node, parts: set[Node], count: int) -> Tensor:
    """A mask for `count` tokens in rows that are not padded; raises ValueError where it depends on anything else."""
    roles, inputs = program.found_roles, program.placeholders
    rows, tokens = example(inputs[roles.tokens]).shape
    sizes = {x.node.expr: n for x, n in ((rows, program.batch), (tokens, count)) if isinstance(x, torch.SymInt)}

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
