"""How good is a model at the task, and how far did it drift? Accuracies with intervals, drift, and the report of a run.

    python evaluate.py --out RUN                                     the run's report: Tables 2 and 3, Fig. 2, drift
    python evaluate.py --out RUN --benchmarks mmlu,hellaswag         and Table 4: what fine-tuning made the model forget
    python evaluate.py --out RUN --task musique                      the run's models on another task, into RUN/on_musique
    python evaluate.py --out RUN --audit 200                         the judge against people: see audit.py
    python evaluate.py --out F --model M --benchmarks mmlu           a model on its own

Reads the folder that s3ft.py wrote and adds, for the base model and every trained one, test.jsonl (the answers),
test.judged.jsonl (the verdicts) and drift.json; then results.json, report.md and figures/. Everything is resumed, nothing is
made twice.

Decided here, the paper being silent:
1. Prompt at test time: the base model gets the predict prompt (it is "prompted"), a trained model its train prompt.
2. Accuracy comes with Wilson's 95 % interval, a difference to SFT with McNemar's exact test over the same test rows.
3. Drift is the mean of KL(base || tuned) over every token of the base model's own greedy responses, to general prompts
   (examples/general.jsonl; 32 tokens at most) and to the first 24 test prompts. It needs no benchmark, and tracks forgetting
   (arXiv 2509.04259).
4. An unreadable verdict of the LLM judge counts as not accepted, and is counted.
"""

import argparse
import hashlib
import json
import random
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

import judges
import lora
from answers import Limits, announce_sandbox, judge_answers, respond
from data import EXAMPLES, Example, Task, prompt
from engine.chat import training_ids
from engine.model import load_model, peak_memory_gib, usable_device
from engine.packed import log_probs, split_by_tokens, target_logits
from results.audit import audit
from results.config import read_comparison
from results.reading_scores import reading_scores
from results.report import write_benchmark_report, write_report
from support import ranks
from support.cli import InputError, exit_cleanly, one_line_error, positive_int
from support.files import locked, read_json, read_jsonl, resume_jsonl, write_json
from support.stats import mcnemar, wilson
from tasks import benchmarks, gsm8k, task_of

GENERAL_TOKENS = 32  # of a response to a general prompt, at most


@torch.inference_mode()
def kl_drift(model, tokenizer, dialogues: list[tuple[str, str]]) -> float:
    """Mean over response tokens of KL(base || tuned), in nats; `dialogues` are (user turn, the base model's response)."""
    total, count = 0.0, 0
    for rows in split_by_tokens([training_ids(tokenizer, *dialogue) for dialogue in ranks.share(dialogues)], tokens=2048):
        log_q = F.log_softmax(target_logits(model, rows, share_prefix=True)[0].float(), dim=-1)  # [targets, vocab]
        with lora.disabled(model):
            log_p = F.log_softmax(target_logits(model, rows, share_prefix=True)[0].float(), dim=-1)
        total += F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        count += len(log_p)
    total, count = ranks.totals(total, count)
    return total / count


def log_probabilities(model, tokenizer, task: Task, examples: list[Example], run: Path, most: int = 84) -> dict | None:
    """Fig. 2: log p(y | x) under the base model of accepted responses, accepted paraphrases and golds of the same rows.

    Over at most 84 random rows where both were accepted, as in the paper (so it needs a method that paraphrases every row,
    SDFT). Without such rows, "rows" says so and each kind stands for the rows that have it. None: nothing was accepted.
    """
    kinds = {kind: accepted_responses(run, kind) for kind in ("predictions", "paraphrases")}
    both = [x for x in examples if all(x.id in found for found in kinds.values())]
    either = [x for x in examples if any(x.id in found for found in kinds.values())]
    if not either:
        return None
    chosen = random.Random(0).sample(both or either, min(most, len(both or either)))
    kinds["golds"] = {x.id: task.gold(x) for x in chosen}
    scores = {"rows": "both accepted" if both else "either accepted", "n": len(chosen)} | {kind: [] for kind in kinds}
    for x in chosen:
        here = {kind: texts[x.id] for kind, texts in kinds.items() if x.id in texts}
        rows = [training_ids(tokenizer, prompt(task.predict, x), text) for text in here.values()]
        for kind, score in zip(here, log_probs(model, rows, share_prefix=True), strict=True):  # one prompt, read once
            scores[kind].append(round(score, 3))
    return scores


