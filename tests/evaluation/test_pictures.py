"""The picture of a task says what was right."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from fewshot_nlp.data import EpisodeReader, EpisodeSampler, load_pools
from fewshot_nlp.evaluation.pictures import RIGHT, WRONG, draw_episode, episode_picture
from fewshot_nlp.learners import build_learner
from tests.data.test_images import make_images
from tests.tiny import tiny_config

GREY = Image.new("L", (8, 8), 128)


@pytest.fixture
def figure(monkeypatch):
    """The figure that was saved last."""
    saved, save = {}, Figure.savefig

    def keep(self, *args, **options):
        saved["figure"] = self
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return lambda: saved["figure"]


def marks(figure):
    """What stands under the queries, row by row, and the colour of their frames."""
    panels = [panel for panel in figure.axes if panel.get_xlabel()]
    return [(panel.get_xlabel(), to_hex(panel.spines["top"].get_edgecolor()).upper()) for panel in panels]


def test_right_and_wrong_answers_are_marked(tmp_path, figure):
    support, query = [[GREY], [GREY], [GREY]], [[GREY, GREY], [GREY, GREY], [GREY]]
    path = episode_picture(
        tmp_path / "new" / "e.png", ["ka", "la", "ma"], support, query, [[0, 2], [1, 1], [0]], "MAML"
    )
    good, bad = ("✓", RIGHT), ("✗ ", WRONG)
    assert marks(figure()) == [good, (f"{bad[0]}C", WRONG), good, good, (f"{bad[0]}A", WRONG)]
    titles = [panel.get_title(loc="left") for panel in figure().axes if panel.get_title(loc="left")]
    assert titles == ["support", "queries: 3 of 5 right"]
    assert {text.get_text() for panel in figure().axes for text in panel.texts} == {"ka  A", "la  B", "ma  C"}
    assert imread(path).shape[0] > 300


@pytest.mark.parametrize(
    ("answers", "message"),
    [([[0]], "answers is of 1 classes, and names of 2"), ([[0], [2]], r"answers=\[2\] must be a class from 0 to 1")],
)
def test_what_does_not_fit_is_an_error(tmp_path, answers, message):
    with pytest.raises(ValueError, match=message):
        episode_picture(tmp_path / "e.png", ["a", "b"], [[GREY], [GREY]], [[GREY], [GREY]], answers)


def test_a_task_is_learned_and_drawn(tmp_path, folders, figure):
    """The answers in the picture are the learner's own."""
    pool = load_pools(make_images(), split_seed=1)["train"]
    learner = build_learner(tiny_config(folders["image"], learner="protonet", head="prototype"))
    params, reader = learner.init_params(), EpisodeReader(pool, learner.model.encoder())
    spec = EpisodeSampler(pool, n_way=3, k_shot=2, n_query=2)[0]
    draw_episode(tmp_path / "e.png", learner, params, spec, reader, pool)
    episode = reader(spec)
    answers = learner.predict(params, learner.adapt(params, episode.support), episode.query).argmax(1).tolist()
    expected = ["✓" if a == i // 2 else f"✗ {'ABC'[a]}" for i, a in enumerate(answers)]
    assert [mark for mark, _ in marks(figure())] == expected
