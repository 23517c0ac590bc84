"""The working state of the pipeline: one captured graph on its way to variants, segments and a plan."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from vericache_compile.errors import UnsupportedGraph
from vericache_compile.plan import Compiled, Output, OutputRole, Roles, Rope, SegmentedProgram, Site

IN_PLACE = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"}
"""Operators that change their first argument; functions and methods that do so end in an underscore."""


@dataclass(frozen=True)
class SiteNodes:
    """The nodes of one attention site in the captured graph."""

    site: Site
    attention: Node
    query: Node
    key: Node
    value: Node
    """This call's keys and values, before they are appended to the cache."""
    mask: Node | None
    """The mask that attention is given; where it is spelled out, the scores as its softmax reads them."""
    sides: tuple[Node, ...] = ()
    """Values other than scores that `mask` is made of."""
    products: tuple[Node, ...] = ()
    """Where attention is spelled out, the product of queries and keys; or its two factors, where it adds something."""
    sinks: Node | None = None
    """The model's weight [H]."""
    spelled: tuple[Node, ...] = ()
    """The calls from the product of queries and keys to the probabilities."""
    weight: Node | None = None
    """Of a latent site, where `key` and `value` are the new latent and rotated part: what makes keys and values of the
    latent, [H * (N + E), R]."""
    expansion: tuple[Node, ...] = ()
    """The calls that make them, which only what runs as captured needs."""


@dataclass(frozen=True)
class SegmentGraph:
    """One segment: its own graph, and which nodes of the variant it reads and makes."""

    module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    key: str
    """Equal keys run the same program."""


@dataclass
class Program:
    """A captured graph (our own copy) and all that passes have found out and made of it."""

    module: GraphModule
    batch: int
    """Rows of the batch that variants are made for."""
    window: int
    scalars: dict[int, float] = field(default_factory=dict)
    """Values of the inputs that hold one float."""
    buffers: dict[int, Tensor] = field(default_factory=dict)
    """The model's buffers among the inputs that masks may be made from: those of whole numbers and truth values."""
    compiled: dict[str, Compiled] = field(default_factory=dict)
    """Compiled segments by structure, shared with every capture of the same model."""
    roles: Roles | None = None
    sites: list[SiteNodes] = field(default_factory=list)
    outputs: list[OutputRole] = field(default_factory=list)
    writes: list[Node] = field(default_factory=list)
    """Calls of a decode step that change caches and their counters in place."""
    position_rule: str = "given"
    position_nodes: list[Node] = field(default_factory=list)
    position_limit: int | None = None
    rotations: list[Rope | None] = field(default_factory=list)
    """Per site, once find_rotation has run."""
    column_limit: int | None = None
    in_step: bool = False
    """Whether all rows of a batch are given one position."""
    captured: GraphModule | None = None
    """The graph as captured, handing new keys and values to a store."""
    unpadded: GraphModule | None = None
    """The same for calls without padding, where masks are then left to `is_causal`."""
    variants: dict[str, GraphModule] = field(default_factory=dict)
    segments: dict[str, list[SegmentGraph]] = field(default_factory=dict)
    segmented: dict[str, SegmentedProgram] = field(default_factory=dict)

    @property
    def found_roles(self) -> Roles:
        """Roles, once find_roles has run."""
        assert self.roles is not None, "find_roles has not run"
        return self.roles

    @property
    def placeholders(self) -> list[Node]:
        """Graph inputs in order."""
        return placeholders(self.module)

    @property
    def returned(self) -> list[Any]:
        """What the graph returns, flat, in order."""
        return returned(self.module)

    @property
    def cached(self) -> set[Node]:
        """Inputs that hold cached keys and values, once find_attention has run."""
        inputs = self.placeholders
        return {inputs[i] for nodes in self.sites for i in nodes.site.past or ()}

    @property
    def idle(self) -> set[Node]:
        """Calls that change in place what the graph itself makes, and reads nowhere but in further arguments of an
        attention (FlexAttention's block masks), once find_attention has run."""
        parts = [n for nodes in self.sites for n in (nodes.query, nodes.key, nodes.value, *nodes.sides)]
        results = {nodes.attention for nodes in self.sites}
        read = set(ancestors([output_node(self.module), *parts], results))
        read |= {node for node in self.module.graph.nodes if node.op in ("placeholder", "get_attr")}
        changes = [node for node in self.module.graph.nodes if mutates(node)]
        return {node for node in changes if read.isdisjoint(ancestors([node]))}

    @property
    def rows(self) -> list[int]:
        """Outputs that are rows of the model's result, once find_attention has run."""
        kinds = (Output.LOGITS, Output.ROWS)
        return [i for i, role in enumerate(self.outputs) if role.kind in kinds]

    @property
    def logits(self) -> int:
        """Which of the rows holds the logits."""
        return [self.outputs[i].kind for i in self.rows].index(Output.LOGITS)


