"""``fit`` against a plain loop, killed and resumed bit for bit, and what it refuses before work is lost."""

import math
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adalfl_lite.data.dataset import BatchSampler, Dataset, Split
from adalfl_lite.learn.base import Plain
from adalfl_lite.learn.learning_rate import RATE_META_LEARNING_RATE, OnlineLearningRate
from adalfl_lite.learn.online import OnlineLoss
from adalfl_lite.learn.stacked import Stacked
from adalfl_lite.losses.dynamical import DynamicalLoss
from adalfl_lite.losses.fixed import fixed_loss
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.newton import NewtonLoss
from adalfl_lite.losses.task import task_loss
from adalfl_lite.train.checkpoint import NOT_KEPT_BEFORE
from adalfl_lite.train.evaluation import evaluate
from adalfl_lite.train.loop import fit as train_loop
from tests.shorthand import fit

COLUMNS = ["step", "train_loss", "meta_loss", "valid_error", "valid_loss", "test_error", "test_loss"]
COLUMNS += ["learning_rate", "seconds"]


def make_data(kind="classification", seed=0):
    """Three clouds, or a linear map, in 6 dimensions: 90 train, 40 valid and 50 test rows."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(180, 6, generator=generator)
    targets = inputs @ torch.randn(6, 3, generator=generator) + torch.randn(180, 3, generator=generator)
    targets = targets.argmax(1) if kind == "classification" else targets
    ends = [0, 90, 130, 180]
    splits = [Split(inputs[a:b], targets[a:b], torch.arange(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    return Dataset(f"clouds-{kind}", kind, *splits, 3, (6,))


def make_parts(kind="classification", seed=0, lr=0.05):
    """A model with everything that has a state: BatchNorm, dropout, momentum."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-3)
    return model, LossNetwork.default(kind), optimizer


RATE = {"online": True, "learn": "learning_rate"}
OPTIONS = {"steps": 40, "batch_size": 16, "evaluate_every": 8, "seed": 3, "progress": False}


def train_online(checkpoint=None, kill_after=None, dropout=0.3, **options):
    """40 online steps; with ``kill_after`` the process kills itself in the training forward pass after so many."""
    torch.set_num_threads(1)
    model, network, optimizer = make_parts()
    model[3].p = dropout
    passes = 0

    def count(module, inputs):
        nonlocal passes
        passes += module.training
        if kill_after is not None and passes > 3 * kill_after:  # a step passes forward three times
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(count)
    options = {**OPTIONS, "online": True, "meta_learning_rate": 1e-3, "checkpoint": checkpoint, **options}
    history = fit(model, network, make_data(), optimizer=optimizer, **options)
    return history, model, network


def flat(module):
    return torch.cat([value.detach().flatten().double() for value in module.state_dict().values()])


def same_history(a, b):
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), check_exact=True)


# The history -------------------------------------------------------------------------------------------------------


def test_rows_and_columns_of_an_online_history():
    history, *_ = train_online()
    assert list(history.columns) == COLUMNS
    assert history.step.tolist() == [0, 8, 16, 24, 32, 40]
    assert history[["train_loss", "meta_loss"]].isna().to_numpy()[0].all()
    assert np.isfinite(history.iloc[1:].to_numpy()).all()
    assert history.seconds.is_monotonic_increasing and history.seconds.iloc[0] == 0 < history.seconds.iloc[-1]
    assert history.valid_error.iloc[-1] < history.valid_error.iloc[0]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"steps": 5, "evaluate_every": None}, [0, 1, 2, 3, 4, 5]),
        ({"steps": 45, "evaluate_every": None}, [0, *range(2, 45, 2), 45]),  # a twentieth, and the last step
        ({"steps": 5, "evaluate_every": 9}, [0, 5]),
    ],
)
def test_when_it_evaluates(options, steps):
    model, _, optimizer = make_parts()
    history = fit(model, F.cross_entropy, make_data(), optimizer=optimizer, **{**OPTIONS, **options})
    assert history.step.tolist() == steps
    assert history.meta_loss.isna().all()  # no meta batches without online=True


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("learned", [False, True])
def test_a_fixed_loss_is_a_plain_torch_loop_bit_for_bit(kind, learned):
    model, network, optimizer = make_parts(kind)
    loss, data = network if learned else task_loss(kind), make_data(kind)
    twin, _, twin_optimizer = make_parts(kind)
    phi = flat(network)
    torch.manual_seed(7)
    history = fit(model, loss, data, optimizer=optimizer, **OPTIONS)
    torch.manual_seed(7)
    twin.train()
    losses, batches = [], BatchSampler(90, 16, seed=3)
    for _ in range(40):
        x, y = data.train[next(batches)]
        twin_optimizer.zero_grad()
        value = loss(twin(x), y)
        value.backward()
        twin_optimizer.step()
        losses.append(value.item())
    assert torch.equal(flat(model), flat(twin)) and torch.equal(flat(network), phi)
    for row, start in zip(history.iloc[1:].itertuples(), range(0, 40, 8), strict=True):
        assert row.train_loss == pytest.approx(np.mean(losses[start : start + 8]), rel=1e-5)
    twin.eval()
    with torch.no_grad():
        expected = task_loss(kind)(twin(data.test.inputs), data.test.targets).item()
    assert history.test_loss.iloc[-1] == pytest.approx(expected, rel=1e-6)


