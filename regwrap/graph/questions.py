"""Questions to a graph: what follows a call, an activation, a dropout."""

from __future__ import annotations

import inspect
import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from regwrap.graph.nodes import call, part
from regwrap.graph.source import word_set
from regwrap.graph.verdicts import Activation, Call, Existing
from regwrap.graph.view import View

_COMMUTING = (nn.ReLU, nn.LeakyReLU)
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    *_COMMUTING,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.Sigmoid,
    nn.ELU,
    nn.SELU,
    nn.CELU,
    nn.ReLU6,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.Hardtanh,
    nn.Mish,
    nn.Softplus,
    nn.Softsign,
    nn.LogSigmoid,
    nn.Tanhshrink,
    nn.Softshrink,
    nn.Hardshrink,
    nn.PReLU,
)
_NAMES = word_set(
    "relu leaky_relu gelu silu tanh sigmoid elu selu celu relu6 hardswish hardsigmoid hardtanh "
    "mish softplus softsign logsigmoid tanhshrink softshrink hardshrink prelu"
)
_FUNCTIONS = {
    id(f): n for n in _NAMES for s in (F, torch) if (f := getattr(s, n, None)) is not None
}
_INPLACE_NEXT = ("relu", "relu6", "selu", "silu", "mish", "hardswish", "hardsigmoid")
_METHODS = frozenset(("relu", "tanh", "sigmoid"))
_DROPOUTS = word_set(
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout"
)
_DROP_FUNCTIONS = {id(f) for n in _DROPOUTS for s in (F, torch) if (f := getattr(s, n, None))}


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an elementwise activation that is known."""
    cls = type(module)
    return cls in _ACTIVATIONS or cls.__module__ == "transformers.activations"


def is_dropout(module: nn.Module) -> bool:
    """Whether a module is a dropout or drop path, by its class or its class's name."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.modules.dropout._DropoutNd) or name.endswith(
        ("dropout", "droppath", "drop_path", "stochasticdepth")
    )


def calls_of(graph: fx.Graph, owner: nn.Module, method: str = "forward") -> list[Call]:
    """Every call of a child in a graph of the owner, in order."""
    view = View(owner)
    return [described(n, view, method) for n in graph.nodes if n.op == "call_module"]


def described(node: fx.Node, view: View, method: str) -> Call:
    """What becomes of the output of one call."""
    after = activation_after(view.owner, node)
    direct = _dropout_of(_only_user(node), node, view, "")
    behind = None
    if after is not None and direct is None:
        act = cast(fx.Node, _only_user(node))
        behind = _dropout_of(_only_user(act), act, view, after.name)
    returned = method == "forward" and any(u.op == "output" for u in node.users)
    return Call(
        child=str(node.target),
        method=method,
        activation=after,
        dropout=direct or behind,
        follower=_follower(node, view),
        returned=returned,
        one_input=input_of(view.owner, node) is not None,
    )


def input_of(owner: nn.Module, node: fx.Node) -> int | str | None:
    """The place of a call's one input: 0, or its name; None if there are others."""
    if len(node.args) + len(node.kwargs) != 1 or node.meta.get("stars"):
        return None
    if node.args:
        return 0
    forward = owner.get_submodule(str(node.target)).forward
    word = next(iter(inspect.signature(forward).parameters), None)
    return word if word in node.kwargs else None


def _operands(user: fx.Node) -> list[Any]:
    args = list(user.args)
    return args[1:] if user.target is call and user.meta.get("say") is None else args


def _function_called(user: fx.Node) -> object:
    """The function that a node calls, also one that lies in an attribute of the owner."""
    if user.target is not call:
        return user.target if user.op == "call_function" else None
    callee = user.args[0]
    if not isinstance(callee, fx.Node) or callee.op != "get_attr":
        return None
    choices: tuple[object, ...] = callee.meta.get("choices") or ()
    return choices[0] if len(choices) == 1 else None


def _only_user(node: fx.Node) -> fx.Node | None:
    """What takes the node's output, if it is alone in that, as its first argument."""
    users = list(node.users)
    if len(users) != 1 or users[0].meta.get("stars"):
        return None
    args = _operands(users[0])
    if len(args) == 0 or args[0] is not node or any(a is node for a in args[1:]):
        return None
    return None if node in users[0].kwargs.values() else users[0]


def activation_after(owner: nn.Module, node: fx.Node) -> Activation | None:
    """The activation that alone takes a node's output as its first argument."""
    view = View(owner)
    user = _only_user(node)
    if user is None:
        return None
    if user.op == "call_module":
        module = view.module(str(user.target))
        if not is_activation(module) or len(user.args) > 1 or user.kwargs:
            return None
        return Activation(type(module).__name__, str(user.target), isinstance(module, _COMMUTING))
    name = _function_name(user, node)
    return None if name is None else Activation(name, None, name in ("relu", "leaky_relu"))


def _function_name(user: fx.Node, node: fx.Node) -> str | None:
    if user.kwargs.get("inplace", False) is not False:
        return None
    if user.op == "call_method":
        return str(user.target) if user.target in _METHODS and len(user.args) == 1 else None
    if len(_operands(user)) > 1 and _FUNCTIONS.get(id(_function_called(user))) in _INPLACE_NEXT:
        return None  # relu(x, True)
    return _FUNCTIONS.get(id(_function_called(user)))


def _dropout_of(user: fx.Node | None, node: fx.Node, view: View, behind: str) -> Existing | None:
    if user is None:
        return None
    if user.op == "call_module":
        found = is_dropout(view.module(str(user.target)))
        return Existing(str(user.target), None, behind) if found else None
    if id(_function_called(user)) in _DROP_FUNCTIONS:
        args = _operands(user)
        rate = user.kwargs.get("p", args[1] if len(args) > 1 else None)
        read_from = isinstance(rate, fx.Node) and rate.op == "get_attr"
        attribute = str(cast(fx.Node, rate).target) if read_from else None
        return Existing(None, attribute, behind)
    return None


def _follower(node: fx.Node, view: View) -> str:
    users = list(node.users)
    if not users:
        return "nothing"
    if len(users) > 1:
        return f"{len(users)} operations"
    user = users[0]
    if user.op == "output":
        return "what the method returns"
    if user.op == "call_module":
        return f"self.{user.target} ({type(view.module(str(user.target))).__name__})"
    if user.target in (operator.mul, torch.mul) or user.target == "mul":
        return "a product, which is no activation"
    if user.target is part:
        return "code with control flow of its own"
    return f"the operation {user.name}"
