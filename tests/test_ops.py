"""The canonical operators against plain loops, and their rules for torch and for windows."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vericache_compile import ops
from vericache_compile.kernels import native
from vericache_compile.ops import LINEAR, attend, fill, has_onednn, heads_mm


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attend_by_loops(
    q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, lengths: list[int], pads: list[int], scale: float
) -> Tensor:
    """One query at a time over the rows that it may see, in float64."""
    batch, heads, tokens, _ = q.shape
    group = heads // k.shape[1]
    out = torch.empty(batch, heads, tokens, v.shape[3], dtype=torch.float64)
    for b, h, t in ((b, h, t) for b in range(batch) for h in range(heads) for t in range(tokens)):
        past = slice(pads[b], max(lengths[b], pads[b]))
        keys = torch.cat([past_k[b, h // group, past], k[b, h // group, : t + 1]]).double()
        values = torch.cat([past_v[b, h // group, past], v[b, h // group, : t + 1]]).double()
        out[b, h, t] = (keys @ q[b, h, t].double() * scale).softmax(-1) @ values
    return out


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(1, 5),
    columns=st.integers(0, 9),
    kv_heads=st.sampled_from([1, 2, 4]),
    value_size=st.sampled_from([3, 8]),
    data=st.data(),
)
def test_attend_sees_a_rows_own_columns_and_the_tokens_before(
    tokens: int, columns: int, kv_heads: int, value_size: int, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(0, columns), min_size=2, max_size=2))
    pads = [data.draw(st.integers(0, length)) for length in lengths]
    q, k, v = draw(2, 4, tokens, 8), draw(2, kv_heads, tokens, 8, seed=1), draw(2, kv_heads, tokens, value_size, seed=2)
    past_k, past_v = draw(2, kv_heads, columns, 8, seed=3), draw(2, kv_heads, columns, value_size, seed=4)
    expected = attend_by_loops(q, k, v, past_k, past_v, lengths, pads, 0.3)
    for b in range(2):
        for past in (past_k, past_v):
            past[b, :, lengths[b] :] = math.nan
            past[b, :, : pads[b]] = math.nan
    made = attend(q, k, v, past_k, past_v, torch.tensor(lengths), torch.tensor(pads), 0.3, 0)
    torch.testing.assert_close(made, expected.float(), atol=1e-5, rtol=1e-5)


CALL = (
    draw(2, 4, 3, 8),
    draw(2, 2, 3, 8, seed=1),
    draw(2, 2, 3, 8, seed=2),
    draw(2, 2, 7, 8, seed=3),
    draw(2, 2, 7, 8, seed=4),
    torch.tensor([7, 4]),
    torch.tensor([0, 2]),
    0.5,
    1,
)
CHANGED = (*CALL, 3, draw(4, seed=5), 2.0, [0.5, 0.25, 0.125, 0.0625], torch.bfloat16, True)
"""The same with a window, sinks, a soft cap and biases by distance."""
LATENT = (draw(2, 4, 3, 10), draw(2, 1, 3, 10, seed=1), draw(2, 1, 3, 7, seed=2), draw(2, 1, 7, 7, seed=3),
          draw(2, 1, 7, 3, seed=4), *CALL[5:], None, None, None, None, torch.float32, False, True)  # fmt: skip
"""One key for all heads, of 7 numbers that are also the value, and 3 more."""
PRODUCT = (draw(2, 3, 8), draw(5, 8, seed=1), draw(5, seed=2))
BY_HEAD = (draw(2, 3, 4, 8), draw(4, 8, 5, seed=1))


@pytest.mark.parametrize(
    ("operator", "inputs"),
    [
        (attend, CALL),
        (attend, CHANGED),
        (attend, LATENT),
        (LINEAR, PRODUCT),
        (LINEAR, (*PRODUCT[:2], None)),
        (heads_mm, BY_HEAD),
    ],
)
def test_torch_finds_no_fault_with_the_operators(operator: object, inputs: tuple[object, ...]) -> None:
    torch.library.opcheck(operator, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("transposed", [False, True])
def test_fake_results_have_the_strides_of_real_ones(transposed: bool) -> None:
    q, k, v, *rest = (x.mT.contiguous().mT if transposed and isinstance(x, Tensor) and x.dim() > 2 else x for x in CALL)
    x = PRODUCT[0].transpose(0, 1) if transposed else PRODUCT[0]
    by_head = BY_HEAD[0].transpose(0, 1) if transposed else BY_HEAD[0]
    for operator, inputs in (
        (attend, (q, k, v, *rest)),
        (LINEAR, (x, *PRODUCT[1:])),
        (heads_mm, (by_head, BY_HEAD[1])),
    ):
        real = operator(*inputs)
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs))
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.parametrize("relative", [False, True])
def test_scores_are_capped_biased_and_sunk_in_that_order(relative: bool) -> None:
    q, k, v, past_k, past_v, lengths, pads, scale, layer = CALL
    sinks, cap, slopes = draw(4, seed=5), 2.0, [0.5, 0.25, 0.125, 0.0625]
    scores = (sinks, cap, slopes, torch.float32, relative)
    made = attend(q, k, v, past_k, past_v, lengths, pads, scale, layer, None, *scores)
    for b, (length, pad) in enumerate(zip(lengths.tolist(), pads.tolist(), strict=True)):
        for t in range(q.shape[2]):
            for h in range(4):
                keys, values = (
                    torch.cat([past[b, h // 2, pad:length], new[b, h // 2, : t + 1]])
                    for past, new in ((past_k, k), (past_v, v))
                )
                scores = cap * torch.tanh(keys @ q[b, h, t] * scale / cap)
                place = torch.arange(len(keys)) - (len(keys) - 1 if relative else 0)
                shares = torch.cat([scores + slopes[h] * place, sinks[h : h + 1]]).softmax(0)[:-1]
                torch.testing.assert_close(made[b, h, t], shares @ values)


@pytest.mark.parametrize("call", [CALL, CHANGED], ids=["plain", "changed"])
def test_a_window_of_one_token_calls_is_one_call_on_its_tokens(call: tuple[object, ...]) -> None:
    window = 5
    q, k, v = draw(window, 2, 4, 1, 8), draw(window, 2, 2, 1, 8, seed=1), draw(window, 2, 2, 1, 8, seed=2)
    rest = call[3:]
    rows = torch.func.vmap(lambda q, k, v: attend(q, k, v, *rest))(q, k, v)
    tokens = [x.squeeze(3).permute(1, 2, 0, 3) for x in (q, k, v)]
    assert torch.equal(rows, attend(*tokens, *rest).permute(2, 0, 1, 3).unsqueeze(3))


def test_keys_that_do_not_vary_over_a_window_are_repeated() -> None:
    q, k, v = draw(4, 2, 4, 1, 8), draw(2, 2, 1, 8, seed=1), draw(2, 2, 1, 8, seed=2)
    made = torch.func.vmap(lambda q: attend(q, k, v, *CALL[3:]))(q)
    rows = [x.expand(4, *x.shape) for x in (k, v)]
    assert torch.equal(made, torch.func.vmap(lambda q, k, v: attend(q, k, v, *CALL[3:]))(q, *rows))


def test_a_cache_that_varies_over_a_window_is_refused() -> None:
    past = draw(4, 2, 2, 7, 8)
    with pytest.raises(NotImplementedError, match="only queries, keys and values differ over a window"):
        torch.func.vmap(lambda past: attend(*CALL[:3], past, *CALL[4:]))(past)


def test_a_latent_is_cached_beside_the_rest_of_the_key() -> None:
    q, k, v, latent, rotated, *rest = LATENT
    keys = torch.cat([latent, rotated], dim=-1)
    assert torch.equal(attend(*LATENT), attend(q, k, v, keys, latent, *rest[:4]))


def test_each_heads_rows_are_multiplied_by_its_own_weight() -> None:
    x, weight = BY_HEAD
    torch.testing.assert_close(heads_mm(x, weight), torch.einsum("abhi,hio->abho", x, weight))
    made = torch.func.vmap(lambda x: heads_mm(x, weight), in_dims=1)(x)
    assert torch.equal(made, heads_mm(x.transpose(0, 1), weight))
    with pytest.raises(NotImplementedError, match="a weight differs over the window"):
        torch.func.vmap(lambda weight: heads_mm(x, weight))(draw(3, 4, 8, 5))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("bias", [PRODUCT[2], None])
def test_a_window_of_products_is_one_product(bias: Tensor | None, axis: int) -> None:
    x, weight = draw(4, 2, 3, 8), PRODUCT[1]
    made = torch.func.vmap(lambda x: LINEAR(x, weight, bias), in_dims=axis)(x.movedim(0, axis))
    assert torch.equal(made, LINEAR(x, weight, bias))


def test_a_weight_that_varies_over_a_window_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="a weight differs over the window"):
        torch.func.vmap(lambda weight: LINEAR(PRODUCT[0], weight, None))(draw(4, 5, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "out"), [(64, 97), (576, 192), (1536, 576)])
def test_a_rows_product_has_the_same_bits_at_each_place(size: int, out: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, size, generator=generator).to(dtype)
    if not has_onednn(weight):
        pytest.skip("oneDNN does not take this type here; verify pads its row counts instead")
    for rows in (*range(2, 33), 48, 64, 96):
        x = torch.randn(rows, size, generator=generator).to(dtype)
        places, others = torch.randperm(rows, generator=generator), torch.randn(rows, size).to(dtype)
        others[places[0]] = x[0]
        made = LINEAR(x, weight, None)
        assert torch.equal(LINEAR(x[places], weight, None), made[places]), rows
        assert torch.equal(LINEAR(others, weight, None)[places[0]], made[0]), rows


def cancelling(rows: int, size: int, sign: int, seed: int) -> Tensor:
    """Numbers [rows, size] whose products with those of the other sign sum to zero: what is left is how it was done."""
    half, order = draw(rows, size // 2, seed=seed), torch.randperm(size, generator=torch.Generator().manual_seed(9))
    return torch.cat([half, sign * half], dim=1)[:, order].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "out"), [(64, 97), (576, 192), (1536, 576)])
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("bias", [False, True])
def test_of_a_window_the_rows_that_are_wanted_have_the_bits_that_they_have_among_all(
    size: int, out: int, batch: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By oneDNN, which may sum in another order for few rows than for many."""
    monkeypatch.setattr(native, "load", lambda: None)
    weight, x = (cancelling(*each).to(dtype) for each in ((out, size, 1, 1), (16 * batch, size, -1, 2)))
    if not has_onednn(weight):
        pytest.skip("oneDNN does not take this type here")
    x, added = x.view(16, batch, 1, size), draw(out).to(dtype) / 1024 if bias else None
    whole = LINEAR(x, weight, added, True)
    assert whole.count_nonzero() > whole.numel() // 16
    for wanted in (1, 2, 5, 16):
        token = ops.WANTED.set(wanted)
        try:
            made, other = LINEAR(x, weight, added, True), LINEAR(x, weight, added)
        finally:
            ops.WANTED.reset(token)
        assert made.shape == whole.shape and made.is_contiguous()
        assert torch.equal(made[:wanted], whole[:wanted])
        assert torch.equal(made[wanted:], whole[:1].expand_as(whole[wanted:]))
        assert torch.equal(other, whole), "rows that are no window's"