def test_online_with_meta_batches_from_train_never_looks_at_valid():
    data = make_data()
    shuffled = Dataset(**{**vars(data), "valid": Split(-data.valid.inputs, data.valid.targets, data.valid.indices)})
    weights = []
    for which, meta_batches in ((data, "train"), (shuffled, "train"), (data, "valid"), (shuffled, "valid")):
        model, network, optimizer = make_parts()
        fit(model, network, which, optimizer=optimizer, online=True, meta_batches=meta_batches, **OPTIONS)
        weights.append(torch.cat([flat(model), flat(network)]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[0], weights[2])


def test_the_next_training_batch_as_meta_batch_is_a_loop_over_pairs_and_may_share_its_pass():
    model, network, optimizer = make_parts()
    online = OnlineLoss(model, network, optimizer, meta_learning_rate=1e-3)
    data, sampler = make_data(), BatchSampler(90, 16, seed=3)
    torch.manual_seed(7)
    model.train()
    batches = [data.train[next(sampler)] for _ in range(41)]
    for batch, next_batch in zip(batches, batches[1:], strict=False):
        online.step(batch, next_batch)
    options = {**OPTIONS, "online": True, "meta_learning_rate": 1e-3, "meta_batches": "next"}
    for engine in ("forward", "shared"):
        other, other_network, other_optimizer = make_parts()
        torch.manual_seed(7)
        fit(other, other_network, data, optimizer=other_optimizer, engine=engine, **options)
        torch.testing.assert_close(flat(other), flat(model), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(flat(other_network), flat(network), rtol=1e-5, atol=1e-6)


def test_a_meta_optimizer_of_the_users_is_used():
    model, network, optimizer = make_parts()
    meta_optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    phi = flat(network)
    fit(model, network, make_data(), optimizer=optimizer, online=True, meta_optimizer=meta_optimizer, **OPTIONS)
    assert torch.equal(flat(network), phi)


def test_a_learned_rate_takes_a_function_for_its_meta_optimizer_and_moves():
    """The default written out gives the default's numbers, another setting others."""
    rates = []
    for options in (
        {},
        {"meta_optimizer": partial(torch.optim.Adam, lr=RATE_META_LEARNING_RATE)},
        {"meta_optimizer": partial(torch.optim.SGD, lr=0.1)},
    ):
        model, _, optimizer = make_parts()
        torch.manual_seed(1)
        options = {**OPTIONS, **options, "online": True, "learn": "learning_rate"}
        history = fit(model, F.cross_entropy, make_data(), optimizer=optimizer, **options)
        rates.append(history.learning_rate.tolist())
    assert rates[0] == rates[1] != rates[2] and len(set(rates[2])) > 3


class Ramp(nn.Module):
    """A loss that changes as it is trained with, and writes down at which of its steps it is asked."""

    def __init__(self):
        super().__init__()
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))
        self.asked = []

    def advance(self):
        self.at += 1

    def forward(self, prediction, target):
        self.asked.append(int(self.at))
        return (1 + 0.1 * self.at) * F.cross_entropy(prediction, target)


