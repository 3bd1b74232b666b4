"""The doctor: each finding has a model that shows it and one that must not."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regwrap as rw
from regwrap import L1, L2, L2SP, Dropout, ElasticNet, Finding, GroupLasso, WeightDecay, doctor


class Net(nn.Module):
    """A healthy network."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.drop(F.relu(self.fc2(F.relu(self.fc1(x))))))


class Normed(nn.Module):
    """Linear - norm - ReLU, the usual order."""

    def __init__(self, norm=nn.BatchNorm1d, drop=0.0):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(8, 16), norm(16), nn.Dropout(drop)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.norm(self.fc(x))
        x = self.drop(F.relu(x))
        return self.head(x)


class DropThenNorm(Normed):
    def forward(self, x):
        x = self.drop(self.fc(x))
        x = self.norm(x)
        return self.head(F.relu(x))


class Stack(nn.Module):
    """30 layers, of which 5 keep their v_proj under another roof."""

    def __init__(self, odd=5):
        super().__init__()
        self.layers = nn.ModuleList()
        for i in range(30):
            layer = nn.Module()
            name = "self_attn" if i < 30 - odd else "linear_attn"
            setattr(layer, name, nn.ModuleDict({"v_proj": nn.Linear(4, 4)}))
            self.layers.append(layer)


