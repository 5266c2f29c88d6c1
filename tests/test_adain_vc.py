# SPDX-License-Identifier: MIT
"""Checks of the method in adain_vc.py: numbers worked out by hand, exact identities, and one short run."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adain_vc as v
import measure

torch.set_num_threads(1)
TINY = dict(
    sample_rate=8000,
    n_fft=256,
    win=200,
    hop=80,
    n_mels=20,
    crop=2560,
    batch_size=6,
    channels=16,
    d_content=6,
    d_speaker=12,
    bank=4,
    bank_channels=4,
    blocks=4,
    dense=2,
    kl_steps=50,
    lr=2e-3,
    device="cpu",
)
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


def tiny(**options):
    return v.Model(v.Config(**TINY | options), 3).eval()


def differ(a, b):
    """Relative distance of two tensors."""
    return ((a - b).norm() / b.norm()).item()


def corpus_of(waves, speaker=None):
    """What get_batch needs of a Corpus, all of one length."""
    waves = torch.stack([w for w in waves])
    U, N = waves.shape
    audio = (waves * 32768).round().clamp(-32768, 32767).short().flatten()
    c = SimpleNamespace(
        train=np.arange(U),
        held=np.arange(U),
        length=np.full(U, N),
        start=np.arange(U) * N,
        audio=audio,
        speaker=np.arange(U) if speaker is None else np.array(speaker),
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


# -------------------- the pieces --------------------
def test_parameters_of_the_paper():
    """9.13: the authors' final configuration, network by network."""
    model = v.Model(v.Config(), 100)

    def count(net):
        return sum(p.numel() for p in net.parameters())

    assert [count(net) for net in (model.content, model.speaker, model.decoder)] == [
        3_574_656,
        3_756_288,
        1_709_568,
    ]
    assert (
        count(model)
        == 9_040_512
        == sum(p.numel() for p in v.Model(v.Config(instance_norm=False), 2).parameters())
    )
    assert sum(isinstance(m, v.AdaIN) for m in model.modules()) == 12
    assert [m.kernel_size[0] for m in model.content.bank] == list(range(1, 9))
    assert [b[3].stride[0] for b in model.speaker.blocks] == [1, 2, 1, 2, 1, 2]
    assert [b.up for b in model.decoder.blocks] == [2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    "k, stride, T", [(1, 1, 7), (2, 1, 7), (5, 2, 7), (5, 2, 8), (8, 1, 9), (3, 1, 4)]
)
def test_convolution_against_a_loop(k, stride, T):
    """Section 3: k // 2 mirrored frames before, one fewer after where k is even; length ceil(T / stride)."""
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


def test_instance_norm_removes_an_affine_per_channel():
    """9.1: IN(a h + b) = IN(h) for a > 0, inside AdaIN; a negative a flips the sign; one frame has no deviation."""
    adain, h, e = (
        v.AdaIN(v.Config(channels=8, d_speaker=5)),
        torch.randn(2, 8, 50),
        torch.randn(2, 5),
    )
    a, b = 0.2 + 3 * torch.rand(1, 8, 1), 5 * torch.randn(1, 8, 1)
    close(adain(a * h + b, e), adain(h, e), 1e-3)
    shift = adain.affine(e)[:, :8, None]
    close(adain(-a * h + b, e) - shift, shift - adain(h, e), 1e-3)
    with pytest.raises(ValueError):
        adain(h[..., :1], e)


def test_adain_sets_mean_and_deviation():
    """9.2: the mean over time is the first half of the affine's output, the biased deviation |the second half|."""
    adain, h, e = (
        v.AdaIN(v.Config(channels=8, d_speaker=5)),
        3 + 7 * torch.randn(2, 8, 50),
        4 * torch.randn(2, 5),
    )
    y, (shift, scale) = adain(h, e), adain.affine(e).chunk(2, 1)
    close(y.mean(-1), shift, 1e-5)
    close(y.std(-1, correction=0), scale.abs(), 1e-4)
    assert (scale < 0).any()  # raw: it may be negative


class Fixed(nn.Module):
    """Stands for a layer whose output is known."""

    def __init__(self, y=None):
        super().__init__()
        self.y = y

    def forward(self, h, e=None):
        return h if self.y is None else self.y


