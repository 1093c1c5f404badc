"""One exact second-order MAML step: seconds, memory and gradient error beside a plain loop, higher and TorchOpt.

    python recipes/benchmarks/meta_step.py
    python recipes/benchmarks/meta_step.py --lengths real --data_file <a jsonl with "text"> --json output/meta_step.json
    python recipes/benchmarks/meta_step.py --device cuda --tasks 16

4 tasks of 25 support and 25 query sentences, 5 inner steps of gradient descent, on the shape of all-MiniLM-L6-v2 (BERT,
6 layers, 384 wide; random weights, which cost what others do), in three settings: LoRA of rank 8 on query and value of
all layers, of the top third of the layers, and full fine-tuning. Contenders take turns, so that noise falls on all
alike; the first turn warms up and is not counted. Prints a table and writes JSON:

- seconds: median over the turns; and the ratio to the plain loop, median of the ratios turn by turn.
- memory: peak resident memory above the idle model, each contender in a process of its own; on a GPU, peak of its
  allocated memory.
- error: norm of the difference to the gradient in float64, over its norm; and the relative error of the norm alone.
- share: floating-point operations of the products that the step cannot do without, over those that the machine does in
  that time in one large product.

The plain loop is what learn2learn does: transformers' eager attention, `torch.func.functional_call`,
`torch.autograd.grad(create_graph=True)`. higher and TorchOpt take a module whose every weight is adapted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertModel

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.memory import forget_peak, peak, resident
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.backbone import ATTENTION
from fewshot_nlp.types import Batch, Episode, EpisodeSpec

N_WAY, SHOTS, STEPS, RATE, SCALE = 5, 5, 5, 0.05, 10.0
SETTINGS = {
    "lora": "LoRA, all layers",
    "lora_top": "LoRA, top third of the layers",
    "full": "full fine-tuning",
}


def build_module(setting: str, attention: str, device: torch.device) -> Any:
    """A random BERT of MiniLM's shape, the same one for every contender."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, hidden_act="gelu"
    )
    config._attn_implementation = attention
    # Drawn on the CPU, where random numbers are the same for every device.
    module = BertModel(config, add_pooling_layer=False).eval()
    if setting == "full":
        return module.requires_grad_(True).to(device)
    layers = [4, 5] if setting == "lora_top" else None
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], layers_to_transform=layers, init_lora_weights=False
    )
    return get_peft_model(module.requires_grad_(False), lora).eval().to(device)


def build_episodes(lengths: list[int], tasks: int, device: str) -> list[Episode]:
    """Tasks whose sentences have the given numbers of tokens, in turn."""
    rng = torch.Generator().manual_seed(1)
    endless = iter(lengths * 1000)

    def batch() -> Batch:
        labels = torch.arange(N_WAY).repeat_interleave(SHOTS)
        own = torch.tensor([next(endless) for _ in labels])
        mask = (torch.arange(int(own.max()))[None] < own[:, None]).long()
        ids = torch.randint(1000, 30000, mask.shape, generator=rng) * mask
        return Batch({"input_ids": ids, "attention_mask": mask}, labels, N_WAY)

    specs = [EpisodeSpec("train", i, "random", tuple("abcde"), (), ()) for i in range(tasks)]
    return [Episode(spec, batch(), batch()).to(device) for spec in specs]


def device_of(episodes: list[Episode]) -> torch.device:
    return episodes[0].query.labels.device


Gradient = Callable[[], dict[str, Tensor]]


def ours(
    setting: str,
    episodes: list[Episode],
    dtype: torch.dtype,
    graph_memory_gb: float | None = None,
    frozen_dtype: str = "float32",
    seen: bool = False,
    stacking: bool | None = None,
) -> Gradient:
    """This package's learner; the gradient by name without the prefix ``model.``. ``seen``: the texts were trained or
    evaluated on before, so that what the layers below the first adapter make of them is known."""
    if stacking is False and graph_memory_gb is None and device_of(episodes).type == "cpu":
        raise CannotTake("on a CPU, tasks of this size are in no stack")
    if setting == "full" and frozen_dtype != "float32":
        raise CannotTake("nothing is frozen")
    if setting != "lora_top" and seen:
        raise CannotTake("the lowest layer is trained")
    config = FewShotConfig(
        learner="maml", head="linear", head_init="zero", inner_steps=STEPS, inner_learning_rate=RATE, head_scale=SCALE,
        frozen_dtype=frozen_dtype, graph_memory_gb=graph_memory_gb,
    )  # fmt: skip
    module = build_module(setting, ATTENTION, device_of(episodes)).to(dtype)
    learner = build_learner(config, FewShotModel(module, None, config))
    learner.stacking = stacking
    params = {name: value.to(dtype) for name, value in learner.init_params().items()}

    def gradient() -> dict[str, Tensor]:
        if learner.model.trunk is not None and not seen:
            learner.model.trunk.forget()
        grads = learner.meta_grad(params, episodes).grads
        return {name.removeprefix("model."): grad for name, grad in grads.items() if name.startswith("model.")}

    return gradient


def loss_of(forward: Callable[..., Any], head: list[Tensor], batch: Batch) -> Tensor:
    hidden = forward(**batch.inputs).last_hidden_state
    mask = batch.inputs["attention_mask"][..., None].to(hidden.dtype)
    features = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return cross_entropy(SCALE * (features @ head[0].T + head[1]), batch.labels)


