"""Caches that the caller keeps in buffers of a fixed size: their data stays with the caller, and rounds work on a copy.

Ghosts are not needed there, nor possible: the buffers are the caller's own memory and always hold what plain decoding
would have put there. A mirror is our copy. It stands for the buffers as long as they are the same tensors, and nobody
but us has changed them in place since (autograd counts that); else it is made anew from them.

Shapes: B batch, K KV heads, C columns of a buffer, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vericache_compile.plan import CapturedPlan
from vericache_compile.runtime.sequence_table import SequenceTable, copy_in
from vericache_compile.runtime.sequences import Sequence

Stamps = tuple[tuple[object, ...], ...]


@dataclass
class Mirror:
    """A sequence that copies what buffers hold, and how these looked when it last did."""

    sequence: Sequence
    stamps: Stamps
    columns: int
    """Columns from the first on that both hold: what the caller has fed, not what was computed ahead."""


def find_mirror(table: SequenceTable, plan: CapturedPlan, inputs: Rows[Any], columns: int) -> Mirror:
    """The mirror of a call's buffers [B, K, C, D], of which `columns` are filled; copied anew where they changed."""
    buffers = _buffers(plan, inputs)
    pointer = buffers[0].data_ptr()
    found = table.mirrors.get(pointer)
    if found is None:
        weakref.finalize(buffers[0].untyped_storage(), table.mirrors.pop, pointer, None)
    if found is None or found.stamps != _stamps(buffers) or found.columns < columns:
        found = table.mirrors[pointer] = Mirror(_copy(table, plan, inputs, columns), _stamps(buffers), columns)
    return found


def write_back(mirror: Mirror, plan: CapturedPlan, inputs: Rows[Any], column: int) -> None:
    """Put the token at `column` into the caller's buffers, and count it, as the captured graph would have."""
    full = mirror.sequence.full
    for site in plan.sites:
        assert site.past is not None, "a decode step has a cache"
        shown = site.cached(full.keys[site.layer], full.values[site.layer])
        for index, held in zip(site.past, shown, strict=True):
            inputs[index][:, :, column] = held[:, :, column]
    for index in plan.roles.counted:
        inputs[index].add_(1)
    mirror.stamps, mirror.columns = _stamps(_buffers(plan, inputs)), column + 1


def paddings(shown: Tensor, columns: int, batch: int) -> list[int] | None:
    """Left padding per row of a whole mask [B or 1, 1, 1, C] (leading ones may be left out), if it is causal with left
    padding at `columns`."""
    shown = shown[(None,) * (4 - shown.dim())].expand(batch, -1, -1, -1)
    if shown.shape[1] != 1:
        return None
    rows = (shown == 0 if shown.is_floating_point() else shown)[:, 0, 0].cpu()
    if shown.is_floating_point() and not bool((rows | (shown[:, 0, 0].cpu() <= -1e9)).all()):
        return None
    column = torch.arange(rows.shape[1])
    pads = rows.int().argmax(dim=1)
    if not torch.equal(rows, (column >= pads[:, None]) & (column <= columns)):
        return None
    return [int(pad) for pad in pads]


def has_versions(plan: CapturedPlan, inputs: Rows[Any]) -> bool:
    """Whether autograd counts the buffers' changes (it does not for those made under inference mode)."""
    return not any(buffer.is_inference() for buffer in _buffers(plan, inputs))


def _buffers(plan: CapturedPlan, inputs: Rows[Any]) -> list[Tensor]:
    return [inputs[i] for site in plan.sites for i in site.past or ()]


def _stamps(buffers: Rows[Tensor]) -> Stamps:
    return tuple((x.data_ptr(), x._version, tuple(x.shape), x.stride()) for x in buffers)


def _copy(table: SequenceTable, plan: CapturedPlan, inputs: Rows[Any], columns: int) -> Sequence:
    made = table.unnamed(plan.sites, inputs[plan.roles.tokens].shape[0])
    copy_in(made, plan, inputs, columns)
    return made
