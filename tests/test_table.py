"""The table: `summary(model)`, `rich.print(policy)`, `policy._repr_html_()`."""

import io
import itertools
import re
from typing import Any

import pytest
import rich
import torch
from rich.console import Console
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, Dropout, GroupLasso, WeightDecay


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, dropout=0.25)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.1)


class Model(nn.Module):
    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 100, bias=False)
        self.head.weight = self.embed.weight


RULES = {
    nn.Linear: L2(1e-4),
    "blocks.*.fc1": Dropout(0.1),
    "blocks.{0..3}.attn": L1(1e-5) + GroupLasso(1e-3, size=2),
    "head": L2(1e-5),
    "**.norm": L2(1e-4, on="all"),
    "blocks.11.fc2": None,
    "blocks": WeightDecay(0.05),
}


@pytest.fixture
def model() -> nn.Module:
    return rw.regularize(Model(), RULES)


def file_console(**how: Any) -> Console:
    """A console that is no terminal."""
    return Console(file=io.StringIO(), **how)


def terminal(width: int, **how: Any) -> Console:
    how = {"force_terminal": True, "color_system": None, "legacy_windows": False} | how
    return Console(file=io.StringIO(), width=width, **how)


def printed(model: nn.Module, console: Console | None = None, **how: Any) -> str:
    console = console or file_console()
    rw.summary(model, console=console, **how)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(text: str, start: str) -> str:
    """The first line that starts with this: of the table, else of what stands below it."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return re.sub(" {2,}", " | ", line.strip())


# ---- what it says ----------------------------------------------------------------------------


def test_a_row_says_what_acts_on_a_layer_by_which_rule_and_mechanism(model: nn.Module) -> None:
    text = printed(model)
    heads = text.splitlines()[0].split()
    assert heads == ["layer", "type", "shape", "terms", "mechanism", "rule"]
    assert row(text, "blocks.{0..11}.fc1") == (
        "blocks.{0..11}.fc1 x12 | Linear | 32x8 | L2(0.0001) + WeightDecay(0.05), Dropout(0.1)"
        " | direct, optimizer, hook | 0, 1, 7"
    )
    assert row(text, "blocks.{0..3}.attn x4") == (
        "blocks.{0..3}.attn x4 | MultiheadAttention | 24x8 | in_proj_weight: L1(1e-05) + "
        "GroupLasso(0.001, size=2) + WeightDecay(0.05) | direct, optimizer | 2, 3, 7"
    )
    assert row(text, "blocks.{0..11}.norm") == (
        "blocks.{0..11}.norm x12 | LayerNorm | 8 | "
        "L2(0.0001, on='all'), bias: L2(0.0001, on='all') | direct | 5"
    )
    assert row(text, "head ") == "head | Linear"
    assert "blocks.{4..11}.attn x8" in text and "blocks.{0..10}.fc2 x11" in text
    assert row(text, "head:") == "head: | weight is shared with embed.weight"


def test_the_footer_counts_layers_parameters_and_rules(model: nn.Module) -> None:
    text = printed(model)
    total = sum(p.numel() for p in model.parameters())
    covered = total - sum(p.numel() for n, p in model.named_parameters() if "bias" in n)
    covered += sum(p.numel() for n, p in model.named_parameters() if n.endswith("norm.bias"))
    assert f"61 of 62 layers and {covered:,} of {total:,} parameters" in text
    assert f"({covered / total:.0%}) covered" in text
    assert "L2(s) = s/2 * sum(w^2)" in text
    assert row(text, "rule 0") == (
        "rule 0 | nn.Linear | L2(0.0001) | 35 layers, 35 entries, 2 overridden"
    )
    assert row(text, "rule 4") == "rule 4 | head | L2(1e-05) | 1 layer, 1 entry"
    assert row(text, "rule 6") == "rule 6 | blocks.11.fc2 | None (clears) | 0 layers, 0 entries"
    rules = [line for line in text.splitlines() if line.startswith("rule ")]
    assert len(rules) == len(rw.policy(model).rules) == 8


def test_values_are_those_of_torch(model: nn.Module) -> None:
    text = printed(model, values=True, collapse=False)
    fc1 = model.get_submodule("blocks.3.fc1").weight.detach()
    norm2, penalty = map(float, row(text, "blocks.3.fc1").split(" | ")[-2:])
    assert norm2 == pytest.approx(fc1.norm().item(), rel=1e-3)
    assert penalty == pytest.approx(1e-4 / 2 * fc1.square().sum().item(), rel=1e-3)
    told = re.search(r"reg_loss = (\S+)", text)
    assert told and float(told[1]) == pytest.approx(model.reg_loss.item(), rel=1e-5)
    penalties = [line.split()[-1] for line in text.splitlines() if line.startswith("blocks.")]
    assert "reg_loss" not in printed(model)
    collapsed = row(printed(model, values=True), "blocks.{0..11}.fc1").split(" | ")[-2:]
    norms = [model.get_submodule(f"blocks.{i}.fc1").weight.norm().item() for i in range(12)]
    assert collapsed[0] == f"{min(norms):.4g} .. {max(norms):.4g}"
    assert float(collapsed[1]) == pytest.approx(sum(n**2 for n in norms) * 1e-4 / 2, rel=1e-3)
    assert len(penalties) > 40


def test_values_under_half_precision_and_of_a_parametrized_weight() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(300, 300))
    model = rw.regularize(nn.Sequential(layer, nn.Linear(300, 300).half()), L2(1.0))
    nn.init.constant_(model[1].weight, 100.0)  # whose squares overflow
    text = printed(model, values=True, collapse=False)
    assert row(text, "1 ").split(" | ")[-2:] == ["3e+04", "4.5e+08"]
    norm2, _ = map(float, row(text, "0 ").split(" | ")[-2:])
    assert norm2 == pytest.approx(layer.weight.norm().item(), rel=1e-3)
    assert "effective value" in text


def test_values_of_outputs_and_of_what_an_optimizer_carries() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    rw.regularize(model, {"0": L2(1.0), "1": L1(0.5, on="output"), "2": rw.MaxNorm(1.0)})
    rw.attach(model, torch.optim.SGD(model.parameters(), 0.1))
    activity = 0.5 * model[:2](torch.ones(4, 2)).sum() / 4
    model(torch.ones(4, 2))
    text = printed(model, values=True)
    square = model[0].weight.square().sum().item()
    shown = [square**0.5, square / 2, model[2].weight.norm().item(), 0.0]
    told = [float(cell) for path in ("0 ", "2 ") for cell in row(text, path).split(" | ")[-2:]]
    assert told == pytest.approx(shown, rel=1e-3)
    assert float(row(text, "1 ").split(" | ")[-1]) == pytest.approx(activity.item(), rel=1e-3)
    assert "3 of 3 layers" in text


def test_weight_decay_of_an_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(rw.param_groups(model, weight_decay=0.02))
    optimizer.param_groups[0]["params"].remove(model.embed.weight)
    text = printed(model, optimizer=optimizer)
    assert "weight decay" in text.splitlines()[0]
    assert row(text, "blocks.{0..11}.fc1").endswith("weight 0.05, bias 0")
    assert row(text, "blocks.{0..11}.norm").endswith(" | 0")
    assert row(text, "embed ").endswith("not in the optimizer")
    plain = torch.optim.SGD(Model().parameters(), lr=0.1)
    assert "weight decay" not in printed(rw.unregularize(model))
    assert "not in the optimizer" in printed(model, optimizer=plain)


def test_a_model_without_a_policy_shows_what_regularizes_it_already() -> None:
    model = Model(3)
    nn.utils.parametrizations.spectral_norm(model.head)
    model.lstm = nn.LSTM(3, 3, num_layers=2, dropout=0.5)
    text = printed(model, optimizer=torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.3))
    assert "no policy" in text
    assert (
        row(text, "blocks.{0..2}.drop")
        == "blocks.{0..2}.drop x3 | Dropout | Dropout(0.1) | its own"
    )
    assert "dropout=0.25" in row(text, "blocks.{0..2}.attn x3")
    assert "dropout=0.5" in row(text, "lstm")
    assert "parametrized: _SpectralNorm" in row(text, "head")
    assert row(text, "blocks.{0..2}.norm").endswith("0.3")
    assert "Dropout" not in printed(nn.Linear(2, 2))
    assert "(model)" in printed(nn.Linear(2, 2))


def test_the_model_itself_as_a_row() -> None:
    text = printed(rw.regularize(nn.Linear(3, 2), L1(0.1)))
    assert row(text, "(model)") == "(model) | Linear | 2x3 | L1(0.1) | direct | 0"
    assert row(text, "rule 0") == "rule 0 | (model) | L1(0.1) | 1 layer, 1 entry"


# ---- how it says it --------------------------------------------------------------------------


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("width", [200, 100, 80, 60, 40])
def test_a_terminal_s_width_is_kept(model: nn.Module, width: int, values: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for how in ({}, {"optimizer": optimizer}, {"collapse": False}):
        text = printed(model, terminal(width), values=values, **how)
        assert max(map(len, text.splitlines())) <= width
        assert "35 layers, 35 entries" in " ".join(text.split())


def test_at_80_columns_names_and_terms_are_whole_and_rules_stand_by_their_terms(
    model: nn.Module,
) -> None:
    text = printed(model, terminal(80))
    assert row(text, "blocks.{0..11}.fc1 x12").endswith("32x8 | L2(0.0001) | direct | 0")
    assert re.search(r"GroupLasso\(0\.001, size=2\) +direct +3 *\n", text)
    assert re.search(r"Dropout\(0\.1\) +hook +1 *\n", text)
    assert "(80 columns: type left out)" in text
    small = printed(rw.regularize(nn.Sequential(nn.Linear(2, 2)), L2(0.1)), terminal(60))
    assert row(small, "0 ") == "0 | Linear | 2x2 | L2(0.1) | direct | 0"
    assert "left out" not in small


@pytest.mark.parametrize(
    "how", [{}, {"record": True}, {"width": 40}, {"force_terminal": False}], ids=str
)
def test_a_non_terminal_is_neither_wrapped_nor_cut(model: nn.Module, how: Any) -> None:
    model.get_submodule("blocks.11").add_module("n" * 300, nn.Linear(2, 2))
    rw.regularize(model, {"blocks.11." + "n" * 300: L2(0.5)})
    console = file_console(**how)
    width = console.width
    text = printed(model, console)
    assert row(text, "blocks.11.nnn").startswith("blocks.11." + "n" * 300 + " | Linear | 2x2")
    for line in text.splitlines():
        assert "…" not in line
    assert text.count("\n") == printed(model, terminal(1000)).count("\n")
    assert console.width == width
    if "record" in how:
        assert "n" * 300 in console.export_text()


def test_without_a_console_it_prints_to_standard_output(
    model: nn.Module, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rw.summary(model) is None
    assert capsys.readouterr().out == printed(model)


def test_rich_prints_a_policy(model: nn.Module) -> None:
    console = terminal(200)
    console.print(rw.policy(model))
    assert console.file.getvalue() == printed(model, terminal(200))  # type: ignore[attr-defined]
    file = io.StringIO()
    rich.print(rw.plan(Model(), RULES), file=file)
    assert "blocks.{0..11}.fc1 x12" in file.getvalue()
    assert max(map(len, file.getvalue().splitlines())) <= 80


def test_notebooks_show_it_whole_and_escaped() -> None:
    model = nn.Module()
    model.add_module("<b>&", nn.Linear(2, 2))
    model.add_module("x" * 300, nn.Linear(2, 2))
    html = rw.policy(rw.regularize(model, L2(0.1)))._repr_html_()
    assert "&lt;b&gt;&amp;" in html and "<b>" not in html
    assert "x" * 300 in html and html.lstrip().startswith("<")


NAMES = [
    "a[/b]c",
    "[red]",
    "[bold",
    "back\\slash[/]",
    ":smile:",
    "new\nline",
    "esc\x1b[31m",
    "ñ→🙂",
]


def test_any_name_is_printed_as_it_is() -> None:
    model = nn.Module()
    for name in NAMES:
        model.add_module(name, nn.Linear(2, 2))
    text = printed(rw.regularize(model, L2(0.1)), terminal(200, color_system="truecolor"))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    for name in NAMES[:5] + NAMES[7:]:
        assert name in plain
    assert r"new\nline" in plain and r"esc\x1b[31m" in plain
    assert rw.policy(rw.regularize(model, {"a[/b]c": L1(0.1)})).rules[-1][0] == "a[/b]c"


def test_an_ascii_console_gets_ascii_only(model: nn.Module) -> None:
    model.add_module("ñ→🙂", nn.Linear(2, 2))
    rw.regularize(model, {"ñ→🙂": L2(0.1)})
    for width in (60, 80, 200):
        file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        console = Console(file=file, width=width, force_terminal=True, color_system=None)
        rw.summary(model, console=console, values=True)
        file.seek(0)
        assert r"\xf1\u2192" in file.read().replace("\n", "")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    rw.summary(model, console=Console(file=file))  # no terminal
    file.seek(0)
    assert r"\xf1\u2192\U0001f642 " in file.read()


# ---- collapsing ------------------------------------------------------------------------------


def table_paths(text: str) -> list[str]:
    """The first column of the table."""
    body = itertools.takewhile(str.strip, text.splitlines()[2:])
    return [line.split("  ")[0].rstrip() for line in body]


def test_a_thousand_layers_print_in_under_60_lines() -> None:
    with torch.device("meta"):
        model = Model(250)
    rw.regularize(model, RULES)
    for width in (60, 80, 200):
        assert len(printed(model, terminal(width)).splitlines()) < 60
    assert len(printed(model, collapse=False).splitlines()) > 1000
    assert len(printed(rw.unregularize(model)).splitlines()) < 60


def test_tied_stacks_collapse_with_their_notes() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(*(nn.Linear(2, 2) for _ in "ab")) for _ in range(50)
            )
            for block in self.blocks:
                block[1].weight = block[0].weight

    text = printed(rw.regularize(Tied(), L2(0.1)))
    assert len(text.splitlines()) < 20
    assert row(text, "blocks.{0..49}.0 x50:").endswith("| shared with blocks.{0..49}.1.weight")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a.0", "a.1", "a.2"], ["a.{0..2} x3"]),
        (["a.0", "a.2", "a.3", "a.9"], ["a.{0,2..3,9} x4"]),
        (["a.0.b1", "a.0.b2", "a.1.b1", "a.1.b2"], ["a.{0..1}.b{1..2} x4"]),
        (["a.0.b1", "a.0.b2", "a.1.b1"], ["a.0.b{1..2} x2", "a.1.b1"]),
        (["a01", "a02"], ["a01", "a02"]),
        (["a0", "b0"], ["a0", "b0"]),
        (["0", "1", "2"], ["{0..2} x3"]),
    ],
)
def test_what_collapses_is_a_where_again(names: list[str], shown: list[str]) -> None:
    model = nn.Module()
    for name in names:
        owner = model
        *above, last = name.split(".")
        for part in above:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(last, nn.Linear(2, 2))
    rw.regularize(model, L2(0.1))
    paths = table_paths(printed(model))
    assert paths == shown
    for path in paths:
        where, _, count = path.partition(" x")
        reached = rw.plan(model, {where: L1(0.1)}).counts()[-1]["layers"]
        assert reached == int(count or 1)


def test_layers_that_differ_do_not_collapse(model: nn.Module) -> None:
    rw.regularize(model, {"blocks.5.fc1": L2(0.5)})
    model.get_submodule("blocks.7.fc1").weight.requires_grad_(False)
    paths = table_paths(printed(model))
    assert {"blocks.5.fc1", "blocks.7.fc1", "blocks.{0..4,6,8..11}.fc1 x10"} <= set(paths)
    assert len(table_paths(printed(model, collapse=False))) > 48


@pytest.mark.parametrize("rule", [L2(0.1), Dropout(0.1, at="input"), None])
def test_layers_of_other_shapes_do_not_collapse(rule: Any) -> None:
    sizes = [(2, 3), (3, 2), (2, 3)]
    model = nn.Sequential(*(nn.Linear(n, m, bias=False) for n, m in sizes))
    paths = table_paths(printed(rw.regularize(model, {"": rule})))
    assert paths == ["{0,2} x2", "1"]


# ---- reading nothing -------------------------------------------------------------------------


class Unreadable(Tensor):
    """A tensor that may be described but not computed with."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "dim", "numel", "size", "is_floating_point", "is_complex", "stride"):
            return super().__torch_function__(func, types, args, kwargs)
        raise AssertionError(f"{name} reads the tensor")


def test_without_values_no_tensor_is_read() -> None:
    model = rw.regularize(Model(2), {"blocks.1": L1(0.1)} | {"": L2(0.1) + Dropout(0.5)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = parameter.detach().as_subclass(Unreadable)  # type: ignore
    text = printed(model, optimizer=optimizer)
    assert "blocks.{0..1}.fc1" in text or "blocks.0.fc1" in text
    rw.policy(model)._repr_html_()
    with pytest.raises(AssertionError, match="reads the tensor"):
        printed(model, values=True)


def test_the_table_of_a_meta_model() -> None:
    with torch.device("meta"):
        model = Model(2)
    assert "blocks.{0..1}.fc1 x2" in printed(rw.regularize(model, {"blocks": L2(0.1)}))