@pytest.mark.parametrize("options", [{}, {"online": True, "learn": "learning_rate"}], ids=["plain", "learned rate"])
@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_changes_advances_once_a_step_in_either_mode_and_not_where_it_is_looked_at(options, training):
    model, _, optimizer = make_parts()
    loss = Ramp().train(training)

    def look(step, model, loss):
        loss(torch.zeros(2, 3), torch.tensor([0, 1]))

    fit(model, loss, make_data(), optimizer=optimizer, callback=look, **options, **OPTIONS)
    assert loss.asked == sorted([*range(40), *range(0, 41, 8)]) and loss.at == 40


def test_the_callback_comes_at_each_evaluation_with_what_is_trained():
    model, network, optimizer = make_parts()
    calls = []

    def callback(step, given_model, given_loss):
        assert given_model is model and given_loss is network
        calls.append((step, flat(network)))

    options = {"online": True, "meta_learning_rate": 1e-3, "callback": callback}
    history = fit(model, network, make_data(), optimizer=optimizer, **options, **OPTIONS)
    assert [step for step, _ in calls] == history.step.tolist()
    assert not torch.equal(calls[0][1], calls[1][1]) and torch.equal(calls[-1][1], flat(network))


@pytest.mark.parametrize("online", [False, True])
def test_bfloat16_autocast_runs_on_the_cpu_and_stays_near_float32(online):
    histories, dtypes = [], []
    for autocast in (None, torch.bfloat16):
        model, network, optimizer = make_parts()
        model[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        model[3].p = 0.0
        options = {"online": online, "meta_learning_rate": 1e-3 if online else None, "autocast": autocast}
        histories.append(fit(model, network, make_data(), optimizer=optimizer, **options, **OPTIONS))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.bfloat16 in dtypes
    for column in ("train_loss", "test_loss"):
        full, half = (history[column].to_numpy()[1:] for history in histories)
        assert not np.array_equal(full, half)
        np.testing.assert_allclose(half, full, rtol=0.05, atol=0.01)


# Evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_evaluate_on_known_predictions(batch_size):
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [0.0, 0.0], [9.0, 0.0], [0.0, math.log(3)]])
    split = Split(logits, torch.tensor([1, 0, 0, 0, 1]), torch.arange(5))
    error, loss = evaluate(nn.Identity(), split, "classification", batch_size)
    nine = math.log(1 + math.exp(-9))
    assert error == pytest.approx(1 / 5)
    assert loss == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2) + nine) / 5, rel=1e-5)
    split = Split(torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]]), torch.zeros(3, 2), torch.arange(3))
    assert evaluate(nn.Identity(), split, "regression", batch_size) == pytest.approx((5 / 6, 5 / 6))


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_in_eval_mode_without_gradients_and_puts_the_mode_back(training):
    model, *_ = make_parts()
    model.train(training)
    before, split = flat(model), make_data().test
    assert evaluate(model, split, "classification") == evaluate(model, split, "classification")  # no dropout
    assert torch.equal(flat(model), before) and all(module.training == training for module in model.modules())


# Killed and resumed ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_midway_and_run_again_it_ends_bit_for_bit_where_it_would_have(tmp_path):
    path = tmp_path / "run.checkpoint"
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['train_online'](sys.argv[2], kill_after=21)"
    arguments = [sys.executable, "-c", code, str(Path(__file__)), str(path)]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=500)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert os.listdir(tmp_path) == ["run.checkpoint"]  # of step 16; steps 17 to 21 are lost

    steps = []
    history, model, network = train_online(path, callback=lambda step, *_: steps.append(step))
    assert steps == [24, 32, 40]
    whole, whole_model, whole_network = train_online()
    same_history(history, whole)
    assert torch.equal(flat(model), flat(whole_model)) and torch.equal(flat(network), flat(whole_network))
    assert history.seconds.is_monotonic_increasing


