"""Meta-learn the start of a LoRA adapter with Reptile: no gradient passes through the inner loop.

    accelerate launch recipes/lora_reptile.py
    accelerate launch recipes/lora_reptile.py --inner_steps 10 --output_dir output/lora_reptile_10

The start moves towards where each task's own steps lead. Settings are in lora_reptile.yaml; needs the `offline` extra.
Prints progress and a table of accuracies beside the baselines; leaves the adapter in output/lora_reptile.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
