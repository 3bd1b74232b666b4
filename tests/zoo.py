"""The zoo: small plain PyTorch models, one hazard each, for the laws to hold over.

Nothing here knows of `regwrap`. A model enters `ZOO` by `@case`, on its class or on a function that
makes it; the docstring's first line names the hazard, the name in snake case names the case. Two
builds of a case are equal bit for bit, and so are two of its inputs.

What a plain model cannot do (pickle, export, ...) is not said here: `support.plain_passes` tries.
"""

import copy
import functools
import re
import threading
import types
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D
from transformers.utils import ModelOutput

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
T = TypeVar("T")
Make = TypeVar("Make", bound=Callable[[], Any])


@dataclass(frozen=True)
class Case:
    """One model of the zoo: `build()` makes it, `inputs()` the `args, kwargs` of its forward."""

    name: str
    hazard: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]

    def __str__(self) -> str:
        return self.name


ZOO: list[Case] = []
BY_NAME: dict[str, Case] = {}


def seeded(make: Callable[[], T]) -> Callable[[], T]:
    """`make` under a fixed seed, the global random state left as it was."""

    def made() -> T:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return made


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> Inputs:
    return (torch.randn(*(shape or (3, 6)), dtype=dtype),), {}


def tokens(rows: int = 3) -> Inputs:
    return (torch.randint(0, 10, (rows, 5)),), {}


def case(inputs: Callable[[], Inputs] = batch) -> Callable[[Make], Make]:
    """Enters a class or a function that makes a model into the zoo and returns it unchanged."""

    def enter(make: Make) -> Make:
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", make.__name__).lower()
        hazard = (make.__doc__ or "").strip().split("\n")[0]
        if not hazard or name in BY_NAME:
            raise ValueError(f"case {name!r} needs a hazard of its own and a name of its own")
        BY_NAME[name] = Case(name, hazard, seeded(make), seeded(inputs))
        ZOO.append(BY_NAME[name])
        return make

    return enter


@contextmanager
def quiet() -> Iterator[None]:
    """For what torch itself warns of when some of these models are made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- plain -----------------------------------------------------------------------------------


@case()
class Mlp(nn.Module):
    """None: two Linears with a relu between them, what everything else deviates from."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.fc2 = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


class Block(nn.Module):
    """Part of other models: a residual block."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 8)
        self.fc2 = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(self.norm(x))))


# ---- one parameter, several names or calls ---------------------------------------------------


@case(tokens)
class TiedWeights(nn.Module):
    """One parameter under two names: the embedding's weight is the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.hidden = nn.Linear(6, 6)
        self.decoder = nn.Linear(6, 10, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.hidden(self.embedding(ids))))


@case()
class SharedModule(nn.Module):
    """One Linear under two names, called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@case()
class SharedBetweenParents(nn.Module):
    """One Linear beneath two parents of different classes: two owners."""

    def __init__(self) -> None:
        super().__init__()
        self.left = Mlp()
        self.right = nn.Sequential(self.left.fc1, nn.Tanh(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@case()
class CalledTwice(nn.Module):
    """A Linear called twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.fc(torch.relu(self.fc(x)))))


@case()
class SharedActivation(nn.Module):
    """One activation module behind several Linears."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.act(self.fc2(self.act(self.fc1(x)))))


@case()
class SharedStorage(nn.Module):
    """Two parameters that are views of one flat buffer."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.randn(6 * 8 + 8 * 4) / 3
        self.up = nn.Parameter(flat[:48].view(6, 8))
        self.down = nn.Parameter(flat[48:].view(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.up) @ self.down


# ---- never called, not always called ---------------------------------------------------------


@case()
class NeverCalled(nn.Module):
    """A Linear whose weight a function uses: the module itself is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(6, 8)
        self.bypassed = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.used(x)), self.bypassed.weight, self.bypassed.bias)


@case()
class CalledAndRead(nn.Module):
    """A Linear that is called, and whose weight is read besides."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x)) @ self.fc.weight


@case()
class UnusedSubmodule(Mlp):
    """A submodule that takes no part in forward and gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = Mlp()


@case(lambda: batch(3, 5, 6))
class SelfAttention(nn.Module):
    """nn.MultiheadAttention: `in_proj_weight` is bare, `out_proj` is never called as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.attention(x, x, x, need_weights=False)[0])


@case(lambda: batch(5, 6))
class MixtureOfExperts(nn.Module):
    """Routing by the data: an expert without tokens is not called and gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Linear(6, 4) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        share, choice = self.gate(x).softmax(-1).max(-1)
        out = x.new_zeros(len(x), 4)
        for index, expert in enumerate(self.experts):
            rows = (choice == index).nonzero().squeeze(1)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * share[rows, None])
        return out


@case()
class LayerDrop(nn.Module):
    """In training whole blocks are left out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or torch.rand(()).item() > 0.5:
                x = block(x)
        return x


