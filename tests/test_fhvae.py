# SPDX-License-Identifier: MIT
"""Checks of the method in fhvae.py: numbers worked out by hand, exact identities, mistakes of earlier ports, a short run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import fhvae as v
import measure

torch.set_num_threads(1)
TINY = dict(
    sample_rate=8000,
    n_fft=200,
    win=200,
    hop=80,
    n_mels=20,
    crop=1840,
    batch_size=6,
    hidden=12,
    layers=2,
    d_z1=3,
    d_z2=5,
    sequences=4,
    device="cpu",
)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def close(x, y, tolerance=1e-6):
    x = torch.as_tensor(x)
    torch.testing.assert_close(x, torch.as_tensor(y, dtype=x.dtype), atol=tolerance, rtol=tolerance)


def tiny(**options):
    """A model whose statistics and heads are not those of the start, at which many a mistake is invisible."""
    model = v.Model(v.Config(**TINY | options), 3).eval()
    model.mean.normal_()
    model.std.uniform_(0.5, 2)
    for name, p in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(p, std=0.3)
    return model


class Stub:
    """What training needs of a Corpus; hashable, as draw_pass keeps it."""

    def __init__(self, lengths, speaker=None, held=2):
        lengths, rng = np.array(lengths), np.random.default_rng(0)
        self.length, self.start = lengths, lengths.cumsum() - lengths
        self.train, self.held = (
            np.arange(len(lengths))[held:][::-1].copy(),
            np.arange(len(lengths))[:held],
        )
        pitch = 60 * 1.2 ** np.arange(len(lengths))
        waves = [
            0.1 * np.sign(np.sin(2 * np.pi * f * np.arange(n) / 8000))
            + 0.05 * rng.standard_normal(n)
            for f, n in zip(pitch, lengths)
        ]
        self.audio = torch.from_numpy(
            (np.concatenate(waves) * 32768).clip(-32768, 32767).astype(np.int16)
        )
        self.speaker = np.arange(len(lengths)) % 3 if speaker is None else np.array(speaker)
        self.speakers, self.test = ["a", "b", "c"], self
        self.paths = [v.Path(f"u{u}.wav") for u in range(len(lengths))]

    def wave(self, u):
        return self.audio[self.start[u] : self.start[u] + self.length[u]].float() / 32768


LENGTHS = (5000, 2400, 1200, 6000, 3000, 9000, 2000, 4000, 7000)


def started(corpus, **options):
    cfg = v.Config(**TINY | options)
    model = v.Model(cfg, 3).to(cfg.device)
    v.prepare(model, corpus, cfg)
    return model, v.make_optimizers(model, cfg), cfg


# -------------------- golden values: the authors' program --------------------
GOLDEN = json.loads((Path(__file__).parent / "golden" / "fhvae.json").read_text())
OUTPUTS = GOLDEN["outputs"]


def fill(layer):
    """A layer of the golden file -> its values, by the formula that the file states."""
    p = 1_000_003
    k = layer["k"]
    i = np.arange(math.prod(layer["shape"]), dtype=np.int64) % p
    square = i * i % p
    cube = square * i % p
    h = 271829 * cube + 314159 * (k + 1) % p * square + 161803 * (k + 3) % p * i + 577215 * (k + 1)
    value = layer["offset"] + layer["scale"] * (2 * (h % p) / p - 1)
    return torch.from_numpy(value).view(layer["shape"])


def golden(x, expected):
    """Sampled entries, mean and mean square to the tolerance of the file; a scalar likewise."""
    tolerance = expected["tolerance"]
    if "index" not in expected:
        assert abs(x - expected["value"]) <= tolerance * max(1, abs(expected["value"]))
        return
    assert list(x.shape) == expected["shape"] and x.dtype == torch.float64
    scale = expected["mean_square"] ** 0.5
    value = torch.tensor(expected["value"], dtype=torch.float64)
    assert (x.flatten()[expected["index"]] - value).abs().max() <= tolerance * scale
    assert abs(x.mean() - expected["mean"]) <= tolerance * scale
    assert abs(x.square().mean() - scale**2) <= 2 * tolerance * scale**2


def load_network(net, layers):
    """Fills a network in the order of the file, whose LSTMs have ONE bias, to whose forget gate the
    program adds 1."""
    with torch.no_grad():
        for depth in range(2):
            getattr(net.lstm, f"weight_ih_l{depth}").copy_(next(layers))
            getattr(net.lstm, f"weight_hh_l{depth}").copy_(next(layers))
            bias = getattr(net.lstm, f"bias_ih_l{depth}")
            bias.copy_(next(layers))
            bias[256:512] += 1
            getattr(net.lstm, f"bias_hh_l{depth}").zero_()
        for head in (net.mu, net.log_var):
            head.weight.copy_(next(layers))
            head.bias.copy_(next(layers))


@pytest.fixture(scope="module")
def step_of_the_authors():
    """One train_step at the authors' size, with their weights, batch and noise, in float64.
    -> model with gradients, the terms of each segment, the outputs of the networks, the log"""
    settings = GOLDEN["settings"]
    names = "n_fft hidden layers d_z1 d_z2 sequences alpha".split()
    size = dict(win=40, hop=20, crop=420, batch_size=5, device="cpu")
    cfg = v.Config(**{name: settings[name] for name in names}, **size)
    model = v.Model(cfg, 2).double()
    x, table, *noise = map(fill, GOLDEN["layers"][:4])
    layers = map(fill, GOLDEN["layers"][4:])
    model.table.data.copy_(table)
    outputs = {}
    for name in ("z2_encoder", "z1_encoder", "decoder"):
        net = getattr(model, name)
        load_network(net, layers)
        net.register_forward_hook(lambda net, given, out, name=name: outputs.update({name: out}))

    rows = np.array(settings["row_of_segment"])
    counts = np.full(11, 99)
    counts[rows] = settings["N_of_its_sequence"]
    corpus = SimpleNamespace(train=np.arange(11))
    terms, objective = {}, v.objective

    def spy(*given):
        terms.update(objective(*given))
        return terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v, "draw_pass", lambda *_: (corpus.train, counts, rows))
        patch.setattr(v, "segments", lambda *_: x)
        patch.setattr(v, "objective", spy)
        patch.setattr(torch, "randn_like", lambda mean: noise.pop(0))
        log = v.train_step(model, v.make_optimizers(model, cfg), corpus, 0, cfg)
    return model, terms, outputs, log


def test_fill_is_that_of_the_golden_file():
    for case in GOLDEN["fill_check"]:
        layer = dict(k=case["k"], shape=[case["i"] + 1], scale=1, offset=0)
        assert fill(layer)[-1] == pytest.approx(case["value"], rel=1e-12)


@pytest.mark.parametrize("name, of", [("z2", "z2_encoder"), ("z1", "z1_encoder"), ("x", "decoder")])
def test_golden_networks(step_of_the_authors, name, of):
    """D1 plays no part: no log variance of x comes near -6."""
    mean, log_variance = step_of_the_authors[2][of]
    golden(mean, OUTPUTS[f"mean_of_{name}"])
    golden(log_variance, OUTPUTS[f"log_variance_of_{name}"])


@pytest.mark.parametrize("name", ["log_px", "kl_z1", "kl_z2", "log_pmu2", "bound", "log_qy"])
def test_golden_terms(step_of_the_authors, name):
    _, terms, _, log = step_of_the_authors
    golden(terms[name], OUTPUTS[name])
    assert log[name].item() == pytest.approx(OUTPUTS[name]["mean"], rel=1e-9)


def test_golden_loss_and_gradients(step_of_the_authors):
    model, _, _, log = step_of_the_authors
    golden(log["loss"], OUTPUTS["loss"])
    for name, parameter in {
        "table": model.table,
        "bias_of_mean_of_z2": model.z2_encoder.mu.bias,
        "bias_of_mean_of_x": model.decoder.mu.bias,
        "input_weights_of_layer_1_of_the_encoder_of_z1": model.z1_encoder.lstm.weight_ih_l0,
    }.items():
        golden(parameter.grad, OUTPUTS[f"gradient_of_loss_to_{name}"])


def test_golden_posterior_of_all_rows(step_of_the_authors):
    m2 = step_of_the_authors[2]["z2_encoder"][0]
    golden(v.log_posterior(m2, fill(GOLDEN["layers"][1])), OUTPUTS["log_posterior_of_all_rows"])


def test_golden_closed_form():
    m2 = fill(GOLDEN["closed_form"]["layers"][0])
    golden(v.closed_form(m2.sum(0), len(m2)), GOLDEN["closed_form"]["mu2"])


def test_golden_segment_counts():
    """D3: what is shorter than a segment counts as one; the program leaves it out."""
    counts = GOLDEN["segment_counts"]
    frames = np.array([5, 19, *counts["frames"]])
    corpus = SimpleNamespace(train=np.arange(len(frames)), length=(frames - 1) * 80 + 40)
    _, segments, order = v.draw_pass.__wrapped__(corpus, v.Config(**TINY | {"sequences": 50}), 0)
    assert segments.tolist() == [1, 1, *counts["segments"]] and len(order) == sum(segments)


# -------------------- the model --------------------
def test_parameters_of_the_papers():
    model = v.Model(v.Config(), 100)

    def count(net):
        return sum(p.numel() for p in net.parameters())

    assert [count(net) for net in (model.z2_encoder, model.z1_encoder, model.decoder)] == [
        1_029_184,
        1_061_952,
        959_378,
    ]
    assert count(model) - model.table.numel() == 3_050_514 and model.table.shape == (2000, 32)
    for options, expected in (
        (dict(n_fft=158), 2_740_512),
        (dict(n_fft=398, layers=1), 1_436_176),
        (dict(n_fft=398, layers=1, d_z1=16, d_z2=16), 1_370_576),
    ):
        model = v.Model(v.Config(win=100, hop=50, **options), 2)
        assert count(model) - model.table.numel() == expected
    assert not [
        m for m in model.modules() if "Norm" in type(m).__name__ or "Dropout" in type(m).__name__
    ]


def test_defaults_of_the_papers():
    cfg = v.Config()
    assert (cfg.alpha, cfg.sequences, cfg.shift, cfg.batch_size, cfg.lr) == (10, 2000, 8, 256, 1e-3)
    assert v.segment_frames(cfg) == 20 == v.segment_frames(v.Config(**v.TOY)) and v.VARIANCE == 0.25
    assert cfg.win == cfg.n_fft == 0.025 * cfg.sample_rate and cfg.hop == 0.010 * cfg.sample_rate
    (group,) = v.make_optimizers(v.Model(cfg, 2), cfg)["autoencoder"].param_groups
    assert (
        group["betas"] == (0.95, 0.999)
        and group["lr"] == 1e-3
        and group["eps"] == 1e-8
        and not group["weight_decay"]
    )


def test_initial_weights():
    """Biases 0, the forget gate's sum of both biases 1; Xavier's limit for every matrix."""
    model = v.Model(v.Config(**TINY), 3)
    for net in (model.z2_encoder, model.z1_encoder, model.decoder):
        for layer in range(2):
            bias = getattr(net.lstm, f"bias_ih_l{layer}") + getattr(net.lstm, f"bias_hh_l{layer}")
            assert bias.tolist() == [0] * 12 + [1] * 12 + [0] * 24
        assert not net.mu.bias.any() and not net.log_var.bias.any()
        for p in net.parameters():
            if p.dim() == 2:
                limit = (6 / sum(p.shape)) ** 0.5
                assert 0.8 * limit < p.abs().max() <= limit
    table = v.Model(v.Config(sequences=5000), 2).table
    assert abs(table.mean()) < 0.02 and abs(table.std() - 1) < 0.02


def test_log_variance_of_the_output_is_bounded():
    """D1: on silence the likelihood has no bound else. Only from below."""
    net = tiny().decoder
    net.log_var.bias.data.fill_(-50)
    assert (net(torch.zeros(1, 3), torch.zeros(1, 5), 20)[1] == -6).all()
    net.log_var.bias.data.fill_(50)
    assert (net(torch.zeros(1, 3), torch.zeros(1, 5), 20)[1] > 40).all()


def test_decoder_is_causal():
    """Every frame has the same input, and nothing is fed back: 40 frames begin with the 20."""
    net, z1, z2 = tiny().decoder, torch.randn(2, 3), torch.randn(2, 5)
    close(net(z1, z2, 40)[0][:, :20], net(z1, z2, 20)[0], 1e-5)


def test_latents_of_different_sizes_and_a_batch_of_one():
    model, x = tiny(d_z1=2, d_z2=7), torch.randn(1, 20, 101)
    terms = v.objective(model, x, torch.tensor([3]), torch.tensor([4]), model.table)
    assert {term.shape for term in terms.values()} == {(1,)}
    assert model.z1_encoder.lstm.input_size == 101 + 7


# -------------------- features and segments --------------------
def test_log_magnitude_against_numpy():
    """Natural log of |DFT| of a Hann window round sample t * hop, DC kept, at least 1e-5."""
    cfg, wave = v.Config(**TINY), torch.randn(1, 1000)
    x = v.log_magnitude(wave, cfg)[0]
    assert x.shape == (13, 101)
    frame = wave[0, 400 - 100 : 400 + 100].numpy() * (
        0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    )
    close(x[5], np.log(np.abs(np.fft.rfft(frame))), 1e-3)
    assert (v.log_magnitude(torch.zeros(1, 1000), cfg) == math.log(1e-5)).all()


def test_statistics_are_of_the_training_set():
    corpus = Stub(LENGTHS)
    model, _, cfg = started(corpus)
    frames = torch.cat([v.log_magnitude(corpus.wave(u)[None], cfg)[0] for u in corpus.train])
    close(model.mean, frames.mean(0), 1e-4)
    close(model.std, frames.std(0, correction=0), 1e-4)
    x = torch.cat([model.features(corpus.wave(u)[None])[0] for u in corpus.train])
    close(x.mean(0), torch.zeros(101), 1e-3)
    close(x.std(0, correction=0), torch.ones(101), 1e-3)


def test_a_constant_bin_has_a_deviation():
    corpus = Stub(LENGTHS)
    corpus.audio.zero_()
    model, _, _ = started(corpus)
    assert (model.std == 0.01).all() and (model.features(corpus.wave(3)[None]) == 0).all()


def test_preemphasis_would_change_nothing():
    """D2: a filter adds the same to every frame of a bin, and the mean takes it away again, but for what a frame sees of the
    sample before it."""
    corpus, cfg = Stub(LENGTHS), v.Config(**TINY)
    wave = torch.cat([corpus.wave(u) for u in corpus.train])
    plain, filtered = (
        v.log_magnitude(w[None], cfg)[0] for w in (wave[1:], wave[1:] - 0.97 * wave[:-1])
    )

    def tidy(x):
        return (x - x.mean(0)) / x.std(0)

    distance = (tidy(plain) - tidy(filtered))[:, 1:].abs().mean()
    assert distance < 0.1, distance


def test_training_segments_are_frames_of_the_utterance():
    """No frame of a segment sees the edge of its crop; the place is random, each draw another."""
    corpus = Stub((8000,) * 3, held=0)
    model, _, cfg = started(corpus)
    drawn = v.segments(model, corpus, cfg, 0, 0, np.array([0, 1, 2, 0]))
    again = v.segments(model, corpus, cfg, 0, 1, np.array([0, 1, 2, 0]))
    assert (
        drawn.shape == (4, 20, 101)
        and not torch.equal(drawn, again)
        and not torch.equal(drawn[0], drawn[3])
    )
    assert torch.equal(drawn, v.segments(model, corpus, cfg, 0, 0, np.array([0, 1, 2, 0])))
    rng = np.random.default_rng((0, 0, 0, 0))
    first = rng.integers(np.full(4, 8000 - 1840 + 1))
    for row, u, at in zip(drawn, (0, 1, 2, 0), first):
        x = model.features(corpus.wave(u)[None, at - 800 if at >= 800 else at % 80 :])[
            0
        ]  # begins elsewhere
        place = 12 if at >= 800 else 2 + at // 80
        close(row, x[place : place + 20], 1e-4)


@pytest.mark.parametrize("crop", [100, 319])
def test_a_crop_that_holds_no_frame(crop):
    """Of 319 samples there are four frames, but none of them has its whole window inside."""
    with pytest.raises(v.UserError, match=f"--crop {crop}: no frame"):
        started(Stub(LENGTHS), crop=crop)
    assert v.segment_frames(v.Config(**TINY | {"crop": 320})) == 1


def test_tile():
    """Segments end to end, the tail dropped; what is too short is repeated."""
    model, x = tiny(), torch.arange(47.0)[:, None].expand(-1, 101)
    assert model.tile(x)[..., 0].tolist() == [list(range(20)), list(range(20, 40))]
    assert model.tile(x[:15])[0, :, 0].tolist() == [*range(15), *range(5)]
    counts = [len(model.tile(x.repeat(7, 1)[:n])) for n in (20, 27, 28, 39, 40, 100, 300)]
    assert counts == [1, 1, 1, 1, 2, 5, 15]


# -------------------- the objective --------------------
def test_kl_and_density_are_those_of_torch():
    m, log_var, p, x = torch.randn(4, 9)
    posterior = Normal(m, (log_var / 2).exp())
    close(v.kl_to_normal(m, log_var, p, 0.25), kl_divergence(posterior, Normal(p, 0.5)), 1e-5)
    close(v.log_normal(x, m, log_var), posterior.log_prob(x), 1e-5)


def test_closed_form_is_the_maximum():
    z = torch.randn(7, 2, dtype=torch.float64)
    mu = v.closed_form(z.sum(0), 7).requires_grad_()
    (Normal(mu, 0.5).log_prob(z).sum() + Normal(0.0, 1.0).log_prob(mu).sum()).backward()
    close(mu.grad, [0, 0], 1e-9)


def test_log_posterior_is_the_naive_one_and_invariant():
    m2, table = torch.randn(6, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    naive = (-(m2[:, None] - table).square().sum(-1) / (2 * 0.25)).log_softmax(1)
    turn, move = (
        torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0],
        torch.randn(5, dtype=torch.float64),
    )
    close(v.log_posterior(m2, table), naive, 1e-9)
    close(v.log_posterior((m2 + move) @ turn, (table + move) @ turn), naive, 1e-9)
    l2, y = torch.randn(6, 1, dtype=torch.float64).expand(6, 5), torch.tensor([0, 3, 3, 1, 8, 2])

    def kl(m2, table):
        return v.kl_to_normal(m2, l2, table[y], 0.25).sum(1)

    close(kl((m2 + move) @ turn, (table + move) @ turn), kl(m2, table), 1e-9)


def test_log_posterior_makes_no_large_tensor():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            self.size = max(
                self.size,
                *(
                    t.numel()
                    for t in (out if isinstance(out, tuple) else (out,))
                    if isinstance(t, torch.Tensor)
                ),
                0,
            )
            return out

    table = torch.randn(300, 32, requires_grad=True)
    with Largest() as largest:
        v.log_posterior(torch.randn(64, 32, requires_grad=True), table)[:, 0].sum().backward()
    assert 0 < largest.size <= 64 * 300


def test_gradient_reaches_everything():
    """Nothing is cut off by a detach. With alpha, rows outside the batch too, without only those in it."""
    model, x, y = tiny(), torch.randn(4, 20, 101), torch.tensor([0, 2, 2, 0])
    model.table.data.mul_(0.1)
    for alpha, rows in ((10, [True] * 4), (0, [True, False, True, False])):
        model.zero_grad()
        terms = v.objective(model, x, y, 5, model.table)
        (terms["bound"] + alpha * terms["log_qy"]).sum().backward()
        assert all(p.grad.abs().max() > 0 for p in model.parameters())
        assert model.table.grad.abs().sum(1).gt(0).tolist() == rows


def test_the_posterior_of_z2_knows_neither_table_nor_row():
    model, x, y = tiny(), torch.randn(3, 20, 101), torch.tensor([0, 1, 2])
    results = []
    for table, rows, n in ((model.table, y, 5), (torch.randn(9, 5), 8 - y, 70)):
        torch.manual_seed(1)
        results.append(v.objective(model, x, rows, n, table))
    assert torch.equal(results[0]["log_px"], results[1]["log_px"]) and torch.equal(
        results[0]["kl_z1"], results[1]["kl_z1"]
    )
    assert not torch.isclose(results[0]["kl_z2"], results[1]["kl_z2"]).any()


# -------------------- hierarchical sampling --------------------
def test_a_pass():
    """K distinct training utterances, rows 0..K-1 of the table, each as often as it has segments, shuffled."""
    corpus, cfg = Stub(LENGTHS), v.Config(**TINY)
    seen = set()
    for number in range(20):
        sequences, segments, order = v.draw_pass(corpus, cfg, number)
        assert len(set(sequences)) == 4 and set(sequences) <= set(corpus.train)
        assert segments.tolist() == [max(0, 1 + LENGTHS[u] // 80 - 20) // 8 + 1 for u in sequences]
        assert (
            np.bincount(order, minlength=4).tolist() == segments.tolist()
            and (np.diff(order) < 0).any()
        )
        seen |= {tuple(sequences), tuple(order)}
        assert all(
            map(np.array_equal, v.draw_pass(corpus, cfg, number), (sequences, segments, order))
        )
    assert len(seen) == 40 and set().union(
        *(v.draw_pass(corpus, cfg, i)[0] for i in range(20))
    ) == set(corpus.train)
    first, other = v.draw_pass(corpus, cfg, 0), v.draw_pass(corpus, replace(cfg, seed=1), 0)
    assert not np.array_equal(first[2], other[2])
    crops = np.random.default_rng((0, 0, 0, 0))  # the stream of get_batch in step 0
    assert not np.array_equal(first[0], crops.choice(corpus.train, 4, replace=False))


def spied(monkeypatch):
    """-> the segments that are drawn: [(step, draw, utterances, x)]"""
    drawn, segments = [], v.segments

    def spy(model, corpus, cfg, step, draw, utterances):
        drawn.append((step, draw, utterances, segments(model, corpus, cfg, step, draw, utterances)))
        return drawn[-1][3]

    monkeypatch.setattr(v, "segments", spy)
    return drawn


def test_the_table_is_filled_by_the_closed_form(monkeypatch):
    """From N random segments of each sequence, with the network as it is; not those that are then learned from."""
    drawn, corpus = spied(monkeypatch), Stub(LENGTHS)
    model, optimizers, cfg = started(corpus, seed=3)
    ((step, draw, utterances, x),) = drawn
    sequences, segments, order = v.draw_pass(corpus, cfg, 0)
    assert sequences.tolist() != sorted(sequences) and len(set(segments)) > 2
    assert draw > 0 and len(x) == segments.sum()
    m2 = model.z2_encoder(x)[0]
    for row, u in enumerate(sequences):
        mine = m2[utterances == u]
        assert len(mine) == segments[row]
        close(model.table[row], mine.sum(0) / (len(mine) + 0.25), 1e-5)
    table, objective, rows = model.table.clone(), v.objective, []
    monkeypatch.setattr(
        v,
        "objective",
        lambda model, x, y, n, table: (
            rows.append((x, y, n, len(table))) or objective(model, x, y, n, table)
        ),
    )
    v.train_step(model, optimizers, corpus, 0, cfg)
    ((x, y, n, K),) = rows
    assert (
        np.array_equal(drawn[1][2], sequences[order[:6]])
        and torch.equal(x, drawn[1][3])
        and drawn[1][1] == 0
    )
    assert y.tolist() == order[:6].tolist() and n.tolist() == segments[y].tolist() and K == 4
    assert not any(torch.equal(a, b) for a in drawn[0][3] for b in x)
    assert (model.table != table).any(1).all()


def test_passes_follow_each_other(monkeypatch):
    """Every segment of a pass once, but for the rest that fills no batch; then other sequences and a refilled table."""
    drawn, corpus = spied(monkeypatch), Stub(LENGTHS)
    model, optimizers, cfg = started(corpus)
    step, begun = 0, []
    for number in range(4):
        sequences, segments, order = v.draw_pass(corpus, cfg, number)
        for i in range(len(order) // 6):
            before = len(drawn)
            v.train_step(model, optimizers, corpus, step, cfg)
            assert all(d[0] == step for d in drawn[before:]) and drawn[-1][1] == 0
            assert model.progress.tolist() == [number, step - i]
            assert np.array_equal(drawn[-1][2], sequences[order[6 * i : 6 * i + 6]])
            assert len(drawn) - before == 1 + (
                i == 0 and number > 0
            )  # the first fill was prepare's
            step += 1
        begun.append(tuple(sequences))
    assert len(set(begun)) == 4


def test_a_table_of_many_segments_is_filled_in_parts(monkeypatch):
    """2048 at a time, each part of other draws; and a table for all but one is filled too."""
    drawn, corpus = spied(monkeypatch), Stub((400_000,) * 5, held=0)
    model, _, cfg = started(corpus, sequences=4, hidden=4, layers=1)
    assert [len(x) for *_, x in drawn] == [2048, 4 * 623 - 2048] and drawn[0][1] != drawn[1][1]
    sequences = v.draw_pass(corpus, cfg, 0)[0]
    m2 = torch.cat([model.z2_encoder(x)[0] for *_, x in drawn])
    for row, u in enumerate(sequences):
        mine = m2[np.concatenate([us for *_, us, _ in drawn]) == u]
        close(model.table[row], mine.sum(0) / 623.25, 1e-4)


def test_ranks_share_a_pass(monkeypatch):
    """Two processes: in each step other segments of the same pass; a pass is over when both have had theirs. The table is the
    average of theirs."""
    corpus, given = Stub(LENGTHS), {}
    monkeypatch.setattr(v, "WORLD_SIZE", 2)
    objective = v.objective
    for rank in (0, 1):
        monkeypatch.setattr(v, "RANK", rank)
        rows = given[rank] = []
        monkeypatch.setattr(
            v,
            "objective",
            lambda model, x, y, n, table: rows.append(y) or objective(model, x, y, n, table),
        )
        model, optimizers, cfg = started(corpus, batch_size=2)
        order = v.draw_pass(corpus, cfg, 0)[2]
        steps = len(order) // 4
        for step in range(steps + 1):
            v.train_step(model, optimizers, corpus, step, cfg)
            assert model.progress.tolist() == ([0, 0] if step < steps else [1, steps])
    both = torch.cat([torch.cat([a, b]) for a, b in zip(given[0][:-1], given[1][:-1])])
    assert both.tolist() == order[: 4 * steps].tolist() and steps > 2
    tables = []
    for together in (False, True):
        torch.manual_seed(7)
        monkeypatch.setattr(v.dist, "is_initialized", lambda: together)
        monkeypatch.setattr(
            v.dist, "all_reduce", lambda x: x.mul_(2).add_(1)
        )  # the sum with such another rank
        tables.append(started(corpus)[0].table)
    close(tables[1], tables[0] + 1, 1e-6)


def test_a_pass_of_exactly_one_batch():
    corpus = Stub((80 * 27,) * 7, held=1)  # two segments each
    model, optimizers, cfg = started(corpus, sequences=3)
    for step in range(3):
        v.train_step(model, optimizers, corpus, step, cfg)
        assert model.progress.tolist() == [step, step]


def test_a_table_for_all_sequences_is_the_training_of_2017():
    """Rows keep their meaning, begin at N(0, 1) and are never refilled; rows beyond the utterances do not compete."""
    corpus = Stub(LENGTHS)
    for K in (7, 50):
        torch.manual_seed(3)
        model, optimizers, cfg = started(corpus, sequences=K)
        torch.manual_seed(3)
        assert torch.equal(model.table, v.Model(cfg, 3).table)
        spare = model.table[7:].clone()
        passes = []
        for step in range(60):
            before = model.table.clone()
            v.train_step(model, optimizers, corpus, step, cfg)
            assert (model.table - before).abs().max() < 5 * cfg.lr  # Adam's step, no refill
            passes.append(model.progress[0].item())
        assert passes[-1] >= 2 and torch.equal(model.table[7:], spare)
        assert all(np.array_equal(v.draw_pass(corpus, cfg, i)[0], corpus.train) for i in range(3))


def test_the_label_is_the_utterance_never_the_speaker():
    """Training does not know the speakers."""
    states = []
    for speaker in (None, [0] * 9):
        torch.manual_seed(5)
        corpus = Stub(LENGTHS, speaker)
        model, optimizers, cfg = started(corpus)
        for step in range(3):
            torch.manual_seed(step)
            v.train_step(model, optimizers, corpus, step, cfg)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))


def test_too_few_segments_for_a_batch():
    corpus = Stub((2000,) * 5)
    model, optimizers, cfg = started(corpus)
    with pytest.raises(
        v.UserError, match="3 segments fill no batch; lower --batch-size or raise --sequences"
    ):
        v.train_step(model, optimizers, corpus, 0, cfg)


def test_one_step_is_adams_on_the_loss():
    """Gradients are those of this step alone, and of -(bound + alpha log q(y))."""
    corpus = Stub(LENGTHS)
    model, optimizers, cfg = started(corpus, seed=3, alpha=3.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e3)  # to be zeroed
    sequences, segments, order = v.draw_pass(corpus, cfg, 0)
    x, y = v.segments(model, corpus, cfg, 0, 0, sequences[order[:6]]), torch.from_numpy(order[:6])
    torch.manual_seed(9)
    terms = v.objective(model, x, y, torch.from_numpy(segments)[y], model.table)
    loss = -(terms["bound"] + 3 * terms["log_qy"]).mean()
    expected = torch.autograd.grad(loss, [*model.parameters()])
    torch.manual_seed(9)
    log = v.train_step(model, optimizers, corpus, 0, cfg)
    close(log["loss"], loss.detach(), 1e-4)
    for name, term in terms.items():
        close(log[name], term.mean().detach(), 1e-4)
    for p, grad in zip(model.parameters(), expected):
        close(p.grad, grad, 1e-4)


def test_nothing_runs_in_bfloat16(monkeypatch):
    """Autocast on CUDA is off inside of a step, where it would run the LSTMs in float16."""
    corpus = Stub(LENGTHS)
    model, optimizers, cfg = started(corpus)
    objective, seen = v.objective, []

    def spy(*given):
        seen.append(torch.is_autocast_enabled())
        return objective(*given)

    monkeypatch.setattr(v, "objective", spy)
    torch.set_autocast_enabled(True)
    try:
        log = v.train_step(model, optimizers, corpus, 0, cfg)
        assert torch.is_autocast_enabled() and seen == [False]
    finally:
        torch.set_autocast_enabled(False)
    assert all(value.dtype == torch.float32 for value in log.values())


def test_overfits_a_few_utterances():
    corpus = Stub(LENGTHS)
    model, optimizers, cfg = started(corpus, lr=5e-3, hidden=24, batch_size=16, sequences=7)
    logs = [v.train_step(model, optimizers, corpus, step, cfg) for step in range(100)]
    first, last = (
        {k: np.mean([log[k] for log in part]) for k in logs[0]} for part in (logs[:10], logs[-10:])
    )
    assert (
        last["log_px"] > first["log_px"] + 250
        and last["log_qy"] > first["log_qy"] + 1
        and last["bound"] > first["bound"] + 250
    )


# -------------------- what it is good for --------------------
def test_represent_covers_the_utterance():
    """ceil(L / shift) vectors, evenly spread, of the segment round each; near the ends the first and last one again. With
    shift 1 these are 9 copies before and 10 after."""
    model, wave = tiny(shift=1), 0.1 * torch.randn(4000)
    x = model.features(wave[None])[0]  # (51, F)
    got = v.represent(model, wave, model.cfg)
    z1, z2 = model.encode(torch.stack([x[i : i + 20] for i in range(32)]))

    def pad(z):
        return torch.cat([z[:1].expand(9, -1), z, z[-1:].expand(10, -1)])

    close(got["z1"], pad(z1), 1e-5)
    close(got["z2"], pad(z2), 1e-5)
    sparse = tiny(shift=8)
    sparse.load_state_dict(model.state_dict())
    other = v.represent(sparse, wave, sparse.cfg)
    close(other["z1"], got["z1"][[3, 10, 18, 25, 32, 40, 47]], 1e-5)  # 51 / 7 (i + 1 / 2)
    assert (
        other["z1"].shape == (7, 3)
        and other["z2"].shape == (7, 5)
        and torch.equal(other["mu2"], got["mu2"])
    )
    mu1, mu2 = model.summary(x)
    assert list(got) == ["z1", "z2", "mu1", "mu2"]
    close(got["mu1"], mu1, 1e-5)
    close(got["mu2"], mu2, 1e-5)
    assert all(
        torch.equal(x, y)
        for x, y in zip(v.represent(model, wave, model.cfg).values(), got.values())
    )


def test_codes_are_means():
    """z2 = m2, z1 = m1(x, m2): nothing is sampled."""
    model, x = tiny(), torch.randn(7, 20, 101)
    z1, z2 = model.encode(x)
    close(z2, model.z2_encoder(x)[0])
    close(z1, model.z1_encoder(x, z2)[0])


def test_s_vector():
    """The closed form over tiles, the same formula for mu1; blind to the order of segments and to the last frames."""
    model, x = tiny(), torch.randn(73, 101)
    mu1, mu2 = model.summary(x)
    z1, z2 = model.encode(x[:60].view(3, 20, 101))
    close(mu2, z2.sum(0) / 3.25, 1e-6)
    close(mu1, z1.sum(0) / 3.25, 1e-6)
    close(model.summary(torch.cat([x[20:60], x[:20]]))[1], mu2, 1e-6)


def test_rebuild_slides_by_one_frame():
    """The first segment gives 20 frames, each later one its last; z2 of every segment is moved, not replaced."""
    model, x, shift = tiny(), torch.randn(31, 101), torch.randn(5)
    frames = []
    for i in range(12):
        m2 = model.z2_encoder(x[None, i : i + 20])[0]
        y = model.decoder(model.z1_encoder(x[None, i : i + 20], m2)[0], m2 + shift, 20)[0][0]
        frames += [*y] if not i else [y[-1]]
    close(model.rebuild(x, shift), torch.stack(frames), 1e-5)
    assert model.rebuild(x[:7]).shape == (7, 101) and model.rebuild(x[:20]).shape == (20, 101)
    long, small = torch.randn(2100, 101), tiny(hidden=4)  # more segments than go in at once
    close(small.rebuild(long)[2060:], small.rebuild(long[2041:])[19:], 1e-5)
    assert small.rebuild(long).shape == (2100, 101)


def test_conversion_moves_z2_by_the_difference_of_s_vectors(monkeypatch):
    model, cfg = tiny(), v.Config(**TINY)
    a, b = 0.1 * torch.randn(4000), 0.1 * torch.randn(6000).cumsum(0).sin()
    shifts, rebuild = [], model.rebuild
    monkeypatch.setattr(
        model, "rebuild", lambda x, shift: shifts.append(shift) or rebuild(x, shift)
    )
    to_b, back, same, none = v.convert(model, [a, b, a, a], [b, a, a, None], cfg)

    def mu(w):
        return v.represent(model, w, cfg)["mu2"]

    close(shifts[0], mu(b) - mu(a), 1e-6)
    close(shifts[0] + shifts[1], torch.zeros(5), 1e-6)
    assert torch.equal(same, none) and len(to_b) == 4000 and len(back) == 6000
    assert not torch.allclose(to_b, same, atol=1e-3)


def test_vocode_undoes_features():
    model, wave = tiny(), v.griffin_lim(torch.rand(1, 40, 101), v.Config(**TINY))
    x = model.features(wave)[0]
    y = model.features(model.vocode(x[None], wave.shape[1]))[0]
    loud = x * model.std + model.mean > 0
    assert ((x - y) * model.std)[loud].abs().mean() < 0.15


def test_vocode_gives_as_many_samples_as_asked(monkeypatch):
    """The last frame once more, for what lies behind it; the spectrum in between is exp of the features."""
    model, x, seen = tiny(), torch.randn(1, 9, 101), []
    monkeypatch.setattr(
        v, "griffin_lim", lambda magnitude, cfg: seen.append(magnitude) or torch.arange(720.0)[None]
    )
    assert torch.equal(model.vocode(x, 700), torch.arange(700.0)[None])
    close(seen[0][:, :9], (x * model.std + model.mean).exp(), 1e-5)
    assert torch.equal(seen[0][0, 9], seen[0][0, 8]) and seen[0].shape == (1, 10, 101)


@pytest.mark.parametrize("samples", [201, 250, 4079, 4080, 4081])
def test_any_length_goes_in_and_comes_out(samples):
    model, wave = tiny(), 0.1 * torch.randn(samples)
    for target in (None, 0.1 * torch.randn(300)):
        (out,) = v.convert(model, [wave], [target], model.cfg)
        assert out.shape == wave.shape and out.isfinite().all()
    assert all(x.isfinite().all() for x in v.represent(model, wave, model.cfg).values())


# -------------------- examples and the bound --------------------
def test_prior(tmp_path, monkeypatch):
    """Ten z2 of variance 0.25 about ONE mu2, and z1 of their own, decoded to 200 frames."""
    model = tiny(d_z1=400, d_z2=300)
    given, decoder = [], model.decoder.forward

    def spy(z1, z2, frames):
        given.append((z1, z2))
        return decoder(z1, z2, frames)

    monkeypatch.setattr(model.decoder, "forward", spy)
    with torch.no_grad():
        v.write_prior(model, model.cfg, tmp_path)
    for z1, z2 in given:
        assert z1.shape == (10, 400) and z2.shape == (10, 300)
        assert abs(z1.std() - 1) < 0.05
        assert abs((z2 - z2.mean(0)).square().sum() / 9 / 300 - 0.25) < 0.02
        assert abs(z2.mean(0).square().mean() - 1 - 0.025) < 0.25
    assert len(given) == 3 and not torch.equal(given[0][0], given[1][0])
    for i in range(3):
        assert len(v.read_audio(tmp_path / f"prior_{i}.wav", 8000)) == 200 * 80


def test_denoised(tmp_path, monkeypatch):
    """White noise 10 dB below the speech, and a clean recording of the same speaker as target."""
    corpus, given = Stub((4000,) * 9, [0, 1, 0, 1, 0, 2, 0, 0, 0], held=6), []

    def convert(model, sources, targets, cfg):
        given.append((sources, targets))
        return [sources[0] / 2]

    monkeypatch.setattr(v, "convert", convert)
    for held, target in ((corpus.held, 4), (corpus.held[:2], 0)):  # u itself if need be
        corpus.held = held
        v.write_denoised(None, corpus, v.Config(**TINY), tmp_path)
        ((noisy,), (recording,)) = given.pop()
        clean = corpus.wave(0)
        assert torch.equal(recording, corpus.wave(target))
        close(20 * torch.log10(clean.std() / (noisy - clean).std()), 10, 0.1)
        for name, wave in {"clean": clean, "noisy": noisy, "denoised": noisy / 2}.items():
            got = v.read_audio(tmp_path / f"noise_{name}.wav", 8000)
            close(got, wave.clamp(-1, 1), 1e-4)


def test_sample_writes_and_returns_the_bound(tmp_path, monkeypatch):
    """Of test utterances, each segment once, with the closed form as mu2 and S of its utterance."""
    corpus = Stub((2400, 4000, 6000, 50, 5000, 3000, 2000, 2000, 2000, 2000, 2000), held=6)
    model, _, cfg = started(corpus)
    objective, bounds = v.objective, []

    def spy(model, x, y, n_segments, table):
        mu2 = model.z2_encoder(x)[0].sum(0) / (len(x) + 0.25)
        close(table[y], mu2.expand(len(x), -1), 1e-5)
        assert n_segments == len(x)
        terms = objective(model, x, y, n_segments, table)
        bounds.append(terms["bound"])
        return terms

    monkeypatch.setattr(v, "objective", spy)
    figures = v.sample(model.eval(), corpus, cfg, tmp_path)
    assert [len(bound) for bound in bounds] == [1, 2, 3, 1, 3, 1]  # (1 + samples // 80) // 20
    assert list(figures) == ["bound"]
    assert figures["bound"] == pytest.approx(torch.cat(bounds).mean().item())
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"prior_{i}.wav" for i in range(3)} | {
        f"noise_{name}.wav" for name in ("clean", "noisy", "denoised")
    }


# -------------------- it learns --------------------
def test_a_short_run_separates():
    """24 voices (a fixed colour each) saying noise that changes five times a second. After 200 steps the s-vector tells unseen
    utterances' voices apart, z1's mean does not, as after the paper; the untrained model's vectors say as much of both."""
    rng, t = np.random.default_rng(0), np.arange(6400) / 8000
    corpus = Stub((6400,) * 120, np.arange(120) % 24, held=48)
    waves = []
    for u in range(120):
        colour = np.random.default_rng(u % 24).normal(0, 0.8, 9)
        gain = np.interp(np.linspace(0, 8, 3201), np.arange(9), colour)
        noise = rng.standard_normal(6400) * np.repeat(rng.uniform(0.2, 1, 4), 1600)
        tone = sum(
            np.sin(2 * np.pi * np.repeat(rng.uniform(300, 3000, 4), 1600) * t) for _ in range(2)
        )
        waves.append(0.05 * np.fft.irfft(np.fft.rfft(noise + 3 * tone) * np.exp(gain), 6400))
    corpus.audio = torch.from_numpy(
        (np.concatenate(waves) * 32768).clip(-32768, 32767).astype(np.int16)
    )
    model, optimizers, cfg = started(
        corpus, hidden=32, layers=1, d_z1=8, d_z2=8, sequences=36, batch_size=64, lr=3e-3
    )
    who = torch.from_numpy(corpus.speaker[corpus.held])

    def rates():
        mus = [model.summary(model.features(corpus.wave(u)[None])[0]) for u in corpus.held]
        return [measure.equal_error_rate(torch.stack(mu), who) for mu in zip(*mus)]

    with torch.no_grad():
        before = rates()
    for step in range(200):
        v.train_step(model, optimizers, corpus, step, cfg)
    with torch.no_grad():
        mu1, mu2 = rates()
    assert mu2 < 0.12 and mu1 > mu2 + 0.15 and mu2 < before[1] - 0.1


@GPU
def test_cuda_equals_cpu():
    model, x = tiny(), torch.randn(4, 20, 101)
    expected = model.encode(x)
    got = model.cuda().encode(x.cuda())
    for a, b in zip(got, expected):
        close(a.cpu(), b, 1e-3)
    corpus = Stub(LENGTHS)
    model, optimizers, cfg = started(corpus, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):  # switched off inside
        log = v.train_step(model, optimizers, corpus, 0, cfg)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in log.values())
