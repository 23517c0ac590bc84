"""Read attention that a model spells out, for `find_attention`.

    s = matmul(q, k.transpose(-1, -2)) * scale
    s = tanh(s / cap) * cap                         Attention(query, key, value, scale, soft_cap, sinks,
    s = s + bias + mask                     ->          mask = s as the softmax reads it,
    s = cat([s, sinks], -1); s = s - max(s)             products = the product of q and k)
    o = matmul(softmax(s)[..., :-1], v)

Each part but the two products and the softmax may be missing, and any number of masks and biases may be added, filled
in or chosen by `where`: what they come to is found later (prove_mask), by running these calls on known products.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from vericache_compile.passes.program import example, is_weight, target_name, unsupported

CASTS = {"to", "type", "float", "half", "bfloat16", "type_as"}
SHAPES = {"view", "reshape", "contiguous"}
PRODUCTS = {"matmul", "bmm", "baddbmm"}
FACTORS = {"mul": 1, "imul": 1, "truediv": -1, "itruediv": -1, "div": -1}
SUMS = {"add", "iadd", "sub", "isub"}
CHOICES = {"where", "masked_fill"}
TRANSPOSES = {"transpose", "swapaxes", "swapdims"}
APPENDS = (torch.cat, torch.concat, torch.concatenate)


@dataclass(frozen=True)
class Attention:
    """One attention, however it is spelled."""

    result: Node
    query: Node
    """[B, H, T, D]."""
    key: Node
    value: Node
    """As attention reads them."""
    scale: float | None
    """None for 1 / sqrt(D)."""
    mask: Node | None
    sides: tuple[Node, ...]
    products: tuple[Node, ...] = ()
    soft_cap: float | None = None
    sinks: Node | None = None
    spelled: tuple[Node, ...] = ()
    is_causal: bool = False


@dataclass
class _Scores:
    """What was read on the way from the softmax back to the product of queries and keys."""

    calls: list[Node]
    sides: list[Node] = field(default_factory=list)
    factor: float = 1.0
    soft_cap: float | None = None


def call_name(node: Node) -> str:
    """A call's name, in place or not."""
    return target_name(node).strip("_")


def read_spelled(softmax: Node) -> Attention | None:
    """The attention around a softmax; None where it is another softmax (a router's, say)."""
    given: dict[str, Any] = dict(zip(("input", "dim"), softmax.args, strict=False)) | softmax.kwargs
    logits = given["input"]
    if given.get("dim") not in (-1, example(logits).dim() - 1):
        return None
    found = _find_values(softmax)
    if found is None:
        return None
    result, passed, sunk = found
    logits, sinks = _leave_out_sinks(logits, sunk)
    scores = _Scores([*passed, softmax])
    product = _read_scores(logits, scores)
    if product is None:
        return None
    parts = _factors(product)
    key = _untransposed(parts["key"])
    if key is None:
        raise unsupported(
            "an attention over keys that are not transposed", product, "multiply q by k.transpose(-1, -2)"
        )
    if parts["added"] is not None:
        scores.sides.append(parts["added"])
    scale = scores.factor * parts["alpha"] * (scores.soft_cap or 1.0)
    query = _query(parts["query"])
    products = (product,) if parts["added"] is None else (parts["query"], parts["key"])
    value = result.args[1]
    assert isinstance(value, Node), f"{result.name} multiplies by a constant"
    calls, sides = tuple(reversed(scores.calls)), tuple(scores.sides)
    return Attention(result, query, key, value, scale, logits, sides, products, scores.soft_cap, sinks, calls)


def _find_values(softmax: Node) -> tuple[Node, list[Node], bool] | None:
    """The product of probabilities and values, the calls up to it, and whether the last column is dropped."""
    node, passed, sunk = softmax, list[Node](), False
    while len(node.users) == 1:
        [user] = node.users
        name = call_name(user)
        if name in PRODUCTS:
            return (user, passed, sunk) if user.args[:1] == (node,) and len(user.args) == 2 else None
        if name == "dropout":
            _refuse_dropout(user)
        elif name == "getitem":
            if user.args[1] != (Ellipsis, slice(None, -1, None)):
                return None
            sunk = True
        elif name not in CASTS | SHAPES:
            return None
        passed.insert(0, user)
        node = user
    return None


def _refuse_dropout(call: Node) -> None:
    given = {"p": 0.5, "training": True} | dict(zip(("input", "p", "training"), call.args, strict=False)) | call.kwargs
    if given["p"] and given["training"]:
        raise unsupported("attention with dropout", call, "call model.eval()")


