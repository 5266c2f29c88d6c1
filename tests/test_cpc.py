# SPDX-License-Identifier: MIT
"""Checks of the method in cpc.py: numbers worked out by hand, exact identities, naive loops, which step moves what, and one
short run."""

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
        (dict(crop=2080), "--crop 2080: too short"),
        (dict(cpc_share=1.2), "--cpc-share 1.2"),
        (dict(negatives="other-sequences", batch_size=1), "--batch-size 1"),
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


@pytest.mark.parametrize("samples", [1, 60, 79])
def test_a_clip_shorter_than_a_hop(samples, corpus):
    """Is one frame, everywhere; a folder may hold such a file."""
    model, _, cfg = started(corpus)
    wave = 0.1 * torch.randn(1, samples)
    assert model(wave)[1].shape == (1, 1, 12) and model.units(wave).shape == model.f0(
        wave
    ).shape == (1, 1)
    assert (
        model.features(wave).shape == (1, 1, 20)
        and len(v.convert(model, [wave[0]], [1], cfg)[0]) == samples
    )
    started(corpus_of([wave[0], tone(100), tone(200)], [0, 0, 1]))


def test_decoder_is_residual():
    """With blocks that put out zero what is left is the first and the last layer."""
    cfg = v.Config(**TINY)
    decoder = v.Decoder(cfg, 3)
    for block in decoder.blocks:
        nn.init.zeros_(block[3].weight), nn.init.zeros_(block[3].bias)
    units, f0, s = torch.randint(6, (2, 9)), torch.randint(20, (2, 9)), torch.tensor([0, 2])
    x = torch.cat(
        [decoder.unit(units), decoder.f0(f0), decoder.speaker(s)[:, None].repeat(1, 9, 1)], 2
    )
    close(decoder(units, f0, s), decoder.leave(decoder.enter(x.mT)).mT)


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


def test_info_nce_by_hand():
    """Prediction (1, 2), candidates (1, 0), (0, 1), (2, 2), the third is right: log(1 + e^-5 + e^-4). Two contexts of
    zeros beside it, which cost log 3 each."""
    z = torch.tensor([[[9.0, 9.0], [1, 0], [0, 1], [2, 2]]])
    c = torch.tensor([[[0.0, 0.0], [0, 0], [1, 2], [7, 7]]])
    loss, N = v.info_nce(z, c, linear(torch.eye(2)), config())
    close(loss, [(0.0247449 + 2 * math.log(3)) / 3])
    close(
        loss,
        F.cross_entropy(torch.tensor([[0.0, 0, 0], [0, 0, 0], [1, 2, 6]]), torch.arange(3))[None],
    )
    assert N == 3


def test_softmax_is_over_candidates():
    """Scores ((3, 1), (2, 0)), row: context. Over candidates 1.126928; over contexts, the transposed loss, 0.813262."""
    z, c = (
        torch.tensor([[[5.0, 5.0], [1, 0], [0, 1]]]),
        torch.tensor([[[3.0, 1.0], [2, 0], [5, 5]]]),
    )
    close(v.info_nce(z, c, linear(torch.eye(2)), config())[0], [1.126928], 1e-5)


@pytest.mark.parametrize("late", [-1, 0, 1])
def test_offsets(late):
    """z_t and c_t say t, W_k moves t by k (+ late): certain where late is 0, and surely wrong otherwise. k = 1 is the next
    frame, not the present one."""
    T, K = 10, 4
    W = torch.cat([torch.eye(T).roll(k + late, 0) * 50 for k in range(1, K + 1)])  # (K T, T)
    x = torch.eye(T)[None]
    loss, _ = v.info_nce(x, x, linear(W), config(prediction_steps=K))
    assert (loss < 1e-6).all() if late == 0 else (loss > 40).all()


@pytest.mark.parametrize("negatives", ["batch", "same-speaker", "sequence", "other-sequences"])
def test_info_nce_against_a_loop(negatives):
    B, T, C, D, K = 3, 7, 5, 4, 2
    z, c, W = torch.randn(B, T, C), torch.randn(B, T, D), torch.randn(K, C, D)
    S, total = T - K, torch.zeros(K)
    for k, b, t in itertools.product(range(1, K + 1), range(B), range(S)):
        candidates = [
            (i, j + k)
            for i in range(B)
            for j in range(S)
            if (i, j) == (b, t)
            or {"sequence": i == b, "other-sequences": i != b}.get(negatives, True)
        ]
        scores = torch.stack([0.3 * z[i, j] @ W[k - 1] @ c[b, t] for i, j in candidates])
        total[k - 1] -= scores.log_softmax(0)[candidates.index((b, t + k))] / (B * S)
    loss, N = v.info_nce(
        z,
        c,
        linear(W.flatten(0, 1)),
        config(prediction_steps=K, negatives=negatives, score_scale=0.3),
    )
    close(loss, total, 1e-5)
    assert N == len(candidates)


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
    """Every matrix W_k has the gradient of the mean over k, from a fresh batch."""
    model, optimizers, cfg = started(corpus)
    get, asked = v.get_batch, []
    monkeypatch.setattr(
        v,
        "get_batch",
        lambda corpus, cfg, step, **k: asked.append((step, k)) or get(corpus, cfg, step, **k),
    )
    for step in (0, 3):
        before = copy.deepcopy(model)
        v.train_step(model, optimizers, corpus, step, cfg)
        loss, _ = v.info_nce(*before(get(corpus, cfg, step)["wave"]), before.predictors, cfg)
        before.zero_grad()
        (sum(loss) / 3).backward()
        for (name, p), q in zip(model.named_parameters(), before.parameters()):
            if not name.startswith("decoder"):
                close(p.grad, q.grad, 1e-5)
        assert (model.predictors.weight.grad.unflatten(0, (3, 16)).abs().amax((1, 2)) > 1e-6).all()
    assert asked == [(0, {}), (3, {})]


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


