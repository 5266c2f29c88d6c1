# SPDX-License-Identifier: MIT
"""Checks of dim.py: golden values of the authors' code, closed forms, single steps, one run."""

import copy
import io
import itertools
import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn as nn
import torch.nn.functional as F

import dim as v
import measure

torch.set_num_threads(1)
TINY = dict(
    sample_rate=8000,
    n_fft=256,
    win=200,
    hop=80,
    n_mels=20,
    crop=1920,
    batch_size=4,
    channels=8,
    d_global=6,
    hidden=16,
    units=12,
    concat_units=8,
    decoder_channels=8,
    steps=10,
    infomax_share=0.5,
    lr=2e-3,
    device="cpu",
)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LOG2 = math.log(2)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(x, y, tolerance=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(x),
        torch.as_tensor(y).to(torch.as_tensor(x).dtype),
        atol=tolerance,
        rtol=tolerance,
    )


def corpus_of(waves, speaker):
    """What the method needs of a Corpus. All utterances are both of training and held out."""
    length = np.array([len(w) for w in waves])
    audio = (torch.cat(list(waves)) * 32768).round().clamp(-32768, 32767).short()
    c = SimpleNamespace(
        train=np.arange(len(waves)),
        held=np.arange(len(waves)),
        length=length,
        audio=audio,
        start=length.cumsum() - length,
        speaker=np.array(speaker),
        speakers=[f"s{i}" for i in range(max(speaker) + 1)],
        paths=[v.Path(f"u{i}.wav") for i in range(len(waves))],
    )
    c.wave = lambda u: c.audio[c.start[u] : c.start[u] + c.length[u]].float() / 32768
    c.test = c
    return c


def voice(pitch, seconds, rate=8000):
    turn = 2 * math.pi * pitch * torch.arange(int(seconds * rate)) / rate
    return 0.1 * sum((h * turn).sin() / h for h in range(1, 8)) + 0.003 * torch.randn(len(turn))


@pytest.fixture(scope="module")
def corpus():
    """Three utterances of each of four voices, one of each held out; a test set of two others."""
    torch.manual_seed(1)
    corpora = []
    for voices in (range(4), range(4, 6)):
        waves = []
        for number in voices:
            for u in range(3):
                waves.append(voice(100 * 1.3**number * (1 + 0.02 * u), 0.4 + 0.05 * u))
        corpora.append(corpus_of(waves, np.repeat(range(len(voices)), 3)))
    c, c.test = corpora
    c.held, c.test.held = np.array([2, 5, 8, 11]), np.array([0, 1, 3, 4])
    c.train = np.setdiff1d(c.train, c.held)
    return c


def started(corpus, **options):
    """-> model after prepare, optimizers, cfg."""
    cfg = v.Config(**TINY | options)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    return model, v.make_optimizers(model, cfg), cfg


def trained(corpus, **options):
    """As started(), one step on, in eval mode."""
    model, optimizers, cfg = started(corpus, **options)
    v.train_step(model.train(), optimizers, corpus, 0, cfg)
    return model.eval(), optimizers, cfg


@pytest.fixture
def drawn(monkeypatch):
    """Every batch that is drawn: (corpus, step, draw, utterances)."""
    seen, inner = [], v.get_batch

    def get_batch(corpus, cfg, step, draw=0, utterances=None):
        chosen = None if utterances is None else utterances.tolist()
        seen.append((corpus, step, draw, chosen))
        return inner(corpus, cfg, step, draw, utterances)

    monkeypatch.setattr(v, "get_batch", get_batch)
    return seen


def square(p, q):
    """One positive logit p and one negative q everywhere -> u (2, 2, 1)."""
    return torch.tensor([[[p], [q]], [[q], [p]]], dtype=torch.float32)


# -------------------- golden values --------------------
GOLDEN = json.loads((Path(__file__).parent / "golden" / "dim.json").read_text())


def formula(k, shape, scale=1.0, offset=0.0):
    """The numbers of layer k of the golden file, in float64."""
    p = 1_000_003
    i = torch.arange(math.prod(shape)) % p
    square = i * i % p
    h = 271829 * (square * i % p) + 314159 * ((k + 1) * square % p)
    h = (h + 161803 * ((k + 3) * i % p) + 577215 * (k + 1)) % p
    return (offset + scale * (2 * h.double() / p - 1)).view(shape)


def filled(part):
    """The tensors of a part of the golden file, in its order."""
    return [formula(x["k"], x["shape"], x["scale"], x["offset"]) for x in part["layers"]]


def same(ours, golden):
    """Holds a tensor, or the sampled entries, mean and mean square of one, to the golden values."""
    ours, tolerance = ours.detach().double(), golden["tolerance"]
    if "index" not in golden:
        assert abs(ours - golden["value"]) <= tolerance * max(1, abs(golden["value"]))
        return
    assert list(ours.shape) == golden["shape"]
    scale = math.sqrt(golden["mean_square"])
    value = torch.tensor(golden["value"], dtype=torch.float64)
    assert (ours.flatten()[golden["index"]] - value).abs().max() <= tolerance * scale
    assert abs(ours.mean() - golden["mean"]) <= tolerance * scale
    assert abs(ours.square().mean() - golden["mean_square"]) <= 2 * tolerance * scale**2


def test_the_formula_of_the_golden_values():
    for check in GOLDEN["fill_check"]:
        assert abs(formula(check["k"], (check["i"] + 1,))[-1] - check["value"]) < 1e-12


