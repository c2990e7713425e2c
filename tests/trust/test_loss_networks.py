"""Loss networks, models and optimizers in states that the fast paths must not pass by: each step judged by the loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.trust.reference import ENGINES, Problem, classification, judge, reference


class Own(nn.Module):
    """A loss of one's own: cross-entropy of outputs that pass through something."""

    kind = "classification"

    def __init__(self, through):
        super().__init__()
        self.through, self.weight = through, nn.Parameter(torch.tensor([0.3, 0.0, 0.8, 1.1]))

    def forward(self, prediction, target):
        return F.cross_entropy(self.through(self.weight * prediction), target)


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h * (torch.rand(h.shape, generator=self.generator, dtype=h.dtype) > 0.3))


class Table(nn.Module):
    """Gives a view of a parameter."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        return self.bias.expand(len(x), 4)


class Expanded(nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
        self.register_buffer("ones", torch.ones(1, dtype=torch.float64).expand(4))

    def forward(self, x):
        return super().forward(x) * self.ones


def hooked():
    phi = classification()
    phi.register_forward_hook(lambda module, arguments, output: 2 * output)
    return phi


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def own(through):
    return lambda: Own(through).double()


def optimizer(name):
    return lambda model: getattr(torch.optim, name)(model.parameters(), lr=0.01)


PROBLEMS = {
    "a hook on the loss network": Problem(mlp, phi=hooked),
    "a loss that draws random numbers": Problem(mlp, phi=own(nn.Dropout(0.4))),
    "an output that is a parameter": Problem(Table),
    "an output that is a parameter, and an own loss": Problem(Table, phi=own(nn.Identity())),
    "an expanded buffer": Problem(Expanded),
    "a generator of the model's own": Problem(Drops, steps=1, warm=0),
    **{
        f"a gradient that is zero, {name}": Problem(mlp, optimizer(name), phi=own(nn.Identity()), tolerance=1e-5)
        for name in ("RMSprop", "Adagrad", "Adamax", "NAdam", "RAdam", "Adadelta")
    },
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_the_step_is_right_in_every_engine(case, counts):
    plain = reference(PROBLEMS[case])
    for engine in ENGINES:
        verdict = judge(PROBLEMS[case], engine, plain)
        counts[f"steps of unusual losses: {verdict.kind}"] += 1
        assert verdict.kind == "right", f"{engine}: {verdict}"
