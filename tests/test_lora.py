"""lora.py against peft: the same numbers, gradients and files; what must not change stays so to the bit."""

import copy
import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora
from engine import peft_check
from engine.model import load_model

peft = pytest.importorskip("peft")

SHAPE = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
)
SHAPE |= dict(
    initializer_range=0.15
)  # the usual 0.02 would leave a model this small with gradients near 1e-5
IDS = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))
TARGETS = [["q_proj", "v_proj"], "all-linear"]


def llama(seed=0, **changes):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(**(SHAPE | {"num_hidden_layers": 2, "attention_bias": True} | changes))
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)  # zero at first: a bias lost by merging would not be seen
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def loss(model):
    return model(IDS, labels=IDS).loss


def train(model, parameters, steps=2):
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    return model


def ours(targets=("q_proj", "v_proj"), rank=4, alpha=12, dropout=0.0, trained=True, **changes):
    model = llama(**changes)
    lora.inject(model, rank, alpha, dropout, targets, seed=7)
    return train(model, lora.parameters(model)) if trained else model


def theirs(targets=("q_proj", "v_proj"), dropout=0.0, trained=True, **options):
    options = dict(r=4, lora_alpha=12, lora_dropout=dropout, task_type="CAUSAL_LM") | options
    targets = targets if isinstance(targets, str) else list(targets)
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=targets, **options)).eval()
    return train(model, [p for p in model.parameters() if p.requires_grad]) if trained else model


def weights(model):
    """Base tensors by their names in the plain model."""
    return {
        n.replace(".base.", "."): p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n
    }


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- the same numbers as peft ----


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_equal_pefts(targets, dropout):
    reference = theirs(targets, dropout)
    model = ours(targets, dropout=dropout, trained=False)
    lora.load_state_dict(model, peft.get_peft_model_state_dict(reference))
    if dropout:  # our masks in peft too; that their odds are torch's is tested below
        for layer in (m for m in reference.modules() if hasattr(m, "lora_dropout")):
            layer.lora_dropout["default"].forward = lambda x: lora.dropout(x, dropout)
    for m in (model, reference):
        m.train().zero_grad()
        torch.manual_seed(3)
        loss(m).backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
    assert len(gradients) == len(lora.parameters(model)) == (8 if targets != "all-linear" else 28)
    for name, layer in lora.layers(model).items():
        for part in ("lora_A", "lora_B"):
            expected = gradients[f"base_model.model.{name}.{part}.default.weight"]
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(getattr(layer, part).grad, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_logits_in_eval_mode_equal_pefts(targets):
    reference = theirs(targets, dropout=0.3)
    model = ours(targets, dropout=0.3, trained=False)
    lora.load_state_dict(model, peft.get_peft_model_state_dict(reference))
    torch.testing.assert_close(logits(model.eval()), logits(reference.eval()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_same_modules_and_trainable_parameters_as_peft(targets):
    reference = theirs(targets, trained=False)
    model = ours(targets, trained=False)
    assert set(lora.state_dict(model)) == set(peft.get_peft_model_state_dict(reference))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        count == reference.get_nb_trainable_parameters()[0] == sum(p.numel() for p in lora.parameters(model))
    )
    assert not isinstance(model.lm_head, lora.LoRALinear)


def test_a_starts_with_pefts_spread_and_b_at_zero():
    model = LlamaForCausalLM(LlamaConfig(**(SHAPE | {"hidden_size": 256, "num_hidden_layers": 1})))
    lora.inject(model, rank=32)
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32 and layer.lora_A.shape == (32, 256)
    assert 0.99 / 16 < layer.lora_A.abs().max() <= 1 / 16  # uniform within 1 / sqrt(in)
    assert abs(layer.lora_A.std() * 16 * 3**0.5 - 1) < 0.03
    assert not layer.lora_B.any()


def test_the_layer_is_the_papers_equation():
    base = nn.Linear(3, 2, bias=False)
    layer = lora.LoRALinear(base, rank=1, alpha=6, dropout=0.0)
    layer.lora_A.data, layer.lora_B.data = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0], [-1]])
    x = torch.tensor([[1.0, 1, 1]])  # A x = 6, scale 6: +36 and -36
    torch.testing.assert_close(layer(x), base(x) + torch.tensor([[36.0, -36]]))