class Unused(Net):
    """Its dropout is made and never called."""

    def forward(self, x):
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Aliased(nn.Module):
    """Its dropout is called under another name."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.body = nn.Sequential(nn.Linear(4, 4), self.drop, nn.Linear(4, 2))

    def forward(self, x):
        return self.body(x)


class Configured(nn.Module):
    def __init__(self, reads):
        super().__init__()
        self.config = types.SimpleNamespace(classifier_dropout=0.3, hidden_size=8, seed=0.5)
        self.drop = nn.Dropout(self.config.classifier_dropout if reads else 0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(x))


class ReadsNothing(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(x)


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), lr=1e-3, **options)


def adamw(model, decay=0.01):
    return torch.optim.AdamW(rw.param_groups(model, weight_decay=decay), lr=1e-3)


def ruled(rules, make=Net):
    return rw.regularize(make(), rules)


def healthy():
    model = ruled({nn.Linear: L2(1e-4), "fc1": Dropout(0.1), "head": None})
    return model, adam(model), 2.3


def frozen(everything):
    model = Net()
    for parameter in (model if everything else model.fc1).parameters():
        parameter.requires_grad = False
    return rw.regularize(model, L2(1e-4))


def replaced_head(again):
    rules = {"": L2(1e-4), "head": L2(1e-3)}
    model = ruled(rules)
    model.head = nn.Linear(16, 5)
    return rw.regularize(model, rules) if again else model


def optimizer_before(changed):
    model = Net()
    optimizer = adam(model)
    if changed:
        model.head = nn.Linear(16, 5)
    return model, optimizer


def two_models_in_one_optimizer():
    model = Net()
    both = [*model.parameters(), *Net().parameters()]
    return model, torch.optim.Adam(both)


def cancelling(spare_weights):
    model = Net()
    plain = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": plain} | ({"weight_decay": 0.0} if spare_weights else {})]
    groups.append({"params": rest, "weight_decay": 0.0})
    return model, torch.optim.AdamW(groups, weight_decay=0.1)


def lora(n):
    model = Stack(odd=0)
    for layer in list(model.layers)[:n]:
        layer.self_attn.v_proj.lora_A = nn.Linear(4, 2)
    return model


def with_optimizer(model, make=adam):
    return model, make(model)


CASES = {  # code: (what shows it, what must not), each the arguments of doctor, loss third
    "l2-twice": (
        lambda: with_optimizer(ruled(L2(1e-4)), lambda m: adam(m, weight_decay=1e-4)),
        lambda: with_optimizer(ruled(L2(1e-4)), lambda m: adamw(m, 0)),
    ),
    "decay-not-carried": (
        lambda: with_optimizer(ruled(WeightDecay(0.05))),
        lambda: with_optimizer(ruled(WeightDecay(0.05)), lambda m: adamw(m)),
    ),
    "optimizer-stale": (
        lambda: optimizer_before(changed=True),
        lambda: two_models_in_one_optimizer(),
    ),
    "decay-cancelled": (
        lambda: cancelling(spare_weights=True),
        lambda: cancelling(spare_weights=False),
    ),
    "decay-on-norms": (
        lambda: with_optimizer(Normed(), lambda m: adam(m, weight_decay=0.1)),
        lambda: with_optimizer(Normed(), adamw),
    ),
    "frozen": (lambda: (frozen(everything=True),), lambda: (frozen(everything=False),)),
    "before-norm": (
        lambda: (ruled({"fc": L2(1e-4)}, Normed),),
        lambda: (ruled({"head": L2(1e-4)}, Normed),),
    ),
    "no-zeros": (lambda: (ruled({"fc1": L1(1e-4)}),), lambda: (ruled({"fc1": L2(1e-4)}),)),
    "penalty-dominates": (
        lambda: (ruled(L2(10.0)), None, 2.3),
        lambda: (ruled(L2(1e-4)), None, 2.3),
    ),
    "penalty-vanishes": (
        lambda: (ruled(L2(1e-9)), None, 2.3),
        lambda: (ruled(L2SP(0.1)), None, 2.3),  # at its reference it is zero, as it should be
    ),
    "penalty-under-adam": (
        lambda: (*with_optimizer(ruled(L2(10.0))), 2.3),
        lambda: (*with_optimizer(ruled(L2(10.0)), lambda m: torch.optim.SGD(m.parameters())), 2.3),
    ),
    "keras-strength": (lambda: (ruled(L2(0.01)),), lambda: (ruled(L2(0.02)),)),
    "partial-family": (
        lambda: (ruled({"**.self_attn.v_proj": L2(1e-4)}, Stack),),
        lambda: (ruled({"layers.{0..1}.**": L2(1e-4)}, Stack),),  # the first two: a choice
    ),
    "replaced": (
        lambda: (replaced_head(again=False),),
        lambda: (replaced_head(again=True),),
    ),
    "dropout-before-batchnorm": (
        lambda: (DropThenNorm(drop=0.5),),
        lambda: (Normed(drop=0.5),),
    ),
    "dropout-on-output": (
        lambda: (ruled({"head": Dropout(0.1)}),),
        lambda: (ruled({"{fc1,fc2}": Dropout(0.1)}),),
    ),
    "dropout-never-called": (lambda: (Unused(),), lambda: (Net(),)),
    "config-unread": (
        lambda: (ReadsNothing({"classifier_dropout": 0.3, "layers": 2}),),
        lambda: (Configured(reads=True),),
    ),
}


def codes(arguments):
    model, optimizer, loss = (*arguments, None, None)[:3]
    return [finding.code for finding in doctor(model, optimizer, loss=loss)]


@pytest.mark.filterwarnings("ignore::regwrap.RegwrapWarning")  # a plan may warn of the same
@pytest.mark.parametrize("code", CASES)
def test_shown(code):
    sick, well = CASES[code]
    assert code in codes(sick())
    assert code not in codes(well())


def test_a_healthy_model():
    model, optimizer, loss = healthy()
    assert doctor(model, optimizer, loss=loss) == []
    assert doctor(Net()) == []
    plain = Net()
    assert doctor(plain, adamw(plain), loss=2.3) == []


def test_other_shapes_of_the_same_fault():
    assert "l2-twice" in codes(
        with_optimizer(ruled(ElasticNet(1e-4, 0.5)), lambda m: torch.optim.AdamW(m.parameters()))
    )
    assert "decay-not-carried" in codes(
        with_optimizer(ruled(WeightDecay(0.05)), lambda m: torch.optim.AdamW(m.parameters()))
    )
    assert "before-norm" in codes((ruled({"0": GroupLasso(1e-4)}, sequential_normed),))
    assert "before-norm" in codes((ruled({"fc": L1(1e-4)}, lambda: Normed(nn.LayerNorm)),))
    assert "dropout-before-batchnorm" in codes((ruled({"0": Dropout(0.1)}, sequential_normed),))
    assert "dropout-on-output" in codes((nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)),))
    assert "config-unread" not in codes((Configured(reads=True),))
    assert "partial-family" in codes((lora(25),))
    assert "dropout-never-called" not in codes((Aliased(),))
    for n in (0, 3, 30):
        assert "partial-family" not in codes((lora(n),))


def sequential_normed():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


class Softmaxed(Net):
    def forward(self, x):
        return F.log_softmax(super().forward(x), dim=-1)


class Softmaxed2(Net):
    def forward(self, x):
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        y = self.head(x)
        return {"loss": None, "logits": F.log_softmax(y, dim=-1)}


class Tupled(Net):
    def forward(self, x):
        hidden = self.fc1(x).relu()
        return self.head(self.fc2(hidden)).squeeze(-1), hidden


@pytest.mark.filterwarnings("ignore::regwrap.RegwrapWarning")
@pytest.mark.parametrize("make", [Softmaxed, Softmaxed2, Tupled])
def test_the_output_layer_is_found(make):
    """Through a softmax, in a dict or a tuple; where the source does not show it, by its name."""
    (finding,) = [f for f in doctor(ruled({"head": Dropout(0.1)}, make)) if "output" in f.code]
    assert finding.path == "head"
    assert doctor(ruled({"fc1": Dropout(0.1)}, make)) == [
        f for f in doctor(make()) if f.code != "dropout-on-output"
    ]


def test_a_rule_of_which_nothing_is_left():
    model = ruled({"fc1": L2(1e-4), "head": L2(1e-3)})
    model.fc1 = nn.Identity()
    (finding,) = doctor(model)
    assert finding == Finding(
        "rule-idle",
        "error",
        "fc1",
        "rule 0 ('fc1': L2(0.0001)) acts nowhere in Net.",
        "Name what is there now, or leave the rule out.",
    )


class Odd(Normed):
    """Its author calls self something else."""

    def forward(this, x):
        x = this.norm(this.fc(x))
        return this.head(this.drop(F.relu(x)))


def shared_forward(self, x):
    return self.head(self.drop(F.relu(self.fc1(x))))


class Lent(Net):
    """Its forward is written elsewhere."""

    forward = shared_forward


def test_a_forward_that_is_written_elsewhere():
    assert doctor(Lent()) == []
    model = Unused()
    assert [f.code for f in doctor(model)] == ["dropout-never-called"]
    model.forward = types.MethodType(shared_forward, model)
    assert doctor(model) == []


class Attention(nn.Module):
    """Holds a dropout and takes its rate, as transformers' attentions do."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop, self.attention_dropout = nn.Linear(8, 8), nn.Dropout(0.1), 0.1

    def forward(self, x):
        return F.dropout(self.fc(x).softmax(-1), self.attention_dropout, self.training)


