"""Meta-learn the start of a LoRA adapter with MAML, exact second-order gradients.

    accelerate launch recipes/lora_maml.py
    accelerate launch recipes/lora_maml.py --learner fomaml --output_dir output/lora_fomaml

A task adapts LoRA in all layers and a head that starts at the class prototypes. Settings are in lora_maml.yaml; needs
the `offline` extra. Prints progress and a table of accuracies beside the baselines; leaves the adapter in
output/lora_maml.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
