"""Bandwidths are measured once and kept; a damaged file is measured over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vericache_compile import machine
from vericache_compile.machine import Bandwidths, bandwidths

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.device]:
    """Each measurement that was made; the file is in a folder of the test's own."""
    made: list[torch.device] = []

    def measure(device: torch.device) -> Bandwidths:
        made.append(device)
        return Bandwidths(20.0, 5.0)

    monkeypatch.setenv("VERICACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(machine, "measure", measure)
    return made


def test_measured_once(measured: list[torch.device]) -> None:
    assert bandwidths(CPU) == bandwidths(CPU) == Bandwidths(20.0, 5.0)
    assert measured == [CPU]


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"cpu": 3}', "\x00"])
def test_a_damaged_file_is_measured_over(measured: list[torch.device], tmp_path: Path, text: str) -> None:
    path = tmp_path / "home" / machine.FILE
    path.parent.mkdir()
    path.write_text(text)
    assert bandwidths(CPU) == Bandwidths(20.0, 5.0)
    assert bandwidths(CPU) == Bandwidths(20.0, 5.0)
    assert len(measured) == 1
    assert Bandwidths(20.0, 5.0) in [Bandwidths(**x) for x in json.loads(path.read_text()).values() if type(x) is dict]


def test_a_folder_that_cannot_be_written_to(measured: list[torch.device], tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    assert bandwidths(CPU) == Bandwidths(20.0, 5.0)
    assert len(measured) == 1


def test_a_real_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "BYTES", 1 << 20)
    found = machine.measure(CPU)
    assert found.memory_gbps > 0
    assert found.link_gbps > 0
