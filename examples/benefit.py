"""What each regularizer is worth when a fifth of the labels is wrong, over seeds.

Trains the same network from the same weights on the same images, once for each rule set and seed.
Writes a table and two pictures: the gain in test accuracy, seed by seed, and the weights after
training. Each strength is the best of one to five that were tried on other draws of the images
(seeds 100 to 102), unevenly: no ranking of the terms follows from differences of a point.

    python examples/benefit.py                       # digits, about two minutes
    python examples/benefit.py --data fashion-mnist  # a folder with the four *-ubyte.gz files
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from quickstart import (
    WRONG,
    Classifier,
    Split,
    accuracy,
    digits,
    idx_files,
    mean_and_spread,
    mislabel,
)
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import regwrap as rw
from regwrap import L1, L2, Dropout, ElasticNet, WeightDecay

PLAIN = "none"
GAIN = "gain in test accuracy (points): each seed, their mean ± standard deviation"

Rules = dict[str, Any]

DIGITS: Rules = {
    PLAIN: None,
    "L2(0.01)": L2(1e-2),
    "L1(0.001)": L1(1e-3),
    "ElasticNet(0.006, 0.1)": ElasticNet(6e-3, 0.1),
    "WeightDecay(3)": WeightDecay(3.0),
    "Dropout(0.5)": {"features": Dropout(0.5)},
}
FASHION: Rules = {
    PLAIN: None,
    "L2(0.01)": L2(1e-2),
    "L1(0.0003)": L1(3e-4),
    "ElasticNet(0.006, 0.05)": ElasticNet(6e-3, 0.05),
    "WeightDecay(3)": WeightDecay(3.0),
    "Dropout(0.5)": {"features": Dropout(0.5)},
}


def trained(data: Split, rules: Any, seed: int, epochs: int, batch: int) -> nn.Module:
    """The network after training, in eval."""
    torch.manual_seed(seed)  # the same first weights and batches for all
    model = Classifier(data.x.shape[1], classes=10)
    if rules is not None:
        rw.regularize(model, rules)
    # AdamW with a decay of 0 is Adam; a WeightDecay rule makes groups of its own.
    groups = rw.param_groups(model, weight_decay=0.0)
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x)).split(batch):
            loss = F.cross_entropy(model(data.x[rows]), data.y[rows]) + rw.reg_loss(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def markdown(scores: dict[str, np.ndarray], gaps: dict[str, np.ndarray]) -> str:
    """The table as it stands in the README."""
    lines = ["| rules | test accuracy | gain | train - test |", "|---|---|---|---|"]
    for name, values in scores.items():
        gain = "" if name == PLAIN else f"+{mean_and_spread(values - scores[PLAIN])}"
        cells = (f"`{name}`" if name != PLAIN else name, mean_and_spread(values), gain)
        lines.append(f"| {' | '.join(cells)} | {mean_and_spread(gaps[name])} |")
    return "\n".join(lines).replace("+-", "-") + "\n"


def draw_gains(scores: dict[str, np.ndarray], title: str, out: Path) -> None:
    """A row a rule set: every seed's gain as a dot, their mean and standard deviation beside."""
    names = [name for name in scores if name != PLAIN]
    figure = Figure(figsize=(7.5, 0.62 * len(names) + 1.3), layout="constrained")
    panel = figure.subplots()
    for row, name in enumerate(reversed(names)):
        gains = 100 * (scores[name] - scores[PLAIN])
        jitter = np.linspace(-0.32, -0.12, len(gains))  # below the mean, so that none hides
        panel.plot(gains, row + jitter, "o", color="C0", alpha=0.45, ms=5, mec="none")
        spread = gains.std(ddof=1) if len(gains) > 1 else 0.0
        panel.errorbar(gains.mean(), row, xerr=spread, fmt="D", color="C3", ms=6, capsize=4)
        panel.annotate(f"{gains.mean():+.1f}", (gains.mean(), row + 0.15), ha="center", color="C3")
    panel.axvline(0, color="gray", lw=1)
    panel.set_yticks(range(len(names)), list(reversed(names)), family="monospace")
    panel.set(ylim=(-0.5, len(names) - 0.5), xlabel=GAIN)
    figure.suptitle(title, fontsize=10)  # over the whole figure: it is wider than the panel
    panel.grid(axis="x", alpha=0.25)
    figure.savefig(out, dpi=150)


def draw_weights(models: dict[str, nn.Module], out: Path) -> None:
    """The first layer's weights after training, each on the same scale."""
    weights = {
        name: model.features[0].weight.detach().flatten().numpy() for name, model in models.items()
    }
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    panels = figure.subplots(1, len(weights), sharex=True, sharey=True)
    reach = max(np.abs(values).max() for values in weights.values())
    edges = np.linspace(-reach, reach, 81)
    for panel, (name, values) in zip(np.atleast_1d(panels), weights.items(), strict=True):
        shares = np.full(len(values), 100 / len(values))
        panel.hist(values, edges, weights=shares, color="C0")
        small = 100 * (np.abs(values) < 1e-3).mean()
        panel.set_title(name, family="monospace", fontsize=9)
        panel.text(0.04, 0.96, f"std {values.std():.3f}\n|w| < 0.001: {small:.0f} %",
                   transform=panel.transAxes, va="top", fontsize=8)  # fmt: skip
        panel.set(yscale="log", xlabel="weight", ylim=(0.01, 500))
    first = np.atleast_1d(panels)[0]
    first.set_ylabel("% of the first layer's weights")
    first.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, help="default: 100, with --data 40")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder of what is written")
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster for matrices this small, and the same on every machine
    console = Console()

    name, load, batch, epochs, methods = "digits", digits, 32, args.epochs or 100, DIGITS
    if args.data:
        name, load, batch, epochs = "fashion", idx_files(args.data), 64, args.epochs or 40
        methods = FASHION

    scores: dict[str, list[float]] = {method: [] for method in methods}
    gaps: dict[str, list[float]] = {method: [] for method in methods}
    models: dict[str, nn.Module] = {}
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("", total=args.seeds * len(methods))
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            chance = torch.Generator().manual_seed(seed)
            data = load(chance)
            data = data._replace(y=mislabel(data.y, chance))
            for method, rules in methods.items():
                progress.update(bar, description=f"seed {seed}, {method}")
                model = models[method] = trained(data, rules, seed, epochs, batch)
                scores[method].append(accuracy(model, data.test_x, data.test_y))
                gaps[method].append(accuracy(model, data.x, data.y) - scores[method][-1])
                progress.advance(bar)

    arrays = {method: np.array(values) for method, values in scores.items()}
    table = markdown(arrays, {method: np.array(values) for method, values in gaps.items()})
    title = (
        f"{name}: {len(data.x):,} training images, {WRONG:.0%} of the labels wrong, "
        f"{epochs} epochs, {args.seeds} seeds"
    )
    console.print(f"\n{title}.\nAccuracy in %, mean ± standard deviation over the seeds:\n")
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"benefit_{name}.md").write_text(f"{title}.\n\n{table}", encoding="utf-8")
    draw_gains(arrays, title, args.out / f"benefit_{name}.png")
    shown = {m: models[m] for m in models if not m.startswith(("Elastic", "WeightDecay"))}
    draw_weights(shown, args.out / f"weights_{name}.png")
    console.print(f"Written: benefit_{name}.md, benefit_{name}.png, weights_{name}.png")


if __name__ == "__main__":
    main()
