"""What a method may ask: the base model's answers with the judge's verdicts (Algorithm 1, lines 4, 5, 8, 9).

`BaseLM` is M_θ0 with a task and its judge. `respond` asks the model (generate.py), and `judge_answers` asks
the judge (judges.py). Both keep what they got in a file. What the file holds already, from an earlier run or
another engine, is not made again, as long as it answers the same question. `validate` does both in the middle
of training and keeps nothing.

A row of predictions.jsonl, paraphrases.jsonl, samples.jsonl or test.jsonl:

    {"id": "train-0", "response": "... The answer is 72.", "tokens": [9707, ..., 2], "finished": true,
     "digest": "1f0c-..."}

`tokens` are what the model generated, its end of turn included. They are trained on as they are, with an end
of turn where the stop string ended them. Judges and people see the text. `digest` tells what the row answers:
prompt, limits and sampling, and model. A file made elsewhere needs `id` and `response` alone.
"""

import contextlib
import gc
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import judges
import lora
from data import Example, Task, prompt
from engine.chat import chat_ids, end_of_turn, end_tokens, plain_ids, training_ids
from engine.decoding import Limits, PromptTooLong, Response, Sampling
from engine.fingerprint import fingerprint
from engine.model import context_length, load_model
from engine.packed import log_probs
from engine.server import ServedModel, is_url
from generate import generate
from support import numerals, ranks, rouge, sandbox, short_answers
from support.cli import InputError, note
from support.costs import CostMeter
from support.files import RowFile, digest
from support.kept_rows import refuse_other_questions


@dataclass(frozen=True)
class Answer:
    """A response, and whether the judge accepts it as equivalent to the gold."""

    text: str
    accepted: bool
    log_prob: float = 0.0  # log p(y | x) of a sample, in nats
    tokens: tuple[int, ...] | None = None  # what the model generated; None where only the text is known


SAMPLING = Sampling(temperature=1.0, top_p=0.95)  # of sample()
FIRST_TOKENS = 16  # of a served response, that are compared with the model's own
PARTS_OF_A_QUESTION = ("prompt", "limits or sampling", "model")  # of its digest, in this order
JUDGE_LIMITS = Limits(max_new_tokens=8)  # of the LLM judge: room for True or False

# ------------------------------------------------------------------------------ the base model


class BaseLM:
    """M_θ0 with a task and its judge.

    The run folder keeps every response and verdict, so that none is made twice.
    A response that the length limit cut off is not accepted, unless `keep_unfinished` asks for the paper's
    letter.
    """

    def __init__(self, model, tokenizer, task: Task, run: Path, keep_unfinished: bool = False):
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.run = run
        self.keep_unfinished = keep_unfinished
        self.local = LocalModel(model, tokenizer)
        self.responder = self.local  # or a server of the same model
        self.judge = LocalModel(model, tokenizer, adapter=False)  # whom the LLM judge asks; or another model

    def ask_others(self, engine: str | None, judge_model: str | None, weights: str, loading: dict) -> None:
        """Have a server answer in the model's place, whose `weights` it has, or another model judge.

        InputError: the judge cannot be asked.
        """
        if engine:
            self.responder = ServedModel.at(engine, weights, loading["chat_template_kwargs"])
        if judge_model:
            self.judge = other_model(judge_model, "--judge-model", **loading)

    def gold(self, x: Example) -> str:
        return self.task.gold(x)

    def predict(self, D: list[Example]) -> dict[str, Answer]:
        """ŷ for every x, from the predict prompt (Figs. 4 and 5), greedily. id -> Answer."""
        prompts = {x.id: prompt(self.task.predict, x) for x in D}
        return self.ask(D, prompts, "predictions")

    def paraphrase(self, D: list[Example]) -> dict[str, Answer]:
        """ỹ for every (x, y), from the paraphrase prompt (Figs. 6 and 7), greedily.

        One that leaks its prompt is rejected.
        """
        prompts = {x.id: prompt(self.task.paraphrase, x, self.gold(x)) for x in D}
        answers = self.ask(D, prompts, "paraphrases")
        for id, y in answers.items():
            if judges.leaks(y.text):
                answers[id] = replace(y, accepted=False)
        return answers

    def sample(self, D: list[Example], k: int, sampling: Sampling = SAMPLING) -> dict[str, list[Answer]]:
        """k samples of every x, each with its log p(y | x) in nats.

        They do not depend on --seed, so that all seeds share one file.
        """
        rows = [replace(x, id=f"{x.id}#{i}") for x in D for i in range(k)]
        prompts = {x.id: prompt(self.task.predict, x) for x in rows}
        answers = self.ask(rows, prompts, "samples", sampling)

        encoded = []
        for id, y in answers.items():
            encoded.append(training_ids(self.tokenizer, prompts[id], y.text, y.tokens))
        scores = log_probs(self.model, encoded)
        scored = [replace(y, log_prob=score) for y, score in zip(answers.values(), scores, strict=True)]
        return {x.id: scored[i * k : (i + 1) * k] for i, x in enumerate(D)}

    def ask(self, D: list[Example], prompts: dict[str, str], kind: str, sampling=None) -> dict[str, Answer]:
        """Judged answers to prompts (id -> user turn) of any kind, kept in RUN/`kind`.jsonl. id -> Answer."""
        limits = Limits(self.task.max_new_tokens, self.task.stop)
        path = self.run / f"{kind}.jsonl"
        if not sampling:
            check_first_response(self.responder, self.local, prompts, path, limits)
        rows = respond(self.responder, prompts, path, limits, sampling)
        pairs = [(x, rows[x.id]["response"]) for x in D]
        verdicts = judge_answers(self.judge, self.task, pairs, path.with_suffix(".judged.jsonl"))

        answers = {}
        for x in D:
            row = rows[x.id]
            kept = self.keep_unfinished or row.get("finished", True)
            answers[x.id] = Answer(row["response"], bool(verdicts[x.id]) and kept, tokens=self._tokens(row))
        return answers

    def _tokens(self, row: dict) -> tuple[int, ...] | None:
        """What is trained on. Where the stop string ended the response, the end of turn follows it."""
        tokens = row.get("tokens")
        if not tokens:
            return None
        ended = tokens[-1] in end_tokens(self.tokenizer, self.model)
        if row.get("finished", True) and not ended:
            return (*tokens, end_of_turn(self.tokenizer))
        return tuple(tokens)


