"""The general benchmarks of Table 4: those that score options, and IFEval, whose prompts are answered."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from engine.decoding import Limits
from support import ranks
from tasks import benchmarks, ifeval
from tasks.benchmarks import BENCHMARKS, Scoring

SHOWS_SHOTS = "mmlu"  # the benchmark whose questions can stand below solved ones
GENERATED = "ifeval"  # the benchmark whose prompts are answered, as a user turn
NAMES = (*BENCHMARKS, GENERATED)

Respond = Callable[[dict[str, str], Path, Limits], dict[str, dict]]  # answers.respond of a model


@dataclass
class Scored:
    """A model on the general benchmarks."""

    scores: dict[str, dict] = field(default_factory=dict)  # by benchmark, each with how it was asked for
    samples: list[dict] = field(default_factory=list)  # every document of those that score options
    grades: list[dict] = field(default_factory=list)  # every prompt of IFEval


def scoring_of(scoring: Scoring, name: str) -> Scoring:
    """How a benchmark is asked: MMLU alone heeds --num-fewshot, and IFEval always has the chat template."""
    if name == SHOWS_SHOTS:
        return replace(scoring, max_new_tokens=None)
    if name == GENERATED:
        return replace(scoring, num_fewshot=0, apply_chat_template=True, add_bos=False)
    return replace(scoring, num_fewshot=0, max_new_tokens=None)


def score_benchmarks(
    model, tokenizer, respond: Respond, names: tuple[str, ...], scoring: Scoring, data: Path, folder: Path
) -> Scored:
    """Ask a model the general benchmarks. What is in `folder` already is not asked again."""
    result = Scored()
    for name in names:
        how = scoring_of(scoring, name)
        if name == GENERATED:
            result.grades = grade_ifeval(respond, how, data, folder)
            score = ifeval.summary(result.grades)
        else:
            scores, samples = benchmarks.score(model, tokenizer, [name], data, folder, how)
            score = scores[name]
            result.samples += samples
        result.scores[name] = score | {"settings": how.settings()}
    return result


def grade_ifeval(respond: Respond, scoring: Scoring, data: Path, folder: Path) -> list[dict]:
    """IFEval's grades, from responses that `folder` keeps, those of another token limit in another file."""
    checkers = ifeval.load_checkers(data)
    rows = ifeval.rows(data, scoring.limit, scoring.sampled)
    prompts = {str(row["key"]): row["prompt"] for row in rows}
    limits = Limits(scoring.max_new_tokens or ifeval.MAX_NEW_TOKENS)
    file = f"ifeval.{limits.max_new_tokens}-tokens.jsonl" if scoring.max_new_tokens else "ifeval.jsonl"
    responses = respond(prompts, folder / file, limits)
    return [ifeval.grade(checkers, row, responses[str(row["key"])]["response"]) for row in rows]


def drops_of(base: Scored, tuned: Scored) -> dict[str, dict]:
    """By how much the trained model falls below the base model on each benchmark, paired by document."""
    paired_drop = partial(benchmarks.paired_drop, base.samples, tuned.samples)
    drop = paired_drop()
    if tuned.grades:
        drop[GENERATED] = ifeval.paired_drop(base.grades, tuned.grades)[ifeval.HEADLINE]
    return {"drop": drop, "drop_log_p": paired_drop(metric="log_p")}


def check_extras(names: tuple[str, ...], data: Path) -> None:
    """InputError: a package that a benchmark needs is not installed. It is said before hours are spent."""
    if GENERATED in names:
        with ranks.rank_0_first():  # which downloads what is missing
            ifeval.load_checkers(data)
