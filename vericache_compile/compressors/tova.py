"""TOVA: keep the tokens that the newest query attends to, the same ones in all heads of a layer.

Oren et al., arXiv 2401.06104: attention of the last query, averaged over the heads; the token with the
least is dropped. Of a prompt that is the top-k of one attention row. The last token itself always stays.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, D head size, w queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vericache_compile.compressors.scorer import Scorer
from vericache_compile.compressors.window_attention import mean_attention


@dataclass(frozen=True)
class Tova(Scorer):
    """Keep a fraction of the tokens before the last one by that token's attention."""

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "arXiv 2401.06104"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    @property
    def queries(self) -> int:
        """The last one votes."""
        return 1

    def covers(self, tokens: int) -> int:
        """All tokens but the last."""
        return max(tokens - 1, 0)

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C], equal for all K: attention of the last of queries [H, w, D], the mean over H."""
        assert queries is not None
        attention = mean_attention(keys, queries[:, -1:], keys.shape[1] - covered)
        return attention.mean(dim=0, keepdim=True).expand_as(attention)