@case()
class SkippedContainer(nn.Module):
    """The owner calls the children of a Sequential itself; `Sequential.forward` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential()
        self.head.add_module("norm", nn.LayerNorm(6))
        self.head.add_module("fc", nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head.fc(self.head[0](x))


# ---- owners, containers, names ---------------------------------------------------------------


@case()
class SequentialOwner(nn.Module):
    """The Linears belong to a stock Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@case()
class ModuleListOwner(nn.Module):
    """The Linears belong to a ModuleList, which has no body of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@case()
class ModuleDictOwner(nn.Module):
    """The Linears belong to a ModuleDict and are looked up by name."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"cat": nn.Linear(6, 2), "dog": nn.Linear(6, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: head(x) for name, head in self.heads.items()}


@case()
class NestedContainers(nn.Module):
    """Containers in containers: ModuleList in ModuleDict in Sequential's owner."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.ReLU())
        self.stages = nn.ModuleDict(
            {"a": nn.ModuleList([Block(), Block()]), "b": nn.ModuleList([nn.Linear(6, 6)])}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages.values():
            for layer in stage:
                x = layer(x)
        return x


@case()
class NumberedBlocks(nn.Module):
    """Twelve equal blocks: `blocks.2` and `blocks.10` do not sort as text."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(12)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@case()
class OddNames(nn.Module):
    """Module names that are markup, glob, format and path characters."""

    NAMES: ClassVar = ("a[/b]c", "*", "{0,2}", "[red]", "%s {x}", "naïve λ", "a b", "weight")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in self.NAMES})

    def forward(self, x: Tensor) -> Tensor:
        for name in self.NAMES:
            x = torch.tanh(self.layers[name](x))
        return x


@case()
class NoneChildren(Mlp):
    """Children and parameters registered as None."""

    def __init__(self) -> None:
        super().__init__()
        self.register_module("downsample", None)
        self.register_parameter("scale", None)
        self.register_buffer("mask", None)


@case()
class IteratesChildren(nn.Module):
    """Forward runs `self.children()`: one child more changes what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


@case()
class HiddenInList(Mlp):
    """A Linear in a plain list: called, but no child as far as torch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Linear(4, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](self.fc2(self.fc1(x).relu()))


@case()
def root_linear() -> nn.Module:
    """The root is an nn.Linear: the site has no owner, its path is empty."""
    return nn.Linear(6, 4)


@case()
def root_sequential() -> nn.Module:
    """The root is an nn.Sequential: its length and indices are part of its interface."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


@case(lambda: batch(5, 3, 6))
def root_lstm() -> nn.Module:
    """The root is an nn.LSTM: parameters held directly, an output that is a nested tuple."""
    return nn.LSTM(6, 4, num_layers=2, dropout=0.2)


@case(lambda: ((torch.randn(3, 5, 6),) * 3, {}))
def root_attention() -> nn.Module:
    """The root is an nn.MultiheadAttention: its only Linear is never called."""
    return nn.MultiheadAttention(6, 2, batch_first=True)


# ---- inputs and outputs ----------------------------------------------------------------------


@case()
class DictOutput(Mlp):
    """Returns a dict with a value that is no tensor."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.fc1(x)
        return {"hidden": hidden, "logits": self.fc2(hidden.relu()), "name": "mlp"}


@dataclass
class Prediction:
    """What `DataclassOutput` returns."""

    logits: Tensor
    hidden: Tensor | None = None


@case()
class DataclassOutput(Mlp):
    """Returns a dataclass."""

    def forward(self, x: Tensor) -> Prediction:
        hidden = self.fc1(x)
        return Prediction(self.fc2(hidden.relu()), hidden)


@case()
class TupleOutput(Mlp):
    """Returns a nested tuple with None in it."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, None]]:
        hidden = self.fc1(x)
        return self.fc2(hidden.relu()), (hidden, None)


Pair = namedtuple("Pair", "logits hidden")


@case()
class NamedtupleOutput(Mlp):
    """Returns a namedtuple."""

    def forward(self, x: Tensor) -> Pair:
        hidden = self.fc1(x)
        return Pair(self.fc2(hidden.relu()), hidden)


@case(lambda: ((torch.randn(3, 6),), {"labels": torch.tensor([0, 3, 1])}))
class ReturnsLoss(Mlp):
    """Computes its own loss from an optional argument, as Hugging Face's models do."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.fc2(self.fc1(x).relu())
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


@case(lambda: ((), {"x": torch.randn(3, 6), "scale": 2.0}))
class KwargsOnly(Mlp):
    """Forward takes keyword arguments only."""

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.fc2(self.fc1(x).relu()) * scale


