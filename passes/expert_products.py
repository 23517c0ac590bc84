"""Products with the weights of experts that each token chooses, spelled as one operator, for `expand_window`.

    grouped_mm(x[by expert], weight [E, in, out], offsets)      ->   vericache.experts_mm(x, weight, expert of each row)
    bmm(weight[experts], x[..., None]) and its transpose        ->   the same, without the copies of weights

transformers writes mixtures of experts in these two ways ("grouped_mm", "batched_mm"). Under torch.func.vmap either
would read weights once per token of a window.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vericache_compile import ops

GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}


class ExpertProducts:
    """Spells one run's products with experts; remembers which values are weights picked by experts."""

    def __init__(self) -> None:
        self._picked: list[tuple[Tensor, Tensor, Tensor]] = []
        """(weights picked [S, ...], weights [E, ...], experts [S])."""

    def spell(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The value of a call that is such a product, or that counts the rows of each expert; None for any other."""
        name = target if isinstance(target, str) else getattr(target, "__name__", "").split(".")[0]
        if name in GROUPED:
            given = _given(("x", "weight", "offs"), args, kwargs)
            return None if given is None else self._grouped(*given)
        if target is torch.bmm:
            given = _given(("input", "mat2"), args, kwargs)
            return None if given is None else self._batched(*given)
        if target is torch.histc:
            given = _given(("input", "bins", "min", "max"), args, kwargs)
            return None if given is None else _count(*given)
        if target is operator.getitem and _is_pick(*args):
            weights, experts = args
            self._picked.append((weights[experts], weights, experts))
            return self._picked[-1][0]
        return None

    def _grouped(self, x: Tensor, weight: Tensor, offs: Tensor | None) -> Tensor | None:
        """x [S, in] in the order of experts, weight [E, in, out], offs [E]: where each expert's rows end."""
        if offs is None or x.dim() != 2 or weight.dim() != 3:
            return None
        row = torch.arange(x.shape[0], device=x.device)
        return _product(x, weight, (offs[:, None] <= row).sum(0))

    def _batched(self, left: Tensor, right: Tensor) -> Tensor | None:
        """weight[experts] [S, out, in] by x [S, in, 1], or x [S, 1, in] by weight[experts] [S, in, out]."""
        for picked, weights, experts in self._picked:
            if picked is left and right.shape[-1] == 1:
                return _product(right.squeeze(-1), weights.transpose(1, 2), experts).unsqueeze(-1)
            if picked is right and left.shape[-2] == 1:
                return _product(left.squeeze(-2), weights, experts).unsqueeze(-2)
        return None


def _given(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The arguments of a call in this order; None where one is missing, or there are others."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    exact = len(args) <= len(names) and given.keys() == set(names)
    return [given[name] for name in names] if exact else None


def _product(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    made: Tensor = ops.experts_mm(x, weight, experts, 0)
    return made


def _is_pick(weights: Any, experts: Any) -> bool:
    """Whether an index picks one of the model's matrices [E, ...] per row."""
    if not isinstance(weights, Tensor) or not isinstance(experts, Tensor):
        return False
    whole = experts.dtype in (torch.int64, torch.int32) and experts.dim() == 1
    shared = not torch._C._functorch.is_batchedtensor(weights)
    return whole and shared and weights.dim() == 3 and weights.is_floating_point()


def _count(x: Tensor, bins: int, min: int, max: int) -> Tensor | None:
    """Of whole numbers x [S] how many are 0, 1, ..., bins - 1 (histc has no rule for a window)."""
    if x.dim() != 1 or (min, max) != (0, bins - 1):
        return None
    return (x[:, None] == torch.arange(bins, device=x.device)).sum(0).to(x.dtype)
