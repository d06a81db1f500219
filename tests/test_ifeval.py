"""IFEval: rows, verdicts known by hand, and everything against lm-evaluation-harness's own functions.

What needs its checkers is skipped where they are not there: pip install 'lm-eval[ifeval]==0.4.13', and NLTK's punkt_tab.
"""

import io
import statistics
import zipfile

import pytest

from results import request, table_4
from support.cli import InputError
from support.files import write_jsonl
from tasks import general, ifeval


def row(key, *instructions):
    names = [name for name, _ in instructions]
    return {"key": key, "prompt": f"Prompt {key}.", "instruction_id_list": names, "kwargs": [k for _, k in instructions]}


NO_COMMA = ("punctuation:no_comma", {})
LOWER = ("change_case:english_lowercase", {})
BULLETS = ("detectable_format:number_bullet_lists", {"num_bullets": 2})
WORDS = ("length_constraints:number_words", {"relation": "at least", "num_words": 5})
SENTENCES = ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 3, "keywords": None})
CAPITALS = ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2})
KEYWORDS = ("keywords:existence", {"keywords": ["fox", "red"]})
REPEAT = ("combination:repeat_prompt", {"prompt_to_repeat": "Prompt 9."})

CASES = [  # row, response, strict, loose
    (row(1, NO_COMMA), "No comma here.", [True], [True]),
    (row(2, NO_COMMA), "Sure, here it is:\nNo comma here.", [False], [True]),
    (row(3, NO_COMMA), "One, two.", [False], [False]),
    (row(4, BULLETS, NO_COMMA), "* one\n* two", [True, True], [True, True]),
    (row(5, BULLETS, NO_COMMA), "* one, two", [False, False], [False, False]),
    (row(6, LOWER, WORDS), "these are some more words than five, all of them small.", [True, True], [True, True]),
    (row(7, LOWER, WORDS), "Four words are here.", [False, False], [False, False]),
    (row(8, SENTENCES), "Dr. Smith went to Washington. He liked it.", [True], [True]),  # the splitter knows "Dr."
    (row(9, REPEAT, SENTENCES), "Prompt 9. One. Two. Three.", [True, False], [True, False]),
    (row(10, CAPITALS), "NASA and ESA flew.", [True], [True]),
    (row(11, KEYWORDS, CAPITALS), "The red FOX.", [True, False], [True, False]),
    (row(12, NO_COMMA), " \n", [False], [False]),  # an empty response follows nothing
]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    write_jsonl(tmp_path / ifeval.FILE, [row for row, *_ in CASES])
    monkeypatch.setattr(ifeval, "COUNT", len(CASES))
    return tmp_path


# ------------------------------------------------------------------------------------------------ rows


def test_the_first_rows_or_a_sample_that_only_grows(data_dir):
    def keys(*args):
        return [row["key"] for row in ifeval.rows(data_dir, *args)]

    assert keys() == list(range(1, 13)) and keys(3) == [1, 2, 3]
    assert keys(4, True) == keys(4, True) == sorted(keys(4, True)) != [1, 2, 3, 4]
    assert set(keys(4, True)) < set(keys(7, True)) and keys(None, True) == list(range(1, 13))


@pytest.mark.parametrize(("change", "message"), [
    ({"kwargs": []}, "line 2: 1 instructions, but 0 'kwargs' for them"),
    ({"kwargs": [None]}, "line 2, 'kwargs' 1: expected an object, found null"),
    ({"instruction_id_list": []}, "line 2: 0 instructions"),
    ({"instruction_id_list": NO_COMMA[0]}, "line 2: 'instruction_id_list' must be a list of strings"),
    ({"prompt": None}, "line 2: the field 'prompt' must be text, found null"),
])
def test_a_bad_row_is_named(data_dir, change, message):
    rows = [row for row, *_ in CASES]
    write_jsonl(data_dir / ifeval.FILE, [rows[0], rows[1] | change, *rows[2:]])
    with pytest.raises(InputError, match=f"{ifeval.FILE}, {message}"):
        ifeval.rows(data_dir)


