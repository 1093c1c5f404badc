"""What a run has reported, on the disk before anyone is told: one JSON object a line, never written over.

A checkpoint holds the reports up to its step. This file holds those after the last checkpoint, too, so that a run that
dies has lost none of them. A run that goes on reports the steps since its checkpoint again, at the end of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

METRICS = "metrics.jsonl"

Report = dict[str, float]


def append_report(output_dir: str | Path, report: Report) -> None:
    """Add one line and see it to the disk.

    Raises:
        OSError: a disk that is full or cannot be written, or a link in place of the file.
    """
    path = Path(output_dir) / METRICS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0, opener=_no_link) as file:
            # A process that was killed, or a disk that was full, may have left half a line.
            start = b"\n" if file.tell() and not _ends_a_line(path) else b""
            line = start + json.dumps(report).encode() + b"\n"
            if file.write(line) != len(line):
                raise OSError("the disk took a part of the line alone")
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            f"{path} cannot be written: {error.strerror or error}. All reports before step {report.get('step')} are in "
            f"it. Free some space, or see that the folder can be written, then go on with resume_from_checkpoint: true."
        ) from error


def start_reports(output_dir: str | Path, history: Sequence[Report] = ()) -> None:
    """Forget the reports of another run; ``history`` are those of a run that goes on in a folder without any."""
    path = Path(output_dir) / METRICS
    if not history:
        path.unlink(missing_ok=True)
    elif not path.exists():
        for report in history:
            append_report(output_dir, report)


def read_reports(output_dir: str | Path) -> list[Report]:
    """What the run in ``output_dir`` has reported, by step: of the same report made twice, the later one.

    Raises:
        FileNotFoundError: there is no ``metrics.jsonl``, as where ``save_strategy`` is ``no``.
    """
    found: dict[tuple[float, frozenset[str]], Report] = {}
    for line in (Path(output_dir) / METRICS).read_bytes().splitlines():
        try:
            report = json.loads(line)
        except ValueError:
            continue  # The half of a line on which the process was killed.
        if isinstance(report, dict) and "step" in report:
            found[report["step"], frozenset(report)] = report
    return sorted(found.values(), key=lambda report: report["step"])


def _no_link(path: str, flags: int) -> int:
    """Opens a file that is no link, by which a folder of somebody else's could have another file written to."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
