"""Drawing judged rows for a person, and the agreement with that person, against calculations by hand."""

import csv
import json

import pytest

from data import Example
from results.audit import audit, compare
from support.cli import InputError
from support.files import read_jsonl, write_jsonl
from support.stats import kappa, wilson


@pytest.fixture
def run(tmp_path):
    """30 predictions, 18 of them accepted; 12 paraphrases, 6 of them accepted, one with an unreadable verdict."""
    for kind, count, right in (("predictions", 30, 18), ("paraphrases", 12, 6)):
        texts = [f"={kind} {i},\n\"quoted\"" for i in range(count)]
        verdicts = [i < right or (None if i == 11 else False) for i in range(count)]
        write_jsonl(tmp_path / f"{kind}.jsonl", [{"id": f"r{i}",
            "response": text} for i, text in enumerate(texts)])
        write_jsonl(tmp_path / f"{kind}.judged.jsonl", [{"id": f"r{i}",
            "accepted": v} for i, v in enumerate(verdicts)])
    return tmp_path


D = [Example(f"r{i}", f"question {i}", f"gold {i}", f"context {i}") for i in range(30)]


def sheet(run):
    with open(run / "audit.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fill(run, marks, delimiter=",", encoding="utf-8"):
    """Write the sheet again as a spreadsheet would, with a mark for every row, in the opposite order.

    A mark is what stands in the column human, or a dictionary of several columns.
    """
    rows = sheet(run)
    with open(run / "audit.csv", "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        marks = [mark if isinstance(mark, dict) else {"human": mark} for mark in marks]
        writer.writerows([row | mark for row, mark in zip(rows, marks, strict=True)][::-1])


def test_a_sample_in_the_proportion_of_the_verdicts(run):
    assert "14 rows; fill the column human" in audit(run, D, 14)
    rows, keys = sheet(run), read_jsonl(run / "audit.jsonl")
    assert list(rows[0]) == ["row", "question", "context", "gold", "response", "likert", "human2", "human"]
    assert sum(key["accepted"] for key in keys) == 8  # of 42 judged, 24 accepted
    for i, (row, key) in enumerate(zip(rows, keys, strict=True), 1):
        number = key["id"][1:]
        assert (row["row"], key["row"], row["human"]) == (str(i), i, "")
        assert row["response"] == f"'={key['kind']} {number},\n\"quoted\""  # no formula for a spreadsheet
        shown = (row["question"], row["context"], row["gold"])
        assert shown == (f"question {number}", f"context {number}", f"gold {number}")
    assert len({(key["kind"], key["id"]) for key in keys}) == 14


def test_the_sample_depends_on_the_seed_alone(run):
    drawn = []
    for seed in (0, 0, 1):
        audit(run, D, 14, seed)
        drawn.append((run / "audit.csv").read_bytes())
        (run / "audit.csv").unlink()
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_rare_verdict_is_drawn_and_more_rows_than_there_are_is_all(tmp_path):
    write_jsonl(tmp_path / "predictions.jsonl", [{"id": f"r{i}", "response": "a"} for i in range(30)])
    write_jsonl(tmp_path / "predictions.judged.jsonl", [{"id": f"r{i}",
        "accepted": i > 0} for i in range(30)])
    audit(tmp_path, D, 5)
    keys = read_jsonl(tmp_path / "audit.jsonl")
    assert sorted(key["accepted"] for key in keys) == [False, True, True, True, True]
    (tmp_path / "audit.csv").unlink()
    audit(tmp_path, D, 500)
    assert len(sheet(tmp_path)) == 30


@pytest.mark.parametrize(("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig")])
def test_a_filled_sheet_is_read_by_row_number(run, delimiter, encoding):
    audit(run, D, 14)
    before = sheet(run)
    assert "the column human is empty" in audit(run, D, 14) and sheet(run) == before
    verdicts = [key["accepted"] for key in read_jsonl(run / "audit.jsonl")]
    fill(run, ["Yes" if verdict else " no " for verdict in verdicts], delimiter, encoding)
    text = audit(run, D, 14)
    assert "14 of 14 rows marked; Cohen's kappa 1.00" in text and "false accept: 0 of 6, 0.0%" in text
    assert json.loads((run / "audit.json").read_text())["agreement"]["count"] == 14


def test_rows_left_blank_are_left_out(run):
    audit(run, D, 14)
    fill(run, ["yes", "no", *[""] * 12])
    assert "2 of 14 rows marked" in audit(run, D, 14)


def test_test_answers_are_drawn_beside_the_training_responses(run):
    test = [Example(f"r{i}", f"test question {i}", f"test gold {i}", aliases=("or this",)) for i in range(10)]
    for name in ("base", "s3ft"):
        write_jsonl(run / name / "test.jsonl", [{"id": f"r{i}",
            "response": f"{name} {i}"} for i in range(10)])
        write_jsonl(run / name / "test.judged.jsonl", [{"id": f"r{i}", "accepted": i < 5} for i in range(10)])
    write_jsonl(run / "base" / "on_mbpp" / "test.jsonl", [{"id": "r1", "response": "of another task"}])
    audit(run, D, 500, test_examples=test)
    rows, keys = sheet(run), read_jsonl(run / "audit.jsonl")
    kinds = [key["kind"] for key in keys]
    assert {kind: kinds.count(kind) for kind in kinds} == \
        {"predictions": 30, "paraphrases": 12, "base/test": 10, "s3ft/test": 10}
    for row, key in zip(rows, keys, strict=True):
        number = key["id"][1:]
        if key["kind"].endswith("/test"):
            shown = (row["question"], row["gold"], row["response"])
            response = f"{key['kind'][:-5]} {number}"
            assert shown == (f"test question {number}", f"test gold {number} / or this", response)

    fill(run, ["yes" if key["accepted"] else "no" for key in keys])
    text = audit(run, D, 500, test_examples=test)
    assert "agreement on base/test: 10 of 10, 100.0%" in text and "agreement on predictions: 30 of 30" in text
    assert "96 % of 50 responses to GSM8K, 86 % of 200 to NQ" in text


def test_a_run_with_test_answers_only(tmp_path):
    write_jsonl(tmp_path / "base" / "test.jsonl", [{"id": "r1", "response": "a"}])
    write_jsonl(tmp_path / "base" / "test.judged.jsonl", [{"id": "r1", "accepted": True}])
    assert "1 rows" in audit(tmp_path, [], 5, test_examples=D)


def test_likert_marks(run):
    """3 and 4 mean yes where the column human is empty. The means are of accepted and rejected responses."""
    audit(run, D, 14)
    verdicts = [key["accepted"] for key in read_jsonl(run / "audit.jsonl")]
    good, bad = iter([4, 3, 3, 2]), iter([0, 1, 3])
    marks = [{"likert": next(good if verdict else bad, "")} for verdict in verdicts]
    marks[verdicts.index(True)]["human"] = "no"  # the word decides: this is the response with the mark 4
    fill(run, marks)
    text = audit(run, D, 14)
    assert "7 of 14 rows marked" in text and "agreement: 4 of 7" in text  # two good ones and two bad ones
    assert "mean mark (0 to 4) of accepted responses: 3.00 (n = 4)" in text
    assert "mean mark (0 to 4) of rejected responses: 1.33 (n = 3)" in text


def test_two_raters_by_hand(run):
    """On 10 rows both say yes 5 times and no 2 times, 3 times the first alone says yes.

    Agreement 0.7; chance 0.8 * 0.5 + 0.2 * 0.5 = 0.5; kappa (0.7 - 0.5) / 0.5 = 0.4.
    """
    audit(run, D, 14)
    pairs = [("yes", "yes")] * 5 + [("no", "no")] * 2 + [("yes", "no")] * 3 + [("yes", "")] * 4
    fill(run, [{"human": first, "human2": second} for first, second in pairs])
    agreement = "the two people agree: 7 of 10, 70.0% (95 % interval 39.7% to 89.2%); Cohen's kappa 0.40"
    assert agreement in audit(run, D, 14)
    raters = json.loads((run / "audit.json").read_text())["raters"]
    assert raters["kappa"] == pytest.approx(0.4) and raters["agreement"]["count"] == 7


def test_a_sheet_of_an_older_version_is_read(run):
    audit(run, D, 14)
    rows = sheet(run)
    with open(run / "audit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ("row", "human"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows([row | {"human": "yes"} for row in rows])
    assert "14 of 14 rows marked" in audit(run, D, 14)


def test_agreement_by_hand():
    """Judge and person on 100 rows: 45 both yes, 25 both no, 20 judge alone yes, 10 person alone yes.

    Agreement 0.70; chance 0.65 * 0.55 + 0.35 * 0.45 = 0.515; kappa (0.70 - 0.515) / 0.485 = 0.38144.
    """
    judge = [True] * 45 + [False] * 25 + [True] * 20 + [False] * 10
    human = [True] * 45 + [False] * 25 + [False] * 20 + [True] * 10
    found = compare(judge, human)
    assert found["kappa"] == kappa(judge, human) == pytest.approx(0.185 / 0.485)
    assert found["agreement"] == {"count": 70, "n": 100, "rate": 0.7, "interval": wilson(70, 100)}
    assert found["false_accept"] == {"count": 20, "n": 45, "rate": 20 / 45, "interval": wilson(20, 45)}
    assert found["false_reject"] == {"count": 10, "n": 55, "rate": 10 / 55, "interval": wilson(10, 55)}


def test_kappa_at_its_ends():
    assert kappa([True, False], [True, False]) == 1 and kappa([True, False], [False, True]) == -1
    assert kappa([True, True, False, False], [True, False, True, False]) == 0
    assert kappa([True, True], [True, True]) is None and compare([True],
        [True])["false_accept"]["rate"] is None


@pytest.mark.parametrize(("change", "message"), [
    (lambda rows: rows[1].update(human="maybe"), "row 2: human is 'maybe'; write yes or no"),
    (lambda rows: rows[1].update(human2="4"), "row 2: human2 is '4'; write yes or no"),
    (lambda rows: rows[1].update(likert="5"), "row 2: likert is '5'; write 0, 1, 2, 3 or 4"),
    (lambda rows: rows[1].update(likert="yes"), "row 2: likert is 'yes'; write 0, 1, 2, 3 or 4"),
    (lambda rows: rows[1].update(row="1"), "entry 3: the column row holds '1'"),
    (lambda rows: rows[1].update(row=""), "entry 3: the column row holds ''"),
    (lambda rows: rows[1].update(row="99"), "row 99 is not one of those that were drawn"),
])
def test_bad_sheets_are_refused(run, change, message):
    audit(run, D, 5)
    rows = sheet(run)
    change(rows)
    with open(run / "audit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(InputError, match=message):
        audit(run, D, 5)


def test_a_sheet_with_line_ends_of_an_old_mac_is_refused_in_one_line(run):
    audit(run, D, 5)
    text = (run / "audit.csv").read_text()
    (run / "audit.csv").write_text(text.replace("row,question", "row\r,question"), newline="")
    with pytest.raises(InputError, match="not readable as CSV"):
        audit(run, D, 5)


def test_a_bad_field_of_the_kept_verdicts_is_named(run):
    audit(run, D, 5)
    write_jsonl(run / "audit.jsonl", [{"row": "1", "kind": "predictions", "accepted": True}])
    with pytest.raises(InputError, match=r"audit\.jsonl, row 1: the field 'row' must be a whole number"):
        audit(run, D, 5)


def test_a_sample_of_no_rows(run):
    with pytest.raises(InputError, match="--audit 0: draw at least 1 row"):
        audit(run, D, 0)


def test_a_run_without_judged_rows(tmp_path):
    with pytest.raises(InputError, match="no judged predictions or paraphrases"):
        audit(tmp_path, D, 5)
