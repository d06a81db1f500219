"""The open-ended task: ROUGE-L beside the package rouge-score, the summaries, a run, and the metrics in its report."""

import json
import random
import re
from dataclasses import replace

import pytest

import evaluate
import judges
import s3ft
import tasks
from data import Example, prompt
from support.files import read_jsonl
from support.rouge import rouge_l
from tasks import gsm8k

CASES = [  # response, gold, words in common in their order
    ("the cat sat on the mat", "the cat lay on the mat", 5),
    ("on the mat sat the cat", "the cat sat on the mat", 3),
    ("the the the the", "the", 1),  # a repeated word counts once for each time that the gold has it
    ("the cat the cat", "cat the cat the", 3),
    ("A-b_c, D!", "a b c d", 4),  # case and marks say nothing
    ("", "a", 0), ("a", "", 0), ("", "", 0), ("...", "...", 0), ("b", "a", 0),
    ("Кошка сидит на ковре", "кошка лежит на ковре", 3),
    ("Größe über Maß", "größe unter maß", 2),
    ("१८ सेब", "१८", 1),
    ("நாய் வீட்டில் உள்ளது", "பூனை மரத்தில் இருந்தது", 0),  # a vowel sign belongs to its word
    ("cafe\u0301 noir", "caf\u00e9 noir", 2),  # one character or two
]
WORD = re.compile(r"(?:[^\W_]|[\u0300-\u036f\u0900-\u0903\u093a-\u094f\u0b82\u0bbe-\u0bcd])+")


@pytest.mark.parametrize(("response", "gold", "common"), CASES)
def test_rouge_l_by_hand(response, gold, common):
    lengths = [len(WORD.findall(text)) for text in (response, gold)]
    expected = 2 * common / sum(lengths) if common else 0
    assert rouge_l(response, gold) == pytest.approx(expected)
    assert rouge_l(gold, response) == pytest.approx(expected)  # F1 does not know which text is the gold


class UnicodeWords:
    """A tokenizer for rouge-score, whose own knows the letters a to z alone."""

    def tokenize(self, text):
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def random_texts():
    rng = random.Random(0)
    words = ["the", "The", "cat", "a", "18", "1,234", "don't", "x_y", "-", "", "end.", "café", "Straße", "мир"]
    for _ in range(500):
        yield tuple(" ".join(rng.choices(words, k=rng.randrange(12))) for _ in range(2))


def test_rouge_l_is_that_of_the_package():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    package = rouge_scorer.RougeScorer(["rougeL"])
    of_any_script = rouge_scorer.RougeScorer(["rougeL"], tokenizer=UnicodeWords())
    compared = 0
    for gold, response in [*random_texts(), *((gold, response) for response, gold, _ in CASES[:10])]:
        expected = of_any_script.score(gold, response)["rougeL"].fmeasure
        assert rouge_l(response, gold) == pytest.approx(expected), (response, gold)
        if (gold + response).isascii():
            compared += 1
            expected = package.score(gold, response)["rougeL"].fmeasure
            assert rouge_l(response, gold) == pytest.approx(expected), (response, gold)
    assert compared > 50


def test_the_judge_accepts_from_the_threshold_on():
    x = Example("1", "q", "a b c d e f g h i j", aliases=("k l",))
    assert judges.ROUGE_THRESHOLD == 0.3
    pairs = [(x, "a b c n o p q r s t"), (x, "a b n o p q r s t u"), (x, "L, k"), (x, "k l"), (x, " \n"), (x, "!")]
    assert list(judges.judge_all("rouge", pairs)) == [True, False, True, True, False, False]


def words(text):
    return set(re.findall(r"\w{5,}", text.lower()))


def test_every_passage_has_a_summary_of_its_own_words():
    task, splits = tasks.load_task("summaries", "nowhere")
    assert [len(rows) for rows in splits] == [36, 6, 18]
    passages = [{x.context for x in rows} for rows in tasks.load_task("reading", "nowhere")[1]]
    for rows, contexts in zip(splits, passages, strict=True):
        for x in rows:
            instruction, _, passage = x.question.partition("\n\n")
            assert passage in contexts, f"{x.id} is in another split than in the task reading"
            assert prompt(task.predict, x) == prompt(task.train, x) == x.question and instruction
            assert len(x.answer.split()) <= 40 < len(passage.split())
            assert not any(sentence in passage for sentence in re.split(r"(?<=[.!?])\s", x.answer))
            shared = {other: len(words(x.answer) & words(other)) for other in contexts}
            assert max(shared, key=shared.get) == passage, f"{x.id}: the summary is of another passage"


def test_an_open_ended_run_reports_the_tasks_own_metrics(tiny, tmp_path, capsys):
    """Any metric that a fork puts into its task stands in results.json and report.md, without a change elsewhere."""
    run = tmp_path / "run"
    s3ft.main(["--task=summaries", "--method=s3ft", f"--model={tiny}", "--limit=2", "--steps=1", "--max-new-tokens=4",
               "--device=cpu", f"--out={run}"])
    evaluate.main([f"--out={run}", "--device=cpu"])
    results = json.loads((run / "results.json").read_text())
    _, (_, _, test_rows) = tasks.load_task("summaries", "")
    responses = {row["id"]: row["response"] for row in read_jsonl(run / "base" / "test.jsonl")}
    expected = sum(rouge_l(responses[x.id], x.answer) for x in test_rows[:2]) / 2
    assert results["models"]["base"]["metrics"]["ROUGE-L"] == pytest.approx(expected)
    assert set(results["models"]["s3ft"]["metrics"]) == {"ROUGE-L", "words"}
    report = capsys.readouterr().out
    assert "## The task's own metrics" in report and "| method | ROUGE-L | words |" in report
    assert "Reading comprehension" not in report


def test_metrics_are_means_over_the_rows():
    pairs = [(Example("1", "q", "x\n#### 18"), "#### 18"), (Example("2", "q", "x\n#### 7"), "It is 7.")]
    assert evaluate.metric_means(gsm8k.GSM8K, pairs) == {"lm-eval, after ####": 0.5, "lm-eval, last number": 1.0}
    task = replace(gsm8k.GSM8K, metrics={"shouts": lambda x, response: float(response.endswith("!"))})
    assert evaluate.metric_means(task, pairs) == {"shouts": 0.0}
