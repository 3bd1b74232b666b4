"""Penalties of outputs, and weight penalties that count only when their module was called."""

import copy
import dataclasses
import io
import pickle
import re
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

import regwrap as rw
from regwrap import L1, L2, L2SP, DropConnect, Dropout, Penalty
from regwrap.seen import ROUND, SEEN

# torch's own: dynamo looks at the .grad of every tensor that it meets
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

Pair = namedtuple("Pair", "first second")


class Mlp(nn.Module):
    def __init__(self, features: int = 5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, features)
        self.fc2 = nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).tanh())


class Siamese(nn.Module):
    """Calls one tower as often as it gets inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(4, 3)

    def forward(self, *xs: Tensor) -> Tensor:
        return torch.stack([self.tower(x).tanh().sum() for x in xs]).sum()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.body(-x)


def mlp(seed: int = 0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp()


def batch(seed: int = 1, rows: int = 6) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_grads(left: nn.Module, right: nn.Module, **how: float) -> None:
    ours, theirs = grads(left), grads(right)
    assert ours and list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **how)


# ---- Keras' semantics ------------------------------------------------------------------------

VALUES = [
    (L1(0.3, on="output"), lambda y: 0.3 * y.abs().sum() / len(y)),
    (L2(0.3, on="output"), lambda y: 0.15 * y.square().sum() / len(y)),
    (Penalty(torch.norm, 0.3, on="output"), lambda y: 0.3 * y.norm() / len(y)),
]


@pytest.mark.parametrize(("term", "value"), VALUES, ids=[type(t).__name__ for t, _ in VALUES])
def test_is_the_sum_over_features_and_the_mean_over_the_batch(term: Any, value: Any) -> None:
    model = rw.regularize(mlp(), {"fc1": term})
    x = batch()
    model(x)
    torch.testing.assert_close(model.reg_loss, value(model.fc1.forward(x)))


@pytest.mark.parametrize("shape", [(6, 4), (1, 4), (4,), (2, 3, 4), (0, 4)])
def test_counts_the_first_dimension_as_the_batch(shape: tuple[int, ...]) -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    x = torch.randn(shape)
    model(x)
    wanted = model.fc1.forward(x).abs().sum() / max(shape[0] if len(shape) > 1 else 5, 1)
    torch.testing.assert_close(model.reg_loss, wanted)


def test_of_a_single_number_is_not_averaged() -> None:
    class Number(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.w * x.sum()

    model = rw.regularize(Number(), {"": L1(1.0, on="output")})
    assert model(torch.ones(3)).item() == model.reg_loss.item() == 6


def test_several_terms_on_one_output_stack_and_the_later_of_one_kind_wins() -> None:
    rules = {"fc1": [L1(0.1, on="output"), L2(0.2, on="output")], "fc*": L1(0.5, on="output")}
    model = rw.regularize(mlp(), rules)
    x = batch()
    model(x)
    h, y = model.fc1.forward(x), model.fc2.forward(model.fc1.forward(x).tanh())
    wanted = (0.5 * h.abs().sum() + 0.1 * h.square().sum() + 0.5 * y.abs().sum()) / 6
    torch.testing.assert_close(model.reg_loss, wanted)
    found = rw.penalties(model)
    assert list(found) == ["fc1:output", "fc2:output"]
    torch.testing.assert_close(sum(found.values()), model.reg_loss)


def test_every_call_of_a_shared_module_counts() -> None:
    model = rw.regularize(Siamese(), {"tower": L1(1.0, on="output")})
    xs = [batch(i, rows) for i, rows in enumerate((2, 3, 7))]
    model(*xs)
    wanted = sum(model.tower.forward(x).abs().sum() / len(x) for x in xs)
    torch.testing.assert_close(model.reg_loss, wanted)


def test_a_module_under_two_names_is_one_site() -> None:
    model = mlp()
    model.alias = model.fc1
    rw.regularize(model, {"{fc1,alias}": L1(1.0, on="output")})
    x = batch()
    model(x)
    torch.testing.assert_close(model.reg_loss, model.fc1.forward(x).abs().sum() / 6)
    assert list(rw.penalties(model)) == ["fc1:output"]


def test_acts_on_the_named_module_alone() -> None:
    model = rw.regularize(Inner(), {"body": L1(1.0, on="output")})
    model(batch())
    assert list(rw.penalties(model)) == ["body:output"]


def test_reaches_the_root_itself() -> None:
    model = rw.regularize(mlp(), L1(1.0, on="output"))
    for _ in range(3):
        y = model(batch())
    torch.testing.assert_close(model.reg_loss, y.abs().sum() / 6)
    assert list(rw.penalties(model)) == [":output"]


def test_sees_the_layer_before_its_dropout_and_before_the_hooks_of_others() -> None:
    model = rw.regularize(mlp(), {"fc1": [L1(1.0, on="output"), Dropout(0.5)]})
    model.fc1.register_forward_hook(lambda m, a, y: y * 1000)
    rw.regularize(model, {"fc1": L2(0.0, on="output")})  # a second call keeps the places
    x = batch()
    model(x)
    wanted = nn.functional.linear(x, model.fc1.weight, model.fc1.bias).abs().sum() / 6
    torch.testing.assert_close(model.reg_loss, wanted)


def test_gives_the_gradient_of_the_formula() -> None:
    model, plain = rw.regularize(mlp(), {"fc1": L2(0.3, on="output")}), mlp()
    x = batch()
    (model(x).sum() + model.reg_loss).backward()
    (plain(x).sum() + 0.15 * plain.fc1(x).square().sum() / 6).backward()
    assert_same_grads(model, plain)


# ---- when it is recorded ---------------------------------------------------------------------


def test_counts_in_training_with_grad_only() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    model(batch())
    assert model.reg_loss > 0
    with torch.no_grad():
        model(batch())
    assert model.reg_loss == 0
    with torch.inference_mode():
        model(batch())
    assert model.reg_loss == 0
    model.eval()(batch())
    assert model.reg_loss == 0
    assert rw.penalties(model)["fc1:output"] == 0


def test_a_part_in_eval_does_not_count_in_a_model_in_training() -> None:
    model = rw.regularize(mlp(), {"fc*": L1(1.0, on="output")})
    model.fc1.eval()
    y = model(batch())
    torch.testing.assert_close(model.reg_loss, y.abs().sum() / 6)


def test_before_any_forward_is_zero() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    assert model.reg_loss == 0
    assert not model.reg_loss.requires_grad


def test_forgets_the_last_forward_when_the_next_begins() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    for seed in range(3):
        model(batch(seed))
    torch.testing.assert_close(model.reg_loss, model.fc1.forward(batch(2)).abs().sum() / 6)


def test_read_twice_is_the_same_and_after_backward_a_value_without_a_graph() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    loss = model(batch()).sum()
    first, second = model.reg_loss, model.reg_loss
    assert first == second
    (loss + first).backward()
    assert model.reg_loss == first
    with pytest.raises(RuntimeError, match="second time"):
        model.reg_loss.backward()


def test_an_exception_inside_the_forward_ends_it() -> None:
    class Fragile(Mlp):
        fail: type[BaseException] | None = None

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.fc1(x)
            if self.fail:
                raise self.fail
            return self.fc2(hidden)

    model = rw.regularize(Fragile(), {"fc1": L1(1.0, on="output")})
    for kind in (ValueError, KeyboardInterrupt, GeneratorExit):
        model.fail = kind
        for _ in range(2):
            with pytest.raises(kind):
                model(batch())
        model.fail = None
        for seed in range(3):
            model(batch(seed))
        torch.testing.assert_close(model.reg_loss, model.fc1.forward(batch(2)).abs().sum() / 6)


def test_an_exception_in_a_pre_hook_leaves_the_count_of_forwards_right() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})

    def refuse(module: nn.Module, args: Any) -> None:
        raise ValueError

    handle = model.register_forward_pre_hook(refuse, prepend=True)
    for _ in range(2):
        with pytest.raises(ValueError):
            model(batch())
    handle.remove()
    for seed in range(3):
        model(batch(seed))
    torch.testing.assert_close(model.reg_loss, model.fc1.forward(batch(2)).abs().sum() / 6)


def test_a_model_that_calls_itself_clears_once() -> None:
    class Recursive(Mlp):
        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            y = self.fc2(self.fc1(x))
            return y + self(x * 2, depth - 1) if depth else y

    model = rw.regularize(Recursive(), {"fc1": L1(1.0, on="output")})
    x = batch()
    for _ in range(2):
        model(x)
    wanted = sum(model.fc1.forward(x * k).abs().sum() / 6 for k in (1, 2, 4))
    torch.testing.assert_close(model.reg_loss, wanted)


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_regularized_model_inside_a_regularized_model(inner_first: bool) -> None:
    model = Inner()
    calls = [
        lambda: rw.regularize(model.body, {"fc1": L1(1.0, on="output")}),
        lambda: rw.regularize(model, {"body": L2(2.0, on="output")}),
    ]
    for call in calls if inner_first else calls[::-1]:
        call()
    x = batch()
    for _ in range(2):
        model(x)
    hidden = sum(model.body.fc1.forward(v).abs().sum() / 6 for v in (x, -x))
    model(x)
    torch.testing.assert_close(model.body.reg_loss - _outputs(model), hidden)
    torch.testing.assert_close(model.reg_loss, model.body.reg_loss)
    model.body(x)  # on its own it begins a forward of its own
    model.body(x)
    assert model.body.reg_loss < model.reg_loss + 1e-6
    once = model.body.fc1.forward(x).abs().sum() / 6 + model.body.forward(x).square().sum() / 6
    model.body(x)
    torch.testing.assert_close(model.body.reg_loss, once)


def _outputs(model: nn.Module) -> Tensor:
    return rw.penalties(model)["body:output"]


def test_an_inner_root_keeps_its_forward_when_the_outer_is_undone() -> None:
    model = Inner()
    rw.regularize(model.body, {"fc1": L1(1.0, on="output")})
    rw.regularize(model, {"body.fc2": L1(1.0, on="output")})
    rw.regularize(model, {"": None})
    assert not [m for m in model.modules() if SEEN in m.__dict__ or ROUND in m.__dict__]
    assert not model.body._forward_pre_hooks
    assert model.reg_loss == 0


# ---- the root's forward bypassed -------------------------------------------------------------


def test_parts_called_on_their_own_count_since_the_last_read() -> None:
    model = rw.regularize(mlp(), {"fc*": L1(1.0, on="output")})
    for seed in range(3):
        x = batch(seed)
        h = model.fc1(x)
        y = model.fc2(h)
        wanted = (h.abs().sum() + y.abs().sum()) / 6
        torch.testing.assert_close(model.reg_loss, wanted)
        (y.sum() + model.reg_loss).backward()


def test_a_read_ends_the_round_of_all_parts_together() -> None:
    model = rw.regularize(mlp(), {"fc*": L1(1.0, on="output")})
    model.fc1(batch())
    model.reg_loss.backward()
    y = model.fc2(torch.randn(2, 5))
    torch.testing.assert_close(model.reg_loss, y.abs().sum() / 2)
    model.reg_loss.backward()  # what fc1 left is gone with its graph


def test_records_outside_the_roots_forward_stay_bounded_with_a_warning() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    with pytest.warns(rw.RegwrapWarning, match="was called 1000 times outside") as told:
        for _ in range(2500):
            model.fc1(batch(rows=1))
    wanted = 500 * model.fc1.forward(batch(rows=1)).abs().sum()
    torch.testing.assert_close(model.reg_loss, wanted)
    assert len(told) == 2
    assert "Linear was called 1000 times outside the regularized model's forward" in str(
        told[0].message
    )


def test_a_part_taken_out_of_the_model_counts_on_its_own() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    part = model.fc1
    h = part(batch())
    torch.testing.assert_close(rw.reg_loss(part), h.abs().sum() / 6)
    assert list(rw.penalties(part)) == [":output"]


# ---- training loops --------------------------------------------------------------------------


def test_accumulation_over_micro_batches_adds_each_micro_batch() -> None:
    model, plain = rw.regularize(mlp(), {"fc1": L2(0.3, on="output")}), mlp()
    for seed in range(4):
        x = batch(seed, 2)
        ((model(x).square().mean() + model.reg_loss) / 4).backward()
        hand = 0.15 * plain.fc1(x).square().sum() / 2
        ((plain(x).square().mean() + hand) / 4).backward()
    assert_same_grads(model, plain)


class Blocks(nn.Module):
    """Three blocks, each of them checkpointed if asked."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, **self.how) if self.how else block(x)
        return x


