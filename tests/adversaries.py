"""Forwards made to mislead a graph: each is rewritten to the very model that it is, or refused.

`check` is the one comparison that `graph` and `surgery.fx` stand on: a rewritten model against the
same model with output hooks, bit for bit.

A case's first line says the trap. `fx` names the layers that are expected to be rewritten ("" none;
None: whatever the survey says, as long as it is right); what the survey calls "never called" must
not be called. `later` is what a user does to the model after the rewrite, to both twins alike.
"""

# Odd on purpose:
# ruff: noqa: RET504, RET506, SIM108, PIE804, UP008

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import math
import random
import sys
import tempfile
import types
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from regwrap import graph
from regwrap.surgery import fx as surgery

WIDTH = 4


@dataclass(frozen=True)
class Adversary:
    """One trap: `build()` makes the model, `inputs()` its arguments."""

    name: str
    trap: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    fx: str | None
    later: Callable[[nn.Module], None] | None

    def __str__(self) -> str:
        return self.name


ADVERSARIES: list[Adversary] = []


def _rows() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1)),), {}


def adversary(
    fx: str | None = None,
    *,
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]] = _rows,
    later: Callable[[nn.Module], None] | None = None,
) -> Callable[[Any], Any]:
    """Enters a class, or a function that makes a model."""

    def enter(make: Any) -> Any:
        trap = (make.__doc__ or make.__name__).split("\n")[0]
        ADVERSARIES.append(Adversary(make.__name__, trap, make, inputs, fx, later))
        return make

    return enter


def x_and(**extra: Any) -> Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]:
    return lambda: (_rows()[0], dict(extra))


class Two(nn.Module):
    """Two layers and an activation: the base of most cases."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.act = nn.GELU()
        self.scale = 0.5
        self.flag = True
        self.register_buffer("count", torch.zeros(()))


# ---- aliasing and in-place operations --------------------------------------------------------


@adversary("fc out")
class AliasThenAugment(Two):
    """`y += 1` changes what `z` is too"""

    def forward(self, x):
        y = self.fc(x)
        z = y
        y += 1
        return self.out(z) * y


@adversary("fc out")
class AugmentANumber(Two):
    """`n += 1` must not change the other name of a number"""

    def forward(self, x):
        n = self.scale
        m = n
        n += 1
        return self.out(self.fc(x) * n) * m


@adversary("fc")
class InPlaceMethod(Two):
    """an in-place method on the layer's output, which is also returned"""

    def forward(self, x):
        y = self.fc(x)
        z = y.mul_(2)
        return y, z


@adversary("fc")
class InPlaceActivation(Two):
    """F.relu_ on the output while another name still means it"""

    def forward(self, x):
        y = self.fc(x)
        F.relu_(y)
        return y + 1


@adversary("fc")
class InPlaceFlag(Two):
    """F.relu(y, inplace=True), result thrown away"""

    def forward(self, x):
        y = self.fc(x)
        F.relu(y, inplace=True)
        return y


@adversary("fc")
class SetItem(Two):
    """`y[:, 0] = 0` on the layer's output"""

    def forward(self, x):
        y = self.fc(x)
        y[:, 0] = 0
        return y


@adversary("fc")
class AugmentItem(Two):
    """`y[0] += 1` through a view"""

    def forward(self, x):
        y = self.fc(x)
        y[0] += 1
        return y


@adversary("fc")
class ViewAugmented(Two):
    """a view of the output is changed, the output is returned"""

    def forward(self, x):
        y = self.fc(x)
        v = y.view(-1)
        v += 1
        return y, v


@adversary("fc out")
class OutputTwice(Two):
    """the same output is returned twice, and used"""

    def forward(self, x):
        y = self.fc(x)
        return y, y, self.out(y)


@adversary("fc")
class ListMutatedByChild(nn.Module):
    """a list is handed to a child, which appends to it"""

    class Appender(nn.Module):
        def forward(self, x, kept):
            kept.append(x)
            return x * 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.child = self.Appender()

    def forward(self, x):
        kept = []
        y = self.child(self.fc(x), kept)
        return y + kept[0] * len(kept)


@adversary("fc")
class ListDisplayTwice(Two):
    """one list under two names"""

    def forward(self, x):
        a = b = [self.fc(x)]
        b.append(x)
        return torch.cat(a, -1)


@adversary("fc")
class DictMade(Two):
    """a dict display is one object"""

    def forward(self, x):
        d = {"a": self.act(x)}
        e = d
        e["b"] = self.fc(x)
        return d


@adversary("fc out")
class UnpackTensor(Two):
    """`a, b, c = tensor` iterates over rows, with the gradient of unbind"""

    def forward(self, x):
        a, b, c = self.fc(x)
        return self.out(a + b * c)


@adversary("fc")
class UnpackWrong(Two):
    """unpacking that fails must fail alike"""

    def forward(self, x):
        a, b = self.fc(x)
        return a + b


@adversary("")
class UnpackStar(Two):
    """`a, *b = ...`"""

    def forward(self, x):
        a, *b = self.fc(x)
        return a + b[0]


@adversary("fc out")
class Swap(Two):
    """`a, b = b, a`"""

    def forward(self, x):
        a, b = self.fc(x), x
        a, b = b, a
        return self.out(a) - b


@adversary("fc out")
class SameNameAgain(Two):
    """one name for everything"""

    def forward(self, x):
        x = self.fc(x)
        x = self.act(x)
        x = self.out(x)
        return x


# ---- values that are decided when it runs ----------------------------------------------------


@adversary("fc", inputs=x_and(mask=None))
class IsNotNone(Two):
    """`mask is not None` is always true for a proxy"""

    def forward(self, x, mask=None):
        y = self.fc(x)
        if mask is not None:
            y = self.out(y) * mask
        return y


@adversary("fc out", inputs=x_and(mask=torch.full((3, 1), 2.0)))
class IsNoneAsValue(Two):
    """`mask is None` used as a number"""

    def forward(self, x, mask=None):
        return self.out(self.fc(x)) * (mask is None) + (mask is not None)


@adversary("out")
class Isinstance(Two):
    """isinstance and type of an argument"""

    def forward(self, x):
        y = self.fc(x) if isinstance(x, Tensor) else x
        return self.out(y), type(y) is Tensor


