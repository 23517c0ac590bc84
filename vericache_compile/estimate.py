"""Bytes that a decode step reads and writes, estimated from shapes; no step is run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.dense import DenseKV
from vericache_compile.compressors.facts import Facts, reader_of
from vericache_compile.passes.program import example, placeholders
from vericache_compile.plan import Site

PROBES = (1024, 16384)
"""Tokens compressed to measure a method's bytes per token: more of them where it covers none of a few."""


def compressed_bytes(compressor: Compressor, sites: Sequence[Site]) -> float:
    """Bytes per token that the compressor takes at all sites together, measured on a region of zeros."""
    return sum(_draft_bytes(compressor, sites))


def bytes_read(compressor: Compressor, sites: Sequence[Site], tokens: int) -> tuple[float, float]:
    """Bytes of one sequence's KV that a full step and a draft step read over so many tokens, at all sites together."""
    columns = [site.columns_read(tokens) for site in sites]
    full = sum(site.bytes_per_token * read for site, read in zip(sites, columns, strict=True))
    draft = sum(size * read for size, read in zip(_draft_bytes(compressor, sites), columns, strict=True))
    return float(full), draft


def _draft_bytes(compressor: Compressor, sites: Sequence[Site]) -> list[float]:
    """Bytes per token of draft's cache at each site; sliding windows are kept as they are."""
    measured: dict[tuple[object, ...], float] = {}
    found: list[float] = []
    for site in sites:
        method = compressor.for_layer(site.layer, len(sites))
        shape = (repr(method), site.heads, site.kv_heads, site.head_size, site.value_size)
        if site.window is not None:
            found.append(float(site.bytes_per_token))
        elif method.donor is not None:
            lends = sites[method.donor].shape == site.shape  # one of another shape lends nothing
            found.append(0.0 if lends else float(site.bytes_per_token))
        else:
            if shape not in measured:
                measured[shape] = _bytes_per_token(method, site)
            found.append(measured[shape])
    return found


def bytes_reloaded(compressor: Compressor, sites: Sequence[Site], tokens: int) -> float:
    """Bytes of one sequence's full KV over so many tokens that a round brings from host memory, at all sites together.

    What drafts hold as it was cached is left out: sliding windows, and what a method keeps without changing it.
    """
    shares: dict[tuple[object, ...], float] = {}
    total = 0.0
    for site in sites:
        if site.window is not None:
            continue
        method = compressor.for_layer(site.layer, len(sites))
        shape = (repr(method), site.heads, site.kv_heads, site.head_size, site.value_size)
        if shape not in shares:
            shares[shape] = _share_reloaded(method, site)
        total += shares[shape] * site.bytes_per_token * tokens
    return total


def _share_reloaded(method: Compressor, site: Site) -> float:
    if method.donor is not None:
        return 1.0
    region = _probe(method, site)
    if region is None:
        return 0.0  # all stay in the exact tail
    own = region.as_cached
    return 1.0 if own is None else 1 - sum(own) / (len(own) * region.covered)


def _bytes_per_token(method: Compressor, site: Site) -> float:
    region = _probe(method, site)
    if region is None:
        return float(site.bytes_per_token)
    own = region.keys.nbytes if site.latent and isinstance(region, DenseKV) else region.nbytes
    return own / region.covered


def _probe(method: Compressor, site: Site) -> CompressedKV | None:
    """A region of zeros; None where all stays in the exact tail."""
    for tokens in PROBES:
        keys = torch.zeros(site.kv_heads, tokens, site.head_size, dtype=site.dtype)
        values = torch.zeros(site.kv_heads, tokens, site.value_size, dtype=site.dtype)
        queries = torch.zeros(site.heads, 32, site.head_size, dtype=site.dtype)
        facts = Facts(read=reader_of(keys, values))
        region = method.knowing(facts).compress(keys, values, queries)
        if region.covered:
            return region
    return None


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