def jitter(inputs):
    """An augmentation."""
    return inputs + 0.1 * torch.randn_like(inputs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "shared", "meta_batches": "next"},
        {"augment": jitter},
        {"engine": "shared", "meta_batches": "next", "augment": jitter, "dropout": 0.0},  # the next batch is drawn
    ],
    ids=["forward", "shared", "augmented", "shared and augmented"],
)
def test_a_run_cut_short_by_an_exception_resumes_and_a_finished_one_is_returned(options, tmp_path):
    """The same within one process, and from a checkpoint at every evaluation."""
    whole, whole_model, whole_network = train_online(**options)

    def stop_at(last):
        def stop(step, model, loss):
            if step == last:
                raise KeyboardInterrupt

        return stop

    path = tmp_path / "run.checkpoint"
    for last in (0, 8, 24, 40):
        with pytest.raises(KeyboardInterrupt):
            train_online(path, callback=stop_at(last), **options)
    history, model, network = train_online(path, **options)
    same_history(history, whole)
    assert torch.equal(flat(model), flat(whole_model)) and torch.equal(flat(network), flat(whole_network))
    again, model, _ = train_online(path, **options)
    pd.testing.assert_frame_equal(again, history, check_exact=True)
    assert torch.equal(flat(model), flat(whole_model))


def test_a_checkpoint_is_read_without_running_code_and_a_foreign_one_is_refused(tmp_path):
    path = tmp_path / "run.checkpoint"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"run\.checkpoint cannot be read"):
        train_online(path)
    assert path.read_bytes() == b"not a checkpoint"
    LossNetwork.classification().save(path)
    with pytest.raises(ValueError, match="holds format 'adalfl-loss-network-1'"):
        train_online(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 80}, "steps 40 -> 80"),
        ({"seed": 4}, "seed 3 -> 4"),
        ({"batch_size": 8}, "batch_size 16 -> 8"),
        ({"evaluate_every": 4}, "evaluate_every 8 -> 4"),
        ({"meta_learning_rate": 1e-4}, "meta_learning_rate 0.001 -> 0.0001"),
        ({"meta_batches": "train"}, "meta_batches 'valid' -> 'train'"),
        ({"online": False, "meta_learning_rate": None}, "online True -> False"),
        ({"engine": "finite-difference"}, "engine None -> 'finite-difference'"),
        ({"autocast": torch.bfloat16}, "autocast None -> 'torch.bfloat16'"),
        ({"on_divergence": "skip"}, "on_divergence 'raise' -> 'skip'"),
        ({"augment": nn.Identity()}, "augment None -> "),
        (
            {"meta_learning_rate": None, "meta_optimizer": partial(torch.optim.SGD, lr=0.1)},
            "meta_optimizer None -> .*'SGD'.*'momentum'",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(finished, change, message):
    before = finished.read_bytes()
    with pytest.raises(ValueError, match=f"is a checkpoint of another run .*{message}.*use another file"):
        train_online(finished, **change)
    assert finished.read_bytes() == before


def test_a_checkpoint_of_another_model_data_set_or_learning_rate_is_refused(finished):
    options = {**OPTIONS, "online": True, "meta_learning_rate": 1e-3, "checkpoint": finished}
    model, network, optimizer = make_parts("regression")
    with pytest.raises(ValueError, match="data 'clouds-classification' -> 'clouds-regression'"):
        fit(model, network, make_data("regression"), optimizer=optimizer, **options)
    model, network, optimizer = make_parts(lr=0.01)
    with pytest.raises(ValueError, match=r"learning_rate \[0.05\] -> \[0.01\]"):
        fit(model, network, make_data(), optimizer=optimizer, **options)
    for other in (nn.Sequential(nn.Linear(6, 3)), make_parts()[0]):
        other.append(nn.Tanh())  # the second has the parameters of the first run
        optimizer = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
        with pytest.raises(ValueError, match="model '[0-9a-f]{12}' -> '[0-9a-f]{12}'"):
            fit(other, network, make_data(), optimizer=optimizer, **options)


def with_run(path, change):
    """The same file with another description of its run."""
    saved = torch.load(path, weights_only=True)
    torch.save({**saved, "run": change(saved["run"])}, path)


def as_before(run):
    """As a checkpoint described its run before engine, meta-optimizer, model and inputs were among it."""
    later = {"engine", "autocast", "meta_optimizer", *NOT_KEPT_BEFORE} - {"loss"}
    offline = {"learn": "loss", "meta_batches": "valid", "meta_learning_rate": 1e-5, "clip_meta_gradient": None}
    return {name: value for name, value in {**offline, **run}.items() if name not in later}


def stop_at_24(step, model, loss):
    if step == 24:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "options",
    [{}, {"engine": "shared", "meta_batches": "next"}, {"online": False, "meta_learning_rate": None}],
    ids=["online", "shared", "plain"],
)
def test_an_older_checkpoint_of_the_default_settings_resumes_bit_for_bit(tmp_path, options):
    whole, whole_model, _ = train_online(**options)
    with pytest.raises(KeyboardInterrupt):
        train_online(tmp_path / "run", callback=stop_at_24, **options)
    with_run(tmp_path / "run", as_before)
    history, model, _ = train_online(tmp_path / "run", **options)
    same_history(history, whole)
    assert torch.equal(flat(model), flat(whole_model))


