"""What is kept for one compiled model, on its parameters: its sequences, its sessions, what was compiled."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vericache_compile.config import AUTO, Config
from vericache_compile.estimate import Measured
from vericache_compile.observers import tokens_path
from vericache_compile.plan import Compiled, Site, Tier
from vericache_compile.runtime.executor import WeightCasts
from vericache_compile.runtime.sequence_table import SequenceTable
from vericache_compile.runtime.session import Session
from vericache_compile.runtime.tiers import Home
from vericache_compile.runtime.transfers import Link

ATTRIBUTE = "_vericache"
"""Where a model's state hangs: on the parameters that the caller's model holds."""


@dataclass
class Compilation:
    """What was compiled for one model under one configuration."""

    config: Config
    session: Session
    compiled: dict[str, Compiled]
    graphs: dict[str, int] = field(default_factory=lambda: {"captured": 0, "decode": 0, "not taken": 0})
    reasons: list[str] = field(default_factory=list)
    seconds: float = 0.0
    sites: tuple[Site, ...] = ()
    measured: Measured | None = None
    """What its compressor takes at these."""
    told: bool = False
    dumps_failed: set[str] = field(default_factory=set)
    """Dump folders that could not be written to, each said once."""


class ModelState:
    """All that is kept for one model; found again through its parameters, and never pickled with them."""

    def __init__(self) -> None:
        self.table = SequenceTable()
        self.casts = WeightCasts()
        self.lock = threading.RLock()
        self.compilations: dict[Config, Compilation] = {}
        self.compiled: dict[str, Compiled] = {}
        """Compiled segments by structure, shared by all configurations."""
        self.latest: Compilation | None = None

    def compilation(self, config: Config) -> Compilation:
        """The compilation for a configuration, made on first use."""
        with self.lock:
            if config not in self.compilations:
                self.compilations[config] = Compilation(config, self._session(config), self.compiled)
            made = self.latest = self.compilations[config]
            made.session.write_to(config.trace, tokens_path(config))  # no part of what makes configurations equal
            return made

    def _session(self, config: Config) -> Session:
        tier = None if config.placement == AUTO else Tier(config.placement)
        home = Home(tier, config.device_bytes, config.kv_folder, Link(config.link_gbps))
        return Session(self.table, config.make_compressor(), self.casts, self.lock, home)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Saved with a parameter it becomes an empty dictionary, which `torch.load(weights_only=True)` reads."""
        return OrderedDict, ()


def state_of(tensors: Sequence[Any]) -> ModelState | None:
    """The state that hangs on one of these parameters, if any."""
    return next((held for t in tensors if isinstance(held := getattr(t, ATTRIBUTE, None), ModelState)), None)
