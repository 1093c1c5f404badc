"""Train any learner: one recipe, and a few lines of settings for each method.

    accelerate launch recipes/train.py --config recipes/learners/relation.yaml
    accelerate launch recipes/train.py --learner anil --inner_steps 5 --output_dir output/anil

Data, backbone, adapter and length of training are in train.yaml and alike for all; what makes a method is in
recipes/learners/. Needs the `offline` extra. Prints progress and a table of accuracies beside the baselines; leaves the
adapter in output/train, or where --output_dir says.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
