"""IFD and r-IFD against plain transformers calls; phases, retries and drops of Selective Reflection-Tuning."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import evaluate
import reflect
from data import CUSTOM_TASK, READING_TASK, Example, chat_ids, prompt
from files import InputError, exit_cleanly, read_jsonl, write_jsonl
from model import load_model
from reflect import REWRITE_BOTH, TAGS, Pair, ifd, parse_fields, r_ifd, score


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


PAIRS = {"a": Pair("What is 2 + 2?", "What is 2 + 2?", "Four."), "b": Pair("Be brief. Who?", "Who?", "Ann, who else? " * 9),
         "c": Pair("ü" * 60, "ü", "{{answer}}")}


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
    assert ifd(given, alone) == r_ifd(given, alone) == pytest.approx(0.5)


def test_a_tokenizer_without_bos_starts_with_its_eos(loaded):
    model, tokenizer = loaded
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.bos_token = None
    (_, (ids, mask), *_) = reflect.scoring_rows(tokenizer, PAIRS["a"])
    assert ids[0] == tokenizer.eos_token_id and mask == [False] + [True] * (len(ids) - 1)


def test_a_pair_that_does_not_fit_has_no_score(loaded):
    assert set(score(*loaded, PAIRS | {"long": Pair("q", "q", "x" * 2100)})) == set(PAIRS)


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
    """What the method needs of s3ft.BaseModel, with the gold as it is."""

    def __init__(self, model, tokenizer, run, task=CUSTOM_TASK, teacher=None):
        self.model, self.tokenizer, self.run, self.teacher = model, tokenizer, run, teacher
        self.task = replace(task, judge="numeric")

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


def test_phases_keep_what_improves_and_emit_what_is_below_one(loaded, given, monkeypatch):
    scripted(monkeypatch, {
        "a is 4": (0.5, 0.9), "A is 4.": (0.6, 0.9), "a should be 3": (0.7, 0.8),  # both phases improve
        "b is 4": (0.5, 0.9), "no idea at all": (0.5, 0.1), "b should be 4": (0.4, 0.8),  # IFD only equal: rejected
        "c should be 5": (0.5, 0.9),  # r-IFD only equal: dropped
        "d is 4": (0.5, 0.9), "It is 4.": (0.6, 0.9), "d should be 6": (1.0, 0.8),  # IFD not below 1: dropped
        "e should be 7": (0.9, 0.8)})  # no new instruction, even when asked again
    rows = list(reflect.reflect(D, Base(*loaded, given)))
    assert [(x.id, x.question, y, source) for x, y, source, _ in rows] == [
        ("a", "What is A?", "a should be 3", "reflection"), ("b", "What is b?", "b should be 4", "reflection"),
        ("e", "What is e?", "e should be 7", "reflection")]
    kept = {row["id"]: row for row in read_jsonl(given / "reflect.jsonl")}
    assert {name: (row["phase_1"], row["phase_2"], row["emitted"], row["judged"]) for name, row in kept.items()} == {
        "a": ("accepted", "accepted", True, None),  # a new question: nothing to check it with
        "b": ("rejected", "accepted", True, True), "c": ("no rewrite", "rejected", False, None),
        "d": ("accepted", "accepted", False, None), "e": ("no rewrite", "accepted", True, False),
        "f": ("too long", "no rewrite", False, None)}
    assert kept["a"]["scores"] == rows[0][3]["scores"] == {
        "original": {"ifd": 0.5, "r_ifd": 0.9}, "phase_1": {"ifd": 0.6, "r_ifd": 0.9}, "phase_2": {"ifd": 0.7, "r_ifd": 0.8}}
    assert kept["f"]["scores"]["phase_1"] is None and kept["a"]["gold"] == "a is 4"
    text = evaluate.reflect_summary(given)
    assert "kept 3 of 6 rows" in text and "Not checked: 1 with a new question" in text
    assert text.endswith("of the 2 with their own question the judge accepts 1.")
    assert evaluate.reflect_summary(given / "x") is None


def test_real_scores_decide_without_a_script(loaded, given):
    rows = list(reflect.reflect(D, Base(*loaded, given)))
    kept = {row["id"]: row for row in read_jsonl(given / "reflect.jsonl")}
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
    made, real = [], evaluate.generate

    def generate(model, tokenizer, prompts, max_new_tokens, *args, **kwargs):
        made.append([tokenizer.decode(ids) for ids in prompts])
        return real(model, tokenizer, prompts, 5, *args, **kwargs)

    monkeypatch.setattr(evaluate, "generate", generate)
    return made


def test_the_teacher_sees_pair_and_context_once_and_once_more_where_nothing_parses(loaded, tmp_path, monkeypatch):
    made = counting(monkeypatch)
    examples = [Example("a", "Who?", "Ann", "Ann {{instruction}} came.")]
    assert list(reflect.reflect(examples, Base(*loaded, tmp_path, READING_TASK))) == []
    assert [len(prompts) for prompts in made] == [1, 1, 1, 1]  # noise from the tiny model: each phase asks twice
    first, again, answer, last = (prompts[0] for prompts in made)
    assert "### Instruction\nWho?\n\nContext:\nAnn {{instruction}} came.\n\n### Answer\nAnn\n" in first
    assert "not in this form" in again and "[New Instruction] ... [End] and [New Answer] ... [End]" in again
    assert "[Better Answer]" in answer and "not in this form" in last
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    list(reflect.reflect(examples, Base(*loaded, tmp_path, READING_TASK)))
    assert len(made) == 4 and {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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
        list(reflect.reflect(D[:1], Base(*loaded, tmp_path / name, teacher=teacher)))
        replies.append(read_jsonl(tmp_path / name / "reflect_instructions.jsonl")[0]["response"])
    ids = chat_ids(tokenizer, reflect.fill(REWRITE_BOTH, instruction=D[0].question, answer=D[0].answer))
    assert replies[0] == dict(evaluate.generate(model, tokenizer, [ids], 5))[0].text != replies[1]
    rows = [read_jsonl(tmp_path / name / "reflect.jsonl")[0]["scores"]["original"] for name in ("one", "two")]
    assert rows[0] == rows[1]
    with pytest.raises(InputError, match="were made by .*other, not by the base model"):
        list(reflect.reflect(D[:1], Base(*loaded, tmp_path / "one")))


def test_a_teacher_that_is_not_there(loaded, tmp_path):
    with pytest.raises(InputError, match="--teacher /nowhere: cannot be loaded"):
        list(reflect.reflect(D, Base(*loaded, tmp_path, teacher="/nowhere")))


def test_a_gold_without_words(loaded, tmp_path):
    with pytest.raises(InputError, match="row b: the field 'answer' is empty"):
        list(reflect.reflect([D[0], Example("b", "q", " ")], Base(*loaded, tmp_path)))


def test_ifd_is_of_the_turn_that_training_shows(loaded, tmp_path):
    x = Example("a", "Who?", "Ann", "Ann came.")
    base = SimpleNamespace(task=READING_TASK)
    assert reflect.scored_pairs(base, {"a": (x, "Ann")}) == {"a": Pair(prompt(READING_TASK.train, x), "Who?", "Ann")}


# ------------------------------------------------------------------------------------------------ the score command


def test_the_score_command(loaded, tiny, tmp_path, capsys):
    rows = [{"question": "What is 2 + 2?", "answer": "Four.", "id": 7},
            {"question": "Who?", "answer": "Ann", "context": "Ann."}]
    write_jsonl(tmp_path / "in.jsonl", rows)
    reflect.main([f"--score={tmp_path / 'in.jsonl'}", f"--model={tiny}", f"--out={tmp_path / 'out.jsonl'}", "--device=cpu"])
    found = read_jsonl(tmp_path / "out.jsonl")
    expected = score(*loaded, {"0": PAIRS["a"], "1": Pair("Who?\n\nContext:\nAnn.", "Who?", "Ann")})
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
