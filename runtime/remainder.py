"""What a region leaves out of full KV, set apart in host memory: all that a round has to bring of the region's tokens.

A method that drops tokens keeps the others as they were cached (`CompressedKV.as_cached`). Which ones is found by
comparing bits, so no method can say it wrong. On the device the two are put together in the order of the cache, so that
attention gives the same bits as over full KV that came whole. What a method says of its newest tokens
(`CompressedKV.exact`) is compared too.

Shapes: K KV heads, S tokens of a region, N slots of its fullest head, M tokens left out by its emptiest, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.kernels import launch
from vericache_compile.kernels.interleave import count_before, interleave, interleave_reference, take
from vericache_compile.plan import Site
from vericache_compile.runtime.pages import host_memory
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
    before: Tensor
    """`count_before(held)`, on the device."""
    firsts: Tensor
    """[2, K, 1] on the device: where in M tokens left out, and in N slots, a head's own begin."""
    counts: tuple[int, ...]
    """Tokens left out, per KV head; M is the most of them."""
    sides: tuple[Tensor, ...]
    """Keys, and values where they are held apart, in host memory: those of head 0 first, [sum(counts), D]."""

    @property
    def end(self) -> int:
        """The column after the region's last token."""
        return self.begin + self.held.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes allocated in host memory."""
        return sum(side.nbytes for side in self.sides)

    @property
    def most(self) -> int:
        """M: columns that `copy_to` writes."""
        return max(self.counts)

    def copy_to(self, link: Link, *targets: Tensor) -> Iterator[int]:
        """Copy each head's tokens to the last of the columns of the targets [K, M, *]; one head per step, as bytes."""
        for target, side in zip(targets[: len(self.sides)], self.sides, strict=True):
            for head, own in enumerate(torch.split(side, list(self.counts))):
                yield from link.copy(target[head : head + 1, self.most - len(own) :], own[None])

    def put_in_order(self, targets: Sequence[Tensor], came: Sequence[Tensor], region: CompressedKV) -> None:
        """Fill the targets [K, S, *], which are columns [begin, end), from what came (see `copy_to`) and the region."""
        count = len(self.sides)
        parts = (targets[:count], region.materialize()[:count], came[:count], self.held)
        if launch.serves(targets[0]):
            interleave(*parts, self.before, self.firsts)
        else:
            interleave_reference(*parts, self.firsts)


@dataclass(frozen=True)
class Newest:
    """So many of a region's last tokens that its last slots hold as they were cached."""

    count: int
    sure: Tensor
    """A bool on the device: whether that is true to the bit. If not, none of them counts."""


def check_newest(keys: Tensor, values: Tensor, region: CompressedKV) -> Newest | None:
    """What a region says of its newest tokens, which are the last of the keys [K, S, D] and values [K, S, E].

    None where it says nothing, or is kept packed. Not sure where it says more than there is. The host waits for
    nothing.
    """
    count = region.exact
    if not count or not isinstance(region, DenseKV):
        return None
    if not 0 < count <= min(region.slots, keys.shape[1]):
        return Newest(count, torch.zeros((), dtype=torch.bool, device=keys.device))
    pairs = zip((keys, values), region.materialize(), strict=True)
    same = [(_bits(full[:, -count:]) == _bits(own[:, -count:])).all() for full, own in pairs]
    return Newest(count, same[0] & same[1])


