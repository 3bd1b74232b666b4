"""What acts: frozen values that know their mathematics and nothing of modules."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from regwrap import proximal
from regwrap.errors import PolicyError, brief
from regwrap.fastpath import accumulator, plain_l1, plain_l2, real
from regwrap.proximal import Metric


def _without_autocast(w: Tensor) -> AbstractContextManager[Any]:
    device = w.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def number(owner: str, name: str, value: object, *, below: float = math.inf) -> float:
    """`value` as a float in [0, below), or an error that shows the value."""
    wanted = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{owner}: {name} must be {wanted}, not {brief(value)} of type {type(value).__name__}."
        )
    try:
        found = float(value)
    except OverflowError:  # an integer beyond what a float holds
        found = math.inf
    if not 0 <= found < below:  # NaN and inf fail this too
        raise ValueError(f"{owner}: {name} must be {wanted}, not {brief(value)}.")
    return found


def _integer(owner: str, name: str, value: object, *, least: int | None = None) -> int:
    wanted = "an integer" if least is None else f"an integer >= {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"{owner}: {name} must be {wanted}, not {brief(value)} of type {type(value).__name__}."
        )
    if least is not None and value < least:
        raise ValueError(f"{owner}: {name} must be {wanted}, not {brief(value)}.")
    return int(value)


def _choice(owner: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{owner}: {name} must be one of {choices}, not {brief(value)}.")
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {choices}, not {brief(value)}.")


def _on(owner: str, value: object, refused: tuple[str, ...]) -> str | tuple[str, ...]:
    """`on=` as a word, a parameter's name or a tuple of names."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            f"{owner}: on must be 'weight', 'bias', 'all', 'output', a parameter's own name "
            f"or a tuple of names, not {brief(value)}."
        )
    if not names or not all(names):
        raise ValueError(f"{owner}: on must name at least one parameter, not {brief(value)}.")
    if names is value:  # no word for several parameters, nor for the output, among the names
        refused = ("all", "output")
    for name in names:
        if name in refused or "." in name:
            raise ValueError(
                f"{owner}: on={name!r} is not possible here; write 'weight' or a parameter's own "
                f"name without dots."
            )
    return value if isinstance(value, str) else tuple(names)


class Term:
    """What acts on a site; compared by class and arguments; `a + b` lists terms."""

    by_identity: ClassVar[frozenset[str]] = frozenset()
    """Fields compared, hashed and shown by identity (functions, reference tensors)."""
    in_step: ClassVar[str | None] = None
    """How an optimizer's step can carry the term: `"gradient"` or `"decay"` before it, `"proximal"`
    or `"projection"` after it; None where it cannot."""
    scheduled: ClassVar[str | None] = None
    """The field that a schedule multiplies."""

    def times(self, factor: float) -> Self:
        """The same term with its strength or rate times the factor; checked like any other."""
        if self.scheduled is None or factor == 1:
            return self
        moved = getattr(self, self.scheduled) * factor
        return dataclasses.replace(self, **{self.scheduled: moved})  # type: ignore[type-var]

    def __add__(self, other: object) -> tuple[Term, ...]:
        if isinstance(other, Term):
            return (self, other)
        return (self, *other) if _is_terms(other) else NotImplemented  # type: ignore[misc]

    def __radd__(self, other: object) -> tuple[Term, ...]:
        return (*other, self) if _is_terms(other) else NotImplemented  # type: ignore[misc]

    def _key(self) -> tuple[object, ...]:
        values = ((f.name, getattr(self, f.name)) for f in _fields(self))
        return (
            type(self),
            *(id(value) if name in self.by_identity else value for name, value in values),
        )

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, Term) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._key())

    def __deepcopy__(self, memo: object) -> Term:
        return self  # immutable; a copy of a model must compare equal to it

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._shown())})"

    def _shown(self) -> list[str]:
        """The arguments as in the source: required ones by position, others only if not default."""
        shown = []
        for f in sorted(_fields(self), key=lambda f: bool(f.kw_only)):
            value = getattr(self, f.name)
            if f.default is dataclasses.MISSING and not f.kw_only:
                shown.append(_source(value))
            elif value != f.default:
                shown.append(f"{f.name}={_source(value)}")
        return shown

    @property
    def family(self) -> tuple[str, ...]:
        """The kind of the term, within which a later rule overrides: its class."""
        return (type(self).__name__,)


