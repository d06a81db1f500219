"""Line 16 of Algorithm 1: train the adapter on D', and keep the best one (A.3).

The loss is -Σ log p(y_t | x, y_<t) over the target tokens of a batch, divided by their number. Prompt tokens
are no targets.
"""

import io
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from zipfile import BadZipFile

import torch
from tqdm import tqdm

import lora
from engine.chat import training_ids
from engine.model import peak_memory_gib, reset_peak_memory
from engine.packed import Row, target_loss
from support import ranks
from support.cli import InputError
from support.files import append_jsonl, resume_jsonl, write_bytes, write_jsonl


@dataclass(frozen=True)
class AdapterSettings:
    """What LoRA takes from the command line (section 3)."""

    rank: int = 8  # r
    alpha: float = 16  # scale = alpha / r
    dropout: float = 0.1  # on the adapter's input
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")


@dataclass(frozen=True)
class TrainingSettings:
    """What training takes from the command line. The README says which values are the paper's."""

    steps: int  # optimizer steps
    eval_every: int  # steps between two validations
    seed: int = 0  # of LoRA's start, of dropout, and of the order of rows
    lr: float = 1e-4  # learning rate at its peak
    schedule: str = "linear"  # how the rate falls after the warm-up: linear or cosine
    warmup: float = 0.03  # share of the steps in which the rate rises
    batch_size: int = 8  # rows a step
    micro_batch: int = 8  # rows a forward pass
    clip: float = 1.0  # largest gradient norm
    bf16: bool = False  # matrix products in bfloat16
    share_prefix: bool = False  # compute what the prompts of a micro-batch begin with once


@dataclass
class Progress:
    """How far training has come. Kept in checkpoint.pt, and at the end in training.json."""

    step: int = 0
    best_step: int = 0
    best_accuracy: float = -1.0  # on the validation rows
    seconds: float = 0.0  # of the steps alone
    validation_seconds: float = 0.0
    tokens: int = 0  # of prompts and targets
    validated: int = 0  # the step of the last validation


def encode(rows: list[dict], tokenizer, longest: int, path: Path) -> list[Row]:
    """The rows of D' as (token ids, is target?). InputError: a response made elsewhere leaves the context."""
    encoded = []
    for row in rows:
        ids, is_target = training_ids(tokenizer, row["prompt"], row["response"], row.get("tokens"))
        if len(ids) > longest:
            raise InputError(
                f"{path}, row {row['id']}: {len(ids)} tokens, but the model's context holds {longest}: "
                f"shorten the response in the file that it came from, and remove {path}")
        encoded.append((ids, is_target))
    return encoded


def train(
    model, rows: list[Row], validate: Callable[[], float], folder: Path, settings: TrainingSettings
) -> Progress:
    """Train on the rows of D', and keep in `folder` the adapter with the best accuracy that `validate` finds.

    What a step does follows from the seed and its number alone. So a run that was killed, and went on from
    its checkpoint, ends with the weights of one that was not.
    InputError: a step does not fit in memory, or checkpoint.pt is of another run.
    """
    optimizer = torch.optim.AdamW(lora.parameters(model), weight_decay=0.0, fused=model.device.type == "cuda")
    progress = load_checkpoint(model, optimizer, folder)  # step 0 where there is none
    reset_peak_memory()
    model.train()

    if is_due(progress, settings):  # the last run died while it validated
        keep_the_best(model, validate, progress, folder)

    steps = range(progress.step, settings.steps)
    bar = tqdm(steps, desc=f"{folder.name}/train", unit="step", initial=progress.step, total=settings.steps)
    for step in bar:
        # 1. One step on one batch.
        started = time.monotonic()
        seed_dropout(settings.seed, step)
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [rows[i] for i in rows_of_step(step, len(rows), settings.batch_size, settings.seed)]
        loss, target_tokens = training_step(model, optimizer, batch, settings)

        # 2. Say how it went.
        batch_tokens = sum(len(ids) for ids, _ in batch)
        progress.step = step + 1
        progress.tokens += batch_tokens
        progress.seconds += time.monotonic() - started
        rate_of_tokens = progress.tokens / progress.seconds
        bar.set_postfix_str(f"loss {loss:.3f}, {rate_of_tokens:.0f} tokens/s", refresh=False)
        log(folder, step=step + 1, loss=round(loss, 6), lr=rate, tokens=batch_tokens, targets=target_tokens)

        # 3. Keep what a run that dies goes on from, also where it is the judge that fails. Then validate.
        if is_due(progress, settings):
            save_checkpoint(model, optimizer, progress, folder)
            keep_the_best(model, validate, progress, folder)
            save_checkpoint(model, optimizer, progress, folder)
    return progress


def is_due(progress: Progress, settings: TrainingSettings) -> bool:
    """Is the adapter of this step still to be validated?"""
    at_its_step = progress.step % settings.eval_every == 0 or progress.step == settings.steps
    return at_its_step and progress.validated < progress.step


def keep_the_best(model, validate: Callable[[], float], progress: Progress, folder: Path) -> None:
    """Validate, and save the adapter if no earlier one was as good (A.3)."""
    started = time.monotonic()
    accuracy = validate()
    model.train()
    progress.validated = progress.step
    progress.validation_seconds += time.monotonic() - started
    log(folder, step=progress.step, validation=accuracy)
    if accuracy > progress.best_accuracy:
        progress.best_step = progress.step
        progress.best_accuracy = accuracy
        if ranks.RANK == 0:
            lora.save(model, folder, model.config._name_or_path)


# ------------------------------------------------------------------------------ one step