def test_an_older_checkpoint_does_not_fit_another_model_or_engine(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train_online(tmp_path / "run", callback=stop_at_24)
    with_run(tmp_path / "run", as_before)
    with pytest.raises(ValueError, match="engine None -> 'finite-difference'"):
        train_online(tmp_path / "run", engine="finite-difference")
    model, network = nn.Sequential(nn.Linear(6, 3)), LossNetwork.classification()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    options = {**OPTIONS, "online": True, "meta_learning_rate": 1e-3, "checkpoint": tmp_path / "run"}
    with pytest.raises(ValueError, match="does not fit this run"):
        fit(model, network, make_data(), optimizer=optimizer, **options)


@pytest.mark.parametrize("engine", ["shared", "unrolled"])
def test_an_exact_engine_resumes_what_another_began(tmp_path, engine):
    """They differ in rounding alone, so that one may help out where another lacks memory or a derivative."""
    options = {"meta_batches": "next", "dropout": 0.0}
    whole, whole_model, _ = train_online(**options)
    with pytest.raises(KeyboardInterrupt):
        train_online(tmp_path / "run", callback=stop_at_24, **options)
    history, model, _ = train_online(tmp_path / "run", engine=engine, **options)
    torch.testing.assert_close(flat(model), flat(whole_model), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history.test_loss, whole.test_loss, rtol=1e-4)


def test_a_meta_optimizer_with_another_setting_is_another_run(tmp_path):
    def train(lr, **options):
        make = partial(torch.optim.SGD, lr=lr)
        return train_online(tmp_path / "run", meta_learning_rate=None, meta_optimizer=make, **options)

    train(0.1)
    train(0.1)  # finished
    with pytest.raises(ValueError, match=r"meta_optimizer .*'learning_rate': \[0.1\].* -> .*'learning_rate': \[0.2\]"):
        train(0.2)


class Shift:
    """An augmentation with a setting."""

    def __init__(self, by):
        self.by = by

    def __call__(self, inputs):
        return inputs + self.by


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"augment": Shift(0.1)}, {"augment": Shift(0.2)}, r"augment_settings .*'by', 0.1.* -> .*'by', 0.2"),
        ({"scheduler": ("StepLR", 10)}, {"scheduler": ("StepLR", 20)}, "'step_size': 10.* -> .*'step_size': 20"),
        ({"scheduler": ("MultiStepLR", [10])}, {"scheduler": ("MultiStepLR", [20])}, "scheduler .*10.* -> .*20"),
        (
            {"scheduler": ("LambdaLR", lambda step: 0.9**step)},
            {"scheduler": ("LambdaLR", lambda step: 0.8**step)},
            "scheduler .*'0.81'.* -> .*'0.64'",
        ),
        ({"scheduler": ("StepLR", 10)}, {"scheduler": ("ExponentialLR", 0.9)}, "'StepLR'.* -> .*'ExponentialLR'"),
        ({}, {"data": "inputs"}, "inputs .* -> "),
        ({}, {"data": "valid"}, "held_out '[0-9a-f]{12}' -> "),
    ],
    ids=["augment", "step", "milestones", "function", "kind", "inputs", "validation rows"],
)
def test_a_setting_of_a_part_is_part_of_the_run(tmp_path, first, second, message):
    def train(scheduler=None, data=None, **options):
        model, _, optimizer = make_parts()
        if scheduler:
            options["scheduler"] = getattr(torch.optim.lr_scheduler, scheduler[0])(optimizer, scheduler[1])
        given = make_data()
        if data == "inputs":
            given = replace(given, train=replace(given.train, inputs=2 * given.train.inputs))
        elif data:
            given = replace(given, valid=given.valid.take(torch.arange(20)))
        options = {**OPTIONS, "checkpoint": tmp_path / "run", **options}
        return fit(model, F.cross_entropy, given, optimizer=optimizer, **options)

    whole = train(**first)
    same_history(train(**first), whole)
    with pytest.raises(ValueError, match=f"of another run .*{message}"):
        train(**second)


