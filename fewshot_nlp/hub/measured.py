"""The part of a model card that says what was measured: ``results.json`` as a table, and its protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fewshot_nlp.checks import shown
from fewshot_nlp.hub.info import AdapterInfo
from fewshot_nlp.hub.markup import listed, plain


def measured_on_test(info: AdapterInfo) -> dict[str, Any]:
    """``"test"`` of ``results.json``; ``ValueError`` where that does not have its form."""
    results = info.results or {}
    test = results.get("test") or {}
    if not isinstance(test, dict):
        raise ValueError(f"results['test'] must be an object by '<k>-shot', not {type(test).__name__}.")
    for shots, entry in test.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("accuracy"), int | float):
            raise ValueError(
                f"results['test'][{shown(shots)}] must be an object with a number 'accuracy', not {shown(entry)}."
            )
        _check_form(
            f"results['test'][{shown(shots)}]", entry, {"baselines": dict, "paired_gain": dict, "paired_gains": dict}
        )
    _check_form("results", results, {"protocol": dict})
    _check_form("results['protocol']", results.get("protocol") or {}, _PROTOCOL)
    return test


_PROTOCOL = {"dataset": str, "dataset_config_name": str, "hub_id": str, "split": str, "n_way": int, "classes": list}


def _check_form(where: str, found: Mapping[str, Any], form: Mapping[str, type]) -> None:
    for name, kind in form.items():
        value = found.get(name)
        items = value if kind is list and isinstance(value, list) else []
        if value is not None and (not isinstance(value, kind) or not all(isinstance(item, str) for item in items)):
            held = "a list of strings" if kind is list else f"of type {kind.__name__}"
            raise ValueError(f"{where}[{name!r}] must be {held}, not {shown(value)}.")


def results_section(info: AdapterInfo, test: Mapping[str, Any]) -> str:
    """A table of what was measured, and how."""
    if not test:
        return "No results were recorded for this adapter."
    gains = {shots: _gains(entry) for shots, entry in test.items()}
    known = [*((entry.get("baselines") or {}) for entry in test.values()), *gains.values()]
    baselines = list(dict.fromkeys(name for names in known for name in names))
    f1 = any(_number(_metrics(entry), "macro_f1") > -math.inf for entry in test.values())
    header = ["", "this adapter", *["its macro F1"] * f1, *(plain(name.replace("_", " ")) for name in baselines)]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for shots, entry in test.items():
        others = [(entry.get("baselines") or {}).get(name) or {} for name in baselines]
        own = _percent(entry, "accuracy")
        row = [plain(shots), f"**{own}**" if _is_best(entry, gains[shots]) else own]
        row += [_percent(_metrics(entry), "macro_f1")] * f1
        row += [_percent(each, "accuracy") + _fewer(each, entry) for each in others]
        rows.append(row)
        if gains[shots]:
            over = [gains[shots].get(name) or {} for name in baselines]
            row = [f"gain, {plain(shots)}", "", *[""] * f1]
            row += [_percent(each, "mean", signed=True) + _fewer(each, entry) for each in over]
            rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    note = "Accuracy in percent, mean over episodes with its 95 % interval"
    tested = ((info.results or {}).get("protocol") or {}).get("classes") or []
    unseen = tested and info.label_names and not set(tested) & set(info.label_names)
    note += ", on classes that were not seen in training." if unseen else "."
    if any(gains.values()):
        note += " A gain, of this adapter over each of the others, is paired: on the same episodes."
    if f1:
        note += " Macro F1, in percent too, is the mean over classes, each counted alike, of all queries together."
    return f"{table}\n\n{note}{_protocol(info)}"


def _protocol(info: AdapterInfo) -> str:
    protocol = (info.results or {}).get("protocol")
    if not isinstance(protocol, dict) or not protocol:
        return ""
    lines = []
    for key, value in protocol.items():
        if value in (None, {}, []):
            continue
        if isinstance(value, dict):
            value = [f"{name} {_spelt(item)}" for name, item in value.items()]
        if isinstance(value, list):
            value = [_data_set(item) if isinstance(item, dict) else item for item in value]
        shown = listed(value, limit=200) if isinstance(value, list) else plain(str(value), limit=200)
        lines.append(f"- {plain(key.replace('_', ' '))}: {shown}")
    return "\n\nProtocol:\n\n" + "\n".join(lines)


def _gains(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Paired gains by baseline; results of one's own may know the one over prototypes alone."""
    one = entry.get("paired_gain")
    return entry.get("paired_gains") or ({"prototypes": one} if one else {})


def _is_best(entry: Mapping[str, Any], gains: Mapping[str, Any]) -> bool:
    """Whether no baseline was better on the episodes that it answered; of fewer than all, the paired gain tells."""
    leads = [
        _number(gains.get(name), "mean")
        if _fewer(other, entry)
        else _number(entry, "accuracy") - _number(other, "accuracy")
        for name, other in (entry.get("baselines") or {}).items()
    ]
    # Below zero by rounding alone is not below.
    return all(lead > -1e-9 for lead in leads)


def _metrics(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    found = entry.get("metrics")
    return found if isinstance(found, dict) else {}


def _number(entry: Any, key: str) -> float:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value if isinstance(value, int | float) else -math.inf


def _fewer(entry: Any, whole: Any) -> str:
    """On how many of the episodes, where it is not all of them."""
    count = _number(entry, "episodes")
    return f" (first {count})" if 0 < count < _number(whole, "episodes") else ""


def _percent(entry: Any, key: str, signed: bool = False) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), int | float):
        return "-"
    # Rounded first, and 0 added: what is below zero by rounding alone is not -0.00.
    text = f"{round(100 * entry[key], 2) + 0.0:{'+' if signed else ''}.2f}"
    return f"{text} ± {100 * entry['ci95']:.2f}" if isinstance(entry.get("ci95"), int | float) else text


def _spelt(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return "(" + ", ".join(f"{str(name).replace('_', ' ')} {value}" for name, value in item.items()) + ")"


def _data_set(item: Mapping[str, Any]) -> str:
    """``home_intents (de)``."""
    config_name = item.get("dataset_config_name")
    return f"{item.get('dataset')}{f' ({config_name})' if config_name else ''}"
