"""Run part of a captured graph on concrete inputs, so that what it computes can be proved rather than guessed.

A scene is one decode call: how many columns are cached, and each row's left padding. What masks and positions may
depend on is exactly that; anything else among their inputs raises UnsupportedGraph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.program import Program, ancestors, example, is_weight, mutates, source_line, unsupported

if TYPE_CHECKING:
    import sympy
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

MOST = 1 << 40
"""More columns than any cache has: what a graph holds for up to here, it holds for without end."""
LONGEST = 1 << 22
"""Constants up to this many columns are taken for lengths at which a mask or position may change its rule."""
EXPECTED = (RuntimeError, IndexError, ValueError)
FIX = "compute it from the past length and the padding mask alone"


class FailsAt(UnsupportedGraph):
    """A mask or position cannot be computed at some length."""


@dataclass(frozen=True)
class Scene:
    """Concrete inputs of a decode call: columns already cached, and left padding per row."""

    past: int
    pads: tuple[int, ...]

    def mask(self, like: Tensor) -> Tensor:
        """The padding mask [B, past + 1] in the type and on the device of `like`."""
        columns = torch.arange(self.past + 1)
        return (columns >= torch.tensor(self.pads)[:, None]).to(like.dtype).to(like.device)


def scenes(program: Program, nodes: Sequence[Node], given: Collection[Node] = ()) -> list[Scene]:
    """Scenes that tell a rule from its look-alikes, of those that the graph is for.

    Besides a few fixed lengths they reach past every constant that `nodes` are computed with, up to those `given`: a
    window, chunk or clamp that begins to bite at 4,096 columns is seen at 4,099. Raises UnsupportedGraph where there is
    no such scene.
    """
    lengths = [5, 9, 70, 1000, *(c + 3 for c in sorted(set(constants(nodes, given))) if 5 < c <= LONGEST)]
    edges = [edge for edge in bounds(program) or () if edge is not None]
    lengths = [past for past in dict.fromkeys((*lengths, *edges)) if holds_at(program, past)]
    if not lengths:
        raise unsupported("a mask or position of a graph that no number of cached columns fits", nodes[0], FIX)
    none = (0,) * program.batch
    if program.found_roles.mask is None:
        return [Scene(past, none) for past in lengths]
    stepped = tuple(3 * b % 5 for b in range(program.batch))
    padded = (stepped, stepped[::-1], (4,) * program.batch)
    plain = [Scene(lengths[0], none)]
    return [*plain, *(Scene(past, padded[i % 3]) for i, past in enumerate(lengths) if past >= 4)]


def constants(nodes: Sequence[Node], given: Collection[Node]) -> Iterator[int]:
    """Integers among the arguments and symbolic sizes that nodes are computed with."""
    for node in ancestors(nodes, given):
        value = example(node)
        if isinstance(value, torch.SymInt):
            yield from (abs(int(atom)) for atom in value.node.expr.atoms() if atom.is_Integer)
        held: list[Any] = []
        torch.fx.node.map_aggregate((node.args, node.kwargs), held.append)
        yield from (abs(int(x)) for x in held if isinstance(x, (int, float)) and abs(x) <= LONGEST)


def bind_symbols(program: Program, past: int) -> dict[sympy.Symbol, int]:
    """Values for the graph's symbolic sizes when `past` columns are cached."""
    roles = program.found_roles
    nodes = program.placeholders
    env: dict[sympy.Symbol, int] = {}

    def bind(size: Any, value: int) -> None:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            env.setdefault(size.node.expr, value)

    for index in (roles.tokens, roles.positions, roles.mask):
        if index is not None:
            bind(example(nodes[index]).shape[0], program.batch)
    for size, columns in (*_lengths(program, past), *_rooms(program, past)):
        bind(size, columns)
    for cached in program.cached:
        bind(example(cached).shape[0], program.batch)
    return env


