"""The pages on compression methods say what the code does: names, parameters, defaults, papers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vericache_compile.compressors.table import COMPRESSORS, all_parameters

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
