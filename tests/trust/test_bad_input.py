# ruff: noqa: E501 -- a table, one case a line
"""A table of wrong uses of the public API and the command line: each is refused by name, with what to do about it."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

import analysis
from adalfl_lite import LossNetwork, OnlineLoss, build_model, evaluate, load_dataset
from adalfl_lite.cli import app
from adalfl_lite.compare.grid import compare
from adalfl_lite.compare.tasks import get_task
from adalfl_lite.data.dataset import BatchSampler, Dataset, Split
from adalfl_lite.engines.steps import plain_step
from adalfl_lite.losses.activations import SmoothLeakyReLU
from adalfl_lite.losses.task import check_kind, task_loss
from tests.shorthand import fit, initialise, unrolled_step

NAN, INF = float("nan"), float("inf")


class Given:
    """A right use of everything, for a case to spoil in one place."""

    def __init__(self, folder):
        torch.manual_seed(0)
        self.folder = folder
        self.x = torch.randn(40, 4)
        self.y = torch.arange(40) % 3
        self.rows = torch.arange(40)
        self.batch, self.meta_batch = (self.x[:8], self.y[:8]), (self.x[8:16], self.y[8:16])
        self.model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.network = LossNetwork.classification()
        self.file = folder / "file"
        self.file.write_text("not one of ours")

    def split(self, **changes):
        return Split(**{"inputs": self.x, "targets": self.y, "indices": self.rows, **changes})

    def data(self, **changes):
        split = self.split()
        given = {"name": "clouds", "kind": "classification", "outputs": 3, "input_shape": (4,)}
        return Dataset(**{**given, "train": split, "valid": split, "test": split, **changes})

    def regression(self, **changes):
        split = self.split(targets=self.x[:, :3])
        return self.data(kind="regression", train=split, valid=split, test=split, **changes)

    def sgd(self, model=None):
        return torch.optim.SGD((model or self.model).parameters(), lr=0.1)

    def online(self, **changes):
        model = changes.get("model", self.model)
        given = {"model": model, "loss_network": self.network}
        optimizer = changes.pop("optimizer", None) or self.sgd(model)
        return OnlineLoss(**{**given, "optimizer": optimizer, **changes})

    def step(self, batch=None, meta_batch=None, **changes):
        batch, meta_batch = (b if a is None else a for a, b in ((batch, self.batch), (meta_batch, self.meta_batch)))
        return self.online(**changes).step(batch, meta_batch)

    def fit(self, **changes):
        model = changes.get("model", self.model)
        given = {"model": model, "loss": self.network, "data": self.data(), "steps": 4, "batch_size": 8}
        optimizer = changes.pop("optimizer", None) or self.sgd(model)
        return fit(**{**given, "optimizer": optimizer, "progress": False, **changes})

    def initialise(self, **changes):
        given = {"make_model": lambda: nn.Linear(4, 3), "train": [self.batch], "valid": [self.meta_batch]}
        short = {"steps": 2, "imitation_steps": 0, "rehearsals": 0, "rollout_steps": 1}
        make_optimizer = functools.partial(torch.optim.SGD, lr=0.1)
        return initialise(self.network, **{**given, "make_optimizer": make_optimizer, **short, **changes})

    def saved(self, **changes):
        """A loss network's file with some entries changed."""
        path = self.folder / "network.pt"
        self.network.save(path)
        torch.save({**torch.load(path, weights_only=True), **changes}, path)
        return path


class Case(NamedTuple):
    what: str
    call: Callable[[Given], Any]
    error: type[Exception]
    message: str
    seen_late: bool = False
    """It shows only after a step of θ, which is then a sound one."""


def frozen(module):
    return module.requires_grad_(False)


def without_gradients(call):
    with torch.no_grad():
        return call()


class Clamped(nn.Linear):
    """Edits its weights in place within the forward pass."""

    def forward(self, x):
        output = super().forward(x)
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return output


class Sparse(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 3, sparse=True)

    def forward(self, x):
        return self.table(x.abs().long().clamp(max=6)[:, 0])


