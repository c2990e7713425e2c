"""Comparisons: fair, repeatable, restartable. Small here: iris, 40 steps, initialisations of 40 meta steps."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from adalfl_lite import Initialiser, LossNetwork
from adalfl_lite.compare import grid as experiments
from adalfl_lite.compare import methods, recipes, tasks
from adalfl_lite.compare.grid import compare, run
from adalfl_lite.compare.methods import METHODS
from adalfl_lite.compare.recipes import Job, Learned, LearnedRate, TaskLoss, TaskRate, Tuned, fresh
from adalfl_lite.compare.results import final_errors
from adalfl_lite.compare.tasks import Task, get_task
from adalfl_lite.losses.dynamical import DynamicalLoss
from adalfl_lite.losses.symbolic import SymbolicLoss
from adalfl_lite.provenance import provenance
from adalfl_lite.train.evaluation import evaluate
from tests.shorthand import fit, short

IRIS = get_task("iris").with_(steps=40)
DIABETES = get_task("diabetes").with_(steps=40)
TIMES = ["seconds", "initialisation_seconds"]
COLUMNS = {
    *("task", "method", "seed", "step", "train_loss", "meta_loss"),
    *("valid_error", "valid_loss", "test_error", "test_loss", "seconds"),
    *("learning_rate", "initialisation_steps", "initialisation_chosen_step", "initialisation_seconds"),
    *("seeds_together", "settings", "recipe", "device", "torch", "python", "commit"),
}
LONG = 3 * 40 + 9 * 15 + 3 * 40  # meta steps, rehearsals, the training: in plain steps
EVERY = [name for name, method in METHODS.items() if "classification" in method.kinds]
INITIALISED = [
    name for name in EVERY if isinstance(METHODS[name].loss, Learned) or isinstance(METHODS[name].rate, LearnedRate)
]
SEARCHED = ["taylorglo", "evomal"]
LEARNED = [*INITIALISED, *SEARCHED, "rate-replay"]
HANDCRAFTED = [name for name in EVERY if name not in LEARNED]


@pytest.fixture(scope="module", autouse=True)
def short_initialisations():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        few = {"taylorglo": (2, 6), "evomal": (1, 16)}
        patch.setattr(methods, "METHODS", {name: short(how, searched=few.get(name)) for name, how in METHODS.items()})
        patch.setattr(experiments, "get_method", methods.get_method)
        yield
    torch.set_num_threads(threads)


def compared(*arguments, **options):
    return compare(*arguments, progress=False, **options)


def same(a, b, without=()):
    """Equal to the last bit, but for the clock."""
    dropped = [*TIMES, *without]
    a, b = (frame.drop(columns=dropped).reset_index(drop=True) for frame in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def results(folder):
    """Every method for classification on iris with seed 0, stored in ``folder``."""
    return compared([IRIS], EVERY, [0], folder=folder)


@pytest.fixture(scope="module")
def regression():
    """Every method for regression on diabetes with seed 0."""
    return compared([DIABETES], [name for name, method in METHODS.items() if "regression" in method.kinds], [0])


def rows(results, method):
    return results[results.method == method].reset_index(drop=True)


# The table ---------------------------------------------------------------------------------------------------------


def test_one_history_per_method_with_its_labels(results):
    assert set(results.columns) == COLUMNS
    for method in EVERY:
        history = rows(results, method)
        length = LONG if method == "handcrafted-long" else 40
        assert history.step.tolist() == sorted({*range(0, length + 1, length // 20), length})
        assert set(history.task) == {"iris"} and set(history.seed) == {0}
        assert np.isfinite(history[["valid_error", "test_error", "test_loss"]].to_numpy()).all()
        assert history.meta_loss.iloc[1:].notna().all() == METHODS[method].online
        tried = set(history.initialisation_steps)
        assert tried == {40 if method in INITIALISED else 12 if method == "taylorglo" else 0} or method == "evomal"
        assert history.initialisation_chosen_step.iloc[0] in range(41 if method in INITIALISED else 1)
        own_rate = not isinstance(METHODS[method].rate, TaskRate)
        assert (history.learning_rate == IRIS.learning_rate).all() or own_rate
        assert (history.learning_rate.nunique() > 1) == (method in ("rate-online", "rate-replay"))


def test_every_method_for_regression_runs_too(regression):
    for method in regression.method.unique():
        history = rows(regression, method)
        assert history.step.max() == (LONG if method == "handcrafted-long" else 40)
        assert np.isfinite(history[["valid_error", "test_error"]].to_numpy()).all()
    assert set(METHODS) - set(regression.method) == {
        *("label-smoothing", "label-smoothing-tuned", "focal", "poly1", "generalised-ce", "symmetric-ce", "dynamical")
    }
    assert set(METHODS) - set(EVERY) == {"huber", "log-cosh"}


def test_every_method_starts_from_the_same_model_and_ends_somewhere_else(results):
    starts = {rows(results, method).test_loss.iloc[0] for method in EVERY}
    assert len(starts) == 1
    ends = [rows(results, method).test_loss.iloc[-1] for method in EVERY]
    assert len(set(ends)) == len(EVERY)


def test_methods_that_start_from_the_same_loss_share_its_initialisation(results):
    seconds = {method: rows(results, method).initialisation_seconds.iloc[0] for method in EVERY}
    assert seconds["offline"] == seconds["online"]
    assert seconds["rate-replay"] > seconds["online"]  # it needed that initialisation too
    assert len({seconds[method] for method in ("ml3", "online", "online-train")}) == 3


def test_provenance_says_what_a_result_depends_on(results):
    found = provenance()
    assert set(found) == {"device", "torch", "python", "commit"}
    assert found["device"] != "cpu" or not Path("/proc/cpuinfo").exists()
    assert found["torch"] == torch.__version__ and all(isinstance(value, str) and value for value in found.values())
    for name, value in found.items():
        assert set(results[name]) == {value}


@pytest.mark.parametrize("place", ["no git", "another repository"])
def test_provenance_of_a_copy_without_a_checkout_names_no_commit(place, tmp_path, monkeypatch):
    """What lies in an environment inside somebody's repository is not of that repository's commit."""
    git = shutil.which("git")
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "theirs"]):
        options = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run([git, "-C", str(tmp_path), *options, *command], check=True)
    monkeypatch.setattr("adalfl_lite.provenance.__file__", str(tmp_path / "provenance.py"))
    if place == "no git":
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    provenance.cache_clear()
    assert provenance()["commit"] == "unknown"
    monkeypatch.undo()
    provenance.cache_clear()


@pytest.mark.parametrize(("method", "library"), [("taylorglo", "cma"), ("evomal", "deap")])
def test_a_search_whose_library_is_not_installed_is_refused_before_any_training(method, library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setattr(experiments, "run", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=rf"{method}' needs {library}, .* pip install 'adalfl-lite\[methods\]'"):
        compare(["iris"], ["handcrafted", method], [0])


def test_final_errors_are_the_last_rows(results):
    last = final_errors(results)
    assert len(last) == len(EVERY) and set(last.step) == {40, LONG} and not last.diverged.any()
    for method in EVERY:
        assert rows(last, method).test_error.item() == rows(results, method).test_error.iloc[-1]


def test_evomal_learns_the_weights_of_a_candidate_before_it_is_scored(monkeypatch):
    """The local search moves them, and the loss it leaves is better to take a step with than the one it found."""
    moved, ends, rehearse = [], [], recipes.rehearsal
    monkeypatch.setattr(recipes, "rehearsal", lambda *arguments: ends.append(rehearse(*arguments)) or ends[-1])

    def search(kind, score, local_search, **options):
        loss = SymbolicLoss(kind, ["multiply", "minus_one", "multiply", "y", "log", "p"])
        before = copy.deepcopy(loss)
        local_search(loss)
        moved.append((loss.weights - before.weights).abs().min().item())
        assert [score(each.requires_grad_(False)) for each in (before, loss)] == [error for error, _ in ends]
        return loss

    monkeypatch.setattr(recipes, "search_symbolic", search)
    task = get_task("iris")
    how = short(METHODS["evomal"], local=250)
    (prepared,) = methods.prepare(task, [task.load(seed=0)], how, [0])
    (_, found), (_, learned) = ends  # the task loss after a training
    assert moved[0] > 0.01 and learned < found and prepared.steps == 2


# Repeatable and restartable ----------------------------------------------------------------------------------------


def test_a_rerun_reads_what_is_finished_and_runs_the_rest(results, folder, monkeypatch):
    assert sorted(os.listdir(folder)) == sorted(f"iris--{method}--seed0.parquet" for method in EVERY)
    ran = []
    monkeypatch.setattr(
        experiments, "run", lambda task, method, seed, name, **_: ran.append((name, seed)) or results[:1]
    )
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    same(compared([IRIS], EVERY, [0], folder=folder), results)
    assert ran == [] and times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    removed = folder / "iris--offline--seed0.parquet"
    kept = removed.read_bytes()
    removed.unlink()
    try:
        compared([IRIS], ["handcrafted", "offline"], [0], folder=folder)
        assert ran == [("offline", 0)]
    finally:
        removed.write_bytes(kept)


def test_a_stored_job_of_another_length_is_not_passed_off_as_this_one(results, folder):
    with pytest.raises(ValueError, match=r"online--seed0\.parquet is of a task with steps 40, not 50; give another"):
        compared([IRIS.with_(steps=50)], ["online"], [0], folder=folder)


def test_a_stored_job_of_another_setting_is_not_passed_off_as_this_one(results, folder):
    changed = IRIS.with_(learning_rate=1.0, drops=(0.5,))
    with pytest.raises(ValueError, match=r"a task with learning_rate 0\.01, not 1\.0, drops \[\], not \[0\.5\]; give"):
        compared([changed], ["handcrafted-tuned"], [0], folder=folder)
    assert all(json.loads(text) == json.loads(results.settings[0]) for text in results.settings)  # not the tuned rate


@dataclass(frozen=True)
class Rotated(Task):
    """A task with a setting of its own, which JSON does not know."""

    angle: complex = 1j


def test_a_setting_of_a_task_of_your_own_is_part_of_its_job(tmp_path):
    task = Rotated("mine", "iris", "linear", steps=4, batch_size=20)
    first = compared([task], ["handcrafted"], [0], folder=tmp_path)
    same(compared([task], ["handcrafted"], [0], folder=tmp_path), first)
    with pytest.raises(ValueError, match=r"of a task with angle 1j, not \(-0-1j\); give another folder"):
        compared([task.with_(angle=-1j)], ["handcrafted"], [0], folder=tmp_path)
    path = experiments.job_path(tmp_path, "mine", "handcrafted", 0)  # an older job, which does not tell
    settings = {name: value for name, value in json.loads(first.settings[0]).items() if name not in ("angle", "class")}
    experiments.write_results(first.assign(settings=json.dumps(settings)), path)
    compared([task], ["handcrafted"], [0], folder=tmp_path)


@pytest.mark.parametrize(
    ("tasks", "methods", "seeds", "message"),
    [
        (
            [IRIS, IRIS.with_(learning_rate=0.1)],
            ["handcrafted"],
            [0],
            r"tasks hold 'iris' twice; .* task\.with_\(name=",
        ),
        ([IRIS], ["handcrafted", "online", "handcrafted"], [0], "methods hold 'handcrafted' twice"),
        ([IRIS], ["handcrafted"], [0, 1, 0], "seeds hold 0 twice"),
    ],
)
def test_nothing_is_compared_with_itself(tasks, methods, seeds, message, monkeypatch):
    monkeypatch.setattr(experiments, "run", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ValueError, match=message):
        compared(tasks, methods, seeds)


@pytest.mark.slow
@pytest.mark.parametrize("method", LEARNED)
def test_a_method_alone_gives_the_numbers_it_gives_beside_others(results, method):
    same(compared([IRIS], [method], [0]), rows(results, method))


def test_handcrafted_methods_alone_and_in_another_order_give_the_same_numbers(results):
    again = compared([IRIS], HANDCRAFTED[::-1], [0])
    for method in HANDCRAFTED:
        same(rows(again, method), rows(results, method))


def test_seeds_differ(results):
    other = compared([IRIS], ["handcrafted"], [1])
    assert other.test_loss.iloc[0] != rows(results, "handcrafted").test_loss.iloc[0]


@pytest.mark.slow
def test_two_processes_give_the_same_numbers_in_the_same_order():
    """loky starts afresh, and gets the methods as they are here."""
    arguments = ([IRIS, DIABETES], ["handcrafted", "handcrafted-all", "online"], [0, 1])
    same(compared(*arguments, jobs=2), compared(*arguments, jobs=1))


@pytest.mark.skipif(os.name != "posix", reason="needs a backend that forks")
def test_a_backend_that_cannot_stream_its_results_works_too():
    """Ray's is one; joblib's own multiprocessing is another. It forks, so it sees the short initialisations."""
    with joblib.parallel_config(backend="multiprocessing"):
        forked = compared([IRIS], ["offline"], [0, 1], jobs=2)
    same(forked[forked.seed == 1], compared([IRIS], ["offline"], [1]))


# Fair --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("poison", ["enlarged", "shuffled"])
def test_no_method_looks_at_the_test_split(results, monkeypatch, poison):
    """Were it used for anything but reporting, the training curves or the chosen settings would change."""
    load = tasks.load_dataset

    def poisoned(*arguments, **options):
        data = load(*arguments, **options)
        inputs, targets = data.test.inputs, data.test.targets
        inputs = inputs * 1e6 if poison == "enlarged" else inputs.flip(0)
        return replace(data, test=replace(data.test, inputs=inputs, targets=targets))

    monkeypatch.setattr(tasks, "load_dataset", poisoned)
    methods = EVERY if poison == "shuffled" else ["ml3", *HANDCRAFTED]
    found = compared([IRIS], methods, [0])
    expected = pd.concat([rows(results, method) for method in methods], ignore_index=True)
    same(found, expected, without=["test_error", "test_loss"])
    assert not np.array_equal(found.test_loss, expected.test_loss)


def recorded_fit(monkeypatch):
    calls = []

    def spy(learner, data, **options):
        calls.append((data[0], options))
        return real(learner, data, **options)

    real = methods.fit
    monkeypatch.setattr(methods, "fit", spy)
    return calls


def test_every_method_but_one_trains_on_the_train_split(monkeypatch):
    calls = recorded_fit(monkeypatch)
    for method in ("handcrafted", "handcrafted-all"):
        run(IRIS, method, 3)
    (plain, _), (joined, _) = calls
    splits = [set(getattr(plain, name).indices.tolist()) for name in ("train", "valid", "test")]
    assert set.union(*splits) == set(range(150)) and sum(map(len, splits)) == 150  # disjoint and complete
    assert sorted(joined.train.indices.tolist()) == sorted(splits[0] | splits[1])
    whole = IRIS.load(seed=3)
    assert torch.equal(joined.train.inputs, torch.cat([whole.train.inputs, whole.valid.inputs]))
    assert torch.equal(joined.train.targets, torch.cat([whole.train.targets, whole.valid.targets]))
    for name in ("valid", "test"):
        assert torch.equal(getattr(joined, name).indices, getattr(plain, name).indices)


@pytest.mark.parametrize("method", ["ml3", "offline", "online-train"])
def test_initialisation_is_on_train_and_the_meta_batches_of_the_method(monkeypatch, method):
    seen = {}

    def spy(network, make_model, train, valid, **options):
        seen.update(train=next(train)[0], meta=next(valid)[0], **options)
        seen["network"] = network
        raise FloatingPointError("enough")

    monkeypatch.setattr(recipes, "initialise", spy)
    with pytest.raises(FloatingPointError, match="enough"):
        run(IRIS, method, 0)
    data = IRIS.load(seed=0)

    def within(batch, split):
        return all((split.inputs == row).all(1).any() for row in batch)

    meta = "train" if method == "online-train" else "valid"
    assert within(seen["train"], data.train) and within(seen["meta"], getattr(data, meta))
    model = IRIS.make_model(data)
    assert seen["validate"](model) == evaluate(model, getattr(data, meta), "classification")
    settings = seen["settings"]
    assert settings.rollout_steps == (1 if method == "ml3" else 20)
    assert ("softplus" in repr(seen["network"]).lower()) == (method == "ml3")
    assert (settings.steps, settings.rehearsal_steps) == (40, 15)
    assert settings.imitation_steps == (0 if method == "ml3" else 20)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_tuned_learning_rate_is_the_one_with_the_lowest_validation_error(seed):
    candidates = [IRIS.with_(learning_rate=IRIS.learning_rate * factor) for factor in Tuned().factors]
    histories = [run(task, "handcrafted", seed) for task in candidates]
    scores = [(history.valid_error.iloc[-1], history.valid_loss.iloc[-1]) for history in histories]
    best = scores.index(min(scores))
    tuned = run(IRIS, "handcrafted-tuned", seed)
    same(tuned, histories[best].assign(method="handcrafted-tuned", settings=tuned.settings, recipe=tuned.recipe))
    assert len(set(scores)) == len(scores) and tuned.learning_rate.iloc[0] == candidates[best].learning_rate


def test_every_rate_is_tuned_with_the_loss_as_it_was(monkeypatch):
    """A loss that changes as it is trained with begins anew in each of the seven runs, and is given back as it was."""
    starts = []

    def spy(learner, data, **options):
        starts.append(int(learner.loss.step))
        return real(learner, data, **options)

    real = recipes.fit
    monkeypatch.setattr(recipes, "fit", spy)
    loss = DynamicalLoss(3, amplitude=5.0, period=10)
    tuned = Tuned().tune(Job(IRIS, IRIS.load(seed=0), 0), loss)
    assert starts == [0] * 7 and loss.step == 0
    scores = []
    for factor in Tuned().factors:
        task = IRIS.with_(learning_rate=IRIS.learning_rate * factor)
        model, optimizer = fresh(task, data := task.load(seed=0), 0)
        options = {"steps": 40, "batch_size": task.batch_size, "evaluate_every": 40, "progress": False}
        fit(model, DynamicalLoss(3, amplitude=5.0, period=10), data, optimizer=optimizer, **options)
        scores.append((*evaluate(model, data.valid, data.kind), task))
    assert tuned == min(scores, key=lambda score: score[:2])[2]


@pytest.mark.parametrize("method", ["online", "dynamical"])
def test_one_preparation_serves_several_trainings(method):
    prepared = methods.prepare(IRIS, [IRIS.load(seed=0)], method, [0])
    first, second = (methods.train(prepared, method, [0]) for _ in range(2))
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"), check_exact=True)


def test_one_preparation_serves_several_trainings_of_all_seeds():
    data = [IRIS.load(seed=seed) for seed in (0, 1)]
    prepared = methods.prepare(IRIS, data, "online", (0, 1))
    first, second = (methods.train(prepared, "online", (0, 1)) for _ in range(2))
    pd.testing.assert_frame_equal(first.drop(columns="seconds"), second.drop(columns="seconds"), check_exact=True)


@pytest.mark.parametrize(
    ("change", "of"),
    [
        ({"rollout_steps": 3}, "settings"),
        ({"imitation_steps": 7}, "settings"),
        ({"meta_batches": "train"}, "method"),
        ({"loss": short(METHODS["ml3"]).loss}, "method"),
        ({"loss": TaskLoss(), "rate": short(METHODS["rate-online"]).rate}, "method"),
        ({"learning_rate": 0.1}, "task"),
        ({"momentum": 0.5}, "task"),
        ({"model": "linear"}, "task"),
        ({"steps": 10}, "task"),
        ({"label_noise": 0.2}, "task"),
        ({"seed": 1}, "call"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_an_initialisation_is_shared_by_what_it_depends_on_alone(monkeypatch, change, of, together):
    """With one ``shared`` for all, a method that differs in anything starts from what it has without it."""
    online = methods.METHODS["online"]
    changed = replace(online, **change) if of == "method" else online
    if of == "settings":
        changed = replace(online, loss=replace(online.loss, settings=online.loss.settings.with_(**change)))
    monkeypatch.setitem(methods.METHODS, "changed", changed)
    monkeypatch.setitem(methods.METHODS, "offline", replace(online, online=False))  # which is not of the initialisation
    task = IRIS.with_(**change) if of == "task" else IRIS
    seed = change.get("seed", 0)
    shared = {}
    if together and not changed.stacks(task):
        pytest.skip("it never is")

    def phi(method, task, seed, shared):
        seeds = (seed, seed + 7) if together else (seed,)
        datasets = [task.load(seed=s) for s in seeds]
        prepared = methods.prepare(task, datasets, method, seeds, shared=dict.fromkeys(seeds, shared))[0]
        if isinstance(methods.METHODS[method].rate, LearnedRate):
            return torch.tensor([prepared.task.learning_rate])
        return torch.cat([p.detach().flatten() for p in prepared.loss.parameters()])

    first = phi("online", IRIS, 0, shared)
    count = len(shared)
    assert torch.equal(phi("offline", IRIS, 0, shared), first) and len(shared) == count
    found, alone = phi("changed", task, seed, shared), phi("changed", task, seed, {})
    assert torch.equal(found, alone)
    assert found.shape != first.shape or not torch.equal(found, first)


def test_the_replayed_schedule_is_the_one_that_online_implied(results, monkeypatch):
    """c at each evaluation of an online run, by gradients of our own; and it is a schedule of 40 steps."""
    seen = {}
    replay = methods.scaled_schedule
    monkeypatch.setattr(methods, "scaled_schedule", lambda o, *found: seen.update(found=found) or replay(o, *found))
    same(run(IRIS, "rate-replay", 0), rows(results, "rate-replay"))
    x, y = IRIS.load(seed=0).train[:]
    expected = []

    def record(step, model, loss):
        parameters = list(model.parameters())
        pair = [torch.autograd.grad(f(model(x), y), parameters) for f in (loss, torch.nn.functional.cross_entropy)]
        m, g = (torch.cat([t.flatten() for t in gradient]) for gradient in pair)
        expected.append((m @ g / (g @ g)).item())

    run(IRIS, "online", 0, callback=record)
    assert seen["found"][0] == list(range(0, 41, 2))
    assert seen["found"][1] == pytest.approx(expected, rel=1e-4)


def test_drops_are_kept_by_every_method_but_the_one_that_learns_its_rate_online(monkeypatch):
    task, calls = IRIS.with_(drops=(0.5,)), recorded_fit(monkeypatch)
    shared, replay, seen = {0: {}}, methods.scaled_schedule, []
    monkeypatch.setattr(methods, "scaled_schedule", lambda *arguments: seen.append(arguments[-1]) or replay(*arguments))
    for method in ("handcrafted", "rate-offline", "online", "rate-replay", "rate-online"):
        history = run(task, method, 0, shared=shared)
        expected = {"rate-online": None}.get(method, 0.1)
        if expected and method != "rate-replay":
            assert history.learning_rate.iloc[-1] == pytest.approx(0.1 * history.learning_rate.iloc[0])
        assert (calls[-1][1]["scheduler"] is not None) == bool(expected)
    assert seen == [task.schedule]


def test_a_learned_loss_is_frozen_offline_and_adapted_online():
    moved = {}

    for method in ("offline", "online"):
        phi = []

        def keep(step, model, loss, phi=phi):
            phi.append(torch.cat([p.detach().flatten() for p in loss.parameters()]))

        run(IRIS.with_(steps=3), method, 0, callback=keep)
        moved[method] = not torch.equal(phi[0], phi[-1])
    assert moved == {"offline": False, "online": True}


# Together ----------------------------------------------------------------------------------------------------------


TOGETHER = ["handcrafted", "handcrafted-all", "ml3", "offline", "online", "online-train", "rate-offline"]


@pytest.fixture(scope="module")
def together():
    return compared([IRIS], TOGETHER, [0, 1], together=True)


def test_seeds_together_give_what_they_give_one_by_one(results, together):
    assert list(together.columns) == list(results.columns)
    for method in TOGETHER:
        found = rows(together[together.seed == 0], method)
        alone = rows(results, method)
        assert set(found.seeds_together) == {1 if method == "rate-offline" else 2}
        assert found.initialisation_chosen_step.equals(alone.initialisation_chosen_step)
        for column in ("step", "train_loss", "meta_loss", "valid_error", "valid_loss", "test_error", "learning_rate"):
            np.testing.assert_allclose(found[column], alone[column], rtol=1e-3, atol=1e-3, err_msg=f"{method} {column}")


def test_a_long_training_adapts_its_loss_more_slowly(monkeypatch):
    rate = METHODS["online"].online_meta_learning_rate
    assert rate(get_task("digits")) == 1e-4
    california = get_task("california")
    for steps in (methods.FULL_RATE_STEPS, california.steps, 10 * california.steps):
        assert rate(california.with_(steps=steps)) * steps == pytest.approx(3)
    usual = compared([IRIS], ["online"], [0, 1])
    monkeypatch.setattr(methods, "FULL_RATE_STEPS", 1e-9)  # so slowly that the loss stays what it was
    online, offline = (rows(compared([IRIS], [method], [0, 1]), method) for method in ("online", "offline"))
    assert online.test_loss.to_numpy() == pytest.approx(offline.test_loss.to_numpy(), abs=1e-6)
    assert rows(usual, "online").test_loss.to_numpy() != pytest.approx(offline.test_loss.to_numpy(), abs=1e-6)
    together = rows(compared([IRIS], ["online"], [0, 1], together=True), "online")
    assert together.test_loss.to_numpy() == pytest.approx(offline.test_loss.to_numpy(), abs=1e-3)


@pytest.mark.parametrize(("jobs", "bars"), [(1, {"jobs", "initialise", "fit"}), (2, {"jobs"})])
def test_progress_is_of_jobs_and_in_one_process_of_steps_too(capfd, jobs, bars):
    compare([IRIS], ["handcrafted", "offline"], [0, 1], together=True, jobs=jobs)
    assert set(re.findall(r"([\w ]+): +\d+%\|", capfd.readouterr().err)) == bars


def test_seeds_together_share_the_seconds_and_the_initialisation(together):
    for method in ("ml3", "online"):
        assert rows(together, method).initialisation_seconds.nunique() == 1
        assert (rows(together, method).groupby("step").seconds.nunique() == 1).all()
    seconds = together.groupby("method").initialisation_seconds.first()
    assert seconds["offline"] == seconds["online"] != seconds["ml3"]


def test_seeds_together_are_stored_one_by_one_and_only_the_missing_ones_run(tmp_path, monkeypatch):
    first = compared([IRIS], ["handcrafted"], [0], folder=tmp_path)
    asked = []
    real = experiments.run
    monkeypatch.setattr(experiments, "run", lambda t, m, seeds, **o: asked.append(seeds) or real(t, m, seeds, **o))
    both = compared([IRIS], ["handcrafted"], [0, 1, 2], folder=tmp_path, together=True)
    assert asked == [[1, 2]] and len(list(tmp_path.glob("*.parquet"))) == 3
    pd.testing.assert_frame_equal(both[both.seed == 0].reset_index(drop=True), first)
    again = compared([IRIS], ["handcrafted"], [0, 1, 2], folder=tmp_path, together=True)
    assert len(asked) == 1
    pd.testing.assert_frame_equal(again, both)


def test_where_one_seed_diverges_the_others_are_run_alone(monkeypatch):
    def diverges(task, method, seeds, **options):
        if isinstance(seeds, list):
            raise FloatingPointError("a loss of learner 1 was not finite")
        return real(task, method, seeds, **options)

    real = experiments.run
    monkeypatch.setattr(experiments, "run", diverges)
    found = compared([IRIS], ["handcrafted"], [0, 1], together=True)
    assert set(found.seeds_together) == {1} and np.isfinite(found.test_error).all()
    same(found, compared([IRIS], ["handcrafted"], [0, 1]))


def test_a_task_with_drops_or_crops_runs_its_seeds_one_by_one():
    for task in (IRIS.with_(drops=(0.5,)), get_task("cifar10-resnet18")):
        assert not METHODS["handcrafted"].stacks(task)
    assert METHODS["handcrafted"].stacks(IRIS) and not METHODS["handcrafted-tuned"].stacks(IRIS)
    dropped = compared([IRIS.with_(drops=(0.5,))], ["handcrafted"], [0, 1], together=True)
    assert dropped.learning_rate.nunique() == 2


# Divergence --------------------------------------------------------------------------------------------------------


def test_a_diverged_run_is_one_row_with_infinite_errors_and_the_others_go_on(tmp_path):
    wild = DIABETES.with_(learning_rate=1e12)
    methods = ["handcrafted", "handcrafted-tuned", "offline"]
    for _ in range(2):  # the second time they are read
        found = compared([wild, IRIS], methods[:1], [0], folder=tmp_path)
        last = final_errors(found).set_index("task")
        assert last.diverged.to_dict() == {"diabetes": True, "iris": False}
        assert last.test_error["diabetes"] == last.valid_error["diabetes"] == math.inf
        assert last.step["diabetes"] == 40 and last.torch["diabetes"] == torch.__version__
        assert (found.task == "diabetes").sum() == 1
    assert final_errors(compared([wild], methods[1:], [0])).diverged.tolist() == [True, True]


def test_tuning_passes_over_learning_rates_that_diverge(monkeypatch):
    """The large ones diverge here; the last one ends not a number without ``fit`` seeing it."""
    task = DIABETES.with_(learning_rate=0.01)
    tuned = METHODS["handcrafted-tuned"]
    assert run(task, replace(tuned, rate=Tuned((1e14, 1.0))), 0).learning_rate.iloc[0] == pytest.approx(0.01)
    poisoned = iter([(math.nan, math.nan), (0.5, 0.5)])
    monkeypatch.setattr(recipes, "evaluate", lambda *_: next(poisoned))
    assert run(task, replace(tuned, rate=Tuned((2.0, 1.0))), 0).learning_rate.iloc[0] == pytest.approx(0.01)


def test_not_a_number_counts_as_diverged():
    labels = {"task": "t", "method": "m", "seed": 0}
    table = pd.DataFrame([{**labels, "step": 0, "test_error": 0.5}, {**labels, "step": 9, "test_error": math.nan}])
    assert final_errors(table).diverged.tolist() == [True]


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["nothing"], ["online"], [0]), "unknown task 'nothing'; known tasks: digits"),
        ((["iris"], ["handcrafted", "magic"], [0]), "unknown method 'magic'; known methods: handcrafted, ml3"),
        ((["iris"], ["huber"], [0]), "method 'huber' is for regression, task 'iris' is classification"),
        ((["iris", "diabetes"], ["focal"], [0]), "method 'focal' is for classification, task 'diabetes' is regression"),
        (([], ["online"], [0]), "nothing to compare: tasks is empty"),
        ((["iris"], [], [0]), "nothing to compare: methods is empty"),
        ((["iris"], ["online"], []), "nothing to compare: seeds is empty"),
    ],
)
def test_bad_arguments_are_refused_before_any_job_starts(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(experiments, "_run_methods", lambda *_, **__: pytest.fail("a job was started"))
    with pytest.raises(ValueError, match=message):
        compared(*arguments, folder=tmp_path / "jobs")
    assert not (tmp_path / "jobs").exists()


def test_methods_of_your_own_can_be_compared_and_are_told_apart_where_they_were_stored(tmp_path):
    """A learned loss of one's own and a handcrafted one, by objects; a network is any function of the kind."""

    def network(kind):
        return LossNetwork(kind, hidden=(6,))

    def half(prediction, target):
        return 0.5 * torch.nn.functional.cross_entropy(prediction, target)

    learned = methods.Method(Learned(network, METHODS["online"].loss.settings), "mine")
    mine = {"mine": short(learned), "half": methods.Method(recipes.Given(half, ("classification",)), "half of it")}
    found = compared([IRIS], mine, [0], folder=tmp_path)
    assert set(found.method) == {"mine", "half"} and final_errors(found).initialisation_steps.tolist() == [40, 0]
    same(compared([IRIS], mine, [0], folder=tmp_path), found)
    with pytest.raises(ValueError, match="recipe of the method"):
        compared([IRIS], {**mine, "half": METHODS["focal"]}, [0], folder=tmp_path)
    with pytest.raises(ValueError, match="method 'half' is for classification"):
        compared([DIABETES], mine, [0])


