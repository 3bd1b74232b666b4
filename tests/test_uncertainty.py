"""Monte Carlo dropout: dropouts act, everything else is in eval, nothing stays changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import regwrap as rw
from regwrap import Dropout, PolicyError, mc_dropout, mc_predict


class Net(nn.Module):
    def __init__(self, outputs=3):
        super().__init__()
        self.fc = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(16, outputs)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.fc(x)).relu()))


def fingerprint(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [(name, m.training, type(m)) for name, m in model.named_modules()]


def assert_same(before, after):
    assert before[1] == after[1]
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])


def x(rows=8):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


def by_hand(model, read, n=30):
    """The loop that one would write."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with torch.no_grad():
        return torch.stack([read(model(x())) for _ in range(n)])


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(training):
    model = Net().train(training)
    model.norm.train(not training)  # a mode that train() would not restore
    before = fingerprint(model)
    grad = torch.is_grad_enabled()
    mc_predict(model, x())
    assert_same(before, fingerprint(model))
    with pytest.raises(ZeroDivisionError), mc_dropout(model):
        assert model.drop.training
        assert not model.norm.training
        assert not model.training
        raise ZeroDivisionError
    assert_same(before, fingerprint(model))
    with pytest.raises(RuntimeError):
        mc_predict(model, torch.randn(2, 5))
    assert_same(before, fingerprint(model))
    assert torch.is_grad_enabled() == grad


def test_a_frozen_train_method_is_not_called():
    class Frozen(Net):
        def train(self, mode=True):
            raise AssertionError("train() is the author's own")

    model = Frozen()
    mc_predict(model, x(), n=2)
    assert model.training


def test_classification_is_the_loop():
    model = Net()
    torch.manual_seed(0)
    runs = by_hand(copy.deepcopy(model), lambda y: y.softmax(-1))
    torch.manual_seed(0)
    found = mc_predict(model, x())
    mean = runs.mean(0)
    entropy = -(mean * mean.log()).sum(-1)
    each = -(runs * runs.log()).sum(-1).mean(0)
    torch.testing.assert_close(found.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.std, runs.std(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mutual_information, entropy - each, atol=1e-6, rtol=0)
    assert found.mean.shape == (8, 3)
    assert found.entropy.shape == (8,)
    assert not found.mean.requires_grad
    assert (found.mutual_information > 0).all()


def test_binary_is_the_loop():
    model = Net(1)
    torch.manual_seed(0)
    runs = by_hand(copy.deepcopy(model), torch.sigmoid)
    torch.manual_seed(0)
    found = mc_predict(model, x(), task="binary")
    mean = runs.mean(0)
    entropy = F.binary_cross_entropy(mean, mean, reduction="none")
    torch.testing.assert_close(found.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-6, rtol=0)
    assert found.mutual_information.shape == mean.shape == (8, 1)


def test_regression_has_no_entropy():
    mean, std, entropy, information = mc_predict(Net(2), x(), task="regression", n=5)
    assert mean.shape == std.shape == (8, 2)
    assert (std > 0).all()
    assert entropy is None
    assert information is None


def test_reproducible_under_manual_seed():
    model = Net()
    torch.manual_seed(3)
    first = mc_predict(model, x())
    torch.manual_seed(3)
    again = mc_predict(model, x())
    other = mc_predict(model, x())
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.mean, other.mean)


def test_the_analytic_spread_of_a_linear_model():
    """Y = sum w_i m_i x_i / (1 - p): its variance is p / (1 - p) * sum (w_i x_i)^2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(50, 4, bias=False))
    inputs = torch.randn(10, 50)
    found = mc_predict(model, inputs, n=500, task="regression")
    weights = model[1].weight
    variance = 0.3 / 0.7 * (inputs.square() @ weights.square().T)
    torch.testing.assert_close(found.std, variance.sqrt(), rtol=0.1, atol=0)
    away = (found.mean - model.eval()(inputs)).abs() / (variance / 500).sqrt()
    assert away.max() < 4  # standard errors


def test_batch_norm_stays_in_eval():
    model = Net().eval()
    with mc_dropout(model):
        model.drop.p = 0.0
        assert torch.equal(model(x()), copy.deepcopy(model).eval()(x()))


def plain_mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Owner(nn.Module):
    """A body that a rewrite by fx can take."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.relu(self.fc(x)))


@pytest.mark.parametrize("make", [plain_mlp, Owner])
def test_dropouts_of_a_policy_act(make):
    """By a hook or by a rewrite: whichever mechanism the plan took."""
    model = make()
    first = next(name for name, m in model.named_modules() if isinstance(m, nn.Linear))
    rw.regularize(model, {first: Dropout(0.5)})
    before = fingerprint(model.eval())
    assert (mc_predict(model, x()).std > 0).all()
    assert_same(before, fingerprint(model))
    assert torch.equal(model(x()), model(x()))


def test_the_spread_of_a_policy_is_that_of_a_dropout_layer():
    torch.manual_seed(0)
    ours = Owner()
    theirs = nn.Sequential(copy.deepcopy(ours.fc), nn.Dropout(0.5), nn.ReLU(), ours.head)
    rw.regularize(ours, {"fc": Dropout(0.5)})
    torch.manual_seed(1)
    a = mc_predict(ours, x())
    torch.manual_seed(1)
    b = mc_predict(theirs, x())
    assert torch.equal(a.mean, b.mean)
    assert torch.equal(a.std, b.std)