DATA = [
    Case("rows differ", lambda g: g.split(targets=g.y[:9]), ValueError, r"same number of rows, got \[40, 9, 40\]"),
    Case("a NumPy array", lambda g: g.split(inputs=g.x.numpy()), TypeError, "inputs must be a tensor, got ndarray"),
    Case("NaN inputs", lambda g: g.split(inputs=g.x / 0 * 0), ValueError, r"inputs .* not finite .*row 0.*clean"),
    Case("infinite inputs", lambda g: g.split(inputs=g.x / 0), ValueError, r"inputs .* not finite .*row 0"),
    Case("NaN targets", lambda g: g.split(targets=g.x * NAN), ValueError, r"targets .* not finite .*row 0"),
    Case("whole-number inputs", lambda g: g.split(inputs=g.y), ValueError, r"inputs .* got torch.int64.*\.float\(\).*OnlineLoss"),
    Case("int32 labels", lambda g: g.split(targets=g.y.int()), ValueError, r"targets .* torch.int32.*\.long\(\)"),
    Case("one-hot labels", lambda g: g.split(targets=F.one_hot(g.y)), ValueError, r"\(40, 3\).*argmax"),
    Case("flat float targets", lambda g: g.split(targets=g.y.float()), ValueError, r"\(N, K\).*\[:, None\]"),
    Case("a negative label", lambda g: g.split(targets=g.y - 1), ValueError, "label -1"),
    Case("statistics without images", lambda g: g.split(mean=torch.zeros(1), std=torch.ones(1)), ValueError,
         "are for uint8 images, the inputs are torch.float32; leave them out"),
    Case("images without statistics", lambda g: g.split(inputs=g.x.byte()), ValueError, "need mean= and std="),
    Case("two devices", lambda g: g.split(indices=g.rows.to("meta")), ValueError, r"one device, got cpu, cpu, meta"),
    Case("unknown kind", lambda g: g.data(kind="ranking"), ValueError, "classification, regression; got 'ranking'"),
    Case("label beyond the classes", lambda g: g.data(outputs=2), ValueError, "train targets .* label 2, but there are 2 outputs"),
    Case("float labels", lambda g: g.data(train=g.split(targets=g.x)), ValueError, "classification .* torch.float32"),
    Case("labels in regression", lambda g: g.data(kind="regression"), ValueError, "regression .* torch.int64"),
    Case("wrong number of targets", lambda g: g.regression(outputs=2), ValueError, r"\(40, 3\).*outputs=2"),
    Case("wrong input shape", lambda g: g.data(input_shape=(5,)), ValueError, r"\(4,\).*input_shape=\(5,\)"),
    Case("an empty split", lambda g: g.data(valid=g.split(inputs=g.x[:0], targets=g.y[:0], indices=g.rows[:0])),
         ValueError, "valid split .* empty"),
    Case("unknown data set", lambda g: load_dataset("cifar"), ValueError, "unknown data set 'cifar'; did you mean 'cifar10'[?] known data sets: digits"),
    Case("valid_size of a table", lambda g: load_dataset("iris", valid_size=9), ValueError, "valid_size=9 is for image"),
    Case("files that are missing", lambda g: load_dataset("svhn", root=g.folder), FileNotFoundError, "download=True"),
    Case("a root that is a file", lambda g: load_dataset("svhn", root=g.file), OSError, "file"),
    Case("a negative seed", lambda g: load_dataset("iris", seed=-1), ValueError, "seed.* -1"),
    Case("too large a batch", lambda g: BatchSampler(8, 9, 0), ValueError, "batch_size=9 must be between 1 and .*n=8"),
    Case("no rows", lambda g: BatchSampler(0, 1, 0), ValueError, "n=0"),
    Case("state of another sampler", lambda g: BatchSampler(9, 2, 0).load_state_dict(BatchSampler(8, 2, 0).state_dict()),
         ValueError, r"\(8, 2\), this one has \(9, 2\)"),
]  # fmt: skip

