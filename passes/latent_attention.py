"""Read attention over keys and values that are made anew from a cached latent, for `find_attention`.

    latent = cat([past_latent, new], -2); rotated = cat([past_rotated, new], -2)      returned: the cache
    both = linear(latent, weight).view(B, C, H, N + E).transpose(1, 2)                Expansion(latent, rotated,
    key = [both[..., :N], rotated.expand(-1, H, -1, -1)]; value = both[..., N:]   ->      weight, the calls between)
    o = attention(q, key, value)

That is multi-head latent attention (arXiv 2405.04434). Data flow decides, not names: a product of one cache tensor and
one weight, and how it is split, copied and put beside the other is run, in decode steps, on numbers that say where they
came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vericache_compile.passes.evaluate import concrete
from vericache_compile.passes.program import Program, changed, example, is_integer, is_weight, mutates, target_name
from vericache_compile.passes.spelled_attention import Attention

COLUMNS = 3
"""Every symbolic length while the calls between are run."""


@dataclass(frozen=True)
class Expansion:
    """How one attention's keys and values are made of what is cached."""

    latent: Node
    """Cache tensor [B, 1, C, R] that the graph returns."""
    rotated: Node
    """The part of the key that all heads share as it is [B, 1, C, D - N], returned too."""
    weight: Node
    """[H * (N + E), R]: of each head what makes the rest of its keys, then what makes its values."""
    calls: tuple[Node, ...]
    """From there to key and value, in order."""


def find_expansion(program: Program, call: Attention, proved: dict[str, bool]) -> Expansion | None:
    """The expansion that an attention reads; None where its keys and values are made in any other way.

    `proved` remembers what was run, by its text.
    """
    # caches are returned; a buffer that is written in place is an input
    ends = {node for node in (*program.placeholders, *program.returned) if _may_be_cache(node)}
    between = _between((call.key, call.value), ends)
    order = [node for node in program.module.graph.nodes if node in between]
    products = [node for node in order if node.target is torch.nn.functional.linear]
    weights = [node for node in order if is_weight(node) and node not in ends]
    cached = [node for node in order if node in ends]
    if len(cached) != 2 or len(products) != 1 or len(weights) != 1:
        return None
    given = dict(zip(("input", "weight", "bias"), products[0].args, strict=False)) | products[0].kwargs
    latent = given["input"]
    if latent not in cached or given["weight"] is not weights[0] or given.get("bias") is not None:
        return None
    [rotated] = (node for node in cached if node is not latent)
    calls = tuple(node for node in order if node.op != "placeholder" and node not in ends)
    found = Expansion(latent, rotated, weights[0], calls)
    if not _fits(call, found):
        return None
    taken = not _may_have_variants(program, found) or _splits_by_head(program, call, found, products[0], proved)
    return found if taken else None


def _fits(call: Attention, found: Expansion) -> bool:
    """Whether the weight's rows are as many as heads take, and one key is cached for all of them."""
    key, value, latent, rotated = (example(node).shape for node in (call.key, call.value, found.latent, found.rotated))
    wanted = (key[1] * (key[3] - rotated[3] + value[3]), latent[3])
    return latent[1] == rotated[1] == 1 and tuple(example(found.weight).shape) == wanted


def _may_have_variants(program: Program, found: Expansion) -> bool:
    """Whether the graph may be a decode step that is rewritten. Any other runs as captured, whatever its calls do, and
    may be of so many columns that running them would take as much memory as a layer of prefill."""
    columns = example(found.rotated).shape[2]
    known = isinstance(columns, int) and found.rotated.op != "placeholder"
    return program.found_roles.tokens_per_call == 1 and not known


def _may_be_cache(node: object) -> bool:
    value = example(node) if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.dim() == 4


def _between(front: tuple[Node, ...], ends: set[Node]) -> set[Node]:
    """What `front` is made of, no further back than `ends`: what is written into a tensor on the way included."""
    found, stack = set[Node](), list(front)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [] if node in ends or node.op == "placeholder" else [*node.all_input_nodes, *_writes(node)]
    return found


def _writes(node: Node) -> list[Node]:
    """The calls that write into a tensor, or into a part of it."""
    parts = [node, *(user for user in node.users if target_name(user) == "getitem" and user.args[0] is node)]
    return [user for part in parts for user in part.users if mutates(user) and changed(user) is part]


def _splits_by_head(
    program: Program, call: Attention, found: Expansion, product: Node, proved: dict[str, bool]
) -> bool:
    """Whether key and value are what they should be of the product and the rotated part, found by running the calls
    between on numbers that are all different."""
    env = _lengths(program)
    batch, _, columns, rotated = (concrete(size, env) for size in example(found.rotated).shape)
    heads, size, value_size = (concrete(n, env) for n in (*example(call.key).shape[1::2], example(call.value).shape[3]))
    own = size - rotated
    text = f"{(batch, columns, heads, size, rotated, value_size)} {[_text(node, env) for node in found.calls]}"
    if text not in proved:
        both = torch.arange(batch * columns * heads * (own + value_size), dtype=torch.int32).view(
            batch, columns, heads, -1
        )
        beside = -1 - torch.arange(batch * columns * rotated, dtype=torch.int32).view(batch, 1, columns, rotated)
        interpreter = Interpreter(program.module)
        latent = torch.empty([concrete(n, env) for n in example(found.latent).shape], dtype=torch.int32)
        interpreter.env |= {found.latent: latent, found.rotated: beside}
        interpreter.env[product] = both.view(batch, 1, columns, -1)
        key, value = _run(interpreter, found.calls, env, call.key, call.value)
        both = both.transpose(1, 2)
        expected = torch.cat([both[..., :own], beside.expand(-1, heads, -1, -1)], dim=-1)
        proved[text] = torch.equal(key, expected) and torch.equal(value, both[..., own:])
    return proved[text]


def _run(interpreter: Interpreter, calls: tuple[Node, ...], env: dict[Any, int], *wanted: Node) -> list[Tensor]:
    for call in (each for each in calls if each not in interpreter.env):
        interpreter.env |= {n: concrete(example(n), env) for n in (*call.all_input_nodes, call) if is_integer(n)}
        if not is_integer(call):
            interpreter.env[call] = interpreter.run_node(call)
    return [interpreter.env[node] for node in wanted]


def _lengths(program: Program) -> dict[Any, int]:
    """Values for the graph's symbolic sizes."""
    nodes = program.placeholders
    sizes = [size for node in nodes if isinstance(example(node), torch.SymInt) for size in (example(node),)]
    env = {symbol: COLUMNS for size in sizes for symbol in size.node.expr.free_symbols}
    batch = example(nodes[program.found_roles.tokens]).shape[0]
    if isinstance(batch, torch.SymInt):
        env[batch.node.expr] = program.batch
    return env


def _text(node: Node, env: dict[Any, int]) -> str:
    """A call with its numbers, without the names of nodes."""
    shape = getattr(example(node), "shape", ())

    def number(argument: Node) -> Any:
        return concrete(example(argument), env) if is_integer(argument) else "_"

    args = torch.fx.node.map_arg((node.args, node.kwargs), number)
    return f"{node.target} {args} {[concrete(size, env) for size in shape]}"
