"""IFD and r-IFD against plain transformers calls; phases, retries and drops of Selective Reflection-Tuning."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import answers
import data
import s3ft
from data import Example, prompt
from engine import packed
from engine.chat import chat_ids
from engine.model import load_model
from examples import ifd, reflect
from examples.ifd import ScoredPair, score
from examples.reflect import REWRITE_BOTH, TAGS, Settings, parse_fields
from support.cli import InputError, exit_cleanly
from support.files import read_jsonl, write_jsonl
from tasks import TASKS
from tasks.custom import CUSTOM_TASK
from tasks.reading import READING_TASK


@pytest.fixture(scope="module")
def loaded(tiny):
    return load_model(str(tiny), "cpu")


# ------------------------------------------------------------------------------------------------ the scores


def plain_perplexity(model, tokenizer, before: list[int], text: str) -> float:
    """exp of transformers' own loss over the tokens of `text` after the tokens `before`."""
    target = tokenizer(text, add_special_tokens=False).input_ids
    ids = torch.tensor([before + target])
    labels = ids.clone()
    labels[0, : len(before)] = -100
    with torch.no_grad():
        return math.exp(model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.item())


PAIRS = {
    "a": ScoredPair("What is 2 + 2?", "What is 2 + 2?", "Four."),
    "b": ScoredPair("Be brief. Who?", "Who?", "Ann, who else? " * 9),
    "c": ScoredPair("ü" * 60, "ü", "{{answer}}"),
}


def test_both_scores_agree_with_plain_transformers_calls(loaded):
    model, tokenizer = loaded
    found = score(model, tokenizer, PAIRS)
    for name, (user, question, answer) in PAIRS.items():
        guess = ("Here is an answer that somebody gave to an instruction:\n\n" + answer +
                 "\n\nGuess the instruction. Reply with the instruction alone.")
        start = [tokenizer.bos_token_id]
        expected = plain_perplexity(model, tokenizer, chat_ids(tokenizer, user), answer) / plain_perplexity(
            model, tokenizer, start, answer)
        reverse = plain_perplexity(model, tokenizer, chat_ids(tokenizer, guess), question) / plain_perplexity(
            model, tokenizer, start, question)
        assert found[name]["ifd"] == pytest.approx(expected, rel=1e-4)
        assert found[name]["r_ifd"] == pytest.approx(reverse, rel=1e-4)


def test_scores_from_log_probabilities_by_hand():
    """ppl(y|x) of tokens with p 1/2 and 1/8 is 4, ppl(y) of 1/16 and 1/4 is 8."""
    given, alone = [math.log(1 / 2), math.log(1 / 8)], [math.log(1 / 16), math.log(1 / 4)]
    assert ifd.ifd(given, alone) == ifd.r_ifd(given, alone) == pytest.approx(0.5)


def test_a_tokenizer_without_bos_starts_with_its_eos(loaded):
    model, tokenizer = loaded
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.bos_token = None
    (_, (ids, mask), *_) = ifd.scoring_rows(tokenizer, PAIRS["a"])
    assert ids[0] == tokenizer.eos_token_id and mask == [False] + [True] * (len(ids) - 1)


def test_a_pair_that_does_not_fit_has_no_score(loaded):
    assert set(score(*loaded, PAIRS | {"long": ScoredPair("q", "q", "x" * 2100)})) == set(PAIRS)


def out_of_memory_above(tokens, monkeypatch):
    """Fail as a GPU does where a group holds more than `tokens`; -> the sizes of the groups that were tried."""
    tried, real = [], packed.target_logits

    def target_logits(model, group, share_prefix):
        tried.append(sum(len(ids) for ids, _ in group))
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError
        return real(model, group, share_prefix)

    monkeypatch.setattr(packed, "target_logits", target_logits)
    return tried


def test_out_of_memory_means_smaller_groups_and_no_lost_row(loaded, monkeypatch, capsys):
    model, tokenizer = loaded
    rows = [row for pair in PAIRS.values() for row in ifd.scoring_rows(tokenizer, pair)]
    expected = list(packed.token_log_probs(model, rows))
    total, longest = sum(len(ids) for ids, _ in rows), max(len(ids) for ids, _ in rows)
    tried = out_of_memory_above(longest, monkeypatch)
    found = list(packed.token_log_probs(model, rows))
    assert [len(row) for row in found] == [len(row) for row in expected]
    assert sum(found, []) == pytest.approx(sum(expected, []), abs=1e-4)
    failed = [size for size in tried if size > longest]
    assert failed[0] == total and sum(tried) == total + sum(failed)  # what fitted was computed once
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert said == [f"out of memory: going on with {size // 2} tokens at a time" for size in failed]


