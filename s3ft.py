"""Selective Self-to-Supervised Fine-Tuning: Algorithm 1 of Gupta et al. (Findings of NAACL 2025).

    python s3ft.py --task gsm8k --method s3ft --out runs/gsm8k

A method turns the data D = {(x, y)} into the data D' = {(x, target)} that the model is trained on. It is one
short function below, which asks the base model: predict(D), paraphrase(D), sample(D, k), each answer with the
judge's verdict, and gold(x). Training, validation and the files are the same for all methods.

Read in this order: `s3ft`, its relatives, `run` (the stages), answers.py (what a method may ask), train.py.

Where we deviate from the paper, or it is silent:
1. Algorithm 1 goes example by example. We ask for all predictions, then for all paraphrases, since a GPU
   wants batches.
2. `=` in lines 5 and 9 is the task's judge. Line 8 shows M both x and y (section 2), as Figs. 6 and 7 do.
3. A paraphrase that leaks its prompt ("the reference answer ...") is rejected, as SDFT's own code does.
4. A response that the length limit cut off is rejected. `--keep-unfinished` judges it like any other.
5. Batch 8, q_proj and v_proj, AdamW, 3 % warm-up, linear decay, clipping at 1.0: see docs/silences.md.
"""

import argparse
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import lora
from answers import Answer, BaseLM, selection_digest, validate
from data import Splits, prompt
from engine import trial
from engine.chat import check_template
from engine.fingerprint import fingerprint
from engine.model import context_length, load_model, usable_device
from engine.peft_check import check_saved
from engine.precision import fastest_dtype
from engine.server import with_name
from judges import JUDGES
from results import config, preview
from results.config import Comparison, Job, Machine
from support import cli, ranks
from support.cli import InputError
from support.files import file_digests, locked, read_jsonl, write_json, write_jsonl
from tasks import CUSTOM_FLAGS, TASKS
from tasks.custom import CUSTOM_TASK
from train import AdapterSettings, TrainingSettings, count_sources, encode, summary, train

# ------------------------------------------------------------------------------ the methods


def s3ft(D, base):
    """Selective Self-to-Supervised Fine-Tuning (Algorithm 1, Fig. 1). The numbers are Algorithm 1's lines."""
    y_hat = base.predict(D)  # 4: ŷ ← M(x), for every x at once
    rejected = [x for x in D if not y_hat[x.id].accepted]
    y_tilde = base.paraphrase(rejected)  # 8: ỹ ← M([x; y])
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
    """Self-Distillation Fine-Tuning (Yang et al., 2024): a paraphrase of every gold, else the gold."""
    y_tilde = base.paraphrase(D)
    for x in D:
        if y_tilde[x.id].accepted:
            yield x, y_tilde[x.id], "paraphrase"
        else:
            yield x, base.gold(x), "gold"


def ssr(D, base):
    """Selective Self-Rehearsal (Gupta et al., 2024): the model's own response, else the gold."""
    y_hat = base.predict(D)
    for x in D:
        if y_hat[x.id].accepted:
            yield x, y_hat[x.id], "prediction"
        else:
            yield x, base.gold(x), "gold"


def rft(D, base, k=4):
    """Rejection sampling (STaR-like): the likeliest accepted one of k samples. A row with none is dropped."""
    samples = base.sample(D, k)
    for x in D:
        accepted = [y for y in samples[x.id] if y.accepted]
        if accepted:
            yield x, max(accepted, key=lambda y: y.log_prob), "prediction"


METHODS = {"sft": sft, "sdft": sdft, "ssr": ssr, "s3ft": s3ft, "rft": rft}

# ------------------------------------------------------------------------------ a run


