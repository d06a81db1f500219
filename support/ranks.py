"""Several processes, one run: `torchrun --nproc_per_node N s3ft.py ...` makes N of them, each on a GPU of its own.

They share the run folder (on several machines: a common file system). Rows are dealt out in turn; each process appends what it
makes to a file of its own beside the real one, and rank 0 puts them together (files.add_rows). Only rank 0 writes other files.
Without torchrun there is one process, rank 0, and everything here does nothing.
"""

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from functools import partialmethod

from tqdm import tqdm

RANK, WORLD, LOCAL_RANK, LOCAL_WORLD = (  # of all machines, and of this one
    int(os.environ.get(name, default))
    for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
if RANK:
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # one progress bar, not one a process


@contextlib.contextmanager
def joined(device: str):
    """Be one of the processes. A long timeout: one may judge for an hour while the others wait."""
    if WORLD == 1:
        yield
        return
    cuda = device.startswith("cuda")
    from torch import distributed  # here, so that judges and files need no torch
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=12))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere) if RANK else contextlib.nullcontext():
            yield
    finally:
        distributed.destroy_process_group()


def barrier() -> None:
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


def data_parallel(module):
    """The torch module, with gradients averaged over the processes where there are several."""
    if WORLD == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel
    return DistributedDataParallel(module)


def without_sync(module, last: bool):
    """Averaging waits for the last micro-batch of a step."""
    return contextlib.nullcontext() if last or WORLD == 1 else module.no_sync()
