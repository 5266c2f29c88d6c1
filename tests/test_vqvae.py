# SPDX-License-Identifier: MIT
"""Checks of the method in vqvae.py: numbers worked out by hand, exact identities, and one short run."""

import math
from dataclasses import asdict
from types import SimpleNamespace

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


# The sampler in torch records a CUDA graph; its single steps are compared on the CPU too.
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RUNNING = [(np, "cpu"), pytest.param(torch, "cuda", marks=GPU)]


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
    """The quantiser of the worked example, and its four latents."""
    # two samples in a crop, one in a hop: a code has two
    tiny = dict(hop=1, win=2, n_fft=2, crop=2, device="cpu")
    options = dict(codes=3, d_code=2, decay=0.9, revive=0.0, smoothing=0.0) | options
    vq = v.VectorQuantizer(v.Config(**tiny | options))
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


# -------------------- straight-through --------------------
def test_straight_through_copies_the_gradient():
    """9.1: the value is the hard one, the gradient reaches the soft one unchanged."""
    z, hard, G = *torch.randn(2, 4, 2).requires_grad_(), torch.arange(8.0).view(4, 2)
    z.retain_grad(), hard.retain_grad()
    out = v.straight_through(hard, z)
    out.backward(G)
    close(out, hard)
    assert torch.equal(z.grad, G) and hard.grad is None


def test_straight_through_passes_the_quantiser():
    """9.1: the quantiser hands the decoder's gradient to the latents, exactly."""
    vq, z = hand()
    z_q, _, _ = vq.eval()(z)
    z_q.backward(G := torch.arange(8.0).view(1, 4, 2))
    assert torch.equal(z.grad, G)


# -------------------- vector quantisation by hand --------------------
def test_vq_nearest_codes():
    """9.2: ids 0 0 1 1, and z_q is those rows of the codebook."""
    vq, z = hand()
    z_q, ids, _ = vq.eval()(z)
    assert ids.tolist() == [[0, 0, 1, 1]]
    close(z_q, vq.e[ids])


def test_vq_nearest_by_squared_distance():
    """4.1: argmin of |z|^2 - 2 z e + |e|^2 is the nearest code, for random latents."""
    vq, z = v.VectorQuantizer(v.Config()).eval(), torch.randn(2, 50, 64)
    assert torch.equal(vq(z)[1], torch.cdist(z, vq.e[None]).argmin(-1))


def test_vq_tie_takes_the_lowest_index():
    """4.1: of two equally near codes the first is taken."""
    vq, _ = hand()
    assert vq.eval()(torch.tensor([[[1.5, 1.0]]]))[1].item() == 0


def test_vq_commitment_value_and_gradient():
    """9.2: beta times .75, and its gradient with respect to z."""
    vq, z = hand()
    loss = vq.eval()(z)[2]
    loss.backward()
    close(loss, 0.1875)
    close(z.grad[0], [[0, -0.0625], [0.0625, -0.0625], [0, 0.0625], [0.0625, 0.0625]])


def test_vq_codebook_loss_value_and_gradient():
    """9.2: the codebook's own term, .75, and its gradient with respect to e; the latents get none of it."""
    vq, z = hand(codebook="gradient", beta=0.0)
    loss = vq.eval()(z)[2]
    loss.backward()
    close(loss, 0.75)
    close(vq.e.grad, [[-0.25, 0.5], [-0.25, -0.5], [0, 0]])
    assert not z.grad.any()


def test_vq_stop_gradients():
    """9.2: with both terms on, e gets the gradient of the codebook's term alone, z that of the commitment."""
    vq, z = hand(codebook="gradient")
    loss = vq.eval()(z)[2]
    loss.backward()
    close(loss, 0.9375)
    close(vq.e.grad, [[-0.25, 0.5], [-0.25, -0.5], [0, 0]])
    close(z.grad[0], [[0, -0.0625], [0.0625, -0.0625], [0, 0.0625], [0.0625, 0.0625]])


def test_vq_loss_is_per_sample():
    """4.2: |.|^2, a sum over D for a latent, is divided by the samples, as the likelihood is."""
    close(hand(crop=320)[0].eval()(hand()[1])[2], 0.25 * 1.5 / 320)


def test_vq_perplexity_of_the_example():
    """9.2: two codes, alike often."""
    vq, z = hand()
    close(v.perplexity(vq.eval()(z)[1]), 2.0)


def test_encoder_gets_no_gradient_from_the_codebook_loss():
    """The encoder learns nothing from |sg[z] - e|^2, and the codebook does."""
    model = tiny(codebook="gradient", beta=0.0).train()
    model.encode(tones(4))[3].backward()
    assert not any(p.grad.any() for p in model.encoder.parameters() if p.grad is not None)
    assert model.bottleneck.e.grad.any()


