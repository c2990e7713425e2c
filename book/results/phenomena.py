"""Measure what a learned loss does to training: python book/results/phenomena.py [--tasks digits --seeds 0 1 2]

For every task and seed one loss network is initialised offline, and one model is trained with it while it adapts online
(the variant "online"). Every other variant is a control of that run: the same fresh model, batches and optimizer, with
one thing changed. Each finished variant is a file in --folder, which a rerun skips; all of them together become
phenomena.parquet beside this file. The loss networks that digits start from are kept in phenomena_losses/, so that the
chapters need not learn them again.

Rows are of a kind: "record" (the model and the loss on fixed rows of the data, at some steps), "layer" (the same, layer
by layer) or "batch" (∇M = c ∇L + r on the training batch of a step).
"""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from script import HERE, arguments, begin, note, save
from torch import Tensor, nn

from adalfl_lite import Initialiser, LossNetwork, OnlineLearningRate, OnlineLoss, initialise
from adalfl_lite.compare import Task, fresh, get_task
from adalfl_lite.compare.recipes import INITIALISATION_SEED, Job, streams
from adalfl_lite.data import BatchSampler, Dataset, Split
from adalfl_lite.data.corruption import relabelled
from adalfl_lite.engines import plain_step
from adalfl_lite.files import atomic_save, load_payload
from adalfl_lite.learn import LearningRate, initialise_learning_rate
from adalfl_lite.losses import Loss
from analysis.calibration import calibration_scores, predictions
from analysis.early_stopping import push_and_gap
from analysis.effective_lr import effective_learning_rate
from analysis.inputs import layers
from analysis.label_smoothing import implied_label_smoothing, logit_statistics, resting_point, target_gradients

FORMAT = "adalfl-phenomena-1"
META_LEARNING_RATE = 1e-4
BATCH_EVERY = 5
RATES = (0.03, 0.1, 0.3, 3.0, 10.0, 30.0, 100.0)

Schedule = Callable[[int], float]
LossAt = Callable[[int], Loss]


@dataclass(frozen=True)
class Setting:
    """A task; which part of its training and validation labels is wrong; how its loss is initialised.

    ``rows`` is the size of either split, cut to its first rows; None leaves it. Along the way ``probe`` rows of each
    are measured, 25 times in the online run and ``records`` in the others. ``only`` names the controls to run; None
    runs all.
    """

    task: Task
    seeds: int
    wrong_labels: float = 0.0
    rows: int | None = None
    initialisation_steps: int = 800
    rehearsals: int = 5
    rehearsal_steps: int = 600
    probe: int = 1000
    records: int = 25
    only: tuple[str, ...] | None = None

    def load(self, seed: int, root: str | None = None) -> Dataset:
        """The data, cut to ``rows``, with wrong labels put in."""
        data = self.task.load(seed=seed, root=root)
        if self.rows:
            first = slice(self.rows)
            data = replace(data, train=data.train.take(first), valid=data.valid.take(first))
        draw = torch.Generator().manual_seed(40_000 + seed)
        return replace(data, train=self._spoilt(data.train, draw), valid=self._spoilt(data.valid, draw))

    def _spoilt(self, split: Split, draw: torch.Generator) -> Split:
        wrong = torch.rand(len(split), generator=draw) < self.wrong_labels
        shift = torch.randint(1, 10, (len(split),), generator=draw)  # of all rows: so were the stored results drawn
        return relabelled(split, wrong, shift[wrong], 10)


