"""The policy: rules, entries, and what of them lies on each module."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from regwrap import table
from regwrap.terms import Term
from regwrap.where import shown

KEY = "_regwrap"
REDO = "_regwrap_redo"
"""Where a module whose weight we have changed keeps the function that changes it anew."""
HOOK: Any = "regwrap"
"""The key of our hooks: an integer id would be given out again in another process."""


@dataclass(frozen=True)
class Rule:
    """One term (None clears) for one where; `order` ranks the rules of a model."""

    order: int
    where: object
    term: Term | None

    def __hash__(self) -> int:
        return self.order  # a rule is looked up for every entry; hashing its term is slow


@dataclass(frozen=True)
class Mark:
    """One term at one site of the module on which it lies."""

    site: str
    term: Term
    rule: Rule
    mechanism: str | None
    by: Rule | None = None
    """The later rule that replaced or cleared it."""
    note: str = ""
    """What was found out when it was planned."""
    callers: int = 0
    """Of a Dropout by fx: how many modules have it in their code."""


class Reference:
    """The values that an L2SP term pulls toward; follows its parameter to another device."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().clone()

    def fits(self, w: Tensor | None) -> bool:
        """Whether it can be the starting point of this weight, by its shape."""
        return w is None or w.shape == self.tensor.shape

    def beside(self, w: Tensor) -> Tensor:
        """The values where `w` is, distributed as `w` is."""
        if spread_alike(self.tensor, w):
            self.tensor = self.tensor.to(w.device)
        elif hasattr(w, "placements"):
            self.tensor = spread(self.tensor, w)
        else:  # FSDP2 has the whole of `w` here for now; the reference stays in shards
            return self.tensor.full_tensor()  # type: ignore[attr-defined, no-any-return]
        return self.tensor


def spread_alike(tensor: Tensor, like: Tensor) -> bool:
    """Whether both are plain tensors, or lie on the ranks in the same way."""
    placed = (getattr(t, "placements", None) for t in (tensor, like))
    meshes = (getattr(t, "device_mesh", None) for t in (tensor, like))
    return len({*placed}) == 1 and len({*meshes}) == 1


def spread(tensor: Tensor, like: Any) -> Tensor:
    """The tensor, whole or in shards, as `like` lies on the ranks."""
    from torch.distributed.tensor import distribute_tensor

    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


class Factor:
    """What a schedule multiplies a term by, live: read anew by everything that acts.

    The tensor is written in place, so that compiled code reads the present value; a copy goes on
    with the value that it was made at, and no schedule moves it.
    """

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.tensor = torch.tensor(value, dtype=torch.float64, device="cpu")

    def set(self, value: float) -> None:
        """Makes this the factor from now on."""
        self.value = value
        self.tensor.fill_(value)

    def __deepcopy__(self, memo: object) -> Factor:
        return Factor(self.value)

    def __reduce__(self) -> tuple[type[Factor], tuple[float]]:
        return (Factor, (self.value,))


class Carried:
    """What an optimizer's step carries, and `reg_loss` leaves out, by its site and kind.

    Each with the token of the attachment that carries it: one that was left behind by unregularize
    is not to act beside a later one. Transient: the copy of a model has no optimizer, so that its
    penalties are back in the loss.
    """

    def __init__(self, by: Mapping[tuple[str, tuple[str, ...]], object] | None = None) -> None:
        self.by = dict(by or {})

    def __deepcopy__(self, memo: object) -> Carried:
        return Carried()

    def __reduce__(self) -> tuple[type[Carried], tuple[()]]:
        return (Carried, ())


@dataclass(frozen=True)
class Pending:
    """A decorated class's rules that wait for layers to come."""

    done: int
    """How many of the class's layers of rules are carried out."""
    settle: Callable[[nn.Module], None]


