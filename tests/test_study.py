"""The study's report: differences by hand, and docs/study.md against the figures that it was made from."""

import json
from pathlib import Path

import pytest

from bench import study, study_report

DOCS = Path(__file__).parent.parent / "docs"


def test_a_difference_is_paired_over_rows_and_averaged_over_seeds():
    """Rows 1 1 0 0 and 1 0 0 0 of two seeds against 0 0 0 0: means 1, 1/2, 0, 0; mean 37.5, standard error 23.9 points."""
    models = [{"verdicts": "1100"}, {"verdicts": "1000"}]
    assert study_report.row_means(models, study_report.verdicts) == [1.0, 0.5, 0.0, 0.0]
    assert study_report.difference(study_report.row_means(models, study_report.verdicts), [0.0] * 4) == "+37.5 (-9.4 to +84.4)"
    assert study_report.difference([1.0] * 9 + [0.0], [0.0] * 10).endswith(" *")


def test_the_average_of_benchmarks_weighs_each_the_same_and_adds_variances():
    """Differences 100 0, 0 0 0, 0 0, 0 0: means 50 0 0 0; the first one's half-width 1.96 * 70.71 / sqrt 2 = 98 over four."""
    sizes = dict(zip(study_report.BENCHMARKS, (2, 3, 2, 2), strict=True))
    base = [{"documents": {name: [0.0] * n for name, n in sizes.items()}}]
    tuned = [{"documents": {name: [1.0 if name == "mmlu" and i == 0 else 0.0 for i in range(n)] for name, n in sizes.items()}}]
    assert study_report.average_difference(tuned, base) == "+12.5 (-12.0 to +37.0)"


def test_a_changed_setting_stands_beside_the_plain_run():
    drift = {"general": 0.01, "task": 0.2}
    plain = {"accuracy": 0.5, "verdicts": "1100", "drift": drift}
    changed = {"accuracy": 0.75, "verdicts": "1110", "drift": drift}
    lines = study_report.choices_table({"models": {"s3ft-0": plain}, "choices": {"all linear layers": changed}}).splitlines()
    assert lines[2:] == ["| as above | 50.0 |  | 0.010 | 0.200 |",
                         "| all linear layers | 75.0 | +25.0 (-24.0 to +74.0) | 0.010 | 0.200 |"]


def test_splits_share_no_article_and_a_quarter_has_no_answer(tmp_path):
    articles = [{"title": f"t{a}", "paragraphs": [{"context": f"Text {a}.", "qas": [
        {"id": f"{a}-{q}", "question": f"What {a} {q}?", "answers": [{"text": f"Text {a}", "answer_start": 0}]}
        for q in range(8)]}]} for a in range(8)]
    (tmp_path / "xquad.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    study.make_rows(tmp_path / "xquad.json", tmp_path, {"train": 99, "val": 99, "test": 5})
    rows = {split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
            for split in study.SHARES}
    assert [len(found) for found in rows.values()] == [32, 8, 5]
    owners = [{row["id"].split("-")[0] for row in found} for found in rows.values()]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert sum(row["unanswerable"] for row in rows["train"]) == 8


@pytest.mark.skipif(not (DOCS / "study.md").exists(), reason="the study has not been run yet")
def test_the_report_holds_only_what_its_results_hold(tmp_path):
    results = json.loads((DOCS / "study" / "results.json").read_text())
    assert study_report.report(results, tmp_path) == (DOCS / "study.md").read_text()
