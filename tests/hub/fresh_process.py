"""Run by ``test_fresh_process.py`` in a process of its own: answers of saved adapters, by this package and by PEFT.

python fresh_process.py <backbone> <inputs.safetensors> <answers.safetensors> <folder of adapters>
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fewshot_nlp import FewShotAdapter
from fewshot_nlp.types import Batch


def main(backbone: str, inputs: str, out: str, saved: str) -> None:
    torch.set_num_threads(1)
    given, found = load_file(inputs), {}
    tokens = {name: given[name] for name in ("input_ids", "attention_mask")}
    support = Batch(tokens, given["labels"], int(given["labels"].max()) + 1)
    for folder in sorted(Path(saved).iterdir()):
        adapter = FewShotAdapter.from_pretrained(folder)
        state = adapter.learner.adapt(adapter.params, support)
        found[f"{folder.name} logits"] = adapter.learner.predict(adapter.params, state, support).detach()
        if (folder / "adapter_config.json").is_file():
            base = AutoModel.from_pretrained(backbone, attn_implementation="eager")
            model = peft.PeftModel.from_pretrained(base, folder).eval()
        else:
            full = (folder / "model.safetensors").is_file()
            model = AutoModel.from_pretrained(folder if full else backbone, attn_implementation="eager").eval()
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[:, -tokens["input_ids"].shape[1] :]
        mask = tokens["attention_mask"][..., None].float()
        found[f"{folder.name} features"] = (hidden * mask).sum(1) / mask.sum(1)
    save_file(found, out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
