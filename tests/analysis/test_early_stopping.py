"""Early stopping on runs whose stopping point is known, and the push against plain autograd."""

import copy
import doctest
import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

import analysis.early_stopping
from adalfl_lite.losses.network import LossNetwork
from analysis.early_stopping import plot_early_stopping, push_and_gap, relative_push, stopping_point
from analysis.recorder import Recorder


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4)).double()


def examples(seed, n=30):
    torch.manual_seed(seed)
    return torch.randn(n, 5, dtype=torch.float64), torch.randint(4, (n,))


def learned_loss():
    return LossNetwork.classification(generator=torch.Generator().manual_seed(3)).double()


def run(scale, **columns):
    steps = [10 * i for i in range(len(scale))]
    train = [1.0 / (1 + i) for i in range(len(scale))]
    return pd.DataFrame({"step": steps, "scale": scale, "train_loss": train, "valid_loss": 0.9, **columns})


def test_push_and_gap_against_plain_autograd():
    model, (x, y), (u, v), loss = classifier().eval(), examples(1), examples(2), learned_loss()
    train, valid = [(x[:8], y[:8]), (x[8:], y[8:])], [(u[:20], v[:20]), (u[20:], v[20:])]
    found = push_and_gap(model, loss, F.cross_entropy, train, valid)
    gradients = []
    for function in (loss, F.cross_entropy):
        twin = copy.deepcopy(model)
        function(twin(x), y).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    m, t = gradients
    by_hand = {
        "scale": (m @ t / (t @ t)).item(),
        "gradient_norm": m.norm().item(),
        "task_gradient_norm": t.norm().item(),
        "train_loss": F.cross_entropy(model(x), y).item(),
        "valid_loss": F.cross_entropy(model(u), v).item(),
    }
    by_hand["gap"] = by_hand["valid_loss"] - by_hand["train_loss"]
    assert found == pytest.approx(by_hand, rel=1e-10)


def test_task_losses_are_those_of_eval_mode():
    model, train, valid = classifier().train(), examples(1), examples(2)
    found = push_and_gap(model, learned_loss(), F.cross_entropy, train, valid)
    settled = copy.deepcopy(model).eval()
    assert found["valid_loss"] == pytest.approx(F.cross_entropy(settled(valid[0]), valid[1]).item(), rel=1e-12)


def test_the_stop_is_for_good():
    # below at step 10, back above at 20, below from 30 on; sign does not matter, order of the rows neither
    frame = run([2.0, 0.1, -1.0, 0.15, 0.0, -0.1], valid_loss=[0.9, 0.8, 0.7, 0.75, 0.8, 0.9])
    found = stopping_point(frame.sample(frac=1, random_state=0), threshold=0.1)
    assert (found.step, found.best_step) == (30, 20)
    assert (found.valid_loss, found.best_valid_loss, found.final_valid_loss) == (0.75, 0.7, 0.9)
    assert found.gap == pytest.approx(0.75 - 1 / 4) and found.final_gap == pytest.approx(0.9 - 1 / 6)
    assert found.remaining == pytest.approx(0.05)
    assert stopping_point(frame, threshold=0.6).step == 10
    assert stopping_point(frame, threshold=0.02).step is None


def test_a_loss_that_pushes_to_the_end_does_not_stop():
    found = stopping_point(run([1.0, 0.01, 0.1]))  # at the threshold is not below it
    assert found.step is None and math.isnan(found.valid_loss) and math.isnan(found.gap)
    assert found.remaining == pytest.approx(0.1) and found.final_gap == pytest.approx(0.9 - 1 / 3)


def test_relative_push_is_indexed_by_step():
    push = relative_push(run([2.0, -4.0, 1.0])[::-1])
    assert push.index.tolist() == [0, 10, 20] and push.tolist() == [0.5, 1, 0.25]