def test_a_rate_that_is_taken_from_an_attribute():
    assert doctor(Attention()) == []
    other = Attention()
    other.attention_dropout = 0.0
    assert codes((other,)) == ["dropout-never-called"]


class Marked(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.fc = nn.Linear(4, 4)

    def no_weight_decay(self):
        return {"scale"}


def test_authors_marks_beside_a_part_with_two_names():
    shared = nn.Sequential(nn.Linear(4, 4))
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(Marked())})
    assert doctor(model, adamw(model)) == []
    (finding,) = doctor(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert finding.message.startswith("a.0.bias and 2 more: biases, norms and parameters")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript's own
def test_a_scripted_part():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 2))
    assert doctor(rw.regularize(model, {"1": L2(1e-4)})) == []


def test_self_by_another_name():
    assert "before-norm" in codes((ruled({"fc": L2(1e-4)}, Odd),))


def test_an_attached_l2_beside_the_optimizers_decay():
    model = ruled(L2(1e-4))
    optimizer = torch.optim.SGD(rw.param_groups(model, weight_decay=1e-4), lr=0.1)
    rw.attach(model, optimizer)
    (finding,) = doctor(model, optimizer)
    assert finding.message == (
        "fc1.weight and 2 more: shrunk twice, by L2(0.0001) in the step and by "
        "weight_decay=0.0001 of SGD."
    )


