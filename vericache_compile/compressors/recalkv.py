"""ReCalKV: keys at low rank per group of similar heads, values at low rank together, more rank where it matters.

Yan et al., arXiv 2505.24357, section 3. Heads whose keys are alike, by linear CKA, form groups of up to four; each
group has a basis, the values of a layer have one. With a calibration file a side's rank grows with its Fisher
information (the sum of squared gradients of the loss), between half of `rank` and all, `rank` on average; without one,
bases are of the row itself and all ranks the same. The paper folds the values' basis into the output weights; see
`low_rank` for the bases, and how values are read here.

Shapes: K KV heads, D head size, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vericache_compile.calibration import Calibration
from vericache_compile.compressors.dense import check_count
from vericache_compile.compressors.fitted import Fit
from vericache_compile.compressors.low_rank import LowRank
from vericache_compile.compressors.observed import observe
from vericache_compile.compressors.quantizer import channel_group
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class ReCalKV(LowRank):
    """Keep the fraction `rank` of the coordinates, in groups of at most `heads` heads."""

    name: ClassVar[str] = "recalkv"
    paper: ClassVar[str] = "arXiv 2505.24357"
    heads: int = 4
    """KV heads in a group of keys: the largest divisor of theirs that is at most this."""

    def __post_init__(self) -> None:
        check_count("heads", self.heads, 1, self.name)
        super().__post_init__()
        if self.held is not None:
            sites = len(self.held.model["sites"])
            for layer in range(sites):
                self.given(self.held, layer, sites)

    def order(self, moment: Tensor, heads: int) -> tuple[Tensor, int]:
        """KV heads [K], similar ones together, and how many are in a group."""
        group = channel_group(heads, self.heads)
        return group_similar(cka(moment, heads), group), group

    def given(self, held: Calibration, layer: int, layers: int) -> Fit:
        """The bases that a file has for a site; raises OptionError where its groups are of another size."""
        heads, groups = len(held.part(f"{layer}.order")), len(held.part(f"{layer}.keys"))
        theirs, own = heads // groups, channel_group(heads, self.heads)
        if theirs != own:
            fix = f"give heads={theirs}, or calibrate again with recalkv(heads={self.heads})"
            raise OptionError(f"groups of {theirs} heads, where heads={self.heads} makes {own}", held.where, fix)
        return super().given(held, layer, layers)

    def shares(self, held: Calibration, layer: int) -> tuple[float, float]:
        """Fractions that keys and values of a site keep, by their Fisher information."""
        keys, values = allot(held.part("fisher"), self.rank)[layer].tolist()
        return keys, values

    def learn(self, model: Any, ids: Tensor, turned: Sequence[Rotation | None]) -> dict[str, Tensor]:
        """Bases of every layer, and the Fisher information [layers, 2] of keys and values; by tokens ids [N, T]."""
        fisher: dict[int, Tensor] = {}
        for layer, seen in observe(model, ids, turned, gradients=True):
            more = torch.stack([part.double().square().sum() for part in (seen.key_gradients, seen.value_gradients)])
            fisher[layer] = fisher.get(layer, 0) + more
        return super().learn(model, ids, turned) | {
            "fisher": torch.stack([fisher[layer] for layer in sorted(fisher)]).float()
        }


def cka(moment: Tensor, heads: int) -> Tensor:
    """Linear CKA [K, K] of heads, by the second moment of their channels [K * D, K * D]; channels are not centred."""
    products = torch.unflatten(torch.unflatten(moment, 0, (heads, -1)), 2, (heads, -1)).square().sum(dim=(1, 3))
    own = products.diagonal().sqrt()
    return (products / (own.unsqueeze(0) * own.unsqueeze(1))).nan_to_num(nan=0.0)


def group_similar(similarity: Tensor, group: int) -> Tensor:
    """Heads [K], group after group: the first one left, and those most similar to it."""
    heads = similarity.shape[0]
    left = torch.ones(heads, dtype=similarity.dtype, device=similarity.device)
    groups = []
    for _ in range(heads // group):
        first = left.argmax()
        scores = similarity.index_select(0, first.unsqueeze(0)).squeeze(0).masked_fill(left == 0, -1.0)
        chosen = scores.index_fill(0, first, 2.0).topk(group).indices.sort().values
        left = left.index_fill(0, chosen, 0.0)
        groups.append(chosen)
    return torch.cat(groups)


def allot(fisher: Tensor, rank: float) -> Tensor:
    """Shares shaped as `fisher`: proportional to it within [rank / 2, 1], and `rank` on average."""
    weights = fisher.double() / fisher.double().mean()
    low, high = 0.0, 2 / float(weights.clamp(min=1e-12).min())
    for _ in range(100):  # the mean grows with the factor
        factor = (low + high) / 2
        low, high = (factor, high) if float((factor * weights).clamp(rank / 2, 1).mean()) < rank else (low, factor)
    return (high * weights).clamp(rank / 2, 1)
