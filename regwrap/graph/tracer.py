"""The tracer: from the syntax tree of a method to its graph."""

from __future__ import annotations

import ast
import builtins
import operator
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from torch import fx, nn

from regwrap.graph.classes import is_made_here, key_of
from regwrap.graph.names import (
    EVERYTHING,
    FORBIDDEN,
    HARMLESS,
    NOTHING,
    Names,
    content_of,
    is_trusted,
    is_written_getattr,
    names_of,
)
from regwrap.graph.nodes import (
    BINARY,
    UNARY,
    Global,
    Method,
    Ref,
    Value,
    augment,
    build,
    call,
    part,
    read,
    unpack,
)
from regwrap.graph.reach import (
    PLAIN_SPECIAL,
    QUIET,
    Doubt,
    Reaching,
    is_introspection,
    item_of,
    unknown_names,
    written_index,
)
from regwrap.graph.syntax import (
    PART,
    Scope,
    _within,
    check_part,
    checked,
    locals_of,
    names_used,
    shortened,
    surely_set,
    why_opaque,
)
from regwrap.graph.verdicts import Refused
from regwrap.graph.view import ABSENT, View, joined


class Tracer(fx.Tracer):
    """Writes the graph of one method of an owner; see the module's docstring for how and why."""

    def __init__(self, view: View, function: types.FunctionType) -> None:
        super().__init__()
        self.root, self.view, self.function = view.owner, view, function
        self.graph = fx.Graph(tracer_cls=Tracer)
        self.doubts: list[Doubt] = []
        self.tree = checked(function)
        self.me = self.tree.args.args[0].arg
        self.env: dict[str, Value] = {}
        self.open: set[str] = set()
        """Names that hold a value or, where a part did not set them, stand for being unbound."""
        self.around = Scope(function, locals_of(self.tree, function))

    def write(self) -> fx.Graph:
        """The graph; raises `Refused`."""
        arguments = self.tree.args
        given = [*arguments.posonlyargs, *arguments.args[1:], *arguments.kwonlyargs]
        extra = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
        for argument in (*given, *extra):
            self.env[argument.arg] = self.graph.placeholder(argument.arg)
        result = self._body(self.tree.body)
        self.graph.output(self._lower(result))
        self.graph.lint()
        return self.graph

    # statements

    def _body(self, statements: list[ast.stmt]) -> Value:
        for i, statement in enumerate(statements):
            if isinstance(statement, ast.Return):
                if i + 1 < len(statements):
                    raise Refused("has code behind its return")
                return None if statement.value is None else self._expr(statement.value)
            if any(isinstance(n, ast.Return) for n in ast.walk(statement)):
                return self._tail(statements[i:])
            self._statement(statement)
        return None

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            value = self._kept(self._expr(node.value))
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.value is not None:
                self._assign(node.target, self._kept(self._expr(node.value)))
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            self._augment(node.target.id, node)
        elif isinstance(node, ast.Expr):
            if not isinstance(node.value, ast.Constant):
                self._expr(node.value)
        elif isinstance(node, ast.Delete) and all(isinstance(t, ast.Name) for t in node.targets):
            for target in node.targets:
                self._load(cast(ast.Name, target).id)
                del self.env[cast(ast.Name, target).id]
        elif not isinstance(node, ast.Pass):
            self._statements([node])

    def _augment(self, name: str, node: ast.AugAssign) -> None:
        old = self._lower(self._load(name))
        value = self._lower(self._expr(node.value))
        symbol = BINARY[type(node.op)][1]
        self.open.discard(name)
        self.env[name] = self._node("call_function", augment, (old, value), say=symbol)

    def _assign(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self._store(target.id, value)
        elif isinstance(target, ast.Tuple | ast.List):
            self._unpack(target.elts, value)
        else:  # self.x = value, x[i] = value: as they stand, for their effect
            name = "_regwrap_value"
            self.env[name] = value
            setting = ast.Assign([target], ast.Name(name, ast.Load()), lineno=0)
            self._statements([ast.fix_missing_locations(setting)])
            del self.env[name]

    def _unpack(self, targets: list[ast.expr], value: Value) -> None:
        if any(isinstance(t, ast.Starred) for t in targets):
            raise Refused("unpacks with a star")
        if isinstance(value, tuple) and len(value) == len(targets):
            items: Iterable[Value] = value
        else:
            whole = self._node("call_function", unpack, (self._lower(value), len(targets)))
            items = [self._item(whole, i) for i in range(len(targets))]
            whole.meta["items"] = tuple(items)
        for target, item in zip(targets, items, strict=True):
            self._assign(target, item)

    def _item(self, whole: fx.Node, index: int) -> fx.Node:
        return self._node("call_function", operator.getitem, (whole, index))

    def _store(self, name: str, value: Value) -> None:
        if name == self.me:
            raise Refused(f"assigns to `{name}`")
        self.env[name] = value
        self.open.discard(name)

    def _load(self, name: str) -> Value:
        if name in self.env and name not in self.open:
            return self.env[name]
        raise Refused(f"may read `{name}` before it has a value")

    # parts: source that runs as it stands

    def _statements(self, nodes: list[ast.stmt]) -> None:
        loaded, stored = names_used(nodes)
        check_part(nodes)
        if self.me in stored:
            raise Refused(f"assigns to `{self.me}`")
        sure = surely_set(nodes, self.around) or frozenset()
        given = [n for n in dict.fromkeys((*loaded, *stored)) if self._is_needed(n, stored)]
        open_ = [n for n in stored if n not in self.env and n not in sure and n not in loaded]
        results = [n for n in stored if (n in self.env and n not in self.open) or n in sure]
        results += open_
        node = self._part(nodes, given, results)
        node.meta["open"] = tuple(open_)
        whole = None if len(results) == 1 else node
        for i, name in enumerate(results):
            self.env[name] = node if whole is None else self._item(node, i)
        for name in set(stored) - set(results):
            self.env.pop(name, None)
        self.open = (self.open - set(stored)) | set(open_)

    def _is_needed(self, name: str, stored: tuple[str, ...]) -> bool:
        if name == self.me:
            return False
        if name in self.env:
            return True
        if name in self.around.locals and name not in stored:
            self._load(name)  # raises
        return False

    def _tail(self, nodes: list[ast.stmt]) -> fx.Node:
        """All that is left of a body, from the first statement that may return."""
        loaded, stored = names_used(nodes)
        check_part(nodes, (*PART, ast.Delete))
        if self.me in stored:
            raise Refused(f"assigns to `{self.me}`")
        given = [n for n in dict.fromkeys((*loaded, *stored)) if self._is_needed(n, stored)]
        return self._part(nodes, given, None)

    def _whole(self, node: ast.expr) -> fx.Node:
        """An expression with control flow or a scope of its own."""
        loaded, stored = names_used([node])
        if stored:
            raise Refused(f"assigns inside `{shortened(node)}`")
        check_part([node])
        given = [n for n in loaded if self._is_needed(n, ())]
        return self._part([ast.copy_location(ast.Return(node), node)], given, None, node)

    def _part(
        self,
        nodes: list[ast.stmt],
        given: list[str],
        results: list[str] | None,
        origin: ast.AST | None = None,
    ) -> fx.Node:
        self._doubt_part(nodes, why_opaque(origin or nodes[0]))
        text = "\n".join(ast.unparse(n) for n in nodes)
        # Indented, as it will stand: a string over several lines would not survive that.
        again = cast(ast.If, ast.parse("if 1:\n" + textwrap.indent(text, "    ")).body[0]).body
        if [*map(ast.dump, again)] != [*map(ast.dump, nodes)]:
            raise Refused(f"has text that cannot be written again: `{shortened(nodes[0])}`")
        args = tuple(self._lower(self.env[n], handed=False) for n in given)
        node = self._node("call_function", part, args)
        maybe = tuple(n for n in given if n in self.open)
        node.meta.update(source=text, given=tuple(given), results=results, open=(), maybe=maybe)
        return node

    def _doubt_part(self, nodes: list[ast.stmt], why: str) -> None:
        refs = {n: frozenset((v.path,)) for n, v in self.env.items() if isinstance(v, Ref)}
        reach = Reaching(self.view, self.me, refs, self.around)
        reach.read(nodes)
        for path in reach.called:
            self._doubt("called", path, NOTHING, why)
        for path, names in reach.given:
            self._doubt("given", path, names, why)

    def _doubt(self, kind: str, path: str, names: Names, why: str) -> None:
        self.doubts.append(Doubt(kind, path, names, f"{self.function.__name__} {why}"))

    # expressions

    def _expr(self, node: ast.expr) -> Value:
        rule = _RULES.get(type(node))
        return self._whole(node) if rule is None else rule(self, node)

    def _constant(self, node: ast.Constant) -> Value:
        return node.value

    def _name(self, node: ast.Name) -> Value:
        if node.id == self.me:
            return Ref("", self.me)
        if node.id in self.around.locals:
            return self._load(node.id)
        if node.id in FORBIDDEN:
            raise Refused(f"uses `{node.id}`")
        return Global(node.id, self.around.value(node.id))

    def _tuple(self, node: ast.Tuple) -> Value:
        if any(isinstance(e, ast.Starred) for e in node.elts):
            return self._display(node, ("(", ",)"))
        return tuple(self._kept(self._expr(e)) for e in node.elts)

    def _list(self, node: ast.List) -> Value:
        return self._display(node, ("[", "]"))

    def _display(self, node: ast.List | ast.Tuple, brackets: tuple[str, str]) -> fx.Node:
        values = [e.value if isinstance(e, ast.Starred) else e for e in node.elts]
        stars = frozenset(i for i, e in enumerate(node.elts) if isinstance(e, ast.Starred))
        args = tuple(self._lower(self._expr(v)) for v in values)
        return self._node("call_function", build, args, say=brackets, stars=stars)

    def _dict(self, node: ast.Dict) -> Value:
        if not all(isinstance(k, ast.Constant) for k in node.keys):
            return self._whole(node)
        keys = tuple(cast(ast.Constant, k).value for k in node.keys)
        args = tuple(self._lower(self._expr(v)) for v in node.values)
        return self._node("call_function", build, args, say=("{", "}"), keys=keys)

    def _binary(self, node: ast.BinOp) -> Value:
        left = self._lower(self._expr(node.left))
        right = self._lower(self._expr(node.right))
        target, symbol = BINARY[type(node.op)]
        return self._node("call_function", target, (left, right), say=symbol)

    def _unary(self, node: ast.UnaryOp) -> Value:
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if isinstance(node.op, ast.USub) and type(number) in (int, float):
            return -cast(float, number)
        target, symbol = UNARY[type(node.op)]
        value = self._lower(self._expr(node.operand), handed=not isinstance(node.op, ast.Not))
        return self._node("call_function", target, (value,), say=symbol)

    def _compare(self, node: ast.Compare) -> Value:
        if len(node.ops) > 1 or type(node.ops[0]) not in BINARY:
            return self._whole(node)
        target, symbol = BINARY[type(node.ops[0])]
        handed = not isinstance(node.ops[0], ast.Is | ast.IsNot)
        left = self._lower(self._expr(node.left), handed)
        right = self._lower(self._expr(node.comparators[0]), handed)
        return self._node("call_function", target, (left, right), say=symbol)

    def _walrus(self, node: ast.NamedExpr) -> Value:
        value = self._kept(self._expr(node.value))
        self._store(node.target.id, value)
        return value

    def _slice(self, node: ast.Slice) -> Value:
        ends = (node.lower, node.upper, node.step)
        return slice(*(None if e is None else self._lower(self._expr(e)) for e in ends))

    def _subscript(self, node: ast.Subscript) -> Value:
        base = self._expr(node.value)
        if isinstance(base, Ref):
            item = item_of(self.view, base.path, written_index(node.slice))
            if item is not None:
                return Ref(item, f"{base.text}[{ast.unparse(node.slice)}]")
            for path in self.view.items(base.path):
                self._doubt("given", path, EVERYTHING, f"picks from `{base.text}` as it runs")
        index = self._lower(self._expr(node.slice))
        whole = self._lower(base, handed=False)
        if isinstance(base, Global):
            found = self._node("call_function", operator.getitem, (whole, index))
            found.meta["choices"] = _choices(base.value)
            return found
        return self._node("call_function", operator.getitem, (whole, index))

    def _attribute(self, node: ast.Attribute) -> Value:
        if node.attr.startswith("__") and not node.attr.endswith("__"):
            raise Refused(f"uses the private name `{node.attr}`")
        return self._member(self._expr(node.value), node.attr)

    def _member(self, base: Value, name: str) -> Value:
        if isinstance(base, Ref):
            return self._of_module(base, name)
        if isinstance(base, Global):
            return Global(f"{base.text}.{name}", _within_global(base.value, name))
        return self._node("call_function", getattr, (self._lower(base), name))

    def _of_module(self, base: Ref, name: str) -> Value:
        found = self.view.look(base.path, name)
        text = f"{base.text}.{name}"
        if isinstance(found, nn.Module):
            return Ref(joined(base.path, name), text)
        if name in ("__call__", "_call_impl", "_wrapped_call_impl"):
            self._doubt("called", base.path, NOTHING, f"uses `{text}`")
        elif is_introspection(self.view, base.path, name) or unknown_names(
            self.view, base.path, name
        ):
            self._doubt("given", base.path, EVERYTHING, f"uses `{text}`")
        if isinstance(found, types.FunctionType) and name not in vars(self.view.module(base.path)):
            return Method(base, name, found)
        return self._read(base, name, found)

    def _read(self, base: Ref, name: str, found: object) -> fx.Node:
        """`self.name` when it runs, whatever it then is."""
        if base.node is not None:
            return self._node("call_function", getattr, (base.node, name))
        node = self._node("get_attr", joined(base.path, name), say=f"{base.text}.{name}")
        if callable(found) and not isinstance(found, property):
            node.meta["choices"] = (found,)
        return node

    # calls

    def _call(self, node: ast.Call) -> Value:
        if any(isinstance(a, ast.GeneratorExp) for a in node.args):
            return self._whole(node)
        if is_written_getattr(node):
            return self._getattr(node)
        callee = self._callee(node.func)
        if _may_rebind(node, self):
            callee = self._kept(callee, early=True)
        lone = [a.value if isinstance(a, ast.Starred) else a for a in node.args]
        stars = frozenset(i for i, a in enumerate(node.args) if isinstance(a, ast.Starred))
        args = [self._argument(a, callee) for a in lone]
        kwargs: dict[str, Any] = {}
        for i, keyword in enumerate(node.keywords):
            kwargs[keyword.arg or f"**{i}"] = self._argument(keyword.value, callee)
        return self._call_node(callee, args, kwargs, stars)

    def _getattr(self, node: ast.Call) -> Value:
        """`getattr(x, "name")`, with or without a default."""
        base, name = self._expr(node.args[0]), str(cast(ast.Constant, node.args[1]).value)
        if len(node.args) == 2 and not node.keywords:
            return self._member(base, name)
        if isinstance(base, Ref):
            found = self.view.look(base.path, name)
            if isinstance(found, nn.Module | types.FunctionType) or unknown_names(
                self.view, base.path, name
            ):
                self._doubt("given", base.path, EVERYTHING, f"uses `{shortened(node)}`")
        rest = [self._lower(self._expr(a)) for a in node.args[1:]]
        args = (self._lower(base, handed=False), *rest)
        return self._node("call_function", getattr, args, say="getattr")

    def _callee(self, node: ast.expr) -> Value:
        if _is_super(node):
            return self._super(cast(ast.Attribute, node).attr)
        if isinstance(node, ast.Attribute):
            base = self._expr(node.value)
            if not isinstance(base, Ref | Global | Method):
                return _Of(self._lower(base), node.attr)
        return self._expr(node)

    def _super(self, name: str) -> _Super:
        """`super().name`, as it is for this owner's class."""
        cells = self.function.__closure__ or ()
        above = content_of(cells[0]) if cells else None
        mro = type(self.view.owner).__mro__
        if not isinstance(above, type) or above not in mro:
            raise Refused("uses super() in a way that is not followed")
        for klass in mro[mro.index(above) + 1 :]:
            found = klass.__dict__.get(name)
            if found is not None and not is_made_here(klass):
                if not isinstance(found, types.FunctionType):
                    raise Refused(f"uses super().{name}, which is no plain method")
                if klass is nn.Module and name not in QUIET | PLAIN_SPECIAL:
                    raise Refused(f"uses super().{name}")
                return _Super(name, key_of(name, klass), found)
        raise Refused(f"uses super().{name}, which is not there")

    def _argument(self, node: ast.expr, callee: Value) -> Any:
        value = self._expr(node)
        for ref in _refs(value):
            if not self._is_harmless(callee):
                why = f"hands `{ref.text}` on, to something that could call it"
                self._doubt("given", ref.path, self._names(callee), why)
        return self._lower(value, handed=False)

    def _is_harmless(self, callee: Value) -> bool:
        return isinstance(callee, Global) and any(
            callee.value is getattr(builtins, n) for n in HARMLESS
        )

    def _names(self, callee: Value) -> Names:
        """What the called code may say: of all that it can be, as far as that is known."""
        if isinstance(callee, Global):
            return EVERYTHING if callee.value is ABSENT else names_of(callee.value)
        choices = callee.meta.get("choices") if isinstance(callee, fx.Node) else None
        if not choices:
            return EVERYTHING
        names = [names_of(c) for c in choices]
        said = frozenset[str]().union(*(n.names for n in names))
        return Names(said, any(n.wide for n in names))

    def _call_node(
        self, callee: Value, args: list[Any], kwargs: dict[str, Any], stars: frozenset[int]
    ) -> fx.Node:
        if isinstance(callee, _Of):
            first = {i + 1 for i in stars}
            return self._node(
                "call_method", callee.name, (callee.base, *args), kwargs, stars=frozenset(first)
            )
        if isinstance(callee, _Super):
            node = self._node("call_function", callee.function, tuple(args), kwargs, None, stars)
            node.meta["super"] = (callee.name, callee.key)
            return node
        if isinstance(callee, Ref):
            if not callee.path:
                raise Refused(f"calls `{callee.text}` itself")
            say = callee.node or callee.text
            return self._node("call_module", callee.path, tuple(args), kwargs, say, stars)
        if isinstance(callee, Method | Global):
            value = callee.function if isinstance(callee, Method) else callee.value
            target = value if isinstance(value, _CALLABLE) else call
            node = self._node("call_function", target, tuple(args), kwargs, callee.text, stars)
            node.meta["choices"] = _results(callee, args)
            return node
        shifted = frozenset(i + 1 for i in stars)
        first_arg = self._lower(callee)
        return self._node("call_function", call, (first_arg, *args), kwargs, None, shifted)

    # nodes

    def _kept(self, value: Value, early: bool = False) -> Value:
        """A value that a variable keeps: what is read lazily is read now."""
        if isinstance(value, Ref) and value.path and value.node is None:
            node = self._node("get_attr", value.path, say=value.text)
            return Ref(value.path, value.text, node)
        if isinstance(value, Global) or (early and isinstance(value, Method)):
            return self._lower(value, handed=False)
        return value if isinstance(value, Ref | _Super) or early else self._lower(value)

    def _lower(self, value: Value, handed: bool = True) -> Any:
        """The value as an argument of a node; a module that gets away from here is in doubt."""
        if isinstance(value, Ref):
            if handed:
                why = f"uses `{value.text}` as a value"
                self._doubt("given", value.path, EVERYTHING, why)
            return self._kept(value).node if value.path else self._node_of(value.text)
        if isinstance(value, Method):
            return self._node("get_attr", joined(value.ref.path, value.name), say=value.text)
        if isinstance(value, Global):
            node = self._node_of(value.text)
            node.meta["choices"] = (value.value,) if callable(value.value) else None
            return node
        if isinstance(value, tuple):
            return tuple(self._lower(v, handed) for v in value)
        return value

    def _node_of(self, text: str) -> fx.Node:
        return self._node("call_function", read, (), say=text)

    def _node(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        say: object = None,
        stars: frozenset[int] = frozenset(),
        keys: tuple[object, ...] | None = None,
    ) -> fx.Node:
        said = isinstance(say, str) and op != "get_attr" and any(map(str.isalnum, say))
        hint = say if said else target
        name = hint if isinstance(hint, str) else getattr(hint, "__name__", "value")
        name = "".join(c if c.isalnum() and c.isascii() else "_" for c in name).strip("_").lower()
        word = name if name and not name[0].isdigit() else f"value_{name}".rstrip("_")
        node = self.graph.create_node(op, target, args, kwargs or {}, name=word)
        node.meta.update(say=say, stars=stars, keys=keys)
        return node


@dataclass(frozen=True, slots=True)
class _Super:
    """`super().name`: a function of a base class, called with self."""

    name: str
    key: str
    function: types.FunctionType


def _is_super(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id == "super"
        and not node.value.args
    )


_CALLABLE = (types.FunctionType, types.BuiltinFunctionType, type)


@dataclass(frozen=True, slots=True)
class _Of:
    """A method of a value: `x.view`."""

    base: Any
    name: str


_RULES: dict[type[ast.AST], Callable[[Tracer, Any], Value]] = {
    ast.Constant: Tracer._constant,
    ast.Name: Tracer._name,
    ast.Tuple: Tracer._tuple,
    ast.List: Tracer._list,
    ast.Dict: Tracer._dict,
    ast.BinOp: Tracer._binary,
    ast.UnaryOp: Tracer._unary,
    ast.Compare: Tracer._compare,
    ast.NamedExpr: Tracer._walrus,
    ast.Slice: Tracer._slice,
    ast.Subscript: Tracer._subscript,
    ast.Attribute: Tracer._attribute,
    ast.Call: Tracer._call,
}


def _refs(value: Value) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _refs(item)


def _within_global(base: object, name: str) -> object:
    if isinstance(base, Mapping) and name in ("get", "get_interface"):
        return _Choice(_choices(base))
    return _within(base, name)


@dataclass(frozen=True, slots=True)
class _Choice:
    """A lookup in a global registry of functions: it gives one of them, or a default."""

    functions: tuple[object, ...] | None

    def __call__(self, *_: object) -> NoReturn:
        raise NotImplementedError


def _choices(registry: object) -> tuple[object, ...] | None:
    if not isinstance(registry, Mapping):
        return None
    values = tuple(registry.values())
    return values if all(isinstance(v, types.FunctionType | type) for v in values) else None


def _results(callee: Method | Global, args: list[Any]) -> tuple[object, ...] | None:
    chosen = callee.value if isinstance(callee, Global) else None
    if not isinstance(chosen, _Choice) or chosen.functions is None:
        return None
    given = [c for a in args if isinstance(a, fx.Node) for c in a.meta.get("choices") or ()]
    return (*chosen.functions, *given)


def _may_rebind(node: ast.Call, tracer: Tracer) -> bool:
    """Whether the arguments run code that could change what the callee's name stands for."""
    inner = (n for a in (*node.args, *node.keywords) for n in ast.walk(a))
    return any(isinstance(n, ast.Call) and not _is_local(n.func, tracer) for n in inner)


def _is_local(function: ast.AST, tracer: Tracer) -> bool:
    if is_trusted(tracer.around.thing(function)):
        return True
    path = ""
    names: list[str] = []
    while isinstance(function, ast.Attribute):
        names.insert(0, function.attr)
        function = function.value
    if not (isinstance(function, ast.Name) and function.id == tracer.me):
        return bool(names) and not isinstance(function, ast.Name)
    for name in names:
        if not isinstance(tracer.view.look(path, name), nn.Module):
            return False
        path = joined(path, name)
    return True
