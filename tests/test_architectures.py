"""The guarantees over Hugging Face architectures, through the public calls alone.

Each is compared with its plain twin; in training with a twin whose layers drop as an editor of the
source would write it. `fixtures/architectures.json` holds what acts on the layers, for the table in
the README; `python tests/test_architectures.py` writes it anew.
"""

import copy
import functools
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_zoo import HF_ZOO
from laws import is_linear, rate_zero_in_place
from support import differences, digest, fingerprint, loss_of, take_gradients
from torch import nn

import regwrap as rw
from regwrap import Dropout

RATE = 0.5
README = Path(__file__).parents[1] / "README.md"
FOUND = Path(__file__).parent / "fixtures" / "architectures.json"
WANTED: dict[str, dict[str, int]] = json.loads(FOUND.read_text()) if FOUND.exists() else {}

pytestmark = [
    pytest.mark.slow,
    # Of transformers, about its own code and about configurations as small as these.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::regwrap.RegwrapWarning"),
]
every_architecture = pytest.mark.parametrize("name", HF_ZOO)

Inputs = dict[str, Any]


@functools.cache
def built(name: str) -> tuple[nn.Module, Inputs]:
    return HF_ZOO[name]()


def made(name: str) -> tuple[nn.Module, Inputs]:
    """The model of that name and its inputs; nobody else has them."""
    return copy.deepcopy(built(name))