@adversary("fc out")
class TypeName(Two):
    """type(x).__name__, len and bool of values"""

    def forward(self, x):
        y = self.fc(x)
        n = len(type(y).__name__) + len(y)
        return self.out(y) * n * bool(y.numel())


@adversary("fc")
class EarlyReturn(Two):
    """returns early, before the second layer"""

    def forward(self, x):
        y = self.fc(x)
        if y.sum() > 1e9:
            return y
        return self.out(y)


@adversary("fc out")
class LateBranchReturn(Two):
    """returns in a branch, behind both layers"""

    def forward(self, x, pair=True):
        y = self.fc(x)
        z = self.out(y)
        if not pair:
            return z
        return y, z


@adversary("")
class ReturnInLoop(Two):
    """return inside a loop, around the layers"""

    def forward(self, x):
        for i in range(3):
            x = self.fc(x)
            if i == 1:
                return self.out(x)
        return x


@adversary("out")
class LoopOverRange(Two):
    """the layer is called twice by a loop"""

    def forward(self, x):
        for _ in range(2):
            x = self.fc(x)
        return self.out(x)


@adversary("fc out")
class LoopOverNumbers(Two):
    """a loop that calls no layer"""

    def forward(self, x):
        y = self.fc(x)
        for i in range(3):
            if i == 1:
                continue
            y = y * 2 + i
        else:
            y = y + 1
        return self.out(y)


@adversary("fc")
class While(Two):
    """a while loop over a value"""

    def forward(self, x):
        y = self.fc(x)
        while y.abs().max() > 0.5:
            y = y / 2
        return y


@adversary("fc")
class UnboundAfterBranch(Two):
    """a name that is set in one branch only"""

    def forward(self, x):
        y = self.fc(x)
        if x.sum() > 1e9:
            z = y
        y = y * 2
        if x.sum() > 1e9:
            y = y + z
        return y


@adversary("fc out")
class BothBranchesSet(Two):
    """a name that both branches set"""

    def forward(self, x):
        y = self.fc(x)
        if x.sum() > 0:
            z = y * 2
        else:
            z = y * 3
        return self.out(z)


@adversary("fc out")
class RaisingBranch(Two):
    """a branch that only raises"""

    def forward(self, x):
        if x.dim() != 2:
            raise ValueError("rows, please")
        else:
            n = x.shape[0]
        return self.out(self.fc(x)) * n


@adversary("fc out", inputs=lambda: ((torch.ones(2, 3, WIDTH),), {}))
class Raises(Two):
    """an exception from the middle"""

    def forward(self, x):
        y = self.fc(x)
        assert x.dim() == 2, f"got {x.dim()}"
        return self.out(y)


@adversary("out")
class ConditionalExpression(Two):
    """the layer under `a if c else b`"""

    def forward(self, x):
        y = self.fc(x) if self.flag else x
        return self.out(y)


@adversary("out")
class ShortCircuit(Two):
    """the layer behind `and`, `or`"""

    def forward(self, x):
        y = self.flag and self.fc(x)
        return self.out(y)


@adversary("out")
class ChainedComparison(Two):
    """`0 < f(x) < 1` evaluates its middle once"""

    def forward(self, x):
        y = 0 < self.fc(x).sum() < 1e9
        return self.out(x) * y


@adversary("fc out")
class Walrus(Two):
    """`(y := self.fc(x))` inside an expression"""

    def forward(self, x):
        return self.out((y := self.fc(x)) * 2) + y


@adversary("")
class WalrusInCondition(Two):
    """a walrus in an if"""

    def forward(self, x):
        if (y := self.fc(x)).sum() > -1e9:
            y = y * 2
        return self.out(y)


@adversary("out")
class Comprehension(Two):
    """the layer is called by a comprehension"""

    def forward(self, x):
        rows = [self.fc(r) for r in x]
        return self.out(torch.stack(rows))


@adversary("fc out")
class ComprehensionShadow(Two):
    """a comprehension that has a variable named as one outside"""

    def forward(self, x):
        y = self.fc(x)
        s = [y * 2 for y in (1, 2)]
        return self.out(y) * sum(s)


@adversary(None)
class GeneratorLate(Two):
    """a generator that runs after its variables have changed"""

    def forward(self, x):
        s = 2
        g = (s * v for v in (self.fc(x), self.out(x)))
        s = 3
        return sum(g)


@adversary("")
class IsGenerator(Two):
    """forward is a generator"""

    def forward(self, x):
        yield self.fc(x)
        yield self.out(x)


# ---- attributes that are read when it runs -----------------------------------------------------


def _faster(model):
    model.scale = 7.0
    model.flag = False


@adversary("fc out", later=_faster)
class NumberChangesLater(Two):
    """self.scale and self.flag change after the rewrite"""

    def forward(self, x):
        y = self.fc(x) * self.scale
        y = y + 1 if self.flag else y - 1
        return self.out(y)


def _other_rate(model):
    model.rate = 0.75
    model.drop.p = 0.9


@adversary("fc out", later=_other_rate)
class RatesChangeLater(Two):
    """dropout rates change at run time"""

    def __init__(self):
        super().__init__()
        self.rate, self.drop = 0.1, nn.Dropout(0.2)

    def forward(self, x):
        y = F.dropout(self.fc(x), self.rate, self.training)
        return self.drop(self.out(y))


@adversary("fc out")
class TrainingRead(Two):
    """self.training is read in the body"""

    def forward(self, x):
        y = self.fc(x)
        y = y * (2 if self.training else 3)
        return self.out(y) + self.training


def _replace_children(model):
    torch.manual_seed(5)
    model.fc = nn.Linear(WIDTH, WIDTH)
    model.act = nn.Tanh()


@adversary("", later=_replace_children)
def replaced_later():
    """children replaced after the rewrite; their hooks would go with them"""
    return nn.Sequential(Two())


def _replace_act(model):
    model.act = nn.Tanh()


@adversary("fc out", later=_replace_act)
class ActivationReplacedLater(Two):
    """the activation is replaced after the rewrite"""

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


def _function_replaced(model):
    model.function = torch.tanh


