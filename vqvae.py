# SPDX-License-Identifier: MIT
"""VQ-VAE on speech: discrete units by vector quantisation, and a WaveNet that speaks them.

van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", 2017, arXiv:1711.00937v2.
Chorowski, Weiss, Bengio, van den Oord, "Unsupervised Speech Representation Learning Using WaveNet
Autoencoders", 2019, arXiv:1901.08810. --bottleneck onehot: Jang, Gu, Poole, 2017, arXiv:1611.01144.

The idea. An auto-encoder whose bottleneck is one integer per 20 ms: the encoder's latent is replaced by the
nearest of K learned codes. The decoder is strong, autoregressive and given the speaker for free, so the
narrow code stream carries what it cannot guess: something like phones. An argmin has no gradient: the latent
is given the decoder's gradient at its code. Converting a voice is decoding its codes with another speaker.

    wave (B, N) -> MFCC (B, N / 160, 39) -> Encoder -> z (B, T', D) -> nearest code: ids, z_q (B, T', D)
    z_q -> jitter -> convolution over 3 codes (B, T', 128), speaker (B, S) -> repeated 320 times
                                    mu-law y_1 .. y_{t-1} -> WaveNet -> p(y_t) (B, N, 256)

    L = -log p(x | z_q(x), speaker) + |sg[z_e(x)] - e|^2 + beta |z_e(x) - sg[e]|^2       Eq. (3), 1711.00937
    N_i <- g N_i + (1-g) n_i,  m_i <- g m_i + (1-g) sum_j z_ij,  e_i = m_i / N_i     A.1, for its 2nd term

    symbol      here                   shape              symbol         here            shape
    z_e(x)      z                      (B, T', D)         z (an index)   ids             (B, T')
    z_q(x)      z_q                    (B, T', D)         beta           cfg.beta        0.25
    e           bottleneck.e           (K, D)             gamma, g       cfg.decay       0.99
    N_i, m_i    bottleneck.N, .M       (K,), (K, D)       N samples, T' = N / 320 latents, S speakers

Differs from the papers. Of 1901.08810 we had later work and implementations, not the text.
D1  The encoder's convolutions, and its output before the projection to D, are batch-normalised, on each GPU
    by its own batch, no scale or shift. With the last alone the residual sums grew from 0.4 to 114 (a trial).
D2  A code that is hardly used moves to a random latent of the batch; the first codes are latents of the data.
D3  Counts are Laplace-smoothed in the division, so that no code is divided by nothing.
D4  Codes by moving averages, in 1711.00937 a variant (A.1); --codebook gradient is the 2nd term of L.
D5  No Polyak average of the weights for evaluation: one set of weights to read and to save.
The papers do not say, or not to us
U1  MFCC: 80 Slaney bands of the magnitude, 25 ms, no pre-emphasis; differences over 5 frames; standardised.
U2  Edges of a crop: silence before and after; the differences repeat the edge frame.
U3  The scale of the last two terms of L: here as the equation stands, see VectorQuantizer.forward.
U4  Kernel of the WaveNet: 2, and 1 for its first layer.
U5  Scalings in the WaveNet: residual sums by sqrt(1/2), the sum of the skips by sqrt(1/layers).
U6  One-hot, binary: KL of their average to uniform keeps codes in use; hard in training, too; temperature.
U7  How many steps the halvings of the learning rate belong to: a million; with fewer, in proportion.

The log shows nats, the cross-entropy per sample (ln 256 = 5.55 at the start); code_loss, small beside it;
perplexity of the codes of ONE batch, which with VQ dips in the first 50 steps and recovers. run.json has
the nats also with another utterance's codes, their average and a wrong speaker, each of which should cost;
perplexity over held-out speech, K at most; bits a second. Of its probes compare `encoder` with `codes`.

    python vqvae.py                                  a toy corpus, two minutes on two CPU cores
    python vqvae.py --data DIR                       any folder of audio, the paper's size, for a GPU
    python vqvae.py convert --checkpoint runs/a --source a.wav --target SPEAKER --output c.wav
"""

import argparse
import contextlib
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from math import ceil
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

NAME = Path(__file__).stem
RANK = int(os.environ.get("RANK", 0))  # these three are set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))


@dataclass(frozen=True)
class Config:
    """The settings of a run: the first ones are the same in all six scripts, and the rest are the method's."""

    data: str = ""  # folder of audio; none: toy voices
    test: str = ""  # another folder, usually of unseen speakers, to test on
    out: str = ""  # run folder; none: the next free runs/NAME-N
    include: str = ""  # regex: only files whose path below data has it, such as _mic1 in VCTK
    speaker: str = r"([^/]+)/"  # regex searched in the path below data; group 1 is the speaker
    sample_rate: int = 16000  # Hz
    n_fft: int = 512  # points of the Fourier transform
    win: int = 400  # samples in an analysis window
    hop: int = 160  # samples between frames
    n_mels: int = 80  # mel bands
    crop: int = 5120  # samples in a training example
    batch_size: int = 64  # training examples in a batch, on each GPU
    steps: int = 1_000_000  # training steps
    lr: float = 4e-4  # learning rate of Adam
    seed: int = 0  # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True  # bfloat16 autocast on CUDA
    log_every: int = 100  # steps between log lines
    save_every: int = 5000  # steps between checkpoints

    bottleneck: Literal["vq", "onehot", "binary", "none"] = (
        "vq"  # makes the code discrete; none: a control
    )
    codebook: Literal["ema", "gradient"] = (
        "ema"  # how VQ learns its codes: 1711.00937 A.1, or Eq. (3)
    )
    codes: int = 512  # K, 1711.00937 4.3; binary: log2 K bits, rounded up
    d_code: int = 64  # D, 1901.08810
    beta: float = 0.25  # weight of the commitment, 1711.00937 3.2
    decay: float = 0.99  # gamma of the moving averages, 1711.00937 A.1
    smoothing: float = 1e-5  # D3: Laplace smoothing of the counts
    revive: float = 0.1  # D2: a code used less than this times the average moves to a random latent
    usage: float = 0.1  # onehot, binary: weight of the term that keeps codes in use, U6
    tau_rate: float = 3e-5  # onehot: temperature max(0.5, exp(-rate * step)), U6
    jitter: float = 0.12  # chance that a latent is replaced by a neighbour, 1901.08810
    channels: int = 768  # of the encoder, 1901.08810
    d_condition: int = 128  # channels of the convolution over the codes, 1901.08810
    residual: int = 368  # WaveNet: residual and gated channels, 1901.08810
    skip: int = 256  # WaveNet: channels of skips and output layers, 1901.08810
    cycles: int = 2  # WaveNet: cycles of dilations, 1901.08810
    depth: int = 10  # WaveNet: layers in a cycle, dilations 1, 2, 4 .. 512, 1901.08810
    temperature: float = 1.0  # of sampling

    def __post_init__(self):
        for name, value in asdict(self).items():
            may_be_zero = isinstance(value, float) or name == "seed"
            above_zero = isinstance(value, str | bool) or 0 < value < math.inf
            if not (above_zero or (value == 0 and may_be_zero)):
                raise UserError(f"--{name} {value}: must be a number above 0")
        if not self.hop <= self.win <= self.n_fft:
            raise UserError(f"--hop {self.hop} --win {self.win} --n-fft {self.n_fft}: must rise")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is no CUDA device; leave the flag out")
        if self.crop % (2 * self.hop):
            raise UserError(
                f"--crop {self.crop}: give a multiple of {2 * self.hop}, a code's samples"
            )


# The same model, narrower, at 8 kHz, for two CPU cores and two minutes; beta was chosen by trial.
TOY = dict(
    sample_rate=8000,
    n_fft=256,
    win=200,
    hop=80,
    n_mels=40,
    crop=1920,
    batch_size=8,
    steps=850,
    lr=3e-3,
    log_every=50,
    save_every=250,
    codes=64,
    beta=0.01,
    decay=0.95,
    tau_rate=3e-3,
    channels=128,
    d_condition=32,
    residual=32,
    skip=64,
    cycles=1,
    depth=8,
)
TARGET = "speaker"  # what convert takes: the index of a training speaker


