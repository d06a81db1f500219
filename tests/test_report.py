"""The report's tables against the paper and hand calculations, several calls and runs, faulty run folders."""

import json
import re

import pytest

import evaluate
import s3ft
from results import tables
from results.paper import GENERAL, PAPER_BENCHMARKS, paper_drop
from results.request import Evaluation
from results.run_files import (
    finite,
    read_answers,
    read_costs,
    read_drift,
    read_training,
    stage_of,
    unused_answers,
)
from results.table_4 import benchmarks_table, mean_drop, merge_benchmarks
from results.tables import costs_table, metrics_table
from support.cli import InputError, exit_cleanly
from support.files import read_jsonl, write_json, write_jsonl

ROWS = [{"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(4)]
SETTINGS = {"num_fewshot": 0, "apply_chat_template": False, "add_bos": False, "limit": None, "sampled": False}


def score(acc: float, n: int = 100, **settings) -> dict:
    return {"n": n, "acc": acc, "mean": acc, "mc1": acc, "mc2": acc, "settings": SETTINGS | settings}


# ------------------------------------------------------------------------------ Table 4


def test_the_papers_drops_are_those_that_its_text_quotes():
    quoted = {"sft": (4.4, 2.7, 5.8), "s3ft": (2.5, 1.0, 2.5)}
    for method, drops in quoted.items():
        assert tuple(paper_drop(task, method) for task in ("gsm8k", "mbpp", "nq")) == drops


def test_the_mean_drop_adds_the_variances_of_independent_benchmarks():
    """Half-widths of 3 and 4 points: the half-width of the mean is sqrt(9 + 16) / 2 = 2.5."""
    drops = [{"drop": 0.10, "interval": [0.07, 0.13]}, {"drop": 0.02, "interval": [-0.02, 0.06]}]
    assert mean_drop(drops) == pytest.approx((0.06, 0.035, 0.085))
    assert mean_drop([*drops, {"drop": 0.0, "interval": [None, None]}])[1:] == (None, None)


def test_table_4_shows_the_papers_stored_average_and_drop():
    scores = {name: score(0.5) for name in GENERAL}
    drop = {name: {"drop": 0.1, "interval": [0.08, 0.12]} for name in GENERAL}
    tuned = {"benchmarks": {"scores": scores, "drop": drop}}
    models = {"base": {"benchmarks": {"scores": scores}}, "sft": tuned}
    text = benchmarks_table({"config": {"task": "gsm8k"}, "models": models})
    assert "| s3ft in the paper | 58.2 | 53.7 | 63.2 | 73.5 | 62.1 | 2.5 |" in text
    assert "| sft | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 10.0 (9.0 to 11.0) |" in text
    assert PAPER_BENCHMARKS["mbpp"]["s3ft"][-1] == 63.6


def test_another_task_and_a_generated_benchmark_have_room_outside_the_average():
    scores = {"winogrande": score(0.75), "ifeval": {"n": 541, "prompt_level_strict": 0.25}}
    against = {"difference": -0.2, "interval": [-0.3, -0.1]}
    results = {
        "config": {"task": "mbpp"},
        "models": {"base": {"benchmarks": {"scores": scores}}, "sft": {}},
        "elsewhere": {
            "gsm8k": {"base": {"accuracy": 0.4}, "sft": {"accuracy": 0.2, "against_base": against}},
        },
    }
    lines = benchmarks_table(results).splitlines()
    assert lines[2] == "| base | 75.0 | 25.0 | 75.0 |  |  | 40.0 |  |"
    assert lines[3] == "| sft |  |  |  |  |  | 20.0 | 20.0 (10.0 to 30.0) |"


def test_a_second_call_adds_to_the_first():
    models = {"base": {"weights": "a", "benchmarks": {"scores": {"mmlu": score(0.5, num_fewshot=5)}}}}
    earlier = {"mmlu": score(0.4, limit=2), "hellaswag": score(0.3)}
    merge_benchmarks(models, {"base": {"weights": "a", "benchmarks": {"scores": earlier}}})
    scores = models["base"]["benchmarks"]["scores"]
    assert {column: found["acc"] for column, found in scores.items()} == {
        "mmlu": 0.5, "mmlu, 0-shot, first 2": 0.4, "hellaswag": 0.3}

    again = {"base": {"weights": "a", "benchmarks": {"scores": {"mmlu": score(0.6, num_fewshot=5)}}}}
    merge_benchmarks(again, models)
    assert again["base"]["benchmarks"]["scores"]["mmlu"]["acc"] == 0.6
    assert len(again["base"]["benchmarks"]["scores"]) == 3


def measured(weights: str | None, acc: float | None = None) -> dict:
    """A model's entry in results.json, with a score of hellaswag and its drops."""
    drop = {"drop": 0.1, "interval": [0.0, 0.2], "n": 100}
    benchmarks = {"scores": {"hellaswag": score(acc or 0.5)}}
    benchmarks |= {"drop": {"hellaswag": drop}, "drop_log_p": {"hellaswag": drop}}
    return {"weights": weights} | ({"benchmarks": benchmarks} if acc else {})


@pytest.mark.parametrize(("before", "now"), [("a", "b"), (None, "b"), (None, None)])
def test_scores_of_other_weights_are_left_out(before, now):
    models = {"base": measured("base"), "sft": measured(now)}
    assert merge_benchmarks(models, {"base": measured("base", 0.6), "sft": measured(before, 0.5)}) == ["sft"]
    assert models["base"]["benchmarks"]["scores"]["hellaswag"]["acc"] == 0.6 and "benchmarks" not in models["sft"]


def test_a_drop_is_carried_where_the_base_model_is_the_same():
    for base in ("base", "another"):
        models = {"base": measured(base), "sft": measured("a")}
        merge_benchmarks(models, {"base": measured("base", 0.6), "sft": measured("a", 0.5)})
        kept = models["sft"]["benchmarks"]
        assert kept["scores"]["hellaswag"]["acc"] == 0.5
        assert ("drop" in kept, "drop_log_p" in kept) == (base == "base", base == "base")


# ------------------------------------------------------------------------------ the files of a run


def test_a_response_that_was_cut_off_is_not_used_and_counted(tmp_path):
    texts = ["The answer is 4.", "4 and on", r"\boxed{4} of 7", "no"]
    rows = [{"id": str(i), "response": text, "finished": i != 1} for i, text in enumerate(texts)]
    write_jsonl(tmp_path / "predictions.jsonl", rows)
    verdicts = [{"id": str(i), "accepted": i < 2} for i in range(4)]
    write_jsonl(tmp_path / "predictions.judged.jsonl", verdicts)
    usable = [y.usable for y in read_answers(tmp_path, "predictions").values()]
    assert usable == [True, False, False, False]
    assert read_answers(tmp_path, "predictions", keep_unfinished=True)["1"].usable
    found = unused_answers(tmp_path, False, numeric=True)
    assert found == {"predictions": {"cut_off": 1, "marks_another_number": 1}}


def test_costs_are_summed_over_calls(tmp_path):
    row = {"stage": "predictions", "calls": 2, "tokens": 10, "seconds": 1.5}
    write_jsonl(tmp_path / "costs.jsonl", [row, row, row | {"stage": "judge:predictions", "tokens": 0}])
    write_jsonl(tmp_path / "sft" / "costs.jsonl", [row | {"stage": "test"}, row | {"stage": "test.judged"}])
    training = {"sft": {"minutes": 2.0, "steps": 5, "tokens": 100}}
    found = {(row["stage"], row["model"]): row for row in read_costs(tmp_path, training)}
    assert found["predict", "base"] | {"stage": "", "model": ""} == {
        "stage": "", "model": "", "calls": 4, "tokens": 20, "seconds": 3.0}
    assert found["train", "sft"]["seconds"] == 120 and found["evaluate", "sft"]["seconds"] == 3.0
    assert ("judge predictions", "base") in found


def test_every_stage_of_a_run_is_among_its_costs(tmp_path):
    row = {"calls": 2, "tokens": 0, "seconds": 1.5}
    write_jsonl(tmp_path / "sft" / "costs.jsonl", [row | {"stage": "drift"}, row | {"stage": "drift"}])
    scored = [row | {"stage": "benchmarks"}, row | {"stage": "ifeval"}]
    write_jsonl(tmp_path / "sft" / "benchmarks" / "costs.jsonl", scored)
    training = {"minutes": 2.0, "steps": 5, "tokens": 100, "validation_minutes": 1.0, "loading_minutes": 0.5}
    found = {(row["stage"], row["model"]): row for row in read_costs(tmp_path, {"sft": training})}
    seconds = {name: row["seconds"] for name, row in found.items()}
    assert seconds == {("load", "sft"): 30, ("train", "sft"): 120, ("validate", "sft"): 60, ("drift", "sft"): 3,
                       ("general benchmarks", "sft"): 3}
    assert found["validate", "sft"]["calls"] is None and found["drift", "sft"]["calls"] == 4
    table = costs_table({"config": {"task": "custom", "model": "M"}, "costs": list(found.values())})
    assert "| validate | sft |  |  | 1.0 | 27.8 |  |" in table and "| 3.6 | 100.0 |" in table


@pytest.mark.parametrize(("folder", "stage", "expected"), [
    (".", "predictions", ("predict", "base")), (".", "paraphrases.judged", ("judge paraphrases", "base")),
    (".", "few_shot_3", ("few shot 3", "base")), (".", "few_shot_3.judged", ("judge few shot 3", "base")),
    (".", "reflect_instructions", ("reflect instructions", "base")),
    ("reflect", "reflect.judged", ("judge reflect", "reflect")),
    ("base", "general", ("drift", "base")), ("s3ft", "drift", ("drift", "s3ft")),
    ("base", "test", ("evaluate", "base")), ("base/train_prompt", "test.judged", ("evaluate", "base/train_prompt")),
    ("base/bigcode", "test", ("evaluate", "base/bigcode")),
    ("s3ft/benchmarks", "ifeval.256-tokens", ("general benchmarks", "s3ft")),
    ("judges", "M.judged", ("judge M", "judges")),
])
def test_every_file_that_is_made_has_a_stage(folder, stage, expected):
    assert stage_of(folder, stage) == expected


def test_a_metric_that_is_no_number_is_left_out_of_its_table():
    results = {"models": {"base": {"metrics": {"words": None, "chars": 2.0}}}}
    assert "| base |  | 2.000 |" in metrics_table(results)


def test_processes_that_work_side_by_side_cost_the_time_of_the_slowest(tmp_path):
    """Rank 0 takes 2 + 3 seconds, rank 1 takes 4."""
    row = {"stage": "predictions", "calls": 1, "tokens": 10}
    times = ((0, 2.0), (1, 4.0), (0, 3.0))
    write_jsonl(tmp_path / "costs.jsonl", [row | {"rank": rank, "seconds": seconds} for rank, seconds in times])
    assert read_costs(tmp_path, {}) == [
        {"stage": "predict", "model": "base", "calls": 3, "tokens": 30, "seconds": 5.0}]


def test_broken_costs_do_not_stop_an_evaluation(tmp_path, capsys):
    """A torn last line is what a killed run leaves. Costs that cannot be read are named and left out."""
    line = '{"stage": "predictions", "calls": 1, "tokens": 10, "seconds": 2.0}\n'
    (tmp_path / "costs.jsonl").write_text(line + '{"stage": "predic')
    assert read_costs(tmp_path, {})[0]["calls"] == 1 and capsys.readouterr().err == ""
    (tmp_path / "costs.jsonl").write_text('{"stage": "predic' + line)
    assert read_costs(tmp_path, {}) == []
    assert "costs.jsonl, line 1: not valid JSON" in capsys.readouterr().err


def test_a_drift_that_four_decimals_do_not_show_is_not_called_zero():
    assert [tables.drift_text(value) for value in (0, 4e-5, 1e-4, 0.25)] == [
        "0.0000", "below 0.0001", "0.0001", "0.2500"]


def test_json_has_no_infinity():
    value = finite({"a": [float("inf"), 1.5], "b": (float("nan"), None, "x")})
    assert json.loads(json.dumps(value, allow_nan=False)) == {"a": [None, 1.5], "b": [None, None, "x"]}


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture
def run(tiny, tmp_path):
    """A finished run of s3ft and sft, in which each branch has a row."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "run"
    for kind, right in (("predictions", "q0"), ("paraphrases", "q1")):
        rows = [{"id": x["id"], "response": x["answer"] if x["id"] == right else "no"} for x in ROWS]
        write_jsonl(out / f"{kind}.jsonl", rows)
    files = [f"--{split}-file={tmp_path / 'rows.jsonl'}" for split in ("train", "val", "test")]
    for method in ("s3ft", "sft"):
        s3ft.main(["--task=custom", "--judge=numeric", f"--method={method}", f"--model={tiny}",
                   f"--out={out}", *files, "--steps=2", "--max-new-tokens=4", "--device=cpu"])
    return out


def test_the_report_shows_a_row_of_each_branch_notes_and_costs(run):
    (run / "sft" / "note.md").write_text("Nothing was selected.\n")
    evaluate.main([f"--out={run}", "--device=cpu"])
    results = json.loads((run / "results.json").read_text())
    assert [(x["id"], x["target"]) for x in results["examples"][:3]] == [
        ("q0", "prediction"), ("q1", "paraphrase"), ("q2", "gold")]
    shown = results["examples"][1]
    assert shown["texts"] == {"gold": "2", "prediction": "no", "paraphrase": "2"}
    assert shown["log_p"]["gold"] == shown["log_p"]["paraphrase"]  # the same text
    for row in results["log_probabilities"]["beside_gold"]:
        assert row["response"] == row["gold"]  # these responses are the gold's own text
    report = (run / "report.md").read_text()
    assert "sft: Nothing was selected." in report and "## What D', training and evaluation cost" in report
    assert {row["stage"] for row in results["costs"]} >= {
        "load", "train", "validate", "evaluate", "drift", "load to evaluate", "Table 1 and Fig. 2"}
    assert "| validate | sft |  |  | " in report


def test_show_prints_a_row_and_refuses_an_unknown_one(run, capsys):
    evaluate.main([f"--out={run}", "--device=cpu", "--show=q1"])
    out = capsys.readouterr().out
    assert "**Row q1, target: ỹ" in out and "rejected: log p = " in out and "a token" in out
    with pytest.raises(InputError, match="no training row has this id"):
        evaluate.main([f"--out={run}", "--device=cpu", "--show=zz"])


def test_a_run_of_sdft_alone_has_paraphrases_and_no_predictions(tiny, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "run"
    write_jsonl(out / "paraphrases.jsonl", [
        {"id": x["id"], "response": x["answer"] if x["id"] == "q1" else "no"} for x in ROWS])
    files = [f"--{split}-file={tmp_path / 'rows.jsonl'}" for split in ("train", "val", "test")]
    s3ft.main(["--task=custom", "--judge=numeric", "--method=sdft", f"--model={tiny}", f"--out={out}", *files,
               "--steps=1", "--max-new-tokens=4", "--device=cpu"])

    evaluate.main([f"--out={out}", "--device=cpu", "--show=q1"])
    assert "**Row q1, target: ỹ" in capsys.readouterr().out
    evaluate.main([f"--out={out}", "--device=cpu"])
    results = json.loads((out / "results.json").read_text())
    assert [(x["id"], x["target"]) for x in results["examples"]][:2] == [("q1", "paraphrase"), ("q0", "gold")]
    assert "Of 4 paraphrases" in (out / "report.md").read_text()


def test_another_test_file_leaves_the_runs_own_results(run, tmp_path):
    write_jsonl(tmp_path / "other.jsonl", ROWS[:3])
    evaluate.main([f"--out={run}", "--device=cpu", f"--test-file={tmp_path / 'other.jsonl'}"])
    (folder,) = run.glob("on_other-????????")
    results = json.loads((folder / "results.json").read_text())
    assert results["models"]["sft"]["n"] == 3 and not (run / "results.json").exists()


def test_two_test_files_of_one_name_have_a_folder_each(tmp_path):
    folders = set()
    for name, rows in (("a", ROWS), ("b", ROWS[:3])):
        write_jsonl(tmp_path / name / "gsm8k.jsonl", rows)
        asked = Evaluation(tmp_path / "run", test_file=str(tmp_path / name / "gsm8k.jsonl"))
        folders.add(asked.folder("sft"))
    assert len(folders | {Evaluation(tmp_path / "run", task="gsm8k").folder("sft")}) == 3


def test_the_base_model_stands_under_both_prompts_where_they_differ(run, monkeypatch):
    load = evaluate.task_of

    def with_another_train_prompt(config, data):
        task, splits = load(config, data)
        return evaluate.Task(**{**vars(task), "train": task.predict + " Answer:"}), splits

    monkeypatch.setattr(evaluate, "task_of", with_another_train_prompt)
    evaluate.main([f"--out={run}", "--device=cpu"])
    models = json.loads((run / "results.json").read_text())["models"]
    assert list(models)[:2] == ["base", "base (train prompt)"]
    assert len(read_jsonl(run / "base" / "train_prompt" / "test.jsonl")) == 4


def test_several_runs_become_one_page(run, tmp_path, capsys):
    evaluate.main([f"--out={run}", "--device=cpu"])
    capsys.readouterr()
    tables.main([str(run), str(run), f"--out={tmp_path / 'tables.md'}"])
    page = (tmp_path / "tables.md").read_text()
    assert "## Table 2" in page and "| custom | s3ft | 4 | 25.0 | 25.0 | 50.0 |" in page
    with pytest.raises(InputError, match="no results.json of a run"):
        tables.main([str(tmp_path)])


@pytest.mark.parametrize(("flags", "message"), [
    (["--model=M", "--benchmarks=mmlu"], "a run's folder"),
    (["--model=M", "--benchmarks=mmlu", "--task=nq"], "leave --model out"),
    (["--audit=5", "--benchmarks=mmlu"], "stands alone"),
    (["--benchmarks=winogrand"], "unknown benchmark"),
    (["--sampled"], "go with --benchmarks"),
    (["--task=nq", "--test-file=F"], "give one of them"),
])
def test_flags_that_would_be_ignored_or_do_harm_are_refused(tmp_path, flags, message, capsys):
    write_json(tmp_path / "config.json", {"task": "gsm8k", "model": "M"})
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: evaluate.main([f"--out={tmp_path}", *flags]))
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_an_older_run_is_still_measured(run):
    """config.json without settings that came later, training.json without figures that came later."""
    config = json.loads((run / "config.json").read_text())
    for name in ("dtype", "limit", "contents", "keep_unfinished", "date", "weights"):
        config.pop(name)
    write_json(run / "config.json", config)
    write_json(run / "sft" / "training.json", {"method": "sft", "minutes": 1.0})
    evaluate.main([f"--out={run}", "--device=cpu"])
    assert "| sft |  |  |  |  |" in (run / "report.md").read_text()


@pytest.fixture
def bare_run(tmp_path):
    """The files of a run that are read before, or without, a model."""
    write_json(tmp_path / "config.json", {"task": "gsm8k", "model": "M"})
    write_json(tmp_path / "sft" / "training.json", {"minutes": 1.0, "sources": {"gold": 4}})
    base = {"accuracy": 0.5, "interval": [0.4, 0.6], "n": 4}
    results = {"config": {"task": "gsm8k", "model": "M"}, "machine": {"date": "2026-01-01", "device": "cpu"}}
    write_json(tmp_path / "results.json", results | {"models": {"base": base}})
    return tmp_path


@pytest.mark.parametrize(("change", "message"), [
    ({"minutes": "x"}, "'minutes' must be a number or null, found \"x\""),
    ({"sources": 3}, "'sources' must be an object, found 3"),
    ({"sources": {"gold": "all"}}, "sources: the field 'gold' must be a whole number"),
    ({"validation": [1]}, "'validation' must be a number or null"),
])
def test_a_bad_field_of_training_json_is_named(bare_run, change, message):
    write_json(bare_run / "sft" / "training.json", change)
    with pytest.raises(InputError, match=r"sft/training\.json.*" + re.escape(message)):
        read_training(bare_run / "sft")


@pytest.mark.parametrize(("change", "message"), [
    ({"task": "custom", "judge": "numeric"}, "'files' must name the custom task's three files"),
    ({"task": "custom", "files": ["a", "b", "c"]}, "'judge' must be one of"),
    ({"files": [1, 2, 3]}, "'files' must be a list of texts, not 1"),
    ({"files": 3}, "'files' must be a list or null, found 3"),
    ({"limit": "8"}, "'limit' must be a whole number or null, found \"8\""),
    ({"task": None}, "'task' must be text, found null"),
    ({"limit": 0}, "'limit' must be at least 1 or null, not 0"),
    ({"dtype": "float99"}, "'dtype' must be float32 or bfloat16"),
])
def test_a_bad_field_of_config_json_is_named(bare_run, change, message):
    write_json(bare_run / "config.json", {"task": "gsm8k", "model": "M"} | change)
    with pytest.raises(InputError, match=r"config\.json: .*" + re.escape(message)):
        evaluate.main([f"--out={bare_run}", "--device=cpu"])


@pytest.mark.parametrize(("change", "message"), [
    ({"benchmarks": {}}, "benchmarks: the field 'scores' is missing"),
    ({"benchmarks": None}, "'benchmarks' must be an object"),
    ({"benchmarks": {"scores": {"mmlu": 1}}}, "mmlu: expected a JSON object, found 1"),
    ({"benchmarks": {"scores": {"mmlu": {"n": 3}}}}, "mmlu: it has no metric"),
    ({"benchmarks": {"scores": {"truthfulqa": {"n": 3, "mc1": 0.5}}}}, "the field 'mean' is missing"),
    ({"benchmarks": {"scores": {}, "drop": {"mmlu": {"drop": 1}}}}, "the field 'interval' is missing"),
    ({"accuracy": "high"}, "'accuracy' must be a number"),
    ({"interval": [1]}, "'interval' must be two numbers, found [1]"),
    ({"training": {}}, "the field 'sources' is missing"),
])
def test_a_bad_field_of_results_json_is_named(bare_run, change, message):
    results = json.loads((bare_run / "results.json").read_text())
    results["models"]["base"] |= change
    write_json(bare_run / "results.json", results)
    with pytest.raises(InputError, match=r"results\.json.*" + re.escape(message)):
        tables.main([str(bare_run)])


@pytest.mark.parametrize("field", ["config", "machine", "models"])
def test_results_without_what_a_page_shows_are_refused(bare_run, field):
    results = json.loads((bare_run / "results.json").read_text())
    for value in ({}, None):
        write_json(bare_run / "results.json", results | {field: value})
        with pytest.raises(InputError, match=r"results\.json"):
            tables.main([str(bare_run)])


def test_a_run_that_was_not_measured_is_named_and_left_out(bare_run, capsys):
    missing = bare_run / "not-yet"
    tables.main([str(bare_run), str(missing)])
    page = capsys.readouterr().out
    assert f"- {missing}: left out, it has no results.json" in page and "| base | 50.0 (40.0 to 60.0) |" in page


@pytest.mark.parametrize(("kept", "message"), [
    ([], "expected a JSON object"), ({"digest": "d", "task": "low", "general": 0.1}, "'task' must be a number")])
def test_a_bad_field_of_drift_json_is_named(tmp_path, kept, message):
    write_json(tmp_path / "drift.json", kept)
    with pytest.raises(InputError, match=r"drift\.json.*" + message):
        read_drift(tmp_path / "drift.json", ("general", "task"), "d")


@pytest.mark.parametrize(("file", "row", "message"), [
    ("predictions.jsonl", {"id": "q0"}, "row 1: the field 'response' is missing"),
    ("predictions.jsonl", {"id": "q0", "response": 4}, "'response' must be text"),
    ("predictions.judged.jsonl", {"id": "q0", "accepted": "yes"}, "'accepted' must be true, false or null"),
])
def test_a_bad_row_of_answers_is_named(tmp_path, file, row, message):
    write_jsonl(tmp_path / file, [row])
    with pytest.raises(InputError, match=message):
        read_answers(tmp_path, "predictions")


@pytest.mark.parametrize("file", ["config.json", "sft/training.json", "results.json"])
def test_a_list_in_place_of_settings_is_refused_in_one_line(run, file):
    write_json(run / file, [1])
    with pytest.raises(InputError, match="expected a JSON object"):
        evaluate.main([f"--out={run}", "--device=cpu"])
