"""The fast path against float64, against the plain sums, and wherever PyTorch takes a function."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from regwrap import fastpath
from regwrap.fastpath import applies, penalty_sum, plain_l1, plain_l2

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from penalty import (
    CASES,
    STRENGTHS,
    by_hand,
    by_regwrap,
    footprint,
    gpt2,
    holders,
    operations,
    resnet50,
    weights,
)

torch.set_num_threads(1)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# torch's own decompositions for forward-mode are scripted
scripted = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

L1, L2 = 0.3, 0.7


def exact(w: Tensor, l1: float = L1, l2: float = L2) -> float:
    """The penalty of one tensor in float64."""
    w = w.detach().to(torch.complex128 if w.is_complex() else torch.float64)
    return l1 * w.abs().sum().item() + l2 / 2 * (w.abs() ** 2).sum().item()


def penalty(*ws: Tensor) -> Tensor:
    return penalty_sum(ws, [L1] * len(ws), [L2] * len(ws))


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def six(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Enough for a bucket."""
    return tensors(*[(3, 2)] * 6, dtype=dtype)


class Calls:
    """How often the two Functions ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for name in ("_sum_of_abs", "_half_sum_of_squares"):
            self._count(monkeypatch, name)

    def _count(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        function = getattr(fastpath, name)

        def counted(*args: Tensor) -> Tensor:
            self.count += 1
            return function(*args)

        monkeypatch.setattr(fastpath, name, counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


# ---- values and gradients ----------------------------------------------------------------------

FAR = 1 << 20  # a bucket

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one small": [(3, 2)],
    "one large": [(600, 500)],
    "one of several buckets": [(2 * FAR + 77,)],
    "many small": [(7, 5)] * 300,
    "vectors": [(16,)] * 200,
    "more tensors than a bucket takes": [(1,)] * 129,
    "no dimension": [()] * 9,
    "no elements": [(0,), (4, 0, 2), (0,), (0,), (0,)],
    "nothing beside something": [(0,), (3, 2), (), (0, 5), (7,)],
    "every size": [(), (5,), (40, 50), (300, 200), (2, 3, 4, 5), (1000, 300), (1100, 1000), (0,)],
    "around the limits": [(n + d,) for n in (1 << 12, 1 << 18) for d in (-1, 0, 1)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
def test_value_and_gradient(shapes: list[tuple[int, ...]], strengths: tuple[float, float]) -> None:
    l1, l2 = (1e4 * s for s in strengths)
    ws = tensors(*shapes)
    value = penalty_sum(ws, [l1] * len(ws), [l2] * len(ws))
    value.backward()
    assert value.shape == () and value.dtype is torch.float32
    assert value.item() == pytest.approx(sum(exact(w, l1, l2) for w in ws), rel=1e-6)
    for w in ws:
        torch.testing.assert_close(w.grad, l1 * w.detach().sign() + l2 * w.detach())


def channels_last() -> Tensor:
    return torch.randn(8, 3, 5, 5).to(memory_format=torch.channels_last)


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(30, 20).t(),
    "channels_last": channels_last,
    "permuted": lambda: torch.randn(4, 5, 6).permute(2, 0, 1),
    "every second column": lambda: torch.randn(30, 20)[:, ::2],
    "every second element": lambda: torch.randn(60)[::2],
    "expanded": lambda: torch.randn(1, 20).expand(30, 20),
    "overlapping": lambda: torch.randn(40).as_strided((30, 10), (1, 1)),
    "sizes of one": lambda: torch.randn(5, 1, 4)[:, :, 1:2],
    "large and transposed": lambda: torch.randn(700, 601).t(),
    "large, every second": lambda: torch.randn(600_001)[::2],
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout(make: Callable[[], Tensor], calls: Calls) -> None:
    torch.manual_seed(0)
    ws = [make().detach().requires_grad_() for _ in range(6)]
    value = penalty(*ws)
    assert calls.count >= 2
    assert value.item() == pytest.approx(sum(map(exact, ws)), rel=1e-6)
    grads = torch.autograd.grad(value, ws)
    for w, g in zip(ws, grads, strict=True):
        torch.testing.assert_close(g, L1 * w.detach().sign() + L2 * w.detach())


def test_a_dense_tensor_is_not_copied() -> None:
    for make in (LAYOUTS["transposed"], LAYOUTS["permuted"], channels_last):
        w = make()
        assert fastpath._flat(w).data_ptr() == w.data_ptr()


def test_gradients_lie_like_their_weights_in_memory_of_their_own() -> None:
    ws = [nn.Parameter(channels_last()) for _ in range(6)]
    penalty(*ws).backward()
    assert all(w.grad is not None and w.grad.stride() == w.stride() for w in ws)
    pointers = {w.untyped_storage().data_ptr() for w in ws}
    pointers |= {w.grad.untyped_storage().data_ptr() for w in ws if w.grad is not None}
    assert len(pointers) == 12


def test_gradients_are_added_to_those_that_exist() -> None:
    ws = six()
    for w in ws:
        w.grad = torch.ones_like(w)
    value = penalty(*ws)
    value.backward(retain_graph=True)
    value.backward()
    for w in ws:
        torch.testing.assert_close(w.grad, 1 + 2 * (L1 * w.detach().sign() + L2 * w.detach()))


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.7, 1 / 3, 0.02, 3.3])
@pytest.mark.parametrize("elements", [1 << 17, 1 << 18, 3_000_001])
def test_equal_weights_add_up_exactly(weight: float, elements: int) -> None:
    # The hardest case: every rounding errs to the same side. Rows of 4,608 are off by 6e-6.
    w = torch.full((elements,), weight)
    ws = [w, w.clone()]
    for l1, l2 in STRENGTHS.values():
        value = penalty_sum(ws, [l1, l1], [l2, l2]).item()
        assert value == pytest.approx(2 * exact(w, l1, l2), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["normal", "equal"])
def test_a_hundred_million_elements(fill: str) -> None:
    torch.manual_seed(0)
    w = torch.randn(10**8) if fill == "normal" else torch.full((10**8,), 0.1)
    for l1, l2 in STRENGTHS.values():
        expected = sum(exact(part, l1, l2) for part in w.split(10**7))
        assert penalty_sum([w], [l1], [l2]).item() == pytest.approx(expected, rel=1e-6)


# ---- strengths ---------------------------------------------------------------------------------


def test_strength_zero_leaves_a_tensor_unread() -> None:
    ws = tensors((3, 2), (3, 2), (3, 2))
    with torch.no_grad():
        ws[1].fill_(math.inf)
    value = penalty_sum(ws, [L1, 0.0, 0.0], [0, 0, L2])
    assert value.item() == pytest.approx(exact(ws[0], L1, 0) + exact(ws[2], 0, L2), rel=1e-6)
    value.backward()
    assert ws[1].grad is None
    nothing = penalty_sum(ws, [0.0] * 3, [0.0] * 3)
    assert nothing.item() == 0 and not nothing.requires_grad


def test_no_tensors_at_all() -> None:
    value = penalty_sum([], [], [])
    assert value.item() == 0 and value.dtype is torch.float32


def test_as_many_strengths_as_tensors() -> None:
    with pytest.raises(ValueError, match="zip"):
        penalty_sum(six(), [L1], [L2])


def test_every_tensor_its_own_strength() -> None:
    ws = tensors(*[(40, 3)] * 20, *[(600, 500)] * 2)
    l1 = [0.1 * i for i in range(len(ws))]
    l2 = [0.05 * (i % 3) for i in range(len(ws))]
    value = penalty_sum(ws, l1, l2)
    expected = sum(exact(w, a, b) for w, a, b in zip(ws, l1, l2, strict=True))
    assert value.item() == pytest.approx(expected, rel=1e-6)
    value.backward()
    for w, a, b in zip(ws[1:], l1[1:], l2[1:], strict=True):
        torch.testing.assert_close(w.grad, a * w.detach().sign() + b * w.detach())


def test_a_strength_may_be_a_tensor(calls: Calls) -> None:
    ws = six()
    l1, l2 = torch.tensor(L1, requires_grad=True), torch.tensor(L2)
    value = penalty_sum(ws, [l1] * 6, [l2] * 6)
    assert calls.count == 2, "one bucket each: the strength is the same tensor"
    torch.testing.assert_close(value, penalty(*ws))
    value.backward()
    assert l1.grad is not None
    assert l1.grad.item() == pytest.approx(sum(exact(w, 1, 0) for w in ws), rel=1e-6)
    with torch.no_grad():
        l2.zero_()
    assert penalty_sum(ws, [l1] * 6, [l2] * 6).item() == pytest.approx(
        sum(exact(w, L1, 0) for w in ws), rel=1e-6
    )


# ---- numbers that are none ---------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 2), (600, 500)])
def test_a_bad_weight_stays_in_its_own_gradient(bad: float, shape: tuple[int, ...]) -> None:
    ws = tensors(*[shape] * 6)
    clean = [w.detach().clone() for w in ws]
    with torch.no_grad():
        ws[2].view(-1)[1] = bad
    value = penalty(*ws)
    value.backward()
    assert not value.isfinite()
    for i, (w, old) in enumerate(zip(ws, clean, strict=True)):
        assert w.grad is not None
        expected = L1 * old.sign() + L2 * old
        if i == 2:
            # sign(NaN) is 0 in PyTorch, so that only L2 shows a NaN
            assert w.grad.view(-1)[1].isnan() if math.isnan(bad) else w.grad.view(-1)[1] == bad
            w.grad.view(-1)[1] = expected.view(-1)[1]
        torch.testing.assert_close(w.grad, expected)


def test_a_weight_of_zero_has_no_l1_gradient() -> None:
    ws = [torch.zeros(3, 2, requires_grad=True) for _ in range(6)]
    penalty(*ws).backward()
    assert all(w.grad is not None and not w.grad.any() for w in ws)


# ---- dtypes and devices ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(30, 20), (600, 500)])
def test_half_precision_adds_up_in_float32(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ws = tensors(*[shape] * 5, dtype=dtype)
    with torch.no_grad():
        ws[0].fill_(300.0)  # its square is infinite in float16, and so are the sums
    value = penalty(*ws)
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(sum(map(exact, ws)), rel=1e-6)
    value.backward()
    for w in ws:
        assert w.grad is not None and w.grad.dtype is dtype
        expected = (L1 * w.detach().double().sign() + L2 * w.detach().double()).to(dtype)
        torch.testing.assert_close(w.grad, expected)


def test_the_widest_weight_decides() -> None:
    ws = [*six(torch.float64), *six(torch.float32), *six(torch.bfloat16)]
    value = penalty(*ws)
    assert value.dtype is torch.float64
    assert value.item() == pytest.approx(sum(map(exact, ws)), rel=1e-6)
    assert penalty(*six(torch.float64)).item() == pytest.approx(
        sum(map(exact, six(torch.float64))), rel=1e-14
    )


def test_complex_weights() -> None:
    w = torch.randn(4, 3, dtype=torch.complex64).requires_grad_()
    assert not applies(w)
    value = penalty(w, *six())
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(exact(w) + sum(map(exact, six())), rel=1e-6)
    value.backward()
    torch.testing.assert_close(w.grad, L1 * w.detach().sgn() + L2 * w.detach())


def test_sparse_weights() -> None:
    w = torch.eye(4).to_sparse().requires_grad_()
    assert not applies(w)
    value = penalty(w)
    assert value.item() == pytest.approx(4 * (L1 + L2 / 2))
    value.backward()
    assert w.grad is not None
    torch.testing.assert_close(w.grad.to_dense(), (L1 + L2) * torch.eye(4))


def test_meta_weights() -> None:
    ws = [torch.empty(3, 2, device="meta") for _ in range(6)]
    assert not applies(ws[0])
    assert penalty(*ws).device.type == "meta"


def test_subclasses_take_the_plain_sums(calls: Calls) -> None:
    class Named(Tensor):
        pass

    ws = [w.detach().as_subclass(Named).requires_grad_() for w in six()]
    assert not any(map(applies, ws))
    assert penalty(*ws).item() == pytest.approx(sum(map(exact, six())), rel=1e-6)
    assert calls.count == 0
    assert applies(nn.Parameter(six()[0].detach())) and applies(six()[0])


@needs_gpu
def test_on_a_gpu() -> None:
    ws = [w.detach().cuda().requires_grad_() for w in tensors(*SHAPES["every size"], *[(3, 2)] * 9)]
    value = penalty(*ws)
    assert value.is_cuda
    assert value.item() == pytest.approx(sum(map(exact, ws)), rel=1e-6)
    value.backward()
    for w in ws:
        torch.testing.assert_close(w.grad, L1 * w.detach().sign() + L2 * w.detach())
    both = penalty(*six(), *ws)
    assert not both.is_cuda
    assert both.item() == pytest.approx(sum(map(exact, [*six(), *ws])), rel=1e-6)


# ---- the same as the plain sums ----------------------------------------------------------------


def test_the_oracle() -> None:
    for w in (*six(), *six(torch.float16), torch.randn(3, dtype=torch.complex64)):
        assert plain_l1(w).item() == pytest.approx(exact(w, 1, 0), rel=1e-6)
        assert plain_l2(w).item() == pytest.approx(exact(w, 0, 2), rel=1e-6)


@pytest.mark.parametrize("shapes", [*SHAPES.values(), resnet50()[:40]], ids=[*SHAPES, "ResNet"])
def test_with_and_without(shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    quick, slow = tensors(*shapes), tensors(*shapes)
    a = penalty(*quick)
    a.backward()
    monkeypatch.setattr(fastpath, "_eager", lambda: False)
    b = penalty(*slow)
    b.backward()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for w, v in zip(quick, slow, strict=True):
        torch.testing.assert_close(w.grad, v.grad)


@pytest.mark.parametrize("shapes", [*SHAPES.values(), *CASES.values()], ids=[*SHAPES, *CASES])
def test_buckets(shapes: list[tuple[int, ...]]) -> None:
    ws = [torch.empty(s, device="meta") for s in shapes]
    buckets = list(fastpath._buckets(ws))
    assert sorted(id(w) for _, bucket in buckets for w in bucket) == sorted(map(id, ws))
    for elements, bucket in buckets:
        assert elements == sum(w.numel() for w in bucket)
        assert len(bucket) <= 128
        assert elements <= 1 << 20 or len(bucket) == 1


# ---- wherever PyTorch takes a function ---------------------------------------------------------


@scripted
def test_gradcheck() -> None:
    ws = tensors(*[(2, 2)] * 5, dtype=torch.float64)
    assert gradcheck(penalty, ws, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(penalty, ws, check_fwd_over_rev=True, check_batched_grad=True)


def test_double_backward(calls: Calls) -> None:
    ws = six()
    first = torch.autograd.grad(penalty(*ws), ws, create_graph=True)
    assert calls.count == 2
    sum(g.square().sum() for g in first).backward()  # type: ignore[union-attr]
    for w in ws:
        g = L1 * w.detach().sign() + L2 * w.detach()
        torch.testing.assert_close(w.grad, 2 * L2 * g)


def test_batched_gradients(calls: Calls) -> None:
    ws = six()
    scales = torch.tensor([1.0, 2.0])
    grads = torch.autograd.grad(penalty(*ws), ws, scales, is_grads_batched=True)
    assert calls.count == 2
    for w, g in zip(ws, grads, strict=True):
        torch.testing.assert_close(g[1], 2 * (L1 * w.detach().sign() + L2 * w.detach()))


def test_vmap_over_stacked_parameters() -> None:
    models = [six() for _ in range(3)]
    for i, ws in enumerate(models):
        for w in ws:
            w.data *= i
    stacked = [torch.stack(list(column)) for column in zip(*models, strict=True)]
    values = torch.func.vmap(penalty)(*stacked)
    torch.testing.assert_close(values, torch.stack([penalty(*ws) for ws in models]))


def test_inside_vmap_beside_it() -> None:
    ws = six()
    values = torch.func.vmap(lambda x: x * penalty(*ws))(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(values[1], 2 * penalty(*ws))


class Stack(nn.Module):
    """Adds the penalty of its own parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).sum() + penalty(*self.parameters())


