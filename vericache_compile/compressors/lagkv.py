"""LagKV: keep the tokens that stand out against the chunk that follows them; no attention is needed.

Liang et al., arXiv 2504.04704: tokens after the sinks fall into chunks of `lag`. Each channel of a chunk's
keys is scaled by the minimum and maximum of the next chunk, a token's score is the softmax over its chunk of the
standard deviation over its channels, the same for values, and the mean of both decides. Every chunk keeps the same
fraction. The last chunk has no next one: it and what follows stay exact, in the tail.

Shapes: K KV heads, S tokens, C tokens scored, P chunks, L tokens in a chunk, D head size, Dv value head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count
from vericache_compile.compressors.scorer import Scorer, top_tokens
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class LagKV(Scorer):
    """Keep a fraction of each chunk, and the sinks; covers nothing before there are two chunks."""

    name: ClassVar[str] = "lagkv"
    paper: ClassVar[str] = "arXiv 2504.04704"

    lag: int = 128
    """Tokens in a chunk (L)."""
    sinks: int = 4
    """First tokens, which always stay; fewer than a chunk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("lag", self.lag, 1, self.name)
        check_count("sinks", self.sinks, 0, self.name)
        if self.sinks >= self.lag:
            raise OptionError(f"sinks={self.sinks}", f"compressor {self.name!r}", f"give fewer than lag={self.lag}")

    @property
    def later(self) -> LagKV:
        """No first tokens among those that join later."""
        return replace(self, sinks=0)

    def covers(self, tokens: int) -> int:
        """The sinks and every chunk that another whole chunk follows; nothing when there is none."""
        chunks = max((tokens - self.sinks) // self.lag - 1, 0) * self.lag
        return self.sinks + chunks if chunks else 0

    def covers_more(self, tokens: int) -> int:
        """The same of tokens that join."""
        return self.covers(tokens)

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C] in float32, sinks at infinity; keys [K, S, D], values [K, S, Dv] reach a chunk further."""
        sinks = covered % self.lag
        end = covered + self.lag
        chunks = (self._stand_out(keys[:, sinks:end]) + self._stand_out(values[:, sinks:end])) / 2
        return torch.cat([chunks.new_full((chunks.shape[0], sinks), float("inf")), chunks], dim=1)

    def select(self, scores: Tensor) -> Tensor:
        """Indices [K, N]: the sinks and the best of each chunk, by scores [K, C]."""
        sinks = scores.shape[1] % self.lag
        chunks = scores[:, sinks:].reshape(scores.shape[0], -1, self.lag)
        kept = top_tokens(chunks.flatten(0, 1), budget(self.keep, self.lag)).view(*chunks.shape[:2], -1)
        starts = torch.arange(sinks, scores.shape[1], self.lag, device=scores.device)
        first = torch.arange(sinks, device=scores.device).expand(scores.shape[0], sinks)
        return torch.cat([first, (kept + starts[:, None]).flatten(1)], dim=1)

    def _stand_out(self, x: Tensor) -> Tensor:
        """Scores [K, (P - 1) * L] of x [K, P * L, D]: all chunks but the last, each against the next."""
        chunks = x.float().reshape(x.shape[0], -1, self.lag, x.shape[2])
        low, high = chunks[:, 1:].amin(dim=2, keepdim=True), chunks[:, 1:].amax(dim=2, keepdim=True)
        scaled = (chunks[:, :-1] - low) / (high - low)
        scaled.nan_to_num_(0, 0, 0)  # a channel that is constant over the next chunk says nothing
        spread = scaled.std(dim=3) if x.shape[2] > 1 else scaled.new_zeros(scaled.shape[:3])
        return spread.softmax(dim=2).flatten(1)
