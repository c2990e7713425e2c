"""PyTorch's own database of modules, with its sample inputs: each module between linear layers, in every engine.

``torch.testing._internal.common_modules.module_db`` holds what PyTorch tests its modules with. A sample becomes part of
a model: a linear layer moves the sample's first floating-point input (those named in ``SEVERAL``: all of them), the
other arguments stay as they are, and a second linear layer reads what the module gives. Modules that the database lacks
have samples of our own in ``MORE``, so that all of ``torch.nn`` is tried, or named with a reason in ``NOT_TRIED``.
"""

import contextlib
import io
import logging
import math
import os
import warnings
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.trust.reference import Problem, Refusals, Verdict, check, judge_all, rows

logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
    # the import locks torch's global flags, as PyTorch wishes in its own tests alone
    patch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.slow

LABEL = "steps of torch.nn's modules"
SEVERITY = {"right": 0, "refused": 1, "fault": 2}
SAMPLES = 4
"""Of each module and mode, spread over the database's list."""
LARGEST = 2500
"""Entries of a sample's inputs, at most; samples without any are left out as well."""
SEVERAL = {
    "nn.Bilinear", "nn.CosineSimilarity", "nn.GRU", "nn.GRUCell", "nn.HuberLoss", "nn.KLDivLoss", "nn.L1Loss",
    "nn.LSTM", "nn.LSTMCell", "nn.MSELoss", "nn.MultiheadAttention", "nn.PairwiseDistance", "nn.RNN", "nn.RNNCell",
    "nn.SmoothL1Loss", "nn.Transformer", "nn.TransformerDecoder", "nn.TransformerDecoderLayer", "nn.TripletMarginLoss",
    "nn.TripletMarginWithDistanceLoss",
}  # fmt: skip
"""Modules all of whose inputs depend on θ."""


def r(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


def layer(kind, **options):
    return kind(4, 2, 8, 0.1, batch_first=True, **options)


IMAGE, VOLUME = r(2, 4, 4, 4), r(2, 2, 4, 4, 4)

# name: (constructor, inputs)
MORE = {
    "nn.AdaptiveLogSoftmaxWithLoss": (lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 8, [2, 5]), (r(5, 6), ids(8, 5))),
    "nn.AlphaDropout": (lambda: nn.AlphaDropout(0.3), (r(4, 6),)),
    "nn.ChannelShuffle": (lambda: nn.ChannelShuffle(2), (IMAGE,)),
    "nn.CosineSimilarity": (lambda: nn.CosineSimilarity(), (r(3, 5), r(3, 5, seed=1))),
    "nn.Dropout": (lambda: nn.Dropout(0.4), (r(4, 6),)),
    "nn.Dropout1d": (lambda: nn.Dropout1d(0.4), (r(3, 4, 5),)),
    "nn.Dropout2d": (lambda: nn.Dropout2d(0.4), (IMAGE,)),
    "nn.Dropout3d": (lambda: nn.Dropout3d(0.4), (VOLUME,)),
    "nn.EmbeddingBag": (lambda: nn.EmbeddingBag(6, 4), (ids(6, 3, 5),)),
    "nn.FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.4), (IMAGE,)),
    "nn.FractionalMaxPool2d, drawn": (lambda: nn.FractionalMaxPool2d(2, output_size=2), (IMAGE,)),
    "nn.Flatten": (lambda: nn.Flatten(), (IMAGE,)),
    "nn.Fold": (lambda: nn.Fold((4, 4), 2), (r(2, 8, 9),)),
    "nn.Hardsigmoid": (lambda: nn.Hardsigmoid(), (r(4, 6),)),
    "nn.Identity": (lambda: nn.Identity(), (r(4, 6),)),
    "nn.LazyBatchNorm1d": (lambda: nn.LazyBatchNorm1d(), (r(4, 6),)),
    "nn.LazyBatchNorm2d": (lambda: nn.LazyBatchNorm2d(), (IMAGE,)),
    "nn.LazyBatchNorm3d": (lambda: nn.LazyBatchNorm3d(), (VOLUME,)),
    "nn.LazyInstanceNorm1d": (lambda: nn.LazyInstanceNorm1d(affine=True), (r(2, 3, 5),)),
    "nn.LazyInstanceNorm2d": (lambda: nn.LazyInstanceNorm2d(affine=True), (IMAGE,)),
    "nn.LazyInstanceNorm3d": (lambda: nn.LazyInstanceNorm3d(affine=True), (VOLUME,)),
    "nn.LazyLinear": (lambda: nn.LazyLinear(3), (r(4, 6),)),
    "nn.MaxUnpool1d": (lambda: nn.MaxUnpool1d(2), (r(2, 2, 3), torch.tensor([[[0, 3, 5], [1, 2, 4]]] * 2))),
    "nn.MaxUnpool2d": (lambda: nn.MaxUnpool2d(2), (r(1, 1, 2, 2), torch.tensor([[[[0, 3], [9, 14]]]]))),
    "nn.MaxUnpool3d": (lambda: nn.MaxUnpool3d(2), (r(1, 1, 1, 2, 2), torch.tensor([[[[[0, 3], [9, 30]]]]]))),
    "nn.PairwiseDistance": (lambda: nn.PairwiseDistance(), (r(3, 5), r(3, 5, seed=1))),
    "nn.PixelShuffle": (lambda: nn.PixelShuffle(2), (IMAGE,)),
    "nn.PixelUnshuffle": (lambda: nn.PixelUnshuffle(2), (IMAGE,)),
    "nn.RReLU": (lambda: nn.RReLU(), (r(4, 6),)),
    "nn.TransformerDecoder": (
        lambda: nn.TransformerDecoder(layer(nn.TransformerDecoderLayer), 2), (r(2, 3, 4), r(2, 3, 4, seed=1))
    ),
    "nn.TripletMarginLoss": (lambda: nn.TripletMarginLoss(), (r(3, 5), r(3, 5, seed=1), r(3, 5, seed=2))),
    "nn.TripletMarginWithDistanceLoss": (
        lambda: nn.TripletMarginWithDistanceLoss(), (r(3, 5), r(3, 5, seed=1), r(3, 5, seed=2))
    ),
    "nn.Unflatten": (lambda: nn.Unflatten(1, (2, 2)), (r(3, 4),)),
    "nn.Unfold": (lambda: nn.Unfold(2), (IMAGE,)),
    "nn.Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (IMAGE,)),
    "nn.UpsamplingBilinear2d": (lambda: nn.UpsamplingBilinear2d(scale_factor=2), (IMAGE,)),
    "nn.UpsamplingNearest2d": (lambda: nn.UpsamplingNearest2d(scale_factor=2), (IMAGE,)),
}  # fmt: skip