def accepted_responses(run: Path, kind: str) -> dict[str, str]:
    """id -> response of those that a method may train on: the judge accepts them, and no paraphrase that leaks its prompt."""
    accepted = {row["id"] for row in resume_jsonl(run / f"{kind}.judged.jsonl") if row["accepted"]}
    return {row["id"]: row["response"] for row in resume_jsonl(run / f"{kind}.jsonl")
            if row["id"] in accepted and not (kind == "paraphrases" and judges.leaks(row["response"]))}


def selection_faults(run: Path) -> dict[str, dict[str, int]]:
    """What selection had to count as not accepted, or cut off, among the run's responses to its training rows."""
    return {kind: {"n": len(rows), "length_limit_hit": sum(not row.get("finished", True) for row in rows),
                   "unreadable_verdicts": sum(row["accepted"] is None for row in resume_jsonl(run / f"{kind}.judged.jsonl"))}
            for kind in ("predictions", "paraphrases") if (rows := resume_jsonl(run / f"{kind}.jsonl"))}


def trained_methods(run: Path) -> list[str]:
    """Names of the run's trained models, in the order base, sft, then the others."""
    found = [folder.parent.name for folder in run.glob("*/training.json")]
    return sorted(found, key=lambda name: (name != "sft", name))


def evaluate_run(run: Path, args) -> dict:
    """Everything about the run's models that report.md shows, as one dictionary (results.json)."""
    config = read_config(run)
    if args.task:
        config |= {"trained_on": config["task"], "task": args.task, "files": None, "judge": None, "max_new_tokens": None}
    task, (train, _, test) = task_of(config, args.data)
    announce_sandbox(task, args.sandbox)
    model, tokenizer = load_model(config["model"], args.device, config["dtype"], args.trust_remote_code)
    results = {"config": config, "machine": machine(model), "log_probabilities": None, "selection": {}, "reflect": None,
               "models": {}}
    if not args.task:
        results |= {"selection": selection_faults(run), "reflect": reflect_summary(run)}
        if (run / "predictions.jsonl").exists():
            results["log_probabilities"] = log_probabilities(model, tokenizer, task, train, run)
    folders = {name: model_folder(run, name, args) for name in ["base", *trained_methods(run)]}
    earlier = {} if args.task else earlier_benchmarks(run)
    base_samples = None  # the first model is the base model
    for name, folder in folders.items():
        trained = None
        if name != "base":
            load_adapter(model, run / name)
            trained = read_json(run / name / "training.json")
        results["models"][name] = evaluate_model(model, tokenizer, task, test, folder, folders["base"], trained)
        if config["task"] == "gsm8k":
            results["models"][name]["harness"] = harness_accuracy(folder / "test.jsonl", test)
        if args.benchmarks:
            found, samples = benchmark_run(model, tokenizer, run, name, base_samples, args)
            results["models"][name]["benchmarks"], base_samples = found, base_samples or samples
        elif name in earlier:
            results["models"][name]["benchmarks"] = earlier[name]
    compare(results["models"], folders, test)
    results["machine"]["peak_memory_gib"] = peak_memory_gib()
    return results


def earlier_benchmarks(run: Path) -> dict[str, dict]:
    """Table 4 as an earlier call measured it: a call without --benchmarks must not lose it."""
    models = read_json(run / "results.json")["models"] if (run / "results.json").exists() else {}
    return {name: model["benchmarks"] for name, model in models.items() if "benchmarks" in model}


def model_folder(run: Path, name: str, args) -> Path:
    """Where a model's answers are: with it, and apart from those to another task than it was trained on."""
    return run / name / f"on_{args.task}" if args.task else run / name


def load_adapter(model, folder: Path) -> None:
    try:
        lora.load(model, folder)
    except ValueError as error:
        raise InputError(str(error)) from None


