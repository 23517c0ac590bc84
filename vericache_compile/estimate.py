"""Bytes that a decode step reads and writes, estimated from shapes; no step is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.compressors.facts import Facts, reader_of
from vericache_compile.config import Config
from vericache_compile.kernels.int8_linear import GROUP
from vericache_compile.passes.program import example, placeholders
from vericache_compile.passes.spell_products import dtype_read
from vericache_compile.plan import Site

PROBES = (1024, 16384)
"""Tokens compressed to measure a method's bytes per token: more of them where it covers none of a few."""


@dataclass(frozen=True)
class SiteBytes:
    """Bytes per token of one site."""

    draft: float
    """Of draft's cache."""
    left: float
    """Of full KV that draft's cache does not hold as it was cached."""
    whole: float = 0.0
    """Of draft's cache what is tokens kept whole."""
    codes: float = 0.0
    """Of draft's cache what is codes that kernels read."""
    tail: int = 0
    """Tokens, not bytes: the newest, which the method leaves to the exact tail whenever others join."""


@dataclass(frozen=True)
class Measured:
    """What a compressor takes per token at each site."""

    compressor: Compressor
    sites: tuple[Site, ...]
    own: tuple[SiteBytes, ...]

    @property
    def draft(self) -> float:
        """Bytes per token of draft's cache at all sites together."""
        return sum(each.draft for each in self.own)

    @property
    def whole(self) -> float:
        """Bytes per token of draft's caches of tokens kept whole, which grow in place on a GPU, and so have room to."""
        return sum(each.whole for each in self.own)

    @property
    def codes(self) -> float:
        """Bytes per token of those of codes that kernels read, which do too."""
        return sum(each.codes for each in self.own)

    def tail(self, beyond: int) -> float:
        """Bytes of the tokens that stay in exact tails, beyond so many at each site."""
        pairs = zip(self.sites, self.own, strict=True)
        return float(sum(site.bytes_per_token * max(own.tail - beyond, 0) for site, own in pairs))

    def read(self, tokens: int) -> tuple[float, float]:
        """Bytes of one sequence's KV that a full step and a draft step read over so many tokens, at all sites."""
        columns = [site.columns_read(tokens) for site in self.sites]
        full = sum(site.bytes_per_token * read for site, read in zip(self.sites, columns, strict=True))
        return float(full), sum(own.draft * read for own, read in zip(self.own, columns, strict=True))

    def reloaded(self, tokens: int) -> float:
        """Bytes of one sequence's full KV over so many tokens that come in for verify, at all sites.

        That is what drafts do not hold as it was cached; all, where regions are soon made anew.
        """
        if not self.compressor.is_lasting:
            return float(tokens * sum(site.bytes_per_token for site in self.sites if site.window is None))
        return tokens * sum(each.left for each in self.own)


def measure(compressor: Compressor, sites: Sequence[Site], probes: Sequence[int] = PROBES) -> Measured:
    """A compressor's bytes at these sites, measured on a region of as many tokens as the first probe that it covers any
    of.

    Sliding windows are kept as they are, and so is a site that would borrow from one of another shape.
    """
    measured: dict[tuple[object, ...], SiteBytes] = {}
    found: list[SiteBytes] = []
    for site in sites:
        method, full = compressor.for_layer(site.layer, len(sites)), float(site.bytes_per_token)
        shape = (repr(method), site.heads, site.kv_heads, site.head_size, site.value_size)
        if site.window is not None:
            found.append(SiteBytes(full, 0.0))
        elif method.donor is not None:
            lends = sites[method.donor].shape == site.shape
            found.append(SiteBytes(0.0, full) if lends else SiteBytes(full, 0.0, full))
        else:
            if shape not in measured:
                measured[shape] = _measure(method, site, probes)
            found.append(measured[shape])
    return Measured(compressor, tuple(sites), tuple(found))


def compressed_bytes(compressor: Compressor, sites: Sequence[Site], tokens: int = PROBES[0]) -> float:
    """Bytes per token that the compressor takes at all sites together, measured on a region of so many."""
    return measure(compressor, sites, (tokens, *PROBES)).draft


def _measure(method: Compressor, site: Site, probes: Sequence[int]) -> SiteBytes:
    region, full = _probe(method, site, probes), float(site.bytes_per_token)
    if region is None:
        return SiteBytes(full, 0.0)
    kept, dense = region.as_cached or (0,), isinstance(region, DenseKV)
    own = (region.keys.nbytes if site.latent and isinstance(region, DenseKV) else region.nbytes) / region.covered
    left = full * (1 - sum(kept) / (len(kept) * region.covered))
    codes = own if region.packed is not None else 0.0
    return SiteBytes(own, left, own if dense else 0.0, codes, method.least_tail)


def _probe(method: Compressor, site: Site, probes: Sequence[int]) -> CompressedKV | None:
    """A region of normal numbers, since bytes may depend on them; None where all stays in the exact tail."""
    generator = torch.Generator("cpu").manual_seed(0)

    def some(heads: int, tokens: int, size: int) -> torch.Tensor:
        return torch.randn(heads, tokens, size, generator=generator, dtype=torch.float32, device="cpu").to(site.dtype)

    for tokens in probes:
        keys, values = some(site.kv_heads, tokens, site.head_size), some(site.kv_heads, tokens, site.value_size)
        queries = some(site.heads, 32, site.head_size)
        facts = Facts(read=reader_of(keys, values))
        region = method.knowing(facts).compress(keys, values, queries)
        if region.covered:
            return region
    return None


def bytes_per_weight(config: Config, dtype: torch.dtype, device: torch.device, rows: int) -> float:
    """Bytes of a weight as drafts of so many rows read it, its share of an int8 copy's scale included."""
    low = dtype_read(config.draft_dtype_on(device), device, rows)
    if low is None or low.itemsize >= dtype.itemsize:
        return dtype.itemsize
    return low.itemsize + (0.0 if low.is_floating_point else torch.bfloat16.itemsize / GROUP)


GATHERS = (torch.ops.aten.embedding.default, torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default)
"""Calls that read a few rows of a weight, not all of it."""


def weight_bytes(variant: GraphModule, weights: Sequence[int]) -> int:
    """Bytes of weights that one run of a traced variant reads; `weights` are those inputs of the captured graph."""
    known = set(weights)
    inputs = [node for node in placeholders(variant) if node.meta.get("captured_input") in known]
    return sum(_bytes_read(node) for node in inputs)


def _bytes_read(weight: Node) -> int:
    value = example(weight)
    if not weight.users:
        return 0
    if all(user.target in GATHERS for user in weight.users):
        rows = sum(example(user).numel() // value.shape[-1] for user in weight.users)
        return int(rows * value.shape[-1] * value.element_size())
    return int(value.numel() * value.element_size())
