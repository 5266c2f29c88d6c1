# SPDX-License-Identifier: MIT
"""Checks of the method in cpc.py: numbers worked out by hand, exact identities, naive loops, which step moves what, and one
short run."""

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

import cpc as v
import measure

torch.set_num_threads(1)
TINY = dict(
    sample_rate=8000,
    n_fft=256,
    win=256,
    hop=80,
    n_mels=20,
    crop=3200,
    batch_size=4,
    channels=16,
    d_context=12,
    prediction_steps=3,
    units=6,
    d_embedding=8,
    hidden=16,
    blocks=2,
    steps=10,
    cpc_share=0.5,
    lr=2e-3,
    device="cpu",
    score_scale=0.25,
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
        speakers=[f"s{i}" for i in sorted(set(speaker))],
        paths=[v.Path(f"u{i}.wav") for i in range(len(waves))],
    )
    c.wave = lambda u: c.audio[c.start[u] : c.start[u] + c.length[u]].float() / 32768
    c.test = c
    return c


def tone(hertz, seconds=0.6, rate=8000, noise=0.003):
    """A harmonic tone (hertz: a number, or one for every sample), 1 / h per harmonic."""
    hertz = torch.as_tensor(hertz, dtype=torch.float64).expand(int(seconds * rate))
    turn = 2 * math.pi * (hertz / rate).cumsum(0)
    wave = sum((h * turn).sin() / h for h in range(1, 8))
    return (0.1 * wave + noise * torch.randn(len(wave))).float()


