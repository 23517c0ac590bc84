"""index.html: what is in it, that names stay data, and that it works in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graphs import Toy, run_until, tiny_decode, toy_decode
from torch import Tensor
from torch.fx import Graph, GraphModule

from vericache_compile.dump.folder import Dump
from vericache_compile.dump.page import BOX, Page, lay_out, rows_of
from vericache_compile.errors import UnsupportedGraph
from vericache_compile.passes.pipeline import plan_capture
from vericache_compile.passes.program import Program

EVIL = '</script><script>document.title="taken"</script>'


def data_of(text: str) -> Any:
    [held] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(held)


def write(root: Path, module: GraphModule) -> Path:
    """The page of one captured graph."""
    dump = Dump(str(root), set())
    try:
        plan_capture(module, 1, 4, False, {}, observers=[dump])
    except UnsupportedGraph as reason:
        dump.refused(module, reason)
    assert not dump.failed
    assert dump.folder is not None
    return dump.folder / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("page"), tiny_decode("llama", 1).module)


@pytest.fixture(scope="module")
def program() -> Program:
    return run_until(tiny_decode("llama", 1), "lower")


def test_every_pass_shows_every_node_of_its_graphs(page: Path, program: Program) -> None:
    data = data_of(page.read_text())
    assert [stage["name"] for stage in data["stages"]][::12] == ["captured", "lower"]
    for mode, groups in data["stages"][-1]["graphs"].items():
        names = [data["nodes"][record][0] for group in groups for record, *_ in group["nodes"]]
        assert sorted(names) == sorted(node.name for node in program.variants[mode].graph.nodes)
    assert list(data["stages"][4]["graphs"]) == ["captured", "as_captured"]


def test_rows_are_inputs_then_segments_and_sites_in_turn(program: Program) -> None:
    kinds = [kind for kind, _, _ in rows_of(program.variants["verify"])]
    assert kinds == ["inputs", *["segment", "site"] * 3, "segment", "output"]


def test_shared_segments_say_so(page: Path) -> None:
    groups = data_of(page.read_text())["stages"][-1]["graphs"]["draft"]
    assert [group["shared"] for group in groups if group["kind"] == "segment"] == [1, 2, 2, 1]


def test_no_two_nodes_of_a_row_overlap_and_readers_are_below(program: Program) -> None:
    for kind, _, nodes in rows_of(program.variants["verify"]):
        places, (width, height) = lay_out(nodes, in_a_column=kind == "inputs")
        assert len(set(places)) == len(places)
        assert all(x + BOX[0] <= width and y + BOX[1] <= height for x, y in places)
        place = dict(zip(nodes, places, strict=True))
        reads = [(read, node) for node in nodes for read in node.all_input_nodes if read in place]
        assert all(place[read][1] < place[node][1] for read, node in reads)


def test_the_page_loads_nothing(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:,)', text)
    assert "default-src 'none'" in text


def test_a_page_of_a_graph_not_taken_says_why(tmp_path: Path) -> None:
    class Doubled(Toy):
        def positions(self, ids: Tensor, past: Tensor, *more: Tensor) -> Tensor:
            return super().positions(ids, past) + past.shape[2]

    data = data_of(write(tmp_path, toy_decode(Doubled()).module).read_text())
    assert "fix: " in data["refusal"]
    assert data["stages"][-1]["name"] == "prove_mask"


def hostile_page() -> str:
    """A page in which a target, a source line and the title try to leave their place."""
    graph = Graph()
    made = graph.call_function(print, (graph.placeholder("x"), EVIL))
    made.meta["stack_trace"] = f'  File "{EVIL}", line 1, in forward\n    {EVIL}\n'
    graph.output((made,))
    page = Page()
    page.add(EVIL, 1, Program(GraphModule({}, graph), 1, 4))
    return page.html(EVIL, EVIL)


def test_names_are_data_and_never_markup() -> None:
    text = hostile_page()
    assert EVIL not in text
    data = data_of(text)
    assert data["refusal"] == data["stages"][0]["name"] == EVIL
    assert EVIL in data["sources"][1]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system's, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs a browser: apt-get install chromium, or Google Chrome")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab that fails the test on any error or network request of its page."""
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
    yield tab
    tab.close()
    assert said == []


def test_it_opens_with_the_node_counts_of_both_variants(page: Path, program: Program, tab: Any) -> None:
    tab.goto(page.as_uri())
    for mode, module in program.variants.items():
        title = tab.locator(f".title[data-graph={mode}]")
        assert title.get_attribute("data-count") == str(len(module.graph.nodes))
    assert tab.locator(".node").count() == 0, "only what is opened is drawn"
    tab.click("#all")
    assert tab.locator(".node").count() == sum(len(module.graph.nodes) for module in program.variants.values())


def test_a_click_shows_a_node_and_what_the_passes_did_to_it(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.locator(".group.site[data-graph=verify] > button").first.click()
    tab.locator(".group[data-graph=verify] .node.is-site").click()
    said = tab.inner_text("#panel")
    assert "vericache.attend.default" in said
    assert "float32 [1, 4, 4, 16]" in said
    assert "sdpa_attention.py" in said
    assert "made by split_modes\nmade by expand_window from attend_default\n" in said
    tab.locator(".group.output[data-graph=verify] > button").click()
    tab.locator(".group[data-graph=verify][data-row='7'] > button").click()
    tab.locator(".group[data-graph=verify][data-row='7'] .node").last.click()
    assert "captured as logits\nchanged by split_modes\nmade by expand_window from logits\n" in tab.inner_text("#panel")


def test_links_lead_from_a_node_to_what_it_reads(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.locator(".group.output[data-graph=verify] > button").click()
    tab.locator(".group[data-graph=verify] .node").click()
    tab.locator("#panel .link").first.click()
    assert "vericache.linear.default" in tab.inner_text("#panel")
    assert tab.locator(".node.chosen").inner_text().startswith("linear_")


def test_the_slider_goes_through_the_passes(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.fill("#stage", "0")
    assert tab.inner_text("#stage-name").startswith("00 captured: ")
    assert tab.locator(".title").all_inner_texts() == [tab.locator(".title[data-graph=captured]").inner_text()]
    tab.fill("#stage", "8")
    assert tab.inner_text("#stage-name") == "08 split_modes: 6"
    assert tab.locator(".title").count() == 2


def test_search_finds_nodes_and_opens_them(page: Path, tab: Any) -> None:
    tab.goto(page.as_uri())
    tab.fill("#search", "vericache.attend")
    assert "6 nodes found" in tab.inner_text("#panel")
    tab.locator("#panel .link").last.click()
    assert "verify / attend" in tab.inner_text("#panel")
    assert tab.locator(".node.chosen").count() == 1


def test_hostile_names_do_nothing(tmp_path: Path, tab: Any) -> None:
    path = tmp_path / "index.html"
    path.write_text(hostile_page())
    tab.goto(path.as_uri())
    tab.click("#all")
    tab.locator(".node").nth(1).click()
    assert EVIL in tab.inner_text("#panel")
    assert EVIL in tab.inner_text("#refusal")
    assert tab.title() == EVIL
