"""What a penalty costs beside the loop that one would write by hand, forward and backward.

    python tests/benchmarks/penalty.py [--quick]

All ways take turns in one process, so that what else the machine does hits them alike. A figure is
the median over all turns of the ratio way / loop, in brackets the ratio of the two least times.
"gradients kept" adds to gradients that exist already; otherwise they are None, as `zero_grad`
leaves them. Memory is what PyTorch allocates beyond weights and gradients that were there before.

Beside regwrap stand Keras 3's `model.losses` on the torch backend, over Dense kernels of the same
shapes (a shape of 4 dimensions flattened to 2), if the interpreter has keras; and the decay of the
fused AdamW: by how much `weight_decay` makes its step longer, in units of the L2 loop.

The whole run takes about twenty minutes on two quiet cores, `--quick` about five.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
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

import regwrap as rw

Shape = tuple[int, ...]
Penalty = Callable[[], Tensor]


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


def by_hand(ws: Sequence[Tensor], l1: float, l2: float) -> Penalty:
    """The textbook loop."""
    if not l2:
        return lambda: sum(l1 * w.abs().sum() for w in ws)  # type: ignore[return-value]
    if not l1:
        return lambda: sum(l2 / 2 * w.pow(2).sum() for w in ws)  # type: ignore[return-value]
    return lambda: sum(l1 * w.abs().sum() + l2 / 2 * w.pow(2).sum() for w in ws)  # type: ignore[return-value]


def by_regwrap(model: nn.Module, l1: float, l2: float) -> Penalty:
    """`reg_loss` of the whole model, with all that it looks up at each read."""
    terms = [rw.L1(l1, on="all")] * bool(l1) + [rw.L2(l2, on="all")] * bool(l2)
    rw.regularize(model, {"": terms})
    return lambda: model.reg_loss  # type: ignore[return-value]


class Holder(nn.Module):
    """A module of one parameter."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.weight = w


def holders(ws: Sequence[Tensor]) -> nn.Module:
    """A model with a module for each parameter."""
    return nn.ModuleList(map(Holder, ws))


STRENGTHS = {"L1": (1e-4, 0.0), "L2": (0.0, 1e-4), "ElasticNet": (1e-4, 1e-4)}


def weights(shapes: Sequence[Shape], *, kept: bool) -> list[Tensor]:
    """Seeded parameters, with gradients of zeros or with none."""
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(s, generator=generator).mul_(0.02)) for s in shapes]
    reset(made, kept=kept)
    return made


def reset(ws: Sequence[Tensor], *, kept: bool) -> None:
    """Gives each a gradient of zeros, or none."""
    for w in ws:
        w.grad = torch.zeros_like(w) if kept else None


# ---- what others do ----------------------------------------------------------------------------


@functools.cache
def keras() -> Any:
    """Keras 3 with the torch backend, None where it is not installed."""
    os.environ["KERAS_BACKEND"] = "torch"
    try:
        import keras as found
    except ImportError:
        return None
    return found


def by_keras(shapes: Sequence[Shape], l1: float, l2: float) -> tuple[list[Tensor], Penalty]:
    """Kernels of Dense layers with a regularizer each, and the sum of their model's `losses`."""
    regularizer = keras().regularizers.L1L2(l1, l2 / 2)  # Keras' L2 has no 1/2
    model = keras().Model()
    model.rows = [math.prod(shape[:-1]) if len(shape) < 3 else shape[0] for shape in shapes]
    model.kernels = [
        keras().layers.Dense(
            math.prod(shape) // rows, use_bias=False, kernel_regularizer=regularizer
        )
        for shape, rows in zip(shapes, model.rows, strict=True)
    ]
    for layer, rows in zip(model.kernels, model.rows, strict=True):
        layer.build((None, rows))
    kernels = [layer.kernel.value for layer in model.kernels]
    for kernel, w in zip(kernels, weights(shapes, kept=False), strict=True):
        kernel.data.copy_(w.detach().view_as(kernel))
    return kernels, lambda: sum(model.losses)


def fused_step(ws: Sequence[Tensor], weight_decay: float) -> Callable[[], Any]:
    """A step of the fused AdamW."""
    return torch.optim.AdamW(ws, lr=1e-6, weight_decay=weight_decay, fused=True).step


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
    """Of a way's times to the loop's."""

    median: float
    least: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f})"


def ratio(ways: Sequence[float], loops: Sequence[float]) -> Ratio:
    """Of times that were taken beside each other."""
    pairs = zip(ways, loops, strict=True)
    return Ratio(statistics.median(a / b for a, b in pairs), min(ways) / min(loops))


def ratios(
    shapes: Sequence[Shape], strengths: tuple[float, float], kept: bool, turns: int
) -> dict[str, Ratio]:
    """Forward and backward of each way, beside the loop's."""
    ws = weights(shapes, kept=kept)
    jobs = {
        "loop": (ws, by_hand(ws, *strengths)),
        "regwrap": (ws, by_regwrap(holders(ws), *strengths)),
    }
    if keras() is not None:
        jobs["Keras 3's losses"] = by_keras(shapes, *strengths)
    for kernels, _ in jobs.values():
        reset(kernels, kept=kept)

    def timed(ws: Sequence[Tensor], penalty: Penalty) -> float:
        if not kept:
            reset(ws, kept=False)
        return seconds(lambda: penalty().backward())  # type: ignore[no-untyped-call]

    found = [[timed(*job) for job in jobs.values()] for _ in range(turns + 2)][2:]
    loop, *ways = zip(*found, strict=True)
    return {name: ratio(way, loop) for name, way in zip(list(jobs)[1:], ways, strict=True)}