def run(job: Job) -> None:
    """The three stages of one method. What an earlier run finished is not repeated."""
    job = config.continued(job)
    if (job.folder / "training.json").exists():
        config.keep_moved_paths(job)
        if ranks.RANK == 0:
            (job.folder / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{job.folder}: finished already")
        return

    # 1. Load everything, and refuse what cannot work before hours of generation.
    started = time.monotonic()
    (D, validation, _), base = load(job)
    model, tokenizer = base.model, base.tokenizer
    loading = {"loading_minutes": round((time.monotonic() - started) / 60, 2)}

    # 2. Lines 2 to 15 of Algorithm 1: build D'.
    with lora.disabled(model):
        rows = build(METHODS[job.method], D, base, job.folder / "train.jsonl")
    sources = count_sources(rows, job.folder.name)  # Table 3

    # 3. Line 16: train on D'.
    encoded = encode(rows, tokenizer, context_length(model.config), job.folder / "train.jsonl")
    accuracy = partial(validate, model, tokenizer, base.task, validation, base.judge)
    progress = train(model, encoded, accuracy, job.folder, job.training)
    if ranks.RANK == 0:
        lora.load(model, job.folder)  # the best adapter, which need not be the last
        wrong_in_peft = check_saved(model, job.folder)
        if wrong_in_peft:
            print(wrong_in_peft)
        found = summary(progress, job.method, sources, job.training)
        write_json(job.folder / "training.json", found | loading)
        (job.folder / "checkpoint.pt").unlink()


def load(job: Job) -> tuple[Splits, BaseLM]:
    """The rows, and the base model with LoRA in it. Only a job that can work marks the folder."""
    shared, machine = job.shared, job.machine
    task, splits, tokenizer, rehearsal = preview.rehearse(METHODS[job.method], job)
    for line in (*preview.plan(task, splits, rehearsal, job), *preview.warnings(task, splits)):
        print(line, flush=True)

    settings = config.loading_of(asdict(shared), machine)
    model, tokenizer = load_model(shared.model, **settings)
    weights = fingerprint(model)
    config.refuse_other_weights(job, weights)
    try:
        lora.inject(model, **asdict(job.adapter), seed=job.training.seed)
        if job.machine.gradient_checkpointing:
            model.gradient_checkpointing_enable()
    except ValueError as error:
        raise InputError(str(error)) from None
    for line in (*check_template(model, tokenizer), *trial.check(model, bf16=job.training.bf16)):
        print(line, flush=True)

    base = BaseLM(model, tokenizer, task, job.run, shared.keep_unfinished)
    base.ask_others(shared.engine, shared.judge_model, weights, settings)
    judge_weights = base.judge.identity() if shared.judge_model else None
    config.refuse_another_judge(job, judge_weights)
    config.keep_config(job, weights, judge_weights, made_by=selection_digest(base, METHODS[job.method]))
    return splits, base


def build(method, D, base: BaseLM, path: Path) -> list[dict]:
    """D' as rows {id, prompt, response, source, tokens}, written to `path` once and then read from there.

    A target is an Answer, whose tokens are trained on as the model generated them, or a text.
    """
    missing = not path.exists()
    ranks.barrier()  # every process has looked, before rank 0 may write it
    if missing:
        rows = []
        for x, target, source in method(D, base):
            answer = target if isinstance(target, Answer) else Answer(target, accepted=True)
            user = prompt(base.task.train, x)
            rows.append({"id": x.id, "prompt": user, "response": answer.text, "source": source})
            if answer.tokens:
                rows[-1]["tokens"] = answer.tokens
        write_jsonl(path, rows)
    ranks.barrier()  # rank 0 has written it
    return read_jsonl(path, ("id", "prompt", "response", "source"))


# ------------------------------------------------------------------------------ the command line


def parse(argv=None):
    """The flags, as they were typed."""
    parser = argparse.ArgumentParser(description="Train a model with S3FT or a relative.", allow_abbrev=False)
    parser.error = cli.one_line_error
    add = parser.add_argument_group("what to do").add_argument
    add("--task", required=True, help=f"{', '.join(TASKS)}, or custom (your files, below)")
    add("--method", required=True, help=", ".join(METHODS))
    add("--model", default="mistralai/Mistral-7B-Instruct-v0.2", help="hub name or folder (%(default)s)")
    add("--out", required=True, type=Path, help="the run folder; all methods of one comparison share it")
    add("--name", help="the method's folder in it (default: the method)")
    add("--data", default="data", help="where the data sets are, and are downloaded to (%(default)s)")
    add("--limit", type=cli.positive_int, help="only the first N rows of every split")
    add("--dry-run", action="store_true", help="say on one page what would be done, and stop")
    add = parser.add_argument_group("your own task: JSONL, a JSON array, or SQuAD's JSON").add_argument
    for split in ("train", "val", "test"):
        add(f"--{split}-file", metavar="F")
    add("--judge", choices=[*JUDGES, "llm"], help="what = means (default: the task's)")
    add("--question-field", metavar="NAME", help="where the question is (default: the usual names are tried)")
    add("--answer-field", metavar="NAME", help="where the gold is")
    add("--prompt", metavar="NAME", help="a built-in prompt, such as reading")
    add("--prompt-file", metavar="F", help="JSON or TOML with your own predict, train and paraphrase prompts")
    add = parser.add_argument_group("generation (greedy, A.3)").add_argument
    add("--max-new-tokens", type=cli.positive_int, help="length limit of a response (default: the task's)")
    add("--keep-unfinished", action="store_true", help="judge cut-off responses like any other")
    add("--chat-template-kwargs", type=cli.json_object, help="as '{\"enable_thinking\": false}'")
    add("--numpy", action="store_true", help="code judge: programs may import numpy")
    add("--sandbox", choices=("best", "strict"), default="best", help="strict: every layer or no code is run")
    add("--engine", metavar="URL", help="a server of the model that answers, as http://localhost:8000/v1")
    add("--judge-model", metavar="M", help="whom the llm judge asks: a name, folder or URL (the base model)")
    add = parser.add_argument_group("LoRA (section 3)").add_argument
    add("--rank", type=cli.positive_int, default=8, help="r (%(default)s)")
    add("--alpha", type=cli.positive_float, default=16, help="scale = alpha / r (%(default)s)")
    add("--dropout", type=cli.share, default=0.1, help="on the adapter's input (%(default)s)")
    add("--target-modules", default="q_proj,v_proj", help="names, or all-linear (%(default)s)")
    add = parser.add_argument_group("training (A.3; batch size and optimizer are ours)").add_argument
    add("--lr", type=cli.positive_float, default=1e-4, help="peak learning rate (%(default)s)")
    add("--schedule", choices=("linear", "cosine"), default="linear", help="its decay (%(default)s)")
    add("--steps", type=cli.positive_int, help="optimizer steps (default: the task's; GSM8K 5000, MBPP 1000)")
    add("--eval-every", type=cli.positive_int, help="validate every N steps (the task's; 500, MBPP 100)")
    add("--batch-size", type=cli.positive_int, default=8, help="rows a step (%(default)s)")
    add("--micro-batch", type=cli.positive_int, help="rows a forward pass (all); fewer need less memory")
    add("--warmup", type=cli.share, default=0.03, help="share of the steps (%(default)s)")
    add("--clip", type=cli.positive_float, default=1.0, help="largest gradient norm (%(default)s)")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice, keep few")
    add("--share-prefix", action="store_true", help="compute the start of all prompts once")
    add("--seed", type=cli.random_seed, default=0, help="LoRA's start, dropout, order of rows (%(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, mps or cpu (default: the best there is)")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
        help="auto: the run's own, or bfloat16 on cuda and on a CPU that is faster so, else float32")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    return parser.parse_args(argv)