def test_a_loss_that_is_switched_off_is_seen_to_stop():
    """Cross-entropy that vanishes after step 60: recorded while training, the stop is found there."""
    model, train, valid = classifier().eval(), examples(1), examples(2)
    recorder = Recorder(push=lambda m, loss: push_and_gap(m, loss, F.cross_entropy, train, valid), every=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(101):
        loss = F.cross_entropy if step < 60 else lambda p, y: 0.001 * F.cross_entropy(p, y)
        recorder(step, model, loss)
        optimizer.zero_grad()
        loss(model(train[0]), train[1]).backward()
        optimizer.step()
    frame = recorder.frame("push")
    assert stopping_point(frame).step == 60
    # the gradient of a loss that never stops also falls, but not this far, and c stays at one
    assert frame[frame.step < 60]["scale"].tolist() == pytest.approx([1] * 6)
    assert frame.train_loss.iloc[-1] == pytest.approx(frame.train_loss.iloc[6], rel=0.01)


def test_the_model_and_the_loss_are_left_as_they_were(unchanged):
    model, loss, train, valid = classifier().train(), learned_loss(), examples(1), examples(2)
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model, loss), torch.no_grad():
        push_and_gap(model, loss, F.cross_entropy, train, valid)


def test_frames_are_left_as_they_were():
    frame = run([1.0, 0.5, 0.01])[::-1]
    before = frame.copy()
    for function in (relative_push, stopping_point, plot_early_stopping):
        function(frame)
    plt.close("all")
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (run([1.0, 0.5]).drop(columns="scale"), "lacks the column scale"),
        (run([1.0, 0.5])[:0], "no rows"),
        (run([1.0, math.nan]), "scale holds NaN"),
        (run([1.0, 0.5], valid_loss=[1.0, math.inf]), "valid_loss holds NaN or infinity"),
        (run([0.0, 0.0]), "never pushed"),
        (pd.concat([run([1.0]), run([1.0])]), "select one run"),
    ],
)
def test_bad_frames_are_named(frame, message):
    with pytest.raises(ValueError, match=message):
        stopping_point(frame)
    with pytest.raises(ValueError, match=message):
        plot_early_stopping(frame)


def test_bad_input_is_named():
    model, (x, y), valid = classifier(), examples(1), examples(2)
    with pytest.raises(ValueError, match="got 10"):
        stopping_point(run([1.0]), threshold=10)
    with pytest.raises(ValueError, match="no data"):
        push_and_gap(model, F.cross_entropy, F.cross_entropy, (x, y), [])
    with pytest.raises(ValueError, match="NaN"):
        push_and_gap(model, F.cross_entropy, F.cross_entropy, (x, y), (x / 0, y))
    with pytest.raises(ValueError, match="finite scalar"):
        push_and_gap(model, F.cross_entropy, lambda p, y: p.sum(1), (x, y), valid)


def test_push_and_losses_share_a_figure():
    frame = run([2.0, 1.0, 0.1, 0.1], gradient_norm=[1.0, 4.0, 2.0, 1.0], valid_loss=[1.0, 0.7, 0.6, 0.8])
    figure, axes = plt.subplots(2, 1)
    upper, lower = plot_early_stopping(frame, tuple(axes))
    assert (upper, lower) == tuple(axes)
    assert upper.lines[0].get_ydata().tolist() == pytest.approx([1, 0.5, 0.05, 0.05])
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["c", "‖∇M‖"]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == ["train", "validation"]
    np.testing.assert_allclose(lower.lines[1].get_ydata(), frame.valid_loss)
    assert all(any(list(line.get_xdata()) == [20, 20] for line in ax.lines) for ax in axes)
    assert lower.get_yscale() == "log"
    plt.close(figure)
    plt.close(plot_early_stopping(frame.assign(scale=[2.0, np.nan, 0.1, 0.1]), by="gradient_norm")[0].figure)
    upper, lower = plot_early_stopping(frame.assign(train_loss=-1.0), by="gradient_norm")
    assert lower.get_yscale() == "linear" and len(upper.figure.axes) == 2
    plt.close(upper.figure)


def test_docstring_examples():
    assert doctest.testmod(analysis.early_stopping).failed == 0
    plt.close("all")