LOSSES = [
    Case("unknown kind", lambda g: LossNetwork("ranking"), ValueError, "got 'ranking'"),
    Case("unknown kind of task loss", lambda g: task_loss("ranking"), ValueError, "got 'ranking'"),
    Case("kind is not a name", lambda g: check_kind(None), ValueError, "got None"),
    Case("unknown activation", lambda g: LossNetwork("regression", activation="tanh"), ValueError, "got 'tanh'"),
    Case("unknown reduction", lambda g: LossNetwork("regression", reduction="max"), ValueError, "got 'max'"),
    Case("a layer of no width", lambda g: LossNetwork("regression", hidden=(4, 0)), ValueError, r"hidden.*\(4, 0\)"),
    Case("beta of 0", lambda g: SmoothLeakyReLU(beta=0), ValueError, "beta must be positive, got 0"),
    Case("gamma of 1", lambda g: SmoothLeakyReLU(gamma=1.0), ValueError, r"gamma must lie in \[0, 1\), got 1.0"),
    Case("logits of one example", lambda g: g.network(g.x[0], g.y[0]), ValueError, r"logits of shape \(B, C\)"),
    Case("float labels", lambda g: g.network(g.x, g.y.float()), ValueError, "int64 .* torch.float32"),
    Case("labels as a column", lambda g: g.network(g.x, g.y[:, None]), ValueError, r"got \(40, 1\)"),
    Case("shapes that would broadcast", lambda g: LossNetwork.regression()(g.x, g.x[:, :1]), ValueError, "one shape"),
    Case("regression on labels", lambda g: LossNetwork.regression()(g.y, g.y), ValueError, "got torch.int64"),
    Case("no such file", lambda g: LossNetwork.load(g.folder / "no.pt"), FileNotFoundError, "no file at .*no.pt"),
    Case("a foreign file", lambda g: LossNetwork.load(g.file), ValueError, "foreign or damaged"),
    Case("an older version", lambda g: LossNetwork.load(g.saved(format="adalfl-loss-network-0")), ValueError,
         "holds format 'adalfl-loss-network-0', expected .*write it again"),
    Case("no parameters within", lambda g: LossNetwork.load(g.saved(state={})), ValueError, "not a whole loss network"),
    Case("unknown settings within", lambda g: LossNetwork.load(g.saved(config={"hidden": [2]})), ValueError, "network.pt"),
    Case("NaN within", lambda g: LossNetwork.load(g.saved(
        state={name: value * NAN for name, value in g.network.state_dict().items()})), ValueError, "not finite"),
]  # fmt: skip

