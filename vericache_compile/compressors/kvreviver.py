"""KVReviver: the candidates exactly, every other token from a sketch out of which it can be revived.

After arXiv 2512.17917: the cache is recent tokens (here the tail), candidates, and a count sketch (Charikar et al.
2002) that takes in what is no candidate: row r of it adds sign_r(j) x_j to bucket h_r(j), and x_j is read back as the
mean over r of sign_r(j) bucket_r[h_r(j)]. Attention runs over all tokens, so memory is saved and not reading. No code
of it is public; the choices made are: candidates are those that the last queries attend to most; keys and values are
sketched less their mean; and what is read back is shrunk by 1 / (1 + (E - 1) / (r w)), E tokens in r rows of w
buckets, since the others in a bucket are noise of so much more variance. Each run of tokens that joins gets a sketch
of its own. A run of so few tokens that one candidate and a sketch take no less than they do stays as it is.

Shapes: H query heads, K KV heads, S tokens, C tokens covered, E of them sketched, N candidates, r rows, w buckets,
D head size, Dv value head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.constants import constant
from vericache_compile.compressors.dense import budget, check_count, check_keep, check_seed
from vericache_compile.compressors.facts import take_tokens
from vericache_compile.compressors.scorer import top_tokens
from vericache_compile.compressors.window_attention import mean_attention
from vericache_compile.errors import OptionError

PRIME = (1 << 31) - 1
"""Hashes are (a j + b) mod PRIME (Carter and Wegman 1979)."""


class Sketch(NamedTuple):
    """One side of E tokens, in the dtype of the cache."""

    buckets: Tensor
    """[K, r, w, D]."""
    mean: Tensor
    """[K, 1, D]."""


class Run(NamedTuple):
    """What is held of one run of tokens."""

    keys: Tensor
    """Candidates [K, N, D]."""
    values: Tensor
    sketches: tuple[Sketch, ...]
    """Of keys and of values; none where all tokens are candidates."""


class RevivedKV(CompressedKV):
    """Runs of tokens that make up [0, covered)."""

    def __init__(self, runs: tuple[Run, ...], counts: tuple[int, ...], method: KVReviver) -> None:
        """`counts` are the tokens sketched (E) per run."""
        self.runs, self.counts, self.method = runs, counts, method
        self.covered = sum(counts) + sum(run.keys.shape[1] for run in runs)

    @property
    def slots(self) -> int:
        """All tokens, exact or revived."""
        return self.covered

    @property
    def in_order(self) -> bool:
        """Where all tokens are candidates."""
        return not any(self.counts)

    @property
    def nbytes(self) -> int:
        """Bytes of candidates and sketches."""
        return sum(x.nbytes for run in self.runs for x in (run.keys, run.values, *chain(*run.sketches)))

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, covered, D] and values [K, covered, Dv]: per run the candidates, then the others, revived."""
        keys, values = [], []
        for run, count in zip(self.runs, self.counts, strict=True):
            revived = [self.method.revive(sketch, count) for sketch in run.sketches]
            keys += [run.keys, *revived[:1]]
            values += [run.values, *revived[1:]]
        return torch.cat(keys, dim=1), torch.cat(values, dim=1)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Also cover keys [K, S, D] and values [K, S, Dv], as a run of their own."""
        run, count = self.method.store(keys, values, queries, keys.shape[1])
        kept = tuple(
            Run(x.keys.clone(), x.values.clone(), tuple(Sketch(*map(torch.clone, each)) for each in x.sketches))
            for x in self.runs
        )
        return type(self)((*kept, run), (*self.counts, count), self.method)


@dataclass(frozen=True)
class KVReviver(Compressor):
    """Spend the bytes of the fraction `keep` of the tokens before the last `window` on candidates and a sketch."""

    name: ClassVar[str] = "kvreviver"
    parameters: ClassVar[tuple[str, ...]] = ("keep",)
    paper: ClassVar[str] = "arXiv 2512.17917"
    needs: ClassVar[tuple[str, ...]] = ("queries",)

    keep: float = 0.2
    """Bytes, as a fraction of those of the full KV, in (0, 1]; 1 keeps all exactly."""
    window: int = 32
    """Queries that vote, and tokens left to the tail."""
    vague: float = 0.3
    """Share of the bytes that goes to the sketch, in (0, 1)."""
    rows: int = 3
    """Of the sketch (r)."""
    seed: int = 0
    refresh: int = field(default=0, kw_only=True, repr=False)
    """Choose and sketch all anew after so many tokens; 0: never."""

    def __post_init__(self) -> None:
        check_keep(self.keep, self.name)
        for option, least in (("window", 1), ("rows", 1)):
            check_count(option, getattr(self, option), least, self.name)
        check_seed(self.seed, self.name)
        check_count("refresh", self.refresh, 0, self.name)
        if not isinstance(self.vague, float) or not 0 < self.vague < 1:
            raise OptionError(f"vague={self.vague!r}", f"compressor {self.name!r}", "give a share in (0, 1)")

    @property
    def queries(self) -> int:
        """The window."""
        return self.window

    @property
    def least_tail(self) -> int:
        """The window."""
        return self.window

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> RevivedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by the queries [H, w, D] of the last w tokens."""
        run, count = self.store(keys, values, queries, max(keys.shape[1] - self.window, 0))
        return RevivedKV((run,), (count,), self)

    def store(self, keys: Tensor, values: Tensor, queries: Tensor | None, covered: int) -> tuple[Run, int]:
        """The first `covered` tokens of keys [K, S, D] and values [K, S, Dv] as a run, and how many are sketched."""
        assert queries is not None, f"{self.name} scores tokens by the last queries: pass them"
        slots = budget(self.keep, covered)
        width = max(int(self.vague * slots) // self.rows, 1)
        exact = max(slots - self.rows * width, 1)
        if exact + self.rows * width + 1 >= covered:  # with the mean it takes no less than the tokens
            whole = [x[:, :covered].clone(memory_format=torch.contiguous_format) for x in (keys, values)]
            return Run(whole[0], whole[1], ()), 0
        scores = mean_attention(keys, queries[:, -self.window :], keys.shape[1] - covered)
        order = _best_first(scores, exact)
        chosen, others = order[:, :exact], order[:, exact:]
        sketches = tuple(self.sketch(take_tokens(x, others), width) for x in (keys, values))
        return Run(take_tokens(keys, chosen), take_tokens(values, chosen), sketches), covered - exact

    def sketch(self, x: Tensor, width: int) -> Sketch:
        """The sketch of tokens x [K, E, D], E >= 1, in rows of `width` buckets."""
        kv_heads, count, size = x.shape
        bucket, sign = self.hashes(count, width, x.device)
        mean = x.float().mean(dim=1, keepdim=True)
        signed = (x.float() - mean).unsqueeze(1) * sign.unsqueeze(-1)
        index = bucket[None, :, :, None].expand(kv_heads, -1, -1, size)
        empty = torch.zeros(kv_heads, self.rows, width, size, dtype=torch.float32, device=x.device)
        return Sketch(empty.scatter_add_(2, index, signed).to(x.dtype), mean.to(x.dtype))

    def revive(self, sketch: Sketch, count: int) -> Tensor:
        """The `count` tokens [K, E, D] of a sketch."""
        kv_heads, rows, width, size = sketch.buckets.shape
        bucket, sign = self.hashes(count, width, sketch.mean.device)
        index = bucket[None, :, :, None].expand(kv_heads, -1, -1, size)
        read = (sketch.buckets.float().gather(2, index) * sign.unsqueeze(-1)).mean(dim=1)
        shrunk = read / (1 + (count - 1) / (rows * width))
        return (shrunk + sketch.mean.float()).to(sketch.mean.dtype)

    def hashes(self, count: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Bucket [r, E], int64, and sign [r, E], 1 or -1 in float32, of tokens 0 to E - 1."""
        factor, added = drawn(device, self.seed, self.rows)
        hashed = (factor * torch.arange(count, device=device) + added) % PRIME
        return hashed[0] % width, (1 - 2 * (hashed[1] % 2)).float()


@constant
def drawn(seed: int, rows: int) -> Tensor:
    """Factors and summands of the hashes, int64 [2, 2, r, 1]."""
    return torch.randint(1, PRIME, (2, 2, rows, 1), generator=torch.Generator().manual_seed(seed))


def _best_first(scores: Tensor, exact: int) -> Tensor:
    """All tokens by scores [K, C]: the best `exact` in ascending order, then the others in ascending order."""
    best = top_tokens(scores, exact)
    rank = torch.ones_like(scores, dtype=torch.int64).scatter_(1, best, 0)
    return rank.argsort(dim=1, stable=True)
