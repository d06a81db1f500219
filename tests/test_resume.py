"""What was asked is what is used: kept answers, verdicts, settings and people's files when a run goes on."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

import evaluate
import judges
import lora
import s3ft
from answers import LocalModel, judge_answers, respond
from data import Example
from engine.decoding import Limits
from engine.fingerprint import fingerprint
from engine.model import load_model
from support.cli import InputError, exit_cleanly
from support.files import read_json, read_jsonl, write_json, write_jsonl
from tasks.custom import CUSTOM_TASK

QUESTIONS = [{"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(12)]
ANSWERS = [{"id": row["id"], "response": f"It is {row['answer']}."} for row in QUESTIONS]


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(str(tiny), "cpu")


@pytest.fixture
def command(tiny, tmp_path):
    """(flags of a short run on 12 questions, its folder)"""
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, QUESTIONS)
    out = tmp_path / "run"
    files = [f"--{split}-file={file}" for split in ("train", "val", "test")]
    sizes = ["--judge=numeric", "--max-new-tokens=6", "--steps=2", "--lr=0.01", "--device=cpu"]
    return ["--task=custom", f"--model={tiny}", f"--out={out}", *files, *sizes], out


def refuse(argv, capsys) -> str:
    """The one line with which a command line is refused."""
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: s3ft.main(argv))
    errors = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and errors[-1].startswith("error: ") and "Traceback" not in "".join(errors)
    return errors[-1]


# ------------------------------------------------------------------------------ answers and their questions


def prompts(end: str = "?") -> dict[str, str]:
    return {row["id"]: row["question"].replace("?", end) for row in QUESTIONS}


def test_a_kept_answer_is_used_for_its_own_question_only(loaded, tmp_path):
    path = tmp_path / "predictions.jsonl"
    first = respond(LocalModel(*loaded), prompts(), path, Limits(6))
    before = path.read_bytes()
    assert respond(LocalModel(*loaded), prompts(), path, Limits(6)) == first and path.read_bytes() == before
    with pytest.raises(InputError, match="12 of its rows answer another prompt than this run asks about"):
        respond(LocalModel(*loaded), prompts("!"), path, Limits(6))
    with pytest.raises(InputError, match="answer another limits or sampling"):
        respond(LocalModel(*loaded), prompts(), path, Limits(7))
    assert path.read_bytes() == before


def test_answers_of_another_model_are_refused(loaded, tmp_path):
    path = tmp_path / "predictions.jsonl"
    model, tokenizer = loaded
    respond(LocalModel(model, tokenizer), prompts(), path, Limits(6))
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.data.clone()
    weight.data += 0.01
    try:
        with pytest.raises(InputError, match="answer another model"):
            respond(LocalModel(model, tokenizer), prompts(), path, Limits(6))
    finally:
        weight.data = before


def test_a_fingerprint_is_of_the_weights_in_use(tiny, loaded):
    model, _ = load_model(str(tiny), "cpu")
    assert fingerprint(model) == fingerprint(loaded[0])
    lora.inject(model, seed=0)
    with lora.disabled(model):
        assert fingerprint(model) == fingerprint(loaded[0])
    untrained = fingerprint(model)
    next(iter(lora.layers(model).values())).lora_B.data.fill_(0.1)
    assert len({untrained, fingerprint(model), fingerprint(loaded[0])}) == 3


def test_rows_of_another_run_under_the_same_ids_are_refused(command, capsys, tmp_path):
    argv, out = command
    s3ft.main([*argv, "--method=ssr"])
    other = tmp_path / "other.jsonl"
    write_jsonl(other, [row | {"question": f"{row['question']} Really"} for row in QUESTIONS])
    (tmp_path / "new").mkdir()
    shutil.copy(out / "predictions.jsonl", tmp_path / "new" / "predictions.jsonl")
    new = [flag for flag in argv if not flag.startswith(("--out", "--train-file"))]
    error = refuse([*new, f"--train-file={other}", f"--out={tmp_path / 'new'}", "--method=ssr"], capsys)
    assert "12 of its rows answer another prompt" in error


def test_a_verdict_is_made_anew_when_the_judge_or_the_gold_changes(loaded, tmp_path, monkeypatch, capsys):
    path = tmp_path / "judged.jsonl"
    pairs = [(Example("a", "q", "4"), "4"), (Example("b", "q", "5"), "4")]
    task = CUSTOM_TASK.__class__(**(vars(CUSTOM_TASK) | {"judge": "numeric"}))
    assert judge_answers(LocalModel(*loaded), task, pairs, path) == {"a": True, "b": False}
    changed = [(Example("a", "q", "4"), "4"), (Example("b", "q", "4"), "4")]
    assert judge_answers(LocalModel(*loaded), task, changed, path) == {"a": True, "b": True}
    assert "1 verdicts were on other responses" in capsys.readouterr().err
    monkeypatch.setitem(judges.JUDGES, "numeric", accepts_nothing)
    assert judge_answers(LocalModel(*loaded), task, changed, path) == {"a": False, "b": False}


def accepts_nothing(x, response) -> bool:
    return False


# ------------------------------------------------------------------------------ files of people


def array() -> bytes:
    return json.dumps(ANSWERS).encode()


CSV = b"id,response\nq0,It is 0.\nq1,It is 2."
MARKS = b'<<<<<<< HEAD\n{"id": "q0", "response": "0"}\n=======\n{"id": "q0", "response": "1"}\n>>>>>>> other'


@pytest.mark.parametrize("content", [
    array(), json.dumps(ANSWERS, indent=2).encode(), CSV, CSV.split(b"\n")[0], gzip.compress(array()),
    array().decode().encode("utf-16"), MARKS, b'{"id": "q0", "response": "0"}\n{"id": "q1", "resp',
    b"PK\x03\x04\n\x00"])
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(command, capsys, content):
    argv, out = command
    out.mkdir()
    path = out / "predictions.jsonl"
    path.write_bytes(content)
    assert "predictions.jsonl" in refuse([*argv, "--method=ssr"], capsys)
    assert path.read_bytes() == content


def test_a_torn_row_of_ours_is_made_again(command):
    argv, out = command
    s3ft.main([*argv, "--method=ssr", "--name=one"])
    whole = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(whole[:-30])
    s3ft.main([*argv, "--method=ssr", "--name=two"])
    assert (out / "predictions.jsonl").read_bytes() == whole


def test_rows_made_elsewhere_are_counted(command, capsys):
    argv, out = command
    write_jsonl(out / "predictions.jsonl", ANSWERS)
    s3ft.main([*argv, "--method=ssr"])
    assert "12 rows were made elsewhere" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what is trained on


def test_a_prediction_is_trained_on_as_the_tokens_that_the_model_generated(command, loaded, monkeypatch):
    argv, out = command
    monkeypatch.setitem(judges.JUDGES, "numeric", lambda x, response: True)
    s3ft.main([*argv, "--method=ssr", "--keep-unfinished"])
    made = {row["id"]: row for row in read_jsonl(out / "predictions.jsonl")}
    rows = read_jsonl(out / "ssr" / "train.jsonl")
    assert {row["source"] for row in rows} == {"prediction"}
    for row in rows:
        assert row["tokens"] == made[row["id"]]["tokens"] and len(row["tokens"]) <= 6


def test_a_response_that_was_cut_off_is_not_accepted(command, monkeypatch):
    argv, out = command
    monkeypatch.setitem(judges.JUDGES, "numeric", lambda x, response: True)
    s3ft.main([*argv, "--method=ssr"])
    finished = {row["id"] for row in read_jsonl(out / "predictions.jsonl") if row["finished"]}
    rows = read_jsonl(out / "ssr" / "train.jsonl")
    own_words = {row["id"] for row in rows if row["source"] == "prediction"}
    assert own_words == finished != {x["id"] for x in QUESTIONS}


# ------------------------------------------------------------------------------ settings, paths, a dry run


def test_a_run_can_move_with_its_files_and_its_model(command, tiny, tmp_path):
    argv, out = command
    s3ft.main([*argv, "--method=sft"])
    rows = tmp_path / "elsewhere" / "rows.jsonl"
    rows.parent.mkdir()
    shutil.move(tmp_path / "rows.jsonl", rows)
    shutil.copytree(tiny, tmp_path / "model")
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    flags = [flag for flag in argv if not flag.startswith(("--out", "--model", "--train", "--val", "--test"))]
    files = [f"--{split}-file={rows}" for split in ("train", "val", "test")]
    s3ft.main([*flags, *files, f"--model={tmp_path / 'model'}/", f"--out={moved}", "--method=ssr"])
    config = read_json(moved / "config.json")
    assert config["files"] == [str(rows)] * 3 and config["model"] == str(tmp_path / "model")
    evaluate.main([f"--out={moved}", "--device=cpu"])


def test_other_weights_under_the_same_name_are_refused(command, tiny, tmp_path, capsys):
    argv, out = command
    s3ft.main([*argv, "--method=sft"])
    config = read_json(out / "config.json")
    write_json(out / "config.json", config | {"weights": "0123456789abcdef"})
    assert "was begun with other weights" in refuse([*argv, "--method=ssr"], capsys)


def test_a_flag_that_is_younger_than_the_folder_has_its_default(command):
    argv, out = command
    s3ft.main([*argv, "--method=sft"])
    for path in (out / "config.json", out / "sft" / "config.json"):
        config = read_json(path)
        for name in ("keep_unfinished", "share_prefix", "schedule", "chat_template_kwargs", "prompt"):
            config.pop(name, None)
        write_json(path, config)
    (out / "sft" / "training.json").unlink()
    s3ft.main([*argv, "--method=sft"])
    assert (out / "sft" / "training.json").exists()


@pytest.mark.parametrize("content", ["[]", '{"task": "custom"}', "{", "null"])
def test_a_config_mended_by_hand_is_one_line(command, capsys, content):
    argv, out = command
    out.mkdir()
    (out / "config.json").write_text(content)
    assert "config.json" in refuse([*argv, "--method=sft"], capsys)


def test_a_torn_checkpoint_is_one_line(command, capsys):
    argv, out = command
    s3ft.main([*argv, "--method=sft"])
    (out / "sft" / "training.json").unlink()
    (out / "sft" / "checkpoint.pt").write_bytes(b"PK\x03\x04 torn")
    assert "remove it, and the same command trains from the start" in refuse([*argv, "--method=sft"], capsys)


@pytest.mark.parametrize("flag", [
    "--clip=0", "--lr=0", "--alpha=0", "--warmup=100", "--warmup=1", "--dropout=1", "--seed=20251125105047",
    "--seed=-1", "--chat-template-kwargs=[]"])
def test_a_value_that_cannot_work_is_refused_at_once(command, capsys, flag):
    argv, out = command
    assert flag.partition("=")[0] in refuse([*argv, "--method=sft", flag], capsys)
    assert not out.exists()


def test_a_dry_run_shows_what_the_model_will_see_and_makes_nothing(command, capsys, tmp_path):
    argv, out = command
    write_jsonl(tmp_path / "bad.jsonl", [*QUESTIONS, {"id": "x", "question": "Who?", "answer": "Ann"}])
    s3ft.main([*argv, f"--train-file={tmp_path / 'bad.jsonl'}", "--method=s3ft", "--dry-run"])
    page = capsys.readouterr().out
    assert "1 of 13 golds are rejected by their own judge (numeric): x." in page
    assert "12 of 12 validation rows are training rows too" in page
    assert "What is 0 + 0?<|end|><|assistant|>|0|<|end|>|" in page
    assert "at most 26 responses of at most 6 tokens" in page and not Path(out).exists()


def test_training_data_made_by_another_judge_is_not_trained_on(command, monkeypatch, capsys):
    """A run that was killed in training, and a judge that was edited since."""
    argv, out = command
    s3ft.main([*argv, "--method=sft"])
    (out / "sft" / "training.json").unlink()
    s3ft.main([*argv, "--method=sft"])  # the same: goes on
    (out / "sft" / "training.json").unlink()
    monkeypatch.setitem(judges.JUDGES, "numeric", accepts_nothing)
    assert "was made by another method, prompt or judge" in refuse([*argv, "--method=sft"], capsys)


def test_the_best_adapter_is_the_one_that_is_checked(command, capsys):
    argv, out = command
    s3ft.main([*argv, "--method=sft", "--eval-every=1", "--steps=3"])
    assert read_json(out / "sft" / "training.json")["step"] < 3
    assert "PEFT" not in capsys.readouterr().out


def test_costs_are_kept_by_stage_and_a_torn_line_is_cut(command):
    argv, out = command
    out.mkdir()
    (out / "costs.jsonl").write_bytes(b'{"stage": "predictions", "calls": 3, "tok')
    s3ft.main([*argv, "--method=ssr"])
    rows = read_jsonl(out / "costs.jsonl")
    assert [(row["stage"], row["calls"]) for row in rows] == [("predictions", 12), ("predictions.judged", 12)]
    assert rows[0]["tokens"] == sum(len(row["tokens"]) for row in read_jsonl(out / "predictions.jsonl"))


def test_a_persons_own_scratch_file_stays(command):
    argv, out = command
    out.mkdir()
    (out / ".mine.tmp").write_text("a person's")
    s3ft.main([*argv, "--method=sft"])
    assert (out / ".mine.tmp").read_text() == "a person's"


def test_programs_may_import_numpy_where_it_is_asked_for(tiny, tmp_path, capsys, monkeypatch):
    from support import sandbox

    monkeypatch.setattr(sandbox, "numpy_parent", "")
    gold = "import numpy\ndef f(x): return int(numpy.int64(x) + 1)"
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "Add.", "answer": gold, "tests": ["assert f(1) == 2"]}])
    files = [f"--{split}-file={tmp_path / 'rows.jsonl'}" for split in ("train", "val", "test")]
    argv = ["--task=custom", "--judge=code", "--method=sft", f"--model={tiny}", f"--out={tmp_path / 'run'}", "--dry-run"]
    s3ft.main([*argv, *files])
    assert "1 of 1 golds are rejected" in capsys.readouterr().out
    s3ft.main([*argv, *files, "--numpy"])
    assert "golds are rejected" not in capsys.readouterr().out
