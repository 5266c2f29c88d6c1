# SPDX-License-Identifier: MIT
"""Checks of the method in dim.py: closed forms, naive loops, which step moves what, and one short run."""

import copy
import io
import itertools
import json
import math
from contextlib import redirect_stdout
from types import SimpleNamespace
from dataclasses import replace

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
    """What the method needs of a Corpus: waves of any lengths, all of them training and held-out utterances."""
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
    """Three utterances of each of four voices, one of each held out; a test set of two other voices, numbered from 0, again
    three of each, of which four utterances count."""
    torch.manual_seed(1)
    c, test = (
        corpus_of(
            [
                voice(100 * 1.3**s * (1 + 0.02 * u), 0.4 + 0.05 * u)
                for s in voices
                for u in range(3)
            ],
            np.repeat(range(len(voices)), 3),
        )
        for voices in (range(4), range(4, 6))
    )
    c.test, c.held, test.held = test, np.array([2, 5, 8, 11]), np.array([0, 1, 3, 4])
    test.speakers = ["s4", "s5"]
    c.train = np.setdiff1d(c.train, c.held)
    return c


def started(corpus, **options):
    """-> model after prepare, optimizers, cfg."""
    cfg = v.Config(**TINY | options)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    return model, v.make_optimizers(model, cfg), cfg


def trained(corpus, **options):
    """As started(), one step on, so that the encoder is not its control, in eval mode."""
    model, optimizers, cfg = started(corpus, **options)
    v.train_step(model.train(), optimizers, corpus, 0, cfg)
    return model.eval(), optimizers, cfg


@pytest.fixture
def drawn(monkeypatch):
    """Every batch that is drawn: (corpus, step, draw, utterances)."""
    seen, inner = [], v.get_batch
    monkeypatch.setattr(
        v,
        "get_batch",
        lambda corpus, cfg, step, draw=0, utterances=None: (
            seen.append((corpus, step, draw, utterances if utterances is None else set(utterances)))
            or inner(corpus, cfg, step, draw, utterances)
        ),
    )
    return seen


def square(p, q):
    """One positive logit p and one negative q everywhere -> u (2, 2, 1)."""
    return torch.tensor([[[p], [q]], [[q], [p]]], dtype=torch.float32)


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
    value, ceiling = v.bound(square(p, q), "jsd")
    close(value, s, 1e-6)
    close(ceiling, 2 * LOG2)


def test_jsd_is_binary_cross_entropy_in_another_dress():
    """With as many negatives as positives 2 BCE = 2 log 2 - jsd; with more, the two means stay separate."""
    u = torch.randn(2, 2, 5)
    labels = torch.eye(2)[..., None].expand(2, 2, 5)
    close(2 * F.binary_cross_entropy_with_logits(u, labels), 2 * LOG2 - v.bound(u, "jsd")[0])
    u = torch.randn(4, 4, 5)
    p, q = (
        torch.stack([u[i, j] for i in range(4) for j in range(4) if (i == j) == same])
        for same in (True, False)
    )
    close(v.bound(u, "jsd")[0], 2 * LOG2 - F.softplus(-p).mean() - F.softplus(q).mean())


def test_dv_values():
    u = torch.randn(4, 4, 5, dtype=torch.float64)
    p, q = (
        torch.cat([u[i, j] for i in range(4) for j in range(4) if (i == j) == same])
        for same in (True, False)
    )
    value, ceiling = v.bound(u, "dv")
    close(
        value, p.mean() - q.exp().mean().log(), 1e-9
    )  # ONE logarithm of ONE mean over all negatives
    close(v.bound(u + 7, "dv")[0], value, 1e-9)  # a constant does not matter
    assert abs(v.bound(u + 7, "jsd")[0] - v.bound(u, "jsd")[0]) > 1  # to jsd it does
    close(v.bound(torch.full((3, 3, 4), 5.0), "dv")[0], 0.0)
    close(ceiling, math.log(4 * 3 * 5))
    assert (
        abs(v.bound(500 + torch.randn(40, 40, 1), "dv")[0] + 0.5) < 0.25
    )  # finite: log E exp of N(500, 1) is 500.5


def test_nce_values():
    """Candidates are the cell itself and all cells of the others, not its own neighbours: N = 1 + (B - 1) T."""
    u = torch.randn(4, 4, 5, dtype=torch.float64)
    terms = []
    for i, t in itertools.product(range(4), range(5)):
        others = torch.cat([u[i, j] for j in range(4) if j != i])
        terms.append(u[i, i, t] - (u[i, i, t].exp() + others.exp().sum()).log())
    value, ceiling = v.bound(u, "nce")
    close(value, math.log(16) + torch.stack(terms).mean(), 1e-9)
    close(ceiling, math.log(1 + 3 * 5))
    close(v.bound(torch.zeros(32, 32, 1), "nce")[0], 0.0)
    close(v.bound(torch.zeros(32, 32, 1), "nce")[1], math.log(32))
    close(
        v.bound(50 * torch.eye(32)[..., None], "nce")[0], math.log(32)
    )  # never beyond the ceiling
    close(
        v.bound(torch.full((8, 8, 1), -30.0), "nce")[0], 0.0
    )  # a constant of -10 as mask gives -17.9