def test_out_of_memory_over_one_row_is_one_line(loaded, monkeypatch):
    out_of_memory_above(0, monkeypatch)
    with pytest.raises(InputError, match="out of memory over one row of [0-9]+ tokens"):
        score(*loaded, PAIRS)


# ------------------------------------------------------------------------------------------------ the teacher's replies


@pytest.mark.parametrize(("reply", "fields"), [
    ("[New Instruction] Who? [End]\n[New Answer] Ann. [End]", ["Who?", "Ann."]),
    ("Fine.\n[new instruction]\nWho\nis it? [end]\n\n[New Answer]The End of it[End] bye", ["Who\nis it?", "The End of it"]),
    ("[New Instruction] draft [End] no: [New Instruction] Who? [End] [New Answer] Ann [End]", ["Who?", "Ann"]),
    ("[New Answer] Ann [End] [New Instruction] Who? [End]", ["Who?", "Ann"]),
    ("[New Instruction] Who? [New Answer] Ann [End]", None),  # the first field has no end
    ("[New Instruction] Who? [End] [New Answer] Ann", None),  # cut off by the length limit
    ("[New Instruction] Who? [End]", None), ("", None), ("Who? Ann.", None),
    ("[New Instruction] [End] [New Answer] Ann [End]", []), ("[New Instruction] N/A. [End] [New Answer] Ann [End]", []),
    ("[New Instruction] the new instruction [End] [New Answer] the new answer [End]", []),
    ("[New Instruction] <The new instruction> [End] [New Answer] Ann [End]", []),
])
def test_parsing(reply, fields):
    assert parse_fields(reply, TAGS[REWRITE_BOTH]) == fields


def test_a_copy_of_the_prompt_counts_as_nothing():
    for template, tags in TAGS.items():
        assert parse_fields(template, tags) == []


# ------------------------------------------------------------------------------------------------ the method


class Base:
    """What the method needs of answers.BaseLM, with the gold as it is."""

    def __init__(self, model, tokenizer, run, task=CUSTOM_TASK):
        self.model, self.tokenizer, self.run = model, tokenizer, run
        self.task = replace(task, judge="numeric")
        self.responder = answers.LocalModel(model, tokenizer)
        self.judge = answers.LocalModel(model, tokenizer, adapter=False)

    def gold(self, x):
        return x.answer


D = [Example(name, f"What is {name}?", f"{name} is 4") for name in "abcdef"]


def both(question, answer):
    return f"[New Instruction] {question} [End] [New Answer] {answer} [End]"


INSTRUCTIONS = {"a": both("What is A?", "A is 4."), "b": both("b??", "no idea at all"), "c": both("N/A", ""), "d": "nothing",
                "e": "nothing", "f": both("long", "x" * 2100)}
RETRIES = {"d": both("What might d be?", "It is 4."), "e": "nothing"}
RESPONSES = {name: f"[Better Answer] {name} should be {i + 3} [End]" for i, name in enumerate("abcde")} | {"f": "nothing"}


def give(run, kind, replies):
    write_jsonl(run / f"{kind}.jsonl", [{"id": name, "response": text} for name, text in replies.items()])


@pytest.fixture
def given(tmp_path):
    """A run folder with every reply of the teacher in it."""
    give(tmp_path, "reflect_instructions", INSTRUCTIONS)
    give(tmp_path, "reflect_instructions.retry", RETRIES)
    give(tmp_path, "reflect_responses", RESPONSES)
    give(tmp_path, "reflect_responses.retry", {"f": "nothing"})
    return tmp_path


def scripted(monkeypatch, table):
    """Let the scores of an answer come from a table (default 0.9, 0.9): what the phases make of them is under test here."""
    def fake(model, tokenizer, pairs, label="scores"):
        fitting = {name: pair for name, pair in pairs.items() if len(pair.answer) < 2000}
        return {name: dict(zip(("ifd", "r_ifd"), table.get(pair.answer, (0.9, 0.9)), strict=True)) for name, pair in
                fitting.items()}
    monkeypatch.setattr(reflect, "score", fake)
    monkeypatch.setattr(ifd, "score", fake)