def test_functional_call_and_grad(calls: Calls) -> None:
    model, x = Stack(), torch.ones(2, 4)
    plain = {name: p.detach() * 2 for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, x)

    other = copy.deepcopy(model)
    other.load_state_dict(plain)
    torch.testing.assert_close(loss(plain), other(x))
    assert calls.count > 0
    other(x).backward()
    grads = torch.func.grad(loss)(plain)
    for name, p in other.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


@scripted
def test_forward_mode() -> None:
    ws = tuple(w.detach() for w in six())
    _, tangent = torch.func.jvp(penalty, ws, tuple(map(torch.ones_like, ws)))
    expected = sum((L1 * w.sign() + L2 * w).sum() for w in ws)
    # `0.3 * w.sum()` has a tangent of float64 too
    torch.testing.assert_close(tangent, expected, check_dtype=False)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(w, torch.ones_like(w)) for w in ws]
        unpacked = torch.autograd.forward_ad.unpack_dual(penalty(*duals))
        torch.testing.assert_close(unpacked.tangent, expected, check_dtype=False)


@scripted
def test_hessian() -> None:
    first, *others = (w.detach() for w in six())
    hessian = torch.func.hessian(lambda w: penalty(w, *others))(first).reshape(6, 6)
    torch.testing.assert_close(hessian, L2 * torch.eye(6))