@pytest.mark.parametrize("case", GOLDEN["bounds"]["results"])
def test_bounds_are_those_of_the_authors(case):
    """Values and gradients. D5: for nce the golden file has the authors' mask made exact."""
    golden = GOLDEN["bounds"]["results"][case]
    u = (golden["scale_of_u"] * filled(GOLDEN["bounds"])[0]).requires_grad_()
    value = v.bound(u, golden["objective"])
    same(value, golden["bound"])
    same(torch.autograd.grad(value, u)[0], golden["gradient_to_u"])


def test_prior_losses_are_those_of_the_authors():
    """D7: non-saturating, and with the penalty of their code."""
    golden = GOLDEN["prior"]["outputs"]
    real, fake, *weights = filled(GOLDEN["prior"])
    critic = v.prior_critic(6).double()
    for parameter, value in zip(critic.parameters(), weights, strict=True):
        parameter.data.copy_(value)
    same(critic(real), golden["d_real"])
    same(critic(fake), golden["d_fake"])

    plain = v.prior_critic_loss(critic, real, fake, 0.0)
    loss = v.prior_critic_loss(critic, real, fake, 1.0)
    same(plain, golden["critic_loss_without_penalty"])
    same(loss - plain, golden["penalty_mean_of_both"])
    gradient = torch.autograd.grad(loss, critic[2].weight)[0]
    same(gradient, golden["gradient_of_critic_loss_with_mean_penalty_to_weight_of_dense_2"])
    for rows in ("real", "fake"):
        x = {"real": real, "fake": fake}[rows]
        difference = v.prior_critic_loss(critic, x, x, 1.0) - v.prior_critic_loss(critic, x, x, 0.0)
        same(difference, golden[f"penalty_{rows}"])

    q = fake.clone().requires_grad_()
    loss = v.prior_loss(critic, q)
    same(loss, golden["encoder_loss"])
    same(torch.autograd.grad(loss, q)[0], golden["gradient_of_encoder_loss_to_fake"])


def test_a_branch_of_the_dot_critic_is_that_of_the_authors():
    golden = GOLDEN["dot_critic_branch"]["outputs"]
    x, *weights, mean, variance = filled(GOLDEN["dot_critic_branch"])
    branch = v.Branch(6, 32).double()
    order = [
        branch.enter.weight,
        branch.norm.weight,
        branch.norm.bias,
        branch.leave.weight,
        branch.leave.bias,
        branch.shortcut.weight,
        branch.layer_norm.weight,
        branch.layer_norm.bias,
    ]
    for parameter, value in zip(order, weights, strict=True):
        parameter.data.copy_(value)
    x.requires_grad_()
    z = branch(x)
    same(z, golden["training"])
    (gradient,) = torch.autograd.grad(z.square().sum(), x)
    same(gradient, golden["gradient_of_sum_of_squares_to_x_training"])
    same(branch.norm.running_mean, golden["running_mean_after_one_training_pass_from_0"])
    same(branch.norm.running_var, golden["running_variance_after_one_training_pass_from_1"])
    branch.norm.running_mean.copy_(mean)
    branch.norm.running_var.copy_(variance)
    same(branch.eval()(x), golden["evaluation"])


# -------------------- the bounds --------------------
@pytest.mark.parametrize(
    "p, q, s",
    [
        (0, 0, 0),
        (40, -40, 2 * LOG2),
        (1e4, -1e4, 2 * LOG2),
        (-1e4, 1e4, 2 * LOG2 - 2e4),
        (1, -2, 2 * LOG2 - math.log1p(math.exp(-1)) - math.log1p(math.exp(-2))),
    ],
)
def test_jsd_values(p, q, s):
    close(v.bound(square(p, q), "jsd"), s, 1e-6)


def test_jsd_is_binary_cross_entropy_up_to_constants():
    """D6: with as many negatives as positives 2 BCE = 2 log 2 - jsd."""
    u = torch.randn(2, 2, 5)
    labels = torch.eye(2)[..., None].expand(2, 2, 5)
    close(2 * F.binary_cross_entropy_with_logits(u, labels), 2 * LOG2 - v.bound(u, "jsd"))


def test_dv_ignores_a_constant_and_does_not_overflow():
    u = torch.randn(4, 4, 5, dtype=torch.float64)
    close(v.bound(u + 7, "dv"), v.bound(u, "dv"), 1e-9)
    assert abs(v.bound(u + 7, "jsd") - v.bound(u, "jsd")) > 1  # to jsd it matters
    # log E exp of N(500, 1) is 500.5
    assert abs(v.bound(500 + torch.randn(40, 40, 1), "dv") + 0.5) < 0.25


@pytest.mark.parametrize("objective", ["jsd", "dv", "nce"])
def test_a_critic_that_knows_nothing_gives_0(objective):
    close(v.bound(torch.zeros(5, 5, 3), objective), 0.0)


def test_nce_ends_at_log_k():
    """K = 1 + (B - 1) T'. D5: no constant of -10 in the place of a mask, which would give -17.9."""
    close(v.bound(50 * torch.eye(32)[..., None], "nce"), math.log(32))
    close(v.bound(50 * torch.eye(4)[..., None].expand(4, 4, 5), "nce"), math.log(1 + 3 * 5))
    close(v.bound(torch.full((8, 8, 1), -30.0), "nce"), 0.0)


