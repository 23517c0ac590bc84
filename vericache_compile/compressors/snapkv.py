"""SnapKV: keep the tokens that the last queries of the prompt attend to.

Li et al., arXiv 2404.14469, section 4: attention of an observation window of queries, pooled so that
neighbours of an important token come along, top-k per head. With grouped queries the group votes together.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, D head size, Dv value head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.dense import check_odd
from vericache_compile.compressors.scorer import WindowScorer
from vericache_compile.compressors.window_attention import mean_attention


@dataclass(frozen=True)
class SnapKV(WindowScorer):
    """Keep a fraction of the tokens before the last `window`, whose queries vote; those stay exact in the tail."""

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "arXiv 2404.14469"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    kernel: int = 7
    """Width of the pooling over tokens; odd."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_odd("kernel", self.kernel, self.name)

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Pooled attention [K, C] to keys [K, S, D]; of more queries [H, w, D] than the window the last vote."""
        assert queries is not None
        return score_tokens(keys, queries[:, -self.window :], self.kernel, keys.shape[1] - covered)


def score_tokens(keys: Tensor, queries: Tensor, kernel: int, unscored: int = 0) -> Tensor:
    """`mean_attention` [K, S - unscored], pooled: pooling and the means are linear, so their order does not matter."""
    return F.avg_pool1d(mean_attention(keys, queries, unscored), kernel, stride=1, padding=kernel // 2)
