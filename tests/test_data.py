"""Prompts to the letter, splits by the book, and bad files named by line."""

import json
from dataclasses import replace

import pytest
from conftest import byte_tokenizer

import data
import tasks
from data import Example
from engine import chat
from support.cli import InputError
from tasks import custom, gsm8k, mbpp

TOKENIZER = byte_tokenizer()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content))
    return path


def test_gsm8k_prompts_read_as_figures_3_5_and_7():
    x, gold = Example("1", "How many {eggs}? {{question}}", "#### 3"), "Three.\nThe answer is 3."
    opening = "You are an expert in math. Below is a math question. Write a response that appropriately answers the question. "
    ending = "Your final answer should be an integer at the end of your response, formatted as: The answer is {answer}."
    figure_3 = opening + ending + "\nQuestion: How many {eggs}? {{question}}"
    assert data.prompt(tasks.TASKS["gsm8k"].train, x) == figure_3
    assert data.prompt(tasks.TASKS["gsm8k"].predict, x) == figure_3 + "\nGreat! Let's think step by step."
    assert data.prompt(tasks.TASKS["gsm8k"].paraphrase, x, gold) == (
        "You are an expert in math. Below are a reference answer and its corresponding math question. Refer to the reference "
        "answer and write a response that appropriately answers the question. " + ending + "\n\nReference Answer:\nThree.\n"
        "The answer is 3.,\n\nQuestion:\nHow many {eggs}? {{question}},\n\nResponse:\nGreat! Let's think step by step.")


def test_mbpp_prompts_read_as_figures_4_and_6():
    x = Example("1", "Add two numbers", "code", tests=("assert a", "assert b", "assert c"))
    task = tasks.TASKS["mbpp"]
    only_code = ("Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. "
                 "Do not generate any explanation.")
    assert task.train == task.predict
    assert data.prompt(task.predict, x) == (
        "You are an expert Python programmer, and here is your task: Add two numbers. Your code should pass these tests:\n"
        "assert a\nassert b\nassert c\n" + only_code)
    assert data.prompt(task.paraphrase, x, "[[BEGIN]]\ncode\n[[DONE]]") == (
        "Below are an instruction that describes a task along with a reference answer. Using the reference answer as a guide, "
        "write your own response.\n\n### Instruction:\nYou are an expert Python programmer, and here is your task: Add two "
        "numbers. Your code should pass these tests.\n\nassert a\nassert b\nassert c\n\n" + only_code +
        "\n\nReference Answer:\n[[BEGIN]]\ncode\n[[DONE]],\n\nResponse:")


def test_golds_end_as_the_prompts_ask():
    x = Example("1", "q", "She has 4 * 500 = <<4*500=2000>>2,000 eggs.\n#### 2,000")
    assert gsm8k.gsm8k_gold(x) == "She has 4 * 500 = 2,000 eggs.\nThe answer is 2000."
    assert mbpp.mbpp_gold(Example("1", "q", "def f():\n\tpass\n")) == "[[BEGIN]]\ndef f():\n\tpass\n[[DONE]]"


def test_one_bos_and_the_chat_templates_own_end_of_turn():
    ids = chat.chat_ids(TOKENIZER, "hi")
    assert TOKENIZER.decode(ids) == "<s><|user|>hi<|end|><|assistant|>"
    assert ids.count(TOKENIZER.bos_token_id) == 1
    assert chat.end_of_turn(TOKENIZER) == TOKENIZER.convert_tokens_to_ids("<|end|>")


def test_only_response_and_end_of_turn_are_targets():
    ids, is_target = chat.training_ids(TOKENIZER, "hi", "yo")
    assert TOKENIZER.decode([t for t, target in zip(ids, is_target, strict=True) if target]) == "yo<|end|>"
    assert ids[: is_target.index(True)] == chat.chat_ids(TOKENIZER, "hi")


def test_end_of_turn_is_a_target_where_padding_has_its_id():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    ids, is_target = chat.training_ids(tokenizer, "hi", "yo")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == ids[-1] and is_target[-1]


def gsm8k_files(folder, train=7473, test=1319):
    for name, count in (("train", train), ("test", test)):
        rows = [{"question": f"{name} {i}?", "answer": f"#### {i}"} for i in range(count)]
        write(folder / "gsm8k" / f"{name}.jsonl", rows)
    return folder