@pytest.mark.parametrize("objective", ["jsd", "dv", "nce"])
def test_positives_are_the_diagonal(objective):
    u = torch.randn(4, 4, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(v.bound(u, objective)[0], u)
    own = torch.eye(4, dtype=torch.bool)
    assert (gradient[own] > 0).all() and (gradient[~own] < 0).all()
    order = torch.randperm(4)
    close(v.bound(u[order][:, order], objective)[0], v.bound(u, objective)[0], 1e-5)


@pytest.mark.parametrize("objective", ["jsd", "dv", "nce"])
def test_gradients_stay_finite(objective):
    u = (1e4 * torch.randn(4, 4, 3)).requires_grad_()
    value = v.bound(u, objective)[0]
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
    """-0.5 log(1 - rho^2): dv finds it, nce of 64 a little less, and half of jsd is the Jensen-Shannon divergence."""
    x, y = pairs(3000, rho)
    assert (
        abs(
            v.bound(log_ratio(x[None], y[:, None], rho)[..., None], "dv")[0]
            + 0.5 * math.log(1 - rho**2)
        )
        < 0.06
    )
    batches = [
        log_ratio(a[None], b[:, None], rho)[..., None]
        for a, b in zip(*(h.split(64) for h in pairs(64 * 200, rho)))
    ]
    assert abs(torch.stack([v.bound(u, "nce")[0] for u in batches]).mean() - nce) < 0.03
    x, y = (
        h.double() for h in pairs(200_000, rho)
    )  # Monte Carlo of the divergence, no critic needed
    p, q = log_ratio(x, y, rho), log_ratio(x, y.roll(1), rho)
    jensen_shannon = (LOG2 - F.softplus(-p)).mean() / 2 + (LOG2 - F.softplus(q)).mean() / 2
    half = torch.stack([v.bound(u, "jsd")[0] for u in batches]).mean() / 2
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


def test_branch_by_hand():
    """LayerNorm(dense(ReLU(BatchNorm(dense x))) + shortcut x), the shortcut an identity to begin with."""
    branch = v.Branch(3, 8)
    x = torch.randn(4, 5, 3)
    h = x.flatten(0, 1) @ branch.enter.weight.T
    h = ((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt()).relu()
    z = h @ branch.leave.weight.T + branch.leave.bias + x.flatten(0, 1) @ branch.shortcut.weight.T
    z = (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
    close(branch(x), z.view(4, 5, 8), 1e-5)
    w = branch.shortcut.weight
    noise = w - torch.eye(8, 3)
    assert (
        (w.diagonal() == 1).all() and -0.01 <= noise.min() < -0.005 and 0.005 < noise.max() <= 0.01
    )
    assert branch.enter.bias is None and branch.shortcut.bias is None


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
    """Five convolutions without bias, each with BatchNorm, the third gives the map; statistics of the fifth go on."""
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
    """Undoes `features`; a frame more at the end, the last once again, and cut to the samples asked for."""
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
    """As many frames as a crop has; y standardised, whatever its size, without weights."""
    net = v.Decoder(v.Config(**TINY | dict(crop=crop)))
    y = torch.randn(16, 6)
    assert net(y).shape == (16, frames, 20) and not list(net.net[0].parameters())
    close(net(y), net(1e-4 * y + 0.03), 1e-2)
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


def test_prior_losses_in_closed_form():
    knows_nothing, v_, q = Linear([0.0, 0.0]), torch.rand(5, 2), torch.rand(5, 2)
    close(v.prior_critic_loss(knows_nothing, v_, q, 1.0), 2 * LOG2)
    close(v.prior_loss(knows_nothing, q), LOG2)
    critic = Linear([3.0, 4.0], 1.0)  # its gradient's norm is 5 everywhere
    plain = F.softplus(-critic(v_)).mean() + F.softplus(critic(q)).mean()
    close(v.prior_critic_loss(critic, v_, q, 0.0), plain)
    close(v.prior_critic_loss(critic, v_, q, 0.5), plain + 12.5, 1e-5)
    close(v.prior_loss(critic, q), F.softplus(-critic(q)).mean())


def test_penalty_is_the_mean_over_both_kinds():
    """|x|^2 / 2 has gradient x: the mean of |v|^2 and |q|^2, and it depends on the critic."""

    def half_square(x):
        return (x**2).sum(1, keepdim=True) / 2

    v_, q = torch.rand(5, 2), 3 * torch.rand(5, 2)
    expected = (v_.square().sum(1).mean() + q.square().sum(1).mean()) / 2
    difference = v.prior_critic_loss(half_square, v_, q, 1.0) - v.prior_critic_loss(
        half_square, v_, q, 0.0
    )
    close(difference, expected, 1e-5)
    critic, losses = Linear([3.0, 4.0]), []
    for weight in (0.0, 1.0):
        losses.append(torch.autograd.grad(v.prior_critic_loss(critic, v_, q, weight), critic.w)[0])
    close(losses[1] - losses[0], torch.tensor([6.0, 8.0]), 1e-4)  # d |w|^2 / dw


def test_encoder_and_prior_critic_have_opposite_signs():
    """A widespread port adds the critic's loss to the encoder's, which then flees the prior."""
    critic, q = Linear([1.0, -2.0]), torch.rand(5, 2)
    a, b = q.clone().requires_grad_(), q.clone().requires_grad_()
    (encoder,) = torch.autograd.grad(v.prior_loss(critic, a), a)
    F.softplus(critic(b)).mean().backward()  # what the critic lowers
    assert (encoder * b.grad < 0).all()


def test_the_prior_is_reached():
    """y of its own, no network, driven by the two losses alone: from a corner to the middle of the square, spread."""
    critic, y = v.discriminator(2), (0.3 * torch.randn(100, 2) + 2).requires_grad_()
    ours, theirs = torch.optim.Adam([y], 0.02), torch.optim.Adam(critic.parameters(), 1e-3)
    before = y.detach().sigmoid()
    for _ in range(400):
        loss = v.prior_critic_loss(critic, torch.rand(100, 2), y.sigmoid().detach(), 0.1)
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        ours.zero_grad()
        v.prior_loss(critic, y.sigmoid()).backward()
        ours.step()
    q = y.detach().sigmoid()
    assert (before.mean(0) > 0.8).all() and (before.var(0) < 0.01).all()
    assert ((q.mean(0) - 0.5).abs() < 0.1).all() and (q.var(0) > 0.04).all()


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
    assert changed(between, model.state_dict()) == {
        "decoder",
        "control_decoder",
    }  # and no running mean of an encoder
    assert log.keys() == {"decoder_loss", "untrained_decoder_loss"}


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
    close(log["local_ceiling"], 2 * LOG2)
    assert all(value.dim() == 0 and not value.requires_grad for value in log.values())


def test_every_step_has_a_batch_of_its_own(corpus, drawn):
    model, optimizers, cfg = started(corpus, pair="cross")
    for step in (0, 3, 5, 7):
        v.train_step(model.train(), optimizers, corpus, step, cfg)
    assert [(step, draw) for _, step, draw, _ in drawn] == [
        (0, 0),
        (0, 1),
        (3, 0),
        (3, 1),
        (5, 0),
        (7, 0),
    ]
    assert drawn[1][3] is not None and all(c is corpus for c, *_ in drawn)


def test_the_order_of_the_players(corpus, monkeypatch):
    """First the prior's critic, from gradients of its own loss alone, then the encoder against the critic as it is now."""
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


def test_what_the_decoders_learn(corpus):
    """The squared error of a batch, each from the y of its own encoder, both encoders in eval mode."""
    model, optimizers, cfg = trained(corpus)
    x = model.crops(v.get_batch(corpus, cfg, 6)["wave"])
    expected = {
        "decoder_loss": (copy.deepcopy(model.decoder).train()(model.encoder(x)[1]) - x)
        .square()
        .mean(),
        "untrained_decoder_loss": (
            copy.deepcopy(model.control_decoder).train()(model.control(x)[1]) - x
        )
        .square()
        .mean(),
    }
    given = []
    for net in (model.decoder, model.control_decoder):
        net.forward = lambda y, inner=net.forward: given.append(y) or inner(y)
    log = v.train_step(model.train(), optimizers, corpus, 6, cfg)
    model.eval()
    close(given[0], model.encoder(x)[1])
    close(given[1], model.control(x)[1])
    assert not torch.equal(given[0], given[1]) and not given[0].requires_grad
    for name, value in log.items():
        close(value, expected[name], 1e-5)


@pytest.mark.parametrize("objective", ["jsd", "dv", "nce"])
def test_ceilings_are_those_of_the_batch(corpus, objective):
    model, optimizers, cfg = started(corpus, objective=objective, alpha=1.0)
    log = v.train_step(model.train(), optimizers, corpus, 0, cfg)
    local, whole = {"jsd": (4, 4), "dv": (4 * 3 * 6, 4 * 3), "nce": (1 + 3 * 6, 4)}[objective]
    close(log["local_ceiling"], math.log(local))
    close(log["global_ceiling"], math.log(whole))


@pytest.mark.parametrize("pair", ["same", "cross"])
def test_pairs(corpus, pair, monkeypatch):
    """same: y and cells of one crop; cross: y of the first, cells of another crop of the same utterance, through the
    encoder in one call."""
    model, _, cfg = started(corpus, pair=pair, alpha=1.0)
    batches, get = [], v.get_batch
    monkeypatch.setattr(v, "get_batch", lambda *given: batches.append(get(*given)) or batches[-1])
    x = v.segments(model, corpus, cfg, 0)
    chosen = set(batches[0]["utterance"].tolist())
    assert len(chosen) == 4 and chosen <= set(corpus.train)
    close(x[:4], model.crops(batches[0]["wave"]))
    calls, given, forward = [], {}, model.encoder.forward
    model.encoder.forward = lambda x: calls.append(x) or forward(x)
    for level, critic in model.critics.items():
        critic.forward = lambda c, y, level=level: (
            given.update({level: (c, y)}) or torch.zeros(4, 4, c.shape[1])
        )
    u, y = v.scores(model, x, cfg)
    assert len(calls) == 1 and list(u) == ["local", "global"]
    c, ys = forward(x)
    if pair == "same":
        assert len(x) == 4 and len(batches) == 1
    else:
        batch, other = batches
        assert len(x) == 8 and torch.equal(other["utterance"], batch["utterance"])
        close(x[4:], model.crops(other["wave"]))
        v.segments(model, corpus, cfg, 1)
        assert not torch.equal(batches[2]["utterance"], batch["utterance"])
        assert not torch.equal(x[:4], x[4:])
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
        lambda d, real, fake, w: (
            seen.append((real.detach().clone(), fake, w)) or inner(d, real, fake, w)
        ),
    )
    monkeypatch.setattr(v, "prior_loss", lambda d, q: seen.append(q) or (0 * q).sum())
    v.train_step(model.train(), optimizers, corpus, 0, cfg)
    (real, fake, weight), q = seen
    assert weight == cfg.penalty and torch.equal(fake, q) and not fake.grad_fn and q.requires_grad
    assert 0 < real.min() < 0.2 and 0.8 < real.max() < 1 and 0 < q.min() and q.max() < 1


def test_a_batch_is_learned_by_heart(corpus, monkeypatch):
    model, optimizers, cfg = started(corpus, gamma=0.0, steps=200, infomax_share=1.0, lr=1e-2)
    batch = v.get_batch(corpus, cfg, 0)
    monkeypatch.setattr(v, "get_batch", lambda *a: batch)
    logs = [v.train_step(model.train(), optimizers, corpus, i, cfg) for i in range(120)]
    assert logs[-1]["local"] > 1.3 > logs[0]["local"] + 0.8


def test_decoders_learn_to_tell_crops_apart(corpus, monkeypatch):
    model, optimizers, cfg = started(corpus, lr=1e-2, decoder_channels=32)
    batch = v.get_batch(corpus, cfg, 0)
    monkeypatch.setattr(v, "get_batch", lambda *a: batch)
    logs = [v.train_step(model.train(), optimizers, corpus, 9, cfg) for _ in range(200)]
    for name in logs[0]:
        assert logs[-1][name] < 0.5 * logs[0][name], name
    x = model.crops(batch["wave"])
    close(logs[0]["decoder_loss"] > 0, True)
    for net, decoder, name in (
        (model.encoder, model.decoder, "decoder_loss"),
        (model.control, model.control_decoder, "untrained_decoder_loss"),
    ):
        guess = decoder.train()(net.eval()(x)[1])
        assert guess.shape == x.shape and F.mse_loss(guess, x) < 1.2 * logs[-1][name] + 0.01


def test_the_share_of_steps(corpus):
    phases = {}
    for share, steps in ((0.5, 10), (0.0, 10), (1.0, 10), (0.55, 3)):
        model, optimizers, cfg = started(corpus, infomax_share=share, steps=steps)
        phases[share, steps] = [
            "loss" in v.train_step(model.train(), optimizers, corpus, i, cfg) for i in range(steps)
        ].count(True)
    assert phases == {(0.5, 10): 5, (0.0, 10): 1, (1.0, 10): 10, (0.55, 3): 2}


def test_the_control_is_the_encoder_before_training(corpus):
    model, optimizers, cfg = started(corpus)

    def same():
        return all(
            torch.equal(a, b)
            for a, b in zip(
                model.encoder.state_dict().values(), model.control.state_dict().values()
            )
        )

    assert same()
    held = {id(p) for o in optimizers.values() for g in o.param_groups for p in g["params"]}
    assert not any(p.requires_grad or id(p) in held for p in model.control.parameters())
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    v.train_step(model.train(), optimizers, corpus, 0, cfg)
    assert not same()
    torch.manual_seed(0)
    fresh = v.Model(cfg, 4)  # as compare.py makes its own untrained model
    torch.manual_seed(0)
    again = v.Model(cfg, 4)
    v.prepare(again, corpus, cfg)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.encoder.state_dict().values(), again.control.state_dict().values())
    )


