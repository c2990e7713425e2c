"""Tables of a comparison: the numbers against numpy and scipy, what is bold, what has an arrow, the three formats."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.statistics import bootstrap_interval, paired_test
from analysis.tables import comparison_table, render


def runs(tasks=("a_1", "b"), seeds=10, **offsets):
    """Errors of methods that lie ``offsets`` from the handcrafted loss, up to noise within a seed."""
    generator = np.random.default_rng(0)
    rows = []
    for task in tasks:
        for seed in range(seeds):
            base = generator.normal(3, 0.6)
            for method, offset in {"handcrafted": 0.0, **offsets}.items():
                error = base + offset + generator.normal(0, 0.02)
                rows.append({"task": task, "method": method, "seed": seed, "test_error": error})
    return pd.DataFrame(rows)


FRAME = runs(better=-0.2, worse=0.2, alike=0.0)


def by_cell(table):
    return table.set_index(["task", "method"])


def test_the_numbers_are_those_of_numpy_and_the_bootstrap():
    table = by_cell(comparison_table(FRAME))
    assert list(table.index) == [(t, m) for t in ("a_1", "b") for m in ("handcrafted", "better", "worse", "alike")]
    for (task, method), row in table.iterrows():
        values = FRAME[(FRAME.task == task) & (FRAME.method == method)].test_error
        assert row["mean"] == pytest.approx(values.mean()) and row.n == 10 and row.diverged == 0
        assert (row.low, row.high) == pytest.approx(tuple(bootstrap_interval(values.to_numpy())))


def test_the_lowest_is_the_best_and_arrows_follow_the_paired_test():
    """Seeds differ by far more than methods, so only a paired test can see it."""
    table = by_cell(comparison_table(FRAME))
    for task in ("a_1", "b"):
        rows = table.loc[task]
        assert rows.index[rows.best].tolist() == ["better"]
        assert rows.arrow.to_dict() == {"handcrafted": "", "better": "lower", "worse": "higher", "alike": ""}
        values = FRAME[FRAME.task == task].pivot(index="seed", columns="method", values="test_error")
        assert stats.mannwhitneyu(values.better, values.handcrafted).pvalue > 0.05
        assert stats.wilcoxon(values.better, values.handcrafted).pvalue * 3 < 0.05
    other = by_cell(comparison_table(FRAME, reference="worse"))
    assert other.loc["b"].arrow.to_dict() == {"handcrafted": "lower", "better": "lower", "worse": "", "alike": "lower"}


def test_an_arrow_points_where_the_ranks_do_though_one_large_difference_turns_the_mean():
    differences = [*np.linspace(-0.12, -0.01, 11), 3.0]
    values = {"handcrafted": np.ones(12), "mostly lower": 1 + np.array(differences)}
    rows = [
        {"task": "a", "method": method, "seed": seed, "test_error": error}
        for method, errors in values.items()
        for seed, error in enumerate(errors)
    ]
    assert np.mean(differences) > 0 and stats.wilcoxon(differences).pvalue < 0.05
    table = by_cell(comparison_table(pd.DataFrame(rows)))
    assert table.loc[("a", "mostly lower"), "arrow"] == "lower"


def test_equal_differences_are_ties_whatever_rounding_made_of_them():
    """.3 − .2 is not .4 − .3; seven such differences and three the other way, twice as large."""
    reference = np.arange(1, 11) / 10
    other = reference + np.array([0.1] * 7 + [-0.2] * 3)
    assert len(set(other - reference)) > 2
    exact = stats.wilcoxon([1] * 7 + [-2] * 3).pvalue
    assert paired_test(other, reference).wilcoxon_pvalue == pytest.approx(exact, abs=1e-15)
    assert stats.wilcoxon(other - reference).pvalue != pytest.approx(exact, abs=1e-15)


def test_holm_counts_the_methods_of_a_task():
    """Six seeds all better: p = 2/64 passes .05 once, not twice."""
    once, twice = runs(seeds=6, better=-0.2), runs(seeds=6, better=-0.2, again=-0.2)
    assert set(comparison_table(once).arrow) == {"", "lower"}
    assert set(comparison_table(twice).arrow) == {""}
    assert set(comparison_table(runs(seeds=5, better=-0.2)).arrow) == {""}


def test_one_seed_has_neither_interval_nor_test():
    table = comparison_table(runs(seeds=1, better=-0.2))
    assert table.low.isna().all() and set(table.arrow) == {""} and table.best.sum() == 2
    assert re.search(r"\*\*\d\.\d{4}\*\* \|", render(table)) and "±" not in render(table)


def test_a_method_that_diverged_is_counted_and_neither_best_nor_tested():
    frame = FRAME.copy()
    bad = (frame.task == "b") & (frame.method == "better") & (frame.seed < 2)
    frame.loc[bad, "test_error"] = [np.inf, np.nan]
    table = by_cell(comparison_table(frame))
    row = table.loc[("b", "better")]
    assert (row.n, row.diverged, row.best, row.arrow) == (8, 2, False, "")
    left = FRAME[(FRAME.task == "b") & (FRAME.method == "better") & (FRAME.seed >= 2)].test_error
    assert row["mean"] == pytest.approx(left.mean())
    assert table.loc["b"].best.sum() == 1 and table.loc[("a_1", "better")].best
    assert "(2 diverged)" in render(table.reset_index())
    frame["test_error"] = np.inf
    table = comparison_table(frame)
    assert not table.best.any() and set(table.n) == {0} and render(table).count("– (10 diverged)") == 8


def test_a_task_may_lack_a_method_or_the_reference():
    frame = FRAME[~((FRAME.task == "b") & FRAME.method.isin(["handcrafted", "worse"]))]
    table = by_cell(comparison_table(frame))
    assert ("b", "worse") not in table.index and set(table.loc["b"].arrow) == {""}
    assert table.loc[("a_1", "better")].arrow == "lower"
    (line,) = (line for line in render(table.reset_index()).splitlines() if line.startswith("| worse"))
    assert line.endswith("|  |")


# The formats -------------------------------------------------------------------------------------------------------


def test_markdown():
    lines = render(comparison_table(FRAME), "markdown", "Errors | means").splitlines()
    assert lines[0] == "| method | a_1 | b |" and lines[1] == "| --- | ---: | ---: |"
    assert len(lines) == 8 and lines[-1] == r"Errors \| means"
    mean = FRAME[(FRAME.task == "a_1") & (FRAME.method == "better")].test_error.mean()
    assert re.match(rf"\| better \| \*\*{mean:.4f}\*\* ± 0\.\d{{4}} ↓ \| ", lines[3])


def test_latex():
    text = render(comparison_table(FRAME), "latex", "100 % of a_1")
    assert text.startswith("% 100 \\% of a\\_1\n\\begin{tabular}{lrr}\n\\toprule\nmethod & a\\_1 & b \\\\\n\\midrule\n")
    assert text.endswith("\\bottomrule\n\\end{tabular}\n")
    assert re.search(r"better & \\textbf\{\d\.\d{4}\} \$\\pm\$ 0\.\d{4} \$\\downarrow\$ & ", text)
    assert text.count(r" \\") == 5


def test_every_letter_that_latex_reads_is_escaped():
    table = comparison_table(FRAME.replace({"method": {"better": r"ML^3~{a}\b"}}))
    assert r"ML\textasciicircum{}3\textasciitilde{}\{a\}\textbackslash{}b & " in render(table, "latex")


def test_html():
    text = render(comparison_table(FRAME.replace({"task": {"b": "<b>"}})), "html", "a & b")
    table = ElementTree.fromstring(text)
    assert [cell.text for cell in table.find("thead")[0]] == ["method", "a_1", "<b>"]
    assert table.find("caption").text == "a & b" and len(table.find("tbody")) == 4
    better = table.find("tbody")[1]
    assert better[0].text == "better" and better[1].find("strong") is not None and "↓" in better[1][0].tail


def test_what_is_no_comparison_is_refused():
    with pytest.raises(ValueError, match="format must be one of markdown, latex, html; got 'word'"):
        render(comparison_table(FRAME), "word")
    for column in ("task", "test_error"):
        with pytest.raises(ValueError, match=f"lacks the column {column}; it has"):
            comparison_table(FRAME.drop(columns=column))
    with pytest.raises(ValueError, match="more than one row"):
        comparison_table(pd.concat([FRAME, FRAME]))
    with pytest.raises(ValueError, match="no rows"):
        comparison_table(FRAME[:0])
