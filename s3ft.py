"""Selective Self-to-Supervised Fine-Tuning: Algorithm 1 of Gupta et al. (Findings of NAACL 2025), and its relatives.

    python s3ft.py --task gsm8k --method s3ft --out runs/gsm8k

A method turns the data D = {(x, y)} into the data D' = {(x, target)} that the model is trained on; it is one short function
below. It asks the base model: predict(D), paraphrase(D), sample(D, k), each answer with the judge's verdict, and gold(x).
Training, validation and the files are the same for all methods.

Read in this order: `s3ft`, its relatives, `BaseLM` (what they ask), `train` (line 16 of Algorithm 1), `run` (the stages).

Where we deviate from the paper, or it is silent:
1. Algorithm 1 goes example by example; we ask for all predictions, then all paraphrases, because a GPU wants batches.
2. `=` in lines 5 and 9 is the task's judge. Line 8 shows M both x and y (section 2), as the printed prompts do.
3. A paraphrase that leaks its prompt ("the reference answer ...") is rejected, as SDFT's own code does.
4. Batch 8, q_proj and v_proj, AdamW, 3 % warm-up and linear decay, clipping at 1.0: see the README's table.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

import torch

import lora
from answers import BaseLM, announce_sandbox, encode_prompts
from data import Example, Task, prompt
from engine.chat import training_ids
from engine.model import context_length, count_weights, load_model, load_tokenizer, peak_memory_gib, usable_device
from judges import JUDGES
from support import ranks
from support.cli import InputError, exit_cleanly, non_negative_float, one_line_error, positive_int
from support.files import digests, locked, read_json, read_jsonl, write_json, write_jsonl
from tasks import TASKS, task_of
from tasks.custom import CUSTOM_TASK
from train import train


def s3ft(D, base):
    """Selective Self-to-Supervised Fine-Tuning (Algorithm 1, Fig. 1). The numbers are the lines of Algorithm 1."""
    y_hat = base.predict(D)  # 4: ŷ ← M(x), for every x at once
    y_tilde = base.paraphrase([x for x in D if not y_hat[x.id].accepted])  # 8: ỹ ← M([x; y]), for the rejected
    for x in D:  # 3
        if y_hat[x.id].accepted:  # 5: ŷ = y
            yield x, y_hat[x.id].text, "prediction"  # 6: D' ← D' ∪ {(x, ŷ)}
        elif y_tilde[x.id].accepted:  # 9: ỹ = y
            yield x, y_tilde[x.id].text, "paraphrase"  # 10: D' ← D' ∪ {(x, ỹ)}
        else:  # 11
            yield x, base.gold(x), "gold"  # 12: D' ← D' ∪ {(x, y)}


def sft(D, base):
    """Supervised fine-tuning: the gold, always."""
    for x in D:
        yield x, base.gold(x), "gold"


def sdft(D, base):
    """Self-Distillation Fine-Tuning (Yang et al., 2024): a paraphrase of every gold, the gold where it is not accepted."""
    y_tilde = base.paraphrase(D)
    for x in D:
        if y_tilde[x.id].accepted:
            yield x, y_tilde[x.id].text, "paraphrase"
        else:
            yield x, base.gold(x), "gold"


def ssr(D, base):
    """Selective Self-Rehearsal (Gupta et al., 2024): the model's own response where accepted, else the gold."""
    y_hat = base.predict(D)
    for x in D:
        if y_hat[x.id].accepted:
            yield x, y_hat[x.id].text, "prediction"
        else:
            yield x, base.gold(x), "gold"


def rft(D, base, k=4):
    """Rejection sampling (STaR-like): the likeliest accepted one of k samples; a row without one is dropped."""
    samples = base.sample(D, k)
    for x in D:
        accepted = [y for y in samples[x.id] if y.accepted]
        if accepted:
            yield x, max(accepted, key=lambda y: y.log_prob).text, "prediction"


METHODS = {"sft": sft, "sdft": sdft, "ssr": ssr, "s3ft": s3ft, "rft": rft}


def build(method, D: list[Example], base: BaseLM, path: Path) -> list[dict]:
    """D' as rows {id, prompt, response, source}, written to `path` once and read from there afterwards."""
    missing = not path.exists()
    ranks.barrier()  # all have looked, before rank 0 may write it
    if missing:
        targets = METHODS[method](D, base)
        write_jsonl(path, [{"id": x.id, "prompt": prompt(base.task.train, x), "response": target, "source": source}
                           for x, target, source in targets])
    ranks.barrier()  # rank 0 has written it
    return read_jsonl(path, ("id", "prompt", "response", "source"))


def encode_rows(model, tokenizer, rows: list[dict], where: Path | str) -> list:
    encoded = [training_ids(tokenizer, row["prompt"], row["response"]) for row in rows]
    longest = context_length(model)
    for row, (ids, _) in zip(rows, encoded, strict=True):
        if len(ids) > longest:
            raise InputError(f"{where}, row {row['id']}: {len(ids)} tokens, but the model's context holds {longest}")
    return encoded


