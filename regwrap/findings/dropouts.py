"""Checks of dropouts, of a policy and of the model's own."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from regwrap import sites
from regwrap.findings.look import Finding, Look, listed
from regwrap.findings.neighbours import author_class, ending, is_leaf, neighbours
from regwrap.graph import joined
from regwrap.terms import Dropout

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_HEADS = {"head", "classifier", "fc", "lm_head", "score", "output", "out", "fc_out", "predict"}
_CONFIGS = ("config", "cfg", "hparams", "args", "opt")


def before_batch_norm(look: Look) -> Iterator[Finding]:
    """Dropout directly before BatchNorm."""
    modules = dict(look.root.named_modules())
    dropping = _dropping(look)
    pairs = [
        (a, b)
        for a, b in neighbours(look.root)
        if isinstance(modules[b], _BATCH_NORMS) and (a in dropping or _rate(modules[a]))
    ]
    if pairs:
        yield Finding(
            "dropout-before-batchnorm",
            "warning",
            pairs[0][0],
            f"{listed(a for a, _ in pairs)}: dropout directly before BatchNorm {pairs[0][1]!r}, "
            "whose variance in training is then not that in eval.",
            "Put the dropout behind the last BatchNorm (Li et al., Understanding the disharmony "
            "between dropout and batch normalization by variance shift, 2019).",
        )


def on_output(look: Look) -> Iterator[Finding]:
    """Dropout on what the model returns."""
    dropping = _dropping(look)
    path = next((p for p in _results(look) if p in dropping or _drops(look, p)), None)
    if path is not None:
        yield Finding(
            "dropout-on-output",
            "warning",
            path,
            f"{path or 'the model'}: dropout on what {look.name} returns sets whole logits or "
            "predictions to zero in training.",
            f"Drop the layer's input instead: {{{path!r}: Dropout(p, at='input')}}, or leave it "
            f"out with {{{path!r}: None}}.",
        )


def _results(look: Look) -> Iterator[str]:
    """What gives the model's result: read from the source, else known by its name."""
    if is_leaf(look.root):
        yield ""
        return
    found = list(ending(look.root))
    if not found:
        linears = (n for n, m in look.root._modules.items() if isinstance(m, nn.Linear))
        found = [name for name in linears if name in _HEADS]
    yield from found


def _drops(look: Look, path: str) -> bool:
    return bool(_rate(look.root.get_submodule(path)))


def _dropping(look: Look) -> set[str]:
    """Layers whose output a rule drops."""
    return {
        e.path
        for e in look.policy
        if isinstance(e.term, Dropout) and e.term.at != "input" and e.mechanism
    }


def _rate(module: nn.Module) -> float:
    """The rate of a dropout layer; 0 for anything else."""
    named = "drop" in type(module).__name__.lower() and not module._modules
    rate = getattr(module, "p", getattr(module, "drop_prob", 0)) if named else 0
    return rate if isinstance(rate, float | int) else 0


def never_called(look: Look) -> Iterator[Finding]:
    """A dropout that the model has and no code calls: a head that never drops."""
    names = Counter(id(node.module) for node in sites.nodes(look.root))
    unused = [
        joined(node.path, name)
        for node in look.nodes
        for name, child in node.module._modules.items()
        if child is not None
        and _rate(child)
        and names[id(child)] == 1  # under another name it may be called
        and _rate(child) not in _kept(node.module)  # which its attention takes
        and not _is_said(node.module, name)
    ]
    if unused:
        yield Finding(
            "dropout-never-called",
            "warning",
            unused[0],
            f"{listed(unused)}: a dropout that {look.name} holds and none of its code calls.",
            "Call it in forward, or set one by a rule: regularize(model, {...: Dropout(p)}).",
        )


def _is_said(owner: nn.Module, name: str) -> bool:
    cls = author_class(owner)
    if cls.__module__.split(".")[0] == "torch" or name.startswith("regwrap_"):
        return True  # containers call their children by other means
    if "forward" in vars(owner):
        return True  # put there by somebody else, who may call it
    return (words := _words(cls)) is None or name in words


