"""Who may import whom, and how long a module may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adalfl_lite"
METHOD = sorted(
    path
    for path in PACKAGE.rglob("*.py")
    if path.relative_to(PACKAGE).parts[0] not in ("__init__.py", "compare", "cli.py")
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
    assert {"forward", "online", "symbolic", "grid", "cli", "plotting", "statistics"} <= names
    assert len(METHOD) > 25


def map_of(face: Path) -> list[str]:
    """The names in the map of a package, which its docstring is, from the ground up."""
    text = ast.get_docstring(ast.parse(face.read_text(encoding="utf-8")), clean=False) or ""
    return re.findall(r"^ {4}(\w+) +\S", text, re.MULTILINE)


FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_import_goes_up_the_map(folder):
    """The map of a package has every file and folder in it, below those that it imports: no circle, no arrow back."""
    order = map_of(folder / "__init__.py")
    rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert len(order) == len(set(order)) and set(order) == rooms - {"__init__"}
    prefix = ".".join(folder.relative_to(ROOT).parts)
    for path in folder.rglob("*.py"):
        own = path.relative_to(folder).parts[0].removesuffix(".py")
        found = {name.removeprefix(f"{prefix}.").split(".")[0] for name in imports_of(path) if name.startswith(prefix)}
        if own != "__init__":
            assert found & set(order) <= {own, *order[: order.index(own)]}, path


def test_the_house_has_few_floors_and_few_stairs():
    """Rooms are the folders and files of the package; an edge is a room that imports another."""
    edges = set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found = {name.split(".")[1] for name in imports_of(path) if name.startswith("adalfl_lite.")}
        edges |= {
            (own, other) for other in found & set(map_of(PACKAGE / "__init__.py")) if own not in (other, "__init__")
        }
    floors: dict[str, int] = {}
    for room in map_of(PACKAGE / "__init__.py"):
        floors[room] = 1 + max([floors[other] for own, other in edges if own == room], default=0)
    assert max(floors.values()) <= 8 and len(edges) <= 50


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name == "analysis"], ids=lambda path: path.stem)
def test_the_diagnostics_know_nothing_of_the_training_package(path):
    assert not within(imports_of(path), "adalfl_lite"), "analysis takes any model and any loss callable"


@pytest.mark.parametrize("path", METHOD, ids=lambda path: path.stem)
def test_the_method_knows_nothing_of_experiments_command_line_or_diagnostics(path):
    names = imports_of(path)
    for above in ("adalfl_lite.compare.grid", "adalfl_lite.cli", "analysis"):
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_function_fits_on_a_page_and_takes_no_crowd(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None and len(node.body) > 1
            first = node.body[1] if documented else node.body[0]
            assert node.body[-1].end_lineno - first.lineno < 60, node.name
            named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([name for name in named if name not in ("self", "cls")]) <= 14, node.name


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_docstrings_say_what_to_whom(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (words := ast.get_docstring(node)):
            assert len(words.split()) > 4, (node.name, words)


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
