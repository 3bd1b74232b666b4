"""What the last forward left behind: transient, never copied, never pickled."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from regwrap.errors import RegwrapWarning

SEEN = "_regwrap_seen"
ROUND = "_regwrap_round"

_LIMIT = 1000
"""Calls recorded outside the root's forward and never read, beyond which the older are dropped."""


class Transient:
    """A holder that starts afresh on a copy and after unpickling: its tensors are no leaves."""

    def __deepcopy__(self, memo: object) -> Any:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), ())


class Seen(Transient):
    """What a module left: the penalties of its outputs, and that it was called."""

    def __init__(self) -> None:
        self.values: list[tuple[tuple[str, ...], Tensor]] = []
        self.called = False
        self.inside = False
        """Whether the regularized model's forward is running."""
        self.consumed = False
        """Whether reg_loss has been read since the last record."""

    def renew(self) -> None:
        """Forgets the last forward."""
        # New objects, not cleared ones: torch.compile would guard on what was in the old list.
        self.values = []
        self.called = False
        self.consumed = False

    def about_to_record(self, name: str) -> None:
        """Keeps the records of a part that is called on its own from piling up."""
        if self.inside:
            return
        if self.consumed:
            self.renew()
        elif len(self.values) >= _LIMIT:
            warnings.warn(
                f"{name} was called {_LIMIT} times outside the regularized model's forward without "
                "reg_loss being read: its older output penalties are dropped; call the model "
                "itself, or read reg_loss after each step.",
                RegwrapWarning,
                stacklevel=3,
            )
            self.renew()

    def total(self, family: tuple[str, ...]) -> Tensor | None:
        """The sum of a term's penalties over the calls of the last forward, None without any."""
        mine = [value for held, value in self.values if held == family]
        return sum(mine[1:], mine[0]) if mine else None


class Round(Transient):
    """A root's bookkeeping of its running forward."""

    def __init__(self) -> None:
        self.nested = 0

    def begin(self, root: nn.Module) -> None:
        """Opens a forward: what the last one left is forgotten, unless one is running already."""
        holders = holders_beneath(root)
        if any(seen.inside for seen in holders):  # a call from within, or an outer root's
            self.nested += 1
            return
        for seen in holders:
            seen.renew()
            seen.inside = True

    def end(self, root: nn.Module) -> None:
        """Closes what `begin` opened."""
        if self.nested:
            self.nested -= 1
            return
        for seen in holders_beneath(root):
            seen.inside = False


def holders_beneath(root: nn.Module) -> list[Seen]:
    """The holders of every module at and beneath the root."""
    found = (m.__dict__.get(SEEN) for m in root.modules())
    return [seen for seen in found if seen is not None]