# ---- what must not change ----


@pytest.mark.parametrize("tied", [False, True])
def test_training_leaves_every_base_weight_as_it_was(tied):
    before = weights(llama(tie_word_embeddings=tied))
    model = ours("all-linear", tie_word_embeddings=tied)
    assert same_bits(weights(model), before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_injected_equals_base_until_trained_and_disabled_equals_base_always(targets):
    base = logits(llama())
    model = ours(targets, trained=False)
    assert torch.equal(logits(model), base)
    train(model, lora.parameters(model))
    trained = logits(model)
    assert (trained - base).abs().max() > 1e-2
    with lora.disabled(model):
        with lora.disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), base)  # leaving the inner block keeps the outer one
    with pytest.raises(KeyError), lora.disabled(model):
        raise KeyError
    assert torch.equal(logits(model), trained)
    with lora.disabled(llama()) as plain:
        assert torch.equal(logits(plain), base)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_merge_equals_pefts_and_unmerge_is_exact(targets, tmp_path):
    model = ours(targets)
    lora.save(model, tmp_path)
    expected = peft.PeftModel.from_pretrained(llama(), tmp_path).merge_and_unload()
    before, separate = weights(model), logits(model)
    lora.merge(model)
    lora.merge(model)
    torch.testing.assert_close(logits(model), separate, atol=1e-5, rtol=0)
    with lora.disabled(model):
        assert torch.equal(logits(model), logits(llama()))
    for name, layer in lora.layers(model).items():
        torch.testing.assert_close(layer.merged, expected.get_submodule(name).weight, atol=1e-6, rtol=0)
    lora.unmerge(model)
    lora.unmerge(model)
    assert same_bits(weights(model), before) and torch.equal(logits(model), separate)


def test_merge_is_summed_in_float32_even_under_autocast():
    model = ours().to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lora.merge(model)
    layer = model.model.layers[1].self_attn.v_proj
    exact = layer.base.weight.double() + 12 / 4 * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(layer.merged.double(), exact, atol=1e-6, rtol=0)


def test_train_and_eval_never_merge_or_unmerge():
    model = ours()
    model.train()
    model.eval()
    assert all(layer.merged is None for layer in lora.layers(model).values())
    lora.merge(model)
    model.train()
    assert all(layer.merged is not None for layer in lora.layers(model).values())


def test_remove_gives_back_the_plain_model_or_the_merged_one():
    model = ours("all-linear")
    trained = logits(model)
    lora.remove(model)
    assert same_bits(dict(model.state_dict()), dict(llama().state_dict()))
    model = ours("all-linear")
    lora.merge(model)
    lora.remove(model)
    assert model.state_dict().keys() == llama().state_dict().keys()
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=0)


def test_dropout_only_in_train_mode():
    model = ours(dropout=0.5)
    assert torch.equal(logits(model), logits(model))  # the model was in eval() when LoRA came in
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with lora.disabled(model):
        assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
def test_dropout_has_the_odds_it_is_asked_for(p):
    """Dropped with probability p at each place of an int64, neighbours apart, and the mean stays."""
    torch.manual_seed(0)
    x = torch.rand(401, 1001) + 1  # an odd number of elements, none of them 0
    found = lora.dropout(x, p)
    kept = (found != 0).flatten()
    for part in (kept[0::4], kept[1::4], kept[2::4], kept[3::4]):
        assert abs(part.float().mean() - (1 - p)) < 5 * (p * (1 - p) / len(part)) ** 0.5
    pairs = kept[1::2] & kept[:-1:2]
    assert abs(pairs.float().mean() - (1 - p) ** 2) < 5 * ((1 - p) ** 2 / len(pairs)) ** 0.5
    torch.testing.assert_close(
        found[found != 0], x[found != 0] / (1 - p), rtol=0.01, atol=0
    )  # 0.999 is rounded
    assert abs(found.mean() - x.mean()) < 5 * found.std() / found.numel() ** 0.5
    assert not torch.equal(kept, (lora.dropout(x, p) != 0).flatten())


