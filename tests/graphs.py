"""Captured graphs to test passes on, and what running them node by node gives.

Shapes: B batch, T tokens, S cached columns, W window, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from models import make_prompt, make_tiny
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from vericache_compile import ops
from vericache_compile.passes import pipeline
from vericache_compile.passes.evaluate import bind_symbols, concrete
from vericache_compile.passes.program import Program, copy_module, example, placeholders, target_name
from vericache_compile.plan import Output, Staging
from vericache_compile.runtime.executor import WeightCasts, bind_weights, execute

PASSES = (*pipeline.FIND, *pipeline.decode_passes(inductor=False))


@dataclass(frozen=True)
class Captured:
    """A graph that Dynamo captured, and the inputs of one call of it."""

    module: GraphModule
    inputs: tuple[Any, ...]


def capture(model: nn.Module, drive: Callable[[nn.Module], object]) -> list[Captured]:
    """Every call of a compiled model while `drive` uses it, in order."""
    calls: list[Captured] = []

    def record(module: GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        kept = copy_module(module)

        def call(*inputs: Any) -> Any:
            held = tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)
            calls.append(Captured(kept, held))
            return module(*inputs)

        return call

    torch._dynamo.reset()
    model.compile(backend=record)
    with torch.no_grad():
        drive(model)
    model._compiled_call_impl = None
    return calls


@cache
def tiny_decode(name: str, batch: int, loop: str = "generate", tokens: int = 7) -> Captured:
    """The decode step (any past length) of a tiny model of three layers: a call with `tokens` + 2 columns cached.

    `loop` is generate, static (generate with a cache of a fixed size), plain (a loop of one's own that passes only
    tokens and cache) or masked (and the padding mask).
    """
    model, prompt = make_tiny(name, layers=3), make_prompt(tokens, batch)

    def generate(model: Any) -> None:
        asked = {"cache_implementation": "static"} if loop == "static" else {}
        model.generate(**prompt, max_new_tokens=4, do_sample=False, **asked)

    def decode(model: Any) -> None:
        from transformers import DynamicCache

        kept, ids, mask = DynamicCache(), prompt["input_ids"], prompt["attention_mask"]
        for _ in range(4):
            given = {"attention_mask": mask} if loop == "masked" else {}
            out = model(input_ids=ids, past_key_values=kept, **given)
            ids, mask = out.logits[:, -1:].argmax(-1), torch.cat([mask, mask.new_ones(batch, 1)], 1)

    return capture(model, generate if loop in ("generate", "static") else decode)[-1]


class Toy(nn.Module):
    """One attention layer with learned positions, as a model of one's own spells it; tests override a method.

    What forward is given beside ids and cache goes to `positions`, `attend` and `finish`.
    """

    heads, kv_heads, size, vocabulary, places = 4, 2, 8, 29, 600

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = self.heads * self.size
        self.embed = nn.Embedding(self.vocabulary, width)
        self.place = nn.Embedding(self.places, width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * self.kv_heads * self.size, bias=False)
        self.to_logits = nn.Linear(width, self.vocabulary)

    def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        """Positions [1, T] of ids [B, T] after the cached past [B, K, S, D]."""
        return (torch.arange(ids.shape[1]) + past.shape[2])[None]

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, K, T, D] of x [B, T, H * D]."""
        q = self.to_q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        kv = self.to_kv(x).unflatten(-1, (2 * self.kv_heads, self.size)).transpose(1, 2)
        return q, *kv.chunk(2, 1)

    def append(self, past: Tensor, new: Tensor) -> Tensor:
        """The cache tensor with this call's part."""
        return torch.cat([past, new], dim=-2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        """Attention [B, H, T, D] over the whole cache."""
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def finish(self, x: Tensor, past: Tensor, *more: Tensor) -> Tensor:
        """Logits of the last hidden states [B, T, H * D]."""
        return self.to_logits(x)

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, T, vocabulary] and the grown cache."""
        x = self.embed(ids) + self.place(self.positions(ids, k, *more))
        q, new_k, new_v = self.project(x)
        keys, values = self.append(k, new_k), self.append(v, new_v)
        x = x + self.attend(q, keys, values, *more).transpose(1, 2).flatten(2)
        return self.finish(x, k, *more), keys, values


class Twin(Toy):
    """Two attentions side by side, each over a cache of its own."""

    def forward(self, ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        """Logits and the grown cache; given are k, v, k, v and anything more."""
        cache, more = given[:4], given[4:]
        x = self.embed(ids) + self.place(self.positions(ids, cache[0]))
        q, new_k, new_v = self.project(x)
        grown = [self.append(past, new) for past, new in zip(cache, (new_k, new_v, new_v, new_k), strict=True)]
        one, two = self.attend(q, *grown[:2], *more), Toy.attend(self, q, *grown[2:])
        return self.finish(x + (one - two).transpose(1, 2).flatten(2), cache[0]), *grown


def toy_decode(
    model: Toy, *more: Any, batch: int = 1, columns: int = 6, dynamic: bool = True, ids: Tensor | None = None
) -> Captured:
    """The decode step of a toy model over random cached columns; `more` are further arguments of its forward."""
    generator = torch.Generator().manual_seed(1)
    fed = torch.randint(model.vocabulary, (batch, 1), generator=generator) if ids is None else ids
    shape = (batch, model.kv_heads, columns, model.size)
    k, v = (torch.randn(shape, generator=generator).to(model.to_q.weight.dtype) for _ in range(2))
    for held in (k, v, *more):
        if dynamic and isinstance(held, Tensor) and columns in (held.shape[-1] - 1, *held.shape[2:3]):
            torch._dynamo.maybe_mark_dynamic(held, held.dim() // 2)
    [call] = capture(model, lambda model: model(fed, k, v, *more))
    return call


def run_until(
    captured: Captured, last: str, batch: int = 1, window: int = 4, staging: Staging | None = None, **more: Any
) -> Program:
    """A program that went through all passes up to the one named `last`; those of transfers with `staging`."""
    program = Program(copy_module(captured.module), batch, window, **more)
    passes = (*pipeline.FIND, *pipeline.decode_passes(inductor=False, staging=staging))
    names = [getattr(each, "func", each).__name__ for each in passes]
    pipeline.run(program, passes[: names.index(last) + 1])
    return program


def calls_of(module: GraphModule) -> list[str]:
    """Names of all functions and methods that a graph calls, in order."""
    return [target_name(node) for node in module.graph.nodes if node.op.startswith("call")]


def node_named(module: GraphModule, name: str) -> Node:
    """The only call of a function or method in a graph."""
    [node] = (node for node in module.graph.nodes if target_name(node) == name)
    return node


@dataclass(frozen=True)
class Steps:
    """W one-token steps of a captured graph, each run eagerly on the cache that the one before returned."""

    tokens: Tensor
    """[W, B, 1]."""
    positions: Tensor
    """[W, B, 1]."""
    lengths: Tensor
    pads: Tensor
    """[B]."""
    rows: list[tuple[Tensor, ...]]
    """Row outputs of each step."""
    new: list[tuple[Tensor, Tensor]]
    """Per site this call's keys and values of all steps [B, K, W, D]."""


