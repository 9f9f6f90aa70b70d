"""Several processes that train one encoder, each with an equal share of every batch. torchrun starts them.

    one batch ─own─▶ share ─backbone─▶ embeddings ─gather─▶ embeddings of the whole batch ─method─▶ loss

Every process has the same settings, random numbers and order of pictures, and from `gather` on the same tensors, so
heads, losses, queues, centres and clusters need no code of their own. Without torchrun all functions here leave things
as they are.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch import distributed as dist

from service import IntArray
from service.errors import InvalidRequest

_T = TypeVar("_T")

# A process that dies closes its connections, so the others notice at once. This is for one that hangs.
_PATIENCE = timedelta(minutes=10)
_loaders: list[Any] = []


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """A context in which this process trains together with the others that torchrun started; alone without torchrun.

    Processes after the first say nothing; their errors are raised as ever.

    Args:
        device: of this process.

    Raises:
        InvalidRequest: the other processes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
        # The loader's thread must not come between the messages of the loop.
        _loaders.append(dist.new_group(backend="gloo", timeout=_PATIENCE))
    # torch raises errors of many kinds for addresses, ports and variables that are wrong.
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InvalidRequest(
            f"process {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} cannot join the others at {where}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    try:
        if first():
            yield
        else:
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
                yield
    finally:
        _loaders.clear()
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Return the device of this process: under torchrun each process of a node has a GPU of its own.

    Raises:
        InvalidRequest: the node has fewer GPUs than processes.
    """
    place = os.environ.get("LOCAL_RANK")
    if place is None or device.type == "cpu":
        return device
    if int(place) >= torch.cuda.device_count():
        raise InvalidRequest(
            f"process {place} of this node has no GPU; expected --nproc-per-node {torch.cuda.device_count()} or fewer, "
            "or --device cpu"
        )
    return torch.device("cuda", int(place))


def count() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Return whether this is the process that writes checkpoint, log and encoder."""
    return rank() == 0


def check_divisible(size: int, compiles: bool) -> None:
    """Make sure that several processes can divide a batch.

    Raises:
        InvalidRequest: its size is no multiple of their number, or leaves each with less than 2 pictures; or the recipe
            compiles the backbone, which a trial decides that knows one process only.
    """
    if compiles and count() > 1:
        raise InvalidRequest(f"compile is for one process, and here are {count()}: --set compile=false")
    if size % count() or size < 2 * count():
        raise InvalidRequest(
            f"batch_size is {size}, and {count()} processes divide it among them: expected a multiple of {count()} "
            f"from {2 * count()} on"
        )


def from_first(made: Callable[[], _T]) -> _T:
    """Return what the first process makes, in all of them."""
    box: list[Any] = [made() if first() else None]
    if count() > 1:
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    found: _T = box[0]
    return found


def largest(*values: float) -> tuple[float, ...]:
    """Return the largest value of any process, in all of them: by it they agree on times and signals."""
    if count() == 1:
        return values
    agreed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return tuple(agreed.tolist())


def own_folder(folder: Path) -> Path:
    """Return where this process writes: the first in the run's folder, each other one in a folder of its own in it."""
    if count() > 1:
        dist.barrier()
    if first():
        return folder
    folder = folder / f"process-{rank()}"
    # Pixels that a killed run left there are not those that the first process's checkpoint tells of.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def own(positions: IntArray) -> IntArray:
    """Return this process's share of positions (N,): contiguous, and equal where N is a multiple of their number."""
    share: IntArray = np.array_split(positions, count())[rank()]
    return share


def exchange(share: _T) -> list[_T]:
    """Return the shares of all processes, in their order. For the loader, which runs in a thread of its own."""
    if count() == 1:
        return [share]
    shares: list[Any] = [None] * count()
    dist.all_gather_object(shares, share, group=_loaders[0])
    return shares


def uniform(rows: int, views: int, pictures: int, randomness: Generator, device: torch.device) -> Tensor:
    """Return numbers in 0..1, (rows, views · pictures), for this process's share of a batch.

    All processes draw the numbers of the whole batch and keep those of their share, so no view depends on their number.
    """
    numbers = torch.rand(rows, views * pictures * count(), generator=randomness, device=device)
    if count() == 1:
        return numbers
    return numbers.view(rows, views, count(), pictures)[:, :, rank()].flatten(1)


def encode(network: nn.Module, views: Tensor) -> Tensor:
    """Return a network's outputs for the views of the whole batch, of which this process has a share.

    Args:
        network: a backbone, pixels (n, C, S, S) → (n, D).
        views: (V, n, C, S, S) of this process's n pictures.

    Returns:
        (V · N, D) of all N pictures, differentiable: the mean of all processes' gradients, as mean_gradients takes it,
        is the gradient of the whole batch.
    """
    return gather(network(views.flatten(0, 1)).unflatten(0, views.shape[:2])).flatten(0, 1)


def gather(share: Tensor) -> Tensor:
    """Return (V, N, …) of the whole batch; a share is (V, n, …). Differentiable, as `encode` says."""
    if count() == 1:
        return share
    whole: Tensor = _Gather.apply(share)
    return whole


def own_part(whole: Tensor) -> Tensor:
    """Return this process's share (V, n, …) of a whole batch (V, N, …)."""
    return whole.tensor_split(count(), 1)[rank()]


def mean_gradients(module: nn.Module) -> None:
    """Replace the gradient of each weight by its mean over all processes, which is that of the whole batch."""
    _average([weight.grad for weight in module.parameters() if weight.grad is not None])


@torch.no_grad()
def mean_statistics(module: nn.Module) -> None:
    """Replace the running statistics of a module's batch norms by their means over all processes."""
    _average([buffer for buffer in module.buffers() if buffer.is_floating_point()])


def copy_first(*tensors: Tensor) -> None:
    """Give tensors the values that they have in the first process."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:  # noqa: ARG004
        shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(count())]
        dist.all_gather(shares, share.contiguous())
        return torch.cat(shares, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        # All processes compute the same loss, so a share's gradient is complete in its own process. The factor cancels
        # that of the mean over processes.
        return own_part(gradients[0]) * count()


def _average(tensors: list[Tensor]) -> None:
    if count() == 1 or not tensors:
        return
    joint = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joint)
    means = torch.split(joint.div_(count()), [one.numel() for one in tensors])
    for tensor, values in zip(tensors, means, strict=True):
        tensor.copy_(values.view_as(tensor))
