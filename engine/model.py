"""A model: the device it runs on, how it is loaded, how much it holds."""

import contextlib
import datetime
import functools
import math
import resource
import string
import sys
import time
from pathlib import Path

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import engine.attention  # noqa: F401, registers the attention that is named "rows"
from engine import trial
from support import ranks
from support.cli import InputError

transformers.logging.disable_progress_bar()  # of loading weights. It silences downloads as well:
huggingface_hub.utils.enable_progress_bars()

# What may stand between "%" and the letter of a date format, and what stands for "%%" while it is replaced.
CLOCK_FLAGS = ("", "-", "_", "0", "^", "#", "E", "O")
PERCENT = "\U000f0002"


# --- Devices ------------------------------------------------------------------------------------------------


def best_device() -> str:
    if torch.cuda.is_available():
        return f"cuda:{ranks.LOCAL_RANK}"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def usable_device(name: str | None) -> str:
    """The device of that name, or the best there is. InputError: this machine has none."""
    if name is None:
        refuse_unusable_driver()
        name = best_device()
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: this machine has none, or torch cannot use it") from None
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return name


def refuse_unusable_driver() -> None:
    """InputError: there is an NVIDIA card that this torch cannot use. Hours on a CPU would surprise."""
    built_for = torch.version.cuda
    if built_for and Path("/dev/nvidiactl").exists() and not torch.cuda.is_available():
        raise InputError(
            f"there is an NVIDIA card, but torch, built for CUDA {built_for}, cannot use it: "
            "nvidia-smi shows the newest CUDA that the driver serves. --device cpu goes on without"
        )


def machine_of(model) -> dict:
    """What a report says of the machine: device, versions and the date."""
    if model.device.type == "cuda":
        device = torch.cuda.get_device_name(model.device)
    else:
        threads = torch.get_num_threads()
        device = f"{model.device}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def peak_memory_gib() -> float:
    """The most memory this process has held, in GiB: of the GPU's if it used one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":  # ru_maxrss is in bytes on macOS, in KiB on Linux
        resident *= 1024
    return round(resident / 2**30, 2)


# --- Loading ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def loading_error_as_one_line(name: str):
    """Turn whatever loading a model can raise into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        if _is_refused_by_the_hub(error):
            raise InputError(
                f"--model {name}: the hub refuses it. Accept its conditions on "
                f"https://huggingface.co/{name} and set HF_TOKEN to a token that may read"
            ) from None
        one_line = " ".join(str(error).split())
        raise InputError(f"--model {name}: cannot be loaded ({one_line[:300]})") from None


def _is_refused_by_the_hub(error: BaseException | None) -> bool:
    """Did the hub answer 401 or 403, the model being gated or private?"""
    while error is not None:
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) in (401, 403) or "gated repo" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_tokenizer(
    name: str,
    trust_remote_code: bool = False,
    chat: bool = True,
    chat_template_kwargs: dict | None = None,
    date: str | None = None,
):
    """A model's tokenizer. InputError: it cannot be loaded, or lacks a chat template where one is needed.

    `chat_template_kwargs`, such as {"enable_thinking": False}, and the `date` (2026-11-25) of a template with
    a clock are the same in every rendering from then on.
    """
    with loading_error_as_one_line(name):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if chat and not tokenizer.chat_template:
        raise InputError(f"--model {name}: its tokenizer has no chat template; take an instruct model")

    if chat_template_kwargs:
        render = tokenizer.apply_chat_template
        tokenizer.apply_chat_template = functools.partial(render, **chat_template_kwargs)
    if date:
        clock = stopped_clock(date)
        template = tokenizer.chat_template
        if isinstance(template, dict):  # several, by name
            tokenizer.chat_template = {name: clock + text for name, text in template.items()}
        elif template:
            tokenizer.chat_template = clock + template
    tokenizer.ends_of_generation = _ends_of_generation(name, trust_remote_code)
    return tokenizer


