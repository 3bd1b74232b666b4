"""From a function to its syntax tree, proved to be the code that runs."""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import types
from collections.abc import Iterator

from regwrap.graph.verdicts import Refused


def definition_of(function: types.FunctionType) -> ast.FunctionDef:
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
    return proved(_Source(code, lines))


class _Source:
    """A code object and the file it is from; equal for the same object alone."""

    def __init__(self, code: types.CodeType, lines: list[str]) -> None:
        self.code, self.lines = code, lines

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Source) and other.code is self.code

    def __hash__(self) -> int:
        return id(self.code)


@functools.lru_cache(maxsize=256)
def proved(source: _Source) -> ast.FunctionDef:
    """The definition in the source that compiles to the very code."""
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
    used = {n for c in codes_within(code) for n in (*c.co_names, *c.co_varnames, *c.co_cellvars)}
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
    if not any(_same(c, code) for c in codes_within(module)):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            return node
    return None


def codes_within(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those of everything defined in it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from codes_within(const)


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


def word_set(words: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(words.split())
