"""What a user may write as `compressor`, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.chain import Chain
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.lagkv import LagKV
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.per_layer import PerLayer
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.spec import options_of, parse
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.config import make_config
from vericache_compile.errors import OptionError
from vericache_compile.plan import Site


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("snapkv", {}, SnapKV()),
        ("snapkv", {"keep": 0.3}, SnapKV(keep=0.3)),
        ("snapkv()", {"keep": 0.3}, SnapKV(keep=0.3)),
        ("snapkv(keep=0.4, window=16)", {"keep": 0.3}, SnapKV(keep=0.4, window=16)),
        (" lagkv( lag = 64 ) ", {}, LagKV(lag=64)),
        ("snapkv(keep=0.5) | kivi(bits=2)", {}, Chain(SnapKV(keep=0.5), Kivi(bits=2))),
        ("streaming|kivi", {"keep": 0.3, "bits": 2}, Chain(Streaming(keep=0.3), Kivi(bits=2))),
        ("none | kivi(residual=16)", {"bits": 2}, Kivi(bits=2, residual=16)),
    ],
)
def test_methods_and_compositions(text: str, options: dict[str, float], expected: Compressor) -> None:
    assert parse(text, options) == expected
    assert make_config({"compressor": text, **options}).make_compressor() == expected


def test_a_choice_per_layer() -> None:
    made = parse("0-1: none, 3: streaming(keep=0.5, sinks=2), rest: snapkv(keep=0.2) | kivi(bits=4)", {})
    assert isinstance(made, PerLayer)
    chain = Chain(SnapKV(keep=0.2), Kivi(bits=4))
    expected = [NoCompression(), NoCompression(), chain, Streaming(keep=0.5, sinks=2), chain]
    assert [made.for_layer(layer, 5) for layer in range(5)] == expected
    assert made.queries == 32


@pytest.mark.parametrize("text", ["2: none, rest: snapkv", "0: none, 7-9: knorm, rest: snapkv"])
def test_an_entry_names_sites_of_the_model(text: str) -> None:
    sites = [Site(layer, 4, 2, 16, 16, 0.25, torch.float32, None) for layer in range(2)]
    with pytest.raises(OptionError, match=r"no site [27][\s\S]*its 2 sites"):
        parse(text, {}).check_model(sites, [])
    parse("1-7: none, rest: snapkv", {}).check_model(sites, [])


@pytest.mark.parametrize(
    "text",
    [
        "0-9: none, 3-5: kivi, rest: snapkv",
        "3: none, 4-7: knorm, 3-5: kivi, rest: knorm",
        "0-99: none, rest: kivi",
        "0-3: none, 4-7: knorm, rest: kivi",
    ],
)
def test_an_entry_is_the_first_for_some_site(text: str) -> None:
    sites = [Site(layer, 4, 2, 16, 16, 0.25, torch.float32, None) for layer in range(8)]
    with pytest.raises(OptionError) as caught:
        parse(text, {}).check_model(sites, [])
    assert caught.value.found == f"no site is left to {Kivi()}"
    assert caught.value.where == "a compressor per layer"
    assert "before it" in caught.value.fix
    parse("3: none, 3-5: kivi, 4-99: knorm, rest: snapkv", {}).check_model(sites, [])


def test_a_composition_wants_what_its_methods_want() -> None:
    made = parse("0: h2o(refresh=64) | kivi, 1: none, rest: snapkv(refresh=32)", {})
    assert made.wants == {"queries", "attention", "layers"}
    assert made.refresh == 32
    assert parse("0: quest, rest: none", {}).refresh == 0
    assert str(parse("tova(refresh=9)", {})) == "Tova(keep=0.2), anew every 9 tokens"


def test_options_are_those_of_all_parts() -> None:
    assert options_of("0-1: none, rest: snapkv(window=4) | kivi") == {"keep", "bits"}
    assert options_of("knorm") == {"keep"}
    assert options_of("none") == set()


@pytest.mark.parametrize(
    ("text", "options", "found", "fix"),
    [
        ("snapvk(keep=0.2)", {}, "compressor='snapvk'", "did you mean 'snapkv'"),
        ("snapkv(keeps=0.2)", {}, "keeps=0.2", "did you mean 'keep'"),
        ("snapkv(keep=2)", {}, "keep=2", "(0, 1]"),
        ("snapkv(0.2)", {}, "'0.2'", "parameter=number"),
        ("snapkv(keep=open)", {}, "'keep=open'", "parameter=number"),
        ("snapkv(keep=0.2", {}, "'snapkv(keep=0.2'", "name(parameter=value, ...)"),
        ("snapkv | ", {}, "''", "one | another"),
        ("kivi | snapkv", {}, "'kivi' does not keep the same number", "as in snapkv"),
        ("snapkv | kivi | int8", {}, "'snapkv | kivi | int8'", "any budgets, then one"),
        ("0-1: none", {}, "sites without a method", "rest: method"),
        ("5-3: none, rest: snapkv", {}, "sites 5-3", "write 3-5"),
        ("0: none, snapkv", {}, "'snapkv'", "rest: another"),
        ("snapkv | int8", {"bits": 4}, "bits=4", "keep"),
        ("none", {"keep": 0.5}, "keep=0.5", "takes no parameters"),
    ],
)
def test_what_is_wrong_says_what_and_how_to_fix_it(text: str, options: dict[str, float], found: str, fix: str) -> None:
    with pytest.raises(OptionError) as caught:
        make_config({"compressor": text, **options})
    assert caught.value.found.startswith(found)
    assert fix in caught.value.fix


def test_an_environment_is_taken_where_a_part_takes_it() -> None:
    made = make_config({"compressor": "snapkv | int8"}, {"VERICACHE_KEEP": "0.3", "VERICACHE_BITS": "2"})
    assert (made.keep, made.bits) == (0.3, None)


def test_a_layer_has_its_own_memory(random_row: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    keys, values, queries = random_row(100)
    made = parse("0: none, rest: streaming(keep=0.1)", {})
    regions = [made.for_layer(layer, 2).compress(keys, values, queries) for layer in range(2)]
    assert [region.slots for region in regions] == [100, 10]
    assert torch.equal(regions[0].materialize()[0], keys)
