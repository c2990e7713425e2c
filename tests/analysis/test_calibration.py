"""Calibration errors and proper scores against hand computations in numpy, float64."""

import doctest

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

import analysis.calibration
from analysis.calibration import calibration_scores, fit_temperature, plot_reliability, predictions, reliability_table


@pytest.fixture(autouse=True)
def fresh_figures():
    yield
    plt.close("all")


def problem(n=400, classes=4, scale=3.0, seed=0):
    """Logits of an overconfident classifier: targets drawn from softmax(logits / scale)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64) * scale
    return logits, (logits / scale).softmax(1).multinomial(1, generator=generator)[:, 0]


def confidence_and_correct(logits, targets):
    z = np.exp(logits.double().numpy())
    p = z / z.sum(1, keepdims=True)
    return p.max(1), p.argmax(1) == targets.numpy()


def gaps(logits, targets, bins):
    """By hand: (share of the examples, |accuracy − confidence|) of every bin of equal width that is not empty."""
    confidence, correct = confidence_and_correct(logits, targets)
    found = []
    for b in range(bins):
        last = b == bins - 1
        inside = (confidence >= b / bins) & ((confidence <= 1) if last else (confidence < (b + 1) / bins))
        if inside.any():
            found.append((inside.mean(), abs(correct[inside].mean() - confidence[inside].mean())))
    return np.array(found).T


def test_docstring_examples():
    assert doctest.testmod(analysis.calibration).failed == 0


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_errors_are_those_by_hand(bins):
    data = problem()
    share, gap = gaps(*data, bins)
    scores, table = calibration_scores(*data, bins), reliability_table(*data, bins)
    assert scores.ece == pytest.approx((share * gap).sum(), abs=1e-14) == (table.fraction * table.gap.abs()).sum()
    assert scores.mce == pytest.approx(gap.max(), abs=1e-14) == table.gap.abs().max()
    assert 0.05 < scores.ece < scores.mce or bins == 1
    assert scores.confidence > scores.accuracy + 0.1  # as the problem was made


def test_ece_is_torchmetrics_of_several_classes_within_float32():
    logits, targets = problem()
    expected = multiclass_calibration_error(logits, targets, num_classes=4, n_bins=15)
    assert calibration_scores(logits, targets).ece == pytest.approx(expected.item(), abs=1e-6)


def test_logits_within_0_and_1_are_still_logits():
    logits, targets = (
        torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        problem(50, 3)[1],
    )
    share, gap = gaps(logits, targets, 15)
    assert calibration_scores(logits, targets).ece == pytest.approx((share * gap).sum(), abs=1e-14)


def test_confidences_of_exactly_1_belong_to_the_last_bin():
    # one right at confidence 1, one wrong at .95: together accuracy .5 against .975; apart they would give ECE .475
    logits = torch.tensor([[200.0, 0.0], [np.log(0.95 / 0.05), 0.0]], dtype=torch.float64)
    scores = calibration_scores(logits, torch.tensor([0, 1]), bins=10)
    assert scores.ece == pytest.approx(0.475, abs=1e-12) == scores.mce
    reversed_ = calibration_scores(logits, torch.tensor([1, 0]), bins=10)  # gaps of −1 and +.05: apart, ECE is .525
    assert reversed_.ece == pytest.approx(0.475, abs=1e-12)
    assert reliability_table(logits, torch.tensor([1, 0]), 10)["count"].tolist() == [0] * 9 + [2]


def test_proper_scores_are_those_by_hand():
    logits, targets = problem()
    z, y = logits.numpy(), targets.numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    scores = calibration_scores(logits, targets)
    assert scores.nll == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean(), rel=1e-13)
    assert scores.brier == pytest.approx(((p - np.eye(4)[y]) ** 2).sum(1).mean(), rel=1e-13)
    assert scores.accuracy == (p.argmax(1) == y).mean() and scores.examples == 400
    sure = calibration_scores(torch.eye(2) * 1e4, torch.tensor([1, 0]))  # certain, and always wrong
    assert (sure.brier, sure.ece, sure.mce, sure.accuracy, sure.nll) == pytest.approx((2, 1, 1, 0, 1e4))


def test_calibrated_predictions_have_little_error():
    logits, targets = problem(40_000, scale=1.0)
    scores = calibration_scores(logits, targets)
    assert scores.ece < 0.01 and scores.adaptive_ece < 0.01


def test_table_of_equal_widths():
    logits, targets = problem(60)
    table = reliability_table(logits, targets, bins=8)
    confidence, correct = confidence_and_correct(logits, targets)
    assert table.low.tolist() == pytest.approx([b / 8 for b in range(8)]) and table.high.iloc[-1] == 1
    assert table["count"].sum() == 60 and table.fraction.sum() == pytest.approx(1)
    assert table["count"].tolist() == np.histogram(confidence, 8, (0, 1))[0].tolist()
    row = table.iloc[-1]
    inside = confidence >= 7 / 8
    expected = [confidence[inside].mean(), correct[inside].mean(), correct[inside].mean() - confidence[inside].mean()]
    assert row[["confidence", "accuracy", "gap"]].tolist() == pytest.approx(expected, rel=1e-13)
    empty = table[table["count"] == 0]
    assert len(empty) and empty[["confidence", "accuracy", "gap"]].isna().all(axis=None)


def test_adaptive_bins_hold_equally_many():
    logits, targets = problem(120)
    table = reliability_table(logits, targets, bins=10, adaptive=True)
    assert table["count"].tolist() == [12] * 10
    confidence, correct = confidence_and_correct(logits, targets)
    order = np.argsort(confidence)
    by_hand = [abs(correct[part].mean() - confidence[part].mean()) for part in np.split(order, 10)]
    assert table.gap.abs().tolist() == pytest.approx(by_hand, abs=1e-13)
    assert calibration_scores(logits, targets, 10).adaptive_ece == pytest.approx(np.mean(by_hand), abs=1e-13)


def test_ties_stay_in_one_bin_whatever_the_order():
    logits, targets = problem(100)
    logits = torch.cat([torch.tensor([[300.0, 0, 0, 0]]).repeat(60, 1), logits])
    targets = torch.cat([torch.arange(60) % 2, targets])
    table = reliability_table(logits, targets, bins=10, adaptive=True)
    assert table["count"].iloc[-1] >= 60 and table["count"].sum() == 160
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    pd.testing.assert_frame_equal(reliability_table(logits[order], targets[order], 10, adaptive=True), table)
    same = reliability_table(torch.zeros(5, 4), torch.tensor([0, 0, 0, 1, 2]), adaptive=True)
    assert same[["count", "confidence", "accuracy"]].values.tolist() == [[5, 0.25, 0.6]]


def test_temperature_is_the_minimum_of_the_cross_entropy():
    logits, targets = problem(4000)
    temperature = fit_temperature(logits, targets)
    found = minimize_scalar(lambda t: F.cross_entropy(logits / t, targets).item(), bounds=(1, 9), method="bounded")
    assert temperature == pytest.approx(found.x, rel=1e-4)
    assert temperature == pytest.approx(3, rel=0.1)  # as the problem was made
    assert fit_temperature(logits / 1000, targets) == pytest.approx(temperature / 1000, rel=1e-9)
    assert calibration_scores(logits / temperature, targets).ece < calibration_scores(logits, targets).ece / 3


def test_a_temperature_that_is_none():
    with pytest.raises(ValueError, match="every prediction is right"):
        fit_temperature(torch.eye(3), torch.arange(3))
    with pytest.raises(ValueError, match="no more than constant"):
        fit_temperature(torch.zeros(3, 3), torch.arange(3))
    with pytest.raises(ValueError, match="no more than constant"):
        fit_temperature(-torch.eye(3), torch.arange(3))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()


def batches():
    torch.manual_seed(1)
    return [(torch.randn(n, 5), torch.randint(3, (n,))) for n in (7, 7, 3)]


def test_predictions_are_those_of_the_model_in_eval_mode():
    model, data = network(), batches()
    logits, targets = predictions(model, data)
    assert torch.equal(targets, torch.cat([y for _, y in data])) and not logits.requires_grad
    assert torch.equal(predictions(model, data[0])[0], logits[:7])
    model.eval()
    torch.testing.assert_close(logits, model(torch.cat([x for x, _ in data])), rtol=0, atol=1e-6)
    assert calibration_scores(logits, targets).examples == 17


def test_the_model_is_left_as_it_was(unchanged):
    model, data = network(), batches()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    with unchanged(model):
        logits, targets = predictions(model, data)
        calibration_scores(logits, targets)
        reliability_table(logits, targets, adaptive=True)
        fit_temperature(*problem())
    leaf = problem()[0].requires_grad_()
    before = leaf.detach().clone()
    calibration_scores(leaf, problem()[1])
    assert torch.equal(leaf, before) and leaf.requires_grad and leaf.grad is None


@pytest.mark.parametrize("function", [calibration_scores, reliability_table, fit_temperature])
def test_bad_predictions_are_named(function):
    logits, targets = problem(6)
    with pytest.raises(ValueError, match="first at example 2"):
        function(logits.index_fill(0, torch.tensor(2), float("nan")), targets)
    with pytest.raises(ValueError, match="no examples"):
        function(logits[:0], targets[:0])
    with pytest.raises(ValueError, match=r"\(N, C\) with C >= 2, got torch.float64 \(6, 1\)"):
        function(logits[:, :1], targets)
    with pytest.raises(ValueError, match=r"integers of shape \(6,\); got torch.int64 \(5,\)"):
        function(logits, targets[:5])
    with pytest.raises(ValueError, match="got torch.float64"):
        function(logits, targets.double())
    with pytest.raises(ValueError, match="to 4, but the logits are of 4 classes"):
        function(logits, targets.clamp(min=4))
    if function is not fit_temperature:
        with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
            function(logits, targets, bins=0)


def test_bad_data_is_named():
    with pytest.raises(ValueError, match="no data"):
        predictions(network(), [])
    with pytest.raises(ValueError, match="inputs hold NaN"):
        predictions(network(), (torch.full((2, 5), float("nan")), torch.zeros(2).long()))
    broken = network()
    nn.init.constant_(broken[0].weight, float("nan"))
    with pytest.raises(ValueError, match="has the training diverged"):
        predictions(broken, batches())


def test_the_diagram_shows_the_table():
    tables = {"sharp": reliability_table(*problem()), "soft": reliability_table(*problem(seed=1, scale=1.0))}
    ax = plot_reliability(pd.concat(table.assign(method=name) for name, table in tables.items()), hue="method")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Confidence", "Accuracy")
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == [f"{name} (ECE {(t.fraction * t.gap.abs()).sum():.3f})" for name, t in tables.items()]
    for dots, table in zip(ax.collections, tables.values(), strict=True):
        filled = table[table["count"] > 0]
        np.testing.assert_allclose(dots.get_offsets(), filled[["confidence", "accuracy"]])
        assert np.corrcoef(dots.get_sizes(), filled.fraction)[0, 1] == pytest.approx(1)
    figure, other = plt.subplots()
    assert plot_reliability(tables["sharp"], ax=other) is other
    with pytest.raises(ValueError, match="lacks .'seed'"):
        plot_reliability(tables["sharp"], hue="seed")
    with pytest.raises(ValueError, match="no bin"):
        plot_reliability(tables["sharp"].iloc[:0])
