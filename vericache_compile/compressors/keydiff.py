"""KeyDiff: keep the tokens whose keys are unlike the others.

Park et al., arXiv 2504.15364: keys that point away from the mean direction of all keys are the distinctive
ones. The score is -cos(k, a) with the anchor a = mean of k / ‖k‖ over the row.

Shapes: K KV heads, S tokens, C tokens scored, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.scorer import WindowScorer


@dataclass(frozen=True)
class KeyDiff(WindowScorer):
    """Keep the keys least similar to the mean direction, per head; the last `window` tokens stay exact.

    When tokens join later, the anchor is that of the tokens that join.
    """

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "arXiv 2504.15364"

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C] in float32, each in [-1, 1]; the anchor is taken over all S keys [K, S, D]."""
        directions = F.normalize(keys.float(), dim=2)
        anchor = F.normalize(directions.mean(dim=1, keepdim=True), dim=2)
        return -(directions[:, :covered] * anchor).sum(dim=2)
