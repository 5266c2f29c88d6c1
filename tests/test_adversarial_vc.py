# SPDX-License-Identifier: MIT
"""Checks of adversarial_vc.py: golden values of the authors' networks and training steps, closed
forms for what those do not cover, and one short run."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import adversarial_vc as v

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


def weights(model):
    """All weights of each network, as one vector."""
    return {
        name: nn.utils.parameters_to_vector(getattr(model, name).parameters()).detach()
        for name in NETS
    }


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


# -------------------- golden values --------------------
GOLDEN = json.loads((Path(__file__).parent / "golden" / "adversarial_vc.json").read_text())
STEPS = {step["step"]: step for step in GOLDEN["training"]["steps"]}
SPEAKER, TARGET = (torch.tensor(GOLDEN["inputs"][name]) for name in ("speaker", "aim"))


def formula(k, shape, scale):
    """Numbers in [-scale, scale] that are the same on every machine; `formula` in the file."""
    P, A, B = 2147483647, 1103515245, 1812433253
    i = torch.arange(math.prod(shape))
    h = ((i * i % P) * A + ((i + 1) * (k + 1) % P) * B) % P
    return (scale * (2 * h.double() / P - 1)).view(shape)


def sampled(tensor, index, expected):
    """The entries at flat indices are the golden ones, to 1e-9 relative."""
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(tensor.detach().flatten()[index], expected, rtol=1e-9, atol=0)


def agrees(ours, name):
    """Sampled entries, mean and mean square of an output."""
    expected = GOLDEN["outputs"][name]
    assert list(ours.shape) == expected["shape"]
    sampled(ours, expected["index"], expected["value"])
    assert ours.mean().item() == pytest.approx(expected["mean"], rel=1e-9)
    assert ours.square().mean().item() == pytest.approx(expected["mean_square"], rel=1e-9)


@pytest.fixture(scope="module")
def authors():
    """The model of full size in float64, without dropout, with the weights of the golden file (none
    is zero at the start: D6), the place of every parameter in that file, and x."""
    model = v.Model(v.Config(device="cpu"), 20).double().eval()
    places = {}
    for k, parameter in enumerate(model.parameters()):
        _, shape, scale = GOLDEN["layers"][k]
        parameter.data = formula(k, shape, scale).view(parameter.shape)
        places[parameter] = str(k)
    assert k + 1 == len(GOLDEN["layers"])
    frames = torch.arange(128) // 8
    x = 0.5 + formula(1001, (2, 128, 513), 0.1) + formula(1002, (2, 16, 513), 0.4)[:, frames]
    return model, places, x


def test_networks_against_the_authors(authors, monkeypatch):
    """All five networks, and conversion by both stages; D4: of the 40 frames that the authors'
    decoders return for 37, ours keeps 37."""
    model, _, x = authors
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    with torch.no_grad():
        z = model.encoder(x)
        agrees(z, "T128_z")
        agrees(model.decoder(z, SPEAKER), "T128_decoder")
        agrees(model.generator(z, TARGET), "T128_generator")
        agrees(model.classifier(z), "classifier_1_logits")
        value, logits = model.critic(x)
        agrees(value, "critic_value")
        agrees(logits, "classifier_2_logits")
        z = model.encoder(x[:, :37])
        agrees(z, "T37_z")
        agrees(model.decode(z, TARGET, 37, stage=2), "T37_converted")


def test_steps_against_the_authors(authors, monkeypatch):
    """Each kind of step from the same weights: losses, gradients, clipping of each network by
    itself, Adam, and that nothing else moves."""
    model, places, x = authors
    cfg = model.cfg
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "randint", lambda *size, **options: TARGET)
    mix = torch.tensor(GOLDEN["inputs"]["mix"], dtype=torch.float64).view(2, 1, 1)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: mix)
    norms = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)))

    weight = STEPS["auto-encoder against classifier-1"]["weight"]
    runs = {
        "auto-encoder against classifier-1": lambda optimizers: v.autoencoder_step(
            model, optimizers, x, SPEAKER, weight, cfg
        ),
        "classifier-1": lambda optimizers: v.classifier_step(model, optimizers, x, SPEAKER, cfg),
        "critic and classifier-2": lambda optimizers: v.critic_step(
            model, optimizers, x, SPEAKER, cfg
        ),
        "generator": lambda optimizers: v.generator_step(model, optimizers, x, cfg),
    }
    losses = {
        "reconstruction_loss": "reconstruction",
        "classifier_loss": "cross_entropy_1",
        "critic_distance": "distance",
        "penalty": "penalty",
        "classifier_2_loss": "cross_entropy_2",
        "generator_classifier_2_loss": "cross_entropy_2",
    }
    for name, run in runs.items():
        golden = STEPS[name]
        networks = {n: getattr(model, n.split("-")[0]) for n in golden["networks"]}
        before = {p: p.detach().clone() for net in networks.values() for p in net.parameters()}
        model.zero_grad()
        norms.clear()
        log = run(v.make_optimizers(model, cfg))

        for ours, theirs in losses.items():
            if ours in log:
                assert log[ours].item() == pytest.approx(golden[theirs], rel=1e-9)
        expected_norms = golden["gradient_norm_before_clipping"].values()
        assert [norm.item() for norm in norms] == pytest.approx([*expected_norms], rel=1e-9)
        with_gradient = {p for p in model.parameters() if p.grad is not None}
        assert with_gradient == set(before)

        for network, expected in golden["networks"].items():
            parameters = list(networks[network].parameters())
            norm = torch.stack([p.grad.norm() for p in parameters]).norm().item()
            assert norm == pytest.approx(expected["gradient_norm"], rel=1e-9)
            moved = torch.cat([(p.detach() - before[p]).flatten() for p in parameters])
            assert moved.mean().item() == pytest.approx(expected["moved"]["mean"], rel=1e-9)
            mean_square = expected["moved"]["mean_square"]
            assert moved.square().mean().item() == pytest.approx(mean_square, rel=1e-9)
            for p in parameters:
                if places[p] in expected["tensors"]:
                    tensor = expected["tensors"][places[p]]
                    sampled(p.grad, tensor["index"], tensor["gradient"])
                    sampled(p, tensor["index"], tensor["weight"])
        for p, weights in before.items():
            p.data = weights


# -------------------- the networks --------------------
def test_sizes_of_the_authors(authors):
    """Their configuration with 20 speakers: parameters of each network, and the settings."""
    model, _, _ = authors
    sizes = [sum(p.numel() for p in getattr(model, name).parameters()) for name in NETS]
    assert sizes == [12_366_208, 10_417_153, 8_400_276, 10_919_605, 10_417_153]
    cfg = v.Config()
    assert cfg.crop // cfg.hop == 128 and cfg.steps == 8000 + 20000 + 80000 + 50000
    assert (cfg.sample_rate, cfg.n_fft, cfg.win, cfg.hop) == (16000, 1024, 800, 200)
    assert (cfg.batch_size, cfg.lr, cfg.generator_lr, cfg.clip) == (32, 1e-4, 1e-4, 5)
    assert (cfg.adversary, cfg.penalty) == (0.01, 10)
    assert (cfg.classifier_steps, cfg.critic_steps) == (5, 5)
    assert (cfg.dropout, cfg.classifier_dropout, cfg.instance_norm) == (0.5, 0.3, True)


@pytest.mark.parametrize("T", [1, 3, 8, 9, 10, 16, 17, 23, 40, 100, 127, 128, 129])
def test_lengths(T):
    """D4: z has ceil(T / 8) frames, 2 at least, and the decoder's output is cut to T."""
    model, _ = tiny()
    speaker = torch.tensor([0, 1])
    z = model.encoder(torch.rand(2, T, 33))
    latent_frames = max(2, math.ceil(T / 8))
    assert z.shape == (2, latent_frames, 16)
    assert model.decoder(z, speaker).shape == (2, 8 * latent_frames, 33)
    for stage in (1, 2):
        assert model.decode(z, speaker, T, stage).shape == (2, T, 33)


