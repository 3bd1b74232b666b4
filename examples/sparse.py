"""Exact zeros: L1 in the loss, in the optimizer's step and in the weight, beside scikit-learn.

Every row trains the same linear model on scikit-learn's diabetes data, with the same `L1(alpha)`,
by gradient steps whose rate falls to 0 over the second half. In the loss, no weight ever becomes
zero; with `attach`, the zeros are Lasso's and so are the coefficients; `solver="hadamard"` ends
there too, with zeros that are tiny and not exact, and is the way for optimizers whose metric
`attach` does not know (RMSprop). Where torchao is installed, its proximal optimizers
(`torchao.prototype.pat`) solve the same problem, at the same strength.

    python examples/sparse.py
"""

from __future__ import annotations

import argparse
import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

import regwrap as rw
from regwrap import L1

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.2),
    "momentum": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "Adam": lambda params: Adam(params, lr=0.01),
    "AdamW": lambda params: AdamW(params, lr=0.01, weight_decay=0),
    "RMSprop": lambda params: RMSprop(params, lr=0.01),
}


@dataclass(frozen=True)
class Result:
    """What one way of training ended at, and what a step of it took."""

    way: str
    optimizer: str
    path: np.ndarray
    """The weights after each step, a row each."""
    microseconds: float
    """Of a training step, the median."""
    kept: int
    """Numbers for each weight: parameters and what the optimizer keeps."""

    @property
    def weight(self) -> np.ndarray:
        return self.path[-1]


def problem(alpha: float) -> tuple[Tensor, Tensor, np.ndarray]:
    x, y = load_diabetes(return_X_y=True)
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    lasso = Lasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=100_000).fit(x, y)
    return torch.tensor(x), torch.tensor(y)[:, None], lasso.coef_


