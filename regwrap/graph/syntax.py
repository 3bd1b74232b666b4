"""Rule P on syntax: what a method, and an opaque part of one, may consist of."""

from __future__ import annotations

import ast
import builtins
import contextlib
import inspect
import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from regwrap.graph.names import EVERYTHING, FORBIDDEN, Names, is_from, names_of
from regwrap.graph.source import definition_of
from regwrap.graph.verdicts import Refused
from regwrap.graph.view import ABSENT

# What a part may consist of; its own scopes are comprehensions alone.
PART = (
    ast.If,
    ast.For,
    ast.While,
    ast.With,
    ast.withitem,
    ast.Try,
    ast.ExceptHandler,
    ast.Raise,
    ast.Assert,
    ast.Assign,
    ast.AugAssign,
    ast.AnnAssign,
    ast.Expr,
    ast.Pass,
    ast.Break,
    ast.Continue,
    ast.Return,
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.Subscript,
    ast.Slice,
    ast.Starred,
    ast.Call,
    ast.keyword,
    ast.BinOp,
    ast.UnaryOp,
    ast.BoolOp,
    ast.Compare,
    ast.IfExp,
    ast.NamedExpr,
    ast.Tuple,
    ast.List,
    ast.Dict,
    ast.Set,
    ast.ListComp,
    ast.SetComp,
    ast.DictComp,
    ast.GeneratorExp,
    ast.comprehension,
    ast.JoinedStr,
    ast.FormattedValue,
    ast.expr_context,
    ast.operator,
    ast.unaryop,
    ast.boolop,
    ast.cmpop,
)
SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
EAGER = ("tuple", "list", "set", "dict", "sum", "any", "all", "max", "min", "sorted")


@dataclass(slots=True)
class Scope:
    """The globals of a function, to say what a name is at the time of the analysis."""

    function: types.FunctionType
    locals: frozenset[str]

    def value(self, name: str) -> object:
        """What a global or builtin name is now; `ABSENT` if it is none."""
        table = self.function.__globals__
        return table[name] if name in table else getattr(builtins, name, ABSENT)

    def thing(self, node: ast.AST) -> object:
        """What a dotted global name is; `ABSENT` if it is none."""
        if isinstance(node, ast.Name):
            return ABSENT if node.id in self.locals else self.value(node.id)
        if isinstance(node, ast.Attribute):
            return _within(self.thing(node.value), node.attr)
        return ABSENT

    def names(self, node: ast.AST) -> Names:
        """The names that the thing which stands there may say."""
        thing = self.thing(node)
        return EVERYTHING if thing is ABSENT else names_of(thing)


def _within(base: object, name: str) -> object:
    if isinstance(base, types.ModuleType):
        return vars(base).get(name, ABSENT)
    if isinstance(base, type):
        return inspect.getattr_static(base, name, ABSENT)
    return ABSENT


