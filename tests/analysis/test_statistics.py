"""Statistics over seeds against scipy, hand computations and known coverage."""

import doctest

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import analysis.statistics
from analysis.statistics import (
    bootstrap_interval,
    cohens_d,
    compare_methods,
    holm,
    interquartile_mean,
    paired_test,
    probability_of_improvement,
    summarise,
)

RNG = np.random.default_rng(7)
A, B = RNG.normal(0.20, 0.02, 10), RNG.normal(0.23, 0.03, 10)
errors = st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0]) | st.floats(-1e3, 1e3), min_size=2, max_size=8)


def runs():
    rows = []
    for task, shift in (("digits", 0.0), ("diabetes", 1.0)):
        for seed in range(8):
            rng = np.random.default_rng(seed)
            common = rng.normal(0, 0.1)
            for method, mean in (("handcrafted", 0.30), ("adalfl", 0.25), ("ml3", 0.29), ("same", None)):
                noise = rng.normal(0, 0.01)
                error = shift + common + (mean + noise if mean else 0.30)
                rows.append({"task": task, "method": method, "seed": seed, "test_error": error})
    frame = pd.DataFrame(rows)
    return frame.sample(frac=1, random_state=0)  # the order of rows must not matter to the pairing


def test_docstring_examples():
    assert doctest.testmod(analysis.statistics).failed == 0


def test_interval_is_scipys_bca():
    expected = stats.bootstrap((np.sort(A),), np.mean, n_resamples=9999, method="BCa", rng=0).confidence_interval
    assert bootstrap_interval(A) == (expected.low, expected.high)
    assert bootstrap_interval(A, seed=1) != bootstrap_interval(A) == bootstrap_interval(A[::-1])
    narrow, wide = bootstrap_interval(A, confidence=0.5), bootstrap_interval(A, confidence=0.99)
    assert wide.low < narrow.low < A.mean() < narrow.high < wide.high


def test_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(0, 1, (200, 30))
    intervals = [bootstrap_interval(s, resamples=499, confidence=0.9) for s in samples]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert 0.83 < covered < 0.95  # binomial noise of 200 trials at .9 is ±.04


@settings(max_examples=60, deadline=None)
@given(errors, st.sampled_from([np.mean, np.median, interquartile_mean]))
def test_interval_is_never_nan_and_within_the_sample(values, statistic):
    low, high = bootstrap_interval(values, statistic, resamples=199)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_degenerate_intervals():
    assert bootstrap_interval([0.1] * 5) == pytest.approx((0.1, 0.1), rel=1e-15)
    ties = [1, 1, 1, 5, 5]  # the jackknife of the median does not vary: BCa is undefined
    assert bootstrap_interval(ties, np.median) == (1.0, 5.0)


@pytest.mark.parametrize(
    "values, words", [([0.1], "more seeds"), ([0.1, np.nan], "diverged"), ([[0.1, 0.2]], "one-dimensional")]
)
def test_bad_samples(values, words):
    with pytest.raises(ValueError, match=words):
        bootstrap_interval(values)


@pytest.mark.parametrize("confidence", [-0.1, 0, 1, 1.5, 95])
def test_bad_confidence(confidence):
    for function in (bootstrap_interval, lambda values, **options: probability_of_improvement(values, B, **options)):
        with pytest.raises(ValueError, match=f"as in 0.95; got {confidence}"):
            function(A, confidence=confidence)


def test_paired_test_is_scipys():
    test = paired_test(A, B)
    t, wilcoxon = stats.ttest_rel(A, B), stats.wilcoxon(A, B)
    assert (test.t, test.t_pvalue) == pytest.approx((t.statistic, t.pvalue), rel=1e-12)
    assert (test.wilcoxon, test.wilcoxon_pvalue) == (wilcoxon.statistic, wilcoxon.pvalue)
    assert test.d_z == pytest.approx(test.t / np.sqrt(test.n), rel=1e-12)
    assert test.n == 10 and test.difference == pytest.approx(A.mean() - B.mean())
    assert (test.low, test.high) == bootstrap_interval(A - B)
    swapped = paired_test(B, A)
    assert (swapped.d_z, swapped.t_pvalue) == pytest.approx((-test.d_z, test.t_pvalue))


