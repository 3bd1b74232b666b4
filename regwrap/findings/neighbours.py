"""Which module takes which module's output directly, as far as the source shows it plainly.

Stock `Sequential`s by their order, other modules by the syntax tree of their `forward`: calls of
children nested in each other or handed on by a local name. What it cannot read it leaves out; it is
for advice, where a silent miss is cheaper than a false alarm.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from regwrap import sites
from regwrap.graph import joined

_MADE = ("_regwrap_rewritten", "_regwrap_spliced")


@dataclass
class Body:
    """The calls of children in one forward: who is fed by whom, and who gives the result."""

    feeds: list[tuple[str, str]] = field(default_factory=list)
    """(child, child that takes its output directly)."""
    result: str | None = None
    """The child whose output is returned, perhaps through a function such as a softmax."""


def body_of(module: nn.Module) -> Body:
    """What the module's forward does with its children."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        names = list(module._modules)
        return Body(list(itertools.pairwise(names)), names[-1] if names else None)
    return _read(author_class(module))


def author_class(module: nn.Module) -> type:
    """The module's class as its author wrote it."""
    modules = (c for c in type(module).__mro__ if issubclass(c, nn.Module))  # no mixin of ours
    return next(c for c in modules if not any(made in vars(c) for made in _MADE))


def neighbours(root: nn.Module) -> Iterator[tuple[str, str]]:
    """Paths of leaves (a, b) where b takes a's output directly, under their first names."""
    names = {id(module): path for path, module in root.named_modules()}
    for owner in root.modules():
        for giver, taker in body_of(owner).feeds:
            last, first = _last(owner, giver), _first(owner, taker)
            if last is not None and first is not None:
                ends = (owner.get_submodule(end) for end in (last, first))
                a, b = (names[id(end)] for end in ends)
                yield a, b


def ending(root: nn.Module) -> Iterator[str]:
    """From the model's result backwards: paths of leaves up to the first that has parameters."""
    path, owner = "", root
    while not is_leaf(owner):
        body = body_of(owner)
        before = {taker: giver for giver, taker in body.feeds}
        child = body.result
        while child is not None and _is_plain_leaf(owner, child):
            yield joined(path, child)
            child = before.pop(child, None)  # once: two may take turns
        found = None if child is None else sites.submodule(owner, child)
        if child is None or found is None:
            return
        path, owner = joined(path, child), found
    if path:
        yield path


def is_leaf(module: nn.Module) -> bool:
    """Whether the module has no children; parametrizations of its own weight are none."""
    return all(name == "parametrizations" for name, _ in module.named_children())


def _is_plain_leaf(owner: nn.Module, name: str) -> bool:
    child = sites.submodule(owner, name)
    return child is not None and is_leaf(child) and not any(True for _ in child.parameters())


def _last(owner: nn.Module, name: str) -> str | None:
    """The leaf that gives a child's output."""
    child = sites.submodule(owner, name)
    if child is None or is_leaf(child):
        return None if child is None else name
    result = body_of(child).result
    inner = None if result is None else _last(child, result)
    return None if inner is None else joined(name, inner)


def _first(owner: nn.Module, name: str) -> str | None:
    """The leaf that takes a child's input: known of leaves and Sequentials."""
    child = sites.submodule(owner, name)
    if child is None or is_leaf(child):
        return None if child is None else name
    if not isinstance(child, nn.Sequential):
        return None
    inner = _first(child, next(iter(child._modules)))
    return None if inner is None else joined(name, inner)


@functools.lru_cache(maxsize=512)
def _read(cls: type) -> Body:
    tree = syntax(cls, "forward")
    if tree is None or not (named := [*tree.args.posonlyargs, *tree.args.args]):
        return Body()
    reader = _Reader(named[0].arg)
    reader.visit(tree)
    return reader.body


def syntax(cls: type, name: str) -> ast.FunctionDef | None:
    """The syntax tree of a method, None where there is no source."""
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(getattr(cls, name))))
        tree = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError, AttributeError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


class _Reader(ast.NodeVisitor):
    """Follows outputs of children through a forward, statement by statement."""

    def __init__(self, own: str) -> None:
        self.own = own  # what the author calls self
        self.body = Body()
        self.held: dict[str, str | None] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        given = self._direct(node.value)
        for target in node.targets:
            for name in (n for n in ast.walk(target) if isinstance(n, ast.Name)):
                self.held[name.id] = given if target is name else None

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._direct(node.value)
        if isinstance(node.target, ast.Name):
            self.held[node.target.id] = None

    def visit_Expr(self, node: ast.Expr) -> None:
        self._direct(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            self._direct(node.value)
            self.body.result = self._behind(node.value)

    def _direct(self, node: ast.expr) -> str | None:
        """The child whose output the expression is; notes who feeds whom on the way."""
        if isinstance(node, ast.Name):
            return self.held.get(node.id)
        if isinstance(node, ast.Call):
            child = self._path(node.func)
            inputs = [self._direct(a) for a in [*node.args, *(k.value for k in node.keywords)]]
            if child is None:
                self._direct(node.func)
            elif inputs and inputs[0] is not None:
                self._feed(inputs[0], child)
            return child
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.expr):
                self._direct(inner)
        return None

    def _feed(self, giver: str, taker: str) -> None:
        if (giver, taker) not in self.body.feeds:
            self.body.feeds.append((giver, taker))

    def _behind(self, node: ast.expr) -> str | None:
        """The child whose output is returned, also through functions and in outer forms."""
        if isinstance(node, ast.Tuple) and node.elts:
            return self._behind(node.elts[0])
        if isinstance(node, ast.Dict):
            keyed = zip(node.keys, node.values, strict=True)
            logits = [v for k, v in keyed if isinstance(k, ast.Constant) and k.value == "logits"]
            return self._behind(logits[0]) if logits else None
        if isinstance(node, ast.Call) and self._path(node.func) is None:
            logits = [k.value for k in node.keywords if k.arg == "logits"]
            method = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Call)
            receiver = [node.func.value] if method else []  # type: ignore[attr-defined]
            return self._first_behind([*logits, *receiver, *node.args[:1]])
        return self._direct(node)

    def _first_behind(self, nodes: list[ast.expr]) -> str | None:
        return self._behind(nodes[0]) if nodes else None

    def _path(self, node: ast.expr) -> str | None:
        """`a.b` for the expression `self.a.b`."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        own = isinstance(node, ast.Name) and node.id == self.own and names
        return ".".join(reversed(names)) if own else None