def test_gsm8k_holds_out_150_of_7473(tmp_path):
    _, (train, validation, test) = tasks.load_task("gsm8k", gsm8k_files(tmp_path))
    assert (len(train), len(validation), len(test)) == (7323, 150, 1319)
    assert len({x.id for x in train + validation}) == 7473
    again = tasks.load_task("gsm8k", tmp_path)[1]
    assert again[1] == validation


def test_a_cut_file_is_not_taken_for_the_whole(tmp_path):
    with pytest.raises(InputError, match="has 7000 rows, the original has 7473"):
        tasks.load_task("gsm8k", gsm8k_files(tmp_path, train=7000))


def test_mbpp_splits_by_task_id(tmp_path):
    rows = [{"task_id": i, "text": "t", "code": "c\r\nd", "test_list": ["a"], "test_setup_code": "s"} for i in range(1, 975)]
    write(tmp_path / "mbpp" / "mbpp.jsonl", rows)
    _, splits = tasks.load_task("mbpp", tmp_path)
    assert [(x[0].id, x[-1].id, len(x)) for x in splits] == [("601", "974", 374), ("511", "600", 90), ("11", "510", 500)]
    assert splits[0][0].setup == "s" and splits[0][0].answer == "c\nd"


def test_a_missing_file_without_network_names_file_and_source(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(InputError) as error:
        tasks.load_task("gsm8k", tmp_path)
    assert str(tmp_path / "gsm8k" / "train.jsonl") in str(error.value)
    assert "grade_school_math/data/train.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_download_that_is_not_the_known_file_is_refused(tmp_path, monkeypatch):
    import io
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: io.BytesIO(b"<html>"))
    with pytest.raises(InputError, match="sha256"):
        tasks.load_task("gsm8k", tmp_path)
    assert not (tmp_path / "gsm8k" / "train.jsonl").exists()


def test_embedded_reading_set_is_apart_by_passage_and_a_quarter_unanswerable():
    _, splits = tasks.load_task("reading", "nowhere")
    assert len(splits[0]) >= 96 and len(splits[2]) >= 96
    contexts = [{x.context for x in rows} for rows in splits]
    assert not (contexts[0] & contexts[1] or contexts[0] & contexts[2] or contexts[1] & contexts[2])
    for rows in splits:
        assert sum(x.unanswerable for x in rows) / len(rows) == pytest.approx(0.25, abs=0.01)
        assert all(x.answer in x.context for x in rows if not x.unanswerable)


