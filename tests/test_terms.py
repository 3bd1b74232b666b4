"""Terms are values: their numbers, their gradients, and what they say about themselves."""

from __future__ import annotations

import copy
import dataclasses
import fractions
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import regwrap as rw
from regwrap import L1, L2, L2SP, Dropout, ElasticNet, GroupLasso, Orthogonal, Penalty, WeightDecay

torch.set_num_threads(1)


class Holder(nn.Module):
    """A model that is one parameter."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def penalty(term: Any, weight: Tensor) -> tuple[Tensor, nn.Parameter]:
    """The term's `reg_loss` on a model of this one parameter, and the parameter."""
    model = rw.regularize(Holder(weight.clone()), {"weight": term})
    return rw.reg_loss(model), model.weight


def sum_of_squares(w: Tensor) -> Tensor:
    return w.square().sum()


def sum_of_fourth_powers(w: Tensor) -> Tensor:
    return w.square().square().sum()


REFERENCE = torch.linspace(-1, 1, 12).reshape(3, 4)


# ---- values, written a second time in float64 and plain loops ---------------------------------


def l1(w: np.ndarray, s: float) -> float:
    return s * float(np.abs(w).sum())


def l2(w: np.ndarray, s: float) -> float:
    return s / 2 * float((np.abs(w) ** 2).sum())


def group_lasso(w: np.ndarray, s: float, dim: int = 0, size: int = 1) -> float:
    units = np.moveaxis(w, dim, 0)
    groups = [units[i : i + size] for i in range(0, len(units), size)]
    return s * sum(math.sqrt(g.size) * math.sqrt((np.abs(g) ** 2).sum()) for g in groups)


def keras_orthogonal(w: np.ndarray, factor: float) -> float:
    """keras.regularizers.OrthogonalRegularizer(factor, mode="rows"), pair by pair."""
    rows = [row / max(math.sqrt((np.abs(row) ** 2).sum()), 1e-6) for row in w.reshape(len(w), -1)]
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    return factor * sum(abs(np.vdot(rows[i], rows[j])) for i, j in pairs) / max(len(pairs), 1)


def keras_l2(w: np.ndarray, s: float) -> float:
    """keras.regularizers.L2(s), which has no half."""
    return s * float((np.abs(w) ** 2).sum())