def _leave_out_sinks(logits: Any, sunk: bool) -> tuple[Node, Node | None]:
    """What the softmax reads before its maximum is taken off and a column appended, and that column's weight."""
    if call_name(logits) == "sub" and len(logits.args) == 2 and _is_maximum(logits.args[1], logits.args[0]):
        logits = logits.args[0]
    appends = logits.target in APPENDS
    if appends is not sunk:
        raise unsupported("a softmax of which other than one appended column is dropped", logits, "append sinks last")
    if not appends:
        return logits, None
    given: dict[str, Any] = dict(zip(("tensors", "dim"), logits.args, strict=False)) | logits.kwargs
    parts = given["tensors"]
    if len(parts) != 2 or example(parts[0]).dim() != 4 or given.get("dim") not in (-1, 3):
        raise unsupported("sinks that are not one column after all others", logits, "append sinks last")
    own, last = parts
    while call_name(last) in SHAPES | {"expand", "unsqueeze"}:
        last = last.args[0]
    if not is_weight(last) or example(last).shape != (example(own).shape[1],):
        raise unsupported("attention sinks that are not one weight per head", logits, "use a weight [heads]")
    return own, last


def _is_maximum(node: Any, of: Any) -> bool:
    """Whether a node is the largest of the last axis of another, that axis kept."""
    if isinstance(node, Node) and call_name(node) == "getitem" and node.args[1] == 0:
        node = node.args[0]
    return isinstance(node, Node) and call_name(node) in ("max", "amax") and node.args[0] is of


def _read_scores(node: Node, scores: _Scores) -> Node | None:
    """Walk back to the product of queries and keys, noting each call; None where there is no such product."""
    while call_name(node) not in PRODUCTS:
        name, found = call_name(node), [i for i in node.all_input_nodes if _leads(i)]
        if len(found) != 1:
            return None
        [own] = found
        others = [i for i in node.all_input_nodes if i is not own]
        if name in FACTORS:
            constant = next((a for a in node.args if isinstance(a, (int, float))), None)
            if constant is None or (FACTORS[name] < 0 and node.args[0] is not own):
                raise unsupported("attention scores multiplied by other than a constant", node, "use a number")
            scores.factor *= float(constant) ** FACTORS[name]
        elif name == "tanh":
            if scores.soft_cap is not None:
                raise unsupported("attention scores capped twice", node, "cap them once")
            scores.soft_cap, scores.factor = scores.factor, 1.0
        elif name in SUMS | CHOICES:
            if scores.soft_cap is not None:
                raise unsupported("a mask or bias below a soft cap of attention scores", node, "cap the scores first")
            if name in ("sub", "isub") and node.args[0] is not own:
                raise unsupported("attention scores taken off something", node, "write scores + mask")
            scores.sides.extend(others)
        scores.calls.append(node)
        node = own
    return node


def _leads(node: Node) -> bool:
    """Whether a value comes from a product through calls on single scores."""
    name = call_name(node)
    if name in PRODUCTS:
        return True
    known = name in FACTORS or name in SUMS | CHOICES | CASTS | SHAPES or name == "tanh"
    return known and any(map(_leads, node.all_input_nodes))


def _factors(product: Node) -> dict[str, Any]:
    """Query and key of a product, what is added to it (or None), and the number it is multiplied by."""
    if call_name(product) != "baddbmm":
        second = "mat2" if "mat2" in product.kwargs else "other"
        pair = dict(zip(("input", second), product.args, strict=False)) | product.kwargs
        return {"query": pair["input"], "key": pair[second], "added": None, "alpha": 1.0}
    given: dict[str, Any] = dict(zip(("input", "batch1", "batch2"), product.args, strict=False)) | product.kwargs
    alpha = float(given.get("alpha", 1))
    return {"query": given["batch1"], "key": given["batch2"], "added": given["input"], "alpha": alpha}


def _untransposed(node: Node) -> Node | None:
    """Keys whose last two axes a call has swapped, before it."""
    rank = example(node).dim()
    before, *given = node.args or (None,)
    axes: set[Any] = set()
    if call_name(node) in TRANSPOSES:
        axes = {axis % rank for axis in given if isinstance(axis, int)}
    elif call_name(node) == "permute":
        order: Any = given[0] if isinstance(given[0], (tuple, list)) else given
        axes = {i for i, axis in enumerate(order) if axis % rank != i}
    elif call_name(node) == "mT" or given == ["mT"]:  # a call of its own since torch 2.14
        axes = {rank - 2, rank - 1}
    return before if isinstance(before, Node) and axes == {rank - 2, rank - 1} else None


def _query(node: Node) -> Node:
    """Queries before they were flattened to [B * H, T, D], or cast to a wider type."""
    while call_name(node) in CASTS | SHAPES:
        before = node.args[0]
        assert isinstance(before, Node), f"{node.name} changes a constant"
        widened = example(before).dtype.itemsize <= example(node).dtype.itemsize
        if not widened or (call_name(node) in SHAPES and example(node).dim() != 3):
            break
        node = before
    return node