def _ends_of_generation(name: str, trust_remote_code: bool) -> frozenset[int]:
    """The tokens at which a model's own generation stops, as its files say: turn_format.py reads them."""
    configured = None
    unreadable = (OSError, ValueError, KeyError, ImportError)  # whoever loads the model says so
    try:
        configured = GenerationConfig.from_pretrained(name).eos_token_id
    except unreadable:  # most often there is no such file, and the model's configuration says it
        with contextlib.suppress(*unreadable):
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            configured = getattr(config.get_text_config(decoder=True), "eos_token_id", None)
    if isinstance(configured, int):
        configured = [configured]
    return frozenset(configured or ())


def stopped_clock(date: str) -> str:
    """A macro in front of a chat template, in place of transformers' clock: `strftime_now(format)`.

    The template sees midnight of `date` (2026-11-25), whenever it is rendered. It fails over a directive that
    strftime does not know here. InputError: that is no date.
    """
    try:
        midnight = datetime.datetime.fromisoformat(date)
    except ValueError:
        raise InputError(f"date {date}: not a date such as 2026-11-25") from None

    written = {"%%": PERCENT}
    for flag in CLOCK_FLAGS:
        for letter in string.ascii_letters:
            text = midnight.strftime(f"%{flag}{letter}")
            if "%" not in text:
                written[f"%{flag}{letter}"] = text
    return (
        "{%- macro strftime_now(format) -%}{%- set now = namespace(text=format) -%}"
        f"{{%- for directive, text in {written}.items() -%}}"
        "{%- set now.text = now.text|replace(directive, text) -%}{%- endfor -%}"
        "{%- if '%' in now.text -%}{{ raise_exception('no such date format: ' ~ format) }}{%- endif -%}"
        "{{ now.text|replace('" + PERCENT + "', '%') }}{%- endmacro %}\n"  # Jinja removes the line break
    )


def load_config(name: str, trust_remote_code: bool = False):
    """A model's configuration: a small file, which is read long before the weights."""
    with loading_error_as_one_line(name):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    chat: bool = True,
    chat_template_kwargs: dict | None = None,
    date: str | None = None,
):
    """(model, tokenizer) of a Hugging Face name or folder, from safetensors only, in eval mode.

    Without a device it is the best that there is. Without a dtype it is bfloat16 on a GPU, float32 elsewhere.
    InputError: it cannot be loaded, or has no chat template where one is needed.
    """
    device = usable_device(device)
    if dtype is None:
        dtype = "bfloat16" if device.startswith("cuda") else "float32"
    tokenizer = load_tokenizer(name, trust_remote_code, chat, chat_template_kwargs, date)

    config = load_config(name, trust_remote_code)
    with loading_error_as_one_line(name):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )

    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = _eos_of_generation(model, tokenizer)
    model = model.to(device).eval()
    trial.use_rows_attention(model)
    return model, tokenizer


def _eos_of_generation(model, tokenizer) -> str | None:
    """The token at which the model's own generation stops, for a tokenizer that names none."""
    ids = model.generation_config.eos_token_id
    if isinstance(ids, list):
        ids = ids[0]
    return None if ids is None else tokenizer.convert_ids_to_tokens(ids)


# --- What a model holds -------------------------------------------------------------------------------------


def context_length(config) -> float:
    """How many tokens a model of this configuration takes. Infinity where it does not say, or says -1."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return length if length is not None and length >= 1 else math.inf


def skeleton(name: str, trust_remote_code: bool = False):
    """A model with the shapes of its weights and no numbers in them, from its configuration alone."""
    config = load_config(name, trust_remote_code)
    with loading_error_as_one_line(name), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def count_weights(name: str, trust_remote_code: bool = False) -> int:
    """How many weights a model has. Nothing is loaded."""
    return sum(parameter.numel() for parameter in skeleton(name, trust_remote_code).parameters())


def reset_peak_memory() -> None:
    """From here on, peak_memory_gib counts anew (on a GPU, and on Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # no Linux
        Path("/proc/self/clear_refs").write_text("5")
