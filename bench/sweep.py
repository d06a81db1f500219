"""`make sweep`: every causal model class of the installed transformers, tiny and random, compared with ours.

For each class the columns say whether ours equals the own result of transformers or peft:

- generation: `generate.generate` against transformers' greedy `generate`, one prompt at a time.
- packed loss: loss and log-probabilities of packed rows against plain forward passes, one row at a time.
- shared prefix: the logits of rows whose common prefix is read once, against whole rows alone.
- LoRA, all-linear: the gradients of a training step against those of plain passes, one row at a time, with
  `q_proj,v_proj` or the nearest that a model has, and with all linear layers.
- peft: the logits of a saved adapter in peft against those of the model that saved it.

"equal" means by the fast way, "slow way" means equal by the slow one, "refused" means one line before any
work, and WRONG means what must not be. "said" means that peft refuses the saved adapter or reads other
logits from it, and that the run which saved it says so in a line (it loads back into this project whole).
"skipped" means that transformers' own generate fails, so that there is nothing to compare with. A class that
cannot be built tiny from its configuration is listed at the end.
"""

import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

import lora
from engine import packed, trial
from engine.forward import plain_inputs
from engine.peft_check import check_saved
from generate import generate
from results.markdown import markdown_table
from support.cli import InputError

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = ("generation", "packed loss", "shared prefix", "LoRA", "peft", "all-linear", "peft, all-linear")
LAYERS = 2
TINY = {  # what the usual fields of a configuration are in a tiny model
    0: "num_kv_shared_layers num_nextn_predict_layers",
    1: "first_k_dense_replace mamba_n_groups moe_layer_interval n_group n_groups n_shared_experts "
    "num_shared_experts topk_group",
    2: "decoder_layers encoder_layers experts_top_k index_n_heads linear_num_key_heads moe_k moe_top_k "
    "moe_topk n_head_kv n_layer n_layers num_experts_per_tok num_experts_per_token num_hidden_layers "
    "num_key_value_heads num_kv_heads num_layers top_k_experts",
    4: "attention_heads decoder_attention_heads encoder_attention_heads linear_num_value_heads mamba_n_heads "
    "mamba_num_heads moe_num_experts n_head n_heads n_routed_experts num_attention_heads num_experts "
    "num_heads num_local_experts",
    8: "attention_chunk_size attention_head_dim attention_window_size chunk_size d_kv head_dim "
    "hidden_size_per_layer_input index_head_dim index_topk kv_channels kv_lora_rank linear_key_head_dim "
    "linear_value_head_dim mamba_chunk_size mamba_d_state qk_nope_head_dim qk_rope_head_dim rotary_dim "
    "sliding_window ssm_state_size state_size v_head_dim",
    16: "expert_ffn_hidden_size mamba_d_head mamba_head_dim moe_intermediate_size q_lora_rank qk_head_dim "
    "moe_shared_expert_intermediate_size shared_expert_intermediate_size",
    32: "d_model dim embed_dim embedding_size hidden_size lru_width n_embd n_embed word_embed_proj_dim",
    48: "d_ff decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size inner_dim intermediate_size "
    "intermediate_size_mlp mlp_hidden_size n_inner",
    512: "max_position_embeddings max_sequence_length max_seq_len n_ctx n_positions seq_length",
}
SIZES = {}
for size, names in TINY.items():
    SIZES |= dict.fromkeys(names.split(), size)
NEAREST = [["q_proj", "v_proj"], ["query", "value"], ["q_proj"], ["query_key_value"], ["qkv_proj"], ["Wqkv"],
           ["c_attn"], ["in_proj"]]  # fmt: skip
EXTRA = {  # what else a class needs when it is tiny, such as a layer with attention among two
    "BambaConfig": {"attn_layer_indices": [1]},
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "NemotronHConfig": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "xLSTMConfig": {"hidden_size": 128, "embedding_dim": 128},  # its cache rounds heads up to multiples of 64
    "FalconH1Config": {"mamba_d_ssm": 64},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8},
    "DeepseekV2Config": {"num_experts_per_tok": 2},
    "Dots3NoteConfig": {"num_key_value_heads": 4},
    "PhimoeConfig": {"input_jitter_noise": 0.0, "router_jitter_noise": 0.0},
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    return tokenizer


# ------------------------------------------------------------------------------------------------ tiny models