@pytest.mark.parametrize("objective", ["jsd", "dv", "nce"])
def test_positives_are_the_diagonal(objective):
    u = torch.randn(4, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(v.bound(u, objective), u)
    own = torch.eye(4, dtype=torch.bool)
    assert (gradient[own] > 0).all() and (gradient[~own] < 0).all()
    order = torch.randperm(4)
    close(v.bound(u[order][:, order], objective), v.bound(u, objective), 1e-5)


@pytest.mark.parametrize("objective", ["jsd", "dv", "nce"])
def test_gradients_stay_finite(objective):
    u = (1e4 * torch.randn(4, 4, 3)).requires_grad_()
    value = v.bound(u, objective)
    assert value.isfinite() and torch.autograd.grad(value, u)[0].isfinite().all()


def log_ratio(x, y, rho):
    """The optimal critic of a correlated pair: log p(x, y) / p(x) p(y)."""
    return -0.5 * math.log(1 - rho**2) - (rho**2 * (x**2 + y**2) - 2 * rho * x * y) / (
        2 * (1 - rho**2)
    )


def pairs(n, rho):
    x = torch.randn(n)
    return x, rho * x + math.sqrt(1 - rho**2) * torch.randn(n)


@pytest.mark.parametrize("rho, nce", [(0.3, 0.0468), (0.5, 0.1442), (0.8, 0.4947), (0.9, 0.8065)])
def test_the_optimal_critic_gives_the_mutual_information(rho, nce):
    """dv finds -0.5 log(1 - rho^2), nce of 64 a little less; half of jsd is the Jensen-Shannon
    divergence, here by Monte Carlo."""

    def scores(x, y):
        return log_ratio(x[None], y[:, None], rho)[..., None]

    x, y = pairs(3000, rho)
    assert abs(v.bound(scores(x, y), "dv") + 0.5 * math.log(1 - rho**2)) < 0.06
    x, y = (h.split(64) for h in pairs(64 * 200, rho))
    batches = [scores(a, b) for a, b in zip(x, y)]
    assert abs(torch.stack([v.bound(u, "nce") for u in batches]).mean() - nce) < 0.03

    x, y = pairs(200_000, rho)
    p = log_ratio(x, y, rho).double()
    q = log_ratio(x, y.roll(1), rho).double()
    jensen_shannon = (LOG2 - F.softplus(-p)).mean() / 2 + (LOG2 - F.softplus(q)).mean() / 2
    half = torch.stack([v.bound(u, "jsd") for u in batches]).mean() / 2
    assert abs(half - jensen_shannon) < 0.02 and half < LOG2


# -------------------- the critics --------------------
def test_dot_critic_is_a_scaled_product_of_all_pairs():
    critic = v.DotCritic(5, 3, 16)
    c, y = torch.randn(4, 7, 5), torch.randn(4, 3)
    u = critic(c, y)
    a, b = critic.cell(c), critic.vector(y)
    assert u.shape == (4, 4, 7)
    for i, j, t in itertools.product(range(4), range(4), range(7)):
        close(u[i, j, t], (a[j, t] * b[i]).sum() / 4, 1e-5)  # sqrt(16)
    assert u.abs().mean() < 1.5  # of order 1 from the start


def test_a_branch_begins_near_the_identity():
    branch = v.Branch(3, 8)
    w = branch.shortcut.weight
    noise = w - torch.eye(8, 3)
    assert (w.diagonal() == 1).all()
    assert -0.01 <= noise.min() < -0.005 and 0.005 < noise.max() <= 0.01
    assert branch.enter.bias is None and branch.shortcut.bias is None
    x = torch.randn(4, 5, 3)
    close(branch(x), branch(x.flatten(0, 1)).view(4, 5, 8), 1e-5)


def test_concat_critic_factored_equals_tiled():
    critic = v.ConcatCritic(5, 3, 8)
    c, y = torch.randn(4, 7, 5), torch.randn(4, 3)
    w = torch.cat([critic.cell.weight, critic.vector.weight], 1)
    tiled = torch.cat([c[None].expand(4, 4, 7, 5), y[:, None, None].expand(4, 4, 7, 3)], -1)
    close(critic(c, y), critic.rest(tiled @ w.T + critic.cell.bias)[..., 0], 1e-5)


def test_parameters_of_the_full_size():
    def count(net):
        return sum(p.numel() for p in net.parameters())

    model = v.Model(v.Config(), 1)
    local = model.critics["local"]
    assert count(model.encoder) == 2_926_144
    assert (count(local.cell), count(local.vector)) == (1_577_984, 1_184_768)
    assert count(model.encoder) + count(model.critics) == 5_688_896
    assert count(model.prior) == 265_401
    assert count(v.Model(v.Config(critic="concat"), 1).critics) == 427_521
    both = v.Model(v.Config(alpha=1.0), 1).critics
    assert (
        list(both) == ["local", "global"]
        and count(both["global"].cell) == 1_577_984 + 2 * 256 * 1024
    )
    assert list(v.Model(v.Config(alpha=1.0, beta=0.0), 1).critics) == ["global"]


# -------------------- the encoder --------------------
def test_shapes_and_receptive_field():
    cfg = v.Config(**TINY)
    net = v.Encoder(cfg).eval()
    for frames, cells in ((128, 32), (24, 6), (26, 6), (27, 6), (4, 1), (3, 1), (1, 1)):
        c, y = net(torch.randn(2, frames, 20))
        assert c.shape == (2, cells, 8) and y.shape == (2, 6) and y.isfinite().all()
    x = torch.randn(1, 3, 20)
    close(net(x)[0], net(torch.cat([x, x[:, :1]], 1))[0])  # repeated up to four frames
    with torch.autocast("cpu", torch.bfloat16):
        assert net(x)[1].dtype == v.pool(x.bfloat16()).dtype == torch.float32
    x = torch.randn(1, 64, 20, requires_grad=True)
    seen = (
        torch.autograd.grad(net(x)[0][0, 8].sum() + (0 * x).sum(), x)[0][0]
        .abs()
        .sum(1)
        .nonzero()[:, 0]
    )
    assert (seen.min(), seen.max()) == (4 * 8 - 5, 4 * 8 + 8)  # 14 frames
    assert (net(torch.randn(1, 64, 20))[0] >= 0).all()  # after a ReLU


def test_layers_are_those_of_the_docstring():
    """Five convolutions without bias, each with BatchNorm. The third gives the map, and the
    statistics of the fifth go on."""
    net = v.Encoder(v.Config(**TINY))
    x = torch.randn(3, 24, 20)
    h, taps = x.mT, [(5, 1, 2), (4, 2, 1), (4, 2, 1), (3, 1, 1), (3, 2, 1)]
    for layer, (kernel, stride, padding) in zip([*net.local, *net.rest], taps):
        assert layer[0].bias is None and layer[0].kernel_size == (kernel,)
        h = F.batch_norm(
            F.conv1d(h, layer[0].weight, stride=stride, padding=padding), None, None, training=True
        ).relu()
        if layer is net.local[2]:
            c = h
    statistics = torch.cat([h.mean(2), (h.var(2, correction=0) + 1e-5).sqrt()], 1)
    d = F.batch_norm(statistics @ net.dense[0].weight.T, None, None, training=True).relu()
    got = net(x)
    close(got[0], c.mT, 1e-5)
    close(got[1], d @ net.dense[3].weight.T + net.dense[3].bias, 1e-4)


def test_the_order_of_things_does_not_reach_y():
    h = torch.randn(2, 9, 5)
    close(v.pool(h), v.pool(h[:, torch.randperm(9)]), 1e-5)
    close(v.pool(h)[:, 5:], h.std(1, correction=0), 1e-4)
    assert v.pool(torch.ones(1, 1, 5)).isfinite().all()


def test_features(corpus):
    """Bands have mean 0 and deviation 1 over the training set, not over an utterance."""
    model, _, cfg = started(corpus)
    every = torch.cat([model.features(corpus.wave(u)[None])[0] for u in corpus.train])
    assert set(corpus.train) & set(corpus.held) == set() and len(corpus.train) == 8
    close(every.mean(0), torch.zeros(20), 1e-3)
    close(every.std(0)[model.std > 0.11], torch.ones(int((model.std > 0.11).sum())), 1e-2)
    assert model.features(corpus.wave(0)[None])[0].mean(0).abs().max() > 0.1
    close(every.mean(0), torch.zeros(20), 1e-5)
    waves = torch.randn(2, cfg.crop)
    assert torch.equal(model.crops(waves), model.features(waves)[:, :24]) and model.crops(
        waves
    ).shape == (2, 24, 20)
    floor = corpus_of([torch.zeros(4000)] * 4, [0, 0, 1, 1])
    assert started(floor)[0].std.min() == pytest.approx(0.1)


def test_vocode(corpus, monkeypatch):
    """Undoes `features`; the last frame counts twice, and the wave is cut to what is asked for."""
    model, _, cfg = started(corpus)
    x = model.features(corpus.wave(0)[None])  # 3200 samples, 41 frames
    rebuilt = model.features(model.vocode(x, 3200))
    assert (
        model.vocode(x, 3000).shape == (1, 3000) and F.l1_loss(rebuilt[:, 2:-2], x[:, 2:-2]) < 0.5
    )
    given = []
    monkeypatch.setattr(v, "mel_to_magnitude", lambda mel, cfg: given.append(mel) or mel)
    monkeypatch.setattr(v, "griffin_lim", lambda magnitude, cfg: torch.zeros(1, 5000))
    model.vocode(x, 3200)
    close(given[0][:, :41].log(), v.log_mel(corpus.wave(0)[None], cfg), 1e-4)
    assert torch.equal(given[0][:, 41], given[0][:, 40]) and given[0].shape[1] == 42


@pytest.mark.parametrize("crop, frames", [(1920, 24), (2000, 25), (1840, 23)])
def test_decoder(crop, frames):
    """As many frames as a crop has; y standardized, whatever its size, without weights."""
    net = v.Decoder(v.Config(**TINY | dict(crop=crop)))
    y = torch.randn(16, 6)
    assert net(y).shape == (16, frames, 20) and not list(net.net[0].parameters())
    close(net(y), net(0.1 * y + 3), 1e-2)
    assert (net(y)[0] - net(y)[1]).abs().max() > 0.01
    still = net.eval()(y)
    close(net(y[:3]), still[:3], 1e-5)  # in eval each by itself


# -------------------- the prior --------------------
class Linear(nn.Module):
    def __init__(self, w, b=0.0):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))

    def forward(self, x):
        return x @ self.w[:, None] + self.b