def scaled(factor):
    return lambda prediction, target: factor * F.cross_entropy(prediction, target)


def given(loss, rate=None):
    return methods.Method(recipes.Given(loss, ("classification",)), "in words", rate or TaskRate())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (given(scaled(1.0)), given(scaled(5.0))),
        (given(LossNetwork.classification()), given(LossNetwork.classification())),
        (
            given(scaled(1.0), recipes.Replayed(given(scaled(1.0)))),
            given(scaled(1.0), recipes.Replayed(given(scaled(2.0)))),
        ),
    ],
    ids=["closures", "weights", "of a replay"],
)
def test_methods_that_differ_within_a_function_are_told_apart_where_they_were_stored(tmp_path, before, after):
    task = IRIS.with_(steps=3)
    found = compared([task], {"mine": before}, [0], folder=tmp_path)
    same(compared([task], {"mine": before}, [0], folder=tmp_path), found)
    with pytest.raises(ValueError, match="recipe of the method"):
        compared([task], {"mine": after}, [0], folder=tmp_path)


def test_a_replayed_method_is_that_of_the_table_it_is_given_in():
    """And one that is known by its name alone, in METHODS."""
    task, flat = IRIS.with_(steps=10), given(scaled(0.1))
    replay = methods.Method(TaskLoss(), "a replay", recipes.Replayed("handcrafted"))
    own = compared([task], {"handcrafted": flat, "replay": replay}, [0])
    of_registry = compared([task], {"replay": replay}, [0])
    by_object = methods.Method(TaskLoss(), "a replay", recipes.Replayed(flat))
    columns = ["step", "train_loss", "test_loss", "learning_rate"]
    replayed = own[own.method == "replay"][columns].reset_index(drop=True)
    pd.testing.assert_frame_equal(replayed, compared([task], {"replay": by_object}, [0])[columns])
    assert replayed.learning_rate.iloc[0] == pytest.approx(0.1 * of_registry.learning_rate.iloc[0], rel=1e-5)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (lambda: methods.Method(TaskLoss(), "", recipes.Replayed("nope")), "unknown method 'nope'"),
        (lambda: methods.Method(TaskLoss(), "", recipes.Replayed("last")), "'last' refers to itself"),
        (lambda: methods.Method(TaskLoss(), "", compute_of="nope"), "unknown method 'nope'"),
        (lambda: methods.Method(TaskLoss(), "", compute_of="handcrafted"), "is a method that learns no loss"),
        (lambda: methods.Method(Learned(LossNetwork.classification), ""), "give lambda kind: LossNetwork"),
        (lambda: methods.Method(Learned(lambda kind: LossNetwork.regression()), ""), "module whose kind is 'class"),
        (lambda: methods.Method(Learned(lambda kind: kind), ""), "must give a module whose kind"),
        (lambda: methods.Method(Learned(lambda kind: TinyLoss()), ""), "imitation_steps=0"),
        (lambda: torch.nn.functional.cross_entropy, "'last' must be a Method, got function; give Method"),
    ],
)
def test_what_a_method_refers_to_is_looked_at_before_any_job_starts(monkeypatch, method, message):
    monkeypatch.setattr(experiments, "_run_methods", lambda *_, **__: pytest.fail("a job was started"))
    with pytest.raises((ValueError, TypeError), match=message):
        compared([IRIS], {"first": given(scaled(1.0)), "last": method()}, [0])


