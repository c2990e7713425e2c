"""The ``adalfl`` command line: train one model, compare methods over seeds, draw and tabulate what was stored."""

from __future__ import annotations

import copy
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import matplotlib.pyplot as plt
import pandas as pd
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from adalfl_lite.compare.grid import compare, run
from adalfl_lite.compare.methods import MAIN_METHODS, METHODS, check_applies, get_method
from adalfl_lite.compare.results import final_errors, read_results, tied, write_results
from adalfl_lite.compare.tasks import TASKS, Task, get_task
from adalfl_lite.data.dataset import BUNDLED
from adalfl_lite.files import atomic_path, atomic_save
from adalfl_lite.losses.stored import StoredLoss
from adalfl_lite.losses.symbolic import SymbolicLoss
from analysis.loss_shapes import loss_curves, plot_loss_curves
from analysis.plotting import plot_comparison, plot_learning_curves, save_figure, theme
from analysis.statistics import summarise
from analysis.tables import comparison_table, render

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="""
**Train models with a loss that learns while they do** (AdaLFL, arXiv 2301.13247).

A small neural network takes the place of the loss. It is meta-learned before training (*offline*) and then changed
after every training step (*online*), so that the step it caused lowers the loss you care about on other data.

Start here:

    adalfl tasks                      # what can be trained
    adalfl methods                    # and with which losses
    adalfl train digits               # one model, about a minute
    adalfl compare digits --seeds 3   # handcrafted loss against learned ones
    adalfl table results/comparison.parquet
""",
)


class Figure(StrEnum):
    """What ``adalfl plot`` can draw."""

    comparison = "comparison"
    curves = "curves"


class Value(StrEnum):
    """What ``adalfl table`` can tabulate."""

    test_error = "test_error"
    test_loss = "test_loss"
    valid_error = "valid_error"
    cost = "cost"


VALUES = {
    Value.test_error: "Test error",
    Value.test_loss: "Task loss on the test split",
    Value.valid_error: "Validation error",
    Value.cost: "Seconds of computing, everything before the training included",
}


class Format(StrEnum):
    """What ``adalfl table`` can write."""

    markdown = "markdown"
    latex = "latex"
    html = "html"


Download = Annotated[bool, typer.Option("--download", help="Download the data if it is missing.")]
Root = Annotated[
    str | None, typer.Option(envvar="ADALFL_DATA", help="Folder of the data sets; bundled tasks need none.")
]
Device = Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, ...")]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps; the task's own number by default.")]
Out = Annotated[Path, typer.Option(help="Folder for the tables and pictures.")]
Results = Annotated[list[Path], typer.Argument(help="One or more .parquet files of `adalfl compare` or `train`.")]
LabelNoise = Annotated[
    float, typer.Option(help="Make this fraction of the train and validation labels wrong (classification).")
]
Imbalance = Annotated[
    float, typer.Option(help="Thin the train and validation classes until the first is this many times the last.")
]


@app.command()
def tasks() -> None:
    """List the tasks: a data set, a base model and the settings of its optimizer, SGD.

    Under *SGD* stand the learning rate, momentum, weight decay, and the steps at which the rate drops to a tenth.
    A task is named after its data. *Bundled* data comes with scikit-learn; `adalfl train TASK --download` and
    `adalfl compare TASK --download` fetch the rest.
    """
    columns = [Column(name, no_wrap=True) for name in ("task", "model", "steps", "batch", "data")]
    table = Table(*columns, "SGD", box=SIMPLE_HEAD)
    for task in TASKS.values():
        settings = [f"{task.learning_rate:g}"]
        if task.momentum:
            settings.append(f"{'Nesterov' if task.nesterov else 'momentum'} {task.momentum:g}")
        if task.weight_decay:
            settings.append(f"decay {task.weight_decay:g}")
        settings += [f"drop at {round(drop * task.steps)}" for drop in task.drops]
        where = "bundled" if task.dataset in BUNDLED else "files"
        table.add_row(task.name, task.model, str(task.steps), str(task.batch_size), where, ", ".join(settings))
    Console().print(table)


@app.command()
def methods() -> None:
    """List the methods that `adalfl train` and `adalfl compare` know: ways to have a loss, or a learning rate.

    The searched ones, *taylorglo* and *evomal*, take minutes where others take seconds, and need the extra `methods`
    of this package.

        adalfl compare digits --methods handcrafted,rate-online,online
    """
    table = Table(Column("method", no_wrap=True), "what it is", "for", box=SIMPLE_HEAD)
    for name, method in METHODS.items():
        table.add_row(name, escape(method.about), "both" if len(method.kinds) > 1 else method.kinds[0])
    Console().print(table)