def test_phases_keep_what_improves_and_emit_what_is_below_one(loaded, given, monkeypatch):
    scripted(monkeypatch, {
        "a is 4": (0.5, 0.9), "A is 4.": (0.6, 0.9), "a should be 3": (0.7, 0.8),  # both phases improve
        "b is 4": (0.5, 0.9), "no idea at all": (0.5, 0.1), "b should be 4": (0.4, 0.8),  # IFD only equal: rejected
        "c should be 5": (0.5, 0.9),  # r-IFD only equal: dropped
        "d is 4": (0.5, 0.9), "It is 4.": (0.6, 0.9), "d should be 6": (1.0, 0.8),  # IFD not below 1: dropped
        "e should be 7": (0.9, 0.8)})  # no new instruction, even when asked again
    rows = list(reflect.reflect(D, Base(*loaded, given)))
    assert [(x.id, x.question, y, source) for x, y, source in rows] == [
        ("a", "What is A?", "a should be 3", "reflection"), ("b", "What is b?", "b should be 4", "reflection"),
        ("e", "What is e?", "e should be 7", "reflection")]
    kept = {row["id"]: row for row in read_jsonl(given / "reflect" / "reflect.jsonl")}
    assert {name: (row["phase_1"], row["phase_2"], row["emitted"], row["judged"]) for name, row in kept.items()} == {
        "a": ("accepted", "accepted", True, None),  # a new question: nothing to check it with
        "b": ("rejected", "accepted", True, True), "c": ("no rewrite", "rejected", False, None),
        "d": ("accepted", "accepted", False, None), "e": ("no rewrite", "accepted", True, False),
        "f": ("too long", "no rewrite", False, None)}
    assert kept["a"]["scores"] == {
        "original": {"ifd": 0.5, "r_ifd": 0.9}, "phase_1": {"ifd": 0.6, "r_ifd": 0.9}, "phase_2": {"ifd": 0.7, "r_ifd": 0.8}}
    assert kept["f"]["scores"]["phase_1"] is None and kept["a"]["gold"] == "a is 4"
    text = (given / "reflect" / "note.md").read_text()
    assert "kept 3 of 6 rows, 50.0 %" in text and "Not checked: 1 with a new question" in text
    assert "of the 2 with their own question the judge accepts 1.\n\n| score | rows | below 0.25 |" in text
    assert sum(map(int, re.findall(r"(?<=\| )\d+(?= \|)", text))) == 2 * 6  # every row once for each score


def test_histograms_count_the_last_scores_by_outcome():
    def row(first, second, emitted, *scores):
        scores = dict(zip(("original", "phase_1", "phase_2"), scores, strict=True))
        return {"phase_1": first, "phase_2": second, "emitted": emitted, "scores": scores}

    low, high = {"ifd": 0.1, "r_ifd": 0.3}, {"ifd": 1.0, "r_ifd": math.inf}
    trace = [row("accepted", "accepted", True, high, high, low),
             row("accepted", "rejected", False, low, high, low),
             row("rejected", "accepted", False, low, low, high)]
    assert reflect.histograms(trace).splitlines()[2:] == [
        "| IFD | trained on | 1 | 0 | 0 | 0 | 0 |", "| IFD | new answer, not selected | 0 | 0 | 0 | 0 | 1 |",
        "| IFD | no new answer | 0 | 0 | 0 | 0 | 1 |", "| r-IFD | trained on | 0 | 1 | 0 | 0 | 0 |",
        "| r-IFD | new answer, not selected | 0 | 0 | 0 | 0 | 1 |", "| r-IFD | no new answer | 0 | 0 | 0 | 0 | 1 |"]


@pytest.mark.parametrize(("settings", "kept"), [
    (Settings(), "abd"),
    (Settings(max_ifd=0.6), "ab"),
    (Settings(max_r_ifd=0.8), "ad"),
    (Settings(max_ifd=2.0, max_r_ifd=2.0), "abcd"),
    (Settings(top=2), "bd"),  # the highest IFD of those that fit, in the order of the data
    (Settings(top=9), "abd"),
])
def test_selection_by_thresholds_and_by_rank(settings, kept):
    scores = {"a": (0.2, 0.3), "b": (0.5, 0.9), "c": (1.2, 0.3), "d": (0.7, 0.1)}
    scores = {id: {"ifd": ifd, "r_ifd": r_ifd} for id, (ifd, r_ifd) in scores.items()}
    assert "".join(reflect.select(scores, settings)) == kept