def test_log_line(corpus):
    """nats_k is log N - loss_k, nats and loss are means over k."""
    model, optimizers, cfg = started(corpus)
    z, c = model(v.get_batch(corpus, cfg, 0)["wave"])
    loss, N = v.info_nce(z, c, model.predictors, cfg)
    log = v.train_step(model, optimizers, corpus, 0, cfg)
    assert set(log) == {"loss", "nats", "nats_1", "nats_2", "nats_3"} and not any(
        x.requires_grad for x in log.values()
    )
    close(log["loss"], loss.mean())
    close(torch.stack([log[f"nats_{k}"] for k in (1, 2, 3)]), math.log(N) - loss, 1e-5)
    close(log["nats"], math.log(N) - loss.mean(), 1e-5)


def test_batches_of_one_speaker(corpus, monkeypatch):
    """Different utterances, all of one speaker; another speaker on another step and another rank; never the held-out ones."""
    cfg = v.Config(**TINY | dict(negatives="same-speaker", batch_size=3))
    seen, batches = set(), []
    for step in range(30):
        chosen = v.of_one_speaker(corpus, corpus.train[:-1], step, cfg)
        assert len(set(corpus.speaker[chosen])) == 1 and len(set(chosen)) == 3 and 11 not in chosen
        assert np.array_equal(chosen, v.of_one_speaker(corpus, corpus.train[:-1], step, cfg))
        seen |= set(chosen)
        batches.append(chosen.tolist())
    assert seen == set(range(11))  # all speakers, all utterances
    monkeypatch.setattr(v, "RANK", 1)
    assert batches != [
        v.of_one_speaker(corpus, corpus.train[:-1], step, cfg).tolist() for step in range(30)
    ]
    few = v.of_one_speaker(corpus, corpus.train, 0, replace(cfg, batch_size=9))
    assert len(set(few)) == 4 and len(set(corpus.speaker[few])) == 1


def test_the_step_draws_them(corpus, monkeypatch):
    model, optimizers, cfg = started(corpus, negatives="same-speaker", steps=40)
    drawn, get, losses = {}, v.get_batch, []  # step -> the batch that was drawn last

    def get_batch(corpus, cfg, step, **options):
        drawn[step] = get(corpus, cfg, step, **options)
        return drawn[step]

    monkeypatch.setattr(v, "get_batch", get_batch)
    for step in (*range(8), 30):
        before = copy.deepcopy(model)
        log = v.train_step(model, optimizers, corpus, step, cfg)
        if step < 8:
            loss = v.info_nce(*before(drawn[step]["wave"]), before.predictors, cfg)[0].mean()
            close(log["loss"], loss)
            losses.append(loss.item())
    decoder = drawn.pop(30)
    assert list(drawn) == list(range(8)) and len(set(losses)) == 8
    assert all(len(batch["speaker"].unique()) == 1 for batch in drawn.values())
    assert len({int(batch["speaker"][0]) for batch in drawn.values()}) > 1
    assert len(decoder["speaker"].unique()) > 1  # the decoder's are mixed
    with pytest.raises(v.UserError, match="--batch-size; lower it"):
        # at once, not when the decoder's turn comes
        v.build(None, corpus, replace(cfg, batch_size=13), None)


# -------------------- k-means --------------------
def test_kmeans_finds_blobs():
    """Ten blobs six deviations apart and more, best of five starts: every blob a cluster."""
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        centers = 8.5 * torch.stack(
            torch.meshgrid(torch.arange(5.0), torch.arange(2.0), indexing="ij"), -1
        ).flatten(0, 1)
        truth = torch.randint(10, (2000,), generator=g)
        x = centers[truth] + torch.randn(2000, 2, generator=g)
        centroids, inertia = v.kmeans(x, 10, seed)
        ids = v.assign(x, centroids)[0]
        purity = sum(truth[ids == k].bincount().max().item() for k in ids.unique()) / 2000
        assert purity > 0.999 and len(ids.unique()) == 10
        assert all(b <= a * (1 + 1e-6) for a, b in zip(inertia, inertia[1:]))
        close(inertia[-1], (x - centroids[ids]).square().sum().item(), 1e-3)


def test_kmeans_is_the_best_of_its_starts_and_repeats_itself():
    x = torch.randn(300, 3)
    inertia = [[v.kmeans(x, 12, seed, starts=n)[1][-1] for n in range(1, 6)] for seed in range(4)]
    assert all(row == sorted(row, reverse=True) for row in inertia) and any(
        row[4] < row[0] for row in inertia
    )
    assert v.kmeans(x, 12, 0)[1][-1] == inertia[0][4]
    assert torch.equal(v.kmeans(x, 12, 3)[0], v.kmeans(x, 12, 3)[0])
    assert not torch.equal(v.kmeans(x, 12, 3)[0], v.kmeans(x, 12, 4)[0])