# ------------------------------------------------------------------------------ who answers


class LocalModel:
    """A loaded model that answers user turns (generate.py).

    Without `adapter` the base model answers, also inside a trained one (A.5). Without `chat` a prompt is a
    text that the model goes on with, and no user turn.
    """

    name = None  # verdicts name a judge that is another model

    def __init__(self, model, tokenizer, adapter: bool = True, chat: bool = True):
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.chat = chat

    def weights(self):
        """Inside this `with` block the model computes with the weights that are asked."""
        return contextlib.nullcontext() if self.adapter else lora.disabled(self.model)

    def identity(self) -> str:
        """16 digits that tell these weights from others."""
        with self.weights():
            return fingerprint(self.model)

    def encode(self, prompts: dict[str, str]) -> dict[str, list[int]]:
        """Token ids `[length]` of every prompt (id -> user turn).

        PromptTooLong: a prompt fills the model's context. It is named by its id.
        """
        longest = context_length(self.model.config)
        encoded = {}
        for id, text in prompts.items():
            ids = chat_ids(self.tokenizer, text) if self.chat else plain_ids(self.tokenizer, text)
            if len(ids) >= longest:
                raise PromptTooLong(
                    id, f"row {id}: its prompt has {len(ids)} tokens, the model's context holds {longest}")
            encoded[id] = ids
        return encoded

    def generate(
        self, encoded: dict[str, list[int]], limits: Limits, sampling: Sampling | None = None
    ) -> Iterator[tuple[str, Response]]:
        """(id, response) of every prompt that `encode` gave, each as soon as it is finished."""
        ids = list(encoded)
        prompts = list(encoded.values())
        end = (limits.max_new_tokens, limits.stop)
        with self.weights():
            made = generate(
                self.model, self.tokenizer, prompts, *end, chat=self.chat, sample=sampling)
            for index, response in made:
                yield ids[index], response

    def release(self) -> None:
        """It stays in memory: it is the model that is trained or evaluated."""


