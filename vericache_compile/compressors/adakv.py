"""AdaKV: SnapKV's scores, and a budget that the heads of a layer share out by them.

Feng et al., arXiv 2407.11550, section 3 and algorithm 1; `head_budget.py` has what it is made of. The same as
`ada | snapkv`.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, D head size, Dv value head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count, check_keep, check_odd
from vericache_compile.compressors.head_budget import HeadSharing, check_floor, share_out
from vericache_compile.compressors.snapkv import score_tokens


@dataclass(frozen=True)
class AdaKV(HeadSharing):
    """Keep the fraction `keep` of a layer's tokens before the last `window`, shared out among its heads by score."""

    name: ClassVar[str] = "adakv"
    parameters: ClassVar[tuple[str, ...]] = ("keep",)
    paper: ClassVar[str] = "arXiv 2407.11550"
    needs: ClassVar[tuple[str, ...]] = ("queries", "count")

    keep: float = 0.2
    window: int = 32
    """Queries that vote, and tokens left to the tail."""
    kernel: int = 7
    """Width of the pooling over tokens; odd."""
    floor: float = 0.2
    """Fraction of an even share that each head keeps in any case, in [0, 1]; 1 shares evenly."""
    refresh: int = field(default=0, kw_only=True, repr=False)
    """Choose anew among all tokens after so many; 0: never."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        check_count("window", self.window, 1, self.name)
        check_count("refresh", self.refresh, 0, self.name)
        check_odd("kernel", self.kernel, self.name)
        check_floor(self.floor, self.name)

    @property
    def queries(self) -> int:
        """The window."""
        return self.window

    @property
    def least_tail(self) -> int:
        """The window."""
        return self.window

    def covers(self, tokens: int) -> int:
        """All tokens but the window."""
        return max(tokens - self.window, 0)

    def share(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Places, ascending, in the flattened [K, C], of those that stay of the first C = `covered` tokens."""
        assert queries is not None, f"{self.name} scores tokens by the last queries: pass them"
        scores = score_tokens(keys, queries[:, -self.window :], self.kernel, keys.shape[1] - covered)
        return share_out(scores, budget(self.keep, covered), self.floor)