@adversary("fc out", later=_function_replaced)
class FunctionAttribute(Two):
    """the activation is a function in an attribute, and is replaced"""

    def __init__(self):
        super().__init__()
        self.function = F.relu

    def forward(self, x):
        return self.out(self.function(self.fc(x)))


@adversary("fc out")
class PropertyWithEffect(Two):
    """a property that counts how often it is read"""

    def __init__(self):
        super().__init__()
        self.reads = 0

    @property
    def factor(self):
        self.reads += 1
        return float(self.reads)

    def forward(self, x):
        y = self.fc(x) * self.factor
        return self.out(y) * self.factor + self.factor


@adversary("out")
class PropertyCallsLayer(Two):
    """a property that calls the layer"""

    @property
    def bias(self):
        return self.fc(torch.ones(1, WIDTH))

    def forward(self, x):
        return self.out(x) + self.bias


@adversary("fc")
class SetsAttribute(Two):
    """forward leaves something on the module"""

    def forward(self, x):
        self.last = self.fc(x)
        self.count += 1
        return self.last * self.count


@adversary("out")
class ReplacesLayerInForward(Two):
    """forward puts another layer in the place of one"""

    def forward(self, x):
        self.fc = copy.deepcopy(self.fc) if self.flag else self.fc
        return self.out(self.fc(x))


@adversary("")
class GetattrByName(Two):
    """getattr(self, name) with a computed name"""

    def forward(self, x):
        layer = getattr(self, "f" + "c" if self.flag else "act")
        return self.out(layer(x))


class One(nn.Module):
    """One layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(x)


@adversary("")
class LooksForDropouts(nn.Module):
    """loops over modules() only to see whether there is a dropout"""

    def __init__(self):
        super().__init__()
        self.one = One()

    def forward(self, x):
        if any(isinstance(m, nn.Dropout) for m in self.modules()):
            x = x * 3
        return self.one(x)


@adversary("")
class LooksForChildren(One):
    """the same over its own children"""

    def forward(self, x):
        n = sum(1 for _ in self.children())
        return self.fc(x) * n


@adversary("")
class ExactClassOfChild(nn.Module):
    """compares the exact class of a child"""

    def __init__(self):
        super().__init__()
        self.one = One()

    def forward(self, x):
        return self.one(x) * (2 if type(self.one) is One else 1)


@adversary("")
class ExactClassByAttribute(nn.Module):
    """compares the `__class__` of a child"""

    def __init__(self):
        super().__init__()
        self.one = One()

    def forward(self, x):
        return self.one(x) * (2 if self.one.__class__ == One else 1)


@adversary("")
class GetattrNumbered(nn.Module):
    """getattr(self, name) in a comprehension; nothing names the layers that it gets"""

    def __init__(self):
        super().__init__()
        self.fc0 = nn.Linear(WIDTH, WIDTH)
        for i in range(1, 3):
            setattr(self, f"fc{i}", nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        y = self.fc0(x)
        return [getattr(self, f"fc{i}")(y) for i in range(1, 3)]


@adversary("fc out")
class GetattrWritten(Two):
    """getattr(self, "fc") with the name written there"""

    def forward(self, x):
        return getattr(self, "out")(getattr(self, "fc")(x))  # noqa: B009


@adversary("")
class GetattrLoop(Two):
    """layers by name in a loop"""

    def forward(self, x):
        for name in ("fc", "out"):
            x = getattr(self, name)(x)
        return x


@adversary("")
class ModulesDict(Two):
    """layers out of self._modules"""

    def forward(self, x):
        return self._modules["out"](self._modules["fc"](x))


@adversary("")
class Children(Two):
    """runs self.children(), where an inserted child would be run too"""

    def __init__(self):
        super().__init__()
        del self.act

    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


@adversary("")
class LastOfModules(Two):
    """list(self.modules())[-1]"""

    def forward(self, x):
        return list(self.modules())[1](x)


@adversary("inner.out")
class CustomGetattr(nn.Module):
    """a wrapper whose __getattr__ forwards to what it wraps"""

    def __init__(self):
        super().__init__()
        self.inner = AliasThenAugment()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.fc(x) + self.inner(x)


@adversary("")
class CustomGetattribute(Two):
    """a __getattribute__ of the author's"""

    def __getattribute__(self, name):
        return super().__getattribute__("fc" if name == "fd" else name)

    def forward(self, x):
        return self.out(self.fd(x))


@adversary("fc out")
class ClassShadowsChild(Two):
    """a class attribute hides nothing that is registered under another name"""

    gain = 3.0

    def forward(self, x):
        return self.out(self.fc(x)) * self.gain


# ---- globals and closures ----------------------------------------------------------------------

GAIN = 2.0
HELD: list[nn.Module] = []


def _gain(model):
    global GAIN
    GAIN = 2.0 if GAIN == 3.0 else 3.0


@adversary("fc out", later=_gain)
class GlobalChanges(Two):
    """a global number that changes later"""

    def forward(self, x):
        return self.out(self.fc(x) * GAIN)


def outside(value):
    return value * 2


def _other_function(model):
    globals()["outside"] = (lambda v: v * 5) if model.flag else outside


@adversary("fc out")
class GlobalFunction(Two):
    """a plain function of the module"""

    def forward(self, x):
        return self.out(outside(self.fc(x)))


def runs_fc(module, x):
    return module.fc(x)


@adversary("")
class HandsSelfOn(Two):
    """a function that is given self calls a layer"""

    def forward(self, x):
        return runs_fc(self, x) + self.fc(x) + getattr(self, "out")(x) * self.mystery(self)  # noqa: B009

    def mystery(self, other):
        return other.out(torch.ones(WIDTH))


class Processor:
    """Calls the layers of the module that it is given, as diffusers' attention has it."""

    def __call__(self, module, x):
        return module.out(module.fc(x))


HERE = sys.modules[__name__]
PROCESSOR = Processor()
PROCESSORS = {"plain": Processor.__call__}


class ModuleProcessor(nn.Module):
    """The same, a module itself."""

    def forward(self, module, x):
        return module.out(module.fc(x))


def runs_both(module, x):
    return module.out(module.fc(x))


@adversary("")
class HandsSelfToProcessor(Two):
    """an object that lies in an attribute is given self; no code of the class names the layers"""

    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


