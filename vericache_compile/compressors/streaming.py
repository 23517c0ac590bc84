"""StreamingLLM: the first tokens, on which attention rests its surplus weight, and the most recent ones.

Xiao et al., arXiv 2309.17453, section 3.2. The paper renumbers positions inside its cache; here keys stay as
they were cached (post-RoPE, true positions): a draft has to resemble the model that reads the full KV.

Shapes: K KV heads, S tokens, N slots kept, D head size, Dv value head size, w queries, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.dense import DenseKV, budget, check_count, check_keep


class StreamingKV(DenseKV):
    """The first `sinks` tokens of [0, covered) and the most recent ones."""

    def __init__(self, keys: Tensor, values: Tensor, covered: int, method: Streaming) -> None:
        super().__init__(keys, values, covered)
        self.method = method

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Cover keys [K, S, D] and values [K, S, Dv] too; queries are not read.

        The budget grows by at most S slots, so the region holds exactly what compressing all tokens at once
        would have kept.
        """
        covered = self.covered + keys.shape[1]
        slots = self.method.slots(covered)
        return type(self)(
            _keep_ends(torch.cat([self.keys, keys], dim=1), slots, self.method.sinks),
            _keep_ends(torch.cat([self.values, values], dim=1), slots, self.method.sinks),
            covered,
            self.method,
        )


@dataclass(frozen=True)
class Streaming(Compressor):
    """Keep a fraction of the tokens: the first `sinks`, the rest from the end."""

    name: ClassVar[str] = "streaming"
    parameters: ClassVar[tuple[str, ...]] = ("keep",)
    paper: ClassVar[str] = "arXiv 2309.17453"

    keep: float = 0.2
    sinks: int = 4

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        check_count("sinks", self.sinks, 0, self.name)

    def slots(self, tokens: int) -> int:
        """Slots for `tokens` tokens: the fraction kept, at least the sinks and one recent token."""
        return min(tokens, max(self.sinks + 1, budget(self.keep, tokens)))

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> StreamingKV:
        """Compress keys [K, S, D] and values [K, S, Dv]; covers all S tokens, queries are not read."""
        tokens = keys.shape[1]
        slots = self.slots(tokens)
        return StreamingKV(_keep_ends(keys, slots, self.sinks), _keep_ends(values, slots, self.sinks), tokens, self)


def _keep_ends(x: Tensor, slots: int, sinks: int) -> Tensor:
    """The first min(sinks, slots) tokens of x [K, S, D] and the last ones, [K, slots, D], in order."""
    first = min(sinks, slots)
    last = x.shape[1] - (slots - first)
    return torch.cat([x[:, :first], x[:, last:]], dim=1)
