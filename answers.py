"""A model's answers and the judge's verdicts on them: what selection, validation and evaluation stand on.

`respond` asks the model (generate.py), `judge_answers` asks the judge (judges.py). Both keep what they got in a file, and what
it holds already, from an earlier run or another engine, is not made again. `validate` does both in the middle of training and
keeps nothing. An unreadable verdict of the LLM judge (8 tokens at most) is None, and counts as rejected.
"""

import dataclasses
import hashlib
import sys
import time
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

import judges
import lora
from data import Example, Task, prompt
from engine.chat import chat_ids, training_ids
from engine.decoding import Sampling
from engine.model import context_length
from engine.packed import log_probs
from generate import generate
from judges import leaks
from support import ranks, sandbox
from support.cli import InputError
from support.files import add_rows, resume_jsonl


def encode_prompts(model, tokenizer, prompts: dict[str, str]) -> list[list[int]]:
    """Token ids of every prompt (id -> user turn); a prompt that fills the model's context is named by its id."""
    encoded = [chat_ids(tokenizer, text) for text in prompts.values()]
    longest = context_length(model)
    for name, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= longest:
            raise InputError(f"row {name}: its prompt has {len(ids)} tokens, the model's context holds {longest}")
    return encoded


def stream_responses(model, tokenizer, prompts: dict[str, str], max_new_tokens: int, stop: str | None, label: str,
                     sampling=None):
    """Responses to `prompts` (id -> user turn) as rows {id, response, finished}, in the order in which they finish."""
    names = list(prompts)
    encoded = encode_prompts(model, tokenizer, prompts)
    tokens, start = 0, time.monotonic()
    with tqdm(total=len(names), desc=label, unit="row", leave=not label.startswith("validation")) as bar:
        for index, response in generate(model, tokenizer, encoded, max_new_tokens, stop, sample=sampling):
            tokens += len(response.tokens)
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s", refresh=False)
            bar.update()
            yield {"id": names[index], "response": response.text, "finished": response.finished}


def respond(model, tokenizer, prompts: dict[str, str], path: Path, max_new_tokens: int, stop: str | None = None,
            sampling=None) -> dict[str, dict]:
    """Responses kept in `path`, id -> row. What the file holds already, from an earlier run or another engine, is used."""

    def make(names):
        part, label = {name: prompts[name] for name in names}, f"{path.parent.name}/{path.stem}"
        keyed = sampling and replace(sampling, keys=names)
        return stream_responses(model, tokenizer, part, max_new_tokens, stop, label, keyed)

    rows = read_responses(path)
    there = {row["id"] for row in rows}
    todo = [name for name in prompts if name not in there]
    rows = add_rows(path, rows, todo, make, lambda rows: sorted_like(rows, prompts))
    by_id = {row["id"]: row for row in rows}
    return {name: by_id[name] for name in prompts}


def sorted_like(rows: list[dict], first) -> list[dict]:
    """Rows by id, the last of each: those of `first` in its order, then the others, which this call was not asked about."""
    by_id = {row["id"]: row for row in rows}
    return [by_id[name] for name in (*first, *(name for name in by_id if name not in first))]


def read_responses(path: Path) -> list[dict]:
    rows, seen = resume_jsonl(path), set()
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("id"), str) or not isinstance(row.get("response"), str):
            raise InputError(f"{path}, row {number}: needs the text fields 'id' and 'response'")
        if row["id"] in seen:
            raise InputError(f"{path}, row {number}: the id {row['id']!r} comes twice")
        seen.add(row["id"])
    return rows


def judge_answers(model, tokenizer, task: Task, rows: list[tuple[Example, str]], path: Path) -> dict[str, bool | None]:
    """The judge's verdict on every (example, response), id -> accepted; None: a verdict that could not be read.

    Kept in `path` with a digest of the response, so that a response that was replaced is judged anew.
    """
    digests = {x.id: hashlib.sha256(response.encode("utf-8", "surrogatepass")).hexdigest()[:16] for x, response in rows}

    def make(part):
        bar = tqdm(part, desc=f"{path.parent.name}/{path.stem}", unit="row")
        for (x, _), accepted in zip(bar, judges.judge_all(task.judge, part, ask_base_model(model, tokenizer)), strict=True):
            yield {"id": x.id, "accepted": accepted, "digest": digests[x.id]}

    verdicts = resume_jsonl(path)
    there = {row["id"] for row in verdicts if row["digest"] == digests.get(row["id"])}
    todo = [(x, response) for x, response in rows if x.id not in there]
    verdicts = add_rows(path, verdicts, todo, make, lambda verdicts: sorted_like(verdicts, digests))
    by_id = {row["id"]: row["accepted"] for row in verdicts}
    return {x.id: by_id[x.id] for x, _ in rows}


