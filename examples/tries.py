"""S3FT with more than one try: what the paper names as future work (section 6).

    python -m examples.tries --tries 4 --shots 3 --task gsm8k --out runs/gsm8k

A row whose prediction is rejected is not given up yet. It is asked again with `--shots` examples in front,
which are rows with accepted predictions of the model's own. Then `--tries` samples are drawn, and the
likeliest accepted one under the model itself counts. Only then comes the paraphrase, as in Algorithm 1. All
other flags are those of s3ft.py. The method is called s3ft-tries, and shares its predictions and paraphrases
with the others.

The report shows the share of every source in Table 3, and what each cost beside it.
"""

import argparse
import functools
import sys

import s3ft
from data import prompt
from support.cli import exit_cleanly, one_line_error, positive_int


def s3ft_tries(D, base, tries: int = 0, shots: int = 0):
    """Algorithm 1, with two more ways to the model's own words before the paraphrase."""
    found = {}  # id -> (answer, source)
    y_hat = base.predict(D)
    keep_accepted(found, y_hat, "prediction")

    if shots:
        examples = [(x, y_hat[x.id]) for x in D if x.id in found][:shots]
        keep_accepted(found, few_shot(base, missing(D, found), examples), "few-shot")
    if tries:
        keep_accepted(found, best_of(base.sample(missing(D, found), tries)), "sample")
    keep_accepted(found, base.paraphrase(missing(D, found)), "paraphrase")

    for x in D:
        answer, source = found.get(x.id, (base.gold(x), "gold"))
        yield x, answer, source


def missing(D, found: dict) -> list:
    return [x for x in D if x.id not in found]


def keep_accepted(found: dict, answers: dict, source: str) -> None:
    for id, y in answers.items():
        if y.accepted:
            found[id] = y, source


def few_shot(base, D, examples: list) -> dict:
    """Predictions (id -> Answer) with solved examples in front, none of them of a row that is asked again."""
    solved = [f"{prompt(base.task.predict, x)}\n{y.text}" for x, y in examples]
    prompts = {x.id: "\n\n".join([*solved, prompt(base.task.predict, x)]) for x in D}
    return base.ask(D, prompts, f"few_shot_{len(examples)}")


def best_of(samples: dict[str, list]) -> dict:
    """The likeliest accepted sample of every row that has one. id -> Answer."""
    best = {}
    for id, answers in samples.items():
        accepted = [y for y in answers if y.accepted]
        if accepted:
            best[id] = max(accepted, key=lambda y: y.log_prob)
    return best


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=s3ft_tries.__doc__, allow_abbrev=False, add_help=False)
    parser.error = one_line_error
    parser.add_argument("--tries", type=positive_int, default=0, help="samples of a row (none)")
    parser.add_argument("--shots", type=positive_int, default=0, help="solved examples in front (none)")
    own, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    s3ft.METHODS["s3ft-tries"] = functools.partial(s3ft_tries, tries=own.tries, shots=own.shots)
    name = f"--name=s3ft-{own.tries}-tries-{own.shots}-shots"
    s3ft.main(["--method=s3ft-tries", name, *rest])


if __name__ == "__main__":
    exit_cleanly(main)
