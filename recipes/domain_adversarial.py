"""Learn intents in English, answer in German: prototypes whose features do not tell the two languages apart.

    accelerate launch recipes/domain_adversarial.py
    accelerate launch recipes/domain_adversarial.py --learner protonet --learner_kwargs none --n_unlabelled 0

Training tasks have English sentences and classes; beside each there are German sentences of other intents than those
that are tested, without labels. Validation and test are in German. The second command leaves them out. Settings are in
domain_adversarial.yaml; needs the `offline` extra. Prints progress and a table of accuracies beside the baselines;
leaves the adapter in output/domain_adversarial.
"""

from pathlib import Path

from fewshot_nlp.cli.train import main

if __name__ == "__main__":
    main(recipe=Path(__file__).with_suffix(".yaml"))