def test_dropout_follows_the_seed_and_keeps_the_dtype():
    x = torch.ones(3, 5, dtype=torch.bfloat16)
    torch.manual_seed(1)
    first = lora.dropout(x, 0.5)
    torch.manual_seed(1)
    assert torch.equal(first, lora.dropout(x, 0.5)) and first.dtype == torch.bfloat16
    assert set(first.flatten().tolist()) == {0.0, 2.0}
    assert set(lora.dropout(x, 1 - 1e-9).flatten().tolist()) <= {0.0, 2.0**16}  # never "drops nothing"
    assert torch.equal(lora.dropout(x, 0.0), x) and lora.dropout(x[:0], 0.5).shape == (0, 5)


def test_dropout_sends_gradients_through_what_it_kept():
    x = torch.ones(7, 5, requires_grad=True)
    found = lora.dropout(x, 0.4)
    found.sum().backward()
    assert torch.equal(x.grad, found)


def test_the_start_depends_on_the_seed_alone():
    first = lora.state_dict(ours(trained=False))
    torch.rand(5)
    model = llama(seed=99)
    state = torch.get_rng_state()
    lora.inject(model, 4, 12, 0.0, seed=7)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random state is left alone
    assert same_bits(lora.state_dict(model), first)
    lora.remove(model)
    lora.inject(model, 4, 12, 0.0, seed=8)
    assert not same_bits(lora.state_dict(model), first)


# ---- precision ----


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_base_with_float32_lora_is_close_to_float32(autocast):
    def run(dtype):
        model = llama().to(torch.bfloat16).to(dtype)  # the same base weights for both
        lora.inject(model, 4, 12, 0.0, "all-linear")
        lora.load_state_dict(model, state)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and dtype == torch.bfloat16):
            loss(model).backward()
            return logits(model).float(), torch.cat([p.grad.flatten() for p in lora.parameters(model)])

    state = lora.state_dict(ours("all-linear"))
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    (low, low_gradient), (high, high_gradient) = run(torch.bfloat16), run(torch.float32)
    assert low_gradient.dtype == torch.float32 and low_gradient.isfinite().all()
    assert (low - high).norm() / high.norm() < 0.02
    assert (low_gradient - high_gradient).norm() / high_gradient.norm() < 0.05


def test_small_steps_are_not_lost_over_a_bf16_base():
    model = llama().to(torch.bfloat16)
    lora.inject(model, seed=0)
    a = lora.parameters(model)[0]
    start = a.detach().clone()
    for _ in range(10):
        a.data.add_(1e-5)  # below half a bf16 step for most entries of A
    torch.testing.assert_close(a - start, torch.full_like(a, 1e-4), atol=1e-7, rtol=0)


def test_a_frozen_product_keeps_no_activation_for_backward():
    model = ours(trained=False)
    layer = model.model.layers[0].self_attn.q_proj
    kept = []
    x = torch.randn(5, 32, requires_grad=True)
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        lora.disabled(model),
    ):
        layer(x)
    assert kept and all(
        t.untyped_storage().data_ptr() == layer.base.weight.untyped_storage().data_ptr() for t in kept
    )


# ---- files ----


