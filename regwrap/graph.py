"""Which module calls which, and what becomes of the result: reads only, runs no code of the model.

`survey(model)` answers for every Linear: who calls it (its *owners*), how often, which activation
and which dropout follow, and whether a rewrite of the owners is provably the model that they are
(*rule P*); where it is not, why, in a sentence. `trace(owner)` gives a method of one owner as a
`torch.fx` graph, every child a leaf.

The graph is not recorded by running the body on proxies, as `torch.fx.Tracer.trace` does: that
patches `nn.Module` for the whole process (another thread's forward fails meanwhile), runs the
body's effects, decides `x is not None` once and for all, turns `y += 1` into `y = y + 1` and burns
every attribute and global in. Here the tracer walks the syntax tree, which is first proved to be
the code that runs (it is compiled again and compared with the function's bytecode), and emits one
node for one operation, in order of evaluation. Nothing has a value at that time, so nothing can be
burned in:
`self.scale`, `self.training` and globals are nodes that read them when they run, `y += 1` is a node
that adds in place.

The whitelist is what the tracer has a rule for. A statement or expression with control flow of its
own (`if`, `for`, `with`, `a if c else b`, a comprehension) becomes one opaque node, a *part*, which
runs the source as it stands; a child called in there is in doubt, the others are not. Whatever has
no rule (closures, lambdas, `yield`, imports) refuses the method. A child is also in doubt where it,
or a module that holds it, is handed to code that could call it unseen.
"""

from __future__ import annotations

import ast
import builtins
import collections
import contextlib
import functools
import inspect
import linecache
import operator
import textwrap
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

# ---- what is found ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Activation:
    """An elementwise activation that takes a call's output and is alone in doing so."""

    name: str
    module: str | None
    """Its path from the owner; None for a function."""
    commutes: bool
    """Whether a dropout before it equals one after it, exactly: ReLU, LeakyReLU."""


@dataclass(frozen=True, slots=True)
class Existing:
    """A dropout that is there already, downstream of a call."""

    module: str | None
    """Its path from the owner; None for a function."""
    attribute: str | None
    """Of a function: the owner's attribute that its rate is read from, if it is one."""
    behind: str
    """The activation in between; `""` if the dropout takes the output itself."""


@dataclass(frozen=True, slots=True)
class Call:
    """One place in the code of an owner where a child is called."""

    child: str
    method: str
    activation: Activation | None
    dropout: Existing | None
    follower: str
    """In words, what takes the output: `the product mul`, `self.act`, `what forward returns`."""
    returned: bool
    """Whether the output is what the owner's forward returns, or an item of it."""
    one_input: bool
    """Whether it is called with one input, whose place in the code is known."""


@dataclass(frozen=True, slots=True)
class Site:
    """The calls of a layer by one owner."""

    owner: str
    """The owner's path in the model, the first one that leads to the layer."""
    child: str
    calls: tuple[Call, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who calls a layer, and whether all of them may be rewritten."""

    path: str
    sites: tuple[Site, ...]
    reason: str
    """`""` where every owner may be rewritten, else one sentence for the user."""

    @property
    def by_fx(self) -> bool:
        """Whether every call is known and in a body that is provably safe."""
        return bool(self.sites) and not self.reason

    @property
    def never_called(self) -> bool:
        """Whether no code of the model calls the layer."""
        return not self.sites and not self.reason


class Refused(Exception):
    """Rule P does not allow a method; the text says why."""


# ---- from a function to its syntax tree, proved ----------------------------------------------


def _definition(function: types.FunctionType) -> ast.FunctionDef:
    """The definition whose compilation is this very function; not to be written to.

    A file edited since the import, an import hook, a decorator that rewrites its function: whatever
    makes the text differ from what runs shows in the bytecode.
    """
    code = function.__code__
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise Refused("is a generator or a coroutine")
    if code.co_name == "<lambda>":
        raise Refused("is a lambda")
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if len(lines) < code.co_firstlineno:
        raise Refused("has no source that could be read")
    return _proved(_Source(code, lines))


class _Source:
    """A code object and the file it is from; equal for the same object alone."""

    def __init__(self, code: types.CodeType, lines: list[str]) -> None:
        self.code, self.lines = code, lines

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and other.code is self.code

    def __hash__(self) -> int:
        return id(self.code)


@functools.lru_cache(maxsize=256)
def _proved(source: _Source) -> ast.FunctionDef:
    try:
        tree = _parse(source.lines, source.code)
        found = _compiled(tree, source.code)
    except (SyntaxError, IndentationError, ValueError, IndexError, RecursionError):
        raise Refused("has no source that could be read") from None
    if found is None:
        raise Refused("has a source that is not the code that runs")
    return found


def _parse(lines: list[str], code: types.CodeType) -> ast.Module:
    block = inspect.getblock(lines[code.co_firstlineno - 1 :])
    names = code.co_qualname.split(".")
    head = names[-2] if len(names) > 1 and names[-2].isidentifier() else "_"
    indented = block[0][:1] in (" ", "\t")  # not dedented: that would change strings of many lines
    tree = ast.parse((f"class {head}:\n" if indented else "") + "".join(block))
    # Calls of `name.method()` compile differently where the file imports the name, even if the
    # function has a variable of that name.
    used = {n for c in _codes(code) for n in (*c.co_names, *c.co_varnames, *c.co_cellvars)}
    imported = _imported("".join(lines)) & used
    tree.body[:0] = [ast.Import([ast.alias(n)]) for n in sorted(imported)]
    return ast.fix_missing_locations(tree)


@functools.lru_cache(maxsize=64)
def _imported(text: str) -> frozenset[str]:
    """The names that a file imports in its own scope."""
    found: set[str] = set()
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.update((a.asname or a.name).split(".")[0] for a in node.names)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                todo.append(node)
    return frozenset(found)


def _compiled(tree: ast.Module, code: types.CodeType) -> ast.FunctionDef | None:
    module = compile(tree, "<regwrap>", "exec", dont_inherit=True)
    if not any(_same(c, code) for c in _codes(module)):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            return node
    return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


_CODE_FACTS = (
    "co_code",
    "co_names",
    "co_varnames",
    "co_freevars",
    "co_cellvars",
    "co_argcount",
    "co_kwonlyargcount",
    "co_posonlyargcount",
    "co_name",
)


def _same(a: types.CodeType, b: types.CodeType) -> bool:
    return (
        all(getattr(a, fact) == getattr(b, fact) for fact in _CODE_FACTS)
        and len(a.co_consts) == len(b.co_consts)
        and all(map(_same_constant, a.co_consts, b.co_consts))
    )


def _same_constant(a: object, b: object) -> bool:
    if isinstance(a, types.CodeType) and isinstance(b, types.CodeType):
        return _same(a, b)
    if isinstance(a, frozenset):
        return a == b
    return type(a) is type(b) and repr(a) == repr(b)  # repr: 0.0 is not -0.0, nor 1 True


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# ---- which names a piece of code can say -----------------------------------------------------

_PACKAGES = ("torch", "transformers.utils", "transformers.integrations", "math")
"""Packages whose code says no name of a user's layer."""
_RUNNERS = (
    "torch.utils.checkpoint",
    "torch._functorch.functional_call",
    "transformers.utils",
    "transformers.integrations",
)
"""Where functions call a module that they are given as a module, if at all, and none beneath it."""

_INTROSPECTION = _set(
    "children modules named_children named_modules _modules __dict__ apply get_submodule _apply "
    "vars attrgetter methodcaller eval exec globals locals gc sys"
)
_FORBIDDEN = _set("__class__ super eval exec globals locals vars dir __import__ delattr")
_HARMLESS = _set("isinstance hasattr len type id callable bool repr str print")
_LIMIT = 200


@dataclass(frozen=True, slots=True)
class _Names:
    """The names and strings in some code; `wide`: it may reach modules by other means."""

    names: frozenset[str]
    wide: bool

    def may_call(self, name: str) -> bool:
        return self.wide or name in self.names


_EVERYTHING = _Names(frozenset(), True)
_NOTHING = _Names(frozenset(), False)


def spoken_by(code: types.CodeType) -> frozenset[str]:
    """Names of attributes and globals, and strings, in the code and in what it defines."""
    try:
        return _SAID[code]
    except KeyError:
        words: set[str] = set()
        for part in _codes(code):
            words.update(part.co_names, part.co_freevars)
            for const in part.co_consts:
                items = const if isinstance(const, tuple | frozenset) else (const,)
                words.update(w for c in items if isinstance(c, str) for w in c.split(".")[:8])
        return _SAID.setdefault(code, frozenset(words))


_SAID: weakref.WeakKeyDictionary[types.CodeType, frozenset[str]] = weakref.WeakKeyDictionary()


def _is_from(thing: object, packages: tuple[str, ...]) -> bool:
    name = getattr(thing, "__module__", None) or ""
    if isinstance(thing, types.BuiltinFunctionType) and not name:
        return "torch" in packages  # a method of a C type, torch.relu
    return isinstance(name, str) and any(
        name == root or name.startswith(f"{root}.") for root in packages
    )


def _is_trusted(thing: object) -> bool:
    return _is_from(thing, _PACKAGES)


def _names_of(thing: object) -> _Names:
    """What a function or class that is given a module says, with all that it names."""
    if _is_trusted(thing):
        runs = _is_from(thing, _RUNNERS) and not isinstance(thing, type)
        return _NOTHING if runs else _EVERYTHING
    words: set[str] = set()
    seen: set[int] = set()
    todo: list[object] = [thing]
    while todo:
        item = todo.pop()
        if id(item) in seen or _is_trusted(item):
            continue
        seen.add(id(item))
        if len(seen) > _LIMIT:
            return _EVERYTHING
        if isinstance(item, type):
            todo += [v for k in item.__mro__ if not _is_trusted(k) for v in vars(k).values()]
        elif functions := _functions(item):
            for function in functions:
                said = spoken_by(function.__code__)
                words |= said
                if said & _INTROSPECTION or ("getattr" in said and _is_dynamic(function)):
                    return _EVERYTHING
                todo += [v for v in _globals_of(function, said) if _is_code(v)]
                if any(isinstance(v, nn.Module) for v in _globals_of(function, said)):
                    return _EVERYTHING
        elif callable(item):
            return _EVERYTHING
    return _Names(frozenset(words), False)


def _is_code(value: object) -> bool:
    return isinstance(value, types.FunctionType | type | types.MethodType)


def _globals_of(function: types.FunctionType, said: frozenset[str]) -> Iterator[object]:
    return (function.__globals__[n] for n in said if n in function.__globals__)


def _is_dynamic(function: types.FunctionType) -> bool:
    """Whether a function may use `getattr` with a name that is not written there."""
    try:
        tree: ast.AST = _definition(function)
    except Refused:
        return True
    uses = sum(isinstance(n, ast.Name) and n.id == "getattr" for n in ast.walk(tree))
    return uses != sum(_is_written_getattr(n) for n in ast.walk(tree))


def _is_written_getattr(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) > 1
        and isinstance(node.args[1], ast.Constant)
    )


