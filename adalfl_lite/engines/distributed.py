"""Several processes, each with its share of every batch, that learn as one would with the whole batch.

Three quantities of a meta step are means over examples: ∇_θ M_φ, v = ∇_θ' L_T and ∇_φ L_T. Averaged over processes with
equal shares, each is the mean over the whole batch; everything between them is the same arithmetic everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def average(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The mean of each tensor over the processes of ``group``, in one message; the tensors themselves if it is None."""
    if group is None or not tensors:
        return list(tensors)
    # one message instead of one per tensor: latency is what costs here
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    parts = (flat / dist.get_world_size(group)).split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


@torch.no_grad()
def start_equal(modules: Sequence[nn.Module], group: dist.ProcessGroup) -> None:
    """Give every process the first one's parameters and buffers."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