def test_a_cut_file_and_no_network(data_dir, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    write_jsonl(data_dir / ifeval.FILE, [CASES[0][0]])
    with pytest.raises(InputError, match="has 1 rows, the original has 12"):
        ifeval.rows(data_dir)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(InputError, match="input_data.jsonl is missing and cannot be fetched .*google-research"):
        ifeval.rows(tmp_path / "elsewhere")


# ------------------------------------------------------------------------------------------------ the sentence splitter


def test_the_splitter_is_fetched_once_and_unpacked(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in (*ifeval.SPLITTER_FILES, "more.txt"):
            archive.writestr(f"punkt_tab/english/{name}", name)
    fetched = []

    def fetch(url, **kwargs):
        fetched.append(url)
        return io.BytesIO(buffer.getvalue())

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    for _ in range(2):
        ifeval.fetch_splitter(tmp_path)
    folder = tmp_path / "tokenizers" / "punkt_tab" / "english"
    assert {path.name: path.read_text() for path in folder.iterdir()} == {name: name for name in ifeval.SPLITTER_FILES}
    assert fetched == [ifeval.SPLITTER_HOME]


def test_an_archive_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: io.BytesIO(b"<html>"))
    with pytest.raises(InputError, match="punkt_tab.zip: not the archive of https://.*: remove it and try again"):
        ifeval.fetch_splitter(tmp_path)


# ------------------------------------------------------------------------------------------------ scores


def graded(key, strict, loose=None):
    loose = loose or strict
    return {"key": key, "prompt_level_strict": all(strict), "inst_level_strict": strict, "prompt_level_loose": all(loose),
            "inst_level_loose": loose}


def test_summary_by_hand():
    scores = ifeval.summary([graded(1, [True]), graded(2, [True, False, False]), graded(3, [False, True], [True, True])])
    assert (scores["n"], scores["instructions"]) == (3, 6)
    assert scores["prompt_level_strict"] == pytest.approx(1 / 3) and scores["prompt_level_loose"] == pytest.approx(2 / 3)
    assert scores["inst_level_strict"] == pytest.approx(3 / 6) and scores["inst_level_loose"] == pytest.approx(4 / 6)
    assert scores["prompt_level_strict_stderr"] == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    assert scores["inst_level_strict_stderr"] == 0  # each prompt has one that is followed
    assert ifeval.summary([graded(1, [True])])["inst_level_strict_stderr"] is None


def test_paired_drop_by_hand():
    base = [graded(1, [True, True]), graded(2, [True, False])]
    tuned = [graded(1, [False, True]), graded(2, [True, True])]
    drops = ifeval.paired_drop(base, tuned)
    assert drops["prompt_level_strict"]["drop"] == 0 and drops["inst_level_strict"]["drop"] == pytest.approx(0)
    assert drops["inst_level_strict"]["interval"] == pytest.approx([-1.959964 * 0.5, 1.959964 * 0.5])  # sd 0.71, n 2
    drops = ifeval.paired_drop(base, [graded(1, [False, False]), graded(2, [True, False])])
    assert drops["prompt_level_strict"] == drops["prompt_level_loose"] and drops["inst_level_loose"]["drop"] == 0.5
    with pytest.raises(InputError, match="different prompts"):
        ifeval.paired_drop(base, tuned[:1])


# ------------------------------------------------------------------------------------------------ the harness's checkers


@pytest.fixture
def checkers(data_dir, monkeypatch):
    pytest.importorskip("langdetect")
    nltk = pytest.importorskip("nltk")
    pytest.importorskip("lm_eval")
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        pytest.skip("NLTK's punkt_tab is not there")

    def offline(*args, **kwargs):
        raise AssertionError("something was downloaded")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(nltk, "download", offline)
    monkeypatch.setattr(ifeval, "fetch_splitter", lambda folder: None)
    return ifeval.load_checkers(data_dir)


@pytest.mark.parametrize(("case", "response", "strict", "loose"), CASES)
def test_verdicts_known_by_hand(checkers, case, response, strict, loose):
    assert ifeval.grade(checkers, case, response) == graded(case["key"], strict, loose)


def test_grades_and_scores_are_the_harnesss(checkers, data_dir):
    responses = [response for _, response, *_ in CASES]
    grades = []
    expected = {metric: [] for metric in ifeval.METRICS}
    for number, example in enumerate(ifeval.rows(data_dir)):
        for response in responses[number:]:
            grades.append(ifeval.grade(checkers, example, response))
            inputs = checkers.InputExample(**example)
            for kind, test in (("strict", checkers.test_instruction_following_strict),
                               ("loose", checkers.test_instruction_following_loose)):
                found = test(inputs, response)
                expected[f"prompt_level_{kind}"].append(found.follow_all_instructions)
                expected[f"inst_level_{kind}"].append(found.follow_instruction_list)
    for metric in ifeval.METRICS:
        assert [grade[metric] for grade in grades] == expected[metric]
    scores = ifeval.summary(grades)
    for kind in ("strict", "loose"):
        assert scores[f"prompt_level_{kind}"] == pytest.approx(statistics.mean(expected[f"prompt_level_{kind}"]))
        assert scores[f"inst_level_{kind}"] == pytest.approx(checkers.agg_inst_level_acc(expected[f"inst_level_{kind}"]))


def test_the_guess_of_a_language_is_always_the_same(checkers):
    example = row(1, ("language:response_language", {"language": "de"}))
    grades = [ifeval.grade(checkers, example, "Der Hund is a good dog und das ist so.") for _ in range(20)]
    assert all(grade == grades[0] for grade in grades)


def test_without_the_checkers_the_package_is_named(data_dir, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    with pytest.raises(InputError, match=r"--benchmarks ifeval needs its checkers .*pip install 'lm-eval\[ifeval\]==0.4.13'"):
        ifeval.load_checkers(data_dir)


def test_a_token_limit_reaches_ifeval_alone_and_is_said_beside_the_score(tmp_path):
    flags = ["--out", str(tmp_path), "--benchmarks", "mmlu,ifeval", "--max-new-tokens", "256"]
    (tmp_path / "config.json").write_text("{}")
    asked = request.read_command_line(flags)
    assert general.scoring_of(asked.scoring, "ifeval").settings()["max_new_tokens"] == 256
    assert "max_new_tokens" not in general.scoring_of(asked.scoring, "mmlu").settings()

    settings = general.scoring_of(asked.scoring, "ifeval").settings()
    models = {"base": {"benchmarks": {"scores": {"ifeval": {"n": 100, "settings": settings}}}}}
    assert "at most 256 tokens a response" in table_4.settings_table(models)
    with pytest.raises(InputError, match="--max-new-tokens goes with --benchmarks ifeval"):
        request.read_command_line(["--out", str(tmp_path), "--benchmarks", "mmlu", "--max-new-tokens", "256"])