ONLINE = [
    Case("unknown engine", lambda g: g.online(engine="fast"), ValueError, "forward, .*unrolled; got 'fast'"),
    Case("a negative rate", lambda g: g.online(meta_learning_rate=-1.0), ValueError, "0 or more and finite, got -1.0"),
    Case("a rate of NaN", lambda g: g.online(meta_learning_rate=NAN), ValueError, "0 or more and finite, got nan"),
    Case("parameters for an optimizer", lambda g: g.online(optimizer=list(g.model.parameters())), TypeError, "got list"),
    Case("LBFGS, which needs a closure", lambda g: g.online(optimizer=torch.optim.LBFGS(g.model.parameters())),
         TypeError, "LBFGS has no differentiable update; use .*SGD, Adam"),
    Case("SparseAdam", lambda g: g.online(optimizer=torch.optim.SparseAdam(g.model.parameters())), TypeError, "SparseAdam"),
    Case("another model's optimizer", lambda g: g.online(optimizer=g.sgd(nn.Linear(4, 3))), ValueError,
         r"not in the model; build it from model.parameters\(\)"),
    Case("a frozen model", lambda g: g.online(model=frozen(g.model)), ValueError, "unfreeze some"),
    Case("a model without parameters", lambda g: g.online(model=nn.ReLU(), optimizer=g.sgd()), ValueError, "not in the model"),
    Case("a loss without parameters", lambda g: g.online(loss_network=nn.CrossEntropyLoss(), task_loss=F.cross_entropy),
         ValueError, "CrossEntropyLoss has no parameter that requires a gradient"),
    Case("the loss network on another device", lambda g: g.online(loss_network=LossNetwork.classification().to("meta")),
         ValueError, r"network is on meta, the model on cpu; use loss_network.to\('cpu'\)"),
    Case("a frozen loss network", lambda g: g.online(loss_network=frozen(g.network)), ValueError, "meta_learning_rate=0"),
    Case("a loss of no kind", lambda g: g.online(loss_network=nn.Linear(2, 1)), ValueError, "pass task_loss="),
    Case("a meta-optimizer over θ", lambda g: g.online(meta_optimizer=g.sgd()), ValueError,
         r"meta_optimizer .* loss_network.parameters\(\)"),
    Case("the loss shares the model's parameters", lambda g: g.online(loss_network=g.model, task_loss=F.cross_entropy),
         ValueError, "share"),
    Case("autocast to integers", lambda g: g.online(autocast=torch.int8), ValueError, "autocast .* torch.int8"),
    Case("inputs alone", lambda g: g.step(batch=g.x), TypeError, r"batch must be a pair \(inputs, targets\), got Tensor"),
    Case("an empty batch", lambda g: g.step(batch=(g.x[:0], g.y[:0])), ValueError, "batch .* 0 inputs"),
    Case("fewer targets", lambda g: g.step(batch=(g.x, g.y[:9])), ValueError, "40 inputs .* 9 targets"),
    Case("an empty meta batch", lambda g: g.step(meta_batch=(g.x[:0], g.y[:0])), ValueError, "meta_batch .* 0 inputs"),
    Case("another device", lambda g: g.step(batch=(g.x.to("meta"), g.y.to("meta"))), ValueError, r"on meta.* model .* cpu"),
    Case("float labels in a meta batch", lambda g: g.step(meta_batch=(g.x, g.y.float())), ValueError, "torch.int64 in batch, torch.float32 in meta_batch"),
    Case("a label beyond the outputs", lambda g: g.step(batch=(g.x, g.y + 1)), ValueError, "label 3, .* 3 outputs"),
    Case("a negative label", lambda g: g.step(batch=(g.x, g.y - 100)), ValueError, "label -100"),
    Case("a meta label beyond the outputs", lambda g: g.step(meta_batch=(g.x, g.y + 1)), ValueError,
         "label 3, .* 3 outputs", seen_late=True),
    Case("NaN inputs", lambda g: g.step(batch=(g.x * NAN, g.y)), ValueError, "batch: inputs .* not finite"),
    Case("NaN inputs in a meta batch", lambda g: g.step(meta_batch=(g.x * NAN, g.y)), ValueError, "meta_batch: inputs",
         seen_late=True),
    Case("inputs of the wrong width", lambda g: g.step(batch=(g.x[:, :3], g.y)), RuntimeError, "4x5|3x"),
    Case("without gradients", lambda g: without_gradients(g.step), RuntimeError, r"no_grad.*"),
    Case("sparse gradients", lambda g: g.step(model=Sparse()), ValueError, "sparse"),
    Case("weights edited in the forward pass", lambda g: g.step(model=Clamped(4, 3)), ValueError, "in place"),
    Case("a compiled model unrolled", lambda g: g.online(model=torch.compile(g.model), engine="unrolled"), ValueError,
         "compiled .*use engine='forward'"),
    Case("no training batch", lambda g: g.online().meta_gradient([], g.batch), ValueError, "at least one training batch"),
    Case("unrolled without a batch", lambda g: unrolled_step(g.model, g.network, g.sgd(), [], g.batch, F.cross_entropy),
         ValueError, "at least one training batch"),
    Case("another network's state", lambda g: g.online().load_state_dict({"model": g.model.state_dict()}), ValueError,
         "lacks loss_network"),
]  # fmt: skip