def dropped(model: nn.Module, rate: float = RATE) -> nn.Module:
    """The model with a dropout on every layer that there is, its head too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*whose output is the model's", rw.RegwrapWarning)
        return rw.regularize(model, Dropout(rate))


def run(model: nn.Module, inputs: Inputs, *, train: bool = False, **more: Any) -> Any:
    model.train(train)
    torch.manual_seed(1)
    return model(**copy.deepcopy(inputs), **more)


def trained(model: nn.Module, inputs: Inputs) -> list[Any]:
    """Outputs and gradients of a step in training, as plain data."""
    out = run(model, inputs, train=True)
    loss_of(tensors(out)).backward()
    return [digest(tensors(out)), digest(take_gradients(model))]


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, those of its cache besides."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors(part)]
    if isinstance(output, dict):
        return tensors(list(output.values()))
    return tensors(list(vars(output).values())) if hasattr(output, "__dict__") else []


def linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if is_linear(m)}


def called(model: nn.Module, inputs: Inputs) -> set[str]:
    """The Linears that a forward in training calls as modules."""
    found = set()
    for name, layer in linears(model).items():
        layer.register_forward_hook(lambda *_, name=name: found.add(name))
    run(model, inputs, train=True)
    return found


def edited_by_hand(model: nn.Module, policy: rw.Policy) -> nn.Module:
    """The model with the dropouts of a policy, as an editor of its source would write them."""
    for row in policy.rows():
        part = model.get_submodule(row["path"])
        if row["mechanism"] in ("fx", "hook"):
            part.forward = functools.partial(with_dropout, part, part.forward)
        elif row["mechanism"] == "direct":
            part.p = RATE
    return model


def with_dropout(layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    return F.dropout(forward(*args, **kwargs), RATE, layer.training)


@every_architecture
def test_eval_is_bit_identical(name: str) -> None:
    plain, inputs = made(name)
    model = dropped(made(name)[0])
    for more in ({}, {"output_hidden_states": True}, {"return_dict": False}):
        try:
            wanted = run(plain, inputs, **more)
        except (TypeError, ValueError, AttributeError, IndexError):
            continue  # the plain model does not take it
        assert digest(tensors(run(model, inputs, **more))) == digest(tensors(wanted))
    if "attention_mask" in inputs:
        del inputs["attention_mask"]
        assert digest(tensors(run(model, inputs))) == digest(tensors(run(plain, inputs)))


@every_architecture
def test_training_at_rate_zero_is_bit_identical(name: str) -> None:
    plain, inputs = made(name)
    model = dropped(made(name)[0])
    rate_zero_in_place(model)
    assert trained(model, inputs) == trained(plain, inputs)


@every_architecture
def test_every_layer_that_is_called_drops_as_if_edited_by_hand(name: str) -> None:
    plain, inputs = made(name)
    model = dropped(made(name)[0])
    twin = edited_by_hand(made(name)[0], rw.policy(model))
    assert trained(model, inputs) == trained(twin, inputs)
    how = mechanisms(model)
    assert called(plain, inputs) <= {layer for layer in how if how[layer] != "never called"}
    assert counted(model) == WANTED[name]


@every_architecture
def test_undo_is_exact(name: str) -> None:
    plain, inputs = made(name)
    model = dropped(made(name)[0])
    parameters = [id(p) for p in model.parameters()]
    rate_zero_in_place(model)
    assert trained(model, inputs) == trained(plain, inputs)  # buffers move
    rw.unregularize(model)
    assert not differences(fingerprint(plain, identity=False), fingerprint(model, identity=False))
    assert parameters == [id(p) for p in model.parameters()]


# ---- what people do with them ----------------------------------------------------------------

WAYS: dict[str, Inputs] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True},
    "without a cache": {"do_sample": False, "use_cache": False},
    "beams": {"do_sample": False, "num_beams": 2},
}
# The plain model raises.
UNABLE = {"rwkv": ["beams"], "switch_transformers": ["greedy", "sampled", "beams"]}
UNSUPPORTED = (TypeError, ValueError, AttributeError, IndexError, RuntimeError, KeyError)


def generated(model: nn.Module, inputs: Inputs, **how: Any) -> list[Any] | None:
    """What a model generates, or None if it cannot in that way."""
    prompt = {key: value for key, value in inputs.items() if not key.startswith("decoder")}
    torch.manual_seed(1)
    try:
        return digest(model.eval().generate(**copy.deepcopy(prompt), max_new_tokens=4, **how))
    except UNSUPPORTED:
        return None


@every_architecture
def test_what_it_generates_is_bit_identical(name: str) -> None:
    plain, inputs = made(name)
    if not plain.can_generate():
        pytest.skip("generates nothing")
    model = dropped(made(name)[0])
    found = {way: generated(model, inputs, **how) for way, how in WAYS.items()}
    wanted = {way: generated(plain, inputs, **how) for way, how in WAYS.items()}
    assert found == wanted
    assert {way for way in wanted if wanted[way] is None} == set(UNABLE.get(name, ()))


@every_architecture
def test_with_gradient_checkpointing_it_drops_the_same(name: str) -> None:
    plain, inputs = made(name)
    if not plain.supports_gradient_checkpointing:
        pytest.skip("has no gradient checkpointing")
    before = dropped(checkpointing(made(name)[0]))
    after = checkpointing(dropped(made(name)[0]))
    twin = checkpointing(edited_by_hand(plain, rw.policy(after)))
    assert trained(before, inputs) == trained(after, inputs) == trained(twin, inputs)


def checkpointing(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


@every_architecture
def test_what_it_saves_is_the_plain_checkpoint(name: str, tmp_path: Path) -> None:
    plain, inputs = made(name)
    model = dropped(made(name)[0])
    for each, folder in ((plain, "plain"), (model, "regularized")):
        each.save_pretrained(tmp_path / folder)
    files = [
        {f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("plain", "regularized")
    ]
    assert files[0] == files[1]
    for cls in (type(plain), type(model)):
        loaded = cls.from_pretrained(tmp_path / "regularized")
        assert digest(tensors(run(loaded, inputs))) == digest(tensors(run(plain, inputs)))
        assert type(loaded) is type(plain), type(loaded)


peft = pytest.importorskip("peft", reason="peft is not installed")


def adapted(model: nn.Module) -> nn.Module:
    """The model with LoRA on every Linear but its head."""
    torch.manual_seed(2)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("name", [name for i, name in enumerate(HF_ZOO) if i % 11 < 6])
def test_lora_after_and_before(name: str) -> None:
    try:
        adapted(made(name)[0])
    except ValueError as error:
        pytest.skip(f"PEFT: {error}")
    for ours in (adapted(dropped(made(name)[0])), dropped(adapted(made(name)[0]))):
        plain, inputs = adapted(made(name)[0]), made(name)[1]
        assert digest(tensors(run(ours, inputs))) == digest(tensors(run(plain, inputs)))
        assert trained(copy.deepcopy(ours), inputs) != trained(copy.deepcopy(plain), inputs)
        rate_zero_in_place(ours)
        assert trained(ours, inputs) == trained(plain, inputs)
        rw.unregularize(ours)
        found, wanted = (fingerprint(each, identity=False) for each in (ours, plain))
        assert not differences(wanted, found)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit", "wav2vec2"])
def test_lora_is_merged_into_the_same_weights(name: str) -> None:
    plain, inputs = adapted(made(name)[0]), made(name)[1]
    wanted = digest(tensors(run(plain.merge_and_unload(), inputs)))
    for ours in (adapted(dropped(made(name)[0])), dropped(adapted(made(name)[0]))):
        assert digest(tensors(run(ours.merge_and_unload(), inputs))) == wanted


# ---- the table -------------------------------------------------------------------------------


def mechanisms(model: nn.Module) -> dict[str, str]:
    """What acts on the call of every Linear, by its path."""
    how = {}
    for row in rw.policy(model).rows():
        if row["mechanism"] in ("fx", "hook"):
            how[row["path"]] = row["mechanism"]
        elif row["mechanism"] == "direct":
            how[re.match(r"for (\S+):", row["note"])[1]] = "its own dropout"
        elif "never called" in row["note"]:
            how[row["path"]] = "never called"
    assert set(how) == set(linears(model))
    return how


def counted(model: nn.Module) -> dict[str, int]:
    return dict(sorted(Counter(mechanisms(model).values()).items()))


def test_the_table_of_the_readme() -> None:
    counts = sum(map(Counter, WANTED.values()), Counter())
    called = counts.total() - counts["never called"]
    assert counts["fx"] >= 0.3 * called
    row = [len(WANTED), counts.total(), counts["fx"], counts["its own dropout"], counts["hook"]]
    wanted = " | ".join(f"{n:,}" for n in [*row, counts["never called"], 0])
    assert f"| {wanted} |" in README.read_text(encoding="utf-8"), wanted


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = {name: counted(dropped(made(name)[0])) for name in HF_ZOO}
    FOUND.write_text(json.dumps(found, indent=1) + "\n")
