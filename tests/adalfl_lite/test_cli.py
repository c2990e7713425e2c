"""The command line end to end on small runs: what it prints and writes, and one line for everything a user can mend."""

import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from adalfl_lite import cli
from adalfl_lite.cli import app
from adalfl_lite.compare import grid as experiments
from adalfl_lite.compare import methods
from adalfl_lite.compare.methods import METHODS
from adalfl_lite.compare.results import final_errors
from adalfl_lite.compare.tasks import TASKS, get_task
from adalfl_lite.data.dataset import BUNDLED
from adalfl_lite.losses.network import LossNetwork
from adalfl_lite.losses.symbolic import SymbolicLoss
from adalfl_lite.losses.taylor import TaylorLoss
from adalfl_lite.train.evaluation import evaluate
from tests.shorthand import short

COMMANDS = ["tasks", "methods", "train", "compare", "plot", "table"]
WIDE = {"COLUMNS": "300", "TERMINAL_WIDTH": "300", "NO_COLOR": "1"}


@pytest.fixture(scope="module", autouse=True)
def short_initialisations():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        few = {"steps": 30, "rehearsal_steps": 10, "imitation_steps": 10}
        patch.setattr(methods, "METHODS", {name: short(how, **few) for name, how in METHODS.items()})
        yield
    torch.set_num_threads(threads)


def adalfl(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=WIDE)


