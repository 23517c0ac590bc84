"""How the tests of callers call: one function per way to decode, run on a plain and on a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import make_prompt, make_tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

OPTIONS = {"inductor": False, "compressor": "streaming", "keep": 0.2, "window": 8}
Caller = Callable[[PreTrainedModel], Tensor]


def greedy(model: PreTrainedModel, ids: Tensor, count: int = 30, **more: Any) -> Tensor:
    """model.generate, greedy unless told otherwise."""
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": count, "do_sample": False, **more}
    return model.generate(ids, **settings)


def prompt(tokens: int = 40, batch: int = 1) -> Tensor:
    return make_prompt(tokens, batch)["input_ids"]


@torch.no_grad()
def step_by_step(model: PreTrainedModel, cache: DynamicCache, ids: Tensor, count: int) -> list[Tensor]:
    """A hand-written greedy loop that passes no position_ids: `count` tokens, each [B, 1]."""
    tokens = []
    for _ in range(count):
        ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        tokens.append(ids)
    return tokens


def both(call: Caller, name: str, **options: Any) -> tuple[Tensor, Tensor, PreTrainedModel]:
    """What a caller gets from the plain and from the compiled model."""
    plain = call(make_tiny(name))
    model = make_tiny(name)
    model.compile(backend="vericache", options={**OPTIONS, **options})
    return plain, call(model), model