def test_prior_losses_of_a_critic_that_knows_nothing():
    critic, p, q = Linear([0.0, 0.0]), torch.rand(5, 2), torch.rand(5, 2)
    close(v.prior_critic_loss(critic, p, q, 1.0), 2 * LOG2)
    close(v.prior_loss(critic, q), LOG2)


def test_the_penalty_is_weighted_and_reaches_the_critic():
    """The gradient of a linear critic is w everywhere: |w|^2 = 25."""
    critic, p, q = Linear([3.0, 4.0]), torch.rand(5, 2), torch.rand(5, 2)
    plain, half = (v.prior_critic_loss(critic, p, q, weight) for weight in (0.0, 0.5))
    close(half - plain, 12.5, 1e-5)
    close(torch.autograd.grad(half - plain, critic.w)[0], torch.tensor([3.0, 4.0]), 1e-5)


def test_the_prior_losses_mark_nothing_of_their_callers():
    """No tensor that comes in requires a gradient afterwards, and one that does gets none."""
    critic, p, q = Linear([3.0, 4.0]), torch.rand(5, 2), torch.rand(5, 2)
    v.prior_critic_loss(critic, p, q, 1.0).backward()
    v.prior_loss(critic, q)
    assert not p.requires_grad and not q.requires_grad
    y = torch.rand(5, 2, requires_grad=True)
    v.prior_critic_loss(critic, p, y.sigmoid(), 1.0).backward()
    assert y.grad is None


