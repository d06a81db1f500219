"""IFD and r-IFD, the scores of Selective Reflection-Tuning (Li et al., 2402.10110).

ppl(y | x) is the perplexity of y after x under the student. IFD(x, y) = ppl(y | x) / ppl(y) says how little
the instruction x helps to predict the answer y. r-IFD(x, y) = ppl(x | y') / ppl(x) says how little the answer
helps to guess the instruction, where the turn y' shows the answer and asks for the instruction. At 1 or above
the two do not belong together.

A text on its own is scored after the tokenizer's BOS (or EOS, where it has none), so that both perplexities
of a ratio are over the same tokens. The end of turn is no part of a text.
"""

import argparse
import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

from data import Example, fill
from engine.chat import chat_ids
from engine.model import context_length, load_model
from engine.packed import Row, token_log_probs
from results.markdown import markdown_table
from support.cli import InputError, one_line_error
from support.files import read_jsonl, write_jsonl

Scores = dict[str, dict[str, float]]  # id -> {"ifd": ..., "r_ifd": ...}


def perplexity(log_probs: Sequence[float]) -> float:
    """ppl(y | x) = exp(-1/T Σ_t log p(y_t | x, y_<t)), from the log p of y's T tokens, in nats."""
    return math.exp(-fmean(log_probs))


def ifd(y_given_x: Sequence[float], y_alone: Sequence[float]) -> float:
    """Instruction-Following Difficulty. Near 1: x hardly helps to predict y."""
    return perplexity(y_given_x) / perplexity(y_alone)


def r_ifd(x_given_y: Sequence[float], x_alone: Sequence[float]) -> float:
    """Reversed IFD. It is low where y fits x, and hardly any other instruction."""
    return perplexity(x_given_y) / perplexity(x_alone)


GUESS = """\
Here is an answer that somebody gave to an instruction:

{{answer}}

Guess the instruction. Reply with the instruction alone."""  # y'


class ScoredPair(NamedTuple):
    """A user turn, the question in it, and the answer."""

    user: str
    question: str
    answer: str


def scoring_rows(tokenizer, pair: ScoredPair) -> list[Row]:
    """(ids, is_target) of y | x, y, x | y' and x, in this order."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    user = chat_ids(tokenizer, pair.user)
    guess = chat_ids(tokenizer, fill(GUESS, answer=pair.answer))
    texts = [(user, pair.answer), ([first], pair.answer), (guess, pair.question), ([first], pair.question)]
    rows = []
    for before, text in texts:
        target = tokenizer.encode(text, add_special_tokens=False)
        rows.append((before + target, [False] * len(before) + [True] * len(target)))
    return rows


def score(model, tokenizer, pairs: dict[str, ScoredPair], label: str = "scores") -> Scores:
    """Both scores of every pair that fits the model's context. The others have no entry."""
    longest = context_length(model.config)
    fitting, rows = [], []
    for id, pair in pairs.items():
        four_rows = scoring_rows(tokenizer, pair)
        if max(len(ids) for ids, _ in four_rows) <= longest:
            fitting.append(id)
            rows += four_rows

    log_probs = iter(tqdm(token_log_probs(model, rows), desc=label, total=len(rows), unit="sequence"))
    scores = {}
    for id in fitting:
        y_given_x, y_alone, x_given_y, x_alone = islice(log_probs, 4)
        scores[id] = {"ifd": ifd(y_given_x, y_alone), "r_ifd": r_ifd(x_given_y, x_alone)}
    return scores


def score_all(model, tokenizer, pairs: dict[str, ScoredPair], where: str, label: str = "scores") -> Scores:
    """As `score`. InputError: a pair has an empty text or does not fit. `where` says whose rows they are."""
    for id, pair in pairs.items():
        for field in ("question", "answer"):
            if not getattr(pair, field).strip():
                raise InputError(f"{where}, row {id}: the field {field!r} is empty, so there is nothing to "
                                 "score")
    scores = score(model, tokenizer, pairs, label)
    for id in pairs:
        if id not in scores:
            raise InputError(f"{where}, row {id}: question and answer are longer than the model's context")
    return scores


def as_instruction(x: Example) -> str:
    """Question, context and tests, as the teacher sees them and as a scored file's user turn has them."""
    text = x.question
    if x.context:
        text += f"\n\nContext:\n{x.context}"
    if x.tests:
        text += "\n\nThe code should pass these tests:\n" + "\n".join(x.tests)
    return text


def score_file(path: Path, model_name: str, out: Path, device: str | None, dtype: str | None) -> None:
    """Write every row of a JSONL file again, with its IFD and r-IFD."""
    rows = read_jsonl(path, ("question", "answer"))
    pairs = {}
    for number, row in enumerate(rows, 1):
        for field in ("question", "answer", "context"):
            if not isinstance(row.get(field, ""), str):
                raise InputError(f"{path}, row {number}: the field {field!r} must be text")
        x = Example(str(number), row["question"], row["answer"], row.get("context", ""))
        pairs[x.id] = ScoredPair(as_instruction(x), x.question, x.answer)

    model, tokenizer = load_model(model_name, device, dtype)
    scores = score_all(model, tokenizer, pairs, str(path))
    write_jsonl(out, [row | scores[str(number)] for number, row in enumerate(rows, 1)])
    easy = sum(found["ifd"] < 1 for found in scores.values())
    print(f"{out}: {len(rows)} rows, {easy} with IFD below 1")


def score_command(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="IFD and r-IFD of any rows.", allow_abbrev=False)
    parser.error = one_line_error  # one line, without the usage
    parser.add_argument("--score", required=True, type=Path, metavar="FILE",
                        help="JSONL rows: question, answer (and context)")
    parser.add_argument("--model", required=True, help="the student: Hugging Face name or folder")
    parser.add_argument("--out", required=True, type=Path, metavar="F", help="the rows with ifd and r_ifd")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="(bfloat16 on cuda, else float32)")
    args = parser.parse_args(argv)
    score_file(args.score, args.model, args.out, args.device, args.dtype)


# --------------------------------------------------------------------------------------- histograms

BINS = {  # of a histogram: what its scores are below, and its name
    0.25: "below 0.25",
    0.5: "0.25 to 0.5",
    0.75: "0.5 to 0.75",
    1.0: "0.75 to 1",
    math.inf: "1 and more",
}


def histograms(trace: list[dict]) -> str:
    """How many rows have an IFD and an r-IFD of each size, by what became of them, as a table.

    The scores are of the row's last question and answer.
    """
    outcomes = {
        "trained on": [row for row in trace if row["emitted"]],
        "new answer, not selected": [
            row for row in trace if row["phase_2"] == "accepted" and not row["emitted"]],
        "no new answer": [row for row in trace if row["phase_2"] != "accepted"],
    }
    rows = []
    for score_name, label in (("ifd", "IFD"), ("r_ifd", "r-IFD")):
        for outcome, members in outcomes.items():
            counts = [0] * len(BINS)
            for row in members:
                counts[bin_of(last_scores(row)[score_name])] += 1
            rows.append([label, outcome, *map(str, counts)])
    return markdown_table(["score", "rows", *BINS.values()], rows)


def last_scores(row: dict) -> dict[str, float]:
    """The scores of what a row ended as."""
    for phase in ("phase_2", "phase_1"):
        if row[phase] == "accepted":
            return row["scores"][phase]
    return row["scores"]["original"]


def bin_of(value: float) -> int:
    """The number of the histogram's column in which a score falls. An infinite one falls in the last."""
    for number, upper in enumerate(BINS):
        if value < upper:
            return number
    return len(BINS) - 1
