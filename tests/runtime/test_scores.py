"""Soft caps, ALiBi and sinks: right against the operator, and bits that do not depend on a token's place in a window.

Shapes: B batch, H query heads, K KV heads, C columns, W window, D head size, E value head size.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vericache_compile import ops
from vericache_compile.kernels import native
from vericache_compile.kernels.block_attention import BLOCK
from vericache_compile.plan import Alibi, Site
from vericache_compile.runtime.attention import Visible, attend_compressed, attend_full
from vericache_compile.runtime.scores import scores_of

HEADS, KV_HEADS, COLUMNS = 6, 2, 3 * BLOCK
SLOPES = tuple(2.0**-h for h in range(1, HEADS + 1))
PLAIN = Site(0, HEADS, KV_HEADS, 16, 16, 0.25, torch.float32, (0, 1))
SITES = {
    "cap": replace(PLAIN, soft_cap=3.0),
    "sinks": replace(PLAIN, sinks=True),
    "alibi": replace(PLAIN, alibi=Alibi(SLOPES, torch.float32, relative=False)),
    "rounded": replace(PLAIN, alibi=Alibi(SLOPES, torch.bfloat16, relative=False)),
    "relative": replace(PLAIN, alibi=Alibi(SLOPES, torch.float32, relative=True)),
    "all": replace(PLAIN, soft_cap=3.0, sinks=True, alibi=Alibi(SLOPES, torch.float32, relative=False)),
    "sliding": replace(PLAIN, soft_cap=3.0, sinks=True, alibi=Alibi(SLOPES, torch.float32, relative=False), window=13),
    "far": replace(PLAIN, sinks=True, window=300),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(params=["kernel", "reference"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Our kernel, and what runs where it does not serve."""
    if request.param == "reference":
        monkeypatch.setattr(native, "load", lambda: None)
    chosen: str = request.param
    return chosen


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sinks_of(site: Site) -> Tensor | None:
    """Sinks that take a good part of the softmax."""
    return 2 * draw(HEADS, seed=9) + 2 if site.sinks else None


def call_operator(site: Site, q: Tensor, keys: Tensor, values: Tensor, start: int, pad: int) -> Tensor:
    """The operator's eager kernel in float32, for the tokens at start + (0..W-1) of one row."""
    window = q.shape[2]
    new = (x[:, :, start : start + window] for x in (keys, values))
    past = (x[:, :, :start] for x in (keys, values))
    alibi = site.alibi
    how = () if alibi is None else (list(alibi.slopes), alibi.dtype, alibi.relative)
    row = (torch.tensor([start]), torch.tensor([pad]))
    sinks = sinks_of(site)
    inputs = [x.float() for x in (q, *new, *past)]
    return ops.attend(*inputs, *row, site.scale, 0, site.window, sinks, site.soft_cap, *how)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SITES)
def test_windows_equal_the_operator(name: str, dtype: torch.dtype) -> None:
    site = SITES[name]
    keys, values = (draw(1, KV_HEADS, COLUMNS, 16, seed=seed, dtype=dtype) for seed in (1, 2))
    for window, start, pad in ((2, 0, 0), (4, 254, 0), (8, 250, 17), (4, 300, 256), (16, 513, 511)):
        q = draw(1, HEADS, window, 16, seed=start, dtype=dtype) * 3
        scores = scores_of(site, sinks_of(site), start + window, q.device)
        made = attend_full(q, keys, values, [start], [pad], site.scale, site.window, scores=scores)
        assert made.dtype == dtype
        expected = call_operator(site, q, keys, values, start, pad)
        assert (made.float() - expected).abs().max() < TOLERANCE[dtype], (window, start, pad)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", SITES)
def test_triton_kernels_take_the_same_scores(name: str, path: str) -> None:
    if path == "reference":
        pytest.skip("neither of them runs here")
    site = SITES[name]
    keys, values = (draw(1, KV_HEADS, COLUMNS, 16, seed=seed) for seed in (1, 2))
    window, start, pad = 4, 300, 200
    q = draw(1, HEADS, window, 16, seed=start) * 3
    scores = scores_of(site, sinks_of(site), start + window, q.device)
    made = attend_full(q, keys, values, [start], [pad], site.scale, site.window, scores=scores)
    expected = call_operator(site, q, keys, values, start, pad)
    assert (made - expected).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("size", [16, 24])
@pytest.mark.parametrize("name", [name for name, site in SITES.items() if site.window is None])
def test_a_draft_step_equals_the_operator(name: str, size: int) -> None:
    """Slots begin where the row's first token is; what lies before and after is not read."""
    site = SITES[name]
    lengths, offset = (40, 300), 7
    keys, values = (draw(2, KV_HEADS, COLUMNS, size, seed=seed) for seed in (1, 2))
    q = draw(2, HEADS, 1, size, seed=3)
    visible = Visible(((offset, offset),) * 2, tuple(offset + length for length in lengths))
    scores = scores_of(site, sinks_of(site), max(visible.rights), q.device)
    made = attend_compressed(q, keys, values, visible, site.scale, {}, scores)
    for b, length in enumerate(lengths):
        row = (x[b : b + 1, :, offset:] for x in (keys, values))
        expected = call_operator(site, q[b : b + 1], *row, length - 1, 0)
        assert (made[b] - expected[0]).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", SITES)
def test_a_tokens_bits_do_not_depend_on_its_place_nor_on_the_batch(name: str) -> None:
    site, window, column = SITES[name], 8, 258
    keys, values = (draw(1, KV_HEADS, COLUMNS, 16, seed=seed) for seed in (1, 2))
    q = draw(1, HEADS, COLUMNS, 16, seed=3)
    scores = scores_of(site, sinks_of(site), COLUMNS, q.device)
    rows = []
    for start in range(column - window + 1, column + 1):
        own = q[:, :, start : start + window]
        for batch in (1, 2):
            given = [x.expand(batch, -1, -1, -1) for x in (own, keys, values)]
            made = attend_full(*given, [start] * batch, [3] * batch, site.scale, site.window, scores=scores)
            rows += [made[b, :, column - start] for b in range(batch)]
    assert all(torch.equal(rows[0], row) for row in rows[1:])


def test_a_plain_site_changes_no_scores() -> None:
    assert scores_of(PLAIN, None, 10, torch.device("cpu")) is None
    with pytest.raises(AssertionError, match="sinks in its plan or in its graph"):
        scores_of(SITES["sinks"], None, 10, torch.device("cpu"))