@case(lambda: ((torch.randn(3, 6), torch.randn(3, 6)), {"scale": torch.tensor(2.0)}))
class StarArguments(Mlp):
    """Forward takes `*args, **kwargs`."""

    def forward(self, *xs: Tensor, **options: Tensor) -> Tensor:
        return self.fc2(self.fc1(sum(xs)).relu()) * options.get("scale", 1.0)


@case(lambda: (({"x": torch.randn(3, 6), "more": [torch.randn(3, 6)]},), {}))
class DictInput(Mlp):
    """Forward takes a dict of tensors and lists and writes into it."""

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        inputs["sum"] = inputs["x"] + inputs["more"][0]
        return self.fc2(self.fc1(inputs["sum"]).relu())


@case(lambda: ((), {}))
class NoInput(Mlp):
    """Forward takes nothing: the input is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(3, 6))

    def forward(self) -> Tensor:
        return self.fc2(self.fc1(self.latent).relu())


# ---- classes and attributes ------------------------------------------------------------------


@case()
class Slotted(Mlp):
    """`__slots__` beside the instance's dict."""

    __slots__ = ("scale",)

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "scale": self.scale}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.scale = state["scale"]
        super().__setstate__({key: state[key] for key in state if key != "scale"})

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()) * self.scale


@case()
class DelegatingGetattr(nn.Module):
    """`__getattr__` falls through to a child: the child's attributes look like the root's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Mlp()
        self.head = nn.Linear(4, 4)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


@case()
class GreedyGetattr(Mlp):
    """`__getattr__` knows every public name: `hasattr` is always true, the value None."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_"):
                raise
            return None


@case()
class NamesLikeOurs(Mlp):
    """A property `reg_loss`, a method `policy` and an attribute `penalties` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.penalties = {"mine": 1.0}

    @property
    def reg_loss(self) -> Tensor:
        return self.fc1.weight.abs().sum()

    def policy(self, x: Tensor) -> Tensor:
        return self(x).softmax(-1)


@case()
class AssignsRegLoss(Mlp):
    """Assigns `self.reg_loss` in forward: a property without a setter would break it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        self.reg_loss = hidden.detach().square().mean()
        return self.fc2(hidden.relu())


@case()
class ChildNamedLikeOurs(nn.Module):
    """Children called `reg_loss`, `policy`, `dropout` and `regwrap`."""

    def __init__(self) -> None:
        super().__init__()
        self.reg_loss = nn.Linear(6, 6)
        self.policy = nn.Linear(6, 6)
        self.dropout = nn.Linear(6, 6)
        self.regwrap = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.regwrap(self.dropout(self.policy(self.reg_loss(x)).relu()))


@case()
class CustomSetattr(Mlp):
    """`__setattr__` keeps a record of every name that was ever set."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__.setdefault("names", {})[name] = None


@case()
class SealedSetattr(Mlp):
    """`__setattr__` refuses every name that `__init__` did not set, `__class__` included."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["sealed"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("sealed") and name not in {*self.__dict__, *self._modules}:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        super().__setattr__(name, value)


class Backbone(nn.Module, ABC):
    """The abstract base of `AbstractBase`."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.features(x))


@case()
class AbstractBase(Backbone):
    """An abstract base class: the metaclass is ABCMeta, forward is inherited."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.fc(x)


Config = TypeVar("Config")


class Configured(nn.Module, Generic[Config]):
    """The generic base of `GenericBase`."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config


@case()
class GenericBase(Configured[dict[str, int]]):
    """A generic base class: `__orig_bases__`, `__class_getitem__`."""

    def __init__(self) -> None:
        super().__init__({"width": 4})
        self.fc = nn.Linear(6, self.config["width"])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Registry(type):
    """Registers every class by name and refuses a second one of the same name."""

    classes: ClassVar[dict[str, type]] = {}

    def __new__(mcs, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> type:
        if name in mcs.classes:
            raise TypeError(f"a class {name!r} is registered already")
        mcs.classes[name] = super().__new__(mcs, name, bases, body)
        return mcs.classes[name]


@case()
class RegisteringMetaclass(Mlp, metaclass=Registry):
    """The metaclass registers by name and refuses a second class of the same name."""


class Tagged(nn.Module):
    """The base of `InitSubclassKwargs`."""

    def __init_subclass__(cls, *, tag: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.tag = tag


@case()
class InitSubclassKwargs(Tagged, tag="mine"):
    """`__init_subclass__` with a required keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


