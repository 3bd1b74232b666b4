"""Where a Dropout goes: into the owner's code, behind a hook, or into a rate that is there already.

What graph and rewrite do with hostile code is in `test_graph.py`; here the public API is asked.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import differences, digest, failure_of, fingerprint, loss_of, new_process
from torch import Tensor, nn
from zoo import Case

import regwrap as rw
from regwrap import L2, Dropout, PolicyError, plan, policy, regularize, unregularize

torch.set_num_threads(1)

Row = dict[str, Any]


# ---- the models ------------------------------------------------------------------------------


class Base(nn.Module):
    """Two Linears, an activation and a Dropout; what is called is the subclass's business."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 16)
        self.b = nn.Linear(16, 4)
        self.act: nn.Module = nn.GELU()
        self.drop = nn.Dropout(0.5)


class Plain(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class Branching(Base):
    """The same for any input without a mask; the call is where no graph can show it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:  # noqa: SIM108
            h = torch.tanh(self.a(x))
        else:
            h = torch.tanh(self.a(x * mask))
        return self.b(h)


class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class TorchFunctional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Method(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


class Leaky(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.leaky_relu(self.a(x), 0.2))


class Approximate(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x), approximate="tanh"))


class Module(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


class ReusedModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.act(self.a(x))))


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(8, 16)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Directly(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.a(x)))


class Behind(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.act(self.a(x))))


class Twice(Base):
    """Its Dropout serves two places."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(self.act(self.a(self.drop(x)))))


class FunctionalDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(F.relu(self.a(x)), 0.5, self.training))


class BranchingDrop(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            x = self.drop(self.a(x))
        return self.b(x)


class DropPath(nn.Module):
    """Stochastic depth, as timm writes it."""

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        shape = (x.shape[0],) + (1,) * (x.dim() - 1)
        return x * x.new_empty(shape).bernoulli_(keep) / keep


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)
        self.path = DropPath(0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.path(self.fc(x)))


class SelfNormalizing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.AlphaDropout(0.2)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(F.selu(self.a(x))))


class Attention(nn.Module):
    """Hugging Face's way: a rate that the forward reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj = nn.Linear(8, 8)
        self.attention_dropout = 0.4

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x).softmax(-1)
        return F.dropout(scores, p=self.attention_dropout, training=self.training) @ x.mT @ x


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3)
        self.emb = nn.Embedding(5, 6)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x)).mean((2, 3))
        return self.fc(h + self.emb(torch.zeros(x.shape[0], dtype=torch.long)))


class Wide(nn.Module):
    """Two owners of one layer, an owner that reaches through, a list without a body."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = User(), User()
        self.right.fc = self.left.fc
        self.heads = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[1](torch.tanh(self.heads[0](self.left(x) + self.right(x))))


class User(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))


class Tied(nn.Module):
    """One weight in two layers, one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight
        self.alias = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.b(torch.tanh(self.alias(x)))))


class Clashing(nn.Module):
    """Children whose names start as ours do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.regwrap_dropout_a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.regwrap_dropout_a(torch.tanh(self.a(x)))))


class Outer(nn.Module):
    """The owner of `fc` is this one, which the layer itself does not know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = Plain()
        self.fc = nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[0](torch.tanh(self.fc(self.inner(x))))


def sequential(p: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(p), nn.Linear(16, 4))


# ---- what is compared ------------------------------------------------------------------------


def data(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, 8)), generator=torch.Generator().manual_seed(3))


def trained(model: nn.Module, x: Tensor | None = None) -> Any:
    """Outputs and gradients of one step of training from a seed, and the random state after."""
    x = data() if x is None else x
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    output = model(x)
    after = torch.get_rng_state()
    loss_of(output).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return digest([output, grads, after])


def put(model: nn.Module, rules: Any, *, told: bool = False) -> nn.Module:
    """Regularizes; what the plan says is what the policy says."""
    with warnings.catch_warnings():
        if told:
            warnings.filterwarnings("ignore", ".*whose output is the model's", rw.RegwrapWarning)
        planned = plan(model, rules)
        regularize(model, rules)
    assert policy(model) == planned
    return model


def rows(model: nn.Module) -> list[Row]:
    return [r for r in policy(model).rows() if r["site"] == "call"]


def row(model: nn.Module) -> Row:
    (only,) = rows(model)
    return only


def how(model: nn.Module) -> dict[str, str | None]:
    """Path -> mechanism, of every Dropout."""
    return {r["path"]: r["mechanism"] for r in rows(model)}


def undone(model: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Undo brings back the model as it was built."""
    model.zero_grad()
    unregularize(model)
    assert not differences(
        fingerprint(build(), identity=False), fingerprint(model.train(), identity=False)
    )