FORMULAS: list[tuple[Any, Callable[[np.ndarray], float]]] = [
    (L1(0.3), lambda w: l1(w, 0.3)),
    (L2(0.3), lambda w: l2(w, 0.3)),
    (L2(2 * 0.3), lambda w: keras_l2(w, 0.3)),
    (L1(0.1) + L2(0.2), lambda w: l1(w, 0.1) + l2(w, 0.2)),
    (ElasticNet(0.3, 0.25), lambda w: 0.3 * (0.25 * l1(w, 1) + 0.75 * l2(w, 1))),
    (GroupLasso(0.3), lambda w: group_lasso(w, 0.3)),
    (GroupLasso(0.3, 1), lambda w: group_lasso(w, 0.3, 1)),
    (GroupLasso(0.3, dim=-1, size=2), lambda w: group_lasso(w, 0.3, -1, 2)),
    (GroupLasso(0.3, dim=0, size=2), lambda w: group_lasso(w, 0.3, 0, 2)),
    (Orthogonal(0.3), lambda w: keras_orthogonal(w, 0.3)),
    (Penalty(sum_of_squares, 0.3), lambda w: 0.3 * float((w * w).sum())),
]
SHAPES = [(6, 4), (4, 2), (6, 3, 2), (2, 4, 3, 2)]
IDS = [str(term) for term, _ in FORMULAS]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("term", "formula"), FORMULAS, ids=IDS)
def test_values_against_float64_by_hand(term: Any, formula: Any, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.manual_seed(0))
    value, _ = penalty(term, weight)
    assert value.dtype == torch.float32
    assert value.shape == ()
    assert value.item() == pytest.approx(formula(weight.double().numpy()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("term", "formula"), FORMULAS[:-1], ids=IDS[:-1])
def test_values_in_other_precisions(term: Any, formula: Any, dtype: torch.dtype) -> None:
    weight = torch.randn((6, 4), generator=torch.manual_seed(0)).to(dtype)
    value, parameter = penalty(term, weight)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(formula(weight.double().numpy()), rel=1e-6)
    value.backward()
    assert parameter.grad is not None
    assert parameter.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(("term", "formula"), FORMULAS[:-1], ids=IDS[:-1])
def test_values_of_complex_weights_use_the_modulus(
    term: Any, formula: Any, dtype: torch.dtype
) -> None:
    weight = torch.randn((6, 4), generator=torch.manual_seed(0), dtype=dtype)
    value, parameter = penalty(term, weight)
    assert value.dtype == dtype.to_real()
    assert value.item() == pytest.approx(formula(weight.numpy()), rel=1e-6)
    value.backward()
    assert parameter.grad is not None
    assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("term", [L1(1.0), L2(1.0), GroupLasso(1.0), L2SP(1.0, {})])
def test_sums_do_not_overflow_half_precision(term: Any) -> None:
    weight = torch.full((64, 64), 300.0, dtype=torch.float16)
    if isinstance(term, L2SP):
        term = L2SP(1.0, {"weight": -weight})
    assert penalty(term, weight)[0].isfinite()


def test_l2sp_pulls_toward_its_reference() -> None:
    weight = torch.randn((3, 4), generator=torch.manual_seed(0))
    value, parameter = penalty(L2SP(0.3, {"weight": REFERENCE}), weight)
    apart = weight.double().numpy() - REFERENCE.double().numpy()
    assert value.item() == pytest.approx(l2(apart, 0.3), rel=1e-6)
    (gradient,) = torch.autograd.grad(value, parameter)
    torch.testing.assert_close(gradient, 0.3 * (weight - REFERENCE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
@pytest.mark.parametrize("of_reference", [torch.float16, torch.float32, torch.float64])
def test_l2sp_subtracts_in_the_wider_precision(
    dtype: torch.dtype, of_reference: torch.dtype
) -> None:
    weight = torch.randn((3, 4), generator=torch.manual_seed(0)).to(dtype)
    reference = (7 * REFERENCE).to(dtype if dtype.is_complex else of_reference)
    value, _ = penalty(L2SP(0.3, {"weight": reference}), weight)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    apart = (weight.to(wide) - reference.to(wide)).numpy()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(l2(apart, 0.3), rel=1e-6)


def test_elastic_net_is_scikit_learns_objective() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 5)), rng.normal(size=40)
    fit = linear_model.ElasticNet(alpha=0.1, l1_ratio=0.3, fit_intercept=False, tol=1e-12)
    weight = torch.tensor(fit.fit(x, y).coef_)[None]
    value, parameter = penalty(ElasticNet(0.1, 0.3), weight)
    loss = 0.5 * (torch.tensor(x) @ parameter[0] - torch.tensor(y)).square().mean()
    (gradient,) = torch.autograd.grad(loss + value, parameter)
    support = weight != 0
    assert 0 < support.sum() < 5 or support.all()
    assert gradient[support].abs().max() < 1e-6


@given(
    data=st.lists(st.floats(-10, 10, width=32), min_size=12, max_size=12),
    strength=st.floats(0, 5),
    dim=st.integers(-2, 1),
)
def test_values_for_any_numbers(data: list[float], strength: float, dim: int) -> None:
    weight = torch.tensor(data, dtype=torch.float64).reshape(3, 4)
    array = weight.numpy()
    for term, expected in [
        (L1(strength), l1(array, strength)),
        (L2(strength), l2(array, strength)),
        (GroupLasso(strength, dim), group_lasso(array, strength, dim)),
        (Orthogonal(strength), keras_orthogonal(array, strength)),
    ]:
        value, parameter = penalty(term, weight)
        assert value.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        (gradient,) = torch.autograd.grad(value, parameter)
        assert gradient.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("term", "formula"),
    [
        (L1(1.0), lambda w: w.abs().sum()),
        (L2(1.0), lambda w: w.square().sum() / 2),
        (
            GroupLasso(1.0),
            lambda w: math.sqrt(w.shape[1]) * w.square().sum(1).sqrt().sum(),
        ),
        (
            GroupLasso(1.0, size=100),
            lambda w: math.sqrt(w.numel()) * w.square().sum().sqrt(),
        ),
        (L2SP(1.0, {"weight": torch.full((1, 1), 0.01).expand(100, 1_000_000)}), None),
    ],
    ids=["L1", "L2", "groups", "one group", "L2SP"],
)
def test_accuracy_on_1e8_elements(term: Any, formula: Any) -> None:
    weight = 0.02 * torch.randn(100, 1_000_000, generator=torch.manual_seed(0)) + 0.01
    value, _ = penalty(term, weight)
    wide = weight.double()
    del weight
    expected = (wide - 0.01).square().sum() / 2 if formula is None else formula(wide)
    rel = 1e-6 if formula else 3e-6  # 0.01 is no float32
    assert value.item() == pytest.approx(float(expected), rel=rel)


