"""Meta-learn scales and shifts of a frozen encoder's layers; a task adapts its head alone (Sun et al. 2019).

    accelerate launch recipes/meta_transfer.py
    accelerate launch recipes/meta_transfer.py --learner anil --adapter lora --output_dir output/lora_anil

Two numbers for every output channel are trained, a thousandth of the encoder's weights; the second command trains LoRA
for the same head. Settings are in meta_transfer.yaml; needs the `offline` extra. Prints progress and a table of
accuracies beside the baselines; leaves scales and shifts in output/meta_transfer.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
