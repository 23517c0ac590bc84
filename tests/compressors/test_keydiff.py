"""KeyDiff: the keys that point away from the rest stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vericache_compile.compressors.keydiff import KeyDiff
from vericache_compile.errors import OptionError

Row = Callable[..., tuple[Tensor, Tensor, Tensor]]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def naive_scores(keys: Tensor) -> list[list[float]]:
    """-cos(key, mean of the normalised keys), per head of keys [K, S, D]."""
    scores = []
    for head in keys.double().tolist():
        units = [[x / math.hypot(*key) for x in key] for key in head]
        anchor = [sum(channel) / len(head) for channel in zip(*units, strict=True)]
        scores.append([-cosine(key, anchor) for key in head])
    return scores


def test_scores_and_choice_equal_the_naive_loops(random_row: Row) -> None:
    keys, values, _ = random_row(60)
    method = KeyDiff(keep=0.25, window=8)
    expected = [head[:52] for head in naive_scores(keys)]
    torch.testing.assert_close(method.score(keys, values, None, 52), torch.tensor(expected), atol=1e-6, rtol=1e-5)

    region = method.compress(keys, values, None)
    assert (region.covered, region.slots) == (52, 13)
    for head, scores in enumerate(expected):
        kept = sorted(sorted(range(52), key=scores.__getitem__)[-13:])
        assert torch.equal(region.keys[head], keys[head, kept])
        assert torch.equal(region.values[head], values[head, kept])


def test_length_does_not_matter(random_row: Row) -> None:
    keys, values, _ = random_row(60)
    lengths = torch.linspace(0.1, 10, 60).view(1, -1, 1)
    method = KeyDiff()
    scaled = method.score(keys * lengths, values, None, 60)
    torch.testing.assert_close(scaled, method.score(keys, values, None, 60))


def test_extend_measures_against_the_chunk(random_row: Row) -> None:
    keys, values, _ = random_row(60)
    region = KeyDiff(keep=0.25, window=20).compress(keys, values, None)
    longer = region.extend(keys[:, 40:], values[:, 40:], None)
    assert (longer.covered, longer.slots) == (60, 15)
    for head, scores in enumerate(naive_scores(keys[:, 40:])):
        kept = sorted(sorted(range(20), key=scores.__getitem__)[-5:])
        assert torch.equal(longer.keys[head, 10:], keys[head, 40:][kept])


@pytest.mark.parametrize("wrong", [{"keep": 0.0}, {"window": -1}])
def test_values_out_of_range_are_option_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        KeyDiff(**wrong)  # type: ignore[arg-type]