def blocks(**how: Any) -> Blocks:
    torch.manual_seed(0)
    return Blocks(**how)


RULES = {"blocks.*": L2(0.3, on="output"), "blocks.*.0": L1(0.1, on="output")}


@pytest.mark.parametrize("early_stop", [True, False])
def test_non_reentrant_checkpointing_gives_the_same_value_and_gradients(early_stop: bool) -> None:
    model = rw.regularize(blocks(use_reentrant=False, early_stop=early_stop), RULES)
    plain = rw.regularize(blocks(), RULES)
    x = batch()
    for each in (model, plain):
        for _ in range(2):
            (each(x).sum() + each.reg_loss).backward()
    torch.testing.assert_close(model.reg_loss, plain.reg_loss)
    assert_same_grads(model, plain)


def test_checkpointing_the_whole_model_keeps_what_it_recorded() -> None:
    model = rw.regularize(blocks(), RULES)
    plain = rw.regularize(blocks(), RULES)
    x = batch().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False)
    before = model.reg_loss.detach()
    (y.sum() + model.reg_loss).backward()
    (plain(x).sum() + plain.reg_loss).backward()
    assert model.reg_loss == before
    assert_same_grads(model, plain)
    y = checkpoint(model, x, use_reentrant=False)
    assert model.reg_loss == before


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    model = rw.regularize(blocks(use_reentrant=True), RULES)
    with pytest.raises(rw.PolicyError, match=re.escape("checkpoint(..., use_reentrant=False)")):
        model(batch().requires_grad_())