def training_step(model, optimizer, rows: list[Row], settings: TrainingSettings) -> tuple[float, int]:
    """One optimizer step on a batch -> (mean loss of a target token in nats, number of target tokens).

    Each micro-batch's summed loss is divided by the target tokens of the whole batch. So every target token
    weighs the same, however the batch is cut into micro-batches or dealt out to processes.
    """
    target_tokens = sum(sum(is_target) for _, is_target in rows)
    mine = ranks.share(rows)  # with torchrun, this process's part
    total_loss = 0.0
    for start in range(0, len(mine), settings.micro_batch):
        micro_batch = mine[start : start + settings.micro_batch]
        total_loss += accumulate_gradients(model, micro_batch, target_tokens, settings)

    parameters = lora.parameters(model)
    ranks.sum_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    (mean_loss,) = ranks.totals(total_loss)
    return mean_loss, target_tokens


def accumulate_gradients(
    model, micro_batch: list[Row], target_tokens: int, settings: TrainingSettings
) -> float:
    """Add the gradients of a micro-batch -> its share of the batch's mean loss. InputError: out of memory."""
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=settings.bf16):
            loss = target_loss(model, micro_batch, settings.share_prefix) / target_tokens
        loss.backward()
    except torch.OutOfMemoryError:
        smaller = max(1, settings.micro_batch // 2)
        raise InputError(
            f"out of memory with --micro-batch {settings.micro_batch}: the same command with --micro-batch "
            f"{smaller}, or with --gradient-checkpointing, goes on from the last checkpoint") from None
    return loss.item()


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up to the peak, then a decay towards 0, linear or along a cosine. Steps count from 0."""
    warmup_steps = max(1, round(settings.warmup * settings.steps))
    rising = (step + 1) / warmup_steps
    left = (settings.steps - step) / max(1, settings.steps - warmup_steps)
    falling = left if settings.schedule == "linear" else (1 - math.cos(math.pi * min(left, 1))) / 2
    return settings.lr * min(rising, falling)


def rows_of_step(step: int, n: int, batch_size: int, seed: int) -> list[int]:
    """Which of the n rows a step sees.

    Every epoch is a new shuffle, and a batch may reach into the next epoch.
    """
    first = step * batch_size
    return [epoch_order(place // n, n, seed)[place % n] for place in range(first, first + batch_size)]


@lru_cache(maxsize=2)
def epoch_order(epoch: int, n: int, seed: int) -> list[int]:
    return random.Random(f"{seed}-{epoch}").sample(range(n), n)


def seed_dropout(seed: int, step: int) -> None:
    """Other masks for every seed, step and process, for fewer than a million steps."""
    torch.manual_seed(1_000_003 * seed + step + 1_000_003 * 2**32 * ranks.RANK)


# ------------------------------------------------------------------------------ going on after a kill


def log(folder: Path, **row) -> None:
    if ranks.RANK == 0:
        append_jsonl(folder / "log.jsonl", row)


# What torch.load and the two load_state_dict raise over a file that is torn, or of another run.
UNREADABLE = (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError, BadZipFile, UnpicklingError)


def save_checkpoint(model, optimizer, progress: Progress, folder: Path) -> None:
    buffer = io.BytesIO()
    state = {"progress": asdict(progress), "lora": lora.state_dict(model)}
    torch.save(state | {"optimizer": optimizer.state_dict()}, buffer)
    write_bytes(folder / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(model, optimizer, folder: Path) -> Progress:
    """The progress of the last checkpoint, or a fresh one.

    The checkpoint's state goes back into model and optimizer.
    """
    path = folder / "checkpoint.pt"
    progress = Progress()
    if path.exists():
        try:
            saved = torch.load(path, map_location=model.device, weights_only=True)
            lora.load_state_dict(model, saved["lora"])
            optimizer.load_state_dict(saved["optimizer"])
            progress = Progress(**saved["progress"])
        except torch.OutOfMemoryError:
            raise
        except UNREADABLE as error:
            reason = " ".join(str(error).split())[:120]
            raise InputError(f"{path}: no checkpoint of this run ({reason}): remove it, and the same command "
                             "trains from the start") from None

    rows = []
    for row in resume_jsonl(folder / "log.jsonl"):
        last = progress.validated if "validation" in row else progress.step
        if row["step"] <= last:  # what came after the checkpoint is about to be logged again
            rows.append(row)
    write_jsonl(folder / "log.jsonl", rows)
    return progress


def summary(progress: Progress, method: str, sources: dict[str, int], settings: TrainingSettings) -> dict:
    """What training.json says of a finished training.

    `step` is that of the kept adapter. The memory is training's own.
    """
    return {
        "method": method,
        "sources": sources,
        "steps": settings.steps,
        "step": progress.best_step,
        "validation": progress.best_accuracy,
        "minutes": round(progress.seconds / 60, 2),
        "validation_minutes": round(progress.validation_seconds / 60, 2),
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "peak_memory_gib": peak_memory_gib(),
    }


def count_sources(rows: list[dict], name: str) -> dict[str, int]:
    """How many rows of D' are predictions, paraphrases and golds (Table 3). InputError: there is no row."""
    if not rows:
        raise InputError(f"{name}: no row of the training data is left, nothing was accepted")
    sources = {"prediction": 0, "paraphrase": 0, "gold": 0} | Counter(row["source"] for row in rows)
    shares = ", ".join(f"{n / len(rows):.1%} {source}" for source, n in sources.items())
    print(f"{name}: {len(rows)} rows, {shares}")
    return sources