def shift(sample, moved):
    return sample + moved


DOMAINS = {
    "nn.KLDivLoss": lambda sample, moved: torch.exp(moved),
    "nn.BCELoss": lambda sample, moved: torch.sigmoid(moved),
    "nn.PoissonNLLLoss": lambda sample, moved: torch.exp(moved),
    "nn.LPPool1d": lambda sample, moved: torch.exp(moved),
    "nn.LPPool2d": lambda sample, moved: torch.exp(moved),
    "nn.LPPool3d": lambda sample, moved: torch.exp(moved),
}
"""How an input is moved, where not every number is one: a function of the sample and of what the linear layer gives."""

NOT_TRIED = {
    "nn.Buffer": "a tensor",
    "nn.Container": "holds modules",
    "nn.CrossMapLRN2d": "its backward pass is for the GPU and legacy code",
    "nn.DataParallel": "a wrapper, among the models of test_any_model",
    "nn.LinearCrossEntropyOptions": "options",
    "nn.Module": "the base class",
    "nn.ModuleDict": "holds modules",
    "nn.ModuleList": "holds modules",
    "nn.NLLLoss2d": "an old name of NLLLoss",
    "nn.Parameter": "a tensor",
    "nn.ParameterDict": "holds parameters, among the models of test_any_model",
    "nn.ParameterList": "holds parameters, among the models of test_any_model",
    "nn.RNNBase": "the base class of RNN, GRU and LSTM",
    "nn.RNNCellBase": "the base class of the cells",
    "nn.Sequential": "holds modules, and every model here is one",
    "nn.SyncBatchNorm": "for GPUs alone",
    "nn.UninitializedBuffer": "a tensor",
    "nn.UninitializedParameter": "a tensor",
}
"""What ``torch.nn`` exports besides, with the reason."""

NO_FLOATING_INPUT = {"nn.Embedding", "nn.EmbeddingBag"}
"""Fed with their integers alone; θ is within."""


def is_float(value):
    return isinstance(value, Tensor) and value.is_floating_point()


def floats(value):
    """The floating-point tensors in any nesting."""
    return [leaf for leaf in tree_flatten(value)[0] if is_float(leaf)]


class Between(nn.Module):
    """logits = W [module(linear layers of the rows), tanh(row)]; every row sees what the module gives."""

    def __init__(self, module, arguments, moved, domain, width, scale):
        super().__init__()
        self.module, self.arguments, self.domain, self.scale = module, arguments, domain, scale
        self.before = nn.ModuleList([nn.Linear(6, value.numel()) for value in floats(arguments)[:moved]])
        self.row, self.head = nn.Linear(6, 5), nn.Linear(5 + width, 4)

    def forward(self, x):
        moves = [linear(x).mean(0) for linear in self.before]
        out = called(self.module, self.arguments, self.domain, moves)
        return self.head(torch.cat([torch.tanh(self.row(x)), out.expand(len(x), -1) / self.scale], 1))


