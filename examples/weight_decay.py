"""Weight decay against overfitting: 200 features, 20 samples, lambda 0 against lambda 3.

The experiment of "Dive into Deep Learning" (d2l.ai, chapter Weight Decay) on the same draws three
times: without a penalty, with `L2(3)` in the loss, with `WeightDecay(3)` in the optimizer. Under
plain SGD the last two are the same thing, and the program says how closely.

    python examples/weight_decay.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import regwrap as rw
from regwrap import L2, WeightDecay

LAMBDA = 3
CASES = {
    "lambda 0": None,
    f"L2({LAMBDA})": L2(LAMBDA),
    f"WeightDecay({LAMBDA})": WeightDecay(LAMBDA),
}


def samples(n: int, features: int = 200) -> tuple[Tensor, Tensor]:
    """Every feature matters a little: y = 0.05 + the sum of 0.01 x, plus noise."""
    x = torch.randn(n, features)
    return x, 0.05 + 0.01 * x.sum(1, keepdim=True) + 0.01 * torch.randn(n, 1)


def half_mse(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x), y) / 2


def train(
    rules: L2 | WeightDecay | None, seed: int, epochs: int
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Returns the trained weight, and the training and test loss after every epoch."""
    torch.manual_seed(seed)
    x, y = samples(20)
    test = samples(100)
    net = nn.Linear(200, 1)
    nn.init.normal_(net.weight)
    nn.init.zeros_(net.bias)
    if rules is not None:
        rw.regularize(net, rules)  # on="weight": the bias is left alone, as in the book
    optimizer = torch.optim.SGD(rw.param_groups(net), lr=0.003)
    curve = []
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(5):
            optimizer.zero_grad()
            (half_mse(net, x[rows], y[rows]) + rw.reg_loss(net)).backward()
            optimizer.step()
        with torch.no_grad():
            curve.append((half_mse(net, x, y).item(), half_mse(net, *test).item()))
    return net.weight.detach(), curve


def mean_and_spread(values: np.ndarray) -> str:
    """Three digits; the spread is the sample standard deviation over the seeds."""
    spread = f" ± {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    return f"{values.mean():.3g}{spread}"


def draw(curves: dict[str, np.ndarray], out: Path) -> None:
    """One panel a lambda: training and test loss, mean and range over the seeds."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for panel, (name, runs) in zip(panels, curves.items(), strict=True):
        epochs = np.arange(1, runs.shape[1] + 1)
        for i, label, color in (0, "train", "C1"), (1, "test", "C0"):
            values = runs[:, :, i]
            panel.plot(epochs, values.mean(0), color, label=f"{label}: {values[:, -1].mean():.2g}")
            panel.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
        panel.set(title=name, xlabel="epoch", xlim=(0, epochs[-1]), yscale="log")
        panel.grid(alpha=0.25)
        panel.legend(loc="lower left", title="at the end", frameon=False)
    panels[0].set_ylabel("half the mean squared error")
    figure.suptitle(f"20 samples, 200 features, {len(runs)} seeds (mean and range)")
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("weight_decay.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()

    weights, curves = {}, {}
    for name, rules in track(CASES.items(), "Training", console=console):
        runs = [train(rules, seed, args.epochs) for seed in range(args.seeds)]
        weights[name] = torch.stack([weight for weight, _ in runs])
        curves[name] = np.array([curve for _, curve in runs])

    table = Table("", "norm of w", "train loss", "test loss")
    for name, runs in curves.items():
        norms = weights[name].flatten(1).norm(dim=1).numpy()
        table.add_row(name, *map(mean_and_spread, (norms, *runs[:, -1].T)))
    console.print(f"After {args.epochs} epochs, mean ± standard deviation of {args.seeds} seeds:")
    console.print(table)
    _, in_loss, in_optimizer = weights.values()
    console.print(
        "L2 in the loss and WeightDecay in SGD: weights differ by at most "
        f"{(in_loss - in_optimizer).abs().max():.1e}"
    )
    del curves[f"WeightDecay({LAMBDA})"]  # whose curves are those of L2
    draw(curves, args.out)
    console.print(f"Curves: {args.out}", soft_wrap=True)


if __name__ == "__main__":
    main()