def test_codebook_is_trained_by_one_of_two_ways():
    """The optimiser holds the codebook if it learns by gradient, and not if it is a moving average."""
    for codebook in ("gradient", "ema"):
        model = tiny(codebook=codebook)
        held = {
            id(p)
            for p in v.make_optimizers(model, model.cfg)["autoencoder"].param_groups[0]["params"]
        }
        assert (id(model.bottleneck.e) in held) == (codebook == "gradient")
        assert {id(p) for p in model.parameters()} - held <= {id(model.bottleneck.e)}


def test_gradient_codebook_is_not_moved_by_the_statistics():
    """With codebook="gradient" a training pass counts, and leaves e to the optimiser."""
    vq, z = hand(codebook="gradient")
    vq.train()(z)
    close(vq.N, [1.1, 1.1, 0.9])
    assert vq.e.tolist() == E


# -------------------- moving averages --------------------
def test_ema_without_smoothing():
    """9.3: N, M and e after one step; the code that no latent chose stays where it was."""
    vq, z = hand()
    vq.train()(z)
    close(vq.N, [1.1, 1.1, 0.9])
    close(vq.M, [[0.1, 0.9], [3.4, 1.3], [8.1, 8.1]])
    close(vq.e, [[0.090909, 0.818182], [3.090909, 1.181818], [9, 9]], 2e-6)


def test_ema_with_laplace_smoothing():
    """9.3: e = M / N' with N' = (N + eps) / (sum N + K eps) sum N; N itself is not overwritten."""
    vq, z = hand(smoothing=0.1)
    vq.train()(z)
    close(vq.e, [[0.091398, 0.822581], [3.107527, 1.188172], [8.883871, 8.883871]], 2e-6)
    close(vq.N, [1.1, 1.1, 0.9])
    close((vq.M[:, 0] / vq.e[:, 0]), [1.094118, 1.094118, 0.911765], 2e-6)
    close((vq.M[:, 0] / vq.e[:, 0]).sum(), vq.N.sum(), 2e-6)


def test_ema_counts_of_zero_fling_codes_away():
    """9.3: why N starts at 1: with N = 0 and M = e an unused code goes to 8.1e5."""
    vq, z = hand(smoothing=1e-5)
    vq.N.zero_()
    vq.train()(z)
    close(vq.e[2], [8.1e5, 8.1e5], 1e-3)


def test_ema_unhit_code_stays_for_long():
    """9.3: with N = 1 and M = e an unused code is in place after 200 steps, also with smoothing."""
    for smoothing in (0.0, v.Config().smoothing):
        vq, z = hand(smoothing=smoothing, decay=0.99)
        for _ in range(200):
            vq.train()(z)
        close(vq.e[2], [9, 9], 1e-4)


def test_decoder_sees_the_old_codes():
    """4.3: z_q comes from e as it was before the update of the same step."""
    vq, z = hand()
    z_q, ids, loss = vq.train()(z)
    close(z_q, torch.tensor(E)[ids])
    close(loss, 0.1875)


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
    """4.4: the codes start as K different latents, with N the share of a code in a batch and M = e N."""
    cfg = v.Config(codes=8, d_code=2)  # 64 crops of 16 latents: 128 for each of 8 codes
    vq, z = v.VectorQuantizer(cfg), torch.arange(40.0).view(20, 2)
    vq.start(z)
    rows = {tuple(row) for row in vq.e.tolist()}
    assert len(rows) == 8 and rows <= {tuple(row) for row in z.tolist()}
    assert torch.equal(vq.M, vq.e * 128) and torch.equal(vq.N, torch.full((8,), 128.0))
    before = vq.e.clone()
    vq.update(z[:8].repeat(128, 1), torch.arange(8).repeat(128))
    assert (vq.N > 100).all() and (
        vq.e - before
    ).abs().max() < 1  # nothing is dead after the first step


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


def test_autocast_leaves_the_ids():
    """9.11: under bfloat16 autocast the nearest codes are those of float32, far from the origin too."""
    model, z = tiny(codes=512, d_code=64), torch.randn(4, 64, 64) + 10
    model.encoder.forward = lambda x: z
    model.bottleneck.e.data += 10
    with torch.autocast("cpu", torch.bfloat16):
        _, z_q, ids, loss = model.encode(tones(4))
    assert torch.equal(ids, model.bottleneck(z)[1]) and z_q.dtype == loss.dtype == torch.float32