def decay(shapes: Sequence[Shape], kept: bool, turns: int) -> Ratio:
    """What `weight_decay` adds to a fused step, beside the L2 loop."""
    ws = weights(shapes, kept=kept)
    penalty = by_hand(ws, *STRENGTHS["L2"])

    def loop() -> None:
        if not kept:
            reset(ws, kept=False)
        penalty().backward()  # type: ignore[no-untyped-call]

    # the loop before each of the two: what it leaves in the cache is the same for both
    jobs = [loop, fused_step(ws, 0), loop, fused_step(ws, STRENGTHS["L2"][1])]
    _, plain, loops, decayed = taking_turns(jobs, turns)
    added = [b - a for a, b in zip(plain, decayed, strict=True)]
    median = statistics.median(a / b for a, b in zip(added, loops, strict=True))
    return Ratio(median, (min(decayed) - min(plain)) / min(loops))


def print_times(console: Console, quick: bool) -> None:
    """The table of ratios to the loop, and what regwrap's come to."""
    table = Table(
        "case",
        "threads",
        "gradients",
        "by",
        *STRENGTHS,
        title="forward + backward, of the textbook loop's time",
    )
    ours: dict[tuple[bool, str], list[float]] = {}
    for threads, kept in itertools.product((1, 2), (False, True)):
        torch.set_num_threads(threads)
        for name, shapes in CASES.items():
            turns = 5 if quick else 15 if sum(map(math.prod, shapes)) > 2e6 else 45
            found = {term: ratios(shapes, s, kept, turns) for term, s in STRENGTHS.items()}
            for term, ways in found.items():
                ours.setdefault((kept, term), []).append(ways["regwrap"].median)
            case = (name, str(threads), "kept" if kept else "None")
            for way in found["L2"]:
                table.add_row(*case, way, *(str(ways[way]) for ways in found.values()))
            if keras() is None:
                table.add_row(*case, "Keras 3's losses", *["no keras here"] * len(found))
            table.add_row(
                *case, "weight_decay", "-", str(decay(shapes, kept, turns)), "-", end_section=True
            )
    console.print(table)
    for (kept, term), medians in ours.items():
        console.print(f"{term}, gradients {'kept' if kept else 'None'}: at most {max(medians):.2f}")
    logs = [math.log(m) for (_, term), ms in ours.items() if term != "ElasticNet" for m in ms]
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


def footprint(ws: Sequence[Tensor], penalty: Penalty, *, kept: bool) -> tuple[int, int]:
    """Operations, and bytes held at the peak, of forward and backward."""
    job = lambda: penalty().backward()  # type: ignore[no-untyped-call]  # noqa: E731
    reset(ws, kept=kept)
    count = operations(job)
    reset(ws, kept=kept)
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
            ws = weights(shapes, kept=kept)
            before = footprint(ws, by_hand(ws, *strengths), kept=kept)
            after = footprint(ws, by_regwrap(holders(ws), *strengths), kept=kept)
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


def training_step(
    way: Callable[[nn.Module], Penalty] | None, weight_decay: float = 0.0
) -> Callable[[], None]:
    """One step of AdamW on a model of its own."""
    torch.manual_seed(0)
    model = GPT()
    penalty = None if way is None else way(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=weight_decay, fused=True)
    tokens = torch.randint(1000, (8, 65))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if penalty is not None:
            loss = loss + penalty()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def print_training(console: Console, quick: bool) -> None:
    """What each way adds to a whole step, in percent of it."""
    ways = {"no penalty": training_step(None)}
    for name, (l1, l2) in STRENGTHS.items():
        ways[f"{name} by hand"] = training_step(
            lambda model, l1=l1, l2=l2: by_hand(list(model.parameters()), l1, l2)
        )
        ways[f"{name} by regwrap"] = training_step(
            lambda model, l1=l1, l2=l2: by_regwrap(model, l1, l2)
        )
    ways["the fused AdamW's weight_decay"] = training_step(None, weight_decay=1e-2)
    table = Table("a training step of a small GPT", "1 thread", "2 threads", title="% added")
    columns = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        plain, *others = taking_turns(list(ways.values()), 10 if quick else 60)
        added = [ratio(way, plain) for way in others]
        columns.append([f"{100 * m - 100:+.0f} ({100 * b - 100:+.0f})" for m, b in added])
    for row in zip(list(ways)[1:], *columns, strict=True):
        table.add_row(*row)
    console.print(table)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns, rougher figures")
    quick = parser.parse_args().quick
    console = Console(width=None if Console().is_terminal else 130)
    start = time.perf_counter()
    print_times(console, quick)
    print_training(console, quick)
    print_footprints(console)
    console.print(f"This run took {(time.perf_counter() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
