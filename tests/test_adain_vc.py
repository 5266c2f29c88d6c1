# SPDX-License-Identifier: MIT
"""Checks of adain_vc.py: golden values of the authors' networks, closed forms, and one short run."""

import json
import math
from pathlib import Path
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


# -------------------- golden values --------------------
GOLDEN = json.loads((Path(__file__).parent / "golden" / "adain_vc.json").read_text())


def formula(k, shape, scale):
    """Numbers in [-scale, scale] that are the same on every machine; `formula` in the file."""
    P, A, B = 2147483647, 1103515245, 1812433253
    i = torch.arange(math.prod(shape))
    h = ((i * i % P) * A + ((i + 1) * (k + 1) % P) * B) % P
    return (scale * (2 * h.double() / P - 1)).view(shape)


EXACT = dict(rtol=1e-9, atol=0)


def agrees(ours, expected):
    """Sampled entries, mean and mean square of a tensor are the golden ones, to 1e-9 relative."""
    assert list(ours.shape) == expected["shape"]
    sampled = ours.flatten()[expected["index"]]
    torch.testing.assert_close(
        sampled, torch.tensor(expected["value"], dtype=torch.float64), **EXACT
    )
    for value, name in (ours.mean(), "mean"), (ours.square().mean(), "mean_square"):
        assert value.item() == pytest.approx(expected[name], rel=1e-9)


@pytest.fixture(scope="module")
def authors():
    """The model of full size in float64, with the weights of the golden file, and its input x."""
    model = v.Model(v.Config(device="cpu"), 2).double()
    for k, parameter in enumerate(model.parameters()):
        _, shape, scale = GOLDEN["layers"][k]
        parameter.data = formula(k, shape, scale).view(parameter.shape)
    assert k + 1 == len(GOLDEN["layers"])
    x = formula(1001, (2, 128, 512), 1.2) + formula(1002, (2, 1, 512), 1.2)
    return model, x


@pytest.mark.parametrize("T", [128, 37])
def test_networks_against_the_authors(authors, T):
    """Posterior, speaker embedding and conversion (each in the other's voice); D4: of the 40 frames
    that the authors' decoder returns for 37, ours keeps 37."""
    model, x = authors
    x = x[:, :T]
    with torch.no_grad():
        mu, log_var = model.content(x)
        e = model.speaker(x)
        agrees(mu, GOLDEN["outputs"][f"T{T}_mu"])
        agrees(log_var, GOLDEN["outputs"][f"T{T}_log_variance"])
        agrees(e, GOLDEN["outputs"][f"T{T}_e"])
        agrees(model.decode(mu, e.flip(0), T), GOLDEN["outputs"][f"T{T}_inference"])


def test_training_against_the_authors(authors, monkeypatch):
    """Three steps with the KL weight at 0.00005, 0.5 and 1: losses, gradients, clipping and Adam
    with amsgrad and weight decay, in every network."""
    model, x = authors
    cfg = model.cfg
    margin = 2  # frames that are cut off at each edge of a crop
    monkeypatch.setattr(model, "features", lambda wave: F.pad(x.mT, (margin, margin)).mT)
    monkeypatch.setattr(v, "get_batch", lambda *args: {"wave": None})
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    norms = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)))
    optimizers = v.make_optimizers(model, cfg)
    start = [p.detach().clone() for p in model.parameters()]
    networks = {
        "content encoder": model.content,
        "speaker encoder": model.speaker,
        "decoder": model.decoder,
    }

    for golden in GOLDEN["training"]["steps"]:
        noise = formula(golden["noise_k"], (2, 16, 128), math.sqrt(3))
        monkeypatch.setattr(torch, "randn_like", lambda mu: noise)
        log = v.train_step(model, optimizers, None, golden["step"], cfg)
        for name in ("loss", "l1", "kl"):
            assert log[name].item() == pytest.approx(golden[name], rel=1e-9)
        assert norms.pop().item() == pytest.approx(
            golden["gradient_norm_before_clipping"], rel=1e-9
        )

        parameters = list(model.parameters())
        for name, network in networks.items():
            expected = golden["networks"][name]
            own = list(network.parameters())
            norm = torch.stack([p.grad.norm() for p in own]).norm().item()
            assert norm == pytest.approx(expected["gradient_norm"], rel=1e-9)
            moved = [
                (p.detach() - old).flatten()
                for p, old in zip(parameters, start)
                if any(p is q for q in own)
            ]
            moved = torch.cat(moved)
            assert moved.mean().item() == pytest.approx(expected["moved"]["mean"], rel=1e-9)
            mean_square = moved.square().mean().item()
            assert mean_square == pytest.approx(expected["moved"]["mean_square"], rel=1e-9)
            for k, tensor in expected["tensors"].items():
                p = parameters[int(k)]
                for ours, name in (p.grad, "gradient"), (p.detach(), "weight"):
                    sampled = ours.flatten()[tensor["index"]]
                    value = torch.tensor(tensor[name], dtype=torch.float64)
                    torch.testing.assert_close(sampled, value, **EXACT)