# ---- fx and hook -----------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["output", "input"])
@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout, DropPath])
def test_a_rewrite_and_a_hook_drop_the_same(kind: type[nn.Module], at: str) -> None:
    term = Dropout(0.4, kind=kind, at=at)  # type: ignore[arg-type]
    rewritten, hooked = put(Plain(), {"a": term}), put(Branching(), {"a": term})
    assert how(rewritten) == {"a": "fx"}
    assert how(hooked) == {"a": "hook"}
    assert trained(rewritten) == trained(hooked) != trained(Plain())
    assert digest(rewritten.eval()(data())) == digest(Plain().eval()(data()))
    undone(rewritten, Plain)
    undone(hooked, Branching)


def test_a_rewrite_is_what_one_writes_by_hand() -> None:
    class ByHand(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.drop(self.a(x))))

    assert trained(put(Plain(), {"a": Dropout(0.5)})) == trained(ByHand())


class LambdaForward(Base):
    forward = lambda self, x: self.b(torch.tanh(self.a(x)))  # noqa: E731


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def sequential_of_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("build", "rules", "why"),
    [
        (Branching, "a", "forward branches on `mask is None`"),
        (LambdaForward, "a", "lambda"),
        (Decorated, "a", ""),
        (sequential_of_linears, "0", "the owner is a stock nn.Sequential"),
        (lambda: nn.Linear(8, 4), "", "the layer is the model itself"),
        (lambda: nn.ModuleDict({"a": nn.Linear(8, 4)}), "a", "no code of the model calls it"),
    ],
)
def test_the_note_says_why_not_fx_in_one_sentence(
    build: Callable[[], nn.Module], rules: str, why: str
) -> None:
    found = row(put(build(), {rules: Dropout(0.5)}))
    assert found["mechanism"] == "hook"
    assert found["note"].startswith("not by fx: ")
    assert why in found["note"]
    assert "\n" not in found["note"]
    assert ". " not in found["note"]


def test_a_rewrite_has_no_note_and_its_dropout_is_the_last_child_of_the_owner() -> None:
    model = put(Outer(), {"heads.0": Dropout(0.5), "inner": Dropout(0.5)})
    assert all(r["note"] == "" for r in rows(model))
    assert all(r["shape"] is None and r["parameters"] == 0 for r in rows(model))
    assert [n for n, _ in model.named_children()][:3] == ["inner", "fc", "heads"]
    assert len(list(model.children())) == 4
    assert len(model.heads) == 1  # type: ignore[arg-type]


def test_a_model_whose_parts_are_called_from_outside() -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.dec = nn.Linear(8, 8), nn.Linear(8, 8)

        def encode(self, x: Tensor) -> Tensor:
            return self.enc(x)

    model = put(Parts(), Dropout(0.5)).train()
    assert how(model) == {"enc": "hook", "dec": "hook"}
    for part in (model.encode, model.dec):
        assert (part(data()) == 0).any()


# ---- at="activation" -------------------------------------------------------------------------

Build = Callable[[], nn.Module]


class ByHandFunctional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(F.relu(self.a(x))))


class ByHandApproximate(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.drop(F.gelu(self.a(x), approximate="tanh")))


class ByHandReused(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.b(self.drop(self.act(self.a(x)))))


@pytest.mark.parametrize(
    ("build", "by_hand"),
    [
        (Functional, ByHandFunctional),
        (TorchFunctional, ByHandFunctional),
        (Method, ByHandFunctional),
        (Approximate, ByHandApproximate),
        (Module, Behind),
        (ReusedModule, ByHandReused),
    ],
)
def test_behind_the_activation_is_what_one_writes_by_hand(build: Build, by_hand: Build) -> None:
    model = put(build(), {"a": Dropout(0.5, at="activation")})
    assert row(model) == {**row(model), "path": "a", "mechanism": "fx", "note": ""}
    assert trained(model) == trained(by_hand())
    assert digest(model.eval()(data())) == digest(build().eval()(data()))
    undone(model, build)


@pytest.mark.parametrize("build", [Functional, TorchFunctional, Method, Leaky])
def test_for_relu_before_and_after_are_equal(build: Build) -> None:
    before = put(build(), {"a": Dropout(0.5)})
    after = put(build(), {"a": Dropout(0.5, at="activation")})
    assert trained(before) == trained(after)


def test_of_a_gelu_before_and_after_differ() -> None:
    before = put(Module(), {"a": Dropout(0.5)})
    after = put(Module(), {"a": Dropout(0.5, at="activation")})
    assert trained(before) != trained(after)


