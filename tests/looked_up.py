"""A toy that writes its cache into buffers at `input_pos`, and looks its masks up by that, as gpt-fast does.

Shapes: B batch, K KV heads, C columns of a buffer, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from graphs import Captured, Toy, capture, run_until
from torch import Tensor

from vericache_compile.passes.program import Program

Write = Callable[[Tensor, Tensor, Tensor], object]
"""(buffer [B, K, C, D], columns [1], new [B, K, 1, D])"""


def index_copy(buffer: Tensor, at: Tensor, new: Tensor) -> None:
    buffer.index_copy_(2, at, new)


def set_item(buffer: Tensor, at: Tensor, new: Tensor) -> None:
    buffer[:, :, at] = new


def index_put(buffer: Tensor, at: Tensor, new: Tensor) -> None:
    torch.ops.aten.index_put_(buffer, [None, None, at], new)


class LookedUp(Toy):
    """One attention over buffers of `columns` columns, under a mask that `seen` [C, C] holds."""

    columns = 20

    def __init__(self, write: Write = set_item) -> None:
        super().__init__()
        self.write = write
        self.register_buffer("seen", torch.ones(self.columns, self.columns, dtype=torch.bool).tril())

    def shown(self, input_pos: Tensor) -> Tensor | None:
        """The mask [1, 1, 1, C] of a token at input_pos [1]."""
        return self.seen[None, None, input_pos]

    def forward(self, ids: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        """Logits [B, 1, vocabulary] of ids [B, 1] at input_pos [1]."""
        q, new_k, new_v = self.project(self.embed(ids) + self.place(input_pos))
        self.write(k, input_pos, new_k)
        self.write(v, input_pos, new_v)
        return self.to_logits(self.attend(q, k, v, input_pos).transpose(1, 2).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        """Attention [B, H, 1, D] over buffers, at input_pos [1]."""
        return F.scaled_dot_product_attention(q, k, v, self.shown(*more), enable_gqa=True)

    def step(self, batch: int = 1) -> Captured:
        """One decode step with 6 columns filled."""
        shape = (2, batch, self.kv_heads, self.columns, self.size)
        k, v = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        ids, input_pos = torch.full((batch, 1), 3), torch.tensor([6])
        return capture(self, lambda model: model(ids, k, v, input_pos))[-1]

    def program(self, last: str, batch: int = 1) -> Program:
        """Its decode step after the pass named `last`."""
        step = self.step(batch)
        buffers = {i: x for i, x in enumerate(step.inputs) if isinstance(x, Tensor) and x.dtype == torch.bool}
        return run_until(step, last, batch=batch, buffers=buffers)
