"""Models of every kind, tiny and random: the loss, log-probabilities and gradients are those of rows alone.

The reference is the plain forward of transformers over one row at a time. It uses nothing of ours.
"""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn import functional as F

import lora
from engine import trial
from engine.forward import Ways
from engine.forward import target_logits as logits_by
from engine.model import load_model
from engine.packed import target_logits, target_loss, token_log_probs
from support.cli import InputError

SMOLLM2 = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"
BASE = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
LLAMA = dict(BASE, intermediate_size=48, num_key_value_heads=2, head_dim=8)
MLA = dict(BASE, intermediate_size=48, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8,
           qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_group=1, topk_group=1, n_routed_experts=4,
           num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1)  # fmt: skip
SSM = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8)
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
TWO_KINDS = ["sliding_attention", "full_attention"]
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 12.8,
            "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}  # fmt: skip
VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)

KINDS = {
    "llama": tf.LlamaConfig(**LLAMA),
    "mistral, a window": tf.MistralConfig(**LLAMA, sliding_window=5),
    "mistral, no window": tf.MistralConfig(**LLAMA, sliding_window=None),
    "qwen3": tf.Qwen3Config(**LLAMA),
    "falcon": tf.FalconConfig(**BASE),
    "mpt": tf.MptConfig(
        vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=256, initializer_range=0.3
    ),
    "bloom": tf.BloomConfig(vocab_size=97, hidden_size=32, n_head=4, n_layer=2, initializer_range=0.3),
    "stablelm": tf.StableLmConfig(**BASE, intermediate_size=48, num_key_value_heads=4),
    "nemotron": tf.NemotronConfig(**LLAMA),
    "gpt_oss": tf.GptOssConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=8, layer_types=TWO_KINDS
    ),
    "granite, logits scaled": tf.GraniteConfig(**LLAMA, logits_scaling=8.0, embedding_multiplier=3.0),
    "cohere, logits scaled": tf.CohereConfig(
        **BASE, intermediate_size=48, num_key_value_heads=2, logit_scale=0.0625
    ),
    "gemma2, logits capped": tf.Gemma2Config(**LLAMA, sliding_window=8, final_logit_softcapping=2.0),
    "gemma3 with vision": tf.Gemma3Config(
        text_config=dict(LLAMA, sliding_window=8, layer_types=TWO_KINDS, final_logit_softcapping=2.0),
        vision_config=VISION, mm_tokens_per_image=4,
    ),
    "granite hybrid": tf.GraniteMoeHybridConfig(
        **LLAMA, **SSM, num_local_experts=2, num_experts_per_tok=1, shared_intermediate_size=16,
        layer_types=["mamba", "attention"],
    ),
    "mamba2": tf.Mamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1,
        chunk_size=8, initializer_range=0.3,
    ),
    "qwen3_next": tf.Qwen3NextConfig(
        **LLAMA, **LINEAR, **MOE, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": tf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    "qwen2_moe, a window in the mask": tf.Qwen2MoeConfig(
        **LLAMA, **MOE, shared_expert_intermediate_size=16, sliding_window=5, use_sliding_window=True,
        max_window_layers=1,
    ),
    "llama4, chunks in the mask": tf.Llama4TextConfig(
        **LLAMA, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
        layer_types=["chunked_attention", "full_attention"],
    ),
    "phimoe": tf.PhimoeConfig(**LLAMA, num_local_experts=4, sliding_window=None, router_jitter_noise=0.0),
    "deepseek v2": tf.DeepseekV2Config(**MLA),
    "deepseek v3": tf.DeepseekV3Config(**MLA),
    "phi3, rotary frequencies change": tf.Phi3Config(
        **LLAMA, rope_parameters=LONGROPE, original_max_position_embeddings=20
    ),
}  # fmt: skip
if hasattr(tf, "DeepseekV32Config"):  # younger than the oldest transformers that is covered
    KINDS["deepseek v3.2, tokens are chosen"] = tf.DeepseekV32Config(
        **MLA, index_topk=8, index_head_dim=8, index_n_heads=2
    )
LLAMA_CONFIG = KINDS["llama"]
SEE_EACH_OTHER = ("falcon", "mpt", "bloom", "gpt_oss", "granite hybrid", "mamba2", "qwen3_next", "lfm2")


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval().to(dtype)
    trial.use_rows_attention(model)  # as load_model does
    return model


def random_rows(lengths=(9, 33, 5, 12), prefix=()):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = [*prefix, *torch.randint(3, 97, (length,), generator=generator).tolist()]
        first_target = len(prefix) + 3
        rows.append((ids, [place >= first_target for place in range(len(ids))]))
    return rows