def test_short_input_is_repeated():
    """D4: too few frames to mirror are repeated, in order; a long bank needs more of them."""
    model, _ = tiny()
    x = torch.rand(2, 3, 33)
    close(model.encoder(x), model.encoder(x.repeat(1, 4, 1)), 1e-6)
    model, _ = tiny(bank=24)
    x = torch.rand(1, 4, 33)
    close(model.encoder(x), model.encoder(x.repeat(1, 8, 1)), 1e-6)


def test_dropout_is_where_the_authors_have_it():
    """After each norm of the encoder, of classifier-1 and of the critic, in training alone."""
    model, _ = tiny(dropout=0.5, classifier_dropout=0.3)

    def rates(net, kind):
        return [m.p for m in net.modules() if type(m) is kind]

    assert rates(model.encoder, nn.Dropout) == [0.5] * 6
    assert rates(model.classifier, nn.Dropout) == [0.3] * 4
    assert rates(model.critic, nn.Dropout2d) == [0.1] * 6
    assert rates(model.decoder, nn.Dropout) == rates(model.generator, nn.Dropout) == []
    x = torch.rand(2, 40, 33)
    assert not torch.equal(model.encoder(x), model.encoder(x))
    model.eval()
    assert torch.equal(model.encoder(x), model.encoder(x))


