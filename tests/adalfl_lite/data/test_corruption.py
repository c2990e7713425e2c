"""Label noise and imbalance: how much, where, by which seed, and never on the test split."""

import pytest
import torch

from adalfl_lite.compare.tasks import TASKS, get_task
from adalfl_lite.data.corruption import with_imbalance, with_label_noise
from adalfl_lite.data.dataset import load_dataset

DIGITS = load_dataset("digits", seed=0)
SPLITS = ("train", "valid", "test")


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("inputs", "targets", "indices"))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.9])
def test_so_many_labels_become_wrong_and_nothing_else_changes(rate):
    noisy = with_label_noise(DIGITS, rate, seed=1)
    for name in SPLITS:
        before, after = getattr(DIGITS, name), getattr(noisy, name)
        wrong = (before.targets != after.targets).sum().item()
        assert wrong == (0 if name == "test" else round(rate * len(before)))
        assert torch.equal(before.inputs, after.inputs) and torch.equal(before.indices, after.indices)
        assert after.targets.dtype == torch.int64 and set(after.targets.tolist()) <= set(range(10))


def test_wrong_labels_are_uniform_over_the_other_classes():
    noisy = with_label_noise(DIGITS, 0.9, seed=1)
    shift = (noisy.train.targets - DIGITS.train.targets) % 10
    counts = shift[shift > 0].bincount(minlength=10)[1:]
    assert counts.sum() == 972 or counts.sum() == round(0.9 * len(shift))
    expected = counts.sum() / 9
    assert ((counts - expected) ** 2 / expected).sum() < 26.1  # χ², 8 degrees of freedom, p = .001


@pytest.mark.parametrize("ratio", [1.0, 5.0, 100.0])
def test_class_sizes_fall_geometrically_and_rows_keep_their_order(ratio):
    thin = with_imbalance(DIGITS, ratio, seed=1)
    assert same(thin.test, DIGITS.test)
    for name in ("train", "valid"):
        before, after = getattr(DIGITS, name), getattr(thin, name)
        sizes, left = (split.targets.bincount(minlength=10) for split in (before, after))
        assert left.tolist() == [max(1, round(n.item() * ratio ** (-c / 9))) for c, n in enumerate(sizes)]
        rows = torch.stack([(before.indices == i).nonzero()[0, 0] for i in after.indices])
        assert torch.equal(rows, rows.sort().values) and torch.equal(before.targets[rows], after.targets)
        assert torch.equal(before.inputs[rows], after.inputs)
    assert ratio != 1 or same(thin.train, DIGITS.train)


def test_corruption_that_would_change_no_row_is_refused():
    with pytest.raises(ValueError, match=r"label_noise=0.0001 makes none of 1079 labels wrong; give at least 0.00093"):
        with_label_noise(DIGITS, 0.0001, seed=1)
    assert not same(with_label_noise(DIGITS, 0.00093, seed=1).train, DIGITS.train)
    with pytest.raises(ValueError, match=r"imbalance=1.0001 removes none of 1079 rows of digits; give a larger one"):
        with_imbalance(DIGITS, 1.0001, seed=1)


@pytest.mark.parametrize(
    "corrupt", [lambda seed: with_label_noise(DIGITS, 0.3, seed), lambda s: with_imbalance(DIGITS, 9, s)]
)
def test_the_seed_decides(corrupt):
    assert same(corrupt(3).train, corrupt(3).train) and same(corrupt(3).valid, corrupt(3).valid)
    assert not same(corrupt(3).train, corrupt(4).train)


def test_a_task_is_corrupted_by_its_seed_and_says_so_in_its_name():
    task = get_task("digits").corrupted(label_noise=0.4, imbalance=10)
    assert task.name == "digits-imbalance10-noise0.4" and get_task("digits").corrupted() == get_task("digits")
    loaded = task.load(seed=5)
    expected = with_label_noise(with_imbalance(load_dataset("digits", seed=5), 10, 5), 0.4, 5)
    assert all(same(getattr(loaded, name), getattr(expected, name)) for name in SPLITS)
    assert same(loaded.test, get_task("digits").load(seed=5).test)
    assert all(not row.label_noise and row.imbalance == 1 for row in TASKS.values())


def test_what_cannot_be_corrupted_is_refused():
    with pytest.raises(ValueError, match=r"'digits-noise0.4' is corrupted already; give .* in one call"):
        get_task("digits").corrupted(label_noise=0.4).corrupted(imbalance=10)
    for rate in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"label_noise must lie in \[0, 1\)"):
            with_label_noise(DIGITS, rate, 0)
    for ratio in (0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="imbalance must be 1 or more"):
            with_imbalance(DIGITS, ratio, 0)
    for option in ({"label_noise": 0.1}, {"imbalance": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for classification; diabetes is regression"):
            get_task("diabetes").corrupted(**option).load()
