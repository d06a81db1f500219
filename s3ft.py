"""Selective Self-to-Supervised Fine-Tuning: Algorithm 1 of Gupta et al. (Findings of NAACL 2025), and its relatives.

    python s3ft.py --task gsm8k --method s3ft --out runs/gsm8k

A method turns the data D = {(x, y)} into the data D' = {(x, target)} that the model is trained on. It is one short function
below, which asks the base model: predict(D), paraphrase(D), sample(D, k), each answer with the judge's verdict, and gold(x).
Training, validation and the files are the same for all methods.

Read in this order: `s3ft`, its relatives, `run` (the stages), answers.py (what a method may ask), train.py (line 16).

Where we deviate from the paper, or it is silent:
1. Algorithm 1 goes example by example. We ask for all predictions, then for all paraphrases, because a GPU wants batches.
2. `=` in lines 5 and 9 is the task's judge. Line 8 shows M both x and y (section 2), as the printed prompts do.
3. A paraphrase that leaks its prompt ("the reference answer ...") is rejected, as SDFT's own code does.
4. A response that the length limit cut off is rejected. `--keep-unfinished` judges it like any other.
5. Batch 8, q_proj and v_proj, AdamW, 3 % warm-up and linear decay, clipping at 1.0: see docs/silences.md.
"""

import argparse
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import lora
from answers import Answer, BaseLM, announce_sandbox, fingerprint
from data import prompt
from engine.chat import training_ids
from engine.model import context_length, count_weights, load_config, load_model, load_tokenizer, usable_device
from judges import JUDGES
from results import preview
from results.config import Comparison, Job, Machine, continued, keep
from support import ranks
from support.cli import InputError, exit_cleanly, one_line_error, positive_float, positive_int, seed, share
from support.files import file_digests, locked, read_jsonl, write_json, write_jsonl
from tasks import TASKS, task_of
from tasks.custom import CUSTOM_TASK
from train import AdapterSettings, TrainingSettings, summary, train

# ------------------------------------------------------------------------------ the methods


def s3ft(D, base):
    """Selective Self-to-Supervised Fine-Tuning (Algorithm 1, Fig. 1). The numbers are the lines of Algorithm 1."""
    y_hat = base.predict(D)  # 4: ŷ ← M(x), for every x at once
    y_tilde = base.paraphrase([x for x in D if not y_hat[x.id].accepted])  # 8: ỹ ← M([x; y]), for the rejected
    for x in D:  # 3
        if y_hat[x.id].accepted:  # 5: ŷ = y
            yield x, y_hat[x.id], "prediction"  # 6: D' ← D' ∪ {(x, ŷ)}
        elif y_tilde[x.id].accepted:  # 9: ỹ = y
            yield x, y_tilde[x.id], "paraphrase"  # 10: D' ← D' ∪ {(x, ỹ)}
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
            yield x, y_tilde[x.id], "paraphrase"
        else:
            yield x, base.gold(x), "gold"


def ssr(D, base):
    """Selective Self-Rehearsal (Gupta et al., 2024): the model's own response where it is accepted, else the gold."""
    y_hat = base.predict(D)
    for x in D:
        if y_hat[x.id].accepted:
            yield x, y_hat[x.id], "prediction"
        else:
            yield x, base.gold(x), "gold"


def rft(D, base, k=4):
    """Rejection sampling (STaR-like): the likeliest accepted one of k samples. A row without one is dropped."""
    samples = base.sample(D, k)
    for x in D:
        accepted = [y for y in samples[x.id] if y.accepted]
        if accepted:
            yield x, max(accepted, key=lambda y: y.log_prob), "prediction"


METHODS = {"sft": sft, "sdft": sdft, "ssr": ssr, "s3ft": s3ft, "rft": rft}  # a new method is one entry more

# ------------------------------------------------------------------------------ a run


