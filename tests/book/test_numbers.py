"""Every number that the book or the README prints is in a results file, and the last build printed the same."""

import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from scipy.stats import bootstrap, wilcoxon
from typer.testing import CliRunner

from adalfl_lite.cli import app
from adalfl_lite.compare.methods import METHODS
from adalfl_lite.compare.tasks import get_task
from analysis.statistics import holm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "book" / "results"
BUILT = ROOT / "book" / "_build"
CHAPTERS = sorted(path.stem for path in RESULTS.glob("*.json"))

TRAINED = {"attribution", "diagnostics", "gradients", "landscapes", "learned_losses", "loss_prediction", "other_losses"}
TRAINED |= {"what_the_loss_decides", "your_data"}
"""Chapters whose numbers are of models that they train; in the others those are called live_, the rest is read."""

TOO_STEEP = {"live_ml3_800"}
"""Errors of training that a loss has wrecked: how badly is a matter of rounding, that it has is not."""

spec = importlib.util.spec_from_file_location("collect", RESULTS / "collect.py")
collect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(collect)


@pytest.fixture(scope="module")
def book_is_built():
    if not (BUILT / "html" / "index.html").is_file():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the book is not built: run `make book` first")


@pytest.fixture(scope="module")
def final() -> pd.DataFrame:
    """The last row of every stored run, found here without the package's help."""
    results = pd.read_parquet(RESULTS / "comparison.parquet")
    results["test_error"] = results.test_error.round(6)  # of sums in float32: ties are ties
    return results.sort_values("step").groupby(["task", "method", "seed"]).tail(1)


@pytest.fixture(scope="module")
def stopped() -> pd.DataFrame:
    """The plain and the long runs where their validation error was lowest."""
    results = pd.read_parquet(RESULTS / "comparison.parquet").query("method in ['handcrafted', 'handcrafted-long']")
    looks = results.sort_values(["valid_error", "valid_loss"]).groupby(["task", "method", "seed"]).head(1)
    return looks.assign(method=looks.method + ", stopped", test_error=looks.test_error.round(6))


@pytest.mark.usefixtures("book_is_built")
def test_every_chapter_that_prints_numbers_has_a_file():
    assert CHAPTERS and collect.chapters() == CHAPTERS


@pytest.mark.usefixtures("book_is_built")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_build_printed_the_stored_numbers(chapter):
    """Training is chaotic: another processor rounds otherwise, so a live error may move by a few test examples."""
    stored = json.loads((RESULTS / f"{chapter}.json").read_text())
    printed = collect.glued(chapter)
    assert printed.keys() == stored.keys()
    for name, value in stored.items():
        if name in TOO_STEEP:
            assert printed[name] > 2 * printed["live_cross_entropy"]
            continue
        live = chapter in TRAINED or name.startswith("live_")
        within = {"rel": 0.2, "abs": 0.015} if live else {"rel": 1e-5, "abs": 1e-9}
        assert printed[name] == pytest.approx(value, **within), name


@pytest.mark.usefixtures("book_is_built")
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_no_glue_is_left_unfilled(chapter):
    source = (ROOT / "book" / f"{chapter}.md").read_text()
    used = {name.split(":")[0] for name in re.findall(r"\{glue:text\}`([^`]+)`", source)}
    assert used <= set(json.loads((RESULTS / f"{chapter}.json").read_text()))
    assert "glue:text" not in (BUILT / "html" / f"{chapter}.html").read_text()


def check_cell(cell: str, errors: pd.Series) -> None:
    """ "mean [low, high]" of the errors of some seeds."""
    mean, low, high = map(float, re.findall(r"[\d.]+", cell))
    assert mean == pytest.approx(errors.mean(), abs=5.1e-5)
    found = bootstrap((np.sort(errors),), np.mean, n_resamples=9999, method="BCa", rng=0).confidence_interval
    assert [low, high] == pytest.approx(list(found), abs=1.1e-4)