@case()
@dataclass(eq=False)
class DataclassModule(nn.Module):
    """A dataclass: its `__init__` is generated, layers are made in `__post_init__`."""

    width: int = 8

    def __post_init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, self.width)
        self.fc2 = nn.Linear(self.width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


@case()
class OldStyleSuper(nn.Module):
    """`super(OldStyleSuper, self)`: the name must stay bound to a class beneath the instance."""

    def __init__(self) -> None:
        super(OldStyleSuper, self).__init__()  # noqa: UP008 the hazard itself
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def extra_repr(self) -> str:
        return super(OldStyleSuper, self).extra_repr() + "old style"  # noqa: UP008


@case()
class SuperForward(Mlp):
    """Forward calls its base's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@case()
class QuotedAnnotations(Mlp):
    """Annotations that are strings, as under `from __future__ import annotations`."""

    def forward(self, x: "Tensor") -> "Tensor":
        return self.fc2(self.fc1(x).relu())


@case()
class ExactTypeCheck(Mlp):
    """Asks for its exact class by name and compares `self.__class__.__name__`."""

    def forward(self, x: Tensor) -> Tensor:
        if self.__class__.__name__ != "ExactTypeCheck" or not isinstance(self, ExactTypeCheck):
            raise TypeError(f"not for {type(self)!r}")
        return self.fc2(self.fc1(x).relu())


@case()
class Falsy(Mlp):
    """`len(model)` is 0, so the model is false."""

    def __len__(self) -> int:
        return 0


@case()
class CallOverride(Mlp):
    """`__call__` is overridden and calls forward by way of `super()`."""

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


@case()
class CachedProperty(Mlp):
    """A `functools.cached_property` appears in the instance's dict at the first forward."""

    @functools.cached_property
    def scale(self) -> float:
        return 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()) * self.scale


@case()
class LambdaAttribute(Mlp):
    """Holds a lambda: copies, but does not pickle."""

    def __init__(self) -> None:
        super().__init__()
        self.act = lambda x: x.sin()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@case()
class LockAttribute(Mlp):
    """Holds a lock: neither copies nor pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


@case()
class BackReference(nn.Module):
    """A child keeps a reference to its parent that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.child = Mlp()
        self.child.__dict__["parent"] = self

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.child.parent.scale


@case()
class WeakBackReference(nn.Module):
    """A child keeps a weak reference to its parent."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 2.0
        self.child = Mlp()
        self.child.parent = weakref.ref(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) * self.child.parent().scale


@case()
class BoundForward(Mlp):
    """Forward replaced on the instance by a bound method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = types.MethodType(doubled_forward, self)


def doubled_forward(self: Mlp, x: Tensor) -> Tensor:
    return self.fc2(torch.relu(self.fc1(x))) * 2


@case()
class PatchedChild(Mlp):
    """Forward of a Linear replaced on the instance by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.forward = functools.partial(F.linear, weight=self.fc1.weight)


# ---- copies and pickles ----------------------------------------------------------------------


def rebuild(state: dict[str, Tensor], training: bool) -> "ReduceByFunction":
    model = ReduceByFunction()
    model.load_state_dict(state)
    return model.train(training)


@case()
class ReduceByFunction(Mlp):
    """`__reduce__` names a function that rebuilds from `state_dict` alone."""

    def __reduce__(self) -> Any:
        return rebuild, (dict(self.state_dict()), self.training)


@case()
class ReduceByType(nn.Module):
    """`__reduce__` names `type(self)` with arguments and the instance's dict."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))

    def __reduce__(self) -> Any:
        return type(self), (self.width,), self.__dict__

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@case()
class NewArguments(Mlp):
    """`__new__` takes an argument that `__getnewargs_ex__` supplies to copies."""

    def __new__(cls, *, scale: float = 2.0) -> "NewArguments":
        model = super().__new__(cls)
        object.__setattr__(model, "scale", scale)
        return model

    def __getnewargs_ex__(self) -> Any:
        return (), {"scale": self.scale}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu()) * self.scale


@case()
class DropsState(Mlp):
    """`__getstate__` drops a lock that `__setstate__` makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.Lock()


@case()
class RebuildsState(Mlp):
    """`__getstate__` keeps the weights alone, `__setstate__` runs `__init__` again."""

    def __getstate__(self) -> dict[str, Any]:
        return {"training": self.training, "weights": dict(self.state_dict())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()
        self.load_state_dict(state["weights"])
        self.train(state["training"])


@case()
class CustomDeepcopy(Mlp):
    """`__deepcopy__` makes a new `type(self)()` and loads the weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "CustomDeepcopy":
        memo[id(self)] = new = type(self)()
        new.load_state_dict(self.state_dict())
        return new.train(self.training)


@case()
class DeepcopyInForward(Mlp):
    """Forward copies a child and calls the copy."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(copy.deepcopy(self.fc1)(x)))


@case()
class ExtraState(Mlp):
    """`get_extra_state`: an entry of `state_dict` that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 3

    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


