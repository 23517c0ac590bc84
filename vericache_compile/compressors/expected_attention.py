"""Expected attention: keep the tokens that queries to come are expected to attend to.

Devoto et al., arXiv 2510.00636, section 3: queries before RoPE are taken for normal, with the mean and covariance of
those seen. Turned by the mean rotation R of the next `horizon` positions they are N(R mu, R Sigma R^T), and the
expected weight of a key is exp(mu'.k / sqrt(D) + k^T Sigma' k / (2 D)). Its softmax over the keys, the mean over the
query heads of a KV head, times the length of the value, is the score. Queries of the first 4 positions are not taken
in, and the first tokens always stay. The paper takes all queries of the prompt; here it is the last `sample`, since no
more are held.

Shapes: H query heads, K KV heads, G = H / K, S tokens, C tokens scored, D head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from vericache_compile.compressors.dense import check_count
from vericache_compile.compressors.rotation import turn
from vericache_compile.compressors.scorer import WindowScorer

ODD = 4
"""First positions, whose queries are unlike the others."""


@dataclass(frozen=True)
class ExpectedAttention(WindowScorer):
    """Keep a fraction of the tokens before the last `window` by the attention expected of queries to come."""

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "arXiv 2510.00636"
    needs: ClassVar[tuple[str, ...]] = ("queries", "pre_rope")

    sample: int = 256
    """Last queries whose mean and covariance stand for those to come."""
    horizon: int = 512
    """Positions to come over which the rotation is averaged."""
    sinks: int = 4
    """First tokens, which always stay."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sample", self.sample, 1, self.name)
        check_count("horizon", self.horizon, 1, self.name)
        check_count("sinks", self.sinks, 0, self.name)

    @property
    def queries(self) -> int:
        """The sample."""
        return self.sample

    @property
    def later(self) -> ExpectedAttention:
        """No first tokens among those that join later."""
        return replace(self, sinks=0).knowing(self.facts)

    def slots(self, tokens: int) -> int:
        """The fraction kept, and at least the sinks."""
        return min(tokens, max(self.sinks, super().slots(tokens)))

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C], float32, of keys [K, S, D] and values [K, S, Dv] by queries [H, w, D]; sinks at infinity."""
        assert queries is not None
        mean, covariance = self._to_come(queries[:, -self.sample :])
        size = keys.shape[2]
        lengths = values[:, :covered].float().square().sum(dim=2).sqrt()
        scores = []
        for head_keys, mu, sigma in zip(
            keys[:, :covered].float(),
            mean.view(keys.shape[0], -1, size),
            covariance.view(keys.shape[0], -1, size, size),
            strict=True,
        ):  # one at a time: the products are [G, C, D]
            spread = (head_keys @ sigma * head_keys).sum(dim=2)
            logits = mu @ head_keys.T * size**-0.5 + spread / (2 * size)
            scores.append(logits.softmax(dim=1).mean(dim=0))
        scored = torch.stack(scores) * lengths
        scored[:, : self.sinks] = float("inf")
        return scored

    def _to_come(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [H, D] and covariance [H, D, D], float32, of queries to come, from the last ones [H, w, D]."""
        rotation, end = self.facts.rotation, self.facts.end
        first = end - queries.shape[1]
        held = queries.float() if rotation is None else rotation.unrotate(queries, max(first, 0))
        held = held[:, min(max(ODD - first, 0) if end else 0, held.shape[1] - 1) :]
        mean = held.mean(dim=1)
        apart = held - mean.unsqueeze(1)
        covariance = apart.transpose(1, 2) @ apart / held.shape[1]
        if rotation is None:
            return mean, covariance
        cos, sin = rotation.mean(end, self.horizon)
        half = turn(covariance, rotation.pairs, cos, sin)
        return turn(mean, rotation.pairs, cos, sin), turn(half.transpose(1, 2), rotation.pairs, cos, sin)