def tiny_settings(default, tokenizer) -> dict:
    """Settings that make a configuration tiny: the usual fields that it has, also of nested ones."""
    vocabulary = len(tokenizer) + 58
    special = {
        "vocab_size": vocabulary,
        "vocab_size_per_layer_input": vocabulary,
        "n_words": vocabulary,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "is_decoder": True,
    }
    settings = {}
    for name, value in default.to_dict().items():
        if name in special:
            settings[name] = special[name]
        elif name in SIZES and (type(value) is int or name == "num_key_value_heads"):
            settings[name] = SIZES[name]
        elif name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types") and value:
            settings[name] = some_of_each(value)
        elif name == "attention_hidden_size" and value:
            settings[name] = 32 * value // default.hidden_size
        elif name == "rope_parameters" and isinstance(value, dict) and value.get("rope_theta", 1) is None:
            settings[name] = {"rope_type": "default", "rope_theta": 10000.0}
        elif isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            settings[name] = 0.0
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            settings[name] = tiny_settings(value, tokenizer)
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return settings | EXTRA.get(type(default).__name__, {})


def some_of_each(kinds: list) -> list:
    """Two layers of different kinds, where a model has two kinds."""
    distinct = list(dict.fromkeys(kinds))
    return (distinct * LAYERS)[:LAYERS]


def tiny_model(model_class, tokenizer):
    """A random model. ValueError: it is still large."""
    config_class = model_class.config_class
    config = config_class(**tiny_settings(config_class(), tokenizer))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class._from_config(config).parameters())
    if size > 20_000_000:
        raise ValueError(f"{size:,} parameters are left")
    torch.manual_seed(0)
    model = model_class._from_config(config).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


# --------------------------------------------------------------------------------------------------- the rows


def random_rows(lengths, prefix=()):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length in lengths:
        ids = [*prefix, *torch.randint(20, 240, (length,), generator=generator).tolist()]
        targets_from = len(prefix) + 3
        rows.append((ids, [place >= targets_from for place in range(len(ids))]))
    return rows


ROWS = random_rows((13, 31, 6))
PREFIXED = random_rows((13, 31, 6), prefix=range(50, 61))


def plain_target_logits(model, rows):
    """The reference: one row at a time, all logits, then those that predict a target."""
    logits = []
    targets = []
    for ids, is_target in rows:
        ids = torch.tensor(ids)
        at = torch.tensor(is_target).nonzero().squeeze(1)
        logits.append(model(**plain_inputs(model, ids)).logits[0, at - 1])
        targets.append(ids[at])
    return torch.cat(logits), torch.cat(targets)


def close(found, expected, scale=None) -> bool:
    scale = expected.float().abs().max() if scale is None else scale
    return bool((found.float() - expected.float()).abs().max() <= 2e-3 * scale + 1e-6)


# ------------------------------------------------------------------------------------------------ the columns


def try_generation(model, tokenizer) -> str:
    prompts = [ids for ids, _ in random_rows((7, 12, 20))]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = dict(generate(model, tokenizer, prompts, max_new_tokens=12))
    slow = any("falling back" in str(warning.message) for warning in said)
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        try:
            output = model.generate(ids, do_sample=False, max_new_tokens=12, attention_mask=mask)
        except Exception as error:  # whatever a model raises on which transformers' own generate fails
            return f"skipped: transformers' own generate fails ({short(error)})"
        if found[number].tokens != output[0, len(prompt) :].tolist():
            return "WRONG"
    return "slow way" if slow else "equal"


def try_loss(model, ways) -> str:
    with torch.no_grad():
        logits, targets = plain_target_logits(model, ROWS)
        expected = F.cross_entropy(logits.float(), targets, reduction="sum")
        log_p = -F.cross_entropy(logits.float(), targets, reduction="none")
        found = packed.target_loss(model, ROWS)
    tokens = torch.tensor(sum(packed.token_log_probs(model, ROWS), []))
    if not close(found, expected) or not close(tokens, log_p):
        return "WRONG"
    return "equal" if ways.packed and ways.plain_head else "slow way"


def try_prefix(model, ways) -> str:
    with torch.no_grad():
        expected, _ = plain_target_logits(model, PREFIXED)
        found, _ = packed.target_logits(model, PREFIXED, share_prefix=True)
    if not close(found, expected):
        return "WRONG"
    return "equal" if ways.shared_prefix else "slow way"


def nearest_targets(model) -> list[str]:
    """q_proj and v_proj, or what a model has in their place: else the first kind of linear layer."""
    kinds = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            kinds.append(name.rpartition(".")[2])
    for wanted in NEAREST:
        if set(wanted) <= set(kinds):
            return wanted
    return kinds[:1]


def try_lora(model, targets) -> str:
    """Leaves the adapter in the model, with an update that is not zero."""
    try:
        lora.inject(model, rank=2, dropout=0.0, target_modules=targets, seed=0)
        trial.check(model)
    except (InputError, ValueError) as error:
        return f"refused: {error}"
    generator = torch.Generator().manual_seed(2)
    for layer in lora.layers(model).values():
        layer.lora_B.data.normal_(0, 0.1, generator=generator)

    packed.target_loss(model, ROWS).backward()
    found = gradients(model)
    logits, targets = plain_target_logits(model, ROWS)
    F.cross_entropy(logits.float(), targets, reduction="sum").backward()
    expected = gradients(model)
    if found.keys() != expected.keys():
        return "WRONG"
    scale = max(gradient.abs().max() for gradient in expected.values())
    if not all(close(found[key], expected[key], scale) for key in expected):
        return "WRONG"
    return "equal" if trial.ways_of(model).packed else "slow way"


