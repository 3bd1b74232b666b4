"""Dropout where the source would have it: an owner's methods are written anew from their graph.

`rewrite(owner, inserts)` registers the dropouts as the owner's last children and gives this one
object a subclass of its class, in which the methods that call the children are generated from
`graph.trace` with the dropouts in place. While none of the dropouts trains, the original method
runs. `restore(owner)` takes both out again.

The subclass says what it is: `inserts`, names and source text are plain data on it, shared by every
owner of equal code; nothing refers to the owner, so that a copy, a pickle and another process have
what undo needs. Generated functions live in the globals of the functions that they replace.
"""

from __future__ import annotations

import abc
import copyreg
import functools
import keyword
import linecache
import operator
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import fx, nn

from regwrap import graph as graphs
from regwrap.errors import PolicyError

_MADE = graphs.MADE


@dataclass(frozen=True, slots=True)
class Insert:
    """A dropout to put in: behind or before the calls of one child of the owner."""

    child: str
    p: float
    kind: type[nn.Module] = nn.Dropout
    at: str = "output"
    """`"output"`, `"activation"` (behind the one that follows) or `"input"`."""


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What a rewritten class was made from."""

    inserts: tuple[Insert, ...]
    names: tuple[str, ...]
    """What each insert's dropout is called as a child of the owner."""
    sources: tuple[tuple[str, str], ...]
    """The generated text of each method."""


def rewritten(owner: nn.Module) -> Rewrite | None:
    """What a module was rewritten with, by this object's class; None if it was not."""
    made = _made(type(owner))
    return None if made is None else cast(Rewrite, vars(made)[_MADE])


def rewrite(owner: nn.Module, inserts: Sequence[Insert]) -> None:
    """Puts dropouts into the owner's own code; earlier ones are taken out first.

    Raises:
        PolicyError: an owner or a place that is not safe; nothing has been changed then.
    """
    before = rewritten(owner)
    if before is not None:
        restore(owner)
    try:
        if inserts:
            _rewrite(owner, tuple(inserts))
    except BaseException:
        if before is not None:
            _install(owner, before)
        raise


def restore(owner: nn.Module) -> None:
    """The inverse of `rewrite`, also on a copy; does nothing to a module that was not rewritten."""
    found = rewritten(owner)
    if found is None:
        return
    for name in found.names:
        owner._modules.pop(name, None)
    object.__setattr__(owner, "__class__", _without(type(owner)))


def _rewrite(owner: nn.Module, inserts: tuple[Insert, ...]) -> None:
    cls = type(owner)
    children = frozenset(i.child for i in inserts)
    facts = graphs.facts_about(owner, children)
    names = _free_names(owner, inserts)
    key = (inserts, names)
    sources = facts.written.get(key)
    if sources is None:
        sources = facts.written[key] = tuple(_sources(owner, facts, inserts, names))
    dropouts = [i.kind(i.p) for i in inserts]
    for insert, dropout in zip(inserts, dropouts, strict=True):
        if dropout.state_dict():
            raise PolicyError(
                f"{insert.kind.__name__} has a state of its own, which the checkpoint would show"
            )
    _install(owner, Rewrite(inserts, names, sources), dropouts)
    assert issubclass(type(owner), cls)


def _install(owner: nn.Module, plan: Rewrite, dropouts: Iterable[nn.Module] = ()) -> None:
    made = _subclass(type(owner), plan)
    dropouts = list(dropouts) or [i.kind(i.p) for i in plan.inserts]
    object.__setattr__(owner, "__class__", made)
    for name, dropout in zip(plan.names, dropouts, strict=True):
        owner._modules[name] = dropout.train(owner.training)


def _free_names(owner: nn.Module, inserts: tuple[Insert, ...]) -> tuple[str, ...]:
    names: list[str] = []
    for insert in inserts:
        stem = f"regwrap_dropout_{insert.child.replace('.', '_')}"
        stem = "".join(c if c.isalnum() else "_" for c in stem)
        name, n = stem, 1
        while name in names or name in owner._modules or not _is_free(owner, name):
            name, n = f"{stem}_{n}", n + 1
        names.append(name)
    return tuple(names)