def refuse_what_does_not_fit(args) -> None:
    """InputError: a name that is none, or flags that do not go together."""
    if args.method not in METHODS:
        raise InputError(f"unknown method {args.method!r}: choose from {', '.join(METHODS)}")
    files = [args.train_file, args.val_file, args.test_file]
    if args.task == "custom":
        if not (all(files) and args.judge):
            raise InputError("--task custom needs --train-file, --val-file, --test-file and --judge")
    elif any(files) or any(getattr(args, name) for name in CUSTOM_FLAGS):
        raise InputError(f"the flags of your own task go with --task custom; {args.task} has its own rows")
    name = args.name or args.method
    if name in ("base", "figures", "judges") or Path(name).name != name or name.startswith("."):
        raise InputError(f"--name {name}: must be the name of one new folder (not base, figures or judges)")
    if args.batch_size < ranks.WORLD:
        raise InputError(f"--batch-size {args.batch_size}: {ranks.WORLD} processes need at least that")


def job_of(args) -> Job:
    """What the flags ask for. What they leave open stays as the run folder began with it."""
    files = [args.train_file, args.val_file, args.test_file]
    custom = {name: getattr(args, name) for name in CUSTOM_FLAGS}
    task = TASKS.get(args.task, CUSTOM_TASK)
    device = usable_device(args.device)
    dtype = args.dtype
    if dtype == "auto":
        dtype = config.begun_with(args.out, "dtype")
        dtype = dtype or fastest_dtype(device, args.model, args.trust_remote_code)
    engine = args.engine
    if engine is not None:
        engine = with_name(engine, config.served_name_begun_with(args.out, "engine"))
    judge_model = config.plain_name(args.judge_model, config.served_name_begun_with(args.out, "judge_model"))
    steps = args.steps or task.steps
    modules = args.target_modules
    brought = config.brought_by_a_person(files, args.prompt_file) if all(files) else []
    shared = Comparison(
        args.task, config.plain_name(args.model), dtype, args.judge, args.limit, args.max_new_tokens,
        files=files if all(files) else None, contents=file_digests(brought) or None,
        numpy=args.numpy, keep_unfinished=args.keep_unfinished,
        chat_template_kwargs=args.chat_template_kwargs, date=time.strftime("%Y-%m-%d"),
        engine=engine, judge_model=judge_model, **custom)
    adapter = AdapterSettings(
        args.rank, args.alpha, args.dropout, modules if modules == "all-linear" else modules.split(","))
    training = TrainingSettings(
        steps, min(args.eval_every or task.eval_every, steps), args.seed, args.lr, args.schedule, args.warmup,
        args.batch_size, args.micro_batch or args.batch_size, args.clip, bf16=dtype == "bfloat16",
        share_prefix=args.share_prefix)
    machine = Machine(args.data, device, args.trust_remote_code, args.sandbox, args.gradient_checkpointing)
    return Job(args.method, args.out / (args.name or args.method), shared, adapter, training, machine)


def main(argv=None) -> None:
    args = parse(argv)
    refuse_what_does_not_fit(args)
    job = job_of(args)
    if args.dry_run:
        print(preview.page(METHODS[job.method], config.continued(job)))
        return
    with locked(args.out), ranks.joined(job.machine.device):
        run(job)


if __name__ == "__main__":
    cli.exit_cleanly(main)