def _lengths(program: Program, past: int) -> Iterator[tuple[Any, int]]:
    """Each size of an input that says how many columns are cached, and what it is when `past` are."""
    roles, nodes = program.found_roles, program.placeholders
    yield from ((example(nodes[i]), past) for i in roles.lengths)
    for site in (found.site for found in program.sites if not found.site.in_place):
        held = past if site.recent is None else min(past, site.recent)
        yield from ((example(nodes[i]).shape[2], held) for i in site.past or ())
    if roles.mask is not None:
        yield example(nodes[roles.mask]).shape[1], past + 1


def _rooms(program: Program, past: int) -> Iterator[tuple[Any, int]]:
    """Each number of columns that a buffer written in place has, and one that it may have where it is symbolic."""
    buffers = {i for found in program.sites if found.site.in_place for i in found.site.past or ()}
    yield from ((example(program.placeholders[i]).shape[2], past + 1 + past % 7) for i in sorted(buffers))


def least_room(program: Program) -> int | None:
    """The fewest columns of a buffer written in place; None where graphs do not say."""
    sizes = [concrete(size, {}) for size, _ in _rooms(program, 0) if isinstance(size, int) or size.node.expr.is_number]
    return min(sizes, default=None)


def batch_symbols(program: Program) -> set[sympy.Symbol]:
    """The graph's symbolic sizes that are the batch."""
    return {symbol for symbol, value in bind_symbols(program, -1).items() if value == program.batch}


def holds_at(program: Program, past: int) -> bool:
    """Whether the graph is one that Dynamo would run when `past` columns are cached: its sizes and guards allow it."""
    env = bind_symbols(program, past)
    if not _in_range(program, past, env):
        return False
    shapes = _shape_env(program)
    known = [guard.expr for guard in shapes.guards if guard.expr.free_symbols <= env.keys()] if shapes else []
    return all(bool(_at(expr, env)) for expr in known)


def _shape_env(program: Program) -> ShapeEnv | None:
    sizes = (size for size, _ in (*_lengths(program, 0), *_rooms(program, 0)) if isinstance(size, torch.SymInt))
    return next((size.node.shape_env for size in sizes), None)


def _in_range(program: Program, past: int, env: Mapping[sympy.Symbol, int]) -> bool:
    """Whether sizes known to Dynamo, and the ranges that it gave to others, fit `past` columns."""
    if past < 0 or any(concrete(size, env) != columns for size, columns in _lengths(program, past)):
        return False
    if any(concrete(size, env) <= past for size, _ in _rooms(program, past)):
        return False
    shapes = _shape_env(program)
    ranges = ((shapes.var_to_range[s], value) for s, value in env.items() if s in shapes.var_to_range) if shapes else ()
    return all(bool(held.lower <= value) and bool(value <= held.upper) for held, value in ranges)


def captured_past(program: Program) -> int | None:
    """How many columns were cached when the graph was captured; None where its inputs do not say."""
    roles, nodes = program.found_roles, program.placeholders
    if roles.lengths:
        return concrete(example(nodes[roles.lengths[0]]), {})
    for site in (found.site for found in program.sites):
        if site.past is not None and not site.in_place:
            held = concrete(example(nodes[site.past[0]]).shape[2], {})
            if site.recent is None or held < site.recent:
                return held
    return None if roles.mask is None else concrete(example(nodes[roles.mask]).shape[1], {}) - 1


def bounds(program: Program) -> tuple[int, int | None] | None:
    """Least and greatest number of cached columns that the graph is for (None: no greatest); None if for none."""
    if program.writes and program.found_roles.mask is None:
        room = least_room(program)
        return 0, None if room is None else room - 1
    now = captured_past(program)

    def fits(past: int) -> bool:
        return _in_range(program, past, bind_symbols(program, past))

    if now is None or not fits(now):
        return None
    least = now - _reach(lambda steps: fits(now - steps), now)
    most = now + _reach(lambda steps: fits(now + steps), MOST)
    return least, None if most == now + MOST else most


def _reach(fits: Callable[[int], bool], most: int) -> int:
    """The largest number of steps up to `most` that fits; all smaller ones do."""
    if fits(most):
        return most
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def concrete(size: Any, env: Mapping[sympy.Symbol, int]) -> int:
    """A size as an int: symbols from `env`, any other from the hint that Dynamo saw."""
    if isinstance(size, torch.SymInt):
        value = _at(size.node.expr, env)
        return int(value) if value.is_number else int(size.node.hint)
    return int(size)


