"""Selective Reflection-Tuning (Li et al., 2402.10110): a teacher rewrites each row, the student's own scores say what to keep.

    python -m examples.reflect --task T --method reflect --teacher NAME_OR_FOLDER --out RUN      a method like the others
    python -m examples.reflect --score FILE --model M --out F      both scores for any (question, answer) rows

The student is the base model, and so is the teacher where --teacher names no other. Phase 1: the teacher criticises a pair
(x, y) and writes a new instruction with a new answer; they stay iff their IFD is higher, that is, iff the student needs the
instruction less than before to see the answer coming. Phase 2: it writes a better answer to what phase 1 left; that stays iff
its r-IFD is lower, that is, iff the instruction is easier to guess from it. D' gets the rows whose answer phase 2 replaced and
whose two scores are below 1; the others are dropped.

The run folder keeps the teacher's replies (reflect_instructions.jsonl and reflect_responses.jsonl, with a .retry.jsonl each),
so that nothing is generated twice, and reflect.jsonl: every row, dropped or not, with its phases and scores.

Covered: any task. A row with tests (code) keeps its question and skips phase 1, since the tests would not fit another one; the
teacher is shown them. Not covered: a check of the new answers by the task's judge where the question is a new one, since there
is no gold for it. Where the question stayed, the judge is asked, for the report only: it selects nothing.

Where we deviate from the authors' code, or they are silent:
1. The teacher is a local chat model, decoding greedily; theirs is gpt-3.5-turbo at temperature 0. The prompts are our words.
2. x in IFD is the user turn that training will show (the task's train prompt around the question); x in r-IFD is the question.
3. A text on its own is scored after the tokenizer's BOS (or EOS, where it has none), so that both perplexities of a ratio
   are over the same tokens. The end of turn is no part of a text.
4. Where a field is missing, the teacher is asked once more, with a reminder. Where one is empty, "N/A" or the placeholder of
   the prompt, the pair stays as it is: a new instruction is never paired with the old answer.
5. A rewrite that does not fit the student's context is rejected. Nothing scores 0 because it could not be scored.
"""

import argparse
import gc
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

import s3ft
from answers import Limits, judge_answers, respond
from data import Example, fill, prompt
from engine.chat import chat_ids
from engine.model import context_length, load_model
from engine.packed import Row, token_log_probs
from support.cli import InputError, exit_cleanly, one_line_error
from support.files import read_json, read_jsonl, resume_jsonl, write_json, write_jsonl


def perplexity(log_probs: Sequence[float]) -> float:
    """ppl(y | x) = exp(-1/T Σ_t log p(y_t | x, y_<t)), from the T log-probabilities of y's tokens, in nats."""
    return math.exp(-fmean(log_probs))


def ifd(y_given_x: Sequence[float], y_alone: Sequence[float]) -> float:
    """Instruction-Following Difficulty: IFD(x, y) = ppl(y | x) / ppl(y). Near 1: x hardly helps to predict y."""
    return perplexity(y_given_x) / perplexity(y_alone)


def r_ifd(x_given_y: Sequence[float], x_alone: Sequence[float]) -> float:
    """Reversed IFD: r-IFD(x, y) = ppl(x | y') / ppl(x), y' asking which instruction y answers. Low: y fits x, and only x."""
    return perplexity(x_given_y) / perplexity(x_alone)


GUESS = """\
Here is an answer that somebody gave to an instruction:

{{answer}}

Guess the instruction. Reply with the instruction alone."""  # y'


class Pair(NamedTuple):
    """What is scored: a user turn, the question in it, and the answer."""

    user: str
    question: str
    answer: str


def scoring_rows(tokenizer, pair: Pair) -> list[Row]:
    """(ids, is_target) of y | x, y, x | y' and x, in this order."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    guess = chat_ids(tokenizer, fill(GUESS, answer=pair.answer))
    rows = []
    for before, text in ((chat_ids(tokenizer, pair.user), pair.answer), ([first], pair.answer),
                         (guess, pair.question), ([first], pair.question)):
        target = tokenizer.encode(text, add_special_tokens=False)
        rows.append((before + target, [False] * len(before) + [True] * len(target)))
    return rows


def score(model, tokenizer, pairs: dict[str, Pair], label: str = "scores") -> dict[str, dict[str, float]]:
    """id -> {"ifd", "r_ifd"} of every pair that fits the model's context; the others are not in the answer."""
    longest = context_length(model.config)
    rows = {name: scoring_rows(tokenizer, pair) for name, pair in pairs.items()}
    rows = {name: four for name, four in rows.items() if max(len(ids) for ids, _ in four) <= longest}
    logs = token_log_probs(model, [row for four in rows.values() for row in four])
    logs = iter(tqdm(logs, desc=label, total=4 * len(rows), unit="sequence"))
    return {name: {"ifd": ifd(next(logs), next(logs)), "r_ifd": r_ifd(next(logs), next(logs))} for name in rows}


