"""What the package promises as a whole: its names, its import, and a model left as it was found."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import analysis

MODULES = sorted(path.stem for path in Path(analysis.__file__).parent.glob("*.py") if path.stem != "__init__")
INTERNAL = {"former", "cut", "derivatives", "inputs", "matrices", "snapshots"}
SHARED = {
    "check_runs",
    "colours",
    "label",
    "legend_above",
    "markdown",
    "plain_ticks",
    "signed_ranks",
    "without_rounding",
}
"""Public by name, but only the package's own modules have use for them."""


def functions(module: str) -> set[str]:
    """The functions that a module defines and does not mark as its own by an underscore."""
    members = inspect.getmembers(importlib.import_module(f"analysis.{module}"), inspect.isfunction)
    return {name for name, f in members if f.__module__ == f"analysis.{module}" and not name.startswith("_")}


@pytest.mark.parametrize("module", [name for name in MODULES if name not in INTERNAL])
def test_every_function_is_exported(module):
    assert functions(module) - SHARED <= set(analysis.__all__)


def test_what_is_shared_is_there():
    assert set().union(*(functions(module) for module in MODULES if module not in INTERNAL)) >= SHARED


@pytest.mark.parametrize("module", [name for name in MODULES if name not in INTERNAL])
def test_a_diagnostic_takes_helpers_from_the_ground_and_diagnostics_from_each_other(module):
    tree = ast.parse((Path(analysis.__file__).parent / f"{module}.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    others = [node for node in imports if node.module.removeprefix("analysis.") in set(MODULES) - INTERNAL]
    taken = {alias.name for node in others if node.module != "analysis.plotting" for alias in node.names}
    assert taken <= {*analysis.__all__, "check_runs", "signed_ranks"}


MODEL, DATA = torch.nn.Linear(4, 3), (torch.zeros(6, 4), torch.arange(6) % 3)
ORDERS = {
    "influence": ((MODEL, cross_entropy, DATA, DATA, cross_entropy, 0.1), "order is model, losses, data"),
    "effective_learning_rate": ((MODEL, cross_entropy, DATA, cross_entropy), "order is model, losses, data"),
    "gradient_norms": ((MODEL, DATA, cross_entropy), "order is model, losses, data"),
    "line": ((MODEL, DATA, cross_entropy), "order is model, losses, data"),
    "sharpness": ((MODEL, DATA, cross_entropy), "order is model, losses, data"),
    "predictions": ((MODEL, cross_entropy), "order is model, losses, data"),
    "push_and_gap": ((MODEL, cross_entropy, DATA, DATA, cross_entropy), "order is model, losses, data"),
    "gradient_cosine": ((MODEL, cross_entropy, DATA, DATA, cross_entropy), "takes 4 positional arguments"),
    "grad_cam": ((MODEL, "0", DATA[0]), "a layer is named after them"),
    "occlusion": ((MODEL, DATA[0], 2, 1, 0, 0.0), "takes from 2 to 4 positional arguments"),
    "plot_feature_attributions": ((DATA[0], ["a", "b", "c", "d"]), "by names="),
}


@pytest.mark.parametrize("name", ORDERS)
def test_arguments_in_another_order_are_refused(name):
    arguments, words = ORDERS[name]
    with pytest.raises(TypeError, match=words):
        getattr(analysis, name)(*arguments)


def test_the_arguments_come_in_one_order():
    """Models, losses, data, then what is particular, in every function that takes a model."""
    groups = [
        {"model", "other"},
        {"loss", "losses", "task_loss"},
        {"data", "batch", "train", "valid", "meta_data", "inputs"},
    ]
    for name in set(analysis.__all__) - set(analysis.NAMES["former"].split()):
        function = getattr(analysis, name)
        if inspect.isfunction(function) and "model" in (parameters := list(inspect.signature(function).parameters)):
            kinds = [next((i for i, group in enumerate(groups) if one in group), len(groups)) for one in parameters]
            assert kinds == sorted(kinds), (name, parameters)


def test_type_checkers_are_told_where_the_headlines_are():
    tree = ast.parse(Path(analysis.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {(node.module, alias.name, alias.asname) for node in block.body for alias in node.names}
    assert len(told) > 10
    for module, name, shown in told:
        assert name == shown and name in analysis.NAMES[module.removeprefix("analysis.")].split()


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
        if module == "former":  # functions of other modules
            continue
        source = (Path(__file__).parent / f"test_{module}.py").read_text(encoding="utf-8")
        tables = re.findall(r"^FUNCTIONS = \{.*?^\}", source, re.M | re.S)
        tests = [test for test in re.split(r"^(?=def |@pytest)", source, flags=re.M) if "with unchanged(" in test]
        marked = re.findall(r"^@pytest.mark.parametrize.*\n(?=def test_the_model)", source, re.M)
        assert tests and any(re.search(rf"\b{name}\b", text) for text in (*tables, *tests, *marked)), name


@pytest.mark.parametrize(
    ("former", "now", "options"),
    [
        ("effective_learning_rate_by_layer", "effective_learning_rate", {"by_layer": True}),
        ("gradient_noise_by_layer", "gradient_noise", {"by_layer": True}),
        ("adaptive_sharpness", "sharpness", {"adaptive": True}),
        ("layer_integrated_gradients", "integrated_gradients", {"layer": "0"}),
    ],
)
def test_a_former_name_says_what_it_is_now_and_does_it(former, now, options):
    torch.manual_seed(0)
    model, x, y = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh()), torch.randn(8, 4), torch.arange(8) % 3
    loss = torch.nn.functional.cross_entropy
    arguments = {
        "effective_learning_rate": (model, loss, loss, (x, y)),
        "integrated_gradients": (model, x),
    }.get(now, (model, loss, (x, y)))
    given = (model, "0", x) if now == "integrated_gradients" else arguments
    with pytest.warns(DeprecationWarning, match=rf"{former} is now {now}\("):
        found = getattr(analysis, former)(*given)
    expected = getattr(analysis, now)(*arguments, **options)
    assert repr(found) == repr(expected)


def test_modules_are_loaded_when_they_are_asked_for():
    code = (
        "import sys, analysis; before = [m for m in sys.modules if m.startswith(('analysis.', 'captum'))];"
        "analysis.curvature.trace; assert 'captum' not in sys.modules; analysis.integrated_gradients;"
        "print(before, 'captum' in sys.modules, 'line' in dir(analysis))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["[]", "True", "True"], done.stderr
    with pytest.raises(AttributeError, match="module 'analysis' has no attribute 'nothing'"):
        analysis.nothing  # noqa: B018