@pytest.mark.parametrize("targets", [*TARGETS, ["layers.0.self_attn.q_proj", "down_proj"]], ids=str)
def test_peft_loads_ours(targets, tmp_path):
    model = ours(targets)
    lora.save(model, tmp_path / "new" / "adapter", base_model_name=str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path / "new" / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)
    assert same_bits(peft.get_peft_model_state_dict(loaded), lora.state_dict(model))
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.inference_mode) == (4, 12, 0.0, True)
    assert (config.base_model_name_or_path, config.task_type) == (str(tmp_path), "CAUSAL_LM")
    assert sorted(p.name for p in (tmp_path / "new" / "adapter").iterdir()) == [lora.CONFIG, lora.WEIGHTS]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": "all-linear"},
        {"use_rslora": True},
        {"targets": r".*\.(q|down)_proj"},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_we_load_what_peft_trained_and_hand_it_back(options, tmp_path):
    reference = theirs(**options)
    reference.save_pretrained(tmp_path / "theirs")
    model = llama()
    lora.load(model, tmp_path / "theirs")
    assert (logits(model) - logits(llama())).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), logits(reference), atol=1e-5, rtol=0)
    assert not any(p.requires_grad for p in model.parameters())
    lora.save(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(reference), atol=1e-5, rtol=0)


def test_load_swaps_adapters_in_one_model(tmp_path):
    one, two = ours("all-linear", rank=2), ours(rank=8, alpha=4)
    lora.save(one, tmp_path / "one")
    lora.save(two, tmp_path / "two")
    model = llama()
    for name, expected in ("one", one), ("two", two), ("one", one):
        lora.load(model, tmp_path / name)
        assert torch.equal(logits(model), logits(expected))
        lora.merge(model)  # must not leak into the next one
    with lora.disabled(model):
        assert torch.equal(logits(model), logits(llama()))


def test_load_into_the_same_shape_keeps_the_parameters_and_can_go_on_training(tmp_path):
    lora.save(ours(), tmp_path)
    model = ours(trained=False)
    before = lora.parameters(model)
    names = lora.load(model, tmp_path, trainable=True)
    assert names == list(lora.layers(model)) and len(names) == 4
    assert all(a is b for a, b in zip(before, lora.parameters(model), strict=True)) and len(before) == 8
    start = logits(model)
    train(model, lora.parameters(model))
    assert not torch.equal(logits(model), start)


def test_state_dict_is_a_copy_that_restores():
    model = ours()
    kept, expected = lora.state_dict(model), logits(model)
    train(model, lora.parameters(model))
    lora.merge(model)
    assert not torch.equal(logits(model), expected)
    lora.load_state_dict(model, kept)  # the merge of the later weights goes too
    assert torch.equal(logits(model), expected)


