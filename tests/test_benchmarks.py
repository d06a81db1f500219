"""The benchmarks' definitions on rows made by hand, and log-likelihoods against scoring every option by itself."""

import csv
import io
import json
import math
import tarfile
import urllib.error
import weakref
import zipfile
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from engine import likelihood
from engine.likelihood import Encoder, Option, Request, can_share, log_likelihoods
from support.cli import InputError
from support.files import read_jsonl, write_jsonl
from tasks import benchmarks
from tasks.benchmarks import BENCHMARKS, Scoring, paired_drop, score
from tasks.gsm8k import gsm8k_flexible, gsm8k_match, gsm8k_strict

LETTERS = "ABCD"
FACTS = [("The sun", "rises in the east", "is a small lake"), ("A spider", "has eight legs", "sings at school"),
         ("Bread", "is made of flour", "swims to the moon"), ("Ice", "melts when it is warm", "was king of Norway"),
         ("A violin", "has four strings", "eats cheese for lunch"), ("Copper", "conducts electricity", "grows on old trees")]


def mmlu_rows(subject: str, n: int) -> list[dict]:
    rows = []
    for i in range(n):
        thing, right, wrong = FACTS[i % len(FACTS)]
        choices = [wrong, f"{i} of them ", "none of these", "all three"]
        choices[i % 4] = right
        question = f" Which of the following is true of {thing.lower()}, number {i}?{' Think well.' * (i % 3)}\n"
        rows.append({"question": question, "subject": subject, "choices": choices, "answer": i % 4})
    return rows


def truthfulqa_rows() -> list[dict]:
    rows = []
    for i, (thing, right, wrong) in enumerate(FACTS):
        one = {"choices": [f"{thing} {right}.", f"{thing} {wrong}.", "Nobody knows."], "labels": [1, 0, 0]}
        two = {"choices": [f"{thing} {wrong}.", f"{thing} {right}.", f"Surely it {right}", "No"], "labels": [0, 1, 1, 0]}
        rows.append({"question": f"What is so about {thing}{'?' * (i + 1)}", "mc1_targets": one, "mc2_targets": two})
    return rows


def hellaswag_rows() -> list[dict]:
    return [{"activity_label": label, "ctx_a": f"{thing} [header] on a table. [title] It lies  there", "ctx_b": middle,
             "endings": [f"{right}.", f"{wrong} [step] and  more of it.", "falls.", f"is what {thing.upper()} does."],
             "label": str(i % 4)}
            for i, ((thing, right, wrong), label, middle) in
            enumerate(zip(FACTS, ("Cooking", "Home and [Garden]") * 3, ("", "a Man From ROME", "they") * 2, strict=True))]


def winogrande_rows() -> list[dict]:
    return [{"sentence": f"{thing} was next to the box, and _ {right} more than the other one.", "option1": thing.lower(),
             "option2": "the box", "answer": str(1 + i % 2)} for i, (thing, right, _) in enumerate(FACTS)]


def make_data(folder, monkeypatch):
    """A data folder of small files, which are taken to be whole."""
    tables = {"mmlu/test.jsonl": mmlu_rows("high_school_physics", 5) + mmlu_rows("astronomy", 7),
              "mmlu/dev.jsonl": mmlu_rows("astronomy", 3) + mmlu_rows("high_school_physics", 3),
              "truthfulqa/multiple_choice.jsonl": truthfulqa_rows(), "hellaswag/validation.jsonl": hellaswag_rows(),
              "winogrande/validation.jsonl": winogrande_rows()}
    for file, rows in tables.items():
        write_jsonl(folder / file, rows)
        monkeypatch.setitem(benchmarks.COUNTS, file, len(rows))
    return folder


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    return make_data(tmp_path / "data", monkeypatch)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer like Llama 3's, made on the spot: it merges across words, and puts BOS in front when asked."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [json.dumps(row) for row in mmlu_rows("astronomy", 9) + truthfulqa_rows() + hellaswag_rows()]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(corpus, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE)


SHAPE = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SHAPE, "intermediate_size": 64, "num_key_value_heads": 2, "initializer_range": 0.3}


def tiny(kind: str, **more):
    """A model of random weights, large enough that a token's place and context matter."""
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**LLAMA, **more))
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, **more))
    if kind == "gemma2":  # caps its logits after the head
        model = Gemma2ForCausalLM(Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=2.0, sliding_window=16, **more))
    if kind == "sliding":
        model = MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=8, **more))
    if kind == "bloom":  # ALiBi: places come from the attention mask
        model = BloomForCausalLM(BloomConfig(vocab_size=600, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3))
    if kind == "mamba":
        model = MambaForCausalLM(MambaConfig(vocab_size=600, hidden_size=32, state_size=4, num_hidden_layers=2))
    return model.eval()