def test_in_a_sequential_the_hook_is_on_the_activation() -> None:
    build = sequential_of_linears
    model = put(build(), {"0": Dropout(0.5, at="activation")})
    found = row(model)
    assert (found["path"], found["layer"], found["mechanism"]) == ("1", "Tanh", "hook")
    assert found["note"].startswith("for 0: behind its activation")
    model.train()
    torch.manual_seed(7)
    h = model[1](model[0](data()))  # type: ignore[index]
    assert (h == 0).any()
    unregularize(model)
    assert not (model[1](model[0](data())) == 0).any()  # type: ignore[index]


@pytest.mark.parametrize("name", ["up", "*", ""])
def test_a_gate_is_no_activation(name: str) -> None:
    model = SwiGLU()
    before = fingerprint(model)
    for act in (plan, regularize):
        with pytest.raises(PolicyError, match=r"'(up|down)': no elementwise activation") as error:
            act(model, {name: Dropout(0.1, at="activation")})
        assert "write at='output'." in str(error.value)
    assert not differences(before, fingerprint(model))
    assert "product, which is no activation" in str(error.value) or name == ""
    assert row(put(model, {"gate": Dropout(0.1, at="activation")}))["mechanism"] == "fx"


@pytest.mark.parametrize(
    ("build", "where", "why"),
    [
        (Branching, "a", "the code that calls it cannot be read"),
        (Plain, "b", "what the method returns"),
        (Directly, "a", "self.drop (Dropout)"),
        (lambda: nn.Linear(2, 2), "", "the code that calls it cannot be read"),
    ],
)
def test_no_activation_is_an_error_that_offers_the_output(
    build: Build, where: str, why: str
) -> None:
    with pytest.raises(PolicyError) as error:
        regularize(build(), {where: Dropout(0.1, at="activation")})
    text = str(error.value)
    assert why in text
    assert text.endswith("; write at='output'.")


# ---- at="input" ------------------------------------------------------------------------------


def test_before_the_layer_is_what_one_writes_by_hand() -> None:
    class ByHand(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(torch.tanh(self.a(x))))

    model = put(Plain(), {"b": Dropout(0.5, at="input")})
    assert how(model) == {"b": "fx"}
    assert trained(model) == trained(ByHand())
    undone(model, Plain)


class ByKeyword(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(input=torch.tanh(self.a(x)))


class BySeveral(Base):
    def forward(self, x: Tensor) -> Tensor:
        both = (self.a(x),)
        return self.b(*both)


@pytest.mark.parametrize(("build", "mechanism"), [(ByKeyword, "fx"), (BySeveral, "hook")])
def test_before_a_layer_however_its_input_is_handed_over(build: Build, mechanism: str) -> None:
    model, twin = put(build(), {"b": Dropout(0.5, at="input")}), build()
    assert how(model) == {"b": mechanism}
    forward = twin.b.forward
    twin.b.forward = lambda input: forward(F.dropout(input, 0.5))  # type: ignore[method-assign]
    assert trained(model) == trained(twin)


def test_a_dropout_before_a_layer_is_not_stacked_on_what_follows_it() -> None:
    for build in (Behind, sequential):
        model = put(build(), {nn.Linear: Dropout(0.1, at="input")})
        assert all("stacked" not in r["note"] for r in rows(model))
        assert all(r["layer"] == "Linear" for r in rows(model))


# ---- what is there already -------------------------------------------------------------------


@pytest.mark.parametrize("at", ["output", "activation"])
@pytest.mark.parametrize("build", [Behind, sequential])
def test_the_rate_of_a_dropout_behind_an_activation_is_changed(build: Build, at: Any) -> None:
    name, drop = ("0", "2") if build is sequential else ("a", "drop")
    model = put(build(), {name: Dropout(0.1, at=at)})
    found = row(model)
    assert (found["path"], found["mechanism"]) == (drop, "direct")
    assert found["note"] == f"for {name}: replaces a Dropout's rate"
    assert model.get_submodule(drop).p == 0.1
    assert len([m for m in model.modules() if isinstance(m, nn.Dropout)]) == 1
    plain = build()
    plain.get_submodule(drop).p = 0.1  # type: ignore[assignment]
    assert trained(model) == trained(plain)
    undone(model, build)


def test_the_rate_of_a_dropout_directly_behind_is_changed() -> None:
    model = put(Directly(), {"a": Dropout(0.1)})
    assert how(model) == {"drop": "direct"}
    assert model.drop.p == 0.1
    undone(model, Directly)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_a_changed_rate_is_restored_on_copies_too(copied: Callable[[nn.Module], Any]) -> None:
    model = put(Behind(), {"a": Dropout(0.1)})
    other = copied(model)
    assert policy(other) == policy(model)
    unregularize(other)
    assert other.drop.p == 0.5
    assert model.drop.p == 0.1
    assert how(model) == {"drop": "direct"}


def test_a_rate_changed_twice_is_restored_to_the_first() -> None:
    model = put(put(Behind(), {"a": Dropout(0.1)}), {"a": Dropout(0.2)})
    assert model.drop.p == 0.2
    (lost,) = policy(model).overridden()
    assert lost["term"] == "Dropout(0.1)"
    undone(model, Behind)


def test_a_dropout_in_place_that_was_off_is_not_turned_on_behind_an_activation() -> None:
    def build() -> nn.Module:
        act, off = nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)
        return nn.Sequential(nn.Linear(4, 4), act, off, nn.Linear(4, 2))

    model = build()
    rw.regularize(model, {"0": Dropout(0.5)})
    assert row(model)["mechanism"] == "hook"
    assert "stacked on a Dropout" in row(model)["note"]
    model(torch.ones(3, 4)).sum().backward()  # what the ReLU saved is still there


