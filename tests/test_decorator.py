"""`@regularized(rules)`: the same class, every instance of it and of its subclasses."""

import abc
import copy
import dataclasses
import functools
import inspect
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import pytest
import torch
from support import new_process
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, L2SP, Dropout, regularized

T = TypeVar("T")


def l2(*parameters: Tensor, strength: float = 0.1) -> Tensor:
    return strength / 2 * sum((p.square().sum() for p in parameters), torch.zeros(()))


def terms(model: nn.Module) -> list[tuple[str, str]]:
    return [(entry.path, repr(entry.term)) for entry in rw.policy(model)]


@regularized({"fc": L2(0.1)})
class Net(nn.Module):
    """A small net."""

    def __init__(self, width: int = 4, *, bias: bool = True) -> None:
        super(Net, self).__init__()  # noqa: UP008 - recurses for ever if another class comes back
        self.fc = nn.Linear(width, width, bias=bias)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x))


# ---- the class stays what it is --------------------------------------------------------------


def test_the_same_class_object_comes_back() -> None:
    class Plain(nn.Module):
        """Words."""

        def __init__(self, size: int, *, scale: float = 2.0) -> None:
            super().__init__()
            self.fc = nn.Linear(size, size)

    def looks() -> list[Any]:
        names = ("__name__", "__qualname__", "__module__", "__doc__", "__mro__")
        signatures = [inspect.signature(Plain), inspect.signature(Plain.__init__)]
        return signatures + [getattr(Plain, name) for name in names]

    before = looks()
    assert regularized(L2(0.1))(Plain) is Plain
    assert looks() == before
    model = Plain(3, scale=1.0)
    assert isinstance(model, Plain)
    assert type(model).__name__ == "Plain" and repr(model).startswith("Plain(")


def test_an_instance_is_regularized_by_the_numbers() -> None:
    model = Net()
    assert torch.equal(model.reg_loss, l2(model.fc.weight))
    assert terms(model) == [("fc", "L2(0.1)")]
    assert rw.policy(model) == rw.plan(rw.unregularize(Net()), {"fc": L2(0.1)})


def test_undo_leaves_a_plain_instance_and_the_class_decorated() -> None:
    model = rw.unregularize(Net())
    assert type(model) is Net and not hasattr(model, "reg_loss")
    assert "_regwrap" not in model.__dict__
    assert Net().reg_loss > 0


def test_bad_arguments_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"@regularized"):
        rw.regularize(Net)  # type: ignore[type-var]  # what `@regularize` above a class does
    with pytest.raises(TypeError, match="@regularized"):
        rw.regularize({"fc": L2(0.1)})  # type: ignore[type-var]  # `@regularize(rules)`
    with pytest.raises(TypeError, match=r"@regularized needs rules.* class Plain"):

        @regularized
        class Plain(nn.Module): ...

    with pytest.raises(TypeError, match="regularized"):
        regularized()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"class of nn\.Module"):
        regularized(L2(0.1))(Net())  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"class of nn\.Module"):
        regularized(L2(0.1))(int)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="rules must be"):
        regularized(0.1)
    for reference in ({"fc": L2SP(0.1)}, lambda model: L2SP(0.1)):
        with pytest.raises(rw.PolicyError, match="reference="):
            regularized(reference)(type("Plain", (Net,), {}))()


def test_l2sp_with_a_reference_is_fine() -> None:
    state = {"fc.weight": torch.zeros(4, 4)}
    model = regularized({"fc": L2SP(0.2, reference=state)})(type("Pulled", (Net,), {}))()
    assert torch.allclose(model.reg_loss, l2(model.fc.weight) * 3)  # Net's own L2 besides


# ---- subclasses ------------------------------------------------------------------------------


def test_a_subclass_s_later_layers_are_reached() -> None:
    @regularized({nn.Linear: L2(0.1)})
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

    class Sub(Base):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(2, 2)

    class Leaf(Sub): ...

    class Bypass(Base):
        def __init__(self) -> None:  # calls no __init__ of Base's
            nn.Module.__init__(self)
            self.own = nn.Linear(2, 2)

    class Wrapping(Base):
        @functools.wraps(Base.__init__)  # copies everything that the wrapped function carries
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(2, 2)

    paths = {cls: [path for path, _ in terms(cls())] for cls in (Base, Sub, Leaf, Bypass, Wrapping)}
    assert list(paths.values()) == [["fc"], ["fc", "late"], ["fc", "late"], ["own"], ["fc", "late"]]


