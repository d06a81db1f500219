"""Which way each kind of model generates, found by a trial: token for token transformers' greedy generate."""

import warnings

import pytest
import torch
from test_generate import EOS, SHAPE, build, prompts, reference, tokenizer  # noqa: F401, a fixture is one of them
from transformers import (
    BambaConfig,
    Cohere2Config,
    Exaone4Config,
    FalconConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    RecurrentGemmaConfig,
    XLNetConfig,
)

from engine.decoding import Sampling
from engine.fallback import rows_in_memory
from engine.model import context_length
from engine.slot_trial import longest_harmless_row, why_no_padding, why_no_slots
from generate import generate
from support.cli import InputError

MIXED = dict(sliding_window=16, layer_types=["full_attention", "sliding_attention"])
GEMMA3 = Gemma3TextConfig(**SHAPE, **MIXED, head_dim=16)
WINDOWS = {
    "mistral-v0.1": MistralConfig(**SHAPE, sliding_window=16),
    "mistral-v0.1-rows": MistralConfig(**SHAPE, sliding_window=16, attn_implementation="rows"),
    "phi3": Phi3Config(**SHAPE, sliding_window=16),
    "qwen2": Qwen2Config(**SHAPE, sliding_window=16, use_sliding_window=True, max_window_layers=1),
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, sliding_window=16, attn_implementation="eager"),
    "gemma3": GEMMA3,
    "gemma3-rows": Gemma3TextConfig(**SHAPE, **MIXED, head_dim=16, attn_implementation="rows"),
    "gemma3-composite": Gemma3Config(
        text_config=GEMMA3.to_dict(),
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                           image_size=28, patch_size=14)),
    "gpt-oss": GptOssConfig(**SHAPE, **MIXED, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
                            attn_implementation="eager"),
    "cohere2": Cohere2Config(**SHAPE, **MIXED),
    "olmo3": Olmo3Config(**SHAPE, **MIXED),
    "exaone4": Exaone4Config(**SHAPE, **MIXED),
    "llama4": Llama4TextConfig(**SHAPE, attention_chunk_size=16, head_dim=8, num_local_experts=2,
                               intermediate_size_mlp=64, layer_types=["chunked_attention", "full_attention"]),
}
LONGROPE = Phi3Config(
    **SHAPE,
    original_max_position_embeddings=64,
    rope_parameters=dict(
        rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[3.0, 5.0, 9.0, 20.0],
        original_max_position_embeddings=64),
)


def generated(model, tokenizer, rows, new, **options):  # noqa: F811
    """(the tokens of each response, the warnings)"""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = dict(generate(model, tokenizer, rows, new, **options))
    return [got[i].tokens for i in range(len(rows))], [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_decoded_in_slots(name, tokenizer):  # noqa: F811
    model, rows = build(WINDOWS[name]), prompts(10)
    assert max(map(len, rows)) > 16, "some prompts must be longer than the window"
    tokens, said = generated(model, tokenizer, rows, 24)
    assert tokens == [reference(model, row, 24) for row in rows]
    assert not [message for message in said if "falling back" in message]


def test_windows_keep_the_shared_prefix(tokenizer):  # noqa: F811
    model = build(WINDOWS["gemma3"])
    rows = [[3] * 20 + [9 + i] * 4 for i in range(10)]
    list(generate(model, tokenizer, rows, 1))  # the trial
    count = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: count.append(kwargs["input_ids"].numel()), with_kwargs=True)
    list(generate(model, tokenizer, rows, 1))
    assert sum(count) <= 1 + 20 + 10 * 4


def test_alibi_and_windows_that_no_cache_layer_knows_fall_back(tokenizer):  # noqa: F811
    attention_types = [[["global", "local"], 1]]
    local = GPTNeoConfig(**SHAPE, num_layers=2, num_heads=4, window_size=16, attention_types=attention_types)
    alibi = FalconConfig(**SHAPE, alibi=True)
    for config in (local, alibi):
        model, rows = build(config), prompts(6)
        tokens, said = generated(model, tokenizer, rows, 24)
        assert tokens == [reference(model, row, 24) for row in rows]
        assert any("falling back to transformers" in message for message in said)


def test_a_model_that_ignores_the_mask_is_found_out():
    model = build(LlamaConfig(**SHAPE))
    assert why_no_slots(model, 60) == ""
    other = build(LlamaConfig(**SHAPE))
    own = other.forward
    other.forward = lambda *args, attention_mask=None, **kwargs: own(*args, **kwargs)
    assert "slots change its logits" in why_no_slots(other, 60)


def test_rounding_in_bfloat16_is_no_difference():
    model = build(LlamaConfig(**SHAPE)).bfloat16()
    assert why_no_slots(model, 60) == why_no_padding(model, 60) == ""


def test_a_model_that_raises_falls_back_in_one_line():
    model = build(LlamaConfig(**SHAPE))

    def forward(*args, past_key_values=None, **kwargs):
        raise RuntimeError("no such\nkernel")

    model.forward = forward
    assert why_no_slots(model, 60) == "RuntimeError: no such kernel"


def test_the_trial_is_made_once_for_a_model():
    model = build(LlamaConfig(**SHAPE))
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    why_no_slots(model, 60)
    tried = len(calls)
    assert why_no_slots(model, 60) == why_no_slots(model, 30) == ""  # the longer trial covers the shorter one
    assert len(calls) == tried > 0
    why_no_slots(model, 61)
    assert len(calls) > tried


