"""Several seeds in one program end where each of them alone would."""

import math

import pytest
import torch
from torch import nn

from adalfl_lite.data import Dataset, Split
from adalfl_lite.ensemble import fit_seeds
from adalfl_lite.losses import LossNetwork, task_loss
from adalfl_lite.training import fit

SEEDS = (3, 5, 8)
OPTIONS = {"steps": 6, "batch_size": 8, "evaluate_every": 3, "progress": False}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def batch_norm():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def convnet():
    norm = nn.BatchNorm2d(4)
    return nn.Sequential(nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 4, (1, 3)), norm, nn.Flatten(), nn.Linear(12, 3))


def make_data(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(5, 3, generator=generator, dtype=torch.float64)
    y = y.argmax(1) if kind == "classification" else y
    parts = [Split(x[a:b], y[a:b], torch.arange(a, b)) for a, b in ((0, 30), (30, 45), (45, 60))]
    return Dataset(f"made-{kind}", kind, *parts, 3, (5,))


def make(build=mlp, kind="classification", **options):
    models, losses = [], []
    for seed in SEEDS:
        torch.manual_seed(seed)
        models.append(build().double())
        losses.append(LossNetwork.default(kind, **options).double())
    return models, losses, [make_data(kind, seed) for seed in SEEDS]


def flat(modules):
    return torch.cat([t.detach().flatten().double() for m in modules for t in m.state_dict().values()])


def assert_as_alone(build, kind, make_optimizer, network=None, learned=True, **options):
    models, losses, data = make(build, kind, **(network or {}))
    together = fit_seeds(
        models, losses if learned else None, data, make_optimizer=make_optimizer, seeds=SEEDS, **options, **OPTIONS
    )
    others, other_losses, _ = make(build, kind, **(network or {}))
    start = flat(others)
    for i, seed in enumerate(SEEDS):
        loss = other_losses[i] if learned else task_loss(kind)
        optimizer = make_optimizer(others[i].parameters())
        history = fit(others[i], loss, data[i], optimizer=optimizer, seed=seed, **options, **OPTIONS)
        rows = together[together.seed == seed].reset_index(drop=True)
        for column in set(rows) - {"seed", "seconds"}:
            assert rows[column].to_numpy() == pytest.approx(history[column].to_numpy(), rel=1e-6, nan_ok=True), column
    torch.testing.assert_close(flat(models), flat(others), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(flat(losses), flat(other_losses), rtol=1e-9, atol=1e-10)
    assert (flat(others) - start).abs().max() > 1e-3


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_online_seeds_are_separate_runs_of_fit(make_optimizer):
    assert_as_alone(mlp, "classification", make_optimizer, online=True, meta_learning_rate=1e-2)


@pytest.mark.parametrize("build", [batch_norm, convnet])
def test_batch_norm_keeps_its_statistics_per_model(build):
    assert_as_alone(build, "classification", OPTIMIZERS["momentum"], online=True, meta_learning_rate=1e-2)


@pytest.mark.parametrize("network", [{}, {"anchored": False, "bias": True, "reduction": "sum", "activation": "relu"}])
def test_regression_anchored_or_not(network):
    options = {"online": True, "meta_learning_rate": 1e-2, "meta_batches": "train"}
    assert_as_alone(mlp, "regression", OPTIMIZERS["SGD"], network, **options)


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("learned", [True, False])
def test_a_frozen_loss_network_or_the_task_loss(kind, learned):
    assert_as_alone(mlp, kind, OPTIMIZERS["momentum"], learned=learned)


def test_one_data_set_may_serve_all():
    models, losses, data = make()
    fit_seeds(models, losses, data[0], make_optimizer=OPTIMIZERS["SGD"], seeds=SEEDS, **OPTIONS)
    others, other_losses, _ = make()
    fit_seeds(others, other_losses, [data[0]] * 3, make_optimizer=OPTIMIZERS["SGD"], seeds=SEEDS, **OPTIONS)
    assert torch.equal(flat(models), flat(others))


def test_the_seed_that_diverges_is_named():
    models, losses, data = make()
    with torch.no_grad():
        models[1][0].weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="a loss of seed 5 was not finite in step 1"):
        fit_seeds(models, losses, data, make_optimizer=OPTIMIZERS["SGD"], seeds=SEEDS, **OPTIONS)


def test_what_cannot_be_stacked_is_refused():
    def refused(error, message, models=None, losses=None, seeds=SEEDS, optimizer=OPTIMIZERS["SGD"], **options):
        ours = make()
        with pytest.raises(error, match=message):
            fit_seeds(
                models or ours[0],
                losses or ours[1],
                ours[2],
                make_optimizer=optimizer,
                seeds=seeds,
                **{**OPTIONS, **options},
            )

    refused(
        ValueError, "give as many of each, at least one: got 3 models, 3 data sets, 2 seeds, 3 losses", seeds=(1, 2)
    )
    refused(ValueError, "the models differ", models=[mlp().double(), mlp().double(), mlp()])
    refused(ValueError, "the losses differ", losses=[LossNetwork("classification", beta=b) for b in (1, 2, 3)])
    dropout = [nn.Sequential(nn.Linear(5, 3), nn.Dropout()) for _ in SEEDS]
    refused(ValueError, "dropout draws other numbers", models=dropout)
    refused(ValueError, "some parameters are frozen", models=[mlp().requires_grad_(False) for _ in SEEDS])
    refused(TypeError, "Linear cannot be stacked", losses=[nn.Linear(2, 1) for _ in SEEDS])
    refused(TypeError, "RMSprop is not known to treat every entry alike", optimizer=torch.optim.RMSprop)
    refused(ValueError, "meta_batches must be 'valid' or 'train', got 'test'", meta_batches="test")
    refused(ValueError, "steps must be at least 1, got 0", steps=0)
