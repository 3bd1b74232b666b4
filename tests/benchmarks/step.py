"""What a training step grows by, relative to what the textbook penalty in the loss adds.

    python tests/benchmarks/step.py [--repeats 15] [--threads 1] [--sizes 1M 10M ...]

A step here is: fresh data gradients, `optimizer.step()`. The textbook adds
`sum(s * p.abs().sum())` or `sum(s / 2 * p.pow(2).sum())`, its backward included, between the two;
`attach` adds its work to the step; the optimizer's own `weight_decay` stands beside an L2. All are
timed in turn in one process, by processor time, and what is added is the median over turns of the
difference to the plain step of the same turn. `attach / textbook` is what is bounded by `limit`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import SGD, AdamW

import regwrap as rw

STRENGTH = 1e-6
LIMITS = {
    "SGD": {"L2": [0.5] * 3, "L1": [0.7] * 3},
    "AdamW": {"L2": [0.5] * 3, "L1": [0.8, 1.4, 1]},
}


def resnet50() -> list[tuple[int, ...]]:
    """The 161 shapes of ResNet-50's weights, without importing torchvision: 25.6M elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convs = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convs += [(4 * width, inputs, 1, 1)] if block == 0 else []
            for conv in convs:
                shapes += [conv, conv[:1], conv[:1]]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SIZES: dict[str, list[tuple[int, ...]]] = {
    "1M in 1,000": [(1000,)] * 1000,
    "10M in 10": [(1_000_000,)] * 10,
    "25M in ResNet-50": resnet50(),
}


class Model(nn.Module):
    def __init__(self, shapes: list[tuple[int, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ws = nn.ParameterList(torch.randn(s) * 0.1 for s in shapes)


Loss = Callable[[Model], torch.Tensor]
TEXTBOOK: dict[str, Loss] = {
    "L1": lambda m: sum(STRENGTH * p.abs().sum() for p in m.ws),  # type: ignore[misc, return-value]
    "L2": lambda m: sum(STRENGTH / 2 * p.pow(2).sum() for p in m.ws),  # type: ignore[misc, return-value]
}
TERMS = {"L1": rw.L1(STRENGTH, on="all"), "L2": rw.L2(STRENGTH, on="all")}
OPTIMIZERS = {"SGD": SGD, "AdamW": AdamW}


def steps(name: str, term: str, shapes: list[tuple[int, ...]]) -> dict[str, Callable[[], float]]:
    """Timed steps by what is added to them."""
    make = OPTIMIZERS[name]

    def timed(model: Model, optimizer: Any, loss: Loss | None = None) -> Callable[[], float]:
        data = [torch.randn_like(p) for p in model.ws]

        def step() -> float:
            for p, g in zip(model.ws, data, strict=True):
                p.grad = g.clone()
            start = time.process_time()
            if loss is not None:
                loss(model).backward()
            optimizer.step()
            return time.process_time() - start

        return step

    def fresh(decay: float = 0) -> tuple[Model, Any]:
        model = Model(shapes)
        return model, make(model.parameters(), lr=1e-3, weight_decay=decay)

    carried, optimizer = fresh()
    rw.regularize(carried, TERMS[term])
    attachment = rw.attach(carried, optimizer)
    made = {
        "plain": timed(*fresh()),
        "textbook": timed(*fresh(), loss=TEXTBOOK[term]),
        "attach": timed(carried, optimizer),
        "own": timed(*fresh(decay=STRENGTH)),
    }
    made["attach"].__dict__["kept"] = attachment
    return made


def measure(name: str, term: str, size: str, repeats: int) -> dict[str, float]:
    """Milliseconds of the plain step, and what each of the others adds to it."""
    runs = steps(name, term, SIZES[size])
    for run in runs.values():
        run(), run()
    turns = [{what: run() for what, run in runs.items()} for _ in range(repeats)]
    added = {w: statistics.median(t[w] - t["plain"] for t in turns) for w in runs if w != "plain"}
    plain = statistics.median(turn["plain"] for turn in turns)
    return {what: seconds * 1e3 for what, seconds in {"plain": plain, **added}.items()}


def row(term: str, found: dict[str, float], limit: float) -> list[str]:
    ratio = found["attach"] / found["textbook"]
    own = found["own"] / found["textbook"]
    grows = [
        f"{found[what]:.2f} (+{100 * found[what] / found['plain']:.0f}%)"
        for what in ("textbook", "attach")
    ]
    verdict = "yes" if ratio <= limit else "NO"
    decay = f"{own:.2f}" if term == "L2" else ""
    return [f"{found['plain']:.2f}", *grows, f"{ratio:.2f}", f"{limit:.1f}", verdict, decay]


HEADS = (
    "plain step\nms",
    "textbook adds\nms",
    "attach adds\nms",
    "attach /\ntextbook",
    "limit",
    "within",
    "own weight_decay /\ntextbook",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", nargs="*", default=[""], help="beginnings, such as 1M")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table(title=f"what a step grows by, median of {args.repeats}, {args.threads} thread(s)")
    for head in ("optimizer", "term", "parameters"):
        table.add_column(head)
    for head in HEADS:
        table.add_column(head, justify="right")
    for name, limits in LIMITS.items():
        for term, bounds in limits.items():
            for size, bound in zip(SIZES, bounds, strict=True):
                if size.startswith(tuple(args.sizes)):
                    found = measure(name, term, size, args.repeats)
                    table.add_row(name, term, size, *row(term, found, bound))
            table.add_section()
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