# ==================== the model ====================
class Encoder(nn.Module):
    """MFCC (B, T, 39) at 100 Hz -> latents (B, T / 2, D) at 50 Hz; each sees 16 MFCC frames, 1901.08810."""

    def __init__(self, cfg):
        super().__init__()
        c, norm = cfg.channels, lambda: nn.BatchNorm1d(cfg.channels, affine=False)

        def residual(kernel):
            return Residual(nn.Conv1d(c, c, kernel, padding="same"), norm(), nn.ReLU())

        self.layers = nn.Sequential(
            nn.Conv1d(39, c, 3, padding=1),
            norm(),
            nn.ReLU(),
            residual(3),
            nn.Conv1d(c, c, 4, stride=2, padding=1),
            norm(),
            nn.ReLU(),
            residual(3),
            residual(3),
            residual(1),
            residual(1),
            residual(1),
            residual(1),
            norm(),
        )  # D1: the norms
        self.project = nn.Linear(c, cfg.d_code)

    def forward(self, x):
        return self.project(self.layers(x.mT).mT)  # (B, T', D)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


# Four bottlenecks, one interface: z (B, T', D), temperature -> (z_q (B, T', D), ids (B, T'), loss).
def straight_through(hard, soft):
    """The value of `hard` with the gradient of `soft`: none passes an argmax or a threshold by itself."""
    return hard.detach() + (soft - soft.detach())


class VectorQuantizer(nn.Module):
    """The nearest of K codes: sections 3.1, 3.2 and A.1 of 1711.00937v2."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.e = nn.Parameter(
            torch.randn(cfg.codes, cfg.d_code), requires_grad=cfg.codebook == "gradient"
        )
        self.register_buffer("N", torch.ones(cfg.codes))  # moving averages: latents of a code,
        self.register_buffer("M", self.e.detach().clone())  # and their sum

    def forward(self, z, tau=None):
        ids = (self.e.square().sum(1) - 2 * z @ self.e.T).argmin(
            -1
        )  # Eq. (1); |z|^2 changes nothing
        e = self.e[ids]  # Eq. (2)
        loss = self.cfg.beta * F.mse_loss(z, e.detach())  # commitment: e is not pulled
        if self.cfg.codebook == "gradient":  # D4
            loss = loss + F.mse_loss(e, z.detach())  # Eq. (3): z is not pulled
        # U3: Eq. (3) adds |.|^2, a sum over D, to the log-likelihood of ALL samples of a crop. Ours is their
        # mean, so this is divided by their number too; often seen, a mean over D, is 80 times that.
        loss = loss * self.cfg.d_code / self.cfg.crop
        if self.training:
            self.update(z.detach().flatten(0, 1), ids.flatten())  # the decoder sees the old e
        return straight_through(e, z), ids, loss

    @torch.no_grad()
    def update(self, z, ids):
        """z (n, D), ids (n,): moves N and M, with EMA also e, and revives dead codes, all in float32."""
        K, g = self.cfg.codes, self.cfg.decay
        one_hot = F.one_hot(ids, K).float()
        n, m = one_hot.sum(0), one_hot.T @ z  # latents of each code, and their sum
        random = z[torch.randint(len(z), (K,), device=z.device)]  # where dead codes go, D2
        if dist.is_initialized():  # these have no gradient to average
            dist.all_reduce(n), dist.all_reduce(m), dist.broadcast(random, 0)
        self.N.lerp_(n, 1 - g)  # N <- g N + (1 - g) n, A.1
        self.M.lerp_(m, 1 - g)  # M <- g M + (1 - g) sum z, A.1
        if self.cfg.codebook == "ema":  # e = M / N; D3: N smoothed, not stored
            total, eps = self.N.sum(), self.cfg.smoothing
            self.e.copy_(self.M / ((self.N + eps) / (total + K * eps) * total)[:, None])
        share = self.N.mean()
        dead = self.N < self.cfg.revive * share  # D2: all three, or the next M / N undoes it
        # torch.where, because a boolean index would make the GPU wait
        self.N.copy_(torch.where(dead, share, self.N))
        self.M.copy_(torch.where(dead[:, None], random * share, self.M))
        self.e.copy_(torch.where(dead[:, None], random, self.e))

    @torch.no_grad()
    def start(self, z):
        """e <- K of the latents z (n, D), N <- the share of a code in a batch, M <- N e: a code without
        latents then stays until D2 moves it (N = 0, as often seen, throws it 1 / smoothing times as far)."""
        self.e.copy_(z[torch.randperm(len(z), device=z.device)[: self.cfg.codes]])
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.N.fill_(
            world * self.cfg.batch_size * self.cfg.crop / (2 * self.cfg.hop * self.cfg.codes)
        )
        self.M.copy_(self.e * self.N[:, None])


class OneHot(nn.Module):
    """One of K by straight-through Gumbel-softmax (1611.01144); its code is a linear map of it."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.logits = cfg, nn.Linear(cfg.d_code, cfg.codes)
        self.e = nn.Linear(cfg.codes, cfg.d_code, bias=False)

    def forward(self, z, tau=None):
        a = self.logits(z)  # (B, T', K)
        y = F.gumbel_softmax(a, tau) if self.training else a.softmax(-1)
        ids = y.argmax(-1)  # no noise outside training
        loss = self.cfg.usage * kl_to_uniform(a.softmax(-1).mean((0, 1)))
        # U6: hard codes also in training; 1711.00937 reports that the decoder inverts soft ones
        return self.e(straight_through(F.one_hot(ids, self.cfg.codes).float(), y)), ids, loss


class Binary(nn.Module):
    """log2 K bits, rounded up, a sigmoid cut at .5, straight-through; the code is a linear map of them."""

    def __init__(self, cfg):
        super().__init__()
        bits = ceil(math.log2(cfg.codes))
        self.cfg, self.logits, self.e = (
            cfg,
            nn.Linear(cfg.d_code, bits),
            nn.Linear(bits, cfg.d_code),
        )

    def forward(self, z, tau=None):
        p = self.logits(z).sigmoid()  # (B, T', log2 K)
        bits, mean = p > 0.5, p.mean((0, 1))
        ids = (bits * 2 ** torch.arange(bits.shape[-1], device=z.device)).sum(-1)
        loss = self.cfg.usage * kl_to_uniform(torch.stack([mean, 1 - mean], -1)).sum()
        return self.e(2 * straight_through(bits.float(), p) - 1), ids, loss


class Nothing(nn.Identity):
    """The plain auto-encoder, the control of the claim that discretising drops the speaker."""

    def forward(self, z, tau=None):
        ids = torch.arange(
            z.shape[0] * z.shape[1], device=z.device
        )  # every latent a code of its own
        return z, ids.view(z.shape[:2]), z.new_zeros(())


def kl_to_uniform(p):
    """KL(p || uniform) in nats over the last axis: 0 for equal shares, ln K for a single code."""
    return torch.special.xlogy(p, p).sum(-1) + math.log(p.shape[-1])


def jitter(z, p):
    """Time jitter, 1901.08810: each latent of z (B, T', D) becomes, with chance p, one of its neighbours."""
    B, T, _ = z.shape
    move = (torch.rand(B, T, device=z.device) < p) * (
        torch.randint(2, (B, T), device=z.device) * 2 - 1
    )
    index = (torch.arange(T, device=z.device) + move).clamp(0, T - 1)
    return z.gather(1, index[..., None].expand_as(z))  # the gradient goes to the frame used


def mu_law(wave):
    """(..., N) in [-1, 1] -> int64 in 0..255: sgn(x) ln(1 + 255 |x|) / ln 256, in equal steps."""
    f = wave.sign() * (255 * wave.abs()).log1p() / math.log(256)
    return ((f + 1) / 2 * 255 + 0.5).long().clamp(0, 255)


def inverse_mu_law(y):
    f = 2 * y.float() / 255 - 1
    return f.sign() * (256 ** f.abs() - 1) / 255


