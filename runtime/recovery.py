"""Compute a sequence's full KV again from its tokens, after a page of it was lost.

Calls that ran as captured run again as they did; what rounds verified is verified again, whole windows at a time. Rows
do not depend on where they stand in a window, so the bits come out as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from vericache_compile.errors import PageLost
from vericache_compile.plan import CapturedPlan
from vericache_compile.runtime.caches import zeros_for
from vericache_compile.runtime.sequences import Sequence

log = logging.getLogger(__name__)


Version = tuple[tuple[int, int], ...]
"""Where each tensor lies, and autograd's version counter of it."""


def version_of(inputs: Rows[Any], watched: Iterable[int]) -> Version:
    """Of some of a call's inputs, its weights say."""
    held = (inputs[i] for i in watched)
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in held)


class Known(NamedTuple):
    """What gives back the rounds of a row after a call."""

    pad: int
    offset: int
    begin: int
    """Where that call ended."""
    length: int
    ids: list[int]
    """Tokens from there on."""


class Masks:
    """Copies of masks [B, C] of one call after another: those that go on from the one before share a buffer with it."""

    def __init__(self) -> None:
        self._buffer = self._longest = torch.empty(0, 0)

    def copy(self, mask: Tensor) -> Tensor:
        """A view [B, C] that is never written to again."""
        held, columns = self._longest, mask.shape[1]
        common = min(held.shape[1], columns)
        typed = (held.dtype, held.device) == (mask.dtype, mask.device)
        alike = typed and torch.equal(held[:, :common], mask[:, :common])
        if alike and common == columns:
            return held[:, :columns]
        if not alike or columns > self._buffer.shape[1]:
            self._buffer, common = zeros_for((mask.shape[0], 2 * columns), mask), 0
        self._buffer[:, common:columns] = mask[:, common:]
        self._longest = self._buffer[:, :columns]
        return self._longest


@dataclass(frozen=True)
class Call:
    """One call that ran as captured: `count` columns from `column` on."""

    plan: CapturedPlan
    module: GraphModule
    """That of the plan's which ran."""
    inputs: list[Any]
    """Cache tensors as shapes without data; the mask a part of `masks`."""
    masks: Masks
    """Shared with the calls before."""
    column: int
    count: int
    """Those of its columns that still stand: fewer where the cache was cropped into it."""
    watched: tuple[int, ...]
    """Inputs that are the caller's, weights and what is large: they must not have changed."""
    version: Version
    """Of these, when it ran."""
    before: tuple[Known, ...]
    """The rows of its batch, as it found them."""
    origin: tuple[int, ...]
    """Of the batch of the call before, the rows that these go on from."""

    @property
    def given(self) -> list[Any]:
        """The inputs to run it with: a mask side by side."""
        return [x.contiguous() if i == self.plan.roles.mask else x for i, x in enumerate(self.inputs)]


def record(
    sequence: Sequence, plan: CapturedPlan, module: GraphModule, inputs: Rows[Any], column: int, count: int
) -> None:
    """Remember a call, so that it can run again: with its own copy of tokens and the like, which the caller may write
    to later, and of all whose changes nobody counts."""
    past = {index for site in plan.sites for index in site.past or ()}
    weights, watched, kept = set(plan.roles.weights), [], list(inputs)
    masks = sequence.calls[-1].masks if sequence.calls else Masks()
    for index, value in enumerate(inputs):
        if index in past:
            kept[index] = value.new_zeros(()).expand(value.shape)
        elif index == plan.roles.mask:
            kept[index] = masks.copy(value)
        elif isinstance(value, Tensor):
            small = value.dim() <= 2 and not value.is_floating_point()
            if index in weights or not (small or value.is_inference()):
                watched.append(index)
            else:
                kept[index] = value.clone()
    sequence.cut_calls(column)
    before, batch = _known(sequence, column), len(sequence.rows)
    origin = tuple(sequence.origin if sequence.calls else range(batch))
    version = version_of(kept, watched)
    sequence.calls.append(Call(plan, module, kept, masks, column, count, tuple(watched), version, before, origin))
    sequence.origin = range(batch)


def _known(sequence: Sequence, column: int) -> tuple[Known, ...]:
    """Of its rows, up to a column at most."""
    begin = sequence.calls_end
    return tuple(
        Known(row.pad, row.offset, begin, min(row.length, column), row.ids[begin:column]) for row in sequence.rows
    )


def recover(
    sequence: Sequence,
    lost: PageLost,
    replica: Sequence,
    run_call: Callable[[Sequence, Call], None],
    verify: Callable[[Sequence, Tensor], None],
) -> None:
    """Fill `replica`'s full KV, and give it to the sequence; raises `lost` where the tokens are not known.

    The replica has the batch of the first call, and its rows go the way that the sequence's went. `run_call` runs a
    recorded call on it; `verify` runs a round in which these tokens [B, n] stand for what would have been drafted.
    """
    calls = sequence.calls
    last = _known(sequence, max(row.length for row in sequence.rows))
    if not calls or calls[0].column:
        raise lost
    for rows in (*(call.before for call in calls), last):
        if any(row.length > row.begin + len(row.ids) for row in rows):
            raise lost
        if any(row.length > row.begin for row in rows) and (replica.decode is None or len(rows) != len(last)):
            raise lost  # the graphs of rounds may be those of another batch
    if any(call.version != version_of(call.inputs, call.watched) for call in sequence.calls):
        raise lost  # KV is the old weights'
    log.warning(
        "vericache: full KV is computed again from its tokens: %s\n  where: %s\n  fix: check the disk; until the "
        "sequence ends its full KV stays in host memory",
        lost.found,
        lost.where,
    )
    for call in calls:
        replica = _arranged(replica, call.origin)
        _verify_up_to(call.before, replica, verify)
        run_call(replica, call)
        for row in replica.rows:
            row.length = call.column + call.count
    replica = _arranged(replica, sequence.origin)
    _verify_up_to(last, replica, verify)
    sequence.full, sequence.draft, sequence.early = replica.full, None, None


def _arranged(replica: Sequence, origin: Rows[int]) -> Sequence:
    """A sequence of these of its rows."""
    if list(origin) == list(range(len(replica.rows))):
        return replica
    made = replica.fork(replica.number, origin, max(row.length for row in replica.rows))
    made.decode = replica.decode
    return made


def _verify_up_to(rows: Rows[Known], replica: Sequence, verify: Callable[[Sequence, Tensor], None]) -> None:
    """Verify the tokens of all rows, up to where they end."""
    ends = [row.length for row in rows]
    for row, known in zip(replica.rows, rows, strict=True):
        row.pad, row.offset, row.length = known.pad, known.offset, min(row.length, known.length)
    while any(row.length < end for row, end in zip(replica.rows, ends, strict=True)):
        ahead = []
        for row, known, end in zip(replica.rows, rows, ends, strict=True):
            own = known.ids[row.length - known.begin : end - known.begin]
            row.token = own[0] if own else None
            ahead.append(own)
        longest = max(map(len, ahead))
        verify(replica, torch.tensor([own + [0] * (longest - len(own)) for own in ahead]))
        for row, end in zip(replica.rows, ends, strict=True):
            row.held.clear()
            row.length = min(row.length, end)