def test_a_crash_while_saving_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    model = ours()
    lora.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train(model, lora.parameters(model))

    def power_cut(*_):
        raise OSError("no space left")

    monkeypatch.setattr(lora.os, "replace", power_cut)
    with pytest.raises(OSError, match="no space"):
        lora.save(model, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


# ---- bad input ----


@pytest.mark.parametrize(
    "targets", [["query"], ["q_proj", "vproj"], [], "proj", "lm_head", "q_proj,v_proj"], ids=str
)
def test_targets_that_match_nothing_name_what_there_is(targets):
    model = llama()
    with pytest.raises(ValueError, match="down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$"):
        lora.inject(model, target_modules=targets)
    assert not lora.layers(model) and all(p.requires_grad for p in model.parameters())


def test_fused_projections_give_the_names_that_exist():
    phi = Phi3ForCausalLM(
        Phi3Config(**SHAPE, num_hidden_layers=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    with pytest.raises(ValueError, match="q_proj, v_proj; .* down_proj, gate_up_proj, o_proj, qkv_proj$"):
        lora.inject(phi)
    assert lora.inject(phi, target_modules="qkv_proj") == ["model.layers.0.self_attn.qkv_proj"]
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2))
    for targets in ("c_attn", "all-linear"):
        with pytest.raises(ValueError, match=rf"nothing: {targets}; .* of GPT2LMHeadModel .*: none$"):
            lora.inject(gpt2, target_modules=targets)


def test_injecting_twice_and_nonsense_sizes():
    with pytest.raises(ValueError, match="already"):
        lora.inject(ours(trained=False))
    for options in ({"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
        model = llama()
        with pytest.raises(ValueError, match="rank >= 1 and 0 <= dropout < 1"):
            lora.inject(model, **options)
        assert not lora.layers(model) and torch.equal(logits(model), logits(llama()))


def test_saving_without_lora_and_a_state_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers"):
        lora.save(llama(), tmp_path)
    model, state = ours(), lora.state_dict(ours())
    key = next(iter(state))
    expected = logits(model)
    for broken in (
        {k: v for k, v in state.items() if k != key},
        state | {"extra": state[key]},
        state | {key: state[key][:1]},  # would broadcast
        {},
    ):
        with pytest.raises(ValueError, match="LoRA state does not fit"):
            lora.load_state_dict(model, broken)
    assert torch.equal(logits(model), expected)


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / lora.CONFIG).read_text())
        (folder / lora.CONFIG).write_text(json.dumps(config | changes))

    return edit


def edit_weights(edit):
    def rewrite(folder):
        state = load_file(folder / lora.WEIGHTS)
        save_file(edit(copy.copy(state)), folder / lora.WEIGHTS)

    return rewrite


BROKEN = {
    "no config": (lambda f: (f / lora.CONFIG).unlink(), "adapter_config.json is missing"),
    "no weights": (lambda f: (f / lora.WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "torn config": (lambda f: (f / lora.CONFIG).write_text('{"r": 4'), "broken adapter file"),
    "config no object": (lambda f: (f / lora.CONFIG).write_text("4"), "broken adapter file"),
    "torn weights": (
        lambda f: (f / lora.WEIGHTS).write_bytes((f / lora.WEIGHTS).read_bytes()[:-7]),
        "broken adapter",
    ),
    "other method": (edit_config(peft_type="IA3"), "no LoRA adapter"),
    "no rank": (edit_config(r=None), "no LoRA adapter"),
    "dora": (edit_config(use_dora=True), "use_dora = true is not supported"),
    "bias": (edit_config(bias="lora_only"), 'bias = "lora_only" is not supported'),
    "whole modules": (edit_config(modules_to_save=["lm_head"]), "modules_to_save = .* is not supported"),
    "rank pattern": (edit_config(rank_pattern={"q_proj": 2}), "rank_pattern = .* is not supported"),
    "alpha pattern": (edit_config(alpha_pattern={"q_proj": 2}), "alpha_pattern = .* is not supported"),
    "transposed": (edit_config(fan_in_fan_out=True), "fan_in_fan_out = true is not supported"),
    "other base weights": (
        edit_config(init_lora_weights="pissa"),
        'init_lora_weights = "pissa" is not supported',
    ),
    "not yet invented": (edit_config(use_next_year=True), "use_next_year = true is not supported"),
    "wrong rank": (edit_config(r=5), r"lora_A.weight is \[4, 32\], the model needs \[5, 32\]"),
    "bad dropout": (edit_config(lora_dropout=2), "0 <= dropout < 1"),
    "no tensors": (edit_weights(lambda s: {}), "is missing"),
    "no tensors, no targets": (
        lambda f: (edit_weights(lambda s: {})(f), edit_config(target_modules=[])(f)),
        "holds no tensors",
    ),
    "B is missing": (
        edit_weights(lambda s: {k: v for k, v in s.items() if "layers.1.self_attn.v_proj.lora_B" not in k}),
        "layers.1.self_attn.v_proj.lora_B.weight is missing",
    ),
    "a tensor we do not know": (
        edit_weights(lambda s: s | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}),
        "no linear layer for base_model.model.lm_head.lora_A",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
def test_a_bad_adapter_is_one_line_and_leaves_the_model_alone(case, injected, tmp_path):
    spoil, line = BROKEN[case]
    lora.save(ours(), tmp_path)
    spoil(tmp_path)
    model = ours("all-linear", rank=2) if injected else llama()
    before, expected = list(lora.layers(model)), logits(model)
    with pytest.raises(ValueError, match=line) as error:
        lora.load(model, tmp_path)
    assert "\n" not in str(error.value) and str(error.value)
    assert list(lora.layers(model)) == before and torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"hidden_size": 64}, r"q_proj.lora_A.weight is \[4, 64\], the model needs \[4, 32\]"),
        ({"num_key_value_heads": 4}, r"v_proj.lora_B.weight is \[32, 4\], the model needs \[16, 4\]"),
        ({"num_hidden_layers": 3}, "it has no linear layer for .*layers.2.self_attn.q_proj"),
        ({"num_hidden_layers": 1}, "layers.1.self_attn.q_proj.lora_A.weight is missing"),
    ],
    ids=str,
)
def test_the_adapter_of_another_model_is_refused(changes, line, tmp_path):
    lora.save(ours(trained=False, **changes), tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} does not fit this LlamaForCausalLM: .*{line}"):
        lora.load(llama(), tmp_path)


