"""Shared by the tests of the diagnostics."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def _unchanged(*models):
    """Values, buffers, modes, requires_grad, grads and the random state are bitwise the same after the block."""

    def snapshot():
        return [
            (
                {name: value.clone() for name, value in model.state_dict().items()},
                [module.training for module in model.modules()],
                [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
            )
            for model in models
        ]

    before, random = snapshot(), torch.get_rng_state()
    yield
    assert torch.equal(random, torch.get_rng_state()), "the random state has moved"
    for (values, modes, grads), (new_values, new_modes, new_grads) in zip(before, snapshot(), strict=True):
        assert modes == new_modes
        assert all(torch.equal(value, new_values[name]) for name, value in values.items())
        for (required, grad), (new_required, new_grad) in zip(grads, new_grads, strict=True):
            assert required == new_required
            assert (grad is None and new_grad is None) or torch.equal(grad, new_grad)


@pytest.fixture
def unchanged():
    """``with unchanged(model, ...):`` asserts that the block leaves the models and the random state as they were."""
    return _unchanged