@pytest.fixture(scope="module")
def corpus():
    """Four utterances of each of three voices, half of each of them a tone and half noise."""
    torch.manual_seed(1)
    waves = []
    for s, u in itertools.product(range(3), range(4)):
        wave = tone(100 * 1.4**s * (1 + 0.05 * u), 0.5 + 0.05 * u)
        wave[len(wave) // 2 :] = 0.03 * torch.randn(len(wave) - len(wave) // 2)
        waves.append(wave)
    return corpus_of(waves, np.repeat(np.arange(3), 4))


def started(corpus, **options):
    """-> model after prepare, optimizers, cfg."""
    cfg = v.Config(**TINY | options)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    return model, v.make_optimizers(model, cfg), cfg


def config(**options):
    return v.Config(**dict(prediction_steps=1, score_scale=1.0, batch_size=2) | options)


def linear(matrix):
    """A predictor layer with these weights, (K C, D)."""
    matrix = torch.as_tensor(matrix, dtype=torch.float32)
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data.copy_(matrix)
    return layer


# -------------------- golden numbers --------------------
GOLDEN = json.loads((Path(v.__file__).parent / "tests/golden/cpc.json").read_text())
DSP = json.loads((Path(v.__file__).parent / "tests/golden/dsp.json").read_text())


def layer(k, shape, scale=1.0, offset=0.0):
    """The array that the formula `fill` of the golden files gives for layer k, float64."""
    p = 1_000_003
    i = np.arange(math.prod(shape)) % p
    terms = (
        (271829 * (i**2 % p) % p) * i,
        (314159 * (k + 1) % p) * (i**2 % p),
        (161803 * (k + 3) % p) * i,
        577215 * (k + 1),
    )
    h = sum(term % p for term in terms) % p
    return torch.from_numpy(offset + scale * (2 * h / p - 1)).view(shape)


def layers_of(section):
    """The arrays of all layers of a section, in order."""
    names = ("k", "shape", "scale", "offset")
    return [layer(*(entry[name] for name in names)) for entry in section["layers"]]


def assert_golden(x, expected):
    """Entries, mean and mean square, relative to the root mean square."""
    x = x.detach()
    assert list(x.shape) == expected["shape"] and x.dtype == torch.float64
    limit = expected["tolerance"] * math.sqrt(expected["mean_square"])
    entries = x.flatten()[expected["index"]] - torch.tensor(expected["value"], dtype=torch.float64)
    assert entries.abs().max() <= limit
    assert abs(x.mean() - expected["mean"]) <= limit
    square = expected["mean_square"]
    assert abs(x.square().mean() - square) <= 2 * expected["tolerance"] * square


def test_golden_formula():
    for check in GOLDEN["fill_check"]:
        value = layer(check["k"], (check["i"] + 1,))[-1]
        assert abs(value - check["value"]) < 1e-12


def test_golden_encoder_and_gru():
    """z and c of the authors' modules. They have no channel norm here (D1): norm="none"."""
    golden = GOLDEN["encoder_and_gru"]
    wave, *weights = layers_of(golden)
    model = v.Model(v.Config(norm="none", channels=24, d_context=16), 2).double()
    parameters = [*model.encoder.parameters(), *model.context.parameters()]
    assert len(parameters) == len(weights)
    for parameter, value in zip(parameters, weights):
        parameter.data.copy_(value)
    z = model.encoder(wave)
    assert_golden(z, golden["outputs"]["z"])
    assert_golden(model.context(z)[0], golden["outputs"]["c"])


@pytest.mark.parametrize("name", GOLDEN["info_nce"]["results"])
def test_golden_info_nce(name):
    """Loss of each k, number of candidates and gradients, for three kinds of negatives and three
    scales of the score. The authors' scale is 1 / C; that of the paper is 1 (D2)."""
    expected = GOLDEN["info_nce"]["results"][name]
    z, c, weight = layers_of(GOLDEN["info_nce"])
    cfg = config(
        prediction_steps=GOLDEN["info_nce"]["settings"]["K"],
        negatives=expected["negatives"],
        score_scale=expected["score_scale"],
    )
    predictors = nn.Linear(12, 5 * 16, bias=False).double()
    predictors.weight.data.copy_(weight.flatten(0, 1))
    z.requires_grad_()
    c.requires_grad_()
    loss, candidates = v.info_nce(z, c, predictors, cfg)
    loss.mean().backward()
    assert candidates == expected["candidates"]
    assert_golden(loss, expected["loss_of_each_k"])
    assert_golden(z.grad, expected["gradient_of_mean_over_k_to_z"])
    assert_golden(c.grad, expected["gradient_of_mean_over_k_to_c"])


@pytest.mark.parametrize("case", DSP["k_means"]["cases"], ids=lambda case: case["name"])
def test_golden_k_means(case):
    """Inertia within the stated bound, 1.01 times the worst of scikit-learn's best of 5, and at most
    1.03 times its best of 20 greedy starts; also for data far from the origin."""
    noise, centers = layers_of(case)
    scale = float(case["text"].split("+ ")[1].split(" *")[0])
    which = 7 * torch.arange(len(noise)) % case["K"]
    x = (noise + scale * centers[which]).float()
    best = case["inertia_of_best_of_20_greedy_starts"]
    for offset in (0.0, 1e4):
        centroids, inertia = v.kmeans(x + offset, case["K"])
        expected = torch.cdist(x.double() + offset, centroids.double()).amin(1).square().sum()
        assert case["min_inertia"] <= expected * (1 + 1e-5)
        assert expected <= min(case["bound_of_inertia"], 1.03 * best)
        assert abs(inertia / expected - 1) < (1e-5 if offset == 0 else 0.01)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_golden_yin(rate):
    """True F0 within 0.2 %, every inner frame voiced. Not the tones below the floor of 65 Hz (D4)."""
    cfg = v.Config(sample_rate=rate, hop=rate // 100)
    t = torch.arange(rate, dtype=torch.float64) / rate
    tones = [tone for tone in DSP["yin"]["tones"] if tone["sample_rate"] == rate]
    tones = [tone for tone in tones if tone["hertz"] > 65]
    waves = []
    for tone in tones:
        hertz = tone["hertz"]
        wave = 0.3 * (2 * math.pi * hertz * t).sin()
        if tone["kind"] == "harmonics":
            partials = range(1, int(3500 / hertz) + 1)
            wave = 0.1 * sum((2 * math.pi * hertz * h * t + h).sin() / h for h in partials)
        waves.append(wave.float())
    f0 = v.yin(torch.stack(waves), cfg)[:, 10:-10]
    truth = torch.tensor([[tone["hertz"]] for tone in tones])
    assert len(tones) == 22
    assert ((f0 - truth).abs() <= DSP["yin"]["max_relative_error"] * truth).all()


# -------------------- the networks --------------------
def test_parameters_of_the_paper():
    model, cfg = v.Model(v.Config(norm="none"), 20), v.Config()

    def count(*nets):
        return sum(p.numel() for net in nets for p in net.parameters())

    assert [count(net) for net in (model.encoder, model.context, model.predictors)] == [
        5_250_560,
        591_360,
        1_572_864,
    ]
    assert count(model.encoder, model.context, model.predictors) == 7_414_784
    assert count(v.Model(cfg, 20).encoder) == 5_250_560 + 5 * 2 * 512
    assert [(c.kernel_size, c.stride) for c in model.encoder if isinstance(c, nn.Conv1d)] == [
        ((10,), (5,)),
        ((8,), (4,)),
        ((4,), (2,)),
        ((4,), (2,)),
        ((4,), (2,)),
    ]
    assert (cfg.sample_rate, cfg.crop, cfg.batch_size, cfg.lr, cfg.prediction_steps) == (
        16000,
        20480,
        8,
        2e-4,
        12,
    )
    assert (cfg.units, cfg.f0_tokens, cfg.d_embedding) == (100, 20, 128) and cfg.hop == math.prod(
        v.STRIDES
    ) == 160
    close(cfg.score_scale, 512**-0.5, 3e-3)
    toy = v.Config(**v.TOY)
    close(toy.score_scale, toy.channels**-0.5)


@pytest.mark.parametrize("samples", [20480, 16000, 10240, 160, 319, 320, 1000, 12345])
def test_lengths(samples):
    """T = N // hop for every N; 20480 samples are 128 frames."""
    cfg = v.Config(channels=8, d_context=8, score_scale=1.0)
    z, c = v.Model(cfg, 2)(torch.randn(1, samples))
    assert z.shape == (1, samples // 160, 8) and c.shape == (1, samples // 160, 8)


@pytest.mark.parametrize("hop, layers", [(5, 1), (20, 2), (40, 3), (80, 4), (160, 5)])
def test_hop_is_the_product_of_the_strides(hop, layers):
    encoder = v.Encoder(v.Config(hop=hop, channels=4))
    assert sum(isinstance(layer, nn.Conv1d) for layer in encoder) == layers
    assert encoder(torch.randn(1, 960)).shape == (1, 960 // hop, 4)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(hop=100), "--hop 100"),
        (dict(crop=2080), "--crop is too short"),
        (dict(negatives="other-sequences", batch_size=1), "--batch-size 2"),
    ],
)
def test_sizes_that_cannot_be(options, words):
    with pytest.raises(v.UserError, match=words):
        v.Config(**options)
    v.Config(crop=14 * 160)


@pytest.mark.parametrize("norm", ["channel", "none"])
def test_what_a_frame_sees(norm):
    """z_t sees samples 160 t - 153 to 160 t + 311, 465 of them."""
    encoder, wave = (
        v.Encoder(v.Config(channels=8, norm=norm)),
        torch.randn(1, 4800, requires_grad=True),
    )
    for t in (5, 17):
        seen = (
            torch.autograd.grad(encoder(wave)[0, t].square().sum(), wave)[0][0].nonzero().flatten()
        )
        assert (seen.min(), seen.max()) == (160 * t - 153, 160 * t + 311)


@pytest.mark.parametrize("norm", ["channel", "none"])
def test_context_is_causal(norm):
    """Other samples from 8000 on: frames 0 to 48 stay what they were to the bit, the 49th is the first to change."""
    model = v.Model(v.Config(channels=16, d_context=8, norm=norm), 2).train()
    a = torch.randn(2, 20480)
    b = torch.cat([a[:, :8000], torch.randn(2, 12480)], 1)
    for x, y in zip(model(a), model(b)):  # z, then c
        assert torch.equal(x[:, :49], y[:, :49]) and (x[:, 49:] != y[:, 49:]).any(2).all()


def test_batch_norm_would_leak():
    """D1: the same change with BatchNorm in training mode reaches frame 0; a frame's own norm knows nothing of others."""
    model = v.Model(v.Config(channels=16, d_context=8), 2).train()
    a = torch.randn(2, 20480)
    b = torch.cat([a[:, :8000], torch.randn(2, 12480)], 1)
    for i, layer in enumerate(model.encoder):
        if isinstance(layer, v.ChannelNorm):
            model.encoder[i] = nn.BatchNorm1d(16)
    assert (model(a)[1][:, 0] != model(b)[1][:, 0]).any()


def test_channel_norm_by_hand():
    norm, x = v.ChannelNorm(5), 3 * torch.randn(2, 5, 7) + 1
    nn.init.uniform_(norm.weight), nn.init.uniform_(norm.bias)
    expected = (x - x.mean(1, keepdim=True)) / (
        x.var(1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    close(norm(x), expected * norm.weight[:, None] + norm.bias[:, None], 1e-5)
    assert not any(
        isinstance(layer, v.ChannelNorm) for layer in v.Encoder(v.Config(channels=4, norm="none"))
    )


def test_layers_in_order():
    """Convolution, norm, ReLU; so z is not negative."""
    encoder = v.Encoder(v.Config(channels=8))
    assert [type(layer) for layer in encoder] == [nn.Conv1d, v.ChannelNorm, nn.ReLU] * 5
    assert (encoder(torch.randn(2, 1600)) >= 0).all()


def test_float32_under_autocast():
    """Encoder and decoder may be bfloat16; what leaves the model is not."""
    model = v.Model(v.Config(**TINY), 2)
    with torch.autocast("cpu", torch.bfloat16):
        z, c = model(torch.randn(2, 1600))
    assert z.dtype == c.dtype == torch.float32


def test_the_shortest_clip(corpus):
    """The plumbing lets nothing through that is shorter than `win`, and `win` is at least `hop`."""
    model, _, cfg = started(corpus, win=160)
    for samples in (80, 160, 239):
        T = samples // 80
        wave = 0.1 * torch.randn(1, samples)
        assert model(wave)[1].shape == (1, T, 12) and model.features(wave).shape == (1, T, 20)
        assert model.units(wave).shape == model.f0(wave).shape == (1, T)
        assert len(v.convert(model, [wave[0]], [1], cfg)[0]) == samples


def test_decoder_is_residual():
    """With blocks that put out zero, what is left is the first and the last layer."""
    cfg = v.Config(**TINY)
    decoder = v.Decoder(cfg, 3)
    first, *blocks, relu, last = decoder.layers
    assert len(blocks) == cfg.blocks and isinstance(relu, nn.ReLU)
    assert [block[1].dilation for block in v.Decoder(v.Config(), 3).layers[1:7]] == [
        (2 ** (i % 3),) for i in range(6)
    ]
    for block in blocks:
        nn.init.zeros_(block[3].weight), nn.init.zeros_(block[3].bias)
    units, f0, s = torch.randint(6, (2, 9)), torch.randint(20, (2, 9)), torch.tensor([0, 2])
    x = torch.cat(
        [decoder.unit(units), decoder.f0(f0), decoder.speaker(s)[:, None].repeat(1, 9, 1)], 2
    )
    close(decoder(units, f0, s), last(first(x.mT).relu()).mT)


def test_decoder_sees_what_it_is_told():
    """Units and F0 near a frame change it, far away they do not; another speaker changes every frame; order is kept."""
    cfg = v.Config(**TINY | dict(blocks=3))
    decoder, reach = v.Decoder(cfg, 3), 2 + 2 * (1 + 2 + 4)
    units, f0, s = torch.randint(6, (1, 60)), torch.randint(20, (1, 60)), torch.tensor([1])
    mel = decoder(units, f0, s)
    assert mel.shape == (1, 60, 20)
    for change in ("units", "f0"):
        u, f = units.clone(), f0.clone()
        (u if change == "units" else f)[0, 30] += (
            -1 if (u if change == "units" else f)[0, 30] else 1
        )
        moved = (decoder(u, f, s) != mel).any(2)[0].nonzero().flatten()
        assert (moved.min(), moved.max()) == (30 - reach, 30 + reach)
    assert (decoder(units, f0, torch.tensor([2])) != mel).any(2).all()


# -------------------- InfoNCE --------------------
@pytest.mark.parametrize(
    "negatives, N",
    [("batch", 348), ("same-speaker", 348), ("sequence", 116), ("other-sequences", 233)],
)
def test_without_a_prediction_the_loss_is_log_n(negatives, N):
    """B = 3, 128 frames, K = 12: 116 contexts a sequence."""
    loss, candidates = v.info_nce(
        torch.randn(3, 128, 8),
        torch.randn(3, 128, 6),
        linear(torch.zeros(96, 6)),
        config(prediction_steps=12, negatives=negatives),
    )
    assert candidates == N and loss.shape == (12,)
    close(loss, torch.full((12,), math.log(N)))
    assert N != 348 or abs(loss[0] - 5.852202) < 1e-5


@pytest.mark.parametrize("late", [-1, 0, 1])
def test_offsets(late):
    """z_t and c_t say t, W_k moves t by k (+ late): certain where late is 0, and surely wrong otherwise. k = 1 is the next
    frame, not the present one."""
    T, K = 10, 4
    W = torch.cat([torch.eye(T).roll(k + late, 0) * 50 for k in range(1, K + 1)])  # (K T, T)
    x = torch.eye(T)[None]
    loss, _ = v.info_nce(x, x, linear(W), config(prediction_steps=K))
    assert (loss < 1e-6).all() if late == 0 else (loss > 40).all()


def test_mutual_information():
    """Correlated Gaussians with the optimal critic, N = 128: log N - loss is below the mutual information, 0.8304 nats at
    rho = 0.9, and close. log p(y | x) / p(y) is bilinear in (y, y^2) and (x, 1), but for terms of x alone."""
    rho, N, B = 0.9, 128, 150
    x = torch.randn(B, N)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(B, N)
    z = F.pad(torch.stack([y, y**2], 2), (0, 0, 1, 0))  # y_t stands one frame later
    c = F.pad(torch.stack([x, torch.ones_like(x)], 2), (0, 0, 0, 1))
    W = torch.diag(torch.tensor([rho, -(rho**2) / 2]) / (1 - rho**2))
    loss, candidates = v.info_nce(z, c, linear(W), config(negatives="sequence"))
    assert candidates == N and 0.80 < math.log(N) - loss.item() < 0.8304
    rho = 1 - 1e-5  # 5.4 nats, of which log 8 can show
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(B, N)
    z = F.pad(torch.stack([y, y**2], 2), (0, 0, 1, 0)).double()
    W = torch.diag(torch.tensor([rho, -(rho**2) / 2], dtype=torch.float64) / (1 - rho**2))
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data.copy_(W)
    parts = [
        v.info_nce(
            z[:, i : i + 9],
            F.pad(c[:, i : i + 8].double(), (0, 0, 0, 1)),
            layer,
            config(negatives="sequence"),
        )[0]
        for i in range(0, 80, 8)
    ]
    assert 1.9 < math.log(8) - torch.stack(parts).mean().item() <= math.log(8)


def test_gradient_flows_to_all_of_cpc_and_from_every_k(corpus):
    """The positives' z gets a gradient too, and each of the K matrices its own."""
    model, _, cfg = started(corpus)
    z, c = model(v.get_batch(corpus, cfg, 0)["wave"])
    v.info_nce(z.detach().requires_grad_(), c, model.predictors, cfg)[0].mean().backward()
    rows = model.predictors.weight.grad.unflatten(0, (3, 16)).abs().sum((1, 2))
    assert (rows > 0).all()
    v.info_nce(z := z.detach().requires_grad_(), c.detach(), model.predictors, cfg)[
        0
    ].mean().backward()
    assert (z.grad[:, 0] == 0).all() and (z.grad[:, 1:] != 0).any(
        2
    ).all()  # frame 0 is nobody's future


def test_a_step_is_one_on_the_mean(corpus, monkeypatch):
    """Every W_k has the gradient of the mean over k, of one batch, the only one that is drawn."""
    model, optimizers, cfg = started(corpus)
    get, drawn = v.get_batch, []
    monkeypatch.setattr(v, "get_batch", lambda *a: drawn.append(get(*a)) or drawn[-1])
    for step in (0, 3):
        before = copy.deepcopy(model)
        log = v.train_step(model, optimizers, corpus, step, cfg)
        (batch,) = drawn
        drawn.clear()
        loss, N = v.info_nce(*before(batch["wave"]), before.predictors, cfg)
        before.zero_grad()
        (sum(loss) / 3).backward()
        for (name, p), q in zip(model.named_parameters(), before.parameters()):
            if not name.startswith("decoder"):
                close(p.grad, q.grad, 1e-5)
        assert (model.predictors.weight.grad.unflatten(0, (3, 16)).abs().amax((1, 2)) > 1e-6).all()

        # The log: nats_k is log J - L_k, nats and loss are means over k.
        assert list(log) == ["loss", "nats", "nats_1", "nats_2", "nats_3"]
        assert not any(value.requires_grad for value in log.values())
        close(log["loss"], loss.mean())
        close(torch.stack([log[f"nats_{k}"] for k in (1, 2, 3)]), math.log(N) - loss, 1e-5)
        close(log["nats"], math.log(N) - loss.mean(), 1e-5)


def test_it_learns_one_batch_by_heart():
    """A quarter of the toy's size, one batch again and again: the loss falls below half of log N."""
    wave = torch.cat(
        [
            tone(torch.linspace(100, 300, 4800).roll(1200 * i), 0.6, noise=0.02)[None]
            for i in range(4)
        ]
    )
    cfg = v.Config(**TINY | dict(channels=32, d_context=32, lr=3e-3, score_scale=0.18))
    model = v.Model(cfg, 2)
    optimizer = v.make_optimizers(model, cfg)["cpc"]
    for _ in range(200):
        loss, N = v.info_nce(*model(wave), model.predictors, cfg)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    assert loss.mean() < 0.5 * math.log(N)


@pytest.mark.parametrize("negatives", ["batch", "same-speaker"])
def test_what_a_batch_holds(corpus, monkeypatch, negatives):
    """Different utterances of the given ones, with same-speaker negatives of one speaker; the same
    ones in a repeated step, others in another step and on another rank."""
    model, _, cfg = started(corpus, negatives=negatives, batch_size=3)
    get, drawn = v.get_batch, []

    def get_batch(corpus, cfg, step, draw, utterances):
        drawn.append(utterances.tolist())
        return get(corpus, cfg, step, draw, utterances)

    monkeypatch.setattr(v, "get_batch", get_batch)

    def batches(cfg=cfg, steps=30):
        drawn.clear()
        for step in range(steps):
            v.draw_losses(model, corpus, corpus.train[:-1], cfg, step)
        return drawn[:]

    first = batches()
    assert all(len(set(us)) == 3 for us in first) and {*sum(first, [])} == {*range(11)}
    speakers = [len(set(corpus.speaker[us])) for us in first]
    assert max(speakers) == (1 if negatives == "same-speaker" else 3)
    assert len({tuple(us) for us in first}) > 10 and batches() == first
    monkeypatch.setattr(v, "RANK", 1)
    assert batches() != first
    if negatives == "same-speaker":  # 4 or 3 utterances of a speaker: all of them
        assert {len(us) for us in batches(replace(cfg, batch_size=9))} == {3, 4}


def test_the_decoder_batches_are_mixed(corpus, monkeypatch):
    model, optimizers, cfg = started(corpus, negatives="same-speaker", steps=40)
    get, drawn = v.get_batch, []
    monkeypatch.setattr(v, "get_batch", lambda *a, **k: drawn.append(get(*a, **k)) or drawn[-1])
    v.train_step(model, optimizers, corpus, 30, cfg)
    assert len(drawn[-1]["speaker"].unique()) > 1
    with pytest.raises(v.UserError, match="--batch-size; lower it"):
        # at once, not when the decoder's turn comes
        v.build(None, corpus, replace(cfg, batch_size=13), None)


# -------------------- k-means --------------------
def test_kmeans_finds_blobs():
    """Ten blobs six deviations apart and more: every blob a cluster, the inertia is what it says."""
    centers = torch.cartesian_prod(8.5 * torch.arange(5), 8.5 * torch.arange(2))
    truth = torch.randint(10, (2000,))
    x = centers[truth] + torch.randn(2000, 2)
    for offset in (0.0, 1e4):
        centroids, inertia = v.kmeans(x + offset, 10)
        ids, distance = v.assign(x + offset, centroids)
        purity = sum(truth[ids == k].bincount().max().item() for k in ids.unique()) / 2000
        assert purity > 0.999 and len(ids.unique()) == 10
        close(inertia, (x + offset - centroids[ids]).square().sum().item(), 1e-3)
        close(distance.sum().item(), inertia, 1e-3)


def test_kmeans_is_the_best_of_its_starts_and_repeats_itself():
    x = torch.randn(300, 3)

    def inertia(seed, starts):
        torch.manual_seed(seed)
        return v.kmeans(x, 12, starts)[1]

    rows = [[inertia(seed, n) for n in range(1, 6)] for seed in range(4)]
    assert all(row == sorted(row, reverse=True) for row in rows)
    assert any(row[4] < row[0] for row in rows) and inertia(0, 5) == rows[0][4]


def test_first_centroids_are_drawn_by_distance_and_greedily():
    """Ten tight blobs, and a crowd at one of them: one first centroid in each, in one start."""
    x = torch.arange(10.0).repeat_interleave(60)[:, None] + 0.01 * torch.randn(600, 1)
    x = torch.cat([x, torch.full((600, 1), 5.0)])
    for _ in range(20):
        assert len(v.spread_centroids(x, 10).round().unique()) >= 9
    # The best of several draws: the middle of a far blob rather than its rim.
    crowd = torch.cat([torch.zeros(50, 1), 100 + torch.linspace(-20, 20, 101)[:, None]])
    second = torch.stack([v.spread_centroids(crowd, 8)[:3] for _ in range(200)])
    one = [c[(c > 50).flatten()][0].item() for c in second]
    assert sum(abs(y - 100) for y in one) / 200 < 9  # 10 if drawn once


def test_assign_against_cdist():
    """Also where data are far from the origin."""
    x, centroids = torch.randn(4, 9, 5), torch.randn(30, 5)
    for offset in (0.0, 1e4):
        ids, distance = v.assign(x + offset, centroids + offset)
        a, b = (x + offset).double(), (centroids + offset).double()
        expected = torch.cdist(a, b).square().min(-1)
        assert torch.equal(ids, expected.indices)
        close(distance, expected.values, 1e-3)


def test_fewer_places_than_clusters():
    """Two places and four clusters: two stay without a member, and nothing breaks."""
    x = torch.tensor([[0.0, 0.0], [1, 1]]).repeat(5, 1)
    centroids, inertia = v.kmeans(x, 4)
    assert inertia < 1e-6 and centroids.shape == (4, 2) and centroids.isfinite().all()
    centroids, _ = v.kmeans(torch.full((8, 2), 3.0), 2)
    close(centroids, torch.full((2, 2), 3.0))


def test_units_are_fitted_on_training_crops(monkeypatch):
    """c of a batch for every two units, whole crops of training utterances, no more."""
    corpus = other_corpus()
    seen, drawn, get = [], [], v.get_batch
    monkeypatch.setattr(
        v, "kmeans", lambda x, K: seen.append((x, K)) or (torch.ones(K, x.shape[1]), 0)
    )
    model, _, cfg = started(corpus, units=7)
    assert (model.centroids == 1).all() and seen[0][1] == 7
    seen.clear()
    monkeypatch.setattr(v, "get_batch", lambda *a, **k: drawn.append(get(*a, **k)) or drawn[-1])
    v.fit_units(model, corpus, cfg)
    ((x, _),) = seen
    assert len(drawn) == 4 and x.shape == (4 * 4 * 40, 12) and not x.requires_grad
    assert x._base is None and x.untyped_storage().nbytes() == x.nbytes  # keeps nothing alive
    used = set(torch.cat([batch["utterance"] for batch in drawn]).tolist())
    assert used == set(corpus.train.tolist())
    close(x[:160], model(drawn[0]["wave"])[1].flatten(0, 1), 1e-5)


def test_ranks_agree_on_the_units(corpus, monkeypatch):
    sent = []
    monkeypatch.setattr(v.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(v.dist, "broadcast", lambda tensor, source: sent.append((tensor, source)))
    model, _, cfg = started(corpus)
    assert sent[0][0] is model.centroids and sent[0][1] == 0


def test_units(corpus):
    """The nearest centroid of c."""
    model, _, cfg = started(corpus)
    wave = corpus.wave(1)[None]
    c = model(wave)[1]
    assert torch.equal(model.units(wave), torch.cdist(c, model.centroids[None]).argmin(2))
    assert len(model.units(wave).unique()) > 1


# -------------------- F0 --------------------
@pytest.mark.parametrize("rate, hop, tolerance", [(16000, 160, 0.0005), (8000, 80, 0.001)])
def test_yin_finds_the_pitch(rate, hop, tolerance):
    """Sines, harmonic tones, and these without their fundamental: every inner frame voiced, and exact."""
    cfg, t = v.Config(sample_rate=rate, hop=hop), torch.arange(rate // 2) / rate
    for f in range(70, 391, 40):
        parts = [(2 * math.pi * f * h * t).sin() / h for h in range(1, 10 if f <= 250 else 2)]
        for wave in (parts[0], sum(parts), sum(parts[1:])) if f <= 250 else parts:
            f0 = v.yin(0.1 * wave[None], cfg)
            assert f0.shape == (1, 1 + len(t) // hop)
            assert ((f0[0, 4:-4] - f).abs() < tolerance * f).all(), f


@pytest.mark.parametrize("rate, hop", [(16000, 160), (8000, 80)])
def test_yin_hears_no_pitch_where_there_is_none(rate, hop):
    cfg, noise = v.Config(sample_rate=rate, hop=hop), torch.randn(1, rate)
    dull = F.avg_pool1d(noise[None], 9, 1, 4)[0]
    for wave in (
        0.1 * noise,
        dull,
        torch.zeros(1, rate),
        torch.full((1, rate), 0.3),
        5e-3 * tone(150, 1, rate)[None],
    ):
        assert (v.yin(wave, cfg) == 0).all()
    assert (
        v.yin(3e-2 * tone(150, 1, rate)[None], cfg)[0, 4:-4] > 0
    ).all()  # quiet, but above -60 dB


def test_yin_in_noise_and_on_a_glide():
    cfg = v.Config()
    wave = tone(150, 1, 16000, noise=0)
    loud = torch.randn(16000) * wave.std()
    for snr, tolerance in ((20, 0.002), (10, 0.01)):
        f0 = v.yin((wave + loud * 10 ** (-snr / 20))[None], cfg)[0, 4:-4]
        assert ((f0 - 150).abs() < tolerance * 150).all()
    f = torch.linspace(100, 300, 16000)
    f0 = v.yin(tone(f, 1, 16000)[None], cfg)[0]
    truth = F.pad(f[::160], (0, 1), value=300.0)
    voiced = f0 > 0
    assert voiced.float().mean() > 0.97 and ((f0 - truth).abs() / truth)[voiced].max() < 0.02


def test_yin_tells_voiced_from_unvoiced_frames():
    """Quarter seconds of tone and noise by turns: errors of a few frames at the borders."""
    cfg, on = v.Config(), (torch.arange(32000) // 4000) % 2 == 0
    wave = torch.where(on, tone(130, 2, 16000), 0.05 * torch.randn(32000))
    f0 = v.yin(wave[None], cfg)[0]
    truth = F.pad(on[::160].float() * 130, (0, 1))
    assert ((f0 - truth).abs() > 0.2 * truth).float().mean() < 0.06


def test_yin_takes_the_median_of_five():
    """Up to four periods, which one or two frames alone would take for a voice, are none; twelve
    are one."""
    cfg = v.Config()
    for periods in (2, 3, 4, 12):
        wave = torch.zeros(1, 8000)
        wave[0, 4000 : 4000 + 80 * periods] = tone(200, periods / 200, 16000, noise=0)
        assert (v.yin(wave, cfg) == 0).all() == (periods < 12), periods


def test_yin_keeps_to_its_range():
    """400 Hz is found; 500 Hz is not, but for its half; below 65 Hz, as the hum of the mains, there
    is no pitch. An offset is no loudness."""
    cfg, t = v.Config(), torch.arange(8000) / 16000

    def f0(f):
        return v.yin(0.1 * (2 * math.pi * f * t).sin()[None], cfg)[0, 4:-4]

    assert ((f0(400) - 400).abs() < 1).all() and ((f0(500) - 250).abs() < 1).all()
    assert (f0(50) == 0).all() and (f0(60) == 0).all() and (f0(67) > 0).all()
    assert (v.yin(1e-4 * tone(150, 0.5, 16000, noise=0)[None] + 0.01, cfg) == 0).all()


def test_yin_is_centred():
    """On a glide from 100 to 300 Hz in a second F0 is at most 4 ms early or late."""
    f = torch.linspace(100, 300, 16000)
    f0 = v.yin(tone(f, 1, 16000, noise=0)[None], v.Config())[0]
    assert ((f0[6:94] - f[960:15040:160]).abs() < 0.004 * 200).all() and (
        f0[6:94] - f[960:15040:160]
    ).mean().abs() < 0.3


def test_yin_has_two_thresholds():
    """Where no dip is below 0.2, the deepest one counts, up to 0.35: frames are voiced at 4 dB above
    the noise, where all dips are deeper than 0.2, and unvoiced at 0 dB."""
    cfg = v.Config()
    wave = tone(150, 2, 16000, noise=0)
    noise = torch.randn(32000) * wave.std()
    assert (v.yin((wave + noise * 10 ** (-4 / 20))[None], cfg)[0, 4:-4] > 0).all()
    assert (v.yin((wave + noise)[None], cfg) == 0).all()


def toy_f0(s, n):
    """F0 of toy utterance n of speaker s, one value per 10 ms, 0 where no voice can be heard: what
    the generator draws, drawn again in the same order."""
    rng = np.random.default_rng((s, n))
    phones = np.repeat([11, *rng.choice(12, 12), 11], rng.integers(6, 17, 14))
    voicing = np.array(v.PHONES.split()).reshape(12, 6)[phones, 4].astype(np.float32)
    voicing = F.avg_pool1d(torch.from_numpy(voicing)[None], 5, 1, padding=2)[0]
    glide = rng.uniform(-0.2, 0.2, 2)
    samples = 160 * len(phones) - 160
    f0 = 2 ** (v.toy_voice(s)[1] + np.linspace(*glide, samples))
    f0 = torch.from_numpy(f0[np.minimum(160 * np.arange(len(phones)), samples - 1)]).float()
    return torch.where(voicing > 0.05, f0, 0.0)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_yin_on_toy_voices(rate):
    """The generator knows F0 and voicing. Voiced frames are lost where the voice fades into noise;
    hardly a frame without a voice has one."""
    cfg = v.Config(sample_rate=rate, hop=rate // 100)
    wrong, false = [], []
    for s in range(1, 41, 2):
        wave, phones = v.toy_utterance(s, 0)
        truth = toy_f0(s, 0)
        f0 = v.yin(v.resample(wave.float(), 16000, rate)[None], cfg)[0]
        frames = min(len(f0), len(truth))
        f0, truth = f0[:frames], truth[:frames]
        wrong.append(((f0 > 0) != (truth > 0)).float().mean())
        false.append((f0[truth == 0] > 0).float().mean())
    assert sum(wrong) / len(wrong) < 0.17 and sum(false) / len(false) < 0.02


def test_f0_tokens_by_hand(corpus, monkeypatch):
    """Token 0 is unvoiced; 1 to 19 are bins of 5 / 19 deviations from -2.5 to 2.5, the outer ones open. The speaker's mean is
    the middle token, not that of unvoiced frames."""
    model, _, cfg = started(corpus)
    model.f0_mean[:], model.f0_std[:] = torch.tensor([4.0, 5.0, 6.0]), torch.tensor([0.1, 0.2, 0.4])
    x = torch.tensor([-9.0, -2.51, -2.49, -2.2, -0.1, 0.0, 0.14, 2.4, 2.6, 9.0])
    expected = [1, 1, 1, 2, 10, 10, 11, 19, 19, 19]
    for s in range(3):
        f0 = torch.cat([(model.f0_mean[s] + model.f0_std[s] * x).exp(), torch.zeros(3)])[None]
        monkeypatch.setattr(v, "yin", lambda wave, cfg: f0)  # a frame more than z has
        assert model.f0(torch.zeros(1, 80 * 12), torch.tensor([s])).tolist() == [[*expected, 0, 0]]
    assert cfg.f0_tokens // 2 == 10  # what `sample` takes for the mean


def test_f0_of_an_unknown_voice(corpus):
    """D6: the same melody half an octave higher has the same tokens, and they are those of the voice's own mean."""
    model, _, cfg = started(corpus)
    melody = 120 * 2 ** (0.2 * torch.sin(torch.linspace(0, 9, 8000)))
    low, high = (model.f0(tone(melody * f, 1)[None]) for f in (1, 1.4))
    assert ((low - high).abs() <= 1).all() and (low > 0).float().mean() > 0.9
    f0 = v.yin(tone(melody, 1)[None], cfg)[:, :100]
    log = f0[f0 > 0].log()
    expected = ((log - log.mean()) / model.f0_std.mean() * 19 / 5 + 9.5).floor() + 1
    assert ((low[low > 0] - expected.clamp(1, 19)).abs() <= 1).all() and low[
        low > 0
    ].float().std() > 1
    assert (model.f0(torch.zeros(1, 4000)) == 0).all()
    model.f0_std[:] = torch.tensor([0.05, 0.1, 0.3])  # on average 0.15
    expected = ((log - log.mean()) / 0.15 * 19 / 5 + 9.5).floor() + 1
    both = torch.stack([tone(melody, 1), tone(melody * 1.4, 1)])
    assert ((model.f0(both[:1])[f0 > 0] - expected).abs() <= 1).all()
    assert torch.equal(
        model.f0(both), torch.cat([model.f0(both[:1]), model.f0(both[1:])])
    )  # each its own mean


# -------------------- statistics and phases --------------------
def test_statistics(corpus):
    """Standardized mel of training crops has mean 0 and deviation 1; F0 statistics are those of
    each voice."""
    model, _, cfg = started(corpus)
    wave = v.get_batch(corpus, cfg, 0, utterances=corpus.train)["wave"]
    mel = v.log_mel(wave, cfg)
    close(model.mean, mel.mean((0, 1)), 1e-4)
    close(model.std, mel.flatten(0, 1).std(0), 1e-4)
    expected = v.log_mel(corpus.wave(0)[None], cfg)[:, :50]
    close(model.features(corpus.wave(0)[None]) * model.std + model.mean, expected, 1e-4)
    for s in range(3):
        f0 = torch.cat([v.yin(corpus.wave(u)[None], cfg)[0] for u in range(4 * s, 4 * s + 4)])
        log_f0 = f0[f0 > 0].log()
        close(model.f0_mean[s], log_f0.mean(), 1e-4)
        close(model.f0_std[s], log_f0.std(), 1e-4)
        assert abs(model.f0_mean[s].exp() / (107.5 * 1.4**s) - 1) < 0.03


def test_statistics_of_25_utterances_each():
    waves = [tone(100 if u < 24 else 150 if u == 24 else 300, 0.2) for u in range(30)]
    waves += [tone(200, 0.2), 0.03 * torch.randn(1600)]
    model, _, cfg = started(corpus_of(waves, [0] * 30 + [1, 2]))
    close(model.f0_mean[:2].exp(), [100 * 1.5**0.04, 200.0], 1e-2)
    assert model.f0_std[1] == torch.tensor(0.02)
    close(model.f0_mean[2], 4.8)  # has no voice
    close(model.f0_std[2], 0.25)


def test_nobody_has_a_voice_and_digital_silence():
    """Statistics are numbers, and a band of nothing has a deviation of 0.01."""
    model, _, cfg = started(corpus_of([0.1 * torch.randn(1600) for _ in range(4)], [0, 0, 1, 1]))
    assert all(x.isfinite().all() for x in model.buffers()) and (model.std > 0).all()
    model, _, cfg = started(corpus_of([torch.zeros(1600) for _ in range(4)], [0, 0, 1, 1]))
    close(model.std, torch.full((20,), 0.01))
    assert all(x.isfinite().all() for x in model.buffers())


def test_phases_move_what_they_should(corpus):
    """Five CPC steps, then units and five steps of the decoder; the rest bit-equal."""
    model, optimizers, cfg = started(corpus)

    def part(name):
        first = name.split(".")[0]
        return "cpc" if first in ("encoder", "context", "predictors") else first

    for step in range(10):
        before = copy.deepcopy(model.state_dict())
        gradients = {
            name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
        }
        log = v.train_step(model, optimizers, corpus, step, cfg)
        moved = {
            part(name) for name, x in model.state_dict().items() if not torch.equal(x, before[name])
        }
        expected = {4: {"cpc"}, 5: {"centroids", "decoder"}}
        assert moved == expected.get(step, {"cpc"} if step < 5 else {"decoder"})
        assert ("decoder_loss" in log) == (step > 4)
        if step > 4:  # not even a gradient
            assert all(
                torch.equal(p.grad, gradients[name])
                for name, p in model.named_parameters()
                if part(name) == "cpc"
            )
        else:
            assert all(p.grad is None for p in model.decoder.parameters())


@pytest.mark.parametrize(
    "share, steps, first",
    [(0.43, 700_000, 301_000), (1.0, 10, 10), (0.5, 10, 5), (0.0, 10, 0), (0.07, 100, 7)],
)
def test_share_of_cpc(share, steps, first, corpus, monkeypatch):
    """Units are fitted once, before the decoder's first step, or at the end if it has none."""
    cfg, called = v.Config(**TINY | dict(cpc_share=share, steps=steps)), []
    decoder = SimpleNamespace(state={})

    def fake(name):
        def call(*given):
            called.append(name)
            if name == "decoder_step":
                decoder.state["a"] = 1

        return call

    for name in ("cpc_step", "decoder_step", "fit_units"):
        monkeypatch.setattr(v, name, fake(name))
    for step in sorted({0, first - 1, first, first + 1, steps - 1} & set(range(steps))):
        called.clear()
        v.train_step(None, {"cpc": 0, "decoder": decoder}, corpus, step, cfg)
        if step < first:
            assert called == ["cpc_step"] + ["fit_units"] * (step == steps - 1)
        else:
            assert called == ["fit_units"] * (step == first) + ["decoder_step"]


def reloaded(model, optimizers, corpus, cfg):
    """The model and the optimizers of a checkpoint, as another process would have them."""
    file = io.BytesIO()
    state = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    content = dict(speakers=corpus.speakers, model=model.state_dict(), optimizers=state, step=0)
    torch.save(content, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    model = v.Model(cfg, len(corpus.speakers))
    model.load_state_dict(checkpoint["model"])
    return v.build(model, corpus, cfg, checkpoint)[:2]


def test_units_stay_what_they_are_in_a_resumed_run(corpus, monkeypatch):
    """Saved and loaded between two steps of the decoder: the units are not fitted again."""
    model, optimizers, cfg = started(corpus)
    for step in range(7):
        v.train_step(model, optimizers, corpus, step, cfg)
    other, others = reloaded(model, optimizers, corpus, cfg)
    called = []
    monkeypatch.setattr(v, "fit_units", lambda *a: called.append(a))
    v.train_step(model, optimizers, corpus, 7, cfg)
    v.train_step(other, others, corpus, 7, cfg)
    assert not called
    for name, x in model.state_dict().items():
        assert torch.equal(x, other.state_dict()[name])


@pytest.mark.parametrize("load", [False, True])
def test_resumed_beyond_the_border(corpus, load):
    """Steps of the decoder, then of CPC again, because --steps is raised, then --steps is lowered
    so that the next step is the decoder's: units are fitted before it."""
    model, optimizers, cfg = started(corpus, steps=2)
    v.train_step(model, optimizers, corpus, 1, cfg)
    cfg = replace(cfg, steps=20)
    for step in range(2, 6):
        v.train_step(model, optimizers, corpus, step, cfg)
    before = model.centroids.clone()
    cfg = replace(cfg, steps=8)
    if load:
        model, optimizers = reloaded(model, optimizers, corpus, cfg)
    v.train_step(model, optimizers, corpus, 6, cfg)
    fitted = model.centroids.clone()
    v.train_step(model, optimizers, corpus, 7, cfg)
    assert not torch.equal(before, fitted) and torch.equal(fitted, model.centroids)


def test_optimizers(corpus):
    """Adam for CPC; for the decoder AdamW with HiFi-GAN's momenta."""
    cpc, decoder = v.make_optimizers(
        v.Model(v.Config(**TINY | dict(lr=0.007)), 3), v.Config(lr=0.007)
    ).values()
    assert type(cpc) is torch.optim.Adam and type(decoder) is torch.optim.AdamW
    assert (cpc.defaults["lr"], cpc.defaults["betas"], cpc.defaults["weight_decay"]) == (
        0.007,
        (0.9, 0.999),
        0,
    )
    assert (
        decoder.defaults["lr"],
        decoder.defaults["betas"],
        decoder.defaults["weight_decay"],
    ) == (0.007, (0.8, 0.99), 0.01)


def test_decoder_loss_by_hand(corpus):
    """Mean absolute error of the standardized log-mel, given units, F0 tokens and who speaks."""
    model, optimizers, cfg = started(corpus, cpc_share=0.1)
    v.train_step(model, optimizers, corpus, 6, cfg)  # fits the units
    batch = v.get_batch(corpus, cfg, 7)
    with torch.no_grad():
        f0 = model.f0(batch["wave"], batch["speaker"])
        mel = model.decoder(model.units(batch["wave"]), f0, batch["speaker"])
    expected = (mel - model.features(batch["wave"])).abs().mean()
    close(v.train_step(model, optimizers, corpus, 7, cfg)["decoder_loss"], expected)


def test_decoder_learns(corpus):
    model, optimizers, cfg = started(corpus, steps=120, cpc_share=0.01)
    logs = [v.train_step(model, optimizers, corpus, step, cfg) for step in range(120)]
    first, last = (sum(log["decoder_loss"] for log in part) / 5 for part in (logs[1:6], logs[-5:]))
    assert last < 0.7 * first


# -------------------- what it is good for --------------------
def test_represent(corpus):
    model, _, cfg = started(corpus)
    wave = corpus.wave(3)
    x = v.represent(model, wave, cfg)
    z, c = model(wave[None])
    assert list(x) == ["z", "c", "units"]
    assert torch.equal(x["z"], z[0]) and torch.equal(x["c"], c[0])
    assert x["units"].shape == (len(wave) // 80,) and x["units"].dtype == torch.int64
    assert torch.equal(x["units"], model.units(wave[None])[0])
    assert not any(y.requires_grad for y in x.values())
    model.centroids[1:] = 100.0  # all frames are unit 0
    assert (v.represent(model, wave, cfg)["units"] == 0).all()


def test_convert(corpus):
    """Lengths stay; the decoder gets units and F0 of the source and the target's row; None takes the speaker who comes
    closest, and equals conversion to that speaker."""
    model, _, cfg = started(corpus)
    for p in model.decoder.parameters():
        nn.init.normal_(p, std=0.1)
    sources = [corpus.wave(0), corpus.wave(5)[:-37]]
    for wave in sources:
        units, f0 = model.units(wave[None]), model.f0(wave[None])
        mels = [model.decoder(units, f0, torch.tensor([s])) for s in range(3)]
        nearest = min(range(3), key=lambda s: (mels[s] - model.features(wave[None])).abs().mean())
        outputs = [v.convert(model, [wave], [s], cfg)[0] for s in (0, 1, 2, None)]
        for s in range(3):
            close(outputs[s], model.vocode(mels[s].detach(), len(wave))[0])
            assert torch.equal(outputs[3], outputs[s]) == (s == nearest)
        assert all(len(y) == len(wave) and y.isfinite().all() for y in outputs)
    both = v.convert(model, sources, [1, 2], cfg)
    assert torch.equal(both[0], v.convert(model, sources[:1], [1], cfg)[0]) and len(both[1]) == len(
        sources[1]
    )


def test_resynthesis_tries_all_speakers_at_once(corpus, monkeypatch):
    """Without a target the decoder runs once for all speakers, over 10 s at most, and once more."""
    model, _, cfg = started(corpus)
    forward, shapes = model.decoder.forward, []
    monkeypatch.setattr(
        model.decoder, "forward", lambda *a: shapes.append(tuple(a[0].shape)) or forward(*a)
    )
    v.convert(model, [corpus.wave(0), torch.randn(12 * 8000) * 0.1], [None, None], cfg)
    assert shapes == [(3, 50), (1, 50), (3, 1000), (1, 1200)]


def test_vocode_undoes_features(corpus):
    """Features of a tone through Griffin-Lim: nearly the same features, the same pitch."""
    model, _, cfg = started(corpus, n_mels=60, n_fft=512, win=320)
    wave = tone(140, 0.8)[None]
    again = model.vocode(model.features(wave), wave.shape[1])
    assert again.shape == wave.shape
    f0 = v.yin(again, cfg)[0, 8:-8]
    assert ((f0 - 140).abs() < 3).float().mean() > 0.9
    assert (model.features(again) - model.features(wave))[:, 8:-8].abs().mean() < 0.25
    model.mean[:], model.std[:] = -6.0, 1.0  # loud to the very end
    flat = model.vocode(torch.full((1, 10, 60), 3.0), 800)[0]
    assert flat[-80:].std() > 0.4 * flat[240:480].std()


@pytest.mark.parametrize("negatives", ["batch", "same-speaker", "sequence", "other-sequences"])
def test_sample(tmp_path, monkeypatch, negatives):
    """InfoNCE over eight batches of held-out utterances; files to listen to, of 3 s at most."""
    corpus = other_corpus()
    model, _, cfg = started(corpus, negatives=negatives, batch_size=3)
    get, drawn = v.get_batch, []

    def get_batch(corpus, cfg, step, draw, utterances):
        drawn.append((step, draw, get(corpus, cfg, step, draw, utterances)))
        return drawn[-1][2]

    monkeypatch.setattr(v, "get_batch", get_batch)
    metrics = json.loads(json.dumps(v.sample(model, corpus, cfg, tmp_path)))
    assert [(step, draw) for step, draw, _ in drawn] == [(i, 1000) for i in range(8)]
    used = torch.cat([batch["utterance"] for _, _, batch in drawn])
    assert set(used.tolist()) == set(corpus.held.tolist())
    gains = []
    for _, _, batch in drawn:
        loss, N = v.info_nce(*model(batch["wave"]), model.predictors, cfg)
        gains.append(math.log(N) - loss)
    close(list(metrics["nats_by_step"].values()), torch.stack(gains).mean(0), 1e-5)
    close(metrics["nats"], torch.stack(gains).mean(), 1e-5)
    assert list(metrics["nats_by_step"]) == ["1", "2", "3"]
    names = [f"held_out_{i}_{name}.wav" for i in range(3) for name in CONTOURS]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert sf.info(tmp_path / "held_out_0_resynthesis.wav").frames == 24000
    assert sf.info(tmp_path / "held_out_1_flat_f0.wav").frames == 4000
    model.predictors.weight.data.zero_()
    assert abs(v.sample(model, corpus, cfg, tmp_path)["nats"]) < 1e-5


CONTOURS = ("resynthesis", "flat_f0", "hidden_voicing")


def other_corpus():
    """Held out are other utterances than those trained on, of very different lengths."""
    lengths = [0.3, 0.4, 4.0, 0.5, 0.3, 0.35, 0.3, 0.45, 0.5, 0.4]
    c = corpus_of(
        [tone(100 + 15 * i, seconds) for i, seconds in enumerate(lengths)],
        [0, 1, 0, 1, 2, 2, 0, 1, 0, 1],
    )
    c.train, c.held = np.array([0, 1, 5, 6, 7, 8, 9]), np.array([2, 3, 4])
    return c


@pytest.mark.parametrize("negatives", ["batch", "same-speaker"])
def test_training_keeps_off_the_held_out(monkeypatch, negatives):
    corpus, drawn, get = other_corpus(), set(), v.get_batch
    model, optimizers, cfg = started(corpus, negatives=negatives, batch_size=3, steps=40)
    monkeypatch.setattr(
        v, "get_batch", lambda *a, **k: drawn.update((b := get(*a, **k))["utterance"].tolist()) or b
    )
    for step in (*range(12), *range(30, 36)):
        v.train_step(model, optimizers, corpus, step, cfg)
    assert drawn == {0, 1, 5, 6, 7, 8, 9}


def test_flat_f0_is_flat(corpus, tmp_path, monkeypatch):
    """What the decoder is given: the F0 of the utterance; every voiced frame the middle token; all
    frames the middle token. Each with the true speaker and the units of the utterance."""
    model, _, cfg = started(corpus)
    given, forward = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda *a: given.append(a) or forward(*a))
    v.sample(model, corpus, cfg, tmp_path)
    assert len(given) == 9
    for u in range(3):
        wave = corpus.wave(u)[None]
        s = torch.tensor([corpus.speaker[u]])
        f0 = model.f0(wave, s)
        assert (f0 > 0).any() and (f0 == 0).any()
        contours = (f0, torch.where(f0 > 0, 10, 0), torch.full_like(f0, 10))
        for (units, contour, speaker), expected in zip(given[3 * u : 3 * u + 3], contours):
            assert torch.equal(units, model.units(wave)) and torch.equal(contour, expected)
            assert torch.equal(speaker, s)


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
    for row in itertools.chain(*encoded):
        row["units"] = F.one_hot(row["units"], cfg.units).float()
    table = {}
    for name in ("c", "units"):
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
    """Both phases, against the untrained control. c and units gain phones. c loses the speaker, by
    whom negatives of the same sequence cannot be told, and units keep no more of the speaker than c
    has left: little, after so few steps. InfoNCE falls below log J. Far more conversions than
    sources are closer to the target's average spectrum than to the source's."""
    monkeypatch.chdir(toy_folder)
    cfg = v.Config(**v.TOY | dict(steps=250, cpc_share=0.72, device="cpu"))
    with redirect_stdout(io.StringIO()):
        corpus = v.load_corpus(cfg)
    torch.manual_seed(0)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    untrained = probes(model.eval(), corpus, cfg, 300)
    optimizers = v.make_optimizers(model, cfg)
    logs = [v.train_step(model.train(), optimizers, corpus, step, cfg) for step in range(cfg.steps)]
    trained = probes(model.eval(), corpus, cfg, 300)
    assert logs[179]["nats"] > 0.4 and logs[-1]["decoder_loss"] < 0.75 * logs[180]["decoder_loss"]
    assert trained["c"]["phone"] > untrained["c"]["phone"] + 0.1
    assert trained["c"]["speaker"] < untrained["c"]["speaker"] - 0.1
    assert trained["units"]["phone"] > untrained["units"]["phone"] + 0.1
    assert trained["units"]["speaker"] < untrained["c"]["speaker"] - 0.1

    us = corpus.held[:24]
    source = torch.from_numpy(corpus.speaker[us])
    aims = (source + 1 + torch.arange(24) % 23) % 24
    waves = [corpus.wave(u) for u in us]

    def spectrum(wave):
        return model.features(wave[None])[0].mean(0)

    def spectrum_of_speaker(s):
        us = corpus.train[corpus.speaker[corpus.train] == s][:10]
        return torch.stack([spectrum(corpus.wave(u)) for u in us]).mean(0)

    average = torch.stack([spectrum_of_speaker(s) for s in range(24)])

    def off(waves, speakers):
        made = torch.stack([spectrum(wave) for wave in waves])
        return (made - average[speakers]).abs().mean(1)

    def closer(waves):
        return (off(waves, aims) < off(waves, source)).float().mean()

    made = v.convert(model, waves, aims.tolist(), cfg)
    assert closer(made) > closer(waves) + 0.3


@GPU
def test_cuda_equals_cpu(corpus):
    model, _, cfg = started(corpus)
    wave = corpus.wave(0)[None]
    expected = *model(wave), model.f0(wave), v.yin(wave, cfg)
    got = *model.cuda()(wave.cuda()), model.f0(wave.cuda()), v.yin(wave.cuda(), cfg)
    for a, b in zip(got, expected):
        close(a.cpu().float(), b.float(), 1e-3)
    z, c = expected[:2]
    loss = v.info_nce(z, c, model.cpu().predictors, cfg)[0]
    with torch.autocast("cuda", torch.bfloat16):  # switched off inside
        close(v.info_nce(z.cuda(), c.cuda(), model.cuda().predictors, cfg)[0].cpu(), loss, 1e-4)
        close(model.context(z.cuda())[0].float().cpu(), c, 0.1)
        ids = model.units(wave.cuda())
    assert torch.equal(ids, model.units(wave.cuda()))
    cfg = replace(cfg, device="cuda")
    optimizers = v.make_optimizers(model, cfg)
    for step in (0, 4, 5):
        with torch.autocast("cuda", torch.bfloat16):
            log = v.train_step(model, optimizers, corpus, step, cfg)
        assert all(value.dtype == torch.float32 and value.isfinite() for value in log.values())