@pytest.mark.parametrize("loss", ["prior_critic_loss", "prior_loss"])
def test_the_prior_losses_are_in_float32(loss):
    """They switch autocast off for the critic, and on again."""
    seen = []

    def critic(x):
        seen.append(torch.is_autocast_enabled("cuda"))
        return x.sum(1, keepdim=True)

    q = torch.rand(5, 2)
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        if loss == "prior_loss":
            v.prior_loss(critic, q)
        else:
            v.prior_critic_loss(critic, q, q, 1.0)
        assert torch.is_autocast_enabled("cuda") and seen and not any(seen)
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_the_prior_loss_does_not_saturate():
    """D7: where the critic is sure that q is not of the prior, the gradient is full; in the form
    printed as Eq. (7) it vanishes."""
    critic, q = Linear([-20.0, -20.0]), torch.rand(5, 2).add(1).requires_grad_()
    (ours,) = torch.autograd.grad(v.prior_loss(critic, q), q)
    (printed,) = torch.autograd.grad((1 - critic(q).sigmoid()).log().mean(), q)
    close(ours, torch.full((5, 2), 20.0 / 5), 1e-4)
    assert printed.abs().max() < 1e-6


def test_encoder_and_prior_critic_have_opposite_signs():
    """A widespread port adds the critic's loss to the encoder's, which then flees the prior."""
    critic, q = Linear([1.0, -2.0]), torch.rand(5, 2)
    a, b = q.clone().requires_grad_(), q.clone().requires_grad_()
    (encoder,) = torch.autograd.grad(v.prior_loss(critic, a), a)
    F.softplus(critic(b)).mean().backward()  # what the critic lowers
    assert (encoder * b.grad < 0).all()


def test_the_prior_is_reached():
    """y without a network, driven by the two losses alone, from a corner of the square: sigmoid(y)
    becomes uniform in mean and variance."""
    critic, y = v.prior_critic(2), (0.3 * torch.randn(100, 2) + 2).requires_grad_()
    encoder, opponent = torch.optim.Adam([y], 0.04), torch.optim.Adam(critic.parameters(), 2e-3)
    before = y.detach().sigmoid()
    for _ in range(160):
        loss = v.prior_critic_loss(critic, torch.rand(100, 2), y.sigmoid(), 0.1)
        opponent.zero_grad()
        loss.backward()
        opponent.step()
        encoder.zero_grad()
        v.prior_loss(critic, y.sigmoid()).backward()
        encoder.step()
    q = y.detach().sigmoid()
    assert (before.mean(0) > 0.8).all() and (before.var(0) < 0.01).all()
    close(q.mean(0), torch.full((2,), 0.5), 0.05)
    close(q.var(0), torch.full((2,), 1 / 12), 0.015)


# -------------------- a step --------------------
def changed(before, after):
    return {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}


@pytest.mark.parametrize(
    "gamma, moved", [(0.1, {"encoder", "critics", "prior"}), (0.0, {"encoder", "critics"})]
)
def test_which_step_moves_what(corpus, gamma, moved):
    model, optimizers, cfg = started(corpus, gamma=gamma)
    before = copy.deepcopy(model.state_dict())
    log = v.train_step(model.train(), optimizers, corpus, 4, cfg)
    between = copy.deepcopy(model.state_dict())
    assert changed(before, between) == moved and ("prior_loss" in log) == bool(gamma)
    log = v.train_step(model.train(), optimizers, corpus, 5, cfg)  # the other half of the steps
    # Of the encoder nothing, no running mean either.
    assert changed(between, model.state_dict()) == {"decoder"}
    assert log.keys() == {"decoder_loss"}


def test_the_two_players_do_not_move_each_other(corpus, monkeypatch):
    """The prior's critic learns from detached y, the encoder without a gradient for the critic."""
    model, optimizers, cfg = started(corpus)
    seen = []
    monkeypatch.setattr(
        optimizers["prior"],
        "step",
        lambda: seen.append([p.grad for p in model.encoder.parameters()]),
    )
    v.train_step(model.train(), optimizers, corpus, 0, cfg)
    assert seen == [[None] * len(seen[0])]
    kept = [p.grad.clone() for p in model.prior.parameters()]
    optimizers["prior"].zero_grad()
    torch.manual_seed(0)
    model2, optimizers2, _ = started(corpus)  # the same once more: grads of the critic's own loss
    monkeypatch.setattr(
        optimizers2["prior"],
        "step",
        lambda: seen.append([p.grad.clone() for p in model2.prior.parameters()]),
    )
    v.train_step(model2.train(), optimizers2, corpus, 0, cfg)
    assert all(torch.equal(p.grad, g) for p, g in zip(model2.prior.parameters(), seen[1]))
    assert kept[0].abs().max() > 0


def test_the_loss_is_the_weighted_sum(corpus):
    model, optimizers, cfg = started(corpus, alpha=0.3, beta=0.7, gamma=2.0)
    log = v.train_step(model.train(), optimizers, corpus, 0, cfg)
    close(log["loss"], -0.3 * log["global"] - 0.7 * log["local"] + 2.0 * log["prior_loss"], 1e-5)
    assert all(value.dim() == 0 and not value.requires_grad for value in log.values())


def test_every_step_has_a_batch_of_its_own(corpus, drawn):
    """With --pair cross two crops of each utterance, in the decoder's steps one."""
    model, optimizers, cfg = started(corpus, pair="cross")
    for step in (0, 3, 5, 7):
        v.train_step(model.train(), optimizers, corpus, step, cfg)
    assert [(step, draw) for _, step, draw, _ in drawn] == [(0, 0), (3, 0), (5, 0), (7, 0)]
    assert [utterances is None for *_, utterances in drawn] == [False, False, True, True]
    assert drawn[0][3] != drawn[1][3] and all(c is corpus for c, *_ in drawn)