def _functions(thing: object) -> list[types.FunctionType]:
    """The Python functions that a callable or descriptor may run: itself, or what it wraps."""
    found: list[types.FunctionType] = []
    todo: list[object] = [thing]
    seen: set[int] = set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, types.FunctionType):
            found.append(item)
            todo += [_content(cell) for cell in item.__closure__ or ()]
            todo.append(item.__dict__.get("__wrapped__"))
        else:
            todo += [_static(item, name) for name in _WRAPPING if _static(item, name) is not item]
    return found


_WRAPPING = ("__func__", "__wrapped__", "fget", "fset", "func", "function")


def _static(item: object, name: str) -> object:
    if isinstance(item, property | types.MethodType | classmethod | staticmethod) or type(
        item
    ).__module__ in ("functools", "torch.jit"):
        return getattr(item, name, None)
    return None


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


MADE = "_regwrap_rewritten"
"""Marks the subclasses that a rewrite makes; a survey sees the classes beneath them."""

# ---- what a class has ------------------------------------------------------------------------


def _own_classes(cls: type) -> list[type]:
    """The class and its bases that add something to `nn.Module`."""
    bases = (k for k in cls.__mro__ if k not in nn.Module.__mro__ and not _is_ours(k))
    return [k for k in bases if not _is_from(k, _FRAMES)]


_FRAMES = (
    "transformers.modeling_utils",
    "transformers.generation",
    "transformers.integrations",
    "transformers.utils",
)
"""Where transformers' base classes live: what they say of layers is never a call of one."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _own_attributes(cls: type) -> list[tuple[str, object]]:
    # Of torch's containers only what runs by itself: their indexing is known.
    return [(n, v) for n, v in vars(cls).items() if cls not in _CONTAINERS or n == "forward"]


def _is_ours(cls: type) -> bool:
    return MADE in vars(cls) or cls.__module__.split(".")[0] == "regwrap"


@dataclass(frozen=True, slots=True)
class _Member:
    """A function of a class; `plain`: it is an ordinary method.

    Its key is its name, or, for one that a subclass has overridden, `name@module.Class`.
    """

    name: str
    key: str
    functions: tuple[types.FunctionType, ...]
    plain: bool
    visible: bool

    @property
    def said(self) -> frozenset[str]:
        return frozenset().union(*(spoken_by(f.__code__) for f in self.functions))


def _members(cls: type) -> list[_Member]:
    found: list[_Member] = []
    taken: set[str] = set()
    for klass in _own_classes(cls):
        for name, value in _own_attributes(klass):
            if functions := _functions(value):
                plain = isinstance(value, types.FunctionType)
                key = _key(name, klass) if name in taken else name
                found.append(_Member(name, key, tuple(functions), plain, name not in taken))
            taken.add(name)
    return found


def _key(name: str, klass: type) -> str:
    return f"{name}@{klass.__module__}.{klass.__qualname__}"


@dataclass(frozen=True, slots=True)
class _ClassWords:
    """For each name that a class defines, what its code says; no reference to the class."""

    members: Mapping[str, frozenset[str]]
    by_key: Mapping[str, frozenset[str]]
    stamp: tuple[weakref.ref[types.CodeType], ...]
    """The code of its functions and of the global functions that they name, as it is now."""

    def live(self, roots: Iterable[str]) -> frozenset[str]:
        """The members that these reach, by name."""
        todo = [r for r in roots if r in self.members]
        seen = set(todo)
        while todo:
            new = (self.members[todo.pop()] & self.members.keys()) - seen
            seen |= new
            todo += new
        return frozenset(seen)

    def said(self, roots: Iterable[str]) -> frozenset[str]:
        return frozenset().union(*(self.members[m] for m in roots))


_WORDS: weakref.WeakKeyDictionary[type, _ClassWords] = weakref.WeakKeyDictionary()
_NOT_RUN = _set(
    "__init__ __new__ __init_subclass__ __repr__ __str__ __deepcopy__ __copy__ __reduce__ "
    "__reduce_ex__ __getstate__ __setstate__ __del__ __post_init__ __set_name__"
)


def _roots(members: Iterable[str]) -> list[str]:
    """The members that run without being named: forward and the special methods."""
    return [m for m in members if m == "forward" or (_is_special(m) and m not in _NOT_RUN)]


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _words(cls: type) -> _ClassWords:
    return _WORDS[cls]


def _read_words(classes: Iterable[type]) -> None:
    """Reads classes anew: somebody may have replaced a method, or a function that it calls."""
    for cls in classes:
        members: dict[str, frozenset[str]] = {}
        by_key: dict[str, frozenset[str]] = {}
        stamp: dict[types.FunctionType, None] = {}
        for member in _members(cls):
            functions = _with_global_functions(member.functions)
            words = frozenset[str]().union(*(spoken_by(f.__code__) for f in functions))
            members[member.name] = members.get(member.name, frozenset()) | words
            by_key[member.key] = words
            stamp |= functions
        codes = tuple(weakref.ref(f.__code__) for f in stamp)
        _WORDS[cls] = _ClassWords(members, by_key, codes)


def _with_global_functions(
    functions: Iterable[types.FunctionType],
) -> dict[types.FunctionType, None]:
    """Functions and those that they name, and so on, of the model's author.

    Of classes that they name, what is written in a module's class: `Base.forward(self, x)`.
    """
    todo = list(functions)
    seen: dict[types.FunctionType, None] = dict.fromkeys(todo)
    while todo and len(seen) < _LIMIT:
        function = todo.pop()
        for value in _globals_of(function, spoken_by(function.__code__)):
            found = [value]
            if isinstance(value, type) and issubclass(value, nn.Module):
                found = [v for n, v in vars(value).items() if n not in _NOT_RUN]
            for item in found:
                if isinstance(item, types.FunctionType) and item not in seen:
                    if _is_trusted(item):
                        continue
                    seen[item] = None
                    todo.append(item)
    return seen


# ---- the modules beneath an owner, looked up without running anything ------------------------

ABSENT = object()
_Token = tuple[object, ...]


def look_up(module: nn.Module, name: str) -> object:
    """What `module.name` would give, with descriptors as they are; nothing of the user's runs."""
    own = vars(module)
    found = ABSENT
    for klass in type(module).__mro__:
        if name in klass.__dict__ and not _is_ours(klass):
            found = klass.__dict__[name]
            break
    if found is not ABSENT and hasattr(type(found), "__set__"):
        return found
    if name in own:
        return own[name]
    if found is not ABSENT:
        return found
    for table in ("_parameters", "_buffers", "_modules"):
        if name in own.get(table, ()):
            return own[table][name]
    return ABSENT


