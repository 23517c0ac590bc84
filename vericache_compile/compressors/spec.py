"""What a user may write as `compressor`: a method, a method of a method, a choice per layer.

    snapkv                                            a method with its defaults
    snapkv(keep=0.3, window=16)                       with parameters: all that `vericache compressors` lists
    snapkv(keep=0.5) | kivi(bits=4)                   drop, then quantise what stays
    pyramid(beta=20) | ada(floor=0.2) | knorm         a budget across layers, one across the heads of each, and a method
    0-1: none, rest: snapkv(keep=0.2) | kivi(bits=4)  per attention site: numbers, ranges, `rest`

The options `keep` and `bits` beside it reach every method that takes them and does not say its own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.chain import make_chain
from vericache_compile.compressors.per_layer import PerLayer
from vericache_compile.compressors.table import (
    BUDGETS,
    NAME,
    budget_parameters,
    find_method,
    make_compressor,
    make_with_all,
    suggest,
)
from vericache_compile.errors import OptionError

METHOD = re.compile(r"\s*(?P<name>\w+)\s*(?:\((?P<inside>[^()]*)\))?\s*")
SITES = re.compile(r"\s*(?:(?P<rest>rest)|(?P<first>\d+)(?:\s*-\s*(?P<last>\d+))?)\s*:(?P<text>.*)", re.DOTALL)
FORM = "write name, name(parameter=value, ...), one | another, or 0-1: one, rest: another"


def parse(text: str, options: Mapping[str, object]) -> Compressor:
    """The compressor that `text` describes, under the backend's options (those that were given).

    Raises OptionError for what is not of the form, an unknown name or parameter, a value out of range, and an
    option that no method in `text` takes.
    """
    if re.fullmatch(r"\w+", text) and text not in BUDGETS:
        return make_compressor(text, **options)
    taken = options_of(text)
    for name, value in options.items():
        if name not in taken:
            fix = f"the methods in it take: {', '.join(sorted(taken)) or 'no options'}"
            raise OptionError(f"{name}={value!r}", f"compressor {text!r}", fix)
    parts = _split(text)
    if SITES.fullmatch(parts[0]) is None:
        return _parse_chain(text, options)
    return PerLayer(tuple(_parse_sites(part, options) for part in parts))


def options_of(text: str) -> set[str]:
    """The backend's options that some method in `text` takes; raises OptionError for an unknown method."""
    names = (match.group(1) for match in re.finditer(rf"({NAME})(?=\s*(?:\(|\||,|$))", _outside(text)))
    return {option for name in names if name not in BUDGETS for option in find_method(name).parameters}


def _parse_sites(text: str, options: Mapping[str, object]) -> tuple[range | None, Compressor]:
    found = SITES.fullmatch(text)
    if found is None:
        raise OptionError(f"{text.strip()!r}", "a compressor per layer", FORM)
    method = _parse_chain(found["text"], options)
    if found["rest"]:
        return None, method
    first, last = int(found["first"]), int(found["last"] or found["first"])
    if last < first:
        raise OptionError(f"sites {first}-{last}", "a compressor per layer", f"write {last}-{first}")
    return range(first, last + 1), method


def _parse_chain(text: str, options: Mapping[str, object]) -> Compressor:
    parts = text.split("|")
    count = next((i for i, part in enumerate(parts) if _name(part) not in BUDGETS), len(parts))
    methods = [_parse_method(part, options) for part in parts[count:]]
    if not methods:
        fix = "write a method after it, as in pyramid | snapkv(keep=0.2)"
        raise OptionError(f"{text.strip()!r} is a budget", "a compressor", fix)
    if len(methods) > 2:
        fix = "write any budgets, then one method that drops | one that quantises"
        raise OptionError(f"{text.strip()!r}", "a compressor", fix)
    made = methods[0] if len(methods) == 1 else make_chain(*methods)
    for part in reversed(parts[:count]):
        made = _spread(part, made)
    return made


def _name(text: str) -> str:
    found = METHOD.fullmatch(text)
    return found["name"] if found else ""


def _spread(text: str, method: Compressor) -> Compressor:
    """A method under the budget that `text` names."""
    found = METHOD.fullmatch(text)
    assert found is not None, "its name was read"
    budget, given = BUDGETS[found["name"]], dict(_parse_parameters(found["inside"] or "", text.strip()))
    known = list(budget_parameters(budget))
    for parameter, value in given.items():
        if parameter not in known:
            raise OptionError(f"{parameter}={value!r}", f"budget {found['name']!r}", suggest(parameter, known))
    return budget(**{budget.around: method, **given})


def _parse_method(text: str, options: Mapping[str, object]) -> Compressor:
    found = METHOD.fullmatch(text)
    if found is None:
        raise OptionError(f"{text.strip()!r}", "a compressor", FORM)
    if found["name"] in BUDGETS:
        fix = f"write it before the method, as in {found['name']} | snapkv(keep=0.2)"
        raise OptionError(f"{text.strip()!r} is a budget", "a compressor after |", fix)
    given = dict(_parse_parameters(found["inside"] or "", text.strip()))
    taken = find_method(found["name"]).parameters
    return make_with_all(found["name"], **{k: v for k, v in options.items() if k in taken} | given)


def _parse_parameters(text: str, where: str) -> Iterator[tuple[str, object]]:
    seen: set[str] = set()
    for part in filter(str.strip, text.split(",")):
        name, equals, value = part.partition("=")
        if name.strip() in seen:
            raise OptionError(f"{part.strip()!r}", f"compressor {where!r}", f"give {name.strip()} once")
        seen.add(name.strip())
        try:
            if not equals:
                raise ValueError
            yield name.strip(), ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise OptionError(
                f"{part.strip()!r}", f"compressor {where!r}", "write parameter=number or parameter='text'"
            ) from None


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside parentheses."""
    return re.split(r",(?![^()]*\))", text)


def _outside(text: str) -> str:
    """The text without what stands in parentheses, and without the sites before colons."""
    return re.sub(r"\w[\w\s-]*:", "", re.sub(r"\([^()]*\)", "", text))
