"""Models, optimizers and loops of the kind that people bring: a step is right, or refused with nothing changed."""

import random
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import optimizer as optim_hooks
from torch.utils.checkpoint import checkpoint

from adalfl_lite import OnlineLoss
from tests.models import Apply, Layers, Reverse
from tests.trust.reference import (
    ENGINES,
    Problem,
    Refusals,
    check,
    classification,
    images,
    judge,
    judge_all,
    reals,
    regression,
    rows,
    sequences,
    sgd,
    tokens,
)

pytestmark = pytest.mark.slow
LABEL = "steps of any model"


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def with_batch_norm():
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4))


def with_dropout():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4))


def embedded(**options):
    return lambda: nn.Sequential(nn.Embedding(20, 4, **options), nn.Flatten(), nn.Linear(12, 4))


def between(function):
    """A problem whose hidden layer goes through a function, (12, 8) -> (12, 8)."""
    return Problem(lambda: nn.Sequential(nn.Linear(6, 8), Apply(function), nn.Linear(8, 4)))


def around(make_layer):
    return Problem(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), make_layer(), nn.Tanh(), nn.Linear(8, 4)))


# ---------------------------------------------------------------------------------------------------- architectures


def used_twice():
    layer = nn.PReLU()
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 8), layer, nn.Linear(8, 4))


def block_used_twice():
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
    return nn.Sequential(nn.Linear(6, 8), block, nn.Dropout(0.2), block, nn.Linear(8, 4))


def batch_norm_used_twice():
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, 8), norm, nn.Linear(8, 4))


def alias():
    model = Layers(lambda self, x: self.body(x), body=mlp())
    model.a, model.b = model.body[0], model.body[2]
    return model


def tied_linear():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[4].weight = model[2].weight
    return model


class Language(nn.Module):
    """A language model in small: the output layer is the table of embeddings."""

    def __init__(self, layer):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(20, 8), layer, nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.last = nn.Linear(20, 4)

    def forward(self, x):
        h = self.layer(self.table(x))
        return self.last(torch.tanh(self.head((h[0] if isinstance(h, tuple) else h).mean(1))))


class Recurrent(nn.Module):
    def __init__(self, layer, width=5):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.q, self.o, self.layer = nn.Linear(3, 8), nn.Linear(8, 4), None
        if options:
            self.layer = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        h = self.q(x)
        if self.layer is not None:
            return self.o(self.layer(h, h, h, need_weights=False)[0].mean(1))
        return self.o(F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None])[:, 0].mean(1))


def encoder(dropout=0.0, layers=0, **options):
    def make():
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, **options)
        return nn.Sequential(
            nn.Linear(3, 8), nn.TransformerEncoder(layer, layers) if layers else layer, nn.Flatten(), nn.Linear(40, 4)
        )

    return make


class Decoder(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        layer = nn.TransformerDecoderLayer(8, 2, 16, dropout, batch_first=True)
        self.embed, self.layer, self.head = nn.Linear(3, 8), nn.TransformerDecoder(layer, 2), nn.Linear(8, 4)

    def forward(self, x):
        h = self.embed(x)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.layer(h, h.flip(1), tgt_mask=mask).mean(1))


class Fourier(nn.Module):
    """Complex weights."""

    def __init__(self):
        super().__init__()
        self.w, self.o = nn.Parameter(torch.randn(4, dtype=torch.complex128)), nn.Linear(6, 4)

    def forward(self, x):
        return self.o(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=6))


def convolutions(norm=nn.BatchNorm2d, **options):
    return lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, **options),
        norm(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(4, 4),
    )


def lists():
    return Layers(
        lambda self, x: self.b(torch.tanh(self.a(x)) * self.scales[0] + self.scales[1]) @ self.by_name["mix"],
        scales=nn.ParameterList([torch.ones(8), torch.zeros(())]),
        by_name=nn.ParameterDict({"mix": torch.eye(4)}),
    )


def two_parameters_of_one_storage():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model.double()
    model[4].weight = nn.Parameter(model[2].weight.data)
    return model


def hidden(function):
    """Layers whose hidden activation goes through a function of (self, h)."""
    return lambda self, x: self.b(function(self, torch.tanh(self.a(x))))


def held(what):
    """Something is held constant in the forward pass: a scale, a teacher, a rounding."""

    def run(self, x):
        h = torch.tanh(self.a(x))
        if what == "detached scale":
            return self.b(h / h.detach().abs().mean())
        with torch.no_grad():
            scale, centre, rounding = h.abs().mean(), self.b(h).mean(0), torch.round(h * 4) / 4 - h
        if what == "scale":
            return self.b(h / scale)
        return self.b(h) - centre if what == "teacher" else self.b(h + rounding)

    return Problem(lambda: Layers(run))