@adversary("")
class HandsChildToModule(nn.Module):
    """a sibling is given the module whose layers it calls"""

    def __init__(self):
        super().__init__()
        self.block = Two()
        self.processor = ModuleProcessor()

    def forward(self, x):
        return self.processor(self.block, x)


@adversary("")
class HandsSelfToFunctions(Two):
    """functions in an attribute, in a list and in a partial are given self"""

    def __init__(self):
        super().__init__()
        self.run = runs_both
        self.runs = [runs_both]
        self.partial = functools.partial(runs_both)

    def forward(self, x):
        return self.run(self, x) + self.runs[0](self, x) + self.partial(self, x)


@adversary("")
class HandsSelfToClassAttribute(Two):
    """functions in a tuple of the class are given self"""

    steps = (runs_both,)

    def forward(self, x):
        for step in self.steps:
            x = step(self, x)
        return x


@adversary("")
class HandsSelfToGlobalObject(Two):
    """a global object is given self"""

    def forward(self, x):
        return PROCESSOR(self, x)


@adversary("")
class HandsSelfToImported(Two):
    """a function of an imported module is given self"""

    def forward(self, x):
        return HERE.runs_both(self, x)


@adversary("")
class HandsSelfToRegistry(Two):
    """a function in a global dict is given self"""

    def forward(self, x):
        return PROCESSORS["plain"](None, self, x)


@adversary("")
class HandsSelfToNewObject(Two):
    """an object made in the forward is given self"""

    def forward(self, x):
        return Processor()(self, x)


@adversary("")
class HandsSelfToDefault(Two):
    """a function that is an argument's default is given self"""

    def forward(self, x, run=runs_both):
        return run(self, x)


@adversary("out")
class HandsSelfToReader(Two):
    """a function that is given self and calls one of two layers"""

    def forward(self, x):
        return runs_fc(self, x) + self.out(self.fc(x))


def reads_scale(module, x):
    return x * module.scale


@adversary("fc out")
class HandsSelfToHarmless(Two):
    """a function that is given self and only reads a number"""

    def forward(self, x):
        return reads_scale(self, self.out(self.fc(x)))


def runs_all(layers, x):
    for layer in layers:
        x = layer(x)
    return x


@adversary("")
class HandsListOn(nn.Module):
    """a function that is given the ModuleList runs what is in it"""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        return runs_all(self.layers, x) + self.layers[0](x)


@adversary("")
class GlobalModule(nn.Module):
    """a module in a global variable calls the layer"""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        globals()["THE_MODEL"] = self

    def forward(self, x):
        return self.fc(x) + _through_global(x)


def _through_global(x):
    return THE_MODEL.fc(x)  # noqa: F821


@adversary("")
def closure_forward():
    """forward closes over a variable"""
    factor = 3.0

    class Closed(Two):
        def forward(self, x):
            return self.out(self.fc(x)) * factor

    return Closed()


@adversary("")
class LambdaInside(Two):
    """a lambda that calls the layer"""

    def forward(self, x):
        f = lambda v: self.fc(v)  # noqa: E731
        return self.out(f(x))


@adversary("")
class InnerFunction(Two):
    """a function defined in forward"""

    def forward(self, x):
        def run(v):
            return self.fc(v)

        return self.out(run(x))


class Based(Two):
    def forward(self, x):
        return self.out(self.fc(x))


@adversary("fc out")
class Super(Based):
    """super().forward()"""

    def forward(self, x):
        return super().forward(x) * 2


class Middle(Based):
    def help(self, x):
        return self.fc(x) * 2

    def forward(self, x, gain=2.0, **kwargs):
        return super().forward(x) * gain


class Side(nn.Module):
    def forward(self, x):
        return super().forward(x + 1) - 1


@adversary("fc out")
class SuperTwice(Side, Middle):
    """super() through a mixin and two bases, which depends on the order of the bases"""

    def help(self, x):
        return super().help(x) + self.fc(x)

    def forward(self, x):
        return super().forward(x) + self.help(x)


@adversary("")
class SuperInBranch(Based):
    """super() under a condition"""

    def forward(self, x):
        return super().forward(x) if self.flag else x


@adversary("")
class SuperKept(Based):
    """super() as a value"""

    def forward(self, x):
        above = super()
        return above.forward(x) + super(SuperKept, self).forward(x)


@adversary("out")
class SuperUnreached(Based):
    """the base's forward, which calls fc, never runs"""

    def forward(self, x):
        return self.out(x)


@adversary("")
class SuperOfSequential(nn.Sequential):
    """super().forward of a stock Sequential"""

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return super().forward(x) + 1


