"""The suite for a method of one's own: the example passes it, and every check can say no."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor

from vericache_compile import testing
from vericache_compile.compressors import table
from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.none import NoCompression, UncompressedKV
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.errors import OptionError

EXAMPLE = Path(__file__).parents[1] / "examples" / "custom_compressor.py"
TestEveryOther = runpy.run_path(str(EXAMPLE))["TestEveryOther"]
EveryOther = table._registered.pop("every_other")  # other test files share this process


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example's method is known in this file."""
    monkeypatch.setitem(table._registered, "every_other", EveryOther)


@pytest.mark.slow
def test_the_example_runs() -> None:
    table._registered.pop("every_other")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert ended.value.code == 0


class Sharing(UncompressedKV):
    """Hands its own keys on, and says half of its bytes."""

    wrong: ClassVar[str]

    @property
    def nbytes(self) -> int:
        return super().nbytes // (2 if self.wrong == "bytes" else 1)

    @property
    def slots(self) -> int:
        return super().slots + (self.wrong == "slots")

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        if self.wrong == "extend":
            self.keys.add_(1)
        if self.wrong == "covered":
            self.covered += 1
        if self.wrong == "writes":
            keys.zero_()
        longer = super().extend(keys, values, queries)
        if self.wrong == "shared" and self.keys.shape[1]:
            longer.values = self.values
        return longer

    def materialize(self) -> tuple[Tensor, Tensor]:
        if self.wrong == "exact":
            return self.keys.flip(1), self.values
        return (self.keys.double(), self.values) if self.wrong == "dtype" else (self.keys, self.values)


@dataclass(frozen=True)
class Wrong(NoCompression):
    """A method that is wrong in one way."""

    wrong: str = ""

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> UncompressedKV:
        made = type("Region", (Sharing,), {"wrong": self.wrong})
        contiguous = torch.contiguous_format
        return made(keys.clone(memory_format=contiguous), values.clone(memory_format=contiguous), keys.shape[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("bytes", "nbytes is"),
        ("slots", "slots for"),
        ("extend", "changed the old region's bytes"),
        ("covered", "tokens are covered|changed the old region"),
        ("shared", "shares memory|materialize gives"),
        ("dtype", "materialize gives torch.float64"),
        ("writes", "are written to"),
        ("exact", "are not as they were cached"),
    ],
)
def test_a_wrong_region_is_found_out(wrong: str, message: str) -> None:
    testing.check_region(Wrong(), *testing.random_row(60), 40)
    with pytest.raises(AssertionError, match=message):
        testing.check_region(Wrong(wrong=wrong), *testing.random_row(60), 40)


class Within(CompressedKV):
    """Keys and values in a container; it copies them, or keeps views and says that they take nothing."""

    def __init__(self, keys: Tensor, values: Tensor, method: Contained) -> None:
        self.method, self.covered = method, keys.shape[1]
        self.itself = self
        self.held = method.into(keys, values) if method.cheats else method.into(keys.clone(), values.clone())

    @property
    def slots(self) -> int:
        return self.covered

    @property
    def nbytes(self) -> int:
        return 0 if self.method.cheats else sum(x.nbytes for x in self.materialize())

    def materialize(self) -> tuple[Tensor, Tensor]:
        return self.method.out_of(self.held)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        held = self.materialize()
        return type(self)(*(torch.cat(pair, dim=1) for pair in zip(held, (keys, values), strict=True)), self.method)


@dataclass(frozen=True)
class Contained(Compressor):
    """A method whose regions hold their tensors in a container."""

    name: ClassVar[str] = "contained"

    into: Callable[[Tensor, Tensor], Any]
    out_of: Callable[[Any], tuple[Tensor, Tensor]]
    cheats: bool

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Within:
        return Within(keys, values, self)


@pytest.mark.parametrize(
    ("into", "out_of"),
    [
        (lambda keys, values: [keys, values], tuple),
        (lambda keys, values: {"keys": keys, "rest": (values,)}, lambda held: (held["keys"], *held["rest"])),
        (
            lambda keys, values: SimpleNamespace(keys=keys, values=values),
            lambda held: (held.keys, held.values),
        ),
    ],
    ids=["list", "dict", "object"],
)
def test_tensors_in_a_container_are_seen(into: Any, out_of: Any) -> None:
    testing.check_region(Contained(into, out_of, cheats=False), *testing.random_row(60), 40)
    with pytest.raises(AssertionError, match="nbytes is 0"):
        testing.check_region(Contained(into, out_of, cheats=True), *testing.random_row(60), 40)


def test_a_method_that_drops_at_keep_1_is_found_out() -> None:
    with pytest.raises(AssertionError, match=r"keep=1\.0 keeps"):
        testing.check_whole(Streaming(keep=0.5), *testing.random_row(60), 40)


def test_a_method_that_takes_anything_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lenient(NoCompression):
        name: ClassVar[str] = "lenient"
        parameters: ClassVar[tuple[str, ...]] = ("keep",)

        def __init__(self, keep: object = 1) -> None:
            pass

    monkeypatch.setitem(table._registered, "lenient", Lenient)
    with pytest.raises(AssertionError, match="takes"):
        testing.check_refusals("lenient")


@dataclass(frozen=True)
class Ranged(NoCompression):
    """A method of one number; `takes` and `says` are how it refuses others."""

    name: ClassVar[str] = "ranged"
    takes: ClassVar[Callable[[Any], bool]]
    says: ClassVar[str]

    share: float | None = None

    def __post_init__(self) -> None:
        if self.share is not None and not type(self).takes(self.share):
            raise OptionError(f"share={self.share!r}", "compressor 'ranged'", self.says)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value


@pytest.mark.parametrize(
    ("takes", "says", "message"),
    [
        (lambda value: _is_number(value) and 0 <= value <= 1, "give a fraction from 0 to 1", None),
        (_is_number, "give a number", None),
        (lambda value: _is_number(value) and 0 <= value <= 1, "give another", "does not say what it takes"),
        (lambda value: value != "half", "give a number", "takes share=nan"),
        (lambda value: value is True or _is_number(value), "give a number", "takes share=True"),
    ],
)
def test_a_range_that_is_not_kept_or_not_said_is_found_out(
    takes: Any, says: str, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number without bounds need not say any."""
    monkeypatch.setitem(table._registered, "ranged", Ranged)
    monkeypatch.setattr(Ranged, "takes", staticmethod(takes), raising=False)
    monkeypatch.setattr(Ranged, "says", says, raising=False)
    if message is None:
        testing.check_refusals("ranged")
        return
    with pytest.raises(AssertionError, match=message):
        testing.check_refusals("ranged")


def test_one_join_is_not_a_long_output(monkeypatch: pytest.MonkeyPatch) -> None:
    testing.gather_soon(monkeypatch)
    with pytest.raises(AssertionError, match=r"covers \[128\] tokens as 40 join 120"):
        testing.check_long_output("kivi(residual=0)", tokens=120, batch=1, count=40)


def test_a_changed_token_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = testing._plain_tokens(2, 9, 3, 5).clone()
    monkeypatch.setattr(testing, "_plain_tokens", lambda *_: plain)
    testing.check_tokens("none", 2, tokens=9, batch=3, count=5)
    plain[2, -1] += 1
    with pytest.raises(AssertionError, match="changes tokens"):
        testing.check_tokens("none", 2, tokens=9, batch=3, count=5)
