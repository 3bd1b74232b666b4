"""What the last forward left behind: transient, never copied, never pickled."""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from regwrap.errors import RegwrapWarning

SEEN = "_regwrap_seen"
ROUND = "_regwrap_round"

_LIMIT = 1000
"""Calls recorded outside the root's forward and never read, beyond which the older are dropped."""

Values = list[tuple[tuple[str, ...], Tensor]]
"""The penalties of one call, each with its term's family."""


class Transient:
    """A holder that starts afresh on a copy and after unpickling: its tensors are no leaves."""

    def __deepcopy__(self, memo: object) -> Any:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), ())


class Read:
    """One read of `reg_loss`, shared by all holders that it looked at."""

    def __init__(self) -> None:
        self.spent = False
        """Whether a part has recorded since: what all of them left before the read is over."""


class Seen(Transient):
    """What a module left: the penalties of its outputs, and that it was called."""

    def __init__(self) -> None:
        self.round: Round | None = None
        """The regularized model's forward that is running."""
        self.renew()

    def renew(self) -> None:
        """Forgets the last forward."""
        # A chain (values, earlier ones), not a list: torch.compile puts a link before the earlier
        # ones without looking at them, where it would guard on every tensor of a list.
        self.calls: Any = None
        self.count = 0
        self.called = False
        self.read: Read | None = None

    def about_to_record(self, name: str) -> None:
        """Keeps the records of a part that is called on its own from piling up."""
        if self.round is not None:
            return
        if self.read is not None:
            self.read.spent = True
            self.renew()
        elif self.count >= _LIMIT:
            if not torch.compiler.is_compiling():
                _warn_of_unread(name)
            self.renew()

    def record(self, values: Values) -> None:
        """Keeps the penalties of one call."""
        self.calls = (values, self.calls)
        if self.round is None:  # else the next forward forgets them: no need to count
            self.count += 1

    def look(self, read: Read) -> None:
        """Prepares for a read of `reg_loss`."""
        if self.read is not None and self.read.spent:
            self.renew()
        self.read = read

    def total(self, family: tuple[str, ...]) -> Tensor | None:
        """The sum of a term's penalties over the calls of the last forward, None without any."""
        mine = []
        link = self.calls
        while link is not None:
            values, link = link
            mine += [value for held, value in values if held == family and _is_alive(value)]
        mine.reverse()
        return sum(mine[1:], mine[0]) if mine else None


def _is_alive(value: Tensor) -> bool:
    """Whether the torch.func transform in which a tensor was made, if any, is still running."""
    if torch.compiler.is_compiling():
        return True
    return not torch._C._functorch.is_dead_tensor_wrapper(value)  # type: ignore[attr-defined]


def _warn_of_unread(name: str) -> None:
    warnings.warn(
        f"{name} was called {_LIMIT} times outside the regularized model's forward without "
        "reg_loss being read: its older output penalties are dropped; call the model "
        "itself, or read reg_loss after each step.",
        RegwrapWarning,
        stacklevel=5,
    )


class Round(Transient):
    """A root's bookkeeping of its running forward."""

    def __init__(self) -> None:
        self.nested = 0

    def begin(self, root: nn.Module) -> None:
        """Opens a forward: what the last one left is forgotten, unless one is running already."""
        holders = holders_beneath(root)
        if any(seen.round is not None and self._is_within(seen.round) for seen in holders):
            self.nested += 1
            return
        self.nested = 0
        for seen in holders:
            seen.renew()
            seen.round = self

    def end(self, root: nn.Module) -> None:
        """Closes what `begin` opened."""
        if self.nested:
            self.nested -= 1
            return
        for seen in holders_beneath(root):
            if seen.round is self:
                seen.round = None

    def _is_within(self, other: Round) -> bool:
        """Whether a forward that was opened is running still, around the one that begins now.

        No hook runs after a KeyboardInterrupt: without a look at the stack, every forward that
        follows one would pass for a call from within and pile its records on the last one's.
        """
        if torch.compiler.is_compiling():
            return True
        calls = sum(held is other for held in _running())
        return calls > (other is self)


def _running() -> list[Round | None]:
    """The rounds of the modules whose calls are on the stack."""
    found = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        # by name: where torch.compile breaks the graph, the code is another one of the same name
        if "_call_impl" in frame.f_code.co_name and "wrapped" not in frame.f_code.co_name:
            found.append(getattr(frame.f_locals.get("self"), "__dict__", {}).get(ROUND))
        frame = frame.f_back
    return found


def holders_beneath(root: nn.Module) -> list[Seen]:
    """The holders of every module at and beneath the root."""
    found = (m.__dict__.get(SEEN) for m in root.modules())
    return [seen for seen in found if seen is not None]