class Decoder(nn.Module):
    """A WaveNet: p(y_t | y_<t, condition) over 256 levels, by dilated causal convolutions of kernel 2 (U4),
    gated, with residuals and skips. Channels last: a convolution is a product with [h_{t-d}, h_t]."""

    def __init__(self, cfg, d_condition):
        super().__init__()
        self.cfg, R, S = cfg, cfg.residual, cfg.skip
        self.dilations = [2**i for i in range(cfg.depth)] * cfg.cycles
        self.embed = nn.Embedding(256, R)  # a 1x1 convolution of one-hot samples
        self.dilated = nn.ModuleList(nn.Linear(2 * R, 2 * R) for _ in self.dilations)
        self.mix = nn.ModuleList(nn.Linear(R, S + R) for _ in self.dilations[1:])
        self.mix.append(nn.Linear(R, S))  # nothing follows the last residual
        self.condition = nn.Linear(
            d_condition, 2 * R * len(self.dilations), bias=False
        )  # V_l of every layer
        self.output = nn.Sequential(nn.ReLU(), nn.Linear(S, S), nn.ReLU(), nn.Linear(S, 256))

    def forward(self, previous, condition):
        """previous (B, N): y_{t-1} at each t; condition (B, T', C) at the code rate -> logits (B, N, 256)."""
        R, S, L, (B, N) = self.cfg.residual, self.cfg.skip, len(self.dilations), previous.shape
        h = self.embed(previous)  # (B, N, R)
        skip = h.new_zeros(B, N, S)  # float32, also under autocast
        # V_l before each code is repeated N / T' times: the same numbers, N / T' times cheaper
        v = self.condition(condition).view(B, -1, 1, L, 2 * R)  # (B, T', 1, L, 2R)
        for layer, d in enumerate(self.dilations):
            past = F.pad(h, (0, 0, d, 0))[:, :N]  # h_{t-d}, zeros before the start
            u = (
                self.dilated[layer](torch.cat([past, h], -1)).view(B, v.shape[1], -1, 2 * R)
                + v[:, :, :, layer]
            )
            a, b = u.view(B, N, 2 * R).chunk(2, -1)
            m = self.mix[layer](a.tanh() * b.sigmoid())  # (B, N, S + R); the last (B, N, S)
            skip = skip + m[..., :S]
            if layer < L - 1:
                h = (h + m[..., S:]) * 0.5**0.5  # U5: the scalings keep the variance
        return self.output(skip / L**0.5)


class Model(nn.Module):
    """Encoder, bottleneck and decoder, and the mean and deviation of the MFCC."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg, self.n_speakers = cfg, n_speakers
        self.register_buffer("mean", torch.zeros(39))
        self.register_buffer("std", torch.ones(39))
        self.encoder = Encoder(cfg)
        kinds = {"vq": VectorQuantizer, "onehot": OneHot, "binary": Binary, "none": Nothing}
        self.bottleneck = kinds[cfg.bottleneck](cfg)
        self.context = nn.Conv1d(cfg.d_code, cfg.d_condition, 3, padding=1)
        self.decoder = Decoder(cfg, cfg.d_condition + n_speakers)

    def features(self, wave):
        """(B, N) -> x (B, T, 39), T = N // hop: MFCC, standardised."""
        return (mfcc(wave, self.cfg) - self.mean) / self.std

    def encode(self, wave, tau=None):
        """(B, N) -> z (B, T', D), z_q (B, T', D), ids (B, T'), loss; silence follows up to a whole T'."""
        wave = F.pad(wave, (0, -wave.shape[1] % (2 * self.cfg.hop)))
        z = self.encoder(self.features(wave))
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 distances pick other codes
            return z, *self.bottleneck(z.float(), tau)

    def condition(self, z_q, speaker):
        """z_q (B, T', D), speaker (B,) -> (B, T', C): a code with its neighbours, and the speaker one-hot."""
        h = self.context((jitter(z_q, self.cfg.jitter) if self.training else z_q).mT).mT
        who = F.one_hot(speaker, self.n_speakers).to(h.dtype)
        return torch.cat([h, who[:, None].expand(-1, h.shape[1], -1)], -1)

    def forward(self, z_q, speaker, wave):
        """-> -log p(wave (B, N) | z_q, speaker), the mean over samples, in nats."""
        y = mu_law(wave)  # U2: silence before the crop
        previous = F.pad(y, (1, 0), value=128)[:, :-1]  # 128 is silence
        logits = self.decoder(previous, self.condition(z_q, speaker))
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


