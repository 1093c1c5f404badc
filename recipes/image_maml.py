"""Meta-learn a four-block convolutional network from scratch with MAML, on pictures of characters.

    accelerate launch recipes/image_maml.py
    accelerate launch recipes/image_maml.py --k_shot 5 --inner_learning_rate 0.2 --output_dir output/five_shot

Settings are in image_maml.yaml beside this file; any of them can be given on the command line. The characters (glyphs)
are drawn from the fonts that matplotlib ships, and no network is used; --dataset_name takes any data set with a column
of images, or a folder of class folders.

The network normalises with the statistics of the batch at hand, queries among them, as MAML's published figures do: the
result is transductive, and says so. Prints progress and, at the end, the accuracy on alphabets that were never trained
on, beside untrained baselines on the same tasks. Leaves in output/image_maml the network, a model card, the results, a
learning curve, and episode.png: the first test task, with right and wrong answers marked.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
