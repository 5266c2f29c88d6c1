# SPDX-License-Identifier: MIT
"""Checks of vqvae.py: golden values of a reference, closed forms, naive loops, and short runs."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

import measure
import vqvae as v

torch.set_num_threads(1)
NET = dict(residual=8, skip=8, depth=4, cycles=2)  # a WaveNet that looks back 31 samples
TINY = dict(
    sample_rate=8000,
    n_fft=256,
    win=200,
    hop=80,
    n_mels=40,
    crop=1280,
    batch_size=8,
    lr=4e-3,
    codes=16,
    d_code=16,
    decay=0.95,
    channels=32,
    d_condition=16,
    residual=24,
    skip=48,
    cycles=1,
    depth=6,
    device="cpu",
)
Z = [[0, 0], [1, 0], [3, 2], [4, 2]]
E = [[0, 1], [3, 1], [9, 9]]


# Where the WaveNet is sampled: on a GPU as a CUDA graph.
RUNNING = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


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


def hand(**options):
    """The quantizer of the worked example, and its four latents."""
    vq = v.VectorQuantizer(3, 2, **dict(decay=0.9, revive=0.0, smoothing=0.0) | options)
    with torch.no_grad():
        vq.e.copy_(torch.tensor(E))
        vq.M.copy_(vq.e)
    return vq, torch.tensor([Z], dtype=torch.float, requires_grad=True)


def tiny(n_speakers=3, **options):
    return v.Model(v.Config(**TINY | options), n_speakers).eval()


def wavenet(condition=5, **options):
    """A WaveNet, an input for 3 streams, and a condition of one code per 8 samples for each."""
    net = v.Decoder(v.Config(**NET | options), condition)
    N = 8 * (2 * sum(net.dilations) // 8 + 2)  # over twice the receptive field
    return net, torch.randint(256, (3, N)), torch.randn(3, N // 8, condition)


def tones(n, length=1280):
    """n tones of different pitch with a rhythm, (n, length) at 8 kHz."""
    t = torch.arange(length) / 8000
    f = 150 * 1.3 ** torch.arange(n)[:, None]
    wave = 0.4 * (2 * math.pi * f * t).sin() * (0.3 + (2 * math.pi * 6 * t).sin() ** 2)
    return wave + 0.01 * torch.randn(n, length)


# -------------------- golden values --------------------
GOLDEN = json.loads((Path(__file__).parent / "golden" / "vqvae.json").read_text())
TOLERANCE = 1e-9  # of ours in float64; the file states 1e-5 for float32


def formula(k, shape, scale=1.0):
    """The array that `fill` of the golden file states for layer k, in float64."""
    p = 1000003
    i = np.arange(math.prod(shape)) % p
    square = i * i % p
    cube = square * i % p
    h = 271829 * cube + 314159 * (k + 1) * square + 161803 * (k + 3) * i + 577215 * (k + 1)
    return torch.from_numpy(scale * (2 * (h % p / p) - 1)).view(shape)


def assert_golden(x, expected):
    """The sampled entries, the mean and the mean square of x, relative to its root mean square."""
    x = x.detach().double()
    rms = math.sqrt(expected["mean_square"])
    assert list(x.shape) == expected["shape"]
    values = torch.tensor(expected["value"], dtype=torch.float64)
    assert (x.flatten()[expected["index"]] - values).abs().max() <= TOLERANCE * rms
    assert abs(x.mean() - expected["mean"]) <= TOLERANCE * rms
    assert abs(x.square().mean() - expected["mean_square"]) <= 2 * TOLERANCE * rms**2


def assert_scalar(x, expected):
    assert abs(x.item() - expected) <= TOLERANCE * max(1, abs(expected))


def golden_quantizer(**options):
    """K = 8 codes of D = 6 at the start of the golden run. D2 is off: the reference revives none."""
    options = dict(decay=0.9, smoothing=1e-5, revive=0.0) | options
    vq = v.VectorQuantizer(8, 6, **options).double()
    e = formula(0, (8, 6), 1.5)
    e[7] += 9
    with torch.no_grad():
        vq.e.copy_(e)
        vq.N.fill_(5)
        vq.M.copy_(5 * e)
    return vq


def golden_latents(step):
    return formula(1300 + step, (4, 10, 6), 1.5) + 0.1 * step * formula(200, (1, 1, 6))


def test_golden_formula():
    """The formula itself, on the values that the file states for it."""
    for check in GOLDEN["fill_check"]:
        value = formula(check["k"], (check["i"] + 1,))[-1]
        assert value.item() == pytest.approx(check["value"], rel=1e-12)


def test_golden_moving_averages():
    """Twenty updates and one pass in evaluation mode of the reference's quantizer (sonnet). Its
    losses are means over the D entries of a latent, and ours are sums."""
    golden, D = GOLDEN["ema"], 6
    vq = golden_quantizer()
    for step in range(20):
        z = golden_latents(step).requires_grad_()
        z_q, ids, loss = vq.train()(z)
        loss = loss / D
        assert ids.flatten().tolist() == golden["each_step"]["ids"][step]
        assert_scalar(loss, golden["each_step"]["commitment_loss"][step])
        perplexity = golden["each_step"]["perplexity"][step]
        assert v.perplexity(ids).item() == pytest.approx(perplexity, rel=1e-6)  # of float32
        expected = golden["after_step"].get(str(step + 1))
        if expected:
            (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
            assert_golden(gradient, expected["gradient_of_commitment_loss_to_z"])
            total = (z_q * formula(300 + step, z.shape)).sum() + loss
            (gradient,) = torch.autograd.grad(total, z)
            key = "gradient_of_sum_of_quantised_times_G_plus_commitment_loss_to_z"
            assert_golden(gradient, expected[key])
            assert_golden(z_q, expected["quantised"])
            assert_golden(vq.e, expected["codebook"])
            assert_golden(vq.N, expected["averaged_counts"])
            assert_golden(vq.M, expected["averaged_sums"])
    assert len(golden["after_step"]) == 3

    before = {name: x.clone() for name, x in vq.state_dict().items()}
    _, ids, loss = vq.eval()(formula(150, (4, 10, 6), 1.5))
    assert ids.flatten().tolist() == golden["evaluation_after_20"]["ids"]
    assert_scalar(loss / D, golden["evaluation_after_20"]["commitment_loss"])
    assert all(torch.equal(x, before[name]) for name, x in vq.state_dict().items())


def test_golden_smoothing():
    """D3, seen best with a large epsilon: five steps with 0.1."""
    vq = golden_quantizer(smoothing=0.1)
    for step in range(5):
        vq.train()(golden_latents(step))
    assert_golden(vq.e, GOLDEN["ema_with_large_epsilon"]["codebook_after_5"])


def test_golden_codebook_by_gradient():
    """Eq. (3) with its second term: the loss, and its gradients to the latents and the codes."""
    golden, vq = GOLDEN["codebook_by_gradient"], golden_quantizer(codebook="gradient")
    z = formula(400, (4, 10, 6), 1.5).requires_grad_()
    _, ids, loss = vq.eval()(z)
    loss = loss / 6
    loss.backward()
    assert ids.flatten().tolist() == golden["ids"]
    assert_scalar(loss, golden["loss"]["value"])
    assert_golden(z.grad, golden["gradient_to_z"])
    assert_golden(vq.e.grad, golden["gradient_to_codebook"])


def test_golden_mu_law():
    """280 amplitudes to levels, and all 256 levels to amplitudes."""
    encode, decode = GOLDEN["mu_law"]["encode"], GOLDEN["mu_law"]["decode"]
    x = torch.tensor(encode["x"], dtype=torch.float64)
    assert v.mu_law(x).tolist() == v.mu_law(x.float()).tolist() == encode["y"]
    x = torch.tensor(decode["x"])
    assert (v.inverse_mu_law(torch.arange(256)) - x).abs().max() < decode["tolerance_absolute"]


# -------------------- vector quantization by hand --------------------
def test_vq_nearest_by_squared_distance():
    """4.1: argmin of |z|^2 - 2 z e + |e|^2 is the nearest code, for random latents."""
    vq, z = v.VectorQuantizer(512, 64).eval(), torch.randn(2, 50, 64)
    assert torch.equal(vq(z)[1], torch.cdist(z, vq.e[None]).argmin(-1))


def test_vq_tie_takes_the_lowest_index():
    """4.1: of two equally near codes the first is taken."""
    vq, _ = hand()
    assert vq.eval()(torch.tensor([[[1.5, 1.0]]]))[1].item() == 0


def test_vq_commitment_value_and_gradient():
    """9.2: beta times 1.5, the sum over D averaged over four latents, and its gradient to z."""
    vq, z = hand()
    z_q, ids, loss = vq.eval()(z)
    loss.backward()
    assert ids.tolist() == [[0, 0, 1, 1]] and torch.equal(z_q, vq.e[ids])
    close(loss, 0.25 * 1.5)
    close(z.grad[0], [[0, -0.125], [0.125, -0.125], [0, 0.125], [0.125, 0.125]])


def test_vq_passes_the_gradient_to_the_latents_alone():
    """9.1: the decoder's gradient reaches the latents unchanged and the codes never, even where
    they are learned by gradient."""
    for codebook in ("ema", "gradient"):
        vq, z = hand(codebook=codebook)
        z_q, _, _ = vq.eval()(z)
        G = torch.arange(8.0).view(1, 4, 2)
        z_q.backward(G)
        assert torch.equal(z.grad, G) and vq.e.grad is None


def test_vq_takes_any_shape():
    """(D,), (n, D) and (B, T', D): the same codes and losses, in training mode too."""
    z = torch.tensor(Z, dtype=torch.float)
    for shape in ((2,), (4, 2), (2, 2, 2), (2, 1, 2, 2)):
        x = z[0] if shape == (2,) else z.view(shape)
        for training in (False, True):
            vq, _ = hand()
            z_q, ids, loss = vq.train(training)(x)
            assert z_q.shape == x.shape and ids.shape == x.shape[:-1] and loss.shape == ()
            assert ids.flatten().tolist() == [0, 0, 1, 1][: ids.numel()]
            close(loss, 0.25 if shape == (2,) else 0.25 * 1.5)


def test_vq_guards_its_precision():
    """Under bfloat16 autocast, and of bfloat16 latents, codes and losses are those of float32, far
    from the origin too, where bfloat16 distances would pick other codes."""
    vq, z = v.VectorQuantizer(512, 64, revive=0.0), torch.randn(4, 64, 64) + 10
    vq.e.data += 10
    expected = vq.eval()(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = vq(z)
        rough = vq(z.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(torch.equal(a, b) for a, b in zip(rough, vq(z.bfloat16().float())))
    with torch.autocast("cpu", torch.bfloat16):
        vq.train()(z)
    assert {x.dtype for x in vq.state_dict().values()} == {torch.float32}


def test_vq_stands_alone():
    """What people copy: the class runs with torch alone, and knows no settings of this script."""
    import inspect

    source = inspect.getsource(v.VectorQuantizer)
    assert "cfg" not in source and "crop" not in source and "hop" not in source
    scope = {"nn": torch.nn, "torch": torch, "F": F, "dist": torch.distributed}
    exec(source, scope)
    z_q, ids, _ = scope["VectorQuantizer"](3, 2)(torch.randn(5, 2))
    assert z_q.shape == (5, 2) and ids.shape == (5,)


def test_vq_codebook_loss_value_and_gradient():
    """9.2: the codebook's own term, .75, and its gradient with respect to e; the latents get none of it."""
    vq, z = hand(codebook="gradient", beta=0.0)
    loss = vq.eval()(z)[2]
    loss.backward()
    close(loss, 1.5)
    close(vq.e.grad, [[-0.5, 1], [-0.5, -1], [0, 0]])
    assert not z.grad.any()


def test_encoder_gets_no_gradient_from_the_codebook_loss():
    """The encoder learns nothing from |sg[z] - e|^2, and the codebook does."""
    model = tiny(codebook="gradient", beta=0.0).train()
    model.encode(tones(4))[3].backward()
    assert not any(p.grad.any() for p in model.encoder.parameters() if p.grad is not None)
    assert model.bottleneck.e.grad.any()


def test_codebook_is_trained_by_one_of_two_ways():
    """The optimizer moves the codebook if it learns by gradient, and not if it is an average."""
    for codebook in ("gradient", "ema"):
        model = tiny(codebook=codebook)
        optimizer = v.make_optimizers(model, model.cfg)["autoencoder"]
        before = model.bottleneck.e.clone()
        _, z_q, _, loss = model.encode(tones(3))
        (model(z_q, torch.arange(3), tones(3)).mean() + loss).backward()
        optimizer.step()
        assert torch.equal(model.bottleneck.e, before) == (codebook == "ema")
        still = {name for name, p in model.named_parameters() if p.grad is None}
        assert still == ({"bottleneck.e"} if codebook == "ema" else set())


def test_gradient_codebook_is_not_moved_by_the_statistics():
    """With codebook="gradient" a training pass counts, and leaves e to the optimizer."""
    vq, z = hand(codebook="gradient")
    vq.train()(z)
    close(vq.N, [1.1, 1.1, 0.9])
    assert vq.e.tolist() == E


# -------------------- moving averages --------------------
def test_ema_counts_of_zero_fling_codes_away():
    """9.3: why N starts at 1: with N = 0 and M = e an unused code goes to 8.1e5."""
    vq, z = hand(smoothing=1e-5)
    vq.N.zero_()
    vq.train()(z)
    close(vq.e[2], [8.1e5, 8.1e5], 1e-3)


def test_ema_unhit_code_stays_for_long():
    """9.3: with N = 1 and M = e an unused code is in place after 200 steps, also with smoothing."""
    for smoothing in (0.0, 1e-5):
        vq, z = hand(smoothing=smoothing, decay=0.99)
        for _ in range(200):
            vq.train()(z)
        close(vq.e[2], [9, 9], 1e-4)


def test_decoder_sees_the_old_codes():
    """4.3: z_q comes from e as it was before the update of the same step."""
    vq, z = hand()
    z_q, ids, loss = vq.train()(z)
    close(z_q, torch.tensor(E)[ids])
    close(loss, 0.25 * 1.5)


def test_eval_leaves_the_codebook_alone():
    """9.11: in eval mode N, M and e stay bit-identical, in training mode they move."""
    model = tiny()
    before = {k: x.clone() for k, x in model.bottleneck.state_dict().items()}
    with torch.no_grad():
        model.encode(tones(4))
        assert before.keys() == {"e", "N", "M"}
        assert all(torch.equal(x, before[k]) for k, x in model.bottleneck.state_dict().items())
        model.train().encode(tones(4))
    assert not any(torch.equal(x, before[k]) for k, x in model.bottleneck.state_dict().items())


def test_start_takes_distinct_latents():
    """4.4: the codes start as K different latents, with N = 1 and M = e; the first step moves no
    code away that is near latents, and kills none."""
    vq, z = v.VectorQuantizer(8, 2), torch.arange(40.0).view(20, 2)
    vq.start(z)
    rows = {tuple(row) for row in vq.e.tolist()}
    assert len(rows) == 8 and rows <= {tuple(row) for row in z.tolist()}
    assert torch.equal(vq.M, vq.e) and torch.equal(vq.N, torch.ones(8))
    before = vq.e.clone()
    vq.train()(before.repeat(16, 1))
    close(vq.e, before, 1e-4)


def test_prepare_starts_from_the_data(tmp_path, monkeypatch):
    """Features get mean 0 and deviation 1, and every code is a latent of the data (D4)."""
    monkeypatch.chdir(tmp_path)
    cfg = v.Config(**TINY | {"data": str(voices(tmp_path / "data"))})
    corpus, model = v.load_corpus(cfg), tiny()
    v.prepare(model, corpus, cfg)
    assert torch.equal(model.bottleneck.M, model.bottleneck.e)
    x = model.features(v.get_batch(corpus, cfg, 7)["wave"])
    assert x.mean().abs() < 0.3 and 0.7 < x.std() < 1.3
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    assert {norm.momentum for norm in norms} == {0.1}
    h = model.eval().encoder.layers(model.features(v.get_batch(corpus, cfg, 8)["wave"]).mT)
    assert h.mean().abs() < 0.3 and 0.5 < h.std() < 1.5  # the averages of the norms are set


def test_revival_sets_all_three():
    """9.11: a dead code becomes a latent, with M = e N: the next step without hits leaves it there."""
    vq, z = hand(revive=0.5)
    vq.N[2], vq.M[2] = 0.1, 0.1 * vq.e[2]
    vq.update(z.detach()[0], torch.tensor([0, 0, 1, 1]))
    revived = vq.e[2].clone()
    assert revived.tolist() in Z
    mean = (0.9 * 2.1 + 0.1 * 4) / 3
    close(vq.N[2], mean)
    close(vq.M[2], revived * mean)
    vq.update(torch.tensor(Z[:2] * 2).float(), torch.tensor([0, 0, 1, 1]))
    close(vq.e[2], revived)


def test_revival_spares_codes_in_use():
    """4.4: a code at or above the share of the average stays; revive=0 switches the revival off."""
    vq, z = hand(revive=0.5)
    vq.update(z.detach()[0], torch.tensor([0, 0, 1, 1]))
    close(vq.e[2], [9, 9])
    vq, z = hand(revive=0.0)
    vq.N[2], vq.M[2] = 1e-3, 1e-3 * vq.e[2]
    vq.update(z.detach()[0], torch.tensor([0, 0, 1, 1]))
    close(vq.e[2], [9, 9])


def test_revival_spares_codes_when_the_batch_grows():
    """A run that is resumed with sixteen times the latents in a batch keeps its codes."""
    vq, _ = hand(revive=0.1, decay=0.99)
    vq.update(torch.tensor(E).float().repeat(16, 1), torch.arange(3).repeat(16))
    close(vq.e, E, 1e-5)


# -------------------- the other bottlenecks --------------------
def one_hot():
    net = v.OneHot(3, 3)
    with torch.no_grad():
        net.logits.weight.copy_(torch.eye(3))
        net.logits.bias.zero_()
        net.e.weight.copy_(torch.eye(3))
    return net


@pytest.mark.parametrize(
    "tau, y", [(1.0, [0.308117, 0.418775, 0.273108]), (0.5, [0.275260, 0.508478, 0.216262])]
)
def test_gumbel_softmax_by_hand(monkeypatch, tau, y):
    """9.8: logits (1, 2, 0) and u = (.5, .25, .75): a hard choice, with the gradient of the soft y,
    dy_1/da = y_1 (onehot_1 - y) / tau, at two temperatures."""
    u = torch.tensor([0.5, 0.25, 0.75])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, *_, **__: x.copy_(-u.log()))
    net, a = one_hot().train(), torch.tensor([[[1.0, 2, 0]]], requires_grad=True)
    net.tau = tau
    z_q, ids, _ = net(a)
    assert ids.item() == 1
    close(z_q[0, 0], [0, 1, 0])
    y = torch.tensor(y)
    expected = y[1] * (torch.tensor([0.0, 1, 0]) - y) / tau
    close(torch.autograd.grad(z_q[0, 0, 1], a)[0][0, 0], expected)


def test_gumbel_argmax_samples_the_softmax():
    """9.8: over 2e5 draws the ids are distributed as the softmax of the logits."""
    ids = one_hot().train()(torch.tensor([1.0, 2, 0]).expand(1, 200_000, 3))[1]
    close(ids.flatten().bincount() / 200_000, [0.24473, 0.66524, 0.09003], 4e-3)


def test_onehot_eval_has_no_noise():
    """5.1: outside training the id is the largest logit."""
    z = torch.randn(2, 100, 3)
    z_q, ids, _ = one_hot().eval()(z)
    assert torch.equal(ids, z.argmax(-1)) and torch.equal(z_q, F.one_hot(ids, 3).float())


def test_temperature_falls(tmp_path, monkeypatch):
    """U5: max(0.5, exp(-rate step)), set by train_step."""
    monkeypatch.chdir(tmp_path)
    data = str(voices(tmp_path / "data"))
    cfg = v.Config(**TINY | {"data": data, "bottleneck": "onehot", "tau_rate": 0.01})
    corpus, model = v.load_corpus(cfg), tiny(bottleneck="onehot").train()
    optimizers, tau = v.make_optimizers(model, cfg), []
    for step in (0, 10, 1000):
        v.train_step(model, optimizers, corpus, step, cfg)
        tau.append(model.bottleneck.tau)
    assert tau == pytest.approx([1, math.exp(-0.1), 0.5])


def test_kl_to_uniform():
    """9.8: .266217 for softmax(1, 2, 0); 0 for equal shares, ln K for a single code."""
    close(v.kl_to_uniform(torch.tensor([1.0, 2, 0]).softmax(-1)), 0.266217)
    close(v.kl_to_uniform(torch.full((7,), 1 / 7)), 0.0)
    close(v.kl_to_uniform(F.one_hot(torch.tensor(2), 7).float()), math.log(7))


def test_usage_loss_is_of_the_average():
    """5.1: the usage term is the KL of the batch average: confident but varied codes cost nothing."""
    z = 50 * torch.eye(3)[None]
    close(one_hot().eval()(z)[2], 0.0)
    close(one_hot().eval()(z[:, :1])[2], math.log(3))


def binary():
    net = v.Binary(16, 4)
    with torch.no_grad():
        net.logits.weight.copy_(torch.eye(4)), net.logits.bias.zero_()
        net.e.weight.copy_(torch.eye(4)), net.e.bias.zero_()
    return net, torch.tensor([[[-2.0, 0, 0.1, 3]]], requires_grad=True)


def test_binary_by_hand():
    """9.9: logits (-2, 0, .1, 3): the bits, their id, and the gradient p (1 - p) of each."""
    net, a = binary()
    z_q, ids, _ = net(a)
    (z_q / 2).sum().backward()  # z_q is 2 bits - 1
    close(z_q[0, 0], [-1, -1, 1, 1])
    close(a.grad[0, 0], [0.104994, 0.25, 0.249376, 0.045177])
    assert ids.item() == 0b1100


def test_binary_kl():
    """9.9: the KL of each bit to a fair coin, and the usage loss that sums them."""
    net, a = binary()
    p = a.detach()[0, 0].sigmoid()
    close(v.kl_to_uniform(torch.stack([p, 1 - p], -1)), [0.327813, 0, 0.001248, 0.502282])
    close(net(a)[2], 0.831344)


@pytest.mark.parametrize("bottleneck", ["vq", "onehot", "binary", "none"])
def test_bottlenecks_share_an_interface(bottleneck):
    """z_q like z, int64 ids below K, a scalar loss, and a gradient for the encoder."""
    model = tiny(bottleneck=bottleneck).train()
    z, z_q, ids, loss = model.encode(tones(4))
    assert z.shape == z_q.shape == (4, 8, 16) and ids.shape == (4, 8) and loss.shape == ()
    assert ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 16
    (model(z_q, torch.zeros(4, dtype=torch.long), tones(4)).mean() + loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.encoder.layers[0][0].weight.grad.any()


def test_no_bottleneck_is_the_identity():
    """The control lets everything through, at no cost."""
    z = torch.randn(2, 5, 4)
    z_q, ids, loss = v.Nothing()(z)
    assert torch.equal(z_q, z) and ids.shape == (2, 5) and not ids.any() and loss == 0


@pytest.mark.parametrize("bottleneck", ["vq", "binary"])
def test_what_a_step_minimizes(tmp_path, monkeypatch, bottleneck):
    """nats + the last two terms of Eq. (3) / the samples of a crop; of the others, their weight."""
    monkeypatch.chdir(tmp_path)
    options = {"bottleneck": bottleneck, "jitter": 0.0, "usage": 0.3, "revive": 0.0}
    cfg = v.Config(**TINY | options | {"data": str(voices(tmp_path / "data"))})
    corpus, model = v.load_corpus(cfg), tiny(**options).train()
    batch = v.get_batch(corpus, cfg, 0)
    _, z_q, _, loss = model.eval().encode(batch["wave"])
    model.train().encoder.eval()  # the same norms
    expected = loss / cfg.crop if bottleneck == "vq" else 0.3 * loss
    nats = model(z_q, batch["speaker"], batch["wave"]).mean()
    weight = model.encoder.project.weight
    (gradient,) = torch.autograd.grad(nats + expected, weight)
    log = v.train_step(model, v.make_optimizers(model, cfg), corpus, 0, cfg)
    close(log["code_loss"], expected)
    close(log["nats"], nats, 1e-5)
    close(weight.grad, gradient, 1e-5)


# -------------------- units --------------------
def test_perplexity_limits():
    """9.11: K for a uniform use of K codes, 1 for a single code."""
    close(v.perplexity(torch.arange(12).repeat(5)), 12.0, 1e-5)
    close(v.perplexity(torch.full((3, 9), 4)), 1.0)
    close(v.perplexity(torch.tensor([0, 0, 1, 2])), 2**1.5)  # 1.5 bits


def test_bottleneck_none_has_no_ids():
    model = tiny(bottleneck="none")
    assert v.represent(model, tones(1)[0], model.cfg).keys() == {"encoder", "codes"}


def test_jitter_statistics():
    """9.10: .12 of the latents are replaced, by the left and right neighbour alike often."""
    move = v.jitter(torch.arange(200_000.0)[None, :, None], 0.12)[0, :, 0] - torch.arange(200_000)
    assert set(move.tolist()) == {-1, 0, 1}
    assert (move != 0).float().mean().item() == pytest.approx(0.12, abs=3e-3)
    assert (move == 1).float().mean().item() == pytest.approx(0.06, abs=3e-3)


def test_jitter_stays_in_range_and_in_its_row():
    """9.10: the edges have no neighbour outside, and utterances do not mix."""
    z = torch.arange(4000.0).view(1000, 4, 1)
    out = v.jitter(z, 1.0)
    assert torch.equal(out // 4, z // 4)
    assert {*out[:, 0].sub(z[:, 0]).unique().tolist()} == {0, 1}
    assert {*out[:, 3].sub(z[:, 3]).unique().tolist()} == {-1, 0}
    assert torch.equal(v.jitter(z, 0.0), z)


def test_jitter_moves_whole_latents_and_their_gradient():
    """6.9: all D values move together, and the gradient goes to the frame that was used."""
    z = torch.arange(50.0)[None, :, None].repeat(1, 1, 3).requires_grad_()
    out = v.jitter(z, 0.5)
    out.sum().backward()
    assert torch.equal(out[..., 0], out[..., 2])
    assert torch.equal(z.grad[0, :, 0], out[0, :, 0].long().bincount(minlength=50).float())


def test_jitter_in_training_only():
    """9.10: eval mode conditions on the codes as they are, training on replaced ones; ids are kept."""
    model = tiny(jitter=1.0)
    z_q, who = torch.randn(2, 8, 16), torch.zeros(2, dtype=torch.long)
    assert torch.equal(model.condition(z_q, who), model.condition(z_q, who))
    exact = model.condition(z_q, who)
    assert not torch.equal(model.train().condition(z_q, who), exact)
    same, wave = tiny(jitter=0.0).train(), tones(2)
    same.load_state_dict(model.state_dict())
    assert torch.equal(model.train().encode(wave)[2], same.encode(wave)[2])


# -------------------- mu-law --------------------
def test_mu_law_round_trip():
    """9.7: coding undoes decoding for all 256 levels, which are symmetric about 0."""
    y = torch.arange(256)
    assert torch.equal(v.mu_law(v.inverse_mu_law(y)), y)
    close(v.inverse_mu_law(y), -v.inverse_mu_law(255 - y))


def test_mu_law_error():
    """9.7: at most .0216 off, near full scale; 37.8 dB for noise of deviation .1; clipping."""
    x = torch.linspace(-1, 1, 200_001)
    error = (v.inverse_mu_law(v.mu_law(x)) - x).abs()
    close(error.max(), 0.02159, 2e-5)
    assert x[error.argmax()].abs().item() == pytest.approx(0.978, abs=2e-3)
    x = 0.1 * torch.randn(100_000)
    error = v.inverse_mu_law(v.mu_law(x)) - x
    assert (10 * (x.var() / error.var()).log10()).item() == pytest.approx(37.8, abs=0.3)
    assert v.mu_law(torch.tensor([-3.0, 3])).tolist() == [0, 255]


# -------------------- the decoder --------------------
def test_wavenet_is_causal():
    """9.4: input 50 changes outputs 50..80, all of them and no other."""
    net, condition = wavenet()[0].double(), torch.zeros(1, 1, 5).double()
    previous = torch.randint(256, (1, 120))
    other = previous.clone()
    other[0, 50] = (other[0, 50] + 100) % 256
    changed = (
        (net(previous, condition) != net(other, condition)).any(-1)[0].nonzero().flatten().tolist()
    )
    assert changed == list(range(50, 81))


def test_model_predicts_each_sample_from_the_past():
    """9.4: changing sample t of the audio changes the logits of samples t + 1 .. t + 31 alone."""
    model, seen = tiny(**NET).double(), []
    model.decoder.register_forward_hook(lambda *args: seen.append(args[2]))
    z_q, who, wave = torch.randn(1, 2, 16).double(), torch.tensor([1]), 0.1 * torch.randn(1, 160)
    other = wave.clone()
    other[0, 50] = 0.9
    model(z_q, who, wave), model(z_q, who, other)
    changed = (seen[0] != seen[1]).any(-1)[0].nonzero().flatten().tolist()
    assert changed == list(range(51, 82))


def test_model_scores_the_sample_itself():
    """The target at t is level t, and the decoder starts from 128, silence."""
    model, seen = tiny(), []
    model.decoder.register_forward_hook(lambda *args: seen.append((args[1][0], args[2])))
    wave = tones(2)
    nats = model(torch.randn(2, 8, 16), torch.tensor([0, 1]), wave)
    (previous, logits), y = seen[0], v.mu_law(wave)
    assert (previous[:, 0] == 128).all() and torch.equal(previous[:, 1:], y[:, :-1])
    assert nats.shape == (2,)  # of each crop
    close(nats, -logits.log_softmax(-1).gather(2, y[..., None]).mean((1, 2)), 1e-5)


@pytest.mark.parametrize("depth, field", [(4, 31), (6, 127), (8, 511), (10, 2047)])
def test_wavenet_receptive_field(depth, field):
    """9.6: two cycles of 1, 2, 4 ..: the last output has a gradient from exactly so many inputs."""
    net, seen = v.Decoder(v.Config(**NET | {"depth": depth}), 2).double(), []
    net.embed.register_forward_hook(
        lambda *args: (args[2].retain_grad(), seen.append(args[2])) and None
    )
    net(torch.randint(256, (1, field + 9)), torch.zeros(1, 1, 2).double())[
        0, -1
    ].square().sum().backward()
    assert seen[0].grad.any(-1)[0].nonzero().flatten().tolist() == list(range(9, field + 9))


def naive_wavenet(net, previous, c):
    """One stream, sample by sample and layer by layer, with every past input looked up."""
    hop = len(previous) // len(c)
    weights = net.project.weight.chunk(len(net.dilations))  # of each layer
    S = net.sizes[0]
    inputs = [[] for _ in net.dilations]
    logits = []
    for t, level in enumerate(previous.tolist()):
        h = net.embed.weight[level]
        total = 0
        for i, dilation in enumerate(net.dilations):
            inputs[i].append(h)
            past = inputs[i][t - dilation] if t >= dilation else torch.zeros_like(h)
            u = net.dilated[i].weight @ torch.cat([past, h]) + net.dilated[i].bias
            u = u + weights[i] @ c[t // hop]
            gated = u[: len(h)].tanh() * u[len(h) :].sigmoid()
            out = net.mix[i].weight @ gated + net.mix[i].bias
            total = total + out[:S]
            h = (h + out[S:]) / 2**0.5
        total = (total / len(net.dilations) ** 0.5).relu()
        hidden = (net.output[1].weight @ total + net.output[1].bias).relu()
        logits.append(net.output[3].weight @ hidden + net.output[3].bias)
    return torch.stack(logits)


@torch.no_grad()
def test_wavenet_is_a_naive_loop():
    """3.1: the definition, with one code for 8 samples."""
    net, previous, condition = wavenet()
    full = net(previous[:, :48], condition[:, :6])
    assert full.std() > 0.05
    for b in range(2):
        close(full[b], naive_wavenet(net, previous[b, :48], condition[b, :6]), 1e-5)


def test_embedding_starts_smooth():
    """D7: mean square 1 in each level, and the nearer two levels are, the more alike they start, at
    any size; sines and cosines of u."""
    for channels in (8, 32, 368):
        e = v.level_waves(256, channels)
        assert e.shape == (256, channels)
        close(e.square().mean(1), torch.ones(256))
        alike = e @ e[128] / channels
        assert alike[128] > alike[129] > alike[131] > alike[134] and alike[129] > 0.98
        u = torch.linspace(-1, 1, 256)
        close(e[:, 0], 2**0.5 * (math.pi / 2 * u).sin(), 1e-5)
        close(e[:, channels // 2 - 1], 2**0.5 * (8 * math.pi * u).sin(), 1e-4)
        close(e[:, -1], 2**0.5 * (8 * math.pi * u).cos(), 1e-4)
    net = v.Decoder(v.Config(**NET), 5)
    assert torch.equal(net.embed.weight, v.level_waves(256, 8)) and net.embed.weight.requires_grad


def test_conditioning_at_the_code_rate():
    """9.11: projecting a code and repeating it is repeating it and projecting, for each stream its own."""
    net, previous, condition = wavenet()
    logits = net(previous, condition)
    close(logits, net(previous, condition.repeat_interleave(8, 1)), 1e-5)
    close(logits[1:2], net(previous[1:2], condition[1:2]), 1e-5)
    assert (logits - net(previous, condition.roll(1, 0))).abs().mean() > 1e-3


def test_condition_reaches_its_own_samples():
    """3.2: code 2 acts on its 8 samples, and on the 29 that later layers reach from there."""
    net, previous, condition = wavenet()
    net, condition = net.double(), condition.double()
    other = condition.clone()
    other[:, 2] += 1
    changed = (
        (net(previous, condition) != net(previous, other)).any(-1)[0].nonzero().flatten().tolist()
    )
    assert changed == list(range(16, 24 + 29))


def generate(net, condition, steps, temperature, device="cpu"):
    """Generated levels (B, steps), and the logits that each was drawn from."""
    seen = []
    net, condition = net.to(device), condition.to(device)
    hook = net.output.register_forward_hook(lambda *args: seen.append(args[2]))
    levels = v.generate(net, condition, 8, steps, temperature)
    hook.remove()
    return levels.cpu(), torch.stack(seen, 1).cpu()


@pytest.mark.parametrize("depth", [4, 10])
@torch.no_grad()
def test_generated_logits_are_those_of_the_parallel_pass(depth):
    """9.5: for three streams, over two receptive fields or a good part of one."""
    net, previous, condition = wavenet(depth=depth)
    steps = min(previous.shape[1], 600)
    condition = condition[:, : steps // 8]
    y, logits = generate(net, condition, steps, 1.0)
    full = net(F.pad(y, (1, 0), value=128)[:, :-1], condition)
    assert y.shape == (3, steps) and y.dtype == torch.int64 and full.std() > 0.05
    assert len(y.unique()) > 100
    close(logits, full, 1e-5)


@pytest.mark.parametrize("device", RUNNING)
@torch.no_grad()
def test_temperature_zero_takes_the_largest_logit(device):
    """Each sample is the largest logit of the full pass over the samples before it."""
    net, _, condition = wavenet()
    y, _ = generate(net, condition, 64, 0.0, device)
    logits = net.cpu()(F.pad(y, (1, 0), value=128)[:, :-1], condition[:, :8])
    close(logits.gather(2, y[..., None])[..., 0], logits.amax(-1), 1e-5)


@pytest.mark.parametrize("temperature", [1, 0.5])
@pytest.mark.parametrize("device", RUNNING)
@torch.no_grad()
def test_samples_are_drawn_from_the_softmax(device, temperature):
    """9.8: levels come as often as softmax(logits / temperature) says."""
    net = v.Decoder(v.Config(residual=2, skip=2, depth=1, cycles=1), 1)
    net.output[3].weight.zero_()
    net.output[3].bias.copy_(torch.tensor([1.0, 2, 0] + [-1e3] * 253))
    y, _ = generate(net, torch.zeros(200, 15, 1), 120, temperature, device)
    p = (torch.tensor([1.0, 2, 0]) / temperature).softmax(-1)
    close(y.flatten().bincount(minlength=3) / 24_000, p, 0.015)
    assert not torch.equal(y[:, :60], y[:, 60:])  # the noise is drawn anew


def test_a_graph_is_warmed_up_on_the_stream_that_is_captured(monkeypatch):
    """The calls to CUDA, recorded: three calls of the action and the capture on one stream other
    than the default one, and as many replays as are missing. A capture runs nothing."""
    events, active = [], ["default"]

    class Stream:
        pass

    class Enter:
        def __init__(self, kind, stream):
            self.kind, self.stream = kind, stream

        def __enter__(self):
            events.append(self.kind)
            active.append(self.stream)

        def __exit__(self, *_):
            active.pop()

    class Graph:
        def replay(self):
            events.append(("replay", active[-1]))

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: Enter("stream", stream))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: Enter("capture", stream))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    v.repeat(lambda: events.append(("action", active[-1])), 10, torch.device("cuda"))

    own = events[2][1]
    assert isinstance(own, Stream)
    expected = ["wait", "stream", *[("action", own)] * 3, "capture", ("action", own)]
    assert events == [*expected, *[("replay", own)] * 7, "wait"]

    count = []
    v.repeat(lambda: count.append(1), 10, torch.device("cpu"))
    assert len(count) == 10


def test_initial_cross_entropy():
    """9.11: an untrained model of the toy's size knows nothing: ln 256 nats, within .1."""
    model = v.Model(v.Config(**v.TOY), 4).eval()
    with torch.no_grad():
        z, z_q, _, _ = model.encode(tones(8, 1920))
        nats = model(z_q, torch.arange(8) % 4, tones(8, 1920)).mean().item()
    assert nats == pytest.approx(math.log(256), abs=0.1)


def test_parameter_count_of_the_paper():
    """The sizes of 1901.08810: a WaveNet of 21.1 million parameters, an encoder of 10.1 million; the
    last layer's residual output, which nothing follows, is 0.14 million more."""
    with torch.device("meta"):
        model = v.Model(v.Config(), 251)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert (count(model.decoder) - 368 * 369) / 1e6 == pytest.approx(21.1, abs=0.1)
    assert count(model.encoder) / 1e6 == pytest.approx(10.1, abs=0.1)
    assert count(model) == 31_353_104 + 368 * 369


# -------------------- the encoder --------------------
def test_encoder_receptive_field():
    """2.2: each latent sees 16 frames, and there are half as many latents as frames."""
    net, x = v.Encoder(v.Config(channels=32)).eval(), torch.randn(1, 60, 39, requires_grad=True)
    z = net(x)
    assert z.shape == (1, 30, 64)
    z[0, 15].square().sum().backward()
    seen = x.grad.any(-1)[0].nonzero().flatten()
    assert (
        len(seen) == 16 and seen.max() - seen.min() == 15 and abs(seen.float().mean() - 30.5) <= 0.5
    )


def test_encoder_normalizes_in_training():
    """D1: after each convolution, and before the projection, mean 0 and variance 1 over the batch, whatever the input."""
    net, seen = v.Encoder(v.Config(channels=32)).train(), []
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm1d)]
    for norm in norms:
        norm.register_forward_hook(lambda *args: seen.append(args[2]))
    net(5 + 300 * torch.randn(4, 60, 39))
    assert len(seen) == len(norms) == 10
    for x in seen:
        close(x.mean((0, 2)), torch.zeros(32), 1e-4)
        assert (x.var((0, 2), correction=0) < 1.001).all() and x.var(
            (0, 2), correction=0
        ).median() > 0.99


def test_mfcc_gain_moves_only_c0():
    """A constant gain adds its logarithm, times sqrt(n_mels), to c0, and changes none of the other 38."""
    cfg, wave = v.Config(**TINY), torch.randn(2, 1600)
    x, louder = v.mfcc(wave, cfg), v.mfcc(3 * wave, cfg)
    assert x.shape == (2, 20, 39)
    close((louder - x)[..., 0], torch.full((2, 20), math.log(3) * 40**0.5), 1e-4)
    close(louder[..., 1:], x[..., 1:], 1e-4)


def test_mfcc_differences_of_a_ramp(monkeypatch):
    """The first difference of a linear ramp is its slope, the second 0, away from the edges."""
    ramp = (0.5 * torch.arange(30.0))[None, :, None].expand(1, 30, 40)
    monkeypatch.setattr(v, "log_mel", lambda wave, cfg: ramp)
    x = v.mfcc(torch.zeros(1, 30 * 80), v.Config(**TINY))[0]
    close(x[2:-2, 13], torch.full((26,), 0.5 * 40**0.5), 1e-5)
    close(x[4:-4, 26], torch.zeros(22), 1e-5)


def test_mfcc_in_float32_under_autocast():
    """The features are the same under bfloat16 autocast."""
    cfg, wave = v.Config(**TINY), torch.randn(2, 1600)
    with torch.autocast("cpu", torch.bfloat16):
        x = v.mfcc(wave, cfg)
    assert torch.equal(x, v.mfcc(wave, cfg)) and x.dtype == torch.float32


# -------------------- the whole --------------------
def test_swapping_the_speaker():
    """9.11: conversion conditions on the same codes and another speaker, and that changes the prediction."""
    model, wave, seen = tiny(), tones(1, 640)[0], []
    condition = model.condition
    model.condition = lambda z_q, who: seen.append((z_q, who, condition(z_q, who))) or seen[-1][2]
    v.convert(model, [wave, wave], [0, 2], model.cfg)
    (codes, first, a), (again, second, b) = seen
    assert torch.equal(codes, again) and (first.item(), second.item()) == (0, 2)
    close(codes, model.bottleneck.e[model.encode(wave[None])[2]], 1e-5)
    y = torch.randint(256, (1, 640))
    assert torch.equal(a[..., :-3], b[..., :-3]) and not torch.equal(
        model.decoder(y, a), model.decoder(y, b)
    )


def test_convert_keeps_lengths():
    """Waves come back as long as they were, of any length, and None finds a speaker."""
    model, waves = tiny(), [tones(1, n)[0] for n in (801, 640, 1700)]
    out = v.convert(model, waves, [0, 1, None], model.cfg)
    assert [len(w) for w in out] == [801, 640, 1700] and all(w.abs().max() <= 1 for w in out)


def test_convert_together_or_alone():
    """At temperature 0 a wave is converted alike alone and in a batch with a longer one."""
    model = tiny(temperature=0.0)
    waves = [tones(1, n)[0] for n in (320, 800)]
    together = v.convert(model, waves, [0, 1], model.cfg)
    alone = [v.convert(model, [wave], [target], model.cfg)[0] for target, wave in enumerate(waves)]
    close(together[0], alone[0], 1e-5), close(together[1], alone[1], 1e-5)


def test_reconstruction_finds_the_likeliest_speaker():
    """Without a target the speaker is the one of least nats on a crop from the middle, with the
    crop's own codes; all speakers in one pass of the decoder."""
    model, wave, seen = tiny(n_speakers=5, temperature=0.0), tones(1, 3000)[0], []
    as_3 = v.convert(model, [wave], [3], model.cfg)[0]
    first = (3000 - 1280) // 2
    crop = wave[None, first : first + 1280]
    z_q = model.encode(crop)[1]
    with torch.no_grad():
        each = torch.cat([model(z_q, torch.tensor([s]), crop) for s in range(5)])
    forward = model.forward
    model.forward = lambda *given: seen.append((given, forward(*given))) or seen[-1][1]
    assert v.likeliest_speaker(model, wave, model.cfg).tolist() == [each.argmin().item()]
    ((z, speaker, part), nats) = seen[0]
    assert len(seen) == 1 and speaker.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(part, crop.expand(5, -1)) and torch.equal(z, z_q.expand(5, -1, -1))
    close(nats, each, 1e-5)

    model.forward = lambda z, s, part: (s - 3.0).abs()
    close(v.convert(model, [wave], [None], model.cfg)[0], as_3)
    v.convert(model, [wave[:100]], [None], model.cfg)  # shorter than a code


def test_learning_rate_is_halved_three_times(tmp_path, monkeypatch):
    """U6: at 40, 60 and 80 % of the steps."""
    monkeypatch.chdir(tmp_path)
    cfg = v.Config(**TINY | {"data": str(voices(tmp_path / "data")), "steps": 100})
    corpus, model = v.load_corpus(cfg), tiny().train()
    optimizers, rates = v.make_optimizers(model, cfg), []
    for step in (0, 39, 40, 60, 80, 99):
        v.train_step(model, optimizers, corpus, step, cfg)
        rates.append(optimizers["autoencoder"].param_groups[0]["lr"] / cfg.lr)
    assert rates == [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_checkpoint_round_trip(tmp_path, codebook):
    """9.11: a checkpoint holds everything, e, N, M and the feature statistics included."""
    model = tiny(codebook=codebook).train()
    optimizers, wave, who = v.make_optimizers(model, model.cfg), tones(3), torch.arange(3)
    _, z_q, _, loss = model.encode(wave)
    (model(z_q, who, wave).mean() + loss).backward()
    optimizers["autoencoder"].step()
    model.mean.normal_()
    v.save(
        tmp_path / "model.pt",
        script="vqvae",
        step=7,
        config=asdict(model.cfg),
        speakers=["a", "b", "c"],
        model=model.state_dict(),
        optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
    )
    loaded, cfg, checkpoint = v.load(tmp_path, device="cpu")
    a, b = model.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys() >= {"bottleneck.e", "bottleneck.N", "bottleneck.M", "mean", "std"}
    assert all(torch.equal(a[k], b[k]) for k in a) and not loaded.training
    assert cfg == model.cfg and checkpoint["step"] == 7
    assert checkpoint["speakers"] == ["a", "b", "c"]
    assert torch.equal(model.eval().encode(wave)[2], loaded.encode(wave)[2])


def test_one_batch_can_be_learned_by_heart():
    """Sixty steps on the same three crops bring the nats well below their start."""
    model, wave, who = tiny().train(), tones(3), torch.arange(3)
    optimizer, nats = v.make_optimizers(model, model.cfg)["autoencoder"], []
    for _ in range(60):
        _, z_q, _, loss = model.encode(wave)
        nats.append(model(z_q, who, wave).mean())
        optimizer.zero_grad()
        (nats[-1] + loss).backward()
        optimizer.step()
    assert nats[-1] < 0.75 * nats[0]


def voices(root):
    """Three speakers, each a pitch, of 12 utterances, each five random vowel-like spectra or pauses."""
    rng, t = np.random.default_rng(0), np.arange(1600) / 8000
    for s, pitch in enumerate((90, 140, 220)):
        (root / f"s{s}").mkdir(parents=True)
        for u in range(12):
            parts = []
            for peak in rng.choice([0, 500, 1200, 2500], 5):
                h = np.arange(1, 3600 // pitch)[:, None]
                level = (0.3 * np.exp(-(((h * pitch - peak) / 300) ** 2)) + 0.02) * (peak > 0)
                parts.append((level * np.sin(2 * np.pi * pitch * h * t)).sum(0))
            wave = np.concatenate(parts)
            wave = 0.5 * wave / (np.abs(wave).max() + 1e-9) + rng.normal(0, 2e-3, 8000)
            sf.write(root / f"s{s}" / f"{u}.wav", wave, 8000)
    return root


def test_the_codes_are_used(tmp_path, monkeypatch):
    """A short run: the nats fall, and another utterance's codes predict the waveform worse than its own."""
    monkeypatch.chdir(tmp_path)
    cfg = v.Config(**TINY | {"data": str(voices(tmp_path / "data")), "steps": 80})
    corpus = v.load_corpus(cfg)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    optimizers = v.make_optimizers(model, cfg)
    log = [v.train_step(model.train(), optimizers, corpus, step, cfg) for step in range(cfg.steps)]
    with torch.no_grad():
        metrics = v.sample(model.eval(), corpus, cfg, tmp_path)
    nats = metrics["nats"]
    assert log[-1]["nats"] < log[0]["nats"] - 1
    assert nats["true"] + 0.05 < nats["shuffled"] and nats["true"] < nats["wrong_speaker"]
    assert log[-1]["code_loss"] < 0.1 and 1 < log[-1]["perplexity"] <= cfg.codes


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
    for name in ("encoder", "codes"):
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


def test_the_beginning_of_the_toy_run(toy_folder, monkeypatch):
    """Against the untrained control: training brings the phone into encoder and codes, and the
    speaker leaves the codes, more than the latents before them."""
    monkeypatch.chdir(toy_folder)
    cfg = v.Config(**v.TOY | {"steps": 250, "device": "cpu"})
    corpus = v.load_corpus(cfg)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    untrained = probes(model.eval(), corpus, cfg, 200)
    optimizers = v.make_optimizers(model, cfg)
    for step in range(cfg.steps):
        v.train_step(model.train(), optimizers, corpus, step, cfg)
    known = probes(model.eval(), corpus, cfg, 200)
    assert known["codes"]["phone"] > untrained["codes"]["phone"] + 0.1, known
    assert known["encoder"]["phone"] > untrained["encoder"]["phone"] + 0.05, known
    assert known["codes"]["speaker"] < untrained["codes"]["speaker"] - 0.05, known
    assert known["codes"]["speaker"] < known["encoder"]["speaker"], known
