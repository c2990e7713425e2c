"""Losses that can be kept in a file."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

from torch import nn

from adalfl_lite.files import atomic_save, load_payload


class StoredLoss(nn.Module):
    """A loss with parameters that can be kept in a file; ``config`` is what its constructor is called with."""

    format: ClassVar[str]
    what: ClassVar[str]
    kind: str
    config: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Write the parameters and ``config`` to ``path``, atomically."""
        atomic_save({"format": self.format, "config": self.config, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a loss of this class written by :meth:`save`, onto the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or holds something else.
        """
        payload = load_payload(path, cls.format)
        try:
            loss, state = cls(**payload["config"]), payload["state"]
            loss.to(next(iter(state.values())).dtype).load_state_dict(state)
        except (KeyError, TypeError, RuntimeError, StopIteration) as error:
            raise ValueError(f"{path} is not a whole {cls.what}: {error}") from error
        if not all(parameter.isfinite().all() for parameter in loss.parameters()):
            raise ValueError(f"{path} holds a {cls.what} whose parameters are not finite; use an earlier one")
        return loss
