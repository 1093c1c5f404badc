"""Two hosts, as two network namespaces with addresses of their own: the same parameters, and the bytes on the wire.

    python recipes/benchmarks/wire.py
    python recipes/benchmarks/wire.py --lora_r 32

Needs the right to make network namespaces (root) and `ip`. Each host runs what a user would:

    GLOO_SOCKET_IFNAME=<interface> torchrun --nnodes 2 --node_rank <0 or 1> --nproc_per_node 1 \\
        --master_addr <address of the first> --master_port 29500 recipes/lora_maml.py ...

on a small random BERT, once for --steps steps and once for twice as many; the difference of the interfaces' counters
is what the additional steps have sent. A ring over n ranks sends 2 (n - 1) / n times the size of the gradient from
each: of two ranks, its size. Prints that beside what was counted, headers of packets and frames included, and how far
the parameters are from those of one process; exits with 1 if they are not the same to 1e-6.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file
from small import RECIPES, SHORT, make_empty, small_backbone

HOSTS = ("10.77.0.1", "10.77.0.2")
RANKS = len(HOSTS)


@contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Names of two namespaces that a pair of interfaces joins; they go with the block."""
    names = [f"fewshot-{os.getpid()}-{i}" for i in range(RANKS)]
    links = [f"fs{os.getpid() % 100000}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, HOSTS, strict=True):
            ip("link", "set", link, "netns", name, "name", "eth0")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: `ip {' '.join(arguments)}`: {done.stderr.strip()}. It needs root and iproute2.")
    return done.stdout


def sent(name: str) -> int:
    """Bytes that a host has sent since it came up."""
    path = "/sys/class/net/eth0/statistics/tx_bytes"
    return int(subprocess.run(["ip", "netns", "exec", name, "cat", path], capture_output=True, check=True).stdout)


def train(arguments: list[str], folder: Path, hosts: list[str]) -> list[int]:
    """Train on ``hosts``, or where there are none on one process; bytes that each of them has sent."""
    script = [str(RECIPES / "lora_maml.py"), *arguments, "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"}
    if not hosts:
        subprocess.run([sys.executable, *script], env=os.environ, check=True, stdout=subprocess.DEVNULL)
        return []
    before = [sent(name) for name in hosts]
    running = []
    for rank, name in enumerate(hosts):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(RANKS), "--node_rank", str(rank)]
        torchrun += ["--nproc_per_node", "1", "--master_addr", HOSTS[0], "--master_port", "29500"]
        command = ["ip", "netns", "exec", name, *torchrun, *script]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"error: the hosts ended with {codes}.")
    return [sent(name) - begun for name, begun in zip(hosts, before, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lora_r", type=int, default=16)
    parser.add_argument("--output_dir", type=Path, default=Path("output/wire"))
    chosen = parser.parse_args()
    make_empty(chosen.output_dir, "wire")
    out = chosen.output_dir.resolve()
    arguments = [*SHORT, "--model_name_or_path", str(small_backbone(out / "backbone")), "--lora_r", str(chosen.lora_r)]
    # One start of the schedule, whatever the length: the steps of the short run are the first of the long one.
    arguments += ["--lr_scheduler_type", "constant", "--eval_strategy", "no", "--load_best_model_at_end", "false"]
    arguments += ["--test_episodes", "0", "--save_steps", "1000000", "--logging_steps", "1000000"]
    counted: dict[int, list[int]] = {}
    with two_hosts() as hosts:
        for steps in (chosen.steps, 2 * chosen.steps):
            counted[steps] = train([*arguments, "--max_steps", str(steps)], out / f"hosts-{steps}", hosts)
    train([*arguments, "--max_steps", str(chosen.steps)], out / "alone", [])
    saved = [
        load_file(out / f / f"checkpoint-{chosen.steps}" / "params.safetensors")
        for f in ("alone", f"hosts-{chosen.steps}")
    ]
    apart = max(float((value - saved[1][name]).abs().max()) for name, value in saved[0].items())
    size = sum(value.nbytes for value in saved[0].values())
    expected = 2 * (RANKS - 1) / RANKS * size
    print("| host | bytes sent a step | size of the trained parameters x 2 (n - 1) / n | ratio |\n|---|---|---|---|")
    for host, short, long in zip(HOSTS, counted[chosen.steps], counted[2 * chosen.steps], strict=True):
        step = (long - short) / chosen.steps
        print(f"| {host} | {step:,.0f} | {expected:,.0f} | {step / expected:.3f} |")
    print(f"Largest difference of a parameter from one process after {chosen.steps} steps: {apart:.1e}")
    sys.exit(apart > 1e-6)


if __name__ == "__main__":
    main()
