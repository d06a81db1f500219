"""Several processes, one run: `torchrun --nproc_per_node N s3ft.py ...` makes N of them.

Where there are GPUs, each has one of its own.
They share the run folder (on several machines: a common file system). Rows are dealt out in turn. Each
process appends what it makes to a file of its own beside the real one, and rank 0 puts them together
(files.RowFile). Only rank 0 writes other files, except costs.jsonl, to which every process appends. Without
torchrun there is one process, rank 0, and everything here does nothing.
"""

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partialmethod

from tqdm import tqdm


def _from_environment(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


RANK = _from_environment("RANK", 0)  # of all machines
WORLD = _from_environment("WORLD_SIZE", 1)
LOCAL_RANK = _from_environment("LOCAL_RANK", 0)  # of this machine
LOCAL_WORLD = _from_environment("LOCAL_WORLD_SIZE", 1)


@contextlib.contextmanager
def joined(device: str):
    """Be one of the processes. A long timeout: one may judge for an hour while the others wait."""
    if WORLD == 1:
        yield
        return
    from torch import distributed  # here, so that judges and files need no torch

    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(hours=12))
    try:
        with _only_rank_0_speaks():
            yield
    finally:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _only_rank_0_speaks():
    if RANK == 0:
        yield
        return
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # one progress bar, not one a process
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def barrier() -> None:
    """Wait until every process is here."""
    if WORLD > 1:
        from torch import distributed

        distributed.barrier()


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 goes first (and downloads, say), the others after it."""
    if RANK:
        barrier()
    yield
    if not RANK:
        barrier()


def share(rows: Sequence) -> list:
    """This process's part of the rows: every WORLD-th one."""
    return list(rows[RANK::WORLD])


def totals(*values: float) -> list[float]:
    """The sums of the values over all processes."""
    if WORLD == 1:
        return list(values)
    import torch
    from torch import distributed

    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def sum_gradients(parameters) -> None:
    """Add up every gradient over the processes, in one message: an adapter is small."""
    if WORLD == 1:
        return
    import torch
    from torch import distributed

    for parameter in parameters:
        if parameter.grad is None:  # this process had no row in the batch
            parameter.grad = torch.zeros_like(parameter)
    message = torch.cat([parameter.grad.flatten() for parameter in parameters])
    distributed.all_reduce(message)
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, summed in zip(parameters, message.split(sizes), strict=True):
        parameter.grad.copy_(summed.view_as(parameter))
