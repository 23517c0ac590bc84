"""How much attention each cached token has drawn: from all queries so far (what H2O, arXiv 2306.14048, accumulates), or
from those of a repetition of the context (KVzip, see `repeat.py`).

Attention kernels do not give their weights away, so they are computed again, in blocks of queries, where a compressor
asks for them: from prefill's queries and from those of each accepted window. Where full KV lives outside the device a
window's are added in the next round or turn, when keys are on the device anyway.

Shapes: B batch, H query heads, K KV heads, C columns, T new tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vericache_compile.plan import Site

AT_ONCE = 256
"""Queries whose weights are held at once."""
AT_ONCE_ON_CPU = 64
"""Few enough that a KV head's weights of some thousand columns stay in a core's cache."""


class Drawn:
    """Per site the sums [B, K, C], float32, over all queries and over the query heads of a KV head."""

    def __init__(self, sites: Sequence[Site], sums: Sequence[Tensor]) -> None:
        self.sites, self.sums = sites, list(sums)

    @classmethod
    def empty(cls, sites: Sequence[Site], batch: int, device: torch.device) -> Drawn:
        """Sums of no columns yet."""
        return cls(sites, [torch.zeros(batch, site.kv_heads, 0, device=device) for site in sites])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.nbytes for held in self.sums)

    def add(self, layer: int, b: int, q: Tensor, keys: Tensor, pad: int) -> None:
        """Row b's queries [H, T, D] of the last T columns of keys [K, C, D], of which the first `pad` are padding."""
        columns = keys.shape[1]
        held = self._with_room(layer, columns)[b]
        held[:, columns - q.shape[1] : columns] = 0  # of other tokens, if any were here
        held[:, pad:columns] += attention_drawn(q, keys[:, pad:], self.sites[layer].scale)

    def add_window(self, layer: int, asked: Asked, lengths: Sequence[int], keys: Tensor, pads: Sequence[int]) -> None:
        """Add a round's accepted queries, as far as rows still hold their tokens: lengths [B] of keys [B, K, C, D].

        Not of a sliding layer, which is not compressed, so nobody asks what its tokens have drawn.
        """
        queries = asked.queries[layer]
        if queries is None or self.sites[layer].window is not None:
            return
        for b, (column, kept, length, pad) in enumerate(zip(asked.columns, asked.kept, lengths, pads, strict=True)):
            count = min(kept, length - column)
            if count > 0:
                self.add(layer, b, queries[b, :, :count], keys[b, :, : column + count], pad)

    def of(self, layer: int, b: int, begin: int, end: int) -> Tensor | None:
        """Row b's sums [K, end - begin]; None where they lie beyond all that was seen."""
        held = self.sums[layer][b]
        return held[:, begin:end] if end <= held.shape[1] else None

    def select(self, rows: Sequence[int]) -> Drawn:
        """A copy of the given rows."""
        with torch.inference_mode(False):
            return Drawn(self.sites, [torch.stack([held[b] for b in rows]) for held in self.sums])

    def _with_room(self, layer: int, columns: int) -> Tensor:
        held = self.sums[layer]
        if columns > held.shape[2]:
            room = 1 << (columns - 1).bit_length()
            with torch.inference_mode(False):  # to be added to in any mode
                grown = torch.zeros((*held.shape[:2], room), device=held.device)
            grown[:, :, : held.shape[2]] = held
            self.sums[layer] = grown
        return self.sums[layer]


@dataclass(frozen=True)
class Asked:
    """A round's queries, which the tokens have yet to be shown to."""

    columns: list[int]
    """Where each row's first one stands."""
    kept: list[int]
    """How many of each row's were accepted."""
    queries: list[Tensor | None]
    """Per site [B, H, W, D]."""

    def select(self, rows: Sequence[int]) -> Asked:
        """A copy of the given rows."""
        queries = [None if held is None else held[list(rows)] for held in self.queries]
        return Asked([self.columns[r] for r in rows], [self.kept[r] for r in rows], queries)


@dataclass(frozen=True)
class Repeated:
    """What a context's keys drew while the model repeated it: per site [B, K, C], float32."""

    scores: list[Tensor]
    lengths: list[int]
    """Columns that each row had."""
    whole: bool = True
    """Whether all of these still stand."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.nbytes for held in self.scores)

    def of(self, layer: int, b: int, begin: int, end: int) -> Tensor:
        """Row b's scores [K, n] of columns [begin, end), as far as they were there."""
        return self.scores[layer][b, :, begin : min(end, self.lengths[b])]

    def cut(self, columns: Sequence[int]) -> Repeated:
        """Those of each row's first columns[b], whatever text comes to stand after them."""
        lengths = list(map(min, self.lengths, columns))
        return Repeated(self.scores, lengths, self.whole and lengths == self.lengths)

    def select(self, rows: Sequence[int]) -> Repeated:
        """A copy of the given rows."""
        return Repeated([held[list(rows)] for held in self.scores], [self.lengths[r] for r in rows], self.whole)


def attention_drawn(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Sums [K, C], float32, of the causal attention that q [H, T, D], of the last T tokens, pays to keys [K, C, D].

    Where T > C the first T - C queries are of tokens that have no key here, such as padding: they pay nothing.
    """
    kv_heads, columns, size = keys.shape
    asking = q[:, max(q.shape[1] - columns, 0) :]
    before = columns - asking.shape[1]
    number, at_once = (torch.float32, AT_ONCE_ON_CPU) if q.device.type == "cpu" else (q.dtype, AT_ONCE)
    grouped = (asking.float() * scale).to(number).reshape(kv_heads, -1, asking.shape[1], size)
    keys = keys.to(number)
    sums = torch.zeros(kv_heads, columns, device=keys.device)
    for begin in range(0, asking.shape[1], at_once):
        count = min(at_once, asking.shape[1] - begin)
        seen = before + begin + count
        future = torch.ones(count, count, dtype=torch.bool, device=keys.device).triu_(1)
        for head in range(kv_heads):  # one at a time: the weights are [G * count, seen]
            logits = grouped[head, :, begin : begin + count].flatten(0, 1) @ keys[head, :seen].T
            logits.view(-1, count, seen)[..., seen - count :].masked_fill_(future, float("-inf"))
            sums[head, :seen] += logits.softmax(dim=-1, dtype=torch.float32).sum(dim=0)
    return sums