def _fields(term: Term) -> tuple[dataclasses.Field[Any], ...]:
    cls: Any = type(term)  # mypy takes it for unhashable
    return _fields_of(cls)


@functools.cache
def _fields_of(cls: type[Any]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls)  # every concrete term is a dataclass


def _is_terms(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(t, Term) for t in value)


def _source(value: object) -> str:
    """`value` as an expression: `torch.nn.AlphaDropout` for a class, its repr otherwise."""
    if isinstance(value, type):
        public = getattr(nn, value.__name__, None) is value
        return (
            f"torch.nn.{value.__name__}" if public else f"{value.__module__}.{value.__qualname__}"
        )
    return getattr(value, "__qualname__", None) or repr(value)


class _Strong(Term):
    """Declares the strength that every weight term takes, each at its own position."""

    strength: float


@dataclass(frozen=True, eq=False, repr=False)
class WeightTerm(_Strong):
    """A term whose value is computed from a tensor: strength * f(tensor)."""

    on: str | tuple[str, ...] = field(default="weight", kw_only=True)

    refused_on: ClassVar[tuple[str, ...]] = ()
    scheduled: ClassVar[str | None] = "strength"

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "strength", number(name, "strength", self.strength))
        object.__setattr__(self, "on", _on(name, self.on, self.refused_on))

    def value(self, w: Tensor, reference: Tensor | None = None) -> Tensor:
        """The penalty of one tensor: 0-dim, differentiable, float32 or wider."""
        raise NotImplementedError

    def pulled(
        self,
        grads: list[Tensor],
        ws: list[Tensor],
        references: list[Tensor],
        by: float,
        outs: list[Tensor] | None,
    ) -> Sequence[Tensor]:
        """The gradients plus `by` times the penalty's own, in `outs` or fresh (`"gradient"`)."""
        raise NotImplementedError

    def shrink_(self, ws: Sequence[Tensor], metric: Metric) -> None:
        """The penalty's proximal step in the metric, in place (`"proximal"`)."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class Timed(WeightTerm):
    """A term that can penalise outputs, and count only when its module was called."""

    when: str = field(default="always", kw_only=True)
    select: str | int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        _choice(name, "when", self.when, ("always", "called"))
        if isinstance(self.select, bool) or not isinstance(self.select, str | int | None):
            raise TypeError(f"{name}: select must be a key or an index, not {self.select!r}.")
        if self.select is not None and self.on != "output":
            raise ValueError(f"{name}: select={self.select!r} needs on='output', not {self.on!r}.")


@dataclass(frozen=True, eq=False, repr=False)
class L1(Timed):
    """L1 penalty: strength * sum(abs(w)); its (sub)gradient is strength * sign(w).

    Args:
        strength: lambda, >= 0.
        on: `"weight"`, `"bias"`, `"all"`, `"output"`, a parameter's own name or a tuple of names.
        when: `"always"`, or `"called"` to count only if the module ran in the last forward.
        solver: `None`, or `"hadamard"` for a smooth W = U * V parametrization.

    Raises:
        TypeError, ValueError: for a strength that is no finite number >= 0.

    Source: Tibshirani, Regression shrinkage and selection via the lasso (1996).
    """

    strength: float
    solver: str | None = field(default=None, kw_only=True)

    in_step: ClassVar[str | None] = "proximal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver is not None:
            _choice("L1", "solver", self.solver, ("hadamard",))
            if self.on == "output" or self.when == "called":
                raise ValueError(
                    f"L1: solver={self.solver!r} changes the weight; it goes with neither "
                    f"on='output' nor when='called', found on={self.on!r}, when={self.when!r}."
                )

    def value(self, w: Tensor, reference: Tensor | None = None) -> Tensor:
        """Strength * sum(abs(w)), accumulated in float32 or wider."""
        return self.strength * plain_l1(w)

    def factored(self, u: Tensor, v: Tensor) -> Tensor:
        """Strength / 2 * (sum(u^2) + sum(v^2)), whose minimum over u * v = w is the L1 of w."""
        return self.strength / 2 * (plain_l2(u) + plain_l2(v))

    def shrink_(self, ws: Sequence[Tensor], metric: Metric) -> None:
        """Every |w| less rate * strength / d, or exactly zero."""
        proximal.shrink_(ws, self.strength, metric)


@dataclass(frozen=True, eq=False, repr=False)
class L2(Timed):
    """L2 penalty: strength / 2 * sum(w^2); its gradient is strength * w.

    In the loss it is what `SGD(weight_decay=strength)` does. Keras' `L2(s)` is `L2(2 * s)` here.

    Args:
        strength: lambda, >= 0.
        on: `"weight"`, `"bias"`, `"all"`, `"output"`, a parameter's own name or a tuple of names.
        when: `"always"`, or `"called"` to count only if the module ran in the last forward.

    Raises:
        TypeError, ValueError: for a strength that is no finite number >= 0.

    Source: Hoerl and Kennard, Ridge regression (1970).
    """

    strength: float

    in_step: ClassVar[str | None] = "gradient"

    def value(self, w: Tensor, reference: Tensor | None = None) -> Tensor:
        """Strength / 2 * sum(w^2), accumulated in float32 or wider."""
        return self.strength / 2 * plain_l2(w)

    def pulled(
        self,
        grads: list[Tensor],
        ws: list[Tensor],
        references: list[Tensor],
        by: float,
        outs: list[Tensor] | None,
    ) -> Sequence[Tensor]:
        """Gradients plus by * strength * w: the bits of `SGD(weight_decay=strength)`."""
        alpha = by * self.strength
        if outs is None:
            return torch._foreach_add(grads, ws, alpha=alpha)
        for gradient, w, out in zip(grads, ws, outs, strict=True):
            torch.add(gradient, w, alpha=alpha, out=out)
        return outs


def ElasticNet(
    strength: float,
    l1_ratio: float,
    *,
    on: str | tuple[str, ...] = "weight",
    when: str = "always",
) -> tuple[Term, ...]:
    """scikit-learn's elastic net: strength * (l1_ratio * |w|_1 + (1 - l1_ratio) / 2 * |w|_2^2).

    A tuple of an `L1` and an `L2`, each overridden like any other.

    Args:
        strength: lambda (scikit-learn's alpha), >= 0.
        l1_ratio: the share of L1, in [0, 1].
        on: as for `L1`.
        when: as for `L1`.

    Raises:
        TypeError, ValueError: for a bad strength or a ratio outside [0, 1].

    Source: Zou and Hastie (2005); `sklearn.linear_model.ElasticNet`.
    """
    strength = number("ElasticNet", "strength", strength)
    ratio = number("ElasticNet", "l1_ratio", l1_ratio)
    if ratio > 1:
        raise ValueError(f"ElasticNet: l1_ratio must be a number in [0, 1], not {l1_ratio!r}.")
    return (
        L1(strength * ratio, on=on, when=when),
        L2(strength * (1 - ratio), on=on, when=when),
    )


@dataclass(frozen=True, eq=False, repr=False)
class GroupLasso(WeightTerm):
    """Group lasso: strength * sum over groups of sqrt(elements of the group) * norm2(group).

    A group is `size` consecutive units along `dim`: neurons, filters, attention heads. The gradient
    of a group that is exactly zero is zero.

    Args:
        strength: lambda, >= 0.
        dim: the dimension along which units are counted.
        size: units a group.
        on: `"weight"`, a parameter's own name or a tuple of names.

    Raises:
        TypeError, ValueError: for a bad argument.
        PolicyError: where `dim` does not exist, or `size` does not divide a tensor.

    Source: Yuan and Lin, Model selection and estimation with grouped variables (2006).
    """

    strength: float
    dim: int = 0
    size: int = 1

    refused_on: ClassVar[tuple[str, ...]] = ("all", "output")
    in_step: ClassVar[str | None] = "proximal"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dim", _integer("GroupLasso", "dim", self.dim))
        object.__setattr__(self, "size", _integer("GroupLasso", "size", self.size, least=1))

    def value(self, w: Tensor, reference: Tensor | None = None) -> Tensor:
        """Strength * sum over groups of sqrt(elements) * norm2."""
        groups = self.grouped(w)
        squares = real(groups).square().flatten(1).sum(1)
        # sqrt has no finite gradient at zero: a group of zeros takes the subgradient zero. Not
        # `squares > 0`: a group that has turned NaN must not count as one of zeros.
        norms = torch.where(squares == 0, 1, squares).sqrt() * (squares != 0)
        return self.strength * math.sqrt(groups.shape[1]) * norms.sum()

    def grouped(self, w: Tensor) -> Tensor:
        """`w` as (groups, elements of a group)."""
        return _rows(w, self.dim, self.size)

    def shrink_(self, ws: Sequence[Tensor], metric: Metric) -> None:
        """Whole groups exactly zero, the others shortened; see `proximal.shrink_groups`."""
        for i, w in enumerate(ws):
            moment = metric.moment(i)
            rows = None if moment is None else real(self.grouped(moment))
            shrunk = proximal.shrink_groups(real(self.grouped(w)), self.strength, metric, rows)
            _write_rows(w, self.dim, shrunk)


def _rows(w: Tensor, dim: int, size: int = 1) -> Tensor:
    """`w` as rows of `size` consecutive units along `dim`."""
    units = w.movedim(dim, 0)
    # not reshape(rows, -1), which a tensor without elements leaves open
    return torch.unflatten(units, 0, (units.shape[0] // size, size)).flatten(1)


def _write_rows(w: Tensor, dim: int, rows: Tensor) -> None:
    """The inverse of `_rows`, into `w`."""
    units = w.movedim(dim, 0)
    units.copy_(rows.reshape(units.shape))


@dataclass(frozen=True, eq=False, repr=False)
class Orthogonal(WeightTerm):
    """Keras' OrthogonalRegularizer on rows: strength * sum(|cos(r_i, r_j)|, i != j) / (n(n-1)).

    Rows of the tensor flattened to (shape[0], -1) are normalised first; of a single row it is 0.

    Args:
        strength: lambda, >= 0.
        on: `"weight"`, a parameter's own name or a tuple of names.

    Raises:
        TypeError, ValueError: for a bad argument.

    Source: `keras.regularizers.OrthogonalRegularizer(mode="rows")`.
    """

    strength: float

    refused_on: ClassVar[tuple[str, ...]] = ("all", "output")

    def value(self, w: Tensor, reference: Tensor | None = None) -> Tensor:
        """Strength * the mean absolute cosine between different rows."""
        rows = w.flatten(1).to(torch.promote_types(w.dtype, torch.float32))
        count = rows.shape[0]
        if count < 2:
            return 0.0 * real(w).sum()
        squares = (rows * rows.conj()).real.sum(1, keepdim=True)
        rows = rows * squares.clamp_min(1e-12).rsqrt()  # Keras' own epsilon
        with _without_autocast(rows):  # which would multiply in halves
            cosines = rows @ rows.mH
        off = cosines - torch.diag_embed(torch.diagonal(cosines))
        return self.strength * off.abs().sum() / (count * (count - 1))


@dataclass(frozen=True, eq=False, repr=False)
class L2SP(Timed):
    """L2 toward a starting point: strength / 2 * sum((w - w0)^2); gradient strength * (w - w0).

    Args:
        strength: lambda, >= 0.
        reference: `None` takes the values at the time of `regularize`; otherwise a mapping such as
            a `state_dict`, or a model.
        on: as for `L1`, without `"output"`.
        when: as for `L1`.

    Raises:
        TypeError, ValueError: for a bad argument.

    Source: Li, Grandvalet and Davoine, Explicit inductive bias for transfer learning (2018).
    """

    strength: float
    reference: Mapping[str, Tensor] | nn.Module | None = None

    by_identity: ClassVar[frozenset[str]] = frozenset({"reference"})
    refused_on: ClassVar[tuple[str, ...]] = ("output",)
    in_step: ClassVar[str | None] = "gradient"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.reference, Mapping | nn.Module | None):
            raise TypeError(
                "L2SP: reference must be None, a mapping such as a state_dict, or a model, "
                f"not {brief(self.reference)}."
            )

    def _shown(self) -> list[str]:
        if self.reference is None:
            return super()._shown()
        plain = dataclasses.replace(self, reference=None)
        first, *others = plain._shown()
        return [first, f"reference=<{type(self.reference).__name__}>", *others]

    def value(self, w: Tensor, reference: Tensor | None = None) -> Tensor:
        """Strength / 2 * sum((w - reference)^2)."""
        if reference is None:
            raise PolicyError("L2SP needs the reference tensor of its site.")
        if reference.shape != w.shape:
            raise PolicyError(
                f"L2SP: the weight has shape {tuple(w.shape)} now, its reference "
                f"{tuple(reference.shape)}; regularize again after a parameter is replaced."
            )
        # Cast before subtracting, the reference to what the weight is: halves would be rounded, and
        # a reference in float64 would widen the whole reg_loss.
        w = real(w)
        return self.strength / 2 * (w - real(reference).to(w.dtype)).square().sum()

    def pulled(
        self,
        grads: list[Tensor],
        ws: list[Tensor],
        references: list[Tensor],
        by: float,
        outs: list[Tensor] | None,
    ) -> Sequence[Tensor]:
        """Gradients plus by * strength * (w - reference)."""
        alpha = by * self.strength
        if outs is None:
            return torch._foreach_add(grads, torch._foreach_sub(ws, references), alpha=alpha)
        for gradient, w, start, out in zip(grads, ws, references, outs, strict=True):
            torch.sub(w, start, out=out)
            torch.add(gradient, out, alpha=alpha, out=out)
        return outs


@dataclass(frozen=True, eq=False, repr=False)
class Penalty(Timed):
    """A penalty of one's own: strength * fn(tensor), any `tensor -> scalar`.

    Args:
        fn: any callable from a tensor to a 0-dim tensor.
        strength: lambda, >= 0.
        name: what tells it from other penalties on the same site; by default the function's name.
        on: as for `L1`.
        when: as for `L1`.

    Raises:
        TypeError, ValueError: for a bad argument.
        PolicyError: when it is pickled and its function cannot be.
    """

    fn: Callable[[Tensor], Tensor]
    strength: float
    name: str = ""

    by_identity: ClassVar[frozenset[str]] = frozenset({"fn"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.fn):
            raise TypeError(
                f"Penalty: fn must be a callable tensor -> scalar, not {brief(self.fn)}."
            )
        if not isinstance(self.name, str):
            raise TypeError(f"Penalty: name must be a string, not {brief(self.name)}.")
        name = self.name or getattr(self.fn, "__name__", type(self.fn).__name__)
        object.__setattr__(self, "name", name)

    @property
    def family(self) -> tuple[str, ...]:
        """The class and the name: differently named penalties stack."""
        return ("Penalty", self.name)

    def __getstate__(self) -> dict[str, Any]:
        try:
            pickle.dumps(self.fn)
        except Exception as error:
            raise PolicyError(
                f"{self!r} cannot be pickled because its function {brief(self.fn)} cannot "
                f"({error}); define the function at the top level of a module."
            ) from error
        return self.__dict__

    def value(self, w: Tensor, reference: Tensor | None = None) -> Tensor:
        """Strength * fn(w), which has to be a single number."""
        result = self.fn(w)
        if not isinstance(result, Tensor) or result.numel() != 1 or result.is_complex():
            raise PolicyError(
                f"{self!r}: its function must return a single real number as a tensor, not "
                f"{_told(result)}."
            )
        return self.strength * result.reshape(()).to(accumulator(result.dtype))


def _told(result: object) -> str:
    if not isinstance(result, Tensor):
        return brief(result)
    return f"a {str(result.dtype).removeprefix('torch.')} of shape {tuple(result.shape)}"


@dataclass(frozen=True, eq=False, repr=False)
class WeightDecay(Term):
    """The optimizer's own weight decay for these parameters, through `param_groups`.

    Decoupled under AdamW (p *= 1 - lr * rate), coupled under SGD and Adam; never in the loss.

    Args:
        rate: the group's `weight_decay`, >= 0.
        on: `"weight"`, `"bias"`, `"all"`, a parameter's own name or a tuple of names.

    Raises:
        TypeError, ValueError: for a bad argument.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization (2019).
    """

    rate: float
    on: str | tuple[str, ...] = field(default="weight", kw_only=True)

    in_step: ClassVar[str | None] = "decay"
    scheduled: ClassVar[str | None] = "rate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", number("WeightDecay", "rate", self.rate))
        object.__setattr__(self, "on", _on("WeightDecay", self.on, ("output",)))

    def decay_(self, ws: list[Tensor], lr: float) -> None:
        """Multiplies w by 1 - lr * rate: what AdamW does before its step."""
        torch._foreach_mul_(ws, 1 - lr * self.rate)


@dataclass(frozen=True, eq=False, repr=False)
class MaxNorm(Term):
    """Keras' constraint: after each optimizer step, units are scaled back to norm2 <= limit.

    Acts through `attach`, never in the loss. A unit is a slice along `dim` (a neuron, a filter),
    its norm goes over everything else: `keras.constraints.MaxNorm(limit, axis=0)` of a Dense
    kernel, which Keras stores transposed, is `MaxNorm(limit, dim=0)` of a Linear's weight.

    Args:
        limit: of a unit's 2-norm, >= 0.
        dim: the dimension along which units are counted.
        on: `"weight"`, a parameter's own name or a tuple of names.

    Raises:
        TypeError, ValueError: for a bad argument.

    Source: Srivastava et al., Dropout (2014), section 5.1; `keras.constraints.MaxNorm`.
    """

    limit: float
    dim: int = 0
    on: str | tuple[str, ...] = field(default="weight", kw_only=True)

    in_step: ClassVar[str | None] = "projection"

    def __post_init__(self) -> None:
        object.__setattr__(self, "limit", number("MaxNorm", "limit", self.limit))
        object.__setattr__(self, "dim", _integer("MaxNorm", "dim", self.dim))
        object.__setattr__(self, "on", _on("MaxNorm", self.on, ("all", "output")))

    def project_(self, ws: Sequence[Tensor]) -> None:
        """Scales units of norm2 above the limit back to it, in place; others keep their bits."""
        for w in ws:
            _write_rows(w, self.dim, proximal.project(real(_rows(w, self.dim)), self.limit))


@dataclass(frozen=True, eq=False, repr=False)
class DropConnect(Term):
    """Elementwise dropout of the weight itself: w -> w * mask / (1 - p), P(mask = 0) = p.

    One draw per read of the weight in training; penalties read the unmasked weight.

    Args:
        p: the rate, in [0, 1).
        on: `"weight"`, a parameter's own name or a tuple of names.

    Raises:
        TypeError, ValueError: for a rate outside [0, 1).

    Source: Wan et al., Regularization of neural networks using DropConnect (2013).
    """

    p: float
    on: str | tuple[str, ...] = field(default="weight", kw_only=True)

    scheduled: ClassVar[str | None] = "p"

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", number("DropConnect", "p", self.p, below=1))
        object.__setattr__(self, "on", _on("DropConnect", self.on, ("all", "output")))


@dataclass(frozen=True, eq=False, repr=False)
class Dropout(Term):
    """A dropout after chosen Linear layers: in training y -> y * mask / (1 - p), P(mask = 0) = p.

    Args:
        p: the rate, in [0, 1).
        at: `"output"`, `"activation"` (behind the activation that follows) or `"input"`.
        kind: the dropout's class, built with one argument, the rate.

    Raises:
        TypeError, ValueError: for a rate outside [0, 1), an unknown place or a kind that is no
            `nn.Module` class.

    Source: Srivastava et al., Dropout (2014); `torch.nn.Dropout`.
    """

    p: float
    at: str = field(default="output", kw_only=True)
    kind: type[nn.Module] = field(default=nn.Dropout, kw_only=True)

    scheduled: ClassVar[str | None] = "p"

    def __post_init__(self) -> None:
        _choice("Dropout", "at", self.at, ("output", "activation", "input"))
        if not (isinstance(self.kind, type) and issubclass(self.kind, nn.Module)):
            raise TypeError(f"Dropout: kind must be a class of nn.Module, not {brief(self.kind)}.")
        object.__setattr__(self, "p", number("Dropout", "p", self.p, below=1))
