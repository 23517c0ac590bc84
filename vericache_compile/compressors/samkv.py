"""SamKV: of each document of a prompt keep the first block, the last, and those that the question looks for.

After arXiv 2508.11661: where a prompt is several documents and a question (retrieval-augmented generation), a block of
one document is chosen by the question's query together with what the other documents have to say to it. The paper's
caches were made document by document, so it computes the kept tokens anew, to see the documents before them; here the
whole prompt was prefilled together: keys are those of full prefill, which that approximates, and lossless is meant
against it.

A document ends with a `separator`; without one, or where the tokens are not known (a cache of a fixed size, or one that
an uncompiled model built), the prompt is one document, which nothing complements. No code of the paper is public; the
choices made are: the query is the mean of the last `window`, and of the group's heads; a block is its mean key, less
the mean of all; a block that begins in a document is that document's; what the other documents say is attention from
the query to their first and last blocks, scaled to half the length of the query; all blocks share one budget, in which
those ends of documents come first.

Shapes: H query heads, K KV heads, S tokens, C tokens scored, P blocks, N slots kept, D head size, w queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vericache_compile.compressors.dense import budget, check_count, is_number
from vericache_compile.compressors.scorer import WindowScorer, top_tokens
from vericache_compile.errors import OptionError


@dataclass(frozen=True)
class SamKV(WindowScorer):
    """Keep a fraction of the whole blocks before the last `window` tokens; what is short of a block stays exact."""

    name: ClassVar[str] = "samkv"
    paper: ClassVar[str] = "arXiv 2508.11661"
    needs: ClassVar[tuple[str, ...]] = ("queries", "ids")

    keep: float = 0.15
    block: int = 32
    """Tokens in a block."""
    initial: int = 1
    """First blocks of a document, which stay before others do."""
    local: int = 1
    """Last blocks of a document, which stay before others do."""
    separator: int | None = None
    """The token that ends a document."""
    complement: float = 0.5
    """Length of what other documents say, as a fraction of the query's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block", self.block, 1, self.name)
        check_count("initial", self.initial, 0, self.name)
        check_count("local", self.local, 0, self.name)
        if self.separator is not None:
            check_count("separator", self.separator, 0, self.name)
        if not is_number(self.complement) or self.complement < 0:
            fix = "give a number from 0 up"
            raise OptionError(f"complement={self.complement!r}", f"compressor {self.name!r}", fix)

    @property
    def wants(self) -> frozenset[str]:
        """Tokens only where one of them separates."""
        return super().wants - ({"ids"} if self.separator is None else set())

    @property
    def later(self) -> SamKV:
        """Neither documents nor their first and last blocks among those that join later."""
        return replace(self, initial=0, local=0, separator=None)

    def covers(self, tokens: int) -> int:
        """The whole blocks before the window."""
        return self.covers_more(super().covers(tokens))

    def covers_more(self, tokens: int) -> int:
        """Whole blocks."""
        return tokens // self.block * self.block

    def slots(self, tokens: int) -> int:
        """Whole blocks: the fraction kept, and at least one document's first and last."""
        blocks = tokens // self.block
        return min(max(budget(self.keep, blocks), self.initial + self.local), blocks) * self.block

    def score(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> Tensor:
        """Scores [K, C], float32, equal within a block, of keys [K, S, D] by the last of queries [H, w, D]."""
        assert queries is not None
        means = keys[:, :covered].float().reshape(keys.shape[0], -1, self.block, keys.shape[2]).mean(dim=2)
        query = queries[:, -self.window :].float().mean(dim=1).reshape(keys.shape[0], -1, keys.shape[2]).mean(dim=1)
        documents = self._documents(covered)
        ends = [(p, d) for d, document in enumerate(documents) for p in self._ends(document)]
        rated = self._rate(query, means - means.mean(dim=1, keepdim=True), documents, ends)
        above = rated.amax(dim=1, keepdim=True) - rated.amin(dim=1, keepdim=True) + 1
        rated[:, [p for p, _ in ends]] += above
        return rated.repeat_interleave(self.block, dim=1)

    def select(self, scores: Tensor) -> Tensor:
        """Indices [K, N] of the tokens of the best blocks, by scores [K, C]."""
        best = top_tokens(scores[:, :: self.block], self.slots(scores.shape[1]) // self.block)
        inside = torch.arange(self.block, device=scores.device)
        return (best[..., None] * self.block + inside).flatten(1)

    def _rate(
        self, query: Tensor, about: Tensor, documents: Sequence[range], ends: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Products [K, P] of each block's mean key, of about [K, P, D], with its document's own query, from [K, D].

        `ends` are (block, document) of all first and last blocks, E of them.
        """
        said = about[:, [p for p, _ in ends]]
        of_end = torch.tensor([d for _, d in ends], device=about.device)
        own = of_end == torch.arange(len(documents), device=about.device).unsqueeze(1)
        logits = (said @ query.unsqueeze(-1) / math.sqrt(query.shape[1])).mT.expand(-1, len(documents), -1)
        weights = logits.masked_fill(own, float("-inf")).softmax(dim=2).nan_to_num(nan=0.0)
        told = F.normalize(weights @ said, dim=2)  # [K, documents, D]; of a document alone nobody says anything
        personal = query.unsqueeze(1) + self.complement * query.norm(dim=1)[:, None, None] * told
        of_block = torch.tensor([d for d, document in enumerate(documents) for _ in document], device=about.device)
        rated: Tensor = (about * personal[:, of_block]).sum(dim=2)
        return rated

    def _documents(self, covered: int) -> list[range]:
        """The blocks of each document."""
        ids, end = self.facts.ids or (), covered // self.block
        behind = [i + 1 for i, token in enumerate(ids[:covered]) if token == self.separator]
        begins = sorted({0, *(-(-i // self.block) for i in behind)} - {end})
        return [range(begin, stop) for begin, stop in zip(begins, [*begins[1:], end], strict=True)]

    def _ends(self, document: range) -> list[int]:
        """A document's first and last blocks."""
        return sorted({*document[: self.initial], *document[max(len(document) - self.local, 0) :]})
