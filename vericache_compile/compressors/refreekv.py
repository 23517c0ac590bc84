"""ReFreeKV: no budget. Keep the first tokens and as many recent ones as the last query's attention asks for.

Ni et al., arXiv 2502.16886 (first published as DBudgetKV): tokens are ranked first the `sinks`, then from the newest
back. Tokens are added in that order until the norm of the last query's attention to them, the mean over the heads, is
within `threshold` of the norm of all of its attention. The first layers keep everything. All heads keep the same.
A norm is ruled by the largest weights: where the sinks draw most of the attention, hardly more than the sinks is kept
(checked against the authors' code, which does the same); a smaller threshold keeps more.

How many stay depends on the data: the host waits for that count, once per site and compression.

Shapes: H query heads, K KV heads, S tokens, N slots kept, D head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.dense import check_count, is_number
from vericache_compile.compressors.scorer import Chooser
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class ReFreeKV(Chooser):
    """Keep the shortest prefix of the ranking that loses at most `threshold` of the attention's norm.

    Tokens that join later are ranked among themselves, from the newest back.
    """

    name: ClassVar[str] = "refreekv"
    paper: ClassVar[str] = "arXiv 2502.16886"
    needs: ClassVar[tuple[str, ...]] = ("queries", "layers", "count")

    threshold: float = 0.01
    """Fraction of the norm that may be lost, in [0, 1); with 0 everything is kept."""
    sinks: int = 4
    """First tokens, which are ranked before the newest."""
    whole: int = 2
    """So many first layers keep everything."""
    refresh: int = field(default=0, kw_only=True, repr=False)
    """Rank all anew after so many tokens; 0: never."""

    def __post_init__(self) -> None:
        if not is_number(self.threshold) or not 0 <= self.threshold < 1:
            fix = "give the fraction of the attention's norm that may be lost, in [0, 1)"
            raise OptionError(f"threshold={self.threshold!r}", f"compressor {self.name!r}", fix)
        check_count("sinks", self.sinks, 0, self.name)
        check_count("whole", self.whole, 0, self.name)
        check_count("refresh", self.refresh, 0, self.name)

    @property
    def queries(self) -> int:
        """The last one decides."""
        return 1

    @property
    def later(self) -> ReFreeKV:
        """No first tokens among those that join later."""
        return type(self)(self.threshold, 0, self.whole)

    def for_layer(self, layer: int, layers: int) -> ReFreeKV:
        """Itself, but for the first layers, which keep everything."""
        return type(self)(0.0, self.sinks, self.whole) if layer < self.whole else self

    def newest(self, kept: int, tokens: int) -> int:
        """All but the sinks, which are ranked first."""
        return kept if kept == tokens else max(kept - self.sinks, 0)

    def choose(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Indices [K, N], the same for all K, by the last of queries [H, w, D]; waits for the count N."""
        if self.threshold == 0:  # norms in float32 are whole before all tokens are in
            return torch.arange(covered, device=keys.device).expand(keys.shape[0], -1)
        assert queries is not None
        positions = torch.arange(covered, device=keys.device)
        order = torch.cat([positions[: self.sinks], positions[self.sinks :].flip(0)])
        squares = _attention(keys[:, :covered], queries[:, -1])[:, order].square()
        norms = squares.cumsum(dim=1).sqrt_().mean(dim=0)
        lost = 1 - norms / norms[-1]
        short = int((~(lost <= self.threshold)).sum())  # not `>`: what is not a number keeps everything
        kept: Tensor = order[: short + 1].sort().values
        return kept.expand(keys.shape[0], -1)


def _attention(keys: Tensor, query: Tensor) -> Tensor:
    """Softmax [H, S], in float32, of query [H, D] over keys [K, S, D]; query head h belongs to KV head h // G."""
    grouped = query.float().reshape(keys.shape[0], -1, query.shape[1])
    logits = grouped * query.shape[1] ** -0.5 @ keys.float().transpose(1, 2)
    attention: Tensor = logits.softmax(dim=2)
    return attention.flatten(0, 1)
