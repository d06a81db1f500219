"""How good is a model at the task, and how far did it drift? Accuracies, drift, and the report of a run.

    python evaluate.py --out RUN                              a run: Tables 1 to 3, Fig. 2, drift
    python evaluate.py --out RUN --benchmarks mmlu,ifeval     and Table 4: what fine-tuning forgot
    python evaluate.py --out RUN --task musique               its models on another task, into RUN/on_musique
    python evaluate.py --out RUN --test-file F                its models on another test file of one's own
    python evaluate.py --out RUN --show ID                    a training row's way through the three branches
    python evaluate.py --out RUN --audit 200                  the judge against people: see results/audit.py
    python evaluate.py --out RUN --compare-judge M            another judge on the same answers
    python evaluate.py --out F --model M --benchmarks mmlu    a model on its own

A run is the folder that s3ft.py wrote. Added to it are, for the base model and every trained one, test.jsonl
(the answers), test.judged.jsonl (the verdicts) and drift.json. Then come results.json, report.md, figures/.
What is there already is not made again.

Decided here, the paper being silent:
1. Prompt at test time: the base model gets the predict prompt (it is "prompted"), a trained model its train
   prompt. Where the two differ, the base model is measured under the train prompt too. On MBPP every model is
   asked a second time in the way of bigcode-evaluation-harness, with which the paper scores (tasks/mbpp.py).
2. Accuracy comes with Wilson's 95 % interval, a difference to SFT with McNemar's exact test over the same
   test rows.
3. Drift is the mean of KL(base || tuned) over every token of the base model's own greedy responses, to
   general prompts (examples/general.jsonl, 32 tokens at most) and to the first 24 test prompts. It needs no
   benchmark, and tracks forgetting (arXiv 2509.04259).
4. An unreadable verdict of the LLM judge counts as not accepted, and is counted.
"""

import re
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import lora
from answers import LocalModel, check_first_response, judge_answers, other_model, respond
from data import EXAMPLES, Example, Task, prompt
from engine.chat import training_ids
from engine.decoding import Limits
from engine.drift import kl_drift
from engine.fingerprint import fingerprint
from engine.model import load_model, machine_of, peak_memory_gib
from engine.packed import token_log_probs
from engine.server import ServedModel
from results import run_files
from results.audit import audit
from results.config import Machine, loading_of
from results.reading_scores import reading_scores
from results.report import write_benchmark_report, write_report
from results.request import Alone, Evaluation, config_of, read_command_line, zero_shot_in_words
from results.table_4 import merge_benchmarks
from results.training_texts import TrainingTexts, describe
from results.two_judges import compare_judges, judged_pairs, write_comparison
from support import ranks, sandbox
from support.cli import InputError, exit_cleanly, note
from support.costs import CostMeter
from support.files import digest, locked, read_jsonl, write_json
from tasks import mbpp, task_of
from tasks.general import GENERATED, Scored, check_extras, drops_of, score_benchmarks

GENERAL_TOKENS = 32  # of a response to a general prompt, at most
DRIFT_PROMPTS = 24  # test prompts over which drift on the task is measured
TRAIN_PROMPT = "base (train prompt)"  # the base model's second row


# ------------------------------------------------------------------------------ a run


def evaluate_run(evaluation: Evaluation) -> dict:
    """Everything that report.md shows of a run, as one dictionary (results.json)."""
    check_extras(evaluation.benchmarks, Path(evaluation.machine.data))
    run, machine = evaluation.run, evaluation.machine
    config = config_of(evaluation)
    task, (train_rows, validation_rows, test_rows) = task_of(config, machine.data)
    if task.judge == "code":
        sandbox.announce(machine.sandbox, config["numpy"])
    if task.judge != "llm":
        config["judge_model"] = None  # --task may bring a judge that asks no model
    started = time.monotonic()
    model, tokenizer = load_base_model(config, machine)
    loading = time.monotonic() - started
    measure = Measure(model, tokenizer, task, test_rows, evaluation, config)

    # 1. The base model, before an adapter is in it.
    results = {"config": config, "machine": machine_of(model)}
    results |= {"selection": {}, "log_probabilities": None}
    models = results["models"] = {"base": measure.base()}
    if task.train != task.predict:
        models[TRAIN_PROMPT] = measure.answers(task.train, evaluation.folder("base") / "train_prompt", "base")
    if not evaluation.elsewhere:  # on other rows these would say nothing
        keep_unfinished = config["keep_unfinished"]
        results["validation_rows"] = len(validation_rows)
        results["selection"] = run_files.selection_faults(run)
        results["unused"] = run_files.unused_answers(run, keep_unfinished, task.judge == "numeric")
        texts = TrainingTexts(task, train_rows, run, keep_unfinished)
        score = log_prob_function(model, tokenizer, task)
        started = time.monotonic()
        results["log_probabilities"] = texts.figure_2(score)
        results["examples"] = texts.examples(score, results["log_probabilities"])
        scoring = time.monotonic() - started

    # 2. Every trained one.
    names = run_files.trained_methods(run)
    for name in names:
        load_adapter(model, run / name)
        models[name] = measure.trained(name)

    # 3. What they are beside each other, and what they cost.
    folders = {name: evaluation.folder(name) for name in models if name != TRAIN_PROMPT}
    run_files.compare(models, folders, [x.id for x in test_rows])
    earlier = run_files.read_results(evaluation.out)
    add_earlier_scores(models, earlier.get("models", {}), evaluation.out)
    results["notes"] = run_files.read_notes(run, names)
    if not evaluation.elsewhere:
        training = {name: models[name]["training"] for name in names}
        results["costs"] = run_files.read_costs(run, training)
        for stage, seconds in (("load to evaluate", loading), ("Table 1 and Fig. 2", scoring)):
            row = {"stage": stage, "model": "base", "calls": None, "tokens": None}
            results["costs"].append(row | {"seconds": round(seconds, 1)})
        results["elsewhere"] = run_files.read_elsewhere(run)
    results["machine"]["peak_memory_gib"] = peak_memory_gib()
    return run_files.finite(results)


