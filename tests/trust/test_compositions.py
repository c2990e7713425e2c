"""Models put together at random from the parts that people use, with random optimizers, groups and frozen parts.

Every block maps (B, T, 4) to (B, T, 4), so that blocks follow each other in any order, run beside each other, come
again and share weights. What is drawn is a tree of names and numbers; the model is built from it, the same each time.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from tests.models import Apply, Reverse
from tests.trust.reference import ENGINES, InaccurateError, Problem, judge_all, sequences

pytestmark = pytest.mark.slow

LABEL = "steps of random compositions"
LENGTH, WIDTH = 3, 4


class Transposed(nn.Module):
    """A layer for (B, C, T)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


class First(nn.Module):
    """A layer that returns several things, the first of which is meant."""

    def __init__(self, layer, times=1):
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x):
        return self.layer(*[x] * self.times)[0]


class Beside(nn.Module):
    """Both branches, put together in one of several ways."""

    def __init__(self, how, left, right):
        super().__init__()
        self.how, self.left, self.right = how, left, right

    def forward(self, x):
        left, right = self.left(x), self.right(x)
        if self.how == "sum":
            return left + right
        if self.how == "gate":
            return left * torch.sigmoid(right)
        if self.how == "no gradient":
            with torch.no_grad():
                right = self.right(x)
            return left + right
        return left + right.detach() if self.how == "detached" else torch.cat([left[..., :2], right[..., 2:]], -1)


class Words(nn.Module):
    """Embeddings of quantised inputs, beside the inputs."""

    def __init__(self, **options):
        super().__init__()
        self.table = nn.Embedding(6, WIDTH, **options)

    def forward(self, x):
        return x + self.table(((x.detach() * 2).round().long() + 3).clamp(0, 5)[..., 0])


class Bilinear(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x.flip(1))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(1.2)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return x * self.scale + self.shift


