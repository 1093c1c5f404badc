"""Results as a table, for a terminal or a model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def percent(entry: Mapping[str, Any], key: str = "accuracy", signed: bool = False) -> str:
    """``91.2 ± 0.8`` from ``{"accuracy": 0.912, "ci95": 0.008}``; without ``±`` where there is no interval."""
    # Rounded first, and 0 added: what is below zero by rounding alone is not -0.0.
    text = f"{round(100 * entry[key], 1) + 0.0:{'+' if signed else ''}.1f}"
    return text if entry.get("ci95") is None else f"{text} ± {100 * entry['ci95']:.1f}"


def results_table(test: Mapping[str, Mapping[str, Any]], *, name: str, markdown: bool = False) -> str:
    """Methods by shots, in percent with 95 % intervals, and the learner's paired gains.

    Args:
        test: the ``"test"`` entry of ``results.json``: ``compare``'s answer by ``"<k>-shot"``.
        name: what to call the learner, such as ``"MAML, prompt_tuning"``.
        markdown: a Markdown table rather than aligned columns.

    Returns:
        The table, without a newline at its end.
    """
    shots = list(test)
    methods = list(dict.fromkeys(method for entry in test.values() for method in entry["baselines"]))
    headings = ["accuracy, %", *shots]
    rows = [[method, *_cells(test, "baselines", method)] for method in methods]
    rows.append([name, *(percent(entry) for entry in test.values())])
    rows += [[f"gain over {method}", *_cells(test, "paired_gains", method)] for method in methods]
    table = _markdown(headings, rows) if markdown else _aligned(headings, rows)
    return table + ("\n\n" if markdown else "\n") + _note(test)


def _cells(test: Mapping[str, Mapping[str, Any]], part: str, method: str) -> list[str]:
    cells = []
    for entry in test.values():
        found = entry[part].get(method)
        if found is None:
            cells.append("")
            continue
        text = percent(found) if part == "baselines" else percent(found, "mean", signed=True)
        fewer = found["episodes"] < entry["episodes"]
        cells.append(f"{text} (first {found['episodes']})" if fewer else text)
    return cells


def _note(test: Mapping[str, Mapping[str, Any]]) -> str:
    episodes = sorted({entry["episodes"] for entry in test.values()})
    count = " or ".join(map(str, episodes))
    return f"Mean over {count} episodes ± 95 % interval (Student t); gains are paired, episode by episode."


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headings) - 1)]
    lines = [[cell.replace("|", r"\|") for cell in line] for line in [headings, rule, *rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _aligned(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