@case()
class StateDictOverride(Mlp):
    """`state_dict` and `load_state_dict` are overridden and rename keys."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        return {f"model/{key}": value for key, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        state = {key.removeprefix("model/"): value for key, value in state_dict.items()}
        return super().load_state_dict(state, *args, **kwargs)


@case()
class ParametersOverride(Mlp):
    """`named_parameters` is overridden and hides one layer."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return (
            (name, parameter)
            for name, parameter in super().named_parameters(*args, **kwargs)
            if not name.startswith("fc1")
        )


# ---- parametrizations, reparametrizations, hooks ---------------------------------------------


@case()
def weight_norm_child() -> nn.Module:
    """A Linear under the weight_norm parametrization."""
    model = Mlp()
    parametrizations.weight_norm(model.fc1)
    return model


@case()
def spectral_norm_child() -> nn.Module:
    """A Linear under spectral_norm: reading its weight in training changes buffers."""
    model = Mlp()
    parametrizations.spectral_norm(model.fc1)
    return model


@case()
def orthogonal_child() -> nn.Module:
    """A Linear whose weight is kept orthogonal."""
    model = Mlp()
    parametrizations.orthogonal(model.fc1)
    return model


@case()
def weight_norm_root() -> nn.Module:
    """The root itself is parametrized: it has a class of its own already."""
    return parametrizations.weight_norm(nn.Linear(6, 4))


@case()
def spectral_norm_root() -> nn.Module:
    """The root itself is under spectral_norm: a class of its own, and buffers that move."""
    return parametrizations.spectral_norm(nn.Linear(6, 4))


@case()
def orthogonal_root() -> nn.Module:
    """The root itself is kept orthogonal."""
    return parametrizations.orthogonal(nn.Linear(6, 4))


@case()
def legacy_weight_norm() -> nn.Module:
    """`torch.nn.utils.weight_norm`: a pre-hook that sets `weight` as a plain attribute."""
    model = Mlp()
    with quiet():
        nn.utils.weight_norm(model.fc1)
    return model


@case()
def legacy_spectral_norm() -> nn.Module:
    """`torch.nn.utils.spectral_norm`: a pre-hook and hooks on `state_dict`."""
    model = Mlp()
    with quiet():
        nn.utils.spectral_norm(model.fc1)
    return model


@case()
def pruned() -> nn.Module:
    """`torch.nn.utils.prune`: `weight_orig`, a mask buffer and a pre-hook."""
    model = Mlp()
    prune.l1_unstructured(model.fc1, "weight", amount=0.3)
    return model


def halve_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output * 0.5


def shift_input(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return (args[0] + 1, *args[1:]), kwargs


def double_gradient(module: nn.Module, grad_in: Any, grad_out: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else gradient * 2 for gradient in grad_in)


def add_version(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state[f"{prefix}version"] = torch.tensor(1)


def take_version(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    del state[f"{prefix}version"]


@case()
def user_forward_hooks() -> nn.Module:
    """Forward hooks of the user, on the root and on a Linear, that change the output."""
    model = Mlp()
    model.register_forward_hook(halve_output)
    model.fc1.register_forward_hook(halve_output, always_call=True)
    return model


@case()
def user_pre_hooks() -> nn.Module:
    """Forward pre-hooks of the user that change the input, with keyword arguments."""
    model = Mlp()
    model.register_forward_pre_hook(shift_input, with_kwargs=True)
    model.fc2.register_forward_pre_hook(shift_input, with_kwargs=True, prepend=True)
    return model


@case()
def user_backward_hook() -> nn.Module:
    """A full backward hook of the user that changes the gradient."""
    model = Mlp()
    model.fc2.register_full_backward_hook(double_gradient)
    return model


@case()
def user_state_dict_hooks() -> nn.Module:
    """Hooks of the user that add a key to `state_dict` and take it out at loading."""
    model = Mlp()
    model.fc1.register_state_dict_post_hook(add_version)
    model.fc1.register_load_state_dict_pre_hook(take_version)
    return model


@case()
class HooksItself(Mlp):
    """Registers its own bound method as a hook of its child."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.fc1.register_forward_hook(self.note)

    def note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1


# ---- autograd and numerics -------------------------------------------------------------------


@case()
class Checkpointed(nn.Module):
    """Non-reentrant checkpointing: the block runs again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.stem(x), use_reentrant=False)


@case()
class CheckpointedReentrant(Checkpointed):
    """Reentrant checkpointing: the first run of the block records no graph."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return checkpoint(self.block, x, use_reentrant=True) if x.requires_grad else self.block(x)


@case(lambda: batch(3, 6, dtype=torch.float16))
def half() -> nn.Module:
    """Parameters in float16: a sum of squares overflows."""
    return Mlp().half()


@case(lambda: batch(3, 6, dtype=torch.bfloat16))
def bfloat16() -> nn.Module:
    """Parameters in bfloat16."""
    return Mlp().bfloat16()


@case(lambda: batch(3, 6, dtype=torch.float64))
def double() -> nn.Module:
    """Parameters in float64: a penalty must not be narrower."""
    return Mlp().double()


@case()
class MixedPrecision(Mlp):
    """One Linear in bfloat16, one in float32, and a forward that asks a weight for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x.to(self.fc1.weight.dtype))
        return self.fc2(hidden.relu().to(self.fc2.weight.dtype))


@case(lambda: batch(3, 6, dtype=torch.complex64))
class ComplexParameters(nn.Module):
    """Complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8, dtype=torch.complex64)
        self.fc2 = nn.Linear(8, 4, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x)))


@case()
class IntegerParameter(nn.Module):
    """A quantized weight: a frozen int8 parameter with a float scale."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-100, 100, (8, 6), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = nn.Parameter(torch.full((8, 1), 0.01))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.weight * self.scale).relu())


@case()
def zero_size() -> nn.Module:
    """Parameters without elements: a norm of nothing, a mean of nothing."""
    with quiet():
        return nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4))


