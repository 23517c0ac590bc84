"""Every compression method by its name: ours, those of other packages, those that a program registers.

A package offers a method as an entry point of the group `vericache_compressors`, whose name is the method's; a
program decorates its class with `register`. A name belongs to one method, and ours come first; budgets' names are none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Final, TypeVar

from vericache_compile.compressors.adakv import AdaKV
from vericache_compile.compressors.around import Around
from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.chunkkv import ChunkKV
from vericache_compile.compressors.clusterkv import ClusterKV
from vericache_compile.compressors.cskv import CSKV
from vericache_compile.compressors.expected_attention import ExpectedAttention
from vericache_compile.compressors.fp8 import Fp8
from vericache_compile.compressors.gear import Gear
from vericache_compile.compressors.h2o import H2O
from vericache_compile.compressors.head_budget import Ada
from vericache_compile.compressors.int8 import Int8
from vericache_compile.compressors.keydiff import KeyDiff
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.knorm import Knorm
from vericache_compile.compressors.kvquant import KVQuant
from vericache_compile.compressors.kvreviver import KVReviver
from vericache_compile.compressors.kvsharer import KVSharer
from vericache_compile.compressors.kvzip import KVzip
from vericache_compile.compressors.lagkv import LagKV
from vericache_compile.compressors.layer_budget import Pyramid
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.packkv import PackKV
from vericache_compile.compressors.pyramidkv import PyramidKV
from vericache_compile.compressors.qpruningkv import QPruningKV
from vericache_compile.compressors.quest import Quest
from vericache_compile.compressors.recalkv import ReCalKV
from vericache_compile.compressors.refreekv import ReFreeKV
from vericache_compile.compressors.rotatekv import RotateKV
from vericache_compile.compressors.samkv import SamKV
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.spark import SparK
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.compressors.tova import Tova
from vericache_compile.compressors.turboquant import TurboQuant
from vericache_compile.errors import OptionError

GROUP: Final = "vericache_compressors"
COMPRESSORS: Final[Mapping[str, type[Compressor]]] = MappingProxyType(
    {
        method.name: method
        for method in (
            NoCompression,
            Streaming,
            SnapKV,
            PyramidKV,
            AdaKV,
            ChunkKV,
            Tova,
            ReFreeKV,
            Knorm,
            KeyDiff,
            LagKV,
            ExpectedAttention,
            H2O,
            KVzip,
            SamKV,
            KVReviver,
            Quest,
            ClusterKV,
            Int8,
            Fp8,
            Kivi,
            TurboQuant,
            QPruningKV,
            Gear,
            PackKV,
            KVQuant,
            RotateKV,
            SparK,
            ReCalKV,
            CSKV,
            KVSharer,
        )
    }
)
"""Our own methods."""
BUDGETS: Final[Mapping[str, type[Around]]] = MappingProxyType({"pyramid": Pyramid, "ada": Ada})
"""What may stand before a method and say how its budget is spread."""
NAME: Final = r"[A-Za-z_]\w*"
_registered: dict[str, type[Compressor]] = {}

Method = TypeVar("Method", bound=type[Compressor])


def register(method: Method) -> Method:
    """Class decorator: make a method known by its `name`, for the life of the process.

    Registering a class of the same module and name again replaces it, so a notebook cell can be run twice.
    Raises OptionError where the name is ours or another class's, or cannot stand in `compressor`.
    """
    where = f"{method.__module__}.{method.__qualname__}"
    _check_name(method.name, where)
    taken = COMPRESSORS.get(method.name) or _registered.get(method.name)
    if taken is not None and f"{taken.__module__}.{taken.__qualname__}" != where:
        raise OptionError(f"the name {method.name!r} is taken by {taken.__qualname__}", where, "choose another name")
    _registered[method.name] = method
    return method


def method_names() -> list[str]:
    """Names of all methods, ours first; loads none."""
    return list(dict.fromkeys([*COMPRESSORS, *_registered, *(point.name for point in _entry_points())]))


def find_method(name: str) -> type[Compressor]:
    """The method's class; raises OptionError for an unknown name and an entry point that gives no method."""
    found = COMPRESSORS.get(name) or _registered.get(name)
    if found is not None:
        return found
    for point in _entry_points():
        if point.name == name:
            return _load(point)
    raise OptionError(f"compressor={name!r}", "the compressor's name", suggest(name, [*method_names(), *BUDGETS]))


def all_methods() -> dict[str, type[Compressor] | OptionError]:
    """Every method by its name, or why an entry point gives none."""
    return {name: _found_or_not(name) for name in method_names()}


def make_compressor(name: str, **parameters: object) -> Compressor:
    """The method `name` with the options of the backend that it takes (those in its class's `parameters`).

    Raises OptionError for an unknown name, an option that the method does not take, or a value out of range.
    """
    method = find_method(name)
    return _build(method, parameters, method.parameters)


def make_with_all(name: str, **parameters: object) -> Compressor:
    """As `make_compressor`, but every parameter that `all_parameters` lists may be given."""
    method = find_method(name)
    return _build(method, parameters, tuple(all_parameters(method)))


def all_parameters(method: type[Compressor]) -> dict[str, object]:
    """A method's parameters with their defaults, None where there is none."""
    if not is_dataclass(method):
        return dict.fromkeys(method.parameters)
    return {field.name: _default_of(field) for field in fields(method) if field.init}


def budget_parameters(budget: type[Around]) -> dict[str, object]:
    """A budget's parameters with their defaults, without the method that it stands before."""
    return {name: default for name, default in all_parameters(budget).items() if name != budget.around}


def suggest(found: str, names: list[str]) -> str:
    """What to write instead: the nearest of `names`, and all of them."""
    if not names:
        return "leave it out: this method takes no parameters"
    near = difflib.get_close_matches(found, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}choose from: {', '.join(names)}"


def _build(method: type[Compressor], parameters: Mapping[str, object], taken: tuple[str, ...]) -> Compressor:
    for parameter, value in parameters.items():
        if parameter not in taken:
            where = f"compressor {method.name!r}"
            raise OptionError(f"{parameter}={value!r}", where, suggest(parameter, list(taken)))
    return method(**parameters)


def _found_or_not(name: str) -> type[Compressor] | OptionError:
    try:
        return find_method(name)
    except OptionError as error:
        return error


def _check_name(name: str, where: str) -> None:
    if name in (*BUDGETS, "rest"):
        raise OptionError(f"the name {name!r} stands for something else in `compressor`", where, "choose another name")
    if not re.fullmatch(NAME, name):
        fix = "choose one of letters, digits and _, without a digit in front"
        raise OptionError(f"the name {name!r} cannot stand in `compressor`", where, fix)


def _default_of(field: Field[object]) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _entry_points() -> Iterator[EntryPoint]:
    return iter(entry_points(group=GROUP))


def _load(point: EntryPoint) -> type[Compressor]:
    where = f"entry point {point.name!r} = {point.value!r} of group {GROUP}"
    _check_name(point.name, where)
    try:
        method = point.load()
    except Exception as error:  # whatever another package's module does when it is imported
        raise OptionError(f"it cannot be loaded: {error}", where, "repair or remove the package") from error
    if not (isinstance(method, type) and issubclass(method, Compressor) and method.name == point.name):
        fix = f"let it name a Compressor class whose name is {point.name!r}"
        raise OptionError(f"it gives {method!r}", where, fix)
    return method