def test_a_crop_does_not_see_its_edges(monkeypatch):
    """The frames of a segment are those of the uncut utterance: pre-emphasis and padding touch only
    the margin, which is cut off."""
    model = tiny()
    cfg = model.cfg
    wave = 0.1 * torch.randn(1, 8000)
    first = 10 * cfg.hop
    asked = []

    def batch(corpus, cfg, step):
        asked.append(cfg.crop)
        return {"wave": wave[:, first : first + cfg.crop]}

    monkeypatch.setattr(v, "get_batch", batch)
    x = v.segments(model, None, cfg, 0)
    margin = (asked[0] - cfg.crop) // 2 // cfg.hop
    assert x.shape == (1, cfg.crop // cfg.hop, cfg.n_mels) and margin > 0
    whole = model.features(wave)[:, 10 + margin :]
    close(x, whole[:, : x.shape[1]], 1e-5)


def test_sample_is_the_loss_of_test_utterances(tmp_path, monkeypatch):
    """The means of both losses over the held-out utterances of the TEST corpus, 200 at most."""
    model, corpus = tiny(), corpus_of(tones(3))
    corpus.test = corpus_of(tones(5, 800))
    seen = []
    monkeypatch.setattr(
        v,
        "losses",
        lambda model, x: (seen.append(x), (torch.tensor(float(len(seen))), torch.tensor(2.0)))[1],
    )
    assert v.sample(model, corpus, model.cfg, tmp_path) == {"l1": 3.0, "kl": 2.0}
    assert torch.equal(seen[4], model.features(corpus.test.wave(4)[None]))
    corpus.test.held = np.zeros(201, int)
    v.sample(model, corpus, model.cfg, tmp_path)
    assert len(seen) == 5 + 200


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
    assert [m.kernel_size[0] for m in model.content.trunk.bank] == list(range(1, 9))
    assert [b.stride for b in model.speaker.trunk.blocks] == [1, 2, 1, 2, 1, 2]
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
    block.conv_1 = block.adain_1 = block.adain_2 = Fixed()
    block.conv_2 = Fixed(torch.arange(8.0).view(1, 4, 2))
    assert block(torch.zeros(1, 2, 2), None)[0].tolist() == [[0, 2, 1, 3], [4, 6, 5, 7]]
    block.conv_2 = Fixed(torch.zeros(1, 4, 2))
    assert block(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), None)[0].tolist() == [
        [1, 1, 2, 2],
        [3, 3, 4, 4],
    ]


@pytest.mark.parametrize("on", [True, False])
def test_the_switch_norms_the_content_encoder_alone(on):
    """The speaker encoder has no norm in either case, the decoder's are always there."""
    model = tiny(instance_norm=on)

    def count(net):
        return sum(isinstance(m, nn.InstanceNorm1d) for m in net.modules())

    assert (count(model.content), count(model.speaker), count(model.decoder)) == (9 * on, 0, 1)


# -------------------- what instance normalization does to the whole --------------------
def still(net):
    """Bank and 1x1 without biases, so that the trunk is homogeneous up to the first norm."""
    for conv in (*net.trunk.bank, net.trunk.mix[0]):
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
    """9.5: they get no gradient, except where two phases share one normalized channel (the doubling convolutions)."""
    model, x = tiny().double(), torch.randn(2, 64, 20).double()
    mu, log_var = model.content(x)
    y = model.decode(mu + (log_var / 2).exp() * torch.randn_like(mu), model.speaker(x), 64)
    (y - x).abs().mean().backward()
    dead = [
        model.content.trunk.mix[0],
        model.decoder.enter[0],
        *(block.conv_1 for block in model.decoder.blocks),
    ]
    dead += [block.layers[i] for block in model.content.trunk.blocks for i in (0, 3)]
    dead += [block.conv_2 for block in model.decoder.blocks if block.up == 1]
    assert max(conv.bias.grad.abs().max() for conv in dead) < 1e-14
    alive = [block.conv_2 for block in model.decoder.blocks if block.up == 2] + [
        model.decoder.leave,
        *model.content.trunk.bank,
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
    assert model.content.trunk.min_frames == 9
    assert v.Model(v.Config(), 2).speaker.trunk.min_frames == 17


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
    )  # frame 10 is centered on sample 3000
    filters = v.mel_filters(24000, 2048, 512, torch.device("cpu")).double().numpy()
    mel = np.abs(np.fft.rfft(frame, 2048)) @ filters
    expected = np.clip((20 * np.log10(np.maximum(1e-5, mel)) - 20 + 100) / 100, 1e-8, 1)
    close(v.normalized_decibels(wave[None], cfg)[0, 10], expected, 1e-4)
    close(v.normalized_decibels(torch.zeros(1, 900), cfg), torch.full((1, 4, 512), 1e-8), 0)
    assert v.normalized_decibels(50 * wave[None], cfg).max() == 1


def test_decibels_at_the_edges():
    """The first sample has none before it; the others are emphasised alike wherever they are."""
    cfg, wave = v.Config(), torch.zeros(1, 9000)
    wave[0, -1] = 0.5  # the last one is not before the first
    close(v.normalized_decibels(wave, cfg)[0, 0], torch.full((512,), 1e-8), 0)
    y = torch.zeros(1, 9000)
    y[0, 300] = 0.5
    close(
        v.normalized_decibels(y.roll(-300, 1), cfg)[0, 0], v.normalized_decibels(y, cfg)[0, 1], 1e-5
    )


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


def test_prepare_standardizes_the_training_set():
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
    monkeypatch.setattr(
        v, "normalized_decibels", lambda wave, cfg: seen.append(wave) or torch.zeros(1, 1, 20)
    )
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
    assert [b.up for b in model.decoder.blocks] == [
        b.stride for b in reversed(model.content.trunk.blocks)
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
