"""What the searched losses share: they can be kept in a file, as a loss network can."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

from torch import nn

from adalfl_lite.files import atomic_save, load_payload


class SearchedLoss(nn.Module):
    """A loss with ``config``, what its constructor is called with, and parameters."""

    format: ClassVar[str]
    config: dict[str, Any]

    def save(self, path: str | os.PathLike) -> None:
        """Write the loss to ``path``, atomically."""
        atomic_save({"format": self.format, "config": self.config, "state": self.state_dict()}, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Read a loss written by :meth:`save`, onto the CPU.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, or holds something else.
        """
        payload = load_payload(path, cls.format)
        try:
            loss, state = cls(**payload["config"]), payload["state"]
            loss.to(next(iter(state.values())).dtype).load_state_dict(state)
        except (KeyError, TypeError, RuntimeError, StopIteration) as error:
            raise ValueError(f"{path} is not a whole {cls.__name__}: {error}") from error
        return loss