@app.command()
def train(
    task: Annotated[str, typer.Argument(help="A name from `adalfl tasks`.")],
    method: Annotated[str, typer.Option(help=f"One of `adalfl methods`: {', '.join(METHODS)}.")] = "online",
    seed: Annotated[int, typer.Option(help="Seeds the split, the model, the loss and the batches.")] = 0,
    steps: Steps = None,
    label_noise: LabelNoise = 0.0,
    imbalance: Imbalance = 1.0,
    root: Root = None,
    download: Download = False,
    device: Device = "cpu",
    out: Out = Path("results"),
) -> None:
    """Train one model; keep it and the loss it learned with, and draw its learning curve and that loss.

    The files OUT/TASK--METHOD--seedSEED have its history (`.parquet`), picture (`.png`), weights (`.model.pt`, a state
    dictionary of torch for `task.make_model(data)`) and learned or searched loss (`.loss.pt`, for `LossNetwork.load`,
    `TaylorLoss.load` or `SymbolicLoss.load`).

    An interrupted training goes on where it stopped when the same command is given again; a learned loss is
    initialised anew first.

        adalfl train digits --method online
    """
    chosen = _task(task, steps, label_noise, imbalance)
    _checked(check_applies, method, chosen)
    _usable(device, out)
    _load(chosen, root=root, download=download, seed=seed)
    stem = out / f"{chosen.name}--{method}--seed{seed}"
    curves: dict[int, StoredLoss] = {}

    def keep(step: int, model: Any, loss: Any) -> None:
        if isinstance(loss, StoredLoss):
            curves[step] = copy.deepcopy(loss).cpu()
        if step == get_method(method).steps(chosen):  # before the last checkpoint says that there is no more to do
            weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
            atomic_save(weights, stem.with_name(stem.name + ".model.pt"))
            if curves:
                curves[step].save(stem.with_name(stem.name + ".loss.pt"))

    checkpoint = stem.with_name(stem.name + ".checkpoint")
    history = _checked(
        run, chosen, method, seed, root=root, device=device, callback=keep, checkpoint=checkpoint, progress=True
    )
    _write(history, stem.with_name(stem.name + ".parquet"))
    print_errors(history, "the model at the end of training")
    if curves and isinstance(found := curves[max(curves)], SymbolicLoss):
        Console().print(f"loss:    {found}", highlight=False, markup=False, soft_wrap=True)
    with theme():
        panels = 2 if curves else 1
        figure, axes = plt.subplots(1, panels, squeeze=False, figsize=(6.75, 3.0))
        plot_learning_curves(history, axes[0, 0])
        if curves:
            shown = curves if METHODS[method].online else {max(curves): curves[max(curves)]}
            kind = next(iter(curves.values())).kind
            plot_loss_curves(loss_curves(shown, kind), axes[0, 1], hue="step" if len(shown) > 1 else "target")
        _picture(figure, stem.with_name(stem.name + ".png"))
    checkpoint.unlink(missing_ok=True)