def test_pixel_shuffle():
    """9.11: channel 2 c + p of frame t becomes channel c of frame 2 t + p; the skip repeats every frame."""
    block = v.DecoderBlock(v.Config(channels=2), up=2)
    block.first = block.adain_1 = block.adain_2 = Fixed()
    block.second = Fixed(torch.arange(8.0).view(1, 4, 2))
    assert block(torch.zeros(1, 2, 2), None)[0].tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
    block.second = Fixed(torch.zeros(1, 4, 2))
    assert block(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), None)[0].tolist() == [
        [1, 1, 2, 2],
        [3, 3, 4, 4],
    ]


def test_decoder_in_plain_functions():
    """1x1, IN, ReLU, blocks, 1x1."""
    net, z, e = tiny().decoder, torch.randn(2, 9, 6), torch.randn(2, 12)
    h = F.relu(F.instance_norm(net.enter[0](z.mT)))
    for block in net.blocks:
        h = block(h, e)
    close(net(z, e), net.leave(h).mT, 1e-5)


def test_decoder_block_order():
    """Section 3: conv, AdaIN, ReLU, conv, shuffle, AdaIN, ReLU, then the skip, in plain functions."""
    block, h, e = (
        v.DecoderBlock(v.Config(channels=3, d_speaker=4), up=2),
        torch.randn(2, 3, 9),
        torch.randn(2, 4),
    )
    shuffled = block.second(block.adain_1(block.first(h), e).clamp(min=0))
    y = torch.zeros(2, 3, 18)
    y[..., 0::2], y[..., 1::2] = shuffled[:, 0::2], shuffled[:, 1::2]
    close(block(h, e), block.adain_2(y, e).clamp(min=0) + F.interpolate(h, scale_factor=2), 1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_trunk_in_plain_functions(norm):
    """Section 3: bank of ReLU'd convolutions with the raw input beside them, 1x1, blocks whose skip is added after the
    ReLU; with IN before every ReLU but the bank's, or nowhere."""
    net, x = tiny(instance_norm=norm).content, torch.randn(2, 37, 20)

    def tidy(y):
        if norm:
            y = (y - y.mean(-1, True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return y.relu()

    h = torch.cat([*(F.relu(conv(x.mT)) for conv in net.bank), x.mT], 1)
    h = tidy(net.mix[0](h))
    for i, block in enumerate(net.blocks):
        y = tidy(block[3](tidy(block[0](h))))
        pairs = [h[..., t : t + 1 + i % 2].mean(-1) for t in range(0, h.shape[-1], 1 + i % 2)]
        h = y + torch.stack(pairs, -1)
    close(net.trunk(x), h, 1e-4)
    mu, log_var = net(x)
    close(mu, h.mT @ net.mu.weight[..., 0].T + net.mu.bias, 1e-4)
    close(log_var, h.mT @ net.log_var.weight[..., 0].T + net.log_var.bias, 1e-4)


def test_speaker_encoder_after_the_trunk():
    """Section 3: the average over time, residual blocks that end in a ReLU, a linear layer, no normalisation."""
    net, x = tiny().speaker, torch.randn(2, 37, 20)
    h = net.trunk(x).mean(-1)
    for block in net.dense:
        h = h + F.relu(block[2](F.relu(block[0](h))))
    close(net(x), net.project(h), 1e-5)


@pytest.mark.parametrize("on", [True, False])
def test_the_switch_norms_the_content_encoder_alone(on):
    """The speaker encoder has no norm in either case, the decoder's are always there."""
    model = tiny(instance_norm=on)

    def count(net):
        return sum(isinstance(m, nn.InstanceNorm1d) for m in net.modules())

    assert (count(model.content), count(model.speaker), count(model.decoder)) == (9 * on, 0, 1)


# -------------------- what instance normalisation does to the whole --------------------
def still(net):
    """Bank and 1x1 without biases, so that the trunk is homogeneous up to the first norm."""
    for conv in (*net.bank, net.mix[0]):
        nn.init.zeros_(conv.bias)
    return net


def test_content_does_not_see_a_gain():
    """9.4: a gain on the input is removed, exactly only without the biases before the first norm; an offset is not."""
    net, x = tiny().content, torch.randn(1, 64, 20)
    with_biases = differ(net(3 * x)[0], net(x)[0])
    assert differ(still(net)(3 * x)[0], net(x)[0]) < 1e-3 < with_biases < 0.2
    assert differ(net(x + 1)[0], net(x)[0]) > 0.1
    plain = still(tiny(instance_norm=False).content)
    assert differ(plain(3 * x)[0], plain(x)[0]) > 0.3


def test_speaker_embedding_sees_a_gain():
    """Pitfall 12: with a norm inside it would not."""
    net, x = still(tiny().speaker), torch.randn(1, 64, 20)
    assert differ(net(3 * x), net(x)) > 0.3


def test_decoder_is_blind_to_constants():
    """9.3: a constant per channel added to z changes nothing, and a gain next to nothing."""
    net, z, e = tiny().decoder.double(), torch.randn(2, 16, 6).double(), torch.randn(2, 12).double()
    nn.init.normal_(net.enter[0].weight), nn.init.zeros_(net.enter[0].bias)
    assert differ(net(z + torch.randn(2, 1, 6), e), net(z, e)) < 1e-12
    assert differ(net(5 * z, e), net(z, e)) < 1e-4
    assert differ(net(z.flip(1), e), net(z, e)) > 1e-2


def test_decoder_hears_the_speaker_by_the_affines_alone():
    """9.12: with their weights at zero the target makes no difference; as they are, it does."""
    net, z = tiny().decoder, torch.randn(1, 16, 6)
    a, b = torch.randn(2, 1, 12)
    assert differ(net(z, a), net(z, b)) > 1e-2
    for m in net.modules():
        isinstance(m, v.AdaIN) and nn.init.zeros_(m.affine.weight)
    assert torch.equal(net(z, a), net(z, b))


def test_biases_before_a_norm_are_dead():
    """9.5: they get no gradient, except where two phases share one normalised channel (the doubling convolutions)."""
    model, x = tiny().double(), torch.randn(2, 64, 20).double()
    mu, log_var = model.content(x)
    y = model.decode(mu + (log_var / 2).exp() * torch.randn_like(mu), model.speaker(x), 64)
    (y - x).abs().mean().backward()
    dead = [
        model.content.mix[0],
        model.decoder.enter[0],
        *(block.first for block in model.decoder.blocks),
    ]
    dead += [conv for block in model.content.blocks for conv in (block[0], block[3])]
    dead += [block.second for block in model.decoder.blocks if block.up == 1]
    assert max(conv.bias.grad.abs().max() for conv in dead) < 1e-14
    alive = [block.second for block in model.decoder.blocks if block.up == 2] + [
        model.decoder.leave,
        *model.content.bank,
    ]
    assert min(conv.bias.grad.abs().max() for conv in alive) > 1e-7
    assert all(p.grad.abs().max() > 0 for p in model.speaker.parameters())


def test_speaker_embedding_hardly_knows_the_order():
    """9.7: said twice it is nearly the same, edges aside; said backwards it is not."""
    net, x = tiny(channels=64).speaker, torch.randn(1, 128, 20).cumsum(1) / 8
    twice, back = net(torch.cat([x, x], 1)), net(x.flip(1))
    center = net(torch.randn(50, 128, 20).cumsum(1) / 8).mean(
        0
    )  # most of an embedding is its biases
    assert differ(twice - center, net(x) - center) < differ(back - center, net(x) - center) / 2


# -------------------- lengths --------------------
@pytest.mark.parametrize("T", [1, 2, 9, 16, 17, 24, 31, 100, 101, 128])
def test_lengths_in_frames(T):
    """9.6: T frames -> ceil(T / 8) latents -> T frames, from one frame on; the target may have any length."""
    model = v.Model(v.Config(channels=8, bank_channels=4, n_mels=20), 2).eval()
    x, target = torch.randn(1, T, 20), torch.randn(1, (T * 7) % 40 + 1, 20)
    mu = model.content(x)[0]
    assert mu.shape == (1, max(3, math.ceil(T / 8)), 128)
    assert model.decoder(mu, model.speaker(target)).shape == (1, 8 * mu.shape[1], 20)
    assert model.decode(mu, model.speaker(target), T).shape == (1, T, 20)


def test_short_ones_are_repeated():
    """D4: fewer frames than reach the end are those frames again and again."""
    model, x = tiny(), torch.randn(1, 4, 20)
    assert torch.equal(model.speaker(x), model.speaker(x.repeat(1, 3, 1)[:, :9]))
    assert model.content.min_frames == 9 and v.Model(v.Config(), 2).speaker.min_frames == 17


@pytest.mark.parametrize("n", [201, 399, 801, 4001, 6000, 6079])
def test_lengths_in_samples(n):
    """As many samples out as in, whatever the target; represent gives a vector and a row per 4 frames."""
    model, wave = tiny(), 0.1 * torch.randn(n)
    out = v.convert(model, [wave, wave], [0.1 * torch.randn(777), None], model.cfg)
    assert [w.shape for w in out] == [(n,), (n,)] and all(w.isfinite().all() for w in out)
    known = v.represent(model, wave, model.cfg)
    assert known["content"].shape == (max(3, math.ceil((1 + n // 80) / 4)), 6) and known[
        "speaker"
    ].shape == (12,)


def test_the_first_frames_are_kept():
    """D4: what is cut is at the end."""
    model, z, e = tiny(), torch.randn(1, 5, 6), torch.randn(1, 12)
    assert torch.equal(model.decode(z, e, 18), model.decoder(z, e)[:, :18])


# -------------------- features --------------------
def test_decibels_against_numpy():
    """Section 2: pre-emphasis, magnitude, mel bands, 20 log10, -80..20 dB to 0..1, in another library's arithmetic."""
    cfg, wave = v.Config(), 0.1 * torch.randn(9000)
    y = wave.double().numpy().copy()
    y[1:] -= 0.97 * y[:-1].copy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1200) / 1200)
    frame = (
        np.pad(y, 1200)[1200 + 10 * 300 - 600 :][:1200] * window
    )  # frame 10 is centred on sample 3000
    filters = v.mel_filters(24000, 2048, 512, torch.device("cpu")).double().numpy()
    mel = np.abs(np.fft.rfft(frame, 2048)) @ filters
    expected = np.clip((20 * np.log10(np.maximum(1e-5, mel)) - 20 + 100) / 100, 1e-8, 1)
    close(v.decibels(wave[None], cfg)[0, 10], expected, 1e-4)
    close(v.decibels(torch.zeros(1, 900), cfg), torch.full((1, 4, 512), 1e-8), 0)
    assert v.decibels(50 * wave[None], cfg).max() == 1


def test_decibels_at_the_edges():
    """The first sample has none before it; the others are emphasised alike wherever they are."""
    cfg, wave = v.Config(), torch.zeros(1, 9000)
    wave[0, -1] = 0.5  # the last one is not before the first
    close(v.decibels(wave, cfg)[0, 0], torch.full((512,), 1e-8), 0)
    y = torch.zeros(1, 9000)
    y[0, 300] = 0.5
    close(v.decibels(y.roll(-300, 1), cfg)[0, 0], v.decibels(y, cfg)[0, 1], 1e-5)


def test_no_mel_band_is_empty():
    """Section 2: at 24 kHz each of the 512 bands has a bin of the spectrum; and at TOY's size."""
    for cfg in (v.Config(), v.Config(**v.TOY)):
        filters = v.mel_filters(cfg.sample_rate, cfg.n_fft, cfg.n_mels, torch.device("cpu"))
        assert (filters.sum(0) > 0).all()


def test_vocode_undoes_the_features():
    """9.14: level and colour of noise survive features and vocode, pre-emphasis included, within 1 dB on average."""
    model, wave = v.Model(v.Config(), 2), 0.05 * torch.randn(1, 24000)
    model.mean.uniform_(), model.std.uniform_(0.5, 2)
    back = model.vocode(model.features(wave), 24000)
    x, y = v.log_mel(wave, model.cfg)[:, 8:-8], v.log_mel(back, model.cfg)[:, 8:-8]
    assert back.shape == (1, 24000)
    gain = 20 / math.log(10) * (y.exp().mean(1) / x.exp().mean(1)).log()[0]  # dB of each band
    assert gain[10:].abs().mean() < 1 and abs(gain[10:].mean()) < 0.5 and gain[30:].abs().max() < 4


def test_vocode_magnitude_by_hand(monkeypatch):
    """What griffin_lim gets: 0..1 at most, 100 dB of it, mel to magnitude, over |1 - 0.97 exp(-i w)|."""
    model, x = tiny(), 2 * torch.randn(1, 9, 20)
    model.mean.uniform_(), model.std.uniform_(0.5, 2)
    monkeypatch.setattr(v, "griffin_lim", lambda magnitude, cfg: magnitude)
    mel = 10 ** (5 * (x * model.std + model.mean).clamp(0, 1) - 4)
    gain = (1 + 0.97**2 - 2 * 0.97 * torch.linspace(0, math.pi, 129).cos()).sqrt()
    y = model.vocode(x, 129) * gain  # as many "samples" as there are bins
    assert torch.equal(y[:, 9], y[:, 8])  # a frame more, for N samples
    close(y[:, :9], v.mel_to_magnitude(mel, model.cfg), 1e-4)


def test_prepare_standardises_the_training_set():
    """Every band has mean 0 and deviation 1 over all frames of the training utterances; a silent one is left alone."""
    model, corpus = tiny(), corpus_of(tones(5))
    v.prepare(model, corpus, model.cfg)
    x = torch.cat([model.features(corpus.wave(u)[None])[0] for u in range(5)])
    close(x.mean(0), torch.zeros(20), 1e-4)
    close(x.std(0, correction=0), torch.ones(20), 1e-3)
    v.prepare(model, corpus_of(torch.zeros(2, 4000)), model.cfg)
    close(model.std, torch.full((20,), 0.01)), close(model.mean, torch.full((20,), 1e-8))


def test_prepare_weighs_frames_and_takes_training_utterances_only(monkeypatch):
    """Long utterances count for more, and 5000 are enough."""
    model, waves = tiny(), tones(5)
    corpus = SimpleNamespace(train=np.arange(3), wave=lambda u: waves[u][: 4000 - 1500 * int(u)])
    v.prepare(model, corpus, model.cfg)
    x = torch.cat([model.features(corpus.wave(u)[None])[0] for u in range(3)])
    close(x.mean(0), torch.zeros(20), 1e-4), close(x.std(0, correction=0), torch.ones(20), 1e-3)
    seen = []
    monkeypatch.setattr(v, "decibels", lambda wave, cfg: seen.append(wave) or torch.zeros(1, 1, 20))
    v.prepare(model, SimpleNamespace(train=np.zeros(5001, int), wave=lambda u: waves[0]), model.cfg)
    assert len(seen) == 5000


# -------------------- the objective --------------------
def test_kl_values():
    """9.8, and against torch.distributions."""

    def kl(mu, var):
        return v.kl_to_normal(torch.tensor(mu), torch.tensor(var).log()).item()

    close(kl(0.0, 1.0), 0.0), close(kl(1.0, 1.0), 0.5), close(kl(0.0, 4.0), 0.8069, 1e-4)
    mu, log_var = torch.randn(2, 3, 4, 5)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mu, (log_var / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    close(v.kl_to_normal(mu, log_var), expected, 1e-5)


@pytest.mark.parametrize("step, weight", [(0, 5e-5), (9999, 0.5), (19999, 1), (20000, 1)])
def test_kl_weight_rises(step, weight):
    """9.9: min(1, (step + 1) / 20000)."""
    cfg = v.Config(**TINY | dict(kl_steps=v.Config.kl_steps, l1=1e-9))
    model, corpus = v.Model(cfg, 3), corpus_of(tones(6))
    log = v.train_step(model, v.make_optimizers(model, cfg), corpus, step, cfg)
    close(log["loss"] / log["kl"], weight, 1e-3)


def test_kl_weight_is_scaled():
    """By --kl: 0.3 at the second of four steps is 0.15."""
    cfg = v.Config(**TINY | dict(kl_steps=4, kl=0.3, l1=1e-9))
    model, corpus = v.Model(cfg, 3), corpus_of(tones(6))
    log = v.train_step(model, v.make_optimizers(model, cfg), corpus, 1, cfg)
    close(log["loss"] / log["kl"], 0.15, 1e-3)


def test_train_step_draws_anew_and_forgets_old_gradients(monkeypatch):
    """Every step has its own batch; what .grad held before makes no difference."""
    cfg, corpus, steps, grads = v.Config(**TINY), corpus_of(tones(6)), [], []
    draw = v.get_batch
    monkeypatch.setattr(
        v, "get_batch", lambda corpus, cfg, step: (steps.append(step), draw(corpus, cfg, step))[1]
    )
    for old in (0, 1):
        torch.manual_seed(1)
        model = v.Model(cfg, 3)
        for p in model.parameters():
            p.grad = torch.full_like(p, old)
        v.train_step(model, v.make_optimizers(model, cfg), corpus, 7, cfg)
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert steps == [7, 7] and torch.equal(*grads)


def test_train_step_by_hand():
    """10 L1 + w KL of one segment in both encoders, with z = mu + exp(log_var / 2) eps; one step of Adam with amsgrad on
    the gradient clipped to 5 over all parameters."""
    cfg = v.Config(**TINY | dict(l1=1000.0, kl_steps=4))  # l1: so that clipping has something to do
    model, other, corpus = v.Model(cfg, 3), v.Model(cfg, 3), corpus_of(tones(6))
    v.prepare(model, corpus, cfg)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    log = v.train_step(model, v.make_optimizers(model, cfg), corpus, 0, cfg)
    torch.manual_seed(5)
    x = other.features(v.get_batch(corpus, cfg, 0)["wave"])[:, :32]
    mu, log_var = other.content(x)
    y = other.decoder(mu + torch.randn_like(mu) * (log_var / 2).exp(), other.speaker(x))[:, :32]
    l1, kl = (y - x).abs().mean(), (log_var.exp() + mu**2 - 1 - log_var).mean() / 2
    (
        close(log["l1"], l1, 1e-5),
        close(log["kl"], kl, 1e-5),
        close(log["loss"], 1000 * l1 + kl / 4, 1e-5),
    )
    (1000 * l1 + kl / 4).backward()
    norm = torch.stack([p.grad.norm() for p in other.parameters()]).norm()
    assert norm > 10
    optimizer = torch.optim.Adam(
        other.parameters(), 2e-3, betas=(0.9, 0.999), weight_decay=1e-4, amsgrad=True
    )
    for p in other.parameters():
        p.grad.mul_(5 / norm)
    optimizer.step()
    for (name, a), b, before in zip(
        model.named_parameters(), other.parameters(), other.parameters()
    ):
        close(a.grad, b.grad, 1e-4)
        torch.testing.assert_close(
            a[b.grad.abs() > 1e-4], b[b.grad.abs() > 1e-4], atol=1e-5, rtol=0, msg=name
        )


@pytest.mark.parametrize("level", [0.0, 3e-5])
def test_a_silent_segment_gives_way(level):
    """D4: digital silence, or noise of the last bit, would leave nothing of the batch's gradient."""
    cfg, waves = v.Config(**TINY | dict(kl=1e-9)), tones(6, 2560)
    model, corpus = v.Model(cfg, 3), corpus_of(waves)
    v.prepare(model, corpus, cfg)
    chosen = v.get_batch(corpus, cfg, 0)["utterance"]
    waves[chosen[2]] = level * torch.randn(2560)
    quiet, waves = corpus_of(waves), waves.clone()
    waves[chosen[2]] = waves[chosen[0]]  # the first that is heard
    grads = []
    for corpus in (quiet, corpus_of(waves)):
        torch.manual_seed(1)
        net = v.Model(cfg, 3)
        net.load_state_dict(model.state_dict())
        v.train_step(net, v.make_optimizers(net, cfg), corpus, 0, cfg)
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*grads) and grads[0].norm() > 0.1
    everything = corpus_of(torch.zeros(6, 2560))  # then no other can be had
    assert v.train_step(net, v.make_optimizers(net, cfg), everything, 0, cfg)["loss"].isfinite()


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_any_number_of_blocks(blocks):
    """The decoder doubles where the encoder, read backwards, halves."""
    model, x = tiny(blocks=blocks, bank=9), torch.randn(1, 7, 20)
    z = model.content(x)[0]
    assert model.decoder(z, model.speaker(x)).shape[1] == z.shape[1] * 2 ** (blocks // 2) >= 7
    assert [b.up for b in model.decoder.blocks] == [b[3].stride[0] for b in model.content.blocks][
        ::-1
    ]


def test_defaults_are_the_authors():
    """Sections 4 and 5."""
    c = v.Config()
    assert (c.l1, c.kl, c.clip, c.kl_steps, c.batch_size, c.steps, c.crop // c.hop) == (
        10,
        1,
        5,
        20_000,
        128,
        500_000,
        128,
    )


def test_optimizer_is_the_authors():
    defaults = v.make_optimizers(tiny(), v.Config())["autoencoder"].defaults
    assert (defaults["lr"], defaults["betas"], defaults["amsgrad"], defaults["weight_decay"]) == (
        5e-4,
        (0.9, 0.999),
        True,
        1e-4,
    )


def test_weight_decay_is_in_the_gradient():
    """Section 5: L2, which AdamW, a subclass, is not."""
    assert type(v.make_optimizers(tiny(), v.Config())["autoencoder"]) is torch.optim.Adam


def test_nothing_is_dropped_in_training():
    """D3: train() is eval()."""
    model, x = tiny(), torch.randn(2, 32, 20)

    def run():
        return model.decode(model.content(x)[0], model.speaker(x), 32)

    assert torch.equal(run(), (model.train(), run())[1])


def test_one_batch_can_be_learned_by_heart():
    """Sixty steps on the same segments halve the error."""
    cfg = v.Config(**TINY | dict(lr=5e-3))
    model, corpus = v.Model(cfg, 3), corpus_of(tones(6, 2560))
    v.prepare(model, corpus, cfg)
    optimizers = v.make_optimizers(model, cfg)
    l1 = [v.train_step(model, optimizers, corpus, 0, cfg)["l1"] for _ in range(60)]
    assert l1[-1] < 0.5 * l1[0]


# -------------------- what it is good for --------------------
def test_inference_is_the_decoder_of_the_means():
    """9.10: exactly Decoder(mu(x), Es(x)); two conversions agree, two noisy passes do not."""
    model, wave, target = tiny(), tones(1)[0], tones(2)[1][:3000]
    model.mean.fill_(0.4), model.std.fill_(0.2)
    x = model.features(wave[None])

    def as_of(e):
        return model.vocode(model.decoder(model.content(x)[0], e)[:, : x.shape[1]], len(wave))[0]

    a, b = (v.convert(model, [wave], [target], model.cfg)[0] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(a, as_of(model.speaker(model.features(target[None]))))
    own = as_of(model.speaker(x))
    assert torch.equal(v.convert(model, [wave], [None], model.cfg)[0], own) and not torch.equal(
        own, a
    )
    corpus, losses = corpus_of(tones(6)), []
    for seed in (1, 2, 2):
        torch.manual_seed(seed)
        still, cfg = tiny(), model.cfg
        still.load_state_dict(model.state_dict())
        losses.append(v.train_step(still, v.make_optimizers(still, cfg), corpus, 0, cfg)["l1"])
    assert losses[0] != losses[1] == losses[2]  # the noise is drawn, and drawn alone


def test_represent_gives_the_means():
    model, wave = tiny(), tones(1)[0]
    x, known = model.features(wave[None]), v.represent(model, wave, model.cfg)
    assert torch.equal(known["content"], model.content(x)[0][0]) and torch.equal(
        known["speaker"], model.speaker(x)[0]
    )


def test_inference_tracks_no_gradient():
    """Nobody wants to write no_grad around it."""
    model, wave = tiny(), tones(1)[0]
    out = [
        *v.represent(model, wave, model.cfg).values(),
        *v.convert(model, [wave], [None], model.cfg),
    ]
    assert not any(y.requires_grad for y in out)


def test_several_targets_are_averaged():
    """U2: of two joined recordings the trunk's average is that of both, edges aside."""
    net, (a, b) = tiny().speaker, torch.randn(2, 1, 200, 20)
    joined, mean = (
        net.trunk(torch.cat([a, b], 1)).mean(-1),
        (net.trunk(a).mean(-1) + net.trunk(b).mean(-1)) / 2,
    )
    assert differ(joined, mean) < 0.02 < differ(net.trunk(a).mean(-1), mean) * 5


def test_sample_takes_the_right_utterances(tmp_path, monkeypatch):
    """The grid is of four speakers of five, held ones of the TEST set: the first recording says it, in the voice of the
    last. L1 and KL are of all of them; what others there are is drawn from all. Nothing is tracked."""
    model, pool, grid = tiny(), corpus_of(tones(13), np.arange(13) % 5), {}
    pool.held, pool.train, pool.speakers = np.arange(1, 13), None, list("edcba")
    v.prepare(model, SimpleNamespace(train=range(13), wave=pool.wave), model.cfg)
    monkeypatch.setattr(
        v,
        "write_audio",
        lambda path, *rest: grid.update({path.name: (*rest, torch.is_grad_enabled())}),
    )
    metrics = v.sample(model, SimpleNamespace(test=pool), model.cfg, tmp_path)
    assert set(grid) == {f"grid_{a}_as_{b}.wav" for a in "dcba" for b in "dcba"}  # e comes fifth
    for name, s, t in ("d_as_c", 1, 12), ("a_as_d", 4, 11):
        wave, rate, tracked = grid[f"grid_{name}.wav"]
        assert torch.equal(wave, v.convert(model, [pool.wave(s)], [pool.wave(t)], model.cfg)[0])
        assert rate == 8000 and not tracked
    expected, kl = dict(own=0, same_speaker=0, another_speaker=0), 0
    for u in range(1, 13):
        x = model.features(pool.wave(u)[None])
        kl += v.kl_to_normal(*model.content(x)).mean() / 12
        for name, ok in (
            ("own", lambda w: w == u),
            ("same_speaker", lambda w: w != u and w % 5 == u % 5),
            ("another_speaker", lambda w: w % 5 != u % 5),
        ):
            ws = [w for w in range(1, 13) if ok(w)]
            e = model.speaker(model.features(pool.wave(ws[u % len(ws)])[None]))
            expected[name] += (
                model.decode(model.content(x)[0], e, x.shape[1]) - x
            ).abs().mean().item() / 12
    for name in expected:
        close(metrics["l1"][name], expected[name], 1e-5)
    close(metrics["kl"], kl, 1e-6)


def test_active_channels_by_hand(tmp_path):
    """KL of channel d is mu_d^2 / 2 where log_var is 0: three of six are above 0.01."""
    model, corpus = tiny(), corpus_of(tones(1))
    for p in (*model.content.mu.parameters(), *model.content.log_var.parameters()):
        nn.init.zeros_(p)
    kl = torch.tensor([0.02, 0.009, 0.011, 0, 0.5, 0.0099])
    model.content.mu.bias.data, corpus.speakers = (2 * kl).sqrt(), ["a"]
    metrics = v.sample(model, corpus, model.cfg, tmp_path)
    assert metrics["active"] == 3
    close(metrics["kl"], kl.mean(), 1e-6)


def test_sample_of_one_speaker_with_one_recording(tmp_path):
    """There is no other recording then, and no other speaker."""
    model, corpus = tiny(), corpus_of(tones(1))
    corpus.speakers = ["a"]
    metrics = v.sample(model, corpus, model.cfg, tmp_path)
    assert list(metrics["l1"]) == ["own"] and (tmp_path / "grid_a_as_a.wav").exists()


def test_sample_measures_200_utterances_at_most(tmp_path, monkeypatch):
    model, corpus, seen, kl = tiny(), corpus_of(tones(1, 400)), [], v.kl_to_normal
    corpus.speakers, corpus.held = ["a"], np.zeros(201, int)
    monkeypatch.setattr(v, "kl_to_normal", lambda *q: seen.append(q) or kl(*q))
    v.sample(model, corpus, model.cfg, tmp_path)
    assert len(seen) == 200


# -------------------- on a GPU --------------------
@GPU
@pytest.mark.parametrize("bf16, tolerance", [(False, 1e-3), (True, 5e-2)])
def test_cuda_is_the_cpu(bf16, tolerance):
    model, x = tiny(), torch.randn(2, 64, 20)
    here = model.decode(model.content(x)[0], model.speaker(x), 64)
    model, x = model.cuda(), x.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        there = model.decode(model.content(x)[0], model.speaker(x), 64)
    assert differ(there.float().cpu(), here) < tolerance


# -------------------- the whole --------------------
def probes(model, corpus, cfg, utterances):
    """Linear probes of what is represented, fitted on training and scored on held-out utterances -> {name: {"phone":
    accuracy of frames, None for a vector; "speaker": accuracy of time averages}}."""
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
            means = torch.stack([z if z.dim() == 1 else z.mean(0) for z in xs])
            averages.append((means, torch.from_numpy(corpus.speaker[us])))
            if x.dim() == 1:
                continue
            phones = [
                measure.labels_of_frames(labels[u], len(z), seconds[u]) for u, z in zip(us, xs)
            ]
            frames.append((torch.cat(xs), torch.cat(phones)))
        table[name] = {
            "phone": measure.probe_accuracy(*frames) if frames else None,
            "speaker": measure.probe_accuracy(*averages),
        }
    return table


def test_a_tenth_of_the_toy_run(toy_folder, monkeypatch):
    """The paper's claim, and the untrained control: without instance norm the speaker is read from the content; training
    brings the phones into it; the embedding tells the speakers apart. Chance is 4 % for speakers, of whom there are 24."""
    monkeypatch.chdir(toy_folder)
    known = {}
    for norm in (False, True):
        cfg = v.Config(**v.TOY | dict(steps=150, kl_steps=38, device="cpu", instance_norm=norm))
        corpus = v.load_corpus(cfg)
        torch.manual_seed(0)
        model = v.Model(cfg, len(corpus.speakers)).eval()
        v.prepare(model, corpus, cfg)
        if norm:
            untrained = probes(model, corpus, cfg, 600)
        optimizers = v.make_optimizers(model, cfg)
        for step in range(cfg.steps):
            v.train_step(model.train(), optimizers, corpus, step, cfg)
        known[norm] = probes(model.eval(), corpus, cfg, 600)
    assert known[True]["content"]["speaker"] + 0.2 < known[False]["content"]["speaker"], known
    assert known[True]["content"]["phone"] > untrained["content"]["phone"] + 0.15, untrained
    assert known[True]["speaker"]["speaker"] > 0.85, known