class NamedModel:
    """Another local model, such as a judge or a teacher: in memory from when it is asked until `release`."""

    def __init__(self, name: str, flag: str, **loading):
        """`name` is what `flag` said, and `loading` what load_model takes beside it."""
        self.name = name
        self.flag = flag
        self.loading = loading
        self.local: LocalModel | None = None
        self.known_identity = ""

    def load(self) -> LocalModel:
        if self.local is None:
            try:
                self.local = LocalModel(*load_model(self.name, **self.loading))
            except InputError as error:
                raise InputError(str(error).replace("--model", self.flag, 1)) from None
        return self.local

    def identity(self) -> str:
        """16 digits that tell its weights from others. They are read once."""
        if not self.known_identity:
            self.known_identity = self.load().identity()
        return self.known_identity

    def encode(self, prompts: dict[str, str]) -> dict[str, list[int]]:
        return self.load().encode(prompts)

    def generate(
        self, encoded: dict[str, list[int]], limits: Limits, sampling: Sampling | None = None
    ) -> Iterator[tuple[str, Response]]:
        return self.load().generate(encoded, limits, sampling)

    def release(self) -> None:
        """Give back its memory. It is loaded again when it is asked again."""
        self.local = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def other_model(name: str, flag: str, **loading) -> NamedModel | ServedModel:
    """The model of --judge-model or --teacher: behind a server where the name is an address, else local.

    InputError: its server does not answer. It is said before hours are spent.
    """
    if not is_url(name):
        return NamedModel(name, flag, **loading)
    served = ServedModel.at(name, chat_template_kwargs=loading.get("chat_template_kwargs"))
    served.check()
    return served


# ------------------------------------------------------------------------------ responses


def respond(
    responder, prompts: dict[str, str], path: Path, limits: Limits, sampling: Sampling | None = None
) -> dict[str, dict]:
    """A response to every prompt (id -> user turn), kept in `path`: id -> row.

    What the file holds already is not made again.
    InputError: a row there answers another question (the line says what changed), or is no row of responses.
    """
    encoded = responder.encode(prompts)
    digests = question_digests(responder, encoded, limits, sampling)
    file = RowFile(path)
    refuse_other_questions(file, digests, PARTS_OF_A_QUESTION)
    ids = file.missing(prompts)

    if ids:
        keyed = replace(sampling, keys=ids) if sampling else None
        label = f"{path.parent.name}/{path.stem}"
        missing = {id: encoded[id] for id in ids}
        with CostMeter(path) as cost:
            for id, response in stream_responses(responder, missing, limits, label, keyed):
                file.append(row_of(id, response) | {"digest": digests[id]})
                cost.add(calls=1, tokens=response.length)
    return file.finish(prompts)


def check_first_response(
    served: ServedModel | LocalModel, local: LocalModel, prompts: dict[str, str], path: Path, limits: Limits
) -> None:
    """Have a server make the first response, and say so where it does not begin as the model's own.

    Then the server has other weights, another template or other settings. In bfloat16 it can be a near-tie.
    White space at the start says nothing, since some servers strip it.
    """
    if served is local:
        return
    first = dict(list(prompts.items())[:1])
    for id, row in respond(served, first, path, limits).items():
        if "digest" not in row:
            continue  # made elsewhere, and not by this server
        few = Limits(min(FIRST_TOKENS, limits.max_new_tokens), limits.stop)
        ((_, own),) = local.generate(local.encode(first), few)
        begins = own.text.rstrip("\ufffd").lstrip()  # \ufffd stands for a part of a character
        if not row["response"].lstrip().startswith(begins):
            answered = row["response"][:80]
            note(f"{path}, row {id}: {served.name} at {served.url} answers {answered!r}, the model itself "
                 f"{begins!r}. Has the server the same weights and settings? See docs/scale.md")


def row_of(id: str, response: Response) -> dict:
    """A response as its file keeps it. A served one has no tokens."""
    row = {"id": id, "response": response.text}
    if response.tokens is not None:
        row["tokens"] = response.tokens
    return row | {"finished": response.finished}


def stream_responses(
    responder, encoded: dict, limits: Limits, label: str, sampling: Sampling | None = None
) -> Iterator[tuple[str, Response]]:
    """(id, response) of every encoded prompt, in the order in which they finish, beside a progress bar."""
    tokens, started = 0, time.monotonic()
    with tqdm(total=len(encoded), desc=label, unit="row", leave=not label.startswith("validation")) as bar:
        for id, response in responder.generate(encoded, limits, sampling):
            tokens += response.length
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
            bar.update()
            yield id, response


def question_digests(
    responder, encoded: dict, limits: Limits, sampling: Sampling | None
) -> dict[str, str]:
    """id -> what makes the response, as three digests: those of PARTS_OF_A_QUESTION.

    They are of the encoded prompt, of limits and sampling, and of the model.
    """
    drawn = [sampling.temperature, sampling.top_p, sampling.seed] if sampling else None
    how = digest(limits.max_new_tokens, limits.stop, drawn)[:8]
    who = responder.identity()[:8]
    return {id: f"{digest(asked)[:8]}-{how}-{who}" for id, asked in encoded.items()}


