"""What the package promises as a whole: its names, its import, and a model left as it was found."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import analysis

MODULES = sorted(path.stem for path in Path(analysis.__file__).parent.glob("*.py") if path.stem != "__init__")
INTERNAL = {"cut", "derivatives", "inputs", "matrices", "snapshots"}
SHARED = {
    *("check_runs", "colours", "flat", "label", "layers", "legend_above", "on_device", "plain_ticks", "split_state"),
    *("check_value", "one_tensor", "without_rounding"),
}
"""Public by name, but only the package's own modules have use for them."""


def functions(module: str) -> set[str]:
    """The functions that a module defines and does not mark as its own by an underscore."""
    members = inspect.getmembers(importlib.import_module(f"analysis.{module}"), inspect.isfunction)
    return {name for name, f in members if f.__module__ == f"analysis.{module}" and not name.startswith("_")}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in INTERNAL])
def test_every_function_is_exported(module):
    assert functions(module) - SHARED <= set(analysis.__all__)


def test_every_exported_name_exists():
    assert all(hasattr(analysis, name) for name in analysis.__all__)


def test_the_import_warns_of_nothing():
    command = [sys.executable, "-W", "error", "-c", "import analysis; analysis.top_eigenpairs"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_function_that_takes_a_model_is_tested_to_leave_it_as_it_was():
    """Those tests use the fixture ``unchanged``; here, that no function is forgotten."""
    takers = {
        (module, name)
        for module in MODULES
        for name in functions(module) & set(analysis.__all__)
        if {"model", "other"} & set(inspect.signature(getattr(analysis, name)).parameters)
    }
    assert len(takers) > 20
    for module, name in sorted(takers):
        source = (Path(__file__).parent / f"test_{module}.py").read_text(encoding="utf-8")
        tables = re.findall(r"^FUNCTIONS = \{.*?^\}", source, re.M | re.S)
        tests = [test for test in re.split(r"^(?=def |@pytest)", source, flags=re.M) if "with unchanged(" in test]
        marked = re.findall(r"^@pytest.mark.parametrize.*\n(?=def test_the_model)", source, re.M)
        assert tests and any(re.search(rf"\b{name}\b", text) for text in (*tables, *tests, *marked)), name
