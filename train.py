"""Line 16 of Algorithm 1: train the adapter on D', and keep the best checkpoint (A.3)."""

import io
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

import lora
from answers import validate
from data import Example, Task
from engine.packed import target_loss
from support import ranks
from support.cli import InputError
from support.files import append_jsonl, resume_jsonl, write_bytes, write_jsonl


class Loss(torch.nn.Module):
    """-Σ log p(y_t | x, y_<t) over the target tokens of the rows, in nats. The prompt is masked: it is no target.

    A module and not a function, because DistributedDataParallel averages the gradients of a module's forward pass.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows, share_prefix: bool = False) -> torch.Tensor:
        return target_loss(self.model, rows, share_prefix)


def step_rows(n: int, batch_size: int, steps: int, seed: int):
    """Row numbers of every step: each epoch in an order of its own, and the same order whenever the run is repeated."""
    order, epoch = [], 0
    for _ in range(steps):
        while len(order) < batch_size:
            order += random.Random(f"{seed}-{epoch}").sample(range(n), n)
            epoch += 1
        yield order[:batch_size]
        order = order[batch_size:]


def learning_rate(step: int, args) -> float:
    """Linear warm-up, then linear decay to 0. `step` counts from 0."""
    warmup = max(1, round(args.warmup * args.steps))
    return args.lr * min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))


def backward(loss_of, rows, args) -> tuple[float, int]:
    """Gradients of the mean loss over a batch, summed up in micro-batches -> (mean loss, target tokens).

    The loss is divided by the target tokens of the whole step. Averaging the micro-batches' own means would weigh a token
    by the length of its neighbours, and make the result depend on how the batch was cut. With several processes each takes
    its share of the rows; their gradients are averaged, hence the factor ranks.WORLD.
    """
    targets, mine = sum(sum(is_target) for _, is_target in rows), ranks.share(rows)
    device = next(loss_of.parameters()).device.type
    total = 0.0
    for start in range(0, len(mine), args.micro_batch):
        last = start + args.micro_batch >= len(mine)
        with ranks.without_sync(loss_of, last), torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(mine[start : start + args.micro_batch], args.share_prefix) / targets
            (loss * ranks.WORLD).backward()
        total += loss.item()
    return ranks.totals(total)[0], targets


def backward_in_memory(loss_of, optimizer, rows, args) -> tuple[float, int]:
    """As `backward`. Out of memory: again, in micro-batches half as large."""
    while True:
        try:
            return backward(loss_of, rows, args)
        except torch.OutOfMemoryError:
            pass  # not here: the exception still holds the forward pass's tensors
        if args.micro_batch == 1 or ranks.WORLD > 1:  # other processes wait for this one's gradients
            raise InputError(f"out of memory with --micro-batch {args.micro_batch}: try a smaller one, "
                             "or --gradient-checkpointing")
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        args.micro_batch = (args.micro_batch + 1) // 2
        tqdm.write(f"out of memory: going on with --micro-batch {args.micro_batch}")


def optimizer_step(loss_of, optimizer, rows, args) -> tuple[float, int]:
    """One step over a batch -> (mean loss, target tokens)."""
    loss, targets = backward_in_memory(loss_of, optimizer, rows, args)
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], args.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, targets


def train(model, tokenizer, task: Task, rows: list, validation: list[Example], folder: Path, args) -> dict:
    """Train on D' and keep the adapter with the best validation accuracy (A.3) -> what training.json says.

    Every `eval_every` steps the whole state goes to checkpoint.pt. Dropout is seeded by the step, the order by the epoch, so a
    run that goes on from there ends with the same weights as one that was never interrupted.
    """
    optimizer = torch.optim.AdamW(lora.parameters(model), weight_decay=0.0, fused=model.device.type == "cuda")
    state = load_checkpoint(model, optimizer, folder)
    args.micro_batch = min(args.micro_batch, state.get("micro_batch", args.micro_batch))  # what fitted before the break
    loss_of = ranks.data_parallel(Loss(model))
    model.train()
    bar = tqdm(total=args.steps, initial=state["step"], desc=f"{folder.name}/train", unit="step")
    for step, batch in enumerate(step_rows(len(rows), args.batch_size, args.steps, args.seed)):
        if step < state["step"]:
            continue
        start = time.monotonic()
        torch.manual_seed(1_000_003 * args.seed + step + 7_919 * ranks.RANK)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        loss, targets = optimizer_step(loss_of, optimizer, [rows[i] for i in batch], args)
        state["seconds"] += time.monotonic() - start
        tokens = sum(len(rows[i][0]) for i in batch)
        state["tokens"] += tokens
        bar.set_postfix_str(f"loss {loss:.3f}, {state['tokens'] / state['seconds']:.0f} tokens/s", refresh=False)
        bar.update()
        log(folder, {"step": step + 1, "loss": round(loss, 6), "lr": learning_rate(step, args), "tokens": tokens,
                     "targets": targets})
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            state |= {"step": step + 1, "micro_batch": args.micro_batch}
            keep_best(model, tokenizer, task, validation, folder, state)
            save_checkpoint(model, optimizer, folder, state)
            model.train()
    bar.close()
    return state


def log(folder: Path, row: dict) -> None:
    if ranks.RANK == 0:
        append_jsonl(folder / "log.jsonl", row)


def keep_best(model, tokenizer, task: Task, validation: list[Example], folder: Path, state: dict) -> None:
    accuracy = validate(model, tokenizer, task, validation)
    log(folder, {"step": state["step"], "validation": accuracy})
    if accuracy > state["best"]["validation"]:
        state["best"] = {"step": state["step"], "validation": accuracy}
        if ranks.RANK == 0:
            lora.save(model, folder, model.config._name_or_path)


def save_checkpoint(model, optimizer, folder: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save({"state": state, "lora": lora.state_dict(model), "optimizer": optimizer.state_dict()}, buffer)
    write_bytes(folder / "checkpoint.pt", buffer.getvalue())


def load_checkpoint(model, optimizer, folder: Path) -> dict:
    """The state of the last checkpoint, put back into model and optimizer; a fresh one if there is none."""
    state = {"step": 0, "best": {"step": 0, "validation": -1.0}, "seconds": 0.0, "tokens": 0}
    if (folder / "checkpoint.pt").exists():
        saved = torch.load(folder / "checkpoint.pt", map_location=model.device, weights_only=True)
        lora.load_state_dict(model, saved["lora"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    log = [row for row in resume_jsonl(folder / "log.jsonl") if row["step"] <= state["step"]]
    write_jsonl(folder / "log.jsonl", log)  # steps after the checkpoint are about to be made, and logged, again
    return state
