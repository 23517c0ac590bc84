"""The verify pass: always W tokens per sequence, over the full cache, which it writes.

Shapes: B batch, H query heads, K KV heads, W window, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vericache_compile.plan import DecodePlan
from vericache_compile.runtime.attention import attend_full
from vericache_compile.runtime.executor import execute
from vericache_compile.runtime.sequences import Sequence

Note = Callable[[int, Tensor, Tensor, Tensor], None]
"""(layer, q [B, H, W, D], k [B, K, W, D], v [B, K, W, E]): shown each site's, once they are in the full cache."""


def verify_tokens(
    sequence: Sequence,
    plan: DecodePlan,
    bound: list[Tensor | None],
    tokens: Tensor,
    first: Tensor,
    columns: list[int],
    note: Note,
) -> tuple[Tensor, ...]:
    """The row outputs, each [W, B, ...], of tokens [W, B, 1] at columns[b] on, whose first positions are [B, 1]."""
    positions = first + torch.arange(plan.window, device=tokens.device)[:, None, None]
    if plan.position_limit is not None:
        positions.clamp_(max=plan.position_limit - 1)
    pads = [row.pad for row in sequence.rows]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        full = sequence.full
        full.append(layer, k, v, columns)
        note(layer, q, k, v)
        return attend_full(q, full.keys[layer], full.values[layer], columns, pads, plan.captured.sites[layer].scale)

    return execute(plan.verify, bound, tokens, positions, attend)
