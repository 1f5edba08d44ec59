"""The global batch over several workers: every worker computes the whole loss on everybody's embeddings."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.embeddings import Embeddings, Erased


def world() -> tuple[int, int]:
    """This worker's rank and the number of workers; (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class _GatherRows(torch.autograd.Function):
    """All workers' rows, end to end; its gradient reaches this worker's own rows.

    Each worker differentiates the same loss, and DistributedDataParallel averages over W workers what should be
    summed: hence the factor W.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        longest = max(sizes)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        rank, _ = world()
        ctx.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        ctx.workers = len(sizes)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.own] * ctx.workers, None


def gather_rows(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows (b, E) of every worker as the global batch (B, E), in rank order, with gradient.

    Args:
        rows: this worker's.
        sizes: rows of each worker, known to all; they may differ.
    """
    if len(sizes) == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows, sizes)
    return gathered


def gather_flags(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Bool rows (b, ...) of every worker as the global batch (B, ...), in rank order."""
    return gather_rows(rows.to(torch.uint8), sizes).bool() if len(sizes) > 1 else rows


def gather_embeddings(embeddings: Embeddings, sizes: Sequence[int]) -> Embeddings:
    """Embeddings of every worker as those of the global batch, in rank order, with gradient.

    Args:
        embeddings: this worker's.
        sizes: rows of each worker, known to all; they may differ.
    """

    def gather(rows: Tensor) -> Tensor:
        if not rows.shape[1:].numel():
            return rows.new_zeros(sum(sizes), *rows.shape[1:])
        return gather_flags(rows, sizes) if rows.dtype == torch.bool else gather_rows(rows, sizes)

    return embeddings.map(gather)


def gather_erased(erased: Erased, sizes: Sequence[int]) -> Erased:
    """Erased views of every worker as those of the global batch; see `gather_embeddings`."""
    return Erased(
        gather_embeddings(erased.image_kept, sizes),
        gather_embeddings(erased.image_dropped, sizes),
        gather_embeddings(erased.text_kept, sizes),
        gather_embeddings(erased.text_dropped, sizes),
        gather_flags(erased.image_partial, sizes),
        gather_flags(erased.text_partial, sizes),
    )


def share_buffers(module: nn.Module) -> None:
    """Give every worker rank 0's buffers: what each computes of the same batch may still differ in rounding.

    On a GPU sums run in any order, and machines differ in their arithmetic.
    """
    if world()[1] == 1:
        return
    for buffer in module.buffers():
        held = buffer.to(torch.uint8) if buffer.dtype == torch.bool else buffer
        dist.broadcast(held, 0)
        buffer.copy_(held)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients that every worker computed from the same global batch, so that no rounding drifts apart."""
    _, workers = world()
    if workers == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= workers