def test_seeds_are_drawn_in_proportion_to_the_distance():
    """Ten tight blobs: with k-means++ nearly every seed is in another one, and the best of five starts has no blob twice."""
    x = torch.arange(10.0).repeat_interleave(60)[:, None] + 0.01 * torch.randn(600, 1)
    for seed in range(4):
        assert v.kmeans(x, 10, seed)[1][0] < 1
    far = torch.cat([x, torch.full((600, 1), 5.0)])  # a crowd does not draw the seeds
    assert v.kmeans(far, 10, 0, starts=1)[1][0] < 70


def test_five_starts_and_an_end():
    """The default is five starts; rounds end when they gain next to nothing."""
    x, better = torch.randn(300, 3), 0
    for seed in range(12):
        four, five, default = (
            v.kmeans(x, 12, seed, **options)[1] for options in (dict(starts=4), dict(starts=5), {})
        )
        assert default == five and len(five) < 100 and five[-2] - five[-1] <= 1e-4 * five[-1]
        better += five[-1] < four[-1]
    assert better and all(a > b * (1 + 1e-4) for a, b in zip(five[:-2], five[1:-1]))


def test_assign_against_cdist():
    x, centroids = torch.randn(4, 9, 5), torch.randn(7, 5)
    ids, d = v.assign(x, centroids)
    expected = torch.cdist(x, centroids).square().min(-1)
    assert torch.equal(ids, expected.indices)
    close(d, expected.values, 1e-4)


def test_empty_clusters_are_refilled():
    """Two places and four clusters: two are left without a member, and nothing breaks; more clusters than points neither."""
    x = torch.tensor([[0.0, 0.0], [1, 1]]).repeat(5, 1)
    centroids, inertia = v.kmeans(x, 4, 0)
    assert inertia[-1] == 0 and centroids.shape == (4, 2) and centroids.isfinite().all()
    centroids, inertia = v.kmeans(x[:3], 8, 0)
    assert centroids.shape == (8, 2) and inertia[-1] == 0


def test_an_empty_cluster_moves_to_the_worst_point(monkeypatch):
    """Seeds that are all alike: without a refill one cluster would take everything."""

    class Seeds:
        integers, random = (lambda self, n: 0), (lambda self: 0.0)

    monkeypatch.setattr(v.np.random, "default_rng", lambda seed: Seeds())
    x = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 30])
    centroids, inertia = v.kmeans(x, 2, 0, starts=1)
    close(centroids.sort(0).values, torch.stack([x[:50].mean(0), x[50:].mean(0)]), 1e-4)
    assert inertia[-1] < 500 < inertia[0]
    x = torch.cat([torch.randn(50, 2), torch.tensor([[300.0, 0.0], [0.0, 400.0]])])
    centroids, inertia = v.kmeans(x, 3, 0, starts=1)  # both far points get one, in the same round
    assert inertia[-1] < 500 and len(inertia) <= 4


@pytest.mark.parametrize("normalise", [False, True])
def test_units_are_fitted_on_training_utterances(corpus, monkeypatch, normalise):
    seen = []
    monkeypatch.setattr(
        v, "kmeans", lambda x, K, seed: seen.append((x, K, seed)) or (torch.ones(K, x.shape[1]), [])
    )
    model, _, cfg = started(corpus, normalise=normalise, seed=3)
    with torch.no_grad():
        expected = torch.cat(
            [model.normalised(model(corpus.wave(u)[None])[1])[0] for u in corpus.train]
        )
    close(seen[0][0], expected)
    assert seen[0][1:] == (6, 3) and (model.centroids == 1).all() and model.fitted == 1


@pytest.mark.parametrize(
    "utterances, frames, every", [(4, 20_000, 2), (600, 100, 1), (600, 101, 2)]
)
def test_units_are_fitted_on_50000_frames(monkeypatch, utterances, frames, every):
    """Every n-th frame of at most 500 utterances."""
    cfg, seen = v.Config(**TINY), []
    model = v.Model(cfg, 2)
    corpus = SimpleNamespace(
        train=np.arange(utterances),
        length=np.full(utterances, frames * cfg.hop + 7),
        wave=lambda u: torch.full((frames,), float(u)),
    )
    monkeypatch.setattr(
        model, "forward", lambda wave: (None, torch.stack([wave, torch.arange(frames)[None]], 2))
    )
    monkeypatch.setattr(
        v, "kmeans", lambda x, K, seed: seen.append(x) or (torch.ones(K, cfg.d_context), [])
    )
    v.fit_units(model, corpus, cfg)
    assert torch.equal(seen[0][:, 1].unique(), torch.arange(0.0, frames, every))
    assert (
        torch.equal(seen[0][:, 0].unique(), torch.arange(float(min(500, utterances))))
        and len(seen[0]) <= 50_000
    )