class Router(nn.Linear):
    """Gives a tuple, as mixtures of experts have it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y.softmax(-1), y


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.router(x)[0]


def test_a_router_of_transformers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Router.forward, "__module__", "transformers.models.mine")
    model = rw.regularize(Routed(), {"router": Dropout(0.5)})
    assert row(model)["mechanism"] == "hook"
    with pytest.raises(rw.PolicyError, match="Router returned tuple, no tensor"):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("build", [Twice, FunctionalDrop])
def test_a_dropout_that_cannot_be_taken_is_stacked_on_and_the_note_says_so(build: Build) -> None:
    model = put(build(), {"a": Dropout(0.1)})
    assert (row(model)["path"], row(model)["mechanism"]) == ("a", "fx")
    assert row(model)["note"] == "stacked on a Dropout that follows"
    assert model.drop.p == 0.5
    undone(model, build)


def test_where_the_code_cannot_be_read_the_note_says_so_and_the_rate_stays() -> None:
    model = put(BranchingDrop(), {"a": Dropout(0.1)})
    assert row(model)["note"].startswith("not by fx: forward branches on `mask is None`")
    assert model.drop.p == 0.5


@pytest.mark.parametrize("where", [nn.Dropout, "drop"])
def test_a_rule_may_name_the_models_own_dropout(where: Any) -> None:
    for build in (Behind, Twice, BranchingDrop):
        model = put(build(), {where: Dropout(0.3)})
        assert how(model) == {"drop": "direct"}
        assert row(model)["note"] == ""
        assert model.drop.p == 0.3
        assert model.a._forward_hooks == {}
        undone(model, build)


def test_a_rule_that_does_not_name_it_leaves_the_models_own_dropout() -> None:
    for where in ("", "*", "**"):
        model = put(Twice(), {where: Dropout(0.3)}, told=True)
        assert model.drop.p == 0.5


@pytest.mark.parametrize("where", [DropPath, "path"])
def test_the_rate_of_a_drop_path_is_set(where: Any) -> None:
    model = put(Residual(), {where: Dropout(0.3)})
    assert how(model) == {"path": "direct"}
    assert model.path.drop_prob == 0.3
    undone(model, Residual)


def test_a_drop_path_is_no_dropout_of_the_layer_before_it() -> None:
    model = put(Residual(), {DropPath: Dropout(0.3), "fc": Dropout(0.1)})
    assert how(model) == {"fc": "fx", "path": "direct"}
    assert model.path.drop_prob == 0.3
    undone(model, Residual)


@pytest.mark.parametrize(
    ("build", "where", "kind", "path"),
    [(Residual, "fc", DropPath, "path"), (SelfNormalizing, "a", nn.AlphaDropout, "drop")],
)
def test_a_dropout_of_the_same_kind_is_changed(
    build: Build, where: str, kind: type[nn.Module], path: str
) -> None:
    model = put(build(), {where: Dropout(0.1, kind=kind)})
    assert how(model) == {path: "direct"}
    undone(model, build)


class Own(nn.Module):
    """A dropout whose rate is under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.my_rate = 0.3

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.my_rate, self.training)


class OwnDropout(Own):
    pass


def test_a_dropout_whose_rate_is_unknown_is_stacked_on() -> None:
    build = Behind()
    build.drop = OwnDropout()  # type: ignore[assignment]
    model = put(build, {"a": Dropout(0.1)})
    assert how(model) == {"a": "fx"}
    assert row(model)["note"] == "stacked on a Dropout that follows"


# ---- rates that are attributes ---------------------------------------------------------------


def encoder() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.4), nn.Linear(8, 4))