def take_steps(program: Program, captured: Captured, window: int) -> Steps:
    """Feed `window` random tokens to the captured graph, one by one."""
    roles, inputs = program.found_roles, list(captured.inputs)
    columns = inputs[program.sites[0].site.past[0]].shape[2]
    mask = inputs[roles.mask] if roles.mask is not None else torch.ones(program.batch, columns + 1)
    pads = (columns + 1 - mask.sum(-1)).long()
    ids = torch.randint(1, 29, (window, program.batch, 1), generator=torch.Generator().manual_seed(2))
    start = columns - (pads if program.position_rule != "column" else 0 * pads)[:, None]
    rows: list[tuple[Tensor, ...]] = []
    for step in range(window):
        inputs[roles.tokens] = ids[step]
        if roles.positions is not None:
            inputs[roles.positions] = start + step
        if roles.mask is not None and step:
            inputs[roles.mask] = torch.cat([inputs[roles.mask], mask.new_ones(program.batch, 1)], -1)
        made = captured.module(*with_sizes(program, inputs, columns + step))
        rows.append(tuple(made[i] for i in program.rows))
        for value, role in zip(made, program.outputs, strict=True):
            if role.kind in (Output.KEYS, Output.VALUES):
                inputs[program.sites[role.layer].site.past[role.kind is Output.VALUES]] = value
    new = [tuple(inputs[i][:, :, columns:] for i in nodes.site.past) for nodes in program.sites]
    positions = start + torch.arange(window)[:, None, None]
    return Steps(ids, positions, torch.full_like(pads, columns), pads, rows, new)


def with_sizes(program: Program, inputs: Sequence[Any], columns: int) -> list[Any]:
    """Inputs of the captured graph with its symbolic sizes for that many cached columns."""
    env = bind_symbols(program, columns)
    fakes = [example(node) for node in program.placeholders]
    return [concrete(f, env) if isinstance(f, torch.SymInt) else x for f, x in zip(fakes, inputs, strict=True)]


def run_variant(program: Program, mode: str, captured: Captured, steps: Steps, window: int) -> tuple[Tensor, ...]:
    """Run a draft or verify graph node by node on the real cache; window 0 means one step without that axis."""
    held = {"tokens": steps.tokens, "positions": steps.positions}
    given = {name: value[:window] if window else value[0] for name, value in held.items()}
    given |= {"lengths": steps.lengths, "pads": steps.pads}
    real = with_sizes(program, captured.inputs, int(steps.lengths[0]))
    variant = program.variants[mode]
    inputs = [
        given[node.meta["role"]] if node.meta.get("role") else real[node.meta["captured_input"]]
        for node in placeholders(variant)
    ]
    made: tuple[Tensor, ...] = torch.fx.Interpreter(variant).run(*inputs)
    return made


def run_segmented(program: Program, mode: str, captured: Captured, steps: Steps, window: int) -> tuple[Tensor, ...]:
    """Run a segmented program with plain attention over the real cache; window 0 as in `run_variant`.

    What it waits for is the real cache as well, and what it does not wait for it may not read.
    """
    segmented = program.segmented[mode]
    real = with_sizes(program, captured.inputs, int(steps.lengths[0]))

    class Cached:
        def prefetch(self, layer: int) -> None:
            pass

        def wait(self, layer: int) -> tuple[Tensor, Tensor]:
            keys, values = (real[i] for i in program.sites[layer].site.past)
            return keys, values

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *waited: Tensor) -> Tensor:
        assert sinks is None
        site = program.sites[layer].site
        past = waited or [real[i] for i in site.past]
        return ops.attend(q, k, v, *past, steps.lengths, steps.pads, site.scale, layer)

    tokens, positions = (x[:window] if window else x[0] for x in (steps.tokens, steps.positions))
    return execute(segmented, bind_weights(segmented, real, WeightCasts()), tokens, positions, attend, Cached())