def placeholders(module: GraphModule) -> list[Node]:
    """Inputs of a graph in order."""
    return [node for node in module.graph.nodes if node.op == "placeholder"]


def output_node(module: GraphModule) -> Node:
    """The graph's single output node."""
    node: Node
    [node] = (node for node in module.graph.nodes if node.op == "output")
    return node


def returned(module: GraphModule) -> list[Any]:
    """What a graph returns, flat, in order."""
    value = output_node(module).args[0]
    return list(value) if isinstance(value, (tuple, list)) else [value]


def batch_of(module: GraphModule, inputs: Sequence[Any]) -> int:
    """Rows of the first two-dimensional integer input that is no buffer: the tokens' batch."""
    given = [x for node, x in zip(placeholders(module), inputs, strict=True) if not is_weight(node)]
    shapes = (x.shape for x in given if isinstance(x, Tensor) and x.dim() == 2 and not x.is_floating_point())
    return next((int(shape[0]) for shape in shapes), 1)


def copy_graph(module: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """A copy of a module's graph, and which node of it stands for which of the original."""
    graph, node_of = Graph(), dict[Node, Node]()
    graph.output(graph.graph_copy(module.graph, node_of))
    return graph, node_of


def copy_module(module: GraphModule) -> GraphModule:
    """A copy whose graph can be changed; parameters and submodules are shared, node metadata is kept."""
    copied = make_module(module, copy_graph(module)[0])
    copied.meta.update(module.meta)
    return copied


def make_module(root: torch.nn.Module, graph: Graph) -> GraphModule:
    """A module of a graph, parameters and submodules those of `root`. Its code is written when it is first called or
    looked at: most modules on the way are only read as graphs."""
    return _LazyGraphModule(root, graph)


def example(node: Node) -> Any:
    """The fake value that Dynamo recorded for a node (None where it recorded none)."""
    return node.meta.get("example_value", node.meta.get("val"))


def is_integer(node: Node) -> bool:
    """Whether a node is one integer, known or symbolic."""
    return isinstance(example(node), (int, torch.SymInt)) and not isinstance(example(node), bool)


def expression(size: int | torch.SymInt) -> Any:
    """A size as a sympy expression, to be compared without a new guard on it (or the int that it is)."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def is_weight(node: Node) -> bool:
    """Whether a graph input is a parameter or buffer of the model."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) or isinstance(
        example(node), torch.nn.Parameter
    )


def target_name(node: Node) -> str:
    """The name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def mutates(node: Node) -> bool:
    """Whether a node changes its first argument in place, or what it is given as `out`."""
    name = target_name(node)
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        return name in IN_PLACE
    if node.op not in ("call_function", "call_method"):
        return False
    is_named = name.strip("_") in IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    return is_named or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None


def changed(node: Node) -> Any:
    """What a node that `mutates` changes."""
    return node.kwargs.get("out", node.args[0] if node.args else node.kwargs.get("input"))


def row_width(value: object) -> int:
    """Columns of a returned tensor of rows [batch, tokens, columns]; 0 for anything else."""
    fake = example(value) if isinstance(value, Node) else None
    if not isinstance(fake, Tensor) or fake.dim() != 3 or not fake.is_floating_point():
        return 0
    return int(fake.shape[-1])


def source_line(node: Node) -> str:
    """The user's source line that a node came from (for an input: that first reads it), for messages."""
    kind = "input" if node.op == "placeholder" else "node"
    frame = user_frame(next(iter(node.users), node) if node.op == "placeholder" else node)
    return f"{kind} {node.name}, {frame}" if frame else f"{kind} {node.name}"


def user_frame(node: Node) -> str:
    """The innermost frame of the user's code that made a node: file, line and code; empty where none is known."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    if not files:
        return ""
    last = files[-1]
    code = lines[last + 1] if last + 1 < len(lines) else ""
    return f"{lines[last]}: {code}"


def unsupported(found: str, node: Node | None, fix: str) -> UnsupportedGraph:
    """An UnsupportedGraph that names the node and the user's source line."""
    return UnsupportedGraph(found, source_line(node) if node is not None else "the captured graph", fix)


def ancestors(nodes: Sequence[Node], given: Collection[Node] = ()) -> Iterator[Node]:
    """The given nodes and all that they depend on, each once; of the nodes in `given` not what they depend on."""
    seen: set[Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(node.all_input_nodes if node not in given else ())