def test_the_note_counts_what_was_selected(loaded, given, monkeypatch):
    scripted(monkeypatch, {f"{id} should be {i + 3}": (0.1 * (i + 1), 0.5) for i, id in enumerate("abcde")})
    rows = list(reflect.reflect(D, Base(*loaded, given), Settings(top=2)))
    assert [x.id for x, _, _ in rows] == ["d", "e"]
    assert "kept 2 of 6 rows" in (given / "reflect" / "note.md").read_text()


def test_real_scores_decide_without_a_script(loaded, given):
    rows = list(reflect.reflect(D, Base(*loaded, given)))
    kept = {row["id"]: row for row in read_jsonl(given / "reflect" / "reflect.jsonl")}
    for x in D:
        scores = kept[x.id]["scores"]
        now = scores["phase_1"] if kept[x.id]["phase_1"] == "accepted" else scores["original"]
        if scores["phase_1"]:
            assert (kept[x.id]["phase_1"] == "accepted") == (scores["phase_1"]["ifd"] > scores["original"]["ifd"])
        if scores["phase_2"]:
            assert (kept[x.id]["phase_2"] == "accepted") == (scores["phase_2"]["r_ifd"] < now["r_ifd"])
        below = scores["phase_2"] and max(scores["phase_2"].values()) < 1
        assert kept[x.id]["emitted"] == bool(kept[x.id]["phase_2"] == "accepted" and below)
    assert [x.id for x, *_ in rows] == [x.id for x in D if kept[x.id]["emitted"]]


def counting(monkeypatch):
    """Record how many prompts each call of the generator gets, and what they say; replies are short."""
    made, real = [], answers.generate

    def generate(model, tokenizer, prompts, max_new_tokens, *args, **kwargs):
        made.append([tokenizer.decode(ids) for ids in prompts])
        return real(model, tokenizer, prompts, 5, *args, **kwargs)

    monkeypatch.setattr(answers, "generate", generate)
    return made


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_teacher_sees_pair_and_context_once_and_once_more_where_nothing_parses(loaded, tmp_path, monkeypatch):
    made = counting(monkeypatch)
    examples = [Example("a", "Who?", "Ann", "Ann {{instruction}} came.")]
    assert list(reflect.reflect(examples, Base(*loaded, tmp_path, READING_TASK))) == []
    assert [len(prompts) for prompts in made] == [1, 1, 1, 1]  # noise from the tiny model: each phase asks twice
    first, again, answer, last = (prompts[0] for prompts in made)
    assert "### Instruction\nWho?\n\nContext:\nAnn {{instruction}} came.\n\n### Answer\nAnn\n" in first
    assert "not in this form" in again and "[New Instruction] ... [End] and [New Answer] ... [End]" in again
    assert "[Better Answer]" in answer and "not in this form" in last
    before = files_in(tmp_path)
    list(reflect.reflect(examples, Base(*loaded, tmp_path, READING_TASK)))
    assert len(made) == 4 and files_in(tmp_path) == before


def test_only_missing_replies_are_made(loaded, given, monkeypatch):
    made = counting(monkeypatch)
    give(given, "reflect_instructions", {name: INSTRUCTIONS[name] for name in "abde"})
    list(reflect.reflect(D, Base(*loaded, given)))
    assert len(made[0]) == 2 and len(made) == 2 and len(made[1]) == 2  # c and f, and once more since noise does not parse
    assert [row["id"] for row in read_jsonl(given / "reflect_instructions.jsonl")] == list("abcdef")


