"""Every result script runs, small; and what is stored is what a script has written."""

import importlib
import os
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from adalfl_lite import LossNetwork
from adalfl_lite.compare import METHODS, get_task
from adalfl_lite.data import load_dataset
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


def test_stored_files_are_those_that_their_scripts_wrote():
    script = load("script")
    kept, known = script.stored(), script.checksums()
    assert {path.suffix for path in kept} == {".parquet", ".json", ".pt"}
    for path in kept:
        name = path.relative_to(RESULTS).as_posix()
        assert script.checksum(path) == known.pop(name), name
    assert not known, "checksums of files that are gone"


def test_a_checksum_is_noted_where_the_file_lies_and_notices_a_change(tmp_path, monkeypatch):
    script = load("script")
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "CHECKSUMS", tmp_path / "checksums.txt")
    path = tmp_path / "below" / "b.json"
    path.parent.mkdir()
    for text in ("1", "2"):
        path.write_text(text)
        script.note(path)
    script.save(pd.DataFrame({"x": [1]}), tmp_path / "a.parquet")
    assert list(script.checksums()) == ["a.parquet", "below/b.json"]
    assert script.checksums()["below/b.json"] == script.checksum(path)
    path.write_text("3")
    assert script.checksums()["below/b.json"] != script.checksum(path)


def process_and_threads(number):
    return number, os.getpid(), torch.get_num_threads()


def test_points_are_spread_over_processes_of_one_thread_and_come_back_in_order():
    found = load("script").spread(process_and_threads, [(3,), (1,), (2,)], jobs=1)
    assert found == [(number, os.getpid(), 1) for number in (3, 1, 2)]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_a_script_explains_itself_and_takes_a_folder_only_if_it_reads_one(name, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(RESULTS / f"{name}.py"), run_name="__main__")
    shown = capsys.readouterr().out
    assert f"python book/results/{name}.py" in shown
    assert ("--root" in shown) == (".root" in (RESULTS / f"{name}.py").read_text())


def test_a_table_is_kept_with_its_provenance_and_the_rows_of_other_tasks(tmp_path):
    script, path = load("script"), tmp_path / "t.parquet"
    script.save(pd.DataFrame({"task": ["a", "b"], "x": [1, 2]}), path)
    script.save(pd.DataFrame({"task": ["b"], "x": [3]}), path, tasks=["b"])
    found = pd.read_parquet(path)
    assert found.task.tolist() == ["a", "b"] and found.x.tolist() == [1, 3]
    assert {"device", "torch", "python", "commit"} <= set(found.columns) and found.commit.notna().all()
    assert "t.parquet" not in script.checksums()  # it is not stored beside the scripts


@pytest.mark.slow
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
    monkeypatch.setattr(module, "load_dataset", lambda name, root, seed: load_dataset("diabetes", seed=seed))
    monkeypatch.setattr(module, "CALIFORNIA", {**module.CALIFORNIA, **few})
    found = module.on_california("ensemble", 0)
    assert found.labelled.tolist() == [20, 25] and (found.absolute_error > 0).all() and found.worst.between(0, 1).all()


def test_comparison_takes_up_what_is_stored(tmp_path):
    module = load("comparison")
    stored = pd.read_parquet(RESULTS / "comparison.parquet")
    few = stored[(stored.task == "iris") & (stored.seed < 2) & stored.method.isin(["handcrafted", "online"])]
    few.to_parquet(tmp_path / "few.parquet", index=False)
    module.take_up(tmp_path / "few.parquet", tmp_path, ["iris"], ["online"])
    names = sorted(path.name for path in tmp_path.glob("iris--*.parquet"))
    assert names == ["iris--handcrafted--seed0.parquet", "iris--handcrafted--seed1.parquet"]
    assert "label-smoothing-tuned" not in module.methods(get_task("diabetes"))


def test_comparison_makes_what_has_no_file_yet(tmp_path):
    module = load("comparison")
    task = get_task("iris").with_(steps=5)
    for seeds in ([0], [0, 1]):
        before = {path: path.read_bytes() for path in tmp_path.glob("*")}
        module.run(task, ["handcrafted", "no such method"], seeds, tmp_path)
        assert all(path.read_bytes() == kept for path, kept in before.items())
    found = module.finished(tmp_path)
    assert set(found.seed) == {0, 1} and set(found.method) == {"handcrafted"} and found.step.max() == 5


@pytest.mark.slow
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