ARCHITECTURES = {
    "plain": Problem(mlp, directions=2),
    "regression": Problem(
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), sgd, reals, phi=regression
    ),
    "from a cold start": Problem(mlp, lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), warm=0),
    "one PReLU used twice": Problem(used_twice),
    "a block used twice": Problem(block_used_twice),
    "one BatchNorm used twice": Problem(batch_norm_used_twice),
    "a layer under two names": Problem(alias),
    "tied weights": Problem(tied_linear),
    "embedding tied with the head": Problem(lambda: Language(nn.GRU(8, 8, batch_first=True)), sgd, tokens),
    "two parameters of one storage": Problem(two_parameters_of_one_storage),
    "lists of parameters": Problem(lists),
    "BatchNorm, train": Problem(with_batch_norm),
    "BatchNorm, eval": Problem(with_batch_norm, training=False),
    "BatchNorm, cumulative": around(lambda: nn.BatchNorm1d(8, momentum=None)),
    "BatchNorm, no statistics kept": around(lambda: nn.BatchNorm1d(8, track_running_stats=False)),
    "BatchNorm in eval within a model in train": Problem(
        lambda: Layers(lambda self, x: self.b(self.norm.eval()(self.a(x))), norm=nn.BatchNorm1d(8))
    ),
    "dropout, train": Problem(with_dropout),
    "dropout, eval": Problem(with_dropout, training=False),
    "a layer of no width": Problem(
        lambda: Layers(hidden(lambda self, h: torch.cat([h, self.none(h)], 1)), none=nn.Linear(8, 0))
    ),
    "dropout of channels": Problem(
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(64, 4)), sgd, images
    ),
    "alpha dropout": around(lambda: nn.AlphaDropout(0.3)),
    "random slopes": around(nn.RReLU),
    "convolutions": Problem(convolutions(), sgd, images),
    "convolutions, channels last": Problem(lambda: convolutions()().to(memory_format=torch.channels_last), sgd, images),
    "convolutions, padded by reflection": Problem(convolutions(padding_mode="reflect"), sgd, images),
    "group norm": Problem(convolutions(lambda width: nn.GroupNorm(2, width)), sgd, images),
    "instance norm": Problem(convolutions(lambda width: nn.InstanceNorm2d(width, affine=True)), sgd, images),
    "RNN": Problem(lambda: Recurrent(nn.RNN(3, 5, batch_first=True)), sgd, sequences),
    "RNN with ReLU": Problem(lambda: Recurrent(nn.RNN(3, 5, nonlinearity="relu", batch_first=True)), sgd, sequences),
    "GRU of two layers with dropout": Problem(
        lambda: Recurrent(nn.GRU(3, 5, 2, dropout=0.2, batch_first=True)), sgd, sequences
    ),
    "LSTM, both ways": Problem(
        lambda: Recurrent(nn.LSTM(3, 5, bidirectional=True, batch_first=True), 10), sgd, sequences
    ),
    "LSTM, projected": Problem(lambda: Recurrent(nn.LSTM(3, 6, proj_size=5, batch_first=True)), sgd, sequences),
    "attention": Problem(Attention, sgd, sequences),
    "multi-head attention, train": Problem(lambda: Attention(dropout=0.2), sgd, sequences),
    "multi-head attention, eval": Problem(lambda: Attention(dropout=0.2), sgd, sequences, training=False),
    "multi-head attention, bias to keys": Problem(lambda: Attention(add_bias_kv=True), sgd, sequences),
    "encoder layer, train": Problem(encoder(0.1), sgd, sequences),
    "encoder layer, eval": Problem(encoder(0.1), sgd, sequences, training=False),
    "encoder layer, norm first, GELU": Problem(encoder(norm_first=True, activation="gelu"), sgd, sequences),
    "encoder, train": Problem(encoder(0.1, layers=2), sgd, sequences),
    "encoder, eval": Problem(encoder(0.1, layers=2), sgd, sequences, training=False),
    "decoder, train": Problem(lambda: Decoder(0.1), sgd, sequences),
    "decoder, eval": Problem(lambda: Decoder(0.1), sgd, sequences, training=False),
    "hardsigmoid": around(nn.Hardsigmoid),
    "hardswish": around(nn.Hardswish),
    "softmax and its logarithm": between(lambda h: h.softmax(1) + h.log_softmax(0)),
    "complex weights": Problem(Fourier),
    "scale taken under no_grad": held("scale"),
    "teacher under no_grad": held("teacher"),
    "straight-through rounding": held("rounding"),
    "detached scale": held("detached scale"),
    "frozen first layer": Problem(
        lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 4))
    ),
    "frozen layer after a trained one": Problem(
        lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 4))
    ),
    "a layer that the optimizer does not hold": Problem(
        mlp, lambda m: torch.optim.SGD([*m[2].parameters(), m[0].bias], lr=0.1, momentum=0.9)
    ),
    "two groups, two learning rates": Problem(
        mlp,
        lambda m: torch.optim.SGD(
            [{"params": m[2].parameters(), "lr": 0.3}, {"params": m[0].parameters(), "momentum": 0.5}], lr=0.1
        ),
    ),
    "a head without use": Problem(
        lambda: Layers(hidden(lambda self, h: h), spare=nn.Linear(8, 4)),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
    ),
    "a layer that only some batches use": Problem(
        lambda: Layers(hidden(lambda self, h: self.more(h) if h[0, 0] > h[1, 0] else h), more=nn.Linear(8, 8)),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        steps=3,
    ),
    "a gradient of which others are made": Problem(
        lambda: Layers(hidden(lambda self, h: h + self.shift), shift=nn.Parameter(torch.zeros(12, 8)))
    ),
    "parameters without entries, and of one": Problem(
        lambda: Layers(
            hidden(lambda self, h: h * self.scale + self.none.sum()),
            scale=nn.Parameter(torch.tensor(1.5)),
            none=nn.Parameter(torch.zeros(0, 3)),
        )
    ),
    "a subclass of Parameter": Problem(
        lambda: Layers(hidden(lambda self, h: h * self.scale), scale=type("Mine", (nn.Parameter,), {})(torch.ones(8)))
    ),
    "not yet initialised": Problem(
        lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Tanh(), nn.LazyLinear(4)), warm=0
    ),
    "inputs that require gradients": Problem(
        mlp, sgd, lambda seed: (rows(seed)[0].requires_grad_(True), rows(seed)[1])
    ),
    "compiled by torch.jit": Problem(lambda: torch.jit.script(mlp())),
    "data parallel": Problem(lambda: nn.DataParallel(mlp())),
    "a forward hook that changes the output": Problem(
        lambda: (model := mlp(), model[1].register_forward_hook(lambda *given: given[2] * 1.5))[0]
    ),
    "a forward pre-hook that changes the input": Problem(
        lambda: (model := mlp(), model[1].register_forward_pre_hook(lambda _, given: (given[0] * 1.5,)))[0]
    ),
    "forward replaced on the instance": Problem(
        lambda: (model := mlp(), setattr(model[1], "forward", lambda x: torch.sin(x)))[0]
    ),
    "pruned": Problem(lambda: (model := mlp(), prune.l1_unstructured(model[0], "weight", amount=0.4))[0]),
}

# --------------------------------------------------------------------------------- operations within the forward pass


def in_place(h):
    h = h * 1.0
    h[:, 0] = 2 * h[:, 1]
    h[:, 3:5].mul_(2).add_(h[:, 5:7].clone())
    return h.sigmoid_()


def ctc(h):
    targets, lengths = torch.ones(2, 3, dtype=torch.long), (torch.tensor([12, 12]), torch.tensor([3, 3]))
    return h * F.ctc_loss(h.view(12, 2, 4).log_softmax(2), targets, *lengths)


def solved(h):
    a = h.T @ h / 12 + torch.eye(8, dtype=h.dtype)
    return torch.linalg.solve(a, h.T).T


def interpolated(h):
    return F.interpolate(h[:, None], size=4, mode="linear").flatten(1).repeat(1, 2)


def sampled(h):
    where = torch.tanh(h).view(12, 2, 2, 2)
    return F.grid_sample(h.view(12, 2, 2, 2), where, align_corners=False).flatten(1)


def nested_gradient(h):
    return torch.func.vmap(torch.func.grad(lambda row: (row**3).sum()))(h)


