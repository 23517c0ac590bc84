"""The contract: all that compile time hands to run time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile.kernels.int8_linear import quantize

FEW = 16
"""Up to how many rows of draft read int8 copies of weights."""
Compiled = Callable[[list[Tensor]], Sequence[Tensor]]
"""A compiled segment."""


class Output(StrEnum):
    """What one output of a captured graph is."""

    LOGITS = "logits"
    ROWS = "rows"
    KEYS = "keys"
    VALUES = "values"
    LENGTH = "length"
    """The past length that the caller counts, grown by this call's tokens: an integer."""
    BATCH = "batch"
    """How many rows this call has: an integer, which a cache may note as it is first filled."""


@dataclass(frozen=True)
class Alibi:
    """Attention with linear biases (arXiv 2108.12409): slope[h] * place of the key, added to the scores of head h."""

    slopes: tuple[float, ...]
    """[H]; a constant factor of the model's own (the attention scale, say) included."""
    dtype: torch.dtype
    """The type in which slope and place are multiplied: large places are rounded in a small one."""
    relative: bool
    """Whether a place is counted back from the query (0, -1, ...) or on from the row's first token (0, 1, ...)."""


@dataclass(frozen=True)
class Site:
    """One attention call, in graph order."""

    layer: int
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    scale: float
    dtype: torch.dtype
    past: tuple[int, int] | None
    """Graph inputs that carry this site's cached keys and values; None where the cache is still empty."""
    soft_cap: float | None = None
    """Scores s become soft_cap * tanh(s / soft_cap), before anything is added to them."""
    sinks: bool = False
    """Whether each head has a learned score more in its softmax, that no value belongs to."""
    alibi: Alibi | None = None
    window: int | None = None
    """Columns that a token attends to, its own included; None for all. Proved of decode steps only."""
    recent: int | None = None
    """Newest past columns that this call may find in the cache tensors of a sliding layer; None where all are there."""
    kept: int | None = None
    """Newest columns that the returned cache tensors are cut to; None where they are not cut."""
    in_place: bool = False
    """Whether the cache tensors have room for every column, and are written in place."""
    latent: bool = False
    """Multi-head latent attention (arXiv 2405.04434): the one key that all heads share is [latent, rotated part], and
    its value is the latent, which is held once. The caller's cache tensors are the latent and the rotated part."""

    @property
    def cached_sizes(self) -> tuple[int, int]:
        """Numbers per head and column of the caller's two cache tensors."""
        return (self.value_size, self.head_size - self.value_size) if self.latent else (self.head_size, self.value_size)

    @property
    def sides(self) -> int:
        """How many tensors hold a site's keys and values: 1 where values are a part of the keys, else 2."""
        return 1 if self.latent else 2

    def attended(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [..., D] and values [..., E] of what the caller's cache tensors hold, side by side."""
        return (torch.cat([first, second], dim=-1), first) if self.latent else (first, second)

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What the caller's cache tensors hold of keys [..., D] and values [..., E]: views."""
        return (values, keys[..., self.value_size :]) if self.latent else (keys, values)

    @property
    def shape(self) -> tuple[int, int, int]:
        """KV heads, head size, value head size: alike where one site can read another's cache."""
        return self.kv_heads, self.head_size, self.value_size

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the scale is done to the products of queries and keys."""
        return self.soft_cap is None and not self.sinks and self.alibi is None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of full KV that one token of one sequence takes at this site."""
        return self.kv_heads * sum(self.cached_sizes) * self.dtype.itemsize

    def columns_read(self, tokens: int) -> int:
        """Of so many cached tokens those that a step reads at this site."""
        return tokens if self.window is None else min(tokens, self.window)


class Tier(StrEnum):
    """Where full KV lives."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


class Way(StrEnum):
    """How a sequence is decoded."""

    OFF = "off (plain decoding)"
    """Full KV in device memory, and no drafts."""
    RESIDENT = "resident verify"
    """Full KV in device memory."""
    SWAPPED = "swapped verify"
    """Full KV comes in from elsewhere for each round."""


@dataclass(frozen=True)
class Arrangement:
    """How a sequence is decoded, and what it may take of device memory beside full KV."""

    way: Way
    draft_bytes: float = 0.0
    """Of its draft cache, by estimate."""
    ring_bytes: float | None = None
    """The most that the ring may take; None: as much as pays."""
    by: tuple[Tier | None, int | None] | None = None
    """Whose choice it was (`Home.key`)."""


@dataclass(frozen=True)
class Staging:
    """Device memory for full KV that comes in. Schedules count it in slots, each for one site's full KV of all rows."""

    nbytes: int
    """What it may take; it never has less than the largest site needs."""
    columns: int
    """Columns of a slot."""
    per_draft_byte: float = 0.0
    """What it may take besides, per byte of draft's KV: the longer a round drafts, the more comes meanwhile."""

    most: float | None = None
    """What it may take at all."""

    def bytes_beside(self, draft_bytes: int, seen: int = 0) -> int:
        """What it may take beside so many bytes of draft's KV: no less than what was `seen` to come while a round
        drafted, unless its size was given."""
        wanted = self.nbytes + rounded(int(self.per_draft_byte * draft_bytes))
        wanted = max(wanted, seen) if self.per_draft_byte else wanted
        return wanted if self.most is None else min(wanted, int(self.most))

    def slot_bytes(self, sites: Sequence[Site], batch: int) -> int:
        """Bytes of a slot: the largest site's full KV."""
        return batch * self.columns * max(site.bytes_per_token for site in sites)

    def slots(self, sites: Sequence[Site], batch: int) -> int:
        """As many as there is room for, at least one, at most one per site."""
        return min(max(self.nbytes // max(self.slot_bytes(sites, batch), 1), 1), len(sites))


def rounded(nbytes: int) -> int:
    """Up to a sixteenth more, so that what grows a little every round seldom asks for other memory."""
    step = 1 << max(nbytes.bit_length() - 5, 0)
    return -(-nbytes // step) * step


@dataclass(frozen=True)
class Roles:
    """Which graph input is what (indices into the captured graph's inputs)."""

    batch: int
    tokens_per_call: int | None
    """T; None when it is symbolic."""
    tokens: int
    positions: int | None
    """Input with explicit positions; None when the graph derives them from the past length."""
    mask: int | None
    """The two-dimensional padding mask [B, past + T], when there is one."""
    weights: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    """Integer inputs that hold the past length, as caches count it whose tensors do not show it."""
    counters: tuple[int, ...] = ()
    """Inputs (int64, one element) that hold the past length of caches written in place."""
    counted: tuple[int, ...] = ()
    """Those of them that a call counts up in place; the caller sets the others."""
    shown: int | None = None
    """Input that holds the whole mask [B, 1, T, C] of caches written in place."""


@dataclass(frozen=True)
class OutputRole:
    """What an output is; for a cache tensor the site it belongs to, for a length the input that it continues (-1: none,
    as nothing was cached)."""

    kind: Output
    layer: int = -1
    source: int = -1


@dataclass(frozen=True)
class Rope:
    """How a site's keys are rotated by position, as the captured graph computes it.

    `module(x, positions, *weights)` gives keys [B, K, 1, D], in any order of the first three axes, from what they are
    before, of as many elements; positions [B, 1].
    """

    module: GraphModule
    weights: tuple[int, ...]
    """Captured graph inputs that it reads."""


@dataclass(frozen=True)
class CapturedPlan:
    """A graph run as captured, on real KV, with every new key and value handed to the store.

    `module(store, *inputs)` reads cached keys and values by `store.past(layer, side)`, calls
    `store.append(layer, q, k, v)` at each site, and returns the row outputs only.
    """

    module: GraphModule
    unpadded: GraphModule | None
    """The same for calls in which no row is padded, masked by `is_causal` where that says as much as the graph's masks;
    None where it would be the same module."""
    roles: Roles
    sites: tuple[Site, ...]
    outputs: tuple[OutputRole, ...]
    attends_to_past: bool
    staging: Staging | None = None
    """Device memory for full KV that comes in from outside the device; None where it is on the device for good."""

    @property
    def in_place(self) -> bool:
        """Whether caches are written in place: `module(*inputs)` is then the graph itself, and returns all outputs."""
        return any(site.in_place for site in self.sites)


@dataclass(frozen=True)
class Cast:
    """How draft reads a weight: in a copy of lower precision, made once by the runtime."""

    dtype: torch.dtype
    turned: bool = False
    """Whether the weight lies as [in, out]; its copy always lies as [out, in]."""
    scale: bool = False
    """int8: whether this input is the scales rather than the codes."""

    def copies(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A copy in a smaller floating type; or int8 codes and their scales, see `int8_linear.quantize`."""
        own = weight.t() if self.turned else weight
        return (own.to(self.dtype).contiguous(),) if self.dtype.is_floating_point else quantize(own)


class Act(StrEnum):
    """What a step of a segmented program does."""

    RUN = "run"
    """a compiled segment"""
    ATTEND = "attend"
    """one site's attention: reads q, k, v and, where it was waited for, that site's full keys and values"""
    PREFETCH = "prefetch"
    """ask for one site's full KV"""
    WAIT = "wait"
    """one side of one site's full KV, once it is there"""


@dataclass(frozen=True)
class Step:
    """One step of a segmented program."""

    act: Act
    run: Compiled | None
    """The compiled segment of a RUN step."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]
    """Slots that nobody reads after this step."""
    layer: int = -1
    side: int = 0
    """What a WAIT step brings: 0 keys, 1 values."""


@dataclass(frozen=True)
class SegmentedProgram:
    """A program cut at its attention sites and transfers; values live in numbered slots."""

    mode: str
    steps: tuple[Step, ...]
    slots: int
    tokens: int
    """Slot of the tokens: [B, 1] for draft, [W, B, 1] for verify (int64)."""
    positions: int
    """Slot of the positions, shaped as the tokens."""
    weights: tuple[tuple[int, int, Cast | None], ...]
    """(slot, captured graph input, how to read it or None for as it is)."""
    outputs: tuple[int, ...]
    """Slots of the row outputs, in captured order, then (draft only) of the next token [B, 1]."""
    distinct: int
    """Distinct compiled segments."""
    waits_for_host: bool = False
    """Whether a segment reads numbers back to the host (`vericache.experts_mm`): it cannot be recorded on a GPU."""


@dataclass(frozen=True)
class DecodePlan:
    """Everything needed to run rounds for one captured decode graph."""

    captured: CapturedPlan
    draft: SegmentedProgram
    verify: SegmentedProgram
    window: int
    logits: int
    """Which row output holds the logits."""
    position_rule: str
    """given | column | unpadded: where a token's position comes from."""
    position_limit: int | None
    """First position that the model cannot embed; None where there is no such limit."""
    rotations: tuple[Rope | None, ...] = ()
    """Per site; None where keys are not rotated, or where it is not known how."""
    column_limit: int | None = None
    """First column at which another graph was or will be captured, or the model's own mask fails; None where there is
    no such column."""
    in_step: bool = False
    """Whether all rows of a batch are given one position, so that they can only advance together."""
