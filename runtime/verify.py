"""The verify pass: always W tokens per sequence, over the full cache, which it writes.

Shapes: B batch, H query heads, K KV heads, W window, C columns, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vericache_compile.ops import WANTED
from vericache_compile.plan import DecodePlan
from vericache_compile.runtime.attention import attend_full
from vericache_compile.runtime.executor import execute
from vericache_compile.runtime.incoming import Incoming
from vericache_compile.runtime.scores import scores_of

Note = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
"""(layer, q [B, H, W, D], k [B, K, W, D], v [B, K, W, E], keys [B, K, C, D]): shown each site's new tokens, and its
full keys, these among them."""


def verify_tokens(
    coming: Incoming,
    pads: Sequence[int],
    plan: DecodePlan,
    bound: list[Tensor | None],
    tokens: Tensor,
    first: Tensor,
    note: Note,
    bounds: Tensor | None = None,
    wanted: int | None = None,
) -> tuple[Tensor, ...]:
    """The row outputs, each [W, B, ...], of tokens [W, B, 1] behind what is `coming`; first positions are [B, 1].

    `bounds` is that of `attend_full`. Only the first `wanted` tokens (None: all) are real: the others' rows are not
    to be read.
    """
    positions = first + torch.arange(plan.window, device=tokens.device)[:, None, None]
    if plan.position_limit is not None:
        positions.clamp_(max=plan.position_limit - 1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *full: Tensor) -> Tensor:
        keys, values = full or coming.wait(layer)
        coming.append(layer, k, v)
        note(layer, q, k, v, keys)
        site = plan.captured.sites[layer]
        scores = scores_of(site, sinks, max(coming.columns) + plan.window, q.device)
        rows = (list(coming.columns), list(pads))
        out = attend_full(q, keys, values, *rows, site.scale, site.window, bounds, scores, wanted)
        coming.release(layer)
        return out

    before = WANTED.set(wanted)
    try:
        return execute(plan.verify, bound, tokens, positions, attend, coming)
    finally:
        WANTED.reset(before)
