"""What the methods share that first look at a row and then store it: a codebook, an order of channels, a basis.

The fit is made of the first tokens that a region covers, or given by a calibration file, and kept for those that join
later. Besides, the first `sinks` tokens of a row may stay as they are: much attention goes there whatever is asked.

Shapes: K KV heads, S tokens, D head size, Dv value head size, s sinks, w queries, H query heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from vericache_compile.calibration import Calibration, read
from vericache_compile.compressors.base import CompressedKV, Compressor
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.quantizer import Codes, join
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.plan import Site

Fit = tuple[Tensor, ...]
"""What a method has learned of a row; () before it has seen one."""


class Pair(NamedTuple):
    """Keys [K, S, D] and values [K, S, Dv]."""

    keys: Tensor
    values: Tensor


class FittedKV(CompressedKV):
    """Sinks as they are, then every token of [s, covered) as codes."""

    def __init__(
        self, sinks: Pair, codes: tuple[Codes, Codes] | None, covered: int, method: Fitted, fit: Fit, *, lent: bool
    ) -> None:
        """`codes` of keys and values, None where nothing is covered; a `lent` fit is not this region's own."""
        self.sinks, self.codes, self.covered, self.method, self.fit, self.lent = (
            sinks,
            codes,
            covered,
            method,
            fit,
            lent,
        )

    @property
    def slots(self) -> int:
        """Keys that attention reads from this region: every covered token."""
        return self.covered

    @property
    def nbytes(self) -> int:
        """Bytes allocated for sinks, codes, and the fit where it is this region's own."""
        codes = [part for side in self.codes or () for part in side]
        return sum(part.nbytes for part in (*self.sinks, *codes, *(() if self.lent else self.fit)))

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys [K, covered, D] and values [K, covered, Dv], read anew from their codes at each call."""
        if self.codes is None:
            return self.sinks.keys, self.sinks.values
        keys, values = self.method.decode(*self.codes, self.fit)
        keys = self.method.as_cached(keys, self.sinks.keys.shape[1])
        return torch.cat([self.sinks.keys, keys], dim=1), torch.cat([self.sinks.values, values], dim=1)

    @property
    def attends(self) -> bool:
        """Where there is something, whether the method does."""
        return self.codes is not None and self.method.attends(self.sinks.keys.dtype)

    def attend(self, query: Tensor, tail: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """As the method does it: [H, Dv]."""
        return self.method.attend(self, query, tail, scale)

    def extend(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        """Cover the whole groups of keys [K, S, D] and values [K, S, Dv] too, by the fit that is held."""
        if self.codes is None:
            return self._begin(keys, values, queries)
        tokens = keys.shape[1] // self.method.multiple * self.method.multiple
        more = self.method.encode(self.method.as_stored(keys[:, :tokens], self.covered), values[:, :tokens], self.fit)
        codes = (join(self.codes[0], more[0]), join(self.codes[1], more[1]))
        covered = self.covered + tokens
        return type(self)(Pair(*_owned(self.sinks)), codes, covered, self.method, self._passed_on(), lent=self.lent)

    def _begin(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Self:
        given = self._passed_on() or None
        return type(self)(*self.method.start(keys, values, queries, given, residual=0), lent=self.lent)

    def _passed_on(self) -> Fit:
        """The fit for a region that follows this one."""
        return self.fit if self.lent else tuple(part.clone() for part in self.fit)


class Fitted(Compressor):
    """A method that keeps every token, by what it has learned of the first ones."""

    residual: int = 32
    """Least number of recent tokens left to the tail."""
    sinks: int = 0
    """First tokens of a row that stay as they are."""

    parameters: ClassVar[tuple[str, ...]] = ()

    @property
    def multiple(self) -> int:
        """Tokens are stored by so many."""
        return 1

    @abstractmethod
    def fit(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> Fit:
        """What to keep of keys [K, S, D], values [K, S, Dv] (S >= 1) and the last queries [H, w, D]; owned tensors."""

    @abstractmethod
    def encode(self, keys: Tensor, values: Tensor, fit: Fit) -> tuple[Codes, Codes]:
        """Codes of keys [K, S, D] and values [K, S, Dv], owned; `multiple` divides S, which may be 0."""

    @abstractmethod
    def decode(self, keys: Codes, values: Codes, fit: Fit) -> tuple[Tensor, Tensor]:
        """Keys [K, S, D] and values [K, S, Dv], in the dtype of the cache, from their codes."""

    def attends(self, dtype: torch.dtype) -> bool:
        """Whether regions of this dtype attend themselves."""
        return False

    def attend(self, region: FittedKV, query: Tensor, tail: tuple[Tensor, Tensor], scale: float) -> Tensor:
        """`CompressedKV.attend` of a region that has codes."""
        raise AssertionError("a method that does not say that it attends")

    def as_stored(self, keys: Tensor, first: int) -> Tensor:
        """Keys [K, S, D] of a row's tokens from `first` on, as the method learns, encodes and decodes them.

        As before RoPE, where the method needs that and the runtime knows how keys were turned; else as cached.
        """
        rotation = self.facts.rotation
        return keys if rotation is None else rotation.unrotate(keys, self._position(first)).to(keys.dtype)

    def as_cached(self, keys: Tensor, first: int) -> Tensor:
        """The inverse of `as_stored`."""
        rotation = self.facts.rotation
        return keys if rotation is None else rotation.rotate(keys, self._position(first)).to(keys.dtype)

    def _position(self, token: int) -> int:
        """Of a token of the row."""
        return self.facts.position + token - self.facts.token

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> FittedKV:
        """Compress keys [K, S, D] and values [K, S, Dv] by a fit of their own, and where a method reads queries by the
        last ones [H, w, D].

        Covers the sinks and after them whole multiples, or nothing; at least `residual` tokens are not covered.
        """
        return FittedKV(*self.start(keys, values, queries, None, self.residual), lent=False)

    def start(
        self, keys: Tensor, values: Tensor, queries: Tensor | None, given: Fit | None, residual: int
    ) -> tuple[Pair, tuple[Codes, Codes] | None, int, Fitted, Fit]:
        """What a region is made of: sinks, codes, covered tokens, method, and the fit (`given`, or one made here)."""
        groups = max(keys.shape[1] - residual - self.sinks, 0) // self.multiple * self.multiple
        if groups == 0:
            return Pair(*_owned((keys[:, :0], values[:, :0]))), None, 0, self, given or ()
        rest = slice(self.sinks, self.sinks + groups)
        stored, others = self.as_stored(keys[:, rest], self.sinks), values[:, rest]
        fit = self.fit(stored, others, queries) if given is None else given
        first = Pair(*_owned((keys[:, : self.sinks], values[:, : self.sinks])))
        return first, self.encode(stored, others, fit), rest.stop, self, fit


class Learner(Compressor):
    """A method that can be calibrated: what it learns of a model's text is kept in a file, and read from there."""

    calibration: str | None = None
    """A file that `vericache calibrate` wrote for this method and model."""
    held: Calibration | None = None
    """What the file held when the method was made (`load`): what becomes of it later does no harm."""

    @abstractmethod
    def learn(self, model: Any, ids: Tensor, turned: Sequence[Rotation | None]) -> dict[str, Tensor]:
        """What to keep in the file: tensors by name, of a transformers model and tokens ids [N, T].

        `turned` says how each layer's keys are turned by position.
        """

    def load(self) -> None:
        """Read the file, where one is named; raise OptionError where it cannot be read, or is another method's."""
        if self.calibration is not None:
            vars(self)["held"] = read(self.calibration, self.name)

    @property
    def shared_nbytes(self) -> int:
        """Of the file's tensors."""
        return 0 if self.held is None else sum(tensor.nbytes for tensor in self.held.tensors.values())

    def check_model(self, sites: Sequence[Site], parameters: Iterable[Sequence[int]]) -> None:
        """Raise OptionError where the file is of another model, by its sites or the shapes of its `parameters`."""
        if self.held is not None:
            self.held.check_model(sites, parameters)


