"""Ours against lm-evaluation-harness itself: every log-likelihood and every metric, on the rows and models of test_benchmarks.

Skipped where lm-eval (0.4.13) is not installed: pip install lm-eval==0.4.13 accelerate
"""

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")
# ruff: noqa: E402, the imports below need what was just looked for

from test_benchmarks import make_data, tiny, tokenizer  # noqa: F401

from bench import evaluate as bench_evaluate
from bench import harness
from engine.likelihood import Encoder
from support.files import read_jsonl
from tasks import benchmarks, gsm8k, mmlu
from tasks.benchmarks import BENCHMARKS, Scoring, score

TASKS = {"truthfulqa": ("truthfulqa_mc1", "truthfulqa_mc2"), "hellaswag": ("hellaswag",), "winogrande": ("winogrande",),
         "mmlu": ("mmlu_high_school_physics", "mmlu_astronomy")}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """(our data folder, the harness's task folder, its task manager, which takes seconds to make)"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        data_dir = make_data(tmp_path_factory.mktemp("data"), patch)
        folder = tmp_path_factory.mktemp("tasks")
        shots = read_jsonl(data_dir / mmlu.MMLU_SHOTS)
        for name, benchmark in BENCHMARKS.items():
            harness.write_tasks(name, read_jsonl(data_dir / benchmark.file), folder, shots)
        yield data_dir, folder, harness.TaskManager(include_path=str(folder))


def theirs(lm, name: str, workplace, num_fewshot: int, chat: bool) -> tuple[dict, list[list[float]]]:
    """(results, log-likelihoods `[documents][options]`), the documents in our order."""
    loaded = harness.load_tasks(workplace[1], name, num_fewshot if name == "mmlu" else 0, workplace[2])
    result = harness.evaluate(lm, loaded, chat)
    found = [harness.log_likelihoods(result, task) for task in TASKS[name]]
    if name == "truthfulqa":  # the options of mc1, then those of mc2
        return result["results"], [one + two for one, two in zip(*found, strict=True)]
    return result["results"], [document for task in found for document in task]


def check(model, tokenizer, name, workplace, out_dir, num_fewshot=0, chat=False, add_bos=False, max_length=None):  # noqa: F811
    results, samples = score(model, tokenizer, [name], workplace[0], out_dir, Scoring(num_fewshot, chat, add_bos))
    results = results[name]
    lm = harness.language_model(model, tokenizer, add_bos, max_length=max_length)
    metrics, expected = theirs(lm, name, workplace, num_fewshot, chat)
    for row, scores in zip(samples, expected, strict=True):
        assert np.abs(np.subtract(row["log_likelihoods"], scores)).max() < 1e-3
    if name == "truthfulqa":
        assert results["mc1"] == pytest.approx(metrics["truthfulqa_mc1"]["acc,none"])
        assert results["mc2"] == pytest.approx(metrics["truthfulqa_mc2"]["acc,none"], abs=1e-5)
    if name == "hellaswag":
        assert results["acc_norm"] == pytest.approx(metrics["hellaswag"]["acc_norm,none"])
    if name == "mmlu":
        for subject, result in results["subjects"].items():
            assert result["acc"] == pytest.approx(metrics[f"mmlu_{subject}"]["acc,none"])
        assert results["acc"] == pytest.approx(metrics["local_mmlu"]["acc,none"])  # weighted by size
    if name in ("hellaswag", "winogrande"):
        assert results["acc"] == pytest.approx(metrics[name]["acc,none"])


@pytest.mark.parametrize(("chat", "add_bos"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_zero_shot(name, chat, add_bos, tokenizer, workplace, tmp_path):  # noqa: F811
    check(tiny("llama"), tokenizer, name, workplace, tmp_path, 0, chat, add_bos)


@pytest.mark.parametrize("chat", [False, True])
def test_few_shot_mmlu(chat, tokenizer, workplace, tmp_path):  # noqa: F811
    check(tiny("llama"), tokenizer, "mmlu", workplace, tmp_path, 3, chat)


@pytest.mark.parametrize(("name", "length"), [("hellaswag", 32), ("winogrande", 32), ("truthfulqa", 64), ("mmlu", 64)])
def test_truncation(name, length, tokenizer, workplace, tmp_path):  # noqa: F811
    model = tiny("llama", max_position_embeddings=length)
    check(model, tokenizer, name, workplace, tmp_path, num_fewshot=1, max_length=length)


def test_a_model_that_cannot_share(tokenizer, workplace, tmp_path):  # noqa: F811
    check(tiny("sliding"), tokenizer, "hellaswag", workplace, tmp_path)


def test_the_bench_times_the_making_of_options(tokenizer, workplace, tmp_path):  # noqa: F811
    """Documents without options score as complete ones do: bench/evaluate.py makes them from the rows, in what it times."""
    model, encoder = tiny("llama"), Encoder(tokenizer, 999)
    chosen = benchmarks.documents("mmlu", workplace[0], Scoring(num_fewshot=2, limit=2))
    shots = benchmarks.mmlu_shots(workplace[0], 2)
    samples = bench_evaluate.ours(model, encoder, [replace(x, options=[]) for x in chosen], shots)
    assert samples == list(benchmarks.scored(model, encoder, chosen))


def test_gsm8k_reads_answers_as_the_harness_does():
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    responses = ["a #### 7 b #### 8", "$1,200.", "-3", "it is 3.", "#### -1,000.50.", "none", "7 of $", "a 12 b 3", "....",
                 "1 - 2", "#### 1200", "x #### $5"]
    flexible = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1).apply([responses], [{}])[0]
    assert [gsm8k.gsm8k_flexible(response) for response in responses] == flexible
    strict = RegexFilter(r"#### (\-?[0-9\.\,]+)").apply([responses], [{}])[0]
    assert [gsm8k.gsm8k_strict(response) for response in responses] == strict
    for extracted in flexible + strict:
        for gold in ("so\n#### 1200", "#### 1,200", "#### -1000.50", "#### 3", "#### 8"):
            expected = exact_match_hf_evaluate([extracted], [gold], [",", "\\$", "(?s).*#### ", "\\.$"], ignore_case=True)
            assert gsm8k.gsm8k_match(extracted, gold) == bool(expected["exact_match"])