def test_ranks_agree_on_the_units(corpus, monkeypatch):
    sent = []
    monkeypatch.setattr(v.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(v.dist, "broadcast", lambda tensor, source: sent.append((tensor, source)))
    model, _, cfg = started(corpus)
    assert sent[0][0] is model.centroids and sent[0][1] == 0


@pytest.mark.parametrize("normalise", [False, True])
def test_units(corpus, normalise):
    """The nearest centroid of c; with --normalise of c less its mean and over its deviation in the utterance."""
    model, _, cfg = started(corpus, normalise=normalise)
    wave = corpus.wave(1)[None]
    c = model(wave)[1]
    if normalise:
        c = (c - c.mean(1, keepdim=True)) / c.var(1, unbiased=False, keepdim=True).sqrt()
    assert torch.equal(model.units(wave), torch.cdist(c, model.centroids[None]).argmin(2))
    assert len(model.units(wave).unique()) > 1
    assert torch.equal(model.normalised(3 * c + 1), 3 * c + 1) != normalise
    if normalise:
        close(model.normalised(3 * c + 1), model.normalised(c), 1e-4)
        close(model.normalised(c).square().mean(1), torch.ones(1, 12), 1e-3)
        assert (model.normalised(torch.ones(1, 5, 12)) == 0).all()


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
    """Quarter seconds of tone and noise by turns: VDE and FFE of a few frames at the borders."""
    cfg, on = v.Config(), (torch.arange(32000) // 4000) % 2 == 0
    wave = torch.where(on, tone(130, 2, 16000), 0.05 * torch.randn(32000))
    f0 = v.yin(wave[None], cfg)[0]
    truth = F.pad(on[::160].float() * 130, (0, 1))
    vde, ffe = (x.float().mean() for x in v.f0_errors(f0, truth))
    assert vde < 0.06 and ffe < 0.06


def test_yin_takes_the_median_of_five():
    """Up to six periods, which one or two frames alone would take for a voice, are none; twelve are one."""
    cfg = v.Config()
    for periods in (4, 5, 6, 12):
        wave = torch.zeros(1, 8000)
        wave[0, 4000 : 4000 + 80 * periods] = tone(200, periods / 200, 16000, noise=0)
        assert (v.yin(wave, cfg) == 0).all() == (periods < 12), periods


def test_yin_keeps_to_its_range():
    """400 Hz is found; 500 Hz is not, but for its half, and what is below 50 Hz has no pitch. An offset is no loudness."""
    cfg, t = v.Config(), torch.arange(8000) / 16000

    def f0(f):
        return v.yin(0.1 * (2 * math.pi * f * t).sin()[None], cfg)[0, 4:-4]

    assert (
        ((f0(400) - 400).abs() < 1).all()
        and ((f0(500) - 250).abs() < 1).all()
        and (f0(45) == 0).all()
    )
    assert (v.yin(1e-4 * tone(150, 0.5, 16000, noise=0)[None] + 0.01, cfg) == 0).all()


def test_yin_is_centred():
    """On a glide from 100 to 300 Hz in a second F0 is at most 3 ms early or late."""
    f = torch.linspace(100, 300, 16000)
    f0 = v.yin(tone(f, 1, 16000, noise=0)[None], v.Config())[0]
    assert ((f0[6:94] - f[960:15040:160]).abs() < 0.003 * 200).all() and (
        f0[6:94] - f[960:15040:160]
    ).mean().abs() < 0.3


def test_f0_errors_by_hand():
    """Of six frames one unvoiced and one voiced in error, one 21 % too high; 19 % is no error."""
    truth = torch.tensor([100.0, 100, 100, 0, 0, 200])
    vde, ffe = v.f0_errors(torch.tensor([119.0, 121, 0, 0, 50, 200]), truth)
    assert vde.tolist() == [False, False, True, False, True, False]
    assert ffe.tolist() == [False, True, True, False, True, False]


def test_f0_tokens_by_hand(corpus, monkeypatch):
    """Token 0 is unvoiced; 1 to 19 are bins of 5 / 19 deviations from -2.5 to 2.5, the outer ones open. The speaker's mean is
    the middle token, not that of unvoiced frames."""
    model, _, cfg = started(corpus)
    model.f0_mean[:], model.f0_std[:] = torch.tensor([4.0, 5.0, 6.0]), torch.tensor([0.1, 0.2, 0.4])
    x = torch.tensor([-9.0, -2.51, -2.49, -2.2, -0.1, 0.0, 0.14, 2.4, 2.6, 9.0])
    expected = [1, 1, 1, 2, 10, 10, 11, 19, 19, 19]
    for s in range(3):
        f0 = torch.cat([(model.f0_mean[s] + model.f0_std[s] * x).exp(), torch.zeros(2)])[None]
        monkeypatch.setattr(v, "yin", lambda wave, cfg: f0)
        assert model.f0(torch.zeros(1, 80 * 12), torch.tensor([s])).tolist() == [[*expected, 0, 0]]
        assert model.f0(torch.zeros(1, 80 * 11), torch.tensor([s])).shape == (
            1,
            11,
        )  # as many as frames of z


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
    """Standardised mel of what they were taken from has mean 0 and deviation 1; F0 statistics are those of each voice."""
    model, _, cfg = started(corpus)
    mel = torch.stack(
        [
            torch.stack(
                [(x := v.log_mel(corpus.wave(u)[None], cfg)[0]).mean(0), x.square().mean(0)]
            )
            for u in corpus.train
        ]
    ).mean(0)
    close(model.mean, mel[0], 1e-4)
    close(model.std, (mel[1] - mel[0] ** 2).sqrt(), 1e-3)
    close(
        model.features(corpus.wave(0)[None]) * model.std + model.mean,
        v.log_mel(corpus.wave(0)[None], cfg)[:, :50],
        1e-4,
    )
    for s in range(3):
        f0 = torch.cat(
            [(y := v.yin(corpus.wave(u)[None], cfg)[0])[y > 0] for u in range(4 * s, 4 * s + 4)]
        ).log()
        close(model.f0_mean[s], f0.mean(), 1e-4)
        close(model.f0_std[s], f0.std(), 1e-4)
        assert abs(model.f0_mean[s].exp() / (107.5 * 1.4**s) - 1) < 0.03


def test_statistics_of_25_utterances_each():
    waves = [tone(100 if u < 24 else 150 if u == 24 else 300, 0.2) for u in range(30)]
    waves += [tone(200, 0.2), 0.03 * torch.randn(1600)]
    model, _, cfg = started(corpus_of(waves, [0] * 30 + [1, 2]))
    close(model.f0_mean[:2].exp(), [100 * 1.5**0.04, 200.0], 1e-2)
    assert (
        abs(model.f0_mean[2].exp() - 104) < 3 and (model.f0_std >= 0.02).all()
    )  # who has no voice: that of all
    assert model.f0_std[1] == torch.tensor(0.02)


def test_nobody_has_a_voice_and_nobody_is_known():
    """An evaluation on other data: speakers beyond the table; noise only. Nothing breaks, statistics are numbers."""
    corpus = corpus_of([0.1 * torch.randn(1600) for _ in range(4)], [2, 2, 3, 3])
    cfg = v.Config(**TINY)
    model = v.Model(cfg, 2)
    v.prepare(model, corpus, cfg)
    assert all(x.isfinite().all() for x in model.buffers()) and (model.std > 0).all()
    close(model.f0_mean, torch.full((2,), 4.85))
    close(model.f0_std, torch.full((2,), 0.5 / math.sqrt(2)))


def test_a_single_voiced_frame_and_digital_silence(monkeypatch):
    """Are no statistics: that voice gets those of all, and a band of nothing a deviation of 0.01."""
    f0 = {1600: torch.tensor([[100.0, 0, 200]]), 1760: torch.tensor([[0.0, 0, 130]])}
    monkeypatch.setattr(v, "yin", lambda wave, cfg: f0[wave.shape[1]])
    model, _, _ = started(
        corpus_of([torch.zeros(1600), torch.zeros(1600), torch.zeros(1760)], [0, 0, 1]), units=1
    )
    every = torch.tensor([100, 200, 100, 200, 130.0, math.exp(4.6), math.exp(5.1)]).log()
    close(model.f0_mean[1], every.mean(), 1e-5)
    close(model.f0_std[1], every.std(), 1e-5)
    close(model.std, torch.full((20,), 0.01))


def test_phases_move_what_they_should(corpus):
    """Five CPC steps, at the end of the fifth the units, then five of the decoder; the rest bit-equal."""
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
        assert (
            moved - {"fitted"}
            == ({"cpc"}, {"cpc", "centroids"}, {"decoder"})[(step >= 4) + (step > 4)]
        )
        assert model.fitted == (step >= 4)
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
    [(0.43, 700_000, 301_000), (1.0, 10, 10), (0.5, 10, 5), (0.01, 10, 1), (0.29, 100, 29)],
)
def test_share_of_cpc(share, steps, first, corpus, monkeypatch):
    """Units are fitted once, at the end of CPC, also when there is no decoder phase, and there is one step of CPC at least."""
    cfg, called = v.Config(**TINY | dict(cpc_share=share, steps=steps)), []
    model = SimpleNamespace(fitted=torch.tensor(1.0))
    for name, fitted in {"cpc_step": 0, "decoder_step": None, "fit_units": 1}.items():
        monkeypatch.setattr(
            v,
            name,
            lambda *a, name=name, fitted=fitted: (
                called.append(name) or (fitted is not None and model.fitted.fill_(fitted))
            ),
        )
    for step in sorted({0, first - 1, first, steps - 1} & set(range(steps))):
        called.clear()
        v.train_step(model, {"cpc": 0, "decoder": 0}, corpus, step, cfg)
        assert called == (
            ["decoder_step"]
            if step >= first
            else ["cpc_step"] + ["fit_units"] * (step == first - 1)
        )


def test_resumed_beyond_the_border(corpus):
    """Six CPC steps, then --steps is lowered so that the next step is the decoder's: units are fitted before it."""
    model, optimizers, cfg = started(corpus, steps=20)
    for step in range(6):
        v.train_step(model, optimizers, corpus, step, cfg)
    assert model.fitted == 0
    before = model.centroids.clone()
    v.train_step(model, optimizers, corpus, 6, replace(cfg, steps=8))
    fitted = model.centroids.clone()
    v.train_step(model, optimizers, corpus, 7, replace(cfg, steps=8))
    assert (
        model.fitted == 1
        and not torch.equal(before, fitted)
        and torch.equal(fitted, model.centroids)
    )
    v.train_step(model, optimizers, corpus, 8, replace(cfg, steps=40))  # CPC again
    assert model.fitted == 0 and torch.equal(fitted, model.centroids)


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
    """Mean absolute error of the standardised log-mel, given units, F0 tokens and who speaks."""
    model, optimizers, cfg = started(corpus)
    batch = v.get_batch(corpus, cfg, 7)
    with torch.no_grad():
        f0 = model.f0(batch["wave"], batch["speaker"])
        expected = (
            (
                model.decoder(model.units(batch["wave"]), f0, batch["speaker"])
                - model.features(batch["wave"])
            )
            .abs()
            .mean()
        )
    close(v.train_step(model, optimizers, corpus, 7, cfg)["decoder_loss"], expected)


def test_decoder_learns(corpus):
    model, optimizers, cfg = started(corpus, steps=120, cpc_share=0.01)
    logs = [v.train_step(model, optimizers, corpus, step, cfg) for step in range(120)]
    first, last = (sum(log["decoder_loss"] for log in part) / 5 for part in (logs[1:6], logs[-5:]))
    assert last < 0.7 * first


# -------------------- what it is good for --------------------
@pytest.mark.parametrize("normalise", [False, True])
def test_represent(corpus, normalise):
    model, _, cfg = started(corpus, normalise=normalise)
    wave = corpus.wave(3)
    x = v.represent(model, wave, cfg)
    z, c = model(wave[None])
    assert (
        list(x) == ["z", "c", "units"] and torch.equal(x["z"], z[0]) and torch.equal(x["c"], c[0])
    )
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


@pytest.fixture
def no_examples(monkeypatch):
    """`sample` without write_examples, which asks the model for more than a test counts or has planted."""
    monkeypatch.setattr(v, "write_examples", lambda *given: None)


def test_examples(tmp_path, monkeypatch):
    """Four held-out utterances, 3 s of them at most: as they are, rebuilt, and in the voice of the next speaker."""
    waves = [torch.full((30000 if u else 900,), 0.1 * u) for u in range(6)]
    corpus = SimpleNamespace(
        held=np.array([5, 3, 1, 0, 2]),
        speaker=np.array([0, 1, 2, 0, 1, 2]),
        speakers=list("abc"),
        paths=[v.Path(f"u{u}.wav") for u in range(6)],
        wave=waves.__getitem__,
    )
    given = []

    def convert(model, sources, targets, cfg):
        given.extend(targets)
        return [wave / 2 if target is None else -wave for wave, target in zip(sources, targets)]

    monkeypatch.setattr(v, "convert", convert)
    v.write_examples(None, corpus, v.Config(**TINY), tmp_path)
    assert given == [None] * 4 + [0, 1, 2, 1]
    for u, voice in zip((5, 3, 1, 0), "abcb"):
        wave = waves[u][:24000]
        made = dict(source=wave, reconstruction=wave / 2, conversion=-wave)
        for kind, expected in made.items():
            got = v.read_audio(tmp_path / f"u{u}_as_{voice}_{kind}.wav", 8000)
            close(got, expected, 1e-4)
    assert len(list(tmp_path.iterdir())) == 12


def bits(ids):
    """Entropy of unit indices in bits, of shares counted one by one."""
    shares = [(ids == k).double().mean().item() for k in set(ids.tolist())]
    return -sum(p * math.log2(p) for p in shares)


def test_unit_figures_by_hand(tmp_path, monkeypatch, no_examples):
    """Four units, all alike: perplexity 4, and with 8 symbols in a second 16 bits in it; a single unit: 1 and nothing."""
    corpus = corpus_of(
        [torch.zeros(4000), torch.zeros(4000)], [2, 2]
    )  # unknown speakers: units and InfoNCE alone
    corpus.speakers = ["s0", "s1"]
    model, _, cfg = started(corpus, batch_size=2)
    for ids, perplexity in (([0, 1, 5, 3], 4.0), ([2, 2, 2, 2], 1.0)):
        monkeypatch.setattr(model, "units", lambda wave: torch.tensor([ids]))
        metrics = v.sample(model, corpus, cfg, tmp_path)
        assert metrics["units_used"] == perplexity
        close(metrics["perplexity"], perplexity)
        close(metrics["bits_per_second"], 8 * math.log2(perplexity), 1e-5)


@pytest.mark.parametrize("negatives", ["batch", "same-speaker", "sequence", "other-sequences"])
def test_sample(corpus, tmp_path, negatives, no_examples):
    model, _, cfg = started(corpus, negatives=negatives, n_mels=60, n_fft=512, win=320)
    metrics = v.sample(model, corpus, cfg, tmp_path)
    json.dumps(metrics)
    lines = [line.split() for line in open(tmp_path / "units.txt")]
    assert [line[0] for line in lines] == [f"u{i}" for i in range(12)]
    ids = [model.units(corpus.wave(u)[None])[0].tolist() for u in range(12)]
    assert [list(map(int, line[1:])) for line in lines] == ids
    every, seconds = torch.tensor(sum(ids, [])), corpus.length.sum() / 8000
    close(metrics["bits_per_second"], len(every) / seconds * bits(every), 1e-4)
    assert metrics["units_used"] == len(every.unique())
    N = {"sequence": 37, "other-sequences": 3 * 37 + 1}.get(negatives, 4 * 37)
    close(metrics["log_n"], math.log(N))
    model.predictors.weight.data.zero_()
    assert abs(v.sample(model, corpus, cfg, tmp_path)["nats"]) < 1e-5
    assert list(metrics["nats_by_step"]) == ["1", "2", "3"]
    close(metrics["nats"], sum(metrics["nats_by_step"].values()) / 3)
    for error in ("vde", "ffe"):
        assert list(metrics[error]) == ["copy", "resynthesis", "flat_f0"]
        assert all(0 <= x <= 1 for x in metrics[error].values())
    assert all(metrics["ffe"][name] >= metrics["vde"][name] for name in metrics["vde"])
    assert metrics["ffe"]["copy"] < 0.3
    files = {p.name for p in tmp_path.glob("*.wav")}
    assert files == {
        f"resynthesis_{i}_{name}.wav"
        for i in range(3)
        for name in ("copy", "resynthesis", "flat_f0")
    }
    assert all(
        sf.info(tmp_path / f"resynthesis_{i}_copy.wav").frames == corpus.length[i] for i in range(3)
    )


def other_corpus():
    """Held out are other utterances than those trained on, of very different lengths, some of unknown speakers."""
    lengths = [0.3, 0.4, 4.0, 0.5, 0.3, 0.35, 0.3, 0.45, 0.5, 0.4]
    c = corpus_of(
        [tone(100 + 15 * i, seconds) for i, seconds in enumerate(lengths)],
        [0, 1, 0, 1, 2, 2, 0, 1, 0, 1],
    )
    c.train, c.held = np.array([0, 1, 6, 7, 8, 9]), np.array([2, 3, 4, 5])
    c.speakers = ["s0", "s1"]
    return c


@pytest.mark.parametrize("negatives", ["batch", "same-speaker"])
def test_sample_on_held_out_speech(tmp_path, monkeypatch, negatives, no_examples):
    """InfoNCE on eight batches of different held-out utterances, not those of training steps; F0 of known speakers, of 3 s
    at most; unit figures per second, of all utterances."""
    corpus = other_corpus()
    model, _, cfg = started(corpus, negatives=negatives, batch_size=3)
    get, asked, forward, given = v.get_batch, [], model.decoder.forward, []
    monkeypatch.setattr(
        v,
        "get_batch",
        lambda corpus, cfg, step, draw, utterances: (
            asked.append((step, draw, utterances.tolist()))
            or get(corpus, cfg, step, draw, utterances)
        ),
    )
    monkeypatch.setattr(model.decoder, "forward", lambda *a: given.append(a) or forward(*a))
    metrics = v.sample(model, corpus, cfg, tmp_path)
    assert [a[:2] for a in asked] == [(i, 1000) for i in range(8)]
    used = [a[2] for a in asked]
    if negatives == "batch":
        assert used[:4] == [[2, 3, 4], [5, 2, 3], [4, 5, 2], [3, 4, 5]]
    else:
        assert all(u in ([2], [3], [4, 5], [5, 4]) for u in used) and len(set(map(str, used))) > 1
    gains = []
    for a in asked:
        loss, N = v.info_nce(
            *model(get(corpus, cfg, a[0], a[1], np.array(a[2]))["wave"]), model.predictors, cfg
        )
        gains.append((math.log(N) - loss, math.log(N)))
    close(metrics["nats"], torch.stack([g for g, _ in gains]).mean(), 1e-5)
    close(metrics["log_n"], sum(n for _, n in gains) / 8)
    assert [len(a[0][0]) for a in given[::2]] == [300, 50] and [int(a[2]) for a in given[::2]] == [
        0,
        1,
    ]  # 4 and 5: unknown
    assert sf.info(tmp_path / "resynthesis_0_copy.wav").frames == 24000
    ids = [model.units(corpus.wave(u)[None])[0] for u in (2, 3, 4, 5)]
    seconds, every = 5.15, torch.cat(ids)
    assert len(open(tmp_path / "units.txt").readlines()) == 4
    close(metrics["perplexity"], 2 ** bits(every), 1e-5)
    close(metrics["bits_per_second"], len(every) / seconds * bits(every), 1e-4)
    heard = [
        v.yin(v.read_audio(tmp_path / f"resynthesis_{i}_copy.wav", 8000)[None], cfg)[0]
        for i, u in enumerate((2, 3))
    ]
    truth = [v.yin(corpus.wave(u)[None, :24000], cfg)[0] for u in (2, 3)]
    wrong = (
        torch.cat([(a > 0) != (b > 0) for a, b in zip(heard, truth)]).float().mean()
    )  # of frames, not of utterances
    close(metrics["vde"]["copy"], wrong, 0.02)
    corpus.held = corpus.held[2:]  # unknown speakers alone
    assert v.sample(model, corpus, cfg, tmp_path)["vde"] == {}


@pytest.mark.parametrize("negatives", ["batch", "same-speaker"])
def test_training_keeps_off_the_held_out(monkeypatch, negatives):
    corpus, drawn, get = other_corpus(), set(), v.get_batch
    model, optimizers, cfg = started(corpus, negatives=negatives, batch_size=3, steps=40)
    monkeypatch.setattr(
        v, "get_batch", lambda *a, **k: drawn.update((b := get(*a, **k))["utterance"].tolist()) or b
    )
    for step in (*range(12), *range(30, 36)):
        v.train_step(model, optimizers, corpus, step, cfg)
    assert drawn == {0, 1, 6, 7, 8, 9}


def test_f0_errors_are_relative_to_the_source(corpus, tmp_path, monkeypatch, no_examples):
    """100 Hz in the source and 121 in the copy is an error; the other way round it would be none."""
    model, _, cfg = started(corpus)
    monkeypatch.setattr(model, "vocode", lambda mel, samples: torch.full((1, samples), 0.5))
    monkeypatch.setattr(
        v,
        "yin",
        lambda wave, cfg: torch.full(
            (1, 1 + wave.shape[1] // 80), 121.0 if (wave == 0.5).all() else 100.0
        ),
    )
    assert v.sample(model, corpus, cfg, tmp_path)["ffe"] == dict.fromkeys(
        ("copy", "resynthesis", "flat_f0"), 1.0
    )


def test_figures_over_utterances(tmp_path, monkeypatch, no_examples):
    """Units are counted over all utterances, and F0 errors are shares of all frames."""
    corpus = other_corpus()
    corpus.held = corpus.held[:2]
    model, _, cfg = started(corpus)
    rows = {32000: torch.tensor([[0, 0, 1, 1]]), 4000: torch.tensor([[1, 1, 2]])}
    monkeypatch.setattr(
        model,
        "units",
        lambda wave: rows.get(wave.shape[1], torch.zeros(1, wave.shape[1] // 80, dtype=torch.long)),
    )
    monkeypatch.setattr(model, "vocode", lambda mel, samples: torch.full((1, samples), 0.5))
    monkeypatch.setattr(model.decoder, "forward", lambda units, f0, s: None)

    def silent(wave):  # the long one loses all voicing, the short none
        return wave.shape[1] == 24000 and (wave == 0.5).all()

    monkeypatch.setattr(
        v,
        "yin",
        lambda wave, cfg: torch.full((1, 1 + wave.shape[1] // 80), 0.0 if silent(wave) else 100.0),
    )
    metrics = v.sample(model, corpus, cfg, tmp_path)
    close(metrics["bits_per_second"], 7 / 4.5 * bits(torch.tensor([0, 0, 1, 1, 1, 1, 2])), 1e-5)
    close(metrics["vde"]["copy"], 301 / (301 + 51), 1e-5)


def test_flat_f0_is_flat(corpus, tmp_path, monkeypatch, no_examples):
    """What the decoder is given: every voiced frame the middle token; the true speaker; the units of the utterance."""
    model, _, cfg = started(corpus)
    given, forward = [], model.decoder.forward
    monkeypatch.setattr(model.decoder, "forward", lambda *a: given.append(a) or forward(*a))
    v.sample(model, corpus, cfg, tmp_path)
    assert len(given) == 24
    for u in range(12):
        (units, f0, s), (same, flat, t) = given[2 * u : 2 * u + 2]
        wave = corpus.wave(u)[None]
        assert (
            torch.equal(units, model.units(wave))
            and torch.equal(units, same)
            and s == t == corpus.speaker[u]
        )
        assert (
            torch.equal(f0, model.f0(wave, s))
            and torch.equal(flat, torch.where(f0 > 0, 10, 0))
            and (f0 > 0).any()
        )


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


def test_a_quarter_of_the_toy_run(toy_folder, monkeypatch):
    """Both phases, against the untrained control: c and units gain phones, c loses the speaker, by whom negatives of the same
    sequence cannot be told, InfoNCE falls below log N, and far more conversions than sources are closer to the target's average spectrum than to the source's."""
    monkeypatch.chdir(toy_folder)
    cfg = v.Config(**v.TOY | dict(steps=300, cpc_share=0.8, device="cpu"))
    with redirect_stdout(io.StringIO()):
        corpus = v.load_corpus(cfg)
    torch.manual_seed(0)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    untrained = probes(model.eval(), corpus, cfg, 400)
    optimizers = v.make_optimizers(model, cfg)
    logs = [v.train_step(model.train(), optimizers, corpus, step, cfg) for step in range(cfg.steps)]
    trained = probes(model.eval(), corpus, cfg, 400)
    assert logs[239]["nats"] > 0.4 and logs[-1]["decoder_loss"] < 0.7 * logs[240]["decoder_loss"]
    assert trained["c"]["phone"] > untrained["c"]["phone"] + 0.1
    assert trained["c"]["speaker"] < untrained["c"]["speaker"] - 0.1
    assert trained["units"]["phone"] > untrained["units"]["phone"] + 0.1
    us = corpus.held[:32]
    source = torch.from_numpy(corpus.speaker[us])
    aims = (source + 1 + torch.arange(32) % 23) % 24
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
    assert closer(made) > closer(waves) + 0.5


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