# -------------------- the other bottlenecks --------------------
def one_hot(**options):
    net = v.OneHot(v.Config(codes=3, d_code=3, **options))
    with torch.no_grad():
        (
            net.logits.weight.copy_(torch.eye(3)),
            net.logits.bias.zero_(),
            net.e.weight.copy_(torch.eye(3)),
        )
    return net


@pytest.mark.parametrize(
    "tau, y", [(1.0, [0.308117, 0.418775, 0.273108]), (0.5, [0.275260, 0.508478, 0.216262])]
)
def test_gumbel_softmax_by_hand(monkeypatch, tau, y):
    """9.8: logits (1, 2, 0) and u = (.5, .25, .75): the soft one-hot at two temperatures."""
    u = torch.tensor([0.5, 0.25, 0.75])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, *_, **__: x.copy_(-u.log()))
    monkeypatch.setattr(v, "straight_through", lambda hard, soft: soft)
    soft, ids, _ = one_hot().train()(torch.tensor([[[1.0, 2, 0]]]), tau)
    close(soft[0, 0], y)
    assert ids.item() == 1


def test_gumbel_argmax_samples_the_softmax():
    """9.8: over 2e5 draws the ids are distributed as the softmax of the logits."""
    ids = one_hot().train()(torch.tensor([1.0, 2, 0]).expand(1, 200_000, 3), 1.0)[1]
    close(ids.flatten().bincount() / 200_000, [0.24473, 0.66524, 0.09003], 4e-3)


def test_onehot_is_hard_forward_and_soft_backward(monkeypatch):
    """5.1: the decoder sees a row of e in both modes; the gradient is that of the soft one-hot."""
    net, z = one_hot(), torch.tensor([[[1.0, 2, 0]]], requires_grad=True)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda x, *_, **__: x.fill_(1))  # no noise
    for mode in (True, False):
        z_q, ids, _ = net.train(mode)(z, 1.0)
        close(z_q, F.one_hot(ids, 3).float())
        p = z.detach().softmax(-1)[0, 0]
        close(torch.autograd.grad(z_q[0, 0, 1], z)[0][0, 0], p[1] * (torch.tensor([0.0, 1, 0]) - p))


def test_onehot_eval_has_no_noise():
    """5.1: outside training the id is the largest logit."""
    z = torch.randn(2, 100, 3)
    assert torch.equal(one_hot().eval()(z)[1], z.argmax(-1))


def test_kl_to_uniform():
    """9.8: .266217 for softmax(1, 2, 0); 0 for equal shares, ln K for a single code."""
    close(v.kl_to_uniform(torch.tensor([1.0, 2, 0]).softmax(-1)), 0.266217)
    close(v.kl_to_uniform(torch.full((7,), 1 / 7)), 0.0)
    close(v.kl_to_uniform(F.one_hot(torch.tensor(2), 7).float()), math.log(7))


def test_usage_loss_is_of_the_average():
    """5.1: the usage term is the KL of the batch average: confident but varied codes cost nothing."""
    z = 50 * torch.eye(3)[None]
    close(one_hot(usage=0.1).eval()(z)[2], 0.0)
    close(one_hot(usage=0.1).eval()(z[:, :1])[2], 0.1 * math.log(3))


def binary(**options):
    net = v.Binary(v.Config(codes=16, d_code=4, **options))
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
    net, a = binary(usage=0.1)
    p = a.detach()[0, 0].sigmoid()
    close(v.kl_to_uniform(torch.stack([p, 1 - p], -1)), [0.327813, 0, 0.001248, 0.502282])
    close(net(a)[2], 0.0831344)


@pytest.mark.parametrize("bottleneck", ["vq", "onehot", "binary", "none"])
def test_bottlenecks_share_an_interface(bottleneck):
    """z_q like z, int64 ids below K, a scalar loss, and a gradient for the encoder."""
    model = tiny(bottleneck=bottleneck).train()
    z, z_q, ids, loss = model.encode(tones(4), 1.0)
    assert z.shape == z_q.shape == (4, 8, 16) and ids.shape == (4, 8) and loss.shape == ()
    assert ids.dtype == torch.int64 and (bottleneck == "none" or 0 <= ids.min() and ids.max() < 16)
    (model(z_q, torch.zeros(4, dtype=torch.long), tones(4)) + loss).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert model.encoder.layers[0].weight.grad.any()


def test_no_bottleneck_is_the_identity():
    """The control lets everything through, at no cost."""
    z = torch.randn(2, 5, 4)
    z_q, ids, loss = v.Nothing(v.Config())(z)
    assert torch.equal(z_q, z) and len(ids.unique()) == 10 and loss == 0


