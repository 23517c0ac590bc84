"""Every compression method by its name. A new method is one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.keydiff import KeyDiff
from vericache_compile.compressors.kivi import Kivi
from vericache_compile.compressors.knorm import Knorm
from vericache_compile.compressors.lagkv import LagKV
from vericache_compile.compressors.none import NoCompression
from vericache_compile.compressors.snapkv import SnapKV
from vericache_compile.compressors.streaming import Streaming
from vericache_compile.compressors.tova import Tova
from vericache_compile.errors import OptionError

COMPRESSORS: Final[Mapping[str, type[Compressor]]] = MappingProxyType(
    {method.name: method for method in (NoCompression, Streaming, SnapKV, Tova, Knorm, KeyDiff, LagKV, Kivi)}
)


def make_compressor(name: str, **parameters: object) -> Compressor:
    """The method `name` with its parameters (those listed in its class's `parameters`).

    Raises OptionError for a name that is not in the table, a parameter that the method does not take, or a
    value out of range.
    """
    if name not in COMPRESSORS:
        raise OptionError(f"compressor={name!r}", "the compressor's name", _suggest(name, list(COMPRESSORS)))
    method: Callable[..., Compressor] = COMPRESSORS[name]
    taken = COMPRESSORS[name].parameters
    for parameter in parameters:
        if parameter not in taken:
            raise OptionError(
                f"{parameter}={parameters[parameter]!r}",
                f"compressor {name!r}",
                _suggest(parameter, list(taken)),
            )
    return method(**parameters)


def _suggest(found: str, names: list[str]) -> str:
    """What to write instead: the nearest of `names`, and all of them."""
    if not names:
        return "leave it out: this method takes no parameters"
    near = difflib.get_close_matches(found, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}choose from: {', '.join(names)}"
