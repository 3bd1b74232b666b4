"""What is found: who calls a layer, and what becomes of the result."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise activation that takes a call's output and is alone in doing so."""

    name: str
    module: str | None
    """Its path from the owner; None for a function."""
    commutes: bool
    """Whether a dropout before it equals one after it, exactly: ReLU, LeakyReLU."""


@dataclass(frozen=True, slots=True)
class Existing:
    """A dropout that is there already, downstream of a call."""

    module: str | None
    """Its path from the owner; None for a function."""
    attribute: str | None
    """Of a function: the owner's attribute that its rate is read from, if it is one."""
    behind: str
    """The activation in between; `""` if the dropout takes the output itself."""


@dataclass(frozen=True, slots=True)
class Call:
    """One place in the code of an owner where a child is called."""

    child: str
    method: str
    activation: Activation | None
    dropout: Existing | None
    follower: str
    """In words, what takes the output: `the product mul`, `self.act`, `what forward returns`."""
    returned: bool
    """Whether the output is what the owner's forward returns, or an item of it."""
    one_input: bool
    """Whether it is called with one input, whose place in the code is known."""


@dataclass(frozen=True, slots=True)
class Site:
    """The calls of a layer by one owner."""

    owner: str
    """The owner's path in the model, the first one that leads to the layer."""
    child: str
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who calls a layer, and whether all of them may be rewritten."""

    path: str
    sites: tuple[Site, ...]
    reason: str
    """`""` where every owner may be rewritten, else one sentence for the user."""

    @property
    def by_fx(self) -> bool:
        """Whether every call is known and in a body that is provably safe."""
        return bool(self.sites) and not self.reason

    @property
    def never_called(self) -> bool:
        """Whether no code of the model calls the layer."""
        return not self.sites and not self.reason


class Refused(Exception):
    """Rule P does not allow a method; the text says why."""
