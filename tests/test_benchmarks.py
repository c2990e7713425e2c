"""The benchmarks run, small: every engine that is here makes the step that it is timed with."""

import importlib.util
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """Each is run from its folder, where it finds the others, on one thread."""
    monkeypatch.syspath_prepend(str(ROOT))
    threads, disabled = torch.get_num_threads(), torch.compiler.config.force_disable_caches
    yield
    torch.set_num_threads(threads)
    torch.compiler.config.force_disable_caches = disabled


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(module, path: Path, *given: str) -> dict:
    """What the benchmark writes when it is called with these options."""
    module.main([*given, "--output", str(path)])
    return json.loads(path.read_text())


def names_its_source(labelled: dict, name: str) -> bool:
    return labelled["command"].startswith(f"python benchmarks/{name}.py --") and {"commit", "torch"} <= labelled.keys()


def test_engines_are_timed_beside_a_plain_step_and_agree():
    step = load("step")
    engines = [name for name in step.installed() if name != "compiled"]
    assert {"plain", "forward", "shared", "functional"} <= set(engines)
    table = step.time_ratios(partial(step.setting, "mlp64", 4), engines, 1)
    assert set(table.index) == set(engines) and table.loc["plain", "time_ratio"] == 1
    assert (table.time_ratio > 0).all()
    exact = [name for name in engines if name in ("forward", *step.PEERS)]
    assert table.disagreement[exact].max() < 1e-4


def test_models_and_peers_have_the_names_that_the_tables_give_them():
    spec = importlib.util.spec_from_file_location("names", ROOT.parent / "book" / "results" / "names.py")
    names = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(names)
    step = load("step")
    assert list(names.MODELS) == list(step.INPUTS) == list(step.ROUNDS)
    assert names.PEERS == list(step.PEERS)


def test_the_rows_of_models_that_were_not_measured_stay(tmp_path):
    step, path = load("step"), tmp_path / "step.json"
    small = ("--engines", "forward", "--rounds", "1", "--batch-size", "4", "--no-memory")
    before = run(step, path, "--models", "lenet5", *small)
    after = run(step, path, "--models", "mlp64", *small)
    assert [(row["model"], row["engine"]) for row in after["rows"]] == [
        (model, engine) for model in ("mlp64", "lenet5") for engine in ("plain", "forward")
    ]
    assert after["rows"][2:] == before["rows"] and all(names_its_source(row, "step") for row in after["rows"])
    profiled = run(step, path, "--models", "mlp64", "--profile", "--batch-size", "4")
    assert profiled["rows"] == after["rows"] and sum(profiled["profiles"]["mlp64"]["plain"].values()) > 0.9


def test_the_check_of_a_step_is_timed_beside_a_step_without(tmp_path):
    agreement = load("agreement")
    assert hasattr(agreement.forward, "check_agreement")  # what the benchmark leaves out
    found = run(agreement, tmp_path / "a.json", "--models", "mlp64", "--rounds", "3", "--batch-size", "8")
    (row,) = found["rows"]
    assert names_its_source(found, "agreement") and (row["model"], row["rounds"]) == ("mlp64", 3)
    assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


def test_the_check_is_left_out_of_the_steps_without_it_alone(monkeypatch):
    agreement, made = load("agreement"), []

    def noted(*arguments, **options):
        made.append(1)
        return check(*arguments, **options)

    check = agreement.forward.check_agreement
    monkeypatch.setattr(agreement.forward, "check_agreement", noted)
    assert len(agreement.ratios("mlp64", 3, 8)) == 3
    assert len(made) == 4  # once a round, the first one included
    assert agreement.forward.check_agreement is noted


def test_a_plane_by_vmap_is_that_of_the_loop(tmp_path, monkeypatch):
    landscape = load("landscape")
    monkeypatch.setattr(landscape, "AXIS", np.linspace(-1, 1, 4))
    monkeypatch.setattr(landscape, "EXAMPLES", (8, 32))
    found = run(landscape, tmp_path / "l.json", "--repeats", "1")
    assert names_its_source(found, "landscape") and found["repeats"] == 1
    assert [grid["points"] for grid in found["grids"]] == [16, 16]
    assert all(0 <= grid["largest_difference"] < 1e-4 for grid in found["grids"])
    assert 0 < sum(found["operations"]["shares"].values()) <= 1 + 1e-3


def test_what_was_not_changed_this_time_is_kept(tmp_path, monkeypatch):
    scaling, path = load("scaling"), tmp_path / "s.json"
    monkeypatch.setattr(scaling, "SIZES", {"classes": {"mlp": (2, 3)}, "width": {"conv": (4,)}})
    before = run(scaling, path, "--change", "width", "--rounds", "1")
    after = run(scaling, path, "--change", "classes", "--rounds", "1")
    assert after["rows"][: len(scaling.ENGINES)] == before["rows"]
    added = after["rows"][len(scaling.ENGINES) :]
    assert {(row["model"], row["classes"], row["width"]) for row in added} == {("mlp", 2, 64), ("mlp", 3, 64)}
    assert all(names_its_source(row, "scaling") for row in after["rows"])


@pytest.mark.slow
def test_seeds_are_timed_beside_one(tmp_path, monkeypatch):
    seeds = load("seeds")
    monkeypatch.setattr(seeds, "SEEDS", (1, 3))
    found = run(seeds, tmp_path / "s.json", "--repeats", "2", "--steps", "2")
    assert names_its_source(found, "seeds") and (found["repeats"], found["steps"]) == (2, 2)
    for rows in (found["rows"], found["initialise_rows"]):
        assert [row["seeds"] for row in rows] == [1, 3]
        assert all(math.isfinite(row["ratio"]) for row in rows)  # two steps are too few for their signs to mean much
