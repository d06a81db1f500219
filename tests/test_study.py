"""The study's report: differences by hand, and docs/study.md against the figures that it was made from."""

import json
from pathlib import Path

import pytest

from bench import study, study_numbers, study_report

DOCS = Path(__file__).parent.parent / "docs"


def test_a_difference_is_paired_over_rows_and_averaged_over_seeds():
    """Rows 1 1 0 0 and 1 0 0 0 of two seeds against 0 0 0 0 have means 1, 1/2, 0, 0.

    Their mean is 37.5 points, its standard error 23.9.
    """
    models = [{"verdicts": "1100"}, {"verdicts": "1000"}]
    means = study_numbers.row_means(models, study_numbers.verdicts)
    assert means == [1.0, 0.5, 0.0, 0.0]
    assert study_numbers.difference(means, [0.0] * 4) == "+37.5 (-9.4 to +84.4)"
    assert study_numbers.difference([1.0] * 9 + [0.0], [0.0] * 10).endswith(" *")


def test_the_average_of_benchmarks_weighs_each_the_same_and_adds_variances():
    """Differences 100 0, 0 0 0, 0 0, 0 0 have means 50 0 0 0.

    The first one's half-width is 1.96 * 70.71 / sqrt 2 = 98, over four.
    """
    sizes = dict(zip(study_numbers.BENCHMARKS, (2, 3, 2, 2), strict=True))
    base = [{"documents": {name: [0.0] * n for name, n in sizes.items()}}]
    tuned = [{"documents": {name: [0.0] * n for name, n in sizes.items()}}]
    tuned[0]["documents"]["mmlu"][0] = 1.0
    assert study_numbers.average_difference(tuned, base) == "+12.5 (-12.0 to +37.0)"


def test_a_changed_setting_stands_beside_the_plain_run():
    drift = {"general": 0.01, "task": 0.2}
    plain = {"accuracy": 0.5, "verdicts": "1100", "drift": drift}
    changed = {"accuracy": 0.75, "verdicts": "1110", "drift": drift}
    results = {"models": {"s3ft-0": plain}, "choices": {"all linear layers": changed}}
    lines = study_report.choices_table(results).splitlines()
    assert lines[2:] == ["| as above | 50.0 |  | 0.010 | 0.200 |",
                         "| all linear layers | 75.0 | +25.0 (-24.0 to +74.0) | 0.010 | 0.200 |"]


def test_splits_share_no_passage_and_a_quarter_has_no_answer(tmp_path):
    articles = [{"title": f"t{a}", "paragraphs": [{"context": f"Text {a}.", "qas": [
        {"id": f"{a}-{q}", "question": f"What {a} {q}?",
         "answers": [{"text": f"Text {a}", "answer_start": 0}]}
        for q in range(4)]}]} for a in range(36)]
    (tmp_path / "xquad.json").write_text(json.dumps({"version": "1.1", "data": articles}))
    study.make_rows(tmp_path / "xquad.json", tmp_path, {"train": 999, "val": 999, "test": 5})
    rows = {split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
            for split in study.ARTICLES_OF}
    assert [len(found) for found in rows.values()] == [16 * 4 + 216, 4 * 4 + 36, 5]  # and the embedded set's
    passages = [{row["context"] for row in found} for found in rows.values()]
    assert not passages[0] & passages[1] and not passages[0] & passages[2] and not passages[1] & passages[2]
    assert sum(row["unanswerable"] for row in rows["train"]) == (16 * 4 + 216) / 4
    assert [study.to_row(study.example_of(row)) for row in rows["train"]] == rows["train"]


def test_what_the_protocol_says_of_a_difference():
    """SFT lost 0.10 nats. A fifth of that is 0.02."""
    said = {(0.03, 0.02): "is supported", (-0.03, 0.02): "is contradicted", (0.005, 0.01): "is not supported",
            (0.015, 0.01): "is supported", (0.01, 0.03): "is neither"}
    for gain, words in said.items():
        assert study_report.answer_of(gain, 0.10).startswith(words)


