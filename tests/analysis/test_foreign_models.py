"""Every function of a model, on models of the kind that people bring: the model is the very same afterwards."""

import inspect
import warnings
from functools import partial

import matplotlib
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import analysis as an
from tests.analysis.foreign_models import MODELS, cross_entropy_that_fails, made, rows, untouched

matplotlib.use("Agg")
ce = F.cross_entropy


def shifted(model):
    """Three checkpoints that span a plane, state dicts with every name of a tied parameter."""
    states = []
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        moves = {id(t): 0.1 * torch.randn(t.shape, generator=g) for t in model.state_dict(keep_vars=True).values()}
        states.append(
            {
                name: t.detach() + moves[id(t)].to(t) if t.is_floating_point() else t.detach()
                for name, t in model.state_dict(keep_vars=True).items()
            }
        )
    return states


def recorded(model, data, loss, layer):
    recorder = an.Recorder(norms=lambda model, loss: an.gradient_norms(model, loss, data))
    recorder(0, model, loss)
    return recorder.replay(model, loss, [(1, shifted(model)[0])])


CALLS = {
    "adaptive_sharpness": lambda m, d, loss, layer: an.sharpness(m, loss, d, adaptive=True),
    "compare_attributions": lambda m, d, loss, layer: an.compare_attributions(
        m, m, d[0], partial(an.integrated_gradients, layer=layer, steps=4, baseline=0), top_k=2
    ),
    "effective_learning_rate": lambda m, d, loss, layer: an.effective_learning_rate(m, loss, ce, d),
    "effective_learning_rate_by_layer": lambda m, d, loss, layer: an.effective_learning_rate(
        m, loss, ce, d, by_layer=True
    ),
    "grad_cam": lambda m, d, loss, layer: an.grad_cam(m, d[0], layer),
    "gradient_cosine": lambda m, d, loss, layer: an.gradient_cosine(m, loss, d, d),
    "gradient_noise": lambda m, d, loss, layer: an.gradient_noise(m, loss, d),
    "gradient_noise_by_layer": lambda m, d, loss, layer: an.gradient_noise(m, loss, d, by_layer=True),
    "gradient_norms": lambda m, d, loss, layer: an.gradient_norms(m, loss, d),
    "implied_label_smoothing": lambda m, d, loss, layer: an.implied_label_smoothing(m, loss, d),
    "influence": lambda m, d, loss, layer: an.influence(m, loss, ce, d, d, 0.1),
    "integrated_gradients": lambda m, d, loss, layer: an.integrated_gradients(m, d[0], steps=4),
    "interpolate": lambda m, d, loss, layer: an.interpolate(m, loss, d, *shifted(m)[:2], positions=[0, 1]),
    "layer_integrated_gradients": lambda m, d, loss, layer: an.integrated_gradients(
        m, d[0], layer=layer, steps=4, baseline=0
    ),
    "line": lambda m, d, loss, layer: an.line(m, loss, d, positions=[0, 0.1], batchnorm="recalibrate"),
    "logit_statistics": lambda m, d, loss, layer: an.logit_statistics(m, d),
    "mean_gradients": lambda m, d, loss, layer: an.mean_gradients(m, [loss, ce], d, shifted(m)[0]),
    "occlusion": lambda m, d, loss, layer: an.occlusion(m, d[0]),
    "penultimate_statistics": lambda m, d, loss, layer: an.penultimate_statistics(m, d),
    "per_sample_gradients": lambda m, d, loss, layer: an.per_sample_gradients(m, loss, d),
    "plane": lambda m, d, loss, layer: an.plane(m, loss, d, x=[0, 0.1], y=[0], batchnorm="train"),
    "predictions": lambda m, d, loss, layer: an.predictions(m, d),
    "push_and_gap": lambda m, d, loss, layer: an.push_and_gap(m, loss, ce, d, d),
    "random_directions": lambda m, d, loss, layer: an.random_directions(m),
    "sharpness": lambda m, d, loss, layer: an.sharpness(m, loss, d, batchnorm="train"),
    "spectral_density": lambda m, d, loss, layer: an.spectral_density(m, loss, d, nodes=3, repeats=1),
    "target_gradients": lambda m, d, loss, layer: an.target_gradients(m, loss, d),
    "top_eigenpairs": lambda m, d, loss, layer: an.top_eigenpairs(m, loss, d, tolerance=0.1),
    "trace": lambda m, d, loss, layer: an.trace(m, loss, d, products=3, repeats=1, matrix="ggn"),
    "trajectory": lambda m, d, loss, layer: an.trajectory(m, shifted(m)),
    "Recorder": recorded,
}
WITHOUT_LOSS = {
    "grad_cam",
    "integrated_gradients",
    "layer_integrated_gradients",
    "occlusion",
    "compare_attributions",
} | {
    *("logit_statistics", "penultimate_statistics", "predictions", "random_directions", "trajectory"),
}


def test_no_function_of_a_model_is_forgotten():
    def takes_a_model(name):
        found = getattr(an, name)
        functions = [f for _, f in inspect.getmembers(found, inspect.isfunction)] if inspect.isclass(found) else [found]
        return any("model" in inspect.signature(f).parameters for f in functions)

    assert set(CALLS) == {name for name in an.__all__ if callable(getattr(an, name)) and takes_a_model(name)}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i < 7 else pytest.mark.slow) for i, name in enumerate(MODELS)]
)
def test_the_model_is_the_very_same(name, function, training):
    model, data = made(name, training)
    refused = (function == "grad_cam" and name != "encoder") or (
        name == "BERT" and function in ("integrated_gradients", "occlusion")
    )
    with untouched(model):
        if refused:  # there are no maps, and ids are no numbers
            with pytest.raises(ValueError, match="Grad-CAM needs|Token ids"):
                CALLS[function](model, data, ce, MODELS[name][2])
        else:
            CALLS[function](model, data, ce, MODELS[name][2])