def test_drop_connect_acts():
    if not hasattr(rw, "DropConnect"):
        pytest.skip("DropConnect is not built on this branch")
    model = rw.regularize(plain_mlp(), {"0": rw.DropConnect(0.5)})
    assert (mc_predict(model, x()).std > 0).all()


def test_what_the_last_forward_left_stays():
    """Penalties on outputs belong to the training step in between which one predicts."""
    model = Net()
    try:
        rw.regularize(model, {"fc": rw.L2(0.1, on="output")})
    except PolicyError as error:
        if "not built" not in str(error):
            raise
        pytest.skip("penalties on outputs are not built on this branch")
    model(x())
    before = model.reg_loss
    mc_predict(model, x(3))
    assert before > 0
    assert torch.equal(model.reg_loss, before)


class Attention(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=p, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Recurrent(nn.Module):
    def __init__(self, kind, p, layers=2):
        super().__init__()
        self.rnn = kind(6, 5, num_layers=layers, dropout=p, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


@pytest.mark.parametrize(
    "make",
    [
        Attention,
        *(lambda p, k=kind: Recurrent(k, p) for kind in (nn.LSTM, nn.GRU, nn.RNN)),
        lambda p: nn.TransformerEncoderLayer(6, 2, 8, dropout=p, batch_first=True),
        lambda p: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(6, 2, 8, dropout=p, batch_first=True), 2
        ),
    ],
    ids=["attention", "lstm", "gru", "rnn", "encoder layer", "encoder"],
)
def test_attributes_and_fused_layers(make):
    """The encoder layer's fused path leaves dropout out without a word when it is in eval."""
    model = make(0.5).eval()
    inputs = torch.randn(2, 4, 6)
    before = fingerprint(model)
    assert (mc_predict(model, inputs, task="regression").std > 0).any()
    assert_same(before, fingerprint(model))
    with pytest.raises(PolicyError, match="has no dropout with a rate above 0"):
        mc_predict(make(0.0), inputs, task="regression")


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")  # the case itself
def test_one_recurrent_layer_drops_nothing():
    with pytest.raises(PolicyError, match="Recurrent has no dropout"):
        mc_predict(Recurrent(nn.LSTM, 0.5, layers=1), torch.randn(2, 4, 6), task="regression")


@pytest.mark.parametrize("make", [plain_mlp, lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0))])
def test_without_dropout(make):
    model = make()
    with pytest.raises(PolicyError) as caught:
        mc_predict(model, x())
    assert str(caught.value) == (
        "Sequential has no dropout with a rate above 0, so that every pass would be the same; add "
        "one with regularize(model, Dropout(0.1)), or train with one."
    )
    assert model.training


class Rewritten(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("kind", [nn.Dropout, nn.AlphaDropout])
@pytest.mark.parametrize(
    ("make", "layer"), [(Rewritten, "a"), (plain_mlp, "0")], ids=["fx", "hook"]
)
def test_a_schedule_at_0(make, layer, kind):
    model = rw.regularize(make(), {layer: Dropout(0.5, kind=kind)})
    schedule = rw.StrengthScheduler(model, lambda step: min(step, 1))
    with pytest.raises(PolicyError, match="has no dropout with a rate above 0"):
        mc_predict(model, x())
    schedule.step()
    assert (mc_predict(model, x()).std > 0).any()


@pytest.mark.parametrize("squeeze", [False, True])
def test_one_logit_is_no_classification(squeeze):
    class One(Net):
        def forward(self, x):
            y = super().forward(x)
            return y.squeeze(-1) if squeeze else y

    with pytest.raises(PolicyError, match=r"not one logit \(shape .*write task='binary'"):
        mc_predict(One(1), x())
    assert mc_predict(One(1), x(), task="binary").mean.shape == ((8,) if squeeze else (8, 1))


def test_what_does_not_fit():
    with pytest.raises(PolicyError, match=r"needs one logit, not shape \(8, 3\); write task='cla"):
        mc_predict(Net(), x(), task="binary")
    with pytest.raises(ValueError, match=r"task must be one of .*'binary', 'regression'.*'multi'"):
        mc_predict(Net(), x(), task="multi")
    for n in (0, 1, 2.0, True):
        with pytest.raises(ValueError, match="n must be an integer >= 2"):
            mc_predict(Net(), x(), n=n)

    class Pair(Net):
        def forward(self, x):
            return (super().forward(x),)

    with pytest.raises(PolicyError, match="not tuple; wrap the model to return one"):
        mc_predict(Pair(), x())


def test_dicts_and_keywords_and_half_precision():
    class Dict(Net):
        def forward(self, *, x):
            return {"loss": None, "logits": super().forward(x)}

    assert mc_predict(Dict(), x=x()).mean.shape == (8, 3)
    found = mc_predict(Net().bfloat16(), x().bfloat16())
    assert found.mean.dtype == torch.float32


def test_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    found = mc_predict(model, input_ids=torch.ones(2, 4, dtype=torch.long))
    assert found.mean.shape == (2, 3)
    assert (found.std > 0).all()


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
def test_the_old_spectral_norm_does_not_move():
    layer = nn.utils.spectral_norm(nn.Linear(6, 16))
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 3))
    rw.regularize(model, {"0": Dropout(0.5)})
    before = fingerprint(model)
    mc_predict(model, x())
    assert_same(before, fingerprint(model))


def test_a_wrapped_model():
    model = Net()
    wrapped = nn.DataParallel(model)
    torch.manual_seed(0)
    a = mc_predict(wrapped, x())
    torch.manual_seed(0)
    assert torch.equal(a.mean, mc_predict(model, x()).mean)