def test_instance_norm_switch_changes_the_encoder_alone():
    def count(net):
        return sum(isinstance(m, (nn.InstanceNorm1d, nn.InstanceNorm2d)) for m in net.modules())

    for switch, expected in (True, [6, 0, 4, 6, 0]), (False, [0, 0, 4, 6, 0]):
        model, _ = tiny(instance_norm=switch)
        assert [count(getattr(model, name)) for name in NETS] == expected


def test_another_length_than_that_of_training_is_an_error():
    """D4: with segments of 128 frames classifier-1 takes 121 to 128 of them and the critic 97 to
    128, as the authors' do. The error names both lengths."""
    model, _ = tiny(crop=128 * 40)
    for T in (121, 128):
        assert model.classifier(model.encoder(torch.rand(2, T, 33))).shape == (2, 3)
    for T in (97, 128):
        value, logits = model.critic(torch.rand(2, T, 33))
        assert value.shape == (2,) and logits.shape == (2, 3)
    for T, latent_frames in (120, 15), (129, 17):
        with pytest.raises(ValueError, match=rf"\({latent_frames},\) .* \(16,\)"):
            model.classifier(model.encoder(torch.rand(2, T, 33)))
    for T, map_frames in (96, 3), (129, 5):
        with pytest.raises(ValueError, match=rf"\(2, {map_frames}\) .* \(2, 4\)"):
            model.critic(torch.rand(2, T, 33))
    model, _ = tiny(crop=100 * 40, n_fft=128)  # neither is a multiple of 32
    assert model.critic(torch.rand(2, 100, 65))[1].shape == (2, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(crop=1280), "the critic needs 33"),
        (dict(n_fft=32, win=32, hop=16), "the critic needs 33"),
        (dict(channels=6), "--channels must be a multiple of 4"),
        (dict(critic_channels=1), "--critic-channels of 2"),
        (dict(dropout=1.0), "must be below 1"),
        (dict(classifier_dropout=2.0), "must be below 1"),
        (dict(ae_share=0.0, classifier_share=0.0, joint_share=0.0, gan_share=0.0), "raise one"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(v.UserError, match=message):
        v.Config(**TINY | options)


# -------------------- precision --------------------
def test_grus_run_in_float32_under_autocast():
    """Their outputs are those without autocast, of the same input, and so are the gradients where
    backward runs outside autocast."""
    gru, h = v.BiGRU(16, 4), torch.randn(2, 9, 16).bfloat16()

    def run(autocast):
        gru.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = gru(h if autocast else h.float())
        y.square().sum().backward()
        return [y, *(p.grad for p in gru.parameters())]

    for rough, exact in zip(run(True), run(False)):
        assert rough.dtype == torch.float32 and torch.equal(rough, exact)
    model, _ = tiny()
    assert sum(isinstance(m, nn.GRU) for m in model.modules()) == 3
    assert sum(isinstance(m, v.BiGRU) for m in model.modules()) == 3


def test_losses_are_float32_under_autocast():
    model, cfg = tiny()
    x, speaker = batch(model, cfg)
    with torch.autocast("cpu", torch.bfloat16):
        z = model.encoder(x)
        outputs = model.decode(z, speaker, 40, 1), model.decode(z, speaker, 40, 2)
        outputs += (model.classifier(z), *model.critic(x))
        assert model.critic.trunk(x.mT[:, None]).dtype == torch.bfloat16
    assert all(y.dtype == torch.float32 for y in outputs)


@pytest.fixture
def tf32():
    """Both switches of TF32, turned on for the test."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = True
    yield switches
    for switch, allowed in zip(switches, before):
        switch.allow_tf32 = allowed


def test_the_penalty_and_its_backward_are_in_full_float32(tf32, monkeypatch):
    """Neither autocast nor TF32 in both, and both as before afterwards, also after an error."""
    model, cfg = tiny()
    x, speaker = batch(model, cfg)
    seen = []

    def look(name):
        seen.append((name, torch.is_autocast_enabled("cpu"), *(s.allow_tf32 for s in tf32)))

    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *args, **kw: (look("backward"), backward(*args, **kw))
    )
    model.critic.register_forward_hook(lambda *_: look("critic"))
    with torch.autocast("cpu", torch.bfloat16):
        log = v.critic_step(model, v.make_optimizers(model, cfg), x, speaker, cfg)
        look("after")
    usual, full = (True, True, True), (False, False, False)
    assert seen == [
        ("critic", *usual),  # real
        ("critic", *usual),  # converted
        ("critic", *full),  # between
        ("backward", *full),
        ("after", *usual),
    ]
    assert log["penalty"].dtype == torch.float32
    with pytest.raises(KeyError), v.full_float32("cpu"):
        raise KeyError
    assert all(switch.allow_tf32 for switch in tf32)


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
    # A frame more, for what lies behind the last.
    close(seen[0][:, -1], seen[0][:, -2], 1e-5)
    ratio = (seen[0][:, :-1] / v.stft(wave, cfg).abs())[:, inner][loud]
    assert copy.shape == (1, 8000) and (ratio.log().abs() < 0.1).float().mean() > 0.95
    # the filter's impulse response is cut by the window, so the ratio is not exact
    wide = x.clamp(0.2, 0.5) * 4 - 1.2
    assert torch.equal(model.vocode(wide, 8000), model.vocode(wide.clamp(0, 1), 8000))
    assert (model.features(copy) - x)[:, inner].abs().mean() < 0.04


def test_a_crop_does_not_see_its_edges(monkeypatch):
    """The frames of a segment are those of the uncut utterance: pre-emphasis and zero padding touch
    only the margin, which is cut off."""
    for hop, win in (40, 64), (16, 64), (40, 48):
        model, cfg = tiny(hop=hop, win=win)
        wave = 0.1 * torch.randn(1, 8000)
        first = 20 * hop
        asked = []

        def batch(corpus, cfg, step, draw, utterances):
            asked.append((cfg.crop, step, draw, utterances))
            speaker = torch.tensor([1])
            return {"wave": wave[:, first : first + cfg.crop], "speaker": speaker}

        monkeypatch.setattr(v, "get_batch", batch)
        x, _ = v.segments(model, None, cfg, 7, 3, [2])
        assert asked[0][1:] == (7, 3, [2])
        margin = (asked[0][0] - cfg.crop) // 2 // hop
        assert x.shape == (1, cfg.crop // hop, 33) and margin > 0
        whole = model.features(wave)[:, 20 + margin :]
        close(x, whole[:, : x.shape[1]], 1e-5)
        cut = model.features(wave[:, first : first + cfg.crop])
        assert (cut[:, 0] - model.features(wave)[:, 20]).abs().max() > 0.01  # the click


# -------------------- loss and training step --------------------
def test_schedule():
    """The four phases at the authors' steps; the weight is exactly 0 at first, 0.005 after 25,000
    joint steps, 0.01 after 50,000, and stays."""
    cfg = v.Config()
    names = ("autoencoder", "classifier", "joint", "stage 2")

    def phases(steps, cfg):
        return [names.index(v.schedule(step, cfg)[0]) for step in steps]

    steps = (0, 7999, 8000, 27999, 28000, 107999, 108000, 157999)
    assert phases(steps, cfg) == [0, 0, 1, 1, 2, 2, 3, 3]
    joint = [v.schedule(28000 + i, cfg)[1] for i in (0, 25000, 50000, 79999)]
    assert joint == [0, 0.005, 0.01, 0.01] and isinstance(joint[1], float)
    assert {v.schedule(step, cfg)[1] for step in (0, 7999, 8000, 20000)} == {0}
    small = replace(cfg, steps=158)
    assert phases((0, 7, 8, 27, 28, 107, 108, 157), small) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert v.schedule(28 + 25, small)[1] == 0.005
    only = replace(small, ae_share=0.0, classifier_share=0.0, gan_share=0.0)
    assert set(phases(range(158), only)) == {2} and v.schedule(157, only)[1] == 0.01
    assert v.schedule(40, replace(small, ramp=0.0))[1] == 0.01


def batch(model, cfg, speakers=(0, 1, 2, 0, 1, 2)):
    return torch.rand(len(speakers), cfg.crop // cfg.hop, 33), torch.tensor(speakers)


@pytest.mark.parametrize(
    "phase, start, expected",
    [
        ("autoencoder", 0, {"encoder", "decoder"}),
        ("classifier", 8, {"classifier"}),
        ("joint", 28, {"encoder", "decoder", "classifier"}),
        ("stage 2", 108, {"critic", "generator"}),
    ],
)
def test_each_phase_moves_its_networks_alone(phase, start, expected):
    """The others stay bit-identical, and all metrics are detached scalars."""
    model, cfg = tiny()
    corpus = corpus_of(tones(6), [0, 0, 1, 1, 2, 2])
    before = weights(model)
    log = v.train_step(model, v.make_optimizers(model, cfg), corpus, start, cfg)
    after = weights(model)
    assert v.schedule(start, cfg)[0] == phase
    assert {name for name in NETS if not torch.equal(before[name], after[name])} == expected
    assert any("loss" in name for name in log)
    assert all(value.dim() == 0 and not value.requires_grad for value in log.values())


def test_inner_steps_and_fresh_batches(monkeypatch):
    """Joint: classifier_steps of the classifier, then the autoencoder, each on a batch of its own;
    stage 2 alike."""
    model, cfg = tiny(classifier_steps=4, critic_steps=3)
    calls, corpus = [], corpus_of(tones(6), [0, 0, 1, 1, 2, 2])
    for name in ("classifier", "autoencoder", "critic", "generator"):
        monkeypatch.setattr(
            v,
            f"{name}_step",
            lambda model, optimizers, x, *rest, name=name: calls.append((name, x, rest)) or {},
        )
    v.train_step(model, None, corpus, 28 + 25, cfg)
    assert [name for name, *_ in calls] == ["classifier"] * 4 + ["autoencoder"]
    assert calls[-1][2][1] == 0.005
    assert len({x.sum().item() for _, x, _ in calls}) == 5
    calls.clear()
    v.train_step(model, None, corpus, 110, cfg)
    assert [name for name, *_ in calls] == ["critic"] * 3 + ["generator"]
    assert len({x.sum().item() for _, x, _ in calls}) == 4


def test_the_frozen_encoder_has_no_dropout():
    """D2: in stage 2 the latent is the one that conversion uses; in stage 1 dropout is on."""
    model, cfg = tiny(dropout=0.5)
    corpus, optimizers = corpus_of(tones(6), [0, 0, 1, 1, 2, 2]), v.make_optimizers(model, cfg)
    for step, training in ((108, False), (0, True), (157, False), (28, True)):
        v.train_step(model.train(), optimizers, corpus, step, cfg)
        assert model.encoder.training == training


def test_no_graph_is_built_through_what_does_not_learn():
    """D2, and stage 1 in stage 2: only networks that are trained, or are between one and the loss,
    give outputs that require a gradient."""
    model, cfg = tiny()
    x, speaker = batch(model, cfg)
    optimizers = v.make_optimizers(model, cfg)
    graphs = {}
    for name in NETS[:4] + ("generator",):
        getattr(model, name).register_forward_hook(
            lambda module, args, y, name=name: graphs.setdefault(name, []).append(
                (y[0] if isinstance(y, tuple) else y).requires_grad
            )
        )
    v.generator_step(model, optimizers, x, cfg)
    expected = {"encoder": [False], "decoder": [False], "generator": [True], "critic": [True]}
    assert graphs == expected
    graphs.clear()
    v.critic_step(model, optimizers, x, speaker, cfg)
    assert graphs == expected | {"generator": [False], "critic": [True] * 3}
    graphs.clear()
    v.classifier_step(model, optimizers, x, speaker, cfg)
    assert graphs == {"encoder": [False], "classifier": [True]}
    graphs.clear()
    v.autoencoder_step(model, optimizers, x, speaker, 0.1, cfg)
    assert graphs == {"encoder": [True], "decoder": [True], "classifier": [True]}


def test_without_adversary_classifier_1_is_not_run():
    """With a weight of 0 the step is that of L_rec alone."""
    model, cfg = tiny()
    x, speaker = batch(model, cfg)
    z = model.encoder(x)
    loss = F.l1_loss(model.decode(z, speaker, 40, 1), x)
    expected = torch.autograd.grad(loss, [*model.encoder.parameters()])
    model.classifier.forward = None
    v.autoencoder_step(
        model, v.make_optimizers(model, replace(cfg, clip=1e9)), x, speaker, 0.0, cfg
    )
    norm = torch.stack([g.norm() for g in expected]).norm()
    for p, g in zip(model.encoder.parameters(), expected):
        close(p.grad, g * min(1, cfg.clip / norm), 1e-4)


def test_optimizers():
    """Together they hold every parameter once; the generator's has a rate of its own."""
    model, cfg = tiny(generator_lr=3e-4)
    optimizers = v.make_optimizers(model, cfg)
    assert list(optimizers) == ["autoencoder", "classifier", "critic", "generator"]
    held = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    assert len(held) == len({*held}) == len([*model.parameters()])
    assert [o.param_groups[0]["lr"] for o in optimizers.values()] == [1e-4, 1e-4, 1e-4, 3e-4]
    # The first step of Adam, to which the golden values hold it, does not depend on the betas.
    for optimizer in optimizers.values():
        group = optimizer.param_groups[0]
        assert (group["betas"], group["weight_decay"], group["amsgrad"]) == ((0.5, 0.9), 0, False)


@pytest.mark.parametrize("norm, penalty", [(3, 4.0), (1, 0.0), (0, 1.0), (0.5, 0.25)])
def test_gradient_penalty_of_a_linear_critic(norm, penalty):
    """(1 - |w|)^2 for D(x) = <w, x>, whatever the segments are; and so is its gradient."""
    w = torch.randn(40, 33)
    w = (norm * w / w.norm()).requires_grad_()
    real, fake = 30 * torch.randn(4, 40, 33), torch.randn(4, 40, 33)
    value = v.gradient_penalty(lambda u: ((u * w).sum((1, 2)), None), real, fake)
    close(value, penalty, 1e-5)
    value.backward()
    if norm:
        close(w.grad, -2 * (1 - norm) * w.detach() / norm, 1e-4)


def test_gradient_penalty_is_taken_between_real_and_fake():
    """At one uniformly random point for each segment."""
    seen = []

    def critic(u):
        seen.append(u.detach()[:, 0, 0])
        return 0.5 * u.square().sum((1, 2)), None

    real, fake = torch.ones(1000, 4, 3), torch.zeros(1000, 4, 3)
    value = v.gradient_penalty(critic, real, fake)
    (mix,) = seen
    assert 0 <= mix.min() < 0.01 and 0.99 < mix.max() <= 1
    assert abs(mix.mean() - 0.5) < 0.05 and abs(mix.var() - 1 / 12) < 0.01
    close(value, (1 - mix * 12**0.5).square().mean(), 1e-5)


def test_random_targets_are_uniform_over_all_speakers():
    model, cfg = tiny(speakers=4)
    model.encoder.forward = lambda x: torch.zeros(len(x), 2, 16)
    targets = torch.cat([v.converted(model, torch.zeros(500, 16, 33))[1] for _ in range(4)])
    assert (torch.bincount(targets, minlength=4) / 2000 - 0.25).abs().max() < 0.04


def test_stage_2_starts_as_stage_1():
    """D6: with last layers of zeros both stages give the decoder's output exactly, the critic has
    no opinion, and yet all of it learns."""
    cfg = tiny()[1]
    model = v.Model(cfg, 3)
    z, y = torch.randn(2, 5, 16), torch.tensor([0, 2])
    assert torch.equal(model.decode(z, y, 40, 2), model.decode(z, y, 40, 1))
    optimizers, (x, speaker) = v.make_optimizers(model, cfg), batch(model, cfg)
    assert not model.critic(x)[0].any() and not model.critic(x)[1].any()
    for _ in range(2):
        v.critic_step(model, optimizers, x, speaker, cfg)
        v.generator_step(model, optimizers, x, cfg)
    assert model.critic(x)[0].any() and model.critic(x)[1].any()
    assert not torch.equal(model.decode(z, y, 40, 2), model.decode(z, y, 40, 1))
    gradient = torch.cat([p.grad.flatten() for p in model.generator.parameters()])
    assert (gradient != 0).float().mean() > 0.5


def test_silent_segments_are_replaced():
    """D3: by another of the batch, with its speaker; a batch of silence alone stays as it is."""
    model, cfg = tiny()
    waves = tones(6)
    waves[0], waves[3] = 1e-6 * torch.randn(4000), 1.5e-4  # next to silence: 0.5 dB of deviation
    corpus = corpus_of(waves, [0, 0, 1, 1, 2, 2])
    x, speaker = v.segments(model, corpus, cfg, 0, 0, np.arange(6))
    assert torch.equal(x[0], x[1]) and torch.equal(x[3], x[1])
    assert speaker.tolist() == [0, 0, 1, 0, 2, 2]
    assert (x.std(1).mean(1) > 0.01).all() and x.shape == (6, 40, 33)
    silent = corpus_of(torch.zeros(6, 4000), [0, 0, 1, 1, 2, 2])
    x, speaker = v.segments(model, silent, cfg, 0, 0, np.arange(6))
    assert x.max() <= 1e-7 and x.shape == (6, 40, 33)


# -------------------- representation, conversion, sampling --------------------
def test_represent_and_convert(monkeypatch):
    """content is the encoder's output; a conversion has the source's length and is of both stages,
    or of one; None takes the closest speaker."""
    model, cfg = tiny()
    model.eval()
    wave = tones(1, 3990)[0]
    x = model.features(wave[None])
    z = model.encoder(x)
    assert torch.equal(v.represent(model, wave, cfg)["content"], z[0])
    seen = []
    vocode = model.vocode
    monkeypatch.setattr(model, "vocode", lambda y, n: seen.append(y) or vocode(y, n))
    out = v.convert(model, [wave, wave[:1234]], [2, 1], cfg)
    assert [len(w) for w in out] == [3990, 1234] and all(w.isfinite().all() for w in out)
    v.convert(model, [wave], [2], cfg, stage=1)
    close(seen[0], model.decode(z, torch.tensor([2]), 100, 2), 1e-5)
    close(seen[2], model.decode(z, torch.tensor([2]), 100, 1), 1e-5)
    assert (seen[0] - seen[2]).abs().max() > 0.01

    guesses = [model.decode(z, torch.tensor([s]), 100, 1) for s in range(3)]
    best = int(np.argmin([F.l1_loss(guess, x).item() for guess in guesses]))
    worst = 5.0 * (torch.arange(3) == best)  # by stage 1: the generator would say another speaker
    monkeypatch.setattr(
        model.generator, "forward", lambda z, s: worst[s, None, None].expand(-1, 8 * z.shape[1], 33)
    )
    v.convert(model, [wave], [None], cfg)
    close(seen[3], guesses[best] + 5, 1e-5)


def test_reconstruction_of_a_long_source_guesses_by_its_beginning():
    """512 frames, so that memory does not grow with the length."""
    model, cfg = tiny()
    lengths = []
    model.decoder.register_forward_hook(lambda module, args, y: lengths.append(y.shape[:2]))
    v.convert(model.eval(), [tones(1, 40 * 600)[0]], [None], cfg)
    assert lengths == [(3, 512), (1, 608)]


def test_sample(tmp_path, monkeypatch):
    """Eight held-out utterances by each stage in the voice of the next speaker; L_rec."""
    corpus = corpus_of(tones(12), [0, 1, 2] * 4)
    corpus.paths = [Path(f"u{i}.flac") for i in range(12)]
    corpus.held = np.arange(3, 12)
    model, cfg = tiny()
    calls = []

    def convert(model, sources, targets, cfg, stage=2):
        calls.append((targets[0], stage))
        return [torch.full((100,), stage / 10)]

    monkeypatch.setattr(v, "convert", convert)
    metrics = v.sample(model.eval(), corpus, cfg, tmp_path)
    assert calls == [((u + 1) % 3, stage) for u in range(8) for stage in (1, 2)]
    names = {f"u{u}_stage_{stage}.wav" for u in range(3, 11) for stage in (1, 2)}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert abs(v.read_audio(tmp_path / "u5_stage_2.wav", 8000)[50] - 0.2) < 1e-3
    x, speaker = v.segments(model, corpus, cfg, 0, 0, corpus.held)
    loss = F.l1_loss(model.decode(model.encoder(x), speaker, 40, 1), x)
    assert metrics == {"reconstruction_loss": pytest.approx(loss.item())}


# -------------------- learning --------------------
def test_stage_1_overfits_a_batch_and_the_adversary_undoes_what_classifier_1_learned():
    model, cfg = tiny(lr=3e-3)
    corpus = corpus_of(tones(6), range(6))
    model = v.Model(cfg, 6)
    optimizers = v.make_optimizers(model, cfg)
    x, y = v.segments(model, corpus, cfg, 0, 0)
    first = v.autoencoder_step(model, optimizers, x, y, 0.0, cfg)["reconstruction_loss"]
    for _ in range(80):
        last = v.autoencoder_step(model, optimizers, x, y, 0.0, cfg)["reconstruction_loss"]
    assert last < 0.3 * first
    for _ in range(60):
        log = v.classifier_step(model, optimizers, x, y, cfg)
    assert log["classifier_loss"] < 0.2
    for _ in range(20):
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


@GPU
def test_small_gradients_survive_in_the_grus():
    """In float16, which autocast would choose for them, those of a loss of 1e-6 are zero."""
    gru, h = v.BiGRU(64, 32).cuda(), torch.randn(4, 50, 64, device="cuda")
    gradients = []
    for bf16 in (False, True):
        gru.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = 1e-6 * gru(h).mean()
        loss.backward()
        gradients.append(gru.weight_hh_l0.grad.clone())
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-2, atol=1e-12)