def test_compiled_in_one_graph() -> None:
    compiled_graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compiled_graphs
        compiled_graphs += 1
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(graph, inputs)

    def f(ws: Sequence[Tensor], strength: Tensor) -> Tensor:
        return penalty_sum(ws, [strength] * 6, [L2] * 6)

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for strength in (0.1, 0.2, 0.3, 0.4):
        ours, theirs = six(), six()
        compiled(ours, torch.tensor(strength)).backward()
        f(theirs, torch.tensor(strength)).backward()
        for w, v in zip(ours, theirs, strict=True):
            torch.testing.assert_close(w.grad, v.grad)
    assert compiled_graphs == 1


def test_exported() -> None:
    model, x = Stack(), torch.ones(2, 4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_traced() -> None:
    model, x = Stack(), torch.ones(2, 4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.trace", category=DeprecationWarning)
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))
    graph = make_fx(penalty)(*six())
    torch.testing.assert_close(graph(*six()), penalty(*six()))


def test_checkpointed() -> None:
    ws, others = six(), six()
    checkpoint(penalty, *ws, use_reentrant=False).backward()
    penalty(*others).backward()
    for w, v in zip(ws, others, strict=True):
        torch.testing.assert_close(w.grad, v.grad)


def test_under_autocast_and_without_grad() -> None:
    ws = six()
    expected = penalty(*ws).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = penalty(*ws)
    assert value.dtype is torch.float32 and value.item() == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        assert not penalty(*ws).requires_grad
    with torch.inference_mode():
        assert penalty(*ws).item() == pytest.approx(expected, rel=1e-6)