def add_earlier_scores(models: dict[str, dict], earlier: dict[str, dict], folder: Path) -> None:
    """merge_benchmarks, and a line about scores of other weights, which the report loses."""
    left_out = merge_benchmarks(models, earlier)
    if left_out:
        names = ", ".join(left_out)
        note(f"{folder / 'results.json'}: its scores of {names} are of other weights, or do not say of "
             "which: they are left out. Name the benchmarks again to have them")


def load_base_model(config: dict, machine: Machine):
    """(model, tokenizer) of a run, its chat template as it was. InputError: the weights are others now."""
    model, tokenizer = load_model(config["model"], **loading_of(config, machine))
    if config["weights"] not in (None, fingerprint(model)):
        raise InputError(f"{config['model']}: not the weights that the run was begun with; put those back")
    return model, tokenizer


def load_adapter(model, folder: Path) -> None:
    try:
        lora.load(model, folder)
    except ValueError as error:
        raise InputError(str(error)) from None


class Measure:
    """The questions of an evaluation, asked of the base model and then of one trained model after another.

    All of them are the same `model`: an adapter is loaded into it between two calls.
    """

    def __init__(
        self, model, tokenizer, task: Task, test: list[Example], evaluation: Evaluation, config: dict
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.local = LocalModel(model, tokenizer)
        self.judge = LocalModel(model, tokenizer, adapter=False)  # whom the LLM judge asks
        if config["judge_model"]:
            loading = loading_of(config, evaluation.machine)
            self.judge = other_model(config["judge_model"], "--judge-model", **loading)
        self.task = task
        self.test = test
        self.evaluation = evaluation
        self.config = config
        general = read_jsonl(EXAMPLES / "general.jsonl", ("id", "prompt"))
        self.general = {row["id"]: row["prompt"] for row in general}
        self.base_scored = Scored()  # on the general benchmarks
        self.asks_as_bigcode = task.load is mbpp.load_mbpp and task.judge == "code"

    def base(self) -> dict:
        """The base model's row of the report. Drift needs its responses to the general prompts."""
        folder = self.evaluation.folder("base")
        result = self.answers(self.task.predict, folder, "base") | {"weights": fingerprint(self.model)}
        if self.asks_as_bigcode:
            result["bigcode"] = self.bigcode(folder / "bigcode")
        respond(self.local, self.general, folder / "general.jsonl", Limits(GENERAL_TOKENS))
        if self.evaluation.benchmarks:
            self.base_scored = self._score("base")
            result["benchmarks"] = {"scores": self.base_scored.scores}
        return result

    def trained(self, name: str) -> dict:
        """A trained model's row of the report. Its adapter is in the model."""
        evaluation = self.evaluation
        folder = evaluation.folder(name)
        result = self.answers(self.task.train, folder, name) | {"weights": fingerprint(self.model)}
        if self.asks_as_bigcode:
            result["bigcode"] = self.bigcode(folder / "bigcode")
        dialogues = self._base_dialogues()
        result["drift"] = kept_drift(self.model, self.tokenizer, dialogues, folder / "drift.json")
        result["training"] = run_files.read_training(evaluation.run / name)
        if evaluation.benchmarks:
            found = self._score(name)
            result["benchmarks"] = {"scores": found.scores} | drops_of(self.base_scored, found)
        return result

    def answers(self, template: str, folder: Path, name: str) -> dict:
        """Accuracy of the model `name` on the test rows under a prompt, and what was counted.

        `folder` keeps the answers.
        """
        prompts = {x.id: prompt(template, x) for x in self.test}
        limits = Limits(self.task.max_new_tokens, self.task.stop)
        path, responder = folder / "test.jsonl", self._responder(name)
        check_first_response(responder, self.local, prompts, path, limits)
        rows = respond(responder, prompts, path, limits)
        pairs = [(x, rows[x.id]["response"]) for x in self.test]
        verdicts = judge_answers(self.judge, self.task, pairs, folder / "test.judged.jsonl")

        result = run_files.accuracy_of(verdicts, rows)
        result["answered_by"] = responder.name  # None: this process
        result["unreadable_verdicts"] = sum(verdict is None for verdict in verdicts.values())
        if any(x.context for x in self.test):
            result["reading"] = reading_scores(pairs)
        if self.task.metrics:
            result["metrics"] = metric_means(self.task, pairs)
        return result

    def bigcode(self, folder: Path) -> dict:
        """Accuracy on MBPP's test rows in bigcode-evaluation-harness's way, decoded greedily.

        `folder` keeps the continuations.
        """
        prompts = {x.id: mbpp.bigcode_prompt(x) for x in self.test}
        limits = Limits(self.task.max_new_tokens, mbpp.BIGCODE_STOPS)
        local = LocalModel(self.model, self.tokenizer, chat=False)
        rows = respond(local, prompts, folder / "test.jsonl", limits)
        pairs = [(x, mbpp.bigcode_program(x, rows[x.id]["response"])) for x in self.test]
        task = replace(self.task, judge="bigcode")
        verdicts = judge_answers(self.judge, task, pairs, folder / "test.judged.jsonl")
        return run_files.accuracy_of(verdicts, rows)

    def _responder(self, name: str) -> LocalModel | ServedModel:
        """Who answers the test rows: the server of --engine where it has the model, else the model itself."""
        if not self.evaluation.engine:
            return self.local
        weights, template = fingerprint(self.model), self.config["chat_template_kwargs"]
        served = ServedModel.at(self.evaluation.engine, weights, template)
        if name == "base":
            return served
        if served.lists(name):
            return replace(served, name=name)
        folder = self.evaluation.run / name
        note(f"{name}: the server lists no model of this name, so the model answers here (vLLM has it with "
             f"--enable-lora --lora-modules {name}={folder})")
        return self.local

    def _base_dialogues(self) -> dict[str, list[tuple]]:
        """What drift is measured over, of each kind: (user turn, the base model's response, its tokens)."""
        folder = self.evaluation.folder("base")
        prompts = {x.id: prompt(self.task.predict, x) for x in self.test[:DRIFT_PROMPTS]}
        return {
            "general": dialogues_of(self.general, folder / "general.jsonl"),
            "task": dialogues_of(prompts, folder / "test.jsonl"),
        }

    def _score(self, name: str) -> Scored:
        """The model on the general benchmarks. Each document's scores are kept with it."""
        evaluation = self.evaluation
        folder = evaluation.run / name / "benchmarks"
        return scored(self.model, self.tokenizer, evaluation, folder)


def dialogues_of(prompts: dict[str, str], path: Path) -> list[tuple]:
    """Each prompt with its response in `path` and that one's tokens, in the order of the file."""
    dialogues = []
    for row in run_files.read_responses(path):
        if row["id"] in prompts:
            dialogues.append((prompts[row["id"]], row["response"], row.get("tokens")))
    return dialogues


def scored(model, tokenizer, asked: Evaluation | Alone, folder: Path) -> Scored:
    """A model on the general benchmarks that are asked for. Each document's scores are kept in `folder`."""
    local = partial(respond, LocalModel(model, tokenizer))
    data = Path(asked.machine.data)
    return score_benchmarks(model, tokenizer, local, asked.benchmarks, asked.scoring, data, folder)


def metric_means(task: Task, pairs: list[tuple[Example, str]]) -> dict[str, float]:
    """The mean of each of the task's own metrics over (example, response) pairs."""
    means = {}
    for name, metric in task.metrics.items():
        means[name] = sum(metric(x, response) for x, response in pairs) / len(pairs)
    return means


# ------------------------------------------------------------------------------ drift


def kept_drift(model, tokenizer, dialogues: dict[str, list], path: Path) -> dict[str, float]:
    """kl_drift over every kind of dialogues, kept in `path` with a digest of them and of the model."""
    made_of = digest(dialogues, fingerprint(model))
    found = run_files.read_drift(path, dialogues, made_of)
    if found is None:
        found = {}
        with CostMeter(path) as cost:
            for kind, turns in dialogues.items():
                found[kind] = kl_drift(model, tokenizer, turns)
                cost.add(calls=len(ranks.share(turns)))
        write_json(path, {"digest": made_of} | found)
    return found


# ------------------------------------------------------------------------------ log p(y | x)


def log_prob_function(model, tokenizer, task: Task):
    """What Table 1 and Fig. 2 ask: (log p in nats, number of tokens) of each response to x."""

    def score(x: Example, responses: list[tuple[str, list[int] | None]]) -> list[tuple[float, int]]:
        user = prompt(task.predict, x)
        encoded = [training_ids(tokenizer, user, text, tokens) for text, tokens in responses]
        found = []
        for scores in token_log_probs(model, encoded, share_prefix=True):  # the prompt is read once
            found.append((round(sum(scores), 3), len(scores)))
        return found

    return score


def show(evaluation: Evaluation) -> str:
    """The text of `--show ID`: a training row's way through the three branches."""
    config, machine = config_of(evaluation), evaluation.machine
    task, (train_rows, _, _) = task_of(config, machine.data)
    model, tokenizer = load_base_model(config, machine)
    score = log_prob_function(model, tokenizer, task)
    texts = TrainingTexts(task, train_rows, evaluation.run, config["keep_unfinished"])
    return describe(texts.example(evaluation.show, score))


def audit_run(evaluation: Evaluation) -> str:
    """The text of `--audit N`: what to mark, or how well the judge agrees with people."""
    _, (train_rows, _, test_rows) = task_of(config_of(evaluation), evaluation.machine.data)
    return audit(evaluation.run, train_rows, evaluation.audit, test_examples=test_rows)


def judge_again(evaluation: Evaluation) -> str:
    """The text of `--compare-judge M`: how another model's verdicts on the same answers agree."""
    config, machine = config_of(evaluation), evaluation.machine
    task, (train_rows, _, test_rows) = task_of(config, machine.data)
    pairs, own = judged_pairs(evaluation.run, train_rows, test_rows)
    name = evaluation.compare_judge
    judge = other_model(name, "--compare-judge", **loading_of(config, machine))

    folder, file_name = evaluation.run / "judges", re.sub(r"[^\w.-]+", "_", judge.name.rstrip("/"))
    verdicts = judge_answers(judge, replace(task, judge="llm"), pairs, folder / f"{file_name}.judged.jsonl")
    result = compare_judges(evaluation.run, own, verdicts, judge.name)
    return write_comparison(result, folder, file_name)


# ------------------------------------------------------------------------------ a model on its own


def score_model(alone: Alone) -> str:
    """Score a model that belongs to no run -> the text of its report."""
    check_extras(alone.benchmarks, Path(alone.machine.data))
    model, tokenizer = load_model(
        alone.model,
        alone.machine.device,
        alone.dtype,
        alone.machine.trust_remote_code,
        chat=alone.scoring.apply_chat_template or GENERATED in alone.benchmarks,
    )
    if alone.adapter:
        load_adapter(model, alone.adapter)
    scores = scored(model, tokenizer, alone, alone.out).scores

    weights = fingerprint(model)
    models = {alone.model: {"weights": weights, "benchmarks": {"scores": scores}}}
    before = run_files.read_results(alone.out)
    if before.get("benchmarks"):
        earlier = {"weights": before.get("weights"), "benchmarks": {"scores": before["benchmarks"]}}
        add_earlier_scores(models, {alone.model: earlier}, alone.out)
    scores = models[alone.model]["benchmarks"]["scores"]
    results = {
        "model": alone.model,
        "adapter": str(alone.adapter) if alone.adapter else None,
        "weights": weights,
        "machine": machine_of(model),
        "benchmarks": scores,
    }
    write_json(alone.out / "results.json", run_files.finite(results))
    return write_benchmark_report(alone.model, scores, alone.out)


# ------------------------------------------------------------------------------ the command line


def main(argv=None) -> None:
    """A model on its own, or one of the four questions about a run."""
    asked = read_command_line(argv)
    zero_shot = zero_shot_in_words(asked)
    if zero_shot:
        note(zero_shot)
    if isinstance(asked, Alone):
        with locked(asked.out), ranks.joined(asked.machine.device):
            print(score_model(asked))
        return

    config_of(asked)  # refuses what is no run, before a folder is made for it
    with locked(asked.run), ranks.joined(asked.machine.device):
        if asked.audit:
            print(audit_run(asked))
        elif asked.show:
            print(show(asked))
        elif asked.compare_judge:
            print(judge_again(asked))
        else:
            results = evaluate_run(asked)
            if ranks.RANK == 0:
                write_json(asked.out / "results.json", results)
                print(write_report(results, asked.out))


if __name__ == "__main__":
    exit_cleanly(main)