def _is_free(owner: nn.Module, name: str) -> bool:
    # Not hasattr: the author's __getattr__ may have an answer to everything.
    return graphs.look_up(owner, name) is graphs.ABSENT


# ---- the class -------------------------------------------------------------------------------


class _Rewritten:
    """What every rewritten class has first among its bases."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the `__init_subclass__` of the owner's author from seeing the class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        make, args, *rest = reduced
        plan = rewritten(cast(nn.Module, self))
        plain = _without(type(self))
        args = tuple(plain if arg is type(self) else arg for arg in args)
        standard = make in (copyreg.__newobj__, copyreg.__newobj_ex__, copyreg._reconstructor)  # type: ignore[attr-defined]
        return (rebuild if standard else _rebuild_whole, (make, args, plan), *rest)


def rebuild(make: Callable[..., nn.Module], args: tuple[Any, ...], plan: Rewrite) -> nn.Module:
    """What unpickling and copying call: the object as yet without state, its class rewritten."""
    owner = make(*args)
    object.__setattr__(owner, "__class__", _subclass(type(owner), plan))
    return owner


rebuild.standard = True  # type: ignore[attr-defined]
"""The state follows, as behind `copyreg.__newobj__`: for other `__reduce_ex__` on top of ours."""


def _rebuild_whole(
    make: Callable[..., nn.Module], args: tuple[Any, ...], plan: Rewrite
) -> nn.Module:
    """The same for a class whose own `__reduce__` makes a whole object."""
    owner = make(*args)
    if isinstance(owner, nn.Module) and "_modules" in vars(owner) and rewritten(owner) is None:
        _install(owner, plan)
    return owner


def _made(cls: type) -> type | None:
    return next((k for k in cls.__mro__ if _MADE in vars(k)), None)


def _without(cls: type) -> type:
    """The class as it would be without the rewrite; classes above it are built again."""
    if _MADE in vars(cls):
        return cls.__bases__[1]
    if _Rewritten not in cls.__mro__:
        return cls
    body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return _create(cls, tuple(map(_without, cls.__bases__)), body)


def _create(like: type, bases: tuple[type, ...], body: dict[str, Any]) -> type:
    # Not through the metaclass's own call: one of the author's may register what it makes.
    meta = type(like)
    make = abc.ABCMeta.__new__ if issubclass(meta, abc.ABCMeta) else type.__new__
    return make(meta, like.__name__, bases, body)


def _subclass(cls: type, plan: Rewrite) -> type:
    known: type
    for known in type.__subclasses__(cls):  # holds them weakly: no cache that keeps classes alive
        if vars(known).get(_MADE) == plan:
            return known
    body: dict[str, Any] = {n: vars(cls)[n] for n in ("__module__", "__doc__") if n in vars(cls)}
    body |= {"__qualname__": cls.__qualname__, _MADE: plan, "__init__": _plain_init(cls)}
    files = []
    functions: dict[str, types.FunctionType] = {}
    for key, source in plan.sources:
        original = graphs.method_of(cls, key)
        filename = f"<regwrap {cls.__qualname__}.{key} {hash(source) & 0xFFFFFFFF:x}>"
        files.append(filename)
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        functions[key] = _function(cls, original, source, filename, functions)
    body |= {key: f for key, f in functions.items() if "@" not in key}
    made = _create(cls, (_Rewritten, cls), body)
    for filename in files:
        weakref.finalize(made, linecache.cache.pop, filename, None)
    return made


def _plain_init(cls: type) -> Callable[..., None]:
    """`type(owner)(...)` makes a plain object: it has no dropouts yet, and no rules."""

    @functools.wraps(cls.__init__)  # type: ignore[misc]
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "__class__", cls)
        self.__init__(*args, **kwargs)

    return __init__


def _function(
    cls: type,
    original: types.FunctionType,
    source: str,
    filename: str,
    others: dict[str, types.FunctionType],
) -> types.FunctionType:
    made: dict[str, Any] = {}
    code = compile(source, filename, "exec", dont_inherit=True)
    exec(code, original.__globals__, made)
    cells = original.__closure__  # of super(): the class that the method was written in
    written_in = cells[0].cell_contents if cells else None
    function: types.FunctionType = made["_regwrap_build"](cls, written_in, others)
    function.__defaults__ = original.__defaults__
    function.__kwdefaults__ = original.__kwdefaults__
    function.__annotations__ = dict(original.__annotations__)
    function.__doc__, function.__module__ = original.__doc__, original.__module__
    function.__qualname__ = original.__qualname__
    function.__dict__.update(original.__dict__)
    return function


# ---- dropouts in a graph ---------------------------------------------------------------------


def _sources(
    owner: nn.Module, facts: graphs.Facts, inserts: tuple[Insert, ...], names: tuple[str, ...]
) -> Iterator[tuple[str, str]]:
    methods: dict[str, None] = {}
    for insert in inserts:
        calls = [c for c in facts.calls if c.child == insert.child]
        reason = facts.doubt_of(owner, insert.child)
        if reason or not calls:
            where = f"{type(owner).__name__}.{insert.child}"
            raise PolicyError(f"{where} cannot be rewritten: {reason or 'it is never called'}")
        methods |= dict.fromkeys(c.method for c in calls)
    callers = [caller for caller, target in facts.supers if target in methods]
    while new := [c for c in callers if c not in methods]:
        methods |= dict.fromkeys(new)
        callers = [caller for caller, target in facts.supers if target in methods]
    for method in methods:
        graph = graphs.trace(owner, method)
        for insert, name in zip(inserts, names, strict=True):
            _insert(graph, owner, insert, name)
        graph.lint()
        original = graphs.method_of(type(owner), method)
        yield method, _Text(graph, original, names, frozenset(methods)).write("@" not in method)


def _insert(graph: fx.Graph, owner: nn.Module, insert: Insert, name: str) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == insert.child:
            _PLACES[insert.at](graph, owner, node, name)


def _behind(graph: fx.Graph, owner: nn.Module, node: fx.Node, name: str) -> None:
    with graph.inserting_after(node):
        dropout = _dropout(graph, name, node)
    node.replace_all_uses_with(dropout, delete_user_cb=lambda user: user is not dropout)


def _behind_activation(graph: fx.Graph, owner: nn.Module, node: fx.Node, name: str) -> None:
    if graphs.activation_after(owner, node) is None:
        raise PolicyError(
            f"no elementwise activation takes the output of {node.target}: use at='output'"
        )
    _behind(graph, owner, next(iter(node.users)), name)


def _before(graph: fx.Graph, owner: nn.Module, node: fx.Node, name: str) -> None:
    place = graphs.input_of(owner, node)
    if place is None:
        raise PolicyError(f"{node.target} is not called with one input: use at='output'")
    with graph.inserting_before(node):
        if isinstance(place, int):
            node.update_arg(place, _dropout(graph, name, node.args[place]))
        else:
            node.update_kwarg(place, _dropout(graph, name, node.kwargs[place]))


def _dropout(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    node = graph.create_node("call_module", name, (value,), {}, name=name)
    node.meta.update(say=f"{_ME}.{name}", stars=frozenset())
    return node


_ME = "{self}"
_PLACES: dict[str, Callable[[fx.Graph, nn.Module, fx.Node, str], None]] = {
    "output": _behind,
    "activation": _behind_activation,
    "input": _before,
}


# ---- a graph as source text ------------------------------------------------------------------


class _Text:
    """Writes one method from its graph, each node a line, every name looked up when it runs."""

    def __init__(
        self,
        graph: fx.Graph,
        original: types.FunctionType,
        dropouts: tuple[str, ...],
        methods: frozenset[str],
    ) -> None:
        self.graph, self.original, self.methods = graph, original, methods
        code = original.__code__
        self.count = code.co_argcount + code.co_kwonlyargcount
        self.me = code.co_varnames[0]
        used = {str(n.target) for n in graph.nodes if n.op == "call_module"}
        reaches = any(n.meta.get("super", ("", ""))[1] in methods for n in graph.nodes)
        self.dropouts = [d for d in dropouts if d in used or reaches]
        self.parts: list[str] = []
        self.names = self._node_names()
        self.last = self._last_uses()

    def _node_names(self) -> dict[fx.Node, str]:
        taken = {*graphs.spoken_by(self.original.__code__), *keyword.kwlist, self.me}
        names = {n: str(n.target) for n in self.graph.nodes if n.op == "placeholder"}
        taken |= set(names.values())
        for node in self.graph.nodes:
            if node not in names:
                name = node.name
                while name in taken:
                    name += "_"
                taken.add(name)
                names[node] = name
        return names

    def write(self, is_entry: bool) -> str:
        """The text; an entry runs the original method while no dropout trains."""
        body = [line for node in self.graph.nodes for line in self._freeing(node)]
        signature, passed = self._signature()
        method = self.original.__name__
        head = self._head(f"_regwrap_base.{method}({self.me}{passed})") if is_entry else []
        return "\n".join(
            [
                "def _regwrap_build(_regwrap_base, _regwrap_class, _regwrap_supers):",
                "    _regwrap_unbound = object()",
                *(_indented(p) for p in self.parts),
                f"    def {method}({self.me}{signature}):",
                _indented("\n".join([*head, *body]), 8),
                f"    return {method}",
                "",
            ]
        )

    def _head(self, original: str) -> list[str]:
        children = "children"
        while children in {*self.names.values(), *graphs.spoken_by(self.original.__code__)}:
            children += "_"
        checks = " or ".join(f'{children}["{d}"].training' for d in self.dropouts)
        return [
            f"{children} = {self.me}._modules",
            f"if not ({checks}):",
            f"    return {original}",
        ]

    def _signature(self) -> tuple[str, str]:
        """The parameters behind `self`, and the arguments that hand them on."""
        code, function = self.original.__code__, self.original
        names = code.co_varnames
        ordinary = names[1 : code.co_argcount]
        defaults = len(function.__defaults__ or ())
        needed = code.co_argcount - 1 - defaults
        taken = [n if i < needed else f"{n}=None" for i, n in enumerate(ordinary)]
        passed = list(ordinary)
        rest = list(names[self.count :])
        if code.co_flags & 0x04:  # *args
            taken.append(f"*{rest[0]}")
            passed.append(f"*{rest.pop(0)}")
        elif code.co_kwonlyargcount:
            taken.append("*")
        for name in names[code.co_argcount : self.count]:
            taken.append(f"{name}=None" if name in (function.__kwdefaults__ or {}) else name)
            passed.append(f"{name}={name}")
        if code.co_flags & 0x08:  # **kwargs
            taken.append(f"**{rest[0]}")
            passed.append(f"**{rest[0]}")
        return "".join(f", {t}" for t in taken), "".join(f", {p}" for p in passed)

    def _freeing(self, node: fx.Node) -> list[str]:
        """The node's lines; what nobody needs any more is let go, as a variable set anew would."""
        lines = self._lines(node)
        if lines and self.last.get(node) and node.op != "output":
            lines[-1] += "".join(f"; {self.names[n]} = None" for n in self.last[node])
        return lines

    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """For each node that writes a line, the values that are not needed behind it."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            read = [*node.all_input_nodes]
            if isinstance(node.meta.get("say"), fx.Node):
                read.append(node.meta["say"])
            if node.op.startswith("call_") and not _is_unpacked(node):
                last[node] = node
            last.update((n, node) for n in read if n in last)
        found: dict[fx.Node, list[fx.Node]] = {}
        for value, node in last.items():
            if value.target is not graphs.unpack:
                found.setdefault(node, []).append(value)
        return found

    def _lines(self, node: fx.Node) -> list[str]:
        name = self.names[node]
        if node.op == "placeholder" or _is_unpacked(node):
            return []
        if node.op == "output":
            return [f"return {self._say(node.args[0])}"]
        if node.target is graphs.augment:
            old, value = node.args
            return [f"{name} = {self._say(old)}", f"{name} {node.meta['say']}= {self._say(value)}"]
        if node.target is graphs.unpack:
            items = "".join(f"{self.names[i]}, " for i in node.meta["items"])
            return [f"({items.rstrip()}) = {self._say(node.args[0])}"]
        return [f"{name} = {self._value(node)}"]

    def _value(self, node: fx.Node) -> str:
        say = node.meta.get("say")
        if node.op == "get_attr" or node.target is graphs.read:
            return str(say)
        if node.op == "call_module":
            called = self.names[say] if isinstance(say, fx.Node) else str(say)
            return f"{called.replace(_ME, self.me)}({self._arguments(node, 0)})"
        if node.op == "call_method":
            return f"{self._base(node.args[0])}.{node.target}({self._arguments(node, 1)})"
        if node.target is graphs.part:
            return self._part(node)
        if "super" in node.meta:
            name, key = node.meta["super"]
            args = self._arguments(node, 0)
            if key in self.methods:
                return f"_regwrap_supers[{key!r}]({self.me}{', ' if args else ''}{args})"
            return f"super(_regwrap_class, {self.me}).{name}({args})"
        if node.target is graphs.build:
            left, right = cast(tuple[str, str], say)
            if node.meta["keys"] is not None:
                pairs = zip(node.meta["keys"], node.args, strict=True)
                return f"{{{', '.join(f'{self._say(k)}: {self._say(a)}' for k, a in pairs)}}}"
            items = self._arguments(node, 0)
            return f"{left}{items}{right}" if items else f"{left}{right.lstrip(',')}"
        if node.target is graphs.call and say is None:
            return f"{self._base(node.args[0])}({self._arguments(node, 1)})"
        if node.target is getattr and say is None:
            return f"{self._base(node.args[0])}.{node.args[1]}"
        if node.target is operator.getitem and say is None:
            return f"{self._base(node.args[0])}[{self._index(node.args[1])}]"
        if node.target in _SYMBOLS and say in _SIGNS:
            parts = [self._base(a) for a in node.args]
            return f"{say}{parts[0]}" if len(parts) == 1 else f"{parts[0]} {say} {parts[1]}"
        return f"{say}({self._arguments(node, 0)})"

    def _part(self, node: fx.Node) -> str:
        name = f"_regwrap_part_{len(self.parts)}"
        given = "".join(f", {g}" for g in node.meta["given"])
        results = node.meta["results"]
        lines = [f"def {name}({self.me}{given}):"]
        # A variable that no branch has set stays one: reading it raises what it did.
        lines += [f"    if {n} is _regwrap_unbound: del {n}" for n in node.meta["maybe"]]
        lines += [f"    {n} = _regwrap_unbound" for n in node.meta["open"]]
        lines.append(_indented(node.meta["source"]))
        if results:
            lines.append(f"    return {results[0] if len(results) == 1 else ', '.join(results)}")
        self.parts.append("\n".join(lines))
        return f"{name}({self.me}{''.join(f', {self._say(a)}' for a in node.args)})"

    def _arguments(self, node: fx.Node, first: int) -> str:
        stars = node.meta["stars"]
        said = [
            f"*{self._base(a)}" if i in stars else self._say(a) for i, a in enumerate(node.args)
        ][first:]
        for key, value in node.kwargs.items():
            double = key.startswith("**")
            said.append(f"**{self._base(value)}" if double else f"{key}={self._say(value)}")
        return ", ".join(said)

    def _index(self, value: Any) -> str:
        if isinstance(value, slice):
            ends = [value.start, value.stop] + ([value.step] if value.step is not None else [])
            return ":".join("" if e is None else self._say(e) for e in ends)
        if isinstance(value, tuple) and any(isinstance(v, slice) for v in value):
            return "".join(f"{self._index(v)}, " for v in value).rstrip()
        return self._say(value)

    def _base(self, value: Any) -> str:
        text = self._say(value)
        return text if isinstance(value, fx.Node) else f"({text})"

    def _say(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if isinstance(value, tuple):
            return f"({', '.join(map(self._say, value))}{',' if len(value) == 1 else ''})"
        if value is Ellipsis:
            return "..."
        if isinstance(value, float | complex):
            return repr(value).replace("inf", "1e999")
        return repr(value)


_SYMBOLS = {f for table in (graphs.BINARY, graphs.UNARY) for f, _ in table.values()}
_SIGNS = {s for table in (graphs.BINARY, graphs.UNARY) for _, s in table.values()}


def _is_unpacked(node: fx.Node) -> bool:
    """Whether the node is one of the names on the left of `a, b = value`."""
    whole = node.args[0] if node.target is operator.getitem else None
    return isinstance(whole, fx.Node) and whole.target is graphs.unpack


def _indented(text: str, by: int = 4) -> str:
    return "\n".join(" " * by + line if line else line for line in text.split("\n"))
