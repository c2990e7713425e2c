"""Statistics over seeds: intervals, paired tests, effect sizes, and tables of them from a tidy frame.

A run is one (task, method, seed), and seeds are the sample. Two methods run with the same seed share their data
split, initialisation and batches, so differences are taken *within* seeds: this removes what the seed alone decides.
Values are errors, thus lower is better, wherever a direction matters.

With few seeds every method here is optimistic or weak: bootstrap intervals of five runs cover less than they say, and
the Wilcoxon test cannot reach p < .05 (two-sided) with fewer than six. Report n.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """A confidence interval [low, high]."""

    low: float
    high: float


def _sample(values: ArrayLike, name: str = "values", least: int = 2) -> np.ndarray:
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, one number per seed; got shape {sample.shape}")
    if len(sample) < least:
        raise ValueError(f"{name} hold {len(sample)} value(s), at least {least} are needed: run more seeds")
    if not np.isfinite(sample).all():
        bad = np.flatnonzero(~np.isfinite(sample)).tolist()
        raise ValueError(f"{name} hold NaN or infinity at {bad}: decide what a diverged run counts as, and replace it")
    return sample


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = _sample(a, "a"), _sample(b, "b")
    if len(a) != len(b):
        raise ValueError(f"paired samples need the same seeds in the same order; got {len(a)} and {len(b)} values")
    return a, b


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), as in 0.95; got {confidence}")


def interquartile_mean(values: ArrayLike, axis: int = -1) -> np.ndarray | float:
    """The mean of the middle half: a quarter of the values (rounded down) is cut at each end.

    Less noisy than the median, less moved by outliers than the mean (Agarwal et al. 2021).

    >>> float(interquartile_mean([1, 2, 3, 4, 5, 6, 7, 1000]))
    4.5
    """
    return stats.trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable = np.mean,
    confidence: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of ``statistic(values)``, bias corrected and accelerated (BCa, Efron 1987).

    Where BCa is undefined (the jackknife does not vary, as for the median of many ties), the percentile interval is
    returned; values that are all equal give an interval of zero width. The result is never NaN.

    Args:
        values: (n,) numbers, n >= 2, one per seed.
        statistic: maps an array to a number; one that takes ``axis`` (``np.mean``, ``np.median``,
            :func:`interquartile_mean`) is evaluated on all resamples at once.
        confidence: coverage in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the resampling; the same seed and values, in any order, give the same interval.

    Raises:
        ValueError: fewer than two values, a value that is NaN or infinite, or a confidence outside (0, 1).

    >>> low, high = bootstrap_interval([0.21, 0.19, 0.24, 0.20, 0.22])
    >>> round(low, 3), round(high, 3)
    (0.2, 0.23)
    """
    sample = np.sort(_sample(values))
    _check_confidence(confidence)
    if np.ptp(sample) == 0:
        return Interval(*[float(statistic(sample))] * 2)
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a degenerate BCa shows as NaN, below
            found = stats.bootstrap(
                (sample,), statistic, confidence_level=confidence, n_resamples=resamples, method=method, rng=seed
            ).confidence_interval
        if np.isfinite(found).all():
            break
    return Interval(float(found.low), float(found.high))


@dataclass(frozen=True)
class PairedTest:
    """Whether a and b, measured on the same seeds, differ. Differences are a − b: negative means a is lower.

    Attributes:
        n: number of pairs.
        difference: the mean of a − b.
        low, high: its bootstrap interval.
        d_z: Cohen's d of paired samples, mean(a − b) / std(a − b); ±inf if all differences are equal but not 0.
        t: the paired t statistic, d_z √n.
        t_pvalue: two-sided p of the paired t-test.
        wilcoxon: the Wilcoxon signed-rank statistic, the smaller of the two rank sums.
        wilcoxon_pvalue: its two-sided p: exact up to 50 pairs without ties or zeros, else scipy's choice.
    """

    n: int
    difference: float
    low: float
    high: float
    d_z: float
    t: float
    t_pvalue: float
    wilcoxon: float
    wilcoxon_pvalue: float