# ---- layers that are not plain, and PEFT where it reads names in its own way ----


def tiny_moe(config_class, model_class, **further):
    """A mixture of experts with a dense layer or a shared expert, and B that is not 0."""
    shape = SHAPE | {"num_hidden_layers": 2, "num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    return model_class(config_class(**shape, **further)).eval()


def adapted(model, targets="all-linear"):
    lora.inject(model, 4, 12, 0.0, targets, seed=7)
    for layer in lora.layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model


def qwen3_moe():
    experts = {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [0],
    }
    return tiny_moe(Qwen3MoeConfig, Qwen3MoeForCausalLM, **experts)


def phimoe():
    return tiny_moe(PhimoeConfig, PhimoeForCausalLM, num_local_experts=4)


def test_an_adapted_layer_reads_like_the_linear_layer_it_stands_for():
    model = ours("all-linear")
    for name, layer in lora.layers(model).items():
        plain = llama().get_submodule(name)
        assert (layer.in_features, layer.out_features) == (plain.in_features, plain.out_features)
        assert torch.equal(layer.weight, plain.weight)
        assert layer.bias is None and plain.bias is None or torch.equal(layer.bias, plain.bias)
    x = torch.randn(3, 32)
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer(x)
    lora.merge(model)
    torch.testing.assert_close(torch.nn.functional.linear(x, layer.weight, layer.bias), expected)
    with lora.disabled(model):
        assert torch.equal(layer.weight, llama().model.layers[0].self_attn.q_proj.weight)
    names = {name for name, _ in model.named_parameters()}
    assert not any(name.endswith("q_proj.weight") for name in names)  # once, under base


class Router(nn.Linear):
    """As in Llama 4 and PhiMoE: more comes out than W x."""

    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class NamedLinear(nn.Linear):
    """A subclass that computes what nn.Linear does."""


def test_layers_with_a_forward_of_their_own_are_left_out_and_named():
    model = nn.Sequential()
    model.add_module("router", Router(4, 4))
    model.add_module("named", NamedLinear(4, 4))
    model.add_module("plain", nn.Linear(4, 4))
    assert lora.left_out(model) == ["router"]
    assert lora.inject(model, target_modules="all-linear") == ["named", "plain"]
    assert lora.left_out(model) == ["router"]
    lora.remove(model)
    with pytest.raises(ValueError, match="match nothing: router; .*: named, plain$"):
        lora.inject(model, target_modules="router")


class RoundedSum(nn.Linear):
    """Computes W x + b in float32 and rounds once, where nn.Linear may round twice."""

    def forward(self, x):
        product = x.float() @ self.weight.float().T
        return (product + self.bias.float()).to(x.dtype)


class NormalisedInput(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.rms_norm(x, x.shape[-1:]))


class ClippedInput(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-8, 8))


class QuantisedInput(nn.Linear):
    """8 bits a number, as in W8A8."""

    def forward(self, x):
        step = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / step).round() * step)


class TernaryWeight(nn.Linear):
    """As in BitNet: the weight that is kept is not the one that is used."""

    def forward(self, x):
        step = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / step).round().clamp(-1, 1) * step, self.bias)


