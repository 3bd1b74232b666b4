"""What the laws share: one policy for every model of the zoo, and how it is put on.

The policy has a penalty on everything, another one on the weights, and a dropout on every Linear.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import support
import torch
from torch import nn
from zoo import ZOO, Case

import regwrap as rw
from regwrap import L1, L2, Dropout, sites

RATE = 0.5
PENALTIES = [L2(1e-3, on="all"), L1(1e-4)]
RULES: dict[Any, Any] = {"": [*PENALTIES, Dropout(RATE)]}

# Where RULES cannot be carried out as they stand, what is instead, and why.
OWN_RULES: dict[str, dict[Any, Any]] = {
    "script_child": {**RULES, "0": None},  # refused by name: a ScriptModule forgets hooks
    "compiled_child": {**RULES, "0": None},  # refused by name: dropout inside of what is compiled
    "root_attention": {"": PENALTIES},  # refused: its only Linear is never called
    "complex_parameters": {"": PENALTIES},  # refused: torch has no complex dropout
    "linear_returns_tuple": {"": PENALTIES, "fc2": Dropout(RATE)},  # fc1 raises at its first call
    # Its own mask is drawn in one call and kept for the next: with a dropout of ours behind it two
    # calls under one seed draw different masks, which the checks take for a difference.
    "stateful_dropout": {"": PENALTIES, "fc1": Dropout(RATE)},
}

# The last one is told by whichever test ran before.
TOLD = (
    r".*(reaches nothing|reaches no Linear layer|has a reg_loss of its own"
    r"|whose output is the model's|after something had been compiled)"
)

every_case = pytest.mark.parametrize("case", ZOO, ids=str)


def rules_of(case: Case) -> dict[Any, Any]:
    """The rules that the laws put on the model of a case."""
    return OWN_RULES.get(case.name, RULES)


@contextlib.contextmanager
def told() -> Iterator[None]:
    """For what `strict=False` says of models without Linears, and of those with a `reg_loss`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", TOLD, rw.RegwrapWarning)
        for text in support.NOT_OURS:
            warnings.filterwarnings("ignore", text)
        yield


def regularized(case: Case, rules: Any = None) -> nn.Module:
    """The model of a case with a policy."""
    return put_on(case.build(), rules or rules_of(case))


def put_on(model: nn.Module, rules: Any) -> nn.Module:
    with told():
        return rw.regularize(model, rules, strict=False)


def is_linear(module: nn.Module) -> bool:
    """Whether a Dropout rule should take the module for a Linear, by this file's own reading."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def hooked(model: nn.Module) -> list[nn.Module]:
    """The layers and owners in which a dropout of ours acts."""
    return [m for m in model.modules() if "regwrap" in m._forward_hooks or sites.inserted(m)]


def taken(model: nn.Module) -> list[nn.Module]:
    """The model's own dropouts whose rate a rule has taken over."""
    return [m for m in model.modules() if "_regwrap_rate" in vars(m)]


def rate_zero_in_place(model: nn.Module) -> None:
    """The hooks stay and drop nothing."""
    for module in taken(model):
        name, rate = vars(module)["_regwrap_rate"]
        vars(module)[name] = rate
    for layer in hooked(model):
        if "regwrap" in layer._forward_hooks:
            layer.__dict__["_regwrap_p"] = 0.0
        for name in sites.inserted(layer):
            layer._modules[name].p = 0.0


@contextlib.contextmanager
def inserted_aside(model: nn.Module) -> Iterator[None]:
    """Without the dropouts that a rewrite put in: the one thing that may be seen, last in place."""
    held = [(m, n, m._modules[n]) for m in list(model.modules()) for n in sites.inserted(m)]
    rates = [(m, *vars(m)["_regwrap_rate"]) for m in taken(model)]
    ours = [vars(m)[name] for m, name, _ in rates]
    for module, name, old in rates:
        vars(module)[name] = old
    for owner, name, _ in held:
        assert list(owner._modules)[-len(list(sites.inserted(owner))) :], name
        del owner._modules[name]
    try:
        yield
    finally:
        for owner, name, dropout in held:
            owner._modules[name] = dropout
        for (module, name, _), rate in zip(rates, ours, strict=True):
            vars(module)[name] = rate


def fingerprint_of(model: nn.Module, **how: Any) -> dict[str, Any]:
    """`support.fingerprint` with the random state besides, which nothing of ours may move."""
    return {**support.fingerprint(model, **how), "random": support.bits(torch.get_rng_state())}