def test_the_rate_of_an_attention() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.MultiheadAttention(8, 2, dropout=0.4))

    model = put(build(), {nn.MultiheadAttention: Dropout(0.3)})
    assert how(model) == {"0": "direct", "0.out_proj": None}
    assert model[0].dropout == 0.3  # type: ignore[index]
    undone(model, build)


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("where", ["class", "path"])
def test_the_rate_of_a_recurrent_layer(cls: Any, where: str) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(cls(8, 8, 2, dropout=0.5))

    model = put(build(), {cls if where == "class" else "0": Dropout(0.3)})
    assert how(model) == {"0": "direct"}
    assert model[0].dropout == 0.3  # type: ignore[index]
    undone(model, build)


def test_a_recurrent_layer_of_one_layer_says_that_it_drops_nothing() -> None:
    model = put(nn.Sequential(nn.GRU(8, 8)), {nn.GRU: Dropout(0.3)})
    assert row(model)["note"].startswith("without effect: a GRU drops between its layers")


def test_the_rates_of_a_transformer_layer() -> None:
    model = put(encoder(), {nn.TransformerEncoderLayer: Dropout(0.3)})
    layer = model[0]  # type: ignore[index]
    assert {m.p for m in layer.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert layer.self_attn.dropout == 0.3
    assert set(how(model).values()) == {"direct", None}
    unregularize(model)
    assert {m.p for m in layer.modules() if isinstance(m, nn.Dropout)} == {0.4}
    assert layer.self_attn.dropout == 0.4


def test_the_rate_that_an_attention_of_hugging_face_reads() -> None:
    def build() -> nn.Module:
        return nn.Sequential(Attention(), nn.Linear(8, 4))

    model = put(build(), {Attention: Dropout(0.2)})
    assert how(model) == {"0": "direct", "0.q_proj": "fx"}
    assert model[0].attention_dropout == 0.2  # type: ignore[index]
    undone(model, build)
    other = put(build(), {"0.q_proj": Dropout(0.2)})
    assert other[0].attention_dropout == 0.4  # type: ignore[index]


# ---- layers that are never called, and the model's output ------------------------------------


def test_a_linear_that_is_never_called_is_reported() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    with pytest.raises(PolicyError, match="never called"):
        plan(model, {"0": Dropout(0.1), "0.out_proj": Dropout(0.1)})
    put(model, Dropout(0.1), told=True)
    found = {r["path"]: r for r in rows(model)}
    assert found["0.out_proj"]["mechanism"] is None
    assert found["0.out_proj"]["note"].startswith("never called")
    assert found["1"]["mechanism"] == "hook"


class Unused(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.a.weight, self.a.bias)) + self.b.bias.sum()


def test_a_linear_of_which_only_the_weight_is_read() -> None:
    with pytest.raises(PolicyError, match="never called"):
        regularize(Unused(), {"a": Dropout(0.1)})


def test_the_models_output_is_warned_of_unless_it_is_named() -> None:
    with pytest.warns(rw.RegwrapWarning, match="'b', whose output is the model's") as caught:
        regularize(Plain(), Dropout(0.1))
    assert len(caught) == 1
    assert "at='input'" in str(caught[0].message)
    assert caught[0].filename == __file__
    for rules in (
        {"b": Dropout(0.1)},
        {"": Dropout(0.1, at="input")},
        {"a": Dropout(0.1)},
        {"": Dropout(0)},
    ):
        put(Plain(), rules)  # warnings are errors


@pytest.mark.parametrize("last", [None, Dropout(0.1, at="input"), Dropout(0), Dropout(0.2)])
def test_the_output_is_not_warned_of_when_a_later_rule_has_taken_it(last: Any) -> None:
    put(Plain(), {"": Dropout(0.1), "b": last})  # warnings are errors


def test_the_output_is_warned_of_once_and_not_by_later_calls() -> None:
    model = put(Plain(), Dropout(0.1), told=True)
    put(model, L2(1e-3))
    put(model, {"a": Dropout(0.2)})


def test_the_output_of_a_nested_model_is_found() -> None:
    for model, name in (
        (nn.Sequential(Plain(), nn.Identity()), None),
        (nn.Sequential(nn.Linear(8, 8), Plain()), "'1.b'"),
        (Outer(), "'heads.0'"),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan(model, Dropout(0.1))
        told = [str(w.message) for w in caught]
        assert [t for t in told if name and name in t] == told
        assert len(told) == (name is not None)


# ---- kinds and targets -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d, nn.AlphaDropout, DropPath])
def test_kinds_behind_a_convolution(kind: type[nn.Module]) -> None:
    class ByHand(Pixels):
        def __init__(self) -> None:
            super().__init__()
            self.drop = kind(0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.drop(self.conv(x))).mean((2, 3))
            return self.fc(h + self.emb(torch.zeros(x.shape[0], dtype=torch.long)))

    pixels = data(4, 3, 5, 5)
    model = put(Pixels(), {nn.Conv2d: Dropout(0.5, kind=kind)})
    assert how(model) == {"conv": "fx"}
    assert trained(model, pixels) == trained(ByHand(), pixels)
    undone(model, Pixels)


def test_whole_channels_behind_a_convolution_in_a_sequential() -> None:
    model = nn.Sequential(nn.Conv1d(3, 6, 3), nn.Flatten())
    put(model, {"0": Dropout(0.5, kind=nn.Dropout1d)}).train()
    assert row(model)["mechanism"] == "hook"
    dropped = (model[0](data(4, 3, 9)) == 0).float().mean(-1)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}