@case(lambda: ((torch.randn(3, 6, device="meta"),), {}))
def on_meta() -> nn.Module:
    """Parameters on the meta device: shapes without values."""
    return Mlp().to("meta")


@case()
class StridedParameter(nn.Module):
    """A parameter that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6)[::2].t())
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x @ self.weight)


class Marked(nn.Parameter):
    """A parameter class of its own."""


@case()
class ParameterSubclass(Mlp):
    """A weight of a subclass of nn.Parameter that carries an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1.weight = Marked(self.fc1.weight.detach().clone())
        self.fc1.weight.origin = "pretrained"


@case()
class InplaceRelu(nn.Module):
    """relu_ on the output of a Linear: its output is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@case()
class InplaceAlias(Mlp):
    """`+=` on a Linear's output that is returned besides: both must see it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = kept = self.fc1(x)
        hidden += 1
        return self.fc2(hidden), kept


@case()
class ReturnedTwice(Mlp):
    """A Linear's output is returned twice and used once more: one mask for all three."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.fc1(x)
        return hidden, hidden, self.fc2(hidden)


@case()
class GradientInForward(Mlp):
    """Differentiates inside forward: every penalty of an output needs a second derivative."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.fc2(torch.tanh(self.fc1(x))).sum(-1)
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=keep)
        return (energy, force) if keep else (energy.detach(), force)


@case()
class NoGradInForward(Mlp):
    """A part of forward runs under no_grad."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.fc1(x)
        return self.fc2(hidden.relu())


@case()
class AutocastInForward(Mlp):
    """A part of forward runs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.fc1(x)
        return self.fc2(hidden.float().relu())


def doubles(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs) * 2

    return wrapper


@case()
class DecoratedForward(Mlp):
    """Forward is decorated: its source is not what runs."""

    @doubles
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


@case(lambda: ((torch.randn(3, 6), torch.tensor([[1.0], [0.0], [1.0]])), {}))
class OptionalMask(Mlp):
    """`if mask is not None` in forward: always true while it is traced."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.fc1(x)
        if mask is not None:
            hidden = hidden * mask
        return self.fc2(hidden.relu())


@case()
class TrainingBranch(Mlp):
    """Forward asks `self.training`."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden.tanh() if self.training else hidden.relu())


@case()
class FunctionalCallInside(nn.Module):
    """A hypernetwork: a child is called with weights that are not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(6, 24)
        self.target = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.generator(x.mean(0)).view(4, 6)
        return torch.func.functional_call(self.target, {"weight": weight}, (x,))


@case()
class KeepsActivation(Mlp):
    """Keeps an activation on the instance: a tensor that is no leaf, after every forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.fc1(x)
        return self.fc2(self.hidden.relu())


# ---- randomness and state --------------------------------------------------------------------


@case()
class OwnDropout(nn.Module):
    """Has a dropout of its own behind the activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2 = nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(torch.relu(self.fc1(x))))


@case()
class SharedDropout(OwnDropout):
    """Uses one dropout module in two places."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(torch.relu(self.fc1(self.drop(x)))))


@case()
class FunctionalDropout(Mlp):
    """Calls `F.dropout` with a rate that is an attribute."""

    rate = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.fc1(x).relu(), self.rate, self.training))


class Locked(nn.Dropout):
    """A dropout that draws its mask once and keeps it until it is in eval."""

    mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.mask = None
            return x
        if self.mask is None:
            self.mask = torch.rand_like(x[:1]) > self.p
        return x * self.mask


@case()
class StatefulDropout(OwnDropout):
    """A dropout that keeps its mask from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = Locked(0.5)


@case()
class RandomInEval(Mlp):
    """Draws random numbers in eval too: one draw more or less moves its output."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden + torch.randn_like(hidden))