def _is_indexed(module: nn.Module) -> bool:
    """Whether items are reached by index or key: what is beneath has no name of its own."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)


def _body_of(module: nn.Module) -> object:
    return look_up(module, "forward")


_BODILESS = (nn.Module.forward, nn.ModuleList.forward, nn.ModuleDict.forward)


def _has_body(module: nn.Module) -> bool:
    return not any(_body_of(module) is f for f in _BODILESS)


def _is_stock_sequential(module: nn.Module) -> bool:
    return _body_of(module) is nn.Sequential.forward


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@dataclass(slots=True)
class _View:
    """Looks names up beneath one owner and remembers of what kind each was.

    The tokens are the *layout* that an analysis holds for: an owner of the same class for which
    they come out equal gets the same analysis.
    """

    owner: nn.Module
    seen: dict[tuple[str, str], _Token] = field(default_factory=dict)

    def module(self, path: str) -> nn.Module:
        found: Any = self.owner
        for name in path.split(".") if path else ():
            # in the object's __dict__ alone: a back-reference to its parent
            found = found._modules[name] if name in found._modules else vars(found)[name]
        return cast(nn.Module, found)

    def look(self, path: str, name: str) -> object:
        found = look_up(self.module(path), name)
        self.seen[path, name] = _token(found)
        return found

    def items(self, path: str) -> list[str]:
        """The paths of what an indexed container holds, or of everything just beneath."""
        names = list(self.module(path)._modules)
        self.seen[path, "*"] = tuple(names)
        return [_join(path, n) for n in names if isinstance(self.look(path, n), nn.Module)]

    def fits(self, tokens: Mapping[tuple[str, str], _Token]) -> bool:
        return all(self._now(path, name) == token for (path, name), token in tokens.items())

    def _now(self, path: str, name: str) -> _Token | None:
        try:
            module = self.module(path)
        except KeyError:
            return None
        if not isinstance(module, nn.Module):
            return None
        return tuple(module._modules) if name == "*" else _token(look_up(module, name))


def _token(found: object) -> _Token:
    if isinstance(found, nn.Module):
        return ("module", weakref.ref(type(found)), "forward" in vars(found))
    if isinstance(found, torch.Tensor):
        return ("tensor",)
    if found is ABSENT:
        return ("absent",)
    if isinstance(found, types.FunctionType):
        return ("function", weakref.ref(found))
    if isinstance(found, types.BuiltinFunctionType):
        return ("builtin", getattr(found, "__qualname__", ""))
    return ("value", callable(found))


# ---- what a stretch of code may do to modules ------------------------------------------------

_ANY = "**"
_PLAIN_SPECIAL = frozenset(("__setattr__", "__delattr__", "__call__", "__dir__"))
_QUIET = _set(
    "parameters named_parameters buffers named_buffers state_dict training train eval zero_grad "
    "requires_grad_ to half float double bfloat16 type cuda cpu _get_name extra_repr "
    "register_buffer register_parameter dump_patches T_destination"
)


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Something that may call modules unseen.

    `called`: the module at `path` itself. `given`: it, and all beneath it whose name is in `names`.
    """

    kind: str
    path: str
    names: _Names
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


class _Reach:
    """Finds what a stretch of code calls and hands on; flow-insensitive, every branch counted."""

    def __init__(self, view: _View, me: str, refs: Mapping[str, Paths], scope: _Scope) -> None:
        self.view, self.me, self.scope = view, me, scope
        self.refs: dict[str, Paths] = dict(refs)
        self.called: dict[str, None] = {}
        self.given: list[tuple[str, _Names]] = []

    def read(self, trees: Iterable[ast.AST]) -> None:
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
            return [_join(path.removesuffix(_ANY).rstrip("."), _ANY)]
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
        if _is_written_getattr(node):
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
                found.add(_join(path, _ANY))
            elif isinstance(self.view.look(path, name), nn.Module):
                found.add(_join(path, name))
            elif name in _unknown(self.view, path, name):
                found.add(_join(path, _ANY))
        return frozenset(found)

    def _indexed(self, base: Paths, index: ast.AST) -> Paths:
        if isinstance(index, ast.Slice):
            return base
        found: set[str] = set()
        for path in base:
            item = None if path.endswith(_ANY) else _item(self.view, path, _written(index))
            found |= {item} if item is not None else set(self._beneath(path, False))
        return frozenset(found)

    # uses of them

    def _visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.Call):
            self._visit_call(node)
            self._give(self._paths(node), _EVERYTHING)
        elif isinstance(node, ast.expr) and self._paths(node):
            if not _is_store(node):
                self._give(self._paths(node), _EVERYTHING)
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
            elif _is_introspection(self.view, path, node.attr):
                self._give(frozenset((path,)), _EVERYTHING)

    def _visit_call(self, node: ast.Call) -> None:
        if called := self._paths(node.func):
            self.called |= dict.fromkeys(called)
            if isinstance(node.func, ast.Subscript):
                self._visit(node.func.slice)
        else:
            self._visit(node.func)
        written = _is_written_getattr(node)
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
            for arg in node.args:
                self._visit_source(arg)
        elif isinstance(node, ast.Subscript) and self._paths(node):
            self._visit(node.slice)
        elif not self._paths(node) and not self._items(node):
            self._visit(node)

    def _give(self, paths: Paths, names: _Names) -> None:
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


def _is_introspection(view: _View, path: str, name: str) -> bool:
    """Whether `module.name` is a way of `nn.Module` to get at the modules beneath."""
    if path.endswith(_ANY) or name in _QUIET:
        return False
    found = view.look(path, name)
    inherited = name in vars(nn.Module) and found is vars(nn.Module)[name]
    return (inherited and name != "forward" and callable(found)) or name in ("_modules", "__dict__")


def _unknown(view: _View, path: str, name: str) -> tuple[str, ...]:
    """The name itself where only a `__getattr__` of the author's could say what it is."""
    module = view.module(path)
    custom = look_up(module, "__getattr__") is not nn.Module.__getattr__
    return (name,) if custom and view.look(path, name) is ABSENT else ()


def _is_harmless(function: ast.AST) -> bool:
    return isinstance(function, ast.Name) and function.id in _HARMLESS


def _written(index: ast.AST) -> object:
    """The constant that an index is, or `ABSENT`."""
    try:
        return ast.literal_eval(cast(ast.expr, index))
    except (ValueError, TypeError, SyntaxError):
        return ABSENT


def _item(view: _View, path: str, index: object) -> str | None:
    """The path of one item of a stock container; None: not known which."""
    module = view.module(path)
    getters = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    if not any(getattr(type(module), "__getitem__", None) is k.__getitem__ for k in getters):
        return None
    names = list(module._modules)
    view.seen[path, "*"] = tuple(names)
    if isinstance(index, int) and not isinstance(index, bool) and -len(names) <= index < len(names):
        return _join(path, names[index])
    return _join(path, index) if isinstance(index, str) and index in names else None


# ---- the tracer ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ref:
    """A module of the owner (`""`: itself), not read yet, or read by a node."""

    path: str
    text: str
    node: fx.Node | None = None


@dataclass(frozen=True, slots=True)
class _Method:
    """A method of the owner or of a module beneath it, still to be looked up when it runs."""

    ref: _Ref
    name: str
    function: object

    @property
    def text(self) -> str:
        return f"{self.ref.text}.{self.name}"


@dataclass(frozen=True, slots=True)
class _Global:
    """A global or something in it: `F.relu`; `value` is what it is now, for questions only."""

    text: str
    value: object


_Value = Any  # fx.Node, _Ref, _Method, _Global, a constant, a tuple or slice of them


def read(*_: object) -> NoReturn:
    """Stands in a graph for reading a global or a module; never called."""
    raise NotImplementedError


def part(*_: object) -> NoReturn:
    """Stands in a graph for source that runs as it stands; never called."""
    raise NotImplementedError


def call(*_: object, **__: object) -> NoReturn:
    """Stands in a graph for a call of something known only when it runs; never called."""
    raise NotImplementedError


def build(*_: object) -> NoReturn:
    """Stands in a graph for a list, dict or set display; never called."""
    raise NotImplementedError


def unpack(*_: object) -> NoReturn:
    """Stands in a graph for `a, b = value`; never called."""
    raise NotImplementedError


def augment(*_: object) -> NoReturn:
    """Stands in a graph for `x += y`; never called."""
    raise NotImplementedError


