"""What a region leaves out of full KV, set apart in host memory: all that a round has to bring of the region's tokens.

A method that drops tokens keeps the others as they were cached. Which ones it keeps is found by comparing bits: no
method has to say it, and none can say it wrong. On the device the two are put together in the order of the cache, so
that attention gives the same bits as over full KV that came whole.

Shapes: K KV heads, S tokens of a region, N slots of its fullest head, M tokens left out by its emptiest, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV
from vericache_compile.plan import Site
from vericache_compile.runtime.pages import host_zeros
from vericache_compile.runtime.transfers import Link

MARKS = 8
"""Channels that tokens are told apart by before all bits are compared."""


@dataclass(frozen=True)
class Remainder:
    """Of one row of one site: the tokens of columns [begin, end) that its region does not hold."""

    begin: int
    held: Tensor
    """[K, S] bool, on the device: whether the region holds a token."""
    sure: Tensor
    """A bool on the device: whether `held` is true to the bit. If not, all of this is of no use."""
    counts: tuple[int, ...]
    """Tokens left out, per KV head."""
    sides: tuple[Tensor, ...]
    """Keys, and values where they are held apart, in host memory: those of head 0 first, [sum(counts), D]."""

    @property
    def end(self) -> int:
        """The column after the region's last token."""
        return self.begin + self.held.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated, nearly all in host memory."""
        return self.held.nbytes + sum(side.nbytes for side in self.sides)

    def copy_to(self, link: Link, *targets: Tensor) -> Iterator[int]:
        """Copy each head's tokens to the columns before `end` of the targets [K, C, *]; one head per step, as bytes."""
        for target, side in zip(targets[: len(self.sides)], self.sides, strict=True):
            for head, own in enumerate(torch.split(side, list(self.counts))):
                yield from link.copy(target[head : head + 1, self.end - len(own) : self.end], own[None])

    def put_in_order(self, targets: Sequence[Tensor], region: CompressedKV) -> None:
        """Columns [begin, end) of the targets [K, C, *], from the last of them (see `copy_to`) and the region."""
        slots = region.as_cached
        assert slots is not None, "whoever holds no tokens as they were cached leaves out nothing"
        most, fullest = max(self.counts), region.slots
        firsts = [[most - out, most + fullest - own] for out, own in zip(self.counts, slots, strict=True)]
        out, own = torch.tensor(firsts, device=self.held.device).t().unsqueeze(-1)
        kept = self.held.cumsum(dim=1)  # of a token that is held, itself and those before it
        left = torch.arange(self.held.shape[1], device=self.held.device) - kept
        order = torch.where(self.held, own + kept - 1, out + left).unsqueeze(-1)
        for target, part, _ in zip(targets, region.materialize(), self.sides, strict=False):
            both = torch.cat([target[:, self.end - most : self.end], part], dim=1)
            target[:, self.begin : self.end] = both.take_along_dim(order, dim=1)


def set_apart(
    site: Site, keys: Tensor, values: Tensor, region: CompressedKV, begin: int, link: Link
) -> Remainder | None:
    """What a region leaves out of the keys [K, S, D] and values [K, S, E] that it was made of, from column `begin` on.

    None where it holds none of them as they were cached, or all of them (`exact`). The host waits for nothing.
    """
    own = region.as_cached
    if own is None or not sum(own) or region.exact == region.covered:
        return None
    keys, values = keys[:, : region.covered], values[:, : region.covered]
    held, sure = find_held(keys, values, *region.materialize(), own)
    counts = tuple(region.covered - slots for slots in own)
    left = held.to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts), None]
    sides = [side.take_along_dim(left, dim=1) for side in (keys, values)[: site.sides]]
    made = tuple(host_zeros((sum(counts), side.shape[2]), side.dtype, link.pinned(keys.device)) for side in sides)
    with link.outgoing(*sides):
        for side, target in zip(sides, made, strict=True):
            for own_side, count, place in zip(side, counts, torch.split(target, list(counts)), strict=True):
                link.store(place[None], own_side[None, :count])
    return Remainder(begin, held, sure, counts, made)


def carry_over(made: Remainder | None, before: CompressedKV, after: CompressedKV) -> Remainder | None:
    """What `before` left out, where `after`, which covers more, still begins with what that held; else None."""
    if made is None:
        return None
    first, now = before.as_cached, after.as_cached
    if first is None or now is None:
        return None
    pairs = zip(before.materialize(), after.materialize(), strict=True)
    same = [
        torch.equal(_bits(old[head, -count:]), _bits(new[head, new.shape[1] - more :][:count]))
        for old, new in pairs
        for head, (count, more) in enumerate(zip(first, now, strict=True))
        if count
    ]
    return made if all(same) else None


def find_held(
    keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, slots: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Which of keys [K, S, D] and values [K, S, E] lie, in their order, in the last slots[h] of each head's [K, N, *].

    [K, S] bool, and a bool that says whether it is so for each slot and to the bit. Nothing is waited for.
    """
    theirs, order = _marks(keys).sort(dim=1, stable=True)
    at = torch.searchsorted(theirs, _marks(own_keys)).clamp(max=keys.shape[1] - 1)
    where = order.take_along_dim(at, dim=1)
    firsts = torch.tensor(slots, device=keys.device).neg().add(own_keys.shape[1])
    real = torch.arange(own_keys.shape[1], device=keys.device) >= firsts[:, None]
    same = torch.ones_like(real)
    for full, own in ((keys, own_keys), (values, own_values)):
        same &= (_bits(full).take_along_dim(where.unsqueeze(-1), dim=1) == _bits(own)).all(dim=-1)
    rising = where.diff(dim=1) > 0
    sure = (same | ~real).all() & (rising | ~real[:, :-1]).all()
    held = real.new_zeros(keys.shape[0], keys.shape[1] + 1)  # the last column takes what lies before a head's slots
    held.scatter_(1, where.masked_fill(~real, keys.shape[1]), True)
    return held[:, :-1].contiguous(), sure


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _marks(x: Tensor) -> Tensor:
    """A number per token [K, T] of x [K, T, D]; tokens with different numbers are different."""
    some = _bits(x[..., :: max(x.shape[-1] // MARKS, 1)][..., :MARKS]).to(torch.int64)
    weights = [pow(0x9E3779B97F4A7C15, i + 1, 1 << 62) for i in range(some.shape[-1])]
    return (some * torch.tensor(weights, device=x.device)).sum(dim=-1)