# ---- gradients -----------------------------------------------------------------------------------

DIFFERENTIABLE = [
    L1(0.3),
    L2(0.3),
    GroupLasso(0.3, dim=1, size=2),
    Orthogonal(0.3),
    L2SP(0.3, {"weight": REFERENCE.double()}),
    Penalty(sum_of_fourth_powers, 0.3),
]


@pytest.mark.parametrize("kind", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("term", DIFFERENTIABLE, ids=lambda t: type(t).__name__)
def test_gradients_and_second_derivatives(term: Any, kind: torch.dtype) -> None:
    if kind.is_complex and isinstance(term, (Penalty, L2SP)):
        pytest.skip("the function and the reference are real")
    model = rw.regularize(
        Holder(torch.randn((3, 4), generator=torch.manual_seed(0), dtype=kind)), {"weight": term}
    )

    def reg_loss_at(weight: Tensor) -> Tensor:
        with torch.no_grad():
            model.weight.copy_(weight)
        return rw.reg_loss(model)

    def numeric(direction: Tensor, eps: float = 1e-6) -> float:
        high, low = reg_loss_at(at + eps * direction), reg_loss_at(at - eps * direction)
        return (high - low).item() / (2 * eps)

    def gradient() -> Tensor:
        return torch.autograd.grad(rw.reg_loss(model), model.weight, create_graph=True)[0]

    at = model.weight.detach().clone()
    direction = torch.randn((3, 4), generator=torch.manual_seed(1), dtype=kind)
    exact = gradient()
    along = (exact.conj() * direction).real.sum()
    (second,) = torch.autograd.grad(along, model.weight)
    assert numeric(direction) == pytest.approx(along.item(), rel=1e-6, abs=1e-8)
    # the second derivative along the direction, from two gradients
    reg_loss_at(at + 1e-6 * direction)
    high = gradient()
    reg_loss_at(at - 1e-6 * direction)
    torch.testing.assert_close(second, (high - gradient()).detach() / 2e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("term", "expected"),
    [
        (L1(0.3), lambda w: 0.3 * w.sign()),
        (L2(0.3), lambda w: 0.3 * w),
        (ElasticNet(0.4, 0.25), lambda w: 0.1 * w.sign() + 0.3 * w),
        (GroupLasso(0.3), lambda w: 0.3 * math.sqrt(4) * w / w.norm(dim=1, keepdim=True)),
    ],
    ids=["L1", "L2", "ElasticNet", "GroupLasso"],
)
def test_gradients_are_the_documented_formulas(term: Any, expected: Any) -> None:
    weight = torch.randn((3, 4), generator=torch.manual_seed(0))
    value, parameter = penalty(term, weight)
    value.backward()
    torch.testing.assert_close(parameter.grad, expected(weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
@pytest.mark.parametrize("term", [L1(1.0), L2(1.0), GroupLasso(1.0), Orthogonal(1.0)], ids=repr)
def test_zero_weights_have_zero_gradients_of_every_order(term: Any, dtype: torch.dtype) -> None:
    value, parameter = penalty(term, torch.zeros((4, 3), dtype=dtype))
    (first,) = torch.autograd.grad(value, parameter, create_graph=True)
    (second,) = torch.autograd.grad(first.abs().sum(), parameter, allow_unused=True)
    assert value == 0
    assert (first == 0).all()
    assert second is None or second.isfinite().all()


def test_only_the_zero_group_has_a_zero_gradient() -> None:
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    value, parameter = penalty(GroupLasso(1.0), weight)
    value.backward()
    expected = math.sqrt(2) * torch.tensor([[0.0, 0.0], [0.6, 0.8]])
    torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize("term", [L1(1.0), L2(1.0), GroupLasso(1.0), Orthogonal(1.0)], ids=repr)
def test_a_weight_that_is_nan_is_not_hidden(term: Any) -> None:
    weight = torch.ones((3, 2))
    weight[0, 0] = math.nan
    assert penalty(term, weight)[0].isnan()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("term", [L1(1.0), L2(1.0), GroupLasso(1.0), Orthogonal(1.0)], ids=repr)
def test_a_weight_without_elements_costs_nothing(term: Any, shape: tuple[int, ...]) -> None:
    assert penalty(term, torch.zeros(shape))[0] == 0


def test_orthogonal_of_a_single_row_is_zero_and_of_orthogonal_rows_too() -> None:
    assert penalty(Orthogonal(1.0), torch.randn(1, 5))[0] == 0
    assert penalty(Orthogonal(1.0), 3 * torch.eye(4))[0] == 0
    assert penalty(Orthogonal(2.0), torch.ones(4, 3))[0].item() == pytest.approx(2)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(6, 4).t(),
        torch.randn(2, 4, 3, 2).to(memory_format=torch.channels_last),
        torch.randn(8, 8)[::2, 1::3],
    ],
    ids=["transposed", "channels_last", "strided view"],
)
@pytest.mark.parametrize(("term", "formula"), FORMULAS[:7], ids=IDS[:7])
def test_memory_layout_does_not_matter(term: Any, formula: Any, weight: Tensor) -> None:
    model = Holder(torch.empty(0))
    model.weight = nn.Parameter(weight.detach())
    value = rw.regularize(model, {"weight": term}).reg_loss
    assert value.item() == pytest.approx(formula(weight.double().numpy()), rel=1e-6)
    value.backward()
    assert model.weight.grad is not None


# ---- terms as values -----------------------------------------------------------------------------

TERMS = [
    (L1(1e-5), "L1(1e-05)"),
    (L1(1e-5, on="all"), "L1(1e-05, on='all')"),
    (L1(0.1, when="called", solver="hadamard"), "L1(0.1, when='called', solver='hadamard')"),
    (L2(1e-4), "L2(0.0001)"),
    (L2(strength=0, on=["weight", "gain"]), "L2(0.0, on=('weight', 'gain'))"),
    (GroupLasso(0.1), "GroupLasso(0.1)"),
    (GroupLasso(0.1, 1, 64), "GroupLasso(0.1, dim=1, size=64)"),
    (Orthogonal(0.1, on="weight_hh_l0"), "Orthogonal(0.1, on='weight_hh_l0')"),
    (L2SP(0.1), "L2SP(0.1)"),
    (L2SP(0.1, on="bias", when="called"), "L2SP(0.1, on='bias', when='called')"),
    (WeightDecay(0.01), "WeightDecay(0.01)"),
    (WeightDecay(rate=0.01, on="bias"), "WeightDecay(0.01, on='bias')"),
    (Dropout(0.1), "Dropout(0.1)"),
    (Dropout(0.1, at="activation"), "Dropout(0.1, at='activation')"),
    (Dropout(0.1, kind=nn.AlphaDropout), "Dropout(0.1, kind=torch.nn.AlphaDropout)"),
]
PLAIN = [term for term, _ in TERMS]


@pytest.mark.parametrize(("term", "shown"), TERMS, ids=[shown for _, shown in TERMS])
def test_repr_can_be_evaluated(term: Any, shown: str) -> None:
    assert repr(term) == shown
    again = eval(shown, {**vars(rw), "torch": torch})
    assert again == term
    assert hash(again) == hash(term)
    assert again is not term


@pytest.mark.parametrize("term", PLAIN, ids=repr)
def test_terms_are_values(term: Any) -> None:
    for other in (copy.copy(term), copy.deepcopy(term), pickle.loads(pickle.dumps(term))):
        assert other == term
        assert hash(other) == hash(term)
        assert repr(other) == repr(term)
    for field in dataclasses.fields(term):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(term, field.name, 0.5)
    assert dataclasses.replace(term) == term
    assert term != 5
    assert term != repr(term)


def test_terms_differ_by_class_and_by_every_argument() -> None:
    assert len(set(PLAIN)) == len(PLAIN)
    assert L1(0.1) != L2(0.1)
    assert L2(1) == L2(1.0) == L2(fractions.Fraction(1)) == L2(np.float64(1))
    assert type(L2(np.float32(0.5)).strength) is float


def test_plus_lists_terms() -> None:
    a, b, c = L1(0.1), L2(0.2), Dropout(0.3)
    assert a + b == (a, b)
    assert a + b + c == (a, b, c)
    assert a + (b + c) == (a, b, c)
    assert ElasticNet(0.1, 0.5) + c == (L1(0.05), L2(0.05), c)
    assert c + ElasticNet(0.1, 0.5) == (c, L1(0.05), L2(0.05))
    for other in (1, "x", None, (1,), [b]):
        with pytest.raises(TypeError):
            a + other  # type: ignore[operator]
        with pytest.raises(TypeError):
            other + a  # type: ignore[operator]


def test_elastic_net_is_an_l1_and_an_l2() -> None:
    assert ElasticNet(0.2, 0.25, on="all", when="called") == (
        L1(0.05, on="all", when="called"),
        L2(0.15000000000000002, on="all", when="called"),
    )
    assert ElasticNet(strength=0.2, l1_ratio=1) == (L1(0.2), L2(0.0))


def test_penalties_and_references_compare_by_identity() -> None:
    assert Penalty(sum_of_squares, 0.1) == Penalty(fn=sum_of_squares, strength=0.1)
    assert Penalty(sum_of_squares, 0.1) != Penalty(sum_of_fourth_powers, 0.1, name="sum_of_squares")
    assert repr(Penalty(sum_of_squares, 0.1)) == (
        "Penalty(sum_of_squares, 0.1, name='sum_of_squares')"
    )
    state = {"weight": REFERENCE}
    assert L2SP(0.1, state) == L2SP(0.1, reference=state)
    assert L2SP(0.1, state) != L2SP(0.1, dict(state))
    assert len({L2SP(0.1, state), L2SP(0.1, state), L2SP(0.1)}) == 2
    assert "reference=<dict>" in repr(L2SP(0.1, state, on="all"))


def test_a_penalty_is_as_picklable_as_its_function() -> None:
    term = Penalty(sum_of_squares, 0.1, name="mine", on="all")
    assert pickle.loads(pickle.dumps(term)) == term
    with pytest.raises(rw.PolicyError, match="define the function at the top level of a module"):
        pickle.dumps(Penalty(lambda w: w.sum(), 0.1))


def test_a_penalty_may_be_any_callable() -> None:
    class Norm:
        def __call__(self, w: Tensor) -> Tensor:
            return w.norm()

    assert Penalty(Norm(), 0.1).name == "Norm"
    assert penalty(Penalty(Norm(), 0.5), torch.tensor([[3.0, 4.0]]))[0].item() == 2.5
    assert penalty(Penalty(lambda w: w.abs().amax(0), 2), torch.tensor([[3.0]]))[0].item() == 6


@given(st.floats(0, 1e6), st.sampled_from(["weight", "all", "bias", ("a", "b"), "gain"]))
def test_repr_round_trips_for_any_strength(strength: float, on: Any) -> None:
    for term in (L1(strength, on=on), L2(strength, on=on), WeightDecay(strength, on=on)):
        assert eval(repr(term), vars(rw)) == term


# ---- what is refused, with the value in the text -----------------------------------------------

NUMBERS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("L1", "strength", L1),
    ("L2", "strength", L2),
    ("GroupLasso", "strength", GroupLasso),
    ("Orthogonal", "strength", Orthogonal),
    ("L2SP", "strength", L2SP),
    ("Penalty", "strength", lambda value: Penalty(sum_of_squares, value)),
    ("WeightDecay", "rate", WeightDecay),
    ("ElasticNet", "strength", lambda value: ElasticNet(value, 0.5)),
    ("ElasticNet", "l1_ratio", lambda value: ElasticNet(0.5, value)),
    ("Dropout", "p", Dropout),
]
number_ids = [f"{name}.{argument}" for name, argument, _ in NUMBERS]