BINARY: dict[type[ast.AST], tuple[Callable[..., Any], str]] = {
    ast.Add: (operator.add, "+"),
    ast.Sub: (operator.sub, "-"),
    ast.Mult: (operator.mul, "*"),
    ast.Div: (operator.truediv, "/"),
    ast.FloorDiv: (operator.floordiv, "//"),
    ast.Mod: (operator.mod, "%"),
    ast.Pow: (operator.pow, "**"),
    ast.MatMult: (operator.matmul, "@"),
    ast.BitAnd: (operator.and_, "&"),
    ast.BitOr: (operator.or_, "|"),
    ast.BitXor: (operator.xor, "^"),
    ast.LShift: (operator.lshift, "<<"),
    ast.RShift: (operator.rshift, ">>"),
    ast.Lt: (operator.lt, "<"),
    ast.LtE: (operator.le, "<="),
    ast.Gt: (operator.gt, ">"),
    ast.GtE: (operator.ge, ">="),
    ast.Eq: (operator.eq, "=="),
    ast.NotEq: (operator.ne, "!="),
    ast.Is: (operator.is_, "is"),
    ast.IsNot: (operator.is_not, "is not"),
}
UNARY: dict[type[ast.AST], tuple[Callable[..., Any], str]] = {
    ast.USub: (operator.neg, "-"),
    ast.UAdd: (operator.pos, "+"),
    ast.Not: (operator.not_, "not "),
    ast.Invert: (operator.invert, "~"),
}