def numbered():
    return nn.ModuleDict(
        {
            part: nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}) for _ in range(6)
            )
            for part in ("encoder", "decoder")
        }
    )


@pytest.mark.parametrize(
    "rules",
    [
        {"encoder.{0..3}": L2(1e-4), "encoder.{4..5}": L2(1e-3)},
        {"encoder.{0..3}": L2(1e-4), "encoder.{4..5}": None},
        {"encoder.{0..3}": L2(1e-4), "encoder.{4..5}.*": None},
        [(lambda path, module: path.endswith(".up"), L2(1e-4)), ("encoder.{0..1}", None)],
    ],
)
def test_a_family_that_the_rules_share_or_leave_out_in_words_is_whole(rules):
    assert doctor(ruled(rules, numbered)) == []


def test_a_partial_family_of_one_of_two_stacks_and_of_several_layers():
    (finding,) = doctor(ruled({"encoder.{0..4}": L2(1e-4), "decoder": L2(1e-4)}, numbered))
    assert finding.message == (
        "rule 0 ('encoder.{0..4}': L2(0.0001)) reaches 5 of 6 'up', not encoder.5.up, and so of "
        "'down'."
    )


def test_a_replaced_module_is_told_once_and_not_after_regularize():
    model = ruled({"": L2(1e-4)}, numbered)
    model.encoder[2]["up"] = nn.Linear(4, 8)
    (finding,) = doctor(model)
    assert finding.message == (
        "encoder.2.up.weight: the module came after regularize, and the policy has no L2(0.0001) "
        "there."
    )
    assert doctor(rw.regularize(model, L2(1e-4))) == []


def test_what_a_lambda_cleared_was_not_replaced():
    rules = [("", L2(1e-4)), (lambda path, module: path.endswith(".up"), None)]
    assert doctor(ruled(rules, numbered)) == []


def test_hadamard_after_the_optimizer():
    model = Net()
    optimizer = adam(model)
    try:
        rw.regularize(model, {"fc1": L1(1e-4, solver="hadamard")})
    except rw.PolicyError as error:
        if "is not built" not in str(error):
            raise
        pytest.skip("L1(solver='hadamard') is not built on this branch")
    assert "optimizer-stale" in codes((model, optimizer))
    assert "optimizer-stale" not in codes((model, adam(model)))
    assert "no-zeros" not in codes((model, adam(model)))


def test_attached_terms_are_fine():
    if not hasattr(rw, "attach"):
        pytest.skip("attach is not built on this branch")
    model = ruled({"": L1(1e-4), "fc1": WeightDecay(0.05)})
    optimizer = adam(model)
    assert set(codes((model, optimizer))) == {"no-zeros", "decay-not-carried"}
    rw.attach(model, optimizer)
    assert doctor(model, optimizer) == []
    model = ruled({"fc1": rw.MaxNorm(1.0)})
    optimizer = adam(model)
    assert codes((model, optimizer)) == ["not-attached"]
    rw.attach(model, optimizer)
    assert doctor(model, optimizer) == []