def test_convolutions_and_embeddings_get_one_only_when_named() -> None:
    for rules in ({"": Dropout(0.1)}, {"*": Dropout(0.1)}, {nn.Module: Dropout(0.1)}):
        assert how(put(Pixels(), rules, told=True)) == {"fc": "fx"}
    model = put(Pixels(), {"conv": Dropout(0.1, at="activation"), nn.Embedding: Dropout(0.2)})
    assert how(model) == {"conv": "fx", "emb": "fx"}
    put(model, {"conv": None, "emb": None})
    assert how(model) == {}
    undone(model, Pixels)


def test_the_linear_of_transformers() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")

    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.c_fc, self.c_proj = utils.Conv1D(16, 8), utils.Conv1D(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.c_proj(torch.tanh(self.c_fc(x)))

    model = put(Old(), {"": Dropout(0.5)}, told=True)
    assert how(model) == {"c_fc": "fx", "c_proj": "fx"}
    undone(model, Old)


class Stateful(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


def test_a_kind_with_a_state_of_its_own_is_refused_and_nothing_is_changed() -> None:
    for build, where in ((Plain, "a"), (Branching, "a")):
        model = build()
        before = fingerprint(model)
        for act in (plan, regularize):
            with pytest.raises(PolicyError, match="has a kind with a state of its own"):
                act(model, {where: Dropout(0.1, kind=Stateful)})
        assert not differences(before, fingerprint(model))


# ---- overriding ------------------------------------------------------------------------------

PLACES: dict[str, Any] = {
    "output": Dropout(0.1),
    "activation": Dropout(0.2, at="activation"),
    "input": Dropout(0.3, at="input"),
    "zero": Dropout(0),
    "none": None,
    "kind": Dropout(0.4, kind=nn.AlphaDropout),
}


@pytest.mark.parametrize("calls", [1, 2], ids=["one call", "two calls"])
@pytest.mark.parametrize("build", [Module, Behind, sequential])
@pytest.mark.parametrize("last", PLACES)
@pytest.mark.parametrize("first", PLACES)
def test_a_later_rule_overrides_wherever_the_earlier_one_put_it(
    first: str, last: str, build: Build, calls: int
) -> None:
    where = "0" if build is sequential else "a"
    both = [(where, PLACES[first]), (where, PLACES[last])]
    model = build()
    for rules in [both] if calls == 1 else [both[:1], both[1:]]:
        put(model, rules)
    alone = put(build(), both[1:])
    assert [{**r, "rule": 0} for r in rows(model)] == [{**r, "rule": 0} for r in rows(alone)]
    assert trained(model) == trained(alone)
    undone(model, build)


def test_none_on_the_layer_gives_the_dropout_behind_it_its_rate_back() -> None:
    for build, where, drop in ((Behind, "a", "drop"), (sequential, "0", "2")):
        model = put(build(), {where: Dropout(0.1)})
        put(model, {where: None})
        assert rows(model) == []
        assert model.get_submodule(drop).p == 0.5
        undone(model, build)


def test_a_rate_that_was_named_itself_is_not_the_layers() -> None:
    rules = [(nn.Dropout, Dropout(0.3)), ("a", Dropout(0.1, at="input"))]
    model = put(Behind(), rules)
    assert how(model) == {"a": "fx", "drop": "direct"}
    assert model.drop.p == 0.3
    put(model, {"a": None})
    assert how(model) == {"drop": "direct"}


def test_the_layers_rate_is_still_its_own_in_a_larger_model() -> None:
    model = nn.Sequential(put(Behind(), {"a": Dropout(0.1)}), nn.Linear(4, 4))
    put(model, {"0.a": None})
    assert rows(model) == []
    assert model[0].drop.p == 0.5  # type: ignore[union-attr]


def test_rate_zero_installs_nothing() -> None:
    for build in (Plain, Branching, Behind, sequential):
        where = "0" if build is sequential else "a"
        model = put(build(), {where: Dropout(0)})
        assert row(model)["mechanism"] is None
        assert row(model)["note"] == "rate 0: installs nothing"
        assert trained(model) == trained(build())
    model = put(Behind(), {"drop": Dropout(0)})
    assert model.drop.p == 0
    undone(model, Behind)


def test_second_calls_leave_our_own_dropouts_alone() -> None:
    model = put(Plain(), {"a": Dropout(0.1)})
    put(model, {nn.Dropout: Dropout(0.3)})  # reaches the model's own, not ours
    assert how(model) == {"a": "fx", "drop": "direct"}
    assert model.regwrap_dropout_a.p == 0.1
    put(model, {"**": L2(1e-3)})
    put(model, {"b": Dropout(0.2)})
    assert how(model) == {"a": "fx", "b": "fx", "drop": "direct"}
    with pytest.raises(rw.UnmatchedRule):
        put(model, {"regwrap_dropout_a": Dropout(0.5)})
    undone(model, Plain)


def test_the_same_rules_again_are_no_change() -> None:
    model = put(Plain(), {"a": Dropout(0.1)})
    first = trained(model)
    put(model, {"a": Dropout(0.1)})
    assert trained(model) == first
    assert len([m for m in model.modules() if isinstance(m, nn.Dropout)]) == 2


def test_a_dropout_in_a_second_call_is_written_beneath_the_class_of_the_root() -> None:
    model = put(put(Plain(), L2(1e-3)), {"a": Dropout(0.5)})
    first = put(Plain(), {"": L2(1e-3), "a": Dropout(0.5)})
    assert [k.__name__ for k in type(model).__mro__] == [k.__name__ for k in type(first).__mro__]
    assert policy(pickle.loads(pickle.dumps(model))) == policy(model)
    assert policy(copy.deepcopy(model)) == policy(model)
    undone(model, Plain)


def test_a_call_that_fails_half_way_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(put(Outer(), {"fc": Dropout(0.1)}), nn.Sequential(Behind(), Plain()))
    put(model, {"1.0.a": Dropout(0.2)})
    before, acting = fingerprint(model), policy(model)
    right = rw.surgery.fx.rewrite

    def fail(owner: nn.Module, inserts: Any) -> None:
        if isinstance(owner, Plain) and inserts:
            raise RuntimeError("half-way")
        right(owner, inserts)

    monkeypatch.setattr("regwrap.surgery.fx.rewrite", fail)
    with pytest.raises(RuntimeError, match="half-way"):
        regularize(model, {"0.fc": None, "0.inner": L2(0.1), "1": Dropout(0.4), "1.1.b": None})
    assert policy(model) == acting
    assert model[1][0].drop.p == 0.2  # type: ignore[index]
    assert not differences(before["repr"], fingerprint(model)["repr"])
    assert not differences(before["class"], fingerprint(model)["class"])
    monkeypatch.undo()
    unregularize(model)
    plain = nn.Sequential(Outer(), nn.Sequential(Behind(), Plain()))
    after = fingerprint(model, identity=False)
    assert not differences(fingerprint(plain, identity=False)["children"], after["children"])
    assert repr(plain) == repr(model)


def test_a_dropout_whose_layer_was_replaced_is_told_of() -> None:
    model = put(Plain(), {"a": Dropout(0.5)})
    model.a = nn.Linear(8, 16)
    assert not torch.equal(model(data()), model(data()))  # it is in the code of the owner
    (told,) = [r["note"] for r in policy(model).rows() if r["path"] == "a"]
    assert told.startswith("a Dropout of rate 0.5 for the layer that was here before acts still")
    put(model, {"a": Dropout(0.25)})
    assert [r["note"] for r in policy(model).rows() if r["path"] == "a"] == [""]
    unregularize(model)
    assert torch.equal(model(data()), model(data()))


# ---- a module beneath the owner --------------------------------------------------------------


@pytest.mark.parametrize("rules", [Dropout(0.5), Dropout(0), {"": None}], ids=repr)
@pytest.mark.parametrize("part", ["fc", "heads", "heads.0"])
def test_a_layer_whose_dropout_is_in_the_code_above_is_left_to_the_model(
    part: str, rules: Any
) -> None:
    model = put(Outer(), {"fc": Dropout(0.1), "heads": Dropout(0.2)}, told=True)
    before = fingerprint(model)
    with pytest.raises(PolicyError, match="in the code of a module above or beside"):
        regularize(model.get_submodule(part), rules)
    with pytest.raises(PolicyError, match="in the code of a module above or beside"):
        unregularize(model.get_submodule(part))
    assert not differences(before, fingerprint(model))
    undone(model, Outer)


def test_a_penalty_beneath_the_owner_is_fine() -> None:
    model = put(Outer(), {"fc": Dropout(0.1)})
    put(model.fc, L2(1e-3))  # type: ignore[arg-type]
    assert how(model) == {"fc": "fx"}
    assert model.regwrap_dropout_fc.p == 0.1  # type: ignore[union-attr]
    undone(model, Outer)


def test_a_submodule_that_owns_its_layers_is_regularized_by_itself() -> None:
    model = Outer()
    put(model.inner, {"a": Dropout(0.1)})  # type: ignore[arg-type]
    assert how(model) == {"inner.a": "fx"}
    unregularize(model.inner)
    assert rows(model) == []


# ---- shared, tied, aliased, clashing ---------------------------------------------------------


def test_a_layer_with_two_owners_drops_in_both() -> None:
    model = put(Wide(), {"left.fc": Dropout(0.5)})
    assert row(model)["mechanism"] == "fx"
    for part in (model.left, model.right):
        assert [m.p for m in part.modules() if isinstance(m, nn.Dropout)] == [0.5]  # type: ignore[union-attr]
    assert trained(model) != trained(Wide())
    undone(model, Wide)


class Shared(nn.Module):
    """One layer that two owners call."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Residual(), Residual()
        self.right.fc = self.left.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(x))


@pytest.mark.parametrize("change", [unregularize, lambda part: regularize(part, {"fc": None})])
def test_one_owner_of_a_shared_layer_alone_is_left_to_the_model(change: Any) -> None:
    model = put(Shared(), {"left.fc": Dropout(0.5)})
    with pytest.raises(PolicyError, match=r"call .* on the model that was regularized first"):
        change(model.left)
    assert how(model) == {"left.fc": "fx"}
    model.right = nn.Identity()  # its caller is gone: the model itself can be undone still
    unregularize(model)
    assert not how(model)
    assert not [name for name, _ in model.named_modules() if "regwrap" in name]


def test_tied_and_aliased_layers() -> None:
    model = put(Tied(), {"a": Dropout(0.5)})
    assert how(model) == {"a": "fx"}
    both = put(Tied(), {"a": Dropout(0.5), "alias": Dropout(0.2), "b": Dropout(0.3)})
    assert {r["path"]: r["term"] for r in rows(both)} == {
        "a": "Dropout(0.2)",
        "b": "Dropout(0.3)",
    }
    undone(model, Tied)
    undone(both, Tied)


def test_children_of_the_author_whose_names_start_as_ours_do() -> None:
    model = put(Clashing(), {"": [L2(1e-3), Dropout(0.5)]}, told=True)
    assert set(how(model)) == {"a", "b", "regwrap_dropout_a"}
    assert "regwrap_dropout_a.weight" in rw.penalties(model)
    assert trained(model) != trained(Clashing())
    undone(model, Clashing)


# ---- what a rewritten owner passes -----------------------------------------------------------

OWNERS: dict[str, tuple[Build, Any]] = {
    "output": (Plain, {"a": Dropout(0.5)}),
    "activation": (Module, {"a": Dropout(0.5, at="activation")}),
    "input": (Plain, {"b": Dropout(0.5, at="input")}),
    "kind": (Plain, {"a": Dropout(0.5, kind=nn.AlphaDropout)}),
    "rate": (Behind, {"a": Dropout(0.2)}),
    "hook": (Branching, {"a": Dropout(0.5)}),
    "two owners": (Wide, {"left.fc": Dropout(0.5), "heads.0": Dropout(0.5)}),
    "tied": (Tied, {"a": Dropout(0.5), "b": Dropout(0.5)}),
}


@pytest.mark.parametrize(
    "what", ["deepcopy", "deepcopy_mid_step", "pickle", "torch_save", "load_both_ways", "export"]
)
@pytest.mark.parametrize("name", OWNERS)
def test_rewritten_owners_pass(name: str, what: str) -> None:
    build, rules = OWNERS[name]
    case = Case(name, "", build, lambda: ((data(),), {}))
    assert failure_of(what, put(build(), rules), case) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", OWNERS)
def test_rewritten_owners_compile_in_one_graph(name: str) -> None:
    build, rules = OWNERS[name]
    case = Case(name, "", build, lambda: ((data(),), {}))
    assert failure_of("compile", put(build(), rules), case) is None


def outputs_of(pickled: bytes) -> list[Any]:
    """Runs in another process."""
    model = pickle.loads(pickled)
    return [trained(model), digest(model.eval()(data())), rows(model)]


def test_rewritten_owners_in_another_process() -> None:
    models = [put(build(), rules) for build, rules in OWNERS.values()]
    for model in models:
        theirs = new_process().submit(outputs_of, pickle.dumps(model)).result()
        assert theirs == outputs_of(pickle.dumps(model))


@pytest.mark.parametrize("name", OWNERS)
def test_undo_on_what_was_saved_and_loaded(name: str) -> None:
    build, rules = OWNERS[name]
    file = io.BytesIO()
    torch.save(put(build(), rules), file)
    file.seek(0)
    undone(torch.load(file, weights_only=False), build)
