"""The table of methods, and what every method in it promises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vericache_compile.compressors.facts import KINDS, Facts
from vericache_compile.compressors.gear import start
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.kvreviver import drawn
from vericache_compile.compressors.learned import Learner
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.recall import IndexedKV
from vericache_compile.compressors.rotatekv import hadamard
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.spec import parse
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.compressors.table import BUDGETS, COMPRESSORS, make_compressor
from vericache_compile.compressors.turboquant import codebook, rotation
from vericache_compile.errors import OptionError
from vericache_compile.testing import check_refusals, check_region, check_whole, random_row, storages

METHODS = pytest.mark.parametrize("name", sorted(COMPRESSORS))
DROPPING = pytest.mark.parametrize("name", sorted(n for n, m in COMPRESSORS.items() if m.parameters == ("keep",)))
SIZES = {"tokens": st.integers(0, 300), "more": st.integers(0, 300)}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def test_methods_are_found_by_name() -> None:
    expected = {"none": NoCompression, "streaming": Streaming, "snapkv": SnapKV, "kivi": Kivi}
    assert {name: COMPRESSORS[name] for name in expected} == expected
    assert all(method.name == name for name, method in COMPRESSORS.items())


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        COMPRESSORS["mine"] = NoCompression  # type: ignore[index]


def test_parameters_reach_the_method() -> None:
    assert make_compressor("none") == NoCompression()
    assert make_compressor("streaming", keep=0.5) == Streaming(keep=0.5)
    assert make_compressor("snapkv", keep=1) == SnapKV(keep=1)
    assert make_compressor("kivi", bits=2) == Kivi(bits=2)


def test_an_unknown_name_is_told_the_nearest_and_all() -> None:
    with pytest.raises(OptionError) as caught:
        make_compressor("snapvk")
    assert caught.value.found == "compressor='snapvk'"
    assert caught.value.fix == f"did you mean 'snapkv'? choose from: {', '.join([*COMPRESSORS, *BUDGETS])}"
    with pytest.raises(OptionError, match=r"fix: choose from: none"):
        make_compressor("zzzz")


@pytest.mark.parametrize(
    ("name", "parameters", "found", "fix"),
    [
        ("kivi", {"keep": 0.2}, "keep=0.2", "choose from: bits"),
        ("snapkv", {"bits": 4}, "bits=4", "choose from: keep"),
        ("snapkv", {"keeps": 0.2}, "keeps=0.2", "did you mean 'keep'?"),
        ("snapkv", {"window": 8}, "window=8", "choose from: keep"),
        ("none", {"keep": 0.2}, "keep=0.2", "takes no parameters"),
        ("snapkv", {"keep": 0}, "keep=0", "(0, 1]"),
        ("snapkv", {"keep": True}, "keep=True", "(0, 1]"),
        ("qpruningkv", {"bits": 3}, "bits=3", "2 or 4"),
        ("streaming", {"keep": 1.5}, "keep=1.5", "(0, 1]"),
        ("kivi", {"bits": 3}, "bits=3", "2 or 4"),
    ],
)
def test_a_wrong_parameter_says_what_where_and_how_to_fix_it(
    name: str, parameters: dict[str, float], found: str, fix: str
) -> None:
    with pytest.raises(OptionError) as caught:
        make_compressor(name, **parameters)
    assert caught.value.found == found
    assert caught.value.where == f"compressor {name!r}"
    assert fix in caught.value.fix


@METHODS
@settings(max_examples=12, deadline=None)
@given(**SIZES, dtype=DTYPES)
def test_regions_are_what_they_say(name: str, tokens: int, more: int, dtype: torch.dtype) -> None:
    check_region(make_compressor(name), *random_row(tokens + more, dtype=dtype), tokens)


@METHODS
@pytest.mark.parametrize(("size", "value_size"), [(1, 1), (3, 5), (7, 12), (20, 33)])
def test_any_head_size_will_do(name: str, size: int, value_size: int) -> None:
    for tokens in (0, 200):
        row = random_row(300, size=size, value_size=value_size, kv_heads=1, heads=2)
        check_region(make_compressor(name), *row, tokens)


@METHODS
def test_wrong_parameters_are_refused(name: str) -> None:
    check_refusals(name)


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_owned_row_is_copied_too(name: str, dtype: torch.dtype) -> None:
    keys, values, queries = (x.contiguous().clone() for x in random_row(300, dtype=dtype))
    region = make_compressor(name).compress(keys, values, queries)
    assert region.covered
    assert not storages(region).keys() & {keys.data_ptr(), values.data_ptr()}
    before = [x.clone() for x in region.materialize()]
    keys.zero_(), values.zero_()
    assert all(map(torch.equal, region.materialize(), before))


@DROPPING
@settings(max_examples=12, deadline=None)
@given(**SIZES, dtype=DTYPES)
def test_keeping_all_is_the_full_cache(name: str, tokens: int, more: int, dtype: torch.dtype) -> None:
    check_whole(make_compressor(name, keep=1.0), *random_row(tokens + more, dtype=dtype), tokens)


@pytest.mark.parametrize("text", ["spark(channels=1.0)", "refreekv(threshold=0.0)", "kvsharer(share=0.0)"])
def test_keeping_all_by_another_parameter(text: str) -> None:
    check_whole(parse(text, {}), *random_row(200), 130)


@DROPPING
@pytest.mark.parametrize("layer", [0, 2, 29])
def test_keeping_all_whatever_is_known(name: str, layer: int) -> None:
    """At every layer, and told what there is to be known of a row."""
    keys, values, queries = random_row(300)
    known = torch.rand(keys.shape[0], 300, generator=torch.Generator().manual_seed(1))
    told = Facts(attention=known, repeated=known, everywhere=(known, known.clone()), ids=range(300), shared={})
    method = make_compressor(name, keep=1.0).for_layer(layer, 30).knowing(told)
    region = method.compress(keys, values, queries)
    covered = region.covered
    assert covered
    assert torch.equal(region.materialize()[0], keys[:, :covered])
    assert torch.equal(region.materialize()[1], values[:, :covered])


@contextmanager
def _defaults(other: str) -> Iterator[None]:
    """Another default of the dtype, or the device, of what is made."""
    if other == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, other))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@METHODS
@pytest.mark.parametrize("other", ["float64", "bfloat16", "meta"])
def test_the_callers_defaults_change_nothing(name: str, other: str) -> None:
    keys, values, queries = random_row(400)

    def read() -> tuple[Tensor, ...]:
        region = make_compressor(name).compress(keys[:, :300], values[:, :300], queries[:, :300])
        return region.extend(keys[:, region.covered :], values[:, region.covered :], queries).materialize()

    expected = read()
    for cached in (rotation, codebook, hadamard, start, drawn):
        cached.cache_clear()  # type: ignore[attr-defined]
    with _defaults(other):
        made = read()
    assert all(map(torch.equal, made, expected))


@DROPPING
def test_a_tenth_is_kept_of_what_is_covered(name: str) -> None:
    keys, values, queries = random_row(1000)
    region = make_compressor(name, keep=0.1).compress(keys, values, queries)
    assert region.covered >= 700
    full = 2 * region.covered * (16 + 12) * keys.element_size()
    kept = region.slots / region.covered if isinstance(region, IndexedKV) else region.nbytes / full
    assert 0.08 <= kept <= 0.12


class NothingComes(TorchDispatchMode):
    """Refuses what would copy a tensor from the host to another device: no recording may."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim()}
        assert "cpu" not in given or not isinstance(made, Tensor) or made.device.type == "cpu", f"{func} copies"
        return made


@pytest.mark.parametrize("name", sorted(name for name in COMPRESSORS if "count" not in COMPRESSORS[name].needs))
def test_no_data_is_read_back_to_the_host(name: str) -> None:
    """On the meta device there is no data to read. Methods that need a count say so. Nor is any sent the second time
    that a region is read.
    """
    keys, values = torch.empty(2, 300, 16, device="meta"), torch.empty(2, 300, 12, device="meta")
    queries = torch.empty(4, 8, 16, device="meta")
    region = make_compressor(name).compress(keys, values, queries)
    assert region.covered
    region = region.extend(keys, values, queries)
    assert region.materialize()[0].shape == (2, region.slots, 16)
    with NothingComes():
        assert region.materialize()[0].device.type == "meta"


@METHODS
def test_every_method_says_what_it_is(name: str) -> None:
    method = COMPRESSORS[name]
    assert method.name == name
    assert set(method.parameters) <= {"keep", "bits"}
    assert set(method.needs) <= {"queries", "layers", "count", "calibration"} | KINDS
    assert ("calibration" in method.needs) == issubclass(method, Learner)
    assert ("queries" in method.needs) == (method().queries > 0)
    assert method.__doc__
    assert name in ("none", "int8") or method.paper.startswith("arXiv ")
