"""Statistics against hand calculations and published values; drift and Fig. 2 against plain transformers calls."""

import json
import math
import statistics
import sys

import pytest
import torch

import answers
import evaluate
import judges
import lora
import s3ft
from data import Task
from engine.chat import training_ids
from engine.model import load_model
from evaluate import kl_drift
from support.cli import InputError, exit_cleanly
from support.files import read_jsonl, write_jsonl
from support.stats import mcnemar, wilson
from tasks import general


@pytest.mark.parametrize(("successes", "n", "expected"), [
    (0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662))])  # the last: Newcombe (1998), Table I
def test_wilson_interval(successes, n, expected):
    assert wilson(successes, n) == pytest.approx(expected, abs=1e-4)


def test_mcnemar_by_hand():
    """8 rows only a solves, 2 only b: p = 2 * (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024."""
    a, b = [True] * 8 + [False] * 2 + [True] * 10, [False] * 8 + [True] * 2 + [True] * 10
    result = mcnemar(a, b)
    assert result["p"] == pytest.approx(112 / 1024) and result["difference"] == pytest.approx(0.3)
    half = 1.959964 * math.sqrt(10 - 36 / 20) / 20
    assert result["interval"] == pytest.approx([0.3 - half, 0.3 + half], abs=1e-6)


def test_mcnemar_of_equal_models_is_no_difference():
    assert mcnemar([True, False], [True, False]) == {"difference": 0, "interval": [0, 0], "p": 1.0}


def test_mcnemar_agrees_with_the_binomial_test_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    a, b = [True] * 7 + [False] * 4, [False] * 7 + [True] * 4
    assert mcnemar(a, b)["p"] == pytest.approx(stats.binomtest(4, 11).pvalue)