mean = 3.0
"""Of the name of a method that a loss calls, and no part of it."""


def test_a_function_is_the_same_in_a_process_that_it_was_sent_to(tmp_path):
    def half(prediction, target):
        return F.cross_entropy(prediction, target, reduction="none").mean() / 2

    task, own = IRIS.with_(steps=3), {"half": given(half)}
    found = compared([task], own, [0, 1], folder=tmp_path, jobs=2)
    same(compared([task], own, [0, 1], folder=tmp_path), found)
    for path in tmp_path.iterdir():
        path.unlink()
    same(compared([task], own, [0, 1], folder=tmp_path), found)
    same(compared([task], own, [0, 1], folder=tmp_path, jobs=2), found)


class TinyLoss(torch.nn.Module):
    """A learned loss of one weight."""

    kind = "classification"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, prediction, target):
        return self.scale * F.cross_entropy(prediction, target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tuned(()), "factors must be positive and finite, one or more"),
        (lambda: Tuned((0.1, -1.0)), "factors must be positive and finite"),
        (lambda: recipes.Given(F.cross_entropy, kinds=["classification"]), "kinds must be a tuple"),
        (lambda: recipes.Given("cross-entropy"), "loss must be a function or a module, got str"),
        (lambda: Learned(LossNetwork.classification()), "network must be a function of the kind, got LossNetwork"),
        (lambda: methods.Method(F.cross_entropy, "mine"), "put together of Given, .* got function"),
        (lambda: methods.Method(Tuned(), "mine"), "got Tuned"),
        (lambda: methods.Method(TaskLoss(), "mine", "tuned"), "got str, give TaskRate"),
        (lambda: methods.Method(Learned(), "mine", meta_learning_rate=1e-3), "give online=True, or leave it out"),
        (lambda: methods.Method(Learned(), "mine", online=True, meta_learning_rate=math.inf), "0 or more and finite"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused_when_they_are_written(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("seeds", [5, "01", [0.5], [True]])
def test_seeds_that_are_no_whole_numbers_are_refused(seeds):
    with pytest.raises(TypeError, match="seeds must be a list of whole numbers"):
        compared([IRIS], ["handcrafted"], seeds)


def test_a_rate_is_learned_for_the_loss_of_its_method():
    """A hundred times the loss has a hundredth of the rate; the schedule's base is the first row's."""
    learned = LearnedRate(Initialiser.published(steps=200))
    loss = methods.Method(recipes.Given(scaled(100.0), ("classification",)), "steep", learned)
    task = IRIS.with_(steps=2, momentum=0.0)
    found = compared([task], {"steep": loss, "plain": methods.Method(TaskLoss(), "plain", learned)}, [0])
    steep, plain = (found[found.method == name].learning_rate.iloc[0] for name in ("steep", "plain"))
    # from the task's own rate, far too high for the steep loss, the one falls while the other rises
    assert steep < task.learning_rate < plain


def test_a_network_that_somebody_keeps_starts_every_job_as_it_is():
    kept = LossNetwork.classification()
    before = copy.deepcopy(kept.state_dict())
    own = {"mine": methods.Method(Learned(lambda kind: kept, Initialiser.published(steps=5)), "kept")}
    both, alone = compared([IRIS.with_(steps=3)], own, [0, 1]), compared([IRIS.with_(steps=3)], own, [1])
    same(both[both.seed == 1], alone)
    assert all(torch.equal(value, before[name]) for name, value in kept.state_dict().items())


class Steeper(Task):
    """A task with an optimizer of its own, and a setting that is no field."""

    factor = 1.0

    def make_optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=self.learning_rate * self.factor)


def test_a_task_with_methods_or_attributes_of_its_own_is_told_from_another(tmp_path):
    plain = IRIS.with_(steps=3)
    own, other = (Steeper(**{f.name: getattr(plain, f.name) for f in fields(plain)}) for _ in range(2))
    object.__setattr__(other, "factor", 3.0)
    compared([own], ["handcrafted"], [0], folder=tmp_path)
    for changed in (plain, other):
        with pytest.raises(ValueError, match="is of a task with"):
            compared([changed], ["handcrafted"], [0], folder=tmp_path)
    compared([own], ["handcrafted"], [0], folder=tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: methods.Method(TaskLoss(), "mine", online=True), "online=True has nothing to adapt; give a loss"),
        (lambda: methods.Method(recipes.Newton(), "mine", Tuned(), online=True), "online=True has nothing to adapt"),
        (lambda: methods.Method(Learned(), "mine", meta_batches="test"), "must be 'valid' or 'train', got 'test'"),
        (lambda: methods.Method(Learned(), "mine", meta_batches="next"), "must be 'valid' or 'train', got 'next'"),
    ],
)
def test_a_method_that_would_do_nothing_or_look_at_the_test_split_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_methods_without_a_name_are_refused():
    with pytest.raises(TypeError, match="methods must be names, or methods of your own by name, such as"):
        compared([IRIS], [METHODS["online"]], [0])


