"""The recorder: what it keeps, and that training does not notice it."""

import copy
import doctest
import time
from dataclasses import dataclass

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis.recorder
from adalfl_lite.data.dataset import load_dataset
from adalfl_lite.losses.network import LossNetwork
from analysis.early_stopping import push_and_gap
from analysis.effective_lr import effective_learning_rate
from analysis.label_smoothing import implied_label_smoothing
from analysis.recorder import Recorder
from tests.shorthand import fit


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))


def learned_loss():
    return LossNetwork.classification(generator=torch.Generator().manual_seed(3))


def examples(n=20):
    torch.manual_seed(1)
    return torch.randn(n, 4), torch.randint(3, (n,))


def careless(model, loss):
    """A diagnostic that leaves everything in disorder."""
    model.eval()
    x, y = examples()  # seeds torch
    loss(model.train()(x), y).backward()
    with torch.no_grad():
        for parameter in [*model.parameters(), *loss.parameters()]:
            parameter.zero_()
            parameter.requires_grad_(False)
    return {"zero": 0.0}


@pytest.mark.parametrize("graded", [False, True])
def test_everything_is_put_back_whatever_a_diagnostic_does(unchanged, graded):
    model, loss = classifier().train(), learned_loss()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    if graded:
        for parameter in [*model.parameters(), *loss.parameters()]:
            parameter.grad = torch.ones_like(parameter)
    recorder = Recorder(careless=careless)
    with unchanged(model, loss):
        recorder(0, model, loss)
    with unchanged(model, loss):
        recorder.replay(model, loss, [(5, model.state_dict(), loss.state_dict())])
    assert recorder.frame().step.tolist() == [0, 5]


def test_a_run_is_the_same_with_and_without():
    data = load_dataset("iris", seed=0)
    batch = data.train[:]
    recorder = Recorder(
        careless=careless,
        whole=lambda model, loss: effective_learning_rate(model, loss, F.cross_entropy, batch),
        layers=lambda model, loss: effective_learning_rate(model, loss, F.cross_entropy, batch, by_layer=True),
    )
    runs = []
    for callback in (None, recorder):
        model, loss = classifier(), learned_loss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"steps": 30, "batch_size": 20, "evaluate_every": 10, "online": True, "meta_learning_rate": 1e-3}
        history = fit(model, loss, data, optimizer=optimizer, callback=callback, progress=False, **options)
        runs.append((history.drop(columns="seconds"), model.state_dict(), loss.state_dict()))
    (history, model, loss), (other_history, other_model, other_loss) = runs
    pd.testing.assert_frame_equal(history, other_history)
    for state, other in ((model, other_model), (loss, other_loss)):
        assert all(torch.equal(value, other[name]) for name, value in state.items())
    frame = recorder.frame("whole")
    assert frame.step.tolist() == [0, 10, 20, 30] == history.step.tolist() and frame.scale.is_unique


def test_the_tables():
    @dataclass
    class Pair:
        norm: float
        count: int

    model = nn.Linear(2, 1)
    recorder = Recorder(
        mapping=lambda model, loss: {"bias": model.bias, "kind": "linear"},
        series=lambda model, loss: pd.Series({"norm": 3.0}),
        pair=lambda model, loss: Pair(1.5, 2),
        rows=lambda model, loss: pd.DataFrame({"layer": ["a", "b"], "norm": [1.0, 2.0]}, index=[7, 7]),
    )
    for step in (0, 4):
        nn.init.constant_(model.bias, step)
        recorder(step, model, F.mse_loss)
    assert recorder.frame("mapping").to_dict("list") == {"step": [0, 4], "bias": [0, 4], "kind": ["linear"] * 2}
    assert recorder.frame("series").to_dict("list") == {"step": [0, 4], "norm": [3, 3]}
    assert recorder.frame("pair").to_dict("list") == {"step": [0, 4], "norm": [1.5, 1.5], "count": [2, 2]}
    rows = recorder.frame("rows")
    assert rows.to_dict("list") == {"step": [0, 0, 4, 4], "layer": list("abab"), "norm": [1, 2, 1, 2]}
    assert rows.index.tolist() == [0, 1, 2, 3]
    every = recorder.frame()
    assert list(every)[:2] == ["step", "diagnostic"] and len(every) == 2 + 2 + 2 + 4
    for name in recorder.diagnostics:
        part = every[every.diagnostic == name].drop(columns="diagnostic").reset_index(drop=True)
        own = recorder.frame(name)
        pd.testing.assert_frame_equal(part[list(own)], own, check_dtype=False)
        assert part.drop(columns=list(own)).isna().all(axis=None)