@pytest.fixture
def tuned(tiny):
    model, tokenizer = load_model(str(tiny), "cpu")
    lora.inject(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    for layer in lora.layers(model).values():
        layer.lora_B.data.normal_(0, 0.3, generator=generator)
    return model.eval(), tokenizer


def test_drift_is_the_mean_kl_per_response_token(tuned, tiny):
    """Row by row with an untouched copy of the base model, KL written out as a sum over the vocabulary."""
    model, tokenizer = tuned
    base, _ = load_model(str(tiny), "cpu")
    dialogues = [("hello", "a reply"), ("what is 2?", "four"), ("x" * 50, "")]
    terms = []
    for dialogue in dialogues:
        ids, is_target = training_ids(tokenizer, *dialogue)
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0].double().softmax(-1) for m in (base, model))
        terms += [(p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum().item() for i, target in enumerate(is_target) if target]
    assert kl_drift(model, tokenizer, dialogues) == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    assert sum(terms) / len(terms) > 0.01


def test_drift_is_kept_until_the_responses_or_the_model_change(tiny, tmp_path):
    model, tokenizer = load_model(str(tiny), "cpu")
    lora.inject(model, 4, 8, 0.0, ["q_proj"], seed=0)
    first = {"task": [("hello", "a reply")], "general": [("hello", "another")]}
    found = evaluate.kept_drift(model, tokenizer, first, tmp_path / "drift.json")
    assert evaluate.kept_drift(model, tokenizer, first, tmp_path / "drift.json") == found == {"task": 0, "general": 0}
    for parameter in lora.parameters(model):
        torch.nn.init.normal_(parameter)
    assert evaluate.kept_drift(model, tokenizer, first, tmp_path / "drift.json")["task"] > 0  # another model
    assert evaluate.kept_drift(model, tokenizer, first | {"task": [("hello", "other")]}, tmp_path / "drift.json")["task"] > 0


def test_drift_of_an_untrained_adapter_is_zero(tiny):
    model, tokenizer = load_model(str(tiny), "cpu")
    lora.inject(model, seed=0)
    assert kl_drift(model, tokenizer, [("hello", "a reply")]) == 0


def test_the_llm_judge_asks_the_base_model_inside_a_trained_one(tuned, tiny):
    model, tokenizer = tuned
    base, _ = load_model(str(tiny), "cpu")
    prompts = ["Decision?", "Is 2 + 2 = 4?"]
    inside = answers.LocalModel(model, tokenizer, adapter=False)
    assert answers.replies_of(inside)(prompts) == answers.replies_of(answers.LocalModel(base, tokenizer))(prompts)
    assert all(layer.enabled for layer in lora.layers(model).values())


def test_unreadable_verdicts_are_kept_apart_from_false_ones(loaded_run):
    """The tiny model answers the LLM judge with noise: None in the file, not accepted in the count."""
    run, task, test, model, tokenizer = loaded_run
    pairs = [(x, "4") for x in test]
    judge = answers.LocalModel(model, tokenizer)
    found = answers.judge_answers(judge, task, pairs, run / "noise.judged.jsonl")
    assert set(found.values()) == {None}
    assert [row["accepted"] for row in read_jsonl(run / "noise.judged.jsonl")] == [None] * len(test)


ROWS = [{"id": f"q{i}", "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(8)]


@pytest.fixture
def loaded_run(tiny, tmp_path):
    from data import Example
    model, tokenizer = load_model(str(tiny), "cpu")
    task = Task(load=None, judge="llm", predict="{{question}}", train="{{question}}", paraphrase="", max_new_tokens=4)
    return tmp_path, task, [Example(row["id"], row["question"], row["answer"]) for row in ROWS], model, tokenizer


@pytest.fixture
def run(tiny, tmp_path):
    """A finished run of sft and sdft with responses made elsewhere, so that some are accepted."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "run"
    for kind in ("predictions", "paraphrases"):
        right = 6 if kind == "predictions" else 4
        rows = [{"id": row["id"], "response": row["answer"] if i < right else "no"} for i, row in enumerate(ROWS)]
        write_jsonl(out / f"{kind}.jsonl", rows)
    files = [f"--{split}-file={tmp_path / 'rows.jsonl'}" for split in ("train", "val", "test")]
    for method in ("s3ft", "sft", "sdft"):
        s3ft.main(["--task=custom", "--judge=numeric", f"--method={method}", f"--model={tiny}", f"--out={out}", *files,
                   "--steps=2", "--max-new-tokens=4", "--device=cpu", "--lr=0.01", "--limit=8"])
    return out


def test_a_report_holds_every_table(run, capsys):
    write_jsonl(run / "sft" / "test.jsonl", [{"id": row["id"], "response": row["answer"]} for row in ROWS])
    evaluate.main([f"--out={run}", "--device=cpu"])
    results = json.loads((run / "results.json").read_text())
    models = results["models"]
    assert list(models) == ["base", "sft", "s3ft", "sdft"]
    assert models["sft"]["accuracy"] == 1.0 and models["sft"]["interval"][1] == 1.0
    assert models["s3ft"]["training"]["sources"] == {"prediction": 6, "paraphrase": 0, "gold": 2}
    assert models["s3ft"]["against_sft"]["difference"] < 0 and models["s3ft"]["drift"]["general"] > 0
    assert results["log_probabilities"]["rows"] == "both accepted"
    assert results["selection"]["predictions"] == {"n": 8, "length_limit_hit": 0, "unreadable_verdicts": 0}
    assert [len(results["log_probabilities"][kind]) for kind in ("predictions", "paraphrases", "golds")] == [4, 4, 4]
    report = (run / "report.md").read_text()
    assert results["machine"]["dtype"] == "float32" and ", cpu, 1 thread, float32, torch " in report
    assert "| sft | 100.0 | 67.6 to 100.0 |" in report and "| s3ft | 8 | 75.0 | 0.0 | 25.0 |" in report
    assert report == capsys.readouterr().out.rstrip("\n") + "\n"


BENCHMARK_ROWS = {
    "winogrande/validation.jsonl": [{"sentence": f"The {a} hit the {b} because _ was small.", "option1": a, "option2": b,
                                     "answer": "2"} for a, b in (("dog", "cat"), ("cup", "jar"), ("oak", "elm"))],
    "hellaswag/validation.jsonl": [{"activity_label": "Cooking", "ctx_a": "A man stirs.", "ctx_b": "he", "label": str(i),
                                    "endings": ["eats.", "sings loudly.", "runs.", "waits."]} for i in range(3)],
}


def test_a_report_with_general_benchmarks_shows_the_drop(run, tmp_path, monkeypatch):
    for file, rows in BENCHMARK_ROWS.items():
        (tmp_path / "data" / file).parent.mkdir(parents=True)
        write_jsonl(tmp_path / "data" / file, rows)
        monkeypatch.setitem(general.benchmarks.COUNTS, file, 3)
    evaluate.main([f"--out={run}", "--device=cpu", "--benchmarks=winogrande,hellaswag", f"--data={tmp_path / 'data'}"])
    models = json.loads((run / "results.json").read_text())["models"]
    assert len(read_jsonl(run / "sft" / "benchmarks" / "samples.jsonl")) == 6
    for name in ("winogrande", "hellaswag"):
        accuracy = [models[who]["benchmarks"]["scores"][name]["acc"] for who in ("base", "sft")]
        assert models["sft"]["benchmarks"]["drop"][name]["drop"] == pytest.approx(accuracy[0] - accuracy[1])
    report = (run / "report.md").read_text()
    assert "| method | winogrande | hellaswag | average |" in report
    assert "| general benchmarks | sft | 6 | 0 |" in report

    log_p = {}
    for who in ("base", "sft"):
        rows = read_jsonl(run / who / "benchmarks" / "samples.jsonl")
        log_p[who] = [row["metrics"]["log_p"] for row in rows if row["benchmark"] == "hellaswag"]
    differences = [before - after for before, after in zip(log_p["base"], log_p["sft"], strict=True)]
    drop = models["sft"]["benchmarks"]["drop_log_p"]["hellaswag"]
    half = 1.959964 * statistics.stdev(differences) / math.sqrt(3)
    assert drop["drop"] == pytest.approx(statistics.mean(differences))
    assert drop["interval"][1] - drop["drop"] == pytest.approx(half)
    assert f"{statistics.mean(log_p['base']):.3f} |  |" in report and f"| {drop['drop']:.3f} (" in report


def test_a_model_on_its_own(tiny, run, tmp_path, monkeypatch, capsys):
    file = "winogrande/validation.jsonl"
    (tmp_path / "data" / "winogrande").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / file, BENCHMARK_ROWS[file])
    monkeypatch.setitem(general.benchmarks.COUNTS, file, 3)
    argv = [f"--model={tiny}", "--benchmarks=winogrande", f"--data={tmp_path / 'data'}", "--device=cpu", "--limit=2"]
    evaluate.main([*argv, f"--out={tmp_path / 'alone'}"])
    assert json.loads((tmp_path / "alone" / "results.json").read_text())["benchmarks"]["winogrande"]["n"] == 2
    report = capsys.readouterr().out
    (log_p,) = [line.split(" | ") for line in report.splitlines() if line.startswith("| winogrande | log_p |")]
    assert "| winogrande | acc |" in report and log_p[3] == "nats" and -3 < float(log_p[2]) < 0
    evaluate.main([*argv, f"--out={tmp_path / 'adapted'}", f"--adapter={run / 'sft'}"])
    rows = [read_jsonl(tmp_path / name / "samples.jsonl")[0]["log_likelihoods"] for name in ("alone", "adapted")]
    assert rows[0] != rows[1]


def test_the_report_of_one_model_holds_no_scores_of_another(tiny, run, tmp_path, monkeypatch, capsys):
    """First with an adapter, then without: asked in another way, so that the samples have a file each."""
    for file in ("winogrande/validation.jsonl", "hellaswag/validation.jsonl"):
        (tmp_path / "data" / file).parent.mkdir(parents=True)
        write_jsonl(tmp_path / "data" / file, BENCHMARK_ROWS[file])
        monkeypatch.setitem(general.benchmarks.COUNTS, file, 3)
    argv = [f"--model={tiny}", f"--data={tmp_path / 'data'}", "--device=cpu", f"--out={tmp_path / 'alone'}"]
    evaluate.main([*argv, "--benchmarks=winogrande", f"--adapter={run / 'sft'}"])
    evaluate.main([*argv, "--benchmarks=hellaswag", f"--adapter={run / 'sft'}"])
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert list(results["benchmarks"]) == ["hellaswag", "winogrande"]

    evaluate.main([*argv, "--benchmarks=winogrande", "--apply-chat-template"])
    results = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert list(results["benchmarks"]) == ["winogrande"]
    assert "are of other weights" in capsys.readouterr().err


class CommaChecker:
    """In place of the harness's checkers, an extra that is not installed everywhere: is there no comma?"""

    @staticmethod
    def process_results(row, responses):
        followed = ["," not in responses[0]]
        levels = {"prompt_level_strict_acc": followed[0], "prompt_level_loose_acc": followed[0]}
        return levels | {"inst_level_strict_acc": followed, "inst_level_loose_acc": followed}


def test_ifeval_is_answered_graded_and_compared(run, tmp_path, monkeypatch):
    rows = [{"key": i, "prompt": f"Write {i} words without a comma.", "instruction_id_list": ["punctuation:no_comma"],
             "kwargs": [{}]} for i in range(3)]
    write_jsonl(tmp_path / "data" / "ifeval" / "input_data.jsonl", rows)
    monkeypatch.setattr(general.ifeval, "COUNT", 3)
    monkeypatch.setattr(general.ifeval, "MAX_NEW_TOKENS", 4)
    monkeypatch.setattr(general.ifeval, "load_checkers", lambda data: CommaChecker)
    evaluate.main([f"--out={run}", "--device=cpu", "--benchmarks=ifeval", f"--data={tmp_path / 'data'}"])

    models = json.loads((run / "results.json").read_text())["models"]
    share = {}
    for name in ("base", "sft"):
        answered = read_jsonl(run / name / "benchmarks" / "ifeval.jsonl")
        share[name] = statistics.mean("," not in row["response"] for row in answered)
        assert models[name]["benchmarks"]["scores"]["ifeval"]["prompt_level_strict"] == pytest.approx(share[name])
    assert models["sft"]["benchmarks"]["drop"]["ifeval"]["drop"] == pytest.approx(share["base"] - share["sft"])
    assert "| ifeval | 3 | 0 | yes | no | all |" in (run / "report.md").read_text()


def test_ifeval_without_its_extra_is_refused_in_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(InputError, match=r"pip install 'lm-eval\[ifeval\]"):
        evaluate.main([f"--out={run}", "--device=cpu", "--benchmarks=ifeval", f"--data={tmp_path / 'data'}"])
    assert not (run / "base").exists()  # before a response is made


def test_a_score_says_how_many_shots_were_shown(tiny, tmp_path, monkeypatch, capsys):
    """Only MMLU has solved questions to show: the others are asked, and recorded, 0-shot."""
    file = "winogrande/validation.jsonl"
    (tmp_path / "data" / "winogrande").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / file, BENCHMARK_ROWS[file])
    monkeypatch.setitem(general.benchmarks.COUNTS, file, 3)
    evaluate.main([f"--model={tiny}", "--benchmarks=winogrande", "--num-fewshot=2", f"--data={tmp_path / 'data'}",
                   "--device=cpu", f"--out={tmp_path / 'alone'}"])
    scores = json.loads((tmp_path / "alone" / "results.json").read_text())["benchmarks"]
    assert scores["winogrande"]["settings"]["num_fewshot"] == 0
    assert "--num-fewshot 2 is for mmlu; 0-shot: winogrande" in capsys.readouterr().err
    assert (tmp_path / "alone" / "samples.jsonl").exists()  # shared with calls that ask for no shots


def test_another_task_than_the_run_was_trained_on(run, capsys):
    evaluate.main([f"--out={run}", "--device=cpu", "--task=reading"])
    results = json.loads((run / "on_reading" / "results.json").read_text())
    assert not (run / "results.json").exists() and results["config"]["trained_on"] == "custom"
    assert (run / "sft" / "on_reading" / "test.jsonl").exists() and not (run / "sft" / "test.jsonl").exists()
    assert results["models"]["sft"]["n"] == 8 and results["models"]["sft"]["reading"]["all"]["n"] == 8
    report = capsys.readouterr().out
    assert "# reading (trained on custom)" in report and "| base | unanswerable |" in report


def test_the_audit_draws_rows_and_reads_them_back(run, capsys):
    evaluate.main([f"--out={run}", "--audit=6"])
    sheet = (run / "audit.csv").read_text().splitlines()
    assert len(sheet) == 7 and sheet[0].endswith(",likert,human2,human")
    (run / "audit.csv").write_text("\n".join([sheet[0], *(line + "yes" for line in sheet[1:])]))
    evaluate.main([f"--out={run}", "--audit=6"])
    accepted = sum(row["accepted"] for row in read_jsonl(run / "audit.jsonl"))
    assert 0 < accepted < 6 and f"false reject: {6 - accepted} of 6" in capsys.readouterr().out


def test_evaluating_twice_makes_nothing_again(run, monkeypatch):
    evaluate.main([f"--out={run}", "--device=cpu"])
    before = {path: path.read_bytes() for path in run.rglob("*.jsonl")}
    (run / "results.json").unlink()
    monkeypatch.setattr(answers, "generate", None)
    monkeypatch.setattr(judges, "judge_all", None)
    evaluate.main([f"--out={run}", "--device=cpu"])
    assert before == {path: path.read_bytes() for path in run.rglob("*.jsonl")}
    assert (run / "results.json").exists()


@pytest.mark.parametrize(("flag", "message"), [
    ("--task=custom", "only a built-in task"), ("--task=gsm9k", "unknown task"), ("--device=gpu9", "this machine has none"),
    ("--num-fewshot=-1", "invalid choice")])
def test_bad_flags_are_refused_in_one_line(run, flag, message, capsys):
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: evaluate.main([f"--out={run}", flag]))
    errors = capsys.readouterr().err.strip().split("\n")
    assert end.value.code == 2 and errors[-1].startswith("error: ") and message in errors[-1]


@pytest.mark.parametrize(("prepare", "message"), [
    (lambda run: (run / "config.json").unlink(), "no config.json there"),
    (lambda run: (run / "sft" / "adapter_config.json").unlink(), "adapter_config.json"),
    (lambda run: (run / "sft" / "adapter_model.safetensors").write_bytes(b"torn"), "sft: broken adapter file"),
])
def test_a_damaged_run_is_refused_in_one_line(run, prepare, message, capsys):
    prepare(run)
    with pytest.raises(SystemExit) as end:
        exit_cleanly(lambda: evaluate.main([f"--out={run}", "--device=cpu"]))
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert end.value.code == 2 and error.startswith("error: ") and message in error


def test_an_adapter_of_another_model_is_refused(run, tiny, tmp_path):
    from transformers import AutoModelForCausalLM
    other = AutoModelForCausalLM.from_pretrained(tiny)
    smaller = other.config.__class__(**{**other.config.to_dict(), "hidden_size": 16, "head_dim": 4})
    with pytest.raises(InputError, match="sft"):
        evaluate.load_adapter(AutoModelForCausalLM.from_config(smaller), run / "sft")
