"""Packed rows against one row at a time: the same logits, loss and gradients for every kind of model."""

import copy
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from engine import precision
from engine.attention import masked_attention, packed_attention, reach_of
from engine.forward import HeadLoss, common_prefix, split_by_tokens
from engine.model import load_model, loading_error_as_one_line
from engine.packed import log_probs, target_logits, target_loss
from engine.trial import ways_of
from support.cli import InputError

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128, pad_token_id=0)
CONFIGS = [LlamaConfig(**SHAPE), MistralConfig(**SHAPE, sliding_window=None), MistralConfig(**SHAPE, sliding_window=5),
           Qwen2Config(**SHAPE), Qwen3Config(**SHAPE), GemmaConfig(**SHAPE), Phi3Config(**SHAPE)]


def random_rows(lengths=(9, 17, 5, 12)):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]
    return [(row, [False] * 3 + [True] * (len(row) - 3)) for row in ids]


def model_of(config, attention):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def one_at_a_time(model, rows):
    """The plain way: each row alone, all its logits."""
    for ids, mask in rows:
        logits = model(torch.tensor([ids])).logits[0]
        where = [i for i, target in enumerate(mask) if target]
        yield logits[[i - 1 for i in where]], torch.tensor([ids[i] for i in where])


@pytest.mark.parametrize("attention", ["rows", "sdpa", "eager"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.model_type}-{getattr(c, 'sliding_window', None)}")
def test_packed_logits_are_those_of_each_row_alone(config, attention):
    model, rows = model_of(config, attention), random_rows()
    with torch.no_grad():
        logits, targets = target_logits(model, rows)
        alone = list(one_at_a_time(model_of(config, "eager"), rows))
    assert torch.equal(targets, torch.cat([t for _, t in alone]))
    torch.testing.assert_close(logits, torch.cat([found for found, _ in alone]), atol=1e-5, rtol=1e-4)


PREFIXED = [([7, 8, 9, 10, *ids], [False] * 4 + mask) for ids, mask in random_rows()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.model_type}-{getattr(c, 'sliding_window', None)}")
def test_a_shared_prefix_changes_no_logits(config):
    model = model_of(config, "rows")
    with torch.no_grad():
        logits, targets = target_logits(model, PREFIXED, share_prefix=True)
        alone = list(one_at_a_time(model_of(config, "eager"), PREFIXED))
    assert torch.equal(targets, torch.cat([t for _, t in alone]))
    torch.testing.assert_close(logits, torch.cat([found for found, _ in alone]), atol=1e-5, rtol=1e-4)


def test_a_shared_prefix_is_computed_once():
    model, lengths = model_of(CONFIGS[0], "rows"), []
    ways_of(model)  # tried before we count
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    target_logits(model, PREFIXED, share_prefix=True)
    assert lengths == [sum(len(ids) for ids, _ in PREFIXED) - 3 * 4]


WINDOW = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
WITH_WINDOWS = [MistralConfig(**SHAPE, sliding_window=5), Phi3Config(**SHAPE, sliding_window=5),
                Qwen2Config(**SHAPE, sliding_window=5, use_sliding_window=True, max_window_layers=1),
                Gemma3TextConfig(**SHAPE, **WINDOW), Cohere2Config(**SHAPE, **WINDOW), Olmo3Config(**SHAPE, **WINDOW)]


@pytest.mark.parametrize("shared", [3, 9])
@pytest.mark.parametrize("config", WITH_WINDOWS, ids=lambda c: c.model_type)
def test_windows_are_packed_and_share_a_prefix(config, shared):
    """Prefixes within the window and beyond it: the tokens are computed once, logits and gradients are each row's own."""
    prefix = list(range(20, 20 + shared))
    rows = [(prefix + ids, [False] * shared + is_target) for ids, is_target in random_rows()]
    model, alone = model_of(config, "rows"), model_of(copy.deepcopy(config), "eager")
    assert ways_of(model).shared_prefix
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: lengths.append(output.shape[1]))
    logits, _ = target_logits(model, rows, share_prefix=True)
    assert lengths == [sum(len(ids) for ids, _ in rows) - 3 * shared]

    expected = torch.cat([found for found, _ in one_at_a_time(alone, rows)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    for found in (logits, expected):
        found.square().mean().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", WITH_WINDOWS, ids=lambda c: c.model_type)
def test_a_window_holds_behind_a_prefix_where_each_row_alone_is_shorter(config):
    """Prefix and first row fit the window of 5, and so does the second row's own part, but not with its prefix."""
    prefix = [20, 21, 22]
    rows = [(prefix + own, [False] * 3 + [True] * len(own)) for own in ([30, 31], [40, 41, 42, 43])]
    model, alone = model_of(config, "rows"), model_of(copy.deepcopy(config), "eager")
    for weight, same in zip(model.parameters(), alone.parameters(), strict=True):
        same.data = weight.data = weight.data * 10  # so that what a token sees makes a difference
    logits, _ = target_logits(model, rows, share_prefix=True)
    expected = torch.cat([found for found, _ in one_at_a_time(alone, rows)])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_what_a_mask_shows():
    """Rows of 3 and 6 tokens: causal, under windows, and under masks that are neither."""
    rows = [0] * 3 + [1] * 6
    here, there = torch.arange(9)[:, None], torch.arange(9)
    same_row = torch.tensor(rows)[:, None] == torch.tensor(rows)
    causal = (there <= here) & same_row
    chunks = causal & (here // 4 == there // 4)
    for mask, window, reach in [(causal, None, 9), (causal, 4, 9), (causal & (there > here - 4), 4, 4),
                                (causal & (there > here - 4), 3, None), (causal & (there > here - 4), None, None),
                                (there <= here, None, 9), (chunks, 4, None), (chunks, None, None)]:
        assert reach_of(mask[None, None].clone(), [3, 6], 0, window) == reach
    assert reach_of(None, [3, 6], 0, 4) == 9


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_masked_attention_is_that_of_repeated_heads(kv_heads):
    query, key, value = (torch.randn(3, heads, n, 8) for heads, n in ((6, 4), (kv_heads, 9), (kv_heads, 9)))
    hidden = torch.rand(3, 1, 4, 9) < 0.4
    hidden[..., 0] = False
    mask = torch.zeros(3, 1, 4, 9).masked_fill(hidden, torch.finfo(torch.float32).min)
    repeated = (states.repeat_interleave(6 // kv_heads, 1) for states in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, mask, scale=0.3)
    for given in (mask, ~hidden):
        output, _ = masked_attention(query, key, value, given, scaling=0.3)
        torch.testing.assert_close(output, expected.transpose(1, 2))
        assert output.is_contiguous()  # some models take a view of it


def test_scores_that_are_capped_are_left_to_transformers():
    query, mask = torch.randn(2, 4, 3, 8), torch.zeros(2, 1, 3, 3)
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(torch.nn.Module(), query, query, query, mask, softcap=30.0)


@pytest.mark.parametrize(("rows", "shared"), [
    ([([1, 2, 3, 4], [False, False, False, True])] * 2, 2),  # the token before the first target belongs to each row
    ([([1, 2, 3], [False, False, True]), ([4, 2, 3], [False, False, True])], 0), ([([1, 2], [True, True])] * 2, 0)])
def test_how_much_is_shared(rows, shared):
    assert common_prefix(rows) == shared


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("rows", "share_prefix"), [(random_rows(), False), (PREFIXED, False), (PREFIXED, True)])
def test_packed_loss_has_the_gradients_of_a_padded_batch(checkpointing, rows, share_prefix):
    """The reference is the usual loop: padded rows, an attention mask, labels of -100 on prompt and padding."""
    packed, padded = model_of(CONFIGS[0], "rows"), model_of(CONFIGS[0], "eager")
    if checkpointing:
        packed.gradient_checkpointing_enable()
        packed.train()
    logits, targets = target_logits(packed, rows, share_prefix)
    F.cross_entropy(logits, targets, reduction="sum").backward()

    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    attend = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([[token if target else -100 for token, target in zip(*row, strict=True)]
                           + [-100] * (width - len(row[0])) for row in rows])
    logits = padded(ids, attention_mask=attend).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum").backward()
    for (name, a), b in zip(packed.named_parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.model_type}-{getattr(c, 'sliding_window', None)}")
def test_the_loss_without_logits_is_cross_entropy(config, monkeypatch):
    """Loss and gradients with a frozen head, in chunks that do not divide the targets, against the plain way."""
    monkeypatch.setattr(HeadLoss, "CHUNK", 4)
    ours, plain = model_of(config, "rows"), model_of(config, "rows")
    for model in (ours, plain):
        model.get_output_embeddings().weight = torch.nn.Parameter(model.get_output_embeddings().weight.clone(), False)
    assert ways_of(ours).plain_head
    loss = target_loss(ours, random_rows())
    (3 * loss).backward()
    expected = F.cross_entropy(*target_logits(plain, random_rows()), reduction="sum")
    (3 * expected).backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    compared = [(a.grad, b.grad) for a, b in zip(ours.parameters(), plain.parameters(), strict=True) if b.grad is not None]
    assert len(compared) > 10
    for a, b in compared:
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_head_that_does_more_takes_the_plain_way():
    config = Gemma2Config(**SHAPE, final_logit_softcapping=2.0)
    model = model_of(config, "eager").requires_grad_(False)
    assert not ways_of(model).plain_head
    with torch.no_grad():
        expected = F.cross_entropy(*target_logits(model, random_rows()), reduction="sum")
        assert target_loss(model, random_rows()) == pytest.approx(expected.item())


def test_log_probs_sum_over_target_tokens_only():
    model, rows = model_of(CONFIGS[0], "rows"), random_rows()
    with torch.no_grad():
        expected = [-F.cross_entropy(logits, targets, reduction="sum").item() for logits, targets in one_at_a_time(model, rows)]
    assert log_probs(model, rows) == pytest.approx(expected, abs=1e-4)


def test_packs_keep_order_and_bound():
    rows = random_rows((9, 17, 5, 12, 40))
    groups = list(split_by_tokens(rows, tokens=26))
    assert [row for group in groups for row in group] == rows
    assert all(sum(len(ids) for ids, _ in group) <= 26 or len(group) == 1 for group in groups)


def test_a_model_without_a_chat_template_is_refused(tiny, tmp_path):
    for file in tiny.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="no chat template"):
        load_model(str(tmp_path))


def test_weights_in_pickle_files_are_refused(tiny, tmp_path):
    for file in tiny.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_a_gated_model_is_one_line_that_says_what_to_do():
    response = SimpleNamespace(status_code=401)

    def refused():
        error = OSError("401 Client Error")
        error.response = response
        raise OSError("no access") from error

    with pytest.raises(InputError, match=r"Accept its conditions on https://huggingface.co/a/b and set HF_TOKEN"):
        with loading_error_as_one_line("a/b"):
            refused()
    with pytest.raises(InputError, match="cannot be loaded"):
        with loading_error_as_one_line("a/b"):
            raise OSError("no such file")


def test_downloads_show_their_progress():
    assert not huggingface_hub.utils.are_progress_bars_disabled()


# --------------------------------------------------------------------------------------------- --dtype auto


@pytest.mark.parametrize(("float32", "bfloat16", "expected"), [
    (1.0, 0.5, "bfloat16"), (1.2, 1.0, "bfloat16"), (1.19, 1.0, "float32"), (1.0, 1.0, "float32"), (1.0, 6.0, "float32")])
def test_bfloat16_must_be_faster_by_a_fifth(float32, bfloat16, expected):
    assert precision.faster_dtype(float32, bfloat16) == expected


def large_model(folder):
    """The configuration of a model of 12 million weights. There are none in the folder, and none are asked for."""
    LlamaConfig(**SHAPE | dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=4, head_dim=128),
                architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def test_a_gpu_computes_in_bfloat16_and_an_apple_one_in_float32():
    assert precision.fastest_dtype("cuda:0", "no model") == "bfloat16"
    assert precision.fastest_dtype("mps", "no model") == "float32"


@pytest.mark.skipif(precision.multiplies_bfloat16(), reason="this CPU multiplies bfloat16")
def test_a_cpu_that_imitates_bfloat16_computes_in_float32(tmp_path, monkeypatch):
    """Torch says that it cannot. Had it said otherwise, the trial would have shown it."""
    assert precision.fastest_dtype("cpu", "no model") == "float32"
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    assert precision.fastest_dtype("cpu", large_model(tmp_path)) == "float32"


def test_the_trial_decides_where_the_cpu_has_bfloat16(tiny, tmp_path, monkeypatch):
    timed = []

    def seconds(shapes):
        timed.append(sorted(map(tuple, shapes)))
        return {torch.float32: 2.0, torch.bfloat16: 1.0}

    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "seconds_of_products", seconds)
    assert precision.fastest_dtype("cpu", large_model(tmp_path)) == "bfloat16"
    shapes = [(256, 512), (512, 512), (512, 1536), (1536, 512)]  # k and v, q and o, down, gate and up
    assert timed == [shapes]

    assert precision.fastest_dtype("cpu", str(tiny)) == "float32" and len(timed) == 1  # too small to time
    monkeypatch.setattr(precision.ranks, "WORLD", 2)
    assert precision.fastest_dtype("cpu", large_model(tmp_path)) == "float32" and len(timed) == 1


def test_the_trial_takes_turns_for_a_second(monkeypatch):
    """Products of 64 rows take about the square of a matrix's width."""
    monkeypatch.setattr(precision, "SECONDS", 0.1)
    small = precision.seconds_of_products([torch.Size((64, 64))])
    large = precision.seconds_of_products([torch.Size((1024, 1024))])
    assert small.keys() == large.keys() == {torch.float32, torch.bfloat16}
    assert all(0 < small[dtype] < large[dtype] for dtype in small)


@pytest.mark.parametrize(("capabilities", "expected"), [
    ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False), ({"avx512_bf16": True}, True),
    ({"avx512_bf16": False, "amx_bf16": True}, True), ({"neon": True, "bf16": True}, True), ({"neon": True}, False)])
def test_what_torch_says_of_a_cpu(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert precision.multiplies_bfloat16() is expected


def test_a_torch_that_says_nothing_of_a_cpu(monkeypatch):
    """Older ones have other names for it, and another may have none."""
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert precision.multiplies_bfloat16()
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not precision.multiplies_bfloat16()
