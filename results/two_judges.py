"""Two judges on the same answers: how often they agree, and how often each agrees with people.

    python evaluate.py --out RUN --compare-judge NAME_OR_FOLDER_OR_URL

The answers are those that the run's judge has judged: predictions and paraphrases of the training rows, and
the test answers. The other judge is a model that reads the prompt of Fig. 8. RUN/judges gets its verdicts,
the figures as JSON, and a page. Where people have filled in the audit's sheet (results/audit.py), both judges
are compared with them too. A verdict that could not be read counts as not accepted.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data import Example
from results.audit import agreement, compare, judged_responses, kappa_text, rate_text, read_marks
from results.markdown import markdown_table
from results.run_files import KINDS
from support.files import write_json, write_text
from support.stats import kappa

RUNS_OWN = "the run's judge"


def judged_pairs(
    run: Path, train: Sequence[Example], test: Sequence[Example]
) -> tuple[list[tuple[Example, str]], dict[str, bool]]:
    """The answers that the run has judged, as pairs (example, response), and its verdicts by id.

    An id here is the kind of the answer and the row's own: "predictions train-0".
    """
    of_training = {x.id: x for x in train}
    of_test = {x.id: x for x in test}
    pairs, verdicts = [], {}
    for row in judged_responses(run, train, test):
        examples = of_training if row["kind"] in KINDS else of_test
        x = replace(examples[row["id"]], id=f"{row['kind']} {row['id']}")
        pairs.append((x, row["response"]))
        verdicts[x.id] = row["accepted"]
    return pairs, verdicts


def compare_judges(run: Path, own: dict[str, bool], other: dict[str, bool | None], name: str) -> dict:
    """Both judges' verdicts (id -> accepted) beside each other, and beside the people's of the audit."""
    first = [own[id] for id in own]
    second = [other[id] is True for id in own]
    both = list(zip(first, second, strict=True))
    result = {
        "judge": name,
        "n": len(own),
        "both_accept": both.count((True, True)),
        "only_the_runs_accepts": both.count((True, False)),
        "only_the_other_accepts": both.count((False, True)),
        "both_reject": both.count((False, False)),
        "unreadable_verdicts": list(other.values()).count(None),
        "agreement": agreement(first, second),
        "kappa": kappa(first, second),
        "people": None,
    }
    people = people_on(run)
    marked = [id for id in own if id in people]
    if marked:
        human = [people[id] for id in marked]
        result["people"] = {
            RUNS_OWN: compare([own[id] for id in marked], human),
            name: compare([other[id] is True for id in marked], human),
        }
    return result


def people_on(run: Path) -> dict[str, bool]:
    """What the people of the audit say of answers, by the ids of judged_pairs. {}: there is no audit."""
    if not (run / "audit.csv").exists():
        return {}
    marked, drawn = read_marks(run)
    found = {}
    for number, mark in marked.items():
        row = drawn[number]
        found[f"{row['kind']} {row['id']}"] = mark["human"]
    return found


def write_comparison(result: dict, folder: Path, file_name: str) -> str:
    """The figures as JSON and as a page -> the page."""
    page = page_of(result)
    write_json(folder / f"{file_name}.json", result)
    write_text(folder / f"{file_name}.md", page)
    return page


def page_of(result: dict) -> str:
    name = result["judge"]
    agreed, kappa_of_both = rate_text(result["agreement"]), kappa_text(result["kappa"])
    lines = [
        f"# Two judges on {result['n']} answers",
        f"{RUNS_OWN} and {name} agree on {agreed}; Cohen's kappa {kappa_of_both}. Of the verdicts of {name}, "
        f"{result['unreadable_verdicts']} could not be read.",
        markdown_table(["", f"{name} accepts", f"{name} rejects"], [
            [f"{RUNS_OWN} accepts", str(result["both_accept"]), str(result["only_the_runs_accepts"])],
            [f"{RUNS_OWN} rejects", str(result["only_the_other_accepts"]), str(result["both_reject"])],
        ]),
    ]
    if result["people"]:
        rows = []
        for judge, found in result["people"].items():
            rates = [rate_text(found[kind]) for kind in ("agreement", "false_accept", "false_reject")]
            rows.append([judge, *rates, kappa_text(found["kappa"])])
        lines.append("Against the people of the audit:")
        lines.append(markdown_table(["judge", "agreement", "false accepts", "false rejects", "kappa"], rows))
    else:
        lines.append("No people to compare with: `--audit N` draws a sheet for them.")
    return "\n\n".join(lines) + "\n"
