"""What inserted dropouts cost, and how long it takes to find their places.

    python tests/benchmarks/dropout.py [--repeats 300] [--threads 1]

Side by side in one process, in turn, by processor time; a figure is the ratio of the two medians.
Training (forward and backward) stands beside a twin whose author wrote the same dropouts, eval
beside the plain model. The rows of a hook stand beside a hook that does nothing, too: its cost is
PyTorch's own. Analysis is `plan` with a Dropout on every Linear, of code that was not read before.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regwrap as rw
from regwrap import Dropout
from regwrap.graph import owner, source

sys.path.append(str(Path(__file__).parents[1]))

RATE = 0.1


class Layer(nn.Module):
    """One layer of an MLP; `drop` is what the author of the twin wrote."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.fc(x))


class DroppedLayer(Layer):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.drop = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.fc(x)))


class Block(nn.Module):
    """A transformer's block: six Linears, before each other's norms."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = self.split(self.q(h)), self.split(self.k(h)), self.split(self.v(h))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class DroppedBlock(Block):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__(width, heads)
        self.drop = nn.Dropout(RATE)

    def forward(self, x: Tensor) -> Tensor:
        h, drop = self.norm1(x), self.drop
        q, k, v = drop(self.q(h)), drop(self.k(h)), drop(self.v(h))
        q, k, v = self.split(q), self.split(k), self.split(v)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + drop(self.o(h.transpose(1, 2).flatten(2)))
        return x + drop(self.fc2(F.gelu(drop(self.fc1(self.norm2(x))))))


def stack(block: Callable[[int], nn.Module], depth: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(block(width) for _ in range(depth)))


def stock(dropped: bool = False) -> nn.Module:
    """The MLP as a Sequential of torch's own layers, whose body is nobody's to rewrite."""
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(20):
        drop = [nn.Dropout(RATE)] if dropped else []
        made += [nn.Linear(64, 64), *drop, nn.ReLU()]
    return nn.Sequential(*made)


def regularized(model: nn.Module, mechanism: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rw.RegwrapWarning)  # the last layer is named by nobody
        rw.regularize(model, Dropout(RATE))
    found = {row["mechanism"] for row in rw.policy(model).rows() if row["term"]}
    assert found == {mechanism}, found
    return model


def hook_of_nothing(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda *_: None)
    return model


MLP, GPT = (lambda b: stack(b, 20, 64)), (lambda b: stack(b, 4, 128))
MODELS: dict[str, dict[str, Any]] = {
    "MLP 20 x 64, fx": {
        "x": (32, 64),
        "plain": lambda: MLP(Layer),
        "twin": lambda: MLP(DroppedLayer),
        "ours": lambda: regularized(MLP(Layer), "fx"),
        "limits": (1.05, 1.05),
    },
    "transformer 4 x 128, fx": {
        "x": (8, 64, 128),
        "plain": lambda: GPT(Block),
        "twin": lambda: GPT(DroppedBlock),
        "ours": lambda: regularized(GPT(Block), "fx"),
        "limits": (1.05, 1.05),
    },
    "MLP 20 x 64, hook": {
        "x": (32, 64),
        "plain": stock,
        "twin": lambda: stock(dropped=True),
        "ours": lambda: regularized(stock(), "hook"),
        "nothing": lambda: hook_of_nothing(stock()),
        "limits": (1.05, 1.30),
    },
}


def step(model: nn.Module, x: Tensor) -> None:
    model(x).sum().backward()


def inference(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def medians(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Milliseconds of processor time by name, all taken in turn."""
    for run in runs.values():
        run(), run(), run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    gc.disable()
    for turn in range(repeats):
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            start = time.process_time()
            runs[name]()
            times[name].append(time.process_time() - start)
    gc.enable()
    return {name: statistics.median(found) * 1e3 for name, found in times.items()}


def cost(case: dict[str, Any], repeats: int) -> dict[str, float]:
    """The ratio of ours to the twin in training, of ours and of an idle hook to plain in eval."""
    x = torch.randn(case["x"])
    kinds = [kind for kind in ("plain", "twin", "ours", "nothing") if kind in case]
    models = {kind: case[kind]() for kind in kinds}
    train = medians({k: lambda m=m: step(m.train(), x) for k, m in models.items()}, repeats)
    for model in models.values():
        model.eval()
    still = medians({k: lambda m=m: inference(m, x) for k, m in models.items()}, repeats)
    ratios = {"training": train["ours"] / train["twin"], "eval": still["ours"] / still["plain"]}
    return ratios | ({"idle": still["nothing"] / still["plain"]} if "nothing" in still else {})


def seconds(job: Callable[[], Any]) -> float:
    """Processor time of a job on code that nobody read before, without the garbage collector."""
    owner.FACTS.clear()
    source.proved.cache_clear()
    gc.collect()
    gc.disable()
    start = time.process_time()
    job()
    gc.enable()
    return time.process_time() - start


def blocks(count: int) -> float:
    with torch.device("meta"):
        model = stack(Block, count, 8)
    return seconds(lambda: rw.plan(model, Dropout(RATE)))


def architectures() -> tuple[int, float]:
    """How many there are, and how long the plans of all of them take."""
    from hf_zoo import HF_ZOO
    from transformers.utils import logging

    logging.set_verbosity_error()  # configurations this small have tokens beyond their vocabulary
    models = [make()[0] for make in HF_ZOO.values()]
    return len(models), seconds(lambda: [rw.plan(model, Dropout(RATE)) for model in models])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    print(f"{'':26}training: to a twin   limit   eval: to plain   limit   an idle hook")
    for name, case in MODELS.items():
        found, (train, still) = cost(case, args.repeats), case["limits"]
        idle = f"{found['idle']:15.2f}" if "idle" in found else ""
        print(
            f"{name:26}{found['training']:19.3f}{train:8.2f}{found['eval']:17.3f}{still:8.2f}{idle}",
            flush=True,
        )
    for count in (250, 500, 1000):
        print(
            f"analysis of {count:5,} blocks: {blocks(count):6.2f} s, limit for 1,000: 5", flush=True
        )
    print("analysis of {} architectures: {:.1f} s (limit for 60: 60)".format(*architectures()))


if __name__ == "__main__":
    main()