@pytest.mark.parametrize("changes", [{"clip_gradient_norm": 1.0}, {"engine": "finite-difference"}])
def test_an_initialisation_that_no_stack_has_is_run_seed_by_seed(changes):
    short_one = short(METHODS["offline"])
    mine = replace(short_one, loss=replace(short_one.loss, settings=short_one.loss.settings.with_(**changes)))
    assert short_one.stacks(IRIS) and not mine.stacks(IRIS)
    found = [compared([IRIS], {"mine": mine}, [0, 1], together=together) for together in (True, False)]
    assert set(found[0].seeds_together) == {1}
    same(*found)


def test_a_loss_of_your_own_needs_no_hash():
    @dataclass  # with == and so without a hash
    class Smoothed:
        epsilon: float = 0.1

        def __call__(self, prediction, target):
            return torch.nn.functional.cross_entropy(prediction, target, label_smoothing=self.epsilon)

    mine = methods.Method(recipes.Given(Smoothed(), ("classification",)), "smoothed")
    named = compared([IRIS], ["label-smoothing"], [0])
    assert compared([IRIS], {"mine": mine}, [0]).test_loss.tolist() == named.test_loss.tolist()


def test_tuning_the_rate_of_a_learned_loss_costs_what_the_loss_cost_too():
    """Also where another method has learned that loss before."""
    loss, shared = short(METHODS["offline"]).loss, {0: {}}
    seconds = []
    for _ in range(2):
        mine = methods.Method(loss, "mine", Tuned((1.0,)))
        (prepared,) = methods.prepare(IRIS, [IRIS.load(seed=0)], mine, [0], shared=shared)
        seconds.append(prepared.seconds)
    ((_, learned),) = shared[0].values()
    assert min(seconds) > learned > 0