TRAINING = [
    Case("no steps", lambda g: g.fit(steps=0), ValueError, "steps must be at least 1, got 0"),
    Case("half a step", lambda g: g.fit(steps=1.5), ValueError, "steps must be a whole number, got 1.5"),
    Case("too large a batch", lambda g: g.fit(batch_size=41), ValueError, "batch_size=41"),
    Case("never evaluated", lambda g: g.fit(evaluate_every=0), ValueError, "evaluate_every must be at least 1, got 0"),
    Case("meta batches from test", lambda g: g.fit(meta_batches="test"), ValueError, "'valid', 'train'.*got 'test'"),
    Case("unknown policy", lambda g: g.fit(on_divergence="hope"), ValueError, "raise, skip, restore; got 'hope'"),
    Case("clipping to nothing", lambda g: g.fit(online=True, clip_meta_gradient=0.0), ValueError, "clip.*got 0.0"),
    Case("a model without parameters", lambda g: g.fit(model=nn.Flatten(), optimizer=g.sgd()), ValueError,
         "model has no parameters"),
    Case("another model's optimizer", lambda g: g.fit(optimizer=g.sgd(nn.Linear(4, 3))), ValueError, "not in the model"),
    Case("LBFGS", lambda g: g.fit(optimizer=torch.optim.LBFGS(g.model.parameters())), TypeError, "LBFGS"),
    Case("a fixed loss online", lambda g: g.fit(loss=F.cross_entropy, online=True), TypeError, "must be a torch.nn.Module"),
    Case("a loss of the other kind", lambda g: g.fit(data=g.regression()), ValueError,
         "the loss is for classification, .* regression"),
    Case("a loss per example", lambda g: g.fit(loss=nn.CrossEntropyLoss(reduction="none")), ValueError, r"scalar.* \(8,\)"),
    Case("a rate's meta-optimizer over the loss", lambda g: g.fit(online=True, learn="learning_rate",
         meta_optimizer=torch.optim.Adam(g.network.parameters())), ValueError, "does not hold the learning rate alone"),
    Case("a meta split where nothing is learned", lambda g: g.fit(meta_batches="train"), ValueError,
         "meta_batches='train' has no effect where nothing is learned"),
    Case("a scheduler of another optimizer", lambda g: g.fit(scheduler=torch.optim.lr_scheduler.StepLR(g.sgd(), 2)), ValueError,
         "scheduler is of another optimizer; build it from"),
    Case("a scheduler of a metric", lambda g: g.fit(optimizer=(o := g.sgd()), scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(o)),
         TypeError, "needs a metric"),
    Case("autocast to float32", lambda g: g.fit(autocast=torch.float32), ValueError, "autocast must be torch.bfloat16"),
    Case("one logit for two classes", lambda g: g.fit(model=nn.Linear(4, 1)), ValueError,
         r"label 2, but there are 1 outputs \(one output is for regression\); a model of 3 classes ends in nn.Linear\(..., 3\)"),
    Case("a lazy layer", lambda g: g.fit(model=nn.Sequential(nn.LazyLinear(3))), ValueError,
         "'0.weight' is of a lazy layer that has no shape yet; run one batch"),
    Case("a drop in steps", lambda g: get_task("iris").with_(drops=(100,)), ValueError, "between 0 and 1, got 100"),
    Case("initialise: a score without a rehearsal", lambda g: g.initialise(validate=lambda model: (0, 0)), ValueError,
         "validate=function has no effect without rehearsals"),
    Case("too few outputs", lambda g: g.fit(model=nn.Linear(4, 2)), ValueError, "label 2, but there are 2 outputs"),
    Case("one output too few in regression", lambda g: g.fit(
        model=nn.Linear(4, 1), loss=F.mse_loss, data=g.regression()), ValueError, r"\(40, 1\) and \(40, 3\)"),
    Case("a model that gives two things", lambda g: g.fit(model=nn.LSTM(4, 3)), TypeError, "must return a tensor, got tuple"),
    Case("a checkpoint that is a folder", lambda g: g.fit(checkpoint=g.folder), OSError, "is a folder; name a file"),
    Case("a checkpoint below a file", lambda g: g.fit(checkpoint=g.file / "c"), OSError, "file"),
    Case("fit: a loader for data", lambda g: g.fit(data=[g.batch]), TypeError, "data must be a Dataset, got list"),
    Case(
        "evaluate: a loader",
        lambda g: evaluate(g.model, [g.batch], "classification"),
        TypeError,
        "split must be a Split, such as data.test, got list",
    ),
    Case("a function for M", lambda g: g.online(loss_network=F.cross_entropy), TypeError, "Module, got function; Loss"),
    Case("initialise: tensors", lambda g: g.initialise(train=g.batch), TypeError, "a train batch .*got Tensor.*DataLoader"),
    Case("initialise: a model", lambda g: g.initialise(make_model=g.model), TypeError, "make_model must be a function"),
    Case(
        "initialise: an optimizer",
        lambda g: g.initialise(make_optimizer=g.sgd(g.model)),
        TypeError,
        "make_optimizer must be a function that builds one, got SGD; use lambda",
    ),
    Case("a foreign checkpoint", lambda g: g.fit(checkpoint=g.file), ValueError, "foreign or damaged; give another"),
    Case("an older checkpoint", lambda g: g.fit(checkpoint=g.saved(format="adalfl-checkpoint-0")), ValueError,
         "holds format 'adalfl-checkpoint-0'"),
    Case("a checkpoint without a run", lambda g: g.fit(checkpoint=g.saved(format="adalfl-checkpoint-1")), ValueError, "whole"),
    Case("evaluation on nothing", lambda g: evaluate(g.model, g.split(inputs=g.x[:0], targets=g.y[:0], indices=g.rows[:0]),
         "classification"), ValueError, "split is empty"),
    Case("evaluation of no rows at a time", lambda g: evaluate(g.model, g.split(), "classification", 0), ValueError,
         "batch_size must be at least 1, got 0"),
    Case("a plain step without a scalar", lambda g: plain_step(g.model, nn.CrossEntropyLoss(reduction="none"), g.sgd(), g.batch),
         ValueError, "scalar"),
    Case("an unknown model", lambda g: build_model("vgg", input_shape=(4,), outputs=3), ValueError, "unknown model 'vgg'"),
    Case("images too small", lambda g: build_model("vgg16", input_shape=(3, 8, 8), outputs=3), ValueError, "at least 32 x 32"),
    Case("no outputs", lambda g: build_model("linear", input_shape=(4,), outputs=0), ValueError, "outputs=0 must be at least 1"),
    Case("initialise: no steps", lambda g: g.initialise(steps=0), ValueError, "steps must be at least 1, got 0"),
    Case("initialise: unknown engine", lambda g: g.initialise(engine="fast"), ValueError, "got 'fast'"),
    Case("initialise: no batches", lambda g: g.initialise(train=[]), ValueError, "train batches are empty"),
    Case("initialise: a loader used up", lambda g: g.initialise(steps=9, valid=iter([g.batch])), ValueError, "valid .* used up"),
    Case("initialise: always the same model", lambda g: g.initialise(make_model=lambda: g.model), ValueError,
         "make_model .* fresh", seen_late=True),
    Case("initialise: optimizer of another model", lambda g: g.initialise(make_optimizer=lambda _: g.sgd()), ValueError,
         "not in the model"),
    Case("compare: unknown task", lambda g: compare(["cifar"]), ValueError, "unknown task 'cifar'; known tasks: digits"),
    Case("compare: unknown method", lambda g: compare(["iris"], ["magic"]), ValueError, "unknown method 'magic'"),
    Case("compare: no seeds", lambda g: compare(["iris"], seeds=[]), ValueError, "nothing to compare: seeds is empty"),
    Case("compare: a folder that is a file", lambda g: compare(["iris"], folder=g.file, progress=False), OSError, "file"),
    Case("compare: a damaged result", lambda g: damaged_job(g), ValueError, "seed0.parquet cannot be read.*delete a damaged"),
    Case("compare: a foreign result", lambda g: damaged_job(g, pd.DataFrame({"a": [1]})), ValueError, "seed0.parquet lacks the columns .*delete a damaged"),
]  # fmt: skip