def layer() -> nn.Linear:
    model = nn.Linear(10, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    return model


def train(
    way: str, name: str, model: nn.Linear, optimizer: Optimizer, data: Any, steps: int
) -> Result:
    x, y = data
    times, path = [], []
    schedule = LambdaLR(optimizer, lambda step: min(1, 2 - 2 * step / steps))
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        ((model(x) - y).square().mean() / 2 + rw.reg_loss(model)).backward()
        optimizer.step()
        schedule.step()
        times.append(time.perf_counter() - start)
        path.append(model.weight.detach()[0].clone())
    tensors = [*model.parameters()]
    for parameter in model.parameters():
        state = optimizer.state[parameter].values()
        tensors += [v for v in state if isinstance(v, Tensor) and v.shape == parameter.shape]
    kept = sum(tensor.numel() for tensor in tensors) // model.weight.numel()
    return Result(way, name, torch.stack(path).numpy(), float(np.median(times)) * 1e6, kept)


def in_loss(name: str, alpha: float, data: Any, steps: int) -> Result:
    model = rw.regularize(layer(), L1(alpha))
    return train("L1 in the loss", name, model, MAKERS[name](model.parameters()), data, steps)


def attached(name: str, alpha: float, data: Any, steps: int) -> Result:
    model = rw.regularize(layer(), L1(alpha))
    optimizer = MAKERS[name](model.parameters())
    with warnings.catch_warnings():
        # what it warns of is in the table: RMSprop's metric is not known
        warnings.simplefilter("ignore", rw.RegwrapWarning)
        rw.attach(model, optimizer)
    return train("attach", name, model, optimizer, data, steps)


def in_weight(name: str, alpha: float, data: Any, steps: int) -> Result:
    model = rw.regularize(layer(), L1(alpha, solver="hadamard"))
    return train("hadamard", name, model, MAKERS[name](model.parameters()), data, steps)


def torchao(name: str, alpha: float, data: Any, steps: int) -> Result:
    from torchao.prototype.pat.optim import PruneOptimizer

    model = layer()
    group = {"params": [model.weight], "prox_type": "ProxLasso", "group_type": "ElemGrouper"}
    optimizer = PruneOptimizer(MAKERS[name]([group]), reg_lambda=alpha)
    return train("torchao", name, model, optimizer, data, steps)


def gaps(path: np.ndarray, wanted: np.ndarray, alpha: float, data: Any) -> np.ndarray:
    """How far the objective lies above scikit-learn's, relative to it, after each step."""
    x, y = (part.numpy() for part in data)

    def objective(rows: np.ndarray) -> np.ndarray:
        return ((rows @ x.T - y.T) ** 2).mean(1) / 2 + alpha * np.abs(rows).sum(1)

    least = objective(wanted[None])[0]
    return (objective(path) - least) / least


def end_table(results: list[Result], wanted: np.ndarray, measured: list[np.ndarray]) -> Table:
    shown = Table(title="L1 on diabetes: 10 weights, scikit-learn's Lasso as the measure")
    for head in ("", "optimizer"):
        shown.add_column(head)
    for head in ("zeros", "same\nsupport", "|w|\n<= 1e-6", "largest\nerror", "objective\ngap"):
        shown.add_column(head, justify="right")
    zeros = str((wanted == 0).sum())
    shown.add_row("scikit-learn", "", zeros, "", "", "", "", end_section=True)
    for r, gap, last in zip(results, measured, lasts(results), strict=True):
        shown.add_row(
            r.way,
            r.optimizer,
            str((r.weight == 0).sum()),
            "yes" if ((r.weight == 0) == (wanted == 0)).all() else "no",
            str((np.abs(r.weight) <= 1e-6).sum()),
            f"{np.abs(r.weight - wanted).max():.0e}",
            f"{abs(gap[-1]):.0e}",
            end_section=last,
        )
    return shown


def cost_table(results: list[Result], measured: list[np.ndarray]) -> Table:
    shown = Table(title="what it takes")
    for head in ("", "optimizer"):
        shown.add_column(head)
    for head in ("steps to within\n1% of the objective", "us\na step", "numbers kept\na weight"):
        shown.add_column(head, justify="right")
    for r, gap, last in zip(results, measured, lasts(results), strict=True):
        above = np.flatnonzero(gap >= 0.01)
        steps = int(above[-1]) + 2 if len(above) else 1
        shown.add_row(
            r.way,
            r.optimizer,
            str(steps) if steps <= len(gap) else "never",
            f"{r.microseconds:.0f}",
            str(r.kept),
            end_section=last,
        )
    return shown


def lasts(results: list[Result]) -> list[bool]:
    """Whether each is the last of its way."""
    ways = [r.way for r in results]
    return [way != after for way, after in zip(ways, [*ways[1:], ""], strict=True)]


def draw(results: list[Result], wanted: np.ndarray, path: Path) -> None:
    """The coefficients, and their sizes on a logarithmic scale, where zeros fall off the edge."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    floor = 1e-9
    marks = {"L1 in the loss": ("o", "tab:orange"), "attach": ("x", "tab:blue")}
    marks |= {"hadamard": ("s", "tab:red"), "torchao": ("+", "tab:green")}
    at = np.arange(len(wanted))
    left.bar(at, wanted, color="0.85", label="scikit-learn's Lasso")
    right.bar(at, np.maximum(np.abs(wanted), floor), color="0.85")
    seen = set()
    for result in results:
        marker, color = marks[result.way]
        label = None if result.way in seen else result.way
        seen.add(result.way)
        style = {"linestyle": "", "marker": marker, "color": color, "alpha": 0.8}
        left.plot(at, result.weight, label=label, fillstyle="none", **style)
        right.plot(at, np.maximum(np.abs(result.weight), floor), fillstyle="none", **style)
    left.axhline(0, color="0.5", linewidth=0.5)
    left.set(title="coefficients", xlabel="feature", xticks=at)
    left.legend(fontsize=8)
    right.set(yscale="log", ylim=(floor / 2, 1), title="their sizes: zeros lie on the floor")
    right.set(xlabel="feature", xticks=at)
    ticks = [floor, 1e-7, 1e-5, 1e-3, 1e-1]
    right.set_yticks(ticks, ["0", *(f"{t:.0e}" for t in ticks[1:])])
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact zeros: L1 in three places.")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("sparse.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    x, y, wanted = problem(args.alpha)
    runs = [(way, name) for way in (in_loss, attached, in_weight) for name in MAKERS]
    if importlib.util.find_spec("torchao"):
        warnings.simplefilter("ignore")  # torchao's own, on import
        runs += [(torchao, name) for name in MAKERS]
    results = [
        run(name, args.alpha, (x, y), args.steps)
        for run, name in track(runs, "Training", console=console)
    ]
    measured = [gaps(r.path, wanted, args.alpha, (x, y)) for r in results]
    console.print(end_table(results, wanted, measured))
    console.print(cost_table(results, measured))
    draw([r for r in results if r.optimizer != "RMSprop"], wanted, args.out)
    console.print(f"[dim]coefficients drawn in {args.out}")


if __name__ == "__main__":
    main()