@pytest.mark.parametrize("wrong", [dict(batch_size=1), dict(crop=639), dict(alpha=0.0, beta=0.0)])
def test_sizes_that_teach_nothing(wrong):
    with pytest.raises(v.UserError, match="--batch-size 2, --crop 8 times --hop, and --alpha"):
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


def planted(rows):
    """An encoder whose y for an utterance of rows[k][0] samples is rows[k][1]: frames tell which it is."""
    table = {1 + n // 80: torch.tensor(y, dtype=torch.float32) for n, y in rows}
    return lambda x: (None, table[x.shape[1]][None])


def test_retrieval(tmp_path, monkeypatch):
    """Queries are test utterances, searched among all held-out ones, the query itself left out."""
    lengths = [1600 + 160 * k for k in range(6)]
    loud = torch.randn(lengths[3]) * 0.1
    loud[:800] *= 0.01  # but begins as softly as all others
    corpus = corpus_of([torch.randn(n) * 0.001 for n in lengths[:3]], [0, 0, 1])
    corpus.test = corpus_of(
        [loud, torch.randn(lengths[4]) * 0.1, torch.randn(lengths[5]) * 0.001], [0, 0, 1]
    )
    corpus.test.speakers = ["s2", "s3"]  # numbered from 0, as in the corpus, but others
    corpus.test.paths = [v.Path(f"t{i}.wav") for i in range(3)]
    corpus.train = np.arange(1)  # nothing is searched among these
    model, _, cfg = started(corpus)
    order, who = [3, 4, 5, 0, 1, 2], [2, 2, 3, 0, 0, 1]

    def by_hand(y):
        y = np.array(y)[order] - np.mean(y, 0)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        cosine = y @ y.T - 3 * np.eye(6)
        return cosine, np.mean([who[cosine[i].argmax()] == who[i] for i in range(3)])

    def circle(angles):
        return [
            [10 * math.cos(a * math.pi / 180), 10 * math.sin(a * math.pi / 180)] for a in angles
        ]

    good, bad = circle([0, 100, 200, 80, 95, 210]), circle([0, 120, 240, 5, 125, 245])
    monkeypatch.setattr(model.encoder, "forward", planted(list(zip(lengths, good))))
    monkeypatch.setattr(model.control, "forward", planted(list(zip(lengths, bad))))
    found = v.retrieve(model.eval(), corpus, cfg, tmp_path)
    cosine, right = by_hand(good)
    mels = [
        model.features(c.wave(u)[None])[0].mean(0).tolist()
        for c in (corpus, corpus.test)
        for u in range(3)
    ]
    close(
        [found[k] for k in ("global", "untrained", "log_mel")],
        [right, by_hand(bad)[1], by_hand(mels)[1]],
        1e-6,
    )
    assert (
        right == pytest.approx(1 / 3)
        and by_hand(bad)[1] == 0
        and by_hand(mels)[1] == pytest.approx(2 / 3)
    )
    close(found["chance"], (1 + 1 + 0) / 3 / 5)  # one other of the same speaker, of five; or none
    assert found.keys() == {"log_mel", "untrained", "global", "chance"}
    lines = [line.split() for line in (tmp_path / "retrieval.txt").read_text().splitlines()]
    assert len(lines) == 2 * 11 and [line[1] for line in lines if "query" in line[0]] == [
        "t0",
        "t2",
    ]
    assert {line[2] for line in lines if "query" in line[0]} == {
        "1.000"
    }  # not the mark that puts it first
    stems = ["t0", "t1", "t2", "u0", "u1", "u2"]
    best = cosine[0].argsort()[::-1]
    assert [line[1] for line in lines[1:6]] == [stems[i] for i in best[:5]]
    assert [line[1] for line in lines[6:11]] == [stems[i] for i in best[:5][::-1]]
    close([float(line[2]) for line in lines[1:6]], cosine[0][best[:5]], 1e-3)
    for name, stem, _ in lines:
        assert name.endswith(f"_s{who[stems.index(stem)]}.wav")
        assert sf.info(tmp_path / name).frames == lengths[order[stems.index(stem)]]


def test_one_corpus_is_searched_once(tmp_path):
    corpus = corpus_of(
        [torch.randn(1600 + 80 * k) * 0.1 for k in range(10)], np.repeat(np.arange(5), 2)
    )
    model, _, cfg = started(corpus)
    close(v.retrieve(model.eval(), corpus, cfg, tmp_path)["chance"], 1 / 9)
    assert len(list(tmp_path.glob("*query*"))) == 4  # of five speakers


def test_200_utterances_of_each_set_are_searched_at_most(tmp_path):
    corpus = corpus_of([torch.randn(400) * 0.1, torch.randn(480) * 0.1], [0, 1])
    corpus.test = corpus_of([torch.randn(400) * 0.1, torch.randn(480) * 0.1], [0, 1])
    corpus.test.speakers = ["s2", "s3"]
    corpus.held = corpus.test.held = np.repeat([0, 1], [200, 9])
    model, _, cfg = started(corpus)
    close(v.retrieve(model.eval(), corpus, cfg, tmp_path)["chance"], 199 / 399)


def test_a_single_utterance_has_no_neighbour(tmp_path):
    corpus = corpus_of([torch.randn(1600) * 0.1] * 2, [0, 1])
    model, _, cfg = started(corpus)
    corpus.held = np.array([0])
    assert set(v.retrieve(model.eval(), corpus, cfg, tmp_path).values()) == {0.0}


def test_explained_variance():
    x = torch.randn(50, 8, 3) + 2 * torch.randn(50, 1, 3) + torch.tensor([5.0, -1.0, 0.0])
    mean = x.mean(1, keepdim=True)
    table = v.explained(
        x, {"all": x, "nothing": x.mean((0, 1)).expand_as(x), "colour": mean.expand_as(x)}
    )
    for part in ("all", "long_term", "time_varying"):
        close(table[part]["all"], 1.0)
        close(table[part]["nothing"], 0.0, 1e-5)
    close(table["long_term"]["colour"], 1.0)
    close(table["time_varying"]["colour"], 0.0, 1e-5)
    between, within = (mean - x.mean((0, 1))).square().mean(), (x - mean).square().mean()
    close(table["all"]["colour"], between / (between + within), 1e-4)
    half = v.explained(
        x, {"half": x / 2 + x.mean((0, 1)) / 2}
    )  # an error of half the deviation: 1 - 1 / 4
    close(torch.tensor([row["half"] for row in half.values()]), torch.full((3,), 0.75), 1e-5)


@pytest.mark.parametrize("rho, truth", [(0.0, 0.0), (0.5, 0.1438), (0.9, 0.8304)])
def test_mine_learns_the_mutual_information(rho, truth):
    cfg = v.Config(**TINY | dict(batch_size=64, concat_units=64))
    (x, y), (a, b) = (map(lambda h: h[:, None], pairs(n, rho)) for n in (20_000, 4096))
    value, ceiling = v.mine(x, y, a, b, 64, cfg)
    assert abs(value - truth) < 0.08
    close(ceiling, math.log(64 * 63))


def test_critics_are_judged_on_held_out_rows():
    """Trained where columns and pairs depend on one another, judged where they do not."""
    cfg = v.Config(**TINY | dict(batch_size=64, concat_units=16))
    (x, y), (a, b) = (
        map(lambda h: h[:, None], pairs(n, rho)) for n, rho in ((4096, 0.9), (1024, 0.0))
    )
    assert v.mine(x, y, a, b, 64, cfg)[0] < 0
    assert v.dependency(torch.cat([x, y], 1), torch.cat([a, b], 1), cfg)[0] < 0


def test_shuffled_keeps_the_marginals():
    y = torch.randn(200, 3)
    s = v.shuffled(y)
    close(s.sort(0).values, y.sort(0).values, 0)
    assert (s != y).any(0).all() and not torch.equal(s[:, 0].argsort(), s[:, 1].argsort())
    y = y[:, :1].repeat(1, 3)  # one column three times over
    assert torch.corrcoef(v.shuffled(y).T)[0, 1:].abs().max() < 0.3


@pytest.mark.parametrize("rho, truth", [(0.0, 0.0), (0.6, 0.8596)])
def test_dependency_of_gaussians(rho, truth):
    """-0.5 log det R for four equally correlated columns."""
    root = torch.linalg.cholesky(torch.full((4, 4), rho) + (1 - rho) * torch.eye(4))
    close(-0.5 * torch.logdet(root @ root.T), truth, 1e-3)
    y, held = (torch.randn(n, 4) @ root.T for n in (20_000, 8192))
    value, ceiling = v.dependency(y, held, v.Config(**TINY | dict(batch_size=128)))
    assert abs(value - truth) < 0.12
    close(ceiling, math.log(8 * 8192))


def test_dependency_ends_at_its_ceiling():
    y = torch.randn(2000, 1).repeat(1, 6)
    value, ceiling = v.dependency(y, y[:256], v.Config(**TINY | dict(batch_size=128)))
    close(ceiling, math.log(8 * 256))
    close(value, ceiling)


def test_batches_of_few_utterances():
    cfg = v.Config(**TINY)
    assert v.batch_of(np.arange(10), 0, cfg).tolist() == [0, 1, 2, 3] and v.batch_of(
        np.arange(10), 2, cfg
    ).tolist() == [8, 9, 0, 1]
    assert v.batch_of(np.arange(3), 1, cfg).tolist() == [
        0,
        1,
        2,
    ]  # none twice: it would be its own negative
    assert v.batch_of(np.array([7]), 1, cfg).tolist() == [7, 7]


FIGURES = {
    "nearest": {"log_mel", "untrained", "global", "chance"},
    "bound": {"local", "local_ceiling"},
    "mine": {"untrained", "global", "ceiling"},
    "dependency": {"untrained", "global", "ceiling"},
    "prior": {"mean", "variance", "uniform"},
}
PARTS = {
    f"r2_{part}{suffix}": {"untrained", "global", "permuted"}
    for part in ("all", "long_term", "time_varying")
    for suffix in ("", "_test")
}


def sampled(model, corpus, cfg, out):
    with redirect_stdout(io.StringIO()) as said:
        metrics = v.sample(model.eval(), corpus, cfg, out)
    return metrics, said.getvalue()


@pytest.fixture
def hasty(monkeypatch):
    """Critics of the figures stay as they begin, where a test is not about these figures."""
    monkeypatch.setattr(v, "train_critic", lambda *given: None)


def test_sample(corpus, tmp_path):
    model, _, cfg = started(corpus)
    metrics, said = sampled(model, corpus, cfg, tmp_path)
    assert {name: set(row) for name, row in metrics.items()} == FIGURES | PARTS
    assert all(math.isfinite(value) for row in metrics.values() for value in row.values())
    assert (
        said == "no draws of the prior: sigmoid(y) is not uniform\n"
        and metrics["prior"]["uniform"] == 0
    )
    files = {path.name for path in tmp_path.glob("*.wav")}
    assert {
        f"decoded_{i}_{name}.wav"
        for i in range(3)
        for name in ("copy", "global", "untrained", "permuted")
    } <= files
    assert (
        not any("prior" in name for name in files)
        and sum("retrieval" in name for name in files) == 2 * 11
    )
    assert sf.info(tmp_path / "decoded_0_copy.wav").frames == cfg.crop
    again, _ = sampled(model, corpus, cfg, tmp_path)
    assert again == metrics  # its own seed


def test_draws_of_the_prior_where_y_is_the_prior(corpus, tmp_path, monkeypatch):
    """A planted encoder with y = logit of independent uniforms passes the check, and the draws are decoded."""
    model, _, cfg = started(corpus)
    encode = model.encoder.forward
    monkeypatch.setattr(
        model.encoder, "forward", lambda x: (encode(x)[0], torch.rand(len(x), 6).logit(1e-4))
    )
    given, forward = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda y: given.append(y) or forward(y))
    metrics, said = sampled(model, corpus, cfg, tmp_path)
    assert said == "" and metrics["prior"]["uniform"] == 1 and metrics["prior"]["mean"] < 0.05
    assert {path.name for path in tmp_path.glob("decoded_*_prior*")} == {
        f"decoded_{i}_prior.wav" for i in range(3)
    }
    drawn = given[0].sigmoid()
    assert drawn.shape == (3, 6) and 0 < drawn.min() < 0.3 and 0.7 < drawn.max() < 1
    _, said = sampled(model, corpus, replace(cfg, gamma=0.0), tmp_path / "none")
    assert "--gamma is 0" in said