@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("function", sorted(set(CALLS) - WITHOUT_LOSS))
def test_the_model_is_the_very_same_after_an_error(function, after):
    for name in ("keeps its features", "old weight_norm", "LSTM"):
        model, (x, y) = made(name)
        batches = [(x[:2], y[:2]), (x[2:4], y[2:4]), (x[4:], y[4:])]
        one = function in ("influence", "per_sample_gradients")
        with untouched(model):
            try:
                CALLS[function](model, (x, y) if one else batches, cross_entropy_that_fails(after), MODELS[name][2])
            except ArithmeticError:
                continue
            assert after or function == "influence", "the loss was not called"


class Advances(nn.Module):
    """A loss that grows at every evaluation, and remembers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.ones((), dtype=torch.float64))
        self.evaluations, self.values = 0, []

    def forward(self, prediction, target):
        value = float(self.step) * ce(prediction, target)
        self.step += 1
        self.evaluations += 1
        self.values.append(value)
        return value


@pytest.mark.parametrize("function", sorted(set(CALLS) - WITHOUT_LOSS))
def test_a_loss_that_advances_is_looked_at_as_it_is(function):
    (model, data), loss = made("a layer under two names", training=False), Advances()
    halves = [(data[0][:3], data[1][:3]), (data[0][3:], data[1][3:])]
    given = data if function in ("influence", "per_sample_gradients") else halves
    with untouched(model, loss):
        found = CALLS[function](model, given, loss, "head")
    expected = CALLS[function](model, given, ce, "head")
    assert repr(found) == repr(expected) or function == "Recorder"


@pytest.mark.parametrize("wrap", [lambda loss: loss, lambda loss: loss.forward, lambda loss: lambda p, y: loss(p, y)])
def test_the_curves_of_a_loss_that_advances(wrap):
    loss = Advances()
    with untouched(loss):
        found = an.loss_curves(wrap(loss), predictions=[0.2, 0.5, 0.9])
        found_gradient = an.logit_gradient(wrap(loss), *rows())
    assert found.value.tolist() == pytest.approx(an.loss_curves(ce, predictions=[0.2, 0.5, 0.9]).value.tolist())
    torch.testing.assert_close(found_gradient, an.logit_gradient(ce, *rows()))


def test_a_model_without_parameters():
    model, (x, y) = nn.Identity(), rows()
    data = (x[:, :4], y)
    with untouched(model):
        torch.testing.assert_close(an.predictions(model, data)[0], data[0])
        assert an.logit_statistics(model, data).confidence > 0
        assert an.integrated_gradients(model, data[0]).values.shape == (6, 4)
    for function in (an.gradient_norms, an.per_sample_gradients, an.top_eigenpairs, an.sharpness, an.line):
        with pytest.raises(ValueError, match="requires a gradient|no trainable"):
            function(model, ce, data)


def test_a_scripted_model_is_run_but_not_taken_apart():
    torch.manual_seed(0)
    plain, (x, y) = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(), nn.Linear(5, 4)).double(), rows()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(plain)
    with untouched(plain):
        torch.testing.assert_close(an.predictions(scripted, (x, y))[0], an.predictions(plain, (x, y))[0])
    assert scripted.training
    for function in (an.gradient_norms, an.per_sample_gradients, an.top_eigenpairs, an.line):
        with pytest.raises(ValueError, match="scripted module.*it was scripted from"):
            function(scripted, ce, (x, y))


def test_a_model_that_returns_a_dictionary():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(6, 4).double()

        def forward(self, x):
            return {"logits": self.last(x)}

    torch.manual_seed(0)
    model, data = Output(), rows()

    def loss(output, target):
        return ce(output["logits"], target)

    torch.testing.assert_close(
        an.per_sample_gradients(model, loss, data), an.per_sample_gradients(model.last, ce, data)
    )
    assert an.trace(model, loss, data) == an.trace(model.last, ce, data)
    assert an.sharpness(model, loss, data) == an.sharpness(model.last, ce, data)
    for call in (
        lambda: an.influence(model, loss, loss, data, data, 0.1),
        lambda: an.trace(model, loss, data, matrix="ggn"),
        lambda: an.predictions(model, data),
        lambda: an.logit_statistics(model, data),
        lambda: an.integrated_gradients(model, data[0]),
    ):
        with untouched(model), pytest.raises(ValueError, match="one floating tensor, got dict; wrap it"):
            call()


class Graph(nn.Module):
    """Passes along a sparse adjacency matrix, which is a buffer; and has a weight that is not a number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.unused = nn.Parameter(torch.tensor(float("nan")))
        self.register_buffer("adjacency", torch.eye(12).to_sparse())

    def forward(self, x):
        return self.layer(torch.sparse.mm(self.adjacency, x))


def test_sparse_buffers_and_weights_that_are_nan_do_no_harm():
    torch.manual_seed(0)
    model, data = Graph(), (torch.randn(12, 6), torch.randint(4, (12,)))
    model.layer.weight.grad = torch.ones_like(model.layer.weight)
    grad, version = model.layer.weight.grad, model.unused._version
    norms = an.gradient_norms(model, F.cross_entropy, data)
    assert norms.set_index("layer").gradient_norm["layer"] > 0
    assert model.layer.weight.grad is grad and model.unused._version == version
    assert torch.equal(model.adjacency.to_dense(), torch.eye(12))
