"""Knorm: keep the tokens whose keys are short.

Devoto et al., arXiv 2406.11430: a key of small L2 norm tends to draw much attention. The score is -‖k‖.

Shapes: K KV heads, S tokens, C tokens scored, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vericache_compile.compressors.scorer import WindowScorer


@dataclass(frozen=True)
class Knorm(WindowScorer):
    """Keep the shortest keys per head; the last `window` tokens stay exact (the paper keeps none on purpose)."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "arXiv 2406.11430"

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C] in float32: minus the norm of each key."""
        return keys[:, :covered].float().square().sum(dim=2).sqrt().neg()
