"""Go on learning: groups of intents arrive one after another, and old ones should not be forgotten.

    accelerate launch recipes/lifelong.py
    accelerate launch recipes/lifelong.py --variant naive --output_dir output/lifelong_naive
    accelerate launch recipes/lifelong.py --variant ewc --output_dir output/lifelong_ewc

Prints the accuracy on every stage after every stage, on texts that were held out, then average accuracy, backward and
forward transfer and forgetting; leaves the adapter, results.json and a picture of the matrix in output/lifelong.
Settings are in lifelong.yaml; --stream_dataset_names streams whole data sets; needs the `offline` extra.
"""

from pathlib import Path

from fewshot_nlp.cli.lifelong import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
