"""How long planning, regularizing and undoing take on large models, and what reading costs.

    python tests/benchmarks/size.py [BLOCKS ...]      (250 and 1000 by default)

The models are transformers on the meta device, six Linears a block. Times are of this process (CPU
seconds, so that other processes do not count) without the garbage collector, as `timeit` has it:
its full collections come in jumps. One row has both jobs with it. `reg_loss` is read on real
weights (8 x 8, so that the overhead a tensor shows) against the loop that one would write by hand.
"""

from __future__ import annotations

import gc
import io
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import regwrap as rw
from regwrap import L1, L2, Dropout, WeightDecay

RULES = {
    nn.Linear: L2(1e-4),
    "blocks.*.fc1": Dropout(0.1),
    "blocks.**.norm1": None,
    "**.{q,v}": L1(1e-5),
    "head": L2(1e-5),
    "embed": WeightDecay(0.1),
}


class Block(nn.Module):
    """The six Linears and two norms of a transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)
        self.act = nn.GELU()


class Transformer(nn.Module):
    """Layers to be counted; it computes nothing."""

    def __init__(self, blocks: int, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 100)


def transformer(blocks: int) -> Transformer:
    """A model of so many blocks without any memory."""
    with torch.device("meta"):
        return Transformer(blocks)


JOBS: dict[str, Callable[[nn.Module], Any]] = {
    "plan": lambda model: rw.plan(model, RULES),
    "regularize": lambda model: rw.regularize(model, RULES),
    "policy": rw.policy,
    "rows": lambda model: rw.policy(model).rows(),
    "summary": lambda model: rw.summary(model, console=Console(file=io.StringIO())),
    "regularize again": lambda model: rw.regularize(model, RULES),
    "unregularize": rw.unregularize,
}


def seconds(job: Callable[[], Any], *, repeat: int = 1) -> float:
    """The least CPU time of the job, without the garbage collector."""
    found = []
    for _ in range(repeat):
        gc.collect()
        gc.disable()
        found.append(timed(job))
        gc.enable()
    return min(found)


def timed(job: Callable[[], Any]) -> float:
    """The CPU time of the job as it is."""
    start = time.process_time()
    job()
    return time.process_time() - start


def times(blocks: int) -> dict[str, float]:
    """CPU seconds of every job, one after another on the same model."""
    model = transformer(blocks)
    found = {name: seconds(lambda job=job: job(model)) for name, job in JOBS.items()}
    both = timed(lambda: (rw.plan(model, RULES), rw.regularize(model, RULES)))
    return found | {"plan and regularize, with gc": both}


def reading(blocks: int) -> dict[str, float]:
    """CPU seconds of one `reg_loss` and its backward, against the bare loop."""
    model = Transformer(blocks)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rw.regularize(model, {nn.Linear: L2(1e-4)})

    def loop() -> torch.Tensor:
        return sum(1e-4 / 2 * w.square().sum() for w in weights)  # type: ignore[return-value]

    def ours() -> torch.Tensor:
        return model.reg_loss  # type: ignore[no-any-return]

    jobs = {"loop": loop, "reg_loss": ours}
    forward = {f"{name}, forward": seconds(job, repeat=5) for name, job in jobs.items()}
    both = {
        f"{name}, and backward": seconds(lambda job=job: job().backward(), repeat=5)
        for name, job in jobs.items()
    }
    return forward | both


def main() -> None:
    """Prints the figures."""
    torch.set_num_threads(1)
    sizes = [int(text) for text in sys.argv[1:]] or [250, 1000]
    seconds(lambda: times(2))  # imports and first calls
    columns = [times(blocks) | reading(blocks) for blocks in sizes]
    table = Table("CPU seconds", *(f"{blocks:,} blocks" for blocks in sizes), "ratio")
    for name in columns[0]:
        row = [column[name] for column in columns]
        table.add_row(name, *(f"{value:.3f}" for value in row), f"{row[-1] / row[0]:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