# -------------------- units --------------------
def test_perplexity_limits():
    """9.11: K for a uniform use of K codes, 1 for a single code."""
    close(v.perplexity(torch.arange(12).repeat(5)), 12.0, 1e-5)
    close(v.perplexity(torch.full((3, 9), 4)), 1.0)


def test_bit_rate():
    """9.10: ids 0 0 1 2 at 50 Hz carry 75 bits a second."""
    assert float(v.bit_rate(torch.tensor([0, 0, 1, 2]), 4 / 50)) == pytest.approx(75, abs=1e-3)


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
def test_mu_law_values():
    """9.7: the levels of nine amplitudes, and the amplitudes of those levels."""
    y = v.mu_law(torch.tensor([-1, -0.5, -0.1, -0.01, 0, 0.01, 0.1, 0.5, 1]))
    assert y.tolist() == [0, 16, 52, 98, 128, 157, 203, 239, 255] and y.dtype == torch.int64
    close(
        v.inverse_mu_law(y),
        [-1, -0.496677, -0.100675, -0.010225, 8.62159e-5, 0.010225, 0.100675, 0.496677, 1],
    )


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
    close(nats, -logits.log_softmax(-1).gather(2, y[..., None]).mean(), 1e-5)


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


def cached(xp, net, previous, condition):
    """The logits of the step-by-step sampler, fed with `previous`."""
    sampler = v.Sampler(net, condition, 8, xp)
    steps = [torch.as_tensor(sampler.step(y if xp is torch else y.numpy())) for y in previous.T]
    return torch.stack(steps, 1)


@pytest.mark.parametrize("xp, depth", [(np, 4), (torch, 4), (np, 10)])
@torch.no_grad()
def test_cached_steps_equal_the_full_pass(xp, depth):
    """9.5: the ring buffers give the same logits to 1e-5, for three streams, over two receptive fields."""
    net, previous, condition = wavenet(depth=depth)
    assert previous.shape[1] >= 2 * (sum(net.dilations) + 1)
    full = net(previous, condition)
    assert full.std() > 0.05
    close(cached(xp, net, previous, condition), full, 1e-5)
    if depth == 4:  # and a second time: nothing is left over
        close(cached(xp, net, previous, condition), full, 1e-5)


@pytest.mark.parametrize("xp, device", RUNNING)
@torch.no_grad()
def test_sampler_feeds_back_its_own_output(xp, device):
    """At temperature 0 each sample is the largest logit of the full pass over the samples before it."""
    net, _, condition = wavenet()
    y = v.Sampler(net.to(device), condition.to(device), 8, xp).run(64, 0.0).cpu()
    logits = net.cpu()(F.pad(y, (1, 0), value=128)[:, :-1], condition[:, :8])
    assert y.shape == (3, 64) and y.dtype == torch.int64
    close(logits.gather(2, y[..., None])[..., 0], logits.amax(-1), 1e-5)


@pytest.mark.parametrize("temperature", [1, 0.5])
@pytest.mark.parametrize("xp, device", RUNNING)
@torch.no_grad()
def test_sampler_draws_from_the_softmax(xp, device, temperature):
    """9.8: levels come as often as softmax(logits / temperature) says."""
    net = v.Decoder(v.Config(residual=2, skip=2, depth=1, cycles=1), 1)
    net.output[3].weight.zero_()
    net.output[3].bias.copy_(torch.tensor([1.0, 2, 0] + [-1e3] * 253))
    y = (
        v.Sampler(net.to(device), torch.zeros(40, 1, 1, device=device), 600, xp)
        .run(600, temperature)
        .cpu()
    )
    p = (torch.tensor([1.0, 2, 0]) / temperature).softmax(-1)
    close(y.flatten().bincount(minlength=3) / 24_000, p, 0.015)
    assert not torch.equal(y[:, :256], y[:, 256:512])  # the noise is drawn anew


def test_initial_cross_entropy():
    """9.11: an untrained model of the toy's size knows nothing: ln 256 nats, within .1."""
    model = v.Model(v.Config(**v.TOY), 4).eval()
    with torch.no_grad():
        z, z_q, _, _ = model.encode(tones(8, 1920))
        assert model(z_q, torch.arange(8) % 4, tones(8, 1920)).item() == pytest.approx(
            math.log(256), abs=0.1
        )


def test_parameter_count_of_the_paper():
    """The sizes of 1901.08810: a WaveNet of 21.1 million parameters, an encoder of 10.1 million."""
    with torch.device("meta"):
        model = v.Model(v.Config(), 251)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(model.decoder) / 1e6 == pytest.approx(21.1, abs=0.1)
    assert count(model.encoder) / 1e6 == pytest.approx(10.1, abs=0.1)
    assert count(model) == 31_353_104


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


