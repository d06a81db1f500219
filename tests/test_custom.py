"""A person's own files: every usual shape of rows, prompts by row, and one line for what cannot be read."""

import gzip
import json

import pytest

import tasks
from data import Example, prompt
from judges import judge_all
from support.cli import InputError
from tasks.custom import load_custom_task
from tasks.own_files import read_own_file
from tasks.reading import READING

ROW = {"question": "How many?", "answer": "3"}


def write(path, content):
    """Bytes or text as they are, a list as JSON lines."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path, content, judge="numeric", **fields):
    return read_own_file(write(path, content), judge, **fields).rows


def load(path, content, judge="numeric", **flags):
    return load_custom_task([write(path, content)] * 3, judge, **flags)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("name", ["train.json", "train.jsonl", "train.txt", "train"])
@pytest.mark.parametrize("content", [
    json.dumps([ROW, ROW]),
    json.dumps([ROW, ROW], indent=2),
    json.dumps(ROW) + "\n" + json.dumps(ROW),  # as Dataset.to_json writes it
    "\ufeff\n" + json.dumps(ROW) + "\n\r\n" + json.dumps(ROW) + "\r\n",
    json.dumps({"data": [ROW, ROW]}),
])
def test_arrays_and_lines_are_read_under_any_name(tmp_path, name, content):
    assert read(tmp_path / name, content) == [Example("1", "How many?", "3"), Example("2", "How many?", "3")]


def test_one_object_is_one_row(tmp_path):
    assert read(tmp_path / "a.json", json.dumps(ROW, indent=1)) == [Example("1", "How many?", "3")]


@pytest.mark.parametrize(("content", "message"), [
    (gzip.compress(b"{}"), "a.jsonl is a gzip file: unpack it"),
    (b"PAR1\x15\x04", "a.jsonl is a Parquet file"),
    (b"PK\x03\x04", "a.jsonl is a zip file"),
    (json.dumps(ROW).encode("utf-16"), "a.jsonl is text in UTF-16: save it as UTF-8"),
    (json.dumps(ROW).encode("utf-16-le"), "a.jsonl is no text in UTF-8: it holds zero bytes"),
    (json.dumps(ROW).encode() + b'\n{"question": "caf\xe9"}', "a.jsonl, line 2: no text in UTF-8"),
    ("question,answer\nHow many?,3\n", "a.jsonl looks like a table .CSV.: its first line is .question,answer."),
    ("question\tanswer\nHow many?\t3\n", "a.jsonl looks like a table .CSV."),
    ("<<<<<<< HEAD\n" + json.dumps(ROW), "a.jsonl, line 1: not valid JSON"),
    (json.dumps(ROW) + "\n>>>>>>> theirs\n", "a.jsonl, line 2: not valid JSON"),
    ("[\n" + json.dumps(ROW) + ",\n" + json.dumps(ROW), "a.jsonl, line 3: not valid JSON .*begins as a JSON array"),
    (json.dumps([ROW, 3]), "a.jsonl, row 2: expected a JSON object, found int"),
    ('"text"', "a.jsonl, line 1: expected a JSON object, found str"),
    (json.dumps({"question": ["a", "b"], "answer": ["1", "2"]}), "line 1: the field 'question' must be text"),
    ("[]", "a.jsonl: no rows"), ("", "a.jsonl: no rows"), (json.dumps({"data": []}), "a.jsonl: no rows"),
    ('"question";"answer"\n"How many?";"3"\n', "a.jsonl looks like a table .CSV."),
])
def test_what_cannot_be_read_is_named_in_one_line_and_left_as_it_is(tmp_path, content, message):
    path = write(tmp_path / "a.jsonl", content)
    before = path.read_bytes()
    with pytest.raises(InputError, match=message) as error:
        load_custom_task([path] * 3, "numeric")
    assert "\n" not in str(error.value) and path.read_bytes() == before


@pytest.mark.parametrize("name", ["missing.jsonl", "."])
def test_a_file_that_is_not_there(tmp_path, name):
    with pytest.raises(InputError, match="cannot read"):
        read_own_file(tmp_path / name, "numeric")


# ------------------------------------------------------------------------------------------------ shapes of rows

TURNS = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3"}]
SHAREGPT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "3"}]


@pytest.mark.parametrize(("row", "expected"), [
    (ROW, {}),
    ({"id": 7, "question": "How many?", "answer": 3}, {"id": "7"}),
    ({"instruction": "How many?", "input": "", "output": "3"}, {}),
    ({"instruction": "How many?", "input": "Ann has 3.", "output": "3"}, {"context": "Ann has 3."}),
    ({"instruction": "How many?", "output": "3"}, {}),
    ({"instruction": "How many?", "context": "Ann has 3.", "response": "3", "category": "qa"}, {"context": "Ann has 3."}),
    ({"prompt": "How many?", "completion": "3"}, {}),
    ({"prompt": "How many?", "response": "3"}, {}),
    ({"problem": "How many?", "solution": "so", "answer": "3"}, {}),
    ({"query": "How many?", "response": "3", "original_question": "?"}, {}),
    ({"input": "How many?", "target": "3"}, {}),
    ({"messages": TURNS}, {}),
    ({"prompt_id": "x", "messages": TURNS, "id": "m"}, {"id": "m"}),
    ({"conversations": SHAREGPT}, {}),
    ({"ID": "s", "Body": "Ann has 3.", "Question": "How many?", "Answer": 3.0, "Type": "x"},
     {"id": "s", "question": "Ann has 3. How many?", "answer": "3.0"}),
    ({"body": "Ann has 3.", "question": "How many?", "answer": "3 (apples)"},
     {"question": "Ann has 3. How many?", "answer": "3 (apples)"}),
    (ROW | {"answer": ["3", "three", "3"]}, {"aliases": ("three",)}),
    (ROW | {"answer": [3, 3.0]}, {"aliases": ("3.0",)}),
    (ROW | {"aliases": ["three", "3"]}, {"aliases": ("three",)}),
    (ROW | {"aliases": None}, {}),
    ({"question": "How many?", "context": "c", "answers": {"text": ["3", "three"], "answer_start": [0, 4]}},
     {"context": "c", "aliases": ("three",)}),
    ({"question": "How many?", "context": "c", "answers": {"text": [], "answer_start": []}},
     {"context": "c", "answer": "unanswerable", "unanswerable": True}),
    ({"question": "How many?", "unanswerable": True}, {"answer": "unanswerable", "unanswerable": True}),
    ({"question": "How many?", "answer": "3", "answerable": False}, {"answer": "unanswerable", "unanswerable": True}),
    ({"question": "How many?", "answer": "3", "is_impossible": True}, {"answer": "unanswerable", "unanswerable": True}),
])
def test_the_usual_shapes_are_recognised(tmp_path, row, expected):
    found, = read(tmp_path / "a.jsonl", [row])
    assert found == Example(**{"id": "1", "question": "How many?", "answer": "3"} | expected)


def test_mbpps_own_rows_for_the_code_judge(tmp_path):
    row = {"task_id": 11, "text": "Add.", "code": "def f(a):\n  return a", "test_list": ["assert f(1) == 1"],
           "test_setup_code": "import math", "challenge_test_list": []}
    task, (rows, *_) = load(tmp_path / "a.jsonl", [row], "code")
    assert rows == [Example("11", "Add.", row["code"], tests=("assert f(1) == 1",), setup="import math")]
    assert "code" in task.note and list(judge_all("code", [(rows[0], task.gold(rows[0]))])) == [True]


def test_fields_by_name(tmp_path):
    row = {"q": "How many?", "a": "3", "question": "no", "answer": "no"}
    assert read(tmp_path / "a.jsonl", [row], question_field="q", answer_field="a") == [Example("1", "How many?", "3")]
    assert read(tmp_path / "a.jsonl", [row], answer_field="a") == [Example("1", "no", "3")]


@pytest.mark.parametrize(("rows", "flags", "message"), [
    ([{"q": "How many?", "a": "3"}], {}, r"line 1: the field 'question' is missing .found: q, a.: .*--question-field"),
    ([{"question": "How many?", "a": "3"}], {}, r"line 1: the field 'answer' is missing .*: name yours with --answer-field"),
    ([ROW], {"question_field": "q"}, "the field 'q' is missing .found: question, answer"),
    ([ROW], {"answer_field": "a"}, "the field 'a' is missing .found: question, answer"),
    ([ROW, {"question": "How many?"}], {}, "line 2: the field 'answer' is missing .found: question."),
    ([ROW, {"question": " ", "answer": "3"}], {}, "line 2: the field 'question' is empty"),
    ([ROW | {"answer": []}], {}, "line 1: the field 'answer' is an empty list"),
    ([ROW | {"answer": {"x": 1}}], {}, "line 1: the field 'answer' must be text, found"),
    ([ROW | {"answers": 1, "answer": {"text": "3"}}], {}, "line 1, answer: 'text' must be a list of strings"),
    ([ROW | {"aliases": "three"}], {}, "line 1: 'aliases' must be a list of strings"),
    ([ROW | {"unanswerable": "false"}], {}, "line 1: the field 'unanswerable' must be true or false, found \"false\""),
    ([ROW | {"unanswerable": 1}], {}, "line 1: the field 'unanswerable' must be true or false, found 1"),
    ([ROW | {"is_impossible": "false"}], {}, "line 1: the field 'is_impossible' must be true or false"),
    ([{"messages": TURNS}, {"messages": [{"role": "system", "content": "Be kind."}, *TURNS]}], {},
     "line 2: the field 'messages' must be one user and one assistant turn, found system, user, assistant: leave"),
    ([{"messages": TURNS, "a": "3"}], {"answer_field": "a"}, "line 1: the field 'question' is missing"),
    ([{"id": "1", "context": "c", "question": "q", "answerable": "yes", "answer": "a"}], {"question_field": "question"},
     "a.jsonl is in Slobodkin's format: --question-field and --answer-field do not go with it"),
    ([{"messages": TURNS[:1]}], {}, "one user and one assistant turn, found user:"),
    ([{"messages": []}], {}, "one user and one assistant turn, found none:"),
    ([{"messages": TURNS[::-1]}], {}, "found assistant, user:"),
    ([{"messages": "How many?"}], {}, "line 1: the field 'messages' must be a list"),
    ([{"messages": [{"role": "user", "content": None}, TURNS[1]]}], {},
     "line 1, messages 1: the field 'content' must be text, found null"),
    ([{"messages": ["How many?", "3"]}], {}, "line 1, messages 1: the field 'role' is missing"),
])
def test_a_bad_row_is_named_with_its_line_and_field(tmp_path, rows, flags, message):
    with pytest.raises(InputError, match=f"a.jsonl, {message}" if message.startswith("line") else message) as error:
        read(tmp_path / "a.jsonl", rows, **flags)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------ prompts

MIXED = [ROW, ROW | {"context": "Ann has 3."}]


def prompts(task, rows):
    return [prompt(task.train, row) for row in rows]


def test_a_context_changes_the_prompt_of_its_own_row_only(tmp_path):
    task, (rows, *_) = load(tmp_path / "a.jsonl", MIXED)
    assert prompts(task, rows) == ["How many?", "Ann has 3.\n\nHow many?"]
    assert (task.max_new_tokens, task.steps, task.eval_every) == (512, 1000, 100)
    assert "1 of 2 training rows have a context; prompt: plain" in task.note and "--prompt reading" in task.note
    assert prompt(task.paraphrase, rows[1], "3").endswith("Ann has 3.\n\nHow many?\n\nReference Answer:\n3,\n\nResponse:")


def test_the_reading_prompt_is_for_who_asks_and_for_rows_with_a_context(tmp_path):
    task, (rows, *_) = load(tmp_path / "a.jsonl", MIXED, prompt="reading")
    assert prompts(task, rows) == ["How many?", prompt(READING, rows[1])]
    assert task.max_new_tokens == 512 and "prompt: reading" in task.note
    task, _ = load(tmp_path / "a.jsonl", MIXED[1:], prompt="reading")
    assert task.max_new_tokens == 64


def test_braces_in_a_row_are_no_variables(tmp_path):
    odd = {"question": "{{context}} {{/context}} {{gold_response}}", "answer": "3", "context": "{{#context}}{{question}}"}
    task, (rows, *_) = load(tmp_path / "a.jsonl", [odd])
    assert prompts(task, rows) == ["{{#context}}{{question}}\n\n{{context}} {{/context}} {{gold_response}}"]


@pytest.mark.parametrize(("name", "content"), [
    ("p.json", json.dumps({"predict": "Q: {{question}}{{#context}} ({{ context }}){{/context}}", "train": "{{question}}",
                           "paraphrase": "{{question}} Like {{gold_response}}:"})),
    ("p.toml", 'predict = "Q: {{question}}{{#context}} ({{ context }}){{/context}}"\ntrain = "{{question}}"\n'
               'paraphrase = "{{question}} Like {{gold_response}}:"\n'),
])
def test_templates_from_a_file(tmp_path, name, content):
    task, (rows, *_) = load(tmp_path / "a.jsonl", MIXED, prompt_file=write(tmp_path / name, content))
    assert [prompt(task.predict, row) for row in rows] == ["Q: How many?", "Q: How many? (Ann has 3.)"]
    assert prompts(task, rows) == ["How many?", "How many?"]
    assert prompt(task.paraphrase, rows[0], "3") == "How many? Like 3:" and name in task.note


def test_what_a_file_of_templates_leaves_out(tmp_path):
    path = write(tmp_path / "p.json", json.dumps({"predict": "100 %s: {{question}}"}))
    task, (rows, *_) = load(tmp_path / "a.jsonl", MIXED, prompt_file=path)
    assert task.train == task.predict and "### Instruction:\n100 %s: How many?\n" in prompt(task.paraphrase, rows[0], "3")


def test_a_template_that_asks_for_code_marks_ends_responses_with_them(tmp_path):
    row = {"question": "Add.", "answer": "def f(): pass", "tests": ["assert f() is None"]}
    marked = write(tmp_path / "p.json", json.dumps({"predict": "{{question}} Between [[BEGIN]] and [[DONE]]: {{tests}}"}))
    plain = write(tmp_path / "q.json", json.dumps({"predict": "{{question}} {{testcase_1}}"}))
    task, (rows, *_) = load(tmp_path / "a.jsonl", [row], "code", prompt_file=marked)
    assert task.gold(rows[0]) == "[[BEGIN]]\ndef f(): pass\n[[DONE]]" and task.stop == "[[DONE]]"
    task, (rows, *_) = load(tmp_path / "a.jsonl", [row], "code", prompt_file=plain)
    assert task.gold(rows[0]) == "def f(): pass" and task.stop is None
    assert prompts(task, rows) == ["Add. assert f() is None"]


@pytest.mark.parametrize(("content", "message"), [
    ("{", "p.json: not valid JSON"),
    ("[]", "p.json: expected an object with the templates predict, train, paraphrase"),
    ("{}", "p.json: the field 'predict' is missing"),
    ('{"predict": ["{{question}}"]}', "p.json: the field 'predict' must be text"),
    ('{"predict": "{{question}}", "test": "{{question}}"}', "p.json: unknown template 'test'"),
    ('{"predict": "{{queston}}"}', "p.json, predict: no row has {{queston}}: use {{question}}"),
    ('{"predict": "Say something."}', "p.json, predict: it never shows {{question}}"),
    ('{"predict": "{{question}} {{gold_response}}"}', "p.json, predict: it shows {{gold_response}}"),
    ('{"predict": "{{question}}", "paraphrase": "{{question}}"}', "p.json, paraphrase: it never shows {{gold_response}}"),
    ('{"predict": "{{#tests}}{{question}}{{/tests}}"}', "p.json, predict: {{# without its end"),
    ('{"predict": "{{#context}}{{question}}"}', "p.json, predict: {{# without its end"),
    (gzip.compress(b"{}"), "p.json is a gzip file"),
])
def test_bad_templates_are_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(InputError) as error:
        load(tmp_path / "a.jsonl", MIXED, prompt_file=write(tmp_path / "p.json", content))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_toml_and_bad_names(tmp_path):
    with pytest.raises(InputError, match="p.toml: not valid TOML"):
        load(tmp_path / "a.jsonl", MIXED, prompt_file=write(tmp_path / "p.toml", "predict ="))
    with pytest.raises(InputError, match="--prompt redaing: choose from plain, reading, code"):
        load(tmp_path / "a.jsonl", MIXED, prompt="redaing")
    with pytest.raises(InputError, match="--prompt and --prompt-file: give one"):
        load(tmp_path / "a.jsonl", MIXED, prompt="reading", prompt_file="p.json")


# ------------------------------------------------------------------------------------------------ a run's config.json


def test_a_config_names_all_of_it_and_an_older_one_takes_the_defaults(tmp_path):
    path = str(write(tmp_path / "a.jsonl", [{"q": "How many?", "a": "3", "context": "c"}] + [{"q": "Why?", "a": "so"}]))
    config = {"task": "custom", "files": [path] * 3, "judge": "recall", "question_field": "q", "answer_field": "a",
              "prompt": "reading", "limit": 1, "max_new_tokens": 9}
    task, splits = tasks.task_of(config, "")
    assert [len(rows) for rows in splits] == [1, 1, 1] and (task.judge, task.max_new_tokens) == ("recall", 9)
    assert prompts(task, splits[0]) == [prompt(READING, splits[0][0])]

    path = str(write(tmp_path / "b.jsonl", MIXED))
    task, splits = tasks.task_of({"task": "custom", "files": [path] * 3, "judge": "numeric"}, "")
    assert [len(rows) for rows in splits] == [2, 2, 2] and (task.judge, task.max_new_tokens) == ("numeric", 512)