@pytest.mark.parametrize("value", [-1e-9, -1, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(("name", "argument", "make"), NUMBERS, ids=number_ids)
def test_numbers_out_of_range(name: str, argument: str, make: Any, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        make(value)
    wanted = "a number in [0, 1)" if name == "Dropout" else "a finite number >= 0"
    assert str(error.value) == f"{name}: {argument} must be {wanted}, not {value!r}."


@pytest.mark.parametrize(
    "value", [True, False, "0.1", None, [0.1], 1j, torch.tensor(0.1), L2, np.bool_(True)], ids=repr
)
@pytest.mark.parametrize(("name", "argument", "make"), NUMBERS, ids=number_ids)
def test_numbers_that_are_none(name: str, argument: str, make: Any, value: Any) -> None:
    with pytest.raises(TypeError) as error:
        make(value)
    wanted = "a number in [0, 1)" if name == "Dropout" else "a finite number >= 0"
    told = f"{value!r} of type {type(value).__name__}"
    assert str(error.value) == f"{name}: {argument} must be {wanted}, not {told}."


def test_an_integer_that_no_float_holds_is_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"L2: strength must be a finite number >= 0, not 1000"):
        L2(10**400)


@pytest.mark.parametrize(("name", "argument", "make"), NUMBERS, ids=number_ids)
def test_zero_is_where_a_sweep_starts(name: str, argument: str, make: Any) -> None:
    make(0)
    make(0.0)


ON = "'weight', 'bias', 'all', 'output', a parameter's own name or a tuple of names"
PLAIN_NAME = "write 'weight' or a parameter's own name without dots"


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: Dropout(1), ValueError, "Dropout: p must be a number in [0, 1), not 1."),
        (lambda: Dropout(1.5), ValueError, "Dropout: p must be a number in [0, 1), not 1.5."),
        (
            lambda: ElasticNet(0.1, 1.5),
            ValueError,
            "ElasticNet: l1_ratio must be a number in [0, 1], not 1.5.",
        ),
        (lambda: L1(0.1, on=3), TypeError, f"L1: on must be {ON}, not 3."),
        (lambda: L1(0.1, on=None), TypeError, f"L1: on must be {ON}, not None."),
        (lambda: L2(0.1, on=("a", 1)), TypeError, f"L2: on must be {ON}, not ('a', 1)."),
        (lambda: L2(0.1, on=()), ValueError, "L2: on must name at least one parameter, not ()."),
        (lambda: L2(0.1, on=""), ValueError, "L2: on must name at least one parameter, not ''."),
        (
            lambda: L2(0.1, on="fc.weight"),
            ValueError,
            f"L2: on='fc.weight' is not possible here; {PLAIN_NAME}.",
        ),
        (
            lambda: L2(0.1, on=("weight", "output")),
            ValueError,
            f"L2: on='output' is not possible here; {PLAIN_NAME}.",
        ),
        (
            lambda: L2(0.1, on=["all"]),
            ValueError,
            f"L2: on='all' is not possible here; {PLAIN_NAME}.",
        ),
        *(
            (
                lambda term=term, on=on: term(0.1, on=on),
                ValueError,
                f"{term.__name__}: on={on!r} is not possible here; {PLAIN_NAME}.",
            )
            for term, on in [
                (GroupLasso, "all"),
                (GroupLasso, "output"),
                (Orthogonal, "all"),
                (Orthogonal, "output"),
                (L2SP, "output"),
                (WeightDecay, "output"),
            ]
        ),
        (
            lambda: L1(0.1, when="sometimes"),
            ValueError,
            "L1: when must be one of ('always', 'called'), not 'sometimes'.",
        ),
        (
            lambda: L2(0.1, when=True),
            TypeError,
            "L2: when must be one of ('always', 'called'), not True.",
        ),
        (
            lambda: L1(0.1, solver="lars"),
            ValueError,
            "L1: solver must be one of ('hadamard',), not 'lars'.",
        ),
        (
            lambda: GroupLasso(0.1, dim=0.5),
            TypeError,
            "GroupLasso: dim must be an integer, not 0.5 of type float.",
        ),
        (
            lambda: GroupLasso(0.1, size=0),
            ValueError,
            "GroupLasso: size must be an integer >= 1, not 0.",
        ),
        (
            lambda: GroupLasso(0.1, size=True),
            TypeError,
            "GroupLasso: size must be an integer >= 1, not True of type bool.",
        ),
        (
            lambda: L2SP(0.1, reference=3),
            TypeError,
            "L2SP: reference must be None, a mapping such as a state_dict, or a model, not 3.",
        ),
        (
            lambda: Penalty("norm", 0.1),
            TypeError,
            "Penalty: fn must be a callable tensor -> scalar, not 'norm'.",
        ),
        (
            lambda: Penalty(sum_of_squares, 0.1, name=3),
            TypeError,
            "Penalty: name must be a string, not 3.",
        ),
        (
            lambda: Dropout(0.1, at="side"),
            ValueError,
            "Dropout: at must be one of ('output', 'activation', 'input'), not 'side'.",
        ),
        (
            lambda: Dropout(0.1, kind=nn.Dropout()),
            TypeError,
            "Dropout: kind must be a class of nn.Module, not Dropout(p=0.5, inplace=False).",
        ),
        (
            lambda: Dropout(0.1, kind=float),
            TypeError,
            "Dropout: kind must be a class of nn.Module, not <class 'float'>.",
        ),
    ],
)
def test_bad_arguments(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as error:
        make()
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("fn", "told"),
    [
        (lambda w: w, "a float32 of shape (2, 2)"),
        (lambda w: None, "None"),
        (lambda w: w.sum().item(), "4.0"),
        (lambda w: w.sum() * 1j, "a complex64 of shape ()"),
    ],
)
def test_a_penalty_that_returns_no_number(fn: Any, told: str) -> None:
    term = Penalty(fn, 0.1, name="mine")
    with pytest.raises(rw.PolicyError) as error:
        penalty(term, torch.ones(2, 2))
    assert str(error.value) == (
        f"{term!r}: its function must return a single real number as a tensor, not {told}."
    )