def test_the_readme_prints_the_results(final):
    text = (ROOT / "README.md").read_text().split("<!-- results -->")[1].split("<!-- /results -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
    (_, _, *methods), _, *lines = rows
    errors = final.groupby(["task", "method"]).test_error
    assert {line[0] for line in lines} == set(final.task) and {"handcrafted-tuned", "online"} <= set(methods)
    for task, seeds, *found in lines:
        for method, cell in zip(methods, found, strict=True):
            check_cell(cell, errors.get_group((task, method)))
            assert int(seeds) == len(errors.get_group((task, method)))


def test_the_readme_has_the_very_tables_that_are_made_from_what_is_stored():
    text = (ROOT / "README.md").read_text()
    for name, table in (("results", collect.results_table()), ("speed", collect.speed_table())):
        assert text.split(f"<!-- {name} -->\n")[1].split(f"<!-- /{name} -->")[0] == table


def test_the_command_line_takes_the_ties_of_stored_results_for_ties(final):
    found = CliRunner().invoke(app, ["table", str(RESULTS / "comparison.parquet")])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.stdout.splitlines() if "|" in line]
    (_, *tasks), _, *lines = lines
    bold = {(task, line[0]) for line in lines for task, cell in zip(tasks, line[1:], strict=True) if "**" in cell}
    means = final[np.isfinite(final.test_error)].groupby(["task", "method"], as_index=False).test_error.mean()
    whole = final.groupby(["task", "method"]).test_error.apply(lambda errors: np.isfinite(errors).all())
    means = means[[whole[task, method] for task, method in zip(means.task, means.method, strict=True)]]
    best = means[means.test_error - means.groupby("task").test_error.transform("min") < 1e-9]
    assert bold == set(zip(best.task, best.method, strict=True))
    assert len(best) > best.task.nunique(), "a task without ties would not tell"


def test_the_readme_prints_the_measured_speed():
    rows = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text())["rows"]
    cost = {(row["model"], row["engine"]): row["time_ratio"] for row in rows}
    of_exact = {row["model"]: row for row in rows if row["engine"] == "forward"}
    text = (ROOT / "README.md").read_text().split("<!-- speed -->")[1].split("<!-- /speed -->")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()[2:]]
    models = dict.fromkeys(row["model"] for row in rows)
    assert len(lines) == len(models) >= 4
    for model, (_, rounds, exact, shared, peer, times) in zip(models, lines, strict=True):
        assert int(rounds) == of_exact[model]["rounds"]
        quartiles = [of_exact[model][name] for name in ("time_ratio", "time_ratio_low", "time_ratio_high")]
        assert list(map(float, re.findall(r"[\d.]+", exact))) == pytest.approx(quartiles, abs=0.0051)
        assert float(shared) == pytest.approx(cost[model, "shared"], abs=0.0051)
        fastest, name = re.fullmatch(r"([\d.]+) \((\w+)\)", peer).groups()
        peers = {engine: ratio for (m, engine), ratio in cost.items() if m == model and engine in collect.PEERS}
        assert peers[name] == min(peers.values()) == pytest.approx(float(fastest), abs=0.0051)
        assert float(times) == pytest.approx(peers[name] / cost[model, "forward"], abs=0.0051)


@pytest.mark.usefixtures("book_is_built")
@pytest.mark.parametrize("chapter", ["adalfl", "comparison"])
def test_the_chapters_print_the_results(final, stopped, chapter):
    page = BeautifulSoup((BUILT / "html" / f"{chapter}.html").read_text(), "html.parser")
    errors = dict(list(pd.concat([final, stopped]).groupby(["task", "method"]).test_error))
    checked = set()
    for table in page("table"):
        (_, *tasks), *lines = [[cell.text for cell in row(["th", "td"])] for row in table("tr")]
        for method, *found in lines if set(tasks) <= set(final.task) else ():
            for task, cell in zip(tasks, found, strict=True):
                assert bool(cell) == ((task, method) in errors)
                if cell:
                    if lost := np.isinf(errors[task, method]).sum():
                        assert cell == f"{lost} of {len(errors[task, method])} diverged"
                    else:
                        check_cell(cell, errors[task, method])
                    checked.add((task, method))
    if chapter == "adalfl":
        shown = {(task, m) for task, m in errors if task in ("digits", "mnist-lenet5")}
        errors = {(task, m) for task, m in shown if "long" not in m and "stopped" not in m}
    assert checked == set(errors)


def test_every_mean_has_its_seeds(final):
    seeds = final.groupby(["task", "method"]).seed.apply(frozenset)
    for task, of_task in seeds.groupby("task"):
        assert of_task.nunique() == 1, task
        assert len(of_task.iloc[0]) == 10


def test_adapting_lowers_the_cross_entropy_of_every_seed_where_the_text_says_so(final):
    losses = final.pivot(index=["task", "seed"], columns="method", values="test_loss")
    for task in ("digits", "mnist-mlp", "mnist-lenet5"):
        tuned, offline, online = (losses.loc[task, name] for name in ("handcrafted-tuned", "offline", "online"))
        assert (online < offline).all() and tuned.mean() < online.mean()
    for task in ("iris", "wine", "breast_cancer"):
        assert losses.loc[task, "online"].mean() > losses.loc[task, "offline"].mean()