@app.command("compare")
def compare_command(
    tasks: Annotated[list[str] | None, typer.Argument(help="Names from `adalfl tasks`.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="The same as an option, once for each.")] = None,
    methods: Annotated[
        str, typer.Option(help=f"Names from `adalfl methods`, commas between: {', '.join(METHODS)}.")
    ] = ",".join(MAIN_METHODS),
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds: 0, 1, ...")] = 5,
    steps: Steps = None,
    label_noise: LabelNoise = 0.0,
    imbalance: Imbalance = 1.0,
    root: Root = None,
    download: Download = False,
    device: Device = "cpu",
    jobs: Annotated[int, typer.Option(min=1, help="Processes to use; a job is one (task, seed).")] = 1,
    together: Annotated[
        bool, typer.Option("--together", help="Run all seeds as one program, for small models.")
    ] = False,
    out: Out = Path("results"),
) -> None:
    """Train every method on every task with several seeds; print and draw mean test errors with 95 % intervals.

    Finished jobs are kept in OUT/jobs and not run again, so an interrupted comparison can be continued.
    OUT/comparison.parquet and its picture are of the last one; `adalfl table OUT/jobs/*.parquet` is of all.

    *handcrafted-tuned* and *handcrafted-all* ask whether a better learning rate, or training on the validation data,
    would have done as well; *online-train* adapts the loss without validation data.

        adalfl compare digits wine --methods handcrafted,online,handcrafted-tuned --seeds 10 --jobs 2
        adalfl compare digits --methods handcrafted,label-smoothing,online --label-noise 0.4
    """
    wanted = dict.fromkeys([*(tasks or ()), *(task or ())])
    if not wanted:
        _fail("no task is given; add a name from `adalfl tasks`, as in: adalfl compare digits")
    chosen = [_task(name, steps, label_noise, imbalance) for name in wanted]
    names = list(dict.fromkeys(name.strip() for name in methods.split(",")))
    for name in names:
        for each in chosen:
            _checked(check_applies, name, each)
    _usable(device, out)
    for each in chosen:
        _load(each, root=root, download=download)
    results = _checked(
        compare,
        chosen,
        names,
        range(seeds),
        folder=out / "jobs",
        root=root,
        device=device,
        jobs=jobs,
        together=together,
    )
    _write(results, out / "comparison.parquet")
    print_errors(results, "test error, mean over seeds")
    with theme():
        _picture(draw(results, Figure.comparison), out / "comparison.png")


@app.command()
def plot(
    results: Results,
    figure: Annotated[Figure, typer.Option(help="Errors at the end, or errors over training.")] = Figure.comparison,
    out: Annotated[Path | None, typer.Option(help="Picture to write: .png, .pdf or .svg.")] = None,
) -> None:
    """Draw stored results: one panel per task, methods in colours, 95 % intervals over seeds.

    adalfl plot results/comparison.parquet --figure curves --out curves.pdf
    """
    if out is None and len(results) > 1:
        _fail(f"{len(results)} files are given and no name for the picture; add --out PICTURE.png")
    frame = _stored(results)
    print_errors(frame, "test error, mean over seeds")
    with theme():
        _picture(draw(frame, figure), out or results[0].with_suffix(".png"))


@app.command("table")
def table_command(
    results: Results,
    format: Annotated[Format, typer.Option(help="How to write it.")] = Format.markdown,
    reference: Annotated[str, typer.Option(help="The method that the others are tested against.")] = "handcrafted",
    value: Annotated[Value, typer.Option(help="What to tabulate; cost is in seconds.")] = Value.test_error,
    out: Annotated[Path | None, typer.Option(help="File to write; printed by default.")] = None,
) -> None:
    """Write stored results as a table for a paper: methods down, tasks across, errors at the end of training.

    Each cell is the mean over seeds ± half its 95 % bootstrap interval; the lowest of a task is bold. An arrow marks a
    method that is lower (↓) or higher (↑) than the reference on the same seeds: Wilcoxon's signed-rank test, Holm's
    correction over the methods of a task, p < .05. Fewer than six seeds never reach that.

        adalfl table results/comparison.parquet
        adalfl table results/jobs/*.parquet --value cost
        adalfl table results/comparison.parquet --format latex --reference handcrafted-tuned --out table.tex
    """
    runs = final_errors(_stored(results))
    notes = [
        f"{VALUES[value]}, mean over seeds ± half a 95 % bootstrap interval; arrows: lower or higher than {reference}, "
        "paired Wilcoxon test with Holm's correction, p < .05."
    ]
    if value is Value.valid_error:
        trained_on = runs.method.map(lambda name: name in METHODS and METHODS[name].train_on_valid)
        if trained_on.any():
            notes.append(f"Without {', '.join(runs.method[trained_on].unique())}: trained on the validation split.")
        runs = runs[~trained_on]
    if reference not in set(runs.method):
        _fail(
            f"no runs of the reference {reference!r} in the results; they have {', '.join(runs.method.unique())}; add"
            f" --reference {runs.method.iloc[0]}"
        )
    if value not in runs:
        _fail(f"the results have no column for {value}; they were not written by compare")
    table = _checked(comparison_table, runs, reference, value.value)
    if table.diverged.any():
        notes.append("In brackets, runs that diverged: the mean is of the others, and is not tested.")
    if value is Value.cost and "seeds_together" in runs and (runs.seeds_together > 1).any():
        table = without_shares(table, runs)
        notes.append(
            "A cell without ± is an equal share of one program that ran all seeds: not to be compared with seeds that"
            " ran one by one, so a task that has one has no bold and no arrows."
        )
    text = render(table, format, " ".join(notes))
    if out is None:
        print(text, end="")
        return
    with atomic_path(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    Console().print(f"table:   {out}", highlight=False, markup=False, soft_wrap=True)


def without_shares(table: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """A table of costs without what equal shares of one program cannot tell: intervals, the best, and tests."""
    shared = runs[runs.seeds_together > 1]
    is_share = table.set_index(["task", "method"]).index.isin(shared.set_index(["task", "method"]).index)
    in_task = table.task.isin(shared.task)
    return table.assign(
        low=table.low.mask(is_share),
        high=table.high.mask(is_share),
        best=table.best & ~in_task,
        arrow=table.arrow.mask(in_task, ""),
    )


def print_errors(results: pd.DataFrame, title: str) -> None:
    """Print the mean test error of every task and method with its interval over seeds, and the runs that diverged."""
    last = final_errors(results)
    summary = summarise(last[~last.diverged]) if not last.diverged.all() else pd.DataFrame()
    table = Table("task", "method", "test error", "95 % interval", "seeds", "diverged", title=escape(title))
    for (task, method), group in last.groupby(["task", "method"], sort=False):
        cells = ["–", "–"]
        for row in summary.itertuples():
            if (row.task, row.method) == (task, method):
                interval = f"{row.low:.4f} – {row.high:.4f}" if row.n > 1 else "–"
                cells = [f"{row.mean:.4f}", interval]
        table.add_row(str(task), str(method), *cells, str(len(group)), str(int(group.diverged.sum())))
    Console().print(table)


def draw(results: pd.DataFrame, figure: Figure) -> plt.Figure:
    """One panel per task: the errors at the end, or over training. Diverged runs are left out."""
    last = final_errors(results)
    keys = ["task", "method", "seed"]
    kept = results.merge(last.loc[~last.diverged, keys], on=keys)
    if kept.empty:
        _fail("there is nothing to draw: every run diverged")
    names = list(kept.task.unique())
    height = 2.6 if figure is Figure.curves else 0.6 + 0.32 * kept.method.nunique()
    drawn, axes = plt.subplots(len(names), 1, figsize=(6.75, height * len(names)), squeeze=False)
    for ax, name in zip(axes[:, 0], names, strict=True):
        rows = kept[kept.task == name]
        if figure is Figure.curves:
            plot_learning_curves(rows[rows.step > 0], ax)
        else:
            plot_comparison(final_errors(rows), ax)
        ax.set_title(name, loc="right")
    return drawn


def _task(name: str, steps: int | None, label_noise: float, imbalance: float) -> Task:
    task = _checked(get_task, name).corrupted(label_noise=label_noise, imbalance=imbalance)
    return task.with_(steps=steps) if steps else task


def _stored(paths: list[Path]) -> pd.DataFrame:
    """Read tables of results into one; end the program if a file is not one, or two have the same run."""
    for path in paths:
        if not path.is_file():
            _fail(f"{path} does not exist; give the .parquet file that train or compare wrote")
    stored = pd.concat([_checked(read_results, path) for path in paths], ignore_index=True)
    keys = ["task", "method", "seed", "step"]
    twice = stored.duplicated(keys)
    if twice.any():
        _fail(f"the files share a run, {stored.loc[twice, keys[:3]].iloc[0].to_dict()}; leave one out")
    return tied(stored)


def _checked(function: Any, *arguments: Any, **options: Any) -> Any:
    """Call ``function``; what the user can mend ends the program with one line instead of a traceback."""
    try:
        return function(*arguments, **options)
    except (ValueError, OSError, FloatingPointError) as error:
        _fail(str(error))


def _load(task: Task, **options: Any) -> None:
    """Load the data once before anything is trained; a damaged file is a ``RuntimeError``."""
    try:
        _checked(task.load, **options)
    except RuntimeError as error:
        _fail(str(error))


def _usable(device: str, out: Path) -> None:
    """End the program unless tensors can be made on ``device`` and files in ``out``."""
    _checked(out.mkdir, parents=True, exist_ok=True)
    try:
        torch.zeros(1, device=device).tolist()  # "meta" makes tensors, without anything in them
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        _fail(f"cannot train on device {device!r}: {str(error).splitlines()[0]}")


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(2)


def _write(table: pd.DataFrame, path: Path) -> None:
    write_results(table, path)
    Console().print(f"table:   {path}", highlight=False, markup=False, soft_wrap=True)


def _picture(figure: plt.Figure, path: Path) -> None:
    _checked(save_figure, figure, path)
    plt.close(figure)
    Console().print(f"picture: {path}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    app()