@pytest.mark.parametrize("spoil", ["mean", "variance", "dependency"])
def test_a_check_that_fails_refuses(corpus, tmp_path, monkeypatch, spoil):
    model, _, cfg = started(corpus)
    encode = model.encoder.forward

    def forward(x):
        q = torch.stack(
            [(torch.randperm(len(x)) + torch.rand(len(x))) / len(x) for _ in range(6)], 1
        )
        q[:, 0] = {"mean": q[:, 0] ** 1.35, "variance": 0.1 + 0.8 * q[:, 0], "dependency": q[:, 1]}[
            spoil
        ]
        return encode(x)[0], q.logit(1e-4)

    monkeypatch.setattr(model.encoder, "forward", forward)
    metrics, said = sampled(model, corpus, cfg, tmp_path)
    off = metrics["prior"] | {"dependency": metrics["dependency"]["global"]}
    beyond = {
        "mean": off["mean"] > 0.05,
        "variance": off["variance"] > 0.01,
        "dependency": off["dependency"] > 1,
    }
    assert beyond == {name: name == spoil for name in beyond}
    assert said == "no draws of the prior: sigmoid(y) is not uniform\n" and not list(
        tmp_path.glob("decoded_*_prior*")
    )


def test_controls_are_what_they_say(corpus, tmp_path, monkeypatch, hasty):
    """untrained: the control's vector through ITS decoder; permuted: another utterance's y through the trained one."""
    model, _, cfg = trained(corpus)
    given = {}
    for name in ("decoder", "control_decoder"):
        net = getattr(model, name)
        monkeypatch.setattr(
            net,
            "forward",
            lambda y, name=name, inner=net.forward: (
                given.setdefault(name, []).append(y) or inner(y)
            ),
        )
    seen = {}
    monkeypatch.setattr(
        v,
        "explained",
        lambda x, rebuilt: seen.update({len(seen): x}) or {"all": dict.fromkeys(rebuilt, 0.0)},
    )
    sampled(model, corpus, cfg, tmp_path)
    for k, x in seen.items():
        own, other = given["decoder"][
            1 + 2 * k : 3 + 2 * k
        ]  # the first are the draws of the prior, none
        close(own, model.encoder(x)[1], 1e-5)
        close(given["control_decoder"][k], model.control(x)[1], 1e-5)
        assert not (own == other).all(1).any()
        close(other.sort(0).values, own.sort(0).values, 1e-6)
        assert not torch.equal(given["control_decoder"][k], own)
    assert [len(x) for x in seen.values()] == [4, 4]  # held-out, and test
    model, _, cfg = trained(corpus, batch_size=3)
    seen.clear()
    sampled(model, corpus, cfg, tmp_path)
    assert [len(x) for x in seen.values()] == [6, 6]  # all four of each, two of them twice


