"""Does PEFT read a saved adapter as lora.py wrote it? Each of its layers is compared, tensor by tensor."""

import copy
import os
import warnings

import torch
from torch import nn

import lora


def check_saved(model: nn.Module, folder: str | os.PathLike) -> str:
    """Load the adapter in `folder` with PEFT, and compare it with the model's, tensor by tensor.

    Returns "" where they are equal or there is no PEFT, otherwise one line. PEFT loads it onto a copy of the
    model whose weights are all one number, which costs no memory. In mixtures of experts PEFT 0.21 takes
    layers named gate_proj, up_proj or down_proj for old names of experts, also where they belong to a dense
    layer or a shared expert. Their tensors are dropped with no more than a warning.
    """
    try:
        theirs = _layers_in_peft(model, folder)
    except ImportError:
        return ""
    except Exception as error:  # whatever PEFT raises over layers that it does not take
        wrong = f"PEFT cannot load this adapter ({' '.join(str(error).split())[:200]})"
    else:
        ours = lora.layers(model)
        differ = [name for name in ours if name not in theirs or not _same_update(ours[name], theirs[name])]
        differ += [name for name in theirs if name not in ours and _has_update(theirs[name])]
        if not differ:
            return ""
        wrong = f"PEFT loads {len(differ)} layers of this adapter wrongly or not at all, such as {differ[0]}"
    return f"{folder}: {wrong}. lora.load reads it whole, and lora.merge with lora.remove makes a plain model"


def _layers_in_peft(model: nn.Module, folder: str | os.PathLike) -> dict[str, nn.Module]:
    """Module name -> PEFT's LoRA layer there. PEFT loads the adapter onto a copy without weights."""
    import peft

    with torch.device("meta"):
        bare = type(model)(copy.deepcopy(model.config))
    for module in bare.modules():
        for name, weight in module.named_parameters(recurse=False):
            one_number = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(one_number, requires_grad=False))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(bare, str(folder), torch_device="cpu")
    found = {}
    for name, module in loaded.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found[name] = module
    return found


def _same_update(layer: lora.LoRALinear, other: nn.Module) -> bool:
    """Has PEFT's layer the same A, B and scale?"""
    if "default" not in other.lora_A or other.scaling["default"] != layer.scale:
        return False
    same_a = torch.equal(other.lora_A["default"].weight.cpu(), layer.lora_A.cpu())
    return same_a and torch.equal(other.lora_B["default"].weight.cpu(), layer.lora_B.cpu())


def _has_update(other: nn.Module) -> bool:
    """Has PEFT's layer got tensors? Where it got none, its B stays 0."""
    return bool(other.lora_B["default"].weight.any())