@dataclass(frozen=True)
class Record:
    """What lies on a module: plain data by the parameter's own name, no paths, no closures."""

    marks: tuple[Mark, ...] = ()
    overridden: tuple[Mark, ...] = ()
    references: Mapping[str, Reference] = field(default_factory=dict, compare=False)
    rules: tuple[Rule, ...] = ()
    """All rules of the calls that had this module as their root."""
    carried: Carried = field(default_factory=Carried, compare=False)
    factors: Mapping[tuple[str, tuple[str, ...]], Factor] = field(
        default_factory=dict, compare=False
    )
    """What schedules multiply terms by, by their site and kind."""
    pending: Pending | None = None
    census: Census | None = field(default=None, compare=False)

    def __bool__(self) -> bool:
        return bool(self.marks or self.overridden or self.rules or self.pending)

    def __deepcopy__(self, memo: dict[int, Any]) -> Record:
        return dataclasses.replace(
            self,
            references=copy.deepcopy(dict(self.references), memo),
            carried=copy.deepcopy(self.carried, memo),
            factors=copy.deepcopy(dict(self.factors), memo),
            census=copy.deepcopy(self.census, memo),
        )

    def is_carried(self, mark: Mark) -> bool:
        """Whether an optimizer's step carries the term at its site."""
        by = self.carried.by
        return bool(by) and (mark.site, mark.term.family) in by

    def factor(self, mark: Mark) -> Factor | None:
        """What a schedule multiplies the term by; None where none does."""
        return self.factors.get((mark.site, mark.term.family)) if self.factors else None


EMPTY = Record()


def read(module: nn.Module) -> Record:
    """What lies on the module."""
    return module.__dict__.get(KEY, EMPTY)  # type: ignore[no-any-return]


def write(module: nn.Module, record: Record) -> None:
    """Lays the record on the module; an empty one leaves nothing there."""
    _count()
    # Through __dict__: a model may have a __setattr__ of its own.
    if record:
        module.__dict__[KEY] = record
    else:
        module.__dict__.pop(KEY, None)


_written = 0


def _count() -> None:
    global _written
    _written += 1


def written() -> int:
    """How often any record has been written; what is derived from records is stale after it."""
    return _written


def waiting(module: nn.Module, pending: Pending | None) -> Record:
    """The module's record with other rules waiting."""
    return dataclasses.replace(read(module), pending=pending)


@dataclass(frozen=True)
class Entry:
    """One line of a policy: a term at a site, or a layer that has none."""

    path: str
    layer: str
    shape: tuple[int, ...] | None
    parameters: int
    term: Term | None = None
    site: str | None = None
    mechanism: str | None = None
    rule: int | None = None
    note: str = ""

    def row(self) -> dict[str, Any]:
        """The entry as plain data."""
        row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return row | {"term": None if self.term is None else repr(self.term)}


Layer = tuple[str, tuple[tuple[tuple[int, ...], ...], ...]]
"""A layer's path, and the shapes behind each of its parameters."""