def test_the_order_of_the_players(corpus, monkeypatch):
    """First the prior's critic, from gradients of its own loss alone, then the encoder against the
    critic as it is now."""
    model, optimizers, cfg = started(corpus)
    losses, order, inner, step = (
        [],
        [],
        (v.prior_critic_loss, v.prior_loss),
        optimizers["prior"].step,
    )
    parameters = list(model.prior.parameters())

    def first(*a):
        losses.append(inner[0](*a))
        return losses[-1]

    def moving():
        own = torch.autograd.grad(losses[-1], parameters, retain_graph=True)
        order.append(all(torch.equal(p.grad, g) for p, g in zip(parameters, own)))
        step()

    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, *a, **k: backward(self, *a, retain_graph=True, **k)
    )
    monkeypatch.setattr(v, "prior_critic_loss", first)
    monkeypatch.setattr(v, "prior_loss", lambda d, q: order.append("encoder") or inner[1](d, q))
    monkeypatch.setattr(optimizers["prior"], "step", moving)
    for i in range(2):
        v.train_step(model.train(), optimizers, corpus, i, cfg)
        assert order == [True, "encoder"] * (i + 1)


def test_what_the_decoder_learns(corpus):
    """The squared error of a batch, from y of the encoder in eval mode."""
    model, optimizers, cfg = trained(corpus)
    x = model.crops(v.get_batch(corpus, cfg, 6)["wave"])
    y = model.encoder(x)[1]
    expected = (copy.deepcopy(model.decoder).train()(y) - x).square().mean()
    given = []
    forward = model.decoder.forward
    model.decoder.forward = lambda y: given.append(y) or forward(y)
    log = v.train_step(model.train(), optimizers, corpus, 6, cfg)
    close(given[0], y)
    assert not given[0].requires_grad
    close(log["decoder_loss"], expected, 1e-5)


@pytest.mark.parametrize("pair", ["same", "cross"])
def test_pairs(corpus, pair, monkeypatch):
    """same: y and cells of one crop; cross: y of the first, cells of another crop of the same
    utterance (D6), through the encoder in one call; D4: the global critic gets the map pooled."""
    model, _, cfg = started(corpus, pair=pair, alpha=1.0)
    batches, get = [], v.get_batch
    monkeypatch.setattr(v, "get_batch", lambda *given: batches.append(get(*given)) or batches[-1])
    x = v.draw_crops(model, corpus, cfg, 0)
    (batch,) = batches
    close(x, model.crops(batch["wave"]))
    chosen = batch["utterance"].tolist()
    assert len(set(chosen)) == 4 and set(chosen) <= set(corpus.train)
    assert chosen == (chosen[:4] if pair == "same" else chosen[:4] * 2)
    if pair == "cross":
        assert (x[:4] - x[4:]).abs().amax((1, 2)).min() > 0.1
        v.draw_crops(model, corpus, cfg, 1)
        assert batches[1]["utterance"].tolist() != chosen

    calls, given, forward = [], {}, model.encoder.forward
    model.encoder.forward = lambda x: calls.append(x) or forward(x)
    for level, critic in model.critics.items():
        critic.forward = lambda c, y, level=level: (
            given.update({level: (c, y)}) or torch.zeros(4, 4, c.shape[1])
        )
    u, y = v.scores(model, x, cfg)
    assert len(calls) == 1 and list(u) == ["local", "global"]
    c, ys = forward(x)
    close(given["local"][0], c[-4:])
    close(given["global"][0], v.pool(c[-4:])[:, None])
    for level in u:
        close(given[level][1], ys[:4])
    close(y, ys[:4])


def test_the_prior_sees_sigmoids_and_the_whole_square(corpus, monkeypatch):
    model, optimizers, cfg = started(corpus)
    seen, inner = [], v.prior_critic_loss
    monkeypatch.setattr(
        v,
        "prior_critic_loss",
        lambda d, real, fake, w: seen.append((real, fake, w)) or inner(d, real, fake, w),
    )
    monkeypatch.setattr(v, "prior_loss", lambda d, q: seen.append(q) or (0 * q).sum())
    v.train_step(model.train(), optimizers, corpus, 0, cfg)
    (real, fake, weight), q = seen
    assert weight == cfg.penalty and torch.equal(fake, q) and q.requires_grad
    assert 0 < real.min() < 0.2 and 0.8 < real.max() < 1 and 0 < q.min() and q.max() < 1


def test_a_batch_is_learned_by_heart(corpus, monkeypatch):
    model, optimizers, cfg = started(corpus, gamma=0.0, steps=200, infomax_share=1.0, lr=1e-2)
    batch = v.get_batch(corpus, cfg, 0)
    monkeypatch.setattr(v, "get_batch", lambda *a: batch)
    logs = [v.train_step(model.train(), optimizers, corpus, i, cfg) for i in range(120)]
    assert logs[-1]["local"] > 1.3 > logs[0]["local"] + 0.8


def test_the_decoder_learns_to_tell_crops_apart(corpus, monkeypatch):
    model, optimizers, cfg = started(corpus, lr=1e-2, decoder_channels=32)
    batch = v.get_batch(corpus, cfg, 0)
    monkeypatch.setattr(v, "get_batch", lambda *a: batch)
    logs = [v.train_step(model.train(), optimizers, corpus, 9, cfg) for _ in range(200)]
    assert logs[-1]["decoder_loss"] < 0.5 * logs[0]["decoder_loss"]