def test_forgetting_in_nats_is_paired_by_document_and_averaged_over_benchmarks():
    """One benchmark of two documents falls by 0.2 and 0.4 nats, the others stay."""
    base = [{"log_p": {name: [-1.0, -1.0] for name in study_numbers.BENCHMARKS}}]
    tuned = [{"log_p": {name: [-1.0, -1.0] for name in study_numbers.BENCHMARKS}}]
    tuned[0]["log_p"]["mmlu"] = [-1.2, -1.4]
    center, half = study_numbers.average_paired_difference(base, tuned, study_numbers.log_p_of)
    assert center == pytest.approx(0.3 / 4) and half == pytest.approx(1.96 * 0.1 / 4, rel=1e-3)
    table = study_report.log_p_table({"base": base, "sft": tuned})
    assert "| sft | +0.075 (+0.026 to +0.124) * | +0.075 |  | +0.300 (+0.104 to +0.496) * |" in table


def test_the_primary_measure_is_paired_by_text():
    """GSM8K's two golds cost 0.1 and 0.3 nats a token more, MBPP's stay."""
    base = [{"human_text": {"gsm8k": [1.0, 1.2], "mbpp": [1.0, 1.0]}}]
    tuned = [{"human_text": {"gsm8k": [1.1, 1.5], "mbpp": [1.0, 1.0]}}]
    center, half = study_numbers.lost_on_human_text(tuned, base)
    assert center == pytest.approx(0.2) and half == pytest.approx(1.96 * 0.1, rel=1e-3)
    table = study_report.primary_table({"base": base, "sft": tuned})
    assert "| sft | +0.200 (+0.004 to +0.396) * | +0.200 |  | +0.000 (+0.000 to +0.000) |" in table


def test_an_interval_over_seeds_is_students():
    """Gains of 0.1, 0.2 and 0.3 nats: standard deviation 0.1, so 4.303 * 0.1 / sqrt 3 = 0.2484."""
    sft = [{"human_text": {"gsm8k": [1.0 + gain, 2.0 + gain]}} for gain in (0.1, 0.2, 0.3)]
    s3ft = [{"human_text": {"gsm8k": [1.0, 2.0]}}] * 3
    each, half = study_numbers.gain_over_seeds(sft, s3ft)
    assert each == pytest.approx([0.1, 0.2, 0.3]) and half == pytest.approx(0.2484, abs=1e-4)


def test_equal_steps_are_compared_with_each_other():
    """After the last step SFT has lost 0.1 and 0.3 nats on two golds, S3FT 0.1 on both."""
    models = {"base": {"human_text": {"gsm8k": [1.0, 1.0]}},
              "sft-0": {"human_text": {"gsm8k": [1.1, 1.3]}},
              "s3ft-0": {"human_text": {"gsm8k": [1.1, 1.1]}}}
    lines = study_report.equal_steps_table(study_numbers.seeds_of(models)).splitlines()
    assert lines[2] == "| sft | +0.200 (+0.004 to +0.396) * | +0.200 |  |"
    assert lines[3] == "| s3ft | +0.100 (+0.100 to +0.100) * | +0.100 | -0.100 (-0.296 to +0.096) |"


def test_what_is_still_to_run_is_said_by_method():
    whole = dict.fromkeys(study_numbers.METHODS, [{}] * study_report.SEEDS)
    assert study_report.still_to_run(whole) == []
    [line] = study_report.still_to_run({**whole, "ssr": [{}], "tries": []})
    assert "of 3 seeds ssr 1, tries 0 are there" in line


@pytest.mark.skipif(not (DOCS / "study.md").exists(), reason="the study has not been run yet")
def test_the_report_holds_only_what_its_results_hold(tmp_path):
    results = json.loads((DOCS / "study" / "results.json").read_text())
    assert study_report.report(results, tmp_path) == (DOCS / "study.md").read_text()
