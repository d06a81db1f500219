"""What a run is about to do: what cannot work, what looks wrong, and the page of --dry-run.

Nothing is generated here, and no weights are loaded.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from answers import Answer
from data import Example, Splits, Task, prompt
from engine.chat import chat_ids, training_ids
from engine.model import context_length, count_weights, load_config, load_tokenizer
from judges import JUDGES, judge_all
from results.config import Job
from results.report import others_in_words
from support import sandbox
from support.cli import InputError
from tasks import task_of

SPLITS = ("training", "validation", "test")
SHOWN = 5  # ids of a fault, at most


@dataclass
class Rehearsal:
    """Stands in for the base model. It accepts nothing, so that a method asks all that it may ask.

    Every prompt is encoded. InputError: one does not fit the model's context of `longest` tokens.
    """

    tokenizer: object
    task: Task
    longest: float
    run: Path  # the run folder
    model: None = None  # is not loaded yet
    responses: int = 0  # that the method asks for
    lengths: list[int] = field(default_factory=list)  # of its training rows with gold, in tokens

    def gold(self, x: Example) -> str:
        user = prompt(self.task.train, x)
        self.check(f"{x.id} (training)", user)
        ids, _ = training_ids(self.tokenizer, user, self.task.gold(x))
        if len(ids) > self.longest:
            raise InputError(
                f"training data with gold, row {x.id}: {len(ids)} tokens, but the model's context holds "
                f"{self.longest}")
        self.lengths.append(len(ids))
        return self.task.gold(x)

    def predict(self, D: list[Example]) -> dict[str, Answer]:
        return self.ask(D, {x.id: prompt(self.task.predict, x) for x in D}, "training")

    def paraphrase(self, D: list[Example]) -> dict[str, Answer]:
        prompts = {x.id: prompt(self.task.paraphrase, x, self.task.gold(x)) for x in D}
        return self.ask(D, prompts, "paraphrase")

    def sample(self, D: list[Example], k: int, sampling=None) -> dict[str, list[Answer]]:
        rejected = self.predict(D)
        self.responses += (k - 1) * len(D)
        return {id: [y] * k for id, y in rejected.items()}

    def ask(self, D: list[Example], prompts: dict[str, str], kind: str, sampling=None) -> dict[str, Answer]:
        for id, user in prompts.items():
            self.check(f"{id} ({kind})", user)
        self.responses += len(prompts)
        return {id: Answer("", accepted=False) for id in prompts}

    def check(self, row: str, user: str) -> None:
        length = len(chat_ids(self.tokenizer, user))
        if length >= self.longest:
            raise InputError(
                f"row {row}: its prompt has {length} tokens, the model's context holds {self.longest}")


def rehearse(method: Callable, job: Job) -> tuple[Task, Splits, object, Rehearsal]:
    """(task, splits, tokenizer, rehearsal): all that is known of a run without the model's weights.

    InputError: a row of training, validation or test does not fit the model's context.
    """
    shared, trusted = job.shared, job.machine.trust_remote_code
    task, splits = task_of(asdict(shared), job.machine.data)
    if shared.judge_model and task.judge != "llm":
        raise InputError(f"--judge-model: the judge of this run is {task.judge}, which asks no model; "
                         "give --judge llm as well, or leave it out")
    if task.judge == "code":
        sandbox.announce(job.machine.sandbox, shared.numpy)
    tokenizer = load_tokenizer(
        shared.model, trusted, chat_template_kwargs=shared.chat_template_kwargs, date=shared.date)
    longest = context_length(load_config(shared.model, trusted))
    rehearsal = Rehearsal(tokenizer, task, longest, job.run)
    for split, rows in zip(SPLITS, splits, strict=True):
        for x in rows:
            rehearsal.check(f"{x.id} ({split})", prompt(task.predict, x))
    for _ in method(splits[0], rehearsal):
        pass
    return task, splits, tokenizer, rehearsal


# ------------------------------------------------------------------------------ what looks wrong


def warnings(task: Task, splits: Splits) -> list[str]:
    """A line for each thing that makes training or its result doubtful. These checks cost seconds."""
    return [*unacceptable_golds(task, splits[0]), *shared_rows(splits)]


def unacceptable_golds(task: Task, D: list[Example]) -> list[str]:
    """Golds that their own judge rejects.

    Whatever the model answers to these rows, only the gold will be trained on.
    """
    if task.judge not in JUDGES:
        return []  # the LLM judge is a model, which is not loaded yet
    pairs = [(x, task.gold(x)) for x in D]
    rejected = []
    for (x, _), accepted in zip(pairs, judge_all(task.judge, pairs), strict=True):
        if not accepted:
            rejected.append(x.id)
    if not rejected:
        return []
    return [f"{len(rejected)} of {len(D)} golds are rejected by their own judge ({task.judge}): "
            f"{first(rejected)}. No answer to these rows can be accepted"]


def shared_rows(splits: Splits) -> list[str]:
    """Rows of training that validation or test have too: an accuracy on them says little."""
    seen = {(x.question, x.context): x.id for x in splits[0]}
    lines = []
    for split, rows in zip(SPLITS[1:], splits[1:], strict=True):
        twice = [x.id for x in rows if (x.question, x.context) in seen]
        if twice:
            lines.append(f"{len(twice)} of {len(rows)} {split} rows are training rows too: {first(twice)}")
    return lines


def first(ids: list[str]) -> str:
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


# ------------------------------------------------------------------------------ how long it will take


def plan(task: Task, splits: Splits, rehearsal: Rehearsal, job: Job) -> list[str]:
    """What will be done, and what it takes, in a few lines."""
    sizes = ", ".join(f"{len(rows)} {split}" for split, rows in zip(SPLITS, splits, strict=True))
    weights = count_weights(job.shared.model, job.machine.trust_remote_code)
    gib = weights * (2 if job.shared.dtype == "bfloat16" else 4) / 2**30
    lines = [
        f"{job.shared.model}: {weights / 1e9:.2f} billion weights, {gib:.1f} GiB in {job.shared.dtype}, on "
        f"{job.machine.device}",
        f"rows: {sizes}; judge: {task.judge}{others_in_words(asdict(job.shared))}",
        f"1. at most {rehearsal.responses} responses of at most {task.max_new_tokens} tokens, with verdicts",
        f"2. training: {settings_in_words(job.recorded())}",
    ]
    if task.note:
        lines.append(task.note)
    if rehearsal.lengths:
        lengths = sorted(rehearsal.lengths)
        median, longest = lengths[len(lengths) // 2], lengths[-1]
        lines.append(f"prompt and gold: {median} tokens (median), {longest} (longest); the model's context "
                     f"holds {rehearsal.longest}")
    if job.machine.device == "cpu":
        lines.append(cpu_hours(rehearsal, job, weights))
    return lines


def cpu_hours(rehearsal: Rehearsal, job: Job, weights: int) -> str:
    """What a run without a GPU will cost, without validation.

    A response is taken to be as long as a gold row. A weight costs 2 operations a token forward, and 4 in a
    LoRA step: frozen weights have no gradient.
    """
    speed = product_rate()
    row = sum(rehearsal.lengths) / len(rehearsal.lengths) if rehearsal.lengths else 256
    tokens = row * (2 * rehearsal.responses + 4 * job.training.steps * job.training.batch_size)
    hours = weights * tokens / speed / 3600
    length = f"{hours:.1f} hours" if hours >= 1 else f"{max(1, 60 * hours):.0f} minutes"
    return (f"no GPU: on this CPU ({speed / 1e9:.0f} GFLOP/s) this will take at most about {length}, without "
            "validation")


def product_rate() -> float:
    """Operations a second of this CPU's matrix products, timed."""
    a = torch.randn(512, 2048)
    started = time.perf_counter()
    for _ in range(8):
        a @ a.T @ a
    return 8 * 4 * 512 * 512 * 2048 / (time.perf_counter() - started)


