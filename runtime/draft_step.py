"""One draft step with its lengths on the device: launched, or replayed as one CUDA graph, H times without a host wait.

Tokens, positions and columns lie at fixed places; a step reads them, writes its token behind the last one and moves
them on. Where a row's tail ends is read from them by the kernels, so the launches of all steps are the same.

Shapes: B batch, K KV heads, H drafted tokens, D head size, E value head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV
from vericache_compile.kernels import block_attention, launch, native
from vericache_compile.kernels.block_attention import PLAIN, Scores
from vericache_compile.kernels.draft_attention import Region, draft_attention, region_lefts
from vericache_compile.kernels.draft_step import begin_step, end_step, write_rows
from vericache_compile.plan import Act, DecodePlan
from vericache_compile.runtime.attention import attend_compressed
from vericache_compile.runtime.caches import DraftKV, DraftLayer
from vericache_compile.runtime.capture import Captured
from vericache_compile.runtime.executor import Incoming, execute
from vericache_compile.runtime.host_capture import is_inductors, recordable
from vericache_compile.runtime.scores import scores_of

Bound = list[Tensor | None]
"""Slots of the draft program with its weights in place."""


def serves(device: torch.device, plan: DecodePlan, draft: DraftKV) -> bool:
    """Whether draft steps run with their lengths on the device: where kernels read lengths there, no bias has to be
    made for a length, no region chooses by the query what is read, and no segment reads numbers back."""
    if plan.draft.waits_for_host or any(site.alibi is not None for site in plan.captured.sites):
        return False
    regions = (region for layer in draft.layers for region in layer.regions)
    if any(type(region).select is not CompressedKV.select for region in regions):
        return False
    return all(launch.takes(device, site.dtype) for site in plan.captured.sites) or makes_calls(device, plan, draft)


def makes_calls(device: torch.device, plan: DecodePlan, draft: DraftKV) -> bool:
    """Whether a step on the CPU does nothing but calls that can be recorded: the kernels there read regions that lie in
    memory as numbers, and Inductor compiled what is between."""
    sites = all(block_attention.takes(device, site.dtype) for site in plan.captured.sites)
    there = sites and native.load() is not None and is_inductors(plan.draft)
    return there and not any(layer.packed for layer in draft.layers)


def step_of(draft: DraftKV, plan: DecodePlan, bound: Bound, batch: int, horizon: int) -> DraftStep:
    """The step over a draft cache's buffers, made anew when what it reads has moved."""
    held = draft.step
    if held is None or not held.fits(plan, bound, horizon) or not held.follows(draft.layers):
        calls = makes_calls(draft.layers[0].keys.device, plan, draft)
        held = draft.step = DraftStep(draft.layers, plan, bound, batch, max(plan.window, horizon + 1), calls)
    return held


class DraftStep:
    """The buffers of a step, and the step."""

    def __init__(
        self,
        layers: Sequence[DraftLayer],
        plan: DecodePlan,
        bound: Bound,
        batch: int,
        capacity: int,
        calls: bool = False,
    ) -> None:
        device = layers[0].keys.device
        self.plan, self.bound, self._places = plan, bound, _places(bound)
        with torch.inference_mode(False):
            self.tokens, self.first, self.positions = torch.zeros((3, batch, 1), dtype=torch.int64, device=device)
            self.columns = torch.zeros(batch, dtype=torch.int64, device=device)
            self.forced = torch.zeros((batch, 1), dtype=torch.bool, device=device)
            self.drafted = torch.zeros((capacity, batch), dtype=torch.int64, device=device)
            self.place = torch.zeros(1, dtype=torch.int64, device=device)
            self.starts = _starts(layers).to(device)
            self.before = _before(layers).to(device)
            self.sites = [_Site(layer) for layer in layers]
            self.shifts = self.before.to(device) - self.starts[:, None]
            self.places, self.shown = torch.zeros_like(self.shifts), torch.zeros_like(self.positions)
        self._program = recordable(plan.draft) if calls else plan.draft
        self._work: list[Tensor] = []
        self._calls = calls
        self._step: Captured[None] = Captured(device, "a draft step", calls=calls)

    def fits(self, plan: DecodePlan, bound: Bound, horizon: int) -> bool:
        """Whether this is a step of that plan, with those weights, and has room for so many tokens."""
        return self.plan is plan and horizon < self.drafted.shape[0] and _places(bound) == self._places

    def follows(self, layers: Sequence[DraftLayer]) -> bool:
        """Whether it is a step over their buffers, too; it then goes on from where regions and tails lie there now."""
        pairs = list(zip(self.sites, layers, strict=True))
        if all(site.layer is layer for site, layer in pairs):
            return True
        if not all(site.reads(layer) for site, layer in pairs):
            return False
        self.starts.copy_(_starts(layers))
        self.before.copy_(_before(layers))
        self.shifts.copy_(self.before - self.starts[:, None])
        for site, layer in pairs:
            site.follow(layer)
        return True

    def draft(
        self,
        tokens: Tensor,
        positions: Tensor,
        columns: Tensor,
        forced: Tensor,
        horizon: int,
        coming: Incoming | None = None,
    ) -> Tensor:
        """Greedy tokens [B, 1 + horizon] from tokens and positions [B, 1] at columns [B]; forced rows [B, 1] repeat.

        Transfers are no part of a recording: what the program's first step asks for is asked for before it.
        """
        for held, given in (
            (self.tokens, tokens),
            (self.first, tokens),
            (self.positions, positions),
            (self.columns, columns),
            (self.forced, forced),
        ):
            held.copy_(given)
        self.place.zero_()
        self.drafted[:1].copy_(tokens.t())
        for asked in (step for step in self.plan.draft.steps if step.act is Act.PREFETCH):
            if horizon and coming is not None:
                coming.prefetch(asked.layer)
        for _ in range(horizon):
            self._step(self._call if self._calls else self._launch)
        return self.drafted[: horizon + 1].t().contiguous()

    def _call(self) -> None:
        """As `_launch`, by nothing but calls that can be recorded."""
        begin_step(self.columns, self.shifts, self.positions, self.plan.position_limit, self.places, self.shown)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            site, held = self.plan.captured.sites[layer], self.sites[layer]
            place, newest = self.places[layer].unbind(0)
            write_rows(k, held.layer.keys, place)
            write_rows(v, held.layer.values, place)
            how = scores_of(site, sinks, 0, q.device) or PLAIN
            own = (held.layer.keys, held.layer.values, newest, held.lefts)
            return block_attention.attend_at(q, *own, site.scale, how, held.layer.reach, self._work)

        (token,) = execute(self._program, self.bound, self.tokens, self.shown, attend)
        ends = (self.tokens, self.drafted, self.place, self.positions, self.columns)
        end_step(token, self.forced, self.first, *ends)

    def _launch(self) -> None:
        limit = self.plan.position_limit
        positions = self.positions if limit is None else self.positions.clamp(max=limit - 1)
        tails = self.columns - self.starts  # [sites, B], as what follows: of all sites at once
        offsets, slots = self.before.unbind(1)
        lengths = list(zip(tails, tails + offsets, tails + slots, strict=True))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
            site, held = self.plan.captured.sites[layer], self.sites[layer]
            tail, place, newest = lengths[layer]
            held.layer.write_at(k, v, place)
            return held.attend(q, tail, newest, site.scale, scores_of(site, sinks, 0, q.device))

        (token,) = execute(self.plan.draft, self.bound, self.tokens, positions, attend)
        self.tokens.copy_(torch.where(self.forced, self.first, token))
        self.place += 1
        self.drafted.index_copy_(0, self.place, self.tokens.t())
        self.positions += 1
        self.columns += 1