@case()
class Buffers(Mlp):
    """Buffers, persistent and not, one of them counting calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((4,), 2.0))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("offset", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc2(self.fc1(x).relu()) * self.scale + self.offset


@case()
def batch_norm() -> nn.Module:
    """BatchNorm: a forward in training changes buffers."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


@case()
class TrainOverride(nn.Module):
    """`train()` is overridden: a frozen part stays in eval, whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)).requires_grad_(False)
        self.head = nn.Linear(8, 4)
        self.train()

    def train(self, mode: bool = True) -> "TrainOverride":
        super().train(mode)
        self.stem.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu())


@case()
def mixed_modes() -> nn.Module:
    """A submodule in eval beneath a root in training."""
    model = OwnDropout()
    model.fc1.train(False)
    model.drop.train(False)
    return model


@case()
def frozen_layer() -> nn.Module:
    """One layer is frozen."""
    model = Mlp()
    model.fc1.requires_grad_(False)
    return model


@case()
def frozen_model() -> nn.Module:
    """Nothing is trainable."""
    return Mlp().requires_grad_(False)


@case()
def lazy_child() -> nn.Module:
    """Lazy layers: parameters without a shape, a class that changes at the first forward."""
    with quiet():
        return nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4))


@case()
def lazy_root() -> nn.Module:
    """The root itself is lazy: its first forward assigns its class."""
    with quiet():
        return nn.LazyLinear(4)


@case()
class LateLayers(nn.Module):
    """Makes its layers in the first forward."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "fc"):
            self.fc = nn.Linear(x.shape[-1], 4)
        return self.fc(x)


# ---- layers ----------------------------------------------------------------------------------


@case(lambda: batch(3, 5, 8))
def transformer_encoder() -> nn.Module:
    """nn.TransformerEncoder: in eval without gradients a fused kernel skips the Linears."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    return nn.TransformerEncoder(layer, num_layers=2)


class Recurrent(nn.Module):
    """Part of other models: takes the last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rnn = layer
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@case(lambda: batch(3, 5, 6))
def lstm() -> nn.Module:
    """nn.LSTM: weights of several names, flattened, and a dropout that is an attribute."""
    return Recurrent(nn.LSTM(6, 4, num_layers=2, dropout=0.2, batch_first=True))


@case(lambda: batch(3, 5, 6))
def gru() -> nn.Module:
    """nn.GRU."""
    return Recurrent(nn.GRU(6, 4, batch_first=True))


@case(lambda: batch(2, 3, 8, 8))
class Convolutions(nn.Module):
    """Convolutions, plain and transposed, with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 3, 3, stride=2)
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.norm(self.down(x)).relu()).mean((2, 3)))


@case(lambda: ((torch.randn(3, 6), torch.randn(3, 5)), {}))
def bilinear() -> nn.Module:
    """nn.Bilinear: a weight of three dimensions, two inputs."""
    return nn.Bilinear(6, 5, 4)


@case(tokens)
class SparseEmbedding(nn.Module):
    """Sparse gradients: an Embedding and an EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6, sparse=True)
        self.bag = nn.EmbeddingBag(10, 6, sparse=True, mode="sum")
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).sum(1) + self.bag(ids))


@case(tokens)
class RenormalizedEmbedding(nn.Module):
    """`max_norm`: forward itself writes into the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 6, max_norm=1.0, padding_idx=0)
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).mean(1))


class ScaledLinear(nn.Linear):
    """A Linear whose forward takes one argument more."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.linear(x, self.weight, self.bias) * scale


@case()
class LinearSubclass(nn.Module):
    """A subclass of Linear with another forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = ScaledLinear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x, scale=0.5).relu())


class TupleLinear(nn.Linear):
    """A Linear that returns its bias apart."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight), self.bias


@case()
class LinearReturnsTuple(nn.Module):
    """A subclass of Linear that returns `(output, bias)`, as Megatron's do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = TupleLinear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, bias = self.fc1(x)
        return self.fc2((out + bias).relu())


@case()
def script_child() -> nn.Module:
    """A ScriptModule as a child: no nn.Linear by `isinstance`, and it refuses hooks."""
    with quiet():
        return nn.Sequential(torch.jit.script(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4))


@case()
def graph_module_root() -> nn.Module:
    """The root is a GraphModule: a class of its own that copies and pickles in its own way."""
    model = OwnDropout()
    return torch.fx.GraphModule(model, torch.fx.Tracer().trace(model))


@case()
def graph_module_child() -> nn.Module:
    """A child is a GraphModule."""
    return nn.Sequential(torch.fx.symbolic_trace(Mlp()), nn.Linear(4, 4))


@case()
def compiled_child() -> nn.Module:
    """A child is compiled already."""
    compiled = torch.compile(nn.Linear(6, 8), backend="eager")
    return nn.Sequential(compiled, nn.ReLU(), nn.Linear(8, 4))


@case()
class BareParameters(nn.Module):
    """The root holds parameters directly: a matrix, a vector and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 4))
        self.vector = nn.Parameter(torch.randn(4))
        self.scalar = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.matrix + self.vector) * self.scalar