def ask_base_model(model, tokenizer):
    """What the LLM judge asks: the base model, also inside a trained one (the paper's NQ judge is the base model)."""

    def ask(prompts: list[str]) -> list[str]:
        encoded = encode_prompts(model, tokenizer, {f"{i} of the LLM judge": text for i, text in enumerate(prompts, 1)})
        with lora.disabled(model):
            replies = dict(generate(model, tokenizer, encoded, max_new_tokens=8))
        return [replies[i].text for i in range(len(prompts))]

    return ask


def announce_sandbox(task: Task, mode: str) -> None:
    """Where programs will be run: say which layers of isolation are in force. "strict" refuses to go below all of them."""
    if task.judge != "code":
        return
    print(sandbox.describe(), file=sys.stderr, flush=True)
    if mode == "strict":
        try:
            sandbox.require_all()
        except RuntimeError as error:
            raise InputError(str(error)) from None


def validate(model, tokenizer, task: Task, examples: list[Example]) -> float:
    """Accuracy of a model in training, by the task's judge; nothing is kept."""
    mine = ranks.share(examples)
    prompts = {x.id: prompt(task.train, x) for x in mine}
    rows = stream_responses(model, tokenizer, prompts, task.max_new_tokens, task.stop, "validation")
    responses = {row["id"]: row["response"] for row in rows}
    pairs = [(x, responses[x.id]) for x in mine]
    correct, = ranks.totals(sum(map(bool, judges.judge_all(task.judge, pairs, ask_base_model(model, tokenizer)))))
    return correct / len(examples)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response and whether the judge accepts it as equivalent to the gold."""

    text: str
    accepted: bool
    log_prob: float = 0.0


SAMPLING = Sampling(temperature=1.0, top_p=0.95)  # of rft


class BaseLM:
    """M_θ0 with a task and its judge. Every response and verdict is kept in the run folder, and never made twice."""

    def __init__(self, model, tokenizer, task: Task, run: Path):
        self.model, self.tokenizer, self.task, self.run = model, tokenizer, task, run

    def gold(self, x: Example) -> str:
        return self.task.gold(x)

    def predict(self, D: list[Example]) -> dict[str, Answer]:
        """ŷ for every x, from the predict prompt (Figs. 4 and 5), greedily."""
        return self._ask(D, {x.id: prompt(self.task.predict, x) for x in D}, "predictions")

    def paraphrase(self, D: list[Example]) -> dict[str, Answer]:
        """ỹ for every (x, y), from the paraphrase prompt (Figs. 6 and 7), greedily."""
        shown = {x.id: prompt(self.task.paraphrase, x, self.gold(x)) for x in D}
        found = self._ask(D, shown, "paraphrases")
        return {id: Answer(y.text, y.accepted and not leaks(y.text)) for id, y in found.items()}

    def sample(self, D: list[Example], k: int, sampling: Sampling = SAMPLING) -> dict[str, list[Answer]]:
        """k samples for every x, with the model's own log p(y | x). Not of --seed: the runs of all seeds share them."""
        rows = [dataclasses.replace(x, id=f"{x.id}#{i}") for x in D for i in range(k)]
        users = {x.id: prompt(self.task.predict, x) for x in rows}
        found = self._ask(rows, users, "samples", sampling)
        scores = log_probs(self.model, [training_ids(self.tokenizer, users[x.id], found[x.id].text) for x in rows])
        scored = [dataclasses.replace(found[x.id], log_prob=score) for x, score in zip(rows, scores, strict=True)]
        return {x.id: scored[i * k : (i + 1) * k] for i, x in enumerate(D)}

    def _ask(self, D, users: dict[str, str], kind: str, sampling=None) -> dict[str, Answer]:
        path, task = self.run / f"{kind}.jsonl", self.task
        rows = respond(self.model, self.tokenizer, users, path, task.max_new_tokens, task.stop, sampling)
        pairs = [(x, rows[x.id]["response"]) for x in D]
        accepted = judge_answers(self.model, self.tokenizer, task, pairs, self.run / f"{kind}.judged.jsonl")
        return {x.id: Answer(response, bool(accepted[x.id])) for x, response in pairs}
