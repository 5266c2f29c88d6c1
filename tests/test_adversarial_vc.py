# SPDX-License-Identifier: MIT
"""Checks of the method in adversarial_vc.py: numbers worked out by hand, exact identities, which step moves which network,
and one short run."""

import copy
import math
from types import SimpleNamespace
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adversarial_vc as v
import measure

torch.set_num_threads(1)
TINY = dict(
    sample_rate=8000,
    n_fft=64,
    win=64,
    hop=40,
    crop=1600,
    batch_size=6,
    channels=16,
    bank=4,
    bank_channels=4,
    critic_channels=2,
    steps=158,
    device="cpu",
)
NETS = ("encoder", "decoder", "classifier", "critic", "generator")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


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


def tiny(speakers=3, **options):
    """-> model in train mode without dropout but the critic's and with no layer at zero, and cfg."""
    cfg = v.Config(**TINY | dict(dropout=0.0, classifier_dropout=0.0) | options)
    model = v.Model(cfg, speakers).train()
    for last in (model.generator.leave[2], model.critic.value, model.critic.classifier):
        last.reset_parameters()  # D6 has them at zero, where much looks right
    return model, cfg


def state(model):
    return {name: copy.deepcopy(getattr(model, name).state_dict()) for name in NETS}


def moved(model, before):
    """Names of the networks any of whose tensors differs in a bit."""
    return {
        name
        for name in NETS
        if any(
            not torch.equal(a, b)
            for a, b in zip(before[name].values(), getattr(model, name).state_dict().values())
        )
    }


def gradients(net):
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
            for p in net.parameters()
        ]
    )


def corpus_of(waves, speaker):
    """What get_batch needs of a Corpus, all of one length."""
    U, N = waves.shape
    audio = (waves * 32768).round().clamp(-32768, 32767).short().flatten()
    speaker = np.array(speaker)
    c = SimpleNamespace(
        train=np.arange(U),
        held=np.arange(U),
        length=np.full(U, N),
        start=np.arange(U) * N,
        audio=audio,
        speaker=speaker,
        speakers=[f"s{i}" for i in set(speaker)],
    )
    c.wave = lambda u: audio[c.start[u] : c.start[u] + N].float() / 32768
    c.test = c
    return c


def tones(n, length=4000):
    """n harmonic tones of different pitch with a rhythm and some noise, (n, length) at 8 kHz."""
    t = torch.arange(length) / 8000
    f = 110 * 1.3 ** torch.arange(n)[:, None]
    wave = sum((2 * math.pi * k * f * t).sin() / k for k in range(1, 6))
    return 0.1 * wave * (0.3 + (2 * math.pi * 6 * t).sin() ** 2) + 0.003 * torch.randn(n, length)


# -------------------- the networks --------------------
def test_parameters_of_the_paper():
    """The authors' configuration with 20 speakers, network by network."""
    model = v.Model(v.Config(), 20)

    def count(net):
        return sum(p.numel() for p in net.parameters())

    assert [count(getattr(model, name)) for name in NETS] == [
        12_366_208,
        10_417_153,
        8_400_276,
        10_919_605,
        10_417_153,
    ]
    assert count(model) == 52_520_395
    x = torch.rand(1, 128, 513)
    with torch.no_grad():
        z = model.encoder(x)
        assert z.shape == (1, 16, 512) and model.decoder(z, torch.tensor([3])).shape == (
            1,
            128,
            513,
        )
        assert model.classifier(z).shape == (1, 20) and model.critic.trunk(x.mT[:, None]).shape == (
            1,
            32,
            17,
            4,
        )
        assert [y.shape for y in model.critic(x)] == [(1,), (1, 20)]
    cfg = v.Config()
    assert cfg.crop // cfg.hop == 128 and cfg.steps == 8000 + 20000 + 80000 + 50000
    assert (cfg.sample_rate, cfg.n_fft, cfg.win, cfg.hop, cfg.batch_size, cfg.lr) == (
        16000,
        1024,
        800,
        200,
        32,
        1e-4,
    )
    assert (cfg.adversary, cfg.classifier_steps, cfg.critic_steps, cfg.penalty, cfg.clip) == (
        0.01,
        5,
        5,
        10,
        5,
    )
    assert (cfg.dropout, cfg.classifier_dropout, cfg.instance_norm) == (0.5, 0.3, True)


