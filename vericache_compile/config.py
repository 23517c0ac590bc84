"""Every option of the backend, documented and checked in one place."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args, get_type_hints

import torch

from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.spec import options_of, parse
from vericache_compile.errors import OptionError
from vericache_compile.kernels import int8_linear
from vericache_compile.kernels.row_invariant_linear import multiplies_bfloat16
from vericache_compile.plan import Tier

MAX_WINDOW = 256
MIB = 1 << 20
PARAMETERS = ("keep", "bits")
"""Options that belong to some compression methods only."""
WHERE = "the options of backend 'vericache'"
DRAFT_DTYPES = {"same": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
AUTO = "auto"
"""int8 on a CPU with our kernels: drafting is bound by reading weights, and memory is plenty; same elsewhere."""


@dataclass(frozen=True)
class Config:
    """Options of `torch.compile(model, backend="vericache", options={...})`.

    Each can also be set by the environment variable VERICACHE_<OPTION>; an explicit option wins.
    """

    compressor: str = field(default="snapkv", metadata={"doc": "compression method that the draft attends over"})
    keep: float | None = field(
        default=None, metadata={"doc": "fraction of the tokens that a dropping method keeps, in (0, 1]"}
    )
    bits: int | None = field(default=None, metadata={"doc": "bits per value of a quantising method"})
    window: int = field(default=16, metadata={"doc": "tokens per verify pass: a power of two, 2 to 256"})
    inductor: bool = field(default=True, metadata={"doc": "compile segments with Inductor; off runs them eagerly"})
    draft_dtype: str = field(
        default=AUTO,
        metadata={
            "doc": "type that draft reads weights in (verify reads the model's own): same, bfloat16, float16, int8; "
            "auto is int8 on a CPU with a C++ compiler, and same elsewhere"
        },
    )
    placement: str = field(
        default=AUTO,
        metadata={
            "doc": "where full KV lives: device, host (memory outside the device), disk (a file); auto is device while "
            "it fits with its drafts, else what is faster: host, or device without drafts"
        },
    )
    device_memory_mb: float | None = field(
        default=None,
        metadata={
            "doc": "memory in MiB that auto may fill with KV; else what is free on a GPU, all that there is on a CPU"
        },
    )
    staging_mb: float | None = field(
        default=None,
        metadata={"doc": "device memory for full KV that comes in from host or disk, in MiB; else as much as pays"},
    )
    link_gbps: float | None = field(
        default=None,
        metadata={"doc": "on the CPU: hold transfers back to so many gigabytes per second, to measure with"},
    )
    kv_folder: str | None = field(
        default=None, metadata={"doc": "folder for the file of placement=disk; else the one for temporary files"}
    )
    strict: bool = field(
        default=False, metadata={"doc": "raise where a graph is not taken instead of running it unchanged"}
    )
    dump: str | None = field(
        default=None,
        compare=False,  # what is written down makes no other configuration
        metadata={"doc": "folder for one folder per captured graph: the graph after each pass, and what came of it"},
    )
    dump_tokens: bool = field(
        default=False,
        compare=False,
        metadata={
            "doc": "also write the tokens of prompts and rounds there, in tokens.jsonl; nothing else holds tokens"
        },
    )
    trace: str | None = field(
        default=None,
        compare=False,
        metadata={"doc": "file for a Chrome trace of calls and rounds, which Perfetto opens"},
    )

    def __post_init__(self) -> None:
        if self.window < 2 or self.window > MAX_WINDOW or self.window & (self.window - 1):
            raise OptionError(f"window={self.window!r}", WHERE, f"use a power of two from 2 to {MAX_WINDOW}")
        if self.draft_dtype not in (AUTO, *DRAFT_DTYPES):
            raise OptionError(
                f"draft_dtype={self.draft_dtype!r}", WHERE, f"use one of {AUTO}, {', '.join(DRAFT_DTYPES)}"
            )
        if self.placement not in (AUTO, *Tier):
            raise OptionError(f"placement={self.placement!r}", WHERE, f"use one of {AUTO}, {', '.join(Tier)}")
        for name in ("device_memory_mb", "staging_mb", "link_gbps"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise OptionError(f"{name}={value!r}", WHERE, "give a number above 0, or leave it out")
        for name, kind in (("dump", "folder"), ("trace", "file"), ("kv_folder", "folder")):
            if (path := getattr(self, name)) is not None and not path.strip():
                raise OptionError(f"{name}={path!r}", WHERE, f"name a {kind}, or leave it out")
        if self.dump_tokens and self.dump is None and os.environ.get("TORCH_COMPILE_DEBUG", "0") != "1":
            raise OptionError(
                "dump_tokens=True, and nothing is dumped", WHERE, "name a folder with dump, or leave it out"
            )
        self.make_compressor()

    def draft_dtype_on(self, device: torch.device) -> torch.dtype | None:
        """The type that draft reads weights in on a device; None for the weights' own.

        In place of int8 bfloat16 where no kernel is for it: Inductor's reductions over codes took twice as long as over
        bfloat16 (H200).
        """
        has_int8 = int8_linear.serves(device)
        dtype = DRAFT_DTYPES[("int8" if has_int8 else "same") if self.draft_dtype == AUTO else self.draft_dtype]
        if dtype is not torch.int8 or has_int8:
            return dtype
        return torch.bfloat16 if device.type != "cpu" or multiplies_bfloat16() else None

    def moves_on(self, device: torch.device) -> bool:
        """Whether full KV of a model on this device may live elsewhere, so that graphs need transfers."""
        if self.placement == AUTO:
            return device.type != "cpu" or self.device_memory_mb is not None
        return self.placement != Tier.DEVICE

    @property
    def device_bytes(self) -> int | None:
        """`device_memory_mb` in bytes."""
        return None if self.device_memory_mb is None else int(self.device_memory_mb * MIB)

    @property
    def staging_bytes(self) -> int | None:
        """`staging_mb` in bytes."""
        return None if self.staging_mb is None else int(self.staging_mb * MIB)

    def make_compressor(self) -> Compressor:
        """The compression method with its parameters; raises OptionError for one that it does not take."""
        given = {name: getattr(self, name) for name in PARAMETERS}
        return parse(self.compressor, {name: value for name, value in given.items() if value is not None})


def make_config(options: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> Config:
    """Config from explicit options over the environment over the defaults; raises OptionError."""
    environment = os.environ if environment is None else environment
    options = options or {}
    hints = get_type_hints(Config)
    names = [f.name for f in fields(Config)]
    values: dict[str, Any] = {}
    for name in names:
        text = environment.get(f"VERICACHE_{name.upper()}")
        if text is not None and name not in options:
            values[name] = _parse(name, text, _kinds(hints[name])[0])
    for name, value in options.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(f"unknown option {name!r}", WHERE, f"{hint}options are {', '.join(names)}")
        values[name] = _check_type(name, value, _kinds(hints[name]))
    if "compressor" in options:
        _drop_foreign_parameters(values, options)
    return Config(**values)


def _drop_foreign_parameters(values: dict[str, Any], options: Mapping[str, Any]) -> None:
    """An environment's `keep` must not break an explicit compressor that takes none."""
    try:
        taken = options_of(values["compressor"])
    except OptionError:  # raised where the compressor is made
        return
    for name in PARAMETERS:
        if name not in taken and name not in options:
            values.pop(name, None)


def _kinds(hint: Any) -> tuple[type, ...]:
    """The types that a field takes, the one that text is parsed as first."""
    kinds: tuple[type, ...] = get_args(hint) or (hint,)
    return (*kinds, int) if float in kinds else kinds


def _parse(name: str, text: str, kind: type) -> Any:
    where = f"the environment variable VERICACHE_{name.upper()}"
    if kind is bool:
        if text.lower() in ("1", "true", "on", "yes"):
            return True
        if text.lower() in ("0", "false", "off", "no"):
            return False
        raise OptionError(f"{text!r}", where, "use 1 or 0")
    try:
        return kind(text)
    except ValueError:
        raise OptionError(f"{text!r}", where, f"give one {kind.__name__}") from None


def _check_type(name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    if str in kinds and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        allowed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise OptionError(f"{name}={value!r}", WHERE, f"give {allowed}")
    return value
