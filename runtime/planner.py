"""Where full KV should live and whether rounds pay, by arithmetic on bytes and bandwidths.

Pure functions: no machine is touched, so machines that are not there can be asked about.

Decoding is bound by reading memory: a step takes its bytes over the bandwidth, a transfer its bytes over the link's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Way, rounded
from vericache_compile.runtime.caches import room_for
from vericache_compile.runtime.compression import CHUNK

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """A device, its memory, and the link to where full KV may live instead."""

    device_bytes: float
    memory_gbps: float
    link_gbps: float


@dataclass(frozen=True)
class Load:
    """What is to be decoded: bytes of weights, and of KV per token of one sequence.

    Layers with a sliding window read that alone and hold every column: what is read and what is held are apart.
    """

    weights: float
    draft_weights: float
    """As draft reads them; those of the model itself count no second time in memory."""
    kv: float
    """Read by a step, on average over the context; so is `draft_kv`."""
    draft_kv: float
    held_kv: float
    site_kv: float
    """Of `held_kv` the largest site's."""
    context: int
    batch: int = 1
    window: int = 16
    tokens_per_round: float = 14.0
    reload: float = 1.0
    """Share of full KV of layers without a window that drafts do not hold as it was cached; where the ring is smaller
    than full KV no more than that comes over the link, and one site's is put together beside the ring."""
    sliding_kv: float = 0.0
    """Of `held_kv` that of layers with a window, which drafts hold: none of it comes over the link."""
    spare: float = 0.0
    """Bytes that a row's draft cache has room for besides."""
    repeated: int = 0
    """Columns that a repetition of the context takes besides, while there is no draft cache yet."""
    few: tuple[int, float] | None = None
    """Rows up to which `draft_weights` are others, where the batch has more, and what they are then."""

    copied: bool = True
    """Whether draft's own copies of weights take room besides: not where they are there already, or all room is for
    KV."""

    def of(self, batch: int) -> Load:
        """The same of fewer sequences."""
        weights = self.few[1] if self.few is not None and batch <= self.few[0] else self.draft_weights
        return replace(self, batch=batch, draft_weights=weights)

    @property
    def full(self) -> float:
        """Bytes of full KV of all rows that a step reads."""
        return self.batch * self.context * self.kv

    @property
    def brought(self) -> float:
        """Bytes of full KV of all rows that would come over the link, did drafts hold none."""
        return self.batch * self.context * (self.held_kv - self.sliding_kv)

    @property
    def columns(self) -> int:
        """Columns allocated of each row: for the context, the window that verify writes beyond, and as much again where
        one row may be ahead of another."""
        return room_for(self.context + (1 if self.batch == 1 else 2) * self.window)

    @property
    def full_held(self) -> float:
        """Bytes of memory for full KV of all rows."""
        return self.batch * self.columns * self.held_kv

    @property
    def columns_repeating(self) -> int:
        """Columns allocated of each row while the model repeats its context."""
        return room_for(self.context + self.repeated + self.window)

    @property
    def compressed(self) -> float:
        """Bytes of compressed KV of all rows."""
        return self.batch * self.context * self.draft_kv

    @property
    def compressed_held(self) -> float:
        """Bytes of memory for it and for the exact tail."""
        return self.compressed + self.batch * ((CHUNK + 2 * self.window) * self.held_kv + self.spare)

    @property
    def copies(self) -> float:
        """Bytes that draft's own copies of weights take besides."""
        return self.draft_weights if self.copied and self.draft_weights != self.weights else 0.0


@dataclass(frozen=True)
class Choice:
    """One way to decode."""

    name: str
    batch: int
    device_bytes: float
    fits: bool
    tokens_per_second: float
    """Over all rows."""
    staging_bytes: float
    arithmetic: tuple[str, ...]
    """Where the figures come from, line by line."""


def choices(load: Load, machine: Machine, staging_bytes: float | None = None) -> list[Choice]:
    """All ways to decode this load here, each with its arithmetic.

    For the batch as it is and, where that does not fit, for the largest one that does.
    """
    ways: tuple[Callable[[Load], Choice], ...] = (
        partial(_plain, machine=machine),
        partial(_resident, machine=machine),
        partial(_swapped, machine=machine, staging_bytes=staging_bytes),
    )
    made = [way(load) for way in ways]
    for way, each in zip(ways, tuple(made), strict=True):
        fitting = 0 if each.fits else bisect_left(range(1, load.batch), True, key=lambda b: not way(load.of(b)).fits)
        if fitting:
            made.append(replace(way(load.of(fitting)), name=f"{each.name}, smaller batch"))
    return made