# -------------------- the whole --------------------
def test_a_part_of_the_toy_run(toy_folder, monkeypatch):
    """All phases. L_rec falls, and another target changes the average spectrum of a conversion in
    the direction in which the average spectra of the two speakers differ."""
    monkeypatch.chdir(toy_folder)
    shares = dict(ae_share=80.0, classifier_share=5.0, joint_share=10.0, gan_share=2.0)
    cfg = v.Config(**v.TOY | shares | dict(steps=97, device="cpu", critic_steps=2))
    corpus = v.load_corpus(cfg)
    model = v.Model(cfg, len(corpus.speakers))
    optimizers = v.make_optimizers(model, cfg)
    losses, phases = [], set()
    for step in range(cfg.steps):
        log = v.train_step(model.train(), optimizers, corpus, step, cfg)
        phases.add(v.schedule(step, cfg)[0])
        losses += [log["reconstruction_loss"].item()] if "reconstruction_loss" in log else []
    assert len(phases) == 4 and np.mean(losses[-10:]) < 0.3 * np.mean(losses[:5])
    model.eval()

    def spectra(waves):
        return torch.stack([model.features(wave[None])[0].mean(0) for wave in waves])

    def average_spectrum(s):
        utterances = corpus.train[corpus.speaker[corpus.train] == s][:8]
        return spectra([corpus.wave(u) for u in utterances]).mean(0)

    S = len(corpus.speakers)
    average = torch.stack([average_spectrum(s) for s in range(S)])
    utterances = corpus.held[:16]
    sources = [corpus.wave(u) for u in utterances]
    own = torch.from_numpy(corpus.speaker[utterances])
    targets = (own + 1 + torch.arange(16)) % S
    change = spectra(v.convert(model, sources, targets.tolist(), cfg))
    change -= spectra(v.convert(model, sources, own.tolist(), cfg))
    cosine = F.cosine_similarity(change, average[targets] - average[own])
    assert cosine.mean() > 0.12 and (cosine > 0).float().mean() > 0.7