def run(job: Job) -> None:
    """The three stages of one method. What an earlier run finished is not repeated."""
    job = continued(job)
    if (job.folder / "training.json").exists():
        if ranks.RANK == 0:
            (job.folder / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{job.folder}: finished already")
        return

    # 1. Load everything, and refuse what cannot work before hours of generation.
    task, (D, validation, _), model, tokenizer = load(job)

    # 2. Lines 2 to 15 of Algorithm 1: build D'.
    base = BaseLM(model, tokenizer, task, job.run, job.shared.keep_unfinished)
    with lora.disabled(model):
        rows = build(METHODS[job.method], D, base, job.folder / "train.jsonl")
    sources = count_sources(rows, job.folder.name)

    # 3. Line 16: train on D'.
    encoded = [training_ids(tokenizer, row["prompt"], row["response"], row.get("tokens")) for row in rows]
    if job.machine.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    progress = train(model, tokenizer, task, encoded, validation, job.folder, job.training)
    write_json(job.folder / "training.json", summary(progress, job.method, sources, job.training))
    if ranks.RANK == 0:
        (job.folder / "checkpoint.pt").unlink()


def load(job: Job):
    """(task, splits, model, tokenizer), LoRA being in the model. Only a job that can work marks the folder."""
    shared, machine = job.shared, job.machine
    task, splits = task_of(asdict(shared), machine.data)
    announce_sandbox(task, machine.sandbox)
    tokenizer = load_tokenizer(shared.model, machine.trust_remote_code)
    longest = context_length(load_config(shared.model, machine.trust_remote_code))
    rehearsal = preview.rehearse(METHODS[job.method], task, splits, tokenizer, longest)
    for line in preview.faults(task, splits):
        print(line, flush=True)
    if machine.device == "cpu":
        weights = count_weights(shared.model, machine.trust_remote_code)
        print(preview.cpu_hours(weights, rehearsal, job.training), flush=True)

    model, tokenizer = load_model(shared.model, machine.device, shared.dtype, machine.trust_remote_code)
    weights = fingerprint(model)
    if shared.weights not in (None, weights):
        raise InputError(f"{job.run} was begun with other weights than those of --model {shared.model}: give that "
                         "model again, or another --out")
    try:
        lora.inject(model, **asdict(job.adapter), seed=job.training.seed)
    except ValueError as error:
        raise InputError(str(error)) from None

    keep(job.run / "config.json", asdict(replace(shared, weights=weights)))
    keep(job.folder / "config.json", job.recorded())
    return task, splits, model, tokenizer


def build(method, D, base: BaseLM, path: Path) -> list[dict]:
    """D' as rows {id, prompt, response, source, tokens}, written to `path` once and read from there afterwards.

    A target is an Answer, whose tokens are trained on as the model generated them, or a text.
    """
    missing = not path.exists()
    ranks.barrier()  # every process has looked, before rank 0 may write it
    if missing:
        rows = []
        for x, target, source in method(D, base):
            answer = target if isinstance(target, Answer) else Answer(target, accepted=True)
            row = {"id": x.id, "prompt": prompt(base.task.train, x), "response": answer.text, "source": source}
            rows.append(row | ({"tokens": answer.tokens} if answer.tokens else {}))
        write_jsonl(path, rows)
    ranks.barrier()  # rank 0 has written it
    return read_jsonl(path, ("id", "prompt", "response", "source"))


def count_sources(rows: list[dict], name: str) -> dict[str, int]:
    """How many rows of D' are predictions, paraphrases and golds (Table 3). InputError: there is no row."""
    if not rows:
        raise InputError(f"{name}: no row of the training data is left, nothing was accepted")
    sources = {"prediction": 0, "paraphrase": 0, "gold": 0} | Counter(row["source"] for row in rows)
    shares = ", ".join(f"{n / len(rows):.1%} {source}" for source, n in sources.items())
    print(f"{name}: {len(rows)} rows, {shares}")
    return sources


# ------------------------------------------------------------------------------ the command line


def parse(argv=None):
    """The flags, as they were typed."""
    parser = argparse.ArgumentParser(description="Train a model with S3FT or one of its relatives.", allow_abbrev=False)
    parser.error = one_line_error
    what = parser.add_argument_group("what to do")
    what.add_argument("--task", required=True, help=f"{', '.join(TASKS)}, or custom (your files, below)")
    what.add_argument("--method", required=True, help=", ".join(METHODS))
    what.add_argument("--model", default="mistralai/Mistral-7B-Instruct-v0.2", help="Hugging Face name or folder (%(default)s)")
    what.add_argument("--out", required=True, type=Path, help="the run folder; all methods of one comparison share it")
    what.add_argument("--name", help="the method's folder in it (default: the method)")
    what.add_argument("--data", default="data", help="where the data sets are, and are downloaded to (%(default)s)")
    what.add_argument("--limit", type=positive_int, help="only the first N rows of every split")
    what.add_argument("--dry-run", action="store_true", help="say on one page what would be done, and stop")
    custom = parser.add_argument_group("your own task", "rows with question and answer (and context, tests, id)")
    for split in ("train", "val", "test"):
        custom.add_argument(f"--{split}-file", metavar="F")
    custom.add_argument("--judge", choices=[*JUDGES, "llm"], help="what = means (default: the task's)")
    generation = parser.add_argument_group("generation (greedy, A.3)")
    generation.add_argument("--max-new-tokens", type=positive_int, help="length limit of a response (default: the task's)")
    generation.add_argument("--keep-unfinished", action="store_true", help="judge cut-off responses like any other")
    generation.add_argument("--sandbox", choices=("best", "strict"), default="best",
                            help="code judge: strict refuses to run where a layer of isolation is missing (%(default)s)")
    adapter = parser.add_argument_group("LoRA (section 3)")
    adapter.add_argument("--rank", type=positive_int, default=8, help="r (%(default)s)")
    adapter.add_argument("--alpha", type=positive_float, default=16, help="scale = alpha / r (%(default)s)")
    adapter.add_argument("--dropout", type=share, default=0.1, help="on the adapter's input (%(default)s)")
    adapter.add_argument("--target-modules", default="q_proj,v_proj", help="names, or all-linear (%(default)s)")
    training = parser.add_argument_group("training (A.3; the paper is silent on batch size, schedule and optimizer)")
    training.add_argument("--lr", type=positive_float, default=1e-4, help="peak learning rate (%(default)s)")
    training.add_argument("--schedule", choices=("linear", "cosine"), default="linear", help="its decay (%(default)s)")
    training.add_argument("--steps", type=positive_int, help="optimizer steps (default: the task's; GSM8K, NQ 5000, MBPP 1000)")
    training.add_argument("--eval-every", type=positive_int, help="validate every N steps (default: the task's; 500, MBPP 100)")
    training.add_argument("--batch-size", type=positive_int, default=8, help="rows a step (%(default)s)")
    training.add_argument("--micro-batch", type=positive_int, help="rows a forward pass; fewer need less memory (default: all)")
    training.add_argument("--warmup", type=share, default=0.03, help="share of the steps (%(default)s)")
    training.add_argument("--clip", type=positive_float, default=1.0, help="largest gradient norm (%(default)s)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")
    training.add_argument("--share-prefix", action="store_true",
                          help="compute what the prompts of a micro-batch begin with once: faster; one dropout mask for it")
    training.add_argument("--seed", type=seed, default=0, help="LoRA's start, dropout, order of rows (%(default)s)")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    machine.add_argument("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on cuda, else float32)")
    machine.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return parser.parse_args(argv)


def job_of(args) -> Job:
    """What the flags ask for. InputError: they do not fit together."""
    if args.method not in METHODS:
        raise InputError(f"unknown method {args.method!r}: choose from {', '.join(METHODS)}")
    files = [args.train_file, args.val_file, args.test_file]
    if args.task == "custom":
        if not (all(files) and args.judge):
            raise InputError("--task custom needs --train-file, --val-file, --test-file and --judge")
    elif any(files):
        raise InputError(f"--train-file, --val-file and --test-file go with --task custom; {args.task} has its own rows")
    name = args.name or args.method
    if name in ("base", "figures") or Path(name).name != name or name.startswith("."):
        raise InputError(f"--name {name}: must be the name of one new folder in --out, and not base or figures")
    if args.batch_size < ranks.WORLD:
        raise InputError(f"--batch-size {args.batch_size}: with {ranks.WORLD} processes it must be at least that")

    task = TASKS.get(args.task, CUSTOM_TASK)
    steps = args.steps or task.steps
    device = usable_device(args.device)
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    model = str(Path(args.model)) if Path(args.model).is_dir() else args.model  # a trailing slash is no other model
    modules = args.target_modules
    shared = Comparison(
        task=args.task, model=model, dtype=dtype, judge=args.judge, limit=args.limit, max_new_tokens=args.max_new_tokens,
        files=files if all(files) else None, contents=file_digests(files) if all(files) else None,
        keep_unfinished=args.keep_unfinished, date=time.strftime("%Y-%m-%d"))
    adapter = AdapterSettings(
        args.rank, args.alpha, args.dropout, modules if modules == "all-linear" else tuple(modules.split(",")))
    training = TrainingSettings(
        steps=steps, eval_every=min(args.eval_every or task.eval_every, steps), seed=args.seed, lr=args.lr,
        schedule=args.schedule, warmup=args.warmup, batch_size=args.batch_size,
        micro_batch=args.micro_batch or args.batch_size, clip=args.clip, bf16=dtype == "bfloat16",
        share_prefix=args.share_prefix)
    machine = Machine(args.data, device, args.trust_remote_code, args.sandbox, args.gradient_checkpointing)
    return Job(args.method, args.out / name, shared, adapter, training, machine)


def main(argv=None) -> None:
    args = parse(argv)
    job = job_of(args)
    with locked(args.out), ranks.joined(job.machine.device):
        run(job)


if __name__ == "__main__":
    exit_cleanly(main)
