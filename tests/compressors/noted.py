"""What a model caches for some text, and how its loss depends on that: by a cache and a backward pass of our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class NotingCache(DynamicCache):
    """Notes every layer's keys and values, and hands a borrower its lender's."""

    def __init__(self, lenders: Mapping[int, int] | None = None) -> None:
        super().__init__()
        self.lenders, self.noted = dict(lenders or {}), list[tuple[Tensor, Tensor]]()

    def update(self, keys: Tensor, values: Tensor, layer: int, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [N, K, T, *] that the layer attends to."""
        assert layer == len(self.noted), "one pass"
        self.noted.append(super().update(keys, values, layer, *rest, **more))
        return self.noted[self.lenders.get(layer, layer)]


def note_gradients(model: PreTrainedModel, ids: Tensor) -> list[list[Tensor]]:
    """Per layer keys, values and the gradients of both, [K, N * T, *]: row by row of ids [N, T]."""
    rows = []
    for row in ids.split(1):
        cache = NotingCache()
        loss = model(row, labels=row, past_key_values=cache).loss
        numbers = [part for layer in cache.noted for part in layer]
        slopes = torch.autograd.grad(loss, numbers)
        rows.append([[*numbers[i : i + 2], *slopes[i : i + 2]] for i in range(0, len(numbers), 2)])
    return [
        [torch.cat([part.detach()[0] for part in parts], dim=1) for parts in zip(*layer, strict=True)]
        for layer in zip(*rows, strict=True)
    ]