class Learned(Learner, Fitted):
    """A method whose fit may come from a file, site by site."""

    @property
    def shared_nbytes(self) -> int:
        """Of the file's tensors, and of their copies on other devices or in other dtypes."""
        fits: dict[tuple[int, int], Placed] = vars(self).get("fits", {})
        return super().shared_nbytes + sum(fit.nbytes for fit in fits.values())

    @abstractmethod
    def given(self, held: Calibration, layer: int, layers: int) -> Fit:
        """The fit that a file holds for site `layer` of `layers`."""

    def typed(self, fit: Fit, dtype: torch.dtype) -> Fit:
        """A given fit for a cache of this dtype: a file may have been made of the model in another."""
        return tuple(part.to(dtype) if part.is_floating_point() else part for part in fit)

    def for_layer(self, layer: int, layers: int) -> Compressor:
        """The method as it is at site `layer` of `layers`: with the file's fit, where there is a file."""
        if self.held is None:
            return self
        fits: dict[tuple[int, int], Placed] = vars(self).setdefault("fits", {})
        if (layer, layers) not in fits:
            fits[layer, layers] = Placed(self.given(self.held, layer, layers))
        return Calibrated(self, layer, fits[layer, layers])


class Placed:
    """A fit that a file has for a site, as caches of several devices and dtypes read it: each made once."""

    def __init__(self, fit: Fit) -> None:
        self._fit = fit
        self._made: dict[tuple[torch.device, torch.dtype], Fit] = {}

    def at(self, device: torch.device, dtype: torch.dtype, method: Learned) -> Fit:
        """For a cache there, of the method that the fit is of."""
        if (device, dtype) not in self._made:
            with torch.inference_mode(False):  # whoever asks later may not be in it
                self._made[device, dtype] = tuple(part.to(device) for part in method.typed(self._fit, dtype))
        return self._made[device, dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of what is not the file's own."""
        held = {id(part) for part in self._fit}
        return sum(part.nbytes for fit in self._made.values() for part in fit if id(part) not in held)


@dataclass(frozen=True)
class Calibrated(Compressor):
    """A method at one site, with the fit that its calibration file has for it."""

    name: ClassVar[str] = "calibrated"

    method: Learned
    layer: int
    given: Placed = field(repr=False, compare=False)

    @property
    def queries(self) -> int:
        """Those that the method reads."""
        return self.method.queries

    @property
    def wants(self) -> frozenset[str]:
        """What the method does."""
        return self.method.wants

    def knowing(self, facts: Facts) -> Self:
        """With the method told."""
        return replace(self, method=self.method.knowing(facts))

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> FittedKV:
        """As the method does, but by the fit that is given, and lent."""
        given = self.given.at(keys.device, keys.dtype, self.method)
        return FittedKV(*self.method.start(keys, values, queries, given, self.method.residual), lent=True)


def _owned(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return (part.clone(memory_format=torch.contiguous_format) for part in tensors)
