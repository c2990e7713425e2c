"""The judge itself: another exact engine is right, and each kind of wrong engine is found."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from tests.trust.reference import Problem, judge, reals, reference, regression, romberg, rows, sgd


class DoubleBackward:
    """SGD without momentum, written out; wrong in one way if asked to be."""

    def __init__(self, model, phi, optimizer, *, engine, wrong=""):
        self.model, self.phi, self.optimizer, self.wrong = model, phi, optimizer, wrong

    def meta_gradient(self, batches, meta_batch):
        (x, y), (x_meta, y_meta) = batches[0], meta_batch
        names, theta = zip(*self.model.named_parameters(), strict=True)
        phi, wrong, model = list(self.phi.parameters()), self.wrong, self.model
        if wrong == "refuses":
            raise ValueError("not for you")
        if wrong == "refuses in silence":
            raise ValueError
        if wrong == "is no refusal":
            raise KeyError("momentum_buffer")
        if wrong == "draws a number":
            torch.rand(1)
        learned = self.phi(model(x), y)
        if wrong == "refuses too late":
            raise ValueError("not for you, but the buffers have moved")
        gradients = torch.autograd.grad(learned, theta, create_graph=True)
        moved = [p - 0.1 * g for p, g in zip(theta, gradients, strict=True)]
        random, buffers = torch.get_rng_state(), {name: b.clone() for name, b in model.named_buffers()}
        loss = (F.cross_entropy if y.ndim == 1 else F.mse_loss)(
            functional_call(model, {**dict(zip(names, moved, strict=True)), **buffers}, (x_meta,)), y_meta
        )
        torch.set_rng_state(random)
        found = list(torch.autograd.grad(loss, phi))
        if wrong == "meta-gradient":
            found[0] = found[0] * (1 + 1e-4)
        with torch.no_grad():
            for p, new in zip(theta, moved, strict=True):
                p.copy_(new + 1e-5 * (new - p) if wrong == "θ" else new)
        if wrong == "a parameter is replaced":
            model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        if wrong == "mode":
            model[1].eval()
        if wrong == "φ's gradient":
            phi[0].grad = torch.zeros_like(phi[0])
        if wrong == "buffers":
            model[1].running_mean += 1e-6
        if wrong == "a later step":
            self.wrong = "meta-gradient"
        return SimpleNamespace(meta_gradient=found, training_loss=learned.detach(), meta_loss=loss.detach())


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))


PROBLEM = Problem(mlp, directions=2)


@pytest.fixture(scope="module")
def plain():
    return reference(PROBLEM)


def test_an_exact_engine_is_right(plain):
    assert str(judge(PROBLEM, "other", plain, DoubleBackward)) == "right"


def test_so_it_is_in_regression():
    problem = Problem(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), batches=reals, phi=regression)
    assert str(judge(problem, "other", None, DoubleBackward)) == "right"


def test_a_refusal_is_one(plain):
    assert judge(PROBLEM, "other", plain, DoubleBackward, wrong="refuses").kind == "refused"


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ("θ", "step 1: θ is not the plain loop's"),
        ("meta-gradient", "step 1: meta-gradient along a direction"),
        ("a later step", "step 2: meta-gradient along a direction"),
        ("a parameter is replaced", "Parameter objects changed"),
        ("mode", "modes changed"),
        ("φ's gradient", "φ changed"),
        ("buffers", "buffers not the plain loop's"),
        ("draws a number", "θ is not the plain loop's"),
        ("refuses in silence", "not a refusal with a message"),
        ("is no refusal", "not a refusal with a message: KeyError"),
        ("refuses too late", "changed buffers (1.running_mean: off by"),
    ],
)
def test_every_kind_of_wrong_engine_is_found(wrong, text, plain):
    verdict = judge(PROBLEM, "other", plain, DoubleBackward, wrong=wrong)
    assert verdict.kind == "fault" and text in verdict.text, str(verdict)


def test_a_refusal_that_leaves_the_optimizer_or_the_gradient_changed_is_a_fault():
    def spoils(what):
        class Spoils(DoubleBackward):
            def meta_gradient(self, batches, meta_batch):
                parameter = next(self.model.parameters())
                if what == "gradient":
                    parameter.grad = torch.ones_like(parameter)
                else:
                    self.optimizer.state[parameter]["momentum_buffer"].add_(1e-9)
                raise RuntimeError("too late")

        return Spoils

    problem = Problem(mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), steps=1)
    plain = reference(problem)
    assert "changed .grad" in judge(problem, "other", plain, spoils("gradient")).text
    assert "changed optimizer's state" in judge(problem, "other", plain, spoils("state")).text


def test_the_reference_meets_a_derivative_on_paper():
    """One weight θ, f = θx, M_φ = φ f²/2, L_T = (f − y)²/2: dL/dφ = −α x² θ · x̃ (θ' x̃ − ỹ), with θ' = θ(1 − α φ x²)."""

    class Half(nn.Module):
        kind = "regression"

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, prediction, target):
            return self.scale * (prediction**2).mean() / 2

    def make():
        model = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(model.weight, 0.6)
        return model

    data = [(1.5, 0.0), (-0.8, 0.4)]

    def batches(seed):
        x, y = data[seed % 2]
        return torch.tensor([[x]], dtype=torch.float64), torch.tensor([[y]], dtype=torch.float64)

    (plain,) = reference(Problem(make, sgd, batches, phi=Half, warm=0, steps=1))
    theta = 0.6 * (1 - 0.1 * 0.7 * 1.5**2)
    expected = -0.1 * 1.5**2 * 0.6 * 2 * -0.8 * (theta * -0.8 - 0.4)  # torch's mse has no half
    ((direction, slope),) = plain.slopes
    assert math.isclose(slope, expected * direction[0].item(), rel_tol=1e-10)


def test_extrapolation_leaves_the_sixth_power():
    values = [3 + 2 * h**2 - 5 * h**4 for h in (0.4, 0.2, 0.1)]
    assert math.isclose(romberg(values)[0], 3, rel_tol=1e-12)


def test_a_reference_that_is_not_accurate_gives_up():
    noise = torch.Generator().manual_seed(0)

    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x) + torch.rand(4, generator=noise, dtype=torch.float64)

    with pytest.raises(AssertionError, match="not accurate enough"):
        reference(Problem(lambda: Noisy(6, 4), batches=rows))
