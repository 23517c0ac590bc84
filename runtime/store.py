"""What a graph that runs as captured hands its keys and values to, and gets those before them from."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch
from torch import Tensor

from vericache_compile.latent import absorb
from vericache_compile.runtime.caches import whole_types
from vericache_compile.runtime.compression import Columns, Early, compress_site, hold_newest, leave_out
from vericache_compile.runtime.sequences import Sequence, followed
from vericache_compile.runtime.sliding import OutOfWindow


class Store:
    """Takes each site's new queries, keys and values while a graph runs as captured, and gives it those before."""

    def __init__(self, sequence: Sequence, column: int, queries: int, pads: Rows[int], shown: Rows[int]) -> None:
        """Site i's cache tensors show the newest shown[i] of the columns before `column`."""
        self.sequence, self.column, self.queries, self.pads, self.shown = sequence, column, queries, pads, shown
        self._past: dict[int, tuple[Tensor, Tensor]] = {}

    def past(self, layer: int, side: int) -> Tensor:
        """A cache tensor, the keys (side 0) or values [B, K, shown, *], as it is before `column`; one site's are on the
        device at a time."""
        return self.sequence.full.sites[layer].cached(*self._read(layer))[side]

    def _read(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._past:
            self._past.clear()
            self._past[layer] = self.sequence.full.read(layer, self.column - self.shown[layer], self.column)
        return self._past[layer]

    def append(self, layer: int, q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None) -> None:
        """q [B, H, T, D], k [B, K, T, D], v [B, K, T, E] of the tokens from `column` on.

        At a latent site k is the latent, v the rotated part, and `weight` makes keys and values of the latent.
        """
        full, batch = self.sequence.full, k.shape[0]
        columns, site = [self.column] * batch, full.sites[layer]
        k, v = site.attended(k, v)

        def asked(q: Tensor) -> Tensor:
            """Queries for the keys that are cached."""
            return q if weight is None else absorb(q, weight, site.cached_sizes[1])

        full.append(layer, k, v, columns)
        full.settle(layer, [self.column + k.shape[2]] * batch)
        if self.sequence.draft is not None:
            self.sequence.draft.layers[layer].write(k, v, columns)
        if self.queries:
            held, last = self.sequence.queries[layer], asked(q[:, :, -self.queries :])
            start = self.column + q.shape[2] - last.shape[2]
            self.sequence.queries[layer] = [
                followed(h, x, start, self.queries) for h, x in zip(held, last, strict=True)
            ]
        if self.sequence.drawn is not None and self.shown[layer] == self.column:  # a sliding layer is not compressed
            keys = torch.cat([self._read(layer)[0], k], dim=2) if self.column else k
            if self.sequence.asked is not None:
                self.sequence.drawn.add_window(layer, self.sequence.asked, columns, keys, self.pads)
            for b, pad in enumerate(self.pads):
                self.sequence.drawn.add(layer, b, asked(q[b : b + 1])[0], keys[b], pad)
        if self.sequence.early is not None:
            with whole_types(k.device):
                self._compress(self.sequence.early, layer, k, v)

    def _compress(self, early: Early, layer: int, k: Tensor, v: Tensor) -> None:
        """Compress a site while its keys and values are on the device anyway; a sliding layer is not compressed."""
        sites = self.sequence.full.sites
        if sites[layer].kept is not None:
            rows = zip(k, v, early.pads, strict=True)
            early.regions.append([OutOfWindow.like(own_k, own_v, k.shape[2] - pad) for own_k, own_v, pad in rows])
            early.remainders.append([None] * k.shape[0])
            early.tips.append([None] * k.shape[0])
            return
        own = early.compressor.for_layer(layer, len(sites))
        spans = [(pad, k.shape[2]) for pad in early.pads]
        asked = self.sequence.asked_within(layer, early.pads, [k.shape[2]] * k.shape[0])
        exact = Columns(k, v, [0] * k.shape[0])
        made = compress_site(own, exact, sites[layer], spans, asked, early.regions)
        early.regions.append(made)
        full, pads = self.sequence.full, early.pads
        early.remainders.append(leave_out(full, sites[layer], exact, made, pads, early.apart))
        early.tips.append(hold_newest(full, exact, made, pads, pads))