class Sampler:
    """Decoder.forward one sample at a time, in O(layers): a ring of d inputs gives each layer its h_{t-d}. In
    numpy on a CPU, where torch spends its time on overhead; in torch on a GPU, where a CUDA graph saves
    launching kernels: so all state, even t, is in tensors."""

    def __init__(self, net, condition, hop, xp):
        """condition (B, T', C), each row for hop samples; xp: the module numpy or torch."""
        self.R, self.S, self.B, self.hop, self.xp = (
            net.cfg.residual,
            net.cfg.skip,
            len(condition),
            hop,
            xp,
        )
        self.ours = ours = lambda x: xp.asarray(x.detach().contiguous())
        bias = torch.stack([dilated.bias for dilated in net.dilated])  # (L, 2R)
        v = net.condition(condition).unflatten(-1, bias.shape) + bias  # (B, T', L, 2R)
        self.v, self.embed = ours(v.permute(1, 2, 0, 3)), ours(net.embed.weight)
        self.layers = [
            [ours(x) for x in (v.new_zeros(d, self.B, self.R), W.weight.T, V.weight.T, V.bias)]
            for d, W, V in zip(net.dilations, net.dilated, net.mix)
        ]
        self.head = [ours(x) for linear in net.output[1::2] for x in (linear.weight.T, linear.bias)]
        self.t, self.device = ours(v.new_zeros(1, dtype=torch.long)) if xp is torch else 0, v.device

    def step(self, y):
        """y (B,): the previous samples -> logits (B, 256) of the next."""
        R, S, L, t, xp = self.R, self.S, len(self.layers), self.t, self.xp
        h, skip, v = self.embed[y], 0, self.v[t // self.hop].reshape(L, self.B, 2 * R)
        for layer, (ring, W, V, bias) in enumerate(self.layers):
            slot = t % len(ring)
            u = xp.concatenate([ring[slot].reshape(h.shape), h], -1) @ W + v[layer]  # (B, 2R)
            ring[slot] = h  # only after it was read
            a, b = u[:, :R], u[:, R:]
            m = (
                xp.tanh(a) * (0.5 + 0.5 * xp.tanh(0.5 * b)) @ V + bias
            )  # sigmoid(b), and no overflow
            skip = skip + m[:, :S]
            if layer < L - 1:
                h = (h + m[:, S:]) * 0.5**0.5
        self.t += 1
        P, p, Q, q = self.head
        return ((skip / L**0.5).clip(0) @ P + p).clip(0) @ Q + q

    def run(self, steps, temperature):
        """-> (B, steps) int64. argmax(logits + T * Gumbel noise) is a draw from softmax(logits / T)."""
        on = {"device": self.device}
        noise = self.ours(torch.zeros(256, self.B, 256, **on))  # of the next 256 steps
        y, out = (self.ours(torch.full(shape, 128, **on)) for shape in ((self.B,), (steps, self.B)))

        def advance():
            y[:] = (self.step(y) + noise[(self.t - 1) % 256].reshape(-1, 256)).argmax(-1)
            out[self.t - 1] = y

        go = advance
        for i in range(steps):
            if i % 256 == 0:
                noise[:] = self.ours(
                    -temperature * (-torch.rand(noise.shape, **on).clamp(1e-9).log()).log()
                )
            if i == 3 and self.device.type == "cuda":  # warm by now; recording runs nothing
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    advance()
                go = graph.replay
            go()
        return torch.as_tensor(out).T.contiguous()


def mfcc(wave, cfg):
    """(B, N) -> (B, N // hop, 39): 13 cepstra of the log-mel spectrum (orthonormal DCT-II), their first and
    their second differences by regression over two frames on either side (U1)."""
    mel = log_mel(wave, cfg)[:, : wave.shape[1] // cfg.hop]  # (B, T, n_mels)
    n, k = torch.arange(cfg.n_mels, device=wave.device) + 0.5, torch.arange(13, device=wave.device)
    dct = (n[:, None] * k * math.pi / cfg.n_mels).cos() * ((k > 0) + 1) ** 0.5 / cfg.n_mels**0.5
    with torch.autocast(wave.device.type, enabled=False):
        x = [mel @ dct]
    for _ in range(2):
        y = F.pad(x[-1].mT, (2, 2), mode="replicate").mT
        x.append((2 * (y[:, 4:] - y[:, :-4]) + y[:, 3:-1] - y[:, 1:-3]) / 10)
    return torch.cat(x, -1)


# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of the features, and codes drawn from the latents."""
    n = 8 + 4 * cfg.codes * 2 * cfg.hop // (cfg.crop * cfg.batch_size)  # at least 4 K latents
    x = torch.stack([mfcc(get_batch(corpus, cfg, 0, draw=1 + i)["wave"], cfg) for i in range(n)])
    model.mean.copy_(x.mean((0, 1, 2)))
    model.std.copy_(x.std((0, 1, 2)) + 1e-5)
    x, encoder = (x - model.mean) / model.std, model.train().encoder  # (n, B, T, 39)
    if cfg.bottleneck == "vq":
        model.bottleneck.start(torch.cat([encoder(batch) for batch in x]).flatten(0, 1))
    torch.optim.swa_utils.update_bn(x, encoder)  # for the untrained model, which is scored too


def make_optimizers(model, cfg):
    """One, for all that has a gradient. D5: its weights are the ones that are used."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return {"autoencoder": torch.optim.Adam(learned, cfg.lr, fused=True)}


def train_step(model, optimizers, corpus, step, cfg):
    """One step on L of Eq. (3), 1711.00937v2, whose 2nd term is there with --codebook gradient only, D4."""
    batch, optimizer = get_batch(corpus, cfg, step), optimizers["autoencoder"]
    for group in optimizer.param_groups:  # halved at 400k, 600k, 800k steps, U7
        group["lr"] = cfg.lr * 0.5 ** sum(step >= share * cfg.steps for share in (0.4, 0.6, 0.8))
    _, z_q, ids, code_loss = model.encode(
        batch["wave"], tau=max(0.5, math.exp(-cfg.tau_rate * step))
    )
    nats = model(z_q, batch["speaker"], batch["wave"])
    optimizer.zero_grad()
    (nats + code_loss).backward()
    optimizer.step()
    return {
        "nats": nats.detach(),
        "code_loss": code_loss.detach(),
        "perplexity": batch_perplexity(ids.flatten()),
    }


# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> encoder (T', D): latents before quantization; codes (T', D): after it, 50 a second; ids
    (T',): their integers, where there is a codebook."""
    z, z_q, ids, _ = model.encode(wave[None])
    representations = {"encoder": z[0], "codes": z_q[0], "ids": ids[0]}
    if cfg.bottleneck == "none":
        del representations["ids"]
    return representations


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,), each with the index of a training speaker -> waves (N,): its codes, that speaker. None:
    the speaker under whom a crop from the middle of the source is likeliest (a pass of the decoder each)."""
    conditions, width = [], cfg.crop // (2 * cfg.hop)  # codes in a crop
    speakers = torch.arange(model.n_speakers, device=model.mean.device)
    for wave, target in zip(sources, targets):
        z_q = model.encode(wave[None])[1]
        if target is None:
            first = max(0, z_q.shape[1] - width) // 2
            z, middle = (
                z_q[:, first : first + width],
                F.pad(wave[first * 2 * cfg.hop :], (0, 2 * cfg.hop)),
            )
            nats = [model(z, s[None], middle[None, : z.shape[1] * 2 * cfg.hop]) for s in speakers]
            target = torch.stack(nats).argmin()
        conditions.append(model.condition(z_q, speakers[target][None])[0])  # (T', C)
    conditions = nn.utils.rnn.pad_sequence(conditions, batch_first=True)
    sampler = Sampler(model.decoder, conditions, 2 * cfg.hop, torch if conditions.is_cuda else np)
    waves = inverse_mu_law(sampler.run(conditions.shape[1] * 2 * cfg.hop, cfg.temperature))
    return [row[: len(wave)] for row, wave in zip(waves, sources)]


def batch_perplexity(ids):
    """`perplexity` of a few ids (n,), in shapes that do not depend on their values, so that a GPU
    need not wait: each symbol's share is found by comparing it with all n."""
    share = (ids[:, None] == ids).float().mean(1)
    return (-share.log().mean()).exp()


def perplexity(ids):
    """exp of the entropy of the symbols in use: K when all are used alike, 1 when a single one is."""
    p = ids.unique(return_counts=True)[1] / ids.numel()
    return torch.special.entr(p).sum().exp()


def bit_rate(ids, seconds):
    return (
        ids.numel() / seconds * math.log2(perplexity(ids))
    )  # symbols a second times entropy in bits


def write_examples(model, corpus, cfg, out):
    """Writes the first 3 s of four held-out utterances, each as it is, reconstructed, and in the
    voice of the next speaker."""
    utterances = corpus.held[:4]
    waves = [corpus.wave(u)[: 3 * cfg.sample_rate].to(cfg.device) for u in utterances]
    voices = [(s + 1) % len(corpus.speakers) for s in corpus.speaker[utterances]]
    made = convert(model, waves + waves, [None] * len(waves) + voices, cfg)
    for i, u in enumerate(utterances):
        name = f"{corpus.paths[u].stem[:60]}_as_{corpus.speakers[voices[i]][:60]}"
        for kind, wave in zip(
            ("source", "reconstruction", "conversion"), (waves + made)[i :: len(waves)]
        ):
            write_audio(out / f"{name}_{kind}.wav", wave, cfg.sample_rate)


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes units.txt, the codes of held-out utterances as text. Returns nats a sample with the true codes,
    another utterance's, their average and a wrong speaker; and how the codes are used."""
    write_examples(model, corpus, cfg, out)
    nats, known = defaultdict(float), corpus.held[corpus.speaker[corpus.held] < model.n_speakers]
    for i in range(8 if len(known) else 0):
        some = np.arange(i * cfg.batch_size, (i + 1) * cfg.batch_size)
        batch, other = (
            get_batch(corpus, cfg, i, draw=1000, utterances=known[which % len(known)])
            for which in (some, some + 1)
        )
        z_q, who = model.encode(batch["wave"])[1], batch["speaker"]
        wrong = (who + 1 + i % max(1, model.n_speakers - 1)) % model.n_speakers
        cases = {
            "true": (z_q, who),
            "shuffled": (model.encode(other["wave"])[1], who),
            "absent": (z_q.mean((0, 1)).expand_as(z_q), who),
            "wrong_speaker": (z_q, wrong),
        }
        for name, case in cases.items():
            nats[name] += model(*case, batch["wave"]).item() / 8
    if cfg.bottleneck == "none":
        return {"nats": nats}
    held = corpus.held[:200]
    ids = [model.encode(corpus.wave(u)[None].to(cfg.device))[2][0] for u in held]
    lines = [
        f"{corpus.paths[u].stem} {' '.join(map(str, k.tolist()))}\n" for u, k in zip(held, ids)
    ]
    (out / "units.txt").write_text("".join(lines), errors="replace")
    seconds = sum(corpus.length[u] for u in held) / cfg.sample_rate
    every, runs = torch.cat(ids), torch.cat([k.unique_consecutive() for k in ids])
    return {
        "nats": nats,
        "codes_used": len(every.unique()),
        "perplexity": perplexity(every).item(),
        "bits_per_second": bit_rate(every, seconds),
        "bits_per_second_merged": bit_rate(runs, seconds),
    }


# ==================== shared: audio ====================
AUDIO_ENDINGS = ".wav .flac .ogg .opus .mp3 .aif .aiff .aifc .au .snd .caf .w64 .sph .nist".split()
PIECE_SECONDS = 60  # the model and the decoder see no more than about this much at a time


class UserError(Exception):
    """A mistake that the user can fix: shown as one line, without a traceback."""


def audio_names(root):
    """Folder -> sorted names below it of its audio files, in linked folders too. `._*` is
    ignored."""
    files = []
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link leads back up
            subfolders.clear()
            continue
        visited.add(real)
        files += [Path(folder, name) for name in names if not name.startswith("._")]

    audio = [file for file in files if file.suffix.lower() in AUDIO_ENDINGS and file.is_file()]
    found = f"{root}: {len(audio)} of {len(files)} files are audio"
    if not audio:
        raise UserError(f"{found}; give a folder of recordings")
    print(found)
    return sorted(file.relative_to(root).as_posix() for file in audio)


def find_pieces(path):
    """Audio file -> [(first, last)] samples of its pieces. Each is PIECE_SECONDS long, but the last
    up to twice as long. An unreadable file has one empty piece."""
    try:
        info = sf.info(os.fsencode(path))  # bytes, because a name need not be UTF-8
    except sf.SoundFileError:
        return [(0, 0)]
    if info.frames > 1e12:  # a stream that does not say its length
        return [(0, 0)]
    piece = PIECE_SECONDS * info.samplerate
    starts = range(0, max(1, info.frames - piece), piece)
    return list(zip(starts, [*starts[1:], info.frames]))


def read_piece(path, first, last, sample_rate):
    """Samples first .. last of an audio file -> (n,) float32 at sample_rate, mono. Raises UserError
    if it cannot be read."""
    try:
        with sf.SoundFile(os.fsencode(path)) as file:
            rate = file.samplerate
            start = max(0, first - rate)  # a second of context, dropped after resampling
            file.seek(start)
            wave = file.read(last + rate - start, np.float32, always_2d=True).mean(1)
    except (sf.SoundFileError, OSError):
        raise UserError(f"{path}: not a readable audio file; give another") from None
    if not np.isfinite(wave).all():
        raise UserError(f"{path}: has NaN or infinite samples; give another")
    resampled = resample(torch.from_numpy(wave), rate, sample_rate)
    resampled = resampled[(first - start) * sample_rate // rate :]
    return resampled[: ceil((last - first) * sample_rate / rate)]


def resample(wave, rate, new_rate):
    """(N,) -> (ceil(N * new_rate / rate),). Overlapping frames are resampled by a Fourier
    transform, and their margins dropped, because there the filter feels the cut."""
    if rate == new_rate:
        return wave
    period = rate // math.gcd(rate, new_rate)  # samples after which both rates meet
    margin = ceil(0.1 * rate / period) * period
    new_margin = margin * new_rate // rate
    silence = 7 * margin - len(wave) % (6 * margin)
    frames = F.pad(wave, (margin, silence)).unfold(0, 8 * margin, 6 * margin)
    spectrum = torch.fft.rfft(frames)[:, : 4 * new_margin + 1]
    # The highest 5 % fade out smoothly: a sharp edge in the spectrum would ring.
    fade = torch.linspace(20, 0, spectrum.shape[1]).clamp(max=1)
    spectrum = spectrum * torch.sin(math.pi / 2 * fade) ** 4
    resampled = torch.fft.irfft(spectrum, 8 * new_margin)[:, new_margin : 7 * new_margin].flatten()
    return resampled[: ceil(len(wave) * new_rate / rate)] * new_rate / rate


def read_audio(path, sample_rate):
    """Any file that libsndfile reads -> (N,) float32 in [-1, 1], mono. Raises UserError if it
    cannot be read."""
    return torch.cat([read_piece(path, *piece, sample_rate) for piece in find_pieces(path)])


def write_audio(path, wave, sample_rate):
    """(N,) in [-1, 1] -> 16-bit audio file; its ending is the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sf.write(os.fsencode(path), wave.float().clamp(-1, 1).cpu().numpy(), sample_rate)


# ==================== shared: spectrum ====================
def stft(wave, cfg):
    """(B, N) -> (B, T, F) complex, F = n_fft // 2 + 1, T = 1 + N // hop. Frame t is centered on
    sample t * hop; there are zeros beyond both ends."""
    window = torch.hann_window(cfg.win, device=wave.device)
    return torch.stft(
        wave.float(), cfg.n_fft, cfg.hop, cfg.win, window, pad_mode="constant", return_complex=True
    ).mT


def istft(spectrum, cfg):
    """(B, T, F) complex -> (B, hop * (T - 1)), the inverse of `stft`."""
    window = torch.hann_window(cfg.win, device=spectrum.device)
    return torch.istft(spectrum.mT, cfg.n_fft, cfg.hop, cfg.win, window)


@functools.lru_cache(maxsize=8)
def mel_filters(sample_rate, n_fft, n_mels, device):
    """(F, n_mels) triangles of equal area on the Slaney mel scale, the default of librosa: linear
    up to 1000 Hz, which is 15 mel, then 27 mel for every factor of 6.4."""
    top = 15 + 27 * math.log(sample_rate / 2000, 6.4)
    mel = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    edges = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))  # in Hz
    left, center, right = edges.unfold(0, 3, 1).T
    frequency = torch.fft.rfftfreq(n_fft, 1 / sample_rate)[:, None]
    rising = (frequency - left) / (center - left)
    falling = (right - frequency) / (right - center)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float().to(device)


def log_mel(wave, cfg):
    """(B, N) -> (B, T, n_mels): natural log of max(mel magnitude, 1e-5)."""
    filters = mel_filters(cfg.sample_rate, cfg.n_fft, cfg.n_mels, wave.device)
    with torch.autocast(wave.device.type, enabled=False):  # bfloat16 is too coarse for spectra
        return (stft(wave, cfg).abs() @ filters).clamp(min=1e-5).log()


def mel_to_magnitude(mel, cfg):
    """(B, T, n_mels) mel magnitude, exp of log_mel -> (B, T, F) linear magnitude, by
    pseudo-inverse."""
    filters = mel_filters(cfg.sample_rate, cfg.n_fft, cfg.n_mels, mel.device)
    return (mel @ torch.linalg.pinv(filters)).clamp(min=0)


def griffin_lim(magnitude, cfg, rounds=60, momentum=0.99):
    """(B, T, F) linear magnitude -> (B, hop * (T - 1)). Looks for phases that fit the magnitudes,
    from zero phase on (Perraudin, Balazs and Sondergaard, WASPAA 2013)."""
    phase = torch.ones_like(magnitude, dtype=torch.complex64)  # exp(i phase), of magnitude 1
    previous = 0
    for _ in range(rounds):
        rebuilt = stft(istft(magnitude * phase, cfg), cfg)
        phase = torch.sgn(rebuilt - momentum / (1 + momentum) * previous)
        previous = rebuilt
    return istft(magnitude * phase, cfg)


# ==================== shared: corpus ====================
@dataclass(eq=False)
class Corpus:
    """A folder of audio. Utterance u is audio[start[u] : start[u] + length[u]]."""

    root: Path
    paths: list  # (U,) files; a long one is several utterances
    audio: torch.Tensor  # (N,) int16, all utterances one after another
    start: np.ndarray  # (U,) samples
    length: np.ndarray  # (U,) samples
    speakers: list  # names
    speaker: np.ndarray  # (U,) index into speakers
    train: np.ndarray  # utterances to train on
    held: np.ndarray  # held-out utterances: a tenth of each speaker's, in a test corpus all
    test: "Corpus" = None  # that of --test, or the corpus itself

    def wave(self, u):
        """Utterance u -> (N,) float32 in [-1, 1], on the device of `audio`."""
        return self.audio.narrow(0, self.start[u], self.length[u]).float() / 32768


def load_corpus(cfg):
    """The corpus of --data, or of toy voices, and in its `test` that of --test."""
    if not cfg.data:
        make_once(Path("runs/toy-24"), write_toy)
        cfg = replace(cfg, data="runs/toy-24/train", test="runs/toy-24/test")
    corpus = read_corpus(Path(cfg.data), cfg, is_test=False)
    corpus.test = read_corpus(Path(cfg.test), cfg, is_test=True) if cfg.test else corpus
    if cfg.device == "cuda" and corpus.audio.nbytes < torch.cuda.mem_get_info()[0] / 4:
        corpus.audio = corpus.audio.cuda()  # then batches need no transfer
    return corpus


def read_corpus(root, cfg, is_test):
    """One folder -> its Corpus."""
    names = [name for name in audio_names(root) if re.search(cfg.include, name)]
    owners = find_speakers(names, cfg, root, least=1 if is_test else 2)
    audio, length, file_index = decode([root / name for name in names], cfg.sample_rate)
    names = [names[i] for i in file_index]  # (U,), like all that follows
    owners = owners[file_index]

    lost = length < cfg.win
    if lost.any():
        note = (
            f"{root}: {lost.sum()} of {len(lost)} recordings are unreadable or shorter than --win"
        )
        note = f"{note}, the first: {names[lost.argmax()]}"
        if lost.mean() > 0.1:
            raise UserError(f"{note}; fix or remove them")
        print(f"{note}; left out")

    speakers = np.unique(owners[~lost])
    speaker = np.searchsorted(speakers, owners)  # of no meaning where a recording is lost
    train, held = split(names, speaker, np.flatnonzero(~lost), is_test)
    minutes = length.sum() / cfg.sample_rate / 60
    short = (length < cfg.crop).sum()
    print(f"{root}: {minutes:.1f} minutes, {len(names)} utterances ({short} shorter than a crop),")
    print(f"    {len(speakers)} speakers: {', '.join(speakers[:5])} ..")
    if not len(held):
        raise UserError(f"{root}: one recording a speaker, so none to test on; add more")
    return Corpus(
        root=root,
        paths=[root / name for name in names],
        audio=audio,
        start=length.cumsum() - length,
        length=length,
        speakers=speakers.tolist(),
        speaker=speaker,
        train=train,
        held=held,
    )


def find_speakers(names, cfg, root, least):
    """Paths below a folder -> the speaker of each: group 1 of --speaker."""
    advice = "set it to a regex whose group 1 is the speaker"
    usual = (r"([^/]+)/", r"/([^/]+)/", r"/([^/]+)/[^/]*$", r"([^/_-]+)[_-][^/]*$")
    for regex in (cfg.speaker, *usual):
        matches = [re.search(regex, name) for name in names]
        owners = [match[1] for match in matches if match and match.lastindex]
        if len(owners) == len(names) and len(set(owners)) >= least:
            if regex == cfg.speaker:
                return np.array(owners)
            advice = f"--speaker '{regex}' would find {len(set(owners))}, such as {owners[0]}"
            break
    what = f"{root}: --speaker {cfg.speaker!r} with --include {cfg.include!r}"
    raise UserError(f"{what} does not find {least} speakers in {names[:2]} ..; {advice}")


def split(names, speaker, utterances, is_test):
    """-> those of `utterances` to train on and those held out, in a fixed pseudo-random order."""
    # The two microphones of VCTK have one take, and so have the pieces of a long recording. A take
    # is held out or trained on as a whole.
    takes = [re.sub(r"(_mic\d)?\.\w+$", "", name) for name in names]
    order = sorted(utterances, key=lambda u: hashlib.md5(os.fsencode(takes[u])).digest())
    takes_of = defaultdict(dict)  # speaker -> take -> its place in this order
    for u in order:
        places = takes_of[speaker[u]]
        places.setdefault(takes[u], len(places))

    train = []
    held = []
    for u in order:
        places = takes_of[speaker[u]]
        tenth = min(ceil(len(places) / 10), len(places) - 1)  # a single take is only trained on
        if is_test or places[takes[u]] < tenth:
            held.append(u)
        else:
            train.append(u)
    return np.array(train, int), np.array(held, int)


def make_once(path, write):
    """Calls write(temporary path) and renames the result to `path`, so that it is complete or
    absent; does nothing if it exists. Under torchrun one process writes, and the others wait."""
    while LOCAL_RANK > 0 and not path.exists():
        time.sleep(0.2)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder, path.name)
            write(part)
            with contextlib.suppress(OSError):  # another run was faster
                os.replace(part, path)


def decode(paths, sample_rate):
    """Decodes each file once -> audio (N,) int16, mapped from a file under runs/cache, and the
    length (U,) and the file (U,) of each piece. Unreadable ones have length 0."""
    stats = [(str(path.resolve()), path.stat()) for path in paths]
    stamps = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    stamp = hashlib.sha256(repr(stamps).encode()).hexdigest()[:16]
    cache = Path(f"runs/cache/{sample_rate}-{stamp}")
    make_once(cache, lambda part: decode_files(paths, sample_rate, part))
    audio = np.memmap(cache / "audio.pcm", np.int16, "c")  # copy on write: torch wants to write
    return torch.from_numpy(audio), *np.load(cache / "pieces.npy")


def decode_files(paths, sample_rate, folder):
    """Writes all pieces of all files to folder/audio.pcm, and their lengths and files to
    pieces.npy."""

    def decode_piece(piece):
        path = paths[piece[0]]
        try:
            wave = read_piece(path, *piece[1:], sample_rate)
        except UserError:
            wave = torch.zeros(0)
        if (wave.abs() > 2).any():
            loud.append(path)
        return (wave * 32768).round().clamp(-32768, 32767).short().numpy()

    pieces = [(i, *piece) for i, path in enumerate(paths) for piece in find_pieces(path)]
    lengths = []
    loud = []
    folder.mkdir()
    with open(folder / "audio.pcm", "wb") as audio, ThreadPoolExecutor() as pool:
        for i in range(0, len(pieces), 256):  # no more than 256 pieces are in memory
            print(f"decoding: {i} of {len(pieces)} recordings done")
            for wave in pool.map(decode_piece, pieces[i : i + 256]):
                lengths.append(len(wave))
                audio.write(wave)
        audio.write(bytes(2))  # an empty file cannot be mapped
    if loud:
        print(
            f"warning: {len(loud)} recordings go far beyond -1..1, such as {loud[0]}; rescale them"
        )
    np.save(folder / "pieces.npy", [lengths, [piece[0] for piece in pieces]])


def get_batch(corpus, cfg, step, draw=0, utterances=None):
    """-> wave (B, crop) float32 in [-1, 1], speaker (B,), utterance (B,) on cfg.device: a crop from
    a random place of each of `utterances`, or of batch_size different training ones. A function of
    (seed, step, draw, rank) alone, so that a resumed run sees what an uninterrupted one would
    see."""
    rng = np.random.default_rng((cfg.seed, step, draw, RANK))
    if utterances is None:
        utterances = rng.choice(corpus.train, cfg.batch_size, replace=False)
    length = corpus.length[utterances]
    first = rng.integers(np.maximum(length - cfg.crop + 1, 1))
    offset = (first[:, None] + np.arange(cfg.crop)) % length[:, None]  # short ones repeat
    index = torch.from_numpy(corpus.start[utterances, None] + offset)  # (B, crop)
    return dict(
        wave=corpus.audio[index].to(cfg.device).float() / 32768,
        speaker=torch.tensor(corpus.speaker[utterances], device=cfg.device),
        utterance=torch.tensor(utterances, device=cfg.device),
    )


# ==================== shared: toy ====================
# Of each toy phone: three formants in Hz, the loudness of the voice, the loudness of the friction.
PHONES = """
    a    800 1250 2500  1    0
    e    480 1900 2600  1    0
    i    280 2300 3000  1    0
    o    480  850 2400  1    0
    u    300  700 2200  0.8  0
    m    250 1100 2100  0.4  0
    l    360 1300 2900  0.6  0
    z    250 1700 4500  0.4  0.12
    s    250 1700 5500  0    0.24
    sh   300 1800 3000  0    0.28
    f    350 1100 6500  0    0.1
    sil  450 1400 2500  0    0
"""


def toy_voice(s):
    """The five traits of speaker s, the same in all utterances: (tilt, pitch, breath, scale, echo).

    tilt    how fast the harmonics above 500 Hz decay
    pitch   mean f0 in octaves above 1 Hz, from 84 to 256 Hz
    breath  loudness of the noise that the glottis adds to its pulses
    scale   of the formants: the shorter the vocal tract, the higher
    echo    delay of the reflection from the desk, in samples

    Multiples of the square roots of primes, modulo 1, fill the cube of the traits evenly: no two
    voices are alike, and later speakers fall into the gaps that earlier ones leave.
    """
    place = s * np.sqrt([2, 3, 5, 7, 11]) % 1
    span = [0.8, 1.6, 0.9, 0.2, 20]
    lowest = [0.2, 6.4, 0, 0.9, 5]
    return place * span + lowest


def glottal_pulses(f0):
    """f0 in Hz (N,) -> (N,) one pulse per period: the sum of the cosines of all harmonics.
    Harmonics above 7600 Hz are left out, so that none folds back at the sample rate of 16 kHz.
    Their sum needs no loop: cos(2x) + .. + cos(2hx) = (sin((2h + 1) x) / sin(x) - 1) / 2, where x
    is half the phase of f0."""
    harmonics = 7600 // f0.max()
    x = np.pi * f0.cumsum() / 16000
    pulses = np.sin((2 * harmonics + 1) * x) / np.sin(x) - 1
    return pulses / harmonics**0.5  # the same power at every pitch


def toy_utterance(s, n):
    """Utterance n of speaker s -> wave (N,) at 16 kHz, and its phones (T,), one per 10 ms."""
    tilt, pitch, breath, scale, echo = toy_voice(s)
    rng = np.random.default_rng((s, n))
    table = np.array(PHONES.split()).reshape(12, 6)
    cfg = Config(n_fft=512, win=512, hop=160)

    # The content does not depend on the speaker: 12 random phones of 60 to 160 ms between two
    # silences. The articulators take 50 ms to move from one phone to the next.
    phones = np.repeat([11, *rng.choice(12, 12), 11], rng.integers(6, 17, 14))  # (T,)
    targets = torch.from_numpy(table[phones, 1:].T.astype(np.float32))  # (5, T)
    *formants, voicing, friction = F.avg_pool1d(targets, 5, 1, padding=2)

    # The source: noise, and pulses whose pitch glides from one random height to another.
    glide = rng.uniform(-0.2, 0.2, 2)
    f0 = 2 ** (pitch + np.linspace(*glide, 160 * len(phones) - 160))
    source = np.stack([glottal_pulses(f0), rng.standard_normal(len(f0))])
    pulses, noise = stft(torch.from_numpy(source), cfg).mT  # (F, T) each

    # The filter: the voice passes three resonances, the noise of friction only the last.
    frequency = torch.linspace(0, 8000, 257)[:, None]
    voice = voicing * (pulses + breath * noise) / (1 + frequency / 500) ** tilt
    for formant in formants:
        ratio = frequency / (scale * formant)
        resonance = 1 / (1 + 0.14j * ratio - ratio**2)
        voice = voice * resonance
    spectrum = voice + (friction * resonance + 0.004) * noise  # 0.004: no room is silent
    wave = istft(spectrum.T[None], cfg)[0]

    # The desk reflects the sound, a little later and weaker.
    wave += 0.3 * wave.roll(int(echo))
    return 0.08 * wave / wave.std(), table[phones[1:], 0]


def write_toy(root):
    """Writes 24 speakers to root/train and 16 others to root/test, with the phones of each."""
    for s in range(1, 41):
        part = root / ("train" if s <= 24 else "test")
        for n in range(54 if s <= 24 else 15):
            wave, phones = toy_utterance(s, n)
            path = part / f"voice{s:02d}/voice{s:02d}_{n:02d}.wav"
            write_audio(path, wave, 16000)
            with open(part / "phones.txt", "a") as file:
                print(path.stem, *phones, file=file)


# ==================== shared: main ====================
def parse(argv):
    """argv -> the flags, and {field: value} of those that are fields of Config."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nEvery field is a flag:\n\n{inspect.getsource(Config)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"error: {message}; see --help\n")
    for name in ("checkpoint", "source", "target", "output"):
        parser.add_argument(f"--{name}")
    for name in ("toy", "resume"):
        parser.add_argument(f"--{name}", action="store_true")
    for field in fields(Config):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type={int: int, float: float, bool: boolean}.get(field.type, str),
            choices=get_args(field.type) or None,
            nargs="?" if field.name == "data" else None,  # --data alone: the toy voices
        )
    mode = "train"
    if argv and argv[0] in ("train", "convert", "encode"):
        mode, *argv = argv
    flags = parser.parse_args(argv, argparse.Namespace(mode=mode))
    if flags.mode != "train" and None in (flags.checkpoint, flags.source, flags.output):
        parser.error(f"{flags.mode} needs --checkpoint, --source and --output")
    if flags.resume and not flags.out:
        parser.error("--resume needs --out")
    if flags.output and Path(flags.output).exists():
        parser.error(f"{flags.output}: exists; remove it or choose another --output")
    return flags, {
        name: value
        for name, value in vars(flags).items()
        if value is not None and name in Config.__dataclass_fields__
    }


def boolean(text):
    return ("false", "true").index(text.lower()) == 1


def save(path, **content):
    """Replaces a checkpoint atomically."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RuntimeError as error:
        raise error.__context__ or error  # the OSError behind torch's "unexpected pos"
    finally:
        part.unlink(missing_ok=True)


def load(path, **overrides):
    """Run folder or model.pt -> model in eval mode, cfg, checkpoint. Executes no code from the
    file."""
    if Path(path).is_dir():
        path = Path(path, "model.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["script"] == NAME, f"it is of {checkpoint['script']}.py"
        cfg = Config(**checkpoint["config"] | {"device": Config.device} | overrides)
        model = Model(cfg, len(checkpoint["speakers"]))
        model.load_state_dict(checkpoint["model"])
    except Exception as error:  # torch has many for a wrong file
        what = f"{path}: not a checkpoint of {NAME}.py with these flags"
        raise UserError(f"{what}; give a run folder ({error!r})") from None
    return model.to(cfg.device).eval(), cfg, checkpoint


def claim_folder(flags):
    """-> the run folder: --out, or the first of runs/NAME-1, -2 .. that is free. It is made in one
    step, so that two runs that start together do not share it."""
    for i in itertools.count(1):
        out = Path(flags.out or f"runs/{NAME}-{i}")
        try:
            out.mkdir(parents=True, exist_ok=flags.resume)
            return out
        except FileExistsError:
            if flags.out:
                what = f"{out}: exists; add --resume to continue it"
                raise UserError(f"{what}, or choose another --out") from None


def average_gradients(model):
    """Broadcasts the weights of rank 0, and averages the gradients after each backward."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(WORLD_SIZE)))


def train(flags, given):
    """Trains a model; leaves model.pt, log.jsonl, run.json and samples/ in the run folder."""
    began = time.time()
    if WORLD_SIZE > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(LOCAL_RANK)  # from here on "cuda" is the GPU of this process
        dist.init_process_group(timeout=timedelta(hours=2))

    model = checkpoint = None
    if flags.resume and Path(flags.out, "model.pt").exists():
        model, cfg, checkpoint = load(flags.out, **given)
    else:
        cfg = Config(**(TOY if flags.toy or not flags.data else {}) | given)
    corpus = load_corpus(cfg)
    model, optimizers, first = build(model, corpus, cfg, checkpoint)

    out = claim_folder(flags) if RANK == 0 else None
    run = describe_run(cfg)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{out}: from step {first} to {cfg.steps} in batches of {cfg.batch_size}")
    print(f"    {millions:.1f} million parameters on {run['hardware']}")
    if cfg.device == "cpu" and flags.data and not flags.toy:
        print("no CUDA device for a model of full size: add --toy for the small one")
    optimize(model, optimizers, corpus, cfg, out, first)

    if RANK == 0:
        metrics = sample(model.eval(), corpus, cfg, out / "samples")
        run = dict(run, seconds=time.time() - began, metrics=metrics)
        (out / "run.json").write_text(json.dumps(run, indent=1))
        print(json.dumps(metrics, indent=1))
        print(f"measure, see and hear it: python tests/compare.py {out}")
    if WORLD_SIZE > 1:
        dist.barrier()  # all wait for rank 0, which samples
        dist.destroy_process_group()


def build(model, corpus, cfg, checkpoint):
    """-> model, optimizers and the number of steps done: new, or as the checkpoint has them."""
    if len(corpus.train) < cfg.batch_size:
        count = len(corpus.train)
        raise UserError(f"{count} training utterances are fewer than --batch-size; lower it")
    torch.manual_seed(cfg.seed)
    if not checkpoint:
        model = Model(cfg, len(corpus.speakers)).to(cfg.device)
        prepare(model, corpus, cfg)
        checkpoint = dict(step=0, speakers=corpus.speakers, optimizers={})
    if checkpoint["speakers"] != corpus.speakers:
        raise UserError("--resume: trained on other speakers than these; choose another --out")
    if checkpoint["step"] > cfg.steps:
        raise UserError(f"--steps {cfg.steps}: there are {checkpoint['step']} already; raise it")
    optimizers = make_optimizers(model, cfg)
    for name, state in checkpoint["optimizers"].items():
        groups = optimizers[name].state_dict()["param_groups"]  # lr and so on, as given now
        optimizers[name].load_state_dict(dict(state, param_groups=groups))
    if WORLD_SIZE > 1:
        average_gradients(model)
    return model, optimizers, checkpoint["step"]


def describe_run(cfg):
    """-> the first entries of run.json. The hash is of the method, so that plumbing may be fixed
    without running again."""
    source = Path(__file__).read_text("utf-8")
    first = source.index("@dataclass(frozen")
    method = source[first : source.index("# ==================== shared")]
    cpu = f"{torch.get_num_threads()} CPU threads"
    return dict(
        script=NAME,
        method_sha256=hashlib.sha256(method.encode()).hexdigest(),
        command=shlex.join(["python", *sys.argv]),
        config=asdict(cfg),
        steps=cfg.steps,
        hardware=torch.cuda.get_device_name() if cfg.device == "cuda" else cpu,
        torch=torch.__version__,
    )


def on_stop(handler):
    """Calls handler(number, frame) on Ctrl-C and on SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def optimize(model, optimizers, corpus, cfg, out, first):
    """The training loop, from step `first` on. Ctrl-C and SIGTERM let a step end, then save and
    stop."""
    stop = []
    on_stop(lambda *_: stop.append(True))
    began = time.time()
    for step in range(first, cfg.steps):
        # A seed for each step: without it a resumed run would draw other numbers.
        torch.manual_seed((cfg.seed * 1_000_003 + step) * WORLD_SIZE + RANK)
        half = cfg.bf16 and cfg.device == "cuda"
        # Without cache_enabled=False, copies of the weights in bfloat16 could outlive a step.
        with torch.autocast(cfg.device, torch.bfloat16, enabled=half, cache_enabled=False):
            metrics = train_step(model.train(), optimizers, corpus, step, cfg)
        done = step + 1
        saving = done == cfg.steps or done % cfg.save_every == 0 or stop
        if saving or done % cfg.log_every == 0 or done - first in (1, 10):
            log(model, metrics, done, (time.time() - began) / (done - first), cfg, out)
        if saving and RANK == 0:
            save(
                out / "model.pt",
                script=NAME,
                step=done,
                config=asdict(cfg),
                speakers=corpus.speakers,
                model=model.state_dict(),
                optimizers={name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            )
        if stop:
            command = shlex.join(["python", *sys.argv, "--out", str(out), "--resume"])
            print(f"saved at step {done}; continue with: {command}")
            raise KeyboardInterrupt  # main returns 130
    on_stop(signal.default_int_handler)


def log(model, metrics, done, pace, cfg, out):
    """Prints the metrics of a step and appends them to log.jsonl."""
    tensors = [*metrics.values(), *model.state_dict().values()]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UserError(f"step {done}: the loss or a weight is not finite; lower --lr")
    if RANK == 0:
        line = {name: value.item() for name, value in metrics.items()}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in line.items())
        left = timedelta(seconds=round((cfg.steps - done) * pace))
        print(f"step {done}/{cfg.steps}  {shown}  {pace:.3g} s a step, {left} left")
        with open(out / "log.jsonl", "a") as file:
            print(json.dumps({"step": done, **line}), file=file)


def read_source(path, cfg):
    """Audio file -> its pieces (n,), on the device."""
    wave = read_audio(path, cfg.sample_rate).to(cfg.device)
    if len(wave) < cfg.win or wave.abs().max() < 1e-4:
        raise UserError(f"{path}: silent, or shorter than --win {cfg.win} samples; give another")
    return wave.tensor_split(ceil(len(wave) / PIECE_SECONDS / cfg.sample_rate))


def convert_file(flags, given):
    """Converts --source to the voice of --target, or reconstructs it without one, and writes
    --output. Of a recording as a target the first PIECE_SECONDS count."""
    if not flags.output.lower().endswith((".wav", ".flac")):
        raise UserError(f"{flags.output}: must end in .wav or .flac")
    model, cfg, checkpoint = load(flags.checkpoint, **given)
    speakers = checkpoint["speakers"] if TARGET else ["nobody: it does not convert voices"]
    target = flags.target
    if target and TARGET == "recording":
        target = read_source(target, cfg)[0]
    elif target in speakers:
        target = speakers.index(target)
    elif target:
        raise UserError(f"--target {target}: choose from {', '.join(speakers[:40])}")
    waves = [convert(model, [piece], [target], cfg)[0] for piece in read_source(flags.source, cfg)]
    write_audio(flags.output, torch.cat(waves), cfg.sample_rate)


def encode_files(flags, given):
    """The representations of --source, a file or a folder -> --output/NAME.REPRESENTATION.npy."""
    model, cfg, _ = load(flags.checkpoint, **given)
    source = Path(flags.source)
    names = audio_names(source) if source.is_dir() else [""]  # source / "" is source
    stems = [os.path.splitext(name)[0] for name in names]
    if len(set(stems)) < len(stems):
        twin = max(stems, key=stems.count)
        raise UserError(f"{source / twin}.*: two files would write one output; rename one")
    failed = []
    for name in names:
        try:
            rows = [represent(model, piece, cfg) for piece in read_source(source / name, cfg)]
        except UserError as error:
            failed.append(error)
            continue
        for key in rows[0]:
            pieces = [row[key] for row in rows]
            is_vector = pieces[0].dim() == 1 and pieces[0].is_floating_point()  # one a recording
            x = torch.stack(pieces).mean(0) if is_vector else torch.cat(pieces)
            path = Path(flags.output, name or source.name).with_suffix(f".{key}.npy")
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, x.cpu().numpy())
    if failed:
        raise UserError(f"{len(failed)} of {len(names)} files not encoded, the first: {failed[0]}")


def main(argv):
    """Runs one mode -> exit code."""
    try:
        flags, given = parse(argv)
        on_stop(signal.default_int_handler)
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
        if RANK > 0:
            sys.stdout = open(os.devnull, "w")
        {"train": train, "convert": convert_file, "encode": encode_files}[flags.mode](flags, given)
        return 0
    except (UserError, sf.SoundFileError) as error:
        message = error
    except OSError as error:
        message = f"{error}; free space there, or work in a folder that you may write to"
    except re.error as error:
        message = f"--speaker or --include: {error}; give a regular expression"
    except (MemoryError, RuntimeError) as error:
        if not re.search("alloc|out of memory|MemoryError", repr(error)):
            raise
        message = "out of memory; lower --batch-size or --crop, or set --device cpu"
    except KeyboardInterrupt:
        return 130
    print("error:", " ".join(str(message).split())[:600], file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
