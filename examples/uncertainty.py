"""How far to trust a prediction: dropout left on in prediction, and where that does not help.

Trains on scikit-learn's digits, with dropout put in by a rule, and asks of several kinds of foreign
images whether their uncertainty is higher than that of unseen digits. The AUROC is the share of
(foreign, digit) pairs in the right order: .5 is a coin.

    python examples/uncertainty.py                       # about half a minute
    python examples/uncertainty.py --data fashion-mnist  # clothes besides, brought to 8 x 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from quickstart import Classifier, idx_files, mean_and_spread
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import regwrap as rw
from regwrap import Dropout

PASSES = 30

Score = Callable[[nn.Module, Tensor], Tensor]


def train(x: Tensor, y: Tensor, rules: object, epochs: int) -> nn.Module:
    model = Classifier(64, classes=10)
    if rules is not None:
        rw.regularize(model, rules)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def monte_carlo(model: nn.Module, x: Tensor) -> Tensor:
    """The entropy of the mean of 30 passes with dropout on."""
    return rw.mc_predict(model, x, n=PASSES).entropy


@torch.no_grad()
def single_pass(model: nn.Module, x: Tensor) -> Tensor:
    """The entropy of the ordinary prediction."""
    return torch.special.entr(model(x).softmax(-1)).sum(-1)


def foreign_images(digits: Tensor, clothes: Path | None) -> dict[str, Tensor]:
    """Images that are no upright digits, 8 x 8 as these are."""
    square = digits.view(-1, 8, 8)
    found = {
        "patches of photographs": photographs(len(digits)),
        "digits, pixels shuffled": digits[:, torch.randperm(64)],
        "digits, turned by 90 degrees": square.rot90(1, (1, 2)).flatten(1),
        "digits, black and white exchanged": 1 - digits,
        "uniform noise": torch.rand_like(digits),
    }
    if clothes is not None:
        images = idx_files(clothes)(torch.Generator().manual_seed(0)).test_x[: len(digits)]
        small = F.interpolate(images.view(-1, 1, 28, 28), size=(8, 8), mode="area")
        found = {"clothes (Fashion-MNIST)": small.flatten(1), **found}
    return found


def photographs(count: int) -> Tensor:
    """Patches of the two photographs that come with scikit-learn, gray, each from 0 to 1."""
    gray = [torch.tensor(i / 255.0).mean(2)[None, None] for i in load_sample_images().images]
    small = [F.interpolate(g, scale_factor=0.25, mode="area") for g in gray]
    patches = torch.cat([F.unfold(s, 8, stride=2)[0].T for s in small]).float()
    patches = patches[torch.randperm(len(patches))[:count]]
    low, high = patches.amin(1, keepdim=True), patches.amax(1, keepdim=True)
    return (patches - low) / (high - low).clamp_min(1e-6)


def auroc(digits: Tensor, foreign: Tensor) -> float:
    labels = np.r_[np.zeros(len(digits)), np.ones(len(foreign))]
    return float(roc_auc_score(labels, torch.cat([digits, foreign]).numpy()))


def draw(auroc_of: dict[str, dict[str, list[float]]], out: Path) -> None:
    """A row a kind of image: the AUROC of each way, mean and range over the seeds."""
    kinds = list(next(iter(auroc_of.values())))
    figure = Figure(figsize=(8, 0.65 * len(kinds) + 1.3), layout="constrained")
    panel = figure.subplots()
    for i, (way, by_kind) in enumerate(auroc_of.items()):
        values = np.array([by_kind[kind] for kind in reversed(kinds)])
        rows = np.arange(len(kinds)) + (1 - i) * 0.2
        around = [values.mean(1) - values.min(1), values.max(1) - values.mean(1)]
        panel.errorbar(values.mean(1), rows, xerr=around, fmt="o", capsize=3, label=way)
    panel.axvline(0.5, color="gray", ls=":", label="a coin")
    panel.set_yticks(range(len(kinds)), list(reversed(kinds)))
    panel.set(xlim=(0.0, 1.0), ylim=(-0.5, len(kinds) - 0.5), xlabel="AUROC against unseen digits")
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    panel.grid(axis="x", alpha=0.25)
    figure.savefig(out, dpi=150)


def report(
    console: Console,
    auroc_of: dict[str, dict[str, list[float]]],
    accuracies: np.ndarray,
    kept: np.ndarray,
) -> None:
    table = Table("AUROC against unseen digits", *auroc_of)
    passes, single, _ = auroc_of.values()
    for kind in passes:
        cells = (np.array(by_kind[kind]) for by_kind in auroc_of.values())
        spread = (f" ± {c.std(ddof=1):.2f}" if len(c) > 1 else "" for c in cells)
        means = (f"{np.mean(by_kind[kind]):.2f}" for by_kind in auroc_of.values())
        table.add_row(kind, *(m + s for m, s in zip(means, spread, strict=True)))
    console.print(table)
    worst = min(passes, key=lambda kind: np.mean(passes[kind]))
    more = np.mean([np.mean(passes[kind]) - np.mean(single[kind]) for kind in passes])
    console.print(
        f"Unseen digits: {mean_and_spread(accuracies)} % right, of the surer half "
        f"{mean_and_spread(kept)} %: it finds\nits own mistakes. It is no reliable detector of "
        f"foreign images: {np.mean(passes[worst]):.2f} for\n{worst}, where a coin gets .50;\nthe "
        f"{PASSES} passes add {more:+.2f} to one pass on average.",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("uncertainty.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster for matrices this small, and the same on every machine
    console = Console()

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    ways: dict[str, tuple[bool, Score]] = {
        f"{PASSES} passes": (True, monte_carlo),
        "one pass": (True, single_pass),
        "no dropout": (False, single_pass),
    }
    auroc_of: dict[str, dict[str, list[float]]] = {way: {} for way in ways}
    accuracies, kept = [], []
    for seed in track(range(args.seeds), "seeds", console=console):
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        seen, unseen = order[:900], order[900:]
        rules = {"features": Dropout(0.3)}
        models = {
            dropout: train(x[seen], y[seen], rules if dropout else None, args.epochs)
            for dropout in (True, False)
        }
        foreign = foreign_images(x[unseen], args.data)
        for way, (dropout, score) in ways.items():
            own = score(models[dropout], x[unseen])
            for kind, images in foreign.items():
                found = auroc(own, score(models[dropout], images))
                auroc_of[way].setdefault(kind, []).append(found)
        predicted = rw.mc_predict(models[True], x[unseen], n=PASSES)
        right = (predicted.mean.argmax(-1) == y[unseen]).float()
        surest = predicted.entropy.argsort()[: len(right) // 2]
        accuracies.append(right.mean().item())
        kept.append(right[surest].mean().item())

    report(console, auroc_of, np.array(accuracies), np.array(kept))
    draw(auroc_of, args.out)
    console.print(f"Picture: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