def test_the_share_of_steps(corpus):
    phases = {}
    for share, steps in ((0.5, 10), (0.0, 10), (1.0, 10), (0.55, 3)):
        model, optimizers, cfg = started(corpus, infomax_share=share, steps=steps)
        phases[share, steps] = [
            "loss" in v.train_step(model.train(), optimizers, corpus, i, cfg) for i in range(steps)
        ].count(True)
    assert phases == {(0.5, 10): 5, (0.0, 10): 1, (1.0, 10): 10, (0.55, 3): 2}


def test_the_optimizers_share_out_all_parameters(corpus):
    model, optimizers, _ = started(corpus, alpha=1.0)
    held = {}
    for name, optimizer in optimizers.items():
        held[name] = {id(p) for group in optimizer.param_groups for p in group["params"]}
    expected = {
        "encoder": [*model.encoder.parameters(), *model.critics.parameters()],
        "prior": model.prior.parameters(),
        "decoder": model.decoder.parameters(),
    }
    assert held == {name: {id(p) for p in ps} for name, ps in expected.items()}
    assert set().union(*held.values()) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("wrong", [dict(batch_size=1), dict(crop=639), dict(alpha=0.0, beta=0.0)])
def test_sizes_that_teach_nothing(wrong):
    with pytest.raises(v.UserError, match="--batch-size >= 2, --crop >= 8 hops"):
        v.Config(**TINY | wrong)
    v.Config(**TINY | dict(batch_size=2, crop=640))