def rows_alone(model, rows):
    """(logits, targets) the plain way."""
    logits = []
    targets = []
    for ids, is_target in rows:
        ids = torch.tensor(ids)
        at = torch.tensor(is_target).nonzero().squeeze(1)
        logits.append(model(ids[None], use_cache=False).logits[0, at - 1])
        targets.append(ids[at])
    return torch.cat(logits), torch.cat(targets)


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4 * expected.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_log_probs_and_gradients_are_those_of_rows_alone(kind):
    model, rows = model_of(KINDS[kind]), random_rows()
    names = [n for n, m in model.named_modules() if type(m) is torch.nn.Linear and "vision" not in n]
    targets = [
        n
        for n in names
        if n.endswith(("q_proj", "v_proj", "query_key_value", "Wqkv", "in_proj", "kv_b_proj"))
    ]
    lora.inject(model, rank=2, dropout=0.0, target_modules=targets or ["query_key_value"], seed=0)
    for layer in lora.layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)

    logits, targets = rows_alone(model, rows)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    wanted = torch.autograd.grad(expected, lora.parameters(model))
    loss = target_loss(model, rows)
    gradients = torch.autograd.grad(loss, lora.parameters(model))
    assert_equal(loss, expected)
    for found, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(
            found, right, atol=1e-4 * max(g.abs().max() for g in wanted).item(), rtol=1e-3
        )

    log_p = torch.tensor(sum(token_log_probs(model, rows), []))
    assert_equal(log_p, -F.cross_entropy(logits, targets, reduction="none").detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_that_is_asked_to_be_shared_changes_nothing(kind):
    model, rows = model_of(KINDS[kind]), random_rows(prefix=range(50, 61))
    with torch.no_grad():
        logits, targets = target_logits(model, rows, share_prefix=True)
        expected, wanted = rows_alone(model, rows)
    assert torch.equal(targets, wanted)
    assert_equal(logits, expected)


@pytest.mark.parametrize("kind", SEE_EACH_OTHER)
def test_models_whose_packed_rows_see_each_other_are_found_out(kind):
    model, rows = model_of(KINDS[kind]), random_rows()
    with torch.no_grad():
        packed, _ = logits_by(model, rows, False, Ways(packed=True))
        expected, _ = rows_alone(model, rows)
    assert (packed - expected).abs().max() > 0.01  # packing is wrong here, so this model shows something
    (line,) = [line for line in trial.check(model) if "packed rows" in line]
    assert type(model).__name__ in line


@pytest.mark.parametrize("kind", ["mamba2", "granite hybrid", "lfm2"])
def test_a_state_that_fades_is_seen_in_16_bits_too(kind):
    assert not trial.ways_of(model_of(KINDS[kind], torch.bfloat16)).packed


def verdict(model):
    ways = trial.ways_of(model, announce=False)
    attention = model.config._attn_implementation
    return attention, ways.packed, ways.pack_limit, ways.shared_prefix, ways.keeps_logits, ways.plain_head


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_in_bfloat16_is_that_in_float32(kind):
    assert verdict(model_of(KINDS[kind], torch.bfloat16)) == verdict(model_of(KINDS[kind]))


@pytest.mark.parametrize("cap", [2.0, 30.0])
@pytest.mark.parametrize("spread_of_weights", [0.02, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cap_that_small_logits_do_not_show_is_seen(cap, spread_of_weights, dtype):
    shape = LLAMA | {"initializer_range": spread_of_weights}
    capped = tf.Gemma2Config(**shape, sliding_window=8, final_logit_softcapping=cap)
    free = tf.Gemma2Config(**shape, sliding_window=8, final_logit_softcapping=None)
    assert not trial.ways_of(model_of(capped, dtype)).plain_head
    assert trial.ways_of(model_of(free, dtype)).plain_head


def test_a_shift_that_large_logits_do_not_show_is_seen():
    class Shifted(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + torch.linspace(-1, 1, output.logits.shape[-1])
            return output

    assert not trial.ways_of(Shifted(copy.deepcopy(LLAMA_CONFIG)).eval()).plain_head


def test_trained_weights_in_bfloat16_keep_every_fast_way():
    """A part of SmolLM2: rounding reaches further in it than in random weights."""
    if not SMOLLM2.exists():
        pytest.skip("make demo writes models/SmolLM2-135M-Instruct")
    model, _ = load_model(str(SMOLLM2), "cpu", "bfloat16")
    del model.model.layers[5:]
    model.resize_token_embeddings(4096)
    assert verdict(model) == ("rows", True, 8192, True, True, True)


class HidesThePrefix(tf.LlamaForCausalLM):
    """Rows see nothing outside themselves, whatever is said to be shared."""

    def forward(self, *args, shared=0, **kwargs):
        return super().forward(*args, shared=0, **kwargs)


class LetsRowsSeeTheFirst(tf.LlamaForCausalLM):
    """What is shared is taken to be longer than it is, by a row."""

    def forward(self, *args, shared=0, row_lengths=None, **kwargs):
        if shared:
            row_lengths = [sum(row_lengths[:2]), *row_lengths[2:]]
            shared = row_lengths[0]
        if row_lengths:
            kwargs["row_lengths"] = row_lengths
        return super().forward(*args, shared=shared, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [HidesThePrefix, LetsRowsSeeTheFirst])
@pytest.mark.parametrize("tolerance", [0.0, float("inf")])
def test_a_prefix_is_refused_by_numbers_and_by_what_rows_see(kind, dtype, tolerance):
    model = kind(copy.deepcopy(LLAMA_CONFIG)).eval().to(dtype)
    model.set_attn_implementation("rows")
    assert trial.ways_of(model).packed and not trial.ways_of(model).shared_prefix
    rows = trial.trial_rows(model)
    ways = trial.ways_of(model)
    with trial.as_base_model(model):
        assert not trial.shares_prefix(model, rows, tolerance, ways)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "deepseek v3", "qwen2_moe, a window in the mask"])
def test_the_fast_ways_are_taken_where_they_are_right(kind, dtype):
    ways = trial.ways_of(model_of(KINDS[kind], dtype))
    assert ways.packed and ways.plain_head and ways.keeps_logits
    assert ways.shared_prefix == ("window" not in kind)
    assert len(ways.slow) == ("window" in kind)


def test_a_pack_is_never_longer_than_where_rotary_frequencies_change():
    model = model_of(KINDS["phi3, rotary frequencies change"])
    lengths = []
    ways = trial.ways_of(model)
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: lengths.append(output.shape[1])
    )
    target_logits(model, random_rows((9, 33, 5, 12)))
    assert ways.pack_limit == 20 and lengths == [9, 33, 17]


# ----------------------------------------------------------------------------------------- code of any kind


class NoKeywords(tf.LlamaForCausalLM):
    """Remote code as some write it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


class IdsAlone(tf.LlamaForCausalLM):
    def forward(self, input_ids):
        return super().forward(input_ids=input_ids)


@pytest.mark.parametrize("kind", [NoKeywords, IdsAlone])
def test_a_forward_that_takes_no_more_keywords_goes_the_slow_way(kind):
    plain = model_of(LLAMA_CONFIG)
    model = kind(copy.deepcopy(LLAMA_CONFIG)).eval()
    model.load_state_dict(plain.state_dict())
    trial.use_rows_attention(model)

    rows = random_rows(prefix=range(50, 61))
    expected, targets = rows_alone(plain, rows)
    logits, found = target_logits(model, rows, share_prefix=True)
    assert torch.equal(found, targets)
    assert_equal(logits, expected)
    assert_equal(target_loss(model, rows), F.cross_entropy(expected, targets, reduction="sum"))


class AsksForItsAttention(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.config._attn_implementation not in ("eager", "sdpa"):
            output.logits = output.logits.flip(-1)
        return output


def test_a_model_that_computes_something_else_with_our_attention_keeps_its_own(capsys):
    model = AsksForItsAttention(copy.deepcopy(LLAMA_CONFIG)).eval()
    trial.use_rows_attention(model)
    assert model.config._attn_implementation == "sdpa"
    assert capsys.readouterr().out.count("it keeps its own (sdpa)") == 1
    model.set_attn_implementation("rows")  # whoever sets it all the same
    rows = random_rows()
    with torch.no_grad():
        logits, _ = target_logits(model, rows)
        assert_equal(logits, rows_alone(model, rows)[0])
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_looks_ahead_is_refused_in_one_line():
    model = tf.BertLMHeadModel(tf.BertConfig(**BASE, intermediate_size=48, is_decoder=False)).eval()
    with pytest.raises(InputError, match="BertLMHeadModel is no causal language model"):
        trial.check(model)


def test_a_model_that_cannot_run_is_refused_in_one_line():
    class Fails(tf.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            raise ValueError("this needs\nan image")

    with pytest.raises(InputError, match=r"9 tokens of Fails fails \(ValueError: this needs an image\)$"):
        trial.check(Fails(copy.deepcopy(LLAMA_CONFIG)).eval())


class FewTokensFit(tf.MistralForCausalLM):
    """Memory runs out over more than so many tokens."""

    fit = 0

    def forward(self, input_ids, **kwargs):
        if input_ids.numel() > self.fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(input_ids=input_ids, **kwargs)


def model_with_little_memory(fit, **settings):
    torch.manual_seed(0)
    model = FewTokensFit(tf.MistralConfig(**LLAMA, **settings)).eval()
    model.fit = fit
    return model


def test_memory_that_runs_out_in_a_trial_is_said_and_blames_no_row():
    model = model_with_little_memory(20, sliding_window=None)
    model.set_attn_implementation("rows")
    (line,) = trial.check(model)
    assert "memory ran out in a trial, and perhaps packed rows" in line
    with torch.no_grad():
        model.fit = 33
        rows = random_rows()
        assert_equal(target_logits(model, rows)[0], rows_alone(model, rows)[0])


def test_without_memory_for_a_row_beyond_the_window_packs_stay_inside_it():
    model = model_with_little_memory(60, sliding_window=60)  # the row beyond the window has 128 tokens
    trial.use_rows_attention(model)
    assert model.config._attn_implementation == "rows"
    ways = trial.ways_of(model)
    assert ways.packed and ways.pack_limit == 60


def test_a_model_that_memory_does_not_hold_is_refused_in_one_line():
    with pytest.raises(InputError, match="out of memory over one row of 9 tokens: take a smaller model"):
        trial.check(model_with_little_memory(8, sliding_window=None))


# ---------------------------------------------------------------------------------------------- LoRA's step


class PassesLayerBy(torch.nn.Module):
    """Code that takes a layer's weight and does not call the layer."""

    def __init__(self, mlp):
        super().__init__()
        self.down_proj = mlp.down_proj
        self.up_proj = mlp.up_proj

    def forward(self, x):
        return F.linear(F.silu(self.up_proj(x)), self.down_proj.weight)


def test_lora_layers_that_cannot_be_trained_are_refused_by_name():
    model = model_of(LLAMA_CONFIG)
    model.model.layers[1].mlp = PassesLayerBy(model.model.layers[1].mlp)
    lora.inject(model, target_modules=["model.layers.1.mlp.down_proj", "q_proj"], seed=0)
    with pytest.raises(InputError, match=r"--target-modules: .*down_proj"):
        trial.check(model)
    lora.remove(model)
    lora.inject(model, target_modules=["q_proj"], seed=0)
    assert trial.check(model) == []


@pytest.mark.parametrize("bf16", [False, True])
def test_the_step_is_that_of_training(bf16):
    """In training's precision, whatever the dtype of the weights, and with a shared prefix."""
    model = model_of(LLAMA_CONFIG)
    lora.inject(model, target_modules=["q_proj"], seed=0)
    trial.ways_of(model)
    steps = []
    model.model.embed_tokens.register_forward_hook(
        lambda module, args, output: steps.append((torch.is_autocast_enabled("cpu"), args[0].shape[1]))
    )
    assert trial.check(model, bf16=bf16) == []
    assert steps == [(bf16, 9 + 9 + 5), (bf16, 6 + 9 + 5 + 14)]


def test_layers_that_text_does_not_reach_are_named_and_stay():
    model = model_of(KINDS["gemma3 with vision"])
    lora.inject(model, target_modules=["q_proj", "v_proj"], seed=0)
    (line,) = [line for line in trial.check(model) if "does not reach" in line]
    assert "vision_tower" in line and "language_model" not in line


def test_gradients_that_are_not_finite_are_refused():
    model = model_of(LLAMA_CONFIG)
    lora.inject(model, target_modules=["q_proj"], seed=0)
    trial.ways_of(model)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="no finite gradient"):
        trial.check(model)


def test_a_trial_leaves_no_trace():
    """Not in the adapter, its gradients, the random state or the mode; and LoRA may come and go after it."""
    model = model_of(LLAMA_CONFIG).train()
    lora.inject(model, target_modules=["q_proj"], dropout=0.5, seed=0)
    before, random_state = lora.state_dict(model), torch.get_rng_state()
    assert trial.check(model) == []
    assert model.training and torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in lora.state_dict(model).items():
        assert torch.equal(value, before[key])
    ways = trial.ways_of(model)
    lora.remove(model)
    assert trial.ways_of(model) is ways
