from fewshot_nlp.evaluation import results_table
from fewshot_nlp.evaluation.tables import percent

TEST = {
    "1-shot": {
        "accuracy": 0.9234,
        "ci95": 0.0049,
        "episodes": 600,
        "baselines": {
            "prototypes": {"accuracy": 0.91, "ci95": 0.006, "episodes": 600},
            "fine-tuning": {"accuracy": 0.8, "ci95": 0.02, "episodes": 50},
        },
        "paired_gains": {
            "prototypes": {"mean": 0.0134, "ci95": 0.002, "episodes": 600},
            "fine-tuning": {"mean": -0.12, "ci95": None, "episodes": 50},
        },
    },
    "5-shot": {
        "accuracy": 0.98,
        "ci95": 0.001,
        "episodes": 600,
        "baselines": {"prototypes": {"accuracy": 0.97, "ci95": 0.002, "episodes": 600}},
        "paired_gains": {"prototypes": {"mean": 0.01, "ci95": 0.001, "episodes": 600}},
    },
}


def test_aligned():
    lines = results_table(TEST, name="MAML").splitlines()
    assert lines[:-1] == [
        "accuracy, %                           1-shot      5-shot",
        "prototypes                        91.0 ± 0.6  97.0 ± 0.2",
        "fine-tuning            80.0 ± 2.0 (first 50)",
        "MAML                              92.3 ± 0.5  98.0 ± 0.1",
        "gain over prototypes              +1.3 ± 0.2  +1.0 ± 0.1",
        "gain over fine-tuning       -12.0 (first 50)",
    ]
    assert lines[-1].startswith("Mean over 600 episodes ± 95 % interval")


def test_markdown():
    lines = results_table(TEST, name="MAML | prompt", markdown=True).splitlines()
    assert lines[:3] == [
        "| accuracy, % | 1-shot | 5-shot |",
        "| --- | ---: | ---: |",
        "| prototypes | 91.0 ± 0.6 | 97.0 ± 0.2 |",
    ]
    assert r"| MAML \| prompt | 92.3 ± 0.5 | 98.0 ± 0.1 |" in lines
    assert lines[-2] == ""


def test_no_gain_is_none_also_where_rounding_left_it_below_zero():
    assert percent({"mean": -6e-18, "ci95": 0.0453}, "mean", signed=True) == "+0.0 ± 4.5"