def test_what_sample_measures_on_what(corpus, tmp_path, monkeypatch, drawn):
    """Critics learn from training speech, standardised, and are judged on held-out speech, standardised alike; R2 is of held-out
    speech and of the test set; every batch has a step of its own, the bound draws of its own."""
    model, _, cfg = trained(corpus, pair="cross")
    given, _ = {"mine": [], "dependency": []}, drawn.clear()
    for name in given:
        monkeypatch.setattr(v, name, lambda *a, name=name: given[name].append(a[:-1]) or (0.0, 1.0))
    sampled(model, corpus, cfg, tmp_path)
    bound, rest = [b for b in drawn if b[2] in (1000, 1001)], [b for b in drawn if b[2] == 2000]
    assert len(bound) == 16 and all(c is corpus and us <= set(corpus.held) for c, _, _, us in bound)
    assert len(rest) == 128 + 16 + 1 + 1 and len(drawn) == 16 + len(rest)
    learn, judge, (held, test) = rest[:128], rest[128:144], rest[144:]
    assert [step for _, step, _, _ in learn] == list(range(128)) and [
        step for _, step, _, _ in judge
    ] == list(range(16))
    assert set().union(*(us for _, _, _, us in learn)) == set(corpus.train)
    assert all(us == set(corpus.held) for _, _, _, us in judge) and all(
        c is corpus for c, *_ in learn + judge
    )
    assert (
        held[0] is corpus
        and held[3] == set(corpus.held)
        and test[0] is corpus.test
        and test[3] == set(corpus.test.held)
    )
    x, ys = v.gather(model, corpus, corpus.train, 128, cfg)
    x_held, ys_held = v.gather(model, corpus, corpus.held, 16, cfg)
    assert (len(x), len(x_held)) == (512, 64) and not torch.equal(ys["global"], ys["untrained"])
    close(ys["global"][:4], model.encoder(x[:4])[1], 1e-5)
    close(ys["untrained"][:4], model.control(x[:4])[1], 1e-5)
    for i, name in enumerate(("untrained", "global")):
        mean, std = ys[name].mean(0), ys[name].std(0)
        (frames, y, frames_held, y_held, size), twice = given["mine"][i], given["dependency"][i]
        close(frames, x[:, 12])
        close(frames_held, x_held[:, 12])
        close(y.mean(0), torch.zeros(6), 1e-4)
        close(y.std(0), torch.ones(6), 1e-4)
        close(y_held, (ys_held[name] - mean) / std, 1e-3)
        assert torch.equal(twice[0], y) and torch.equal(twice[1], y_held) and size == 4