@pytest.mark.parametrize(
    "k, stride, T", [(1, 1, 7), (2, 1, 7), (4, 1, 9), (5, 2, 7), (5, 2, 8), (7, 1, 9), (3, 1, 4)]
)
def test_convolution_against_a_loop(k, stride, T):
    """K // 2 mirrored frames before, one fewer after where k is even; length ceil(T / stride)."""
    conv, x = v.Conv(3, 2, k, stride=stride), torch.randn(1, 3, T)

    def mirror(t):
        return -t if t < 0 else 2 * (T - 1) - t if t >= T else t

    expected = torch.stack(
        [
            conv.bias
            + sum(conv.weight[:, :, j] @ x[0, :, mirror(t + j - k // 2)] for j in range(k))
            for t in range(0, T, stride)
        ],
        1,
    )
    close(conv(x)[0], expected, 1e-5)
    assert expected.shape[1] == math.ceil(T / stride)


@pytest.mark.parametrize("T", [9, 10, 16, 17, 23, 40, 100, 127, 128, 129])
def test_lengths(T):
    """Z has ceil(T / 8) frames, the decoder's output 8 times as many; what is cut off makes it T again."""
    model, cfg = tiny()
    z = model.encoder(torch.rand(2, T, 33))
    y = model.decoder(z, torch.tensor([0, 1]))
    assert z.shape == (2, -(-T // 8), 16) and y.shape == (2, 8 * -(-T // 8), 33)
    assert model.decode(z, torch.tensor([0, 1]), T, 2).shape == (2, T, 33)


@pytest.mark.parametrize("T", [1, 3, 8])
def test_short_input_is_repeated(T):
    """D4: fewer frames than can be mirrored are repeated to nine, in order."""
    model, cfg = tiny()
    x = torch.rand(2, T, 33)
    close(model.encoder(x), model.encoder(x.repeat(1, 9, 1)[:, :9]), 1e-6)
    assert model.decode(model.encoder(x), torch.tensor([0, 0]), T, 1).shape == (2, T, 33)


def leaky(h):
    return torch.where(h > 0, h, 0.01 * h)


def norm(h):
    """InstanceNorm of (B, C, T) written out."""
    return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("instance_norm", [True, False])
@pytest.mark.parametrize("T", [16, 23])
def test_encoder_in_plain_functions(instance_norm, T):
    """Bank and x, LeakyReLU over all, 1x1; conv, act, conv, act, norm and then the residual, pooled with the last
    frame mirrored where T is odd; dense blocks; GRU beside its input."""
    model, cfg = tiny(instance_norm=instance_norm)
    net, x, normalise = model.encoder, torch.rand(2, T, 33), norm if instance_norm else lambda h: h
    h = leaky(torch.cat([conv(x.mT) for conv in net.bank] + [x.mT], 1))
    h = normalise(leaky(net.mix[2](h)))
    for block in net.down:
        y = normalise(leaky(block[2](leaky(block[0](h)))))
        last = h if h.shape[2] % 2 == 0 else torch.cat([h, h[..., -2:-1]], 2)
        h = y + (last[..., 0::2] + last[..., 1::2]) / 2
    for block in net.dense:
        h = h + normalise(leaky(block[2](leaky(block[0](h)))))
    h = torch.cat([h.mT, net.gru(h.mT)[0]], 2)
    close(net(x), leaky(h @ net.leave.weight.T + net.leave.bias), 1e-4)
    assert (
        [c.kernel_size[0] for c in net.bank] == [1, 2, 3, 4]
        and net.gru.bidirectional
        and net.gru.hidden_size == 4
    )


def test_encoder_dropout():
    """After each norm, in training alone."""
    model, cfg = tiny(dropout=0.5)
    x = torch.rand(2, 40, 33)
    assert not torch.equal(model.encoder(x), model.encoder(x))
    assert sum(isinstance(m, nn.Dropout) and m.p == 0.5 for m in model.encoder.modules()) == 6
    assert sum(isinstance(m, nn.Dropout) for m in model.decoder.modules()) == 0
    model.encoder.eval()
    assert torch.equal(model.encoder(x), model.encoder(x))
    model, cfg = tiny(classifier_dropout=0.3)
    assert [m.p for m in model.classifier.modules() if isinstance(m, nn.Dropout)] == [0.3] * 4
    assert [m.p for m in model.critic.modules() if isinstance(m, nn.Dropout2d)] == [0.1] * 6


def test_pixel_shuffle():
    """Out[c, 2 t + r] = in[2 c + r, t]; checked through the first block of a decoder whose layers do nothing else."""
    h = torch.arange(8.0).view(1, 4, 2)
    assert h.unflatten(1, (-1, 2)).mT.flatten(2)[0].tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
    model, cfg = tiny(channels=4)
    net, seen = model.decoder, []
    net.up[0][0].forward = lambda x: torch.arange(16.0).view(1, 8, 2)
    net.up[0][1].register_forward_hook(lambda module, args, y: seen.append(args[0]))
    nn.init.zeros_(net.speaker[0].weight)
    net(torch.rand(1, 2, 4), torch.tensor([0]))
    assert seen[0][0].tolist() == [[0, 2, 1, 3], [4, 6, 5, 7], [8, 10, 9, 11], [12, 14, 13, 15]]


def test_decoder_in_plain_functions():
    """Where each of the five tables enters, the order within a block, the residual without the speaker."""
    model, cfg = tiny()
    net, z, y = model.decoder, torch.randn(2, 3, 16), torch.tensor([2, 0])
    e = [table.weight[y][:, :, None] for table in net.speaker]
    h = z.mT
    for i in range(3):
        first, second = net.up[i]
        u = leaky(first(h + e[i]))
        up = torch.zeros(2, 16, 2 * h.shape[2])
        up[..., 0::2], up[..., 1::2] = u[:, 0::2], u[:, 1::2]
        h = norm(leaky(second(up + e[i]))) + F.interpolate(h, scale_factor=2)
    for first, second in net.dense:
        h = h + norm(leaky(second(leaky(first(h + e[3])) + e[3])))
    out = torch.cat([h.mT, net.gru((h + e[4]).mT)[0], e[4].mT.expand(2, 24, 16)], 2)
    close(
        net(z, y),
        leaky(out @ net.leave[0].weight.T + net.leave[0].bias) @ net.leave[2].weight.T
        + net.leave[2].bias,
        1e-4,
    )


def test_decoder_depends_on_the_speaker_through_every_table():
    """Another speaker, another output; gradient only in the rows of the batch's speakers."""
    model, cfg = tiny(speakers=5)
    z = torch.randn(2, 5, 16)
    y = model.decoder(z, torch.tensor([1, 3]))
    assert not torch.allclose(y, model.decoder(z, torch.tensor([1, 4])), atol=1e-3)
    y.square().sum().backward()
    assert len(model.decoder.speaker) == 5
    for table in model.decoder.speaker:
        assert (table.weight.grad.abs().sum(1) > 0).tolist() == [False, True, False, True, False]


def test_classifier_in_plain_functions():
    """Pairs 2 and 3 are residual; then narrower, and one kernel over the whole latent of a training segment."""
    model, cfg = tiny()
    net, z = model.classifier, torch.randn(2, 5, 16)

    def run(block, h):
        return norm(leaky(block[2](leaky(block[0](h)))))

    h = run(net.blocks[0], z.mT)
    h = run(net.blocks[1], h) + h
    h = run(net.blocks[2], h) + h
    h = run(net.narrow, h)
    close(net(z), torch.einsum("bct,sct->bs", h, net.head.weight) + net.head.bias, 1e-4)
    assert [b[0].kernel_size[0] for b in [*net.blocks, net.narrow]] == [5, 5, 5, 3] and h.shape[
        1
    ] == 4


def test_critic_in_plain_functions():
    """Mirrored convolutions with stride 2, act, norm over time and frequency; two heads as large as the map."""
    model, cfg = tiny()
    net, x = model.critic.eval(), torch.rand(2, 40, 33)
    h = x.mT[:, None]
    convs = [m for m in net.trunk if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels) for c in convs] == [
        (1, 2),
        (2, 4),
        (4, 8),
        (8, 16),
        (16, 16),
        (16, 1),
    ]
    for conv in convs:
        p = conv.kernel_size[0] // 2
        h = leaky(
            F.conv2d(
                F.pad(h, (p, p, p, p), mode="reflect"), conv.weight, conv.bias, stride=conv.stride
            )
        )
        h = norm(h.flatten(2)).view_as(h)
    value, logits = net(x)
    close(value, (h * net.value.weight).sum((1, 2, 3)) + net.value.bias, 1e-4)
    close(
        logits, torch.einsum("bchw,schw->bs", h, net.classifier.weight) + net.classifier.bias, 1e-4
    )


def test_heads_fit_the_segment_and_average_longer_ones():
    """D4: S logits for any segment, never S times the positions; a segment too short for the critic is refused."""
    for crop in (1600, 2560, 5120):
        model, cfg = tiny(crop=crop)
        x = torch.rand(2, crop // 40, 33)
        assert model.classifier(model.encoder(x)).shape == (2, 3) and model.critic(x)[1].shape == (
            2,
            3,
        )
        assert model.critic(x)[0].shape == (2,)
    model, cfg = tiny()
    z = torch.randn(1, 7, 16)  # trained length: 5
    h = model.classifier.blocks[0](z.mT)
    for block in model.classifier.blocks[1:]:
        h = block(h) + h
    windows = model.classifier.narrow(h).unfold(2, 5, 1)  # (1, C, 3, 5)
    logits = (
        torch.einsum("bcwt,sct->bws", windows, model.classifier.head.weight)
        + model.classifier.head.bias
    )
    close(model.classifier(z), logits.mean(1), 1e-5)
    assert model.critic(torch.rand(1, 100, 33))[1].shape == (1, 3)
    with pytest.raises(RuntimeError):
        model.classifier(torch.randn(1, 4, 16))
    for options in (dict(crop=1280), dict(n_fft=32, win=32, hop=32)):
        with pytest.raises(v.UserError, match="the critic needs 33"):
            tiny(**options)
    for options in (dict(channels=3), dict(critic_channels=1)):
        with pytest.raises(v.UserError, match="--channels must be 4"):
            tiny(**options)
    for options in (dict(dropout=1.0), dict(classifier_dropout=2.0)):
        with pytest.raises(v.UserError, match="--classifier-dropout must be below 1"):
            tiny(**options)
    assert tiny(bank=24)[0].encoder(torch.rand(1, 4, 33)).shape == (1, 2, 16)


def test_instance_norm_switch_changes_the_encoder_alone():
    def count(net):
        return sum(isinstance(m, (nn.InstanceNorm1d, nn.InstanceNorm2d)) for m in net.modules())

    a, b = tiny()[0], tiny(instance_norm=False)[0]
    assert [count(getattr(a, name)) for name in NETS] == [6, 0, 4, 6, 0]
    assert [count(getattr(b, name)) for name in NETS] == [0, 0, 4, 6, 0]
    z = torch.randn(1, 6, 16)
    close(norm(3 * z.mT - 7), norm(z.mT), 3e-4)
    close(norm(-3 * z.mT), -norm(z.mT), 3e-4)


# -------------------- features --------------------
def test_features_are_decibels_after_pre_emphasis():
    """20 log10 of the linear magnitude, -80 dB to 20 dB as 0 to 1, in (0, 1]."""
    model, cfg = tiny()
    wave = 0.3 * torch.randn(2, 1600)
    emphasised = torch.stack(
        [wave[:, 0], *(wave[:, n] - 0.97 * wave[:, n - 1] for n in range(1, 1600))], 1
    )
    magnitude = v.stft(emphasised, cfg).abs()
    assert magnitude.shape == (2, 41, 33)
    expected = ((20 * np.log10(np.maximum(magnitude.numpy(), 1e-5)) - 20 + 100) / 100).clip(1e-8, 1)
    close(model.features(wave), torch.from_numpy(expected), 1e-5)
    x = model.features(torch.zeros(1, 400))
    assert x.min() > 0 and x.max() <= 1e-8 + 1e-12
    assert model.features(30 * torch.randn(1, 1600)).max() == 1


def test_decibels_round_trip():
    """Exact for magnitudes from 1e-4 to 10, clipped below."""
    model, cfg = tiny()
    magnitude = 10 ** torch.linspace(-4, 1, 101)
    x = ((20 * magnitude.log10() + 80) / 100).clamp(1e-8, 1)
    close(10 ** (5 * x - 4), magnitude, 1e-5)


def test_vocode_undoes_features():
    """The magnitude that goes into Griffin-Lim is that of the wave without pre-emphasis; and the copy sounds alike."""
    model, cfg = tiny(n_fft=512, win=400, hop=100, crop=4000)
    wave = tones(1, 8000)
    x = model.features(wave)
    seen = []
    griffin_lim, v.griffin_lim = (
        v.griffin_lim,
        lambda magnitude, cfg: seen.append(magnitude) or griffin_lim(magnitude, cfg),
    )
    try:
        copy = model.vocode(x, 8000)
    finally:
        v.griffin_lim = griffin_lim
    inner = slice(3, -3)  # at the ends the filter starts from zeros
    loud = (x > 0.3)[:, inner]
    assert torch.equal(
        seen[0][:, -1], seen[0][:, -2]
    )  # a frame more, for what lies behind the last
    ratio = (seen[0][:, :-1] / v.stft(wave, cfg).abs())[:, inner][loud]
    assert copy.shape == (1, 8000) and (ratio.log().abs() < 0.1).float().mean() > 0.95
    # the filter's impulse response is cut by the window, so the ratio is not exact
    wide = x.clamp(0.2, 0.5) * 4 - 1.2
    assert torch.equal(model.vocode(wide, 8000), model.vocode(wide.clamp(0, 1), 8000))
    assert (model.features(copy) - x)[:, inner].abs().mean() < 0.04


# -------------------- the objective --------------------
def test_schedule():
    """The four phases at the authors' steps; the weight is exactly 0 at first, 0.005, 0.01 at 50,000, and stays."""
    cfg = v.Config()

    def at(step):
        return v.schedule(step, cfg)

    assert [at(s)[0] for s in (0, 7999, 8000, 27999, 28000, 107999, 108000, 157999)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert [at(28000 + i)[1] for i in (0, 25000, 50000, 79999)] == [0, 0.005, 0.01, 0.01]
    assert {at(s)[1] for s in (0, 7999, 20000, 108000, 157999)} == {0}
    small = replace(cfg, steps=158)
    assert [v.schedule(s, small)[0] for s in (0, 7, 8, 27, 28, 107, 108, 157)] == [
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert v.schedule(28 + 25, small)[1] == 0.005
    only = replace(small, ae_share=0.0, classifier_share=0.0, gan_share=0.0)
    assert {v.schedule(s, only)[0] for s in range(158)} == {2} and v.schedule(157, only)[1] == 0.01
    assert v.schedule(40, replace(small, ramp=0.0))[1] == 0.01
    with pytest.raises(v.UserError, match="raise one"):
        replace(only, joint_share=0.0)


def batch(model, cfg, speakers=(0, 1, 2, 0, 1, 2)):
    return torch.rand(len(speakers), cfg.crop // cfg.hop, 33), torch.tensor(speakers)


def plain(optimizers, lr):
    """SGD in the place of Adam, with the same parameters."""
    return {
        name: torch.optim.SGD([p for g in o.param_groups for p in g["params"]], lr)
        for name, o in optimizers.items()
    }


def test_adversarial_gradient_is_the_classifiers_with_the_sign_turned():
    """Of -w CE the encoder gets -w times the gradient of CE, so of L_rec - w CE the sum; the decoder only L_rec's."""
    model, cfg = tiny(clip=1e9)
    x, y = batch(model, cfg)
    model.double(), x.double()
    x, encoder = x.double(), [*model.encoder.parameters()]
    z = model.encoder(x)
    rec = F.l1_loss(model.decode(z, y, 40, 1).float(), x)
    rec_grad = torch.autograd.grad(rec, encoder, retain_graph=True)
    ce_grad = torch.autograd.grad(F.cross_entropy(model.classifier(z).float(), y), encoder)
    taken = []
    for weight in (0.0, 0.3):
        model.zero_grad()
        v.autoencoder_step(model, plain(v.make_optimizers(model, cfg), 0.0), x, y, weight, cfg)
        taken.append([p.grad.clone() for p in encoder])
        expected = [r - weight * c for r, c in zip(rec_grad, ce_grad)]
        assert max((a - b).abs().max() for a, b in zip(taken[-1], expected)) < 1e-5
        assert all(p.grad is None for p in model.classifier.parameters())
    assert max((a - b).abs().max() for a, b in zip(*taken)) > 1e-4


def test_a_step_against_the_classifier_raises_its_error_and_its_own_lowers_it():
    """And so the two pull at one error from both sides."""
    model, cfg = tiny(clip=1e9)
    x, y = batch(model.double(), cfg)
    x = x.double()

    def error():
        return F.cross_entropy(model.classifier(model.encoder(x)), y).item()

    optimizers = plain(
        v.make_optimizers(model, cfg), 1e-12
    )  # ten norms in a row make steep gradients
    before = error()
    v.autoencoder_step(model, optimizers, x, y, 10.0, cfg)
    raised = error()
    v.classifier_step(model, optimizers, x, y, cfg)
    assert raised > before and error() < raised


@pytest.mark.parametrize(
    "step, expected",
    [
        ("classifier", {"classifier"}),
        ("autoencoder", {"encoder", "decoder"}),
        ("adversarial", {"encoder", "decoder"}),
        ("critic", {"critic"}),
        ("generator", {"generator"}),
    ],
)
def test_each_step_moves_its_networks_alone(step, expected):
    """The others stay bit-identical and get no gradient."""
    model, cfg = tiny()
    (x, y), before, optimizers = batch(model, cfg), state(model), v.make_optimizers(model, cfg)
    {
        "classifier": lambda: v.classifier_step(model, optimizers, x, y, cfg),
        "autoencoder": lambda: v.autoencoder_step(model, optimizers, x, y, 0.0, cfg),
        "adversarial": lambda: v.autoencoder_step(model, optimizers, x, y, 0.5, cfg),
        "critic": lambda: v.critic_step(model, optimizers, x, y, cfg),
        "generator": lambda: v.generator_step(model, optimizers, x, cfg),
    }[step]()
    assert moved(model, before) == expected
    assert {
        name for name in NETS if any(p.grad is not None for p in getattr(model, name).parameters())
    } == expected


@pytest.mark.parametrize(
    "phase, start, expected",
    [
        (0, 0, {"encoder", "decoder"}),
        (1, 8, {"classifier"}),
        (2, 28, {"encoder", "decoder", "classifier"}),
        (3, 108, {"critic", "generator"}),
    ],
)
def test_each_phase_moves_its_networks_alone(phase, start, expected):
    model, cfg = tiny()
    corpus, before, optimizers = (
        corpus_of(tones(6), [0, 0, 1, 1, 2, 2]),
        state(model),
        v.make_optimizers(model, cfg),
    )
    log = v.train_step(model, optimizers, corpus, start, cfg)
    assert v.schedule(start, cfg)[0] == phase and moved(model, before) == expected
    assert any("loss" in name for name in log) and all(value.dim() == 0 for value in log.values())


def test_inner_steps_and_fresh_batches(monkeypatch):
    """Joint: classifier_steps of the classifier, then the auto-encoder, each on a batch of its own; stage 2 alike."""
    model, cfg = tiny(classifier_steps=4, critic_steps=3)
    calls, corpus = [], corpus_of(tones(6), [0, 0, 1, 1, 2, 2])
    for name in ("classifier", "autoencoder", "critic", "generator"):
        monkeypatch.setattr(
            v,
            f"{name}_step",
            lambda model, optimizers, x, *rest, name=name: calls.append((name, x, rest)) or {},
        )
    v.train_step(model, None, corpus, 28 + 25, cfg)
    assert [c[0] for c in calls] == ["classifier"] * 4 + ["autoencoder"] and calls[-1][2][
        1
    ] == 0.005
    assert len({c[1].sum().item() for c in calls}) == 5
    calls.clear()
    v.train_step(model, None, corpus, 110, cfg)
    assert [c[0] for c in calls] == ["critic"] * 3 + ["generator"] and len(
        {c[1].sum().item() for c in calls}
    ) == 4


def test_stage_2_switches_the_encoders_dropout_off_and_stage_1_on():
    """Frozen means frozen: the latent is the one that conversion uses."""
    model, cfg = tiny(dropout=0.5)
    corpus, optimizers = corpus_of(tones(6), [0, 0, 1, 1, 2, 2]), v.make_optimizers(model, cfg)
    for step, training in ((108, False), (0, True), (157, False), (28, True)):
        v.train_step(model.train(), optimizers, corpus, step, cfg)
        assert model.encoder.training == training


def test_each_network_is_clipped_by_itself():
    model, cfg = tiny(clip=1e-3)
    x, y = batch(model, cfg)
    v.autoencoder_step(model, plain(v.make_optimizers(model, cfg), 0.0), 100 * x, y, 0.0, cfg)
    for net in (model.encoder, model.decoder):
        close(gradients(net).norm(), 1e-3, 1e-5)


def test_optimizers():
    """Adam with betas 0.5 and 0.9, no weight decay; together they hold every parameter once."""
    model, cfg = tiny(generator_lr=3e-4)
    optimizers = v.make_optimizers(model, cfg)
    assert (
        list(optimizers) == ["autoencoder", "classifier", "critic", "generator"]
        and v.Config().generator_lr == 1e-4
    )
    held = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    assert len(held) == len({*held}) == len([*model.parameters()])
    assert [o.param_groups[0]["lr"] for o in optimizers.values()] == [1e-4, 1e-4, 1e-4, 3e-4]
    for o in optimizers.values():
        group = o.param_groups[0]
        assert isinstance(o, torch.optim.Adam) and (group["betas"], group["weight_decay"]) == (
            (0.5, 0.9),
            0,
        )


class Linear(nn.Module):
    """A critic D(x) = <w, x>."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        return (x * self.w).sum((1, 2)), None


@pytest.mark.parametrize("norm_of_w, penalty", [(3, 4.0), (1, 0.0), (0, 0.999998), (0.5, 0.25)])
def test_gradient_penalty_of_a_linear_critic(norm_of_w, penalty):
    """(1 - |w|)^2, whatever the segments are."""
    w = torch.randn(40, 33)
    for scale in (1, 30):
        real, fake = scale * torch.randn(4, 40, 33), torch.randn(4, 40, 33)
        close(v.gradient_penalty(Linear(norm_of_w * w / w.norm()), real, fake), penalty, 1e-5)


def test_gradient_penalty_point_and_gradient():
    """One random point per segment, between the two; the penalty has a gradient with respect to the critic's weights."""
    seen = []

    class Square(nn.Module):
        def forward(self, u):
            seen.append(u.detach())
            return 0.5 * u.square().sum((1, 2)), None

    real, fake = torch.ones(5, 4, 3), torch.zeros(5, 4, 3)
    value = v.gradient_penalty(Square(), real, fake)
    mix = seen[0][:, 0, 0]
    assert (
        (seen[0] == mix[:, None, None]).all()
        and len(set(mix.tolist())) == 5
        and ((mix >= 0) & (mix <= 1)).all()
    )
    close(value, (1 - mix * 12**0.5).square().mean(), 1e-5)
    critic = Linear(torch.randn(4, 3))
    v.gradient_penalty(critic, real, fake).backward()
    w = critic.w.detach()
    close(critic.w.grad, -2 * (1 - w.norm()) * w / w.norm(), 1e-4)


def test_gradient_penalty_is_in_float32():
    with torch.autocast("cpu", torch.bfloat16):
        model, cfg = tiny()
        x = torch.rand(2, 40, 33)
        a = v.gradient_penalty(model.critic.eval(), x, x.bfloat16())
    assert a.dtype == torch.float32
    torch.manual_seed(0)
    model, cfg = tiny()
    x = torch.rand(2, 40, 33)
    close(v.gradient_penalty(model.critic.eval(), x, x.bfloat16()), a, 1e-6)


class Known(nn.Module):
    """A critic whose outputs are linear in x, so that losses can be worked out; it keeps what it saw."""

    def __init__(self, speakers):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.randn(40, 33)), []
        self.v = nn.Parameter(torch.randn(speakers, 40, 33) / 40)

    def forward(self, x):
        self.seen.append(x.detach())
        return (x * self.w).sum((1, 2)), torch.einsum("btf,stf->bs", x, self.v)


def test_critic_objective():
    """Min -(D(x) - D(x')) + CE(real, y) + weight * penalty; classifier-2 never learns from a fake."""
    model, cfg = tiny(clip=1e9, penalty=7.0)
    model.critic = Known(3)
    x, y = batch(model, cfg)
    torch.manual_seed(5)
    made, aim = v.converted(model, x)
    torch.manual_seed(5)
    log = v.critic_step(model, plain(v.make_optimizers(model, cfg), 0.0), x, y, cfg)
    real, fake, w = x, model.critic.seen[1], model.critic.w.detach()
    assert torch.equal(model.critic.seen[0], real)
    assert torch.equal(fake, made)
    close(
        fake,
        model.decode(model.encoder(x), aim, 40, 1) + model.generator(model.encoder(x), aim)[:, :40],
        1e-5,
    )
    mix = (
        ((model.critic.seen[2] - fake) / (real - fake)).flatten(1).median(1).values
    )  # where the penalty is taken
    assert ((mix > 0) & (mix < 1)).all() and len(set(mix.tolist())) == 6
    close(log["critic_distance"], ((real - fake) * w).sum((1, 2)).mean(), 1e-3)
    close(log["penalty"], (1 - w.norm()) ** 2, 1e-3)
    log_p = torch.einsum("btf,stf->bs", real, model.critic.v).log_softmax(1)
    close(log["classifier_2_loss"], -log_p[range(6), y].mean(), 1e-4)
    expected = (fake - real).mean(0) - 14 * (1 - w.norm()) * w / w.norm()
    close(model.critic.w.grad, expected, 1e-3)
    soft = log_p.exp() - F.one_hot(y, 3)
    close(model.critic.v.grad, torch.einsum("bs,btf->stf", soft, real).detach() / 6, 1e-4)


def test_generator_objective():
    """Min -D(x') + CE(classifier-2(x'), y'), x' = Dec(z, y') + Gen(z, y') with random y'."""
    model, cfg = tiny(clip=1e9, gan_share=50.0)
    model.critic, (x, _) = Known(3), batch(model, cfg)
    torch.manual_seed(5)
    aim, z = v.converted(model, x)[1], model.encoder(x).detach()
    fake = model.decoder(z, aim)[:, :40] + model.generator(z, aim)[:, :40]
    value, logits = model.critic(fake)
    error = F.cross_entropy(logits, aim)
    expected = torch.autograd.grad(error - value.mean(), [*model.generator.parameters()])
    torch.manual_seed(5)
    latents = []
    model.encoder.register_forward_hook(lambda module, args, z: latents.append(z.requires_grad))
    log = v.generator_step(model, plain(v.make_optimizers(model, cfg), 0.0), x, cfg)
    close(log["generator_loss"], error, 1e-5)
    for p, g in zip(model.generator.parameters(), expected):
        close(p.grad, g, 1e-4)
    close(model.critic.seen[-1], fake.detach(), 1e-5)
    assert latents == [False] and all(
        p.grad is None for net in (model.encoder, model.decoder) for p in net.parameters()
    )


def test_random_targets_are_uniform_over_all_speakers():
    model, cfg = tiny(speakers=4)
    model.encoder.forward = lambda x: torch.zeros(len(x), 2, 16)
    aims = torch.cat([v.converted(model, torch.zeros(500, 16, 33))[1] for _ in range(4)])
    assert (torch.bincount(aims, minlength=4) / 2000 - 0.25).abs().max() < 0.04


def test_generator_starts_as_nothing():
    """D6: with a last layer of zeros both stages give the decoder's output exactly, and yet it learns."""
    cfg = tiny()[1]
    model = v.Model(cfg, 3)
    z, y = torch.randn(2, 5, 16), torch.tensor([0, 2])
    assert torch.equal(model.decode(z, y, 40, 2), model.decode(z, y, 40, 1))
    optimizers, (x, s) = v.make_optimizers(model, cfg), batch(model, cfg)
    assert not model.critic(x)[0].any() and not model.critic(x)[1].any()
    assert (
        v.gradient_penalty(model.critic, x, x) > 0.999
    )  # a critic without an opinion has no gradient
    for _ in range(2):
        v.critic_step(model, optimizers, x, s, cfg)
        v.generator_step(model, optimizers, x, cfg)
    assert model.critic(x)[0].any() and model.critic(x)[1].any()
    assert not torch.equal(model.decode(z, y, 40, 2), model.decode(z, y, 40, 1))
    assert (gradients(model.generator).abs() > 0).float().mean() > 0.5


def test_silent_segments_are_replaced():
    """D3: by another of the batch, with its speaker; a batch of silence alone stays as it is."""
    model, cfg = tiny()
    waves = tones(6)
    waves[0], waves[3] = 1e-6 * torch.randn(4000), 1.5e-4  # next to silence: 0.5 dB of deviation
    corpus = corpus_of(waves, [0, 0, 1, 1, 2, 2])
    x, speaker = v.segments(model, corpus, cfg, 0, 0, np.arange(6))
    assert (
        torch.equal(x[0], x[1])
        and torch.equal(x[3], x[1])
        and speaker.tolist() == [0, 0, 1, 0, 2, 2]
    )
    assert (x.std(1).mean(1) > 0.01).all() and x.shape == (6, 40, 33)
    silent = corpus_of(torch.zeros(6, 4000), [0, 0, 1, 1, 2, 2])
    x, speaker = v.segments(model, silent, cfg, 0, 0, np.arange(6))
    assert x.max() <= 1e-7 and x.shape == (6, 40, 33)


# -------------------- what it is good for --------------------
def test_represent_and_convert():
    """content is the encoder's output; a conversion has the source's length; None takes the closest speaker."""
    model, cfg = tiny()
    model.eval()
    wave = tones(1, 3990)[0]
    x = model.features(wave[None])
    assert torch.equal(v.represent(model, wave, cfg)["content"], model.encoder(x)[0])
    seen = []
    vocode, model.vocode = model.vocode, lambda y, samples: seen.append(y) or vocode(y, samples)
    out = v.convert(model, [wave, wave[:1234]], [2, 1], cfg)
    assert [len(w) for w in out] == [3990, 1234] and all(w.isfinite().all() for w in out)
    close(seen[0][:, :100], model.decode(model.encoder(x), torch.tensor([2]), 100, 2), 1e-5)
    v.convert(model, [wave], [2], replace(cfg, gan_share=0.0))
    close(seen[2][:, :100], model.decode(model.encoder(x), torch.tensor([2]), 100, 1), 1e-5)
    assert seen[0].shape[1] == 100  # vocode repeats the last: 99.75 hops
    errors = [
        F.l1_loss(model.decode(model.encoder(x), torch.tensor([s]), 100, 1), x).item()
        for s in range(3)
    ]
    best = int(np.argmin(errors))
    model.generator.forward = lambda z, s: (
        5.0 * (s[:, None, None] == best).expand(len(z), 8 * z.shape[1], 33)
    )
    v.convert(model, [wave], [None], cfg)  # by stage 1, as the generator is far off for it
    close(seen[3][:, :100], model.decode(model.encoder(x), torch.tensor([best]), 100, 2), 1e-5)


def test_global_variance(tmp_path, monkeypatch):
    """The mean of |ln ratio| to real speech, worked out by hand: stage 2 says what the target says, stage 1 makes noise."""
    waves, noise = tones(4), 0.1 * torch.randn(4, 4000)
    corpus = corpus_of(torch.cat([waves, waves]), [0, 1, 2, 3] * 2)
    model, cfg = tiny(speakers=4, steps=8)
    monkeypatch.setattr(
        v,
        "convert",
        lambda model, sources, targets, cfg: [
            corpus.wave(targets[0]) if cfg.gan_share else noise[targets[0]]
        ],
    )
    nets = []
    monkeypatch.setattr(v, "fresh_classifier", lambda net, *rest: nets.append(net) or 0.5)
    metrics = v.sample(model.eval(), corpus, cfg, tmp_path)
    torch.manual_seed(cfg.seed)
    fresh = v.Model(cfg, 4).encoder.state_dict().values()
    assert nets[0] is model.encoder and all(
        torch.equal(a, b) for a, b in zip(nets[1].state_dict().values(), fresh)
    )
    real, made = (
        (100 * model.features(x)).var(1, correction=0).clamp(min=1)
        for x in (torch.stack([*map(corpus.wave, range(4))]), noise)
    )
    close(metrics["variance"]["real"], real.mean(), 1e-3)
    close(metrics["variance"]["stage_1"], made.mean(), 1e-3)
    close(metrics["variance_error"]["stage_1"], (made / real).log().abs().mean(), 1e-4)
    assert metrics["variance_error"]["stage_2"] < 1e-5
    saved = torch.from_numpy(np.load(tmp_path / "global_variance.npy"))
    close(saved[[0, 2, 3]], torch.stack([real, made, real]), 1e-2)
    copies = torch.stack(
        [
            model.features(model.vocode(model.features(w[None]), len(w)))[0]
            for w in map(corpus.wave, range(4))
        ]
    )
    close(saved[1], (100 * copies).var(1, correction=0).clamp(min=1), 1e-2)
    assert metrics["variance_error"]["copy"] > 0
    assert len([*tmp_path.glob("*_stage1.wav")]) == len([*tmp_path.glob("*_stage2.wav")]) == 16
    metrics = v.sample(model, corpus, replace(cfg, gan_share=0.0), tmp_path)
    assert set(metrics["variance"]) == {"real", "copy", "stage_1"}


def test_fresh_classifier():
    """Reads a speaker that shows in the latent, is at chance where none does, and leaves the encoder bit-identical."""
    waves = tones(3, 4000).repeat(8, 1) + 0.003 * torch.randn(24, 4000)
    corpus = corpus_of(waves, [0, 1, 2] * 8)
    model, cfg = tiny(steps=1200, lr=3e-3)
    template = model.features(waves[:3]).mean(1)  # (3, F)

    class Telling(nn.Module):
        def __init__(self, told):
            super().__init__()
            self.told, self.pattern = told, nn.Parameter(torch.randn(3, 5, 16))

        def forward(self, x):
            speaker = torch.cdist(x.mean(1), template).argmin(1)
            return self.told * self.pattern[speaker] + torch.randn(len(x), 5, 16)

    for told, low, high in ((1, 0.8, 1), (0, 0, 0.6)):
        encoder = Telling(told)
        before = encoder.pattern.clone()
        assert low <= v.fresh_classifier(encoder, corpus, cfg) <= high
        assert (
            torch.equal(encoder.pattern, before)
            and encoder.pattern.grad is None
            and not encoder.training
        )


def test_fresh_classifier_is_scored_on_held_out_utterances_without_dropout(monkeypatch):
    """And it begins with other weights than the classifier of the run."""
    corpus = corpus_of(tones(12), [0, 1, 2] * 4)
    corpus.train, corpus.held = np.arange(9), np.arange(9, 12)
    model, cfg = tiny(steps=20, lr=1e-20)
    calls, segments, forward = [], v.segments, v.Classifier.forward
    monkeypatch.setattr(
        v,
        "segments",
        lambda m, c, cfg, step, draw, us: (
            calls.append(["?", us, m]) or segments(m, c, cfg, step, draw, us)
        ),
    )

    def spy(self, z):
        calls[-1][0] = self.training
        return forward(self, z)

    monkeypatch.setattr(v.Classifier, "forward", spy)
    v.fresh_classifier(model.encoder, corpus, cfg)
    assert [c[0] for c in calls] == [True] * 5 + [False] * 4
    assert all(set(us) <= set(range(9)) for training, us, _ in calls if training)
    assert all([*us] == [9, 10, 11] for training, us, _ in calls if not training)
    torch.manual_seed(cfg.seed)
    assert not torch.equal(
        v.Model(cfg, 3).classifier.blocks[0][0].bias, calls[0][2].classifier.blocks[0][0].bias
    )


# -------------------- learning --------------------
def test_overfits_a_batch():
    """Stage 1 rebuilds one batch; classifier-1 learns its speakers; the adversary undoes that."""
    model, cfg = tiny(lr=3e-3)
    corpus = corpus_of(tones(6), range(6))
    model = v.Model(cfg, 6)
    optimizers = v.make_optimizers(model, cfg)
    x, y = v.segments(model, corpus, cfg, 0)
    first = v.autoencoder_step(model, optimizers, x, y, 0.0, cfg)["reconstruction_loss"]
    for _ in range(150):
        last = v.autoencoder_step(model, optimizers, x, y, 0.0, cfg)["reconstruction_loss"]
    assert last < 0.2 * first
    for _ in range(60):
        log = v.classifier_step(model, optimizers, x, y, cfg)
    assert log["classifier_accuracy"] == 1
    for _ in range(30):
        v.autoencoder_step(model, optimizers, x, y, 1.0, cfg)
    with torch.no_grad():
        assert F.cross_entropy(model.classifier(model.encoder(x)), y) > 2 * math.log(6)


# -------------------- on a GPU --------------------
@GPU
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-3), (True, 5e-2)])
def test_cuda_is_the_cpu(bf16, tolerance):
    """The networks and the gradient penalty; under bfloat16 every step leaves finite weights."""
    model, cfg = tiny()
    x, y = batch(model.eval(), cfg)

    def run():
        return [
            model.decode(model.encoder(x), y, 40, 2),
            model.classifier(model.encoder(x)),
            *model.critic(x),
        ]

    here = run()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16, cache_enabled=False):
        for a, b in zip(run(), here):
            assert ((a.float().cpu() - b).norm() / b.norm()).item() < tolerance
        optimizers = v.make_optimizers(model.train(), cfg)
        for _ in range(3):
            logs = [
                v.classifier_step(model, optimizers, x, y, cfg),
                v.autoencoder_step(model, optimizers, x, y, 0.1, cfg),
                v.critic_step(model, optimizers, x, y, cfg),
                v.generator_step(model, optimizers, x, cfg),
            ]
    assert all(value.isfinite() for log in logs for value in log.values())
    assert all(p.isfinite().all() for p in model.parameters())


# -------------------- the whole --------------------
def probes(model, corpus, cfg, utterances):
    """Linear probes of what is represented, fitted on training and scored on held-out utterances -> {name: {"phone":
    accuracy of frames, "speaker": accuracy of time averages}}."""
    names = [path.relative_to(corpus.root).as_posix() for path in corpus.paths]
    seconds = corpus.length / cfg.sample_rate
    parts = corpus.train[:utterances], corpus.held[:utterances]
    file = corpus.root / "phones.txt"
    labels, _ = measure.read_labels(file, names, seconds, np.concatenate(parts))
    encoded = [[v.represent(model, corpus.wave(u), cfg) for u in us] for us in parts]
    table = {}
    for name, x in encoded[0][0].items():
        frames, averages = [], []
        for us, rows in zip(parts, encoded):
            xs = [row[name] for row in rows]
            phones = [
                measure.labels_of_frames(labels[u], len(x), seconds[u]) for u, x in zip(us, xs)
            ]
            frames.append((torch.cat(xs), torch.cat(phones)))
            means = torch.stack([x.mean(0) for x in xs])
            averages.append((means, torch.from_numpy(corpus.speaker[us])))
        table[name] = {
            "phone": measure.probe_accuracy(*frames),
            "speaker": measure.probe_accuracy(*averages),
        }
    return table


def test_a_fifth_of_the_toy_run(toy_folder, monkeypatch):
    """All phases. Far more conversions than sources are closer to the target's average spectrum than to the source's, and the
    phones become easier to read from the latent, against the untrained control."""
    monkeypatch.chdir(toy_folder)
    cfg = v.Config(**v.TOY | dict(steps=160, gan_share=20.0, device="cpu"))
    corpus = v.load_corpus(cfg)
    torch.manual_seed(0)
    model, losses, phases = v.Model(cfg, len(corpus.speakers)), [], set()
    untrained = probes(model.eval(), corpus, cfg, 200)
    optimizers = v.make_optimizers(model, cfg)
    for step in range(cfg.steps):
        log = v.train_step(model.train(), optimizers, corpus, step, cfg)
        phases.add(v.schedule(step, cfg)[0])
        losses += [log["reconstruction_loss"].item()] if "reconstruction_loss" in log else []
    assert phases == {0, 1, 2, 3} and np.mean(losses[-10:]) < 0.4 * np.mean(losses[:5])
    trained = probes(model.eval(), corpus, cfg, 200)
    assert trained["content"]["phone"] > untrained["content"]["phone"] + 0.05

    def spectrum(wave):
        return model.features(wave[None])[0].mean(0)

    def spectrum_of_speaker(s):
        us = corpus.train[corpus.speaker[corpus.train] == s][:20]
        return torch.stack([spectrum(corpus.wave(u)) for u in us]).mean(0)

    average = torch.stack([spectrum_of_speaker(s) for s in range(24)])
    us = corpus.held[:48]
    source = torch.from_numpy(corpus.speaker[us])
    aims = (source + 1 + torch.arange(48) % 23) % 24

    def off(waves, speakers):
        made = torch.stack([spectrum(wave) for wave in waves])
        return (made - average[speakers]).abs().mean(1)

    def closer(waves):
        return (off(waves, aims) < off(waves, source)).float().mean()

    sources = [corpus.wave(u) for u in us]
    for stage in (0.0, 1.0):
        waves = v.convert(model, sources, aims.tolist(), replace(cfg, gan_share=stage))
        assert closer(waves) > closer(sources) + 0.3