DIGITS = get_task("digits").with_(steps=1000)
SETTINGS = {
    "digits": Setting(DIGITS, seeds=4),
    "noisy-digits": Setting(
        DIGITS.with_(learning_rate=0.03),
        seeds=3,
        wrong_labels=0.2,
        only=(
            *("handcrafted", *(f"rate x{factor:g}" for factor in RATES), "constant", "schedule", "frozen at 0"),
            *("from 0.5 plain", "from 0.5 scaled", "smoothing", "constant smoothing"),
            *("smoothing without scale", "scale without smoothing"),
        ),
    ),
    "mnist-lenet5": Setting(
        get_task("mnist-lenet5").with_(steps=600, learning_rate=0.1),
        seeds=3,
        initialisation_steps=300,
        rehearsals=3,
        rehearsal_steps=200,
        probe=500,
        records=5,
        only=(
            *("handcrafted", "rate x0.3", "rate x3", "rate x10"),
            *("schedule", "smoothing", "scale without smoothing"),
        ),
    ),
    "noisy-mnist": Setting(
        get_task("mnist-lenet5").with_(steps=1000, learning_rate=0.1),
        seeds=3,
        wrong_labels=0.2,
        rows=2000,
        initialisation_steps=300,
        rehearsals=3,
        rehearsal_steps=600,
        only=(
            *("handcrafted", "rate x0.03", "rate x0.1", "rate x0.3", "rate x3"),
            *("schedule", "from 0.5 plain", "from 0.5 scaled"),
        ),
    ),
}


def smoothed_cross_entropy(prediction: Tensor, target: Tensor, epsilon: float, scale: float = 1.0) -> Tensor:
    """Cross-entropy against (1 − ε) y + ε/C, times a scale."""
    return scale * F.cross_entropy(prediction, target, label_smoothing=epsilon)


def schedule(frame: pd.DataFrame, column: str, window: int = 1) -> Schedule:
    """A column of a run as a function of the step: a rolling mean, interpolated; negative values count as zero."""
    values = frame[column].rolling(window, center=True, min_periods=1).mean().clip(lower=0)
    return lambda step: float(np.interp(step, frame["step"], values))


