"""What calibration sees: the keys and values that a model caches for some text, and how its loss depends on them.

Shapes: N rows of T tokens, K KV heads, D head size, Dv value head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vericache_compile.compressors.rotation import Rotation

SAMPLED = 2048
"""Tokens per layer that are kept where single numbers are wanted."""


class Observed(NamedTuple):
    """One layer's cache for one row; gradients of the mean loss, zeros where none were asked for."""

    keys: Tensor
    """[K, T, D]."""
    values: Tensor
    """[K, T, Dv]."""
    key_gradients: Tensor
    value_gradients: Tensor


def observe(
    model: Any, ids: Tensor, turned: Sequence[Rotation | None] = (), *, gradients: bool = False
) -> Iterator[tuple[int, Observed]]:
    """(layer, what it caches) for each row of ids [N, T] and each layer of an uncompiled transformers model.

    Keys are turned back to before RoPE where `turned` says how they were turned, and so are their gradients: a turn's
    transpose is its inverse.
    """
    for row in range(len(ids)):
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        with torch.set_grad_enabled(gradients), _frozen(model):
            _forward(model, ids[row : row + 1], partial(_keep, kept), gradients=gradients)
        for layer, (keys, values) in kept.items():
            seen = Observed(*(part.detach()[0] for part in (keys, values, _slope(keys), _slope(values))))
            rotation = turned[layer] if turned else None
            yield layer, seen if rotation is None else _turned_back(seen, rotation)


def sample(model: Any, ids: Tensor, turned: Sequence[Rotation | None] = ()) -> Mapping[int, Observed]:
    """Per layer some tokens of ids [N, T], evenly spread and at most 2,048, with gradients."""
    step = -(-ids.numel() // SAMPLED)
    kept: dict[int, list[Observed]] = {}
    for layer, seen in observe(model, ids, turned, gradients=True):
        kept.setdefault(layer, []).append(Observed(*(part[:, ::step].clone() for part in seen)))
    return {
        layer: Observed(*(torch.cat(parts, dim=1) for parts in zip(*seen, strict=True))) for layer, seen in kept.items()
    }


def last_hidden(model: Any, ids: Tensor, lend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """Hidden states [N, T, *] that the model's head would read.

    `lend(layer, keys, values)` says what the layer attends to in place of its own keys and values.
    """
    with torch.no_grad():
        states: Tensor = _forward(model, ids, lend).last_hidden_state
        return states


def _forward(
    model: Any,
    ids: Tensor,
    lend: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    gradients: bool = False,
) -> Any:
    """Run a model without its head on ids [N, T] over a new cache; for gradients with it, and backwards too."""
    from transformers import DynamicCache

    cache = DynamicCache()
    update = cache.update

    def lending(keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        made: tuple[Tensor, Tensor] = lend(layer, *update(keys, values, layer, *args, **kwargs))
        if gradients:
            for part in made:
                part.retain_grad()
        return made

    cache.update = lending
    inputs: dict[str, Any] = {"input_ids": ids}
    if gradients:
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach().requires_grad_(), "labels": ids}
    out = (model if gradients else model.base_model).forward(**inputs, past_key_values=cache, use_cache=True)
    if gradients:
        out.loss.backward()
    return out


def _keep(kept: dict[int, tuple[Tensor, Tensor]], layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    kept[layer] = (keys, values)
    return keys, values


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No parameter gathers a gradient while this is open."""
    wanted = [each for each in model.parameters() if each.requires_grad]
    try:
        for each in wanted:
            each.requires_grad_(False)
        yield
    finally:
        for each in wanted:
            each.requires_grad_(True)


def _turned_back(seen: Observed, rotation: Rotation) -> Observed:
    keys, slopes = (rotation.unrotate(part, 0).to(part.dtype) for part in (seen.keys, seen.key_gradients))
    return seen._replace(keys=keys, key_gradients=slopes)


def _slope(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
