"""A picture of a task on images: what was learned from, and what was answered, right and wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from fewshot_nlp.data import Pool
from fewshot_nlp.evaluation.plots import save_figure, set_heading
from fewshot_nlp.types import Episode, EpisodeSpec, Learner, Params

# Okabe & Ito (2008), told apart by colour-blind readers; a mark says the same.
RIGHT, WRONG = "#0072B2", "#D55E00"
#: Side of a picture, and room for names on the left, in inches.
SIDE, NAMES = 0.62, 2.0


def draw_episode(
    path: str | Path,
    learner: Learner,
    params: Params,
    spec: EpisodeSpec,
    reader: Callable[[EpisodeSpec], Episode],
    pool: Pool,
    title: str | None = None,
) -> Path:
    """Learn the task at ``spec``, answer its queries, and draw both as a PNG at ``path``; see ``episode_picture``."""
    device = next((tensor.device for tensor in params.values()), torch.device("cpu"))
    episode = reader(spec).to(device)
    with torch.no_grad():
        logits = learner.predict(params, learner.adapt(params, episode.support), episode.query)
    answers = iter(logits.argmax(1).tolist())
    return episode_picture(
        path,
        [pool.readable_name(name) for name in spec.classes],
        [pool.examples(rows) for rows in spec.support],
        [pool.examples(rows) for rows in spec.query],
        [[next(answers) for _ in rows] for rows in spec.query],
        title,
    )


def episode_picture(
    path: str | Path,
    names: Sequence[str],
    support: Sequence[Sequence[Image.Image]],
    query: Sequence[Sequence[Image.Image]],
    answers: Sequence[Sequence[int]],
    title: str | None = None,
) -> Path:
    """Draw a task as a PNG at ``path``: a row a class, its support images, then its queries with the answers.

    A right answer is framed and ticked; a wrong one is framed in another colour and says which class was answered.

    Args:
        path: the file to write; its folder is made if need be.
        names: of the classes.
        support, query: images by class.
        answers: the class that was answered for each query, as its place among ``names``.
        title: heading of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: the lists are not of one length, or an answer is no class.
    """
    for what, given in (("support", support), ("query", query), ("answers", answers)):
        if len(given) != len(names):
            raise ValueError(f"{what} is of {len(given)} classes, and names of {len(names)}. Give one list a class.")
    for row, images in zip(answers, query, strict=True):
        if len(row) != len(images) or not all(0 <= answer < len(names) for answer in row):
            raise ValueError(f"answers={list(row)} must be a class from 0 to {len(names) - 1} for each query.")
    letters = [chr(ord("A") + i % 26) for i in range(len(names))]
    k, q = max(map(len, support)), max(map(len, query))
    # A column apart between what is learned from and what is asked.
    columns = k + q + 1
    figure = Figure(figsize=(NAMES + SIDE * columns, SIDE * 1.25 * len(names) + 0.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(names), columns, squeeze=False, width_ratios=[1.0] * k + [0.4] + [1.0] * q)
    for panel in panels.flat:
        panel.set_axis_off()
    for i, name in enumerate(names):
        for panel, image in zip(panels[i], support[i], strict=False):
            _show(panel, image)
        for panel, image, answer in zip(panels[i, k + 1 :], query[i], answers[i], strict=False):
            right = answer == i
            _show(panel, image, RIGHT if right else WRONG, "✓" if right else f"✗ {letters[answer]}")
        # Beside the row, whatever the first picture of it is.
        panels[i, 0].text(
            -0.2,
            0.5,
            f"{_short(name)}  {letters[i]}",
            transform=panels[i, 0].transAxes,
            ha="right",
            va="center",
            fontsize=8,
        )
    panels[0, 0].set_title("support", fontsize=9, loc="left")
    asked = sum(map(len, answers))
    good = sum(answer == i for i, row in enumerate(answers) for answer in row)
    panels[0, k + 1].set_title(f"queries: {good} of {asked} right", fontsize=9, loc="left")
    set_heading(figure, title)
    return save_figure(figure, path)


def _show(panel: Axes, image: Image.Image, colour: str | None = None, mark: str = "") -> None:
    panel.set_axis_on()
    panel.imshow(np.asarray(image.convert("RGB")))
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set(color=colour or "#BBBBBB", linewidth=2.5 if colour else 0.5)
    if colour:
        panel.set_xlabel(mark, color=colour, fontsize=8, labelpad=1.5)


def _short(name: str, length: int = 30) -> str:
    return name if len(name) <= length else f"…{name[1 - length :]}"