def test_padding_that_leaks_is_found_and_rows_go_alone(tokenizer):  # noqa: F811
    config = RecurrentGemmaConfig(
        **SHAPE, attention_window_size=16, lru_width=32, block_types=["recurrent", "attention"])
    model, rows = build(config), prompts(8)
    tokens, said = generated(model, tokenizer, rows, 24)
    assert tokens == [reference(model, row, 24) for row in rows]
    assert any("padding changes its logits" in message for message in said)


def by_plain_forwards(model, prompt, new):
    """Greedy decoding by plain forward passes over the whole row, up to an end of turn."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] in EOS:
            break
    return ids[len(prompt) :]


def no_attention_for_the_cache():
    """State-space layers only: transformers' generate asks the cache for its length, and that raises."""
    return build(BambaConfig(
        **SHAPE, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=8))


def no_generate():
    """A class that does not inherit from GenerationMixin, and whose forward fails with a cache."""
    model = build(LlamaConfig(**SHAPE))
    own = model.forward

    def forward(*args, past_key_values=None, **kwargs):
        if past_key_values is not None:
            raise TypeError("no such cache")
        return own(*args, **kwargs)

    def generate(*args, **kwargs):
        raise AttributeError("no generate")

    model.forward = forward
    model.generate = generate
    return model


@pytest.mark.parametrize("make", [no_attention_for_the_cache, no_generate])
@torch.no_grad()
def test_a_model_on_which_transformers_generate_fails_reads_whole_rows(make, tokenizer):  # noqa: F811
    model, rows = make(), prompts(5)
    tokens, said = generated(model, tokenizer, rows, 12)
    assert tokens == [by_plain_forwards(model, row, 12) for row in rows]
    assert any("falling back to a forward pass over the whole row for every token" in line for line in said)


def test_rows_that_are_drawn_do_not_depend_on_the_way(tokenizer):  # noqa: F811
    sample = Sampling(seed=1)
    in_slots, _ = generated(build(LlamaConfig(**SHAPE)), tokenizer, prompts(5), 12, sample=sample)
    whole_rows, _ = generated(no_generate(), tokenizer, prompts(5), 12, sample=sample)
    assert whole_rows == in_slots


def test_a_context_of_minus_one_token_is_without_end():
    config = XLNetConfig(vocab_size=SHAPE["vocab_size"], d_model=32, n_layer=2, n_head=4, d_inner=64)
    assert config.max_position_embeddings == -1
    assert context_length(config) == float("inf")
    assert context_length(LlamaConfig(**SHAPE)) == 256


@pytest.mark.parametrize("attention", ["sdpa", "rows"])
def test_a_long_row_does_not_change_its_short_neighbours(attention, tokenizer):  # noqa: F811
    model = build(LONGROPE)
    model.set_attn_implementation(attention)
    assert longest_harmless_row(model, 200) == 64
    assert longest_harmless_row(build(LlamaConfig(**SHAPE)), 200) == 200

    rows = prompts(8)
    lengths = [len(row) + 24 for row in rows]
    assert min(lengths) <= 64 < max(lengths)
    tokens, said = generated(model, tokenizer, rows, 24)
    model.set_attn_implementation("sdpa")
    assert tokens == [reference(model, row, 24) for row in rows]
    assert any("rows of more than 64 tokens" in message for message in said)


def out_of_memory_beyond(model, most: int):
    """Let the model's forward run out of memory with more than `most` rows."""
    own = model.forward

    def forward(*args, input_ids=None, **kwargs):
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("simulated")
        return own(*args, input_ids=input_ids, **kwargs)

    model.forward = forward


def test_out_of_memory_in_the_fallback_halves_its_batch_and_loses_no_row(tokenizer):  # noqa: F811
    model, rows = build(MambaConfig(**SHAPE, state_size=4)), prompts(11)
    expected = [reference(model, row, 12) for row in rows]
    generated(model, tokenizer, rows, 12)  # the trial
    out_of_memory_beyond(model, 3)
    tokens, said = generated(model, tokenizer, rows, 12)
    assert tokens == expected
    assert any("out of memory: going on with 2 rows at a time" in message for message in said)


def test_out_of_memory_with_one_row_in_the_fallback_is_one_line(tokenizer):  # noqa: F811
    model, rows = build(MambaConfig(**SHAPE, state_size=4)), prompts(3)
    generated(model, tokenizer, rows, 4)
    out_of_memory_beyond(model, 0)
    with pytest.raises(InputError, match="out of memory with one row"):
        generated(model, tokenizer, rows, 4)


def test_the_fallback_takes_as_many_rows_as_the_budget_holds():
    model = build(LlamaConfig(**SHAPE))
    token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, bytes
    assert rows_in_memory(model, 100, memory_gib=5.5 * 100 * token / 2**30) == 5
    assert rows_in_memory(model, 100, memory_gib=1e-9) == 1
    assert rows_in_memory(model, 100, memory_gib=None) == 32  # on the CPU a larger batch gains nothing


def test_a_trial_that_has_no_memory_is_made_with_a_shorter_row():
    model = build(LlamaConfig(**SHAPE))
    tried, forward = [], model.forward

    def small_device(input_ids=None, **kwargs):
        tried.append(input_ids.shape[1])
        if input_ids.shape[1] > 40:
            raise torch.OutOfMemoryError("simulated")
        return forward(input_ids=input_ids, **kwargs)

    model.forward = small_device
    assert why_no_slots(model, 60) == "" and max(tried) > 40
