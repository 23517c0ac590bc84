"""Where full KV should live and whether rounds pay, by arithmetic on bytes and bandwidths.

Pure functions: no machine is touched, so machines that are not there can be asked about.

Decoding is bound by reading memory: a step takes its bytes over the bandwidth, a transfer its bytes over the link's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vericache_compile.kernels.block_attention import BLOCK
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
    """What is to be decoded: bytes of weights, and of KV per token of one sequence."""

    weights: float
    draft_weights: float
    """As draft reads them; those of the model itself count no second time in memory."""
    kv: float
    draft_kv: float
    sites: int
    context: int
    batch: int = 1
    window: int = 16
    tokens_per_round: float = 14.0
    reload: float = 1.0
    """Share of full KV that drafts do not hold as it was cached; where the ring is smaller than full KV no more than
    that comes over the link, and one site's is put together beside the ring."""

    @property
    def full(self) -> float:
        """Bytes of full KV of all rows."""
        return self.batch * self.context * self.kv

    @property
    def full_held(self) -> float:
        """Bytes of memory for it: in whole blocks, with half of one to spare."""
        return self.batch * -(-(self.context + BLOCK // 2) // BLOCK) * BLOCK * self.kv

    @property
    def compressed(self) -> float:
        """Bytes of compressed KV of all rows."""
        return self.batch * self.context * self.draft_kv

    @property
    def compressed_held(self) -> float:
        """Bytes of memory for it and for the exact tail."""
        return self.compressed + self.batch * (CHUNK + 2 * self.window) * self.kv

    @property
    def copies(self) -> float:
        """Bytes that draft's own copies of weights take."""
        return self.draft_weights if self.draft_weights != self.weights else 0.0


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


PLAIN, RESIDENT, SWAPPED = "off (plain decoding)", "resident verify", "swapped verify"


def choices(load: Load, machine: Machine, staging_bytes: float | None = None) -> list[Choice]:
    """All ways to decode this load here, each with its arithmetic.

    For the batch as it is and, where full KV of it does not fit, for the largest one that does.
    """
    made = [_plain(load, machine), _resident(load, machine), _swapped(load, machine, staging_bytes)]
    fixed = load.weights + load.copies
    for each in made[:2]:
        per_row = (each.device_bytes - (fixed if each.name == RESIDENT else load.weights)) / load.batch
        room = int((machine.device_bytes - (each.device_bytes - per_row * load.batch)) / per_row)
        if not each.fits and 0 < room < load.batch:
            smaller = replace(load, batch=room)
            build = _plain if each.name == PLAIN else _resident
            made.append(replace(build(smaller, machine), name=f"{each.name}, smaller batch"))
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
    return _choice(PLAIN, load, machine, load.weights + load.full, load.batch / step, 0.0, lines)


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
    needed = load.weights + load.copies + load.full_held + load.compressed_held
    rate = load.batch * load.tokens_per_round / (draft + verify)
    lines += (f"round = draft + verify = {_ms(draft + verify)} for {load.tokens_per_round:g} tokens of each row",)
    return _choice(RESIDENT, load, machine, needed, rate, 0.0, lines)


def _swapped(load: Load, machine: Machine, staging_bytes: float | None) -> Choice:
    draft, verify, lines = _rounds(load, machine)
    slot = load.full_held / load.sites
    known, wanted = (
        ring_bytes(nbytes, load.window, machine) if staging_bytes is None else staging_bytes
        for nbytes in (load.draft_weights, load.draft_weights + load.compressed)
    )
    share, whole = (load.reload, slot) if known < load.full and load.reload < 1 else (1.0, 0.0)
    held = min(max(wanted - whole, share * slot), share * load.full_held)
    ring, first = held + whole, min(held, share * load.full)
    early, late = (size / machine.link_gbps / GB for size in (first, share * load.full - first))
    total = max(draft, early) + max(verify, late)
    needed = load.weights + load.copies + load.compressed_held + ring
    lines += (
        f"transfer = {'' if share == 1 else f'{share:.0%} of '}full KV {_gb(load.full)} / {machine.link_gbps:g} GB/s = "
        f"{_ms(early + late)}, of which the ring of {_gb(ring)} lets {_ms(early)} go on under draft",
        f"round = max(draft, {_ms(early)}) + max(verify, {_ms(late)}) = {_ms(total)} for {load.tokens_per_round:g} "
        "tokens of each row",
    )
    return _choice(SWAPPED, load, machine, needed, load.batch * load.tokens_per_round / total, ring, lines)


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