def test_a_task_of_your_own_can_be_compared():
    task = Task("my wine", "wine", "linear", steps=10, batch_size=20)
    found = compared([task], ["handcrafted"], [0, 1])
    assert final_errors(found)[["task", "seed"]].to_numpy().tolist() == [["my wine", 0], ["my wine", 1]]


# The defaults hold -------------------------------------------------------------------------------------------------


@pytest.fixture
def full_length(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", METHODS)


@pytest.mark.slow
def test_online_learning_of_a_regression_needs_no_tuning(full_length):
    """With nothing chosen by hand it ends finite, and not worse than twice the handcrafted loss."""
    last = final_errors(compared([get_task("diabetes").with_(steps=300)], ["handcrafted", "online"], [0]))
    assert not last.diverged.any()
    means = last.groupby("method").test_error.mean()
    assert means["online"] <= 2 * means["handcrafted"], means.to_dict()


@pytest.mark.slow
def test_the_stored_results_come_out_again(full_length):
    """Three seeds of digits from nothing: the mean is one that three of the ten stored errors could have."""
    stored = final_errors(pd.read_parquet(Path(__file__).parents[3] / "book" / "results" / "comparison.parquet"))
    again = final_errors(compared([get_task("digits")], ["handcrafted", "online"], range(3), together=True))
    for method in ("handcrafted", "online"):
        errors = stored[(stored.task == "digits") & (stored.method == method)].set_index("seed").test_error
        found = again[again.method == method].set_index("seed").test_error
        means = np.random.default_rng(0).choice(errors, (20_000, 3)).mean(1)
        low, high = np.quantile(means, [0.001, 0.999])
        assert low <= found.mean() <= high, f"{method}: {found.tolist()}, stored {errors[found.index].tolist()}"
        if method == "handcrafted":  # no chaos there but that of rounding: two of 360 rows
            assert (found - errors[found.index]).abs().max() <= 2 / 359


def test_settings_that_a_stack_has_not_are_kept_by_running_one_by_one():
    loss = METHODS["online"].loss
    for setting in ({"clip_gradient_norm": 1.0}, {"clip_gradient_value": 0.1}, {"engine": "unrolled"}):
        assert not replace(METHODS["online"], loss=replace(loss, settings=loss.settings.with_(**setting))).stacks(IRIS)
    assert METHODS["online"].stacks(IRIS)
