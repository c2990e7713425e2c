"""Who may import whom, and how long a module may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD = sorted(
    path
    for path in (ROOT / "adalfl_lite").rglob("*.py")
    if path.stem not in {"__init__", "experiments", "cli"} or path.parent.name == "baselines"
)
"""The training package but for what compares and the command line."""
MODULES = sorted([*(ROOT / "adalfl_lite").rglob("*.py"), *(ROOT / "analysis").rglob("*.py")])
BOOK = sorted(
    path for path in (ROOT / "book").rglob("*.py") if "_build" not in path.parts and ".jupyter_cache" not in path.parts
)


def imported(source: str, package: str = "") -> set[str]:
    """The absolute dotted names a module imports, at its top or within a function; relative ones made absolute."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    return names


def imports_of(path: Path) -> set[str]:
    return imported(path.read_text(encoding="utf-8"), path.parent.name)


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


def test_the_check_sees_every_way_to_import():
    source = """
import a.b as c
from d import e
def later():
    from . import f
    from .g import h
    importlib.import_module("i.j")
"""
    assert imported(source, "p") == {"a.b", "d", "d.e", "p", "p.f", "p.g", "p.g.h", "i.j"}


def test_there_are_modules_to_check():
    names = {path.stem for path in MODULES}
    assert {"metagradient", "online", "evomal", "experiments", "cli", "plotting", "statistics"} <= names
    assert len(METHOD) > 25


def test_the_map_of_the_package_names_every_module_below_those_it_imports():
    package = ROOT / "adalfl_lite"
    text = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
    order = [first or later for first, later in re.findall(r"^ {4}(\w+) |; (\w+):", text, re.MULTILINE)]
    names = {p.stem for p in package.glob("*.py")} - {"__init__"} | {"baselines"}
    assert len(order) == len(names) and set(order) == names
    for path in package.rglob("*.py"):
        own = path.relative_to(package).parts[0].removesuffix(".py")
        found = {name.split(".")[1] for name in imports_of(path) if name.startswith("adalfl_lite.")} & names
        if own != "__init__":
            assert found <= {own, *order[: order.index(own)]}, path


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "analysis"], ids=lambda path: path.stem)
def test_the_diagnostics_know_nothing_of_the_training_package(path):
    assert not within(imports_of(path), "adalfl_lite"), "analysis takes any model and any loss callable"


@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.stem)
def test_the_method_knows_nothing_of_experiments_command_line_or_diagnostics(path):
    names = imports_of(path)
    for above in ("adalfl_lite.experiments", "adalfl_lite.cli", "analysis"):
        assert not within(names, above)


def test_only_the_command_line_joins_the_two_packages():
    training = [path for path in MODULES if "adalfl_lite" in path.relative_to(ROOT).parts]
    joining = {path.stem for path in training if within(imports_of(path), "analysis")}
    assert joining == {"cli"}
    assert not any(within(imports_of(path), "adalfl_lite.cli") for path in MODULES)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_nothing_imports_the_book_or_the_tests(path):
    names = imports_of(path)
    for outside in ("book", "tests", *(p.stem for p in BOOK if p.stem != "__init__")):
        assert not within(names, outside)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_module_is_read_in_one_sitting(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("package", ["adalfl_lite", "analysis"])
def test_type_checkers_are_told_that_the_packages_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_the_method_imports_no_plotting_and_no_command_line():
    """Training on a cluster needs neither; the import stays quick."""
    for path in METHOD:
        names = {re.split(r"\.", found)[0] for found in imports_of(path)}
        assert not names & {"matplotlib", "seaborn", "typer", "rich"}, path


def test_importing_the_method_does_not_wait_for_libraries_it_may_not_need():
    code = "import sys, adalfl_lite; print(*{'sklearn', 'torchvision', 'torch._dynamo', 'matplotlib'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not found.stdout.split()