@pytest.fixture(scope="session")
def llama():
    return tiny("llama")


@torch.no_grad()
def alone(model, context: list[int], continuation: list[int], max_length: int = 10**6) -> float:
    """log p(continuation | context) of one request by one forward over it, by the definition."""
    ids = torch.tensor([(context + continuation)[-(max_length + 1):]])
    log_p = F.log_softmax(model(ids[:, :-1]).logits[0].double(), dim=-1)
    scored = len(continuation)
    return log_p[-scored:].gather(1, ids[0, -scored:, None]).sum().item()


def random_documents(seed: int = 0) -> list[list[Request]]:
    """Documents of all sorts: common contexts, none in common, equal options, options of one token."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(2, 600, size=n).tolist()

    start, found = draw(12), []
    for size in (3, 9, 25):
        context = start + draw(size)
        found.append([Request(context + option, len(option)) for option in (draw(1), draw(7), draw(4))])
        found.append([Request(context + [token], 1) for token in (5, 6, 7, 8)])
        found.append([Request(start + draw(2) + context[13:] + context[-6:], 6) for _ in range(2)])
        found.append([found[-3][0], found[-3][1], found[-3][1]])
    return found


# ------------------------------------------------------------------------------------------------ rows -> options


def test_mmlu_prompt():
    rows = mmlu_rows("high_school_physics", 2)
    rows[0] |= {"question": " Who? \n", "choices": ["a ", " b", "c", "d"], "answer": 2}
    rows[1] |= {"question": "When?", "choices": ["1", "2", "3", "4"]}
    first, *_, last = BENCHMARKS["mmlu"].options(rows[1], rows[:1])
    assert first.description == "The following are multiple choice questions (with answers) about high school physics.\n\n"
    assert first.context == "When?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert first.shots == (("Who?\nA. a \nB.  b\nC. c\nD. d\nAnswer:", "C"),)
    assert (first.continuation, last.continuation) == ("A", "D")


def test_truthfulqa_prompt():
    row = truthfulqa_rows()[0]
    options = BENCHMARKS["truthfulqa"].options(row, [])
    context = options[0].context
    assert context.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert context.endswith("in Barcelona, Spain.\n\nQ: What is so about The sun?\nA:")
    assert context.count("\n\nQ: ") == 6
    assert [option.continuation for option in options] == row["mc1_targets"]["choices"] + row["mc2_targets"]["choices"]


def test_hellaswag_prompt():
    row = {"activity_label": "Home [x]and", "ctx_a": "He [header] sits. [title] Then", "ctx_b": "a Man", "label": "0",
           "endings": [" goes  far [step] away ", "b", "c", "d [x]"]}
    options = BENCHMARKS["hellaswag"].options(row, [])
    assert options[0].context == "Home and: He sits.. Then A man"
    assert [option.continuation for option in options] == ["goes far away", "b", "c", "d "]


def test_winogrande_scores_the_same_end_after_each_filling():
    row = {"sentence": "Ann met Eve, so _  smiled. ", "option1": "Ann", "option2": "Eve", "answer": "2"}
    assert BENCHMARKS["winogrande"].options(row, []) == [
        Option("Ann met Eve, so Ann", "smiled."), Option("Ann met Eve, so Eve", "smiled.")]


# ------------------------------------------------------------------------------------------------ scores -> metrics


def test_hellaswag_divides_by_characters():
    row = {"label": "1", "endings": ["four", "eight888", "x" * 100, "y"]}
    result = BENCHMARKS["hellaswag"].metrics(row, np.array([-4.0, -6.0, -99.0, -3.9]))
    by_character = np.array([-4 / 4, -6 / 8, -99 / 100, -3.9 / 1])
    by_hand = {"log_p": -6 - math.log(sum(map(math.exp, [-4.0, -6.0, -99.0, -3.9]))),
               "log_p_norm": -6 / 8 - math.log(np.exp(by_character).sum())}
    assert result["metrics"] == pytest.approx({"acc": 0.0, "acc_norm": 1.0} | by_hand)
    assert (result["chosen"], result["gold"]) == (3, 1)


def test_truthfulqa_takes_labels_by_position_of_the_label():
    row = {"mc1_targets": {"choices": "abc", "labels": [1, 0, 0]}, "mc2_targets": {"choices": "abcd", "labels": [0, 1, 0, 1]}}
    scores = np.log([0.2, 0.1, 0.1, 0.1, 0.2, 0.3, 0.4])
    metrics = BENCHMARKS["truthfulqa"].metrics(row, scores)["metrics"]
    assert metrics == {"log_p": pytest.approx(math.log(0.5)), "mc1": 1.0, "mc2": pytest.approx(0.6),
                       "mean": pytest.approx(0.8)}
    assert BENCHMARKS["truthfulqa"].metrics(row, scores - 2000)["metrics"]["mc2"] == pytest.approx(0.6)


def test_of_equal_options_the_first_is_chosen():
    assert BENCHMARKS["mmlu"].metrics({"answer": 1}, np.array([-1.0, -0.5, -0.5, -2.0]))["metrics"]["acc"] == 1.0
    assert BENCHMARKS["winogrande"].metrics({"answer": "2"}, np.array([-1.0, -1.0]))["chosen"] == 0


@pytest.mark.parametrize(("name", "row"), [("mmlu", {"answer": 2}), ("winogrande", {"answer": "1"})])
def test_log_p_is_that_of_the_right_option_among_the_options(name, row):
    scores = np.log([0.1, 0.2, 0.6, 0.3][:4 if name == "mmlu" else 2]) - 900  # which alone would underflow
    expected = 0.6 / 1.2 if name == "mmlu" else 0.1 / 0.3
    assert BENCHMARKS[name].metrics(row, scores)["metrics"]["log_p"] == pytest.approx(math.log(expected))


# ------------------------------------------------------------------------------------------------ words -> tokens


def encoded(encoder: Encoder, *option: str) -> tuple[str, str]:
    request, = encoder.requests([Option(*option)])
    decode = encoder.tokenizer.decode
    return decode(request.ids[:-request.scored]), decode(request.ids[-request.scored:])


def test_blanks_at_the_end_of_a_context_go_to_the_continuation(tokenizer):
    assert encoded(Encoder(tokenizer, 99), "The sun \n ", "rises") == ("The sun", " \n  rises")


def test_a_continuation_is_never_encoded_alone(tokenizer):
    encoder = Encoder(tokenizer, 99, apply_chat_template=True)
    request, = encoder.requests([Option("x", "The sun")])
    text = encoder.chat([{"role": "user", "content": "x"}])
    whole = tokenizer.encode(text + "The sun", add_special_tokens=False)
    assert request.ids[-request.scored:] == whole[len(tokenizer.encode(text, add_special_tokens=False)):]


def test_bos_comes_once(tokenizer):
    bos = tokenizer.bos_token_id
    for chat in (False, True):
        for add_bos in (False, True):
            request, = Encoder(tokenizer, 99, chat, add_bos).requests([Option("The sun", "rises")])
            assert request.ids.count(bos) == (chat or add_bos)
    assert Encoder(tokenizer, 99, add_bos=True).requests([Option("<s>The sun", "rises")])[0].ids.count(bos) == 1


def test_an_empty_context_is_bos(tokenizer):
    request, = Encoder(tokenizer, 99).requests([Option("", "rises")])
    assert request.ids == [tokenizer.bos_token_id, *tokenizer.encode(" rises", add_special_tokens=False)]


def test_a_system_turn_is_dropped_where_the_template_refuses_it(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer, 99, apply_chat_template=True)
    assert encoder.render(Option("u", "c", "d")) == ("<s><system>d\n<user>u\n<assistant>", "c")
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    assert encoder.render(Option("u", "c", "d")) == ("<s><user>u\n<assistant>", "c")


def test_shots_are_text_without_a_template_and_turns_in_it(tokenizer):
    option = Option("u", "c", "d ", (("q1", "a1"), ("q2", "a2")))
    assert Encoder(tokenizer, 99).render(option) == ("d q1 a1\n\nq2 a2\n\nu", " c")
    assert Encoder(tokenizer, 99, apply_chat_template=True).render(option) == (
        "<s><system>d \n<user>q1\n<assistant>a1\n<user>q2\n<assistant>a2\n<user>u\n<assistant>", "c")


def test_too_long_loses_its_beginning(tokenizer, llama):
    option = Option("one two three four five six seven eight nine ten " * 3, "eleven twelve")
    whole, = Encoder(tokenizer, 999).requests([option])
    cut, = Encoder(tokenizer, 20).requests([option])
    assert cut.ids == whole.ids[-21:] and cut.scored == whole.scored
    (_, [found]), = log_likelihoods(llama, [[cut]], share=True)
    assert found == pytest.approx(alone(llama, whole.ids[:-whole.scored], whole.ids[-whole.scored:], 20), abs=1e-4)


def test_an_option_without_tokens_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="0 tokens"):
        Encoder(tokenizer, 99, apply_chat_template=True).requests([Option("x", "")])


# ------------------------------------------------------------------------------------------------ log-likelihoods


@pytest.mark.parametrize(("kind", "shares"), [("llama", True), ("gpt2", True), ("gemma2", False), ("sliding", False),
                                              ("bloom", False), ("mamba", False)])
def test_log_likelihoods_are_those_of_every_option_by_itself(kind, shares, monkeypatch):
    monkeypatch.setitem(likelihood.BATCH_TOKENS, "cpu", 120)  # several batches
    model, documents = tiny(kind), random_documents()
    assert can_share(model) is shares
    found = dict(log_likelihoods(model, documents, shares))
    for index, document in enumerate(documents):
        expected = [alone(model, r.ids[:-r.scored], r.ids[-r.scored:]) for r in document]
        assert found[index] == pytest.approx(expected, abs=2e-4)


def test_eager_attention_and_bfloat16_share_too():
    assert can_share(tiny("llama", attn_implementation="eager"))
    assert can_share(tiny("llama").to(torch.bfloat16))


def test_no_token_is_computed_twice(llama):
    seen, heads = [], []
    hooks = [llama.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(args[0].numel())),
             llama.lm_head.register_forward_hook(lambda module, args, out: heads.append(out.shape[1]))]
    context = list(range(10, 50))
    options = [[101, 102, 103], [101, 102, 104], [105]]
    list(log_likelihoods(llama, [[Request(context + option, len(option)) for option in options]], share=True))
    for hook in hooks:
        hook.remove()
    assert sum(seen) == 40 + 2  # the context, then 101 and 102, which two options share
    assert heads[-1] == 3  # logits after the context, after 101 and after 102


def widths_of_forwards(model, limit: int = 10**9):
    """(a hook, a list): the list gets (rows, past + own width) of every forward; one that holds more tokens has no memory."""
    seen, tensors = [], []

    def forward(module, args, inputs):
        assert all(tensor() is None for tensor in tensors), "an earlier forward's tensors are alive"
        rows, width = inputs["input_ids"].shape
        past = inputs.get("past_key_values")
        width += past.get_seq_length() if past else 0
        tensors[:] = [weakref.ref(inputs["input_ids"])]
        if rows * width > limit:
            raise torch.OutOfMemoryError("simulated")
        seen.append((rows, width))

    return model.register_forward_pre_hook(forward, with_kwargs=True), seen


@pytest.mark.parametrize("share", [True, False])
def test_out_of_memory_halves_the_batch_and_loses_nothing(llama, share, monkeypatch, capsys):
    documents = random_documents()
    expected = dict(log_likelihoods(llama, documents, share))
    monkeypatch.setitem(likelihood.BATCH_TOKENS, "cpu", 2000)
    hook, seen = widths_of_forwards(llama, limit=250)
    found = list(log_likelihoods(llama, documents, share))
    retried = capsys.readouterr().out.count("out of memory: going on with")
    again = dict(log_likelihoods(llama, documents, share))
    hook.remove()
    assert sorted(index for index, _ in found) == list(range(len(documents)))  # every document once
    for index, scores in found:
        assert scores == pytest.approx(expected[index], abs=2e-4) and again[index] == scores
    assert retried >= 2 and max(rows for rows, _ in seen) > 1
    assert "out of memory" not in capsys.readouterr().out  # what was too much is not tried again


@pytest.mark.parametrize("limit", [40, 5])  # a document does not fit; what all begin with does not
def test_a_document_that_does_not_fit_is_an_error(llama, limit, monkeypatch):
    monkeypatch.setitem(likelihood.BATCH_TOKENS, "cpu", 2000)
    hook, _ = widths_of_forwards(llama, limit)
    with pytest.raises(InputError, match="cannot hold one document .*--num-fewshot.*--device"):
        list(log_likelihoods(llama, random_documents(), share=True))
    hook.remove()


def test_a_batch_counts_the_prefix_of_every_row(llama, monkeypatch):
    monkeypatch.setitem(likelihood.BATCH_TOKENS, "cpu", 200)
    prefix = list(range(10, 70))
    hook, seen = widths_of_forwards(llama)
    list(log_likelihoods(llama, [[Request([*prefix, 100 + i, 5, 6], 2)] for i in range(9)], share=True))
    hook.remove()
    assert [rows for rows, _ in seen] == [1, 3, 3, 3]  # the prefix; then 3 x (59 or 60 + its own) <= 200
    assert all(rows * width <= 200 for rows, width in seen)


# ------------------------------------------------------------------------------------------------ score


ALL = ["mmlu", "truthfulqa", "hellaswag", "winogrande"]


def test_score_reports_means_and_writes_samples(llama, tokenizer, data_dir, tmp_path):
    results, samples = score(llama, tokenizer, ALL, data_dir, tmp_path / "out", Scoring(num_fewshot=2))
    by_key = {(row["benchmark"], row["index"]): row for row in samples}
    assert read_jsonl(tmp_path / "out" / "samples.2-shot.jsonl") == [by_key[key] for key in sorted(by_key)]
    assert len(samples) == 12 + 6 + 6 + 6
    subjects = results["mmlu"]["subjects"]
    assert {name: subject["n"] for name, subject in subjects.items()} == {"high_school_physics": 5, "astronomy": 7}
    weighted = sum(subject["acc"] * subject["n"] for subject in subjects.values()) / 12
    assert results["mmlu"]["acc"] == pytest.approx(weighted)
    p = results["mmlu"]["acc"]
    assert results["mmlu"]["acc_stderr"] == pytest.approx(math.sqrt(p * (1 - p) / 11))
    assert results["truthfulqa"]["mean"] == pytest.approx((results["truthfulqa"]["mc1"] + results["truthfulqa"]["mc2"]) / 2)
    metrics = ("acc", "log_p", "acc_norm", "log_p_norm")
    assert set(results["hellaswag"]) == {"n", *metrics, *(f"{metric}_stderr" for metric in metrics)}
    row = next(row for row in samples if row["benchmark"] == "winogrande" and row["index"] == 3)
    before, after = winogrande_rows()[3]["sentence"].split("_")
    for name, found in zip(("option1", "option2"), row["log_likelihoods"], strict=True):
        context = tokenizer.encode(before + winogrande_rows()[3][name], add_special_tokens=False)
        whole = tokenizer.encode(before + winogrande_rows()[3][name] + after, add_special_tokens=False)
        assert found == pytest.approx(alone(llama, context, whole[len(context):]), abs=1e-4)
    assert row["chosen"] == int(np.argmax(row["log_likelihoods"])) and row["gold"] == 1


def test_limit_takes_the_first_documents_of_every_task(llama, tokenizer, data_dir, tmp_path):
    results, samples = score(llama, tokenizer, ["mmlu", "winogrande"], data_dir, tmp_path / "out", Scoring(limit=2))
    assert results["mmlu"]["n"] == 4 and results["winogrande"]["n"] == 2
    assert [row["index"] for row in samples if row["benchmark"] == "mmlu"] == [0, 1, 5, 6]


def test_a_sample_is_always_the_same_and_grows(llama, tokenizer, data_dir, tmp_path):
    found = [benchmarks.documents("mmlu", data_dir, Scoring(limit=limit, sampled=True)) for limit in (2, 2, 3, None)]
    indices = [[document.index for document in part] for part in found]
    assert indices[0] == indices[1] == sorted(indices[0]) and indices[0] != [0, 1, 5, 6]
    assert set(indices[0]) < set(indices[2]) and len(indices[2]) == 6 and indices[3] == list(range(12))
    assert [document.task for document in found[0]] == [found[3][0].task] * 2 + [found[3][-1].task] * 2
    _, samples = score(llama, tokenizer, ["mmlu"], data_dir, tmp_path / "out", Scoring(limit=2, sampled=True))
    assert [row["index"] for row in samples] == indices[0]


def test_samples_are_those_of_the_documents_asked_for(llama, tokenizer, data_dir, tmp_path):
    """Also where the file holds more, from an earlier call: the drop is computed over what the scores are of."""
    score(llama, tokenizer, ["winogrande", "hellaswag"], data_dir, tmp_path / "out", Scoring(limit=4))
    results, samples = score(llama, tokenizer, ["winogrande"], data_dir, tmp_path / "out", Scoring(limit=2))
    assert [(row["benchmark"], row["index"]) for row in samples] == [("winogrande", 0), ("winogrande", 1)]
    assert results["winogrande"]["n"] == paired_drop(samples, samples)["winogrande"]["n"] == 2


def test_a_sample_of_an_edited_document_is_scored_anew(llama, tokenizer, data_dir, tmp_path):
    _, before = score(llama, tokenizer, ["winogrande"], data_dir, tmp_path / "out")
    rows = winogrande_rows()
    rows[2] |= {"option1": "a quite different thing"}
    write_jsonl(data_dir / "winogrande/validation.jsonl", rows)
    _, after = score(llama, tokenizer, ["winogrande"], data_dir, tmp_path / "out")
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, True, True, True]
    _, fresh = score(llama, tokenizer, ["winogrande"], data_dir, tmp_path / "fresh")
    assert after[2]["log_likelihoods"] == pytest.approx(fresh[2]["log_likelihoods"], abs=1e-4)
    assert read_jsonl(tmp_path / "out" / "samples.jsonl") == after


def test_samples_of_before_a_metric_existed_get_it_without_being_scored_again(llama, tokenizer, data_dir, tmp_path):
    fresh, samples = score(llama, tokenizer, ALL, data_dir, tmp_path / "out")
    path = tmp_path / "out" / "samples.jsonl"
    old = [sample | {"metrics": {"acc": 0.0}} for sample in read_jsonl(path)]
    write_jsonl(path, old)
    assert score(llama, tokenizer, ALL, data_dir, tmp_path / "out") == (fresh, samples)
    assert read_jsonl(path) == old


def test_a_killed_run_goes_on_by_document(llama, tokenizer, data_dir, tmp_path):
    whole, _ = score(llama, tokenizer, ALL, data_dir, tmp_path / "whole")
    score(llama, tokenizer, ["mmlu", "hellaswag"], data_dir, tmp_path / "out", Scoring(limit=3))
    path = tmp_path / "out" / "samples.jsonl"
    kept = path.read_bytes()
    path.write_bytes(kept[:-40])  # the kill tore the last line
    resumed, _ = score(llama, tokenizer, ALL, data_dir, tmp_path / "out")
    assert set(kept[:-40].split(b"\n")[:-1]) <= set(path.read_bytes().split(b"\n"))  # not scored again: the same bytes
    for name in ALL:
        for metric, value in whole[name].items():
            if metric != "subjects":
                assert resumed[name][metric] == pytest.approx(value, abs=1e-6)
    keys = [(row["benchmark"], row["index"]) for row in read_jsonl(path)]
    assert len(keys) == len(set(keys)) == 30


def test_every_way_of_asking_has_its_own_samples(llama, tokenizer, data_dir, tmp_path):
    ways = [{}, {"num_fewshot": 2}, {"add_bos": True}, {"num_fewshot": 2, "apply_chat_template": True, "add_bos": True}]
    first = [score(llama, tokenizer, ["mmlu"], data_dir, tmp_path, Scoring(limit=1, **way)) for way in ways]
    names = ["samples", "samples.2-shot", "samples.bos", "samples.2-shot.chat.bos"]
    assert {path.name for path in tmp_path.glob("samples*")} == {x + end for x in names for end in (".jsonl", ".config.json")}
    assert len({row["log_likelihoods"][0] for _, samples in first for row in samples}) == 4 * 2
    kept = {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    assert [score(llama, tokenizer, ["mmlu"], data_dir, tmp_path, Scoring(limit=1, **way)) for way in ways] == first
    assert kept == {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")}


def test_samples_of_another_model_are_not_mixed(llama, tokenizer, data_dir, tmp_path):
    score(llama, tokenizer, ["winogrande"], data_dir, tmp_path / "out", Scoring(limit=2))
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight[0] += 0.01
    with pytest.raises(InputError, match="another model"):
        score(other, tokenizer, ["winogrande"], data_dir, tmp_path / "out")


def test_rank_0_downloads_first(llama, tokenizer, data_dir, tmp_path, monkeypatch):
    """A file that is missing is fetched while the other ranks wait."""
    trace, rows = [], (data_dir / "winogrande/validation.jsonl").read_bytes()

    @contextmanager
    def rank_0_first():
        trace.append("others wait")
        yield
        trace.append("others go on")

    def fetch(folder):
        trace.append("download")
        (folder / "validation.jsonl").write_bytes(rows)

    monkeypatch.setattr(benchmarks.ranks, "rank_0_first", rank_0_first)
    monkeypatch.setitem(BENCHMARKS, "winogrande", replace(BENCHMARKS["winogrande"], fetch=fetch))
    (data_dir / "winogrande/validation.jsonl").unlink()
    score(llama, tokenizer, ["winogrande"], data_dir, tmp_path / "out", Scoring(limit=1))
    assert trace == ["others wait", "download", "others go on"]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(("file", "change", "message"), [
    ("winogrande/validation.jsonl", {"sentence": "no blank here"}, "line 4: not a row of winogrande"),
    ("winogrande/validation.jsonl", {"answer": "3"}, "line 4: .*gold 2"),
    ("mmlu/test.jsonl", {"choices": ["a", "b", "c"]}, "line 4: not a row of mmlu"),
    ("mmlu/test.jsonl", {"answer": "B"}, "line 4: not a row of mmlu"),
    ("mmlu/test.jsonl", {"answer": True}, "line 4: .*the answer must be int, found True"),
    ("winogrande/validation.jsonl", {"answer": True}, "line 4: .*the answer must be str, found True"),
    ("hellaswag/validation.jsonl", {"label": 2.9}, "line 4: .*the label must be str, found 2.9"),
    ("truthfulqa/multiple_choice.jsonl", {"mc2_targets": {"choices": ["a", "b"], "labels": ["1", "0"]}},
     "line 4: .*a label must be int, found '1'"),
    ("truthfulqa/multiple_choice.jsonl", {"mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]}},
     "line 4: .*the first option of mc1 must be the true one"),
    ("hellaswag/validation.jsonl", {"label": ""}, "line 4: not a row of hellaswag"),
    ("hellaswag/validation.jsonl", {"endings": None}, "line 4: not a row of hellaswag"),
    ("truthfulqa/multiple_choice.jsonl", {"mc1_targets": {"choices": []}}, "line 4: not a row of truthfulqa"),
])
def test_a_bad_row_is_named(llama, tokenizer, data_dir, tmp_path, file, change, message):
    rows = read_jsonl(data_dir / file)
    rows[1] |= change
    write_jsonl(data_dir / file, rows)
    first, *rest = (data_dir / file).read_bytes().splitlines(keepends=True)
    (data_dir / file).write_bytes(b"".join([first, b"\n", b" \n", *rest]))  # blank lines are skipped, but counted
    with pytest.raises(InputError, match=f"{file}, {message}"):
        score(llama, tokenizer, [file.partition("/")[0]], data_dir, tmp_path / "out")


def test_missing_fields_short_files_and_wrong_flags(llama, tokenizer, data_dir, tmp_path, monkeypatch):
    def run(names, **more):
        return score(llama, tokenizer, names, data_dir, tmp_path / "out", Scoring(**more))

    with pytest.raises(InputError, match="unknown benchmark 'mmul': choose from mmlu, truthfulqa"):
        run(["mmul"])
    with pytest.raises(InputError, match="--num-fewshot 4: .*dev.jsonl has 3"):
        run(["mmlu"], num_fewshot=4)
    with pytest.raises(InputError, match="--num-fewshot -1: it must be 0 or more"):
        run(["mmlu"], num_fewshot=-1)
    write_jsonl(data_dir / "winogrande/validation.jsonl", winogrande_rows()[:-1])
    with pytest.raises(InputError, match="has 5 rows, the original has 6"):
        run(["winogrande"])
    write_jsonl(data_dir / "winogrande/validation.jsonl", [*winogrande_rows()[:-1], {"sentence": "a _ b"}])
    with pytest.raises(InputError, match="line 6: the field 'option1' is missing"):
        run(["winogrande"])
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(InputError, match="line 1: .*chat"):
        run(["hellaswag"], apply_chat_template=True)


def test_add_bos_needs_a_bos_token(llama, tokenizer, data_dir, tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(InputError, match="no BOS token"):
        score(llama, bare, ["hellaswag"], data_dir, tmp_path / "out", Scoring(add_bos=True))


# ------------------------------------------------------------------------------------------------ files from their public homes


def test_mmlu_from_its_archive(tmp_path, monkeypatch):
    source = {"data/test/b_law_test.csv": [['Is it, "so"?', "x,\ny", "2", "3", "4", "D"]],
              "data/test/astronomy_test.csv": [["One?", "1", "2", "3", "4", "A"], ["Two?", "1", "2", "3", "4", "B"]],
              "data/dev/astronomy_dev.csv": [["Dev?", "1", "2", "3", "4", "C"]],
              "data/val/astronomy_val.csv": [["Val?", "1", "2", "3", "4", "C"]]}
    (tmp_path / "mmlu").mkdir()
    with tarfile.open(tmp_path / "mmlu" / "data.tar", "w") as tar:
        for name, rows in source.items():
            text = io.StringIO()
            csv.writer(text).writerows(rows)
            content = text.getvalue().encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    monkeypatch.setitem(benchmarks.COUNTS, "mmlu/test.jsonl", 3)
    monkeypatch.setitem(benchmarks.COUNTS, "mmlu/dev.jsonl", 1)
    found = benchmarks.documents("mmlu", tmp_path)
    assert [(x.row["subject"], x.row["question"], x.row["answer"]) for x in found] == [
        ("astronomy", "One?", 0), ("astronomy", "Two?", 1), ("b_law", 'Is it, "so"?', 3)]
    assert found[2].row["choices"] == ["x,\ny", "2", "3", "4"]
    assert [row["question"] for row in read_jsonl(tmp_path / "mmlu" / "dev.jsonl")] == ["Dev?"]


def test_truthfulqa_from_its_file(tmp_path, monkeypatch):
    (tmp_path / "truthfulqa").mkdir()
    row = {"question": "Q?", "mc1_targets": {"yes": 1, "no": 0}, "mc2_targets": {"no": 0, "yes": 1, "sure": 1}}
    (tmp_path / "truthfulqa" / "mc_task.json").write_text(json.dumps([row]))
    monkeypatch.setitem(benchmarks.COUNTS, "truthfulqa/multiple_choice.jsonl", 1)
    found, = benchmarks.documents("truthfulqa", tmp_path)
    assert found.row == {"question": "Q?", "mc1_targets": {"choices": ["yes", "no"], "labels": [1, 0]},
                         "mc2_targets": {"choices": ["no", "yes", "sure"], "labels": [0, 1, 1]}}


def test_hellaswag_from_its_file(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "hellaswag" / "hellaswag_val.jsonl", [row | {"label": int(row["label"]), "ind": 7}
                                                                 for row in hellaswag_rows()])
    monkeypatch.setitem(benchmarks.COUNTS, "hellaswag/validation.jsonl", 6)
    found = benchmarks.documents("hellaswag", tmp_path)
    assert [x.row for x in found] == [row | {"ind": 7} for row in hellaswag_rows()]


def test_winogrande_from_its_archive(tmp_path, monkeypatch):
    (tmp_path / "winogrande").mkdir()
    with zipfile.ZipFile(tmp_path / "winogrande" / "winogrande_1.1.zip", "w") as archive:
        archive.writestr("__MACOSX/winogrande_1.1/dev.jsonl", "not JSON")
        archive.writestr("winogrande_1.1/train_xl.jsonl", "{}\n")
        lines = [json.dumps(row | {"qID": "3"}) + "\n" for row in winogrande_rows()]
        archive.writestr("winogrande_1.1/dev.jsonl", "".join(lines))
    monkeypatch.setitem(benchmarks.COUNTS, "winogrande/validation.jsonl", 6)
    assert [x.row for x in benchmarks.documents("winogrande", tmp_path)] == winogrande_rows()


@pytest.mark.parametrize("name", ALL)
def test_without_a_network_the_missing_file_is_named(name, tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(InputError, match=f"{name}/.* is missing and cannot be fetched .*: download https://.* there"):
        benchmarks.documents(name, tmp_path)


# ------------------------------------------------------------------------------------------------ drop against base, GSM8K


def samples_of(values: list[float]) -> list[dict]:
    metrics = [{"acc": value, "acc_norm": 0.0} for value in values]
    return [{"benchmark": "hellaswag", "index": i, "metrics": metrics[i]} for i in range(len(values))]


def test_paired_drop_by_hand():
    drop = paired_drop(samples_of([1, 1, 0, 1]), samples_of([0, 1, 0, 1])[::-1])["hellaswag"]
    assert drop["drop"] == 0.25 and drop["n"] == 4
    assert drop["interval"] == pytest.approx([0.25 - 1.959964 * 0.25, 0.25 + 1.959964 * 0.25])  # sd 0.5, n 4
    other = paired_drop(samples_of([1, 1, 0, 1]), samples_of([0, 1, 0, 1]), metric="acc_norm")["hellaswag"]
    assert other == {"drop": 0.0, "interval": [0.0, 0.0], "n": 4}
    with pytest.raises(InputError, match="different documents"):
        paired_drop(samples_of([1, 0]), samples_of([1]))


@pytest.mark.parametrize(("response", "strict", "flexible"), [
    ("so 3 + 4 = 7.\n#### 7\nor #### 8", "7", "8"),
    ("#### -1,234.50 dollars", "-1,234.50", "-1,234.50"),
    ("#### $5", "[invalid]", "$5"),
    ("It costs $18.", "[invalid]", "$18."),
    ("3 apples and 4 pears", "[invalid]", "4"),
    ("no number", "[invalid]", "[invalid]"),
    ("well...", "[invalid]", "..."),
])
def test_gsm8k_extraction(response, strict, flexible):
    assert (gsm8k_strict(response), gsm8k_flexible(response)) == (strict, flexible)


def test_gsm8k_match_is_of_text():
    gold = "9 * 2 = <<9*2=18>>18\n#### 18"
    assert all(gsm8k_match(extracted, gold) for extracted in ("18", "$18.", "1,8"))
    assert not any(gsm8k_match(extracted, gold) for extracted in ("18.00", "118", "[invalid]"))