# ------------------------------------------------------------------------------ the page of --dry-run


def page(method: Callable, job: Job) -> str:
    """What --dry-run says: limits, lengths, what looks wrong, what is there, and three rows as seen."""
    task, splits, tokenizer, rehearsal = rehearse(method, job)
    lines = [*plan(task, splits, rehearsal, job), *warnings(task, splits), *there_already(job.run)]
    for x in splits[0][:3]:
        to_predict = chat_ids(tokenizer, prompt(task.predict, x))
        lines += ["", f"--- row {x.id}, to predict", tokenizer.decode(to_predict)]
        lines += [f"--- row {x.id}, to train on with its gold, bars between its tokens"]
        lines += [marked(tokenizer, task, x)]
    return "\n".join(lines)


def settings_in_words(settings: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def marked(tokenizer, task: Task, x: Example) -> str:
    """A training row as the model sees it, each token of the target between bars."""
    ids, is_target = training_ids(tokenizer, prompt(task.train, x), task.gold(x))
    start = is_target.index(True)
    target = "|".join(tokenizer.decode([token]) for token in ids[start:])
    return f"{tokenizer.decode(ids[:start])}|{target}|"


def there_already(run: Path) -> list[str]:
    found = sorted(path for path in run.rglob("*.jsonl") if path.is_file()) if run.exists() else []
    lines = []
    for path in found:
        lines.append(f"there already: {path} ({path.read_bytes().count(10)} rows)")
    return lines or [f"{run} is empty"]