def test_as_few_rows_are_multiplied_as_are_summed_in_the_order_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a library that sums backwards for eight rows or less; where little can be told apart, all are."""

    def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        products = (x[:, None] * weight).unbind(-1)
        return functools.reduce(torch.add, reversed(products) if x.shape[0] <= 8 else products)

    monkeypatch.setattr(ops, "_multiply", multiply)
    enough = ops._rows_enough.__wrapped__
    for shape, wanted, expected in (((64, 64), 2, 9), ((64, 64), 12, 12), ((63, 64), 2, 16), ((64, 63), 2, 16)):
        assert enough(torch.Size(shape), torch.float32, False, 16, wanted, 1) == expected


def test_row_counts_are_filled_where_onednn_treats_what_is_left_of_a_tile_in_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [fill(rows) for rows in (*range(1, 14), 16, 32)] == [*[0] * 6, 3, 2, 1, 0, 0, 0, 3, 0, 2]
    x, weight = draw(4, 2, 8), draw(5, 8)
    expected = LINEAR(x, weight, None)
    monkeypatch.setattr(ops, "_are_rows_alike", lambda: False)
    filled = LINEAR(x, weight, None)
    assert filled.shape == expected.shape
    torch.testing.assert_close(filled, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_a_heads_row_has_the_same_bits_at_each_place(turned: bool, dtype: torch.dtype) -> None:
    """Weights as absorbing and as expanding reads them; float64 is for libraries other than oneDNN."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 96, 160, generator=generator).to(dtype)
    weight = weight.mT.contiguous().mT if turned else weight
    for rows in (*range(2, 20), 32, 48):
        x = torch.randn(rows, 3, 96, generator=generator).to(dtype)
        places, others = torch.randperm(rows, generator=generator), torch.randn(rows, 3, 96).to(dtype)
        others[places[0]] = x[0]
        made = heads_mm(x, weight)
        assert torch.equal(heads_mm(x[places], weight), made[places]), rows
        assert torch.equal(heads_mm(others, weight)[places[0]], made[0]), rows