def evaluate_model(model, tokenizer, task: Task, test: list[Example], folder: Path, base: Path, trained: dict | None) -> dict:
    """One model's row of the report, its answers kept in `folder`; `trained` is its training.json, None for the base model."""
    template = task.train if trained else task.predict
    prompts = {x.id: prompt(template, x) for x in test}
    rows = respond(model, tokenizer, prompts, folder / "test.jsonl", Limits(task.max_new_tokens, task.stop))
    pairs = [(x, rows[x.id]["response"]) for x in test]
    verdicts = judge_answers(model, tokenizer, task, pairs, folder / "test.judged.jsonl")
    correct = sum(map(bool, verdicts.values()))
    result = {
        "accuracy": correct / len(test), "interval": wilson(correct, len(test)), "n": len(test),
        "length_limit_hit": sum(not row.get("finished", True) for row in rows.values()),
        "unreadable_verdicts": sum(verdict is None for verdict in verdicts.values()),
    }
    if any(x.context for x in test):
        result["reading"] = reading_scores(pairs)
    general = {row["id"]: row["prompt"] for row in read_jsonl(EXAMPLES / "general.jsonl", ("id", "prompt"))}
    if not trained:
        respond(model, tokenizer, general, base / "general.jsonl", Limits(GENERAL_TOKENS))
        return result
    dialogues = {"general": base_dialogues(base / "general.jsonl", general),
                 "task": base_dialogues(base / "test.jsonl", {x.id: prompt(task.predict, x) for x in test[:24]})}
    return result | {"drift": kept_drift(model, tokenizer, dialogues, folder / "drift.json"), "training": trained}


def kept_drift(model, tokenizer, dialogues: dict[str, list], path: Path) -> dict[str, float]:
    """kl_drift over every kind of dialogues, kept in `path` with a digest of them."""
    digest = hashlib.sha256(json.dumps(dialogues).encode()).hexdigest()[:16]
    kept = read_json(path) if path.exists() else {}
    if kept.get("digest") != digest:
        kept = {"digest": digest} | {kind: kl_drift(model, tokenizer, turns) for kind, turns in dialogues.items()}
        write_json(path, kept)
    return {kind: kept[kind] for kind in dialogues}


def harness_accuracy(path: Path, test: list[Example]) -> dict:
    """GSM8K as lm-evaluation-harness reads it, to be set beside published numbers; the paper's rule is `numeric`."""
    responses = {row["id"]: row["response"] for row in read_jsonl(path)}
    filters = {"strict": gsm8k.gsm8k_strict, "flexible": gsm8k.gsm8k_flexible}
    return {name: sum(gsm8k.gsm8k_match(read(responses[x.id]), x.answer) for x in test) / len(test)
            for name, read in filters.items()}


def base_dialogues(path: Path, prompts: dict[str, str]) -> list[tuple[str, str]]:
    return [(prompts[row["id"]], row["response"]) for row in read_jsonl(path) if row["id"] in prompts]


def reflect_summary(run: Path) -> str | None:
    """What method `reflect` kept, and what of it nobody checked. None: it was not run."""
    if not (run / "reflect.jsonl").exists():
        return None
    rows = read_jsonl(run / "reflect.jsonl")
    emitted = [row for row in rows if row["emitted"]]
    old = [row for row in emitted if row["phase_1"] != "accepted"]
    phases = [sum(row[phase] == "accepted" for row in rows) for phase in ("phase_1", "phase_2")]
    return (f"Selective Reflection-Tuning kept {len(emitted)} of {len(rows)} rows (new question taken: {phases[0]}, new answer "
            f"taken: {phases[1]}). Not checked: {len(emitted) - len(old)} with a new question, for which there is no gold. "
            f"Checked, without effect: of the {len(old)} with their own question the judge accepts "
            f"{sum(row['judged'] is True for row in old)}.")


def compare(models: dict, folders: dict[str, Path], test: list[Example]) -> None:
    """Add each model's paired comparison against SFT."""
    def verdicts(name):
        accepted = {row["id"]: bool(row["accepted"]) for row in read_jsonl(folders[name] / "test.judged.jsonl")}
        return [accepted[x.id] for x in test]

    for name, result in models.items():
        if "sft" in models and name != "sft":
            result["against_sft"] = mcnemar(verdicts(name), verdicts("sft"))


def read_config(run: Path) -> dict:
    return asdict(read_comparison(run))


def machine(model) -> dict:
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if on_gpu else f"{model.device}, {torch.get_num_threads()} threads"
    return {"device": device, "torch": torch.__version__, "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d")}


def score_benchmarks(model, tokenizer, folder: Path, args) -> tuple[dict, list[dict]]:
    """(scores on args.benchmarks (Table 4), each document's), the latter kept in `folder`/samples.jsonl too."""
    scoring = benchmarks.Scoring(args.num_fewshot, args.apply_chat_template, args.add_bos, args.limit, args.sampled)
    return benchmarks.score(model, tokenizer, args.benchmarks, args.data, folder, scoring)