def choose(made: Sequence[Choice]) -> Choice | None:
    """The fastest way that fits; None where none does."""
    return max((each for each in made if each.fits), key=lambda each: each.tokens_per_second, default=None)


def ring_bytes(step_bytes: float, window: int, machine: Machine) -> float:
    """Bytes that can come over the link while a round drafts, each step reading so many: a larger ring would not be
    filled in time."""
    return (window - 1) * step_bytes / machine.memory_gbps * machine.link_gbps


def _plain(load: Load, machine: Machine) -> Choice:
    step = (load.weights + load.full) / machine.memory_gbps / GB
    lines = (
        f"step = (weights {_gb(load.weights)} + full KV {_gb(load.full)}) / {machine.memory_gbps:g} GB/s = {_ms(step)}",
    )
    return _choice(Way.OFF, load, machine, load.weights + load.full_held, load.batch / step, 0.0, lines)


def _rounds(load: Load, machine: Machine) -> tuple[float, float, tuple[str, ...]]:
    """Seconds of a round's draft and verify, and how they come about."""
    draft = (load.window - 1) * (load.draft_weights + load.compressed) / machine.memory_gbps / GB
    verify = (load.weights + load.full) / machine.memory_gbps / GB
    return (
        draft,
        verify,
        (
            f"draft = {load.window - 1} x (weights {_gb(load.draft_weights)} + compressed KV {_gb(load.compressed)}) / "
            f"{machine.memory_gbps:g} GB/s = {_ms(draft)}",
            f"verify = (weights {_gb(load.weights)} + full KV {_gb(load.full)}) / "
            f"{machine.memory_gbps:g} GB/s = {_ms(verify)}",
        ),
    )


def _resident(load: Load, machine: Machine) -> Choice:
    draft, verify, lines = _rounds(load, machine)
    repeating = load.batch * load.columns_repeating * load.held_kv
    needed = load.weights + load.copies + max(load.full_held + load.compressed_held, repeating)
    rate = load.batch * load.tokens_per_round / (draft + verify)
    lines += (f"round = draft + verify = {_ms(draft + verify)} for {load.tokens_per_round:g} tokens of each row",)
    return _choice(Way.RESIDENT, load, machine, needed, rate, 0.0, lines)


def _swapped(load: Load, machine: Machine, staging_bytes: float | None) -> Choice:
    draft, verify, lines = _rounds(load, machine)
    slot = load.batch * load.columns * load.site_kv
    wanted = known = staging_bytes
    if known is None or wanted is None:
        left = max(machine.device_bytes - load.weights - load.copies - load.compressed_held, 0)
        known = min(ring_bytes(load.draft_weights, load.window, machine), left)
        wanted = min(known + rounded(int(ring_bytes(load.compressed_held, load.window, machine))), left)
    apart = known < load.batch * load.context * load.held_kv and load.reload < 1
    share = load.reload if apart else 1.0
    whole = slot if apart or load.sliding_kv else 0.0
    comes = share * load.brought if apart else load.full_held - load.batch * load.columns * load.sliding_kv
    comes += load.batch * BLOCK * load.sliding_kv  # a window begins within a block
    held = max(min(wanted - whole, rounded(int(comes))), min(share * slot, comes))
    ring, first = held + whole, min(held, share * load.brought)
    early, late = (size / machine.link_gbps / GB for size in (first, share * load.brought - first))
    total = max(draft, early) + max(verify, late)
    repeating = load.batch * load.columns_repeating * load.site_kv
    needed = load.weights + load.copies + max(load.compressed_held + ring, repeating)
    part = "" if share == 1 else f"{share:.0%} of "
    lines += (
        f"transfer = {part}full KV {_gb(load.brought)} / {machine.link_gbps:g} GB/s = {_ms(early + late)}, "
        f"of which the ring of {_gb(ring)} lets {_ms(early)} go on under draft",
        f"round = max(draft, {_ms(early)}) + max(verify, {_ms(late)}) = {_ms(total)} for {load.tokens_per_round:g} "
        "tokens of each row",
    )
    return _choice(Way.SWAPPED, load, machine, needed, load.batch * load.tokens_per_round / total, ring, lines)


def _choice(
    name: str, load: Load, machine: Machine, needed: float, rate: float, ring: float, lines: tuple[str, ...]
) -> Choice:
    fits = needed <= machine.device_bytes
    memory = f"memory = {_gb(needed)} of {_gb(machine.device_bytes)}" + ("" if fits else ": does not fit")
    return Choice(name, load.batch, needed, fits, rate, ring, (*lines, memory))


def _gb(count: float) -> str:
    return f"{count / GB:.3g} GB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
