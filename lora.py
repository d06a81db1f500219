"""LoRA: a trainable low-rank update beside frozen linear layers, stored in PEFT's file format.

    W' = W + (alpha / r) B A          (Hu et al. 2022, section 4.1)

Covered: each plain `nn.Linear` of a Hugging Face model except its output head, one adapter at a time, and
rsLoRA's scale on loading.
Not covered: embeddings, Conv1D (GPT-2), routers and fused experts, the output head, biases, DoRA, a rank or
alpha that differs between layers. What is not covered is refused with a ValueError of one line. A refused
call leaves the model as it was.

Differences from the LoRA paper:
1. A starts Kaiming-uniform (a = sqrt 5), as in the authors' code and in PEFT. The paper says Gaussian. B
   starts at 0.
2. A and B are float32 whatever the base is, so that small optimizer steps are not rounded away. The update is
   computed in the dtype of its input (bf16 for a bf16 base, with or without autocast), the hardware's fast
   path. Over a float32 base this is PEFT's arithmetic. Over a bf16 base PEFT computes the update in float32.
3. Merging leaves the base alone: W', summed in float32 and rounded once, is kept beside W. So `unmerge` is
   exact to the bit and `disabled` works on a merged model too. The price is a second copy of each adapted
   weight. `train()` and `eval()` switch dropout and nothing else.

A saved adapter loads into the class that AutoModelForCausalLM gives the checkpoint, here and in PEFT. Other
classes of the checkpoint (...ForConditionalGeneration) name their layers otherwise, so that PEFT would put
nothing into them. PEFT 0.21 misreads some all-linear adapters of mixtures of experts, and refuses out_proj in
Mamba models. engine/peft_check.py says where, and `load` reads them whole.

Two parts: LoRA itself, and PEFT's files. A reader of LoRA can stop after the first.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.linear import dropout, is_plain_linear


class LoRALinear(nn.Module):
    """x -> base(x) + scale B A dropout(x), for x `[..., in]` and a result `[..., out]`.

    It stands in place of an nn.Linear, its frozen `base`. `lora_A` is `[r, in]`, `lora_B` is `[out, r]`. For
    the backward pass the frozen product keeps only its weight, and the update keeps dropout(x), the dropout
    mask and the `[..., r]` product. ValueError: a rank below 1, or a dropout outside [0, 1).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float, rslora: bool = False):
        super().__init__()
        if rank < 1 or not 0 <= dropout < 1:
            wrong = f"not rank {rank} and dropout {dropout}"
            raise ValueError(f"LoRA needs rank >= 1 and 0 <= dropout < 1, {wrong}")
        self.base = base.requires_grad_(False)
        self.settings = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora}
        self.scale = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = dropout
        self.enabled = True
        kind = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, **kind))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **kind))
        self.register_buffer("merged", None, persistent=False)  # W' while merged
        self.train(base.training)  # no dropout in a model that is in eval() already

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if self.merged is not None:
            return F.linear(x, self.merged, self.base.bias)
        dropped = dropout(x, self.dropout) if self.training else x  # [..., in]
        h = F.linear(dropped, self.lora_A.to(x.dtype)) * self.scale  # [..., r], cheapest to scale
        return self.base(x) + F.linear(h, self.lora_B.to(h.dtype))  # [..., out]

    # Code that reads the weight instead of calling the layer gets W, or W' while merged: without the update
    # it computes what the base model computes, and A and B get no gradient there.

    @property
    def weight(self) -> Tensor:
        if self.merged is not None and self.enabled:
            return self.merged
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features