@adversary("fc")
class SubclassedLinear(nn.Module):
    """a layer with a forward of its own, which calls super().forward"""

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    def __init__(self):
        super().__init__()
        self.fc = self.Scaled(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(x)


def by_proxy(x, module):
    return runs_fc(module, x)


@adversary("")
class HandsSelfTwice(nn.Module):
    """a function that hands self to a function that calls the layer, which forward never names"""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return by_proxy(x, self)


@adversary("")
class Wrapped(nn.Module):
    """the layer lies in a module that is kept in a list"""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.kept = [nn.Sequential(self.fc)]

    def forward(self, x):
        return self.kept[0](x) + self.fc(x)


@adversary("")
class ByClass(Based):
    """Base.forward(self, x)"""

    def forward(self, x):
        return Based.forward(self, x) * 2


@adversary("fc out")
class Inherits(Based):
    """forward is inherited"""


def _twice(function):
    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        return function(self, *args, **kwargs) * 2

    return wrapped


@adversary("")
class Decorated(Two):
    """forward is decorated"""

    @_twice
    def forward(self, x):
        return self.out(self.fc(x))


@adversary("")
class NoGradDecorator(Two):
    """@torch.no_grad() on forward"""

    @torch.no_grad()
    def forward(self, x):
        return self.out(self.fc(x))


def _marked(function):
    function.marked = True
    return function


@adversary("fc out")
class MarkingDecorator(Two):
    """a decorator that gives the function back"""

    @_marked
    def forward(self, x):
        return self.out(self.fc(x))


# ---- context managers and random state ---------------------------------------------------------


@adversary("out")
class NoGradInside(Two):
    """no_grad around one layer"""

    def forward(self, x):
        with torch.no_grad():
            y = self.fc(x)
        return self.out(y)


@adversary("fc out")
class NoGradAround(Two):
    """no_grad around what is no layer"""

    def forward(self, x):
        y = self.fc(x)
        with torch.no_grad():
            s = y.sum()
        return self.out(y) * s


@adversary("out")
class Autocast(Two):
    """autocast around one layer"""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.fc(x)
        return self.out(y.float())


@adversary("fc out")
class GradModeSet(Two):
    """torch.set_grad_enabled as a statement"""

    def forward(self, x):
        y = self.fc(x)
        torch.set_grad_enabled(False)
        z = y * 2
        torch.set_grad_enabled(True)
        return self.out(y) + z


@adversary("fc out")
class Suppress(Two):
    """a name set under contextlib.suppress"""

    def forward(self, x):
        y = self.fc(x)
        z = y
        with suppress(RuntimeError):
            z = y.view(7, 7)
        return self.out(z)


@adversary("fc out")
class RandomInside(Two):
    """noise before, between and behind the layers"""

    def forward(self, x):
        x = x + torch.randn_like(x)
        y = self.fc(x) * torch.rand(1)
        y = y + torch.randn(WIDTH)
        return self.out(y) + torch.rand(())


@adversary("fc out")
class SeedsInside(Two):
    """seeds the generator in the middle"""

    def forward(self, x):
        y = self.fc(x)
        torch.manual_seed(3)
        return self.out(y) + torch.rand(())


@adversary("fc out")
class PythonRandom(Two):
    """Python's random and math"""

    def forward(self, x):
        y = self.fc(x) * math.sqrt(self.scale)
        random.seed(0)
        return self.out(y) * random.random()


@adversary("fc out")
class Constants(Two):
    """tensors made in forward, changed in place"""

    def forward(self, x):
        z = torch.zeros(WIDTH)
        z += self.count
        self.count.add_(1)
        return self.out(self.fc(x) + z)


@adversary("fc")
class TryExcept(Two):
    """a layer inside try"""

    def forward(self, x):
        y = self.fc(x)
        try:
            y = self.out(y).view(7, 7)
        except RuntimeError:
            y = y + 1
        return y


@adversary("out")
class Checkpointed(Two):
    """a layer that checkpoint runs"""

    def forward(self, x):
        return self.out(checkpoint(self.fc, x, use_reentrant=False))


@adversary("")
class LambdaCheckpointed(Two):
    """a lambda that checkpoint runs"""

    def forward(self, x):
        return self.out(checkpoint(lambda v: self.fc(v), x, use_reentrant=False))


@adversary("fc out")
class CheckpointedMethod(Two):
    """a method that checkpoint runs again in backward"""

    def body(self, x):
        return self.act(self.fc(x))

    def forward(self, x):
        return self.out(checkpoint(self.body, x, use_reentrant=False))


# ---- who calls ---------------------------------------------------------------------------------


@adversary("fc out")
class Helpers(Two):
    """helpers call the layers, one of them with a branch"""

    def first(self, x, double=False):
        y = self.fc(x)
        if double:
            y = y * 2
        return y

    def second(self, x):
        return self.out(x)

    def forward(self, x):
        return self.second(self.first(x, double=True)) + self.first(x)


@adversary("fc out")
class HelperOutside(Two):
    """a public method that the user calls too"""

    def encode(self, x):
        return self.fc(x)

    def forward(self, x):
        return self.out(self.encode(x)), self.encode(x)


@adversary("out")
class StaticHelper(Two):
    """a static method is given the layer"""

    @staticmethod
    def run(layer, x):
        return layer(x)

    def forward(self, x):
        return self.out(self.run(self.fc, x))


@adversary("out")
class BoundMethodKept(Two):
    """a bound method kept in an attribute before the rewrite"""

    def __init__(self):
        super().__init__()
        self.kept = self.first

    def first(self, x):
        return self.fc(x)

    def forward(self, x):
        return self.out(self.kept(x) + self.first(x))


@adversary("out")
class LayerKept(Two):
    """the layer also lies in a list"""

    def __init__(self):
        super().__init__()
        self.kept = [self.fc]

    def forward(self, x):
        return self.out(self.kept[0](x) + self.fc(x))


@adversary("out")
class LayerInClosure(Two):
    """the layer lies in a closure"""

    def __init__(self):
        super().__init__()
        fc = self.fc
        self.kept = lambda x: fc(x)

    def forward(self, x):
        return self.out(self.kept(x) + self.fc(x))


@adversary("out")
class ForwardDirectly(Two):
    """self.fc.forward(x): no hook of the layer fires"""

    def forward(self, x):
        return self.out(self.fc.forward(x))


@adversary("out")
class CallDirectly(Two):
    """self.fc.__call__(x)"""

    def forward(self, x):
        return self.out(self.fc.__call__(x))


@adversary("out")
class WeightOnly(Two):
    """a layer of which only the weight is used"""

    def forward(self, x):
        return self.out(F.linear(x, self.fc.weight, self.fc.bias))


@adversary("out")
class WeightAndCall(Two):
    """the layer is called under a condition, its weight is used elsewhere"""

    def forward(self, x):
        y = x @ self.fc.weight
        if self.flag:
            y = self.fc(y)
        return self.out(y)


@adversary("fc")
class Alias(nn.Module):
    """one layer under two names, both called"""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.alias = self.fc

    def forward(self, x):
        return self.alias(self.fc(x))


@adversary("a.fc")
def shared_by_two_owners():
    """one layer in two owners"""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = ActivationReplacedLater(), ActivationReplacedLater()
            self.b.fc = self.a.fc
            self.a.out = self.b.out = nn.Identity()

        def forward(self, x):
            return self.b(self.a(x))

    return Pair()


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Based()

    def forward(self, x):
        return self.head(x)


@adversary("head.fc head.out")
class ReachThrough(Headed):
    """an ancestor reaches through: self.head.fc(x); the head's forward runs too"""

    def forward(self, x):
        y = self.head(x)
        return self.head.fc(y)


@adversary(None)
class ReachThroughVariable(Headed):
    """head = self.head; head.fc(x)"""

    def forward(self, x):
        head = self.head
        return head.fc(x) + head(x)


@adversary("")
class ReachThroughLoop(nn.Module):
    """a loop over the blocks that calls their layers"""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Based() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block.out(block.fc(x))
        return x


@adversary("blocks.0.fc blocks.0.out blocks.1.fc blocks.1.out")
class LoopOverBlocks(nn.Module):
    """a loop over the blocks that calls the blocks"""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Based() for _ in range(2))

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x) * i
        for block in reversed(self.blocks[:1]):
            x = block(x)
        return x