def damaged_job(given, frame=None):
    path = given.folder / "iris--handcrafted--seed0.parquet"
    path.write_text("cut off") if frame is None else frame.to_parquet(path)
    return compare([get_task("iris").with_(steps=2)], ["handcrafted"], [0], folder=given.folder, progress=False)


ANALYSIS = [
    Case("no data", lambda g: analysis.gradient_norms(g.model, F.cross_entropy, []), ValueError, "no data"),
    Case("NaN inputs", lambda g: analysis.gradient_norms(g.model, F.cross_entropy, (g.x * NAN, g.y)), ValueError, "NaN"),
    Case("fewer targets", lambda g: analysis.effective_learning_rate(
        g.model, g.network, F.cross_entropy, (g.x, g.y[:3])), ValueError, "40 inputs and 3 targets"),
    Case("a frozen model", lambda g: analysis.gradient_norms(frozen(g.model), F.cross_entropy, g.batch), ValueError, "grad"),
    Case("gradients of two shapes", lambda g: analysis.decompose(g.x, g.x[0]), ValueError, r"\(40, 4\).*\(4,\)"),
    Case("label smoothing of float labels", lambda g: analysis.fit_label_smoothing(g.x, g.y.float(), g.x), ValueError, "float32"),
    Case("label smoothing beyond the classes", lambda g: analysis.fit_label_smoothing(g.x, g.y + 9, g.x), ValueError, "9|11"),
    Case("calibration of labels beyond", lambda g: analysis.calibration_scores(g.x, g.y + 9), ValueError, "9|11"),
    Case("no bins", lambda g: analysis.reliability_table(g.x, g.y, bins=0), ValueError, "bins.*0"),
    Case("one seed", lambda g: analysis.bootstrap_interval([1.0]), ValueError, "2"),
    Case("pairs of two lengths", lambda g: analysis.paired_test([1.0, 2.0], [1.0]), ValueError, "b hold 1 value.s., at least 2"),
    Case("certain beyond doubt", lambda g: analysis.bootstrap_interval([1.0, 2.0], confidence=1.0), ValueError, "confidence.*1.0"),
]  # fmt: skip


