"""Nodes, sites and segments of a program as plain values: what JSON, GraphML, DOT and the page are all made of.

Shapes and types come from the fake values that tracing left; no tensor's data is ever read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from vericache_compile.ops import ATTEND, PREFETCH, WAIT
from vericache_compile.passes.find_attention import ATTENTION
from vericache_compile.passes.partition import levels
from vericache_compile.passes.program import Program, SiteNodes, example, target_name, user_frame
from vericache_compile.plan import Roles

SITES = (ATTENTION, ATTEND)
KINDS = {ATTENTION: "site", ATTEND: "site", PREFETCH: "prefetch", WAIT: "wait"}
"""What a node is to us, by its target; all others are ordinary."""
ARGUMENTS = 400
"""Characters of a node's arguments that are kept."""


def graphs_of(program: Program) -> dict[str, GraphModule]:
    """The graphs that a program consists of now, by name."""
    if program.variants:
        return dict(program.variants)
    graphs = {"captured": program.module}
    if program.captured is not None:
        graphs["as_captured"] = program.captured
    if program.unpadded is not None:
        graphs["unpadded"] = program.unpadded
    return graphs


def type_of(value: object) -> str:
    """A fake value as text: "float32 [1, 4, s53, 16]", "Sym(s53)"; empty for None."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} [{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(type_of, value))})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"Sym({value})"
    return "" if value is None else type(value).__name__


def target_of(node: Node) -> str:
    """What a node calls or reads, as a name."""
    if node.op == "call_method":
        return f".{node.target}"
    if node.op != "call_function" or isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    module = getattr(node.target, "__module__", None) or ""
    return f"{module}.{target_name(node)}".removeprefix(".").removeprefix("_operator.")


def describe_node(node: Node) -> dict[str, Any]:
    """Name, op, target, type, arguments, inputs (names), the user's line, and the nodes that it was traced from."""
    known = {"role": node.meta.get("role"), "captured_input": node.meta.get("captured_input")}
    args = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    return {
        "name": node.name,
        "op": node.op,
        "target": target_of(node),
        "type": type_of(example(node)),
        "args": args if len(args) <= ARGUMENTS else f"{args[:ARGUMENTS]}...",
        "inputs": [read.name for read in node.all_input_nodes],
        "source": user_frame(node),
        "traced_from": [source.name for source in node.meta.get("from_node") or ()],
    } | {name: value for name, value in known.items() if value is not None}


def segment_of(graph: Graph) -> dict[Node, int]:
    """The segment that each node is shown in: where what it reads is there; for weights, where they are first read."""
    level = levels(graph, SITES)
    for node in reversed(graph.nodes):
        varies = any(read.op != "placeholder" or read.meta.get("role") for read in node.all_input_nodes)
        if not varies and node.users and node.op != "output":
            level[node] = min(level[user] - (user.target in SITES) for user in node.users)
    return level


def mask_kind(nodes: SiteNodes, proved: bool) -> str:
    """How an attention is masked, and what else is done to its scores, as a person would say it."""
    site = nodes.site
    cap = "" if site.soft_cap is None else f"soft cap {site.soft_cap:g}"
    more = (cap, "sinks" if site.sinks else "", "ALiBi" if site.alibi is not None else "")
    return ", ".join(filter(None, (_mask_alone(nodes, proved), *more)))


def _mask_alone(nodes: SiteNodes, proved: bool) -> str:
    window = f", window {nodes.site.window}" if nodes.site.window is not None else ""
    if nodes.products and not nodes.sides:
        return f"none{window}"
    if nodes.mask is not None:
        return f"causal with left padding{window} (proved)" if proved else "a tensor"
    given = dict(zip(("attn_mask", "dropout_p", "is_causal"), nodes.attention.args[3:], strict=False))
    causal = (given | dict(nodes.attention.kwargs)).get("is_causal")
    return f"is_causal{window}" if causal else f"none{window}"


def describe_sites(program: Program) -> list[dict[str, Any]]:
    """One row per attention site; bytes are of full KV, of all rows of the batch where it says so."""
    rows = []
    for nodes in program.sites:
        site = nodes.site
        rows.append(
            {
                "layer": site.layer,
                "heads": site.heads,
                "kv_heads": site.kv_heads,
                "head_size": site.head_size,
                "value_size": site.value_size,
                "scale": site.scale,
                "dtype": str(site.dtype).removeprefix("torch."),
                "mask": mask_kind(nodes, bool(program.variants)),
                "bytes_per_token": site.bytes_per_token,
                "bytes_written_per_decode_step": program.batch * site.bytes_per_token,
                "bytes_written_per_verify_pass": program.batch * program.window * site.bytes_per_token,
                "bytes_read_per_cached_token": program.batch * site.bytes_per_token,
                "source": user_frame(nodes.attention),
            }
        )
    return rows


def describe_segments(program: Program, mode: str) -> list[dict[str, Any]]:
    """The segments of a variant in order, each with its key and the others that are the same program."""
    segments = program.segments.get(mode, [])
    keys = [segment.key for segment in segments]
    return [
        {
            "segment": i,
            "key": segment.key[:12],
            "nodes": len(segment.module.graph.nodes),
            "inputs": len(segment.inputs),
            "outputs": [node.name for node in segment.outputs],
            "shared_with": [j for j, key in enumerate(keys) if key == segment.key and j != i],
        }
        for i, segment in enumerate(segments)
    ]


def describe_transfers(program: Program) -> list[dict[str, Any]]:
    """Per site of verify: where it is asked for, in the draft step already or after which attention, and what comes."""
    verify, draft = program.variants.get("verify"), program.variants.get("draft")
    if verify is None or draft is None:
        return []
    early = {node.args[1] for node in draft.graph.nodes if node.target is PREFETCH}
    rows, attended = [], -1
    for node in verify.graph.nodes:
        attended += node.target is ATTEND
        if node.target is PREFETCH:
            layer = int(node.args[1])
            asked = "draft" if layer in early else "verify"
            rows.append(
                {
                    "layer": layer,
                    "asked_for_in": asked,
                    "after_attention": attended if attended >= 0 else None,
                    "waited_for_before_attention": layer,
                    "bytes_per_cached_token": program.batch * program.sites[layer].site.bytes_per_token,
                }
            )
    return rows


def describe_roles(program: Program) -> dict[str, Any]:
    """Which captured input is what, by name; empty before find_roles has run."""
    roles: Roles | None = program.roles
    if roles is None:
        return {}
    names = [node.name for node in program.placeholders]
    return {
        "tokens": names[roles.tokens],
        "positions": None if roles.positions is None else names[roles.positions],
        "mask": None if roles.mask is None else names[roles.mask],
        "weights": len(roles.weights),
        "position_rule": program.position_rule,
    }


def describe_program(program: Program) -> dict[str, Any]:
    """Everything in program.json: no weights, no tokens; shapes, names and byte counts only."""
    return {
        "batch": program.batch,
        "window": program.window,
        "roles": describe_roles(program),
        "outputs": [{"kind": str(role.kind), "layer": role.layer} for role in program.outputs],
        "sites": describe_sites(program),
        "transfers": describe_transfers(program),
        "variants": {
            name: {
                "nodes": [describe_node(node) | {"segment": at} for node, at in segment_of(module.graph).items()],
                "segments": describe_segments(program, name),
            }
            for name, module in graphs_of(program).items()
        },
    }
