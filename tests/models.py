"""Parts of small models that several tests are made of; they need torch alone."""

import torch
from torch import nn
from torch.autograd import Function


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Layers(nn.Module):
    """Two linear layers, and a forward pass given as a function of (self, x)."""

    def __init__(self, run, **more):
        super().__init__()
        self.a, self.b, self.run = nn.Linear(6, 8), nn.Linear(8, 4), run
        for name, value in more.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.run(self, x)


class Reverse(Function):
    """The identity, whose backward turns the gradient round and doubles it."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -2 * g


class Once(Function):
    """The identity with a backward of its own, which neither forward mode nor vmap knows."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient
