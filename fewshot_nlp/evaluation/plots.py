"""The picture a run leaves behind. Figures are objects of their own: no pyplot, no window, no global state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

#: ``(step, value)`` pairs.
Curve = Sequence[tuple[int, float]]

# Okabe & Ito (2008): told apart by colour-blind readers. A line and its baseline share a colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: A curve of more points than this is drawn pale, with its running mean on top.
NOISY = 30


def learning_curve(
    path: str | Path,
    accuracy: Mapping[str, Curve],
    *,
    baselines: Mapping[str, float] | None = None,
    loss: Mapping[str, Curve] | None = None,
    title: str | None = None,
) -> Path:
    """Draw accuracy, and below it loss, against training steps as a PNG at ``path``.

    Args:
        path: the file to write; its folder is made if need be.
        accuracy: curves by name, such as ``{"train": [(10, 0.81), ...], "validation": [...]}``, in [0, 1].
        baselines: accuracies in [0, 1] by name, drawn as labelled horizontal lines; a curve whose
            name is part of a baseline's (``"validation"`` in ``"untrained, validation"``) lends it its colour.
        loss: curves as for ``accuracy``, in nats; no second panel if not given.
        title: heading of the figure.

    Returns:
        ``path``.

    Raises:
        ValueError: no curve has a point.
    """
    accuracy, loss = _drawable(accuracy), _drawable(loss or {})
    if not accuracy:
        raise ValueError(f"No accuracy to draw in {path}. Log or evaluate at least once (logging_steps, eval_steps).")
    names = list(dict.fromkeys([*accuracy, *loss]))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}

    figure = Figure(figsize=(7.2, 6.4 if loss else 4.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 if loss else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw(panels[0], {name: [(x, 100 * y) for x, y in curve] for name, curve in accuracy.items()}, colours)
    for i, (name, value) in enumerate((baselines or {}).items()):
        # A whole word: "untrained" is no baseline of "train".
        colour = next((colours[curve] for curve in accuracy if re.search(rf"\b{re.escape(curve)}\b", name)), "#444444")
        label, style = f"{name}: {100 * value:.1f} %", ("--", ":", "-.")[i % 3]
        panels[0].axhline(100 * value, color=colour, linestyle=style, linewidth=1.4, label=label)
    panels[0].set_ylabel("accuracy (% of queries)")
    if loss:
        _draw(panels[1], loss, colours)
        panels[1].set_ylabel("cross-entropy (nats)")
    # One legend, beside the panels: in them it would hide a line sooner or later.
    lines = {line.get_label(): line for panel in panels for line in panel.get_legend_handles_labels()[0]}
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", frameon=False, fontsize=8.5, ncols=2)
    panels[-1].set_xlabel("training step (meta-updates)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    set_heading(figure, title)
    return save_figure(figure, path)


def set_heading(figure: Figure, title: str | None) -> None:
    """Give ``figure`` a title, of several lines where one would be cut."""
    if title:
        # In this size and weight about eleven letters take an inch.
        width = int(10 * figure.get_figwidth())
        figure.suptitle("\n".join(wrap(title, width)), fontsize=11, fontweight="bold")


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write ``figure`` as PNG; equal figures leave equal files. Returns the path.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The version of matplotlib would make two equal runs leave unequal files.
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


def curves_from_log_history(log_history: Iterable[Mapping[str, float]]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """``learning_curve``'s ``accuracy`` and ``loss`` from a trainer's ``state.log_history``.

    ``accuracy`` and ``loss`` at a ``step`` are the curve ``"train"``; ``eval_<name>_accuracy`` is ``"validation,
    <name>"``; ``eval_accuracy``, the mean of those, is ``"validation"`` where no name is logged or one alone.
    """
    found: dict[str, dict[str, list[tuple[int, float]]]] = {"accuracy": {}, "loss": {}}
    for logs in log_history:
        for key, value in logs.items():
            for kind, curves in found.items():
                if key == kind:
                    curves.setdefault("train", []).append((int(logs["step"]), value))
                elif key.startswith("eval_") and key.endswith(f"_{kind}"):
                    name = key.removeprefix("eval").removesuffix(kind).strip("_")
                    curve = f"validation, {name}" if name else "validation"
                    curves.setdefault(curve, []).append((int(logs["step"]), value))
    for curves in found.values():
        named = [name for name in curves if name.startswith("validation, ")]
        drop = named if len(named) == 1 and "validation" in curves else ["validation"] if named else []
        for name in drop:
            curves.pop(name, None)
    return dict(found["accuracy"]), dict(found["loss"])


def _drawable(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """The finite points of each curve that has any."""
    finite = {name: [(step, value) for step, value in curve if np.isfinite(value)] for name, curve in curves.items()}
    return {name: curve for name, curve in finite.items() if curve}


def _draw(panel: Axes, curves: Mapping[str, Curve], colours: Mapping[str, str]) -> None:
    for name, curve in curves.items():
        steps, values = np.asarray(sorted(curve), dtype=np.float64).T
        if len(values) > NOISY:
            panel.plot(steps, values, color=colours[name], linewidth=0.8, alpha=0.25)
            panel.plot(steps, _running_mean(values), color=colours[name], linewidth=2.0, label=f"{name} (running mean)")
        else:
            panel.plot(steps, values, color=colours[name], linewidth=2.0, marker="o", markersize=4, label=name)
    panel.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a centred window of a tenth of the curve, cut at both ends."""
    half = max(1, len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    first, last = np.maximum(positions - half, 0), np.minimum(positions + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)
