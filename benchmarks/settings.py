"""Which parameters give a compression method a budget of bytes: those that take the most bytes within it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vericache_compile.compressors.learned import Learner
from vericache_compile.compressors.spec import parse
from vericache_compile.compressors.table import all_parameters, find_method
from vericache_compile.errors import OptionError
from vericache_compile.estimate import compressed_bytes
from vericache_compile.plan import Site

FRACTIONS = ("keep", "rank", "channels", "share")
"""Parameters that take any fraction."""
STEPS = [i / 50 for i in range(1, 51)]
FIXED: Mapping[str, Mapping[str, Any]] = {"cskv": {"bits": 4}, "qpruningkv": {"bits": 4}}
"""Where a method has two such parameters, one is held."""
TOGETHER: Mapping[str, str] = {"spark": "value_channels"}
"""Where a method has two such parameters, the one that goes with the first."""
TRIED: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "packkv": tuple(
        {"key_step": key, "value_step": value}
        for key, value in ((0.07, 0.07), (0.07, 0.14), (0.1, 0.1), (0.1, 0.2), (0.15, 0.3), (0.2, 0.4), (0.3, 0.6))
    ),
    "refreekv": tuple({"threshold": each} for each in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5)),
}
"""Settings of methods whose bytes depend on the data: these are measured."""
PAPERS: Mapping[str, Mapping[str, Any]] = {
    "adakv": {"floor": 0.5},  # floor_alpha of its code
    "cskv": {"rank": 0.2},
    "gear": {"rank": 4},
    "kivi": {"bits": 2, "residual": 128},
    "kvquant": {"bits": 3, "outliers": 0.01},
    "packkv": {"residual": 192},  # the buffer of its code
    "rotatekv": {"bits": 2},
    "snapkv": {"kernel": 5},  # its code's own
    "turboquant": {"bits": 3},  # of 2.5 and 3.5
}
"""Parameters that papers, or the code that comes with them, have otherwise than ours."""


def spell(name: str, parameters: Mapping[str, Any]) -> str:
    """The method as `compressor` takes it."""
    inside = ", ".join(f"{key}={value!r}" for key, value in parameters.items())
    return f"{name}({inside})" if inside else name


def settings(name: str, calibration: str | None) -> Iterator[str]:
    """Every setting of a method that may be tried."""
    method = find_method(name)
    fixed = dict(FIXED.get(name, {}))
    if calibration is not None and issubclass(method, Learner):
        fixed["calibration"] = calibration
    known = all_parameters(method)
    fraction = next((each for each in FRACTIONS if isinstance(known.get(each), float)), None)
    if fraction is not None:
        both = [fraction, TOGETHER[name]] if name in TOGETHER else [fraction]
        yield from (spell(name, {**fixed, **dict.fromkeys(both, step)}) for step in STEPS)
    elif "bits" in known:
        yield from (spell(name, {**fixed, "bits": bits}) for bits in range(2, 9))
    else:
        yield spell(name, fixed)


def of_paper(name: str, calibration: str | None) -> str:
    """A method with the parameters of its paper, as far as it has them."""
    return spell(name, {**PAPERS.get(name, {}), **({} if calibration is None else {"calibration": calibration})})


def fraction_of(setting: str) -> float:
    """What a method keeps or reads."""
    made: float = vars(parse(setting, {}))["keep"]
    return made


def choose(
    name: str, share: float, sites: tuple[Site, ...], tokens: int, calibration: str | None = None, tail: float = 0.0
) -> str:
    """The setting that takes as much of the full cache's bytes as `most_within` says, by estimate for so many tokens.

    The exact tail takes the fraction `tail` besides. Where all settings take as many bytes, the one that reads this
    share in a step.
    """
    full = sum(site.bytes_per_token for site in sites)
    sizes: dict[str, float] = {}
    for each in settings(name, calibration):
        try:
            method = parse(each, {})
            sizes[each] = (compressed_bytes(method, sites, tokens) + method.shared_nbytes / tokens) / full + tail
        except OptionError:  # bits that it, or its calibration, does not have; or a larger share
            continue
    if len(sizes) > 1 and len(set(sizes.values())) == 1:  # a method that reads less, but holds as much
        return min(sizes, key=lambda each: abs(fraction_of(each) + tail - share))
    return most_within(sizes, share)


def most_within(sizes: Mapping[str, float], share: float) -> str:
    """Of settings that take these shares, the one that takes most up to `share` (give or take a hundredth of it);
    where all take more, the one that takes least."""
    within = {each: size for each, size in sizes.items() if size <= 1.01 * share}
    return max(within, key=lambda each: within[each]) if within else min(sizes, key=lambda each: sizes[each])