def test_paired_test_without_variation():
    same = paired_test(A, A)
    assert (same.d_z, same.t_pvalue, same.wilcoxon_pvalue, same.low, same.high) == (0, 1, 1, 0, 0)
    shifted = paired_test([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    assert shifted.d_z == -np.inf and shifted.t_pvalue == 0 and shifted.wilcoxon_pvalue == 0.25


def test_a_difference_that_is_rounding_is_none():
    """.1 + .2 is not .3; and 203 wrong of 10,000, summed in float32 in another order, are not 203 of 10,000."""
    same = paired_test([0.1 + 0.2] * 7, [0.3] * 7)
    assert (same.difference, same.t, same.t_pvalue, same.wilcoxon_pvalue, same.d_z) == (0, 0, 1, 1, 0)
    counts = np.array([203, 190, 185, 210, 199, 188, 207, 195])
    more = np.array([0, 0, 9, 12, 3, -5, 8, 21])
    a, b = (counts + more) / 1e4, counts / 1e4 + np.array([3e-10, -2e-9, 1e-9, 0, -4e-10, 6e-10, 0, 1e-10])
    exact = stats.wilcoxon(more).pvalue
    assert paired_test(a, b).wilcoxon_pvalue == exact != stats.wilcoxon(a - b).pvalue
    assert probability_of_improvement([0.0203], [0.0203 + 3e-10]).probability == 0.5
    steady = paired_test(np.arange(5) / 10 + 0.1, np.arange(5) / 10)
    assert steady.d_z == steady.t == np.inf and steady.t_pvalue == 0


def test_paired_test_needs_pairs():
    with pytest.raises(ValueError, match="10 and 9"):
        paired_test(A, B[:9])


def test_cohens_d_by_hand():
    pooled = np.sqrt((9 * A.var(ddof=1) + 5 * B[:6].var(ddof=1)) / 14)
    assert cohens_d(A, B[:6]) == pytest.approx((A.mean() - B[:6].mean()) / pooled, rel=1e-12)
    assert cohens_d([0.1] * 3, [0.1] * 2) == 0  # of three .1 the mean is not .1
    assert cohens_d([0.1] * 3, [0.2] * 3) == -np.inf
    t = stats.ttest_ind(A, B).statistic
    assert cohens_d(A, B) == pytest.approx(t * np.sqrt(2 / 10), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(errors, errors)
def test_probability_of_improvement_is_mann_whitney(a, b):
    a, b = np.round(a, 2), np.round(b, 2)  # what differs, differs by more than rounding
    found = probability_of_improvement(a, b, resamples=50)
    assert found.probability == pytest.approx(stats.mannwhitneyu(b, a).statistic / (len(a) * len(b)), abs=1e-12)
    assert probability_of_improvement(b, a, resamples=50).probability == pytest.approx(1 - found.probability)


def test_probability_of_improvement_interval_is_scipys():
    a, b = A, A + np.random.default_rng(8).normal(0.01, 0.02, 10)

    def chance(x, y, axis=-1):
        return (x[..., :, None] < y[..., None, :]).mean((-2, -1))

    expected = stats.bootstrap((a, b), chance, method="percentile", vectorized=True, rng=3).confidence_interval
    found = probability_of_improvement(a, b)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)  # two Monte Carlos


def test_probability_of_improvement_averages_tasks():
    rng = np.random.default_rng(0)  # its own: what is drawn must not depend on which tests ran before
    a, b = rng.normal(size=(6, 3)), rng.normal(0.5, 1, size=(9, 3))
    found = probability_of_improvement(a, b)
    each = [probability_of_improvement(a[:, t], b[:, t]) for t in range(3)]
    assert found.probability == pytest.approx(np.mean([e.probability for e in each]))
    assert found.high - found.low < min(e.high - e.low for e in each)  # more tasks, less noise
    with pytest.raises(ValueError, match="3 tasks and b has 2"):
        probability_of_improvement(a, b[:, :2])
    with pytest.raises(ValueError, match="finite"):
        probability_of_improvement([np.nan, 1], [1, 2])


def test_interquartile_mean_cuts_a_quarter_at_each_end():
    assert interquartile_mean([100, 1, 2, -50]) == 1.5
    assert interquartile_mean(np.array([[100, 1, 2, -50], [0, 0, 4, 4]])).tolist() == [1.5, 2.0]


def test_holm_by_definition():
    p = np.random.default_rng(9).uniform(0, 0.2, 6)
    order = np.argsort(p)
    expected = np.empty(6)
    for rank, index in enumerate(order):
        expected[index] = min(1, max((6 - j) * p[order[j]] for j in range(rank + 1)))
    assert holm(p) == pytest.approx(expected)
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    with pytest.raises(ValueError, match="within"):
        holm([0.1, np.nan])


def test_summarise():
    frame = runs()
    table = summarise(frame)
    assert list(table) == ["task", "method", "mean", "low", "high", "median", "std", "n"]
    assert len(table) == 8 and (table.n == 8).all()
    row = table[(table.task == "digits") & (table.method == "ml3")].iloc[0]
    x = frame[(frame.task == "digits") & (frame.method == "ml3")].test_error
    assert row["mean"] == pytest.approx(x.mean()) and row["std"] == pytest.approx(x.std())
    assert row["median"] == x.median() and (row.low, row.high) == bootstrap_interval(x)


def test_summarise_single_run_and_bad_frames():
    frame = runs()
    single = summarise(frame[(frame.seed == 0)], by=["task", "method"])
    assert single[["low", "high", "std"]].isna().all().all() and (single.n == 1).all()
    with pytest.raises(ValueError, match="more than one row"):
        summarise(frame, by=["method"])
    with pytest.raises(ValueError, match="lacks .'accuracy'"):
        summarise(frame, value="accuracy")
    with pytest.raises(ValueError, match="no rows"):
        summarise(frame[:0])
    frame.iloc[3, frame.columns.get_loc("test_error")] = np.inf
    with pytest.raises(ValueError, match="1 of 64"):
        summarise(frame)


def test_compare_methods():
    frame = runs()
    table = compare_methods(frame)
    assert len(table) == 6 and "handcrafted" not in set(table.method)
    row = table[(table.task == "digits") & (table.method == "adalfl")].iloc[0]
    pivot = frame[frame.task == "digits"].pivot(index="seed", columns="method", values="test_error")
    expected = stats.ttest_rel(pivot.adalfl, pivot.handcrafted)
    assert row.t_pvalue == pytest.approx(expected.pvalue) and row.difference == pytest.approx(-0.05, abs=0.02)
    assert row.low < row.difference < row.high < 0
    for _, group in table.groupby("task"):
        assert group.t_holm.tolist() == pytest.approx(holm(group.t_pvalue))
        assert group.wilcoxon_holm.tolist() == pytest.approx(holm(group.wilcoxon_pvalue))
    # The seed decides more than the method: only the pairing sees the difference this clearly.
    assert expected.pvalue < 0.001 < 0.05 < stats.ttest_ind(pivot.adalfl, pivot.handcrafted).pvalue


def test_compare_methods_pairs_by_common_seeds():
    frame = runs()
    part = frame[(frame.method != "ml3") | (frame.seed < 5)]
    table = compare_methods(part).set_index(["task", "method"])
    assert table.loc[("digits", "ml3"), "n"] == 5 and table.loc[("digits", "adalfl"), "n"] == 8
    with pytest.raises(ValueError, match="share 1 seed"):
        compare_methods(frame[(frame.method != "ml3") | (frame.seed < 1)])
    with pytest.raises(ValueError, match="no runs of the baseline 'sgd'"):
        compare_methods(frame, baseline="sgd")
    with pytest.raises(ValueError, match="no method but"):
        compare_methods(frame[frame.method == "handcrafted"])


def test_two_common_seeds_suffice_for_a_comparison():
    frame = runs()
    table = compare_methods(frame[(frame.method != "ml3") | (frame.seed < 2)]).set_index(["task", "method"])
    assert table.loc[("digits", "ml3"), "n"] == 2 and np.isfinite(table.loc[("digits", "ml3"), "difference"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_diverged_run_is_not_left_out_of_a_comparison_in_silence(value):
    frame = runs()
    with pytest.raises(ValueError, match="more than one row"):
        compare_methods(pd.concat([frame, frame[:1]]))
    frame.loc[3, "test_error"] = value
    with pytest.raises(ValueError, match="decide what a diverged run counts as"):
        compare_methods(frame)
