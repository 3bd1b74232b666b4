"""What a stretch of code may do to the modules that it can get at."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from regwrap.graph.names import EVERYTHING, HARMLESS, Names, is_trusted, is_written_getattr
from regwrap.graph.source import word_set
from regwrap.graph.syntax import Scope, is_store
from regwrap.graph.view import ABSENT, View, has_body, joined, look_up

_ANY = "**"
PLAIN_SPECIAL = frozenset(("__setattr__", "__delattr__", "__call__", "__dir__"))
QUIET = word_set(
    "parameters named_parameters buffers named_buffers state_dict training train eval zero_grad "
    "requires_grad_ to half float double bfloat16 type cuda cpu _get_name extra_repr "
    "register_buffer register_parameter dump_patches T_destination"
)


@dataclass(frozen=True, slots=True)
class Doubt:
    """Something that may call modules unseen.

    `called`: the module at `path` itself. `given`: it, and all beneath it whose name is in `names`.
    """

    kind: str
    path: str
    names: Names
    reason: str

    def concerns(self, leaf: str, local: str, anchor: str) -> bool:
        """Whether it may call a leaf that is reached by a name, `local`, at the path `anchor`."""
        if self.path.endswith(_ANY):
            return leaf.startswith(self.path.removesuffix(_ANY))
        if leaf == self.path:
            return True
        if self.kind != "given" or not _is_beneath(leaf, self.path):
            return False
        by_index = self.path == anchor or _is_beneath(self.path, anchor)
        return by_index or self.names.may_call(local)


def _is_beneath(path: str, top: str) -> bool:
    return not top or path.startswith(f"{top}.")


Paths = frozenset[str]
_NO_PATHS: Paths = frozenset()


class Reaching:
    """Finds what a stretch of code calls and hands on; flow-insensitive, every branch counted."""

    def __init__(self, view: View, me: str, refs: Mapping[str, Paths], scope: Scope) -> None:
        self.view, self.me, self.scope = view, me, scope
        self.refs: dict[str, Paths] = dict(refs)
        self.called: dict[str, None] = {}
        self.given: list[tuple[str, Names]] = []

    def read(self, trees: Iterable[ast.AST]) -> None:
        """Follows the names that stand for modules through the trees."""
        for _ in range(3):  # names bound to modules, through up to three hops
            for tree in trees:
                for node in ast.walk(tree):
                    self._bind(node)
        for tree in trees:
            self._visit(tree)

    # names that stand for modules

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.For | ast.comprehension):
            self._bind_items(node.target, node.iter)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._bind_value(target, node.value)
        elif isinstance(node, ast.NamedExpr | ast.AnnAssign) and node.value is not None:
            self._bind_value(node.target, node.value)

    def _bind_value(self, target: ast.AST, value: ast.AST) -> None:
        if isinstance(target, ast.Name) and (paths := self._paths(value)):
            self.refs[target.id] = self.refs.get(target.id, _NO_PATHS) | paths

    def _bind_items(self, target: ast.AST, source: ast.AST) -> None:
        items = self._items(source)
        names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
        for name in names if items else ():
            self.refs[name] = self.refs.get(name, _NO_PATHS) | items

    def _items(self, source: ast.AST) -> Paths:
        """The modules that iteration over an expression may give."""
        if isinstance(source, ast.Call):
            if isinstance(source.func, ast.Name) and source.func.id in _ITERATORS:
                return frozenset().union(*(self._items(a) for a in source.args))
            if isinstance(source.func, ast.Attribute) and source.func.attr in _LISTINGS:
                base = self._paths(source.func.value)
                deep = source.func.attr in ("modules", "named_modules")
                return frozenset(i for b in base for i in self._beneath(b, deep))
            return _NO_PATHS
        return frozenset(i for p in self._paths(source) for i in self._beneath(p, False))

    def _beneath(self, path: str, deep: bool) -> Iterable[str]:
        if path.endswith(_ANY) or deep:
            return [joined(path.removesuffix(_ANY).rstrip("."), _ANY)]
        return self.view.items(path)

    def _paths(self, node: ast.AST) -> Paths:
        """The modules that an expression may be; empty: none, as far as is known."""
        if isinstance(node, ast.Name):
            return frozenset(("",)) if node.id == self.me else self.refs.get(node.id, _NO_PATHS)
        if isinstance(node, ast.Attribute):
            return self._step(self._paths(node.value), node.attr)
        if isinstance(node, ast.Subscript):
            return self._indexed(self._paths(node.value), node.slice)
        if isinstance(node, ast.IfExp):
            return self._paths(node.body) | self._paths(node.orelse)
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*(self._paths(v) for v in node.values))
        if isinstance(node, ast.NamedExpr):
            return self._paths(node.value)
        if is_written_getattr(node):
            call = cast(ast.Call, node)
            return self._step(
                self._paths(call.args[0]), str(cast(ast.Constant, call.args[1]).value)
            )
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "next":
                return self._items(node.args[0]) if node.args else _NO_PATHS
            if node.func.id in _ITERATORS:
                return frozenset().union(*(self._paths(a) for a in node.args))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self._got(node.func)
        return _NO_PATHS

    def _got(self, function: ast.Attribute) -> Paths:
        """What a method of a container gives: `self.layers.values()`."""
        if function.attr not in ("pop", "get", "__getitem__", "get_submodule", *_LISTINGS):
            return _NO_PATHS
        deep = function.attr in ("get_submodule", "modules", "named_modules")
        base = self._paths(function.value)
        return frozenset(i for b in base for i in self._beneath(b, deep))

    def _step(self, base: Paths, name: str) -> Paths:
        found = set()
        for path in base:
            if path.endswith(_ANY):
                found.add(path)
            elif name in ("_modules", "__dict__"):
                found.add(joined(path, _ANY))
            elif isinstance(self.view.look(path, name), nn.Module):
                found.add(joined(path, name))
            elif name in unknown_names(self.view, path, name):
                found.add(joined(path, _ANY))
        return frozenset(found)

    def _indexed(self, base: Paths, index: ast.AST) -> Paths:
        if isinstance(index, ast.Slice):
            return base
        found: set[str] = set()
        for path in base:
            item = None if path.endswith(_ANY) else item_of(self.view, path, written_index(index))
            found |= {item} if item is not None else set(self._beneath(path, False))
        return frozenset(found)

    # uses of them

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self._visit_call(node)
            self._give(self._paths(node), EVERYTHING)
        elif isinstance(node, ast.expr) and self._paths(node):
            if not is_store(node):
                self._give(self._paths(node), EVERYTHING)
        elif isinstance(node, ast.Attribute) and self._paths(node.value):
            self._visit_member(node)
        elif isinstance(node, ast.Compare) and all(
            isinstance(o, ast.Is | ast.IsNot) for o in node.ops
        ):
            for side in (node.left, *node.comparators):
                if not self._paths(side):
                    self._visit(side)
        elif isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) for t in node.targets):
            if not self._paths(node.value):
                self._visit(node.value)
        elif isinstance(node, ast.For | ast.comprehension) and self._items(node.iter):
            self._visit_source(node.iter)
            for child in ast.iter_child_nodes(node):
                if child is not node.iter:
                    self._visit(child)
        elif isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert) and self._paths(
            node.test
        ):
            for child in ast.iter_child_nodes(node):
                if child is not node.test:  # a truth value
                    self._visit(child)
        elif isinstance(node, ast.FunctionDef):
            for statement in node.body:
                self._visit(statement)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None and not self._paths(node.value):
                self._visit(node.value)
        else:
            for child in ast.iter_child_nodes(node):
                self._visit(child)

    def _visit_member(self, node: ast.Attribute) -> None:
        """An attribute of a module that is no module."""
        for path in self._paths(node.value):
            if node.attr in ("__call__", "_call_impl", "_wrapped_call_impl"):
                self.called[path] = None
            elif is_introspection(self.view, path, node.attr):
                self._give(frozenset((path,)), EVERYTHING)

    def _visit_call(self, node: ast.Call) -> None:
        if called := self._paths(node.func):
            self.called |= dict.fromkeys(called)
            if isinstance(node.func, ast.Subscript):
                self._visit(node.func.slice)
        else:
            self._visit(node.func)
        written = is_written_getattr(node)
        moves = isinstance(node.func, ast.Name) and node.func.id in ("next", *_ITERATORS)
        harmless = written or moves or _is_harmless(node.func)
        names = self.scope.names(node.func)
        for arg in (*node.args, *(k.value for k in node.keywords)):
            bare = arg.value if isinstance(arg, ast.Starred) else arg
            if not self._paths(bare):
                self._visit(bare)
            elif not harmless:
                self._give(self._paths(bare), names)

    def _visit_source(self, node: ast.AST) -> None:
        """What is iterated over: the modules in it are accounted for, the rest is visited."""
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in _LISTINGS:
                self._visit_listing(node.func)
            for arg in node.args:
                self._visit_source(arg)
        elif isinstance(node, ast.Subscript) and self._paths(node):
            self._visit(node.slice)
        elif not self._paths(node) and not self._items(node):
            self._visit(node)

    def _visit_listing(self, function: ast.Attribute) -> None:
        """A listing shows what a rewrite puts among the children, if only to be counted."""
        if is_trusted(self.scope.function):  # torch's own encoder looks for hooks, no more
            return
        bases = self._paths(function.value)
        shown = (p for p in bases if is_introspection(self.view, p, function.attr))
        self._give(frozenset(p for p in shown if self._shows_owners(p, function.attr)), EVERYTHING)

    def _shows_owners(self, path: str, listing: str) -> bool:
        deep = listing in ("modules", "named_modules")
        return deep or has_body(self.view.module(path))

    def _give(self, paths: Paths, names: Names) -> None:
        self.given += [(p, names) for p in paths]


_ITERATORS = ("enumerate", "zip", "reversed", "list", "tuple", "sorted", "iter")
_LISTINGS = (
    "items",
    "values",
    "keys",
    "children",
    "modules",
    "named_children",
    "named_modules",
)


def is_introspection(view: View, path: str, name: str) -> bool:
    """Whether `module.name` is a way of `nn.Module` to get at the modules beneath."""
    if path.endswith(_ANY) or name in QUIET:
        return False
    found = view.look(path, name)
    inherited = name in vars(nn.Module) and found is vars(nn.Module)[name]
    return (inherited and name != "forward" and callable(found)) or name in ("_modules", "__dict__")


def unknown_names(view: View, path: str, name: str) -> tuple[str, ...]:
    """The name itself where only a `__getattr__` of the author's could say what it is."""
    module = view.module(path)
    custom = look_up(module, "__getattr__") is not nn.Module.__getattr__
    return (name,) if custom and view.look(path, name) is ABSENT else ()


def _is_harmless(function: ast.AST) -> bool:
    return isinstance(function, ast.Name) and function.id in HARMLESS


def written_index(index: ast.AST) -> object:
    """The constant that an index is, or `ABSENT`."""
    try:
        return ast.literal_eval(cast(ast.expr, index))
    except (ValueError, TypeError, SyntaxError):
        return ABSENT


def item_of(view: View, path: str, index: object) -> str | None:
    """The path of one item of a stock container; None: not known which."""
    module = view.module(path)
    getters = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    if not any(getattr(type(module), "__getitem__", None) is k.__getitem__ for k in getters):
        return None
    names = list(module._modules)
    view.seen[path, "*"] = tuple(names)
    if isinstance(index, int) and not isinstance(index, bool) and -len(names) <= index < len(names):
        return joined(path, names[index])
    return joined(path, index) if isinstance(index, str) and index in names else None
