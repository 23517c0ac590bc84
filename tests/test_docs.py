"""The pages on methods and models say what the code does: names, parameters, defaults, papers; families tried."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from models import OLDER

from vericache_compile.cli import main
from vericache_compile.compressors.table import COMPRESSORS, all_parameters
from vericache_compile.sweep import COLUMNS
from vericache_compile.sweep_models import HYBRIDS, MODELS, attentions_of

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "compressors").glob("*.md"))
SECTION = re.compile(r"^## (\w+)$\n+^`(\w+)\((.*?)\)`(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
SECTIONS = {found[1]: found for page in PAGES for found in SECTION.finditer(page.read_text())}


def test_sections_are_found() -> None:
    assert set(SECTIONS) == set(COMPRESSORS)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_gives_the_methods_defaults_and_paper(name: str) -> None:
    _, spelled, inside, text = SECTIONS[name].groups()
    method = COMPRESSORS[name]
    assert spelled == name
    assert inside == ", ".join(f"{key}={value!r}" for key, value in all_parameters(method).items())
    assert method.paper.removeprefix("arXiv ") in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert links
    assert all((page.parent / link).exists() for link in links)
    assert f"docs/compressors/{page.name}" in (ROOT / "README.md").read_text()


def test_the_readmes_plan_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what it leaves out, which it says with dots."""
    [block] = re.findall(
        r"^```\n\$ vericache (plan .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    command, shown = re.split(r"(?<!\\)\n", block, maxsplit=1)
    monkeypatch.setenv("COLUMNS", "112")
    assert main(shlex.split(command.replace("\\\n", ""))) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert all(part.strip() in printed for part in shown.split("...\n")), printed


@pytest.mark.skipif(OLDER, reason="the page is of a newer transformers, where other families have sdpa")
def test_the_page_on_models_has_every_family_and_each_is_right() -> None:
    """As `vericache sweep --markdown docs/models.md` writes it."""
    lines = [line for line in (ROOT / "docs" / "models.md").read_text().splitlines() if line.startswith("| ")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert tuple(header) == COLUMNS
    expected = [[name, attention] for name in MODELS for attention in attentions_of(name)]
    assert [row[:2] for row in rows] == expected
    for name, *_, taken, checks, identical, _, _, reason in rows:
        assert (taken, checks, identical) == ("no" if name in HYBRIDS else "yes", "passed", "yes"), name
        assert bool(reason) == (name in HYBRIDS), name
