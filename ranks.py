"""Several processes, one run: `torchrun --nproc_per_node N s3ft.py ...` makes N of them, each on a GPU of its own.

They share the run folder (on several machines: a common file system). Rows are dealt out in turn; each process appends what it
makes to a file of its own beside the real one, and rank 0 puts them together (files.add_rows). Only rank 0 writes other files.
Without torchrun there is one process, rank 0, and everything here does nothing.
"""

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import distributed

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default))
                           for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
if RANK:
    os.environ["TQDM_DISABLE"] = "1"  # one progress bar; tqdm reads this when it is imported


@contextlib.contextmanager
def joined(device: str):
    """Be one of the processes. A long timeout: one may judge for an hour while the others wait."""
    if WORLD == 1:
        yield
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(LOCAL_RANK)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere) if RANK else contextlib.nullcontext():
            yield
    finally:
        distributed.destroy_process_group()


def barrier() -> None:
    if WORLD > 1:
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
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(sums)
    return sums.tolist()


def data_parallel(module: torch.nn.Module) -> torch.nn.Module:
    """The module, with gradients averaged over the processes where there are several."""
    return torch.nn.parallel.DistributedDataParallel(module) if WORLD > 1 else module


def without_sync(module: torch.nn.Module, last: bool):
    """Averaging waits for the last micro-batch of a step."""
    return contextlib.nullcontext() if last or WORLD == 1 else module.no_sync()