def test_a_checkpoint_of_another_loss_split_optimizer_or_without_the_scheduler_is_refused(tmp_path):
    def train(loss=F.cross_entropy, data=None, scheduled=True, **changes):
        model, _, optimizer = make_parts()
        optimizer.param_groups[0] |= changes
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10) if scheduled else None
        options = {**OPTIONS, "scheduler": scheduler, "checkpoint": tmp_path / "c"}
        return fit(model, loss, data or make_data(), optimizer=optimizer, **options)

    whole = train()
    same_history(train(), whole)
    for change, message in (
        ({"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss .*label_smoothing=0.1"),
        ({"loss": fixed_loss("focal")}, r"loss 'cross_entropy' -> 'focal\(\)'"),
        ({"data": make_data(seed=1)}, "rows '[0-9a-f]{12}' -> '[0-9a-f]{12}'"),
        ({"momentum": 0.5}, r"momentum \[0.9\] -> \[0.5\]"),
        ({"scheduled": False}, "parts .*'scheduler'.* -> "),
    ):
        with pytest.raises(ValueError, match=f"of another run .*{message}"):
            train(**change)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (fixed_loss("focal"), fixed_loss("focal", gamma=3.0), r"'focal\(\)' -> 'focal\(gamma=3.0\)'"),
        (NewtonLoss("classification"), NewtonLoss("classification", "fisher"), "'hessian'.* -> .*'fisher'"),
        (DynamicalLoss(3), DynamicalLoss(3, amplitude=2.0), r"amplitude=70.0.* -> .*amplitude=2.0"),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing=0.0.* -> .*smoothing=0.1"),
    ],
)
def test_a_checkpoint_of_the_same_loss_with_another_setting_is_refused(tmp_path, first, second, message):
    for loss in (first, second):
        model, _, optimizer = make_parts()
        with pytest.raises(ValueError, match=message) if loss is second else nullcontext():
            fit(model, loss, make_data(), optimizer=optimizer, **{**OPTIONS, "checkpoint": tmp_path / "c"})


def test_evaluation_puts_the_mode_of_every_layer_back():
    model, _, _ = make_parts()
    model.train()
    model[1].eval()
    before = [layer.training for layer in model.modules()]
    evaluate(model, make_data().test, "classification")
    assert [layer.training for layer in model.modules()] == before
    with pytest.raises(RuntimeError):
        evaluate(model, Split(torch.randn(2, 5), torch.tensor([0, 1]), torch.arange(2)), "classification")
    assert [layer.training for layer in model.modules()] == before


def test_a_loss_network_that_is_not_learned_gets_no_gradient_and_nor_does_what_is_not_trained():
    model, network, _ = make_parts()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.05)
    fit(model, network, make_data(), optimizer=optimizer, **OPTIONS)
    assert all(p.grad is None for p in [*network.parameters(), *model[0].parameters()])
    assert all(p.grad is not None for p in model[4].parameters())


