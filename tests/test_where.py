"""Selectors: which modules and parameters a rule means, and how it is shown."""

from __future__ import annotations

import itertools
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import regwrap as rw
from regwrap import L1, L2, Where
from regwrap.where import compile_glob, shown

torch.set_num_threads(1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(2, 2)
        self.v = nn.Linear(2, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(2, 2))
        self.attn = Attention()
        self.fc1 = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 2))
        self.embed = nn.Embedding(3, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.head = nn.Linear(2, 2)


NET = Net()


def reached(where: Any, term: Any = None, model: nn.Module = NET) -> list[str]:
    """The sites that a rule reaches, as dotted names; by default that of an L2."""
    return [
        f"{row['path']}.{row['site']}".lstrip(".")
        for row in rw.plan(model, {where: term or L2(0.1)}).rows()
        if row["term"] is not None
    ]


def block(*numbers: int, names: tuple[str, ...] = ("attn.q", "attn.v", "fc1")) -> list[str]:
    """Weights of these layers of these blocks."""
    return [f"blocks.{i}.{name}.weight" for i in numbers for name in names]


WHOLE_BLOCKS = [
    f"blocks.{i}.{name}"
    for i in range(12)
    for name in ("gain", "attn.q.weight", "attn.v.weight", "fc1.weight")
]
EVERYTHING = ["scale", "embed.weight", *WHOLE_BLOCKS, "head.weight"]
BIASES = [f"blocks.{i}.{n}.bias" for i in range(12) for n in ("attn.q", "attn.v", "fc1", "norm")]


def lambda_on_path(path: str, module: nn.Module) -> bool:
    return path.endswith(".q")


# Sites in module order, reached by L2 with on="weight" unless they are named themselves.
SELECTORS: list[tuple[Any, list[str]]] = [
    # dotted paths
    ("", EVERYTHING),
    ("head", ["head.weight"]),
    ("head.weight", ["head.weight"]),
    ("head.bias", ["head.bias"]),
    ("scale", ["scale"]),
    ("blocks.3.norm.weight", ["blocks.3.norm.weight"]),
    ("blocks.3.attn", block(3, names=("attn.q", "attn.v"))),
    ("blocks.3", ["blocks.3.gain", *block(3)]),
    ("blocks", WHOLE_BLOCKS),
    # globs
    ("*", [s for s in EVERYTHING if s != "scale"]),
    ("**", EVERYTHING),
    ("***", [s for s in EVERYTHING if s != "scale"]),
    ("**.**", EVERYTHING),
    ("blocks.*", WHOLE_BLOCKS),
    ("blocks.**", WHOLE_BLOCKS),
    ("blocks.**.**", WHOLE_BLOCKS),
    ("**.blocks", WHOLE_BLOCKS),
    ("blocks.*.*", block(*range(12))),
    ("blocks.*.g*", [f"blocks.{i}.gain" for i in range(12)]),
    ("blocks.1*.fc1", block(1, 10, 11, names=("fc1",))),
    ("blocks.?.fc1", None),
    ("blocks.[12].fc1", None),
    ("blocks.*.fc*", block(*range(12), names=("fc1",))),
    ("blocks.*.*1", block(*range(12), names=("fc1",))),
    ("blocks.*.f*c*", block(*range(12), names=("fc1",))),
    ("*.3.fc1", block(3, names=("fc1",))),
    ("*.fc1", None),
    ("fc1", None),
    ("**.fc1", block(*range(12), names=("fc1",))),
    ("**.attn.q", block(*range(12), names=("attn.q",))),
    ("**.head", ["head.weight"]),
    ("blocks.**.q", block(*range(12), names=("attn.q",))),
    ("blocks.**.attn.**.q", block(*range(12), names=("attn.q",))),
    ("**.bias", [*BIASES, "head.bias"]),
    ("*.bias", ["head.bias"]),
    ("head.*", None),
    ("head.**", ["head.weight"]),
    ("head.b*", ["head.bias"]),
    ("**.3.**.bias", [s for s in BIASES if ".3." in s]),
    # braces
    ("blocks.{0..11}.fc1", block(*range(12), names=("fc1",))),
    ("blocks.{2..4}.fc1", block(2, 3, 4, names=("fc1",))),
    ("blocks.{4..2}.fc1", block(2, 3, 4, names=("fc1",))),
    ("blocks.{0..1,4,10..11}.fc1", block(0, 1, 4, 10, 11, names=("fc1",))),
    ("blocks.1{0,1}.fc1", block(10, 11, names=("fc1",))),
    ("blocks.{0,9..20}.attn.{q,v}", block(0, 9, 10, 11, names=("attn.q", "attn.v"))),
    ("blocks.0.{attn.q,fc1}", block(0, names=("attn.q", "fc1"))),
    ("blocks.0.{a*,fc}", block(0, names=("attn.q", "attn.v"))),
    ("blocks.0.{fc,fc2}{,1}", block(0, names=("fc1",))),
    ("**.{q,v}.{bias,nothing}", [s for s in BIASES if "attn" in s]),
    ("blocks.{3}.fc1", None),
    ("blocks.{}.fc1", None),
    # regexes
    (re.compile(r"blocks\.\d\.fc1"), block(*range(10), names=("fc1",))),
    (re.compile(r"fc1"), None),
    (re.compile(r".*fc1"), block(*range(12), names=("fc1",))),
    (re.compile(r".*\.bias"), [*BIASES, "head.bias"]),
    (re.compile(r"head(\..*)?"), ["head.weight"]),
    (re.compile(r"blocks\.\d\.\w+"), block(*range(10))),
    (re.compile(r"HEAD", re.IGNORECASE), ["head.weight"]),
    (re.compile(r""), EVERYTHING),
    # classes
    (nn.Linear, [*block(*range(12)), "head.weight"]),
    (nn.Embedding, ["embed.weight"]),
    (Block, WHOLE_BLOCKS),
    (Net, EVERYTHING),
    (nn.Module, EVERYTHING),
    (nn.LayerNorm, None),
    (nn.Conv2d, None),
    # callables
    (lambda_on_path, block(*range(12), names=("attn.q",))),
    (lambda path, module: path == "", EVERYTHING),
    (lambda path, module: isinstance(module, Attention) and "3" in path, block(3)[:2]),
    (lambda path, module: False, None),
    # several conditions
    (Where("**.fc1"), block(*range(12), names=("fc1",))),
    (Where(""), EVERYTHING),
    (Where("**", type=nn.Linear), [*block(*range(12)), "head.weight"]),
    (Where("*", type=nn.Linear), ["head.weight"]),
    (Where("blocks.{0,1}", type=nn.Linear), None),
    (Where(type=nn.Linear, regex=re.compile(r".*\.v")), block(*range(12), names=("attn.v",))),
    (Where(regex=r".*\.v"), block(*range(12), names=("attn.v",))),
    (Where("**.bias", type=nn.LayerNorm), [s for s in BIASES if "norm" in s]),
    (Where("**.bias", predicate=lambda path, module: path == "head"), ["head.bias"]),
    (Where("**.bias", regex=r".*\.norm\..*"), None),
    (Where("**.bias", regex=r".*\.norm\.bias"), [s for s in BIASES if "norm" in s]),
    (
        Where("**.3.*", type=nn.Linear, predicate=lambda path, module: True, regex="b.*"),
        block(3, names=("fc1",)),
    ),
]


@pytest.mark.parametrize(
    ("where", "expected"), SELECTORS, ids=[f"{i}: {shown(w)}" for i, (w, _) in enumerate(SELECTORS)]
)
def test_what_a_selector_reaches(where: Any, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(rw.UnmatchedRule):
            reached(where)
    else:
        assert reached(where) == expected


def test_what_is_named_itself_is_reached_whatever_on_says() -> None:
    assert reached("head.bias", L2(0.1, on="weight")) == ["head.bias"]
    assert reached("head.weight", L1(0.1, on="bias")) == ["head.weight"]
    assert reached("head.bias", L2(0.1, on="output")) == ["head.bias"]
    assert reached("head", L2(0.1, on="bias")) == ["head.bias"]
    assert reached("head", L2(0.1, on="all")) == ["head.weight", "head.bias"]
    assert reached("**.norm.weight") == [f"blocks.{i}.norm.weight" for i in range(12)]


def test_a_path_of_the_table_is_a_where() -> None:
    """Names that the table prints for collapsed layers mean exactly these layers."""
    assert reached("blocks.{0..11}.attn.{q,v}") == block(*range(12), names=("attn.q", "attn.v"))


def test_nothing_but_stars_and_braces_is_special() -> None:
    names = ["a[/b]c", "x+y", "(group)", "^$", "sp ace", "ünï", "a|b", "back\\slash", "{one}", "?"]
    model = nn.ModuleDict({name: nn.ModuleDict({"in": nn.Linear(1, 1)}) for name in names})
    for name in names:
        assert reached(name, model=model) == [f"{name}.in.weight"]
        assert reached(f"{name}.in.bias", model=model) == [f"{name}.in.bias"]
        assert reached(f"{{{name},nothing}}.in" if "{" not in name else name, model=model) == [
            f"{name}.in.weight"
        ]
        assert reached(f"**.{name}.*", model=model) == [f"{name}.in.weight"]


# ---- globs against a matcher that can be read --------------------------------------------------


def expand(pattern: str) -> list[str]:
    """The pattern without braces, in all its alternatives."""
    found = re.search(r"\{(\d+\.\.\d+|[^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    choices: list[str] = []
    for item in found.group(1).split(","):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", item)
        low, high = sorted(map(int, span.groups())) if span else (0, -1)
        choices += [str(n) for n in range(low, high + 1)] if span else [item]
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [whole for c in choices for whole in expand(before + c + after)]


def component_matches(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(component_matches(pattern[1:], name[i:]) for i in range(len(name) + 1))
    return name[:1] == pattern[0] and component_matches(pattern[1:], name[1:])


def path_matches(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(path_matches(pattern[1:], path[i:]) for i in range(len(path) + 1))
    return (
        bool(path)
        and component_matches(pattern[0], path[0])
        and path_matches(pattern[1:], path[1:])
    )


def slowly(pattern: str, path: str) -> bool:
    """What DESIGN says a glob matches, by trying everything."""
    names = path.split(".") if path else []
    return any(
        path_matches(alternative.split(".") if alternative else [], names)
        for alternative in expand(pattern)
    )


NAMES = st.sampled_from(["a", "b", "ab", "fc1", "0", "1", "10", "q"])
PATHS = st.lists(NAMES, max_size=5).map(".".join)
COMPONENTS = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        "*",
        "**",
        "a*",
        "*b",
        "*a*",
        "fc*1",
        "{0..10}",
        "1{0,1}",
        "{a,q}",
        "{a*,0..1}",
    ]
)
PATTERNS = st.lists(COMPONENTS, max_size=5).map(".".join)


@given(PATTERNS, PATHS)
@example("**.**", "a.b")
@example("a.**.**", "a")
@example("**.**.a", "a")
@example("a.**.b", "a.b")
@example("**", "")
@example("*", "")
def test_globs_against_a_slow_matcher(pattern: str, path: str) -> None:
    assert bool(compile_glob(pattern).fullmatch(path)) == slowly(pattern, path)


def test_globs_against_a_slow_matcher_over_all_short_ones() -> None:
    components = ["a", "*", "**", "a*", "{a,b}"]
    patterns = [".".join(p) for n in range(4) for p in itertools.product(components, repeat=n)]
    paths = [".".join(p) for n in range(4) for p in itertools.product(["a", "ab"], repeat=n)]
    wrong = [
        (pattern, path)
        for pattern in patterns
        for path in paths
        if bool(compile_glob(pattern).fullmatch(path)) != slowly(pattern, path)
    ]
    assert not wrong


# ---- how a where is recorded ---------------------------------------------------------------------


class Custom(nn.Linear):
    pass


def test_a_policy_keeps_what_another_process_can_find() -> None:
    class Local(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Custom(2, 2), "b": Local(2, 2)})
    here = lambda path, module: path == "a"  # noqa: E731
    line = here.__code__.co_firstlineno
    pattern = re.compile("a")
    wheres = ["a", pattern, Custom, nn.Linear, lambda_on_a, Where("a", type=Custom), here, Local]
    policy = rw.plan(model, [(where, L2(0.1)) for where in wheres])
    kept = [where for where, _ in policy.rules]
    assert kept[:6] == wheres[:6]
    name = "test_a_policy_keeps_what_another_process_can_find.<locals>."
    assert kept[6:] == [f"{name}<lambda> (line {line})", f"{name}Local"]
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert [count["where"] for count in policy.counts()][:6] == [
        "a",
        "re.compile('a')",
        "Custom",
        "nn.Linear",
        "lambda_on_a",
        "Where(path='a', type=Custom)",
    ]


def lambda_on_a(path: str, module: nn.Module) -> bool:
    return path == "a"


def test_a_where_of_a_lambda_is_recorded_as_text() -> None:
    where = Where("a", predicate=lambda path, module: True)
    policy = rw.plan(nn.ModuleDict({"a": nn.Linear(2, 2)}), {where: L2(0.1)})
    ((kept, _),) = policy.rules
    assert isinstance(kept, str)
    assert kept.startswith("Where(path='a', predicate=")
    assert "<lambda> (line " in kept


def test_where_is_a_value() -> None:
    where = Where("a.*", type=nn.Linear)
    assert where == Where(path="a.*", type=nn.Linear)
    assert hash(where) == hash(Where("a.*", type=nn.Linear))
    assert where != Where("a.*")
    assert pickle.loads(pickle.dumps(where)) == where
    with pytest.raises(AttributeError):
        where.path = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (Where, TypeError, "Where needs a condition; write Where('') for the whole model."),
        (lambda: Where(3), TypeError, "Where: path must be a string, not 3."),
        (
            lambda: Where(type=int),
            TypeError,
            "Where: type must be a class of nn.Module, not <class 'int'>.",
        ),
        (
            lambda: Where(type="torch.nn.Linear"),
            TypeError,
            "Where: type must be a class of nn.Module, not 'torch.nn.Linear'.",
        ),
        (lambda: Where(regex=3), TypeError, "Where: regex must be a pattern of text, not 3."),
        (
            lambda: Where(regex=re.compile(b"a")),
            TypeError,
            "Where: regex must be a pattern of text, not re.compile(b'a').",
        ),
        (
            lambda: Where(regex="a("),
            ValueError,
            "Where: regex 'a(' is no regular expression: missing ), unterminated subpattern at "
            "position 1.",
        ),
        (
            lambda: Where(predicate="a"),
            TypeError,
            "Where: predicate must be a callable, not 'a'.",
        ),
    ],
)
def test_bad_conditions(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == text


@pytest.mark.parametrize("where", [3, None, int, nn.Linear(1, 1), ("a", "b"), b"a"], ids=repr)
def test_what_is_no_where(where: Any) -> None:
    with pytest.raises(TypeError) as error:
        rw.plan(NET, [(where, L2(0.1))])
    assert str(error.value) == (
        "A rule's where must be a path, a compiled regex, a class of nn.Module, a callable "
        f"(path, module) -> bool or a Where, not {where!r} of type {type(where).__name__}."
    )
