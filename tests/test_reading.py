"""Loaders on small files of the upstream shapes, written here; reading metrics against plain calculations."""

import io
import json
import zipfile
from collections import Counter

import pytest

import tasks
from data import Example, hold_out, prompt
from results.reading_scores import reading_row, reading_scores
from support.cli import InputError
from tasks import custom, multidoc2dial, reading


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def put_rows(path, rows):
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------ Slobodkin et al.

SLOBODKIN = {"id": "1", "context": "c", "question": "q", "answerable": "yes", "answer": "a", "additional_data": "{}"}


@pytest.mark.parametrize(("change", "answer", "aliases"), [
    ({}, "a", ()),
    ({"answer": ["a", "b", "a"]}, "a", ("b",)),
    ({"answer": None, "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}, "a", ("b",)),
    ({"answer": "", "additional_data": '{"answers": ["a"]}'}, "a", ()),
    ({"answer": "", "additional_data": {"answer": "a"}}, "a", ()),
    ({"context": ""}, "a", ()),
])
def test_slobodkin_answers_are_read_where_they_are(tmp_path, change, answer, aliases):
    row = SLOBODKIN | change
    expected = Example("1", "q", answer, row["context"], aliases=aliases)
    assert reading.read_slobodkin(put(tmp_path / "a.json", [row])) == [expected]


@pytest.mark.parametrize(("row", "message"), [
    ({key: value for key, value in SLOBODKIN.items() if key != "answer"}, "row 2: answerable, but it has no 'answer'"),
    (SLOBODKIN | {"answer": [1]}, "row 2: answerable, but it has no 'answer'"),
    (SLOBODKIN | {"answer": "", "additional_data": "no json"}, "row 2: answerable, but it has no 'answer'"),
    (SLOBODKIN | {"answerable": "maybe"}, "row 2: 'answerable' is 'maybe', expected yes or no"),
    ({"id": "1", "context": "c", "question": "q"}, "row 2: the field 'answerable' is missing"),
    (SLOBODKIN | {"context": None}, "row 2: the field 'context' must be text"),
    ("text", "row 2: the field 'id' is missing"),
])
def test_bad_slobodkin_rows_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        reading.read_slobodkin(put(tmp_path / "a.json", [SLOBODKIN, row]))


def test_an_id_that_is_answerable_and_not_becomes_two(tmp_path):
    rows = [SLOBODKIN, SLOBODKIN | {"answerable": "no", "answer": ""}, SLOBODKIN | {"id": "2", "answerable": "no"}]
    found = reading.read_slobodkin(put(tmp_path / "a.json", rows))
    assert [(x.id, x.answer, x.unanswerable) for x in found] == [
        ("1", "a", False), ("1-unanswerable", "unanswerable", True), ("2", "unanswerable", True)]


def test_an_id_that_is_answerable_twice_is_refused(tmp_path):
    path = put(tmp_path / "a.json", [SLOBODKIN, SLOBODKIN])
    with pytest.raises(InputError, match="id '1' comes twice"):
        custom.load_custom_task([path] * 3, "recall")


def test_a_custom_json_list_is_read_as_slobodkins(tmp_path):
    path = put(tmp_path / "a.json", [SLOBODKIN])
    task, (rows, *_) = custom.load_custom_task([path] * 3, "recall")
    assert rows == [Example("1", "q", "a", "c")]
    assert prompt(task.train, rows[0]) == prompt(reading.READING, rows[0])


# ------------------------------------------------------------------------------------------------ SQuAD


def squad_file(qas_by_context):
    paragraphs = [{"context": context, "qas": qas} for context, qas in qas_by_context.items()]
    return {"version": "v2.0", "data": [{"title": "T", "paragraphs": paragraphs}]}


def question(id, answers=("a",), **more):
    return {"id": id, "question": f"q {id}", "answers": [{"text": text, "answer_start": 0} for text in answers], **more}


def test_squad_v2_kinds_of_rows(tmp_path):
    qas = [question("1", ("a", "b", "a"), is_impossible=False), question("2", (), is_impossible=True, plausible_answers=[]),
           question("3", ()), {"id": "4", "question": "q 4", "is_impossible": True}]
    rows = reading.read_squad(put(tmp_path / "s.json", squad_file({"c": qas, "": [question("5")]})))[0]
    assert [(x.id, x.answer, x.aliases, x.unanswerable, x.context) for x in rows] == [
        ("1", "a", ("b",), False, "c"), ("2", "unanswerable", (), True, "c"), ("3", "unanswerable", (), True, "c"),
        ("4", "unanswerable", (), True, "c"), ("5", "a", (), False, "")]


@pytest.mark.parametrize(("content", "message"), [
    (squad_file({"c": [], "d": [question("1"), {"id": "9", "question": "q"}]}),
     "s.json, article 1, paragraph 2, question 2 .id 9.: the field 'answers' is missing"),
    (squad_file({"c": [{"id": "9", "answers": []}]}), "article 1, paragraph 1, question 1 .id 9.: the field 'question' is mis"),
    (squad_file({"c": [{"question": "q"}]}), "article 1, paragraph 1, question 1: the field 'id' is missing"),
    (squad_file({"c": [question(None)]}), "question 1: the field 'id' must be text, found null"),
    (squad_file({"c": [question("9", (None,))]}), "question 1 .id 9.: the field 'text' must be text, found null"),
    (squad_file({"c": [question("9") | {"answers": "a"}]}), "id 9.: the field 'answers' must be a list, found \"a\""),
    (squad_file({"c": {}}), "article 1, paragraph 1: the field 'qas' must be a list, found {}"),
    (squad_file({"c": [question("9", is_impossible="false")]}), "'is_impossible' must be true or false, found \"false\""),
    (squad_file({"c": [question("9", is_impossible=0)]}), "'is_impossible' must be true or false, found 0"),
    ({"data": [{"paragraphs": [{"context": None, "qas": []}]}]}, "paragraph 1: the field 'context' must be text, found null"),
    ({"data": [{"paragraphs": ["c"]}]}, "article 1, paragraph 1: the field 'context' is missing"),
    ({"data": [{"title": "T"}]}, "article 1: the field 'paragraphs' is missing"),
    ([1], "s.json, read as SQuAD's JSON: the field 'data' is missing"), ("{", "not valid JSON"),
])
def test_bad_squad_rows_are_named(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        reading.read_squad(put(tmp_path / "s.json", content))


def test_a_number_as_id_becomes_text(tmp_path):
    path = put(tmp_path / "s.json", squad_file({"c": [question(7), question(8, ())]}))
    assert [x.id for x in reading.read_squad(path)[0]] == ["7", "8"]


@pytest.mark.parametrize(("task", "version"), [("squad", "v2.0"), ("squad1", "v1.1")])
def test_squad_validates_on_paragraphs_of_its_own(tmp_path, task, version):
    contexts = {f"context {i}": [question(f"{i}-{j}") for j in range(3)] for i in range(40)}
    put(tmp_path / "squad" / f"train-{version}.json", squad_file(contexts))
    put(tmp_path / "squad" / f"dev-{version}.json", squad_file({"c": [question("d")]}))
    _, (train, validation, test) = tasks.load_task(task, tmp_path)
    assert (len(train), len(validation), [x.id for x in test]) == (108, 12, ["d"])
    assert not {x.context for x in train} & {x.context for x in validation}


def offline(*args, **kwargs):
    raise OSError("no network")


@pytest.mark.parametrize(("task", "named"), [
    ("squad", ("squad/train-v2.0.json", "https://rajpurkar.github.io/SQuAD-explorer/dataset/train-v2.0.json")),
    ("musique", ("musique/musique_full_v1.0_train.jsonl", "https://github.com/StonyBrookNLP/musique")),
    ("multidoc2dial", ("multidoc2dial/multidoc2dial.zip", "https://doc2dial.github.io/multidoc2dial/file/multidoc2dial.zip")),
    ("nq", ("nq/train.json", "https://github.com/lovodkin93/unanswerability")),
])
def test_a_missing_file_names_itself_and_its_home(tmp_path, monkeypatch, task, named):
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(InputError) as error:
        tasks.load_task(task, tmp_path)
    assert all(text in str(error.value) for text in (*named, str(tmp_path))) and "\n" not in str(error.value)


def test_hold_out_takes_whole_groups_and_at_most_about_150_rows():
    rows = [Example(f"{i}", "q", "a", context=f"{i // 7}") for i in range(7000)]
    train, validation = hold_out(rows, lambda x: x.context)
    assert 150 <= len(validation) < 157 and len(train) + len(validation) == 7000
    assert not {x.context for x in train} & {x.context for x in validation}
    assert hold_out(rows, lambda x: x.context) == (train, validation)


# ------------------------------------------------------------------------------------------------ MuSiQue


def musique_row(id, answerable, **more):
    paragraphs = [{"idx": i, "title": f"T{i}", "paragraph_text": f"Text {i}.", "is_supporting": i == 1} for i in range(2)]
    return {"id": id, "paragraphs": paragraphs, "question": "Whose?", "question_decomposition": [], "answer": "Ann",
            "answer_aliases": ["Anna", "Ann"], "answerable": answerable, **more}


def test_musique_rows_come_twice_and_stay_together(tmp_path):
    rows = [musique_row(f"2hop__{i}", answerable) for i in range(30) for answerable in (True, False)]
    put_rows(tmp_path / "musique" / "musique_full_v1.0_train.jsonl", rows)
    put_rows(tmp_path / "musique" / "musique_full_v1.0_dev.jsonl", rows[:2])
    _, (train, validation, test) = tasks.load_task("musique", tmp_path)
    assert test == [Example("2hop__0", "Whose?", "Ann", "T0\nText 0.\n\nT1\nText 1.", aliases=("Anna",)),
                    Example("2hop__0-unanswerable", "Whose?", "unanswerable", "T0\nText 0.\n\nT1\nText 1.", unanswerable=True)]
    stems = [{x.id.removesuffix("-unanswerable") for x in part} for part in (train, validation)]
    assert (len(train), len(validation)) == (54, 6) and not stems[0] & stems[1]


@pytest.mark.parametrize(("change", "expected"), [
    ({"paragraphs": [], "answer": ["Ann", "A."]}, ("Ann", ("A.", "Anna"), "")),
    ({"answer_aliases": None}, ("Ann", (), "T0\nText 0.\n\nT1\nText 1.")),
    ({"answerable": None}, ("Ann", ("Anna",), "T0\nText 0.\n\nT1\nText 1."))])
def test_odd_musique_rows(tmp_path, change, expected):
    x = reading.read_musique(put_rows(tmp_path / "m.jsonl", [musique_row("1", True) | change]))[0]
    assert (x.answer, x.aliases, x.context) == expected


@pytest.mark.parametrize(("row", "message"), [
    ({"id": "1", "paragraphs": [], "question": "q"}, "row 1: the field 'answer' is missing .the test set has none"),
    (musique_row("1", True, paragraphs=[{"title": "T"}]), "row 1: the field 'paragraph_text' is missing"),
    (musique_row("1", True, paragraphs="text"), "row 1: the field 'paragraphs' must be a list"),
    (musique_row("1", "false"), "row 1: the field 'answerable' must be true or false, found \"false\""),
    ({"id": "1", "question": "q"}, "line 1: the field 'paragraphs' is missing"),
])
def test_bad_musique_rows_are_named(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        reading.read_musique(put_rows(tmp_path / "m.jsonl", [row]))


# ------------------------------------------------------------------------------------------------ MultiDoc2Dial

DOCUMENTS = {"doc_data": {"dmv": {name: {"doc_id": name, "title": name, "doc_text": f"Text of {name}.", "spans": {}}
                                  for name in ("d1", "d2")}, "va": {}}}


def turn(id, role, da, utterance, *documents):
    references = [{"id_sp": str(i), "label": "solution", "doc_id": name} for i, name in enumerate(documents)]
    return {"turn_id": id, "role": role, "da": da, "references": references, "utterance": utterance}


DIALOGUE = {"dial_id": "x", "turns": [
    turn(1, "agent", "respond_solution", "Hello.", "d1"),  # answers nobody
    turn(2, "user", "query_condition", "Can I\nrenew?", "d1"),
    turn(3, "agent", "respond_solution", "Yes, by mail.", "d1", "d1"),
    turn(4, "user", "query_condition", "And my boat?"),
    turn(5, "agent", "respond_no_solution", "Sorry, I found nothing."),
    turn(6, "agent", "query_condition", "Anything else?"),  # follows no user turn
    turn(7, "user", "query_solution", "Both?", "d1", "d2"),
    turn(8, "agent", "respond_solution", "Both.", "d2", "d1"),
]}
LOST = {"dial_id": "y", "turns": [turn(1, "user", "query_condition", "Hm?"), turn(2, "agent", "respond_no_solution", "No.")]}


def dialogues(*found):
    return {"dial_data": {"dmv": list(found), "va": []}}


def test_multidoc2dial_agent_turns(tmp_path):
    files = put(tmp_path / "t.json", dialogues(DIALOGUE, LOST)), put(tmp_path / "d.json", DOCUMENTS)
    found = multidoc2dial.read_multidoc2dial(*files)
    opening = "agent: Hello.\nuser: Can I renew?"
    later = f"{opening}\nagent: Yes, by mail.\nuser: And my boat?"
    assert found == [
        Example("x_3", opening, "Yes, by mail.", "Text of d1."),
        Example("x_5", later, "unanswerable", "Text of d1.", unanswerable=True),
        Example("x_8", f"{later}\nagent: Sorry, I found nothing.\nagent: Anything else?\nuser: Both?", "Both.",
                "Text of d2.\n\nText of d1.")]


def archive(train, validation):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in (("dial_train", train), ("dial_validation", validation), ("doc", DOCUMENTS)):
            opened.writestr(f"multidoc2dial/multidoc2dial_{name}.json", json.dumps(content))
    return buffer.getvalue()


def test_multidoc2dial_is_unpacked_and_split_by_dialogue(tmp_path, monkeypatch):
    many = [DIALOGUE | {"dial_id": f"t_{i}"} for i in range(20)]
    content = archive(dialogues(*many), dialogues(DIALOGUE))
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: io.BytesIO(content))
    task, (train, validation, test) = tasks.load_task("multidoc2dial", tmp_path)
    assert (len(train), len(validation), len(test), task.judge) == (54, 6, 3, "llm")
    stems = [{x.id.rpartition("_")[0] for x in part} for part in (train, validation)]
    assert not stems[0] & stems[1]
    monkeypatch.setattr("urllib.request.urlopen", offline)
    (tmp_path / "multidoc2dial" / "multidoc2dial.zip").unlink()
    assert tasks.load_task("multidoc2dial", tmp_path)[1] == (train, validation, test)


@pytest.mark.parametrize(("content", "message"), [
    (dialogues({"dial_id": "x", "turns": [turn(1, "user", "", "q", "d9")]}), "dialogue 1, turn x_1: the document 'd9'"),
    (dialogues(DIALOGUE, {"turns": []}), "t.json, domain dmv, dialogue 2: the field 'dial_id' is missing"),
    (dialogues({"dial_id": "x"}), "dialogue 1: the field 'turns' is missing"),
    (dialogues({"dial_id": "x", "turns": [{"role": "user"}]}), "dialogue 1, turn 1: the field 'turn_id' is missing"),
    (dialogues({"dial_id": "x", "turns": [turn(1, "user", "", None)]}), "turn x_1: the field 'utterance' must be text"),
    (dialogues({"dial_id": "x", "turns": [turn(1, "user", "", "q") | {"references": ["d1"]}]}), "turn x_1: the field 'doc_id'"),
    (dialogues({"dial_id": "x", "turns": [turn(1, "User", "", "q")]}), "turn x_1: 'role' is 'User', expected user or agent"),
    (dialogues({"dial_id": "x", "turns": [turn(1, "user", "", "q", "d1"), turn(2, "agent", None, "a")]}),
     "turn x_2: the field 'da' must be text, found null"),
    ({"dial_data": {"dmv": {}}}, "t.json, dial_data: the field 'dmv' must be a list"),
    ([], "t.json: the field 'dial_data' is missing"), ("nothing", "not valid JSON")])
def test_bad_multidoc2dial_files(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        multidoc2dial.read_multidoc2dial(put(tmp_path / "t.json", content), put(tmp_path / "d.json", DOCUMENTS))


@pytest.mark.parametrize(("content", "message"), [
    ({}, "d.json: the field 'doc_data' is missing"),
    ({"doc_data": []}, "d.json: the field 'doc_data' must be an object"),
    ({"doc_data": {"dmv": []}}, "d.json, doc_data: the field 'dmv' must be an object"),
    ({"doc_data": {"dmv": {"d1": {"doc_text": None}}}}, "d.json, document d1: the field 'doc_text' must be text, found null")])
def test_bad_multidoc2dial_documents_are_not_blamed_on_the_dialogues(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        multidoc2dial.read_multidoc2dial(put(tmp_path / "t.json", dialogues(DIALOGUE)), put(tmp_path / "d.json", content))


def test_a_download_that_is_no_zip(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: io.BytesIO(b"<html>"))
    with pytest.raises(InputError, match="not the archive of https://doc2dial"):
        tasks.load_task("multidoc2dial", tmp_path)


# ------------------------------------------------------------------------------------------------ metrics


def plain_words(text):
    """SQuAD's normalisation once more, written as loops over characters."""
    kept = "".join(letter for letter in text.lower() if letter not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
    return [word for word in kept.split() if word not in ("a", "an", "the")]


def plain_f1(response, gold):
    said, wanted = plain_words(response), plain_words(gold)
    shared = 0
    for word in set(said):
        shared += min(said.count(word), wanted.count(word))
    if shared == 0:
        return 0.0
    precision, recall = shared / len(said), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


GOLDS = [("the Amazon River", ("Amazon",)), ("42 km", ()), ("Marie Curie", ("Curie", "Madame Curie")), ("no, not at all", ())]
RESPONSES = ["The Amazon River.", "It is the river Amazon", "42 km", "42", "42 42 km km", "Curie, Marie (née Sklodowska)",
             "Madame Curie", "no!", "", "Paris", "the a an"]


@pytest.mark.parametrize("gold, aliases", GOLDS)
@pytest.mark.parametrize("response", RESPONSES)
def test_exact_match_and_f1_agree_with_a_plain_calculation(response, gold, aliases):
    row = reading_row(Example("1", "q", gold, "c", aliases=aliases), response)
    assert row["exact"] == max(plain_words(response) == plain_words(text) for text in (gold, *aliases))
    assert row["f1"] == pytest.approx(max(plain_f1(response, text) for text in (gold, *aliases)))
    counted = [sum((Counter(plain_words(response)) & Counter(plain_words(t))).values()) / len(plain_words(t))
               for t in (gold, *aliases)]
    assert row["recall"] == row["modified_recall"] == pytest.approx(max(counted))
    assert row["answerability"] == 1 and row["words"] == len(response.split())


YES, NO = Example("1", "q", "red fox", "c"), Example("2", "q", "unanswerable", "c", unanswerable=True)


@pytest.mark.parametrize(("x", "response", "expected"), [
    (YES, "a red fox", (1, 1, 1, 1, 1)), (YES, "a red dog", (0, 0.5, 0.5, 0.5, 1)), (YES, "unanswerable", (0, 0, 0, 0, 0)),
    (YES, "I don't know, a red fox?", (0, 0, 1, 0, 0)),  # it has the words, and abstains
    (NO, "unanswerable", (1, 1, 1, 1, 1)), (NO, "I don't know.", (1, 1, 0, 1, 1)), (NO, "a red fox", (0, 0, 0, 0, 0)),
])
def test_abstention_in_every_score(x, response, expected):
    row = reading_row(x, response)
    assert tuple(row[key] for key in ("exact", "f1", "recall", "modified_recall", "answerability")) == expected


def test_groups_apart_and_together():
    pairs = [(YES, "a red fox"), (YES, "red"), (NO, "unanswerable"), (NO, "a red fox it is")]
    scores = reading_scores(pairs)
    assert [scores[name]["n"] for name in ("answerable", "unanswerable", "all")] == [2, 2, 4]
    assert [scores[name]["modified_recall"] for name in ("answerable", "unanswerable", "all")] == [0.75, 0.5, 0.625]
    assert [scores[name]["words"] for name in ("answerable", "unanswerable", "all")] == [2, 3, 2.5]
    assert scores["all"]["answerability"] == 0.75 and scores["all"]["f1"] == pytest.approx((1 + 2 / 3 + 1 + 0) / 4)
    assert list(reading_scores(pairs[:2])) == ["answerable", "all"] and reading_scores([]) == {}