def score_all(model, tokenizer, pairs: dict[str, Pair], where: str, label: str = "scores") -> dict[str, dict[str, float]]:
    """As `score`. InputError: a pair has an empty text, or does not fit; `where` tells whose rows they are."""
    for name, pair in pairs.items():
        for field in ("question", "answer"):
            if not getattr(pair, field).strip():
                raise InputError(f"{where}, row {name}: the field {field!r} is empty, so there is nothing to score")
    found = score(model, tokenizer, pairs, label)
    for name in pairs:
        if name not in found:
            raise InputError(f"{where}, row {name}: question and answer are longer than the model's context")
    return found


REWRITE_BOTH = """\
Below are an instruction and an answer to it. Your task is to make both better.

### Instruction
{{instruction}}

### Answer
{{answer}}

1. Criticise the instruction: how complex is its topic, how detailed is it, how much knowledge does it take, is it ambiguous, \
does it take reasoning?
2. Criticise the answer: is it helpful, relevant, accurate, detailed?
3. Write a better instruction on the same subject that can be answered as it stands; a context, if there is one, stays as it \
is and is not repeated. Then write a full answer to it. If the answer above ends in a fixed form, keep that form.

Write the result of step 3 exactly so:
[New Instruction] the new instruction [End]
[New Answer] the new answer [End]"""
REWRITE_ANSWER = """\
Below are an instruction and an answer to it. Your task is to make the answer better.

### Instruction
{{instruction}}

### Answer
{{answer}}

1. Criticise the answer: is it helpful, relevant, accurate, detailed?
2. Write a better answer to the same instruction. If the answer above ends in a fixed form, keep that form.

Write the result of step 2 exactly so:
[Better Answer] the better answer [End]"""
REMINDER = "\n\nYour last reply was not in this form. Leave out the criticism and write only {{tags}}."
TAGS = {REWRITE_BOTH: ("New Instruction", "New Answer"), REWRITE_ANSWER: ("Better Answer",)}
ANY_TAG = r"\[(?:New Instruction|New Answer|Better Answer|End)\]"
NOTHING = {"", "n/a", "na", "none", "the new instruction", "the new answer", "the better answer"}  # as good as left out
REPLY_TOKENS = 1024  # of a teacher's reply, at most


def parse_fields(reply: str, tags: tuple[str, ...]) -> list[str] | None:
    """The texts between [Tag] and [End], the last of each tag. None: one is missing; []: one says nothing."""
    found = [re.findall(rf"\[{tag}\]((?:(?!{ANY_TAG}).)*)\[End\]", reply, re.DOTALL | re.IGNORECASE) for tag in tags]
    if not all(found):
        return None
    texts = [texts[-1].strip() for texts in found]
    return [] if any(text.lower().strip("[]<>{}().\"' ") in NOTHING for text in texts) else texts


class Teacher:
    """Who rewrites: the base model, or another one that is loaded when first asked. Replies are kept in the run folder."""

    def __init__(self, base):
        self.base, self.other = base, None
        name, path = {"teacher": base.teacher or "the base model"}, base.run / "reflect_teacher.json"
        if not path.exists():
            write_json(path, name)
        elif read_json(path) != name:
            raise InputError(f"--teacher: the rewrites in {base.run} were made by {read_json(path)['teacher']}, "
                             f"not by {name['teacher']}: give that one again, or another --out")

    def ask(self, prompts: dict[str, str], kind: str) -> dict[str, str]:
        path = self.base.run / f"{kind}.jsonl"
        if self.base.teacher and not self.other and prompts.keys() - {row["id"] for row in resume_jsonl(path)}:
            self.other = self.load()
        model, tokenizer = self.other or (self.base.model, self.base.tokenizer)
        return {name: row["response"] for name, row in respond(model, tokenizer, prompts, path, Limits(REPLY_TOKENS)).items()}

    def load(self):
        base, dtype = self.base, str(self.base.model.dtype).removeprefix("torch.")
        try:
            return load_model(base.teacher, str(base.model.device), dtype, base.trust_remote_code)
        except InputError as error:
            raise InputError(str(error).replace("--model", "--teacher", 1)) from None

    def rewrite(self, pairs: dict[str, tuple[Example, str]], template: str, kind: str) -> dict[str, list[str]]:
        """id -> the new texts, for every pair that the teacher rewrote."""
        prompts = {name: fill(template, instruction=shown(x), answer=y) for name, (x, y) in pairs.items()}
        tags = TAGS[template]
        found = {name: parse_fields(reply, tags) for name, reply in self.ask(prompts, kind).items()}
        reminder = fill(REMINDER, tags=" and ".join(f"[{tag}] ... [End]" for tag in tags))
        again = {name: prompts[name] + reminder for name, texts in found.items() if texts is None}
        if again:
            found |= {name: parse_fields(reply, tags) for name, reply in self.ask(again, f"{kind}.retry").items()}
        return {name: texts for name, texts in found.items() if texts}


def shown(x: Example) -> str:
    """An instruction as the teacher, or a scored file's user turn, shows it."""
    context = f"\n\nContext:\n{x.context}" if x.context else ""
    tests = "\n".join(["\n\nThe code should pass these tests:", *x.tests]) if x.tests else ""
    return x.question + context + tests


