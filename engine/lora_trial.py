"""One step of LoRA training is tried before hours of generation: does it run and reach every layer?"""

import traceback

import torch

import lora
from engine.forward import Row, Ways, target_loss
from support.cli import InputError

CAN_GO_WRONG = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


def try_training_step(model, rows: list[Row], prefixed: list[Row], ways: Ways, bf16: bool) -> list[str]:
    """One step forward and back over some rows -> a line on layers that text does not reach.

    `prefixed` are rows for a shared prefix, where the ways allow one. `bf16` is that of the training to come:
    matrix products in bfloat16. Neither the adapter nor the random state is changed. InputError: the step
    fails, or a LoRA layer whose surroundings ran has no finite gradient.
    """
    training = model.training
    try:
        model.train()
        ran = forward_and_back(model, rows, prefixed, ways, bf16)
        trained, passed_by, unreached = judge_gradients(model, ran)
    except torch.OutOfMemoryError:
        raise InputError("out of memory in a training step over short rows: take a smaller model") from None
    except CAN_GO_WRONG as error:
        raise failure(model, "one training step", error) from None
    finally:
        model.zero_grad(set_to_none=True)
        model.train(training)

    name = type(model).__name__
    if passed_by or not trained:
        raise InputError(
            f"--target-modules: {some(passed_by or unreached)} of {name} would not be trained, since a "
            "training step brings no finite gradient there; name other modules"
        )
    if unreached:
        return [f"{name}: text does not reach {some(unreached)}, so these are not trained"]
    return []


def forward_and_back(model, rows: list[Row], prefixed: list[Row], ways: Ways, bf16: bool) -> set:
    """Leave the gradients of a loss in the model -> the modules that ran. The random state is kept."""
    ran = set()

    def note(module, args):
        ran.add(module)

    hooks = [module.register_forward_pre_hook(note) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):  # as train.py does
                loss = target_loss(model, rows, False, ways)
                if ways.shared_prefix:
                    loss = loss + target_loss(model, prefixed, True, ways)
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def judge_gradients(model, ran: set) -> tuple[list[str], list[str], list[str]]:
    """LoRA layers with finite gradients, those that are passed by, and those that text does not reach.

    They are named by kind, with numbers as *. A layer without a gradient is passed by where the module that
    it is in ran: its code takes the weight and does not call the layer. In a list, such as a layer's experts,
    some are not chosen by a few rows, so there one trained layer speaks for all.
    """
    trained, passed_by, in_lists, unreached = set(), set(), set(), set()
    for name, layer in lora.layers(model).items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        parent, user = parents(model, name)
        if has_finite_gradient(layer.lora_A) and has_finite_gradient(layer.lora_B):
            trained.add(kind)
        elif layer in ran or parent in ran:
            passed_by.add(kind)
        elif user in ran:
            in_lists.add(kind)
        else:
            unreached.add(kind)
    passed_by |= in_lists - trained
    return sorted(trained), sorted(passed_by), sorted(unreached - trained - passed_by)


def parents(model, name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The module that holds a layer, and the innermost whose code can use it. A list has no code."""
    name = name.rpartition(".")[0]
    parent = user = model.get_submodule(name)
    while isinstance(user, torch.nn.ModuleList | torch.nn.ModuleDict):
        name = name.rpartition(".")[0]
        user = model.get_submodule(name)
    return parent, user


def some(names: list[str]) -> str:
    """The first names of a list that may be long."""
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} kinds more"


def has_finite_gradient(parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.isfinite().all())


def failure(model, what: str, error: Exception) -> InputError:
    """One line about what the model cannot do. Where LoRA is in, it names the layers most likely to blame.

    Those are in the innermost module that the error came through, or else of any kind.
    """
    said = f"{what} of {type(model).__name__} fails"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    adapted = lora.layers(model)
    if not adapted:
        return InputError(f"{said} ({reason})")

    names = sorted({name.rpartition(".")[2] for name in adapted})
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            inside = {module, *module.children()}
            here = [name for name, layer in adapted.items() if layer in inside]
            names = here or names
    return InputError(f"--target-modules: {said} at {some(names)} ({reason}); name other modules")