def called(module, arguments, domain, moves):
    """What a module gives, flat, with the first floating-point inputs moved."""
    leaves, form = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if is_float(leaf)]
    for place, moved in zip(places, moves, strict=False):
        leaves[place] = domain(leaves[place], moved.reshape(leaves[place].shape))
    args, kwargs = tree_unflatten(leaves, form)
    return torch.cat([value.flatten() for value in floats(module(*args, **kwargs))])


def optimizer(model):
    """Most of a step falls to the module and to what is before it."""
    after = [*model.row.parameters(), *model.head.parameters()]
    moved = [*model.module.parameters(), *model.before.parameters()]
    return torch.optim.SGD([{"params": moved, "lr": 3.0}, {"params": after, "lr": 0.001}])


def problem(name, training, make, arguments):
    """The sample within a model; raises what torch raises."""
    moved, domain = len(floats(arguments)) if name in SEVERAL else 1, DOMAINS.get(name, shift)
    with torch.no_grad(), quiet():
        still = [torch.zeros_like(value) for value in floats(arguments)[:moved]]
        given = called(make().double().train(training), arguments, domain, still)
    scale = 1 + given.abs().max().item()
    assert math.isfinite(scale) and (floats(arguments) or name in NO_FLOATING_INPUT), "this is no sample"

    def build():
        model = Between(make(), arguments, moved, domain, len(given), scale)
        if any(map(is_lazy, model.parameters())):
            model.double().train(training)(rows(0)[0])
        return model

    return Problem(build, optimizer, rows, training=training, warm=0)


@cache
def database(name, training):
    """[(make, arguments)] of a module."""
    if name in MORE:
        make, inputs = MORE[name]
        return [(make, (inputs, {}))]
    (info,) = [info for info in module_db if info.name == name]
    with quiet():
        torch.manual_seed(0)
        given = info.module_inputs_func(info, device="cpu", dtype=torch.float64, requires_grad=False, training=training)
    found = []
    for sample in given:
        if sample.forward_input is None:
            continue
        built, called = sample.constructor_input, sample.forward_input
        arguments = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, (called.args, called.kwargs))
        sizes = [leaf.numel() for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]
        if not min(sizes) or sum(sizes) > LARGEST:
            continue
        found.append((lambda built=built: info.module_cls(*built.args, **built.kwargs), arguments))
    return found


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def spread(samples):
    """Up to ``SAMPLES`` of a list, from its beginning to its end."""
    stride = max(1, len(samples) // SAMPLES)
    return samples[::stride][:SAMPLES]


NAMES = sorted({info.name for info in module_db} | MORE.keys())
REFUSED: Refusals = {
    "nn.CTCLoss": ("forward shared unrolled", "cannot be differentiated"),
    "nn.LinearCrossEntropyLoss": ("forward shared unrolled", "cannot serve this model"),
    "nn.MultiLabelMarginLoss": ("forward shared unrolled", "cannot be differentiated"),
    "nn.MultiMarginLoss": ("forward shared unrolled", "cannot be differentiated"),
}
"""For nn.LinearCrossEntropyLoss, some of the samples: it skips rows in its backward pass, or fills buffers in place."""


def modes(name):
    """Eval mode, and train mode where that is another thing."""
    differs = name in MORE or next(info for info in module_db if info.name == name).train_and_eval_differ
    return (False, True) if differs else (False,)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_trained_right_or_refused(name, counts):
    worst: dict[str, Verdict] = {}
    for training in modes(name):
        for make, arguments in spread(database(name, training)):
            verdicts = judge_all(problem(name, training, make, arguments), counts, LABEL)
            for engine, verdict in verdicts.items():
                if SEVERITY[verdict.kind] >= SEVERITY[worst.get(engine, verdict).kind]:
                    worst[engine] = verdict
    assert worst, "no sample"
    counts["modules of torch.nn tried"] += 1
    check(name, worst, REFUSED.get(name))


def test_all_of_torch_nn_is_tried_or_named():
    exported = {f"nn.{name}" for name, value in vars(nn).items() if isinstance(value, type)}
    assert exported >= {"nn.Linear", "nn.Module"}
    assert exported <= {*NAMES, *NOT_TRIED}, sorted(exported - {*NAMES, *NOT_TRIED})
    assert not {*NAMES} & {*NOT_TRIED}
    assert len(NAMES) >= 149, "the database has shrunk"


def test_every_sample_is_fed():
    """A sample that cannot be a part of a model would be an error above; here they are counted."""
    samples = {name: [len(spread(database(name, training))) for training in modes(name)] for name in NAMES}
    assert not [name for name, numbers in samples.items() if not min(numbers)]
    assert sum(sum(numbers) for numbers in samples.values()) >= 480


def test_the_table_of_refusals_names_modules():
    assert REFUSED.keys() <= {*NAMES}