@dataclass(frozen=True)
class Policy:
    """The ordered, immutable set of entries: what will act on a model, or what does.

    Iteration and `len()` are over the entries; `rows()` shows layers without any besides.
    """

    lines: tuple[Entry, ...]
    rules: tuple[tuple[object, Term | None], ...]
    replaced: tuple[Entry, ...]
    layers: tuple[Layer, ...]
    """Layers with parameters of their own, and the shapes of these."""
    parameters: int
    """Elements of all parameters of the model, each once."""
    covered: int
    """Elements that an entry covers, each once."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries, in module order."""
        return tuple(line for line in self.lines if line.term is not None)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def rows(self) -> list[dict[str, Any]]:
        """One dict an entry, plus one a layer that has parameters and no entry, in module order."""
        return [line.row() for line in self.lines]

    def overridden(self) -> list[dict[str, Any]]:
        """What a later rule replaced or cleared, with the keys of `rows`."""
        return [line.row() for line in self.replaced]

    def counts(self) -> list[dict[str, Any]]:
        """One dict a rule: how many layers it reaches, entries in force and overridden."""
        acting = [[e for e in self.entries if e.rule == i] for i in range(len(self.rules))]
        return [
            {
                "rule": i,
                "where": shown(where),
                "term": None if term is None else repr(term),
                "layers": len({e.path for e in acting[i] if e.mechanism}),
                "entries": sum(e.mechanism is not None for e in acting[i]),
                "overridden": sum(e.rule == i for e in self.replaced),
            }
            for i, (where, term) in enumerate(self.rules)
        ]

    def sheet(self, **figures: Any) -> table.Sheet:
        """The policy as a table that shows these figures besides."""
        covered = {e.path for e in self.entries if e.mechanism is not None}
        layers = {line.path for line in self.lines}
        whole = self.covered == self.parameters
        percent = round(100 * self.covered / self.parameters) if self.parameters else 0
        share = f" ({percent if whole else min(percent, 99)}%)" if self.parameters else ""
        footer = (
            f"{len(covered)} of {len(layers)} layers and {self.covered:,} of "
            f"{self.parameters:,} parameters{share} covered",
            table.CONVENTION,
            *figures.pop("footer", ()),
        )
        return table.Sheet(self.rows(), self.counts(), footer, dict(self.layers), **figures)

    def __rich__(self) -> Any:
        return table.draw(self.sheet())

    def _repr_html_(self) -> str:
        return table.html(self.sheet())


class Census:
    """The modules on which a root's entries lie, so that a replaced one is noticed.

    Transient: an unpickled one takes its own at the first read.
    """

    def __init__(self, modules: Iterable[nn.Module] | None = None) -> None:
        self.expected = None if modules is None else [weakref.ref(m) for m in modules]

    def __deepcopy__(self, memo: dict[int, Any]) -> Census:
        # A root's record is copied after its children, which are in the memo by then.
        if self.expected is None:
            return Census()
        return Census(copied for ref in self.expected if (copied := memo.get(id(ref()))))

    def __reduce__(self) -> tuple[type[Census], tuple[()]]:
        return (Census, ())

    def lost(self, root: nn.Module, found: list[nn.Module]) -> int:
        """How many modules with entries are no longer beneath the root; counts anew from here."""
        expected, self.expected = self.expected, [weakref.ref(m) for m in found]
        if expected is None or len(expected) == len(found):
            return 0
        beneath = {id(m) for m in root.modules()}
        return sum(id(ref()) not in beneath for ref in expected)


def lift(module: nn.Module) -> dict[str, Any]:
    """Everything of ours that lies on one module, to be laid on its copy."""
    own = {k: v for k, v in module.__dict__.items() if k.startswith(KEY)}
    hooks = {
        (d, key): fns[key]
        for d, fns in _hook_dicts(module)
        for key in fns
        if isinstance(key, str) and key.startswith(HOOK)
    }
    return {"own": own, "hooks": hooks} if own or hooks else {}


def lay(module: nn.Module, lifted: dict[str, Any]) -> None:
    """Lays on a module what `lift` took from another."""
    _count()
    module.__dict__.update(lifted["own"])
    if REDO in lifted["own"]:
        lifted["own"][REDO](module)  # the other's weight came along as a plain one, or changed
    for (name, key), hook in lifted["hooks"].items():
        module.__dict__[name][key] = hook


def strip(module: nn.Module) -> bool:
    """Takes everything of ours from one module; whether there was a hook among it."""
    _count()
    lifted = lift(module)
    for key in lifted.get("own", ()):
        del module.__dict__[key]
    for name, key in lifted.get("hooks", ()):
        del module.__dict__[name][key]
    return bool(lifted.get("hooks"))


def _hook_dicts(module: nn.Module) -> Iterator[tuple[str, dict[Any, Any]]]:
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"):
        yield name, module.__dict__.get(name, {})