def announce_cpu(task: Task, D: list[Example], args) -> None:
    """Without a GPU, say what a run will cost: 2 FLOPs a weight and token forward, 4 in a LoRA step, over a timed product.

    Said before the weights are loaded, which may be more than a laptop holds.
    """
    tokenizer, some = load_tokenizer(args.model, args.trust_remote_code), D[:100]
    row = sum(len(training_ids(tokenizer, prompt(task.predict, x), task.gold(x))[0]) for x in some) / len(some)
    weights = count_weights(args.model, args.trust_remote_code)
    a = torch.randn(512, 2048)
    start = time.perf_counter()
    for _ in range(8):
        a @ a.T @ a
    speed = 8 * 4 * 512 * 512 * 2048 / (time.perf_counter() - start)  # FLOP/s
    answers = len(D) * {"sft": 0, "sdft": 1, "ssr": 1, "rft": 8}.get(args.method, 2)  # rft: 4 samples, and their scores
    hours = weights * row * (2 * answers + 4 * args.steps * args.batch_size) / speed / 3600
    length = f"{hours:.1f} hours" if hours >= 1 else f"{max(1, 60 * hours):.0f} minutes"
    print(f"no GPU: on this CPU ({speed / 1e9:.0f} GFLOP/s) {args.method} will take about {length}, without validation",
          flush=True)


def check_lengths(model, tokenizer, task: Task, splits: dict[str, list[Example]], method: str) -> None:
    """InputError: a row is longer than the model's context, as a prompt, with its gold, or in its paraphrase prompt."""
    for split, rows in splits.items():
        encode_prompts(model, tokenizer, {f"{x.id} ({split})": prompt(task.predict, x) for x in rows})
    D = splits["training"]
    if method in ("sdft", "s3ft"):
        encode_prompts(model, tokenizer, {f"{x.id} (paraphrase)": prompt(task.paraphrase, x, task.gold(x)) for x in D})
    if method not in ("rft", "reflect"):  # these never train on the gold
        rows = [{"id": x.id, "prompt": prompt(task.train, x), "response": task.gold(x)} for x in D]
        encode_rows(model, tokenizer, rows, "training data with gold")


def inject(model, args) -> None:
    try:
        lora.inject(model, args.rank, args.alpha, args.dropout, args.target_modules, seed=args.seed)
    except ValueError as error:
        raise InputError(str(error)) from None


def run(args) -> None:
    """The stages of one method: D', LoRA, training. Each is skipped where an earlier run finished it."""
    shared = {name: getattr(args, name) for name in ("task", "model", "judge", "limit", "files", "max_new_tokens", "dtype")}
    shared["contents"] = args.files and digests(args.files)
    own = {name: value for name, value in vars(args).items() if name not in (*shared, *MAY_CHANGE_ON_RESUME)}
    folder = args.out / args.name
    settings = ((args.out / "config.json", shared, "--out"), (folder / "config.json", own, "--name"))
    for path, values, flag in settings:
        check_same(path, values, flag)
    if (folder / "training.json").exists():
        if ranks.RANK == 0:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{folder}: finished already")
        return
    task, (D, validation, test) = task_of(shared, args.data)
    announce_sandbox(task, args.sandbox)
    if args.device == "cpu":
        announce_cpu(task, D, args)
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code)
    inject(model, args)  # before hours of generation: what cannot work must not come to light after them
    check_lengths(model, tokenizer, task, {"training": D, "validation": validation, "test": test}, args.method)
    for path, values, _ in settings:  # only now: a mistyped flag must not mark the folder
        if not path.exists():
            write_json(path, values)
    base = BaseLM(model, tokenizer, task, args.out)
    with lora.disabled(model):
        rows = build(args.method, D, base, folder / "train.jsonl")
    if not rows:
        raise InputError(f"{args.name}: no row of the training data is left, nothing was accepted")
    sources = {"prediction": 0, "paraphrase": 0, "gold": 0} | Counter(row["source"] for row in rows)
    print(f"{args.name}: {len(rows)} rows, " + ", ".join(f"{n / len(rows):.1%} {source}" for source, n in sources.items()))
    encoded = encode_rows(model, tokenizer, rows, folder / "train.jsonl")
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    state = train(model, tokenizer, task, encoded, validation, folder, args)
    write_json(folder / "training.json", {"method": args.method, "sources": sources, "steps": args.steps, **state["best"],
                                          "minutes": round(state["seconds"] / 60, 2),
                                          "tokens_per_second": round(state["tokens"] / state["seconds"]),
                                          "peak_memory_gib": peak_memory_gib()})
    if ranks.RANK == 0:
        (folder / "checkpoint.pt").unlink()


# Where and on what, not what.
MAY_CHANGE_ON_RESUME = ("out", "name", "data", "device", "trust_remote_code", "sandbox", "micro_batch",
                        "gradient_checkpointing")