@pytest.mark.parametrize("case", [
    pytest.param(case, id=f"{group}: {case.what}")
    for group, cases in (("data", DATA), ("losses", LOSSES), ("online", ONLINE), ("training", TRAINING), ("analysis", ANALYSIS))
    for case in cases
])  # fmt: skip
def test_refused(case, tmp_path, counts):
    given = Given(tmp_path)
    before = [parameter.detach().clone() for parameter in given.model.parameters()]
    with pytest.raises(case.error) as caught:
        case.call(given)
    assert re.search(case.message, str(caught.value), re.DOTALL), f"{type(caught.value).__name__}: {caught.value}"
    for value, old in zip(given.model.parameters(), before, strict=True):
        if case.seen_late:
            assert torch.isfinite(value).all()
        else:
            assert torch.equal(value, old), "work was done before the refusal"
    counts["bad inputs refused"] += 1


COMMANDS = [
    (["train", "cifar"], "unknown task 'cifar'; known tasks: digits"),
    (["train", "iris", "--method", "magic"], "unknown method 'magic'; known methods: handcrafted"),
    (["train", "iris", "--device", "abacus"], "cannot train on device 'abacus'"),
    (["train", "iris", "--steps", "0"], "--steps"),
    (["train", "iris", "--seed", "-1"], "seed must lie in .* got -1"),
    (["train", "iris", "--seed", "one"], "--seed.*valid integer"),
    (["train", "iris", "--out", "FILE"], "FILE"),
    (["train", "mnist-mlp", "--root", "nowhere"], "not found.*download"),
    (["compare", "iris", "--methods", "online,"], "unknown method ''"),
    (["compare", "iris", "--seeds", "0"], "--seeds"),
    (["compare", "iris", "--jobs", "0"], "--jobs"),
    (["compare"], "no task is given; add a name from `adalfl tasks`"),
    (["plot", "nothing.parquet"], "nothing.parquet does not exist; give the .parquet file"),
    (["plot", "FILE"], "FILE cannot be read as results.*give a file that train or compare wrote"),
    (["plot", "FILE", "--figure", "pie"], "'pie' is not one of"),
    (["dance"], "No such command 'dance'"),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS, ids=[" ".join(arguments) for arguments, _ in COMMANDS])
def test_refused_by_the_command_line(arguments, message, tmp_path, monkeypatch, counts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ADALFL_DATA", raising=False)
    (tmp_path / "FILE").write_text("not a table")
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "300", "TERMINAL_WIDTH": "300", "NO_COLOR": "1"})
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.output
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["FILE"]
    counts["bad inputs refused"] += 1


def test_the_table_is_long_enough():
    assert len(DATA + LOSSES + ONLINE + TRAINING + ANALYSIS) + len(COMMANDS) >= 60