def test_a_frozen_weight_counts_and_gets_no_gradient() -> None:
    ws = six()
    ws[0].requires_grad_(False)
    value = penalty(*ws)
    value.backward()
    assert value.item() == pytest.approx(sum(map(exact, ws)), rel=1e-6)
    assert ws[0].grad is None and ws[1].grad is not None


def test_a_weight_that_is_no_leaf() -> None:
    masters = six()
    penalty(*(2 * w for w in masters)).backward()
    for w in masters:
        torch.testing.assert_close(w.grad, 2 * (L1 * w.detach().sign() + L2 * 2 * w.detach()))


def test_the_same_tensor_twice() -> None:
    w = six()[0]
    penalty(*[w] * 6).backward()
    torch.testing.assert_close(w.grad, 6 * (L1 * w.detach().sign() + L2 * w.detach()))


def test_a_weight_changed_before_backward_is_an_error() -> None:
    ws = six()
    value = penalty(*ws)
    with torch.no_grad():
        ws[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


# ---- what it costs, in what does not depend on the machine -------------------------------------

MODELS = {"ResNet-50": resnet50(), "GPT-2, 384 wide": gpt2(384), "equal": [(170, 1000)] * 148}


@pytest.mark.parametrize("shapes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("strengths", list(STRENGTHS.values())[:2], ids=list(STRENGTHS)[:2])
def test_operations(shapes: list[tuple[int, ...]], strengths: tuple[float, float]) -> None:
    penalty = by_regwrap(holders(weights(shapes, kept=False)), *strengths)
    assert operations(lambda: penalty().backward()) <= 240  # by hand 1,037 and more


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("strengths", STRENGTHS.values(), ids=STRENGTHS)
@pytest.mark.parametrize("kept", [False, True], ids=["None", "kept"])
def test_peak_memory(
    shapes: list[tuple[int, ...]], strengths: tuple[float, float], kept: bool
) -> None:
    held = 4 * sum(map(math.prod, shapes)) * (1 + kept)  # the weights, and the gradients if kept
    ws = weights(shapes, kept=kept)
    _, loop = footprint(ws, by_hand(ws, *strengths), kept=kept)
    _, ours = footprint(ws, by_regwrap(holders(ws), *strengths), kept=kept)
    # 1,000 of 16 are 64 kB in all, of which two buckets' gradients (L1's and L2's) are 16 kB
    assert ours + held <= 1.05 * (loop + held) + 2**14
