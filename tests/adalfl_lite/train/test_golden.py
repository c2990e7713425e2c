"""Runs begun by an earlier edition are taken up: checkpoints that were committed, and the histories they must end with.

The files were written once, at step 20 of 40, by the edition whose format they keep; they are never written again.
"""

import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from adalfl_lite import LossNetwork, load_dataset
from adalfl_lite.losses.dynamical import DynamicalLoss
from tests.shorthand import fit, fit_seeds

GOLDEN = Path(__file__).parent / "golden"
SETTINGS = {"steps": 40, "batch_size": 20, "evaluate_every": 20, "progress": False}
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def make_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def make_loss(seed: int = 1) -> LossNetwork:
    return LossNetwork.classification(hidden=(6, 6), generator=torch.Generator().manual_seed(seed))


def online_loss(**options) -> pd.DataFrame:
    model = make_model(0)
    how = {"online": True, "meta_learning_rate": 1e-3, "meta_batches": "next", "engine": "shared"}
    optimizer = SGD(model.parameters())
    return fit(model, make_loss(), load_dataset("iris"), optimizer=optimizer, clip_gradient_norm=2.0, **how, **options)


def plain(**options) -> pd.DataFrame:
    model = make_model(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss = DynamicalLoss(3, amplitude=5.0, period=4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 30])
    return fit(model, loss, load_dataset("iris"), optimizer=optimizer, scheduler=scheduler, **options)


def online_learning_rate(**options) -> pd.DataFrame:
    model = make_model(0)
    how = {"online": True, "learn": "learning_rate", "meta_learning_rate": 1e-2, "meta_batches": "train"}
    return fit(model, F.cross_entropy, load_dataset("iris"), optimizer=SGD(model.parameters()), **how, **options)


def stacked(seed: int, **options) -> pd.DataFrame:
    models, losses = [make_model(i) for i in range(2)], [make_loss(i) for i in range(2)]
    how = {"make_optimizer": SGD, "seeds": [seed, seed + 1], "online": True, "meta_learning_rate": 1e-3}
    return fit_seeds(models, losses, load_dataset("iris"), **how, **options)


@pytest.mark.parametrize("run", [online_loss, plain, online_learning_rate, stacked], ids=lambda run: run.__name__)
def test_an_old_checkpoint_is_taken_up(run, tmp_path):
    checkpoint = shutil.copy(GOLDEN / f"{run.__name__}.checkpoint", tmp_path)
    history = run(seed=3, checkpoint=checkpoint, **SETTINGS)
    wanted = pd.read_json(GOLDEN / f"{run.__name__}.json")
    assert history.seconds.iloc[-1] > 0
    found = history[wanted.columns]
    exact = ["step", "valid_error", "test_error"]
    pd.testing.assert_frame_equal(found[exact], wanted[exact], check_dtype=False, rtol=0, atol=1e-6)
    pd.testing.assert_frame_equal(found, wanted, check_dtype=False, rtol=1e-4)
    assert torch.load(checkpoint, weights_only=True)["history"][-1]["step"] == 40