def test_a_class_without_an_init_of_its_own() -> None:
    class Plain(nn.Module):
        def __init__(self, size: int = 2) -> None:
            super().__init__()
            self.fc = nn.Linear(size, size)

    @regularized({"fc": L2(0.1)})
    class Decorated(Plain): ...

    class Wider(Plain):
        def __init__(self, size: int = 3) -> None:
            super().__init__(size)
            self.late = nn.Linear(size, size)

    class Diamond(Decorated, Wider): ...

    assert inspect.signature(Decorated) == inspect.signature(Plain)
    assert terms(Decorated(5)) == [("fc", "L2(0.1)")]
    assert Diamond(5).late.in_features == 5  # Wider's __init__ runs, as it would undecorated
    assert terms(Diamond()) == [("fc", "L2(0.1)")]
    assert not hasattr(Plain(), "reg_loss")


def test_a_mixin_whose_init_comes_first() -> None:
    class Late:
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(2, 2)

    @regularized({nn.Linear: L2(0.1)})
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

    class Both(Late, Base): ...

    assert [path for path, _ in terms(Both())] == ["fc", "late"]


def test_a_subclass_made_before_the_decorator_came() -> None:
    class Base(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

    class Sub(Base):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Linear(2, 2)

    regularized({nn.Linear: L2(0.1)})(Base)
    assert [path for path, _ in terms(Sub())] == ["fc", "late"]


def test_rules_follow_from_base_to_subclass_and_from_lower_to_upper_decorator() -> None:
    @regularized({"head": None})
    @regularized(lambda model: {"fc": L2(1.0), "head": L1(2.0)}, strict=False)
    class Sub(Net): ...

    assert terms(Sub()) == [("fc", "L2(1.0)")]
    assert [term for _, term in rw.policy(Sub()).rules] == [L2(0.1), L2(1.0), L1(2.0), None]
    assert terms(Net()) == [("fc", "L2(0.1)")]


def test_rules_as_a_function_of_the_finished_instance() -> None:
    @regularized(lambda net: {f"layers.{len(net.layers) - 1}": L2(0.1 * len(net.layers))})
    class Stack(nn.Module):
        def __init__(self, depth: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(depth))

    assert terms(Stack(2)) == [("layers.1", "L2(0.2)")]
    assert terms(Stack(4)) == [("layers.3", "L2(0.4)")]


def test_rules_are_those_that_stood_there_when_the_class_was_decorated() -> None:
    rules = {"fc": L2(0.1)}
    cls = regularized(rules)(type("Copying", (_Two,), {}))
    rules["fc"] = L2(9.0)
    assert terms(cls()) == [("fc", "L2(0.1)")]


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


@pytest.mark.parametrize("base", [abc.ABC, Generic[T]], ids=["abstract", "generic"])
def test_abstract_and_generic_classes(base: Any) -> None:
    @regularized({"fc": L2(0.1)})
    class Base(nn.Module, base):
        made = 0

        def __init_subclass__(cls, tag: str = "", **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            cls.tag = tag
            Base.made += 1

        def __init__(self) -> None:
            super().__init__()
            self.fc = self.build()

        @abc.abstractmethod
        def build(self) -> nn.Module: ...

    class Concrete(Base[int] if base is not abc.ABC else Base, tag="mine"):  # type: ignore[index]
        def build(self) -> nn.Module:
            return nn.Linear(2, 2)

    if base is abc.ABC:
        with pytest.raises(TypeError, match="abstract"):
            Base()
    model = Concrete()
    assert terms(model) == [("fc", "L2(0.1)")]
    assert (Concrete.tag, Base.made) == ("mine", 1)
    assert isinstance(copy.deepcopy(model), Concrete)


# ---- dataclasses -----------------------------------------------------------------------------


def _dataclass_net(above: bool, post: type = nn.Module) -> Any:
    class Data(post):  # type: ignore[misc,valid-type]
        width: int = 4
        depth: int = 1

        def __post_init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(self.width, 2) for _ in range(self.depth))

    Data.__annotations__ = {"width": int, "depth": int}
    decorate, make = regularized({nn.Linear: L2(0.1)}), dataclasses.dataclass(eq=False)
    return decorate(make(Data)) if above else make(decorate(Data))


@pytest.mark.parametrize("above", [True, False], ids=["above", "below"])
def test_dataclasses_in_both_orders_keep_their_fields(above: bool) -> None:
    Data = _dataclass_net(above)
    assert list(inspect.signature(Data).parameters) == ["width", "depth"]
    model = Data(3, depth=2)
    assert (model.width, [path for path, _ in terms(model)]) == (3, ["layers.0", "layers.1"])
    assert len(rw.policy(model).rules) == 1

    @dataclasses.dataclass(eq=False)
    class Fields(Data):  # no __post_init__ of its own
        extra: int = 7

    @dataclasses.dataclass(eq=False)
    class Late(Data):
        extra: int = 7

        def __post_init__(self) -> None:
            super().__post_init__()
            self.late = nn.Linear(self.extra, 1)

    class Plain(Late): ...

    assert list(inspect.signature(Fields).parameters) == ["width", "depth", "extra"]
    assert [path for path, _ in terms(Fields(3, 1, extra=2))] == ["layers.0"]
    for cls in (Late, Plain):
        assert [path for path, _ in terms(cls(3, 1, extra=2))] == ["layers.0", "late"]
        assert len(rw.policy(cls()).rules) == 1


@pytest.mark.parametrize("above", [True, False], ids=["above", "below"])
def test_a_decorated_dataclass_of_a_plain_one(above: bool) -> None:
    @dataclasses.dataclass(eq=False)
    class Small(nn.Module):
        width: int = 4

        def __post_init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(self.width, 2)

    class Big(Small):
        depth: int = 1

    Big.__annotations__ = {"depth": int}
    decorate, make = regularized({"fc": L2(0.1)}), dataclasses.dataclass(eq=False)
    Big = decorate(make(Big)) if above else make(decorate(Big))  # type: ignore[misc]
    assert (Big(3, depth=5).depth, terms(Big(3, depth=5))) == (5, [("fc", "L2(0.1)")])
    assert not hasattr(Small(), "reg_loss")


# ---- copies ----------------------------------------------------------------------------------


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", [copy.deepcopy, _pickled, _saved])
def test_copies_have_the_policy_once(how: Any) -> None:
    model = Net()
    other = how(model)
    assert rw.policy(other) == rw.policy(model)
    assert torch.equal(other.reg_loss, model.reg_loss)
    with torch.no_grad():
        other.fc.weight.zero_()
    assert other.reg_loss == 0 and model.reg_loss > 0
    assert type(rw.unregularize(other)) is Net and model.reg_loss > 0


def _reg_loss_of(model: nn.Module) -> tuple[float, int]:
    return model.reg_loss.item(), len(rw.policy(model))


def test_an_instance_goes_to_a_spawned_process() -> None:
    model = Net()
    sent = new_process().submit(_reg_loss_of, model).result()
    assert sent == (pytest.approx(model.reg_loss.item()), 1)


# ---- when something fails --------------------------------------------------------------------


def test_a_failing_init_leaves_nothing_behind() -> None:
    @regularized({"fc": L2(0.1)})
    class Fails(nn.Module):
        def __init__(self, *, fail: bool) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)
            if fail:
                raise RuntimeError("no")

    class Sub(Fails):
        def __init__(self, *, fail: bool) -> None:
            try:
                super().__init__(fail=fail)
            except RuntimeError:
                super().__init__(fail=False)
            self.late = nn.Linear(2, 2)

    for _ in range(3):
        with pytest.raises(RuntimeError, match="no"):
            Fails(fail=True)
    assert len(rw.policy(Fails(fail=False)).rules) == 1
    assert len(rw.policy(Sub(fail=True)).rules) == 1  # not at the end of the inner one too


