"""Work grows with the model, not with its square, and importing stays light.

Times are printed by benchmarks/size.py.
"""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn

import regwrap as rw

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from size import JOBS, Transformer, transformer


def calls(job: Callable[[], Any]) -> int:
    """How many functions the job calls, of Python and of C."""
    count = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(see)
    try:
        job()
    finally:
        sys.setprofile(None)
    return count


def work(make: Callable[[int], nn.Module], blocks: int) -> dict[str, int]:
    model = make(blocks)
    return {name: calls(lambda job=job: job(model)) for name, job in JOBS.items()}


def tied(blocks: int) -> nn.Module:
    """Every Linear of a kind has the same weight."""
    model = transformer(blocks)
    for block in model.blocks:
        for name in ("q", "k", "v", "o", "fc1", "fc2"):
            getattr(block, name).weight = getattr(model.blocks[0], name).weight
    return model


def shared(blocks: int) -> nn.Module:
    """One block under many names."""
    model = transformer(1)
    model.blocks.extend([model.blocks[0]] * (blocks - 1))
    return model


def marked(blocks: int) -> nn.Module:
    """Every block has marks of its author."""
    model = transformer(blocks)
    for block in model.blocks:
        block.no_weight_decay = lambda: {"q.weight"}
    return model


@pytest.mark.parametrize("make", [transformer, tied, shared, marked])
def test_work_is_linear_in_the_size_of_the_model(make: Callable[[int], nn.Module]) -> None:
    work(make, 2)  # caches
    small, large = work(make, 15), work(make, 60)
    for name, count in large.items():
        assert count < 4.4 * small[name], f"{name}: {small[name]:,} calls, then {count:,}"


def test_a_read_of_reg_loss_is_linear_too() -> None:
    def reads(blocks: int) -> int:
        model = rw.regularize(Transformer(blocks), {nn.Linear: rw.L2(0.1) + rw.L1(0.1)})
        assert model.reg_loss > 0
        return calls(lambda: model.reg_loss) + calls(lambda: rw.penalties(model))

    assert reads(60) < 4.4 * reads(15)


def test_a_thousand_blocks_are_planned_applied_and_undone_on_the_meta_device() -> None:
    model = transformer(1000)
    plan = rw.plan(model, {nn.Linear: rw.L2(1e-4), "blocks.*.fc1": rw.Dropout(0.1)})
    rw.regularize(model, {nn.Linear: rw.L2(1e-4), "blocks.*.fc1": rw.Dropout(0.1)})
    assert rw.policy(model) == plan
    assert [count["entries"] for count in plan.counts()] == [6001, 1000]
    file = io.StringIO()
    rw.summary(model, console=Console(file=file))
    assert len(file.getvalue().splitlines()) < 20
    rw.unregularize(model)
    assert all("_regwrap" not in module.__dict__ for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())
    assert type(model) is Transformer


def modules_after(code: str) -> set[str]:
    """The modules that a fresh process has after running the code."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(told.stdout.split())


def test_import_brings_nothing_that_torch_and_rich_do_not() -> None:
    new = modules_after("import torch, rich\nimport regwrap") - modules_after("import torch, rich")
    foreign = {
        name
        for name in new
        if name.partition(".")[0] not in {"regwrap", "rich", *sys.stdlib_module_names}
    }
    heavy = (
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.distributed.fsdp",
        "torch._inductor",
    )
    assert not any(name.startswith(heavy) for name in new)
    assert not any(name.startswith("regwrap.integrations") for name in new)
    assert not foreign, sorted(foreign)


def test_regularizing_and_reading_import_nothing_heavy_either() -> None:
    code = """
import torch, rich, regwrap as rw
model = rw.regularize(torch.nn.Sequential(torch.nn.Linear(2, 2)), rw.L2(0.1) + rw.Dropout(0.5))
model.reg_loss.backward()
rw.summary(rw.unregularize(model))
"""
    heavy = {"torch._dynamo", "torch.distributed.tensor", "torch._inductor", "numpy.testing"}
    assert not heavy & modules_after(code)