def test_reentrant_checkpointing_passes_where_nothing_needs_its_gradient() -> None:
    model = rw.regularize(blocks(use_reentrant=True), {"blocks.*": L2(0.3, when="called")})
    plain = rw.regularize(blocks(), {"blocks.*": L2(0.3)})
    for each in (model, plain):
        (each(batch().requires_grad_()).sum() + each.reg_loss).backward()
    assert model.reg_loss == plain.reg_loss > 0
    assert_same_grads(model, plain)
    model = rw.regularize(blocks(use_reentrant=True), RULES).eval()
    model(batch().requires_grad_()).sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_penalises_what_the_layer_gave_in_float32(dtype: torch.dtype) -> None:
    model = rw.regularize(mlp(), {"fc1": [L1(1.0, on="output"), L2(1.0, on="output")]})
    with torch.autocast("cpu", dtype=dtype):
        model(batch())
        h = model.fc1.forward(batch())
        loss = model.reg_loss
    assert h.dtype == dtype
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (h.float().abs().sum() + h.float().square().sum() / 2) / 6)
    loss.backward()
    assert model.fc1.weight.grad.dtype == torch.float32


def test_half_outputs_do_not_overflow() -> None:
    model = mlp().to(torch.float16)
    nn.init.constant_(model.fc1.weight, 300.0)
    rw.regularize(model, {"fc1": L2(1.0, on="output")})
    model(torch.full((6, 4), 20.0, dtype=torch.float16))
    torch.testing.assert_close(model.reg_loss.item(), 2.5 * 24000.0**2, rtol=1e-3, atol=0)