def _at(expression: sympy.Basic, env: Mapping[sympy.Symbol, int]) -> sympy.Basic:
    """An expression with what `env` has of its symbols put in; `subs` takes its time for each that it is given."""
    return expression.subs({symbol: env[symbol] for symbol in expression.free_symbols & env.keys()})


def reads_data(node: Node, cached: set[Node]) -> bool:
    """Whether a node reads what a cache tensor holds, rather than its shape."""
    return isinstance(example(node), Tensor) and any(i in cached for i in node.all_input_nodes)


def evaluate(
    program: Program,
    nodes: Sequence[Node],
    scene: Scene,
    filled: Mapping[Node, float] | None = None,
    counted: Tensor | None = None,
) -> list[Any]:
    """Values of `nodes` in a scene, tensors in `filled` taken for that number throughout; raises UnsupportedGraph when
    they depend on anything else, FailsAt when they cannot be computed in it.

    Where it is given, `counted` [] is what the counters of caches written in place hold, in place of the scene's past.
    """
    filled = filled or {}
    env = bind_symbols(program, scene.past)
    cached = program.cached
    counters = [program.placeholders[i] for i in program.found_roles.counters]
    counts = [call for call in program.writes if call.args[0] in counters]
    sizes = {node: size for node in program.module.graph.nodes if (size := _size(node, env)) is not None}
    needed = set(ancestors([*nodes, *counts], filled.keys() | sizes.keys()))
    interpreter = Interpreter(program.module)
    for node in program.module.graph.nodes:
        if node not in needed:
            continue
        if node in filled:
            value = _full(node, env, filled[node])
            interpreter.env[node] = value.clone() if any(map(mutates, node.users)) else value
            continue
        if node in sizes:
            interpreter.env[node] = sizes[node]
            continue
        if reads_data(node, cached):
            raise _depends("cached keys or values", node)
        if node in counters:
            past = torch.tensor(scene.past) if counted is None else counted
            interpreter.env[node] = past.to(example(node).device).reshape(example(node).shape).clone()
            continue
        if node.op == "placeholder":
            interpreter.env[node] = _input(program, node, scene, env)
            continue
        try:
            interpreter.env[node] = interpreter.run_node(node)
        except EXPECTED as error:
            found = f"a mask or position that fails at {scene.past} cached columns ({error})"
            raise FailsAt(found, source_line(node), FIX) from error
    return [interpreter.env[node] for node in nodes]


def _size(node: Node, env: Mapping[sympy.Symbol, int]) -> int | None:
    """A size that past length and batch give, whichever tensor it was read from; None for any other node."""
    value = example(node)
    known = isinstance(value, torch.SymInt) and value.node.expr.free_symbols <= env.keys()
    return concrete(value, env) if known else None


def _input(program: Program, node: Node, scene: Scene, env: Mapping[sympy.Symbol, int]) -> Any:
    """An input's value in a scene: lengths and the padding mask; of cached keys and values only the shape counts."""
    roles = program.found_roles
    value, index = example(node), program.placeholders.index(node)
    if isinstance(value, torch.SymInt):
        return concrete(value, env)
    if index == roles.mask:
        return scene.mask(value)
    if index in program.buffers:
        return program.buffers[index]
    if node not in program.cached:
        names = {roles.tokens: "tokens", roles.positions: "given positions"}
        raise _depends("weights" if is_weight(node) else names.get(index, "an input that it does not know"), node)
    return _full(node, env, 0)


def _full(node: Node, env: Mapping[sympy.Symbol, int], number: float) -> Tensor:
    value = example(node)
    shape = [concrete(size, env) for size in value.shape]
    return torch.full([1] * len(shape), number, dtype=value.dtype, device=value.device).expand(shape)


def _depends(what: str, node: Node) -> Exception:
    return unsupported(f"a mask or position that depends on {what}", node, FIX)
