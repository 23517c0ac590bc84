"""KVzip: keep what the model needs to repeat its context, whatever is asked of it later.

Kim et al., arXiv 2505.23416: before the first draft the model is fed its context once more, chunk by chunk, over the
full cache; a key's score is the most attention that it draws while it does (`runtime/repeat.py`, where the choices
made are said). All heads of all sites share one budget: the highest scores stay, wherever they are; or, `per_layer`,
those of each site. Tokens that come later were never repeated: all stay, as in the paper; with `refresh` the model
repeats them too. The repetition costs about as much as verifying the context once
(`stats(model)["seconds"]["repeat"]`), and until it is done full KV has room for a chunk more.

Where the context's tokens are not known (a cache that an uncompiled model built), or a model that learned its
positions has none left for a repetition, which is said once, the last queries vote, as in AdaKV.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, n of them repeated, D head size, w queries.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.adakv import AdaKV
from vericache_compile.compressors.dense import budget
from vericache_compile.compressors.head_budget import share_out
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class KVzip(AdaKV):
    """Keep the fraction `keep` of the repeated tokens before the last `window`, shared by all heads of all sites."""

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "arXiv 2505.23416"
    needs: ClassVar[tuple[str, ...]] = ("queries", "count", "repeated", "shared")

    per_layer: bool = False
    """Whether each site has a budget of its own, shared by its heads alone."""
    kernel: int = field(default=1, init=False, repr=False)
    floor: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.per_layer, bool):
            raise OptionError(f"per_layer={self.per_layer!r}", f"compressor {self.name!r}", "give True or False")

    @property
    def wants(self) -> frozenset[str]:
        """What other sites leave, unless each has a budget of its own."""
        return super().wants - ({"shared"} if self.per_layer else set())

    def share(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Places, ascending, in the flattened [K, C], of those that stay of the first C = `covered` tokens."""
        repeated = self.facts.repeated
        if repeated is None:
            return super().share(keys, values, queries, covered)
        known = min(repeated.shape[1], covered)
        scores = F.pad(repeated[:, :known], (0, covered - known), value=float("inf"))
        if self.per_layer or not known or not self.facts.everywhere:
            return share_out(scores, budget(self.keep, known) + covered - known, self.floor)
        stays = F.pad(self._stays(known), (0, covered - known), value=True)
        return stays.flatten().nonzero().squeeze(1)

    def _stays(self, known: int) -> Tensor:
        """Which of the first `known` tokens of this site stay, bool [K, n]: the choice is made once for all sites."""
        shared, everywhere = self.facts.shared if self.facts.shared is not None else {}, self.facts.everywhere
        if (self, known) not in shared:
            scores = torch.cat([site[:, :known].flatten() for site in everywhere])
            best = scores.topk(len(scores) // known * budget(self.keep, known), sorted=False).indices
            shared[self, known] = scores.isposinf().scatter_(0, best, value=True)  # sinks stay, whatever the budget
        own = next(place for place, site in enumerate(everywhere) if site is self.facts.repeated)
        ends = list(itertools.accumulate((len(site) * known for site in everywhere), initial=0))
        return shared[self, known][ends[own] : ends[own + 1]].view(-1, known)