# ---- torch.compile ---------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module) -> tuple[Any, Any]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_to_one_graph_that_serves_every_step() -> None:
    model, plain = (rw.regularize(mlp(), {"fc*": L2(0.3, on="output")}) for _ in range(2))
    fast, counter = compiled(model)
    for each, called in ((model, fast), (plain, plain)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for seed in range(5):
            optimizer.zero_grad()
            (called(batch(seed)).sum() + rw.reg_loss(called)).backward()
            optimizer.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(model.reg_loss, plain.reg_loss)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiles_with_the_penalty_read_inside() -> None:
    model = rw.regularize(mlp(), {"fc1": L2(0.3, on="output"), "fc2": L2(0.1)})

    def step(x: Tensor) -> Tensor:
        return model(x).sum() + model.reg_loss

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.testing.assert_close(fast(batch(seed)), step(batch(seed)))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_forwards_follow_the_mode_and_forget() -> None:
    model = rw.regularize(Siamese(), {"tower": L1(1.0, on="output")})
    fast, counter = compiled(model)
    for _ in range(3):
        fast(batch(1), batch(2))
        wanted = sum(model.tower.forward(batch(i)).abs().sum() / 6 for i in (1, 2))
        torch.testing.assert_close(model.reg_loss, wanted)
    model.eval()
    fast(batch(1), batch(2))
    assert model.reg_loss == 0
    assert counter.frame_count == 2  # one a mode
    model.train()
    fast(batch(1), batch(2))
    assert counter.frame_count == 2
    torch.testing.assert_close(model.reg_loss, wanted)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_part_of_an_eager_model_records_too() -> None:
    model = rw.regularize(Inner(), {"body.fc1": L1(1.0, on="output")})
    model.body.compile(fullgraph=True, backend="aot_eager")
    x = batch()
    for _ in range(4):
        model(x)
        wanted = sum(model.body.fc1.forward(v).abs().sum() / 6 for v in (x, -x))
        torch.testing.assert_close(model.reg_loss, wanted)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_part_called_on_its_own_does_not_pile_up() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    part, counter = compiled(model.fc1)
    for seed in range(6):
        h = part(batch(seed))
        torch.testing.assert_close(model.reg_loss, h.abs().sum() / 6)
        model.reg_loss.backward()
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning")
def test_compiles_around_checkpoints_with_a_graph_break() -> None:
    model = rw.regularize(blocks(use_reentrant=False), RULES)
    plain = rw.regularize(blocks(), RULES)
    fast = torch.compile(model, backend="aot_eager")
    for each in (fast, plain):
        (each(batch()).sum() + rw.reg_loss(each)).backward()
    torch.testing.assert_close(model.reg_loss, plain.reg_loss)
    assert_same_grads(model, plain)


def test_export_in_training_leaves_nothing_behind() -> None:
    model = rw.regularize(mlp(), {"fc1": L1(1.0, on="output")})
    for strict in (False, True):
        program = torch.export.export(model, (batch(),), strict=strict)
        torch.testing.assert_close(program.module()(batch()), mlp()(batch()))
        assert type(model.reg_loss) is Tensor
        assert model.reg_loss == 0
    model(batch())
    assert model.reg_loss > 0


# ---- outputs of every form -------------------------------------------------------------------


@dataclasses.dataclass
class Plain:
    hidden: Tensor
    note: str = ""


@dataclasses.dataclass(slots=True)
class Slotted:
    hidden: Tensor


@dataclasses.dataclass
class Named(ModelOutput):
    loss: Tensor | None = None
    hidden: Tensor | None = None
    other: Tensor | None = None


FORMS: list[tuple[str, Any]] = [
    ("tuple", lambda y: (y, -2 * y)),
    ("list", lambda y: [y, -2 * y]),
    ("namedtuple", lambda y: Pair(y, -2 * y)),
    ("nested", lambda y: ((None, {"a": y}), -2 * y)),
    ("dict", lambda y: {"a": y, "b": -2 * y}),
    ("dataclass", lambda y: Plain(y)),
    ("slots", lambda y: Slotted(y)),
    ("model_output", lambda y: Named(hidden=y, other=-2 * y)),
]


class Shaped(nn.Module):
    def __init__(self, form: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.fc(x))


@pytest.mark.parametrize("form", [f for _, f in FORMS], ids=[n for n, _ in FORMS])
def test_takes_the_first_tensor(form: Any) -> None:
    model = rw.regularize(Shaped(form), {"": L1(1.0, on="output")})
    model(batch())
    torch.testing.assert_close(model.reg_loss, model.fc(batch()).abs().sum() / 6)


SELECTED = [
    (1, lambda y: (y, -2 * y)),
    (-1, lambda y: [y, -2 * y]),
    ("second", lambda y: Pair(y, -2 * y)),
    ("b", lambda y: {"a": y, "b": -2 * y}),
    (7, lambda y: {0: y, 7: -2 * y}),
    ("other", lambda y: Named(hidden=y, other=-2 * y)),
    (1, lambda y: Named(hidden=y, other=-2 * y)),
    (1, lambda y: (y, (-2 * y, y))),  # an LSTM's states
]


@pytest.mark.parametrize(("select", "form"), SELECTED, ids=[str(s) for s, _ in SELECTED])
def test_select_names_another(select: Any, form: Any) -> None:
    model = rw.regularize(Shaped(form), {"": L1(1.0, on="output", select=select)})
    model(batch())
    torch.testing.assert_close(model.reg_loss, 2 * model.fc(batch()).abs().sum() / 6)


REFUSED = [
    (None, lambda y: "text", "The output of Shaped has no tensor to penalise: it is str; name it"),
    (None, lambda y: (), "The output of Shaped has no tensor to penalise: it is tuple; name it"),
    (3, lambda y: (y,), "no tensor to penalise at select=3: it is tuple; name it with select=, a"),
    ("c", lambda y: {"a": y}, "no tensor to penalise at select='c': it is dict; name it"),
    ("count", lambda y: (y,), "no tensor to penalise at select='count': it is tuple; name it"),
    (0, lambda y: Plain(y), "no tensor to penalise at select=0: it is Plain; name it"),
    (
        None,
        lambda y: (y.argmax(1), y),
        "The output of Shaped has a tensor of torch.int64 to penalise, which has no gradient; name "
        "another with select=, a key or an index.",
    ),
]


@pytest.mark.parametrize(("select", "form", "message"), REFUSED)
def test_an_output_without_such_a_tensor_is_refused(select: Any, form: Any, message: str) -> None:
    model = rw.regularize(Shaped(form), {"": L1(1.0, on="output", select=select)})
    with pytest.raises(rw.PolicyError, match=re.escape(message)):
        model(batch())
    model.eval()(batch())  # in eval nothing is looked at


# ---- copies ----------------------------------------------------------------------------------


def _through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _through_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, _through_pickle, _through_save])
def test_a_copy_after_a_forward_starts_empty_and_records_alone(copied: Any) -> None:
    model = rw.regularize(mlp(), {"fc1": [L1(1.0, on="output"), L2(1.0, when="called")]})
    model(batch())
    before = model.reg_loss
    twin = copied(model)
    assert twin.reg_loss == 0
    twin(batch(5, 2))
    assert model.reg_loss == before
    wanted = rw.penalties(twin)
    torch.testing.assert_close(twin.reg_loss, sum(wanted.values()))
    assert twin.reg_loss > 0
    rw.unregularize(twin)
    assert not twin.fc1._forward_hooks
    model(batch())
    assert model.reg_loss == before