_WIDE = {"children", "modules", "named_children", "named_modules", "_modules", "getattr"}


@functools.lru_cache(maxsize=512)
def _words(cls: type) -> frozenset[str] | None:
    """Attributes that the methods of a class read; None where it may read any, or has no source."""
    words: set[str] = set()
    defined: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins"):
            continue
        methods = _methods(base)
        if methods is None or _elsewhere(base) - {method.name for method in methods}:
            return None
        for method in methods:
            if method.name not in defined or "super" in words:  # else overridden, and never run
                words |= _read_in(method)
        defined |= {method.name for method in methods}
    return None if words & _WIDE else frozenset(words)


def _elsewhere(cls: type) -> set[str]:
    """Functions of the class, wherever they are written: `forward = shared_forward`."""
    return {n for n, v in vars(cls).items() if inspect.isfunction(v) and not n.startswith("__")}


def _methods(cls: type) -> list[ast.FunctionDef] | None:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    inner = tree.body if isinstance(tree, ast.ClassDef) else []
    return [node for node in inner if isinstance(node, ast.FunctionDef) and node.name != "__init__"]


def _read_in(tree: ast.AST) -> set[str]:
    loads = (n for n in ast.walk(tree) if isinstance(getattr(n, "ctx", None), ast.Load))
    names = {n.attr if isinstance(n, ast.Attribute) else getattr(n, "id", "") for n in loads}
    strings = {
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
    }
    return names | strings


def config_unread(look: Look) -> Iterator[Finding]:
    """Dropout rates in the model's configuration that nothing of it reads."""
    rates = {rate for node in look.nodes for rate in _rates(node.module)}
    classes = {author_class(node.module) for node in look.nodes}
    for holder in _CONFIGS:
        told = _settings(vars(look.root).get(holder))
        unread = [
            (name, rate)
            for name, rate in told
            if rate not in rates and not any(_mentions(cls, name) for cls in classes)
        ]
        for name, rate in unread:
            yield Finding(
                "config-unread",
                "warning",
                "",
                f"{holder}.{name} = {rate:g}, but no code of {look.name} reads it and no dropout "
                "of it has that rate.",
                f"Set it by a rule: regularize(model, Dropout({rate:g})), or take it from the "
                "configuration.",
            )


def _settings(config: Any) -> list[tuple[str, float]]:
    """The dropout rates above 0 of a configuration, without those that its class has by default.

    A default may be for another head, as DistilBERT's `qa_dropout` is in a classifier.
    """
    if isinstance(config, Mapping):
        items: Iterable[tuple[Any, Any]] = config.items()
    else:
        usual = _defaults(type(config))
        held = vars(config) if hasattr(config, "__dict__") else {}
        items = ((name, value) for name, value in held.items() if usual.get(name) != value)
    return [
        (name, float(value))
        for name, value in items
        if isinstance(name, str)
        and "drop" in name
        and isinstance(value, float | int)
        and 0 < value < 1
    ]


def _defaults(cls: type) -> dict[str, Any]:
    try:
        told = inspect.signature(cls).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in told}


def _rates(module: nn.Module) -> Iterator[float]:
    yield _rate(module)
    yield from _kept(module)


def _kept(module: nn.Module) -> list[float]:
    """Rates that the module keeps as plain numbers."""
    return [v for n, v in vars(module).items() if "drop" in n and isinstance(v, float)]


@functools.lru_cache(maxsize=4096)
def _mentions(cls: type, name: str) -> bool:
    """Whether the source of a class reads the setting: `config.name`, `"name"`, `**config`."""
    holders = "|".join(_CONFIGS)
    whole = rf"\*\*(?:vars\()?(?:\w+\.)*(?:{holders})\b"  # **self.config, not **kwargs
    said = rf"\b\w*(?:{holders})\b(?:\.\w+)*\.{name}\b|[\"']{name}[\"']|{whole}"
    written = (c for c in cls.__mro__ if c.__module__.split(".")[0] not in ("torch", "builtins"))
    return any(re.search(said, source) for source in map(_source, written))


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return "**config"  # unknown: it may read everything