def test_few_held_out_utterances(corpus, tmp_path, monkeypatch, hasty):
    """No batch of MINE has an utterance twice: it would be its own negative."""
    model, _, cfg = trained(corpus, batch_size=6)
    monkeypatch.setattr(
        v, "mine", lambda x, y, x_held, y_held, size, cfg: (float(size), float(len(x_held)))
    )
    metrics, _ = sampled(model, corpus, cfg, tmp_path)
    assert metrics["mine"]["global"] == 4 and metrics["mine"]["ceiling"] == 64


def test_a_dead_dimension_does_no_harm(corpus, tmp_path):
    model, _, cfg = trained(corpus)
    with torch.no_grad():
        model.encoder.dense[-1].weight[0] = 0
    metrics, _ = sampled(model, corpus, cfg, tmp_path)
    assert all(math.isfinite(value) for row in metrics.values() for value in row.values())


def test_decoded_files(corpus, tmp_path, monkeypatch, hasty):
    """The first three crops of the test set, as they are and as each decoder makes them."""
    model, _, cfg = trained(corpus)
    given = []
    monkeypatch.setattr(model, "vocode", lambda x, n: given.append(x) or torch.zeros(1, n))
    sampled(model, corpus, cfg, tmp_path)
    x, ys = v.gather(model, corpus.test, corpus.test.held, 1, cfg)
    expected = [x, model.control_decoder(ys["untrained"]), model.decoder(ys["global"])]
    for row in expected:
        assert (
            sum(torch.allclose(mel[0], crop, atol=1e-5) for mel in given for crop in row[:3]) >= 3
        )
    close(torch.cat(given[:3]), x[:3], 1e-6)
    assert len(given) == 12