# ------------------------------------------------------------------------------ verdicts


def judge_answers(
    judge, task: Task, pairs: list[tuple[Example, str]], path: Path
) -> dict[str, bool | None]:
    """The verdict of the task's judge on every (example, response): id -> accepted.

    The LLM judge asks the model `judge`. None stands for a verdict that could not be read.
    Kept in `path` with a digest of response, gold, tests and judge. A verdict on anything else is made anew.
    InputError: the file is not ours, or the LLM judge's first replies are no verdicts.
    """
    made_by = judge_digest(judge, task.judge)
    digests = {}
    for x, response in pairs:
        gold = [x.question, x.answer, list(x.aliases), x.unanswerable, list(x.tests), x.setup]
        digests[x.id] = digest(response, gold, made_by)

    file = RowFile(path)
    stale = [id for id, row in file.rows.items() if id in digests and row.get("digest") != digests[id]]
    for id in stale:
        del file.rows[id]
    if stale:
        note(f"{path}: {len(stale)} verdicts were on other responses, golds or tests, or by another judge: "
             "they are made anew")
    ids = set(file.missing(digests))
    todo = [(x, response) for x, response in pairs if x.id in ids]

    if todo:
        bar = tqdm(todo, desc=f"{path.parent.name}/{path.stem}", unit="row")
        named = {"judge": judge.name or "base"} if task.judge == "llm" else {}
        with CostMeter(path) as cost:
            verdicts = judges.judge_all(task.judge, todo, replies_of(judge, cost))
            for (x, _), accepted in zip(bar, verdicts, strict=True):
                file.append({"id": x.id, "accepted": accepted, "digest": digests[x.id]} | named)
                cost.add(calls=1)
    judge.release()
    return {id: row["accepted"] for id, row in file.finish(digests).items()}


def judge_digest(judge, name: str) -> str:
    """What a judge is: its prompt and its model, or the source of its function and of what that uses."""
    if name == "llm":
        return digest(judges.LLM_JUDGE, judge.identity())
    module = inspect.getmodule(judges.judge_named(name))
    sources = [inspect.getsource(part) for part in (module, numerals, rouge, sandbox, short_answers)]
    return digest(name, sources, sandbox.numpy_parent != "")


def selection_digest(base: BaseLM, method) -> str:
    """What D' is made by: the method's source, the task's prompts and gold, and the judge.

    A judge that is another model is loaded for it, and so is known to work before hours are spent.
    """
    task = base.task
    function = getattr(method, "func", method)  # of a functools.partial
    sources = [inspect.getsource(function), inspect.getsource(task.gold)]
    templates = [task.predict, task.train, task.paraphrase]
    judge = judge_digest(base.judge, task.judge)
    base.judge.release()
    return digest(sources, templates, judge, base.keep_unfinished)


def replies_of(judge, cost: CostMeter | None = None):
    """What the LLM judge asks: a function that gives a list of replies of a model for a list of prompts.

    A prompt that does not fit the judge's context gets the reply "", which holds no verdict.
    """

    def ask(prompts: list[str]) -> list[str]:
        replies = {f"{i} of the LLM judge": "" for i in range(1, len(prompts) + 1)}
        waiting = dict(zip(replies, prompts, strict=True))
        while waiting:
            try:
                for id, reply in judge.generate(judge.encode(waiting), JUDGE_LIMITS):
                    del waiting[id]
                    replies[id] = reply.text
                    if cost:
                        cost.add(tokens=reply.length)
            except PromptTooLong as error:
                note(f"{error}: no verdict")
                del waiting[error.id]
        return list(replies.values())

    return ask


def validate(model, tokenizer, task: Task, examples: list[Example], judge) -> float:
    """Accuracy of a model in training, by the task's judge. Nothing is kept."""
    mine = ranks.share(examples)
    trained = LocalModel(model, tokenizer)
    encoded = trained.encode({x.id: prompt(task.train, x) for x in mine})
    limits = Limits(task.max_new_tokens, task.stop)
    responses = dict(stream_responses(trained, encoded, limits, "validation"))
    pairs = [(x, responses[x.id].text) for x in mine]
    verdicts = list(judges.judge_all(task.judge, pairs, replies_of(judge)))
    judge.release()
    (correct,) = ranks.totals(verdicts.count(True))
    return correct / len(examples)