@pytest.mark.parametrize("width", [4, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other", [NormalisedInput, ClippedInput, QuantisedInput, TernaryWeight])
def test_a_layer_that_changes_its_input_or_weight_is_not_plain(other, dtype, width):
    torch.manual_seed(0)
    plain = nn.Sequential(NamedLinear(width, 8), RoundedSum(width, 8)).to(dtype)
    assert lora.left_out(plain) == []
    assert lora.left_out(nn.Sequential(other(width, 8).to(dtype))) == ["0"]
    with torch.device("meta"):
        bare = nn.Sequential(NamedLinear(width, 8), other(width, 8))
    assert lora.left_out(bare) == ["1"]


def test_all_linear_trains_a_model_whose_router_is_a_linear_layer():
    model = adapted(phimoe())
    assert lora.left_out(model) == [f"model.layers.{i}.mlp.router" for i in (0, 1)]
    loss(model).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora.parameters(model))


@pytest.mark.parametrize("make", [llama, phimoe, qwen3_moe], ids=lambda make: make.__name__)
@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_the_check_says_whether_peft_computes_the_same(make, targets, tmp_path):
    """In qwen3_moe PEFT takes a dense layer for experts, in all of them an older transformers may stop it."""
    model = adapted(make(), targets)
    lora.save(model, tmp_path)
    line = peft_check.check_saved(model, tmp_path)
    try:
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    except TypeError:
        assert "PEFT cannot load this adapter" in line
    else:
        assert (line == "") == torch.allclose(logits(theirs), logits(model), atol=1e-4)
    if make is llama:
        assert line == ""
    elif line:
        assert "\n" not in line and "PEFT" in line

    again = make()
    lora.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_a_dense_layer_that_peft_takes_for_experts_is_named(tmp_path):
    model = adapted(qwen3_moe())
    lora.save(model, tmp_path)
    line = peft_check.check_saved(model, tmp_path)
    if line == "" or "cannot load" in line:
        pytest.skip("another version of PEFT")
    assert "PEFT loads 3 layers" in line and "model.layers.0.mlp.gate_proj" in line


def change_one_weight(folder):
    state = load_file(folder / lora.WEIGHTS)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file(state | {key: state[key] + 1}, folder / lora.WEIGHTS)


def double_alpha(folder):
    edit_config(lora_alpha=24)(folder)


def drop_a_target(folder):
    edit_config(target_modules=["q_proj"])(folder)


@pytest.mark.parametrize(
    ("spoil", "first"),
    [
        (change_one_weight, "1 layers .*layers.1.self_attn.v_proj"),
        (double_alpha, "4 layers"),
        (drop_a_target, "2 layers .*v_proj"),
    ],
)
def test_a_file_that_is_not_the_models_adapter_is_noticed(spoil, first, tmp_path):
    model = adapted(llama(), ["q_proj", "v_proj"])
    lora.save(model, tmp_path)
    spoil(tmp_path)
    assert re.search(f"PEFT loads {first}", peft_check.check_saved(model, tmp_path))


def test_what_peft_refuses_is_one_line(tmp_path):
    """PEFT takes no out_proj in Mamba models."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    model = adapted(Mamba2ForCausalLM(config))
    lora.save(model, tmp_path)
    line = peft_check.check_saved(model, tmp_path)
    assert "PEFT cannot load this adapter" in line and "out_proj" in line and "\n" not in line


def test_the_check_holds_no_second_model(tmp_path):
    model = adapted(llama(), ["q_proj"])
    lora.save(model, tmp_path)
    theirs = peft_check._layers_in_peft(model, tmp_path)
    assert theirs and all(
        layer.base_layer.weight.untyped_storage().nbytes() <= 4 for layer in theirs.values()
    )


def test_the_check_of_a_model_as_it_is_loaded_for_a_run(tiny, tmp_path):
    model, _ = load_model(str(tiny), "cpu")  # with the attention that is named "rows"
    lora.save(adapted(model), tmp_path)
    assert peft_check.check_saved(model, tmp_path) == ""


def test_without_peft_nothing_is_checked(tmp_path, monkeypatch):
    model = adapted(llama())
    lora.save(model, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert peft_check.check_saved(model, tmp_path) == ""