def test_init_called_again_starts_afresh() -> None:
    model = Net()
    model.__init__(3)  # type: ignore[misc]
    assert torch.equal(model.reg_loss, l2(model.fc.weight))
    assert len(rw.policy(model).rules) == 1


def test_a_rule_that_cannot_be_carried_out_raises_from_the_constructor() -> None:
    @regularized({"fc": rw.GroupLasso(0.1, size=3)})
    class Odd(_Two): ...

    with pytest.raises(rw.PolicyError, match="size=3"):
        Odd()


# ---- nested ----------------------------------------------------------------------------------


def test_the_outer_s_reg_loss_has_the_inner_s_once() -> None:
    @regularized({"head": L1(0.01), "net.head": L2(0.5)})
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.other = Net()
            self.head = nn.Linear(2, 2)

    model = Outer()
    inner = l2(model.net.fc.weight) + l2(model.other.fc.weight)
    more = 0.01 * model.head.weight.abs().sum() + l2(model.net.head.weight, strength=0.5)
    assert torch.allclose(model.reg_loss, inner + more)
    part = l2(model.net.fc.weight) + l2(model.net.head.weight, strength=0.5)
    assert torch.allclose(model.net.reg_loss, part)
    assert torch.allclose(rw.reg_loss(model.other), l2(model.other.fc.weight))
    rw.unregularize(model.net)
    assert torch.allclose(
        model.reg_loss, l2(model.other.fc.weight) + 0.01 * model.head.weight.abs().sum()
    )