def gradients(model) -> dict:
    """Those of the adapter, taken out."""
    found = {}
    for key, parameter in enumerate(lora.parameters(model)):
        if parameter.grad is not None:
            found[key] = parameter.grad
        parameter.grad = None
    return found


def try_peft(model) -> str:
    """Save the adapter that is in the model, and load it with peft into the same base model.

    Where that goes wrong, `check_saved` must have said so.
    """
    try:
        from peft import PeftModel
    except ImportError:
        return "not installed"
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected, _ = plain_target_logits(model, ROWS)
        try:
            lora.save(model, folder)
        except (InputError, ValueError) as error:
            return f"refused: {error}"
        said = check_saved(model, folder).removeprefix(f"{folder}: ")
        lora.remove(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                other = PeftModel.from_pretrained(model, folder).eval()
            found, _ = plain_target_logits(other.base_model.model, ROWS)
            other.unload()
        except Exception as error:  # whatever peft raises over layers that it does not take
            return f"said: {said}" if said else f"WRONG: {short(error)}"
    if close(found, expected):
        return f"WRONG: equal, and yet the run says: {said}" if said else "equal"
    return f"said: {said}" if said else "WRONG"


def try_class(model_class, tokenizer) -> dict:
    """The columns of one class. Each has its own try: what fails in one does not hide another."""
    try:
        model = tiny_model(model_class, tokenizer)
        plain_target_logits(model, ROWS[:1])
    except Exception as error:  # whatever a configuration that was never meant to be tiny can raise
        return {"skipped": short(error)}

    trial.use_rows_attention(model)
    try:
        ways = trial.ways_of(model, announce=False)
    except InputError as error:
        return {"refused": str(error)}

    row = {"says": ways.slow}
    columns = {
        "generation": lambda: try_generation(model, tokenizer),
        "packed loss": lambda: try_loss(model, ways),
        "shared prefix": lambda: try_prefix(model, ways),
        "LoRA": lambda: try_lora(model, nearest_targets(model)),
        "peft": lambda: try_peft(model),
        "all-linear": lambda: try_lora(model, ["all-linear"]),
        "peft, all-linear": lambda: try_peft(model),
    }
    for name, column in columns.items():
        if "peft" in name and not lora.layers(model):
            row[name] = "-"  # no adapter was made
            continue
        try:
            row[name] = column()
        except Exception as error:
            row[name] = f"WRONG: {short(error)}"
        if "peft" in name or "refused" in row[name]:
            lora.remove(model)
    return row


def short(error) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:140]


# ----------------------------------------------------------------------------------------------------- output


def write_table(results: dict) -> None:
    """docs/models.json, and docs/models.md for people."""
    (DOCS / "models.json").write_text(json.dumps(results, indent=1) + "\n")
    tried = {name: row for name, row in results.items() if "generation" in row}
    rows = []
    reasons = []
    for name, row in tried.items():
        rows.append([name, *(row[column].partition(":")[0] for column in COLUMNS)])
        for column in COLUMNS:
            if ":" in row[column]:
                reasons.append(f"- {name}, {column}: {row[column]}")
    skipped = []
    for name, row in results.items():
        if name not in tried:
            skipped.append(f"- {name}: {row.get('skipped') or row.get('refused')}")

    made_by = f"transformers {transformers.__version__} and torch {torch.__version__}, float32, on the CPU"
    parts = [
        "# Model classes that were tried",
        __doc__.partition("\n\n")[2].strip(),
        f"Made by `make sweep` with {made_by}: {len(tried)} classes.",
        markdown_table(["class", *COLUMNS], rows),
        "## Refused, said, skipped or wrong, and why",
        "\n".join(reasons),
        "## Not tried, and why",
        "\n".join(skipped),
    ]
    (DOCS / "models.md").write_text("\n\n".join(parts) + "\n")


def causal_classes() -> list:
    """Those that AutoModelForCausalLM chooses from, each once."""
    classes = {}
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING.values():
        model_class = entry[0] if isinstance(entry, tuple) else entry
        classes[model_class.__name__] = model_class
    return list(classes.values())


def main() -> None:
    """All classes, or those whose names contain one of the arguments (then no table is written)."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokenizer = tiny_tokenizer()
    wanted = sys.argv[1:]
    results = {}
    for model_class in causal_classes():
        name = model_class.__name__
        if wanted and not any(word in name for word in wanted):
            continue
        results[name] = try_class(model_class, tokenizer)
        print(name, *results[name].items(), sep="\n    " if wanted else "  ", flush=True)
    if not wanted:
        write_table(results)


if __name__ == "__main__":
    main()