def _named_in(targets: Iterable[ast.AST]) -> frozenset[str]:
    return frozenset(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def checked(function: types.FunctionType) -> ast.FunctionDef:
    """The definition of a function that may be traced; raises `Refused`."""
    if function.__closure__ and function.__code__.co_freevars != ("__class__",):
        raise Refused("is decorated or a closure")
    tree = definition_of(function)
    if not tree.args.args or tree.args.posonlyargs:
        raise Refused("does not take `self` as its first argument by name")
    refuse_private(tree)
    return tree


def refuse_private(tree: ast.AST) -> None:
    """Raises `Refused` where names are mangled by the class, or are this package's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name | ast.keyword | ast.arg):
            name = next(getattr(node, f) for f in ("attr", "id", "arg") if hasattr(node, f))
            if name and (name.startswith("_regwrap") or _is_private(name)):
                raise Refused(f"uses the private name `{name}`")


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def locals_of(tree: ast.FunctionDef, function: types.FunctionType) -> frozenset[str]:
    """The names that are local to a function."""
    stored = names_used(tree.body)[1]
    return frozenset((*function.__code__.co_varnames, *function.__code__.co_cellvars, *stored))


def names_used(nodes: Iterable[ast.AST]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names read and set in some code, without those of comprehensions' own scopes."""
    loaded: dict[str, None] = {}
    stored: dict[str, None] = {}

    def visit(node: ast.AST, hidden: frozenset[str]) -> None:
        if isinstance(node, SCOPES):
            hidden |= _named_in(g.target for g in node.generators)
        if isinstance(node, ast.Name) and node.id not in hidden:
            kept = loaded if isinstance(node.ctx, ast.Load) else stored
            kept[node.id] = None
        if isinstance(node, ast.AnnAssign):  # the annotation of a local never runs
            for item in (node.target, node.value):
                if item is not None:
                    visit(item, hidden)
            return
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            loaded[node.target.id] = None
        for child in ast.iter_child_nodes(node):
            visit(child, hidden)

    for node in nodes:
        visit(node, frozenset())
    return tuple(loaded), tuple(stored)


def check_part(nodes: Iterable[ast.AST], allowed: tuple[type, ...] = PART) -> None:
    """Raises `Refused` at the first piece that an opaque part may not have."""
    for top in nodes:
        eager = {
            id(n.args[0])
            for n in ast.walk(top)
            if isinstance(n, ast.Call) and len(n.args) == 1 and not n.keywords
            if isinstance(n.func, ast.Name) and n.func.id in EAGER
        }
        for node in ast.walk(top):
            _check_node(node, eager, allowed)


def _check_node(node: ast.AST, eager: set[int], allowed: tuple[type, ...]) -> None:
    if not isinstance(node, allowed):
        raise Refused(f"has a construct that is not followed: `{shortened(node)}`")
    if isinstance(node, ast.Name) and node.id in FORBIDDEN:
        raise Refused(f"uses `{node.id}`")
    if isinstance(node, ast.GeneratorExp) and id(node) not in eager:
        raise Refused(f"makes a generator: `{shortened(node)}`")
    if isinstance(node, ast.ExceptHandler) and node.name:
        raise Refused(f"names an exception: `as {node.name}`")
    if isinstance(node, SCOPES):
        for inner in ast.walk(node):
            if isinstance(inner, ast.NamedExpr):
                raise Refused(f"assigns inside `{shortened(node)}`")
        _check_scope(node)


def _check_scope(node: ast.AST) -> None:
    """A comprehension's variables must not be names of the surrounding code too."""
    generators = cast(ast.ListComp, node).generators
    bound = _named_in(g.target for g in generators)
    first = _named_in([generators[0].iter])
    if bound & first:
        raise Refused(f"uses one name twice in `{shortened(node)}`")


def surely_set(nodes: Iterable[ast.AST], around: Scope) -> frozenset[str] | None:
    """The names that are set when the statements are through; None: they never get through."""
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Raise | ast.Return | ast.Continue | ast.Break):
            return None
        if isinstance(node, ast.Assign):
            found |= _set_in(node.targets)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            found |= _set_in([node.target])
        elif isinstance(node, ast.If):
            ends = [surely_set(branch, around) for branch in (node.body, node.orelse)]
            through = [e for e in ends if e is not None]
            if not through:
                return None
            found |= frozenset.intersection(*through)
        elif isinstance(node, ast.With) and all(_swallows_nothing(i, around) for i in node.items):
            inside = surely_set(node.body, around)
            if inside is None:
                return None
            found |= inside
    return frozenset(found)


def _swallows_nothing(item: ast.withitem, around: Scope) -> bool:
    """Whether a context manager is known to let exceptions through: one of torch's."""
    if not isinstance(item.context_expr, ast.Call):
        return False
    thing = around.thing(item.context_expr.func)
    return is_from(thing, ("torch",)) or thing is contextlib.nullcontext


def _set_in(targets: Iterable[ast.AST]) -> frozenset[str]:
    names = (n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
    return frozenset(n.id for n in names if isinstance(n.ctx, ast.Store))


def is_store(node: ast.AST) -> bool:
    """Whether a name is set there."""
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def shortened(node: ast.AST) -> str:
    """The code of a node on one short line."""
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 60 else f"{text[:57]}..."


def why_opaque(node: ast.AST) -> str:
    """Why a child called in there is not found by the graph."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript):
        return f"sets `{shortened(node.targets[0])}`"
    if isinstance(node, ast.If | ast.IfExp):
        return f"branches on `{shortened(node.test)}`"
    if isinstance(node, ast.For):
        return f"loops over `{shortened(node.iter)}`"
    if isinstance(node, ast.While):
        return f"loops while `{shortened(node.test)}`"
    if isinstance(node, ast.With):
        return f"runs it inside `{shortened(node).rstrip(':')}`"
    if isinstance(node, ast.Try):
        return "runs it inside try"
    if isinstance(node, SCOPES):
        return f"runs it inside the comprehension `{shortened(node)}`"
    return f"runs it inside `{shortened(node)}`"
