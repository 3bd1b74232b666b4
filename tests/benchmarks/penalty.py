"""What a penalty costs beside the loop that one would write by hand, forward and backward.

    python tests/benchmarks/penalty.py [--quick]

The two take turns in one process, so that what else the machine does hits both. A figure is the
median over all turns of the ratio regwrap / loop, in brackets the ratio of the two least times.
"gradients kept" adds to gradients that exist already; otherwise they are None, as `zero_grad`
leaves them. Memory is what PyTorch allocates beyond weights and gradients that were there before.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from regwrap.fastpath import penalty_sum

Shape = tuple[int, ...]
Penalty = Callable[[Sequence[Tensor]], Tensor]


def resnet50() -> list[Shape]:
    """The 161 parameters of torchvision's ResNet-50: 25,557,032 elements."""
    convolutions: list[Shape] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [
                (width, channels, 1, 1),
                (width, width, 3, 3),
                (4 * width, width, 1, 1),
            ]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            channels = 4 * width
    norms = [[shape, shape[:1], shape[:1]] for shape in convolutions]
    return [*itertools.chain(*norms), (1000, 2048), (1000,)]


def gpt2(width: int) -> list[Shape]:
    """GPT-2's 148 parameters in another width: 11,000 elements a unit of it, and its square."""
    w = width
    norm: list[Shape] = [(w,), (w,)]
    attention: list[Shape] = [(w, 3 * w), (3 * w,), (w, w), (w,)]
    mlp: list[Shape] = [(w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(10_000, w), (1024, w), *[*norm, *attention, *norm, *mlp] * 12, *norm]


CASES: dict[str, list[Shape]] = {
    "1M in 1,000": [(25, 40)] * 1000,
    "10M in 10": [(1000, 1000)] * 10,
    "ResNet-50: 25M in 161": resnet50(),
    "1,000 of 16": [(16,)] * 1000,
}


def by_hand(l1: float, l2: float) -> Penalty:
    """The textbook loop."""
    if not l2:
        return lambda ws: sum(l1 * w.abs().sum() for w in ws)  # type: ignore[return-value]
    if not l1:
        return lambda ws: sum(l2 / 2 * w.pow(2).sum() for w in ws)  # type: ignore[return-value]
    return lambda ws: sum(l1 * w.abs().sum() + l2 / 2 * w.pow(2).sum() for w in ws)  # type: ignore[return-value]


def fast(l1: float, l2: float) -> Penalty:
    """The same by the fast path."""
    return lambda ws: penalty_sum(ws, [l1] * len(ws), [l2] * len(ws))


STRENGTHS = {"L1": (1e-4, 0.0), "L2": (0.0, 1e-4), "ElasticNet": (1e-4, 1e-4)}


def weights(shapes: Sequence[Shape], *, kept: bool) -> list[Tensor]:
    """Seeded parameters, with gradients of zeros or with none."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator).mul_(0.02).requires_grad_() for s in shapes]
    for w in made:
        w.grad = torch.zeros_like(w) if kept else None
    return made


# ---- times -----------------------------------------------------------------------------------


def seconds(job: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def taking_turns(jobs: Sequence[Callable[[], Any]], turns: int) -> list[list[float]]:
    """Seconds of each job in each turn; the first two turns warm up."""
    found = [[seconds(job) for job in jobs] for _ in range(turns + 2)][2:]
    return [list(column) for column in zip(*found, strict=True)]


class Ratio(NamedTuple):
    """Of regwrap's times to the loop's."""

    median: float
    least: float


def ratio(shapes: Sequence[Shape], strengths: tuple[float, float], kept: bool, turns: int) -> Ratio:
    """Forward and backward, beside each other."""
    ws = weights(shapes, kept=kept)

    def job(penalty: Penalty) -> float:
        for w in ws if not kept else ():
            w.grad = None
        return seconds(lambda: penalty(ws).backward())  # type: ignore[no-untyped-call]

    pairs = [(job(by_hand(*strengths)), job(fast(*strengths))) for _ in range(turns + 2)][2:]
    loop, ours = zip(*pairs, strict=True)
    return Ratio(statistics.median(b / a for a, b in pairs), min(ours) / min(loop))


def print_times(console: Console, quick: bool) -> None:
    """The table of ratios, and their geometric mean over L1 and L2."""
    table = Table("forward + backward", "threads", "gradients", *STRENGTHS, title="times")
    logs = []
    for threads, kept in itertools.product((1, 2), (False, True)):
        torch.set_num_threads(threads)
        for name, shapes in CASES.items():
            turns = 5 if quick else 15 if sum(map(math.prod, shapes)) > 2e6 else 45
            found = [ratio(shapes, s, kept, turns) for s in STRENGTHS.values()]
            logs += [math.log(r.median) for r in found[:2]]
            cells = [f"{r.median:.2f} ({r.least:.2f})" for r in found]
            table.add_row(name, str(threads), "kept" if kept else "None", *cells)
    console.print(table)
    console.print(f"geometric mean of L1 and L2: {math.exp(statistics.mean(logs)):.2f}")


# ---- operations and memory, the same on every machine ------------------------------------------


class Operations(TorchDispatchMode):
    """Counts dispatched operations, without views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **kwargs or {})


