"""Ghosts: a name in the payload of NaNs survives every move of data, and nothing else passes for one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vericache_compile.plan import Site
from vericache_compile.runtime.ghosts import BITS, FIELDS, FORMATS, Name, can_spell, is_hollow, read, spell

CPU = torch.device("cpu")
DTYPES = list(FORMATS)
WIDTHS = dict(FIELDS)
NAMES = st.builds(
    Name, **{field: st.integers(0, 2 ** WIDTHS[field] - 1) for field in ("sequence", "epoch", "row", "place")}
)
PERMUTATION = torch.tensor([2, 0, 1])
MOVES: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "crop": (lambda x: x[:, :, :4], [0, 1, 2]),
    "deepcopy": (copy.deepcopy, [0, 1, 2]),
    "clone": (lambda x: x.clone(), [0, 1, 2]),
    "contiguous": (lambda x: x.contiguous(), [0, 1, 2]),
    "contiguous, then crop": (lambda x: x.contiguous()[:, :, :4], [0, 1, 2]),
    "index_select": (lambda x: x.index_select(0, PERMUTATION.to(x.device)), [2, 0, 1]),
    "fancy indexing": (lambda x: x[torch.tensor([1, 1, 0, 2])], [1, 1, 0, 2]),
    "boolean mask": (lambda x: x[torch.tensor([True, False, True])], [0, 2]),
    "slice of rows": (lambda x: x[1:], [1, 2]),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=0), [0, 0, 1, 1, 2, 2]),
    "repeat": (lambda x: x.repeat(2, 1, 1, 1), [0, 1, 2, 0, 1, 2]),
    "expand": (lambda x: x[:1].expand(4, -1, -1, -1), [0, 0, 0, 0]),
    "cat of rows": (lambda x: torch.cat([x[2:], x[:1], x[2:]]), [2, 0, 2]),
    "stack of rows": (lambda x: torch.stack([x[1], x[0]]), [1, 0]),
    "flip of rows": (lambda x: x.flip(0), [2, 1, 0]),
    "where": (lambda x: torch.where(torch.tensor([True, False, True])[:, None, None, None], x, x.flip(0)), [0, 1, 2]),
    "to, copied": (lambda x: x.to("cpu", copy=True), [0, 1, 2]),
    "copy_": (lambda x: torch.zeros(x.shape, dtype=x.dtype).copy_(x), [0, 1, 2]),
    "transpose there and back": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), [0, 1, 2]),
}
ARITHMETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "times one": lambda x: x * 1.0,
    "times two": lambda x: x * 2.0,
    "plus zero": lambda x: x + 0,
    "sum of two": lambda x: x + x,
    "negation": lambda x: -x,
    "mean with itself": lambda x: (x + x) / 2,
    "times a mask of ones": lambda x: x * torch.ones(3, 1, 1, 1, dtype=x.dtype),
    "there and back through another type": lambda x: x.double().to(x.dtype),
}


def names_of(rows: int, place: int = 5) -> list[Name]:
    return [Name(sequence=123456, epoch=77, row=row, place=place) for row in range(rows)]


def make_ghost(dtype: torch.dtype, names: list[Name] | None = None, size: int = 16, columns: int = 9) -> Tensor:
    """A ghost [B, 2, columns, size]."""
    return spell([names or names_of(3)], 2, size, dtype, CPU)[0].expand(-1, -1, columns, -1)


def as_bits(tensor: Tensor) -> Tensor:
    return tensor.view(FORMATS[tensor.dtype][0])


@pytest.mark.parametrize("dtype", DTYPES)
@given(names=st.lists(NAMES, min_size=1, max_size=4))
def test_a_name_is_read_as_it_was_spelled(dtype: torch.dtype, names: list[Name]) -> None:
    assert read(make_ghost(dtype, names)) == names


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_spells_its_own_name(dtype: torch.dtype) -> None:
    places = [names_of(2, place) for place in range(6)]
    columns = spell(places, 3, 20, dtype, CPU)
    assert columns.shape == (6, 2, 3, 1, 20)
    assert [read(column) for column in columns] == places


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ghost_is_nan_all_over_and_holds_one_column(dtype: torch.dtype) -> None:
    ghost = make_ghost(dtype, columns=1000, size=64)
    assert ghost.isnan().all()
    assert is_hollow(ghost)
    assert ghost.stride(2) == 0
    assert ghost.untyped_storage().nbytes() == 3 * 2 * 64 * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move", MOVES)
def test_a_name_survives_every_move_of_data(move: str, dtype: torch.dtype) -> None:
    function, rows = MOVES[move]
    names = names_of(3)
    assert read(function(make_ghost(dtype, names))) == [names[row] for row in rows]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_two_sequences_keep_their_names(dtype: torch.dtype) -> None:
    other = dataclasses.replace(names_of(1)[0], sequence=3)
    assert read(torch.cat([make_ghost(dtype), make_ghost(dtype, [other])])) == [*names_of(3), other]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("move", [name for name in MOVES if name != "to, copied"])
def test_a_name_survives_a_journey_to_the_gpu(move: str, dtype: torch.dtype) -> None:
    function, rows = MOVES[move]
    names = names_of(3)
    with torch.device("cuda"):
        moved = function(make_ghost(dtype, names).cuda())
    assert read(moved) == read(moved.cpu()) == [names[row] for row in rows]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ARITHMETIC)
def test_arithmetic_on_the_gpu_takes_the_name_away(operation: str, dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        changed = ARITHMETIC[operation](make_ghost(dtype).cuda())
    assert read(changed) is None
    assert is_hollow(changed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operation", ARITHMETIC)
def test_arithmetic_takes_the_name_away(operation: str, dtype: torch.dtype) -> None:
    """What is left is NaN: never taken for the sequence, and never for data."""
    changed = ARITHMETIC[operation](make_ghost(dtype))
    assert read(changed) is None
    assert is_hollow(changed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_over_a_ghost_is_nan(dtype: torch.dtype) -> None:
    ghost = make_ghost(dtype)
    out = torch.nn.functional.scaled_dot_product_attention(torch.randn(3, 2, 1, 16).to(dtype), ghost, ghost)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_flipped_bit_is_refused(dtype: torch.dtype) -> None:
    """Any bit of any element that spells, the sign and the exponent included."""
    view, _, free = FORMATS[dtype]
    for names in ([Name(1, 0, 0, 0)], [Name(2**24 - 1, 2**16 - 1, 2**12 - 1, 2**12 - 1)], names_of(1)):
        for element in range(-(-BITS // free)):
            for bit in range(8 * dtype.itemsize):
                ghost = make_ghost(dtype, names).contiguous()
                as_bits(ghost)[..., element] ^= (
                    torch.tensor(-1 if bit == 8 * dtype.itemsize - 1 else 1, dtype=view) << bit
                )
                assert read(ghost) is None, f"{names}, element {element}, bit {bit}"


@given(name=NAMES, field=st.sampled_from(["sequence", "epoch", "row", "place"]), bit=st.integers(0, 23))
def test_check_bits_depend_on_every_bit(name: Name, field: str, bit: int) -> None:
    flipped = dataclasses.replace(name, **{field: getattr(name, field) ^ 1 << bit % WIDTHS[field]})
    assert flipped.check != name.check


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6))
def test_random_data_is_not_a_ghost(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(2, 2, 5, 16, generator=generator).to(dtype)
    assert read(data) is None
    assert not is_hollow(data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -0.0])
def test_constants_are_not_ghosts(dtype: torch.dtype, value: float) -> None:
    assert read(torch.full((2, 2, 5, 16), value, dtype=dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_nans_with_a_random_payload_are_not_ghosts(dtype: torch.dtype) -> None:
    """Twelve check bits and the bits that must be zero: few of the random ones in two rows pass by chance."""
    view, empty, free = FORMATS[dtype]
    generator = torch.Generator().manual_seed(0)
    payload = torch.randint(0, 2**free, (300, 2, 1, 1, 16), generator=generator)
    nans = (payload + empty).to(view).view(dtype).expand(-1, -1, 1, 5, -1)
    assert sum(read(one) is not None for one in nans) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_of_two_ghosts_are_not_one(dtype: torch.dtype) -> None:
    later = [dataclasses.replace(name, epoch=78) for name in names_of(3)]
    assert read(torch.cat([make_ghost(dtype), make_ghost(dtype, later)], dim=2)) is None
    assert read(torch.cat([make_ghost(dtype), torch.zeros(3, 2, 1, 16, dtype=dtype)], dim=2)) is None


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 2, 0, 16),
        torch.zeros(0, 2, 5, 16),
        torch.zeros(2, 5, 16),
        torch.zeros(2, 2, 5, 1),
        torch.zeros(2, 2, 5, 16, dtype=torch.float64),
        torch.zeros(2, 2, 5, 16, dtype=torch.int64),
    ],
    ids=lambda tensor: f"{list(tensor.shape)} {tensor.dtype}",
)
def test_other_tensors_are_not_ghosts(tensor: Tensor) -> None:
    assert read(tensor) is None


def test_a_cache_without_columns_holds_no_nan() -> None:
    assert not is_hollow(torch.zeros(2, 2, 0, 16))


@pytest.mark.parametrize("column", [0, -1])
def test_nan_at_either_end_is_hollow(column: int) -> None:
    data = torch.zeros(2, 2, 5, 16)
    data[1, 1, column, 3] = float("nan")
    assert is_hollow(data)


def test_sites_must_have_room_for_a_name() -> None:
    def site(size: int, value_size: int, dtype: torch.dtype) -> Site:
        return Site(0, 4, 2, size, value_size, 1.0, dtype, None)

    for dtype, least in ((torch.float32, 4), (torch.float16, 10), (torch.bfloat16, 16)):
        assert can_spell(site(least, least, dtype))
        assert not can_spell(site(least - 1, 64, dtype))
        assert not can_spell(site(64, least - 1, dtype))
        assert read(make_ghost(dtype, size=least)) == names_of(3)
    assert not can_spell(site(64, 64, torch.float64))


def test_ghosts_made_under_inference_mode_can_be_used_outside() -> None:
    with torch.inference_mode():
        ghost = make_ghost(torch.float32)
    assert not ghost.is_inference()