def test_a_diagnostics_own_table_is_not_touched():
    table = pd.DataFrame({"norm": [1.0]})
    recorder = Recorder(table=lambda model, loss: table)
    recorder(0, nn.Linear(1, 1), F.mse_loss)
    recorder(1, nn.Linear(1, 1), F.mse_loss)
    assert list(table) == ["norm"]


def test_the_interval():
    def steps(every, calls):
        recorder = Recorder(one=lambda model, loss: {"value": 1}, every=every)
        for step in calls:
            recorder(step, nn.Linear(1, 1), F.mse_loss)
        return recorder.frame().step.tolist()

    assert steps(1, range(3)) == [0, 1, 2]
    assert steps(10, range(35)) == [0, 10, 20, 30]
    assert steps(100, range(30, 300, 30)) == [30, 150, 270]  # never sooner than every


def test_seconds_and_share_are_those_of_the_diagnostics(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(model, loss):
        now[0] += 2.0
        return {"value": 1}

    recorder = Recorder(slow=slow, every=2)
    assert recorder.share == 0
    for step in range(5):  # records at 0, 2 and 4; the training between two calls takes 3 seconds
        recorder(step, nn.Linear(1, 1), F.mse_loss)
        now[0] += 3.0
    assert recorder.seconds == 6 and recorder.share == pytest.approx(6 / (3 * 2 + 4 * 3))


def test_checkpoints_give_what_the_run_gave():
    batch = examples()
    diagnostics = {
        "whole": lambda model, loss: effective_learning_rate(model, loss, F.cross_entropy, batch),
        "smoothing": lambda model, loss: implied_label_smoothing(model, loss, batch),
        "push": lambda model, loss: push_and_gap(model, loss, F.cross_entropy, batch, batch),
    }
    model, loss, live, checkpoints = classifier().double(), learned_loss().double(), Recorder(**diagnostics), []
    batch = (batch[0].double(), batch[1])
    start = copy.deepcopy((model, loss))
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    for step in range(3):
        torch.manual_seed(step)
        live(step, model, loss)
        checkpoints.append(copy.deepcopy((step, model.state_dict(), loss.state_dict())))
        optimizer.zero_grad()
        loss(model(batch[0]), batch[1]).backward()
        optimizer.step()

    def seeded():
        for checkpoint in checkpoints:
            torch.manual_seed(checkpoint[0])  # of the dropout masks
            yield checkpoint

    pd.testing.assert_frame_equal(Recorder(**diagnostics).replay(*start, seeded()).frame(), live.frame(), rtol=1e-12)
    alone = Recorder(**diagnostics).replay(start[0], F.cross_entropy, [c[:2] for c in checkpoints]).frame()
    assert alone.query("diagnostic == 'whole'").scale.tolist() == pytest.approx([1] * 3)


def test_bad_input_is_named():
    model, fine = nn.Linear(2, 1), {"fine": lambda model, loss: {"value": 1.0}}
    with pytest.raises(ValueError, match="nothing to record"):
        Recorder()
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Recorder(**fine, every=0)
    with pytest.raises(ValueError, match="nothing is recorded yet"):
        Recorder(**fine).frame()
    with pytest.raises(ValueError, match="'norm'; there are fine"):
        Recorder(**fine).frame("norm")
    with pytest.raises(ValueError, match="no checkpoints"):
        Recorder(**fine).replay(model, F.mse_loss, [])
    with pytest.raises(ValueError, match="step 3 does not fit"):
        Recorder(**fine).replay(model, F.mse_loss, [(3, nn.Linear(3, 1).state_dict())])
    with pytest.raises(ValueError, match="step 3 does not fit"):
        Recorder(**fine).replay(model, F.mse_loss, [(3, model.state_dict(), {})])
    recorder = Recorder(**fine)
    recorder(5, model, F.mse_loss)
    with pytest.raises(ValueError, match="step 0 after step 5"):
        recorder(0, model, F.mse_loss)
    for result, message in [
        (3.0, "'bad' gave a float"),
        ({"weight": torch.ones(2)}, "'weight' is a tensor of 2"),
        ({"step": 1}, "column 'step'"),
    ]:
        recorder = Recorder(**fine, bad=lambda model, loss, result=result: result)
        with pytest.raises(ValueError, match=message):
            recorder(0, model, F.mse_loss)
        with pytest.raises(ValueError, match="nothing is recorded yet"):
            recorder.frame()


def test_docstring_examples():
    assert doctest.testmod(analysis.recorder).failed == 0