def operations(job: Callable[[], Any]) -> int:
    """How many the job dispatches."""
    with Operations() as seen:
        job()
    return seen.count


def peak(job: Callable[[], Any]) -> int:
    """The most bytes that the job holds at a time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        job()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def footprint(shapes: Sequence[Shape], penalty: Penalty, *, kept: bool) -> tuple[int, int]:
    """Operations, and bytes held at the peak, of forward and backward."""
    job = lambda: penalty(weights_).backward()  # type: ignore[no-untyped-call]  # noqa: E731
    weights_ = weights(shapes, kept=kept)
    count = operations(job)
    weights_ = weights(shapes, kept=kept)
    return count, peak(job)


def print_footprints(console: Console) -> None:
    """The loop's figures, and regwrap's."""
    table = Table("loop -> regwrap", "gradients", title="operations, and peak memory in MB")
    for name in STRENGTHS:
        table.add_column(name)
    for (name, shapes), kept in itertools.product(
        {**CASES, "GPT-2, 384 wide: 26M in 148": gpt2(384)}.items(), (False, True)
    ):
        cells = []
        for strengths in STRENGTHS.values():
            before = footprint(shapes, by_hand(*strengths), kept=kept)
            after = footprint(shapes, fast(*strengths), kept=kept)
            memory = f"{before[1] / 1e6:.1f} -> {after[1] / 1e6:.1f}"
            cells.append(f"{before[0]:,} -> {after[0]:,}; {memory}")
        table.add_row(name, "kept" if kept else "None", *cells)
    console.print(table)


# ---- in a training step ------------------------------------------------------------------------


class GPT(nn.Module):
    """A small causal transformer: 1.1M parameters at a width of 128."""

    def __init__(self, width: int = 128, blocks: int = 4, vocabulary: int = 1000) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.blocks(self.embed(tokens), mask=mask, is_causal=True))  # type: ignore[no-any-return]


def training_step(penalty: Penalty | None, weight_decay: float = 0.0) -> Callable[[], None]:
    """One step of AdamW on a model of its own."""
    torch.manual_seed(0)
    model = GPT()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=weight_decay)
    tokens = torch.randint(1000, (8, 65))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if penalty is not None:
            loss = loss + penalty(parameters)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def print_training(console: Console, quick: bool) -> None:
    """What each way adds to a whole step, in percent of it."""
    ways = {"no penalty": training_step(None)}
    for name, strengths in STRENGTHS.items():
        ways[f"{name} by hand"] = training_step(by_hand(*strengths))
        ways[f"{name} by regwrap"] = training_step(fast(*strengths))
    ways["AdamW's weight_decay"] = training_step(None, weight_decay=1e-2)
    table = Table("a training step of a small GPT", "1 thread", "2 threads", title="% added")
    columns = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        plain, *others = taking_turns(list(ways.values()), 10 if quick else 60)
        added = [
            (
                statistics.median(b / a for a, b in zip(plain, way, strict=True)),
                min(way) / min(plain),
            )
            for way in others
        ]
        columns.append([f"{100 * m - 100:+.0f} ({100 * b - 100:+.0f})" for m, b in added])
    for row in zip(list(ways)[1:], *columns, strict=True):
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns, rougher figures")
    quick = parser.parse_args().quick
    console = Console(width=None if Console().is_terminal else 110)
    print_times(console, quick)
    print_training(console, quick)
    print_footprints(console)


if __name__ == "__main__":
    main()