def squad(tmp_path, qas):
    return write(tmp_path / "s.json", json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": qas}]}]}))


def test_squad_json_is_read_as_reading_comprehension(tmp_path):
    path = squad(tmp_path, [
        {"id": "1", "question": "q", "answers": [{"text": "a"}, {"text": "b"}, {"text": "a"}]},
        {"id": "2", "question": "r", "answers": [], "is_impossible": True}])
    task, (rows, *_) = custom.load_custom_task([path] * 3, "recall")
    assert rows[0] == Example("1", "q", "a", "c", aliases=("b",))
    assert rows[1] == Example("2", "r", "unanswerable", "c", unanswerable=True)
    assert "Context:\nc\n" in data.prompt(task.train, rows[0]) and task.judge == "recall"


@pytest.mark.parametrize(("content", "where"), [
    ('{"question": "q"}\n', "rows.jsonl, line 1: the field 'answer' is missing"),
    ('{"question": "q", "answer": "a"}\n\n{"question": "q", "answer": null}\n', "line 3: the field 'answer' must be .*null"),
    ('{"question": "q", "answer": ["a", null]}\n', "the field 'answer' must be text, found null"),
    ('{"question": "q", "answer": true}\n', "the field 'answer' must be text, found true"),
    ('{"question": null, "unanswerable": true}\n', "line 1: the field 'question' must be text, found null"),
    ('{"question": "q", "answer": "a", "context": null}\n', "line 1: the field 'context' must be text, found null"),
    ('{"question": "q", "answer": "a", "setup": ["import os"]}\n', "line 1: the field 'setup' must be text"),
    ('{"question": "q", "answer": "a", "id": null}\n', "line 1: the field 'id' must be text, found null"),
    ('{"question": "q", "answer": "a"}\n{"answer": "a"}\n', "line 2: the field 'question' is missing"),
    ('{"question": "q", "answer": "a"}\n\n{"question": \n', "line 3: not valid JSON"),
    ('[1]\n', "row 1: expected a JSON object, found int"),
    ('{"question": "q", "answer": "a"}\n[1]\n', "line 2: expected a JSON object, found list"),
    ('{"question": "q", "answer": "a", "tests": "t"}\n', "line 1: 'tests' must be a list of strings"),
    ("", "no rows"),
    ('{"id": 1, "question": "q", "answer": "a"}\n{"id": "1", "question": "q", "answer": "a"}\n', "id '1' comes twice"),
    ("[" * 100_000, "line 1: not valid JSON"),
])
def test_a_bad_row_is_named(tmp_path, content, where):
    path = write(tmp_path / "rows.jsonl", content)
    with pytest.raises(InputError, match=where):
        custom.load_custom_task([path] * 3, "numeric")


def test_a_custom_code_task_shows_its_tests(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"question": "Add.", "answer": "def f(a, b): return a + b", "tests": ["assert f(1, 2) == 3", "assert f(0, 0) == 0"]}
    path.write_text(json.dumps(row))
    task, (rows, *_) = custom.load_custom_task([path] * 3, "code")
    assert data.prompt(task.predict, rows[0]) == (
        "Add.\nYour code should pass these tests:\nassert f(1, 2) == 3\nassert f(0, 0) == 0\n"
        "Generate only the python code encapsulated between [[BEGIN]] and [[DONE]] tags. Do not generate any explanation.")
    assert task.gold(rows[0]) == "[[BEGIN]]\ndef f(a, b): return a + b\n[[DONE]]" and task.stop == "[[DONE]]"


def test_numbers_and_blank_lines_in_a_custom_file(tmp_path):
    path = write(tmp_path / "rows.jsonl", '\n{"question": "q", "answer": 4}\n\n{"id": 9, "question": "r", "answer": 0.5}\n'
                                          '{"question": "s", "answer": null, "unanswerable": true}\n')
    assert custom.read_own_file(path, "numeric").rows == [Example("1", "q", "4"), Example("9", "r", "0.5"),
                                                           Example("3", "s", "unanswerable", unanswerable=True)]


def test_the_code_judge_needs_tests_in_every_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(InputError, match="'tests' is missing"):
        custom.load_custom_task([path] * 3, "code")


def test_a_prompt_that_asks_for_more_than_the_row_has(tmp_path):
    x = Example("7", "q", "a", tests=("assert a",))
    with pytest.raises(InputError, match="row 7.*{{testcase_2}}"):
        data.prompt(mbpp.MBPP_PREDICT, x)


def test_unknown_task():
    with pytest.raises(InputError, match="unknown task 'gsm9k': choose from gsm8k"):
        tasks.load_task("gsm9k", "")


NQ_ROW = {"id": "1", "context": "c", "question": "q", "answerable": "yes", "answer": "a"}


@pytest.mark.parametrize(("change", "expected"), [
    ({}, Example("1", "q", "a", "c")),
    ({"answer": None, "answers": ["a", "b"]}, Example("1", "q", "a", "c", aliases=("b",))),
    ({"answerable": "no"}, Example("1", "q", "unanswerable", "c", unanswerable=True)),
])
def test_nq_rows(tmp_path, change, expected):
    for name in ("train", "dev", "test"):
        write(tmp_path / "nq" / f"{name}.json", json.dumps([NQ_ROW | change]))
    task, (rows, *_) = tasks.load_task("nq", tmp_path)
    assert rows == [expected] and task.judge == "llm"


def test_nq_without_answers_says_so(tmp_path):
    write(tmp_path / "nq" / "train.json", json.dumps([NQ_ROW | {"answer": ""}]))
    with pytest.raises(InputError, match="train.json, row 1: answerable, but"):
        tasks.load_task("nq", tmp_path)
    with pytest.raises(InputError, match="no plain download"):
        tasks.load_task("nq", tmp_path / "elsewhere")


def test_limit_cuts_every_split():
    _, splits = tasks.task_of({"task": "reading", "limit": 5}, "")
    assert [len(rows) for rows in splits] == [5, 5, 5]
    assert replace(splits[0][0], id="") == replace(tasks.load_task("reading", "")[1][0][0], id="")