OPERATIONS = {
    "in place": in_place,
    "ReLU in place": lambda h: F.relu_(h * 1.0),
    "sorted": lambda h: h.sort(1).values,
    "top k": lambda h: h.topk(8, 1).values,
    "gathered": lambda h: h.gather(1, h.detach().argsort(1)),
    "scattered": lambda h: torch.zeros_like(h).scatter_add(0, torch.arange(12)[:, None].expand(12, 8) // 2, h),
    "index put": lambda h: torch.zeros_like(h).index_put((torch.arange(12) // 3,), h, accumulate=True),
    "masked": lambda h: h.masked_fill(h > 0.5, 0.5) + torch.where(h > 0, h, h**2),
    "einsum": lambda h: torch.einsum("bi,bj,bk->bk", h, h, h),
    "cumulated": lambda h: h.cumsum(1) + h.cumprod(0) + h.logcumsumexp(1),
    "products and norms": lambda h: h * h.prod(1, keepdim=True) + h / h.norm(dim=1, keepdim=True),
    "renormalised": lambda h: h.renorm(2, 0, 0.5),
    "logsumexp": lambda h: h - h.logsumexp(1, keepdim=True),
    "median and quantile": lambda h: h - h.median(0).values - h.quantile(0.3, dim=1, keepdim=True),
    "distances": lambda h: torch.cdist(h, h)[:, :8] + F.pairwise_distance(h, h.flip(0))[:, None],
    "cosine": lambda h: h * F.cosine_similarity(h, h.flip(1))[:, None],
    "Fourier": lambda h: torch.fft.fft(h).abs(),
    "complex": lambda h: torch.view_as_real(torch.exp(torch.view_as_complex(h.view(12, 4, 2)))).flatten(1),
    "solved": solved,
    "Cholesky": lambda h: h @ torch.linalg.cholesky(h.T @ h + torch.eye(8, dtype=h.dtype)),
    "eigenvalues": lambda h: h * torch.linalg.eigvalsh(h.T @ h),
    "singular values": lambda h: h * torch.linalg.svdvals(h),
    "matrix exponential": lambda h: h @ torch.matrix_exp(0.1 * (h.T @ h)),
    "determinant": lambda h: h * torch.linalg.slogdet(h.T @ h + torch.eye(8, dtype=h.dtype))[1],
    "unfolded": lambda h: F.unfold(h.view(12, 2, 2, 2), 2).flatten(1),
    "interpolated": interpolated,
    "bicubic": lambda h: F.interpolate(h.view(12, 2, 2, 2), scale_factor=2, mode="bicubic").flatten(1)[:, 4:12],
    "pixels shuffled": lambda h: F.pixel_shuffle(h.view(12, 8, 1, 1), 2).flatten(1),
    "sampled from a grid": sampled,
    "special functions": lambda h: torch.lgamma(h.abs() + 1) + torch.erf(h) + torch.special.i0(h) + torch.sinc(h),
    "Bessel": lambda h: torch.special.bessel_j0(h),
    "gradient inside, by torch.func": nested_gradient,
    "conditional on the mean": lambda h: torch.sin(h) if h.mean() > 0 else torch.cos(h),
    "Huber and squared error": lambda h: h * F.huber_loss(h, h.flip(0)) + F.mse_loss(h, h.flip(1)),
    "CTC": ctc,
    "soft pooling": lambda h: F.lp_pool1d(h[:, None].abs() + 0.1, 2, 2).flatten(1).repeat(1, 2),
    "local response": lambda h: F.local_response_norm(h.view(12, 4, 2), 3).flatten(1),
}  # fmt: skip

# --------------------------------------------------------------- backward passes that are not the forward's derivative


class ReverseWithTangent(Reverse):
    """With a forward mode of its own, which is not the transpose of its backward pass."""

    @staticmethod
    def jvp(ctx, t):
        return t.view_as(t)


class StraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(4 * x) / 4

    @staticmethod
    def backward(ctx, g):
        return g


class StraightThroughWithTangent(StraightThrough):
    @staticmethod
    def jvp(ctx, t):
        return t * 1.0


def saturated(g, at=1e-4):
    """Clipping, but smooth, so that it can be differentiated by differences."""
    return at * torch.tanh(g / at)


class Saturated(Function):
    """Backward is not even linear in the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return saturated(g)


class Noised(Function):
    """Draws random numbers in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g * (1 + 0.1 * torch.randn_like(g))


class Cube(Function):
    """True derivatives, backward only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeOnce(Cube):
    """True derivatives, but once."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeDetached(Cube):
    """A backward pass that cuts its own graph: its second derivative is silently wrong."""

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return (3 * x.detach() ** 2 * g.detach()).detach()


class CubeByNumpy(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * x.detach().numpy() ** 2 * g.detach().numpy())


class CubeBothWays(Function):
    """True derivatives, both ways."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def jvp(ctx, t):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * t


class CubeForwardAlone(CubeBothWays):
    """The forward mode is the derivative, the backward pass a cheaper stand-in."""

    @staticmethod
    def backward(ctx, g):
        return g * 1.0


def hooked(hook, guarded):
    def function(h):
        h = torch.tanh(h)
        if h.requires_grad or not guarded:
            h.register_hook(hook)
        return h

    return between(function)


def retained(h):
    h = torch.tanh(h)
    h.retain_grad()
    return h


def kept_elsewhere(h):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        return torch.tanh(h) ** 2


def kept_coarsely(h):
    """Activations are saved in low precision for the backward pass, a compression."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(torch.bfloat16), lambda t: t.to(torch.float64)):
        return torch.tanh(h) ** 2


def dropped(h):
    return F.dropout(h, 0.4).tanh()


BACKWARDS = {
    "gradient reversal": between(Reverse.apply),
    "gradient reversal with a tangent": between(ReverseWithTangent.apply),
    "straight through": between(StraightThrough.apply),
    "straight through with a tangent": between(StraightThroughWithTangent.apply),
    "gradient saturated within": between(Saturated.apply),
    "random numbers in the backward pass": between(Noised.apply),
    "a Function with true derivatives": between(Cube.apply),
    "a Function with true derivatives, both ways": between(CubeBothWays.apply),
    "a Function that differentiates once": between(CubeOnce.apply),
    "a Function that cuts its second derivative": between(CubeDetached.apply),
    "a Function in numpy": between(CubeByNumpy.apply),
    "a Function whose forward mode alone is true": between(CubeForwardAlone.apply),
    "activation hook that scales": hooked(lambda g: 0.5 * g, guarded=False),
    "activation hook that scales, guarded": hooked(lambda g: 0.5 * g, guarded=True),
    "activation hook that saturates, guarded": hooked(saturated, guarded=True),
    "activation hook that only looks": hooked(lambda g: None, guarded=False),
    "activation hook that only looks, guarded": hooked(lambda g: None, guarded=True),
    "activation whose gradient is retained": between(retained),
    "activations kept elsewhere": between(kept_elsewhere),
    "activations kept in low precision": between(kept_coarsely),
    "checkpoint": between(lambda h: checkpoint(torch.tanh, h, use_reentrant=False)),
    "checkpoint, reentrant": between(lambda h: checkpoint(torch.tanh, h, use_reentrant=True)),
    "checkpoint with dropout": between(lambda h: checkpoint(dropped, h, use_reentrant=False)),
    "checkpoint with dropout, reentrant": between(lambda h: checkpoint(dropped, h, use_reentrant=True)),
    "checkpoint that draws anew": between(
        lambda h: checkpoint(dropped, h, use_reentrant=False, preserve_rng_state=False, determinism_check="none")
    ),
    "checkpoint over a layer": Problem(
        lambda: Layers(lambda self, x: self.b(checkpoint(lambda x: torch.tanh(self.a(x)), x, use_reentrant=False)))
    ),
    "embedding, padded": Problem(embedded(padding_idx=0), sgd, tokens),
}


class Words(nn.Module):
    """Embeddings by function."""

    def __init__(self, function=F.embedding, **options):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(20, 4)), nn.Linear(12 if function is F.embedding else 4, 4)
        self.function, self.options = function, options

    def forward(self, x):
        return self.head(self.function(x, self.table, **self.options).flatten(1))


def bag(**options):
    return lambda: nn.Sequential(nn.EmbeddingBag(20, 8, **options), nn.Linear(8, 4))


WORDS = {
    "max_norm": {"max_norm": 1.0},
    "scale_grad_by_freq": {"scale_grad_by_freq": True},
    "sparse gradients": {"sparse": True},
}
for what, options in WORDS.items():
    summed = {"mode": "sum", **options}
    BACKWARDS |= {
        f"nn.Embedding with {what}": Problem(embedded(**options), sgd, tokens),
        f"F.embedding with {what}": Problem(partial(Words, **options), sgd, tokens),
        f"nn.EmbeddingBag with {what}": Problem(bag(**summed), sgd, tokens),
        f"F.embedding_bag with {what}": Problem(partial(Words, F.embedding_bag, **summed), sgd, tokens),
    }
BACKWARDS |= {f"nn.EmbeddingBag, {mode}": Problem(bag(mode=mode), sgd, tokens) for mode in ("sum", "mean", "max")}

# ------------------------------------------------------------------------------- models that remember, and that draw


def counted(scale):
    def function(self, h):
        self.calls = getattr(self, "calls", 0) + 1
        return h * (1 + scale * self.calls)

    return Problem(lambda: Layers(hidden(function)), steps=1)


class Stateful(nn.Module):
    """Carries its hidden state from batch to batch, in an attribute."""

    def __init__(self, as_buffer):
        super().__init__()
        self.layer, self.head, self.as_buffer = nn.GRU(3, 5, batch_first=True), nn.Linear(5, 4), as_buffer
        if as_buffer:
            self.register_buffer("state", torch.zeros(1, 12, 5))
        else:
            self.state = torch.zeros(1, 12, 5, dtype=torch.float64)

    def forward(self, x):
        h, state = self.layer(x, self.state)
        self.state = state.detach()
        return self.head(h[:, -1])


def running_scale(self, h):
    """A buffer that is changed, then used."""
    with torch.no_grad():
        self.scale.mul_(0.5).add_(0.5 * h.abs().mean())
    return h / self.scale


def rebound_buffer(self, h):
    self.seen = self.seen + 1
    return h * (1 + 0.1 * self.seen)


def first_seen(self, h):
    if getattr(self, "first", None) is None:
        self.first = h.detach().mean(0)
    return h - self.first


def own_generator():
    generator = torch.Generator().manual_seed(0)
    return Layers(hidden(lambda self, h: h + 0.1 * torch.randn(h.shape, generator=generator, dtype=h.dtype)))


def updated_weights(self, h):
    """The forward pass changes a parameter, as some normalisations do."""
    with torch.no_grad():
        self.b.weight.div_(self.b.weight.norm())
    return h


def updated_weights_unseen(self, h):
    self.b.weight.data.div_(self.b.weight.data.norm())
    return h


def changes_its_input(self, x):
    x.mul_(2)
    return self.b(torch.tanh(self.a(x)))


def forces(guarded):
    """The output is a derivative, taken in the forward pass, as that of an energy."""

    def run(self, x):
        with torch.set_grad_enabled(guarded or torch.is_grad_enabled()):
            x = x.detach().requires_grad_(True)
            energy = torch.tanh(self.a(x)).pow(2).sum()
            (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return self.b(F.pad(force, (0, 2)))

    return Problem(lambda: Layers(run))


def orthogonal(**options):
    return around(lambda: parametrizations.orthogonal(nn.Linear(8, 8), **options))


# What is kept outside of buffers and of torch's random state moves on in the meta pass as well, in anybody's loop: of
# such models one step is judged.
STATES = {
    "counts its calls": counted(0.0),
    "changes with its calls": counted(0.1),
    "state carried in an attribute": Problem(lambda: Stateful(False), sgd, sequences, steps=1),
    "state carried in a buffer": Problem(lambda: Stateful(True), sgd, sequences),
    "a buffer that is changed, then used": Problem(lambda: Layers(hidden(running_scale), scale=torch.ones(()))),
    "a buffer that is rebound": Problem(lambda: Layers(hidden(rebound_buffer), seen=torch.zeros(()))),
    "remembers its first batch": Problem(lambda: Layers(hidden(first_seen)), warm=0, steps=1),
    "noise": between(lambda h: h + 0.1 * torch.randn_like(h)),
    "noise after a dropout": between(lambda h: F.dropout(h, 0.2) + 0.1 * torch.rand_like(h)),
    "Gumbel softmax": between(lambda h: F.gumbel_softmax(h, 0.7)),
    "Gumbel softmax, straight through": between(lambda h: F.gumbel_softmax(h, 0.7, hard=True)),
    "noise from its own generator": Problem(own_generator, steps=1),
    "noise from Python": replace(between(lambda h: h * (1 + random.random())), steps=1),
    "noise from numpy": replace(between(lambda h: h + torch.from_numpy(np.random.randn(8))), steps=1),
    "seeds the generator itself": between(lambda h: (torch.manual_seed(1), h + 0.1 * torch.randn_like(h))[1]),
    "a layer dropped at random": replace(
        between(lambda h: torch.tanh(h) if (random.random(), random.random())[1] < 0.6 else h), steps=1
    ),
    "weights changed in the forward pass": Problem(lambda: Layers(hidden(updated_weights))),
    "weights changed in the forward pass, by .data": Problem(lambda: Layers(hidden(updated_weights_unseen))),
    "changes its input": Problem(lambda: Layers(changes_its_input), steps=1),
    "another function when gradients are off": between(
        lambda h: torch.tanh(h) if torch.is_grad_enabled() else torch.sin(h)
    ),
    "another function when no weight asks for gradients": Problem(
        lambda: Layers(hidden(lambda self, h: h * h if self.a.weight.requires_grad else h))
    ),
    "a derivative within the forward pass": forces(guarded=False),
    "a derivative within the forward pass, guarded": forces(guarded=True),
    "spectral norm, old": around(lambda: nn.utils.spectral_norm(nn.Linear(8, 8))),
    "spectral norm, old, eval": replace(around(lambda: nn.utils.spectral_norm(nn.Linear(8, 8))), training=False),
    "spectral norm": around(lambda: parametrizations.spectral_norm(nn.Linear(8, 8))),
    "spectral norm, eval": replace(around(lambda: parametrizations.spectral_norm(nn.Linear(8, 8))), training=False),
    "weight norm, old": around(lambda: nn.utils.weight_norm(nn.Linear(8, 8))),
    "weight norm": around(lambda: parametrizations.weight_norm(nn.Linear(8, 8))),
    "orthogonal": orthogonal(),
    "orthogonal by Householder": orthogonal(orthogonal_map="householder"),
    "parametrized, cached": Problem(
        lambda: Layers(
            hidden(lambda self, h: cached_twice(self.more, h)), more=parametrizations.weight_norm(nn.Linear(8, 8))
        )
    ),
}  # fmt: skip


def cached_twice(layer, h):
    with parametrize.cached():
        return layer(torch.tanh(layer(h)))


# --------------------------------------------------------------------------------- hooks, and what a loop does besides


@dataclass
class Undo:
    """A handle; ``kept`` is kept alive."""

    function: Any = None
    kept: Any = None

    def remove(self):
        if self.function is not None:
            self.function()


def on_parameters(hook):
    return lambda model, optimizer: [p.register_hook(hook) for p in model.parameters()]


def after_accumulation(hook):
    return lambda model, optimizer: [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]


def masked(g):
    return g * (torch.arange(g.numel()).reshape(g.shape) % 2)


def halve(p):
    p.grad.mul_(0.5)


def saturate(p):
    p.grad.copy_(saturated(p.grad))


def halved_together(mode):
    def hook(gradients):
        for g in gradients if isinstance(gradients, list | tuple) else [gradients]:
            if g is not None and mode != "look":
                g.mul_(0.5)

    def attach(model, optimizer):
        return [torch.autograd.graph.register_multi_grad_hook(list(model.parameters()), hook)]

    return attach


def on_nodes(before):
    """Hooks on the nodes that accumulate gradients, where data parallelism puts its own."""

    def attach(model, optimizer):
        handles = []
        for p in model.parameters():
            node = p.view_as(p).grad_fn.next_functions[0][0]
            if before:
                handles.append(node.register_prehook(lambda given: tuple(0.5 * g for g in given)))
            else:
                handles.append(node.register_hook(lambda *_, p=p: halve(p)))
            handles.append(Undo(kept=node))
        return handles

    return attach


def step_within_backward(model, optimizer):
    """Each parameter steps as soon as its gradient is there, which saves the memory of the gradients."""
    inner = {p: torch.optim.SGD([p], lr=0.2) for p in model.parameters()}

    def step(p):
        inner[p].step()
        p.grad = None

    return [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]


def on_modules(kind, hook):
    return lambda model, optimizer: [getattr(model[1], f"register_{kind}")(hook)]


def on_all_modules(model, optimizer):
    def hook(module, inward, outward):
        return (0.5 * inward[0],) if isinstance(module, nn.Tanh) else None

    return [nn.modules.module.register_module_full_backward_hook(hook)]


def clip(optimizer, *_):
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 5e-3)


def halve_all(optimizer, *_):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = 0.5 * p.grad


def drop_all(optimizer, *_):
    for group in optimizer.param_groups:
        group["params"][0].grad = None


def noisy(optimizer, *_):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad.add_(1e-4 * torch.randn_like(p))


def project(optimizer, *_):
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.ndim > 1:
                p.data.renorm_(2, 0, 0.5)


def average(optimizer, *_):
    """The moving average of θ that many keep."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    old = getattr(optimizer, "averages", [torch.zeros_like(p) for p in parameters])
    optimizer.averages = [0.9 * a + 0.1 * p.detach() for a, p in zip(old, parameters, strict=True)]


def count(optimizer, *_):
    optimizer.count = getattr(optimizer, "count", 0) + 1


def half_rate(optimizer, *_):
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def before_step(hook):
    return lambda model, optimizer: [optimizer.register_step_pre_hook(hook)]


def after_step(hook):
    return lambda model, optimizer: [optimizer.register_step_post_hook(hook)]


def before_all_steps(hook):
    return lambda model, optimizer: [optim_hooks.register_optimizer_step_pre_hook(hook)]


def after_all_steps(hook):
    return lambda model, optimizer: [optim_hooks.register_optimizer_step_post_hook(hook)]


def wrapped_step(change):
    """``optimizer.step`` is another function on the instance, as learning-rate schedulers make it."""

    def attach(model, optimizer):
        real = optimizer.step

        def step(closure=None):
            change(optimizer)
            return real(closure)

        optimizer.step = step
        return []

    return attach


def stale(fill, only=None):
    def attach(model, optimizer):
        for p in model.parameters() if only is None else only(model):
            p.grad = torch.full_like(p, fill)

    return attach


def counts_of(model, optimizer):
    return getattr(optimizer, "count", 0)


def averages_of(model, optimizer):
    return getattr(optimizer, "averages", None)


def momentum(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


HOOKS = {
    "tensor hooks that scale": Problem(mlp, attach=on_parameters(lambda g: 0.5 * g)),
    "tensor hooks that mask": Problem(mlp, attach=on_parameters(masked)),
    "tensor hooks that saturate": Problem(mlp, attach=on_parameters(saturated)),
    "tensor hooks that scale in place": Problem(mlp, attach=on_parameters(lambda g: (g.mul_(0.5), None)[1])),
    "tensor hooks that only look": Problem(mlp, attach=on_parameters(lambda g: None)),
    "tensor hook on one parameter": Problem(mlp, attach=lambda m, o: [m[0].bias.register_hook(lambda g: 0 * g)]),
    "accumulation hooks that scale": Problem(mlp, attach=after_accumulation(halve)),
    "accumulation hooks that saturate": Problem(mlp, attach=after_accumulation(saturate)),
    "accumulation hooks that only look": Problem(mlp, attach=after_accumulation(lambda p: None)),
    "a step within the backward pass": Problem(mlp, attach=step_within_backward),
    "multi-grad hook that scales": Problem(mlp, attach=halved_together("all")),
    "multi-grad hook that only looks": Problem(mlp, attach=halved_together("look")),
    "hooks on the accumulating nodes": Problem(mlp, attach=on_nodes(before=False)),
    "hooks before the accumulating nodes": Problem(mlp, attach=on_nodes(before=True)),
    "module hook that scales the gradient": Problem(
        mlp, attach=on_modules("full_backward_hook", lambda m, inward, out: (0.5 * inward[0],))
    ),
    "module hook that only looks at the gradient": Problem(
        mlp, attach=on_modules("full_backward_hook", lambda m, inward, out: None)
    ),
    "module pre-hook that scales the gradient": Problem(
        mlp, attach=on_modules("full_backward_pre_hook", lambda m, out: (0.5 * out[0],))
    ),
    "old module hook that scales the gradient": Problem(
        mlp, attach=on_modules("backward_hook", lambda m, inward, out: tuple(0.5 * g for g in inward))
    ),
    "hook on all modules that scales the gradient": Problem(mlp, attach=on_all_modules),
    "step hook that clips": Problem(mlp, attach=before_step(clip)),
    "step hook that clips, Adam": Problem(mlp, adam, attach=before_step(clip)),
    "step hook that scales": Problem(mlp, attach=before_step(halve_all)),
    "step hook that drops a gradient": Problem(mlp, momentum, attach=before_step(drop_all)),
    "step hook that adds noise": Problem(mlp, attach=before_step(noisy)),
    "step hook that halves the learning rate": Problem(mlp, attach=before_step(half_rate)),
    "step hook that only counts": Problem(mlp, attach=before_step(count), observe=counts_of),
    "step hook that only counts, RMSprop": Problem(
        mlp, lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01), attach=before_step(count), observe=counts_of
    ),
    "step hook that projects": Problem(mlp, attach=after_step(project)),
    "step hook that projects, RMSprop": Problem(
        mlp, lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01), attach=after_step(project)
    ),
    "step hook that averages": Problem(mlp, attach=after_step(average), observe=averages_of),
    "step hook that halves the learning rate afterwards": Problem(mlp, attach=after_step(half_rate)),
    "hook on all optimizers that clips": Problem(mlp, attach=before_all_steps(clip)),
    "hook on all optimizers that projects": Problem(mlp, attach=after_all_steps(project)),
    "hook on all optimizers that only counts": Problem(mlp, attach=after_all_steps(count), observe=counts_of),
    "a step that was replaced and clips": Problem(mlp, attach=wrapped_step(clip)),
    "a step that was replaced and clips, Adam": Problem(mlp, adam, attach=wrapped_step(clip)),
    "a step that was replaced and only counts": Problem(mlp, attach=wrapped_step(count), observe=counts_of),
    "a stale gradient": Problem(mlp, attach=stale(0.01), steps=1),
    "a stale gradient, Adam": Problem(mlp, adam, attach=stale(0.01), steps=1),
    "a gradient of zeros": Problem(mlp, momentum, attach=stale(0.0), steps=1),
    "a gradient of zeros at a head without use": Problem(
        lambda: Layers(hidden(lambda self, h: h), spare=nn.Linear(8, 4)),
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1),
        attach=stale(0.0, lambda m: m.spare.parameters()),
        steps=1,
    ),
    "a stale gradient at a frozen layer": Problem(
        lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 4)),
        attach=stale(0.01, lambda m: m[0].parameters()),
        steps=1,
    ),
    "a gradient buffer that stays": Problem(
        mlp, momentum, attach=stale(0.0), between=lambda m, o: [stale(0.0)(m, o)], steps=2
    ),
}


def scheduled(make):
    def attach(model, optimizer):
        with warnings.catch_warnings(action="ignore"):
            optimizer.scheduler = make(optimizer)
        return []

    return {"attach": attach, "between": lambda model, optimizer: optimizer.scheduler.step(), "steps": 3}


SCHEDULES = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, 10),
    "CosineAnnealingWarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.1), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


def no_grad_changes(model, optimizer):
    with torch.no_grad():
        model[0].weight.mul_(0.9)


def unseen_changes(model, optimizer):
    model[0].weight.data.mul_(0.9)


def swapped(model, optimizer):
    model[0].weight.data = 0.9 * model[0].weight.data


def replaced_layer(model, optimizer):
    model[1] = nn.ReLU()


def option_changed(model, optimizer):
    model[2].p = 0.1


def new_group(model, optimizer):
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.3})


def same_batches(seed):
    """The tensors themselves come again, but other numbers may be in them."""
    return KEPT.setdefault(seed, rows(seed))


KEPT: dict[int, Any] = {}


LOOPS = {
    "the learning rate is changed": Problem(mlp, momentum, between=lambda m, o: half_rate(o)),
    "weights changed under no_grad": Problem(mlp, between=no_grad_changes),
    "weights changed by .data": Problem(mlp, between=unseen_changes),
    "weights swapped by .data": Problem(mlp, between=swapped),
    "a layer is frozen": Problem(mlp, momentum, between=lambda m, o: m[0].requires_grad_(False)),
    "a layer is frozen and joins": Problem(
        lambda: nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Tanh(), nn.Linear(8, 4)),
        lambda m: torch.optim.SGD(m[2].parameters(), lr=0.1),
        between=new_group,
    ),
    "a layer is replaced": Problem(mlp, between=replaced_layer),
    "an option of a layer is changed": Problem(with_dropout, between=option_changed),
    "from train to eval": Problem(with_batch_norm, between=lambda m, o: m.eval()),
    "random numbers are drawn": Problem(with_dropout, between=lambda m, o: torch.rand(3)),
    "the generator is seeded": Problem(with_dropout, between=lambda m, o: torch.manual_seed(9)),
    "a buffer is changed": Problem(with_batch_norm, between=lambda m, o: m[1].running_mean.zero_(), training=False),
    "a buffer is changed by .data": Problem(
        with_batch_norm, between=lambda m, o: m[1].running_mean.data.add_(1), training=False
    ),
    "the state is loaded": Problem(with_batch_norm, between=lambda m, o: m.load_state_dict(m.state_dict())),
    "a hook is added": Problem(
        mlp, between=lambda m, o: m[1].register_forward_hook(lambda *given: given[2] * 1.5) and None
    ),
    "evaluated in between": Problem(
        with_batch_norm, between=lambda m, o: (m.eval(), m(rows(55)[0]), m.train())
    ),
}  # fmt: skip

ALL = {**ARCHITECTURES, **BACKWARDS, **STATES, **HOOKS}
ALL |= {f"within: {name}": between(function) for name, function in OPERATIONS.items()}
ALL |= {f"scheduled by {name}": Problem(mlp, momentum, **scheduled(make)) for name, make in SCHEDULES.items()}
ALL |= {f"between two steps: {name}": problem for name, problem in LOOPS.items()}

ALL_ENGINES, FORWARD = " ".join(ENGINES), "forward shared"

REFUSED: Refusals = {
    "two parameters of one storage": (ALL_ENGINES, "share memory"),
    "not yet initialised": (ALL_ENGINES, "is of a lazy layer"),
    "compiled by torch.jit": (ALL_ENGINES, "a scripted model"),
    "gradient reversal": (FORWARD, "implement the jvp"),
    "gradient reversal with a tangent": (FORWARD, "disagree"),
    "straight through": (FORWARD, "implement the jvp"),
    "gradient saturated within": (ALL_ENGINES, "cannot serve this model"),
    "random numbers in the backward pass": (FORWARD, "implement the jvp"),
    "a Function with true derivatives": (FORWARD, "implement the jvp"),
    "a Function that differentiates once": (ALL_ENGINES, "cannot serve this model"),
    "a Function that cuts its second derivative": (ALL_ENGINES, "cannot be differentiated"),
    "a Function in numpy": (ALL_ENGINES, "cannot be differentiated"),
    "a Function whose forward mode alone is true": (FORWARD, "disagree"),
    "activation hook that scales": (FORWARD, "cannot register a hook"),
    "activation hook that scales, guarded": (FORWARD, "disagree"),
    "activation hook that saturates, guarded": (ALL_ENGINES, "disagree"),
    "activation hook that only looks": (FORWARD, "cannot register a hook"),
    "activation whose gradient is retained": (FORWARD, "retain_grad"),
    "activations kept elsewhere": ("unrolled", "hook on saved tensors"),
    "activations kept in low precision": (ALL_ENGINES, "cannot serve this model"),
    "checkpoint": ("unrolled", "a checkpoint"),
    "checkpoint with dropout": ("unrolled", "a checkpoint"),
    "checkpoint over a layer": ("unrolled", "a checkpoint"),
    "checkpoint that draws anew": (ALL_ENGINES, "cannot serve this model"),
    "checkpoint, reentrant": (ALL_ENGINES, "use_reentrant=True"),
    "checkpoint with dropout, reentrant": (ALL_ENGINES, "use_reentrant=True"),
    "nn.EmbeddingBag, max": (ALL_ENGINES, "mode='max'"),
    "state carried in a buffer": (FORWARD, "disagree"),
    "a buffer that is rebound": (FORWARD, "disagree"),
    "noise from its own generator": (FORWARD, "disagree"),
    "noise from Python": (FORWARD, "disagree"),
    "noise from numpy": (FORWARD, "disagree"),
    "changes its input": (FORWARD, "disagree"),
    "another function when no weight asks for gradients": (FORWARD, "disagree"),
    "weights changed in the forward pass": (ALL_ENGINES, "changes its parameters in place"),
    "weights changed in the forward pass, by .data": (ALL_ENGINES, "changes its parameters in place"),
    "a derivative within the forward pass": (FORWARD, "cannot serve this model"),
    "a derivative within the forward pass, guarded": (FORWARD, "cannot serve this model"),
    "hooks on the accumulating nodes": (ALL_ENGINES, "disagree"),
    "hooks before the accumulating nodes": (ALL_ENGINES, "a hook"),
    "module hook that scales the gradient": (ALL_ENGINES, "cannot serve this model"),
    "module pre-hook that scales the gradient": (ALL_ENGINES, "cannot serve this model"),
    "old module hook that scales the gradient": (ALL_ENGINES, "cannot serve this model"),
    "hook on all modules that scales the gradient": (ALL_ENGINES, "cannot serve this model"),
    "module hook that only looks at the gradient": ("unrolled", "a module has a backward hook"),
    "a step that was replaced and clips": (ALL_ENGINES, "has a step() of its own"),
    "a step that was replaced and clips, Adam": (ALL_ENGINES, "has a step() of its own"),
    "a step that was replaced and only counts": (ALL_ENGINES, "has a step() of its own"),
    "within: distances": (FORWARD, "cannot be differentiated in forward mode"),
    "within: CTC": (ALL_ENGINES, "cannot be differentiated"),
    "between two steps: a hook is added": ("shared", "disagree"),
}
for what, part in {
    "max_norm": "shortens its rows",
    "scale_grad_by_freq": "by frequency",
    "sparse gradients": "sparse",
}.items():
    for layer in ("nn.Embedding", "F.embedding", "nn.EmbeddingBag", "F.embedding_bag"):
        REFUSED[f"{layer} with {what}"] = (ALL_ENGINES, part)
for case in HOOKS:
    if case.startswith(("tensor hook", "accumulation hooks", "multi-grad", "a step within")):
        REFUSED[case] = (ALL_ENGINES, "has a gradient hook")
    if case.startswith(("step hook", "hook on all optimizers")):
        REFUSED[case] = (ALL_ENGINES, "the optimizer has a step hook")
    if case.startswith(("a stale gradient", "a gradient")):
        REFUSED[case] = (ALL_ENGINES, "has a .grad already")


@pytest.mark.parametrize("case", ALL)
def test_a_model_is_trained_right_or_refused(case, counts):
    check(case, judge_all(ALL[case], counts, LABEL), REFUSED.get(case))


# -------------------------------------------------------------------------------------------------------- optimizers


class Renamed(torch.optim.Adam):
    """Overrides nothing."""


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        return super().step(closure)


class Clipping(torch.optim.SGD):
    def step(self, closure=None):
        clip(self)
        return super().step(closure)


class ClippingAdam(torch.optim.Adam):
    def step(self, closure=None):
        clip(self)
        return super().step(closure)


class Projecting(torch.optim.RMSprop):
    def step(self, closure=None):
        loss = super().step(closure)
        project(self)
        return loss


class Centred(torch.optim.SGD):
    """Gradients are centred, out of place and differentiably."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.ndim > 1:
                    p.grad = p.grad - p.grad.mean(1, keepdim=True)
        return super().step(closure)


class Mine(torch.optim.Optimizer):
    """A step of one's own, not differentiable."""

    def __init__(self, params, lr, **more):
        super().__init__(params, {"lr": lr, **more})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * torch.tanh(100 * p.grad) / 100)


class Lookahead(torch.optim.SGD):
    """Every second step goes back half of the way."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["slow"], state["i"] = state.get("slow", p.detach().clone()), state.get("i", 0) + 1
                if state["i"] % 2 == 0:
                    state["slow"].add_(p.detach() - state["slow"], alpha=0.5)
                    p.data.copy_(state["slow"])
        return loss


def flat(name, lr=0.01, **options):
    return lambda model: getattr(torch.optim, name)(model.parameters(), lr=lr, **options)


def matrices(model):
    """Muon takes matrices alone."""
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)


OPTIMIZERS = {
    "SGD": flat("SGD", 0.1),
    "SGD with weight decay": flat("SGD", 0.1, weight_decay=0.1),
    "momentum": flat("SGD", 0.1, momentum=0.9),
    "momentum, damped": flat("SGD", 0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "Nesterov": flat("SGD", 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD, maximize": flat("SGD", 0.1, momentum=0.5, maximize=True),
    "SGD, foreach": flat("SGD", 0.1, momentum=0.9, foreach=True),
    "SGD, fused": flat("SGD", 0.1, momentum=0.9, fused=True),
    "SGD, learning rate in a tensor": lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1), momentum=0.9),
    "Adam": flat("Adam"),
    "Adam with weight decay": flat("Adam", weight_decay=0.1),
    "Adam, decoupled": flat("Adam", weight_decay=0.1, decoupled_weight_decay=True),
    "Adam, maximize": flat("Adam", maximize=True),
    "Adam, foreach": flat("Adam", foreach=True),
    "Adam, fused": flat("Adam", fused=True),
    "Adam, learning rate in a tensor": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "AMSGrad": flat("Adam", amsgrad=True),
    "AdamW": flat("AdamW"),
    "AdamW, AMSGrad": flat("AdamW", amsgrad=True, weight_decay=0.1),
    "RMSprop": flat("RMSprop"),
    "RMSprop, centred, momentum": flat("RMSprop", centered=True, momentum=0.5, weight_decay=0.1),
    "Adagrad": flat("Adagrad", 0.1, lr_decay=0.1, eps=1e-6),
    "Adadelta": flat("Adadelta", 1.0),
    "Adamax": flat("Adamax"),
    "NAdam": flat("NAdam"),
    "NAdam, decoupled": flat("NAdam", weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": flat("RAdam"),
    "ASGD": flat("ASGD"),
    "Rprop": flat("Rprop"),
    "Adafactor": flat("Adafactor"),
    "a subclass that changes nothing": lambda m: Renamed(m.parameters(), lr=0.01),
    "a subclass that counts": lambda m: Counting(m.parameters(), lr=0.1),
    "a subclass that clips": lambda m: Clipping(m.parameters(), lr=0.1),
    "a subclass that clips, Adam": lambda m: ClippingAdam(m.parameters(), lr=0.01),
    "a subclass that projects": lambda m: Projecting(m.parameters(), lr=0.01),
    "a subclass that centres": lambda m: Centred(m.parameters(), lr=0.1),
    "a subclass that looks ahead": lambda m: Lookahead(m.parameters(), lr=0.1),
    "an own optimizer": lambda m: Mine(m.parameters(), lr=0.1),
    "an own optimizer that claims a derivative": lambda m: Mine(m.parameters(), lr=0.1, differentiable=False),
}
WITHOUT_REFERENCE = {
    "LBFGS, whose step takes a closure": Problem(mlp, flat("LBFGS"), warm=0),
    "Muon, which rounds to bfloat16": Problem(mlp, matrices),
    "SparseAdam": Problem(embedded(sparse=True), lambda m: torch.optim.SparseAdam(m[0].parameters()), tokens),
    "SGD, differentiable": Problem(mlp, flat("SGD", 0.1, momentum=0.9, differentiable=True), warm=0),
    "Adam, differentiable": Problem(mlp, flat("Adam", differentiable=True), warm=0),
}
"""Steps that must be refused: torch's plain loop does not take them, or nothing can be said about their derivative."""

MODELS = {
    "mlp": Problem(mlp),
    "BatchNorm": Problem(with_batch_norm),
    "dropout": Problem(with_dropout),
    "embedding": Problem(embedded(), sgd, tokens),
    "complex weights": Problem(Fourier),
}
NOT_FOR_COMPLEX = {"SGD, fused", "Adam, fused", "Adafactor"}  # says torch

FOLLOWED = {
    f"{name}, {which}": replace(
        problem, optimizer=optimizer, observe=counts_of if name == "a subclass that counts" else None
    )
    for name, optimizer in OPTIMIZERS.items()
    for which, problem in MODELS.items()
    if not (which == "complex weights" and name in NOT_FOR_COMPLEX)
}

REFUSED_OPTIMIZERS: Refusals = {
    "Adafactor": (ALL_ENGINES, "has no differentiable update"),
    "an own optimizer": (ALL_ENGINES, "has no differentiable update"),
    "an own optimizer that claims a derivative": (ALL_ENGINES, "has a step() of its own"),
    "a subclass that counts": (ALL_ENGINES, "has a step() of its own"),
    "a subclass that clips": (ALL_ENGINES, "has a step() of its own"),
    "a subclass that clips, Adam": (ALL_ENGINES, "has a step() of its own"),
    "a subclass that projects": (ALL_ENGINES, "has a step() of its own"),
    "a subclass that centres": (ALL_ENGINES, "has a step() of its own"),
    "a subclass that looks ahead": (ALL_ENGINES, "has a step() of its own"),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_an_optimizer_is_followed_or_refused(case, counts):
    verdicts = judge_all(FOLLOWED[case], counts, "steps of any optimizer")
    optimizer = case.rsplit(", ", 1)[0]
    check(case, verdicts, REFUSED_OPTIMIZERS.get(case) or REFUSED_OPTIMIZERS.get(optimizer))


@pytest.mark.parametrize("case", WITHOUT_REFERENCE)
def test_a_step_without_a_reference_is_refused(case, counts):
    verdicts = judge_all(WITHOUT_REFERENCE[case], counts, "steps of any optimizer", plain=[None])
    assert all(verdict.kind == "refused" for verdict in verdicts.values()), list(map(str, verdicts.values()))


def test_every_optimizer_of_torch_is_tried():
    tried = set()
    for problem in [*FOLLOWED.values(), *WITHOUT_REFERENCE.values()]:
        tried |= {kind.__name__ for kind in type(problem.optimizer(problem.make())).__mro__}
    exported = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    assert exported <= tried


# ----------------------------------------------------------------------------------------------- what goes with it


def test_the_tables_of_refusals_name_cases_and_engines():
    assert REFUSED.keys() <= ALL.keys()
    assert REFUSED_OPTIMIZERS.keys() <= OPTIMIZERS.keys() | FOLLOWED.keys()
    for engines, part in [*REFUSED.values(), *REFUSED_OPTIMIZERS.values()]:
        assert part and [engine for engine in ENGINES if engine in engines.split()] == engines.split()


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ENGINES)
def test_torchs_data_parallelism_is_refused(engine, one_process, counts):
    """It hangs on backward(), from where it averages over the processes; ours is the option process_group."""
    problem = Problem(lambda: nn.parallel.DistributedDataParallel(mlp().double()), warm=1)
    verdict = judge(problem, engine)
    counts[f"{LABEL}: {verdict.kind}"] += 1
    assert verdict.kind == "refused", str(verdict)


@pytest.mark.parametrize("case", ["RNN", "LSTM, both ways", "encoder, eval"])
def test_it_is_right_where_torchs_global_flags_are_locked(case, counts, monkeypatch):
    """As ``torch.backends.disable_global_flags()`` does, which leaves the context managers ``flags()``."""
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", False)
    check(case, judge_all(ALL[case], counts, LABEL), REFUSED.get(case))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduler_finds_that_the_optimizer_stepped(name, engine):
    """Schedulers replace ``optimizer.step`` on the instance, and warn if their own was not called."""
    model = mlp().double()
    optimizer = momentum(model)
    scheduler = SCHEDULES[name](optimizer)
    online = OnlineLoss(model, classification(), optimizer, engine=engine)
    for i in range(3):
        online.step(rows(i), rows(i + 1))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*before `optimizer.step")
            scheduler.step()