# What a part may consist of; its own scopes are comprehensions alone.
_PART = (
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
_SCOPES = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_EAGER = ("tuple", "list", "set", "dict", "sum", "any", "all", "max", "min", "sorted")


@dataclass(slots=True)
class _Scope:
    """The globals of a function, to say what a name is at the time of the analysis."""

    function: types.FunctionType
    locals: frozenset[str]

    def value(self, name: str) -> object:
        table = self.function.__globals__
        return table[name] if name in table else getattr(builtins, name, ABSENT)

    def thing(self, node: ast.AST) -> object:
        """What a dotted global name is; `ABSENT` if it is none."""
        if isinstance(node, ast.Name):
            return ABSENT if node.id in self.locals else self.value(node.id)
        if isinstance(node, ast.Attribute):
            return _within(self.thing(node.value), node.attr)
        return ABSENT

    def names(self, node: ast.AST) -> _Names:
        thing = self.thing(node)
        return _EVERYTHING if thing is ABSENT else _names_of(thing)


def _within(base: object, name: str) -> object:
    if isinstance(base, types.ModuleType):
        return vars(base).get(name, ABSENT)
    if isinstance(base, type):
        return inspect.getattr_static(base, name, ABSENT)
    return ABSENT


class Tracer(fx.Tracer):
    """Writes the graph of one method of an owner; see the module's docstring for how and why."""

    def __init__(self, view: _View, function: types.FunctionType) -> None:
        super().__init__()
        self.root, self.view, self.function = view.owner, view, function
        self.graph = fx.Graph(tracer_cls=Tracer)
        self.doubts: list[_Doubt] = []
        self.tree = _checked(function)
        self.me = self.tree.args.args[0].arg
        self.env: dict[str, _Value] = {}
        self.open: set[str] = set()
        """Names that hold a value or, where a part did not set them, stand for being unbound."""
        self.around = _Scope(function, _locals(self.tree, function))

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

    def _body(self, statements: list[ast.stmt]) -> _Value:
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

    def _assign(self, target: ast.expr, value: _Value) -> None:
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

    def _unpack(self, targets: list[ast.expr], value: _Value) -> None:
        if any(isinstance(t, ast.Starred) for t in targets):
            raise Refused("unpacks with a star")
        if isinstance(value, tuple) and len(value) == len(targets):
            items: Iterable[_Value] = value
        else:
            whole = self._node("call_function", unpack, (self._lower(value), len(targets)))
            items = [self._item(whole, i) for i in range(len(targets))]
            whole.meta["items"] = tuple(items)
        for target, item in zip(targets, items, strict=True):
            self._assign(target, item)

    def _item(self, whole: fx.Node, index: int) -> fx.Node:
        return self._node("call_function", operator.getitem, (whole, index))

    def _store(self, name: str, value: _Value) -> None:
        if name == self.me:
            raise Refused(f"assigns to `{name}`")
        self.env[name] = value
        self.open.discard(name)

    def _load(self, name: str) -> _Value:
        if name in self.env and name not in self.open:
            return self.env[name]
        raise Refused(f"may read `{name}` before it has a value")

    # parts: source that runs as it stands

    def _statements(self, nodes: list[ast.stmt]) -> None:
        loaded, stored = _names_used(nodes)
        _check_part(nodes)
        if self.me in stored:
            raise Refused(f"assigns to `{self.me}`")
        sure = _surely_set(nodes, self.around) or frozenset()
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
        loaded, stored = _names_used(nodes)
        _check_part(nodes, (*_PART, ast.Delete))
        if self.me in stored:
            raise Refused(f"assigns to `{self.me}`")
        given = [n for n in dict.fromkeys((*loaded, *stored)) if self._is_needed(n, stored)]
        return self._part(nodes, given, None)

    def _whole(self, node: ast.expr) -> fx.Node:
        """An expression with control flow or a scope of its own."""
        loaded, stored = _names_used([node])
        if stored:
            raise Refused(f"assigns inside `{_short(node)}`")
        _check_part([node])
        given = [n for n in loaded if self._is_needed(n, ())]
        return self._part([ast.copy_location(ast.Return(node), node)], given, None, node)

    def _part(
        self,
        nodes: list[ast.stmt],
        given: list[str],
        results: list[str] | None,
        origin: ast.AST | None = None,
    ) -> fx.Node:
        self._doubt_part(nodes, _why(origin or nodes[0]))
        text = "\n".join(ast.unparse(n) for n in nodes)
        # Indented, as it will stand: a string over several lines would not survive that.
        again = cast(ast.If, ast.parse("if 1:\n" + textwrap.indent(text, "    ")).body[0]).body
        if [*map(ast.dump, again)] != [*map(ast.dump, nodes)]:
            raise Refused(f"has text that cannot be written again: `{_short(nodes[0])}`")
        args = tuple(self._lower(self.env[n], handed=False) for n in given)
        node = self._node("call_function", part, args)
        maybe = tuple(n for n in given if n in self.open)
        node.meta.update(source=text, given=tuple(given), results=results, open=(), maybe=maybe)
        return node

    def _doubt_part(self, nodes: list[ast.stmt], why: str) -> None:
        refs = {n: frozenset((v.path,)) for n, v in self.env.items() if isinstance(v, _Ref)}
        reach = _Reach(self.view, self.me, refs, self.around)
        reach.read(nodes)
        for path in reach.called:
            self._doubt("called", path, _NOTHING, why)
        for path, names in reach.given:
            self._doubt("given", path, names, why)

    def _doubt(self, kind: str, path: str, names: _Names, why: str) -> None:
        self.doubts.append(_Doubt(kind, path, names, f"{self.function.__name__} {why}"))

    # expressions

    def _expr(self, node: ast.expr) -> _Value:
        rule = _RULES.get(type(node))
        return self._whole(node) if rule is None else rule(self, node)

    def _constant(self, node: ast.Constant) -> _Value:
        return node.value

    def _name(self, node: ast.Name) -> _Value:
        if node.id == self.me:
            return _Ref("", self.me)
        if node.id in self.around.locals:
            return self._load(node.id)
        if node.id in _FORBIDDEN:
            raise Refused(f"uses `{node.id}`")
        return _Global(node.id, self.around.value(node.id))

    def _tuple(self, node: ast.Tuple) -> _Value:
        if any(isinstance(e, ast.Starred) for e in node.elts):
            return self._display(node, ("(", ",)"))
        return tuple(self._kept(self._expr(e)) for e in node.elts)

    def _list(self, node: ast.List) -> _Value:
        return self._display(node, ("[", "]"))

    def _display(self, node: ast.List | ast.Tuple, brackets: tuple[str, str]) -> fx.Node:
        values = [e.value if isinstance(e, ast.Starred) else e for e in node.elts]
        stars = frozenset(i for i, e in enumerate(node.elts) if isinstance(e, ast.Starred))
        args = tuple(self._lower(self._expr(v)) for v in values)
        return self._node("call_function", build, args, say=brackets, stars=stars)

    def _dict(self, node: ast.Dict) -> _Value:
        if not all(isinstance(k, ast.Constant) for k in node.keys):
            return self._whole(node)
        keys = tuple(cast(ast.Constant, k).value for k in node.keys)
        args = tuple(self._lower(self._expr(v)) for v in node.values)
        return self._node("call_function", build, args, say=("{", "}"), keys=keys)

    def _binary(self, node: ast.BinOp) -> _Value:
        left = self._lower(self._expr(node.left))
        right = self._lower(self._expr(node.right))
        target, symbol = BINARY[type(node.op)]
        return self._node("call_function", target, (left, right), say=symbol)

    def _unary(self, node: ast.UnaryOp) -> _Value:
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if isinstance(node.op, ast.USub) and type(number) in (int, float):
            return -cast(float, number)
        target, symbol = UNARY[type(node.op)]
        value = self._lower(self._expr(node.operand), handed=not isinstance(node.op, ast.Not))
        return self._node("call_function", target, (value,), say=symbol)

    def _compare(self, node: ast.Compare) -> _Value:
        if len(node.ops) > 1 or type(node.ops[0]) not in BINARY:
            return self._whole(node)
        target, symbol = BINARY[type(node.ops[0])]
        handed = not isinstance(node.ops[0], ast.Is | ast.IsNot)
        left = self._lower(self._expr(node.left), handed)
        right = self._lower(self._expr(node.comparators[0]), handed)
        return self._node("call_function", target, (left, right), say=symbol)

    def _walrus(self, node: ast.NamedExpr) -> _Value:
        value = self._kept(self._expr(node.value))
        self._store(node.target.id, value)
        return value

    def _slice(self, node: ast.Slice) -> _Value:
        ends = (node.lower, node.upper, node.step)
        return slice(*(None if e is None else self._lower(self._expr(e)) for e in ends))

    def _subscript(self, node: ast.Subscript) -> _Value:
        base = self._expr(node.value)
        if isinstance(base, _Ref):
            item = _item(self.view, base.path, _written(node.slice))
            if item is not None:
                return _Ref(item, f"{base.text}[{ast.unparse(node.slice)}]")
            for path in self.view.items(base.path):
                self._doubt("given", path, _EVERYTHING, f"picks from `{base.text}` as it runs")
        index = self._lower(self._expr(node.slice))
        whole = self._lower(base, handed=False)
        if isinstance(base, _Global):
            found = self._node("call_function", operator.getitem, (whole, index))
            found.meta["choices"] = _choices(base.value)
            return found
        return self._node("call_function", operator.getitem, (whole, index))

    def _attribute(self, node: ast.Attribute) -> _Value:
        if node.attr.startswith("__") and not node.attr.endswith("__"):
            raise Refused(f"uses the private name `{node.attr}`")
        return self._member(self._expr(node.value), node.attr)

    def _member(self, base: _Value, name: str) -> _Value:
        if isinstance(base, _Ref):
            return self._of_module(base, name)
        if isinstance(base, _Global):
            return _Global(f"{base.text}.{name}", _within_global(base.value, name))
        return self._node("call_function", getattr, (self._lower(base), name))

    def _of_module(self, base: _Ref, name: str) -> _Value:
        found = self.view.look(base.path, name)
        text = f"{base.text}.{name}"
        if isinstance(found, nn.Module):
            return _Ref(_join(base.path, name), text)
        if name in ("__call__", "_call_impl", "_wrapped_call_impl"):
            self._doubt("called", base.path, _NOTHING, f"uses `{text}`")
        elif _is_introspection(self.view, base.path, name) or _unknown(self.view, base.path, name):
            self._doubt("given", base.path, _EVERYTHING, f"uses `{text}`")
        if isinstance(found, types.FunctionType) and name not in vars(self.view.module(base.path)):
            return _Method(base, name, found)
        return self._read(base, name, found)

    def _read(self, base: _Ref, name: str, found: object) -> fx.Node:
        """`self.name` when it runs, whatever it then is."""
        if base.node is not None:
            return self._node("call_function", getattr, (base.node, name))
        node = self._node("get_attr", _join(base.path, name), say=f"{base.text}.{name}")
        if callable(found) and not isinstance(found, property):
            node.meta["choices"] = (found,)
        return node

    # calls

    def _call(self, node: ast.Call) -> _Value:
        if any(isinstance(a, ast.GeneratorExp) for a in node.args):
            return self._whole(node)
        if _is_written_getattr(node):
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

    def _getattr(self, node: ast.Call) -> _Value:
        """`getattr(x, "name")`, with or without a default."""
        base, name = self._expr(node.args[0]), str(cast(ast.Constant, node.args[1]).value)
        if len(node.args) == 2 and not node.keywords:
            return self._member(base, name)
        if isinstance(base, _Ref):
            found = self.view.look(base.path, name)
            if isinstance(found, nn.Module | types.FunctionType) or _unknown(
                self.view, base.path, name
            ):
                self._doubt("given", base.path, _EVERYTHING, f"uses `{_short(node)}`")
        rest = [self._lower(self._expr(a)) for a in node.args[1:]]
        args = (self._lower(base, handed=False), *rest)
        return self._node("call_function", getattr, args, say="getattr")

    def _callee(self, node: ast.expr) -> _Value:
        if _is_super(node):
            return self._super(cast(ast.Attribute, node).attr)
        if isinstance(node, ast.Attribute):
            base = self._expr(node.value)
            if not isinstance(base, _Ref | _Global | _Method):
                return _Of(self._lower(base), node.attr)
        return self._expr(node)

    def _super(self, name: str) -> _Super:
        """`super().name`, as it is for this owner's class."""
        cells = self.function.__closure__ or ()
        above = _content(cells[0]) if cells else None
        mro = type(self.view.owner).__mro__
        if not isinstance(above, type) or above not in mro:
            raise Refused("uses super() in a way that is not followed")
        for klass in mro[mro.index(above) + 1 :]:
            found = klass.__dict__.get(name)
            if found is not None and not _is_ours(klass):
                if not isinstance(found, types.FunctionType):
                    raise Refused(f"uses super().{name}, which is no plain method")
                if klass is nn.Module and name not in _QUIET | _PLAIN_SPECIAL:
                    raise Refused(f"uses super().{name}")
                return _Super(name, _key(name, klass), found)
        raise Refused(f"uses super().{name}, which is not there")

    def _argument(self, node: ast.expr, callee: _Value) -> Any:
        value = self._expr(node)
        for ref in _refs(value):
            if not self._is_harmless(callee):
                why = f"hands `{ref.text}` on, to something that could call it"
                self._doubt("given", ref.path, self._names(callee), why)
        return self._lower(value, handed=False)

    def _is_harmless(self, callee: _Value) -> bool:
        return isinstance(callee, _Global) and any(
            callee.value is getattr(builtins, n) for n in _HARMLESS
        )

    def _names(self, callee: _Value) -> _Names:
        """What the called code may say: of all that it can be, as far as that is known."""
        if isinstance(callee, _Global):
            return _EVERYTHING if callee.value is ABSENT else _names_of(callee.value)
        choices = callee.meta.get("choices") if isinstance(callee, fx.Node) else None
        if not choices:
            return _EVERYTHING
        names = [_names_of(c) for c in choices]
        said = frozenset[str]().union(*(n.names for n in names))
        return _Names(said, any(n.wide for n in names))

    def _call_node(
        self, callee: _Value, args: list[Any], kwargs: dict[str, Any], stars: frozenset[int]
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
        if isinstance(callee, _Ref):
            if not callee.path:
                raise Refused(f"calls `{callee.text}` itself")
            say = callee.node or callee.text
            return self._node("call_module", callee.path, tuple(args), kwargs, say, stars)
        if isinstance(callee, _Method | _Global):
            value = callee.function if isinstance(callee, _Method) else callee.value
            target = value if isinstance(value, _CALLABLE) else call
            node = self._node("call_function", target, tuple(args), kwargs, callee.text, stars)
            node.meta["choices"] = _results(callee, args)
            return node
        shifted = frozenset(i + 1 for i in stars)
        first_arg = self._lower(callee)
        return self._node("call_function", call, (first_arg, *args), kwargs, None, shifted)

    # nodes

    def _kept(self, value: _Value, early: bool = False) -> _Value:
        """A value that a variable keeps: what is read lazily is read now."""
        if isinstance(value, _Ref) and value.path and value.node is None:
            node = self._node("get_attr", value.path, say=value.text)
            return _Ref(value.path, value.text, node)
        if isinstance(value, _Global) or (early and isinstance(value, _Method)):
            return self._lower(value, handed=False)
        return value if isinstance(value, _Ref | _Super) or early else self._lower(value)

    def _lower(self, value: _Value, handed: bool = True) -> Any:
        """The value as an argument of a node; a module that gets away from here is in doubt."""
        if isinstance(value, _Ref):
            if handed:
                why = f"uses `{value.text}` as a value"
                self._doubt("given", value.path, _EVERYTHING, why)
            return self._kept(value).node if value.path else self._node_of(value.text)
        if isinstance(value, _Method):
            return self._node("get_attr", _join(value.ref.path, value.name), say=value.text)
        if isinstance(value, _Global):
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


_RULES: dict[type[ast.AST], Callable[[Tracer, Any], _Value]] = {
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


def _refs(value: _Value) -> Iterator[_Ref]:
    if isinstance(value, _Ref):
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


def _results(callee: _Method | _Global, args: list[Any]) -> tuple[object, ...] | None:
    chosen = callee.value if isinstance(callee, _Global) else None
    if not isinstance(chosen, _Choice) or chosen.functions is None:
        return None
    given = [c for a in args if isinstance(a, fx.Node) for c in a.meta.get("choices") or ()]
    return (*chosen.functions, *given)


def _may_rebind(node: ast.Call, tracer: Tracer) -> bool:
    """Whether the arguments run code that could change what the callee's name stands for."""
    inner = (n for a in (*node.args, *node.keywords) for n in ast.walk(a))
    return any(isinstance(n, ast.Call) and not _is_local(n.func, tracer) for n in inner)


def _is_local(function: ast.AST, tracer: Tracer) -> bool:
    if _is_trusted(tracer.around.thing(function)):
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
        path = _join(path, name)
    return True


# ---- rule P on syntax ------------------------------------------------------------------------


def _named_in(targets: Iterable[ast.AST]) -> frozenset[str]:
    return frozenset(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))


def _checked(function: types.FunctionType) -> ast.FunctionDef:
    if function.__closure__ and function.__code__.co_freevars != ("__class__",):
        raise Refused("is decorated or a closure")
    tree = _definition(function)
    if not tree.args.args or tree.args.posonlyargs:
        raise Refused("does not take `self` as its first argument by name")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name | ast.keyword | ast.arg):
            name = next(getattr(node, f) for f in ("attr", "id", "arg") if hasattr(node, f))
            if name and (name.startswith("_regwrap") or _is_private(name)):
                raise Refused(f"uses the private name `{name}`")
    return tree


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _locals(tree: ast.FunctionDef, function: types.FunctionType) -> frozenset[str]:
    stored = _names_used(tree.body)[1]
    return frozenset((*function.__code__.co_varnames, *function.__code__.co_cellvars, *stored))


def _names_used(nodes: Iterable[ast.AST]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names read and set in some code, without those of comprehensions' own scopes."""
    loaded: dict[str, None] = {}
    stored: dict[str, None] = {}

    def visit(node: ast.AST, hidden: frozenset[str]) -> None:
        if isinstance(node, _SCOPES):
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


def _check_part(nodes: Iterable[ast.AST], allowed: tuple[type, ...] = _PART) -> None:
    for top in nodes:
        eager = {
            id(n.args[0])
            for n in ast.walk(top)
            if isinstance(n, ast.Call) and len(n.args) == 1 and not n.keywords
            if isinstance(n.func, ast.Name) and n.func.id in _EAGER
        }
        for node in ast.walk(top):
            _check_node(node, eager, allowed)


def _check_node(node: ast.AST, eager: set[int], allowed: tuple[type, ...]) -> None:
    if not isinstance(node, allowed):
        raise Refused(f"has a construct that is not followed: `{_short(node)}`")
    if isinstance(node, ast.Name) and node.id in _FORBIDDEN:
        raise Refused(f"uses `{node.id}`")
    if isinstance(node, ast.GeneratorExp) and id(node) not in eager:
        raise Refused(f"makes a generator: `{_short(node)}`")
    if isinstance(node, ast.ExceptHandler) and node.name:
        raise Refused(f"names an exception: `as {node.name}`")
    if isinstance(node, _SCOPES):
        for inner in ast.walk(node):
            if isinstance(inner, ast.NamedExpr):
                raise Refused(f"assigns inside `{_short(node)}`")
        _check_scope(node)


def _check_scope(node: ast.AST) -> None:
    """A comprehension's variables must not be names of the surrounding code too."""
    generators = cast(ast.ListComp, node).generators
    bound = _named_in(g.target for g in generators)
    first = _named_in([generators[0].iter])
    if bound & first:
        raise Refused(f"uses one name twice in `{_short(node)}`")


def _surely_set(nodes: Iterable[ast.AST], around: _Scope) -> frozenset[str] | None:
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
            ends = [_surely_set(branch, around) for branch in (node.body, node.orelse)]
            through = [e for e in ends if e is not None]
            if not through:
                return None
            found |= frozenset.intersection(*through)
        elif isinstance(node, ast.With) and all(_swallows_nothing(i, around) for i in node.items):
            inside = _surely_set(node.body, around)
            if inside is None:
                return None
            found |= inside
    return frozenset(found)


def _swallows_nothing(item: ast.withitem, around: _Scope) -> bool:
    """Whether a context manager is known to let exceptions through: one of torch's."""
    if not isinstance(item.context_expr, ast.Call):
        return False
    thing = around.thing(item.context_expr.func)
    return _is_from(thing, ("torch",)) or thing is contextlib.nullcontext


def _set_in(targets: Iterable[ast.AST]) -> frozenset[str]:
    names = (n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
    return frozenset(n.id for n in names if isinstance(n.ctx, ast.Store))


def _is_store(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _short(node: ast.AST) -> str:
    text = ast.unparse(node).split("\n")[0]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _why(node: ast.AST) -> str:
    """Why a child called in there is not found by the graph."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript):
        return f"sets `{_short(node.targets[0])}`"
    if isinstance(node, ast.If | ast.IfExp):
        return f"branches on `{_short(node.test)}`"
    if isinstance(node, ast.For):
        return f"loops over `{_short(node.iter)}`"
    if isinstance(node, ast.While):
        return f"loops while `{_short(node.test)}`"
    if isinstance(node, ast.With):
        return f"runs it inside `{_short(node).rstrip(':')}`"
    if isinstance(node, ast.Try):
        return "runs it inside try"
    if isinstance(node, _SCOPES):
        return f"runs it inside the comprehension `{_short(node)}`"
    return f"runs it inside `{_short(node)}`"


# ---- questions to a graph --------------------------------------------------------------------

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
_NAMES = _set(
    "relu leaky_relu gelu silu tanh sigmoid elu selu celu relu6 hardswish hardsigmoid hardtanh "
    "mish softplus softsign logsigmoid tanhshrink softshrink hardshrink prelu"
)
_FUNCTIONS = {
    id(f): n for n in _NAMES for s in (F, torch) if (f := getattr(s, n, None)) is not None
}
_INPLACE_NEXT = ("relu", "relu6", "selu", "silu", "mish", "hardswish", "hardsigmoid")
_METHODS = frozenset(("relu", "tanh", "sigmoid"))
_DROPOUTS = _set(
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
    view = _View(owner)
    return [_described(n, view, method) for n in graph.nodes if n.op == "call_module"]


def _described(node: fx.Node, view: _View, method: str) -> Call:
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
    view = _View(owner)
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


def _dropout_of(user: fx.Node | None, node: fx.Node, view: _View, behind: str) -> Existing | None:
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


def _follower(node: fx.Node, view: _View) -> str:
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


# ---- one owner -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Facts:
    """What the code of one owner does with the modules beneath it; plain data."""

    calls: tuple[Call, ...]
    doubts: tuple[_Doubt, ...]
    supers: tuple[tuple[str, str], ...] = ()
    """Which method calls which overridden one by `super()`, by their keys."""
    written: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """Room for what is made from these facts, for every owner that they hold for."""

    def doubt_of(self, owner: nn.Module, child: str) -> str:
        """The same for a child of an owner that they hold for."""
        local, anchor = _name_of(owner, child)
        return self.doubt(child, local, anchor)

    def doubt(self, leaf: str, local: str, anchor: str) -> str:
        """Why a call of this module may be unseen; `""` if there is no doubt."""
        return next((d.reason for d in self.doubts if d.concerns(leaf, local, anchor)), "")


def facts_about(owner: nn.Module, children: Iterable[str]) -> Facts:
    """What the owner's code does with these modules beneath it, as far as itself can tell."""
    with _LOCK:
        _read_words([type(owner)])
    words = _words(type(owner))
    interest = {_name_of(owner, child)[0] for child in children}
    return facts(owner, frozenset(interest), words.live(_roots(words.members)))


def _name_of(owner: nn.Module, child: str) -> tuple[str, str]:
    """What a module beneath the owner is reached by, and the path of what has that name."""
    names = child.split(".")
    view = _View(owner)
    end = len(names)
    while end > 0 and _is_indexed(view.module(".".join(names[: end - 1]))):
        end -= 1
    return (names[end - 1] if end else ""), ".".join(names[:end])


def method_of(cls: type, key: str) -> types.FunctionType:
    """The class's own plain method of this key, beneath any rewrite."""
    name = key.split("@")[0]
    for klass in cls.__mro__:
        if name in vars(klass) and not _is_ours(klass) and key in (name, _key(name, klass)):
            found = vars(klass)[name]
            if isinstance(found, types.FunctionType):
                return found
            break
    raise Refused(f"{name} is no plain method")


def trace(owner: nn.Module, method: str = "forward") -> fx.Graph:
    """A method of one owner as a graph, every child a leaf.

    Raises:
        Refused: the method is not provably what a graph can say.
    """
    function = method_of(type(owner), method)
    if method in vars(owner):
        raise Refused(f"{method} was replaced on the instance")
    try:
        return Tracer(_View(owner), function).write()
    except Refused as error:
        raise Refused(f"{method} {error}") from None


_Key = tuple[frozenset[str], frozenset[str], tuple[weakref.ref[types.CodeType], ...]]
_Known = tuple[_Key, dict[tuple[str, str], _Token], Facts]
_LOCK = threading.RLock()
_LAYOUTS = 64
_FACTS: weakref.WeakKeyDictionary[type, list[_Known]] = weakref.WeakKeyDictionary()


def facts(owner: nn.Module, interest: frozenset[str], live: frozenset[str]) -> Facts:
    """What the owner's code does with modules of these names; cached by class and layout.

    Args:
        owner: The module whose code is read.
        interest: The names of the layers beneath it that are asked about.
        live: Its methods that the model's own code may reach.
    """
    view, key = _View(owner), (interest, live, _words(type(owner)).stamp)
    with _LOCK:
        known = _FACTS.setdefault(type(owner), [])
        for of, tokens, found in known:
            if of == key and view.fits(tokens):
                return found
        found = _facts(view, interest, live)
        del known[:-_LAYOUTS]
        known.append((key, view.seen, found))
    return found


def _facts(view: _View, interest: frozenset[str], live: frozenset[str]) -> Facts:
    owner = view.owner
    doubts = list(_doubts_of_owner(view))
    view.look("", "forward")
    if _is_stock_sequential(owner):
        return _facts_of_sequential(view)
    reading = _Reading(view, interest, live)
    reading.read()
    return Facts(
        tuple(reading.calls), tuple(doubts + reading.doubts), tuple(dict.fromkeys(reading.supers))
    )


class _Reading:
    """Reads the methods of one owner that matter to the layers asked about."""

    def __init__(self, view: _View, interest: frozenset[str], live: frozenset[str]) -> None:
        self.view, self.interest, self.live = view, interest, live
        self.members = {m.key: m for m in _members(type(view.owner))}
        self.words = _words(type(view.owner)).by_key
        self.calls: list[Call] = []
        self.doubts: list[_Doubt] = []
        self.supers: list[tuple[str, str]] = []
        self.is_indexed = _is_indexed(view.owner)
        hidden = (m for m in self.members.values() if not m.visible and m.name not in _NOT_RUN)
        self.hidden = [m for m in hidden if self._matters(m)]
        self.seen: set[str] = set()

    def _matters(self, member: _Member) -> bool:
        looks_round = member.name in self.live and (
            self.is_indexed or bool(member.said & _INTROSPECTION)
        )
        return bool(self.words[member.key] & self.interest) or looks_round

    def read(self) -> None:
        for member in self.members.values():
            runs = member.name not in _NOT_RUN or member.name in self.live
            by_super = bool(self.hidden) and "super" in member.said
            if member.visible and runs and (self._matters(member) or by_super):
                self.view.look("", member.name)
                self._read(member)

    def _read(self, member: _Member) -> None:
        if member.key in self.seen:
            return
        self.seen.add(member.key)
        is_live = member.name in self.live
        try:
            tracer = self._tracer(member)
            nodes = list(tracer.write().nodes)
        except Refused as error:
            self._give_up(member, is_live, str(error))
            return
        self.doubts += [d for d in tracer.doubts if is_live or d.kind == "called"]
        found = (n for n in nodes if n.op == "call_module")
        self.calls += [_described(n, self.view, member.key) for n in found]
        for _, key in (n.meta["super"] for n in nodes if "super" in n.meta):
            self.supers.append((member.key, key))
            above = self.members.get(key)
            if above is not None and (self._matters(above) or "super" in above.said):
                self._read(above)

    def _tracer(self, member: _Member) -> Tracer:
        if not member.plain or len(member.functions) != 1:
            raise Refused("is decorated")
        if member.visible and member.name in vars(self.view.owner):
            raise Refused("was replaced on the instance")
        return Tracer(self.view, member.functions[0])

    def _give_up(self, member: _Member, is_live: bool, why: str) -> None:
        self.doubts += _doubts_of_function(self.view, member, is_live, why)
        if "super" in member.said:
            for hidden in self.hidden:
                if hidden.key not in self.seen:
                    self.seen.add(hidden.key)
                    self._give_up(hidden, is_live, f"may be reached from where it {why}")


def _doubts_of_owner(view: _View) -> Iterator[_Doubt]:
    owner = view.owner
    cls = type(owner)
    view.look("", "parametrizations")
    if isinstance(owner, torch.jit.ScriptModule):
        yield _Doubt("given", "", _EVERYTHING, "the owner is a ScriptModule")
    elif isinstance(owner, fx.GraphModule):
        yield _Doubt("given", "", _EVERYTHING, "the owner is a GraphModule")
    elif "parametrizations" in owner._modules and cls.__name__.startswith("Parametrized"):
        yield _Doubt("given", "", _EVERYTHING, "the owner is itself parametrized")
    elif any(k.__name__ == "FSDPModule" for k in cls.__mro__):
        yield _Doubt("given", "", _EVERYTHING, "the owner is itself sharded by fully_shard")
    elif inspect.getattr_static(cls, "__getattribute__") is not object.__getattribute__:
        yield _Doubt("given", "", _EVERYTHING, "the owner has a __getattribute__ of its own")
    if "forward" in vars(owner):
        names = _names_of(vars(owner)["forward"])
        yield _Doubt("given", "", names, "forward was replaced on the instance")


def _facts_of_sequential(view: _View) -> Facts:
    graph = fx.Graph()
    value = graph.placeholder("input")
    reason = "the owner is a stock nn.Sequential"
    doubts = []
    for path in view.items(""):
        value = graph.call_module(path, (value,))
        doubts.append(_Doubt("called", path, _NOTHING, reason))
    graph.output(value)
    return Facts(tuple(calls_of(graph, view.owner)), tuple(doubts))


def _doubts_of_function(view: _View, member: _Member, is_live: bool, why: str) -> list[_Doubt]:
    reason = f"{member.name} {why}"
    doubts: list[_Doubt] = []
    for function in member.functions:
        if _is_trusted(function) and not _is_trusted(type(view.owner)):
            continue
        try:
            tree = _definition(function)
        except Refused as error:
            said = _Names(spoken_by(function.__code__), False)
            text = reason if why.startswith(str(error)) else f"{reason}, and {error}"
            doubts.append(_Doubt("given", "", said, text))
            continue
        if spoken_by(function.__code__) & _FORBIDDEN - {"super"} and is_live:
            doubts.append(_Doubt("given", "", _EVERYTHING, reason))
        me = tree.args.args[0].arg if tree.args.args else ""
        reach = _Reach(view, me, {}, _Scope(function, _locals(tree, function)))
        reach.read(tree.body)
        doubts += [_Doubt("called", p, _NOTHING, reason) for p in reach.called]
        doubts += [_Doubt("given", p, n, reason) for p, n in reach.given if is_live]
    return doubts


# ---- the whole model -------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """Whether a module is an `nn.Linear`, a subclass of it, or transformers' `Conv1D`."""
    cls = type(module)
    conv1d = cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"
    return conv1d or isinstance(module, nn.Linear)


@dataclass(frozen=True, slots=True)
class _Above:
    """A module on the way to a layer, with its path and the layer's path from it."""

    path: str
    module: nn.Module
    child: str
    local: str
    """What the layer, or the container that holds it, is called."""
    anchor: str
    """The path from here of what has that name; `""` if that is this module or above it."""
    is_owner: bool


def survey(model: nn.Module, wanted: Callable[[nn.Module], bool] = is_linear) -> dict[str, Verdict]:
    """Who calls each layer that is wanted, and whether its owners may be rewritten.

    The keys are the layers' first names, in the order of `named_modules`.
    """
    above = _ways(model, wanted)
    interest = _interests(above)
    with _LOCK:
        _read_words({type(m) for m in model.modules()})
        live = _live_members(model)
        strays = _strays(model)
        read = _Reader(interest, live)
        return {
            path: _judge(path, layer, ways, read, strays) for path, (layer, ways) in above.items()
        }


def _ways(
    model: nn.Module, wanted: Callable[[nn.Module], bool]
) -> dict[str, tuple[nn.Module, list[_Above]]]:
    """For each layer every module above it, under every name."""
    found: dict[int, tuple[str, nn.Module, dict[tuple[int, str], _Above]]] = {}
    stack: list[tuple[str, nn.Module]] = []

    def visit(name: str, module: nn.Module) -> None:
        if any(module is m for _, m in stack):
            return
        stack.append((name, module))
        if wanted(module) and len(stack) > 1:
            first = ".".join(n for n, _ in stack[1:])
            ways = found.setdefault(id(module), (first, module, {}))[2]
            for way in _way(stack):
                ways.setdefault((id(way.module), way.child), way)
        for child_name, child in module._modules.items():
            if child is not None:
                visit(child_name, child)
        stack.pop()

    visit("", model)
    return {first: (layer, list(ways.values())) for first, layer, ways in found.values()}


def _way(stack: list[tuple[str, nn.Module]]) -> Iterator[_Above]:
    end = len(stack) - 1
    named = end
    while named > 0 and _is_indexed(stack[named - 1][1]):
        named -= 1
    owner = next((i for i in range(end - 1, -1, -1) if _has_body(stack[i][1])), 0)
    for i in range(end):
        yield _Above(
            ".".join(n for n, _ in stack[1 : i + 1]),
            stack[i][1],
            ".".join(n for n, _ in stack[i + 1 :]),
            stack[named][0],
            ".".join(n for n, _ in stack[i + 1 : named + 1]),
            i == owner,
        )


def _interests(above: dict[str, tuple[nn.Module, list[_Above]]]) -> dict[int, frozenset[str]]:
    found: dict[int, set[str]] = {}
    for _, ways in above.values():
        for way in ways:
            found.setdefault(id(way.module), set()).add(way.local)
    return {i: frozenset(names) for i, names in found.items()}


def _live_members(model: nn.Module) -> dict[type, frozenset[str]]:
    """For each class the members that code of the model may reach, by name."""
    classes = {type(m) for m in model.modules()}
    live = {c: _words(c).live(_roots(_words(c).members)) for c in classes}
    while True:
        spoken = frozenset().union(*(_words(c).said(live[c]) for c in classes))
        wider = {
            c: _words(c).live({*live[c], *(spoken & _words(c).members.keys())}) for c in classes
        }
        if wider == live:
            return live
        live = wider


def _judge(
    path: str,
    layer: nn.Module,
    ways: list[_Above],
    read: _Reader,
    strays: _Strays,
) -> Verdict:
    sites: list[Site] = []
    reasons: list[str] = []
    for way in ways:
        found = read.facts(way)
        if found is None:
            continue
        calls = tuple(c for c in found.calls if c.child == way.child)
        if calls:
            sites.append(Site(way.path, way.child, calls))
        reasons.append(found.doubt(way.child, way.local, way.anchor))
    reasons += [_hooks_doubt(way) for way in ways]
    if isinstance(layer, torch.jit.ScriptModule):
        reasons.append("the layer is a ScriptModule")
    reasons.append(strays.doubt(layer, ways, read.live))
    return Verdict(path, tuple(sites), next(filter(None, reasons), ""))


def _hooks_doubt(way: _Above) -> str:
    """A hook of the user's on a module above may call the layer itself."""
    module = way.module
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if not _is_from(hook, ("regwrap",)) and _names_of(hook).may_call(way.local):
            return f"a forward hook of the {type(module).__name__} above it might call it"
    return ""


@dataclass(slots=True)
class _Reader:
    """Reads every module above a layer once."""

    interest: dict[int, frozenset[str]]
    live: dict[type, frozenset[str]]
    said: dict[type, tuple[frozenset[str], bool]] = field(default_factory=dict)
    known: dict[int, Facts] = field(default_factory=dict)
    bodies: dict[int, tuple[bool, bool]] = field(default_factory=dict)

    def facts(self, way: _Above) -> Facts | None:
        """Of an owner whose code can say the layer's name or looks around; None of another."""
        if not self._is_relevant(way):
            return None
        found = self.known.get(id(way.module))
        if found is None:
            found = self.known[id(way.module)] = self._read(way.module)
        return found

    def _is_relevant(self, way: _Above) -> bool:
        module = way.module
        body = self.bodies.get(id(module))
        if body is None:
            body = (_has_body(module), _is_stock_sequential(module))
            self.bodies[id(module)] = body
        if not all(body):
            return body[0] and self._is_said(way)
        return way.is_owner

    def _is_said(self, way: _Above) -> bool:
        module = way.module
        said, is_wide = self._said(type(module))
        special = isinstance(module, torch.jit.ScriptModule | fx.GraphModule)
        named = way.local in said or not way.anchor
        return named or is_wide or special or "forward" in vars(module)

    def _said(self, cls: type) -> tuple[frozenset[str], bool]:
        found = self.said.get(cls)
        if found is None:
            words = _words(cls)
            live = self.live[cls]
            is_wide = bool(words.said(live) & _INTROSPECTION)
            runs = (m for m in words.members if m not in _NOT_RUN or m in live)
            found = self.said[cls] = (words.said(runs), is_wide)
        return found

    def _read(self, module: nn.Module) -> Facts:
        if _is_stock_sequential(module):
            return facts(module, frozenset(), frozenset())
        interest = self.interest[id(module)] & self._said(type(module))[0]
        return facts(module, interest, self.live[type(module)])


# ---- modules that are also kept outside the tree ---------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stray:
    holder: type
    attribute: str
    module: nn.Module
    method: str | None

    @property
    def reason(self) -> str:
        what = f"its method {self.method}" if self.method else "it or what holds it"
        return f"{what} is also kept in `{self.attribute}` of a {self.holder.__name__}"


@dataclass(frozen=True, slots=True)
class _Strays:
    """References to modules, and bound methods, that lie in attributes where no tree shows them."""

    found: Mapping[int, list[_Stray]]
    globals: tuple[tuple[type, frozenset[str]], ...]

    def doubt(self, layer: nn.Module, ways: list[_Above], live: dict[type, frozenset[str]]) -> str:
        for stray in self.found.get(id(layer), ()):
            return stray.reason
        for way in ways:
            for stray in self.found.get(id(way.module), ()):
                if self._may_call(stray, way, live):
                    return stray.reason
        for cls, said in self.globals:
            if any(way.local in said for way in ways):
                return f"{cls.__name__} uses a module in a global variable"
        return ""

    def _may_call(self, stray: _Stray, way: _Above, live: dict[type, frozenset[str]]) -> bool:
        if stray.method is not None:
            words = _words(type(stray.module))
            return way.local in words.members.get(stray.method, frozenset())
        words = _words(stray.holder)
        return way.local in words.said(live.get(stray.holder, frozenset()))


_EMPTIABLE = (dict, collections.OrderedDict, list, tuple, set)
_TABLES = frozenset(("_parameters", "_buffers", "_modules"))
_DEEP = 4


def _strays(model: nn.Module) -> _Strays:
    inside = {id(m): m for m in model.modules()}
    seen: set[int] = set()
    found: dict[int, list[_Stray]] = {}
    for module in inside.values():
        for stray in _kept_by(module, inside, seen):
            found.setdefault(id(stray.module), []).append(stray)
    classes = {type(m) for m in inside.values()}
    spoken = tuple((c, w) for c in classes if (w := _said_with_globals(c, inside)))
    return _Strays(found, spoken)


def _kept_by(module: nn.Module, inside: dict[int, nn.Module], seen: set[int]) -> Iterator[_Stray]:
    for attribute, value in vars(module).items():
        if type(value) in _EMPTIABLE and not value:
            continue
        if attribute not in _TABLES and not isinstance(value, _PLAIN):
            for item in _walk(value, _DEEP, seen):
                if isinstance(item, types.MethodType):
                    if id(item.__self__) in inside:
                        owner = cast(nn.Module, item.__self__)
                        yield _Stray(type(module), attribute, owner, item.__func__.__name__)
                elif not (attribute == "forward" and item is module):
                    for kept in cast(nn.Module, item).modules():
                        if id(kept) in inside:
                            yield _Stray(type(module), attribute, kept, None)


def _said_with_globals(cls: type, inside: Mapping[int, nn.Module]) -> frozenset[str]:
    """What code says that a class runs and that has a module of the model in a global variable."""
    live = _words(cls).live(_roots(_words(cls).members))
    words: frozenset[str] = frozenset()
    own = (f for m in _members(cls) if m.name in live for f in m.functions)
    for function in _with_global_functions(own):
        said = spoken_by(function.__code__)
        held = (v for v in _globals_of(function, said) if isinstance(v, nn.Module))
        if any(id(m) in inside for v in held for m in v.modules()):
            words |= said
    return words


_PLAIN = (bool, int, float, str, bytes, torch.Tensor, torch.dtype, torch.device, type, type(None))


def _walk(value: object, depth: int, seen: set[int]) -> Iterator[object]:
    """Modules and bound methods that a value holds, looked for a few steps deep."""
    if isinstance(value, _PLAIN):
        return
    if isinstance(value, nn.Module | types.MethodType):
        yield value
        return
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    for item in _held(value):
        yield from _walk(item, depth - 1, seen)


def _held(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, types.FunctionType):
        return [_content(c) for c in value.__closure__ or ()]
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType):
        return ()
    try:
        held = list(vars(value).values())
    except TypeError:  # no __dict__
        held = []
    if type(value).__module__ == "functools":
        held += [getattr(value, n, None) for n in ("func", "args", "keywords")]
    return held