def set_apart(
    site: Site, keys: Tensor, values: Tensor, region: CompressedKV, begin: int, link: Link
) -> Remainder | None:
    """What a region leaves out of the keys [K, S, D] and values [K, S, E] that it was made of, from column `begin` on.

    None where it holds none of them as they were cached, or all of them (`exact`), or where a prompt's keys or values
    have another type than the cache (under autocast). The host waits for nothing.
    """
    own = region.as_cached
    if own is None or not sum(own) or region.exact == region.covered:
        return None
    if not keys.dtype is values.dtype is site.dtype:
        return None
    keys, values = keys[:, : region.covered], values[:, : region.covered]
    held, sure = find_held(keys, values, *region.materialize(), own)
    counts = tuple(region.covered - slots for slots in own)
    left = held.to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts)]
    sides = [take(side, left) for side in (keys, values)[: site.sides]]
    pinned = link.pinned(keys.device)
    made = tuple(host_memory((sum(counts), side.shape[2]), side.dtype, pinned, zeroed=False) for side in sides)
    with link.outgoing(*sides):
        for side, target in zip(sides, made, strict=True):
            for own_side, count, place in zip(side, counts, torch.split(target, list(counts)), strict=True):
                link.store(place[None], own_side[None, :count])
    return Remainder(begin, held, sure, count_before(held), _firsts(counts, own, keys.device), counts, made)


def carry_over(made: Remainder | None, before: CompressedKV, after: CompressedKV) -> Remainder | None:
    """What `before` left out, for `after`, which covers more: `sure` is whether that still begins with what the former
    held. The host waits for nothing."""
    if made is None:
        return None
    first, now = before.as_cached, after.as_cached
    if first is None or now is None or any(more < count for count, more in zip(first, now, strict=True)):
        return None
    sure = made.sure
    for old, new in zip(before.materialize(), after.materialize(), strict=True):
        for head, (count, more) in enumerate(zip(first, now, strict=True)):
            begins = new.shape[1] - more
            sure = sure & (_bits(old[head, old.shape[1] - count :]) == _bits(new[head, begins : begins + count])).all()
    return replace(made, sure=sure, firsts=_firsts(made.counts, now, made.held.device))


def find_held(
    keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, slots: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Which of keys [K, S, D] and values [K, S, E] lie, in their order, in the last slots[h] of each head's [K, N, *].

    [K, S] bool, and a bool that says whether it is so for each slot and to the bit. The host waits for nothing.
    """
    theirs, order = _marks(keys).sort(dim=1, stable=True)
    at = torch.searchsorted(theirs, _marks(own_keys)).clamp(max=keys.shape[1] - 1)
    where = order.take_along_dim(at, dim=1)
    firsts = _on(keys.device, [[own_keys.shape[1] - own] for own in slots])
    real = torch.arange(own_keys.shape[1], device=keys.device) >= firsts
    same = torch.ones_like(real)
    for full, own in ((keys, own_keys), (values, own_values)):
        same &= (_bits(take(full, where)) == _bits(own)).all(dim=-1)
    rising = where.diff(dim=1) > 0
    sure = (same | ~real).all() & (rising | ~real[:, :-1]).all()
    held = real.new_zeros(keys.shape[0], keys.shape[1] + 1)  # the last column takes what lies before a head's slots
    held.scatter_(1, where.masked_fill(~real, keys.shape[1]), True)
    return held[:, :-1].contiguous(), sure


def _firsts(counts: Sequence[int], slots: Sequence[int], device: torch.device) -> Tensor:
    most, fullest = max(counts), max(slots)
    pairs = [[[most - out] for out in counts], [[fullest - own] for own in slots]]
    return _on(device, pairs)


def _on(device: torch.device, values: Sequence[object]) -> Tensor:
    """Whole numbers on the device; the host waits for the copy only where its memory could not be pinned."""
    made = torch.tensor(values)
    held = host_memory(tuple(made.shape), made.dtype, device.type == "cuda", zeroed=False)
    return held.copy_(made).to(device, non_blocking=True)


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _marks(x: Tensor) -> Tensor:
    """A number per token [K, T] of x [K, T, D]; tokens with different numbers are different."""
    channels = _bits(x[..., :: max(x.shape[-1] // MARKS, 1)][..., :MARKS]).unbind(-1)
    made = channels[0].to(torch.int64)
    for channel in channels[1:]:
        made = made * 0x1E3779B97F4A7C15 + channel
    return made.contiguous()