class _Site:
    """One site's draft cache, with what its attention reads besides on the device."""

    def __init__(self, layer: DraftLayer) -> None:
        self.layer, self.regions = layer, _regions(layer)
        lefts, covered = self._bounds()
        self.lefts, self.covered = (x.to(layer.keys.device) for x in (lefts, covered))

    def reads(self, layer: DraftLayer) -> bool:
        """Whether what is launched for this site reads that draft cache too."""
        if self.layer is layer:
            return True
        if self.layer.keys is not layer.keys or self.layer.packed != layer.packed:
            return False
        return not layer.packed or (bool(self.regions) and _places_of(self.regions) == _places_of(_regions(layer)))

    def follow(self, layer: DraftLayer) -> None:
        """Go on over a draft cache that it `reads`."""
        self.layer, self.regions = layer, _regions(layer)
        for held, new in zip((self.lefts, self.covered), self._bounds(), strict=True):
            held.copy_(new)

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """The first slot of each row and KV head [B, K], and the tokens of each row's region [B]."""
        heads = self.layer.keys.shape[1]
        lefts = region_lefts(self.regions, heads) if self.regions else self.layer.lefts
        return torch.tensor(lefts), torch.tensor([region.covered for region in self.layer.regions])

    def attend(self, q: Tensor, tails: Tensor, newest: Tensor, scale: float, scores: Scores | None) -> Tensor:
        """q [B, H, 1, D] over region and tail, whose newest token is at place tails[b], in slot newest[b]. Returns
        [B, H, 1, E]."""
        layer = self.layer
        if launch.serves(q):
            how = {} if scores is None else scores._asdict()
            if self.regions:
                own = (self.lefts, scale, self.regions, self.covered)
                return draft_attention(q, layer.keys, layer.values, tails, *own, **how)
            return draft_attention(q, *layer.read_whole(), newest, self.lefts, scale, reach=layer.reach, **how)
        return attend_compressed(q, *layer.read_whole(), layer.visible((tails + 1).tolist()), scale, {}, scores)


def _regions(layer: DraftLayer) -> list[Region]:
    """Each row's region as a kernel reads it; none where one of them cannot be."""
    made = [region.packed for region in layer.regions] if layer.packed else []
    known = [region for region in made if region is not None]
    return known if len(known) == len(made) else []


def _places_of(regions: Sequence[Region]) -> list[tuple[int, int]]:
    """Where their numbers lie, and how much room there is."""
    sides = [side for region in regions for side in region]
    return [(part.data_ptr(), side.room) for side in sides for part in (side.codes, side.scale, side.zero_or_scale)]


def _starts(layers: Sequence[DraftLayer]) -> Tensor:
    """Columns at which tails start, [sites, B]."""
    return torch.tensor([layer.starts for layer in layers])


def _before(layers: Sequence[DraftLayer]) -> Tensor:
    """Columns of a buffer, and slots, that come before its tail, [sites, 2, 1]."""
    return torch.tensor([[[layer.offset], [layer.slots]] for layer in layers])


def _places(bound: Bound) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in bound]
