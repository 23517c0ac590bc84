"""What is to be decoded, in bytes, and how: what `vericache plan` shows and `placement="auto"` goes by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vericache_compile.config import Config
from vericache_compile.estimate import Measured, bytes_per_weight
from vericache_compile.machine import bandwidths
from vericache_compile.plan import FEW, Arrangement, Way
from vericache_compile.runtime.compression import CHUNK, EXACT, SPARE
from vericache_compile.runtime.counts import Counts
from vericache_compile.runtime.executor import WeightCasts
from vericache_compile.runtime.planner import Choice, Load, Machine, choices, choose
from vericache_compile.runtime.repeat import columns_fed

log = logging.getLogger(__name__)
Weights = Mapping[torch.dtype, int]
"""How many weights there are of each type."""
ROUNDS = 8
"""Rounds with drafts that say how many tokens one gives."""
LATELY = 512
"""Rounds, with drafts or without, among which these are looked for."""
EXPECTED = 0.875
"""Of a window, the tokens that a round is taken to give before any was seen."""


def count_weights(tensors: Sequence[Any]) -> Weights:
    """The numbers of the given tensors, by type."""
    found: dict[torch.dtype, int] = {}
    for tensor in tensors:
        found[tensor.dtype] = found.get(tensor.dtype, 0) + tensor.numel()
    return found


def make_load(
    config: Config,
    measured: Measured,
    weights: Weights,
    device: torch.device,
    context: int,
    batch: int,
    tokens_per_round: float | None = None,
) -> Load:
    """The load of decoding `batch` sequences of `context` tokens on a device, by what a compressor was measured to
    take."""
    sites, compressor = measured.sites, measured.compressor
    full, draft = measured.read(context)
    held, sliding = (
        sum(site.bytes_per_token for site in sites if every or site.window is not None) for every in (True, False)
    )
    whole, codes = (measured.whole, measured.codes) if device.type == "cuda" else (0.0, 0.0)
    spare = context * (whole + codes) / SPARE + (EXACT * held if whole else 0.0) + (CHUNK + 2 * config.window) * codes
    rows = (batch, min(batch, FEW))
    read, few = (
        sum(count * bytes_per_weight(config, dtype, device, each) for dtype, count in weights.items()) for each in rows
    )
    return Load(
        weights=float(sum(count * dtype.itemsize for dtype, count in weights.items())),
        draft_weights=read,
        kv=full / context,
        draft_kv=draft / context,
        held_kv=float(held),
        site_kv=float(max(site.bytes_per_token for site in sites)),
        context=context,
        batch=batch,
        window=config.window,
        tokens_per_round=tokens_per_round or EXPECTED * config.window,
        reload=measured.reloaded(context) / (context * (held - sliding)) if sliding < held else 1.0,
        sliding_kv=float(sliding),
        spare=measured.tail(EXACT) + spare,
        repeated=columns_fed(context) if "repeated" in compressor.wants else 0,
        few=None if few == read else (rows[1], few),
    )


@dataclass
class Auto:
    """How a new sequence of one model is decoded under `placement="auto"`."""

    config: Config
    measured: Measured
    weights: Weights
    device: torch.device
    counts: Counts
    casts: WeightCasts
    _said: set[str] = field(default_factory=set)

    def __call__(self, batch: int, columns: int, room: float, ring: float = 0) -> Arrangement:
        """How sequences that may become so long are decoded, where `room` bytes of device memory are left for them, and
        a ring of so many bytes is there already.

        Verifying in place wherever that fits: what a round saves of it, drafting decides later (`runtime/pace.py`).
        Else the faster one of decoding in place without drafts, where that fits, and of swapping; by the acceptance
        of the rounds so far.
        """
        load = make_load(self.config, self.measured, self.weights, self.device, columns, batch, self.tokens_per_round)
        load = replace(load, copied=self.config.device_bytes is None and not self.casts.nbytes)
        found = bandwidths(self.device)
        link = self.config.link_gbps or found.link_gbps
        machine = Machine(room + load.weights, found.memory_gbps, link)
        made = choices(load, machine, self.config.staging_bytes)
        shared = choices(load, replace(machine, device_bytes=machine.device_bytes + ring), self.config.staging_bytes)
        whole = {each.name: each for each in made if each.name in set(Way)}
        whole |= {each.name: each for each in shared if each.name == Way.SWAPPED}
        if whole[Way.RESIDENT].fits:
            return Arrangement(Way.RESIDENT, load.compressed_held)
        best = choose([whole[Way.OFF], whole[Way.SWAPPED]]) or whole[Way.SWAPPED]
        self._say(best, choose(made), columns, room)
        if best.name == Way.OFF:
            return Arrangement(Way.OFF)
        left = max(room + ring - load.copies - load.compressed_held, 0)
        return Arrangement(Way.SWAPPED, load.compressed_held, left if self.config.staging_bytes is None else None)

    @property
    def tokens_per_round(self) -> float | None:
        """What a round of W tokens would give each row by the latest rounds with drafts, as verify judged them; None
        where there were few lately: then it is as good as unknown again.

        A drafted token is taken to stand as often as those before it: of those that stood and those that did not, where
        a row keeps less than was drafted, the share that stood.
        """
        drafting = [each for each in list(self.counts.latest)[-LATELY:] if each.drafted]
        if len(drafting) < ROUNDS:
            return None
        stood = sum(each.accepted for each in drafting)
        share = stood / (stood + sum(min(each.rows, each.drafted - each.accepted) for each in drafting))
        return sum(share**place for place in range(self.config.window))

    def _say(self, best: Choice, fastest: Choice | None, columns: int, room: float) -> None:
        """Say once per way why it is not verifying in place, and what would be faster."""
        if best.name in self._said:
            return
        self._said.add(best.name)
        better = "" if fastest is None or fastest.batch == best.batch else f"; {_rate(fastest, columns)}"
        log.info(
            "vericache: %s, since resident verify does not fit into %.3g GB%s%s\n  %s",
            _rate(best, columns),
            room / 1e9,
            "" if best.fits else ", nor does anything else, and this takes the least",
            better,
            "\n  ".join(best.arithmetic),
        )


def _rate(choice: Choice, columns: int) -> str:
    return f"{choice.name}, {choice.batch} x {columns} tokens, would give {choice.tokens_per_second:.3g} tokens/s"