def test_the_bound_is_of_held_out_speech(corpus, tmp_path, monkeypatch, hasty):
    model, _, cfg = started(corpus, objective="nce", pair="cross", alpha=1.0)
    seen, inner = [], v.segments
    monkeypatch.setattr(
        v,
        "segments",
        lambda m, c, cfg, step, draw, us: (
            seen.append((draw, set(us))) or inner(m, c, cfg, step, draw, us)
        ),
    )
    metrics, _ = sampled(model, corpus, cfg, tmp_path)
    assert set().union(*(us for _, us in seen)) == set(corpus.held) and {
        draw for draw, _ in seen
    } == {1000}
    close(metrics["bound"]["local_ceiling"], math.log(1 + 3 * 6))
    close(metrics["bound"]["global_ceiling"], math.log(4))
    u = [
        v.bound(
            v.scores(
                model, inner(model, corpus, cfg, i, 1000, v.batch_of(corpus.held, i, cfg)), cfg
            )[0]["local"],
            "nce",
        )[0]
        for i in range(8)
    ]
    close(metrics["bound"]["local"], torch.stack(u).mean(), 1e-5)


# -------------------- the whole --------------------
def phone_accuracy(model, corpus, cfg):
    """Of a linear probe of `local`, fitted on frames of training and scored on those of held-out utterances."""
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


