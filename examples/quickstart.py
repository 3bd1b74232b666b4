"""Few images, a fifth of them wrongly labelled: a plain network against the same one with rules.

Trains both on scikit-learn's digits (bundled; 200 images), on the same data, from the same weights
and in the same batch order, once per seed. Prints the policy table and the accuracy on clean test
images, and draws the training and test curves.

    python examples/quickstart.py                      # about half a minute
    python examples/quickstart.py --data fashion-mnist # a folder with the four *-ubyte.gz files
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import regwrap as rw
from regwrap import L2, Dropout

WRONG = 0.2  # of the training labels

RULES = {
    nn.Linear: L2(3e-3),  # general first ...
    "features": Dropout(0.5),  # another kind of term: stacks
    "head": L2(3e-4),  # the same kind, later: wins
}


class Classifier(nn.Module):
    """Somebody else's network, written without a thought of regularization."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU()
        )
        self.head = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Split(NamedTuple):
    """Training images with some labels wrong, and clean test images."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(draw: torch.Generator) -> Split:
    """200 of the 8 x 8 digits to train on, the other 1,597 to test on."""
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32)
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=draw)
    train, test = order[:200], order[200:]
    return Split(x[train], y[train], x[test], y[test])


def idx_files(folder: Path) -> Callable[[torch.Generator], Split]:
    """2,000 of Fashion-MNIST's (or MNIST's) training images, and all of its test images."""

    def read(name: str, header: int) -> np.ndarray:
        with gzip.open(folder / f"{name}-ubyte.gz") as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    def images(name: str) -> Tensor:
        pixels = read(f"{name}-images-idx3", header=16).reshape(-1, 28 * 28)
        return torch.from_numpy(pixels.astype(np.float32) / 255)

    def labels(name: str) -> Tensor:
        return torch.from_numpy(read(f"{name}-labels-idx1", header=8).astype(np.int64))

    x, y, test_x, test_y = images("train"), labels("train"), images("t10k"), labels("t10k")

    def split(draw: torch.Generator) -> Split:
        train = torch.randperm(len(x), generator=draw)[:2000]
        return Split(x[train], y[train], test_x, test_y)

    return split


def mislabel(y: Tensor, draw: torch.Generator) -> Tensor:
    """A copy of `y` in which a share `WRONG` of the labels is another class."""
    wrong = torch.randperm(len(y), generator=draw)[: round(WRONG * len(y))]
    y = y.clone()
    y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=draw)) % 10
    return y


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).float().mean().item()


def train(
    model: nn.Module, data: Split, epochs: int, batch: int, after_epoch: Callable[[], None]
) -> list[tuple[float, float]]:
    """Train with Adam; returns the accuracy in training and on test after every epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curve = []
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(data.x)).split(batch):
            # The function, not model.reg_loss, because it is 0 for the plain model too.
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows]) + rw.reg_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        curve.append((accuracy(model, data.x, data.y), accuracy(model, data.test_x, data.test_y)))
        after_epoch()
    return curve


def mean_and_spread(values: np.ndarray) -> str:
    """In percent; the spread is the sample standard deviation over the seeds."""
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"


def draw(curves: dict[str, np.ndarray], title: str, out: Path) -> None:
    """One panel a model: the training and the test curve, mean and range over the seeds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for panel, (name, runs) in zip(panels, curves.items(), strict=True):
        epochs = np.arange(1, runs.shape[1] + 1)
        for i, label, color in (0, "train, as labelled", "C1"), (1, "test, clean labels", "C0"):
            values = 100 * runs[:, :, i]
            mean = values.mean(0)
            panel.plot(epochs, mean, color, label=f"{label}: {mean[-1]:.1f} % at the end")
            panel.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        panel.axhline(100 * (1 - WRONG), color="gray", ls=":", label="right labels in training")
        panel.set(title=name, xlabel="epoch", xlim=(0, epochs[-1]), ylim=(40, 101))
        panel.grid(alpha=0.25)
        panel.legend(loc="lower right", frameon=False)
    panels[0].set_ylabel("accuracy (%)")
    figure.suptitle(f"{title} (mean and range)")
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="default: 100, with --data 40")
    parser.add_argument("--out", type=Path, default=Path("quickstart.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster for matrices this small, and the same on every machine
    console = Console()

    if args.data:
        load, batch, epochs = idx_files(args.data), 64, args.epochs or 40
    else:
        load, batch, epochs = digits, 32, args.epochs or 100

    runs: dict[str, list[list[tuple[float, float]]]] = {"plain": [], "with three rules": []}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=args.seeds * len(runs) * epochs)
        for seed in range(args.seeds):
            chance = torch.Generator().manual_seed(seed)
            data = load(chance)
            data = data._replace(y=mislabel(data.y, chance))
            for name, curves in runs.items():
                torch.manual_seed(seed)  # the same first weights and batches for both
                model = Classifier(data.x.shape[1], classes=10)
                if name != "plain":
                    rw.regularize(model, RULES)
                    if seed == 0:
                        rw.summary(model, console=console)
                progress.update(bar, description=f"seed {seed}, {name}")
                curves.append(train(model, data, epochs, batch, lambda: progress.advance(bar)))

    results = {name: np.array(curves) for name, curves in runs.items()}
    title = (
        f"{len(data.x):,} training images, {WRONG:.0%} wrong labels, "
        f"{epochs} epochs, {args.seeds} seeds"
    )
    console.print(f"\n{title}.\nAccuracy in %, mean ± standard deviation:")
    table = Table("", "train, as labelled", "test, clean", "test, best epoch")
    for name, curves in results.items():
        train_end, test_end = curves[:, -1].T
        cells = train_end, test_end, curves[:, :, 1].max(1)
        table.add_row(name, *map(mean_and_spread, cells))
    console.print(table)
    plain, ruled = (curves[:, -1, 1] for curves in results.values())
    console.print(
        f"After the last epoch the rules gain {mean_and_spread(ruled - plain)} points on the\n"
        f"{len(data.test_x):,} clean test images; ahead on {(ruled > plain).sum()} of {args.seeds} "
        "seeds. The best epoch is picked\n"
        "on those test images: no early stopping could do better."
    )
    draw(results, title, args.out)
    console.print(f"Curves: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
