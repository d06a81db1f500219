"""More than one try: which source a row gets, what is asked, and what never happens."""

import pytest

from answers import Answer
from data import Example
from examples import tries
from support.files import read_jsonl, write_jsonl
from tasks.custom import CUSTOM_TASK

D = [Example(id, f"question {id}", "a") for id in "abcde"]


class FakeBase:
    """Accepts a row by one way each, and records what it was asked."""

    task = CUSTOM_TASK

    def __init__(self):
        self.asked = {}

    def gold(self, x):
        return f"gold {x.id}"

    def predict(self, D):
        return self._answers("predict", D, "a")

    def paraphrase(self, D):
        return self._answers("paraphrase", D, "d")

    def ask(self, D, prompts, kind, sampling=None):
        self.prompts = prompts
        return self._answers(kind, D, "b")

    def sample(self, D, k):
        self.asked["sample"] = "".join(x.id for x in D)
        likely, best = Answer("wrong", False, -1.0), Answer("best", True, -2.0)
        samples = {x.id: [likely] for x in D}
        samples["c"] = [likely, Answer("third", True, -3.0), best]
        return samples

    def _answers(self, kind, D, accepted):
        self.asked[kind] = "".join(x.id for x in D)
        return {x.id: Answer(f"{kind} {x.id}", x.id in accepted) for x in D}


def test_each_way_is_asked_about_what_is_left():
    base = FakeBase()
    rows = [(x.id, y.text if isinstance(y, Answer) else y, source)
            for x, y, source in tries.s3ft_tries(D, base, tries=3, shots=2)]
    assert rows == [("a", "predict a", "prediction"), ("b", "few_shot_1 b", "few-shot"), ("c", "best", "sample"),
                    ("d", "paraphrase d", "paraphrase"), ("e", "gold e", "gold")]
    assert base.asked == {"predict": "abcde", "few_shot_1": "bcde", "sample": "cde", "paraphrase": "de"}
    assert base.prompts["b"] == "question a\npredict a\n\nquestion b"  # never an example of the row itself


def test_without_flags_it_is_algorithm_1():
    base = FakeBase()
    sources = [source for *_, source in tries.s3ft_tries(D, base)]
    assert sources == ["prediction", "gold", "gold", "paraphrase", "gold"]
    assert base.asked == {"predict": "abcde", "paraphrase": "bcde"}


def test_a_run_keeps_the_train_prompt_and_records_its_samples(tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [{"id": x.id, "question": x.question, "answer": "4"} for x in D])
    write_jsonl(tmp_path / "run" / "predictions.jsonl",
                [{"id": x.id, "response": "It is 4." if x.id == "a" else "no"} for x in D])
    files = [f"--{split}-file={file}" for split in ("train", "val", "test")]
    flags = ["--task=custom", "--judge=numeric", "--device=cpu", "--max-new-tokens=4", "--steps=2", *files]
    tries.main(["--tries=2", "--shots=1", f"--model={tiny}", f"--out={tmp_path / 'run'}", *flags])
    rows = read_jsonl(tmp_path / "run" / "s3ft-2-tries-1-shots" / "train.jsonl")
    assert [row["prompt"] for row in rows] == [x.question for x in D] and rows[0]["source"] == "prediction"
    assert len(read_jsonl(tmp_path / "run" / "samples.jsonl")) == 2 * 4
    assert len(read_jsonl(tmp_path / "run" / "few_shot_1.jsonl")) == 4


@pytest.mark.parametrize("flag", ["--tries=-1", "--shots=x"])
def test_bad_flags(flag):
    with pytest.raises(ValueError, match=flag.partition("=")[0]):
        tries.main([flag])
