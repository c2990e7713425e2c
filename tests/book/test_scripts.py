"""Every result script runs, small; and what is stored is what a script has written."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from adalfl_lite import LossNetwork
from adalfl_lite.compare import METHODS, get_task
from tests.shorthand import short

RESULTS = Path(__file__).parents[2] / "book" / "results"
SCRIPTS = {path.stem for path in RESULTS.glob("*.py")} - {"script", "names", "collect"}
ONLINE = short(METHODS["online"], steps=10, rehearsal_steps=5, imitation_steps=10)
DIGITS = get_task("digits").with_(steps=10)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(name):
    return importlib.import_module(name)


def test_stored_tables_are_those_that_their_scripts_wrote():
    script = load("script")
    assert {path.name for path in RESULTS.glob("*.parquet")} == set(script.checksums())
    for name, digits in script.checksums().items():
        assert script.checksum(RESULTS / name) == digits, name


def test_a_table_is_kept_with_its_provenance_and_the_rows_of_other_tasks(tmp_path):
    script, path = load("script"), tmp_path / "t.parquet"
    script.save(pd.DataFrame({"task": ["a", "b"], "x": [1, 2]}), path)
    script.save(pd.DataFrame({"task": ["b"], "x": [3]}), path, tasks=["b"])
    found = pd.read_parquet(path)
    assert found.task.tolist() == ["a", "b"] and found.x.tolist() == [1, 3]
    assert {"device", "torch", "python", "commit"} <= set(found.columns) and found.commit.notna().all()
    assert "t.parquet" not in script.checksums()  # it is not stored beside the scripts


def test_curvature():
    found = load("curvature").measure(DIGITS, [0], ONLINE, rows=30)
    assert set(found.method) == {"cross-entropy", "cross-entropy, rate x 10", "learned"}
    assert np.isfinite(found[["own", "task_loss"]].to_numpy()).all() and (found.limit > 0).all()
    limits = found.groupby("method").limit.first()
    assert limits["cross-entropy"] == pytest.approx(10 * limits["cross-entropy, rate x 10"])


def test_implied_scale():
    task = get_task("diabetes").with_(steps=10)
    found = load("implied_scale").measure(task, [0, 1], ONLINE)
    assert set(found.seed) == {0, 1} and found.scale.notna().all() and found.step.max() == 10


def test_meta_rate():
    task = get_task("diabetes").with_(steps=10)
    found = load("meta_rate").measure(task, [0, 1], rates=(1e-2, 1e-4), online=ONLINE)
    assert found.groupby("meta_learning_rate").size().to_dict() == {1e-4: 2, 1e-2: 2}
    assert found.test_error.nunique() == 4  # another rate is another run


def test_other_losses():
    module = load("other_losses")
    task = module.TASK.with_(steps=5)
    for name in module.COMPARED:
        row = module.measure(name, 0, task, short(METHODS[name], steps=5, searched=(1, 4), scored_steps=4, local=2))
        assert 0 <= row["test_error"] <= 1 and row["tried"] > 0 and bool(row["found"]) == (name != "online")


def test_architectures():
    module = load("architectures")
    found = module.measure("ML³", LossNetwork.ml3, 0, lengths=(0, 10), training_steps=5)
    assert set(found.meta_steps) == {0, 10} and len(found) == 2 * len(module.PROBABILITIES)
    assert found.groupby("meta_steps").derivative.first().nunique() == 2  # it has been learned


@pytest.mark.parametrize("variant", ["ML³", "AdaLFL's network, 20-step rollouts"])
def test_short_horizon(variant):
    rows = load("short_horizon").measure("digits", variant, 0, lengths=(5, 25), horizon=5)
    assert [row["meta_steps"] for row in rows] == [5, 25] and rows[0]["scale"] != rows[1]["scale"]


@pytest.mark.slow
def test_active_learning(monkeypatch):
    module = load("active_learning")
    few = {"rounds": 2, "first": 20, "added": 5, "steps": 4, "batch_size": 8, "members": 2}
    for name, value in (("POOL", 60), ("TEST", 10), ("FIGURES", {**module.FIGURES, **few})):
        monkeypatch.setattr(module, name, value)
    found = module.on_figures("random", 0)
    assert found.labelled.tolist() == [20, 25] and found.missed.between(0, 1).all()


def test_comparison_takes_up_what_is_stored(tmp_path):
    module = load("comparison")
    stored = pd.read_parquet(RESULTS / "comparison.parquet")
    few = stored[(stored.task == "iris") & (stored.seed < 2) & stored.method.isin(["handcrafted", "online"])]
    few.to_parquet(tmp_path / "few.parquet", index=False)
    module.take_up(tmp_path / "few.parquet", tmp_path, ["iris"], ["online"])
    names = sorted(path.name for path in tmp_path.glob("iris--*.parquet"))
    assert names == ["iris--handcrafted--seed0.parquet", "iris--handcrafted--seed1.parquet"]
    assert "label-smoothing-tuned" not in module.methods(get_task("diabetes"))


def test_phenomena(tmp_path, monkeypatch):
    module = load("phenomena")
    setting = module.SETTINGS["digits"]
    few = replace(setting, task=setting.task.with_(steps=50), initialisation_steps=5, rehearsals=1, rehearsal_steps=5)
    few = replace(few, probe=50, only=("handcrafted", "schedule", "layer schedules", "algorithm 4", "from 0.5 scaled"))
    monkeypatch.setitem(module.SETTINGS, "digits", few)
    monkeypatch.setattr(module, "HERE", tmp_path)
    module.Run("digits", 3, tmp_path).all_variants()
    found = pd.concat(map(pd.read_parquet, tmp_path.glob("digits--3--*.parquet")))
    assert set(found.variant) == {"online", *few.only} and {"record", "layer", "batch"} <= set(found.kind)
    ends = found[(found.kind == "record") & (found.step == 50)].set_index("variant").test_error
    assert len(ends) == 6 and ends.between(0, 1).all()


def test_no_script_is_forgotten():
    tested = Path(__file__).read_text()
    assert all(f'load("{name}")' in tested for name in SCRIPTS)