def new_head(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return [torch.zeros(*shape, dtype=dtype, device=device).requires_grad_() for shape in ((N_WAY, 384), (N_WAY,))]


def plain_loop(setting: str, episodes: list[Episode], dtype: torch.dtype) -> Gradient:
    """The whole inner loop in one graph."""
    module = build_module(setting, "eager", device_of(episodes)).to(dtype)
    names = [name for name, value in module.named_parameters() if value.requires_grad]
    start = [dict(module.named_parameters())[name] for name in names]

    def gradient() -> dict[str, Tensor]:
        total = [torch.zeros_like(value) for value in start]
        for episode in episodes:
            body, head = start, new_head(dtype, device_of(episodes))
            for _ in range(STEPS):
                call = partial(functional_call, module, dict(zip(names, body, strict=True)))
                loss = loss_of(lambda call=call, **inputs: call(args=(), kwargs=inputs), head, episode.support)
                grads = torch.autograd.grad(loss, [*body, *head], create_graph=True)
                body = [value - RATE * grad for value, grad in zip(body, grads[: len(body)], strict=True)]
                head = [value - RATE * grad for value, grad in zip(head, grads[len(body) :], strict=True)]
            call = partial(functional_call, module, dict(zip(names, body, strict=True)))
            loss = loss_of(lambda call=call, **inputs: call(args=(), kwargs=inputs), head, episode.query)
            for sum_, grad in zip(total, torch.autograd.grad(loss, start), strict=True):
                sum_ += grad
        return dict(zip(names, total, strict=True))

    return gradient


class CannotTake(Exception):
    """Why a library has no answer in a setting; it stands in the table."""


class WithHead(torch.nn.Module):
    """Backbone and head in one module, as higher and TorchOpt want them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        own = next(module.parameters())
        self.weight, self.bias = (torch.nn.Parameter(value.detach()) for value in new_head(own.dtype, own.device))

    def forward(self, batch: Batch) -> Tensor:
        return loss_of(self.module, [self.weight, self.bias], batch)


def by_higher(setting: str, episodes: list[Episode], dtype: torch.dtype) -> Gradient:
    import higher

    if setting != "full":
        raise CannotTake("cannot take a PEFT model")
    model = WithHead(build_module(setting, "eager", device_of(episodes))).to(dtype)

    def gradient() -> dict[str, Tensor]:
        model.zero_grad()
        for episode in episodes:
            optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
            with higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (fast, inner):
                for _ in range(STEPS):
                    inner.step(fast(episode.support))
                fast(episode.query).backward()
        return {name: value.grad.clone() for name, value in model.module.named_parameters()}

    return gradient


def by_torchopt(setting: str, episodes: list[Episode], dtype: torch.dtype) -> Gradient:
    import torchopt

    if setting != "full":
        raise CannotTake("MetaSGD fails on frozen parameters")
    model = WithHead(build_module(setting, "eager", device_of(episodes))).to(dtype)
    names = [name for name, _ in model.module.named_parameters()]
    start = list(model.module.parameters())

    def gradient() -> dict[str, Tensor]:
        total = [torch.zeros_like(value) for value in start]
        for episode in episodes:
            optimiser = torchopt.MetaSGD(model, lr=RATE)
            before = torchopt.extract_state_dict(model, by="reference")
            for _ in range(STEPS):
                optimiser.step(model(episode.support))
            grads = torch.autograd.grad(model(episode.query), start)
            for sum_, grad in zip(total, grads, strict=True):
                sum_ += grad
            torchopt.recover_state_dict(model, before)
        return dict(zip(names, total, strict=True))

    return gradient


CONTENDERS: dict[str, Callable[..., Gradient]] = {
    "plain loop": plain_loop,
    "fewshot_nlp": ours,
    "fewshot_nlp, step by step": partial(ours, graph_memory_gb=0.0, stacking=False),
    "fewshot_nlp, one task at a time": partial(ours, stacking=False),
    "fewshot_nlp, texts seen before": partial(ours, seen=True),
    "fewshot_nlp, bfloat16": partial(ours, frozen_dtype="bfloat16"),
    "higher": by_higher,
    "TorchOpt": by_torchopt,
}


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


def product_rate(device: str) -> float:
    """Floating-point operations a second of a large product in float32."""
    m, n, k = (2048, 1536, 2048) if device == "cpu" else (8192, 8192, 8192)
    a, b = torch.randn(m, n, device=device), torch.randn(n, k, device=device)
    times = []
    for _ in range(12):
        start = synchronized()
        a @ b
        times.append(synchronized() - start)
    return 2 * m * n * k / median(times)


def useful_operations(setting: str, episodes: list[Episode]) -> float:
    """Of the frozen matrices' products, on real tokens: four a layer and step (forward, backward, and both of them
    differentiated) and two for the query; below the first adapter one for each sentence; thrice the backward where the
    matrices themselves are differentiated."""
    per_layer = 2 * 12 * 384**2
    total = 0.0
    for episode in episodes:
        support, query = (int(b.inputs["attention_mask"].sum()) for b in (episode.support, episode.query))
        trained, below = {"lora": (6, 0), "lora_top": (2, 4), "full": (6, 0)}[setting]
        step, last = (4, 2) if setting != "full" else (9, 3)
        total += per_layer * (trained * (step * STEPS * support + last * query) + below * (support + query))
    return total


def run(episodes: list[Episode], turns: int, settings: list[str], contenders: list[str], where: list[str]) -> list[Row]:
    device = device_of(episodes).type
    rate, rows = product_rate(device), list[Row]()
    on = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"one large product: {rate / 1e9:.0f} GFLOP/s on {on}", flush=True)
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