# -------------------- what it is good for --------------------
def test_represent_and_convert(corpus):
    model, _, cfg = trained(corpus)
    wave = corpus.wave(2)
    x = model.features(wave[None])
    codes = v.represent(model, wave, cfg)
    c, y = model.encoder(x)
    assert torch.equal(codes["local"], c[0]) and torch.equal(codes["global"], y[0])
    assert codes["local"].shape == (x.shape[1] // 4, 8) and codes["global"].shape == (6,)
    waves = [wave, torch.randn(200) * 0.1, torch.randn(cfg.crop) * 0.1]
    for source, made in zip(waves, v.convert(model, waves, [None] * 3, cfg)):
        assert made.shape == source.shape and made.isfinite().all()


def test_convert_decodes_crop_by_crop(corpus, monkeypatch):
    """A y for each 24 frames; the last part is filled up with the beginning, and cut."""
    model, _, cfg = started(corpus)
    model.eval()
    seen = []
    monkeypatch.setattr(
        model.encoder,
        "forward",
        lambda x: (None, seen.append(x) or torch.arange(6.0).repeat(len(x), 1)),
    )
    monkeypatch.setattr(model, "vocode", lambda x, n: seen.append((x, n)) or torch.zeros(1, n))
    wave = corpus.wave(2)  # 4000 samples, 51 frames
    v.convert(model, [wave], [None], cfg)
    x = model.features(wave[None])[0]
    given, (made, n) = seen
    close(given, torch.cat([x, x[:21]]).view(3, 24, 20))
    crop = model.decoder(torch.arange(6.0)[None])[0]
    assert n == 4000 and made.shape == (1, 51, 20)
    close(made[0], torch.cat([crop, crop, crop])[:51], 1e-5)


def test_sample(corpus, tmp_path):
    """Figures and draws of the prior, the same again: the seed is its own."""
    model, _, cfg = started(corpus)
    metrics = v.sample(model.eval(), corpus, cfg, tmp_path)
    assert {name: set(row) for name, row in metrics.items()} == {
        "bound": {"local"},
        "prior": {"mean", "variance"},
    }
    assert json.dumps(metrics)
    assert all(math.isfinite(value) for row in metrics.values() for value in row.values())
    assert {path.name for path in tmp_path.iterdir()} == {f"prior_{i}.wav" for i in range(3)}
    assert sf.info(tmp_path / "prior_0.wav").frames == cfg.crop
    first = (tmp_path / "prior_0.wav").read_bytes()
    assert v.sample(model, corpus, cfg, tmp_path) == metrics
    assert (tmp_path / "prior_0.wav").read_bytes() == first
    assert first != (tmp_path / "prior_1.wav").read_bytes()
    v.sample(model, corpus, replace(cfg, gamma=0.0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_draws_of_the_prior(corpus, tmp_path, monkeypatch):
    """y = logit(v) with v uniform, decoded."""
    model, _, cfg = started(corpus, d_global=400)
    given, forward = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda y: given.append(y) or forward(y))
    v.sample(model.eval(), corpus, cfg, tmp_path)
    (y,) = given
    drawn = y.sigmoid()
    assert drawn.shape == (3, 400) and 0 < drawn.min() < 0.05 and 0.95 < drawn.max() < 1
    close(drawn.mean(), 0.5, 0.05)
    close(drawn.var(), 1 / 12, 0.02)


def test_how_far_y_is_from_the_prior(corpus, tmp_path, monkeypatch):
    """Largest errors of mean and variance of an element of sigmoid(y)."""
    model, _, cfg = started(corpus)
    model.critics.clear()
    q = torch.full((4, 6), 0.5)
    q[:, 1] = torch.tensor([0.1, 0.3, 0.5, 0.7])  # mean 0.4, variance 1 / 15
    q[:, 2] = torch.tensor([0.4, 0.5, 0.7, 0.8])  # mean 0.6
    monkeypatch.setattr(model.encoder, "forward", lambda x: (torch.zeros(4, 6, 8), q.logit()))
    prior = v.sample(model.eval(), corpus, cfg, tmp_path)["prior"]
    close(prior["mean"], 0.1, 1e-5)
    close(prior["variance"], 1 / 12, 1e-5)  # elements that do not vary
    q.copy_(torch.rand(4, 6))
    q[:, 3] = torch.tensor([0.9, 0.9, 0.9, 0.9])
    close(v.sample(model, corpus, cfg, tmp_path)["prior"]["mean"], 0.4, 1e-5)


def test_the_bounds_are_of_held_out_speech(corpus, tmp_path, drawn):
    """Means over whole batches of different held-out utterances, the encoder in eval mode."""
    held = SimpleNamespace(**vars(corpus))
    held.held = np.arange(11)
    model, _, cfg = trained(corpus, objective="nce", pair="cross", alpha=1.0)
    drawn.clear()
    bounds = v.sample(model, held, cfg, tmp_path)["bound"]
    assert [(step, draw, us) for _, step, draw, us in drawn] == [
        (0, 1000, [0, 1, 2, 3] * 2),
        (1, 1000, [4, 5, 6, 7] * 2),
    ]
    us = []
    for i in range(2):
        x = v.draw_crops(model, held, cfg, i, 1000, np.arange(4 * i, 4 * i + 4))
        us.append(v.scores(model, x, cfg)[0])
    for level in ("local", "global"):
        close(bounds[level], torch.stack([v.bound(u[level], "nce") for u in us]).mean(), 1e-5)

    drawn.clear()
    held.held = np.arange(8).repeat(10)
    v.sample(model, held, cfg, tmp_path)
    assert len(drawn) == 8  # at most


@pytest.mark.parametrize("held, batch", [([7, 3, 5], [7, 3, 5]), ([7], [7, 7])])
def test_few_held_out_utterances(corpus, tmp_path, drawn, held, batch):
    """No utterance is twice in a batch, where it would be its own negative. One alone has to be."""
    few = SimpleNamespace(**vars(corpus))
    few.held = np.array(held)
    model, _, cfg = trained(corpus)
    drawn.clear()
    assert math.isfinite(v.sample(model, few, cfg, tmp_path)["bound"]["local"])
    assert [utterances for *_, utterances in drawn] == [batch]


# -------------------- the whole --------------------
def phone_accuracy(model, corpus, cfg):
    """Of a linear probe of `local`, fitted on training and scored on held-out frames."""
    names = [path.relative_to(corpus.root).as_posix() for path in corpus.paths]
    seconds = corpus.length / cfg.sample_rate
    parts = corpus.train[:160], corpus.held[:160]
    file = corpus.root / "phones.txt"
    labels, _ = measure.read_labels(file, names, seconds, np.concatenate(parts))
    frames = []
    for us in parts:
        xs = [v.represent(model, corpus.wave(u), cfg)["local"] for u in us]
        phones = [measure.labels_of_frames(labels[u], len(x), seconds[u]) for u, x in zip(us, xs)]
        frames.append((torch.cat(xs), torch.cat(phones)))
    return measure.probe_accuracy(*frames)


def error_rate(encode, pool):
    """Of verification by encode(wave) -> (D,), on 160 test utterances."""
    us = pool.held[:160]
    x = torch.stack([encode(pool.wave(u)) for u in us])
    return measure.equal_error_rate(x, torch.from_numpy(pool.speaker[us]))


def test_a_part_of_the_toy_run(toy_folder, tmp_path, monkeypatch):
    """What the method is for: unseen voices are told apart by y, not by the same encoder untrained
    and not by log-mel, and the map loses phones."""
    monkeypatch.chdir(toy_folder)
    cfg = v.Config(**v.TOY | dict(steps=400, infomax_share=0.75, device="cpu"))
    with redirect_stdout(io.StringIO()):
        corpus = v.load_corpus(cfg)
    torch.manual_seed(0)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)

    def rates():
        phone = phone_accuracy(model.eval(), corpus, cfg)
        return phone, error_rate(lambda wave: v.represent(model, wave, cfg)["global"], corpus.test)

    untrained_phone, untrained_eer = rates()
    optimizers = v.make_optimizers(model, cfg)
    logs = [v.train_step(model.train(), optimizers, corpus, step, cfg) for step in range(cfg.steps)]
    phone, eer = rates()
    log_mel_eer = error_rate(lambda wave: v.log_mel(wave[None], cfg)[0].mean(0), corpus.test)
    assert eer < min(untrained_eer, log_mel_eer) - 0.08
    assert phone < untrained_phone

    # The mean of all speech would have a decoder_loss of 1. The bound holds on held-out speech.
    assert logs[299]["local"] > 0.7 and logs[-1]["decoder_loss"] < 0.85
    assert v.sample(model.eval(), corpus, cfg, tmp_path)["bound"]["local"] > 0.7


@GPU
def test_cuda_equals_cpu(corpus):
    model, _, cfg = started(corpus, alpha=1.0)
    x = v.draw_crops(model, corpus, cfg, 0)
    u, y = v.scores(model, x, cfg)
    on_gpu, z = v.scores(model.cuda(), x.cuda(), cfg)
    close(z.cpu(), y, 1e-3)
    for level in u:
        close(on_gpu[level].cpu(), u[level], 1e-3)
        for objective in ("jsd", "dv", "nce"):
            with torch.autocast("cuda", torch.bfloat16):  # switched off inside
                value = v.bound(on_gpu[level], objective)
            close(value.cpu(), v.bound(u[level], objective), 1e-3)
    cfg = replace(cfg, device="cuda")
    optimizers = v.make_optimizers(model, cfg)
    for step in (0, 5):
        with torch.autocast("cuda", torch.bfloat16):
            log = v.train_step(model.train(), optimizers, corpus, step, cfg)
        assert all(
            value.dtype == torch.float32 and value.isfinite() and value.is_cuda
            for value in log.values()
        )
