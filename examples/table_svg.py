"""The policy table as it looks in a terminal, as an SVG for the README.

python examples/table_svg.py  # writes examples/policy.svg
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, Dropout, WeightDecay


class Block(nn.Module):
    """One of the equal blocks."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


class Mixer(nn.Module):
    """A model as others write them: a stack of equal blocks, and a head."""

    def __init__(self, dim: int = 64, depth: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(dim) for _ in range(depth)))
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x).flatten(2).mT).mean(1))


RULES = {
    "": WeightDecay(0.05),
    "blocks.*.fc2": Dropout(0.1),
    "blocks.{0..5}": L2(1e-4),
    "head": [L1(1e-5), WeightDecay(0.0)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "policy.svg")
    args = parser.parse_args()
    model = rw.regularize(Mixer(), RULES)
    console = Console(file=io.StringIO(), record=True, width=84, force_terminal=True)
    console.print("[dim]>>>[/dim] rw.summary(model)", highlight=False, end="\n\n")
    rw.summary(model, console=console)
    # A fixed id, so that the file changes when the table does and not otherwise.
    console.save_svg(str(args.out), title="regwrap", unique_id="regwrap")
    print(f"Written: {args.out}")


if __name__ == "__main__":
    main()