def check_same(path: Path, settings: dict, flag: str) -> None:
    """Are the settings those of the run that is being continued?"""
    before = read_json(path) if path.exists() else settings
    for name, value in settings.items():
        if before.get(name) != value:
            setting = {"files": "the files", "contents": "files with the digests"}.get(name, f"--{name.replace('_', '-')}")
            raise InputError(f"{path.parent} was begun with {setting} {before.get(name)}, not {value}: give the same again, "
                             f"or another {flag}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Train a model with S3FT or one of its relatives.", allow_abbrev=False)
    parser.error = one_line_error  # one line, without the usage
    what = parser.add_argument_group("what to do")
    what.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or custom (your files, below)")
    what.add_argument("--method", required=True, help=", ".join(METHODS))
    what.add_argument("--model", default="mistralai/Mistral-7B-Instruct-v0.2", help="Hugging Face name or folder (%(default)s)")
    what.add_argument("--out", required=True, type=Path, help="the run folder; all methods of one comparison share it")
    what.add_argument("--name", help="the method's folder in it (default: the method)")
    what.add_argument("--data", default="data", help="where the data sets are, and are downloaded to (%(default)s)")
    what.add_argument("--limit", type=positive_int, help="only the first N rows of every split")
    custom = parser.add_argument_group("your own task", "JSONL rows: question, answer (context, tests, id); or SQuAD JSON")
    for split in ("train", "val", "test"):
        custom.add_argument(f"--{split}-file", metavar="F")
    custom.add_argument("--judge", choices=[*JUDGES, "llm"], help="what = means (default: the task's)")
    generation = parser.add_argument_group("generation (greedy, A.3)")
    generation.add_argument("--max-new-tokens", type=positive_int, help="length limit of a response (default: the task's)")
    generation.add_argument("--sandbox", choices=("best", "strict"), default="best",
                            help="code judge: strict refuses to run where a layer of isolation is missing (%(default)s)")
    adapter = parser.add_argument_group("LoRA (section 3)")
    adapter.add_argument("--rank", type=positive_int, default=8, help="r (%(default)s)")
    adapter.add_argument("--alpha", type=non_negative_float, default=16, help="scale = alpha / r (%(default)s)")
    adapter.add_argument("--dropout", type=non_negative_float, default=0.1, help="on the adapter's input (%(default)s)")
    adapter.add_argument("--target-modules", default="q_proj,v_proj", help="names, or all-linear (%(default)s)")
    training = parser.add_argument_group("training (A.3; the paper is silent on batch size, schedule and optimizer)")
    training.add_argument("--lr", type=non_negative_float, default=1e-4, help="peak learning rate (%(default)s)")
    training.add_argument("--steps", type=positive_int, help="optimizer steps (default: the task's; GSM8K, NQ 5000, MBPP 1000)")
    training.add_argument("--eval-every", type=positive_int, help="validate every N steps (default: the task's; 500, MBPP 100)")
    training.add_argument("--batch-size", type=positive_int, default=8, help="sequences a step (%(default)s)")
    training.add_argument("--micro-batch", type=positive_int,
                          help="sequences a forward pass; fewer need less memory (default: all)")
    training.add_argument("--warmup", type=non_negative_float, default=0.03, help="share of the steps (%(default)s)")
    training.add_argument("--clip", type=non_negative_float, default=1.0, help="largest gradient norm (%(default)s)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")
    training.add_argument("--share-prefix", action="store_true",
                          help="compute what the prompts of a micro-batch begin with once: faster; one dropout mask for it")
    training.add_argument("--seed", type=int, default=0, help="LoRA's start, dropout, order of rows (%(default)s)")
    hardware = parser.add_argument_group("machine")
    hardware.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    hardware.add_argument("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on cuda, else float32)")
    hardware.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return complete(parser.parse_args(argv))


def complete(args):
    """Fill in the defaults that depend on others, and refuse what cannot work."""
    if args.method not in METHODS:
        raise InputError(f"unknown method {args.method!r}: choose from {', '.join(METHODS)}")
    files = [vars(args).pop(f"{split}_file") for split in ("train", "val", "test")]
    custom = args.task == "custom"
    if custom and not (all(files) and args.judge) or not custom and any(files):
        raise InputError("--task custom goes with --train-file, --val-file, --test-file and --judge; the other tasks with none")
    task = TASKS.get(args.task, CUSTOM_TASK)
    args.files = files if all(files) else None
    args.name = args.name or args.method
    if args.name in ("base", "figures") or Path(args.name).name != args.name or args.name.startswith("."):
        raise InputError(f"--name {args.name}: must be the name of one new folder in --out, and not base or figures")
    args.steps = args.steps or task.steps
    args.eval_every = min(args.eval_every or task.eval_every, args.steps)
    if args.batch_size < ranks.WORLD:
        raise InputError(f"--batch-size {args.batch_size}: with {ranks.WORLD} processes it must be at least that")
    args.micro_batch = args.micro_batch or args.batch_size
    args.device = usable_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    if args.target_modules != "all-linear":
        args.target_modules = args.target_modules.split(",")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    with locked(args.out), ranks.joined(args.device):
        run(args)


if __name__ == "__main__":
    exit_cleanly(main)