def inject(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 16,
    dropout: float = 0.1,
    target_modules: str | Iterable[str] = ("q_proj", "v_proj"),
    seed: int | None = None,
) -> list[str]:
    """Freeze the model and put LoRA beside each `nn.Linear` whose name is, or ends with, a target module.

    "all-linear" means every plain `nn.Linear` except the output head (`left_out` names what is not plain). A
    depends on `seed` alone, whatever the device (None: on torch's global random state).
    Returns the adapted names. ValueError: LoRA is in already, or a target matches nothing.
    """
    if layers(model):
        raise ValueError("the model has LoRA layers already: call lora.remove(model) first")
    names = select(model, target_modules)
    _wrap(model, names, {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": False})

    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        start = torch.empty(layer.lora_A.shape, dtype=torch.float32)  # on the CPU: the same on every device
        layer.lora_A.data.copy_(nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator))
    return names


def remove(model: nn.Module) -> None:
    """Take LoRA out. After `merge` the model keeps W', to be saved as a plain model. Otherwise it has W."""
    for name, layer in layers(model).items():
        if layer.merged is not None:
            layer.base.weight.data = layer.merged
        model.set_submodule(name, layer.base)


def layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Module name -> LoRA layer, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable LoRA parameters, A before B, in the model's own order. After `load` there may be none."""
    return [parameter for parameter in _tensors(model).values() if parameter.requires_grad]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the `with` block the model computes exactly what the base model computes, trained or merged."""
    was_enabled = {layer: layer.enabled for layer in layers(model).values()}
    try:
        for layer in was_enabled:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in was_enabled.items():
            layer.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Compute with W' = W + scale B A, one product a layer. While merged, A and B get no gradient."""
    for layer in layers(model).values():
        weight = layer.base.weight
        with torch.autocast(weight.device.type, enabled=False):
            update = layer.scale * (layer.lora_B.float() @ layer.lora_A.float())
        layer.merged = (weight.float() + update).to(weight.dtype)


def unmerge(model: nn.Module) -> None:
    """Undo `merge` exactly: the base weights were never changed."""
    for layer in layers(model).values():
        layer.merged = None


def state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the LoRA tensors alone, under PEFT's names."""
    return {key: parameter.detach().clone() for key, parameter in _tensors(model).items()}


@torch.no_grad()
def load_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the LoRA tensors in place, so that an optimizer keeps its parameters.

    A merge is undone. ValueError: the names or shapes are not those of the model's own LoRA tensors.
    """
    current = _tensors(model)
    shapes = {key: parameter.shape for key, parameter in current.items()}
    _check_shapes(state, shapes, "the LoRA state does not fit this model")
    unmerge(model)
    for key, parameter in current.items():
        parameter.copy_(state[key])


def select(model: nn.Module, target_modules: str | Iterable[str]) -> list[str]:
    """The names of the linear layers that `target_modules` means. ValueError: a target matches nothing."""
    available = _linears(model)
    if isinstance(target_modules, str):
        target_modules = [target_modules]
    targets = list(target_modules)
    if targets == ["all-linear"] and available:
        return list(available)

    unmatched = [target for target in targets if not _matching(available, [target])]
    if targets and not unmatched:
        return _matching(available, targets)

    wrong = "no target modules given"
    if unmatched:
        wrong = f"target modules match nothing: {', '.join(unmatched)}"
    kind = f"the linear layers of {type(model).__name__} (nn.Linear, without the head)"
    raise ValueError(f"{wrong}; {kind}: {', '.join(_short_names(available)) or 'none'}")


def left_out(model: nn.Module) -> list[str]:
    """The linear layers that "all-linear" leaves out, beside the head: those with a forward of their own.

    Routers of mixtures of experts are such: they return more than W x, so that nothing can be added to it.
    """
    head = _head(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, module in linears.items() if module is not head and not is_plain_linear(module)]


def _head(model: nn.Module) -> nn.Module | None:
    if hasattr(model, "get_output_embeddings"):
        return model.get_output_embeddings()
    return None


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Name -> the plain `nn.Linear` there, the frozen one where LoRA is in.

    The output head is left out, because its weight may be the embedding's.
    """
    head = _head(model)
    adapted = layers(model)
    frozen = {layer.base for layer in adapted.values()}  # named_modules lists them again, inside LoRA layers

    found = {}
    for name, module in model.named_modules():
        if name in adapted:
            found[name] = module.base
        elif is_plain_linear(module) and module is not head and module not in frozen:
            found[name] = module
    return found


def _matching(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """PEFT's rule: a target is a whole module name or the last parts of one."""
    endings = tuple(f".{target}" for target in targets)
    return [name for name in names if f".{name}".endswith(endings)]


def _short_names(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _wrap(model: nn.Module, names: list[str], settings: dict) -> None:
    """Freeze the model and put a LoRA layer, A and B zero, at each name in place of any that is in."""
    available = _linears(model)
    wrapped = {name: LoRALinear(available[name], **settings) for name in names}
    unmerge(model)
    remove(model)
    model.requires_grad_(False)
    for name, layer in wrapped.items():
        model.set_submodule(name, layer)


def _tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """PEFT's name of a tensor -> the parameter, A before B, in the model's own order."""
    found = {}
    for name, layer in layers(model).items():
        found[_key(name, "lora_A")] = layer.lora_A
        found[_key(name, "lora_B")] = layer.lora_B
    return found


def _key(name: str, part: str) -> str:
    return f"base_model.model.{name}.{part}.weight"


def _check_shapes(state: dict[str, Tensor], needed: dict[str, tuple[int, ...]], what: str) -> None:
    for key in sorted(needed.keys() | state.keys()):
        if key not in state:
            raise ValueError(f"{what}: {key} is missing")
        if key not in needed:
            raise ValueError(f"{what}: it has no linear layer for {key}")
        if state[key].shape != needed[key]:
            found = list(state[key].shape)
            raise ValueError(f"{what}: {key} is {found}, the model needs {list(needed[key])}")


# --- PEFT's files -------------------------------------------------------------------------------------------

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# The fields of adapter_config.json that we read, or that do not change what a trained adapter computes. Any
# other field that is set might (DoRA, trained biases, features yet to come), so such an adapter is refused.
HARMLESS = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "peft_type", "task_type", "peft_version", "inference_mode",
    "base_model_name_or_path", "revision", "auto_mapping", "eva_config", "megatron_core", "qalora_group_size",
    "ensure_weight_tying",
}  # fmt: skip
UNSET = (None, False, "none", {}, [])
PLAIN_INIT = (True, "gaussian", "orthogonal", "eva")  # PiSSA, OLoRA, CorDA, LoftQ change the base too


def save(model: nn.Module, folder: str | os.PathLike, base_model_name: str | None = None) -> None:
    """Write the adapter as PEFT does: the weights, then adapter_config.json. Each file is whole or absent."""
    adapted = layers(model)
    if not adapted:
        raise ValueError("the model has no LoRA layers to save")
    if base_model_name is None and hasattr(model, "config"):
        base_model_name = model.config._name_or_path
    settings = next(iter(adapted.values())).settings
    short = _short_names(adapted)
    exact = _matching([name for name, _ in model.named_modules()], short) == list(adapted)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": settings["dropout"],
        "use_rslora": settings["rslora"],
        "target_modules": short if exact else list(adapted),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / WEIGHTS, safetensors.torch.save(state_dict(model), metadata={"format": "pt"}))
    _write(folder / CONFIG, json.dumps(config, indent=2).encode())


def load(model: nn.Module, folder: str | os.PathLike, trainable: bool = False) -> list[str]:
    """Put the adapter in `folder`, ours or PEFT's, into the model. One that is in already goes.

    Returns the adapted names. ValueError: a file is missing or broken, the adapter belongs to another model,
    or it needs something that is not covered here.
    """
    config, state = _read(Path(folder))
    names = _check_fit(model, config, state, folder)
    settings = {
        "rank": config["r"],
        "alpha": config["lora_alpha"],
        "dropout": config.get("lora_dropout", 0.0),
        "rslora": config.get("use_rslora", False),
    }
    present = {name: layer.settings for name, layer in layers(model).items()}
    if present != dict.fromkeys(names, settings):
        _wrap(model, names, settings)
    load_state_dict(model, state)
    for parameter in _tensors(model).values():
        parameter.requires_grad_(trainable)
    return names


def _check_fit(
    model: nn.Module, config: dict, state: dict[str, Tensor], folder: str | os.PathLike
) -> list[str]:
    """The modules the adapter adapts, in the model's order. ValueError: its tensors are not this model's."""
    available = _linears(model)
    rank = config["r"]
    names = [name for name in available if _key(name, "lora_A") in state]
    targets = config.get("target_modules")
    narrowed = config.get("layers_to_transform") or config.get("exclude_modules")
    if isinstance(targets, list) and not narrowed:
        names = _matching(available, [*names, *targets])  # notices the adapter of a model with fewer layers

    needed = {}
    for name in names:
        needed[_key(name, "lora_A")] = (rank, available[name].in_features)
        needed[_key(name, "lora_B")] = (available[name].out_features, rank)
    _check_shapes(state, needed, f"the adapter in {folder} does not fit this {type(model).__name__}")
    if not names:
        raise ValueError(f"the adapter in {folder} holds no tensors")
    return names


def _read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The two files of an adapter, checked as far as that needs no model."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: {name} is missing, so this is no adapter in PEFT's format")
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        state = safetensors.torch.load_file(folder / WEIGHTS)
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder}: broken adapter file: {error}") from None

    numbers = isinstance(config.get("r"), int) and isinstance(config.get("lora_alpha"), int | float)
    if config.get("peft_type") != "LORA" or not numbers:
        needs = "that has peft_type LORA and numbers r and lora_alpha"
        raise ValueError(f"{folder / CONFIG}: no LoRA adapter; {needs}")

    for field, value in config.items():
        plain_start = field == "init_lora_weights" and value in PLAIN_INIT
        if field not in HARMLESS and value not in UNSET and not plain_start:
            found = f"{field} = {json.dumps(value)}"
            raise ValueError(f"{folder / CONFIG}: {found} is not supported, only plain LoRA is")
    return config, state


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