@case()
class ParameterContainers(nn.Module):
    """Bare parameters in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ParameterList([torch.randn(6, 6) / 3, torch.randn(6, 6) / 3])
        self.table = nn.ParameterDict({"out": torch.randn(6, 4), "bias": torch.zeros(4)})

    def forward(self, x: Tensor) -> Tensor:
        for matrix in self.stack:
            x = torch.tanh(x @ matrix)
        return x @ self.table["out"] + self.table["bias"]


@case(lambda: batch(2, 3, 6))
def no_linears() -> nn.Module:
    """Parameters, but not one Linear."""
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 1))


@case()
def no_parameters() -> nn.Module:
    """Children, but not one parameter."""
    return nn.Sequential(nn.ReLU(), nn.Dropout(0.5))


@case()
class Empty(nn.Module):
    """Nothing at all: no child, no parameter, no buffer."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


# ---- what the author marks as not to be decayed ----------------------------------------------


class Position(nn.Module):
    """The part that the models below mark: `MARKED` are the parameters to leave alone."""

    MARKED: ClassVar[frozenset[str]] = frozenset({"position", "fc.weight"})

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(3, 6))
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x + self.position).relu())


@case()
class NoDecayMethod(Position):
    """`no_weight_decay()` is a method that returns a set of names."""

    def no_weight_decay(self) -> set[str]:
        return {"position", "fc.weight"}


@case()
class NoDecayJitIgnore(Position):
    """`no_weight_decay()` is a method under `torch.jit.ignore`, as in timm."""

    @torch.jit.ignore
    def no_weight_decay(self) -> dict[str, None]:
        return {"position": None, "fc.weight": None}


@case()
class NoDecayProperty(Position):
    """`no_weight_decay` is a property."""

    @property
    def no_weight_decay(self) -> list[str]:
        return ["position", "fc.weight"]


@case()
class NoDecayClassAttribute(Position):
    """`no_weight_decay` is an attribute of the class."""

    no_weight_decay = ("position", "fc.weight")


@case()
class NoDecayInstanceAttribute(Position):
    """`no_weight_decay` is an attribute of the instance."""

    def __init__(self) -> None:
        super().__init__()
        self.no_weight_decay = ["position", "fc.weight"]


@case()
class NoDecayPattern(Position):
    """`no_weight_decay()` returns patterns."""

    MARKED = frozenset({"position", "fc.weight", "fc.bias"})

    def no_weight_decay(self) -> set[str]:
        return {"pos*", "fc.*"}


@case()
class NoDecayKeywords(Position):
    """`no_weight_decay_keywords()` returns parts of names, as in Swin."""

    def no_weight_decay_keywords(self) -> set[str]:
        return {"position", "fc.w"}


@case()
class NoDecayChild(nn.Module):
    """A child declares `no_weight_decay()` with names relative to itself."""

    MARKED: ClassVar[frozenset[str]] = frozenset({"encoder.position", "encoder.fc.weight"})

    def __init__(self) -> None:
        super().__init__()
        self.encoder = NoDecayMethod()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@case()
class NoDecayParameterMark(Position):
    """The parameters themselves carry the mark, as in Mamba and in S4."""

    def __init__(self) -> None:
        super().__init__()
        self.position._no_weight_decay = True
        self.fc.weight._optim = {"weight_decay": 0.0}


@case()
class NoDecayFalse(Position):
    """The mark is there and says no: `_no_weight_decay = False`, an empty `no_weight_decay()`."""

    MARKED = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.position._no_weight_decay = False

    def no_weight_decay(self) -> set[str]:
        return set()


# ---- Hugging Face ----------------------------------------------------------------------------


@dataclass
class Answer(ModelOutput):
    """What `ModelOutputForward` returns."""

    loss: Tensor | None = None
    logits: Tensor | None = None


@case()
class ModelOutputForward(Mlp):
    """Returns a `ModelOutput`: an ordered dict, a dataclass and a tuple in one."""

    def forward(self, x: Tensor) -> Answer:
        return Answer(logits=self.fc2(self.fc1(x).relu()))


@case()
def conv1d_layer() -> nn.Module:
    """The Conv1D of GPT-2: a Linear that is none, its weight transposed."""
    return nn.Sequential(Conv1D(8, 6), nn.ReLU(), nn.Linear(8, 4))
