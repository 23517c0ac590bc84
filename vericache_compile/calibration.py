"""Calibration files: what a compression method has learned of a model, as safetensors.

The metadata says of which method and model it is. A graph shows no configuration, so what a file is checked against at
run time is what a graph does show: the shape of every attention site's cache, and the shapes of the parameters.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from vericache_compile.errors import OptionError
from vericache_compile.plan import Site

FORMAT = "vericache calibration 1"


@dataclass(frozen=True)
class Calibration:
    """What a file holds."""

    path: str
    method: str
    model: Mapping[str, Any]
    """config: hash of the model's configuration; sites: [[KV heads, head size, value head size], ...]; parameters:
    their distinct shapes."""
    parameters: str
    """The method as it was calibrated."""
    tensors: Mapping[str, Tensor] = field(repr=False)

    @property
    def where(self) -> str:
        """For errors."""
        return f"the calibration file {self.path}"

    @property
    def again(self) -> str:
        """For errors: how to make another."""
        return f"make one with `vericache calibrate --compressor {self.method} --model ... --text ... --out ...`"

    def part(self, name: str) -> Tensor:
        """A tensor; raises OptionError where there is none of that name."""
        if name not in self.tensors:
            raise OptionError(f"no tensor {name!r} in it", self.where, self.again)
        return self.tensors[name]

    def parameter(self, name: str) -> float:
        """A number that the method was calibrated with; raises OptionError where the file does not say."""
        found = re.search(rf"\b{name}=(\d+(\.\d+)?(e-?\d+)?)\b", self.parameters)
        if found is None:
            raise OptionError(f"it does not say with which {name} it was made", self.where, self.again)
        return float(found[1])

    def check_model(self, sites: Sequence[Site], parameters: Iterable[Sequence[int]]) -> None:
        """Raise OptionError unless these are the file's model: all its sites, and no parameter of another shape."""
        own = [[site.kv_heads, site.head_size, site.value_size] for site in sites]
        if own != self.model["sites"]:
            theirs = self.model["sites"]
            found = f"it is of a model with {len(theirs)} layers of {theirs[0]} (KV heads, head sizes)"
            raise OptionError(f"{found}, not {len(own)} of {own[0]}", self.where, self.again)
        foreign = sorted({tuple(shape) for shape in parameters} - {tuple(shape) for shape in self.model["parameters"]})
        if foreign:
            found = f"it is of another model: that one has no parameter of shape {list(foreign[0])}"
            raise OptionError(found, self.where, self.again)


def write(
    path: str | os.PathLike[str],
    method: str,
    parameters: str,
    model: Any,
    sites: Sequence[Sequence[int]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Write a calibration of a transformers model with these sites (KV heads, head size, value head size).

    Returns what the file says of itself; raises OptionError where it cannot be written.
    """
    from safetensors.torch import save_file

    described = describe(model) | {"sites": [list(site) for site in sites]}
    metadata = {
        "format": FORMAT,
        "method": method,
        "parameters": parameters,
        "model": json.dumps(described, sort_keys=True),
    }
    own = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    beside = Path(f"{os.fspath(path)}.part")  # so that a file of this name is whole, or the old one
    try:
        save_file(own, beside, metadata=metadata)
        beside.replace(path)
    except Exception as error:
        beside.unlink(missing_ok=True)
        fix = "name a file in a folder that can be written to"
        raise OptionError(f"it cannot be written: {error}", f"the calibration file {path}", fix) from error
    return metadata | {"model": described}


def describe(model: Any) -> dict[str, Any]:
    """What names a model in a file, beside its sites, which only a run of it shows."""
    unstable = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
    config = {name: value for name, value in model.config.to_dict().items() if name not in unstable}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "parameters": sorted({tuple(each.shape) for each in model.parameters()}),
    }


def read(path: str, method: str) -> Calibration:
    """The file's contents, read once per version of it; raises OptionError where it is not `method`'s or not whole."""
    where = f"the calibration file {path}"
    fix = f"name a file that `vericache calibrate --compressor {method} ...` wrote"
    if not isinstance(path, str | os.PathLike):
        raise OptionError(f"calibration={path!r}", f"compressor {method!r}", f"{fix}, as text in quotes")
    try:
        state = Path(path).stat()
    except OSError as error:
        raise OptionError(f"it cannot be read: {error.strerror}", where, fix) from error
    held = _read(os.fspath(path), state.st_mtime_ns, state.st_size, fix)
    if held.method != method:
        raise OptionError(f"it is of method {held.method!r}, not {method!r}", where, fix)
    return held


@lru_cache(maxsize=8)
def _read(path: str, changed: int, size: int, fix: str) -> Calibration:
    """`changed` and `size` tell versions of a file apart."""
    from safetensors import SafetensorError, safe_open

    where = f"the calibration file {path}"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (OSError, SafetensorError) as error:
        raise OptionError(f"it is not a whole safetensors file: {error}", where, fix) from error
    if metadata.get("format") != FORMAT:
        raise OptionError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}", where, fix)
    try:
        model = json.loads(metadata["model"])
        return Calibration(path, metadata["method"], model, metadata["parameters"], tensors)
    except (KeyError, ValueError) as error:
        raise OptionError(f"its metadata is not whole: {error}", where, fix) from error