def test_two_thirds_of_the_toy_run(toy_folder, tmp_path, monkeypatch):
    """What the method is for: unseen voices are told apart by y, not by the same encoder untrained and not by log-mel; the
    time average is kept nearly as well as by the untrained encoder, what varies in time is dropped."""
    monkeypatch.chdir(toy_folder)
    cfg = v.Config(**v.TOY | dict(steps=1000, device="cpu"))
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
    metrics, _ = sampled(model, corpus, cfg, tmp_path)
    assert logs[299]["local"] > 0.7 and logs[-1]["decoder_loss"] < 0.9 * logs[300]["decoder_loss"]
    assert eer < min(untrained_eer, log_mel_eer) - 0.08
    assert phone < untrained_phone
    assert metrics["nearest"]["global"] > 5 * metrics["nearest"]["chance"]
    assert metrics["nearest"]["global"] > max(
        metrics["nearest"]["log_mel"], metrics["nearest"]["untrained"]
    )
    kept, dropped = metrics["r2_long_term"], metrics["r2_time_varying"]
    assert kept["global"] > 0.5 > 0 > kept["permuted"] and kept["global"] > kept["untrained"] - 0.1
    assert dropped["global"] < dropped["untrained"] - 0.05
    assert json.dumps(metrics)


@GPU
def test_cuda_equals_cpu(corpus):
    model, _, cfg = started(corpus, alpha=1.0)
    x = v.segments(model, corpus, cfg, 0)
    u, y = v.scores(model, x, cfg)
    on_gpu, z = v.scores(model.cuda(), x.cuda(), cfg)
    close(z.cpu(), y, 1e-3)
    for level in u:
        close(on_gpu[level].cpu(), u[level], 1e-3)
        for objective in ("jsd", "dv", "nce"):
            with torch.autocast("cuda", torch.bfloat16):  # switched off inside
                close(
                    v.bound(on_gpu[level], objective)[0].cpu(),
                    v.bound(u[level], objective)[0],
                    1e-3,
                )
    cfg = replace(cfg, device="cuda")
    optimizers = v.make_optimizers(model, cfg)
    for step in (0, 5):
        with torch.autocast("cuda", torch.bfloat16):
            log = v.train_step(model.train(), optimizers, corpus, step, cfg)
        assert all(
            value.dtype == torch.float32 and value.isfinite() and value.is_cuda
            for value in log.values()
        )
