"""transformers' own generation tests, with every model compiled: by nothing, by Inductor, by vericache.

    make test-transformers SOURCE=/path/to/a/checkout/of/transformers

runs the tests of `GenerationTesterMixin` (tests/generation/test_utils.py there) for some models, three times, and
lists the tests that pass under Inductor and not under vericache. The transformers that is installed is what runs; the
checkout gives the tests. Where it is of another version, names that the tests import and the installed one lacks are
stood in for by functions that raise, so tests that need them fail in all three runs alike.

The same file is the command and, for the pytest that it starts, the plugin. No test of the suite is in here.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

BACKENDS = ("none", "inductor", "vericache")


def pytest_addoption(parser: pytest.Parser) -> None:
    """How models are compiled, and the model folders whose tests are to be imported."""
    parser.addoption("--backend", choices=BACKENDS, required=True)
    parser.addoption("--models", required=True)


def pytest_configure(config: pytest.Config) -> None:
    """Import the tests, and see to it that models are compiled."""
    sys.path.insert(0, str(config.rootpath))
    for model in config.getoption("--models").split(","):
        import_with_stand_ins(f"tests.models.{model}.test_modeling_{model}")
    if config.getoption("--backend") != "none":
        compile_models(config.getoption("--backend"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the generation tests."""
    tests = [x for x in items if isinstance(x, pytest.Function)]
    kept = [x for x in tests if x.function.__qualname__.startswith("GenerationTesterMixin.")]
    config.hook.pytest_deselected(items=[x for x in items if x not in kept])
    items[:] = kept


def pytest_runtest_setup() -> None:
    """Dynamo counts recompilations per code object: without this, tests after the first few would run uncompiled."""
    import torch

    torch.compiler.reset()


def import_with_stand_ins(module: str) -> None:
    """Import a module of tests; what it asks of transformers and is not there raises when it is used."""
    while True:
        try:
            importlib.import_module(module)
        except ImportError as error:
            lacking = re.match(r"cannot import name '(\w+)' from '(transformers[\w.]*)'", str(error))
            if lacking is None:
                raise
            setattr(sys.modules[lacking[2]], lacking[1], functools.partial(_raise, lacking[1]))
        else:
            return


def _raise(name: str, *_: object, **__: object) -> None:
    raise NotImplementedError(f"the installed transformers has no {name}")


def compile_models(backend: str) -> None:
    """`model.compile(backend=...)` for whatever can generate, as soon as it is built."""
    from transformers import GenerationMixin, PreTrainedModel

    post_init = PreTrainedModel.post_init

    def compiled(self: Any) -> None:
        post_init(self)
        if isinstance(self, GenerationMixin):
            self.compile(backend=backend)

    PreTrainedModel.post_init = compiled


def main() -> int:
    """Run the three, print and write what came of them; 1 where vericache loses a test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a checkout of transformers")
    parser.add_argument("--models", nargs="+", default=["llama", "qwen2"])
    parser.add_argument("--only", default="", metavar="EXPRESSION", help="tests by name, as pytest's -k")
    parser.add_argument("--json", type=Path, help="where each test's outcomes go")
    asked = parser.parse_args()
    outcomes = {backend: run(backend, asked.source.resolve(), asked.models, asked.only) for backend in BACKENDS}
    for backend, found in outcomes.items():
        print(f"{backend:10}", ", ".join(f"{count} {what}" for what, count in sorted(Counter(found.values()).items())))
    lost = [test for test, what in outcomes["inductor"].items() if what == "passed" != outcomes["vericache"].get(test)]
    print("\n".join([f"{len(lost)} pass under inductor and not under vericache", *lost]))
    if asked.json:
        found = re.search(
            r'^__version__ = "(.+)"', (asked.source / "src/transformers/__init__.py").read_text(), re.MULTILINE
        )
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        versions["tests"] = found[1] if found else "unknown"
        asked.json.write_text(json.dumps({"versions": versions, "outcomes": outcomes}, indent=1) + "\n")
    return bool(lost)


def run(backend: str, source: Path, models: list[str], only: str) -> dict[str, str]:
    """What became of each test: passed, failure, error or skipped."""
    here, paths = Path(__file__), os.environ.get("PYTHONPATH", "")
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder, "outcomes.xml")
        command = [sys.executable, "-m", "pytest", "-p", here.stem, "--backend", backend, "--models", ",".join(models)]
        command += ["--noconftest", "-c", os.devnull, "--rootdir", str(source), "-k", only, "-W", "ignore", "-q"]
        command += ["-n", "auto", "--dist", "worksteal", "--tb", "line", "--junitxml", str(written)]
        command += [f"tests/models/{model}/test_modeling_{model}.py" for model in models]
        found = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(here.parent), paths)))}
        subprocess.run(command, cwd=source, env=found, check=False)
        return outcomes_in(written)


def outcomes_in(written: Path) -> dict[str, str]:
    """Outcomes by test in a JUnit file."""
    made = {}
    for case in ElementTree.parse(written).iter("testcase"):
        what = [part.tag for part in case if part.tag in ("failure", "error", "skipped")]
        made[f"{case.get('classname', '').rsplit('.', 1)[-1]}.{case.get('name')}"] = what[0] if what else "passed"
    return made


if __name__ == "__main__":
    sys.exit(main())