def test_another_teacher_writes_and_the_student_scores(loaded, tiny, tmp_path, monkeypatch):
    """The teacher has other weights: its replies are those of its own generation, the scores are the base model's."""
    other = tmp_path / "other"
    model, tokenizer = load_model(str(tiny), "cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    model.save_pretrained(other)
    tokenizer.save_pretrained(other)
    counting(monkeypatch)
    replies = []
    for name, teacher in (("one", str(other)), ("two", None)):
        list(reflect.reflect(D[:1], Base(*loaded, tmp_path / name), Settings(teacher)))
        replies.append(read_jsonl(tmp_path / name / "reflect_instructions.jsonl")[0]["response"])
    ids = chat_ids(tokenizer, data.fill(REWRITE_BOTH, instruction=D[0].question, answer=D[0].answer))
    assert replies[0] == dict(answers.generate(model, tokenizer, [ids], 5))[0].text != replies[1]
    rows = [read_jsonl(tmp_path / name / "reflect" / "reflect.jsonl")[0]["scores"]["original"] for name in ("one", "two")]
    assert rows[0] == rows[1]
    before = files_in(tmp_path / "one")
    list(reflect.reflect(D[:1], Base(*loaded, tmp_path / "one"), Settings(str(other))))  # goes on with its replies
    assert files_in(tmp_path / "one") == before
    with pytest.raises(InputError, match="were made by .*other, not by the base model"):
        list(reflect.reflect(D[:1], Base(*loaded, tmp_path / "one")))


def test_a_teacher_with_code_of_its_own_is_trusted_as_the_model_is(loaded, tmp_path, monkeypatch):
    asked = []

    def load(name, device, dtype, trust_remote_code, **template):
        asked.append((name, device, dtype, trust_remote_code))
        return loaded

    monkeypatch.setattr(answers, "load_model", load)
    for trusted in (False, True):
        reflect.Teacher(Base(*loaded, tmp_path), Settings("T", trusted)).responder.load()
    assert asked == [("T", "cpu", "float32", False), ("T", "cpu", "float32", True)]


def test_a_row_with_tests_keeps_its_question_and_is_judged(loaded, tmp_path, monkeypatch):
    tests = ("assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4")
    code = Example("a", "Write f, which adds one.", "def f(x): return x + 1", tests=tests)
    give(tmp_path, "reflect_instructions", {"a": both("Write g.", "def g(): pass"), "b": "nothing"})
    give(tmp_path, "reflect_instructions.retry", {"b": "nothing"})
    give(tmp_path, "reflect_responses", {"a": "[Better Answer] def f(x): return 1 + x [End]", "b": "[Better Answer] 4 [End]"})
    scripted(monkeypatch, {"def f(x): return 1 + x": (0.9, 0.8), "def g(): pass": (0.95, 0.1)})
    monkeypatch.setattr(reflect, "judge_answers", lambda judge, task, rows, path:
                        {x.id: x.tests == tests for x, _ in rows})
    ((x, y, _),) = reflect.reflect([code, D[1]], Base(*loaded, tmp_path))
    assert (x, y) == (code, "def f(x): return 1 + x")
    trace, other = read_jsonl(tmp_path / "reflect" / "reflect.jsonl")
    assert (trace["phase_1"], trace["phase_2"], trace["judged"]) == ("skipped: the row has tests", "accepted", True)
    assert other["phase_1"] == "no rewrite"


def test_the_teacher_sees_the_tests(loaded, tmp_path, monkeypatch):
    made = counting(monkeypatch)
    x = Example("a", "Write f.", "def f(x): pass", tests=("assert f(1)", "assert f(2)", "assert f(3)"))
    list(reflect.reflect([x], Base(*loaded, tmp_path, TASKS["mbpp"])))
    assert len(made) == 2 and all("[Better Answer]" in prompts[0] for prompts in made)  # phase 2 and its second try only
    assert ("### Instruction\nWrite f.\n\nThe code should pass these tests:\nassert f(1)\nassert f(2)\nassert f(3)\n\n"
            "### Answer\n") in made[0][0]


def test_a_teacher_that_is_not_there(loaded, tmp_path):
    with pytest.raises(InputError, match="--teacher /nowhere: cannot be loaded"):
        list(reflect.reflect(D, Base(*loaded, tmp_path), Settings("/nowhere")))


def test_a_gold_without_words(loaded, tmp_path):
    with pytest.raises(InputError, match="row b: the field 'answer' is empty"):
        list(reflect.reflect([D[0], Example("b", "q", " ")], Base(*loaded, tmp_path)))


def test_ifd_is_of_the_turn_that_training_shows(loaded, tmp_path):
    x = Example("a", "Who?", "Ann", "Ann came.")
    base = SimpleNamespace(task=READING_TASK)
    assert reflect.scored_pairs(base, {"a": (x, "Ann")}) == {"a": ScoredPair(prompt(READING_TASK.train, x), "Who?", "Ann")}


# ------------------------------------------------------------------------------------------------ the run command


@pytest.fixture
def passed_on(monkeypatch):
    """What the run command gives to s3ft.main, which is not run."""
    given = []
    monkeypatch.setattr(s3ft, "main", given.extend)
    monkeypatch.setattr(s3ft, "METHODS", dict(s3ft.METHODS))
    return given


def test_only_its_own_flags_stay_with_the_method(passed_on, tmp_path):
    reflect.main(["--task=reading", "--teacher", "T", f"--out={tmp_path}", "--trust-remote-code", "--lr", "1e-3"])
    assert sorted(passed_on) == sorted(["--task=reading", "--lr", "1e-3", "--method=reflect", "--name=reflect",
                                        f"--out={tmp_path}", "--trust-remote-code"])
    assert s3ft.METHODS["reflect"].keywords["settings"] == Settings("T", True, "reflect")


def test_thresholds_and_rank_stay_with_the_method_too(passed_on, tmp_path):
    reflect.main(["--max-ifd=0.9", "--max-r-ifd", "0.8", "--top=100", f"--out={tmp_path}"])
    assert passed_on == ["--method=reflect", "--name=reflect", f"--out={tmp_path}"]
    assert s3ft.METHODS["reflect"].keywords["settings"] == Settings(max_ifd=0.9, max_r_ifd=0.8, top=100)


def test_the_core_knows_no_teacher(capsys):
    with pytest.raises(SystemExit):
        exit_cleanly(lambda: s3ft.main(["--task=reading", "--method=sft", "--out=x", "--teacher=T"]))
    assert capsys.readouterr().err == "error: unrecognized arguments: --teacher=T\n"


def test_another_method_is_refused(passed_on):
    with pytest.raises(InputError, match="--method: invalid choice: 'sft'"):
        reflect.main(["--method=sft", "--out=x"])
    assert not passed_on


def test_a_run_that_goes_on_keeps_its_teacher(passed_on, loaded, given):
    """Its D' may be there already, so that the method itself is not asked again."""
    list(reflect.reflect(D, Base(*loaded, given)))
    reflect.main([f"--out={given}"])
    assert passed_on
    with pytest.raises(InputError, match="reflect was begun with --teacher None, not T: give the same again"):
        reflect.main([f"--out={given}", "--teacher=T"])
    with pytest.raises(InputError, match="reflect was begun with --max-r-ifd 1.0, not 0.5"):
        reflect.main([f"--out={given}", "--max-r-ifd=0.5"])


# ------------------------------------------------------------------------------------------------ the score command


def test_the_score_command(loaded, tiny, tmp_path, capsys):
    rows = [{"question": "What is 2 + 2?", "answer": "Four.", "id": 7},
            {"question": "Who?", "answer": "Ann", "context": "Ann."}]
    write_jsonl(tmp_path / "in.jsonl", rows)
    reflect.main([f"--score={tmp_path / 'in.jsonl'}", f"--model={tiny}", f"--out={tmp_path / 'out.jsonl'}", "--device=cpu"])
    found = read_jsonl(tmp_path / "out.jsonl")
    expected = score(*loaded, {"0": PAIRS["a"], "1": ScoredPair("Who?\n\nContext:\nAnn.", "Who?", "Ann")})
    for i, row in enumerate(rows):
        assert found[i] == row | {key: pytest.approx(value, rel=1e-5) for key, value in expected[str(i)].items()}
    assert "2 rows" in capsys.readouterr().out


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "q"}, "line 2: the field 'answer' is missing"),
    ({"question": "q", "answer": ""}, "row 2: the field 'answer' is empty, so there is nothing to score"),
    ({"question": "q", "answer": 4}, "row 2: the field 'answer' must be text"),
    ({"question": "x" * 2100, "answer": "a"}, "row 2: question and answer are longer than the model's context"),
])
def test_bad_rows_are_named(tiny, tmp_path, capsys, row, message):
    (tmp_path / "in.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n" + json.dumps(row) + "\n")
    argv = [f"--score={tmp_path / 'in.jsonl'}", f"--model={tiny}", f"--out={tmp_path / 'out.jsonl'}", "--device=cpu"]
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: reflect.main(argv))
    errors = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and message in errors[-1] and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("change", "message"), [
    (["--device=gpu9"], "error: --device gpu9: this machine has none, or torch cannot use it"),
    (["--dtype=int8"], "error: argument --dtype: invalid choice: 'int8'"),
    (["--no-such"], "error: unrecognized arguments: --no-such"),
])
def test_a_bad_command_line_ends_in_one_line(tiny, tmp_path, capsys, change, message):
    write_jsonl(tmp_path / "in.jsonl", [{"question": "q", "answer": "a"}])
    argv = [f"--score={tmp_path / 'in.jsonl'}", f"--model={tiny}", f"--out={tmp_path / 'out.jsonl'}", *change]
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: reflect.main(argv))
    errors = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(errors) == 1 and errors[0].startswith(message)