def benchmark_run(model, tokenizer, run: Path, name: str, base_samples: list[dict] | None, args) -> tuple[dict, list[dict]]:
    """One model of a run: its scores, for a trained one also the drop against the base model, and each document's scores."""
    scores, samples = score_benchmarks(model, tokenizer, run / name / "benchmarks", args)
    drop = {"drop": benchmarks.paired_drop(base_samples, samples)} if base_samples else {}
    return {"scores": scores} | drop, samples


def benchmark_model(args) -> None:
    """A model on its own, with or without an adapter: `--model M --benchmarks LIST --out F`."""
    model, tokenizer = load_model(args.model, args.device, args.dtype, args.trust_remote_code, chat=args.apply_chat_template)
    if args.adapter:
        load_adapter(model, args.adapter)
    scores, _ = score_benchmarks(model, tokenizer, args.out, args)
    write_json(args.out / "results.json", {"model": args.model, "adapter": args.adapter and str(args.adapter),
                                           "machine": machine(model), "benchmarks": scores})
    print(write_benchmark_report(args.model, scores, args.out))


def parse(argv=None):
    parser = argparse.ArgumentParser(description="Evaluate a run folder: base model and every trained one.", allow_abbrev=False)
    parser.error = one_line_error
    parser.add_argument("--out", required=True, type=Path, help="the run folder that s3ft.py wrote")
    parser.add_argument("--data", default="data", help="where the data sets are (%(default)s)")
    parser.add_argument("--task", help="measure on this task's test rows instead of the run's own: out of domain")
    parser.add_argument("--audit", type=positive_int, metavar="N",
                        help="draw N judged rows for a person to mark, or read them back")
    general = parser.add_argument_group("general benchmarks (Table 4), scored as lm-evaluation-harness scores them")
    general.add_argument("--benchmarks", type=lambda text: text.split(","), metavar="LIST",
                         help=f"of {','.join(benchmarks.BENCHMARKS)}")
    general.add_argument("--model", help="score this model instead of a run's; --out is then a folder of its own")
    general.add_argument("--adapter", type=Path, metavar="FOLDER", help="with --model: an adapter in PEFT's format")
    general.add_argument("--dtype", choices=("bfloat16", "float32"),
                         help="with --model (default: bfloat16 on cuda, else float32)")
    general.add_argument("--limit", type=positive_int, help="only N documents, the first ones (of MMLU: of each subject)")
    general.add_argument("--sampled", action="store_true", help="with --limit: N at random, the same for every model")
    general.add_argument("--num-fewshot", type=int, choices=range(6), default=0, metavar="K",
                         help="solved MMLU questions shown, 0 to 5 (%(default)s)")
    general.add_argument("--apply-chat-template", action="store_true", help="ask in the model's chat template")
    general.add_argument("--add-bos", action="store_true", help="put one BOS token in front")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--sandbox", choices=("best", "strict"), default="best", help="code judge: see s3ft.py (%(default)s)")
    args = parser.parse_args(argv)
    args.device = usable_device(args.device)
    if not args.model and (args.adapter or args.dtype):
        raise InputError("--adapter and --dtype go with --model; a run's own are in its folder")
    if not args.benchmarks and (args.limit or args.num_fewshot or args.apply_chat_template or args.add_bos):
        raise InputError("--limit, --num-fewshot, --apply-chat-template and --add-bos go with --benchmarks")
    if args.sampled and not args.limit:
        raise InputError("--sampled goes with --limit")
    if args.task == "custom":
        raise InputError("--task custom: only a built-in task can be measured on a run that was trained on another")
    return args


def main(argv=None) -> None:
    args = parse(argv)
    if args.model:
        if not args.benchmarks:
            raise InputError("--model goes with --benchmarks; the models of a run come from its folder")
        with locked(args.out), ranks.joined(args.device):
            return benchmark_model(args)
    config = read_config(args.out)
    with locked(args.out), ranks.joined(args.device):
        if args.audit:
            return print(audit(args.out, task_of(config, args.data)[1][0], args.audit))
        results, out = evaluate_run(args.out, args), args.out / f"on_{args.task}" if args.task else args.out
        if ranks.RANK == 0:
            write_json(out / "results.json", results)
            print(write_report(results, out))


if __name__ == "__main__":
    exit_cleanly(main)