def test_most_severe_first_and_one_a_rule():
    model = ruled({"": L2(0.01) + WeightDecay(0.1)})
    found = doctor(model, adam(model, weight_decay=0.5))
    severities = [f.severity for f in found]
    assert severities == sorted(severities, key=["error", "warning", "info"].index)
    assert [f.code for f in found] == [
        "decay-not-carried", "l2-twice", "decay-on-norms", "keras-strength"
    ]  # fmt: skip


def test_the_wording():
    model = ruled(L2(1e-4))
    (finding,) = (f for f in doctor(model, adam(model, weight_decay=1e-4)) if f.code == "l2-twice")
    assert finding.path == "fc1.weight"
    assert finding.message == (
        "fc1.weight and 2 more: shrunk twice, by L2(0.0001) in the loss and by "
        "weight_decay=0.0001 of Adam."
    )
    assert finding.fix == (
        "Keep one: build the optimizer from regwrap.param_groups(model, weight_decay=0), or write "
        "WeightDecay instead of L2."
    )
    (finding,) = doctor(ruled({"**.self_attn.v_proj": L2(1e-4)}, Stack))
    assert finding.path == "layers.25.linear_attn.v_proj"
    assert finding.message == (
        "rule 0 ('**.self_attn.v_proj': L2(0.0001)) reaches 25 of 30 'v_proj', not "
        "layers.25.linear_attn.v_proj and 4 more."
    )


@pytest.mark.filterwarnings("ignore::regwrap.RegwrapWarning")
@pytest.mark.parametrize("code", CASES)
def test_every_finding_is_a_sentence_and_a_way_out(code):
    model, optimizer, loss = (*CASES[code][0](), None, None)[:3]
    for finding in doctor(model, optimizer, loss=loss):
        assert finding.severity in ("error", "warning", "info")
        for text in (finding.message, finding.fix):
            assert text.endswith((".", ")."))
            assert "\n" not in text


def test_nothing_is_touched():
    model = ruled({"": L2(1e-4), nn.Linear: Dropout(0.1), "fc1": L2SP(0.1)})
    model.norm = nn.BatchNorm1d(3)
    model.fc1 = nn.Linear(8, 16)
    model.eval().fc2.train()
    optimizer = adam(model)
    before = (copy.deepcopy(model.state_dict()), [m.training for m in model.modules()])
    random = torch.get_rng_state()
    records = [dict(vars(m)) for m in model.modules()]
    doctor(model, optimizer, loss=1.0)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == before[1]
    assert all(torch.equal(v, before[0][k]) for k, v in model.state_dict().items())
    assert [dict(vars(m)) for m in model.modules()] == records
    with pytest.warns(rw.RegwrapWarning, match="replaced since"):
        rw.reg_loss(model)  # the doctor did not use the warning up


def test_a_transformers_model_is_healthy():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=8, num_labels=3, classifier_dropout=0.2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    assert doctor(model) == []
    rw.regularize(model, {"**.{query,value}": Dropout(0.1), "classifier": L2(1e-2, on="bias")})
    assert doctor(model, adam(model), loss=1.1) == []
    rw.regularize(model, {"classifier": Dropout(0.1)})
    assert codes((model,)) == ["dropout-on-output"]


def test_rates_of_a_transformers_configuration():
    """A misspelt one is told, though every class takes `**kwargs`; not another head's default."""
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 11, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}
    config = transformers.DistilBertConfig(**small, clasifier_dropout=0.45)
    (finding,) = doctor(transformers.DistilBertForQuestionAnswering(config))
    assert finding.message.startswith("config.clasifier_dropout = 0.45, but no code of Distil")
    assert config.seq_classif_dropout == 0.2  # which a model for questions does not read
    config = transformers.DistilBertConfig(**small, seq_classif_dropout=0.45)
    assert codes((transformers.DistilBertForQuestionAnswering(config),)) == ["config-unread"]
    assert codes((transformers.DistilBertForSequenceClassification(config),)) == []