def test_encoder_normalises_in_training():
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


def test_mfcc_dct_is_orthonormal(monkeypatch):
    """A log-mel spectrum that is the j-th cosine of unit norm has the j-th cepstrum 1 and the others 0."""
    n = (np.arange(40) + 0.5) * math.pi / 40
    rows = (
        np.cos(np.arange(13)[:, None] * n)
        * np.where(np.arange(13) == 0, 1, 2**0.5)[:, None]
        / 40**0.5
    )
    monkeypatch.setattr(v, "log_mel", lambda wave, cfg: torch.tensor(rows, dtype=torch.float)[None])
    close(v.mfcc(torch.zeros(1, 13 * 80), v.Config(**TINY))[0, :, :13], torch.eye(13), 1e-5)


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
    """Without a target the speaker is the one of least nats on a crop, with its own codes, from the middle."""
    model, wave, seen = tiny(temperature=0.0), tones(1, 3000)[0], []
    as_1 = v.convert(model, [wave], [1], model.cfg)[0]
    model.forward = lambda z, s, part: seen.append((z, part)) or (s[0] - 1.0).abs()
    close(v.convert(model, [wave], [None], model.cfg)[0], as_1)
    (z, part), z_q = seen[0], model.encode(wave[None])[1]  # 8 of 19 codes, of 160 samples each
    assert (
        len(seen) == 3
        and torch.equal(z, z_q[:, 5:13])
        and torch.equal(part[0], wave[5 * 160 : 13 * 160])
    )


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


def test_learning_rate_is_halved_three_times(tmp_path, monkeypatch):
    """U7: at 40, 60 and 80 % of the steps; and `prepare` leaves the norms as it found them."""
    monkeypatch.chdir(tmp_path)
    cfg = v.Config(**TINY | {"data": str(voices(tmp_path / "data")), "steps": 100})
    corpus, model = v.load_corpus(cfg), tiny()
    v.prepare(model, corpus, cfg)
    optimizers, rates = v.make_optimizers(model, cfg), []
    for step in (0, 39, 40, 60, 80, 99):
        v.train_step(model.train(), optimizers, corpus, step, cfg)
        rates.append(optimizers["autoencoder"].param_groups[0]["lr"] / cfg.lr)
    assert rates == [1, 1, 1 / 2, 1 / 4, 1 / 8, 1 / 8]
    assert {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm1d)} == {0.1}


@pytest.mark.parametrize("codebook", ["ema", "gradient"])
def test_checkpoint_round_trip(tmp_path, codebook):
    """9.11: a checkpoint holds everything, e, N, M and the feature statistics included."""
    model = tiny(codebook=codebook).train()
    optimizers, wave, who = v.make_optimizers(model, model.cfg), tones(3), torch.arange(3)
    _, z_q, _, loss = model.encode(wave)
    (model(z_q, who, wave) + loss).backward()
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
        nats.append(model(z_q, who, wave))
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
    cfg = v.Config(**TINY | {"data": str(voices(tmp_path / "data")), "steps": 150})
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
    assert 2 < metrics["codes_used"] <= cfg.codes and 1 < metrics["perplexity"] <= cfg.codes
    assert 0 < metrics["bits_per_second"] <= 50 * math.log2(cfg.codes)
    assert len((tmp_path / "units.txt").read_text().splitlines()) == len(corpus.held)
    assert len(list(tmp_path.glob("*_as_*.wav"))) == 4 * 3


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


def test_an_eighth_of_the_toy_run(toy_folder, monkeypatch):
    """Against the untrained control: training brings the phone into encoder and codes; quantising drops speaker."""
    monkeypatch.chdir(toy_folder)
    cfg = v.Config(**v.TOY | {"steps": 100, "device": "cpu"})
    corpus = v.load_corpus(cfg)
    model = v.Model(cfg, len(corpus.speakers))
    v.prepare(model, corpus, cfg)
    untrained = probes(model.eval(), corpus, cfg, 300)
    optimizers = v.make_optimizers(model, cfg)
    for step in range(cfg.steps):
        v.train_step(model.train(), optimizers, corpus, step, cfg)
    known = probes(model.eval(), corpus, cfg, 300)
    assert known["codes"]["phone"] > untrained["codes"]["phone"] + 0.1, known
    assert known["encoder"]["phone"] > untrained["encoder"]["phone"] + 0.05, known
    assert known["codes"]["speaker"] < known["encoder"]["speaker"] - 0.1, known