def test_undo_leaves_no_hook() -> None:
    model = rw.regularize(mlp(), {"": L1(1.0, on="output"), "fc1": L1(1.0, when="called")})
    model(batch())
    rw.unregularize(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called
        assert not [key for key in module.__dict__ if "regwrap" in key]


# ---- when="called" ---------------------------------------------------------------------------


class Experts(nn.Module):
    """A mixture whose router says which experts run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor, *chosen: int) -> Tensor:
        return x + sum((self.experts[i](x) for i in chosen), torch.zeros(()))


def hand(model: Experts, *chosen: int) -> Tensor:
    return sum((m.weight.square().sum() / 2 for m in (model.experts[i] for i in chosen)), _ZERO)


_ZERO = torch.zeros(())
CALLED = {"": L2(1.0, when="called")}


def test_experts_without_tokens_pay_nothing() -> None:
    model = rw.regularize(Experts(), CALLED)
    assert model.reg_loss == 0
    for chosen in ((0, 2), (1,), (), (3, 3, 3)):
        model(batch(), *chosen)
        torch.testing.assert_close(model.reg_loss, hand(model, *set(chosen)))
    model.reg_loss.backward()
    assert [e.weight.grad is not None for e in model.experts] == [False, False, False, True]


def test_the_value_of_a_called_weight_is_read_live() -> None:
    model = rw.regularize(Experts(), CALLED)
    model(batch(), 0)
    with torch.no_grad():
        model.experts[0].weight.mul_(3)
    torch.testing.assert_close(model.reg_loss, hand(model, 0))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [True, False])
def test_called_does_not_depend_on_mode_or_grad(context: Any, training: bool) -> None:
    model = rw.regularize(Experts(), CALLED).train(training)
    with context():
        model(batch(), 1)
    torch.testing.assert_close(model.reg_loss, hand(model, 1))


def test_layer_drop_pays_for_the_layers_that_ran() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            self.ran = [i for i in range(6) if torch.rand(()) > 0.5]
            for i in self.ran:
                x = self.layers[i](x)
            return x

    model = rw.regularize(Dropped(), CALLED)
    for seed in range(4):
        torch.manual_seed(seed)
        model(batch())
        wanted = sum((model.layers[i].weight.square().sum() / 2 for i in model.ran), _ZERO)
        torch.testing.assert_close(model.reg_loss, wanted)


def test_an_unused_head_pays_nothing() -> None:
    model = rw.regularize(Experts(), {"unused": L2(1.0, when="called"), "experts.0": L1(1.0)})
    model(batch(), 1)
    torch.testing.assert_close(model.reg_loss, model.experts[0].weight.abs().sum())
    assert rw.penalties(model)["unused.weight"] == 0


def test_a_tied_weight_counts_once_if_any_of_its_layers_ran() -> None:
    for chosen in ((0,), (1,), (0, 1)):
        model = Experts()
        model.experts[1].weight = model.experts[0].weight
        rw.regularize(model, CALLED)
        model(batch(), *chosen)
        torch.testing.assert_close(model.reg_loss, hand(model, 0))
        torch.testing.assert_close(rw.penalties(model)["experts.0.weight"], hand(model, 0))


def test_called_parts_of_a_bypassed_root_count_since_the_last_read() -> None:
    model = rw.regularize(Experts(), CALLED)
    model.experts[0](batch())
    torch.testing.assert_close(model.reg_loss, hand(model, 0))
    model.experts[1](batch())
    model.experts[2](batch())
    torch.testing.assert_close(model.reg_loss, hand(model, 1, 2))


def test_called_and_always_override_each_other() -> None:
    model = rw.regularize(Experts(), {"": L2(1.0, when="called"), "experts.0": L2(1.0)})
    model(batch(), 1)
    torch.testing.assert_close(model.reg_loss, hand(model, 0, 1))
    assert not model.experts[0]._forward_hooks


def test_an_l2sp_counts_when_called() -> None:
    model = rw.regularize(Experts(), {"": L2SP(2.0, when="called")})
    with torch.no_grad():
        for expert in model.experts:
            expert.weight.add_(1)
    model(batch(), 1, 2)
    torch.testing.assert_close(model.reg_loss, torch.tensor(32.0))


def test_a_parametrized_weight_counts_when_called() -> None:
    model = Experts()
    torch.nn.utils.parametrizations.weight_norm(model.experts[0])
    rw.regularize(model, {"": [L2(1.0, when="called"), DropConnect(0.5)]})
    model(batch(), 0, 1)
    model.eval()
    torch.testing.assert_close(model.reg_loss, hand(model, 0, 1))


def test_non_reentrant_checkpointing_marks_once() -> None:
    model = rw.regularize(blocks(use_reentrant=False), {"blocks.*": L2(0.3, when="called")})
    plain = rw.regularize(blocks(), {"blocks.*": L2(0.3)})
    for each in (model, plain):
        (each(batch()).sum() + each.reg_loss).backward()
    assert model.reg_loss == plain.reg_loss
    assert_same_grads(model, plain)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
def test_called_under_compile(training: bool) -> None:
    model = rw.regularize(Experts(), CALLED).train(training)
    fast, counter = compiled(model)
    for chosen in ((0, 2), (1,), (0, 2), (1,)):
        fast(batch(), *chosen)
        torch.testing.assert_close(model.reg_loss, hand(model, *chosen))
    assert counter.frame_count == 2  # one a choice


def test_a_module_that_is_never_called_is_refused() -> None:
    model = Experts()
    wanted = (
        "Rule ('experts': L2(1.0, on='output')) reaches only modules that are never called in "
        "Experts: they have no forward of their own, or a function uses their weights; name a "
        "module that runs."
    )
    with pytest.raises(rw.PolicyError, match=re.escape(wanted)):
        rw.regularize(model, {"experts": L2(1.0, on="output")})


def test_a_parameter_s_own_name_means_the_parameter_and_no_output() -> None:
    model = rw.regularize(
        nn.Sequential(nn.Linear(2, 3), nn.ReLU()), {"0.bias": L2(0.5, on="output")}
    )
    model(torch.ones(4, 2))
    want = 0.25 * model[0].bias.square().sum()
    assert list(rw.penalties(model)) == ["0.bias"]
    torch.testing.assert_close(rw.reg_loss(model), want)
    rw.regularize(model, {"0": L2(0.1, on="output"), "0.bias": L2(0.2)})
    model(torch.ones(4, 2))
    assert list(rw.penalties(model)) == ["0.bias", "0:output"]
