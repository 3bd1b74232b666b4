"""How do I put L1 or L2 on one hidden layer, as in Keras, in the definition of the network?

The question that PyTorch beginners ask, with a network of two layers, `hidden` and `predict`, on
scikit-learn's diabetes data (bundled; 442 patients, 10 features). Keras writes

    Dense(32, kernel_regularizer=L1(0.003))    # hidden
    Dense(1, kernel_regularizer=L2(0.05))      # predict

Here the same is said beside the network (`regularize`) or above its class (`@regularized`), with a
weight decay for each layer besides. Both spellings train to equal numbers.

    python examples/per_layer.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import scale
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, WeightDecay

RULES = {
    # Our L2(s) is s/2 * sum(w^2), so that it is SGD's weight_decay=s. Keras' L2(0.05) is L2(0.1).
    "hidden": [L1(0.003), WeightDecay(0.01)],
    "predict": [L2(0.1), WeightDecay(0.001)],
}


class Net(nn.Module):
    """The network of the question, as somebody else wrote it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(10, 32)
        self.predict = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(F.relu(self.hidden(x)))


@rw.regularized(RULES)
class RegularizedNet(nn.Module):
    """The same with the rules in its definition: every instance is made regularized."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(10, 32)
        self.predict = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.predict(F.relu(self.hidden(x)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[dict[str, float]]:
    """Returns the loss before the penalty, and the penalty of each layer, at every step."""
    data = load_diabetes()
    x = torch.tensor(scale(data.data), dtype=torch.float32)
    y = torch.tensor(scale(data.target), dtype=torch.float32).unsqueeze(1)
    history = []
    for _ in range(steps):
        loss = F.mse_loss(model(x), y)
        parts = {"data loss": loss, **rw.penalties(model)}  # which sum to reg_loss
        history.append({name: value.item() for name, value in parts.items()})
        optimizer.zero_grad()
        (loss + model.reg_loss).backward()
        optimizer.step()
    return history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    console = Console()

    histories = []
    for make in (lambda: rw.regularize(Net(), RULES)), RegularizedNet:
        torch.manual_seed(0)
        model = make()
        # Each layer's WeightDecay becomes a parameter group; biases are in one without any.
        optimizer = torch.optim.AdamW(rw.param_groups(model), lr=0.01)
        histories.append(train(model, optimizer, steps))
    rw.summary(model, optimizer=optimizer, console=console)

    called, decorated = histories
    table = Table("step", *called[0], "sum")
    for step in sorted({0, steps // 10, steps - 1}):
        values = called[step].values()
        table.add_row(str(step + 1), *(f"{v:.4f}" for v in values), f"{sum(values):.4f}")
    console.print(table)
    console.print(
        f"regularize() and @regularized: {steps} steps, "
        f"{'equal' if called == decorated else 'DIFFERENT'} numbers at every one."
    )


if __name__ == "__main__":
    main()
