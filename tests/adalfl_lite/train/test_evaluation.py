"""Errors are counted: equal counts are equal errors, whatever the batches; and stored sums are brought to that."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from adalfl_lite import evaluate
from adalfl_lite.compare import final_errors, tied
from adalfl_lite.data import Split

ROWS = 360


def split_with(wrong, seed=0):
    """Logits of which so many, in random places, are of another class than the target."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (ROWS,), generator=generator)
    rows = torch.randperm(ROWS, generator=generator)[:wrong]
    said = targets.clone()
    said[rows] = (said[rows] + 1) % 10
    return Split(nn.functional.one_hot(said, 10).float(), targets, torch.arange(ROWS))


@pytest.mark.parametrize("wrong", [0, 1, 7, 119, 359, 360])
def test_an_error_rate_is_a_count_over_a_count_whatever_the_batches(wrong):
    for batch_size in (1, 7, 100, 1000):
        error, _ = evaluate(nn.Identity(), split_with(wrong), "classification", batch_size)
        assert error == wrong / ROWS  # to the last bit


def test_a_squared_error_is_put_together_in_double_precision():
    inputs = torch.linspace(-3, 3, ROWS)[:, None]
    split = Split(inputs, torch.zeros(ROWS, 1), torch.arange(ROWS))
    expected = inputs.double().square().mean().item()
    for batch_size in (1, 7, 100):
        assert evaluate(nn.Identity(), split, "regression", batch_size) == pytest.approx((expected, expected), rel=1e-7)


def test_sums_of_float32_of_equal_counts_become_ties():
    batches = [torch.full((100,), 1.0)[:size] for size in (100, 100, 100, 60)]
    counts = [(2, 0, 3, 2), (0, 2, 2, 3)]  # 7 of 360 wrong, in two orders
    sums = [
        sum((torch.tensor(float(k)) / len(b)).item() * len(b) for k, b in zip(of, batches, strict=True)) / ROWS
        for of in counts
    ]
    assert sums[0] != sums[1]  # as older results have them
    rows = pd.DataFrame({"task": "t", "method": ["a", "b"], "seed": 0, "step": 1, "test_error": sums})
    found = final_errors(tied(rows)).test_error
    assert found[0] == found[1] == pytest.approx(7 / ROWS, abs=1e-6)
    assert np.array_equal(rows.test_error, sums)  # the table that was given is as it was


def test_a_row_that_is_no_number_is_wrong_whatever_its_class():
    split = split_with(0)
    split.inputs[:90] = np.nan
    error, loss = evaluate(nn.Identity(), split, "classification")
    assert error == 90 / ROWS and np.isnan(loss)
