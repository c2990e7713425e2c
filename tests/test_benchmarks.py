"""The benchmarks run, small: every engine that is here makes the step that it is timed with."""

import importlib.util
import math
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "benchmarks"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_engines_are_timed_beside_a_plain_step_and_agree():
    step = load("step")
    engines = [name for name in step.installed() if name != "compiled"]
    assert {"plain", "forward", "shared", "functional"} <= set(engines)
    table = step.time_ratios(partial(step.setting, "mlp64", 4), engines, 1)
    assert set(table.index) == set(engines) and table.loc["plain", "time_ratio"] == 1
    assert (table.time_ratio > 0).all()
    exact = [name for name in engines if name in ("forward", "functional", "higher", "torchopt")]
    assert table.disagreement[exact].max() < 1e-4


@pytest.mark.slow
def test_seeds_are_timed_beside_one():
    seeds = load("seeds")
    table = seeds.compare(seeds.train, 2, 2)
    assert table.seeds.tolist() == list(seeds.SEEDS)
    assert all(math.isfinite(ratio) for ratio in table.ratio)  # two steps are too few for their signs to mean anything


@pytest.mark.slow
def test_the_check_of_a_step_is_timed_beside_a_step_without(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    agreement = load("agreement")
    found = agreement.ratios("mlp64", 3, 8)
    assert len(found) == 3 and all(math.isfinite(ratio) for ratio in found)
