"""Settings at equal bytes: the most bytes within the budget, else the fewest there are."""

from __future__ import annotations

import pytest
import settings
import torch

from vericache_compile.compressors.spec import parse
from vericache_compile.compressors.table import COMPRESSORS
from vericache_compile.estimate import compressed_bytes
from vericache_compile.plan import Site

SITES = tuple(Site(layer, 9, 3, 64, 64, 0.125, torch.float32, None) for layer in range(8))
QUICK = {"snapkv", "kivi", "cskv", "packkv", "none"}
"""One of each kind."""


@pytest.mark.parametrize(
    ("name", "share", "expected"),
    [
        ("snapkv", 0.2, "snapkv(keep=0.2)"),
        ("streaming", 0.2, "streaming(keep=0.2)"),
        ("kivi", 0.2, "kivi(bits=4)"),
        ("kivi", 0.15, "kivi(bits=2)"),
        ("turboquant", 0.2, "turboquant(bits=5)"),
        ("kvsharer", 0.8, "kvsharer(share=0.2)"),
        ("int8", 0.01, "int8"),
        ("none", 0.2, "none"),
        pytest.param("spark", 0.2, "spark(channels=0.14, value_channels=0.14)", marks=pytest.mark.slow),
        ("quest", 0.2, "quest(keep=0.2)"),
        pytest.param("clusterkv", 0.2, "clusterkv(keep=0.2)", marks=pytest.mark.slow),
    ],
)
def test_the_largest_setting_within_the_budget_is_taken(name: str, share: float, expected: str) -> None:
    assert settings.choose(name, share, SITES, 3000) == expected


def test_the_tail_counts() -> None:
    assert settings.choose("snapkv", 0.25, SITES, 3000, tail=0.05) == "snapkv(keep=0.2)"
    assert settings.choose("quest", 0.25, SITES, 3000, tail=0.05) == "quest(keep=0.2)"
    assert settings.choose("int8", 0.25, SITES, 3000, tail=0.05) == "int8"


@pytest.mark.parametrize("name", sorted(settings.TRIED))
def test_settings_that_are_tried_are_settings(name: str) -> None:
    assert len({repr(parse(settings.spell(name, each), {})) for each in settings.TRIED[name]}) > 5


def test_bases_that_are_fitted_to_a_row_count_once_per_row() -> None:
    """So more coordinates fit where a prompt is longer."""
    ranks = [settings.choose("cskv", 0.25, SITES, tokens, tail=0.05) for tokens in (1000, 3000)]
    assert ranks[0] < ranks[1]


@pytest.mark.parametrize("name", sorted(settings.PAPERS))
def test_parameters_of_papers_are_taken(name: str) -> None:
    assert parse(settings.of_paper(name, None), {}) != parse(name, {})


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(COMPRESSORS)]
)
def test_every_method_has_a_setting(name: str) -> None:
    sites = SITES[:2]
    chosen, smallest = (settings.choose(name, share, sites, 3000) for share in (0.2, 0.0))
    assert parse(chosen, {}).name == name
    assert compressed_bytes(parse(smallest, {}), sites) <= compressed_bytes(parse(chosen, {}), sites)


def test_a_calibration_reaches_those_that_take_one() -> None:
    assert next(settings.settings("cskv", "f.safetensors")).startswith(
        "cskv(bits=4, calibration='f.safetensors', rank="
    )
    assert "calibration" not in next(settings.settings("kivi", "f.safetensors"))