def paired_test(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> PairedTest:
    """Paired t-test, Wilcoxon signed-rank test and effect size of a − b over seeds.

    Two samples that are equal give p = 1 and d_z = 0.

    Args:
        a: (n,) numbers, n >= 2.
        b: (n,) numbers, for the same seeds in the same order.
        confidence: of the bootstrap interval of the mean difference.
        seed: of that bootstrap.

    Raises:
        ValueError: different lengths, fewer than two pairs, NaN or infinity.
    """
    a, b = _pair(a, b)
    difference = _difference(a, b)
    low, high = bootstrap_interval(difference, confidence=confidence, seed=seed)
    ranks = signed_ranks(a, b)
    t, t_pvalue = 0.0, 1.0
    if difference.any():
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # equal differences: t is infinite, as documented
            t, t_pvalue = stats.ttest_1samp(difference, 0.0)
    return PairedTest(
        n=len(a),
        difference=float(difference.mean()),
        low=low,
        high=high,
        d_z=cohens_d(a, b, paired=True),
        t=float(t),
        t_pvalue=float(t_pvalue),
        wilcoxon=ranks.statistic,
        wilcoxon_pvalue=ranks.pvalue,
    )


class SignedRanks(NamedTuple):
    """Wilcoxon's signed-rank test of a − b, see :func:`signed_ranks`."""

    statistic: float
    """The smaller of the two rank sums."""
    pvalue: float
    """Two-sided."""
    balance: float
    """The sum of the ranks where a is higher minus that where it is lower: the side on which the test finds a."""


def signed_ranks(a: np.ndarray, b: np.ndarray) -> SignedRanks:
    """Wilcoxon's signed-rank test of the pairs (a, b), (n,) each and checked; two equal samples give p = 1."""
    difference = without_rounding(a, b)
    if not difference.any():
        return SignedRanks(0.0, 1.0, 0.0)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # small samples with ties: scipy's choice of method, as documented
        found = stats.wilcoxon(difference)
    balance = np.sign(difference) @ stats.rankdata(np.abs(difference))
    return SignedRanks(float(found.statistic), float(found.pvalue), float(balance))


def without_rounding(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The differences a − b for a rank test, in units of the largest number, to which equal ones are ties.

    Six digits remain: error rates that come from sums in float32 agree to seven where as many examples are wrong.
    """
    unit = max(np.abs(a).max(), np.abs(b).max())
    return np.round((a - b) / unit, 6) if unit else a - b


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a − b, with zero for what is rounding, and one number where all are equal but for rounding."""
    rounded = without_rounding(a, b)
    difference = np.where(rounded == 0, 0.0, a - b)
    return np.full_like(difference, difference.mean()) if np.ptp(rounded) == 0 else difference


def cohens_d(a: ArrayLike, b: ArrayLike, paired: bool = False) -> float:
    """Cohen's d: the mean difference a − b in standard deviations.

    The standard deviation is the pooled one of a and b, or with ``paired`` that of the differences (d_z).
    0 if the means are equal; ±inf if they differ and nothing varies.

    >>> cohens_d([1.0, 2.0, 3.0], [3.0, 4.0, 5.0])
    -2.0
    """
    if paired:
        a, b = _pair(a, b)
        difference = _difference(a, b)
        mean, deviation = difference.mean(), difference.std(ddof=1) if np.ptp(difference) else 0.0
    else:
        a, b = _sample(a, "a"), _sample(b, "b")
        # the mean of equal numbers need not be their number
        means, variances = zip(*((s.mean(), s.var(ddof=1)) if np.ptp(s) else (s[0], 0.0) for s in (a, b)), strict=True)
        squares = (len(a) - 1) * variances[0] + (len(b) - 1) * variances[1]
        mean, deviation = means[0] - means[1], np.sqrt(squares / (len(a) + len(b) - 2))
    if deviation == 0:
        return float(np.sign(mean) * np.inf) if mean else 0.0
    return float(mean / deviation)


@dataclass(frozen=True)
class Improvement:
    """P(A < B), and its bootstrap interval [low, high]."""

    probability: float
    low: float
    high: float


def probability_of_improvement(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, resamples: int = 9999, seed: int = 0
) -> Improvement:
    """P(A < B) + P(A = B)/2: how likely a run of A has a lower error than a run of B (Agarwal et al. 2021).

    The Mann-Whitney statistic over all pairs of runs, averaged over tasks; 1/2 means no difference. The interval is
    the percentile bootstrap, runs resampled within each task. 2P − 1 is the negative of Cliff's delta of a against b.

    Args:
        a: (n,) errors of one task, or (n, T) of n runs on T tasks.
        b: (m,) or (m, T) likewise; n and m may differ.
        confidence: coverage in (0, 1).
        resamples: number of bootstrap resamples.
        seed: of the resampling.

    Raises:
        ValueError: NaN or infinity, empty samples, different numbers of tasks, or a confidence outside (0, 1).

    >>> probability_of_improvement([1, 2, 3], [2, 4, 6]).probability  # 7 pairs lower, one tie, one higher
    0.8333333333333334
    """
    _check_confidence(confidence)
    samples = []
    for name, values in (("a", a), ("b", b)):
        sample = np.asarray(values, dtype=np.float64)
        sample = sample[:, None] if sample.ndim == 1 else sample
        if sample.ndim != 2 or sample.size == 0 or not np.isfinite(sample).all():
            raise ValueError(f"{name} must be finite, of shape (runs,) or (runs, tasks); got shape {sample.shape}")
        samples.append(sample)
    x, y = samples
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"a has {x.shape[1]} tasks and b has {y.shape[1]}; they must be the same tasks")
    (n, tasks), m = x.shape, len(y)
    wins = np.where(np.isclose(x[:, None], y, rtol=1e-6, atol=0), 0.5, x[:, None] < y)  # (n, m, T), ties as above
    rng = np.random.default_rng(seed)  # how often each run is drawn, per resample and task: (R, T, n) and (R, T, m)
    drawn_a = rng.multinomial(n, np.full(n, 1 / n), size=(resamples, tasks))
    drawn_b = rng.multinomial(m, np.full(m, 1 / m), size=(resamples, tasks))
    means = np.einsum("rtn,nmt,rtm->r", drawn_a, wins, drawn_b, optimize=True) / (n * m * tasks)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Improvement(float(wins.mean()), float(low), float(high))


def holm(pvalues: ArrayLike) -> np.ndarray:
    """Holm's (1979) step-down adjustment: reject where the result is below α, and the family-wise error stays below α.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must be a one-dimensional array within [0, 1], got {pvalues!r}")
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def check_runs(frame: pd.DataFrame, by: Sequence[str], value: str, seed: str = "seed") -> None:
    """Check that ``frame`` holds one finite ``value`` per group of ``by`` and seed.

    Raises:
        ValueError: a column is missing, the frame is empty, a value is not finite, or a group holds a seed twice.
    """
    missing = [column for column in (*by, value, seed) if column not in frame.columns]
    if missing:
        raise ValueError(f"the frame lacks {missing}; it has {list(frame.columns)}")
    if frame.empty:
        raise ValueError("the frame has no rows")
    keys = [*by, seed]
    bad = frame.loc[~np.isfinite(frame[value].astype(float)), keys]
    if len(bad):
        raise ValueError(
            f"{value} is NaN or infinite in {len(bad)} of {len(frame)} rows, first at {bad.iloc[0].to_dict()}: "
            "decide what a diverged run counts as, and replace it"
        )
    twice = frame.loc[frame.duplicated(keys), keys]
    if len(twice):
        raise ValueError(f"more than one row for {twice.iloc[0].to_dict()}: select one, or group by another column too")


def summarise(
    frame: pd.DataFrame,
    by: Sequence[str] = ("task", "method"),
    value: str = "test_error",
    seed: str = "seed",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """One row per group of ``by``: the mean over seeds, its bootstrap interval, median, standard deviation, and n.

    Args:
        frame: one row per run, with columns ``by``, ``value`` and ``seed``; more columns are ignored.
        by: the columns that name a group.
        value: the column to summarise.
        seed: the column that tells the runs of a group apart.
        confidence: of the interval.

    Returns:
        Columns ``by``, mean, low, high, median, std, n, in order of first appearance. A group of one run has no
        interval: low, high and std are NaN there.

    Raises:
        ValueError: see :func:`check_runs`.
    """
    by = [by] if isinstance(by, str) else list(by)
    check_runs(frame, by, value, seed)
    rows = []
    for key, group in frame.groupby(by, sort=False, observed=True, dropna=False):
        x = group[value].to_numpy(dtype=np.float64)
        low, high = bootstrap_interval(x, confidence=confidence) if len(x) > 1 else (np.nan, np.nan)
        std = x.std(ddof=1) if len(x) > 1 else np.nan
        rows.append((*key, x.mean(), low, high, np.median(x), std, len(x)))
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "median", "std", "n"])


def compare_methods(
    frame: pd.DataFrame,
    baseline: str = "handcrafted",
    value: str = "test_error",
    task: str = "task",
    method: str = "method",
    seed: str = "seed",
    confidence: float = 0.95,
) -> pd.DataFrame:
    """Every method against ``baseline``, paired by seed within each task.

    Args:
        frame: one row per run, with columns ``task``, ``method``, ``seed`` and ``value`` (lower is better).
        baseline: the method the others are compared with.
        value: the column to compare.
        task: the column of tasks.
        method: the column of methods.
        seed: the column of seeds; only seeds that both methods have are compared, and n counts them.
        confidence: of the interval of the difference.

    Returns:
        One row per task and method with columns ``task``, ``method``, n, difference (method − baseline, so negative is
        better), low, high, d_z, improvement (:func:`probability_of_improvement` over the baseline), t_pvalue,
        wilcoxon_pvalue, and both after :func:`holm` correction over the methods of a task, t_holm and wilcoxon_holm.

    Raises:
        ValueError: see :func:`check_runs`; or a task lacks the baseline, or shares fewer than two seeds with it.
    """
    check_runs(frame, [task, method], value, seed)
    tables = []
    for name, group in frame.groupby(task, sort=False, observed=True):
        runs = group.pivot(index=seed, columns=method, values=value).astype(float)
        if baseline not in runs:
            raise ValueError(f"task {name!r} has no runs of the baseline {baseline!r}, only of {list(runs.columns)}")
        rows = []
        for other in [m for m in group[method].unique() if m != baseline]:
            pairs = runs[[other, baseline]].dropna()
            if len(pairs) < 2:
                raise ValueError(
                    f"task {name!r}: {other!r} and {baseline!r} share {len(pairs)} seed(s), at least 2 are needed"
                )
            a, b = pairs[other].to_numpy(), pairs[baseline].to_numpy()
            test = paired_test(a, b, confidence)
            rows.append(
                {
                    task: name,
                    method: other,
                    "n": test.n,
                    "difference": test.difference,
                    "low": test.low,
                    "high": test.high,
                    "d_z": test.d_z,
                    "improvement": probability_of_improvement(a, b).probability,
                    "t_pvalue": test.t_pvalue,
                    "wilcoxon_pvalue": test.wilcoxon_pvalue,
                }
            )
        if rows:
            table = pd.DataFrame(rows)
            tables.append(table.assign(t_holm=holm(table.t_pvalue), wilcoxon_holm=holm(table.wilcoxon_pvalue)))
    if not tables:
        raise ValueError(f"there is no method but the baseline {baseline!r} to compare")
    return pd.concat(tables, ignore_index=True)
