"""Sliding layers: what their cache tensors show of the columns that they stand for, and their draft cache's region."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import Any, Self

from torch import Tensor

from vericache_compile.compressors.dense import DenseKV
from vericache_compile.errors import GhostError
from vericache_compile.plan import CapturedPlan, Site


class OutOfWindow(DenseKV):
    """Tokens that no later token of a sliding layer attends to: covered, without a slot."""

    @classmethod
    def like(cls, keys: Tensor, values: Tensor, covered: int) -> Self:
        """For one row of a site, with its head count, sizes and type: keys [K, any, D], values [K, any, E]."""
        no_keys, no_values = (x.new_empty(x.shape[0], 0, x.shape[2]) for x in (keys, values))
        return cls(no_keys, no_values, covered)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also covers the next S tokens: keys [K, S, D], values [K, S, E]."""
        return self.like(keys, values, self.covered + keys.shape[1])


def columns_of(plan: CapturedPlan, inputs: Rows[Any]) -> int | None:
    """Columns that the caller's cache stands for; None where neither a counted length nor a tensor's shape says so."""
    lengths = {int(inputs[i]) for i in plan.roles.lengths}
    lengths |= {inputs[i].shape[2] for site in plan.sites if site.recent is None for i in site.past or ()}
    if not lengths:
        cut = {inputs[i].shape[2] for site in plan.sites for i in site.past or () if inputs[i].shape[2] < site.recent}
        lengths = cut
    if len(lengths) > 1:
        found = f"cache tensors of different lengths ({sorted(lengths)})"
        raise GhostError(found, "the cache of this call", "crop or build all layers alike")
    return lengths.pop() if lengths else None


def columns_shown(plan: CapturedPlan, inputs: Rows[Any]) -> list[int]:
    """Columns that each site's cache tensors show."""
    return [inputs[site.past[0]].shape[2] if site.past is not None else 0 for site in plan.sites]


def columns_after(site: Site, before: int, count: int) -> int:
    """Columns that a site's cache tensors show after `count` more tokens than `before`."""
    return before + count if site.kept is None else min(before + count, site.kept)


def is_short(plan: CapturedPlan, inputs: Rows[Any], columns: int) -> bool:
    """Whether a sliding layer's tensors show fewer columns than its window reaches back."""
    cut = ((site, site.past) for site in plan.sites if site.window is not None and site.past is not None)
    return any(inputs[past[0]].shape[2] < min(columns, (site.window or 1) - 1) for site, past in cut)