def succeeds(*arguments):
    result = adalfl(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments):
    """Exit status 2, nothing raised, and beside progress bars one line of explanation, which is returned."""
    result = adalfl(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    lines = [
        line for line in re.split(r"[\r\n]", result.stderr) if line.strip() and not re.search(r"\d+%\|.*\]$", line)
    ]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Help and listing --------------------------------------------------------------------------------------------------


def test_help_shows_where_to_start():
    text = succeeds("--help")
    assert adalfl().output.strip() == text.strip()  # no arguments at all
    for example in ("adalfl tasks", "adalfl train digits", "adalfl compare digits --seeds 3"):
        assert example in text
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", text)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_an_example(command):
    text = succeeds(command, "--help")
    body = [line for line in text.splitlines() if "Usage:" not in line]
    assert any(re.search(r"\badalfl [a-z]+", line) for line in body), text


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_help_names_every_method(command):
    text = succeeds(command, "--help")
    assert all(method in text for method in METHODS)


def test_methods_lists_every_method_and_what_it_is_for():
    lines = succeeds("methods").splitlines()
    for name, method in METHODS.items():
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert line.rstrip().endswith("both" if len(method.kinds) == 2 else method.kinds[0])
        assert method.about and method.about in line


def test_tasks_lists_every_task_and_where_its_data_comes_from():
    lines = succeeds("tasks").splitlines()
    for task in TASKS.values():
        (line,) = (line for line in lines if re.search(rf"^ *{re.escape(task.name)} ", line))
        for value in (task.dataset, task.model, task.steps, task.batch_size):
            assert re.search(rf"\b{value}\b", line)
        assert ("bundled" in line) == (task.dataset in BUNDLED)


def test_harder_tasks_have_results_of_their_own(tmp_path):
    options = ("--methods", "handcrafted", "--seeds", 1, "--steps", 4, "--out", tmp_path)
    succeeds("compare", "iris", *options)
    text = succeeds("compare", "iris", "--label-noise", 0.4, "--imbalance", 2, *options)
    assert "iris-imbalance2-noise0.4" in text
    names = [f"iris{end}--handcrafted--seed0.parquet" for end in ("", "-imbalance2-noise0.4")]
    first, second = (pd.read_parquet(tmp_path / "jobs" / name) for name in names)
    assert set(second.task) == {"iris-imbalance2-noise0.4"} and first.test_loss.iloc[-1] != second.test_loss.iloc[-1]


# Train -------------------------------------------------------------------------------------------------------------


def test_train_online_writes_history_picture_and_loss(tmp_path):
    open_before = plt.get_fignums()
    text = succeeds("train", "iris", "--steps", 20, "--seed", 1, "--out", tmp_path / "new")
    stem = "iris--online--seed1"
    assert files(tmp_path) == [f"new/{stem}{end}" for end in (".loss.pt", ".model.pt", ".parquet", ".png")]
    history = pd.read_parquet(tmp_path / "new" / f"{stem}.parquet")
    assert history.step.tolist() == list(range(21)) and set(history.method) == {"online"} and set(history.seed) == {1}
    assert f"{history.test_error.iloc[-1]:.4f}" in text and str(tmp_path / "new" / f"{stem}.parquet") in text
    assert LossNetwork.load(tmp_path / "new" / f"{stem}.loss.pt").kind == "classification"
    assert (tmp_path / "new" / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert plt.get_fignums() == open_before


@pytest.mark.parametrize("method", ["handcrafted-tuned", "online"])
def test_train_keeps_the_model_that_was_evaluated_last(tmp_path, method):
    succeeds("train", "wine", "--method", method, "--steps", 20, "--seed", 2, "--out", tmp_path)
    last = pd.read_parquet(tmp_path / f"wine--{method}--seed2.parquet").iloc[-1]
    task = get_task("wine")
    data = task.load(seed=2)
    model = task.make_model(data)
    model.load_state_dict(torch.load(tmp_path / f"wine--{method}--seed2.model.pt", weights_only=True))
    assert evaluate(model, data.test, data.kind) == (last.test_error, last.test_loss)


@pytest.mark.parametrize("method", ["taylorglo", "evomal"])
def test_train_keeps_the_loss_that_a_search_found(tmp_path, monkeypatch, method):
    few = {"taylorglo": (1, 4), "evomal": (1, 16)}[method]
    monkeypatch.setitem(methods.METHODS, method, short(METHODS[method], searched=few, local=2))
    text = succeeds("train", "iris", "--method", method, "--steps", 4, "--out", tmp_path)
    stem = f"iris--{method}--seed0"
    assert files(tmp_path) == [f"{stem}{end}" for end in (".loss.pt", ".model.pt", ".parquet", ".png")]
    loss = (TaylorLoss if method == "taylorglo" else SymbolicLoss).load(tmp_path / f"{stem}.loss.pt")
    assert any(parameter.abs().sum() for parameter in loss.parameters())
    assert method == "taylorglo" or f"loss:    {loss}\n" in text


def test_train_with_the_handcrafted_loss_has_no_loss_to_write(tmp_path):
    succeeds("train", "diabetes", "--method", "handcrafted", "--steps", 4, "--out", tmp_path)
    stem = "diabetes--handcrafted--seed0"
    assert files(tmp_path) == [f"{stem}{end}" for end in (".model.pt", ".parquet", ".png")]


def test_an_interrupted_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    arguments = ("train", "iris", "--method", "handcrafted", "--steps", 20, "--out", tmp_path)
    evaluate, calls = methods.fit.__globals__["evaluate"], []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 15:  # two at each of steps 0 to 6, then in the middle of step 7's
            raise KeyboardInterrupt
        return evaluate(*given)

    monkeypatch.setitem(methods.fit.__globals__, "evaluate", interrupted)
    assert adalfl(*arguments).exit_code != 0
    assert files(tmp_path) == ["iris--handcrafted--seed0.checkpoint"]
    calls.extend([None] * 100)
    succeeds(*arguments)
    assert len(calls) == 15 + 100 + 2 * 14  # steps 7 to 20 only
    resumed = pd.read_parquet(tmp_path / "iris--handcrafted--seed0.parquet")
    monkeypatch.undo()
    assert files(tmp_path) == [f"iris--handcrafted--seed0{end}" for end in (".model.pt", ".parquet", ".png")]
    succeeds(*arguments)
    whole = pd.read_parquet(tmp_path / "iris--handcrafted--seed0.parquet")
    times = ["seconds", "initialisation_seconds"]
    pd.testing.assert_frame_equal(resumed.drop(columns=times), whole.drop(columns=times), check_exact=True)


def test_a_training_interrupted_after_its_last_step_has_kept_model_and_loss(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    arguments = ("train", "iris", "--steps", 5, "--out", tmp_path)
    stem = "iris--online--seed0"
    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_results", interrupted)
        assert adalfl(*arguments).exit_code != 0
    assert files(tmp_path) == [f"{stem}{end}" for end in (".checkpoint", ".loss.pt", ".model.pt")]
    kept = [(tmp_path / f"{stem}{end}").read_bytes() for end in (".loss.pt", ".model.pt")]
    succeeds(*arguments)
    assert files(tmp_path) == [f"{stem}{end}" for end in (".loss.pt", ".model.pt", ".parquet", ".png")]
    assert kept == [(tmp_path / f"{stem}{end}").read_bytes() for end in (".loss.pt", ".model.pt")]


# Compare and plot --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A folder, and what ``compare`` printed while filling it."""
    out = tmp_path_factory.mktemp("comparison")
    arguments = ("--methods", "handcrafted, offline", "--seeds", 2, "--steps", 10, "--out", out)
    return out, succeeds("compare", "iris", "wine", *arguments)


def test_compare_runs_the_grid_and_prints_the_mean_over_seeds(comparison):
    out, text = comparison
    jobs = [
        f"jobs/{t}--{m}--seed{s}.parquet" for t in ("iris", "wine") for m in ("handcrafted", "offline") for s in (0, 1)
    ]
    assert files(out) == ["comparison.parquet", "comparison.png", *jobs]
    last = final_errors(pd.read_parquet(out / "comparison.parquet"))
    assert len(last) == 8
    for (task, method), mean in last.groupby(["task", "method"]).test_error.mean().items():
        (line,) = (line for line in text.splitlines() if re.search(rf" {task} .* {method} ", line))
        assert f" {mean:.4f} " in line and re.search(r" 2 .* 0 ", line)


def test_compare_again_runs_nothing(comparison, monkeypatch):
    out, text = comparison
    monkeypatch.setattr(experiments, "run", lambda *_, **__: pytest.fail("a finished job was run again"))
    arguments = ("--methods", "handcrafted,offline", "--seeds", 2, "--steps", 10, "--out", out)
    assert succeeds("compare", "iris", "wine", *arguments) == text
    assert "of a task with steps 10, not 11; give another folder" in fails(
        "compare", "iris", "--steps", 11, "--out", out
    )


def test_compare_together_is_compare(comparison, tmp_path):
    out, text = comparison
    options = ("--methods", "handcrafted", "--seeds", 2, "--steps", 10, "--together", "--out", tmp_path)
    assert "handcrafted" in succeeds("compare", "iris", *options)
    found = pd.read_parquet(tmp_path / "comparison.parquet")
    assert set(found.seeds_together) == {2}
    whole = pd.read_parquet(out / "comparison.parquet").query("task == 'iris' and method == 'handcrafted'")
    assert found.test_loss.to_numpy() == pytest.approx(whole.test_loss.to_numpy(), abs=1e-5)


@pytest.mark.parametrize("figure", ["comparison", "curves"])
@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_plot_draws_a_stored_table(comparison, tmp_path, figure, ending, start):
    out, _ = comparison
    picture = tmp_path / f"{figure}.{ending}"
    text = succeeds("plot", out / "comparison.parquet", "--figure", figure, "--out", picture)
    assert picture.read_bytes().startswith(start) and str(picture) in text


def test_plot_writes_beside_the_table_by_default(comparison, tmp_path):
    table = tmp_path / "table.parquet"
    table.write_bytes((comparison[0] / "comparison.parquet").read_bytes())
    succeeds("plot", table)
    assert files(tmp_path) == ["table.parquet", "table.png"]


def test_the_jobs_of_several_comparisons_make_one_table_and_one_picture(comparison, tmp_path):
    out, _ = comparison
    jobs = sorted((out / "jobs").iterdir())
    text = succeeds("table", *jobs, "--reference", "handcrafted")
    assert sorted(text.splitlines()) == sorted(succeeds("table", out / "comparison.parquet").splitlines())
    assert "2 files are given and no name for the picture; add --out" in fails("plot", *jobs[:2])
    succeeds("plot", *jobs, "--out", tmp_path / "all.png")
    assert files(tmp_path) == ["all.png"]


@pytest.mark.parametrize(("format", "start"), [("markdown", "| method |"), ("latex", "%"), ("html", "<table>")])
def test_table_writes_the_means_of_a_stored_comparison(comparison, tmp_path, format, start):
    stored = comparison[0] / "comparison.parquet"
    text = succeeds("table", stored, "--format", format)
    assert text.startswith(start)
    for mean in final_errors(pd.read_parquet(stored)).groupby(["task", "method"]).test_error.mean():
        assert f"{mean:.4f}" in text
    assert str(tmp_path / "table") in succeeds("table", stored, "--format", format, "--out", tmp_path / "table")
    assert (tmp_path / "table").read_text(encoding="utf-8") == text


def test_table_tells_what_a_method_costs(comparison):
    last = final_errors(pd.read_parquet(comparison[0] / "comparison.parquet"))
    text = succeeds("table", comparison[0] / "comparison.parquet", "--value", "cost")
    assert "Seconds of computing" in text
    rows = last[(last.task == "wine") & (last.method == "offline")]
    assert f"{(rows.initialisation_seconds + rows.seconds).mean():.4f}" in text


def test_shares_of_one_program_are_neither_the_cheapest_nor_tested(comparison, tmp_path):
    table = pd.read_parquet(comparison[0] / "comparison.parquet")
    for seed in range(2, 9):
        table = pd.concat([table, table[table.seed == 0].assign(seed=seed)])
    table["seconds"] = table.seconds + 0.01 * table.seed
    shared = (table.task == "wine") & (table.method == "offline")
    table.loc[shared, ["seconds", "seeds_together"]] = [0.25, 9]
    table.to_parquet(tmp_path / "table.parquet")
    text = succeeds("table", tmp_path / "table.parquet", "--value", "cost")
    (line,) = (line for line in text.splitlines() if line.startswith("| offline |"))
    iris, wine = line.split("|")[2:4]
    assert "±" in iris and "↑" in iris and not set("±↑↓*") & set(wine) and "A cell without ±" in text
    assert "A cell without ±" not in succeeds("table", comparison[0] / "comparison.parquet", "--value", "cost")


def test_no_validation_error_is_shown_of_what_trained_on_it(tmp_path):
    options = ("--methods", "handcrafted,handcrafted-all", "--seeds", 1, "--steps", 4, "--out", tmp_path)
    succeeds("compare", "iris", "--task", "iris", "--task", "wine", *options)
    text = succeeds("table", tmp_path / "comparison.parquet", "--value", "valid_error")
    assert "| handcrafted-all |" not in text and "Without handcrafted-all: trained on the validation split" in text
    assert "iris | wine" in text and "| handcrafted-all |" in succeeds("table", tmp_path / "comparison.parquet")


def test_table_shows_the_results_that_come_with_the_book():
    stored = Path(__file__).parents[2] / "book" / "results" / "comparison.parquet"
    text = succeeds("table", stored)
    header, _, *lines = text.splitlines()
    for task in ("digits", "wine", "breast_cancer", "diabetes", "mnist-lenet5"):
        assert f"| {task} |" in header
    for method in ("handcrafted", "online"):
        assert sum(line.startswith(f"| {method} |") for line in lines) == 1
    assert text.count("**") // 2 >= 5 and "↓" in text
    assert "(4 diverged)" in text and "In brackets, runs that diverged" in text
    assert "iris" in succeeds("table", stored, "--value", "cost").splitlines()[0]


def test_table_says_what_is_missing(comparison, tmp_path):
    stored = comparison[0] / "comparison.parquet"
    assert "no runs of the reference 'ml3' in the results; they have handcrafted, offline" in fails(
        "table", stored, "--reference", "ml3"
    )
    assert "does not exist" in fails("table", stored, tmp_path / "nothing.parquet")
    assert "the files share a run, {'task': 'iris', 'method': 'handcrafted', 'seed': 0}" in fails(
        "table", stored, stored
    )


def test_a_diverged_run_is_counted_and_left_out_of_the_picture(comparison, tmp_path):
    table = pd.read_parquet(comparison[0] / "comparison.parquet")
    bad = (table.task == "wine") & (table.method == "offline") & (table.seed == 0) & (table.step == 10)
    table.loc[bad, "test_error"] = float("inf")
    table.to_parquet(tmp_path / "table.parquet")
    text = succeeds("plot", tmp_path / "table.parquet")
    (line,) = (line for line in text.splitlines() if re.search(r" wine .* offline ", line))
    kept = table[(table.task == "wine") & (table.method == "offline") & (table.seed == 1)].test_error.iloc[-1]
    assert re.search(r" 2 .* 1 ", line) and f" {kept:.4f} " in line
    drawn = cli.draw(table, cli.Figure.comparison)
    assert [ax.get_title(loc="right") for ax in drawn.axes] == ["iris", "wine"]
    table["test_error"] = float("inf")
    table.to_parquet(tmp_path / "table.parquet")
    assert "nothing to draw: every run diverged" in fails("plot", tmp_path / "table.parquet")


# What a user can mend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "cifar"), "unknown task 'cifar'; known tasks: digits, iris"),
        (("train", "[/red]"), "unknown task '[/red]'; known tasks: digits"),  # is not markup
        (("train", "iris", "--method", "magic"), "unknown method 'magic'; known methods: handcrafted"),
        (("train", "iris", "--device", "abacus"), "cannot train on device 'abacus': "),
        (("train", "diabetes", "--label-noise", "0.2"), "label_noise is for classification; diabetes is regression"),
        (("compare", "iris", "--imbalance", "0.5"), "imbalance must be 1 or more, got 0.5"),
        (("compare", "iris", "diabetes", "--methods", "focal"), "method 'focal' is for classification, task 'diab"),
        (("train", "iris", "--seed", "-1"), "seed must lie in"),
        (("train", "mnist-mlp", "--root", "nowhere"), "download=True"),
        (("compare", "iris", "cifar"), "unknown task 'cifar'"),
        (("compare", "--task", "iris", "--task", "cifar"), "unknown task 'cifar'"),
        (("compare", "--seeds", "2"), "no task is given; add a name from `adalfl tasks`"),
        (("compare", "iris", "--methods", "online,"), "unknown method ''"),
        (("compare", "iris", "mnist-mlp", "--root", "nowhere"), "not found"),
        (("compare", "iris", "--device", "abacus"), "cannot train on device 'abacus': "),
        (("plot", "nothing[/b].parquet"), "nothing[/b].parquet does not exist; give the .parquet file"),
    ],
)
def test_bad_arguments_end_with_one_line_before_anything_is_trained(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("run", "compare"):
        monkeypatch.setattr(cli, name, lambda *_, **__: pytest.fail("training was started"))
    assert message in fails(*arguments)
    assert files(tmp_path) == []


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_trained(tmp_path, monkeypatch, command):
    for name in ("run", "compare"):
        monkeypatch.setattr(cli, name, lambda *_, **__: pytest.fail("training was started"))
    (tmp_path / "file").touch()
    assert "file" in fails(command, "iris", "--out", tmp_path / "file")


def test_damaged_data_is_refused_with_one_line(tmp_path):
    (tmp_path / "communities").mkdir()
    (tmp_path / "communities" / "communities.data").write_text("cut off")
    for command in ("train", "compare"):
        line = fails(command, "communities", "--root", tmp_path, "--out", tmp_path / "out")
        assert "communities.data is damaged or not the official file" in line


def test_a_checkpoint_of_another_run_is_refused_with_one_line(tmp_path):
    (tmp_path / "iris--handcrafted--seed0.checkpoint").write_bytes(b"something else")
    line = fails("train", "iris", "--method", "handcrafted", "--steps", 5, "--out", tmp_path)
    assert "iris--handcrafted--seed0.checkpoint cannot be read" in line


def test_a_training_that_diverges_ends_with_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(cli.TASKS, "iris", TASKS["iris"].with_(learning_rate=1e38))
    line = fails("train", "iris", "--method", "handcrafted", "--steps", 40, "--out", tmp_path)
    assert "lower the base learning rate" in line


def test_tables_that_plot_cannot_read_are_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("step,error")
    assert "arquet" in fails("plot", tmp_path / "text.parquet")
    pd.DataFrame({"task": ["iris"], "step": [1]}).to_parquet(tmp_path / "other.parquet")
    assert "lacks the columns method, seed, test_error; give a file" in fails("plot", tmp_path / "other.parquet")


def test_a_picture_of_an_unknown_kind_is_refused(comparison, tmp_path):
    line = fails("plot", comparison[0] / "comparison.parquet", "--out", tmp_path / "picture.bmp")
    assert "'picture.bmp' must end in .pdf, .svg, .png" in line
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "arguments", [("train",), ("train", "iris", "--steps", "0"), ("plot", "x", "--figure", "pie"), ("nonsense",)]
)
def test_misspelt_commands_show_the_usage(arguments):
    result = adalfl(*arguments)
    assert result.exit_code == 2 and "Usage:" in result.stderr and "Traceback" not in result.output


@pytest.mark.slow
def test_the_installed_command_runs_in_a_process_of_its_own(tmp_path):
    """Its exit status, its streams and its files, as a shell sees them."""
    program = [str(Path(sys.executable).with_name("adalfl"))]
    environment = {**os.environ, **WIDE, "OMP_NUM_THREADS": "1"}

    def shell(*arguments):
        return subprocess.run(
            [*program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
        )

    good = shell("train", "iris", "--method", "handcrafted", "--steps", "5")
    assert good.returncode == 0, good.stderr
    assert files(tmp_path) == [f"results/iris--handcrafted--seed0{end}" for end in (".model.pt", ".parquet", ".png")]
    assert "iris--handcrafted--seed0.png" in good.stdout
    bad = shell("train", "cifar")
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: unknown task 'cifar'") and bad.stderr.count("\n") == 1
