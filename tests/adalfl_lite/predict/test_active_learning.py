"""Active learning: rounds that differ in nothing but what they label, and never look at the labels they do not have."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from adalfl_lite.data.dataset import load_dataset
from adalfl_lite.predict import active_learning as module
from adalfl_lite.predict.active_learning import STRATEGIES, active_learning
from adalfl_lite.predict.keypoints import HeatmapNet, figures_dataset
from adalfl_lite.predict.loss_prediction import PAIR_LOSSES, ConvLossModule, predict_losses

DIABETES = load_dataset("diabetes", seed=0)
OPTIONS = {"rounds": 3, "first": 20, "added": 30, "steps": 10, "members": 2}


@pytest.fixture(scope="module")
def histories():
    return {strategy: active_learning(DIABETES, strategy, **OPTIONS) for strategy in STRATEGIES}


def test_every_strategy_starts_alike_labels_as_many_and_goes_its_own_way(histories):
    for strategy, history in histories.items():
        assert history.labelled.tolist() == [20, 50, 80] and history["round"].tolist() == [0, 1, 2]
        assert set(history.strategy) == {strategy} and set(history.seed) == {0}
    assert len({history.test_error[0] for history in histories.values()}) == 1
    assert len({history.test_error[2] for history in histories.values()}) == len(STRATEGIES)


def test_runs_repeat_and_seeds_differ(histories):
    again = active_learning(DIABETES, "ensemble", **OPTIONS)
    pd.testing.assert_frame_equal(again, histories["ensemble"], check_exact=True)
    other = active_learning(DIABETES, "ensemble", **{**OPTIONS, "rounds": 1}, seed=1)
    assert other.test_error[0] != again.test_error[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_labels_that_were_not_asked_for_are_not_seen(histories, strategy, monkeypatch):
    """Poison every label that is not chosen: nothing changes."""
    seen = set()
    spy = module.train_with_loss_module

    def record(model, loss_module, layers, inputs, targets, **options):
        seen.update(map(tuple, inputs.tolist()))
        return spy(model, loss_module, layers, inputs, targets, **options)

    monkeypatch.setattr(module, "train_with_loss_module", record)
    active_learning(DIABETES, strategy, **OPTIONS)
    known = torch.tensor([tuple(row) in seen for row in DIABETES.train.inputs.tolist()])
    assert known.sum() == 80
    targets = torch.where(known[:, None], DIABETES.train.targets, 1e6)
    poisoned = replace(DIABETES, train=replace(DIABETES.train, targets=targets))
    found = active_learning(poisoned, strategy, **OPTIONS)
    pd.testing.assert_frame_equal(found, histories[strategy], check_exact=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_strategies_choose_what_they_say(strategy, monkeypatch):
    """The rows chosen have the highest score among those that were unlabelled, and the score is the strategy's."""
    calls, trained, losses = [], [], []
    select, train = module.select_batch, module.train_with_loss_module
    monkeypatch.setattr(module, "select_batch", lambda *a, **k: calls.append((a, select(*a, **k))) or calls[-1][1])

    def keep(model, loss_module, layers, *arguments, pair_loss, **options):
        train(model, loss_module, layers, *arguments, pair_loss=pair_loss, **options)
        trained.append((model, loss_module, layers))
        losses.append(pair_loss)

    monkeypatch.setattr(module, "train_with_loss_module", keep)
    active_learning(DIABETES, strategy, **OPTIONS)
    members, inputs = OPTIONS["members"] if strategy == "ensemble" else 1, DIABETES.train.inputs
    assert len(trained) == 2 * members + 1  # the last round asks for no score
    if strategy in PAIR_LOSSES:
        assert set(losses) == {PAIR_LOSSES[strategy]}
    labelled = set()
    for number, ((scores, unlabelled, count), chosen) in enumerate(calls):
        assert count == 30 and not labelled & set(unlabelled.tolist())
        rest = unlabelled[~torch.isin(unlabelled, chosen)]
        assert scores[chosen].min() >= scores[rest].max()
        labelled |= set(chosen.tolist())
        of_round = trained[number * members : (number + 1) * members]
        if strategy == "ensemble":
            first, second = (model(inputs).detach() for model, *_ in of_round)
            torch.testing.assert_close(scores, ((first - second) ** 2 / 2).mean(1))
        elif strategy != "random":
            torch.testing.assert_close(scores, predict_losses(*of_round[0], inputs))
    assert len(calls) == 2 and len(labelled) == 60


def test_figures_are_learned_actively_with_a_module_and_measures_of_ones_own():
    data = figures_dataset(60, 1, 20)
    made = []

    def make_module(features):
        made.append(ConvLossModule(features, width=4))
        return made[-1]

    def record(model, labelled):
        return {"counted": len(labelled), "outputs": model(data.test.inputs[:1]).numel()}

    history = active_learning(
        data,
        "learning-loss++",
        model=lambda: HeatmapNet(width=2),
        module=make_module,
        rounds=2,
        first=10,
        added=5,
        steps=2,
        batch_size=4,
        record=record,
    )
    assert history.counted.tolist() == history.labelled.tolist() == [10, 15]
    assert set(history.outputs) == {data.outputs} and len(made) == 2


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match=r"strategy must be one of random, learning-loss, .* got 'best'"):
        active_learning(DIABETES, "best")
    with pytest.raises(ValueError, match="for regression; iris is classification"):
        active_learning(load_dataset("iris"), "random")
    with pytest.raises(ValueError, match="members must be at least 2, got 1"):
        active_learning(DIABETES, "ensemble", **{**OPTIONS, "members": 1})
    with pytest.raises(ValueError, match=r"cannot label 100 \+ 4 x 100 rows of 266"):
        active_learning(DIABETES, "random")