# ---- layers that come later ------------------------------------------------------------------


@regularized({"late": L2(0.1)})
class Later(nn.Module):
    """Makes its layer at the first forward, or when it is told to."""

    def configure_model(self, width: int = 3) -> None:
        self.late = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.late(x)


READS = {
    "reg_loss": lambda model: model.reg_loss,
    "function": rw.reg_loss,
    "penalties": rw.penalties,
    "policy": rw.policy,
    "summary": rw.summary,
    "param_groups": rw.param_groups,
    "forward": lambda model: model(torch.zeros(1, 3)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_rules_wait_for_layers_and_then_raise(read: Any) -> None:
    model = Later()
    for _ in range(2):
        with pytest.raises(rw.UnmatchedRule, match="'late'"):
            read(model)
    for each in (model, copy.deepcopy(model), _pickled(model)):
        each.configure_model()
        read(each)
        assert terms(each) == [("late", "L2(0.1)")]
        assert not each._forward_pre_hooks


def test_undo_takes_back_what_waits() -> None:
    model = rw.unregularize(Later())
    assert type(model) is Later
    assert not (model._forward_pre_hooks or "_regwrap" in model.__dict__)


def test_lenient_rules_wait_too_and_then_warn() -> None:
    cls = regularized({"late": L2(0.1), "never": L2(0.1)}, strict=False)(
        type("Lenient", (nn.Module,), {"configure_model": Later.configure_model})
    )
    model = cls()
    model.configure_model()
    with pytest.warns(rw.RegwrapWarning, match="'never'"):
        assert model.reg_loss > 0
    assert len(rw.policy(model)) == 1


def test_only_what_does_not_reach_yet_waits_and_nothing_is_carried_out_twice() -> None:
    @regularized({"never": L2(0.1)})
    @regularized({"late": L2(0.1)})
    class More(Net):
        configure_model = Later.configure_model

    model = More()
    with pytest.raises(rw.UnmatchedRule, match="'late'"):
        rw.reg_loss(model)
    model.configure_model()
    for _ in range(3):
        with pytest.raises(rw.UnmatchedRule, match="'never'"):
            rw.reg_loss(model)
    model.never = nn.Linear(2, 2)
    assert [path for path, _ in terms(model)] == ["fc", "late", "never"]
    assert len(rw.policy(model).rules) == 3


def test_a_waiting_part_of_a_decorated_model_still_waits() -> None:
    @regularized({"head": L2(0.1)})
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Later()
            self.head = nn.Linear(2, 2)

    model = Outer()
    with pytest.raises(rw.UnmatchedRule, match="'late'"):
        rw.reg_loss(model)
    model.part.configure_model()
    assert torch.allclose(model.reg_loss, l2(model.head.weight, model.part.late.weight))


def test_waiting_takes_no_reg_loss_away_from_a_model_that_has_one() -> None:
    @regularized({"late": L2(0.1)})
    class Own(nn.Module):
        reg_loss = "mine"

    model = Own()
    assert model.reg_loss == "mine"
    model.late = nn.Linear(2, 2)
    with pytest.warns(rw.RegwrapWarning, match="reg_loss of its own"):
        assert rw.reg_loss(model) > 0
    assert model.reg_loss == "mine"


def test_lazy_layers_are_reached_before_they_are_initialized() -> None:
    @regularized({nn.Linear: L2(0.1) + Dropout(0.5)})
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Lazy()
    assert model.reg_loss == 0
    out = model(torch.ones(64, 5))
    assert torch.allclose(model.reg_loss, l2(model.fc.weight))
    assert (out == 0).any()


# ---- threads, Lightning, Hugging Face --------------------------------------------------------


def test_instances_may_be_made_in_several_threads() -> None:
    started = threading.Barrier(8)

    def make(_: int) -> nn.Module:
        started.wait()
        return Net()

    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(make, range(8)))
    assert len({type(model) for model in models}) == 1
    assert all(terms(model) == [("fc", "L2(0.1)")] for model in models)


def collected(frame: Any) -> dict[str, Any]:
    """What Lightning 2.6 collects for `save_hyperparameters()`: the frames of `__init__` upwards.

    After `lightning.pytorch.utilities.parsing.collect_init_args` and `get_init_args`.
    """
    found: list[dict[str, Any]] = []
    while frame is not None:
        values = inspect.getargvalues(frame).locals
        if "__class__" not in values or frame.f_code.co_name != "__init__":
            break
        if isinstance(values.get("self"), nn.Module):
            parameters = inspect.signature(values["__class__"].__init__).parameters
            kinds = {p.kind: name for name, p in parameters.items()}
            starred = {kinds.get(inspect.Parameter.VAR_POSITIONAL)}
            keywords = kinds.get(inspect.Parameter.VAR_KEYWORD)
            own = {name: values[name] for name in parameters}
            own.update(own.get(keywords, {}) if keywords else {})
            found.insert(0, {k: v for k, v in own.items() if k not in {"self", keywords, *starred}})
        frame = frame.f_back
    return {key: value for each in reversed(found) for key, value in each.items()}


def test_frames_of_init_show_all_arguments_up_to_the_subclass_s() -> None:
    @regularized({"fc": L2(0.1)})
    class Base(nn.Module):
        def __init__(self, width: int = 2, **kwargs: Any) -> None:
            super().__init__()
            frame = inspect.currentframe()
            self.seen = collected(frame)
            self.fc = nn.Linear(width, width)

    class Sub(Base):
        def __init__(self, rate: float, width: int = 3, *, name: str = "x") -> None:
            super().__init__(width, extra=1)

    class Bare(Base): ...

    assert Base(4).seen == Bare(4).seen == {"width": 4}
    assert Sub(0.5, name="y").seen == {"rate": 0.5, "width": 3, "name": "y", "extra": 1}


def test_save_hyperparameters_of_lightning() -> None:
    lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)

    def make(decorate: Any) -> Any:
        class Base(lightning.LightningModule):  # type: ignore[misc,name-defined]
            def __init__(self, width: int = 2, **kwargs: Any) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.fc = nn.Linear(width, width)

        class Sub(decorate(Base)):  # type: ignore[misc]
            def __init__(self, rate: float, width: int = 3, *, name: str = "x") -> None:
                super().__init__(width, extra=1)

        return Sub(0.5, name="y"), Base(4, more=2)

    plain = make(lambda cls: cls)
    ours = make(regularized({"fc": L2(0.1)}))
    assert [dict(model.hparams) for model in ours] == [dict(model.hparams) for model in plain]
    assert dict(ours[0].hparams) == {"rate": 0.5, "width": 3, "name": "y", "extra": 1}
    assert ours[0].reg_loss > 0


transformers = pytest.importorskip("transformers")


class TinyConfig(transformers.PretrainedConfig):  # type: ignore[misc,name-defined]
    model_type = "tiny-regularized"

    def __init__(self, width: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width


@regularized({"fc": L2(0.1) + Dropout(0.5)})
class Tiny(transformers.PreTrainedModel):  # type: ignore[misc,name-defined]
    config_class = TinyConfig

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config)
        self.fc = nn.Linear(config.width, config.width)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_a_pretrained_model_is_saved_and_loaded(tmp_path: Any) -> None:
    model = Tiny._from_config(TinyConfig(width=6))
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert '"architectures": [\n    "Tiny"\n  ]' in config
    loaded, info = Tiny.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert torch.equal(loaded.fc.weight, model.fc.weight)
    assert torch.equal(loaded.reg_loss, l2(model.fc.weight))
    x = torch.ones(32, 6)
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert (loaded.train()(x) == 0).any()
