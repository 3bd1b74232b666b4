"""What a rule reaches, and what it says when that is nothing."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn

from regwrap import sites
from regwrap.errors import PolicyError
from regwrap.graph import joined
from regwrap.planning.claims import Claim, Claims
from regwrap.planning.survey import (
    OUTPUT,
    Key,
    Owner,
    Survey,
    can_be_penalised,
    class_name,
)
from regwrap.record import Rule
from regwrap.sites import Node
from regwrap.terms import (
    DropConnect,
    Dropout,
    GroupLasso,
    MaxNorm,
    Orthogonal,
    Term,
    WeightDecay,
    WeightTerm,
)
from regwrap.where import Where, parse_where, shown


@dataclass(frozen=True)
class Reach:
    """What a where selects: modules named by it, all modules reached, parameters named by it."""

    where: Where
    named: list[Node]
    modules: list[Node]
    parameters: list[tuple[Node, str]]


def reach(survey: Survey, where: Where) -> Reach:
    """What the where selects, and everything beneath it."""
    named, modules, parameters = [], [], []
    covered: list[bool] = []
    for node in survey.tree:
        hit = where.selects_module(node.path, node.module)
        inside = hit or (node.parent is not None and covered[node.parent])
        covered.append(inside)
        named += [node] if hit else []
        modules += [node] if inside else []
        parameters += [
            (node, name)
            for name in survey.keys[id(node.module)]
            if where.selects_parameter(joined(node.path, name), node.path, node.module)
        ]
    return Reach(where, named, modules, parameters)


def claim_parameters(survey: Survey, claims: Claims, rule: Rule, reach: Reach) -> int:
    """Gives a term for parameters those that it reaches; returns how many."""
    assert isinstance(rule.term, WeightTerm | WeightDecay | MaxNorm | DropConnect)
    on = rule.term.on
    if on == OUTPUT and (reach.named or not reach.parameters):
        return _claim_outputs(survey, claims, rule, reach)
    reached = [
        (node.module, name)
        for node in reach.modules
        for name in survey.keys[id(node.module)]
        if survey.covers(on, node.module, name)
    ]
    for node, name in reach.parameters:
        if not can_be_penalised(node.module, name):
            raise PolicyError(_no_gradient(rule, joined(node.path, name), node.module, name))
        reached.append((node.module, name))
    if getattr(rule.term, "when", "always") == "called":
        _check_called(survey, rule, [module for module, _ in reached])
    owners: dict[Key, dict[tuple[int, str], Owner]] = {}  # of a tied parameter several
    for module, name in reached:
        held = owners.setdefault(survey.keys[id(module)][name], {})
        held[id(module), name] = (module, name)
    for key, held in owners.items():
        module, name = next(iter(held.values()))
        mechanism = _mechanism(survey, rule.term, module)
        claims.take(key, Claim(name, rule.term, rule, mechanism, tuple(held.values())))
    return len(reached)


def _mechanism(survey: Survey, term: Term, module: nn.Module) -> str | None:
    if isinstance(term, WeightDecay | MaxNorm):
        return "optimizer"
    if isinstance(term, DropConnect):
        return "parametrization" if term.p > 0 else None
    if getattr(term, "solver", None) == "hadamard":
        return "parametrization"
    if getattr(term, "when", "always") == "always":
        return "direct"
    return "hook" if survey.is_called(module) else None


def _claim_outputs(survey: Survey, claims: Claims, rule: Rule, reach: Reach) -> int:
    """Gives an activity penalty the outputs of the modules named, not of those beneath them."""
    assert rule.term is not None
    named = [node.module for node in reach.named]
    _check_called(survey, rule, named)
    for module in named:
        mechanism = "hook" if survey.is_called(module) else None
        claim = Claim(OUTPUT, rule.term, rule, mechanism, ((module, OUTPUT),))
        claims.take((OUTPUT, id(module)), claim)
    return len(named)


def _check_called(survey: Survey, rule: Rule, modules: list[nn.Module]) -> None:
    """Refuses a term that waits for calls where none can come."""
    if modules and not any(map(survey.is_called, modules)):
        raise PolicyError(
            f"Rule ({shown(rule.where)!r}: {rule.term!r}) reaches only modules that are never "
            f"called in {class_name(survey.model)}: they have no forward of their own, or a "
            "function uses their weights; name a module that runs."
        )


def _no_gradient(rule: Rule, path: str, module: nn.Module, name: str) -> str:
    dtype = sites.stored(module, name)[0].dtype
    return (
        f"Rule ({shown(rule.where)!r}: {rule.term!r}) names {path!r}, whose dtype {dtype} has no "
        "gradient; name floating point parameters only."
    )


def unmatched(survey: Survey, index: int, where: object, term: Term | None, reach: Reach) -> str:
    """Why the rule reaches nothing, and what its author may have meant."""
    told = f"Rule {index} ({shown(where)!r}: {term!r})"
    model = class_name(survey.model)
    if isinstance(term, Dropout) and reach.parameters and not reach.modules:
        node, name = reach.parameters[0]
        return (
            f"{told} reaches no Linear layer in {model}: {joined(node.path, name)!r} is a "
            f"parameter; name its layer {node.path!r}."
        )
    if not reach.modules:
        return f"{told} matches nothing in {model}; {_nearest(survey, where)}."
    names = ", ".join(f"{n.path!r} ({class_name(n.module)})" for n in reach.named[:3])
    if isinstance(term, Dropout):
        return (
            f"{told} reaches no Linear layer in {model}: none lies in {names}; name a Linear, or "
            "what holds one."
        )
    on = getattr(term, "on", "weight")
    quantized = [n for n in reach.modules if _is_quantized(n.module)]
    if quantized:
        return (
            f"{told} reaches nothing in {model}: {quantized[0].path!r} "
            f"({class_name(quantized[0].module)}) is quantized, its weight has no gradient; "
            "regularize before quantizing."
        )
    dtypes = _dtypes_without_gradient(survey, reach, on)
    if dtypes:
        return (
            f"{told} reaches nothing in {model}: the parameters of {names} are {dtypes}, which "
            "have no gradient; name floating point parameters."
        )
    if not any(survey.keys[id(n.module)] for n in reach.modules):
        return f"{told} reaches nothing in {model}: {names} has no parameters; name a layer."
    more = "" if isinstance(term, GroupLasso | Orthogonal) else "on='all', or "
    return (
        f"{told} reaches nothing in {model}: {names} has no parameter that on={on!r} covers; write "
        f"{more}the parameter's own name."
    )


def _is_quantized(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith("torch.ao.nn.") and "quantized" in home


def _dtypes_without_gradient(survey: Survey, reach: Reach, on: str | tuple[str, ...]) -> str:
    """The dtypes that keep the rule from acting, where it is they that do."""
    own = [(n.module, name) for n in reach.modules for name in survey.keys[id(n.module)]]
    stiff = [(module, name) for module, name in own if not can_be_penalised(module, name)]
    if len(stiff) < len(own):
        asked = (on,) if isinstance(on, str) else on
        stiff = [(module, name) for module, name in stiff if name in asked]
    return ", ".join(sorted({str(sites.stored(*site)[0].dtype) for site in stiff}))


def _nearest(survey: Survey, where: object) -> str:
    """The three nearest names, and how to reach a name at any depth."""
    meant = parse_where(where)
    text = meant.path if meant.path is not None else shown(where)
    deeper: list[str] = []
    if meant.type is not None and meant.path is None:
        classes = sorted({class_name(n.module) for n in survey.firsts()})
        near = _closest(meant.type.__name__, classes)
    else:
        paths = [n.path for n in survey.tree if n.path]
        deeper = [f"**.{text}"] if any(p.endswith(f".{text}") for p in paths) else []
        text = text if meant.regex is None else meant.regex.pattern
        near = _closest(text, paths + [p for site in survey.sites.values() for p in site.paths])
    told = ", ".join(repr(n) for n in (deeper + near)[:3])
    return f"the nearest names are {told}" if told else "it has no modules to name"


def _closest(name: str, names: list[str]) -> list[str]:
    """The three nearest: by the whole name, then by the last component."""
    whole = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    last = name.rpartition(".")[2]
    by_last = [n for n in names if n.rpartition(".")[2] == last]
    return list(dict.fromkeys(by_last + whole))[:3]
