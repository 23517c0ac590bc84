"""Methods that may be calibrated: what they learn of a model's text is kept in a file, and read from there.

Shapes: K KV heads, S tokens, D head size, Dv value head size, w queries, H query heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vericache_compile.calibration import Calibration, read
from vericache_compile.compressors.base import Compressor
from vericache_compile.compressors.facts import Facts
from vericache_compile.compressors.fitted import Fit, Fitted, FittedKV
from vericache_compile.compressors.rotation import Rotation
from vericache_compile.plan import Site


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
    def learned(self) -> Sequence[Tensor]:
        """The file's tensors."""
        return () if self.held is None else list(self.held.tensors.values())

    def check_model(self, sites: Sequence[Site], parameters: Iterable[Sequence[int]]) -> None:
        """Raise OptionError where the file is of another model, by its sites or the shapes of its `parameters`."""
        if self.held is not None:
            self.held.check_model(sites, parameters)


class Learned(Learner, Fitted):
    """A method whose fit may come from a file, site by site."""

    @property
    def learned(self) -> Sequence[Tensor]:
        """The file's tensors, and their copies on other devices or in other dtypes."""
        fits: dict[tuple[int, int], Placed] = vars(self).get("fits", {})
        return [*super().learned, *(part for fit in fits.values() for part in fit.copies)]

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
    def copies(self) -> list[Tensor]:
        """What is not the file's own."""
        held = {id(part) for part in self._fit}
        return [part for fit in self._made.values() for part in fit if id(part) not in held]


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

    @property
    def least_tail(self) -> int:
        """The method's."""
        return self.method.least_tail

    def knowing(self, facts: Facts) -> Self:
        """With the method told."""
        return replace(self, method=self.method.knowing(facts))

    def compress(self, keys: Tensor, values: Tensor, queries: Tensor | None) -> FittedKV:
        """As the method does, but by the fit that is given, and lent."""
        given = self.given.at(keys.device, keys.dtype, self.method)
        return FittedKV(*self.method.start(keys, values, queries, given, self.method.residual), lent=True)
