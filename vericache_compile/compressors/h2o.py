"""H2O: keep the heavy hitters, which all queries so far have attended to most, and the most recent tokens.

Zhang et al., arXiv 2306.14048, section 4: the attention that a token draws is summed over all queries, here those of
prefill and those of every accepted window; half of the budget goes to the largest sums, half to the newest tokens. With
grouped queries the group's sums are added. What was dropped is lost to the original; with `refresh` it may come back.

Where the sums are not known (a cache that an uncompiled model built) the last queries' attention stands in.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, D head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vericache_compile.compressors.dense import is_number
from vericache_compile.compressors.scorer import Scorer
from vericache_compile.compressors.window_attention import mean_attention
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class H2O(Scorer):
    """Keep a fraction of the tokens: `recent` of it the newest, the rest those that drew most attention."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv 2306.14048"
    needs: ClassVar[tuple[str, ...]] = ("queries", "attention")

    recent: float = 0.5
    """Share of the slots that goes to the newest tokens, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.recent) or not 0 <= self.recent <= 1:
            raise OptionError(f"recent={self.recent!r}", f"compressor {self.name!r}", "give a share in [0, 1]")

    @property
    def queries(self) -> int:
        """Those that stand in where the sums are not known."""
        return 32

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C], float32: attention drawn, and infinity for the newest tokens."""
        assert queries is not None
        drawn = self.facts.attention
        scores = mean_attention(keys, queries) if drawn is None else drawn
        newest = int(self.recent * self.slots(covered))
        scores = scores[:, :covered].clone()
        scores[:, covered - newest :] = float("inf")
        return scores
