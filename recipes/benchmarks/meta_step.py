"""One exact second-order MAML step: seconds, memory and gradient error beside a plain loop, higher and TorchOpt.

    python recipes/benchmarks/meta_step.py
    python recipes/benchmarks/meta_step.py --lengths real --data_file <a jsonl with "text"> --json output/meta_step.json
    python recipes/benchmarks/meta_step.py --device cuda --tasks 16

4 tasks of 25 support and 25 query sentences, 5 inner steps of gradient descent, on the shape of all-MiniLM-L6-v2 (BERT,
6 layers, 384 wide; random weights, which cost what others do), in three settings: LoRA of rank 8 on query and value of
all layers, of the top third of the layers, and full fine-tuning. Contenders take turns, so that noise falls on all
alike (`contenders.py`); the first turn warms up and is not counted. Prints a table and writes JSON:

- seconds: median over the turns; and the ratio to the plain loop, median of the ratios turn by turn.
- memory: peak resident memory above the idle model, each contender in a process of its own; on a GPU, peak of its
  allocated memory.
- error: norm of the difference to the gradient in float64, over its norm; and the relative error of the norm alone.
- share: floating-point operations of the products that the step cannot do without, over those that the machine does in
  that time in one large product of the same precision.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from contenders import CONTENDERS, SETTINGS, STEPS, CannotTake, Gradient, build_episodes, device_of, plain_loop
from torch import Tensor

from fewshot_nlp.functional.memory import forget_peak, peak, resident
from fewshot_nlp.types import Episode


@dataclass
class Row:
    """One contender in one setting."""

    setting: str
    contender: str
    seconds: float | None = None
    speedup: float | None = None
    memory_mb: float | None = None
    error: float | None = None
    norm_error: float | None = None
    share: float | None = None
    note: str = ""


def peak_mb(setting: str, contender: str, where: list[str]) -> float:
    """Peak resident memory above the idle model of one gradient, in a process of its own."""
    command = [sys.executable, __file__, "--measure_memory", setting, contender, *where]
    return float(subprocess.run(command, capture_output=True, check=True, text=True).stdout.split()[-1])


def measure_memory(setting: str, contender: str, episodes: list[Episode]) -> None:
    print(peak_of(CONTENDERS[contender](setting, episodes, torch.float32), "cpu"))


def peak_of(gradient: Gradient, device: str) -> float:
    idle = resident(device)
    gradient()
    return (peak(device) - idle) / 2**20


def synchronized() -> float:
    """The time, once the device has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large product."""
    m, n, k = (2048, 1536, 2048) if device == "cpu" else (8192, 8192, 8192)
    a, b = torch.randn(m, n, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    times = []
    for _ in range(12):
        start = synchronized()
        a @ b
        times.append(synchronized() - start)
    return 2 * m * n * k / median(times)


def useful_operations(setting: str, episodes: list[Episode]) -> float:
    """Of the frozen matrices' products, on real tokens: four a layer and step (forward, backward, and both of them
    differentiated) and two for the query; below the first adapter one for each sentence; thrice the backward where the
    matrices themselves are differentiated. None for the first step, which from a head of zeros moves the head alone, on
    the features of the second."""
    per_layer = 2 * 12 * 384**2
    total = 0.0
    for episode in episodes:
        support, query = (int(b.inputs["attention_mask"].sum()) for b in (episode.support, episode.query))
        trained, below = {"lora": (6, 0), "lora_top": (2, 4), "full": (6, 0)}[setting]
        step, last = (4, 2) if setting != "full" else (9, 3)
        total += per_layer * (trained * (step * (STEPS - 1) * support + last * query) + below * (support + query))
    return total


def run(episodes: list[Episode], turns: int, settings: list[str], contenders: list[str], where: list[str]) -> list[Row]:
    device = device_of(episodes).type
    full, half = (product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    rows = list[Row]()
    on = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"one large product: {full / 1e9:.0f} GFLOP/s, in bfloat16 {half / 1e9:.0f}, on {on}", flush=True)
    for setting in settings:
        exact = plain_loop(setting, episodes, torch.float64)()
        norm = torch.sqrt(sum(value.square().sum() for value in exact.values()))
        ready: dict[str, Gradient] = {}
        for name in contenders:
            row = Row(SETTINGS[setting], name)
            rows.append(row)
            try:
                ready[name] = CONTENDERS[name](setting, episodes, torch.float32)
            except (ImportError, CannotTake) as error:
                row.note = str(error)
        times: dict[str, list[float]] = {name: [] for name in ready}
        found: dict[str, dict[str, Tensor]] = {}
        for turn in range(turns + 1):
            for name, gradient in ready.items():
                start = synchronized()
                found[name] = gradient()
                if turn:
                    times[name].append(synchronized() - start)
        for row in rows[-len(contenders) :]:
            if row.contender not in ready:
                continue
            own = times[row.contender]
            row.seconds = median(own)
            row.speedup = median(a / b for a, b in zip(times["plain loop"], own, strict=True))
            grads = found[row.contender]
            assert grads.keys() == exact.keys(), grads.keys() ^ exact.keys()
            row.error = float(torch.sqrt(sum((grads[n] - v).square().sum() for n, v in exact.items())) / norm)
            row.norm_error = abs(float(torch.sqrt(sum(value.square().sum() for value in grads.values())) / norm) - 1)
            rate = half if "bfloat16" in row.contender else full
            row.share = useful_operations(setting, episodes) / row.seconds / rate
            if device == "cpu":
                row.memory_mb = peak_mb(setting, row.contender, where)
            else:
                forget_peak(device)
                row.memory_mb = peak_of(ready[row.contender], device)
            print(f"{row.setting}, {row.contender}: {row.seconds:.2f} s, {row.speedup:.2f}x", flush=True)
    return rows


def real_lengths(path: Path, count: int = 200) -> list[int]:
    """Token counts of the first ``count`` texts of a jsonl file, by the tokenizer of the default backbone."""
    from fewshot_nlp.models import load_backbone

    _, tokenizer = load_backbone("sentence-transformers/all-MiniLM-L6-v2")
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
    return [min(len(ids), 48) for ids in tokenizer(texts)["input_ids"]]


def table(rows: list[Row]) -> str:
    lines = [
        "| setting | contender | seconds | times the plain loop's speed | memory, MB | error | of its norm | share |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        if row.seconds is None:
            lines.append(f"| {row.setting} | {row.contender} | {row.note} | | | | | |")
            continue
        numbers = (
            f"{row.seconds:.2f}",
            f"{row.speedup:.2f}",
            f"{row.memory_mb:,.0f}",
            f"{row.error:.1e}",
            f"{row.norm_error:.1e}",
            f"{row.share:.0%}",
        )
        lines.append(f"| {row.setting} | {row.contender} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", choices=("equal", "real"), default="equal", help="16 tokens each, or as in a file")
    parser.add_argument("--data_file", type=Path, help="jsonl with a text a line, for --lengths real")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=Path("output/meta_step.json"))
    parser.add_argument("--measure_memory", nargs=2, metavar=("SETTING", "CONTENDER"), help=argparse.SUPPRESS)
    parser.add_argument("--token_lengths", nargs="+", type=int, default=[16], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.measure_memory:
        episodes = build_episodes(chosen.token_lengths, chosen.tasks, chosen.device)
        return measure_memory(*chosen.measure_memory, episodes)
    if chosen.lengths == "real" and chosen.data_file is None:
        parser.error("--lengths real needs --data_file, a jsonl file with a text a line")
    lengths = [16] if chosen.lengths == "equal" else real_lengths(chosen.data_file)
    # All are compared to the plain loop.
    contenders = list(dict.fromkeys(["plain loop", *chosen.contenders]))
    where = ["--tasks", str(chosen.tasks), "--token_lengths", *map(str, lengths)]
    episodes = build_episodes(lengths, chosen.tasks, chosen.device)
    rows = run(episodes, chosen.turns, chosen.settings, contenders, where)
    print("\n" + table(rows))
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