def test_an_optimizer_whose_step_takes_no_closure_serves():
    class Plain(torch.optim.SGD):
        def step(self):
            return super().step()

    (model, loss, optimizer), (twin, _, _) = make_parts(), make_parts()
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
    torch.manual_seed(1)
    fit(model, loss, make_data(), optimizer=optimizer, **OPTIONS)
    torch.manual_seed(1)
    fit(twin, loss, make_data(), optimizer=Plain(twin.parameters(), **options), **OPTIONS)
    assert torch.equal(flat(model), flat(twin))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a finished ``train_online``."""
    path = tmp_path_factory.mktemp("finished") / "run.checkpoint"
    train_online(path)
    return path


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "run.checkpoint"

    def diverge(step, model, loss):
        if step == 16:
            with torch.no_grad():
                model[0].weight.fill_(math.nan)

    model, network, optimizer = make_parts()
    options = {**OPTIONS, "checkpoint": path, "callback": diverge}
    with pytest.raises(FloatingPointError, match="step 17: the loss is not finite .*0.weight.* lower the base"):
        fit(model, F.cross_entropy, make_data(), optimizer=optimizer, **options)
    assert torch.load(path, weights_only=True)["history"][-1]["step"] == 16
    model, network, optimizer = make_parts()
    with pytest.raises(FloatingPointError, match="step 17: the learned loss is not finite"):
        fit(model, network, make_data(), optimizer=optimizer, online=True, **{**options, "checkpoint": None})


# Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 91}, "batch_size=91 must be between 1 and the number of rows, n=90"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"meta_batches": "test"}, "meta_batches must be 'valid', 'train' or 'next', got 'test'"),
        ({"online": True, "engine": "shared"}, "engine='shared' needs meta_batches='next', got 'valid'"),
        ({"online": True, "engine": "fast"}, "engine must be one of"),
        ({"online": True, "meta_learning_rate": -1.0}, "meta_learning_rate must be 0 or more and finite"),
        (
            {"meta_batches": "train"},
            "meta_batches='train' has no effect where nothing is learned beside the model; leave it out",
        ),
        (
            {"online": True, "meta_learning_rate": 0.1, "meta_optimizer": partial(torch.optim.Adam, lr=1e-3)},
            "meta_learning_rate has no effect on a meta_optimizer of your own; leave one of the two out",
        ),
        (
            {"autocast": torch.float32},
            "autocast must be torch.bfloat16 or torch.float16, got torch.float32; leave it out",
        ),
        ({"autocast": torch.int8}, "autocast must be torch.bfloat16 or torch.float16, got torch.int8"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_trained(options, message):
    model, network, optimizer = make_parts()
    before = flat(model)
    with pytest.raises(ValueError, match=message):
        fit(model, network, make_data(), optimizer=optimizer, **{**OPTIONS, **options})
    assert torch.equal(flat(model), before)


def test_a_scheduler_that_would_not_schedule_this_run_is_refused():
    model, network, optimizer = make_parts()
    other = make_parts()[2]
    for scheduler, error, message in (
        (
            torch.optim.lr_scheduler.StepLR(other, 10),
            ValueError,
            "the scheduler is of another optimizer; build it from",
        ),
        (torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), TypeError, "needs a metric .* MultiStepLR"),
    ):
        with pytest.raises(error, match=message):
            fit(model, network, make_data(), optimizer=optimizer, scheduler=scheduler, **OPTIONS)


def twice(prediction, target):
    return 2 * F.cross_entropy(prediction, target)


def plain(model, **changes):
    given = {"loss": F.cross_entropy, "lr": 0.05, **changes}
    return Plain(model, given["loss"], torch.optim.SGD(model.parameters(), lr=given["lr"]))


def online(model, **options):
    network = LossNetwork.classification()
    return OnlineLoss(model, network, torch.optim.SGD(model.parameters(), lr=0.05), **options)


def rate(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr", 0.05))
    return OnlineLearningRate(model, F.cross_entropy, optimizer, **options)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def frozen_first():
    model = small()
    model[0].requires_grad_(False)
    return model


FEW = {"steps": 6, "batch_size": 16, "evaluate_every": 2, "seed": 3, "progress": False}


class Stop(Exception):
    """Ends a run at an evaluation."""


def stop_at(step):
    def callback(reached, model, loss):
        if reached == step:
            raise Stop

    return callback


def started(learner, path, **options):
    """A run that ends after the checkpoint of step 2."""
    with pytest.raises(Stop):
        train_loop(learner, make_data(), checkpoint=path, callback=stop_at(4), **{**FEW, **options})


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (lambda: online(small()), lambda: online(small(), task_loss=twice), "task_loss"),
        (lambda: rate(small()), lambda: rate(small(), task_loss=twice), "task_loss"),
        (lambda: plain(small()), lambda: plain(frozen_first()), "frozen"),
        (
            lambda: plain(small(), loss=lambda p, t: F.cross_entropy(p, t)),
            lambda: plain(small(), loss=lambda p, t: 2 * F.cross_entropy(p, t)),
            "loss_code",
        ),
        (
            lambda: Stacked([rate(small(), lr=0.05), rate(small(), lr=0.5)]),
            lambda: Stacked([rate(small(), lr=0.05), rate(small(), lr=0.005)]),
            "members",
        ),
    ],
    ids=["task loss", "task loss of a rate", "frozen", "code", "second of a stack"],
)
def test_a_run_that_differs_where_only_code_shows_it_is_no_resume(tmp_path, before, after, named):
    first, second = before(), after()
    seed = [3, 4] if isinstance(first, Stacked) else 3
    started(first, tmp_path / "run.pt", **({"seed": seed} if isinstance(seed, list) else {}))
    states = [{name: value.clone() for name, value in model.state_dict().items()} for model in second.models]
    with pytest.raises(ValueError, match=f"another run .*{named}"):
        train_loop(second, make_data(), checkpoint=tmp_path / "run.pt", **{**FEW, "seed": seed})
    for model, state in zip(second.models, states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("make", [plain, online, rate])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_run_goes_on_with_the_very_objects_it_was_stopped_with(tmp_path, make, scheduled):
    """As where a cell of a notebook is run again."""
    if scheduled and make is rate:
        pytest.skip("a learned rate has no schedule")

    def parts():
        learner = make(small())
        scheduler = torch.optim.lr_scheduler.MultiStepLR(learner.optimizer, [1, 3]) if scheduled else None
        return learner, scheduler

    torch.manual_seed(0)
    learner, scheduler = parts()
    whole = train_loop(learner, make_data(), scheduler=scheduler, **FEW)
    torch.manual_seed(0)
    learner, scheduler = parts()
    started(learner, tmp_path / "run.pt", scheduler=scheduler)
    again = train_loop(learner, make_data(), checkpoint=tmp_path / "run.pt", scheduler=scheduler, **FEW)
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), whole.drop(columns="seconds"), check_exact=True)


class Hidden(nn.Module):
    """A model whose width its repr does not show."""

    def __init__(self, width):
        super().__init__()
        self.first, self.more = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(width))

    def forward(self, x):
        return x @ self.first + self.more.sum()


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    started(plain(Hidden(2)), tmp_path / "run.pt")
    learner = plain(Hidden(5))
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit this run"):
        train_loop(learner, make_data(), checkpoint=tmp_path / "run.pt", **FEW)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())


@pytest.mark.parametrize("make", [plain, online])
def test_a_callback_that_switches_to_eval_mode_changes_no_number(make):
    def run(callback):
        torch.manual_seed(0)
        model, _, _ = make_parts()
        return train_loop(make(model), make_data(), callback=callback, **FEW).drop(columns="seconds")

    pd.testing.assert_frame_equal(run(lambda step, model, loss: model.eval()), run(None), check_exact=True)


def test_two_of_a_stack_with_one_seed_have_their_histories_below_each_other():
    learner = Stacked([plain(small(0)), plain(small(1))])
    history = train_loop(learner, make_data(), **{**FEW, "seed": [3, 3]})
    assert history.step.tolist() == [0, 2, 4, 6] * 2
    alone = train_loop(plain(small(1)), make_data(), **FEW)
    assert history.test_loss[4:].tolist() == pytest.approx(alone.test_loss.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": "3"}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"batch_size": "20"}, "batch_size must be a whole number, got '20'"),
        ({"steps": 12.0}, "steps must be a whole number, got 12.0"),
        ({"steps": math.nan}, "steps must be a whole number, got nan"),
        ({"steps": None}, "steps must be a whole number, got None"),
        ({"scheduler": "cosine"}, "scheduler must be one of torch's"),
        ({"callback": 3}, "callback must be a function, got int"),
        ({"augment": 3}, "augment must be a function, got int"),
    ],
)
def test_arguments_of_another_type_are_refused_by_name(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train_loop(plain(small()), make_data(), **{**FEW, **options})
