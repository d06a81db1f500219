"""generate.py against transformers' own greedy generate, token for token in float32, on tiny random models."""

import random
import types
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import engine.attention  # noqa: F401, registers the attention that is named "rows"
import generate as module
from engine import decoding
from engine.decoding import Sampling
from generate import generate
from support.cli import InputError

EOS = [1, 7, 20, 30, 44, 58, 71, 93]
SMOL = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"
PIECES = ["<s>", "</s>", "[[", "]]", "[[DO", "NE", "]", "[", "x]]y", " ", "ü", "DONE"]
VOCABULARY = PIECES + [chr(i) for i in range(33, 127) if chr(i) not in "[]"]
SHAPE = dict(
    vocab_size=len(VOCABULARY),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,  # wide enough that greedy choices are no near-ties
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=1,
)
COVERED = {
    "llama": LlamaConfig(**SHAPE),
    "llama-eager": LlamaConfig(**SHAPE, attn_implementation="eager"),
    "llama-rows": LlamaConfig(**SHAPE, attn_implementation="rows"),
    "gemma-rows": GemmaConfig(**SHAPE, head_dim=16, attn_implementation="rows"),
    "mistral-v0.2": MistralConfig(**SHAPE, sliding_window=None),
    "mistral-wide-window": MistralConfig(**SHAPE, sliding_window=128),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma": GemmaConfig(**SHAPE, head_dim=16),
    "gemma2-wide-window": Gemma2Config(**SHAPE, head_dim=16, sliding_window=128, attn_implementation="eager"),
    "phi": PhiConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE),
    "gpt2": GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
}
UNCOVERED = {
    "bloom": BloomConfig(**SHAPE, n_layer=2, n_head=4),
    "mamba": MambaConfig(**SHAPE, state_size=4),
}


@pytest.fixture(scope="module")
def tokenizer():
    inner = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(VOCABULARY)}, unk_token="<s>"))
    inner.decoder = decoders.Fuse()  # pieces are joined without spaces, so that a stop string can span tokens
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<s>")


def build(config, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation).float()
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=0)
    return model.eval()


