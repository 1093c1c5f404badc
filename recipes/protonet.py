"""Train a LoRA adapter as a prototypical network: a query belongs to the nearest class mean.

    accelerate launch recipes/protonet.py
    accelerate launch recipes/protonet.py --adapter prompt_tuning --output_dir output/protonet_prompt

A task takes no gradient step, which makes this the fastest of the recipes and the strongest to beat. Settings are in
protonet.yaml; needs the `offline` extra. Prints progress and a table of accuracies beside the baselines; leaves the
adapter in output/protonet.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