@adversary("blocks.0.fc blocks.0.out blocks.1.fc blocks.1.out")
class CheckpointedBlocks(nn.Module):
    """a loop that hands the blocks to checkpoint"""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Based() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


@adversary("layers.0 layers.1 layers.2")
class Indexed(nn.Module):
    """a ModuleList by index, from both ends"""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return self.layers[-1](self.layers[1](self.layers[0](x)))


@adversary("")
class IndexedByValue(nn.Module):
    """a ModuleList by a computed index"""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, i=1):
        return self.layers[i](self.layers[0](x))


@adversary("")
class LoopOverLayers(nn.Module):
    """a loop over a ModuleList of layers"""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@adversary("heads.a heads.b")
class ByKey(nn.Module):
    """a ModuleDict by key"""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({k: nn.Linear(WIDTH, WIDTH) for k in "ab"})

    def forward(self, x):
        return {"a": self.heads["a"](x), "b": self.heads["b"](x)}


class MyList(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


@adversary("")
class ListWithForward(nn.Module):
    """a ModuleList subclass with a forward of its own"""

    def __init__(self):
        super().__init__()
        self.stack = MyList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x):
        return self.stack(x)


class MySequential(nn.Sequential):
    def forward(self, x):
        return self.fc(x) + x


@adversary("inner.fc")
class SequentialWithForward(nn.Module):
    """a Sequential subclass with a straight forward of its own"""

    def __init__(self):
        super().__init__()
        self.inner = MySequential()
        self.inner.add_module("fc", nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.inner(x)


@adversary("")
def stock_sequential():
    """a stock Sequential"""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


@adversary("")
class Poolformer(nn.Module):
    """the layer lies in a Sequential that never runs: the root calls self.head.fc"""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential()
        self.head.add_module("fc", nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.head.fc(x)


@adversary("")
def patched_forward():
    """forward was replaced on the instance"""
    model = Based()
    fc = model.fc
    model.forward = lambda x: fc(x) * 2
    return model


@adversary("")
def patched_by_method():
    """forward was replaced by a bound method"""
    model = Based()
    model.forward = types.MethodType(lambda self, x: self.out(self.fc(x)) * 3, model)
    return model


@adversary("")
def wrapped_forward():
    """forward was wrapped on the instance, as accelerate does"""
    model = Based()
    old = model.forward

    @functools.wraps(old)
    def forward(*args, **kwargs):
        return old(*args, **kwargs) + 1

    model.forward = forward
    return model


@adversary("fc out")
def patched_helper():
    """a helper was replaced on the instance"""
    model = HelperOutside()
    model.out = nn.Identity()
    del model.out
    model.out = nn.Linear(WIDTH, WIDTH)
    return model


@adversary("out")
def patched_encode():
    """the helper that calls the layer was replaced on the instance"""
    model = HelperOutside()
    model.encode = types.MethodType(lambda self, x: self.fc(x) * 2, model)
    return model


@adversary("")
def no_source():
    """a class made by exec"""
    scope: dict[str, Any] = {"Two": Two}
    exec(
        "class Hidden(Two):\n    def forward(self, x):\n        return self.out(self.fc(x))\n",
        scope,
    )
    return scope["Hidden"]()


@adversary("")
def edited_source():
    """the file was edited after the import"""
    text = "from adversaries import Two\n\nclass E(Two):\n"
    text += "    def forward(self, x):\n        return self.{}(x)\n"
    folder = Path(tempfile.mkdtemp())
    path = folder / "edited_adversary.py"
    path.write_text(text.format("fc"))
    spec = importlib.util.spec_from_file_location("edited_adversary", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["edited_adversary"] = module
    spec.loader.exec_module(module)
    path.write_text(text.format("out"))
    return module.E()


@adversary("")
def lambda_forward():
    """forward is a lambda"""

    class L(Two):
        forward = lambda self, x: self.out(self.fc(x))  # noqa: E731

    return L()


@adversary("fc out")
class TwoNames(Two):
    """one function is forward and another name"""

    def run(self, x):
        return self.out(self.fc(x))

    forward = run


@adversary("fc out")
class CallOverridden(Two):
    """__call__ is overridden"""

    def __call__(self, x):
        return super().__call__(x * 2)

    def forward(self, x):
        return self.out(self.fc(x))


@adversary("out")
def hook_calls_layer():
    """a user's hook on the owner calls its layer"""
    model = Based()
    model.register_forward_hook(lambda m, args, out: m.fc(out))
    return model


@adversary("fc out")
def hook_harmless():
    """a user's hook on the owner and one on a layer"""
    model = Based()
    model.register_forward_hook(lambda m, args, out: out * 2)
    model.fc.register_forward_hook(lambda m, args, out: out + 1)
    return model


@adversary("fc out")
def pre_hook_with_kwargs():
    """a pre-hook that changes what forward gets"""
    model = RichSignature()
    model.register_forward_pre_hook(
        lambda m, args, kwargs: (args, {**kwargs, "gain": 3.0}), with_kwargs=True
    )
    return model


@adversary("fc")
class Recursive(Two):
    """calls itself"""

    def forward(self, x, depth=1):
        y = self.fc(x)
        return self(y, 0) if depth else self.out(y)


@adversary("")
def scripted_child():
    """a ScriptModule child, on which no hook fires"""

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():  # torch.jit is deprecated
                warnings.simplefilter("ignore")
                self.fc = torch.jit.script(nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            return self.fc(x)

    return Scripted()


@adversary("")
def graph_module():
    """a GraphModule"""
    return torch.fx.symbolic_trace(Based())


# ---- signatures and calls ----------------------------------------------------------------------


@adversary("fc out")
class RichSignature(Two):
    """defaults, annotations, keyword-only, star arguments"""

    def forward(self, x: Tensor, *rest: float, gain: float = GAIN, **extra: Any) -> Tensor:
        """Its documentation."""
        y = self.fc(x) * gain
        for r in rest:
            y = y + r
        return self.out(y) + len(extra)


@adversary("fc out", inputs=lambda: ((*_rows()[0], 1.0, 2.0), {"gain": 5.0, "more": 1}))
class StarArguments(RichSignature):
    """the same, called with all of them"""


@adversary("fc", inputs=x_and(shape=(2, 2), keyword=1))
class StarCalls(Two):
    """calls with stars"""

    def forward(self, x, shape, **kwargs):
        y = self.fc(*(x,)).view(-1, *shape)
        return torch.add(y, **{"other": 1.0}), dict(**kwargs), (*shape, 3), [*shape]


@adversary("fc out")
class NamesOfBuiltins(Two):
    """parameters and variables named like builtins and modules"""

    def forward(self, input):
        torch = self.fc(input)
        list = self.out(torch)
        children = list * 2
        return children + torch


@adversary("fc out")
class OtherSelf(Two):
    """self has another name, and F is imported by two names"""

    def forward(this, x):
        return functional.relu(this.out(F.relu(this.fc(x))))


@adversary("")
class ReassignsSelf(Two):
    """self is assigned to"""

    def forward(self, x):
        y = self.fc(x)
        self, z = self.out, y
        return self(z)


@adversary("")
class Private(Two):
    """a private name, mangled by the class"""

    def __init__(self):
        super().__init__()
        self.__gain = 3.0

    def forward(self, x):
        return self.out(self.fc(x)) * self.__gain


@adversary("")
class PrivateLayers(nn.Module):
    """layers under private names, mangled by the class"""

    def __init__(self):
        super().__init__()
        self.__fc = nn.Linear(WIDTH, WIDTH)
        self.__stack = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])

    def forward(self, x):
        for layer in self.__stack:
            x = layer(x)
        return self.__fc(x)


@adversary("fc out")
class LongStrings(Two):
    """strings of several lines, f-strings, brackets"""

    def forward(self, x):
        y = self.fc(x)
        s = """a
        b{c}"""
        t = f"{len(s)!r:>4} {s}"
        return self.out(y) * len(t), {"k{": s}


@adversary("fc out")
class NumbersAsText(Two):
    """constants that need care when written"""

    def forward(self, x):
        y = self.fc(x) ** 2 * -1e-300 + (-2) ** 2 - (1).bit_length()
        return self.out(y), 1e999, -0.0, 2j, b"x", ..., None, (1,), ()


@adversary("fc out")
class Slices(Two):
    """every form of index"""

    def forward(self, x):
        y = self.fc(x)
        return self.out(y)[..., None, 1:3], y[:, -1], y[::2], y[0], y[(0, 1)], y[[0, 1]], y[0:, :]


@adversary("fc out")
class MatMul(Two):
    """every operator"""

    def forward(self, x):
        y = self.fc(x)
        z = y @ y.T % 3 - y.sum() / 2 + (y.detach() // 1).sum()
        b = (y > 0) & ~(y < 1) | (y == 2) ^ (y != 3)
        return self.out(y), +z, b, not y.numel(), 1 << 2 >> 1, y >= 0, y <= 0


@adversary("fc out")
class OrderOfEvaluation(Two):
    """the callee is looked up before its arguments run, which replace it"""

    def __init__(self):
        super().__init__()
        self.function = F.relu

    def rebind(self, x):
        self.function = torch.tanh
        return x

    def forward(self, x):
        y = self.function(self.rebind(self.fc(x)))
        self.function = F.relu
        return self.out(y)


@adversary("fc out")
class ReadBeforeEffect(Two):
    """a number is read before a call changes it"""

    def bump(self, x):
        self.scale += 1
        return x

    def forward(self, x):
        y = self.scale * self.bump(self.fc(x)) * self.scale
        return self.out(y)


@adversary("fc out")
class DeleteName(Two):
    """del of a variable"""

    def forward(self, x):
        y = self.fc(x)
        z = self.out(y)
        del y
        return z


@adversary("fc out")
class NoReturn(Two):
    """forward returns nothing and leaves its result on itself"""

    def forward(self, x):
        self.result = self.out(self.fc(x))


@adversary("fc out")
class NamedTuples(Two):
    """outputs in a namedtuple and a NamedTuple"""

    class Out(NamedTuple):
        a: Tensor
        b: Tensor

    def forward(self, x):
        y = self.fc(x)
        return self.Out(y, Pair2(self.out(y), y))


Pair2 = namedtuple("Pair2", "p q")


@adversary("fc out")
class DtypeCast(Two):
    """a cast that depends on the weight's dtype, as in T5"""

    def forward(self, x):
        y = self.fc(x)
        if isinstance(self.out.weight, Tensor) and y.dtype != self.out.weight.dtype:
            y = y.to(self.out.weight.dtype)
        return self.out(y)


@adversary("inner.fc inner.out")
def t5_in_bfloat16():
    """the same in bfloat16 with a float32 layer"""
    model = DtypeCast()
    model.fc.to(torch.bfloat16)
    return Cast(model)


class Cast(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.to(torch.bfloat16))


@adversary("fc out")
class Warns(Two):
    """null context and print-like effects"""

    def forward(self, x):
        with nullcontext():
            n = 1
        return self.out(self.fc(x)) * n


@adversary("fc out")
class DoubleCall(Two):
    """a layer called three times in one expression"""

    def forward(self, x):
        return self.fc(self.fc(x)) + self.fc(x) * self.out(x)


@adversary("fc")
class DropAlready(Two):
    """a dropout behind the activation is there already"""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return self.drop(self.act(self.fc(x)))


@adversary("fc out")
class SwiGLU(Two):
    """a gate product is no activation"""

    def forward(self, x):
        return F.silu(self.fc(x)) * self.out(x)


@adversary("")
class NestedCallsInAnd(Two):
    """layers on both sides of `or` in an argument"""

    def forward(self, x):
        return torch.add(self.flag or self.fc(x), self.out(x) if self.flag else x)


@adversary("fc out")
class Match(Two):
    """forward(x, **kwargs) hands everything on"""

    def forward(self, x, **kwargs):
        return self.out(self.fc(x), **kwargs)


@adversary("")
class MatchStatement(Two):
    """a match statement"""

    def forward(self, x):
        match self.flag:
            case True:
                return self.fc(x)
            case _:
                return self.out(x)


@adversary("")
class ImportInside(Two):
    """an import in forward"""

    def forward(self, x):
        import math as m

        return self.out(self.fc(x)) * m.pi


@adversary("")
class LocalsInside(Two):
    """locals() sees the variables"""

    def forward(self, x):
        y = self.fc(x)
        return self.out(y), sorted(locals())


@adversary("")
class EvalInside(Two):
    """eval of a text that calls the layer"""

    def forward(self, x):
        return self.out(eval("self.fc(x)"))


# ---- the comparison ---------------------------------------------------------------------------

Inputs = Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
Later = Callable[[nn.Module], None]
RATE = 0.4


def rewrite_all(model: nn.Module, verdicts: Mapping[str, graph.Verdict], p: float = RATE) -> None:
    """A dropout behind every layer that the survey says may have one by fx."""
    inserts: dict[str, list[surgery.Insert]] = {}
    for verdict in verdicts.values():
        for site in verdict.sites if verdict.by_fx else ():
            inserts.setdefault(site.owner, []).append(surgery.Insert(site.child, p))
    for owner, wanted in inserts.items():
        surgery.rewrite(model.get_submodule(owner), wanted)


def hook_all(model: nn.Module, verdicts: Mapping[str, graph.Verdict], p: float = RATE) -> None:
    """The same by output hooks."""
    for path, verdict in verdicts.items():
        if verdict.by_fx:
            model.get_submodule(path).register_forward_hook(_dropper(p))


def _dropper(p: float) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    return lambda layer, args, out: F.dropout(out, p) if layer.training else None


def calls_counted(model: nn.Module, paths: Any, inputs: Inputs) -> dict[str, int]:
    """How often each layer is called by one forward in training."""
    counts = dict.fromkeys(paths, 0)

    def counter(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[path] += 1

        return hook

    for path in paths:
        layer = model.get_submodule(path)
        if not isinstance(layer, torch.jit.ScriptModule):
            layer.register_forward_hook(counter(path))
    run(model.train(), inputs)
    return counts


@dataclass
class Result:
    """All that a forward and its backward leave behind."""

    output: Any
    gradients: list[Tensor | None]
    random: Tensor
    attributes: dict[str, Any]


def run(model: nn.Module, inputs: Inputs, backward: bool = True) -> Result:
    """One forward and backward under a fixed seed; an exception is an output too."""
    args, kwargs = inputs()
    leaves = [t.requires_grad_() for t in tensors((args, kwargs)) if t.is_floating_point()]
    model.zero_grad()
    torch.manual_seed(7)
    try:
        output = model(*args, **kwargs)
        if hasattr(output, "__next__"):
            output = list(output)
    except Exception as error:
        output = (type(error), str(error))
    total = [t.float().sum() for t in tensors(output) if t.requires_grad]
    try:
        if total and backward:
            torch.stack(total).sum().backward()
    except RuntimeError as error:  # the plain model cannot do it either (rwkv)
        output = (type(error), str(error).split("[")[0])
    params = [p.grad for p in model.parameters()]
    kept = {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        if "regwrap_dropout" not in path
        for name, value in vars(module).items()
        if isinstance(value, Tensor | float | int)
    }
    buffers = dict(model.named_buffers())
    return Result(
        output, [t.grad for t in leaves] + params, torch.get_rng_state(), {**kept, **buffers}
    )


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors([getattr(value, f.name) for f in dataclasses.fields(value)])


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal, bit for bit and type for type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        equal = a.shape == b.shape and a.dtype == b.dtype and a.requires_grad == b.requires_grad
        if a.is_meta or not equal:
            return equal
        a, b = (t.detach().to_dense() if t.is_sparse else t.detach() for t in (a, b))
        return torch.equal(a.isnan(), b.isnan()) and bool((a == b)[~a.isnan()].all())
    if type(a) is not type(b):
        return False
    if isinstance(a, Result):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float | int | str | bool | bytes | complex | type(None) | type):
        return a == b or a != a
    return True


def difference(a: Result, b: Result) -> str:
    """Which parts of two results differ; `""` if none does."""
    parts = (f.name for f in dataclasses.fields(a))
    return ", ".join(n for n in parts if not same(getattr(a, n), getattr(b, n)))


def trace_of(model: nn.Module) -> dict[str, Any]:
    """What undo must bring back."""
    return {
        path: (type(m), [n for n, _ in m.named_children()], {k: id(v) for k, v in vars(m).items()})
        for path, m in model.named_modules()
    }


def check(build: Callable[[], nn.Module], inputs: Inputs, later: Later | None = None) -> dict:
    """Asserts that what may be rewritten is the hooked model, and that undo leaves no trace.

    Returns the verdicts.
    """

    def made() -> nn.Module:
        torch.manual_seed(0)
        return build()

    model = made()
    before = trace_of(model)
    verdicts = graph.survey(model)
    assert trace_of(model) == before, "the survey touched the model"
    counts = calls_counted(made(), verdicts, inputs)
    for path, verdict in verdicts.items():
        if verdict.never_called:
            assert counts[path] == 0, f"{path} is said never to be called"
    if not any(v.by_fx for v in verdicts.values()):
        return verdicts
    rewrite_all(model, verdicts)
    reference = made()
    hook_all(reference, verdicts)
    for round_ in ("first", "second", "after a change"):
        if round_ == "after a change":
            if later is None:
                break
            later(model)
            later(reference)
        for training in (True, False):
            ours = run(model.train(training), inputs)
            theirs = run(reference.train(training), inputs)
            said = difference(ours, theirs)
            assert not said, f"{round_}, training={training}: {said} differ"
    if later is None:
        for module in list(model.modules()):
            surgery.restore(module)
        assert [t for t, _, _ in trace_of(model).values()] == [t for t, _, _ in before.values()]
        assert [c for _, c, _ in trace_of(model).values()] == [c for _, c, _ in before.values()]
    return verdicts
