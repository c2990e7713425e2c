"""The chapters on what the learned loss does print what their experiment found, computed here without their code."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adalfl_lite import LossNetwork

RESULTS = Path(__file__).parents[2] / "book" / "results"
METHODS = {
    "learning_rate_scheduling": {
        "handcrafted": "handcrafted",
        "constant": "mean scale",
        "schedule": "schedule",
        "layer schedules": "layer schedules",
        "algorithm 4": "algorithm 4",
        "frozen at 0": "offline",
        "frozen at 1": "frozen, final",
        "online": "online",
    },
    "early_stopping": {
        "handcrafted": "handcrafted",
        "schedule": "schedule",
        "from 0.5 plain": "handed over",
        "from 0.5 scaled": "handed over, scaled",
        "online": "online",
    },
    "label_smoothing": {
        "handcrafted": "handcrafted",
        "smoothing without scale": "smoothing, no scale",
        "scale without smoothing": "scale, no smoothing",
        "constant smoothing": "constant smoothing",
        "smoothing": "scale and smoothing",
        "online": "online",
    },
}


@pytest.fixture(scope="module")
def final() -> pd.DataFrame:
    """The last record of every run."""
    results = pd.read_parquet(RESULTS / "phenomena.parquet")
    records = results[results.kind == "record"].sort_values("step")
    return records.groupby(["task", "variant", "seed"]).tail(1)


@pytest.mark.parametrize("chapter", METHODS)
def test_mean_errors_are_those_of_the_experiment(chapter, final):
    stored = json.loads((RESULTS / f"{chapter}.json").read_text())
    checked = 0
    for (task, variant), rows in final.groupby(["task", "variant"]):
        if (name := f"{task}_{METHODS[chapter].get(variant)}") in stored:
            assert stored[name] == pytest.approx(rows.test_error.mean(), abs=1e-9), name
            checked += 1
    assert checked >= 8


def test_shares_of_the_gain(final):
    stored = json.loads((RESULTS / "learning_rate_scheduling.json").read_text())
    error = final[final.task == "digits"].groupby("variant").test_error.mean()
    expected = (error["handcrafted"] - error["schedule"]) / (error["handcrafted"] - error["online"])
    assert stored["digits_schedule_share"] == pytest.approx(expected)


def test_every_control_has_the_seeds_of_the_run_that_it_controls(final):
    for task, rows in final.groupby("task"):
        seeds = rows.groupby("variant").seed.apply(frozenset)
        assert (seeds == seeds["online"]).all(), task
        assert len(seeds["online"]) >= 3
    for column in ("torch", "python", "device", "commit"):
        assert final[column].notna().all() and (final[column] != "unknown").all(), column


def test_controls_of_scale_and_direction_start_alike(final):
    results = pd.read_parquet(RESULTS / "phenomena.parquet")
    start = results[(results.kind == "record") & (results.step == 0)]
    losses = start.groupby(["task", "seed"]).valid_loss.agg(np.ptp)
    assert (losses < 1e-6).all(), "all variants of a seed begin with the same weights and data"


def test_the_losses_that_the_chapters_start_from_are_there():
    for name in ("digits", "noisy-digits"):
        for seed in range(3):
            assert LossNetwork.load(RESULTS / "phenomena_losses" / f"{name}-seed{seed}.pt").kind == "classification"