def reflect(D, base):
    """Selective Reflection-Tuning: yields (x with its new question, new answer, "reflection", what its phases said)."""
    golds = pairs = {x.id: (x, base.gold(x)) for x in D}
    teacher = Teacher(base)
    original = current = score_all(base.model, base.tokenizer, scored_pairs(base, pairs), "reflect", "original/scores")

    free = {name: (x, y) for name, (x, y) in pairs.items() if not x.tests}  # tests hold for their own question only
    rewritten = {name: (replace(pairs[name][0], question=question), answer) for name, (question, answer) in
                 teacher.rewrite(free, REWRITE_BOTH, "reflect_instructions").items()}
    first = score(base.model, base.tokenizer, scored_pairs(base, rewritten), "phase 1/scores")
    kept = {name for name in first if first[name]["ifd"] > current[name]["ifd"]}  # IFD(x', y') > IFD(x, y)
    pairs = pairs | {name: rewritten[name] for name in kept}
    current = current | {name: first[name] for name in kept}

    better = {name: (pairs[name][0], answer) for name, (answer,) in
              teacher.rewrite(pairs, REWRITE_ANSWER, "reflect_responses").items()}
    second = score(base.model, base.tokenizer, scored_pairs(base, better), "phase 2/scores")
    accepted = {name for name in second if second[name]["r_ifd"] < current[name]["r_ifd"]}  # r-IFD(x', y'') < r-IFD(x', y')
    emitted = {name for name in accepted if second[name]["ifd"] < 1 and second[name]["r_ifd"] < 1}
    del teacher  # and with it the other model, where there is one
    gc.collect()

    verdicts = check_unchanged(base, {name: better[name] for name in emitted if name not in kept})
    traces = {x.id: {"phase_1": "skipped: the row has tests" if x.tests else outcome(x.id, rewritten, first, kept),
                     "phase_2": outcome(x.id, better, second, accepted),
                     "emitted": x.id in emitted, "judged": verdicts.get(x.id), "scores": {
                         "original": original[x.id], "phase_1": first.get(x.id), "phase_2": second.get(x.id)}} for x in D}
    final = pairs | {name: better[name] for name in accepted}
    write_jsonl(base.run / "reflect.jsonl", [{"id": name, "question": x.question, "response": y, "gold": golds[name][1],
                                              **traces[name]} for name, (x, y) in final.items()])
    for x in D:
        if x.id in emitted:
            yield *better[x.id], "reflection", traces[x.id]


def scored_pairs(base, pairs: dict[str, tuple[Example, str]]) -> dict[str, Pair]:
    return {name: Pair(prompt(base.task.train, x), x.question, y) for name, (x, y) in pairs.items()}


def outcome(name: str, rewritten: dict, scores: dict, kept: set[str]) -> str:
    if name not in rewritten:
        return "no rewrite"
    return "too long" if name not in scores else "accepted" if name in kept else "rejected"


def check_unchanged(base, pairs: dict[str, tuple[Example, str]]) -> dict[str, bool | None]:
    """The judge's verdict on new answers to old questions. It selects nothing; None: a verdict that could not be read."""
    return judge_answers(base.model, base.tokenizer, base.task, list(pairs.values()), base.run / "reflect.judged.jsonl")


def score_file(args) -> None:
    """Write every row of a JSONL file with its IFD and r-IFD."""
    rows, pairs = read_jsonl(args.score, ("question", "answer")), {}
    for number, row in enumerate(rows, 1):
        for field in ("question", "answer", "context"):
            if not isinstance(row.get(field, ""), str):
                raise InputError(f"{args.score}, row {number}: the field {field!r} must be text")
        x = Example(str(number), row["question"], row["answer"], row.get("context", ""))
        pairs[x.id] = Pair(shown(x), x.question, x.answer)
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    scores = score_all(model, tokenizer, pairs, str(args.score))
    write_jsonl(args.out, [row | scores[str(number)] for number, row in enumerate(rows, 1)])
    easy = sum(value["ifd"] < 1 for value in scores.values())
    print(f"{args.out}: {len(rows)} rows, {easy} with IFD below 1")


def main(argv=None) -> None:
    """With --score a file is scored. Without it, a run of s3ft.py with one more method."""
    argv = sys.argv[1:] if argv is None else argv
    if not any(flag.startswith("--score") for flag in argv):
        s3ft.METHODS["reflect"] = reflect
        return s3ft.main(argv)
    parser = argparse.ArgumentParser(description="IFD and r-IFD of (question, answer) rows.", allow_abbrev=False)
    parser.error = one_line_error  # one line, without the usage
    parser.add_argument("--score", required=True, type=Path, metavar="FILE", help="JSONL rows: question, answer (and context)")
    parser.add_argument("--model", required=True, help="the student: Hugging Face name or folder")
    parser.add_argument("--out", required=True, type=Path, metavar="F", help="the rows again, with ifd and r_ifd")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="(default: bfloat16 on cuda, else float32)")
    score_file(parser.parse_args(argv))


if __name__ == "__main__":
    exit_cleanly(main)
