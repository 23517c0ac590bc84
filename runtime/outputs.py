"""What a call gives back: rows where the captured graph returns rows, ghosts where it returns the cache."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any

import torch
from torch import Tensor

from vericache_compile.plan import CapturedPlan, Output, OutputRole
from vericache_compile.runtime.sequence_table import SequenceTable
from vericache_compile.runtime.sequences import Row, Sequence
from vericache_compile.runtime.sliding import columns_after, columns_shown

FEW = 1
"""Columns up to which Dynamo specialises a length, so that marking it dynamic would be in vain."""


def take(rows: Rows[Row]) -> list[Tensor]:
    """The rows to hand out, each as the captured graph would have shaped it; never shared with what is held."""
    taken = [row.held.popleft() for row in rows]
    for row in rows:
        row.served += 1
    parts = zip(*([output[held.index] for output in held.outputs] for held in taken), strict=True)
    return [torch.cat(part) for part in parts]


def assemble(
    table: SequenceTable,
    plan: CapturedPlan,
    rows: Rows[Tensor],
    sequence: Sequence,
    inputs: Rows[Any],
    columns: int,
    *,
    marked: bool,
) -> list[Any]:
    """The captured graph's outputs in order, for a sequence that has now so many columns.

    Ghosts whose length varies are `marked` as dynamic for Dynamo.
    """
    tokens = inputs[plan.roles.tokens]
    before = columns_shown(plan, inputs)
    shown = [columns_after(site, width, tokens.shape[1]) for site, width in zip(plan.sites, before, strict=True)]
    pairs = table.mint(sequence, columns, tokens.device, shown)
    if marked:
        for site, width, pair in zip(plan.sites, shown, pairs, strict=True):
            for ghost in pair if width > FEW and width != site.kept else ():
                torch._dynamo.maybe_mark_dynamic(ghost, 2)
    remaining = iter(rows)

    def output(role: OutputRole) -> Any:
        if role.kind is Output.LENGTH:
            return tokens.shape[1] + (int(inputs[role.source]) if role.source >= 0 else 0)
        if role.kind is Output.BATCH:
            return tokens.shape[0]
        if role.kind in (Output.KEYS, Output.VALUES):
            return pairs[role.layer][role.kind is Output.VALUES]
        return next(remaining)

    return [output(role) for role in plan.outputs]