def prompts(count, seed=0, longest=40):
    """Prompts that start alike; every third one also shares a passage with its two neighbours."""
    rng = random.Random(seed)
    draw = lambda low, high: [rng.randrange(2, SHAPE["vocab_size"]) for _ in range(rng.randint(low, high))]  # noqa: E731
    start, passages = draw(5, 5), [draw(33, 40) for _ in range(count)]
    return [start + (passages[i // 3] if i % 6 < 3 else []) + draw(1, longest) for i in range(count)]


def reference(model, prompt, new):
    """transformers' greedy generate, one prompt at a time, so that there is no padding in it."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def try_before(model, tokenizer, rows, new):
    """Generate once, so that no forward of the model's trial comes into what a test counts afterwards."""
    return dict(generate(model, tokenizer, rows, new))


def gib_for(model, slots, rows, new):
    """A memory budget that holds exactly `slots` rows (and the one for the common prefix) of a two-layer Llama."""
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    return (slots + 1.5) * token * (max(map(len, rows)) + new) / 2**30


@pytest.mark.parametrize("name", COVERED)
def test_same_tokens_as_transformers_without_falling_back(name, tokenizer):
    model, rows = build(COVERED[name]), prompts(14)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = dict(generate(model, tokenizer, rows, 24))
    expected = [reference(model, row, 24) for row in rows]
    assert [got[i].tokens for i in range(len(rows))] == expected
    assert [got[i].finished for i in range(len(rows))] == [row[-1] in EOS for row in expected]
    assert len({len(row) for row in expected}) > 2, "the rows must end at different times for this test to mean something"


@pytest.mark.parametrize("name", UNCOVERED)
def test_falls_back_and_says_so(name, tokenizer):
    model, rows = build(UNCOVERED[name]), prompts(6)
    with pytest.warns(UserWarning, match="falling back to transformers"):
        got = dict(generate(model, tokenizer, rows, 24))
    assert [got[i].tokens for i in range(len(rows))] == [reference(model, row, 24) for row in rows]


@pytest.mark.parametrize("slots", [1, 2, 5])
@pytest.mark.parametrize("refill", [1, 10**6])
def test_more_prompts_than_slots(slots, refill, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "REFILL_TOKENS", refill)
    monkeypatch.setitem(module.PREFILL_TOKENS, "cpu", 120)
    model, rows = build(COVERED["llama"], seed=1), prompts(23, seed=1)
    try_before(model, tokenizer, rows, 24)
    sizes = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    got = dict(generate(model, tokenizer, rows, 24, memory_gib=gib_for(model, slots, rows, 24)))
    assert max(sizes) == slots
    assert [got[i].tokens for i in range(len(rows))] == [reference(model, row, 24) for row in rows]


def test_identical_and_nested_prompts(tokenizer):
    model, row = build(COVERED["llama"]), prompts(1)[0]
    rows = [row, row, row[:1], row[:-1], row + [5], row]
    got = dict(generate(model, tokenizer, rows, 12))
    assert [got[i].tokens for i in range(len(rows))] == [reference(model, row, 12) for row in rows]


def test_what_prompts_share_is_forwarded_once(tokenizer):
    model, rng = build(COVERED["llama"]), random.Random(0)
    passage = [[rng.randrange(2, 90) for _ in range(100)] for _ in range(2)]
    rows = [[3] * 20 + passage[i // 5] + [rng.randrange(2, 90) for _ in range(4)] for i in range(10)]
    try_before(model, tokenizer, rows, 1)
    count = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: count.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    dict(generate(model, tokenizer, rows, 1))
    assert sum(count) <= 1 + 20 + 2 * 101 + 10 * 5  # the probe, the common prefix, two passages, the questions


def test_generation_config_is_ignored(tokenizer):
    model, rows = build(COVERED["llama"]), prompts(8)
    expected = [reference(model, row, 16) for row in rows]
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, do_sample=True, temperature=5.0, repetition_penalty=3.0, no_repeat_ngram_size=1, min_new_tokens=9
    )
    got = dict(generate(model, tokenizer, rows, 16))
    assert [got[i].tokens for i in range(len(rows))] == expected
    model, rows = build(UNCOVERED["mamba"]), prompts(4)
    expected = [reference(model, row, 16) for row in rows]
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=9)
    kept = model.generation_config
    with pytest.warns(UserWarning):
        got = dict(generate(model, tokenizer, rows, 16))
    assert [got[i].tokens for i in range(len(rows))] == expected
    assert model.generation_config is kept


def scripted(text_pieces):
    """A model that answers any prompt with the given pieces: its logits are one-hot at the next one."""
    model = build(LlamaConfig(**SHAPE))
    model.generation_config.eos_token_id = 1
    script = [VOCABULARY.index(piece) for piece in text_pieces]

    def forward(self, input_ids, position_ids=None, logits_to_keep=0, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        out = type(self).forward(self, input_ids, position_ids=position_ids, **kwargs)
        step = (position_ids - 2).clamp(0, len(script) - 1)  # prompts of three tokens
        out.logits = torch.nn.functional.one_hot(torch.tensor(script)[step], SHAPE["vocab_size"]).float()
        return out

    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.parametrize(
    "pieces, text, count",
    [
        (["a", "[[", "DONE", "]]", "b"], "a[[DONE]]", 4),  # spans tokens
        (["a", "[[DO", "NE", "x]]y", "b", "</s>"], "a[[DONEx]]yb", 6),  # looks like it, is not
        (["[[", "DONE", "]", "]", "b"], "[[DONE]]", 4),
        (["a", "]]", "[", "[", "D", "O", "NE", "]]", "[["], "a]][[DONE]]", 8),
        (["ü", "]]", "</s>"], "ü]]", 3),
    ],
)
def test_stop_string(pieces, text, count, tokenizer):
    got = dict(generate(scripted(pieces), tokenizer, [[5, 6, 7], [8, 9, 10]], 12, stop="[[DONE]]"))
    for response in got.values():
        assert (response.text, len(response.tokens), response.finished) == (text, count, True)


def test_text_is_cut_where_a_token_overshoots_the_stop_string(tokenizer):
    got = dict(generate(scripted(["a", "x]]y", "b"]), tokenizer, [[5, 6, 7]], 12, stop="]]"))
    assert (got[0].text, len(got[0].tokens), got[0].finished) == ("ax]]", 2, True)


def test_the_first_of_several_stop_strings_ends_a_response(tokenizer):
    pieces = ["a", "[[", "b", "DONE", "]]", "c"]
    for stops in (("]]", "bDONE"), ("bDONE", "]]")):
        got = dict(generate(scripted(pieces), tokenizer, [[5, 6, 7]], 12, stop=stops))
        assert (got[0].text, len(got[0].tokens), got[0].finished) == ("a[[bDONE", 4, True)


def test_length_limit_is_not_finished(tokenizer):
    got = dict(generate(scripted(["a", "b", "c", "</s>"]), tokenizer, [[5, 6, 7]], 3))
    assert (got[0].text, got[0].finished) == ("abc", False)
    got = dict(generate(scripted(["a", "b", "</s>"]), tokenizer, [[5, 6, 7]], 3))
    assert (got[0].text, got[0].tokens[-1], got[0].finished) == ("ab", 1, True)


def test_results_come_as_they_finish(tokenizer):
    model, rows = build(COVERED["llama"]), prompts(14)
    seen, steps = [], []
    model.register_forward_hook(lambda *_: steps.append(1))
    for index, _ in generate(model, tokenizer, rows, 24):
        seen.append((len(steps), index))
    assert len({when for when, _ in seen}) > 3
    assert sorted(index for _, index in seen) == list(range(14))


def test_context_limit(tokenizer):
    model = build(LlamaConfig(**SHAPE | dict(max_position_embeddings=32)))
    model.generation_config.eos_token_id = None
    tokenizer = types.SimpleNamespace(eos_token_id=None, decode=tokenizer.decode)
    rows = [[5] * 31, [6] * 20]
    got = dict(generate(model, tokenizer, rows, 20))
    assert [len(got[i].tokens) for i in range(2)] == [1, 12]  # capped at the context
    assert not got[0].finished and not got[1].finished
    with pytest.raises(ValueError, match="prompt 1 has 32 tokens"):
        generate(model, tokenizer, [[5], [5] * 32], 4)
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate(model, tokenizer, [[5], []], 4)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, tokenizer, [[5]], 0)
    assert list(generate(model, tokenizer, [], 4)) == []


def test_training_flag_and_weights_stay_usable(tokenizer):
    model = build(COVERED["llama"]).train()
    list(generate(model, tokenizer, prompts(3), 4))
    assert model.training
    stream = generate(model, tokenizer, prompts(3), 4)
    next(stream)
    assert not model.training
    stream.close()
    assert model.training
    model(input_ids=torch.tensor([[4, 5, 6]]), labels=torch.tensor([[4, 5, 6]])).loss.backward()


def test_out_of_memory_halves_the_slots_and_loses_no_row(tokenizer):
    model, rows = build(COVERED["llama"]), prompts(20)
    expected = [reference(model, row, 24) for row in rows]
    try_before(model, tokenizer, rows, 24)
    real, calls = model.forward, []

    def forward(*args, input_ids, position_ids=None, logits_to_keep=0, **kwargs):
        calls.append(len(input_ids))
        if len(input_ids) > 6 and len(calls) > 5:  # not at once: some rows must be under way
            raise torch.OutOfMemoryError("simulated")
        return real(*args, input_ids=input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **kwargs)

    model.forward = forward
    with pytest.warns(UserWarning, match="out of memory: going on with (10|5) rows"):
        got = list(generate(model, tokenizer, rows, 24))
    assert sorted(i for i, _ in got) == list(range(20))
    assert [dict(got)[i].tokens for i in range(20)] == expected


def test_out_of_memory_with_one_slot_is_raised(tokenizer):
    model = build(COVERED["llama"])
    try_before(model, tokenizer, prompts(2), 4)

    def forward(*args, input_ids, position_ids=None, logits_to_keep=0, real=model.forward, **kwargs):
        if position_ids is not None:
            raise torch.OutOfMemoryError("simulated")
        return real(*args, input_ids=input_ids, **kwargs)

    model.forward = forward
    with pytest.warns(UserWarning), pytest.raises(InputError, match="out of memory with one row"):
        list(generate(model, tokenizer, prompts(2), 4))


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_a_sample_does_not_depend_on_its_batch(name, tokenizer):
    model, sample = build((COVERED | UNCOVERED)[name]), Sampling(temperature=1.3, top_p=0.9, seed=4)
    rows = [prompts(1)[0]] * 6 + prompts(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        some = dict(generate(model, tokenizer, rows[:6], 12, sample=sample))
        every = dict(generate(model, tokenizer, rows, 12, sample=sample))
    assert all(some[i].tokens == every[i].tokens for i in range(6))
    assert len({tuple(response.tokens) for response in some.values()}) > 3


def test_a_sample_follows_the_name_of_its_prompt(tokenizer):
    model, rows = build(COVERED["llama"]), prompts(5)
    every = dict(generate(model, tokenizer, rows, 12, sample=Sampling(seed=2, keys="abcde")))
    part = dict(generate(model, tokenizer, [rows[4], rows[1]], 12, sample=Sampling(seed=2, keys="eb")))
    assert [part[0].tokens, part[1].tokens] == [every[4].tokens, every[1].tokens]


def test_replaced_modules_are_used(tokenizer):
    class Wrapped(torch.nn.Module):  # as a LoRA layer: a frozen layer and something beside it
        def __init__(self, base):
            super().__init__()
            self.base, self.extra = base, torch.nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.extra(x)

    model, rows = build(COVERED["llama"]), prompts(6)
    before = dict(generate(model, tokenizer, rows, 12))
    for layer in model.model.layers:
        layer.self_attn.v_proj = Wrapped(layer.self_attn.v_proj)
    got = dict(generate(model, tokenizer, rows, 12))
    assert [got[i].tokens for i in range(6)] == [reference(model, row, 12) for row in rows]
    assert got != before


def test_samples_follow_the_top_p_distribution():
    logits = torch.log(torch.tensor([[0.05, 0.5, 0.3, 0.15]]))
    rows = [decoding.Row(i, [0], 1, 9) for i in range(20000)]
    drawn = decoding.choose_tokens(logits.expand(20000, 4), rows, Sampling(temperature=1.0, top_p=0.8, seed=1))
    share = torch.bincount(torch.tensor(drawn), minlength=4) / 20000
    assert torch.allclose(share, torch.tensor([0, 0.5 / 0.8, 0.3 / 0.8, 0]), atol=0.015)
    hot = decoding.choose_tokens(logits.expand(20000, 4), rows, Sampling(temperature=2.0, seed=1))
    share = torch.bincount(torch.tensor(hot), minlength=4) / 20000
    assert torch.allclose(share, torch.softmax(logits[0] / 2, -1), atol=0.015)
    with pytest.raises(ValueError):
        Sampling(temperature=0)


def test_bfloat16_runs(tokenizer):
    model = build(COVERED["llama"]).bfloat16()
    got = dict(generate(model, tokenizer, prompts(9), 8))
    assert sorted(got) == list(range(9)) and all(1 <= len(r.tokens) <= 8 for r in got.values())


@pytest.mark.skipif(not SMOL.exists(), reason="the demo's model is not there")
def test_same_tokens_on_the_demo_model():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32), AutoTokenizer.from_pretrained(SMOL)
    asked = ["What is 2 + 2?", "Name a colour of the sky.", "Write a haiku about rain."]
    rows = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, return_dict=False)
        for q in asked
    ]
    got = dict(generate(model, tokenizer, rows, 12))
    assert [got[i].tokens for i in range(3)] == [reference(model, row, 12) for row in rows]