class RunningMean(nn.Module):
    """A buffer of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return x - self.mean


def attention(dropout=0.0):
    return First(nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=True), times=3)


def encoder():
    return nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.1, batch_first=True)


LINEAR = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "without bias": lambda: nn.Linear(WIDTH, WIDTH, bias=False),
    "bottleneck": lambda: nn.Sequential(nn.Linear(WIDTH, 2), nn.Tanh(), nn.Linear(2, WIDTH)),
    "convolution": lambda: Transposed(nn.Conv1d(WIDTH, WIDTH, 3, padding=1)),
    "grouped convolution": lambda: Transposed(nn.Conv1d(WIDTH, WIDTH, 1, groups=2)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
    "bilinear": lambda: Bilinear(WIDTH, WIDTH, WIDTH),
    "scaled": Scaled,
}
ACTIVATIONS = {
    name: getattr(nn, name)
    for name in (
        "CELU", "ELU", "GELU", "Hardsigmoid", "Hardswish", "LeakyReLU", "LogSigmoid", "Mish", "PReLU", "ReLU", "ReLU6",
        "SELU", "Sigmoid", "SiLU", "Softplus", "Softsign", "Tanh", "Tanhshrink",
    )
}  # fmt: skip
ACTIVATIONS |= {
    "softmax": lambda: nn.Softmax(-1),
    "in place": lambda: nn.Sequential(Apply(lambda x: x * 1.0), nn.ReLU(inplace=True)),
    "cumulated": lambda: Apply(lambda x: x.cumsum(1)),
    "sorted": lambda: Apply(lambda x: x.sort(-1).values),
    "normalised": lambda: Apply(lambda x: F.normalize(x, dim=-1)),
}
NORMS = {
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "RMS norm": lambda: nn.RMSNorm(WIDTH),
    "batch norm": lambda: Transposed(nn.BatchNorm1d(WIDTH)),
    "batch norm without statistics": lambda: Transposed(nn.BatchNorm1d(WIDTH, track_running_stats=False)),
    "group norm": lambda: Transposed(nn.GroupNorm(2, WIDTH)),
    "instance norm": lambda: Transposed(nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True)),
    "running mean": RunningMean,
}
RANDOM = {
    "dropout": lambda: nn.Dropout(0.3),
    "dropout of features": lambda: nn.Dropout1d(0.3),
    "alpha dropout": lambda: nn.AlphaDropout(0.2),
    "noise": lambda: Apply(lambda x: x + 0.1 * torch.randn_like(x)),
}
MIXERS = {
    "attention": attention,
    "attention with dropout": lambda: attention(0.2),
    "encoder layer": encoder,
    "GRU": lambda: First(nn.GRU(WIDTH, WIDTH, batch_first=True)),
    "LSTM": lambda: First(nn.LSTM(WIDTH, 2, bidirectional=True, batch_first=True)),
    "RNN": lambda: First(nn.RNN(WIDTH, WIDTH, batch_first=True)),
    "words": Words,
}
HOSTILE = {
    "gradient reversal": lambda: Apply(Reverse.apply),
    "words with max_norm": lambda: Words(max_norm=0.5),
    "words with scale_grad_by_freq": lambda: Words(scale_grad_by_freq=True),
    "hook": lambda: Apply(lambda x: (x.register_hook(lambda g: 0.5 * g) if x.requires_grad else None, x * 1.0)[1]),
    "another function without gradients": lambda: Apply(lambda x: torch.sin(x) if torch.is_grad_enabled() else x),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
}
"""Parts that some engines must refuse."""
PARTS = {**LINEAR, **ACTIVATIONS, **NORMS, **RANDOM, **MIXERS, **HOSTILE}

LEAVES = st.one_of(*[st.sampled_from(sorted(kind)) for kind in (LINEAR, ACTIVATIONS, NORMS, RANDOM, MIXERS)])
TREES = st.recursive(
    st.tuples(LEAVES, st.booleans()),  # with whether it is frozen, rarely
    lambda inner: st.one_of(
        st.tuples(st.just("beside"), st.sampled_from(["sum", "gate", "detached", "no gradient", "join"]), inner, inner),
        st.tuples(st.just("residual"), inner),
        st.tuples(st.just("twice"), inner),
        st.tuples(st.just("row"), st.lists(inner, min_size=2, max_size=3)),
    ),
    max_leaves=5,
)


def build(tree, made):
    """The module of a tree; ``made`` are the linear layers so far, to be tied."""
    kind, *rest = tree
    if kind == "beside":
        return Beside(rest[0], build(rest[1], made), build(rest[2], made))
    if kind == "residual":
        return Beside("sum", nn.Identity(), build(rest[0], made))
    if kind == "twice":
        block = build(rest[0], made)
        return nn.Sequential(block, nn.Tanh(), block)
    if kind == "row":
        return nn.Sequential(*[build(part, made) for part in rest[0]])
    module = PARTS[kind]()
    if kind == "linear":
        made.append(module)
    return module.requires_grad_(not (rest[0] and len(kind) % 3 == 0))


class Composition(nn.Module):
    def __init__(self, trees, tied, pooled):
        super().__init__()
        made = []
        self.inside = nn.Linear(3, WIDTH)
        self.blocks = nn.Sequential(*[build(tree, made) for tree in trees])
        if tied and len(made) > 1:
            made[-1].weight = made[0].weight
        self.pooled = pooled
        self.head = nn.Linear(WIDTH if pooled else WIDTH * LENGTH, 4)

    def forward(self, x):
        h = self.blocks(self.inside(x))
        return self.head(h.mean(1) if self.pooled else h.flatten(1))


# With Adam's usual eps a parameter without influence, such as a bias before BatchNorm, makes a step of its rounding.
# AMSGrad is left to the other tests: its maximum is a kink in φ, where differences are no derivative.
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "Nesterov": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.01, eps=1e-3),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.01, eps=1e-3, weight_decay=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, eps=1e-3, momentum=0.5),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, eps=1e-3),
}


@st.composite
def problems(draw, hostile=False):
    """(problem, what it is)."""
    trees = draw(st.lists(TREES, min_size=1, max_size=3))
    if hostile:
        place = draw(st.integers(0, len(trees)))
        trees = [*trees[:place], (draw(st.sampled_from(sorted(HOSTILE))), False), *trees[place:]]
    tied, pooled, training = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    name, left_out = draw(st.sampled_from(sorted(OPTIMIZERS))), draw(st.integers(0, 9))
    rates = draw(st.sampled_from([(1.0,), (1.0, 0.3), (0.5, 2.0, 0.0)]))

    def optimizer(model):
        parameters = list(model.parameters())
        held = [p for i, p in enumerate(parameters) if i % 10 != left_out or i < 2]
        groups = [{"params": held[i :: len(rates)]} for i in range(len(rates))]
        made = OPTIMIZERS[name](groups)
        for group, rate in zip(made.param_groups, rates, strict=True):
            group["lr"] *= rate
        return made

    def batches(seed):
        return sequences(seed, count=8, length=LENGTH, width=3)

    what = f"{trees}, tied {tied}, pooled {pooled}, training {training}, {name} {rates}, without {left_out}"
    return Problem(lambda: Composition(trees, tied, pooled), optimizer, batches, training=training), what


SEEN: Counter = Counter()


def no_faults(drawn, counts, kind):
    problem, what = drawn
    try:
        verdicts = judge_all(problem, counts, LABEL)
    except InaccurateError:
        SEEN[kind, "left out"] += 1
        assume(False)
    for verdict in verdicts.values():
        SEEN[kind, verdict.kind] += 1
    said = "\n".join(f"  {engine}: {verdict}" for engine, verdict in verdicts.items())
    assert all(verdict.kind != "fault" for verdict in verdicts.values()), f"{what}\n{said}"


@settings(max_examples=150)
@given(drawn=problems())
def test_a_composition_is_trained_right_or_refused(drawn, counts):
    no_faults(drawn, counts, "usual")


@settings(max_examples=60)
@given(drawn=problems(hostile=True))
def test_a_composition_with_a_hostile_part_is_trained_right_or_refused(drawn, counts):
    no_faults(drawn, counts, "hostile")


def test_hardly_a_usual_composition_is_refused_or_left_out():
    """Of what the tests above met, where they ran in this process."""
    for kind, least in (("usual", 0.9), ("hostile", 0.3)):
        right, refused = SEEN[kind, "right"], SEEN[kind, "refused"]
        assert right >= least * (right + refused), SEEN
        assert SEEN[kind, "left out"] * len(ENGINES) <= 0.03 * (right + refused), SEEN