class Run:
    """Everything that is trained for one setting and seed."""

    def __init__(self, name: str, seed: int, folder: Path, root: str | None = None):
        self.name, self.seed, self.folder = name, seed, folder
        self.setting = SETTINGS[name]
        self.task, self.data = self.setting.task, self.setting.load(seed, root)
        self.steps = self.task.steps
        self.probe = {part: getattr(self.data, part)[: self.setting.probe] for part in ("train", "valid", "test")}

    def all_variants(self) -> None:
        """Train every variant that has no file yet."""
        online = self.online
        c = schedule(online[online.kind == "batch"], "scale", window=5)
        mean_c = np.mean([c(step) for step in range(self.steps)])
        whole = online[online.kind == "record"]
        by_layer = {name: schedule(rows, "scale") for name, rows in online[online.kind == "layer"].groupby("layer")}
        fitted = whole[whole.identifiability >= min(0.2, whole.identifiability.max())]
        epsilon, s = schedule(fitted, "epsilon"), schedule(fitted, "smoothing_scale")
        states = self.states
        if self.task.dataset == "digits" and self.seed < 3:
            kept = HERE / "phenomena_losses" / f"{self.name}-seed{self.seed}.pt"
            self.network(states[0]["loss"]).save(kept)
            note(kept)

        def rate(factor: float) -> LossAt:
            return lambda step: partial(smoothed_cross_entropy, epsilon=0.0, scale=factor)

        def scaled(by: Schedule, epsilon: Schedule = lambda step: 0.0) -> LossAt:
            return lambda step: partial(smoothed_cross_entropy, epsilon=min(epsilon(step), 1), scale=by(step))

        self.variant("handcrafted", rate(1.0))
        for factor in RATES:
            self.variant(f"rate x{factor:g}", rate(factor))
        for step in (0, self.steps):
            frozen = self.network(states[step]["loss"]).requires_grad_(False)
            self.variant(f"frozen at {step / self.steps:g}", lambda step, frozen=frozen: frozen)
        self.variant("schedule", scaled(c))
        self.variant("constant", rate(mean_c))
        self.variant("layer schedules", rate(1.0), layer_scales=by_layer)
        half = self.steps // 2
        so_far = np.mean([c(step) for step in range(half)])
        for name, factor in (("plain", 1.0), ("scaled", so_far)):
            self.variant(f"from 0.5 {name}", rate(factor), start=states[half])
        self.variant("smoothing", scaled(s, epsilon))
        mean_s, mean_epsilon = (np.mean([f(step) for step in range(self.steps)]) for f in (s, epsilon))
        self.variant("constant smoothing", scaled(lambda step: mean_s, lambda step: mean_epsilon))
        self.variant("smoothing without scale", scaled(lambda step: 1.0, epsilon))
        self.variant("scale without smoothing", scaled(s))
        self.variant("algorithm 4", rate(1.0), learned_rate=True)

    def variant(self, name: str, loss_at: LossAt, **options) -> None:
        """Train one variant, unless its file is there or the setting does without it."""
        wanted = self.setting.only is None or name in self.setting.only
        if wanted and not self.file(name).exists():
            self.train(name, loss_at, **options)

    @cached_property
    def online(self) -> pd.DataFrame:
        """The rows of the run that all others are controls of."""
        if not (self.file("online").exists() and self.states_file.exists()):
            network = self.learned_loss()
            keep = {0, self.steps // 2, self.steps}
            states = self.train("online", lambda step: network, online=True, keep=keep)
            atomic_save({"format": FORMAT, "states": states}, self.states_file)
        return pd.read_parquet(self.file("online"))

    @property
    def states(self) -> dict[int, dict]:
        """Model, optimizer, batches and loss of the online run at some steps."""
        return load_payload(self.states_file, FORMAT)["states"]

    @property
    def states_file(self) -> Path:
        """Where the states of the online run are kept."""
        return self.folder / f"{self.name}--{self.seed}.pt"

    def file(self, variant: str) -> Path:
        """Where the rows of a variant are kept."""
        return self.folder / f"{self.name}--{self.seed}--{variant}.parquet"

    def network(self, state: dict) -> LossNetwork:
        """A loss network with this φ."""
        network = LossNetwork.classification()
        network.load_state_dict(state)
        return network

    def learned_loss(self) -> LossNetwork:
        """Algorithm 1, with the package's additions."""
        torch.manual_seed(INITIALISATION_SEED + self.seed)
        network = LossNetwork.classification()
        train, valid, _ = streams(self.job)
        make_optimizer, settings = self.task.make_optimizer, self.settings
        initialise(network, self.job.make_model, train, valid, make_optimizer=make_optimizer, settings=settings)
        return network

    def learned_rate(self) -> LearningRate:
        """Algorithm 3, with the same additions and budget."""
        torch.manual_seed(INITIALISATION_SEED + self.seed)
        rate = LearningRate([self.task.learning_rate])
        train, valid, _ = streams(self.job)
        initialise_learning_rate(
            rate,
            self.job.make_model,
            train,
            valid,
            make_optimizer=self.task.make_optimizer,
            kind="classification",
            settings=self.settings,
        )
        return rate

    @property
    def job(self) -> Job:
        """What Algorithms 1 and 3 learn on."""
        return Job(self.task, self.data, self.seed)

    @property
    def settings(self) -> Initialiser:
        """For how long Algorithms 1 and 3 learn."""
        given = self.setting
        return Initialiser(
            steps=given.initialisation_steps, rehearsals=given.rehearsals, rehearsal_steps=given.rehearsal_steps
        )

    def train(
        self,
        variant: str,
        loss_at: LossAt,
        *,
        online: bool = False,
        learned_rate: bool = False,
        layer_scales: dict[str, Schedule] | None = None,
        start: dict | None = None,
        keep: Collection[int] = (),
    ) -> dict[int, dict]:
        """Train a model, write its rows, and return the states at the steps ``keep``.

        Args:
            variant: names the run.
            loss_at: the loss of each step.
            online: adapt that loss, a loss network, after every step (Algorithm 2).
            learned_rate: adapt the learning rate instead (Algorithm 4).
            layer_scales: what to multiply each layer's gradient by.
            start: a state to go on from, instead of a fresh model.
            keep: steps at which to keep the state.
        """
        rate = self.learned_rate() if learned_rate else None
        model, optimizer = fresh(self.task, self.data, self.seed)
        batches = BatchSampler(len(self.data.train), self.task.batch_size, self.seed)
        metas = BatchSampler(len(self.data.valid), self.task.batch_size, self.seed + 1)
        first = 0
        if start:
            first = start["step"]
            model.load_state_dict(start["model"])
            optimizer.load_state_dict(start["optimizer"])
            batches.load_state_dict(start["batches"])
        learner: OnlineLoss | OnlineLearningRate | None = None
        if online:
            learner = OnlineLoss(model, loss_at(0), optimizer, meta_learning_rate=META_LEARNING_RATE)
        elif rate:
            learner = OnlineLearningRate(model, loss_at(0), optimizer, learning_rate=rate)
        now = first
        for layer, names in layers(model).items() if layer_scales else ():
            for name in names:
                parameter = model.get_parameter(name)
                parameter.register_hook(lambda gradient, scale=layer_scales[layer]: gradient * scale(now))
        record_at = {*range(0, self.steps + 1, self.steps // (25 if online else self.setting.records))}
        record_at |= {3, 6, 10, 15, 20, 30} if online else set()
        rows: list[dict] = []
        states: dict[int, dict] = {}
        for now in range(first, self.steps + 1):
            loss = loss_at(now)
            learned = isinstance(loss, LossNetwork)
            if now in record_at or now == first:
                rows += [{**row, "step": now} for row in self.record(model, loss, final=now == self.steps)]
                rows[-1]["learning_rate"] = optimizer.param_groups[0]["lr"]
            if now in keep:
                parts = {"model": model, "optimizer": optimizer, "batches": batches, "loss": loss}
                state = {"step": now} | {name: part.state_dict() for name, part in parts.items()}
                states[now] = copy.deepcopy(state)
            if now == self.steps:
                break
            batch = self.data.train[next(batches)]
            if learned and now % BATCH_EVERY == 0:
                found = effective_learning_rate(model, loss, F.cross_entropy, batch)
                rows.append({"kind": "batch", "step": now, **vars(found)})
            if learner:
                learner.step(batch, self.data.valid[next(metas)])
            elif not torch.isfinite(plain_step(model, loss, optimizer, batch)):
                rows.append({"kind": "record", "step": self.steps, "valid_error": np.inf, "test_error": np.inf})
                break
        save(pd.DataFrame(rows).assign(task=self.name, variant=variant, seed=self.seed), self.file(variant))
        print(self.name, self.seed, variant, rows[-1]["test_error"], flush=True)
        return states

    def record(self, model: nn.Module, loss: Loss, final: bool) -> list[dict]:
        """What is measured of a model and its loss: on the first rows of each split; at the end on all test rows."""
        rows: list[dict] = []
        train, valid, test = self.probe.values()
        row = push_and_gap(model, loss, F.cross_entropy, train, valid)
        if isinstance(loss, LossNetwork):
            row |= vars(effective_learning_rate(model, loss, F.cross_entropy, train))
            found = effective_learning_rate(model, loss, F.cross_entropy, train, by_layer=True)
            rows += found.assign(kind="layer").to_dict("records")
            fit = vars(implied_label_smoothing(model, loss, train))
            rest = resting_point(target_gradients(model, loss, train), self.data.outputs)
            row |= {"smoothing_scale": fit.pop("scale"), **fit}
            row |= {f"rest_{name}": value for name, value in vars(rest).items()}
        if final:
            valid, test = self.data.valid[:], self.data.test[:]
        for part, pair in (("valid", valid), ("test", test)):
            scores = calibration_scores(*predictions(model, pair))
            row |= {f"{part}_error": 1 - scores.accuracy, f"{part}_loss": scores.nll}
        row |= {name: getattr(scores, name) for name in ("ece", "adaptive_ece", "brier", "confidence")}
        logits = logit_statistics(model, self.probe["test"])
        row |= {"margin": logits.margin, "logit_norm": logits.norm}
        return [*rows, {"kind": "record", **row}]


if __name__ == "__main__":
    parser = arguments(__doc__, root=True)
    parser.add_argument("--tasks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, help="by default all of a task's")
    parser.add_argument("--folder", type=Path, default=Path("results/phenomena"))
    options = begin(parser)
    for name in options.tasks:
        for seed in options.seeds or range(SETTINGS[name].seeds):
            Run(name, seed, options.folder, options.root).all_variants()
    parts = [pd.read_parquet(path) for name in SETTINGS for path in sorted(options.folder.glob(f"{name}--*.parquet"))]
    save(pd.concat(parts, ignore_index=True), HERE / "phenomena.parquet", labelled=True)