def test_adapting_moves_the_error_of_the_tasks_that_the_text_names(final):
    errors = final.pivot(index=["task", "seed"], columns="method", values="test_error")
    for method, baseline, named in (
        ("online", "offline", {"communities": -1, "mnist-mlp": 1}),
        ("online-train", "online", {"diabetes": 1}),
    ):
        gains = (errors[method] - errors[baseline]).dropna().round(6)
        of_tasks = dict(list(gains.groupby("task")))
        pvalues = [wilcoxon(gain).pvalue if gain.any() else 1.0 for gain in of_tasks.values()]
        told = [task for task, p in zip(of_tasks, holm(pvalues), strict=True) if p < 0.05]
        assert {task: np.sign(of_tasks[task].mean()) for task in told} == named


def test_the_controls_that_the_text_names_do_as_well_or_better(final, stopped):
    errors = pd.concat([final, stopped]).pivot(index=["task", "seed"], columns="method", values="test_error")
    digits, linear, communities = (errors.loc[name] for name in ("digits", "mnist-linear", "communities"))
    assert digits["label-smoothing-tuned"].mean() < digits.online.mean()
    assert wilcoxon(linear.online - linear["handcrafted-long"]).pvalue > 0.05
    gain = communities["handcrafted, stopped"] - communities.online
    assert gain.mean() < 0 and wilcoxon(gain).pvalue < 0.05


def test_online_is_told_from_the_tuned_task_loss_where_the_text_says_so(final):
    told = {-1: [], 1: []}
    for task, runs in final.groupby("task"):
        errors = runs.pivot(index="seed", columns="method", values="test_error")
        others = [m for m in errors if m != "handcrafted-tuned" and np.isfinite(errors[m]).all()]
        gains = {m: errors[m] - errors["handcrafted-tuned"] for m in others}
        pvalues = {m: wilcoxon(gain).pvalue if gain.any() else 1.0 for m, gain in gains.items()}
        if dict(zip(pvalues, holm(list(pvalues.values())), strict=True))["online"] < 0.05:
            told[int(np.sign(gains["online"].mean()))].append(task)
    assert told == {-1: ["digits", "mnist-linear"], 1: ["mnist-mlp"]}


def test_the_learned_loss_walks_nearer_to_the_edge_in_every_seed():
    walks = pd.read_parquet(RESULTS / "curvature.parquet")
    shares = (walks.own / walks.limit).groupby([walks.method, walks.step, walks.seed]).first()
    learned, plain, fast = (shares[name] for name in ("learned", "cross-entropy", "cross-entropy, rate x 10"))
    assert learned.index.levshape == (21, 10) and (learned > plain).all()
    assert (learned[400] > fast[400]).all() and learned[400].max() < 1


def test_the_meta_learning_rate_is_chosen_on_validation_data(final):
    stored = json.loads((RESULTS / "comparison.json").read_text())
    online = final[final.method == "online"].set_index(["task", "seed"]).test_error
    for task, runs in pd.read_parquet(RESULTS / "meta_rate.parquet").groupby("task"):
        assert runs.groupby("meta_learning_rate").seed.nunique().eq(10).all()
        best = [of_seed.test_error[of_seed.valid_error.idxmin()] for _, of_seed in runs.groupby("seed")]
        assert stored[f"chosen_{task}"] == pytest.approx(np.mean(best))
        rate = METHODS["online"].online_meta_learning_rate(get_task(task))
        usual = runs[runs.meta_learning_rate == rate].set_index("seed").test_error
        assert usual.to_numpy() == pytest.approx(online[task][usual.index].to_numpy(), abs=1e-4)


@pytest.mark.parametrize("name", [path.name for path in sorted(RESULTS.glob("*.parquet"))])
def test_results_say_where_they_come_from(name):
    results = pd.read_parquet(RESULTS / name)
    for column in ("torch", "python", "device", "commit"):
        assert results[column].notna().all() and (results[column] != "unknown").all(), column
    assert not results.commit.str.contains("dirty").any()


def test_benchmarks_say_where_they_come_from():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        commits = re.findall(r'"commit": "([^"]*)"', path.read_text())
        assert commits and all(re.fullmatch("[0-9a-f]{7,}", commit) for commit in commits), path
