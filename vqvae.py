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
perplexity of the codes of ONE batch, which with VQ dips in the first 50 steps and recovers. result.json has
the nats also with another utterance's codes, their average and a wrong speaker, each of which should cost;
perplexity over held-out speech, K at most; bits a second. Of its probes compare `encoder` with `codes`.

    python vqvae.py                                  a toy corpus, two minutes on two CPU cores
    python vqvae.py --data DIR                       any folder of audio, the paper's size, for a GPU
    python vqvae.py convert --checkpoint runs/a --source a.wav --target SPEAKER --output c.wav

Measured on CPU threads, not on a GPU, at TOY's size. Toy corpus, seeds 0, 1, 2: from `encoder` to `codes`
the speaker falls from 69, 69, 66 to 45, 35, 45 %, phones from 90, 89, 90 to 76, 78, 78 % (codes untrained:
57, 59, 41 and 34, 30, 32). Negative: on digits, 6000 steps, codes keep the speaker (98 to 92 %, untrained
92, log-mel 100), yet 67 % of conversions are heard as the target, with 18 % of frames keeping their digit
(copies 38); after 850 steps on toy, 3000 on words, speech is too noisy.
"""
import argparse
import base64
import collections
import contextlib
import functools
import hashlib
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
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from html import escape
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import quote

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

@dataclass(frozen=True)
class Config:
    """The first twenty fields are common to the six scripts. Comments are the help texts."""
    data: str = ""               # folder of audio; none: the toy corpus
    test: str = ""               # another folder, for testing, usually of unseen speakers
    out: str = ""                # run folder; none: the next free runs/NAME-N
    speaker: str = r"([^/]+)/"   # regex searched in the path below data; group 1 is the speaker
    phones: str = ""           # lines "utterance-id label label ..", a label per 10 ms; none: DATA/phones.txt
    sample_rate: int = 16000     # Hz
    n_fft: int = 512             # points of the Fourier transform
    win: int = 400               # samples in an analysis window
    hop: int = 160               # samples between frames
    n_mels: int = 80             # mel bands
    crop: int = 5120             # samples in a training example
    batch_size: int = 64         # training examples in a batch, on each GPU
    steps: int = 1_000_000       # training steps
    lr: float = 4e-4             # learning rate of Adam
    seed: int = 0                # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True            # bfloat16 autocast on CUDA
    probe: int = 1500            # utterances at most to fit the probes on, and to score them on
    log_every: int = 100         # steps between log lines
    save_every: int = 5000       # steps between checkpoints

    bottleneck: Literal["vq", "onehot", "binary", "none"] = "vq"  # makes the code discrete; none: a control
    codebook: Literal["ema", "gradient"] = "ema"  # how VQ learns its codes: 1711.00937 A.1, or Eq. (3)
    codes: int = 512             # K, 1711.00937 4.3; binary: log2 K bits, rounded up
    d_code: int = 64             # D, 1901.08810
    beta: float = 0.25           # weight of the commitment, 1711.00937 3.2
    decay: float = 0.99          # gamma of the moving averages, 1711.00937 A.1
    smoothing: float = 1e-5      # D3: Laplace smoothing of the counts
    revive: float = 0.1         # D2: a code used less than this times the average moves to a random latent
    usage: float = 0.1           # onehot, binary: weight of the term that keeps codes in use, U6
    tau_rate: float = 3e-5       # onehot: temperature max(0.5, exp(-rate * step)), U6
    jitter: float = 0.12         # chance that a latent is replaced by a neighbour, 1901.08810
    channels: int = 768          # of the encoder, 1901.08810
    d_condition: int = 128       # channels of the convolution over the codes, 1901.08810
    residual: int = 368          # WaveNet: residual and gated channels, 1901.08810
    skip: int = 256              # WaveNet: channels of skips and output layers, 1901.08810
    cycles: int = 2              # WaveNet: cycles of dilations, 1901.08810
    depth: int = 10              # WaveNet: layers in a cycle, dilations 1, 2, 4 .. 512, 1901.08810
    temperature: float = 1.0     # of sampling

# The same model, narrower, at 8 kHz, for two CPU cores and two minutes; beta was chosen by trial.
TOY = dict(sample_rate=8000, n_fft=256, win=200, hop=80, n_mels=40, crop=1920, batch_size=8, steps=850,
           lr=3e-3, log_every=50, save_every=250, codes=64, beta=0.01, decay=0.95, tau_rate=3e-3,
           channels=128, d_condition=32, residual=32, skip=64, cycles=1, depth=8)
TARGET = "speaker"               # what convert takes: the index of a training speaker

# ==================== the model ====================
class Encoder(nn.Module):
    """MFCC (B, T, 39) at 100 Hz -> latents (B, T / 2, D) at 50 Hz; each sees 16 MFCC frames, 1901.08810."""
    def __init__(self, cfg):
        super().__init__()
        c, norm = cfg.channels, lambda: nn.BatchNorm1d(cfg.channels, affine=False)
        residual = lambda kernel: Residual(nn.Conv1d(c, c, kernel, padding="same"), norm(), nn.ReLU())
        self.layers = nn.Sequential(
            nn.Conv1d(39, c, 3, padding=1), norm(), nn.ReLU(), residual(3),
            nn.Conv1d(c, c, 4, stride=2, padding=1), norm(), nn.ReLU(), residual(3), residual(3),
            residual(1), residual(1), residual(1), residual(1), norm())      # D1: the norms
        self.project = nn.Linear(c, cfg.d_code)

    def forward(self, x):
        return self.project(self.layers(x.mT).mT)                            # (B, T', D)

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
        self.e = nn.Parameter(torch.randn(cfg.codes, cfg.d_code), requires_grad=cfg.codebook == "gradient")
        self.register_buffer("N", torch.ones(cfg.codes))                 # moving averages: latents of a code,
        self.register_buffer("M", self.e.detach().clone())                   # and their sum

    def forward(self, z, tau=None):
        ids = (self.e.square().sum(1) - 2 * z @ self.e.T).argmin(-1)         # Eq. (1); |z|^2 changes nothing
        e = self.e[ids]                                                      # Eq. (2)
        loss = self.cfg.beta * F.mse_loss(z, e.detach())                     # commitment: e is not pulled
        if self.cfg.codebook == "gradient":                                  # D4
            loss = loss + F.mse_loss(e, z.detach())                          # Eq. (3): z is not pulled
        # U3: Eq. (3) adds |.|^2, a sum over D, to the log-likelihood of ALL samples of a crop. Ours is their
        # mean, so this is divided by their number too; often seen, a mean over D, is 80 times that.
        loss = loss * self.cfg.d_code / self.cfg.crop
        if self.training:
            self.update(z.detach().flatten(0, 1), ids.flatten())             # the decoder sees the old e
        return straight_through(e, z), ids, loss

    @torch.no_grad()
    def update(self, z, ids):
        """z (n, D), ids (n,): moves N and M, with EMA also e, and revives dead codes, all in float32."""
        K, g = self.cfg.codes, self.cfg.decay
        one_hot = F.one_hot(ids, K).float()
        n, m = one_hot.sum(0), one_hot.T @ z                             # latents of each code, and their sum
        random = z[torch.randint(len(z), (K,), device=z.device)]             # where dead codes go, D2
        if dist.is_initialized():                                          # these have no gradient to average
            dist.all_reduce(n), dist.all_reduce(m), dist.broadcast(random, 0)
        self.N.lerp_(n, 1 - g)                                               # N <- g N + (1 - g) n, A.1
        self.M.lerp_(m, 1 - g)                                               # M <- g M + (1 - g) sum z, A.1
        if self.cfg.codebook == "ema":                                 # e = M / N; D3: N smoothed, not stored
            total, eps = self.N.sum(), self.cfg.smoothing
            self.e.copy_(self.M / ((self.N + eps) / (total + K * eps) * total)[:, None])
        share = self.N.mean()
        dead = self.N < self.cfg.revive * share                # D2: all three, or the next M / N undoes it
        self.N[dead], self.M[dead], self.e[dead] = share, random[dead] * share, random[dead]

    @torch.no_grad()
    def start(self, z):
        """e <- K of the latents z (n, D), N <- the share of a code in a batch, M <- N e: a code without
        latents then stays until D2 moves it (N = 0, as often seen, throws it 1 / smoothing times as far)."""
        self.e.copy_(z[torch.randperm(len(z), device=z.device)[:self.cfg.codes]])
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.N.fill_(world * self.cfg.batch_size * self.cfg.crop / (2 * self.cfg.hop * self.cfg.codes))
        self.M.copy_(self.e * self.N[:, None])

class OneHot(nn.Module):
    """One of K by straight-through Gumbel-softmax (1611.01144); its code is a linear map of it."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.logits = cfg, nn.Linear(cfg.d_code, cfg.codes)
        self.e = nn.Linear(cfg.codes, cfg.d_code, bias=False)

    def forward(self, z, tau=None):
        a = self.logits(z)                                                   # (B, T', K)
        y = F.gumbel_softmax(a, tau) if self.training else a.softmax(-1)
        ids = y.argmax(-1)                                                   # no noise outside training
        loss = self.cfg.usage * kl_to_uniform(a.softmax(-1).mean((0, 1)))
        # U6: hard codes also in training; 1711.00937 reports that the decoder inverts soft ones
        return self.e(straight_through(F.one_hot(ids, self.cfg.codes).float(), y)), ids, loss

class Binary(nn.Module):
    """log2 K bits, rounded up, a sigmoid cut at .5, straight-through; the code is a linear map of them."""
    def __init__(self, cfg):
        super().__init__()
        bits = math.ceil(math.log2(cfg.codes))
        self.cfg, self.logits, self.e = cfg, nn.Linear(cfg.d_code, bits), nn.Linear(bits, cfg.d_code)

    def forward(self, z, tau=None):
        p = self.logits(z).sigmoid()                                         # (B, T', log2 K)
        bits, mean = p > 0.5, p.mean((0, 1))
        ids = (bits * 2 ** torch.arange(bits.shape[-1], device=z.device)).sum(-1)
        loss = self.cfg.usage * kl_to_uniform(torch.stack([mean, 1 - mean], -1)).sum()
        return self.e(2 * straight_through(bits.float(), p) - 1), ids, loss

class Nothing(nn.Identity):
    """The plain auto-encoder, the control of the claim that discretising drops the speaker."""
    def forward(self, z, tau=None):
        ids = torch.arange(z.shape[0] * z.shape[1], device=z.device)         # every latent a code of its own
        return z, ids.view(z.shape[:2]), z.new_zeros(())

def kl_to_uniform(p):
    """KL(p || uniform) in nats over the last axis: 0 for equal shares, ln K for a single code."""
    return torch.special.xlogy(p, p).sum(-1) + math.log(p.shape[-1])

def jitter(z, p):
    """Time jitter, 1901.08810: each latent of z (B, T', D) becomes, with chance p, one of its neighbours."""
    B, T, _ = z.shape
    move = (torch.rand(B, T, device=z.device) < p) * (torch.randint(2, (B, T), device=z.device) * 2 - 1)
    index = (torch.arange(T, device=z.device) + move).clamp(0, T - 1)
    return z.gather(1, index[..., None].expand_as(z))                    # the gradient goes to the frame used

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
        self.dilations = [2 ** i for i in range(cfg.depth)] * cfg.cycles
        self.embed = nn.Embedding(256, R)                               # a 1x1 convolution of one-hot samples
        self.dilated = nn.ModuleList(nn.Linear(2 * R, 2 * R) for _ in self.dilations)
        self.mix = nn.ModuleList(nn.Linear(R, S + R) for _ in self.dilations[1:])
        self.mix.append(nn.Linear(R, S))                                   # nothing follows the last residual
        self.condition = nn.Linear(d_condition, 2 * R * len(self.dilations), bias=False)  # V_l of every layer
        self.output = nn.Sequential(nn.ReLU(), nn.Linear(S, S), nn.ReLU(), nn.Linear(S, 256))

    def forward(self, previous, condition):
        """previous (B, N): y_{t-1} at each t; condition (B, T', C) at the code rate -> logits (B, N, 256)."""
        R, S, L, (B, N) = self.cfg.residual, self.cfg.skip, len(self.dilations), previous.shape
        h = self.embed(previous)                                             # (B, N, R)
        skip = h.new_zeros(B, N, S)                                          # float32, also under autocast
        # V_l before each code is repeated N / T' times: the same numbers, N / T' times cheaper
        v = self.condition(condition).view(B, -1, 1, L, 2 * R)               # (B, T', 1, L, 2R)
        for l, d in enumerate(self.dilations):
            past = F.pad(h, (0, 0, d, 0))[:, :N]                             # h_{t-d}, zeros before the start
            u = self.dilated[l](torch.cat([past, h], -1)).view(B, v.shape[1], -1, 2 * R) + v[:, :, :, l]
            a, b = u.view(B, N, 2 * R).chunk(2, -1)
            m = self.mix[l](a.tanh() * b.sigmoid())                        # (B, N, S + R); the last (B, N, S)
            skip = skip + m[..., :S]
            if l < L - 1:
                h = (h + m[..., S:]) * 0.5 ** 0.5                         # U5: the scalings keep the variance
        return self.output(skip / L ** 0.5)

class Model(nn.Module):
    """Encoder, bottleneck and decoder, and the mean and deviation of the MFCC."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        if cfg.crop % (2 * cfg.hop):
            raise UserError(f"--crop {cfg.crop}: no multiple of a code's {2 * cfg.hop} samples; give one")
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
        with torch.autocast(z.device.type, enabled=False):               # bfloat16 distances pick other codes
            return z, *self.bottleneck(z.float(), tau)

    def condition(self, z_q, speaker):
        """z_q (B, T', D), speaker (B,) -> (B, T', C): a code with its neighbours, and the speaker one-hot."""
        h = self.context((jitter(z_q, self.cfg.jitter) if self.training else z_q).mT).mT
        who = F.one_hot(speaker, self.n_speakers).to(h.dtype)
        return torch.cat([h, who[:, None].expand(-1, h.shape[1], -1)], -1)

    def forward(self, z_q, speaker, wave):
        """-> -log p(wave (B, N) | z_q, speaker), the mean over samples, in nats."""
        y = mu_law(wave)                                                     # U2: silence before the crop
        previous = F.pad(y, (1, 0), value=128)[:, :-1]                       # 128 is silence
        logits = self.decoder(previous, self.condition(z_q, speaker))
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())

class Sampler:
    """Decoder.forward one sample at a time, in O(layers): a ring of d inputs gives each layer its h_{t-d}. In
    numpy on a CPU, where torch spends its time on overhead; in torch on a GPU, where a CUDA graph saves
    launching kernels: so all state, even t, is in tensors."""
    def __init__(self, net, condition, hop, xp):
        """condition (B, T', C), each row for hop samples; xp: the module numpy or torch."""
        self.R, self.S, self.B, self.hop, self.xp = net.cfg.residual, net.cfg.skip, len(condition), hop, xp
        self.ours = ours = lambda x: xp.asarray(x.detach().contiguous())
        bias = torch.stack([dilated.bias for dilated in net.dilated])            # (L, 2R)
        v = net.condition(condition).unflatten(-1, bias.shape) + bias            # (B, T', L, 2R)
        self.v, self.embed = ours(v.permute(1, 2, 0, 3)), ours(net.embed.weight)
        self.layers = [[ours(x) for x in (v.new_zeros(d, self.B, self.R), W.weight.T, V.weight.T, V.bias)]
                       for d, W, V in zip(net.dilations, net.dilated, net.mix)]
        self.head = [ours(x) for linear in net.output[1::2] for x in (linear.weight.T, linear.bias)]
        self.t, self.device = ours(v.new_zeros(1, dtype=torch.long)) if xp is torch else 0, v.device

    def step(self, y):
        """y (B,): the previous samples -> logits (B, 256) of the next."""
        R, S, L, t, xp = self.R, self.S, len(self.layers), self.t, self.xp
        h, skip, v = self.embed[y], 0, self.v[t // self.hop].reshape(L, self.B, 2 * R)
        for l, (ring, W, V, bias) in enumerate(self.layers):
            slot = t % len(ring)
            u = xp.concatenate([ring[slot].reshape(h.shape), h], -1) @ W + v[l]  # (B, 2R)
            ring[slot] = h                                                       # only after it was read
            a, b = u[:, :R], u[:, R:]
            m = xp.tanh(a) * (0.5 + 0.5 * xp.tanh(0.5 * b)) @ V + bias       # sigmoid(b), and no overflow
            skip = skip + m[:, :S]
            if l < L - 1:
                h = (h + m[:, S:]) * 0.5 ** 0.5
        self.t += 1
        P, p, Q, q = self.head
        return ((skip / L ** 0.5).clip(0) @ P + p).clip(0) @ Q + q

    def run(self, steps, temperature):
        """-> (B, steps) int64. argmax(logits + T * Gumbel noise) is a draw from softmax(logits / T)."""
        on = {"device": self.device}
        noise = self.ours(torch.zeros(256, self.B, 256, **on))               # of the next 256 steps
        y, out = (self.ours(torch.full(shape, 128, **on)) for shape in ((self.B,), (steps, self.B)))

        def advance():
            y[:] = (self.step(y) + noise[(self.t - 1) % 256].reshape(-1, 256)).argmax(-1)
            out[self.t - 1] = y
        go = advance
        for i in range(steps):
            if i % 256 == 0:
                noise[:] = self.ours(-temperature * (-torch.rand(noise.shape, **on).clamp(1e-9).log()).log())
            if i == 3 and self.device.type == "cuda":              # warm by now; recording runs nothing
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    advance()
                go = graph.replay
            go()
        return torch.as_tensor(out).T.contiguous()

def mfcc(wave, cfg):
    """(B, N) -> (B, N // hop, 39): 13 cepstra of the log-mel spectrum (orthonormal DCT-II), their first and
    their second differences by regression over two frames on either side (U1)."""
    mel = log_mel(wave, cfg)[:, :wave.shape[1] // cfg.hop]                   # (B, T, n_mels)
    n, k = torch.arange(cfg.n_mels, device=wave.device) + 0.5, torch.arange(13, device=wave.device)
    dct = (n[:, None] * k * math.pi / cfg.n_mels).cos() * ((k > 0) + 1) ** 0.5 / cfg.n_mels ** 0.5
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
    n = 8 + 4 * cfg.codes * 2 * cfg.hop // (cfg.crop * cfg.batch_size)       # at least 4 K latents
    x = torch.stack([mfcc(get_batch(corpus, cfg, 0, draw=1 + i)["wave"], cfg) for i in range(n)])
    model.mean.copy_(x.mean((0, 1, 2)))
    model.std.copy_(x.std((0, 1, 2)) + 1e-5)
    x, encoder = (x - model.mean) / model.std, model.train().encoder         # (n, B, T, 39)
    if cfg.bottleneck == "vq":
        model.bottleneck.start(torch.cat([encoder(batch) for batch in x]).flatten(0, 1))
    torch.optim.swa_utils.update_bn(x, encoder)               # for the untrained model, which is scored too

def make_optimizers(model, cfg):
    """One, for all that has a gradient. D5: its weights are the ones that are used."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return {"autoencoder": torch.optim.Adam(learned, cfg.lr, fused=True)}

def train_step(model, optimizers, corpus, step, cfg):
    """One step on L of Eq. (3), 1711.00937v2, whose 2nd term is there with --codebook gradient only, D4."""
    batch, optimizer = get_batch(corpus, cfg, step), optimizers["autoencoder"]
    for group in optimizer.param_groups:                              # halved at 400k, 600k, 800k steps, U7
        group["lr"] = cfg.lr * 0.5 ** sum(step >= share * cfg.steps for share in (0.4, 0.6, 0.8))
    _, z_q, ids, code_loss = model.encode(batch["wave"], tau=max(0.5, math.exp(-cfg.tau_rate * step)))
    nats = model(z_q, batch["speaker"], batch["wave"])
    optimizer.zero_grad()
    (nats + code_loss).backward()
    optimizer.step()
    return {"nats": nats.detach(), "code_loss": code_loss.detach(), "perplexity": perplexity(ids)}

# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> encoder (T', D): latents before quantisation; codes (T', D): after it. 50 a second."""
    z, z_q, _, _ = model.encode(wave[None])
    return {"encoder": z[0], "codes": z_q[0]}

@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,), each with the index of a training speaker -> waves (N,): its codes, that speaker. None:
    the speaker under whom a crop from the middle of the source is likeliest (a pass of the decoder each)."""
    conditions, width = [], cfg.crop // (2 * cfg.hop)                       # codes in a crop
    speakers = torch.arange(model.n_speakers, device=model.mean.device)
    for wave, target in zip(sources, targets):
        z_q = model.encode(wave[None])[1]
        if target is None:
            first = max(0, z_q.shape[1] - width) // 2
            z, middle = z_q[:, first:first + width], F.pad(wave[first * 2 * cfg.hop:], (0, 2 * cfg.hop))
            nats = [model(z, s[None], middle[None, :z.shape[1] * 2 * cfg.hop]) for s in speakers]
            target = torch.stack(nats).argmin()
        conditions.append(model.condition(z_q, speakers[target][None])[0])   # (T', C)
    conditions = nn.utils.rnn.pad_sequence(conditions, batch_first=True)
    sampler = Sampler(model.decoder, conditions, 2 * cfg.hop, torch if conditions.is_cuda else np)
    waves = inverse_mu_law(sampler.run(conditions.shape[1] * 2 * cfg.hop, cfg.temperature))
    return [row[:len(wave)] for row, wave in zip(waves, sources)]

def perplexity(ids):
    """exp of the entropy of the symbols in use: K when all are used alike, 1 when a single one is."""
    p = ids.unique(return_counts=True)[1] / ids.numel()
    return torch.special.entr(p).sum().exp()

def bit_rate(ids, seconds):
    return ids.numel() / seconds * math.log2(perplexity(ids))      # symbols a second times entropy in bits

@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes units.txt, the codes of held-out utterances as text. Returns nats a sample with the true codes,
    another utterance's, their average and a wrong speaker; and how the codes are used."""
    nats, known = collections.defaultdict(float), corpus.held[corpus.speaker[corpus.held] < model.n_speakers]
    for i in range(8 if len(known) else 0):
        some = np.arange(i * cfg.batch_size, (i + 1) * cfg.batch_size)
        batch, other = (get_batch(corpus, cfg, i, draw=1000, utterances=known[which % len(known)])
                        for which in (some, some + 1))
        z_q, who = model.encode(batch["wave"])[1], batch["speaker"]
        wrong = (who + 1 + i % max(1, model.n_speakers - 1)) % model.n_speakers
        cases = {"true": (z_q, who), "shuffled": (model.encode(other["wave"])[1], who),
                 "absent": (z_q.mean((0, 1)).expand_as(z_q), who), "wrong_speaker": (z_q, wrong)}
        for name, case in cases.items():
            nats[name] += model(*case, batch["wave"]).item() / 8
    if cfg.bottleneck == "none":
        return {"nats": nats}
    held = corpus.held[:cfg.probe]
    ids = [model.encode(corpus.wave(u)[None].to(cfg.device))[2][0] for u in held]
    (out / "units.txt").write_text("".join(f"{corpus.paths[u].stem} {' '.join(map(str, k.tolist()))}\n"
                                           for u, k in zip(held, ids)))
    seconds = sum(corpus.length[u] for u in held) / cfg.sample_rate
    every, runs = torch.cat(ids), torch.cat([k.unique_consecutive() for k in ids])
    return {"nats": nats, "codes_used": len(every.unique()), "perplexity": perplexity(every).item(),
            "bits_per_second": bit_rate(every, seconds), "bits_per_second_merged": bit_rate(runs, seconds)}

# ==================== shared: audio ====================
class UserError(Exception):
    """What the user can mend: shown as one line, `error: ...`, without a traceback."""

def read_audio(path, sample_rate):
    """Any file that libsndfile reads -> (N,) float32, mono, in [-1, 1]. UserError names the file."""
    try:
        wave, rate = sf.read(path, dtype="float32", always_2d=True)                  # (N, channels)
    except (sf.SoundFileError, OSError):
        what = "not readable as audio" if Path(path).is_file() else "no such file"
        raise UserError(f"{path}: {what}; give a wav, flac, ogg or mp3 file") from None
    wave = torch.from_numpy(wave).mean(1)
    if not len(wave) or not wave.isfinite().all():
        what = "NaN or infinite samples" if len(wave) else "0 samples"
        raise UserError(f"{path}: {what}; give another recording")
    if rate == sample_rate:
        return wave
    # Band-limited, by Fourier: append zeros up to a whole number of periods of both rates (which also keeps
    # the end from wrapping round), cut or extend the spectrum, fade its last 5 % against ringing.
    period = rate // math.gcd(rate, sample_rate)
    padded = -(-(len(wave) + rate // 20) // period) * period
    n = padded * sample_rate // rate
    spectrum = torch.fft.rfft(wave, padded)[:n // 2 + 1]
    spectrum *= (torch.arange(len(spectrum), 0, -1) / (0.05 * len(spectrum))).clamp(max=1)
    return torch.fft.irfft(spectrum, n)[:-(-len(wave) * sample_rate // rate)] * (n / padded)

def audio_files(root):
    """Folder -> sorted paths of the audio files below it; UserError, with what was seen, if none."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    paths = [p for p in files if p.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3")]
    if not paths:
        seen = ", ".join(sorted({p.suffix or p.name for p in files})[:5]) or "nothing"
        what = f"no wav, flac, ogg or mp3 below it, but {seen}" if root.is_dir() else "no such folder"
        raise UserError(f"{root}: {what}; give a folder of audio")
    return paths

def write_audio(path, wave, sample_rate):
    """(N,) in [-1, 1] -> 16-bit audio file; the ending, .wav .flac or .ogg, is the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, wave.detach().float().cpu().clamp(-1, 1).numpy(), sample_rate)
# ==================== end shared: audio ====================

# ==================== shared: spectrum ====================
def stft(wave, cfg):
    """(B, N) -> (B, T, F) complex: Hann window of `win`, T = 1 + N // hop, frame t centred on sample t * hop,
    zeros beyond the ends, F = n_fft // 2 + 1. Its .abs() is the linear magnitude."""
    window = torch.hann_window(cfg.win, device=wave.device)
    return torch.stft(wave.float(), cfg.n_fft, cfg.hop, cfg.win, window, pad_mode="constant",
                      return_complex=True).mT

@functools.lru_cache(maxsize=8)
def mel_filters(cfg, device):
    """(F, n_mels) triangles of unit area on Slaney's mel scale: scale and norm of librosa's default."""
    top = cfg.sample_rate / 2
    mel = torch.linspace(0, 15 + 27 * math.log(top / 1000, 6.4), cfg.n_mels + 2, dtype=torch.float64)
    edge = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))     # (n_mels + 2,) Hz
    low, mid, high = edge[:-2], edge[1:-1], edge[2:]
    hertz = torch.linspace(0, top, cfg.n_fft // 2 + 1)[:, None]
    triangles = torch.minimum((hertz - low) / (mid - low), (high - hertz) / (high - mid)).clamp(min=0)
    return (triangles * 2 / (high - low)).float().to(device)

def log_mel(wave, cfg):
    """(B, N) -> (B, T, n_mels): ln(max(mel magnitude, 1e-5)), in float32 also under autocast."""
    with torch.autocast(wave.device.type, enabled=False):
        return (stft(wave, cfg).abs() @ mel_filters(cfg, wave.device)).clamp(min=1e-5).log()

def mel_to_magnitude(mel, cfg):
    """(B, T, n_mels) mel magnitude, exp of log_mel, -> (B, T, F) linear magnitude, by pseudo-inverse."""
    return (mel @ torch.linalg.pinv(mel_filters(cfg, mel.device))).clamp(min=0)

def griffin_lim(magnitude, cfg):
    """(B, T, F) linear magnitude -> (B, hop * (T - 1)) wave: 60 rounds of fast Griffin-Lim with momentum 0.99
    (Perraudin, Balazs & Sondergaard, WASPAA 2013) from a random but fixed phase."""
    angle = 2 * math.pi * torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(0))
    phase, previous = torch.polar(torch.ones_like(angle), angle).to(magnitude.device), 0
    window = torch.hann_window(cfg.win, device=magnitude.device)
    inverse = lambda: torch.istft((magnitude * phase).mT, cfg.n_fft, cfg.hop, cfg.win, window)
    for _ in range(60):
        rebuilt = stft(inverse(), cfg)
        phase = rebuilt - 0.99 / 1.99 * previous
        phase, previous = phase / phase.abs().clamp(min=1e-8), rebuilt
    return inverse()
# ==================== end shared: spectrum ====================

# ==================== shared: corpus ====================
class Corpus:
    """A folder of audio: utterance u is audio[start[u]:start[u] + length[u]] of ONE memory-mapped int16
    vector, by speakers[speaker[u]], of whom the model knows the first `known`. `held` is a tenth of each
    speaker's, `train` the rest, in the order of a hash of the path; `test` the Corpus of --test, or this."""
    def __init__(self, folder, cfg, speakers=(), is_test=False):
        root = Path(folder)
        paths = audio_files(root)
        names = [p.relative_to(root).as_posix() for p in paths]
        try:
            who = [m and m[1] for m in map(re.compile(cfg.speaker).search, names)]
        except (re.error, IndexError) as error:
            raise UserError(f"--speaker {cfg.speaker!r}: {error}; give a regex with one (group)") from None
        if None in who:
            raise UserError(f"{paths[who.index(None)]}: --speaker {cfg.speaker!r} finds no speaker; mend it")
        length, self.audio = decode(paths, cfg.sample_rate)
        good, bad = np.flatnonzero(length), np.flatnonzero(length == 0)
        if len(bad):
            lost = f"{root}: {len(bad)} of {len(paths)} files unreadable, the first is {paths[bad[0]]}"
            if len(bad) > 0.1 * len(paths):
                raise UserError(f"{lost}; mend or remove them")
            print(f"{lost}; left out")
        names, who, self.paths = [names[i] for i in good], [who[i] for i in good], [paths[i] for i in good]
        self.length, self.start, self.test = length[good], (length.cumsum() - length)[good], self
        self.speakers = [*speakers, *sorted(set(who) - set(speakers))]
        self.speaker = np.array([*map({s: i for i, s in enumerate(self.speakers)}.get, who)])
        self.known = len(speakers or self.speakers)
        self.labels = Path(not is_test and cfg.phones or root / "phones.txt")
        if cfg.phones and not self.labels.exists() and not is_test:
            raise UserError(f"--phones {cfg.phones}: no such file")
        if self.labels.exists() and len({p.stem for p in paths}) < len(paths):
            raise UserError(f"{root}: two files share a name, by which {self.labels} finds them; rename one")
        total, count, parts = collections.Counter(who), collections.Counter(), ([], [])
        order = sorted(range(len(names)), key=lambda u: hashlib.md5(os.fsencode(names[u])).digest())
        for u in order:                                # the first tenth of a speaker's is held out, never all
            count[who[u]] += 1
            parts[is_test or count[who[u]] <= -(-total[who[u]] // 10) < total[who[u]]].append(u)
        self.train, self.held = (np.array(part, int) for part in parts)
        minutes, short = length.sum() / cfg.sample_rate / 60, (self.length < cfg.crop).sum()
        print(f"{root}: {len(names)} utterances, {len(total)} speakers, {minutes:.1f} minutes; {short} "
              "shorter than a crop are repeated", *map("{} -> {}".format, names[:3], who),
              sep="\n    ", flush=True)
        if len(total) < 2 and not is_test:
            raise UserError(f"{root}: one speaker, {who[0]!r}, where two are needed; set --speaker, a regex")
        if not len(self.held):
            raise UserError(f"{root}: one utterance a speaker, so none to test on; add more")

    def wave(self, u):
        """Utterance u, whole -> (N,) float32 in [-1, 1]."""
        return self.audio[self.start[u]:self.start[u] + self.length[u]].float() / 32768

    def phones(self, utterances):
        """-> {u: (M,) class of every 10 ms} for those in the label file, read line by line: it is large."""
        wanted = {self.paths[u].stem: u for u in utterances}
        lines = map(str.split, open(self.labels if self.labels.exists() else os.devnull))
        rows = {wanted[words[0]]: words[1:] for words in lines if words and words[0] in wanted}
        index = {p: i for i, p in enumerate(sorted(set().union(*rows.values())))}
        return {u: np.array([index[p] for p in row]) for u, row in rows.items() if row}

@contextlib.contextmanager
def once(path, anew=False):
    """Yields a temporary path, renamed to `path` at the end; None where `path` exists, unless `anew`."""
    while int(os.environ.get("LOCAL_RANK", 0)) and not path.exists():       # of torchrun the first writes
        time.sleep(0.2)
    if path.exists() and not anew:
        yield None
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            yield Path(folder) / path.name
            if anew or not path.exists():                # another run may have been faster
                os.replace(Path(folder) / path.name, path)

def decode(paths, sample_rate):
    """Decodes each file once, in threads, at most 256 in memory -> (lengths (U,), 0 where unreadable; audio
    int16), memory-mapped from a file in runs/cache/: the audio of all files, then the lengths."""
    stamp = os.fsencode("".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in paths))
    cache = Path("runs/cache") / f"{sample_rate}-{hashlib.sha256(stamp).hexdigest()[:16]}.pcm"
    def read(path):
        with contextlib.suppress(UserError):
            return (read_audio(path, sample_rate) * 32768).round().clamp(-32768, 32767).short().numpy()
        return np.zeros(0, np.int16)
    with once(cache) as part:
        if part:
            lengths = []
            with open(part, "wb") as file, ThreadPoolExecutor() as pool:
                for i in range(0, len(paths), 256):
                    for wave in pool.map(read, paths[i:i + 256]):
                        lengths.append(len(wave))
                        file.write(wave)
                    print(f"decoded {len(lengths)} of {len(paths)} files", flush=True)
                file.write(np.array(lengths))
    audio = np.memmap(cache, np.int16, "c")
    return np.array(audio[-4 * len(paths):]).view(np.int64), torch.from_numpy(audio)

def load_corpus(cfg, speakers=()):
    """The Corpus of cfg.data and cfg.test, or the toy one; on a GPU if it takes less than a quarter of it."""
    data, test = (cfg.data, cfg.test) if cfg.data else toy_corpus()
    corpus = Corpus(data, cfg, speakers)
    if test:
        corpus.test = Corpus(test, cfg, corpus.speakers, is_test=True)
    if cfg.device == "cuda" and corpus.audio.nbytes < torch.cuda.mem_get_info()[0] / 4:
        corpus.audio = corpus.audio.cuda()
    return corpus

def get_batch(corpus, cfg, step, draw=0, utterances=None):
    """-> wave (B, crop) float32 in [-1, 1], speaker (B,), utterance (B,) on cfg.device: a crop from a random
    place of each of `utterances`, or of batch_size training ones, by (seed, step, draw, rank) alone."""
    rng = np.random.default_rng((cfg.seed, step, draw, RANK))
    if utterances is None:
        if len(corpus.train) < cfg.batch_size:
            raise UserError(f"{len(corpus.train)} training utterances fill no batch; lower --batch-size")
        utterances = corpus.train[rng.choice(len(corpus.train), cfg.batch_size, replace=False)]
    length = corpus.length[utterances]
    first = (rng.random(len(length)) * (length - cfg.crop + 1).clip(1)).astype(np.int64)
    index = (first[:, None] + np.arange(cfg.crop)) % length[:, None] + corpus.start[utterances, None]
    wave = corpus.audio[torch.from_numpy(index).to(corpus.audio.device)].to(cfg.device).float() / 32768
    return {"wave": wave, "speaker": torch.from_numpy(corpus.speaker[utterances]).to(cfg.device),
            "utterance": torch.from_numpy(utterances).to(cfg.device)}

def toy_corpus():
    """Writes runs/toy/train and runs/toy/test once -> both: 8 and 4 speakers, 160 and 20 utterances of 1.5 s,
    16 kHz, and phones.txt. Pulses of gliding f0, and noise, shaped by formants. Speaker = f0, tract length,
    tilt, breath, a microphone's colour, level and offset; content = random phones, drawn independently."""
    table = {"a": (800, 1250, 2500, 1, 0), "e": (480, 1900, 2600, 1, 0), "i": (280, 2300, 3000, 1, 0),
             "o": (480, 850, 2400, 1, 0), "u": (300, 700, 2200, .8, 0), "m": (250, 1100, 2100, .4, 0),
             "l": (360, 1300, 2900, .6, 0), "z": (250, 1700, 4500, .4, .3), "s": (250, 1700, 5500, 0, .6),
             "sh": (300, 1800, 3000, 0, .7), "f": (350, 1100, 6500, 0, .25), "sil": (450, 1400, 2500, 0, 0)}
    names, table = list(table), np.array(list(table.values()))               # F1, F2, F3 in Hz, voice, noise
    cfg, rng = Config(n_fft=512, win=512, hop=160), np.random.default_rng(0)
    freq, window = np.linspace(0, 8000, 257)[:, None], torch.hann_window(512)
    voices = np.stack([rng.permutation(12) / 11 for _ in range(6)], 1)  # traits spread evenly over 12
    with once(Path("runs/toy")) as root:
        for s, n in ((s, n) for s in range(12 if root else 0) for n in range(20 if s % 3 == 1 else 160)):
            pitch, tract, tilt, breath, level, offset = voices[s]
            folder, rng = root / ("test" if s % 3 == 1 else "train"), np.random.default_rng((s, n))
            colour = np.random.default_rng(1000 + s).normal(0, 0.04, 6)  # log10 of the gain: a cosine series
            colour = np.cos(freq * np.arange(1, 7) * np.pi / 4000) @ colour[:, None]         # (F, 1)
            phones = np.repeat(np.r_[11, rng.integers(0, 12, 12), 11], rng.integers(6, 17, 14))  # (T,)
            track = F.avg_pool1d(F.pad(torch.from_numpy(table[phones].T), (2, 2), "replicate"), 5, 1).numpy()
            f0 = np.linspace(-1, 1, len(phones)) * rng.uniform(-0.2, 0.2) + rng.normal(0, 0.08)
            f0 = np.repeat(90 * 2 ** (1.5 * pitch + f0), 160)                # (N,) Hz
            turn, h = np.pi * f0.cumsum() / 16000, int(7600 / f0.max())
            pulse = (np.sin((2 * h + 1) * turn) / (np.sin(turn) + 1e-9) - 1) / (4 * h) ** 0.5      # h cosines
            pulse, noise = (stft(torch.from_numpy(x)[None], cfg)[0, :-1].T.numpy()                # (F, T)
                            for x in (pulse, rng.normal(0, 1, len(f0))))
            ratio = freq[..., None] / (track[:3] * (1.05 - 0.1 * tract)).T   # (F, T, 3)
            shape = ((1 - ratio ** 2) ** 2 + 0.02 * ratio ** 2).prod(-1) ** -0.5     # three resonances
            shape *= 10 ** colour / (1 + freq / 500) ** (0.3 * tilt + 0.4)
            source = pulse * (1 - 0.09 * breath ** 2) ** 0.5 + 0.3 * breath * noise
            mixed = track[3] * shape * source
            mixed += (track[4] * np.exp(-((ratio[..., 2] - 1) * 3) ** 2) + 2e-3) * noise
            wave = torch.istft(F.pad(torch.from_numpy(mixed).cfloat(), (0, 1)), 512, 160, 512, window)
            wave *= 0.08 * 10 ** (0.05 * level + rng.uniform(-0.05, 0.05)) / wave.std()
            write_audio(folder / f"voice{s:02d}/voice{s:02d}_{n:02d}.wav", wave + 0.01 * offset, 16000)
            with open(folder / "phones.txt", "a") as file:
                print(f"voice{s:02d}_{n:02d}", *(names[i] for i in phones), file=file)
    return "runs/toy/train", "runs/toy/test"
# ==================== end shared: corpus ====================

# ==================== shared: probe ====================
def linear_probe(x, y, classes):
    """Softmax regression of y (n,) in 0..classes-1 on x (n, D), every 2nd, 3rd.. row beyond 50,000,
    standardised, L2 1e-3, full-batch L-BFGS -> function (m, D) -> (m, classes) log posteriors."""
    x, y = x[::-(-len(y) // 50_000)], y[::-(-len(y) // 50_000)]
    mean, std = x.mean(0), x.std(0).clamp(min=1e-5)
    w = torch.zeros(x.shape[1] + 1, classes, device=x.device, requires_grad=True)
    predict = lambda x: ((x - mean) / std @ w[1:] + w[0]).log_softmax(-1)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")
    def closure():
        loss = F.nll_loss(predict(x), y) + 1e-3 * w[1:].square().sum()
        w.grad, = torch.autograd.grad(loss, w)
        return loss
    optimizer.step(closure)                                             # gradients also under no_grad
    return predict

def equal_error_rate(x, speaker):
    """Verification by the cosine of centred rows of x (n, D), all pairs -> the error rate where the shares of
    same-speaker pairs rejected and of other pairs accepted are alike; 0.5 is chance, None without both."""
    x = F.normalize(x - x.mean(0), dim=1)
    a, b = torch.triu_indices(len(x), len(x), 1, device=x.device)
    same = (speaker[a] == speaker[b])[(x @ x.T)[a, b].argsort()].double()            # by rising score
    if not 0 < same.sum() < len(same):
        return None
    rejected, accepted = same.cumsum(0) / same.sum(), 1 - (1 - same).cumsum(0) / (1 - same).sum()
    i = (rejected - accepted).abs().argmin()
    return ((rejected[i] + accepted[i]) / 2).item()

def stretch(labels, frames, samples, cfg):
    """(M,) labels, one per 10 ms -> (frames,): the label in the middle of each equal part of `samples`."""
    at = (np.arange(frames) + 0.5) * samples / frames / cfg.sample_rate * 100
    return torch.from_numpy(labels[at.astype(int).clip(0, len(labels) - 1)]).to(cfg.device)

def labelled(corpus, utterances, xs, phones, cfg):
    """Of the (T', D) of each utterance, those with labels -> their frames (n, D) and phones (n,)."""
    rows = [(x, u) for x, u in zip(xs, utterances) if u in phones]
    y = [stretch(phones[u], len(x), corpus.length[u], cfg) for x, u in rows]
    return torch.cat([x for x, _ in rows]), torch.cat(y)

@torch.no_grad()
def evaluate(model, corpus, cfg):
    """What each representation knows -> {"chance": row, "representations": {name: row}}, row = {"phone",
    "speaker", "eer"}, fractions or None. Linear probes of a frame's phone, of the speaker of a time average,
    fitted on training, scored on held-out utterances (chance: the commonest class); eer on corpus.test."""
    torch.manual_seed(cfg.seed)
    untrained = Model(cfg, corpus.known).to(cfg.device)
    prepare(untrained, corpus, cfg)                                 # the control: everything but the training
    parts = (corpus, corpus.train), (corpus, corpus.held), (corpus.test, corpus.test.held)
    parts = [(c, us[:cfg.probe]) for c, us in parts]
    who = [torch.from_numpy(c.speaker[us]).to(cfg.device) for c, us in parts]
    phones, chance, table = corpus.phones([*parts[0][1], *parts[1][1]]), {"phone": None, "eer": 0.5}, {}
    def accuracy(what, x, y):                                                # x, y: (fit, held)
        chance[what] = (y[1].bincount().max() / len(y[1])).item()
        probe = linear_probe(x[0], y[0], int(torch.cat(y[:2]).max()) + 1)
        return (probe(x[1]).argmax(1) == y[1]).float().mean().item()
    for source, net in {"log-mel": None, "untrained": untrained.eval(), "": model.eval()}.items():
        encode = lambda wave: represent(net, wave, cfg) if net else {"": log_mel(wave[None], cfg)[0]}
        encoded = [[encode(c.wave(u).to(cfg.device)) for u in us] for c, us in parts]
        for name in encoded[0][0]:
            x = [[e[name].float() for e in part] for part in encoded]        # (T', D) or (D,) each
            mean = [torch.stack([v if v.dim() == 1 else v.mean(0) for v in part]) for part in x]
            row = {"phone": None, "speaker": accuracy("speaker", mean, who)}
            table[f"{name} {source}".strip()] = row
            if x[0][0].dim() == 2 and all(not phones.keys().isdisjoint(us) for _, us in parts[:2]):
                frames = [labelled(c, us, v, phones, cfg) for (c, us), v in zip(parts[:2], x)]
                row["phone"] = accuracy("phone", *zip(*frames))
            row["eer"] = equal_error_rate(mean[2], who[2])
    return {"chance": chance, "representations": table}
# ==================== end shared: probe ====================

# ==================== shared: listen ====================
@torch.no_grad()
def listen(model, corpus, cfg, out):
    """Converts 24 held-out utterances (their first 3 s), writes six to out, and has linear probes of log-mel
    frames of OTHER real utterances judge them, by mean posterior -> "target", "source": share heard as that
    speaker; "phones": share of frames whose phone survives; the same for reconstruction and copy (Griffin-Lim
    alone). None without a TARGET."""
    pool, rng = corpus.test if TARGET == "recording" else corpus, np.random.default_rng(cfg.seed)
    aims = pool.held[(pool.speaker[pool.held] < corpus.known) | (TARGET == "recording")]
    others = [(u, aims[pool.speaker[aims] != pool.speaker[u]]) for u in pool.held[:24]]
    pairs = np.array([(u, rng.choice(vs)) for u, vs in others if len(vs)])           # (24, 2): source, target
    rest = np.setdiff1d(np.r_[pool.train[:cfg.probe], pool.held[:cfg.probe]], pairs)
    if not TARGET or not len(pairs) or not len(rest):
        return None
    clips = [[pool.wave(u)[:3 * cfg.sample_rate].to(cfg.device) for u in column] for column in pairs.T]
    aims = clips[1] if TARGET == "recording" else pool.speaker[pairs[:, 1]].tolist()
    copies = [griffin_lim(mel_to_magnitude(log_mel(w[None], cfg).exp(), cfg), cfg)[0] for w in clips[0]]
    waves = {"source": clips[0], "copy": copies, "target": clips[1],
             "reconstruction": convert(model, clips[0], [None] * len(pairs), cfg),
             "conversion": convert(model, clips[0], aims, cfg)}
    for (k, name), i in itertools.product(enumerate(waves), range(min(6, len(pairs)))):
        who = f"{pool.paths[pairs[i, 0]].stem}_to_{pool.speakers[pool.speaker[pairs[i, 1]]]}"
        write_audio(out / f"{i}_{who}_{k}_{name}.wav", waves[name][i], cfg.sample_rate)
    phones, speaker = pool.phones([*rest, *pairs[:, 0]]), torch.from_numpy(pool.speaker).to(cfg.device)
    hear = lambda wave: log_mel(wave[None], cfg)[0].clamp(min=math.log(1e-3))      # deaf to what is inaudible
    mels = [hear(pool.wave(u).to(cfg.device)) for u in rest]
    heard = torch.cat([speaker[u].expand(len(m)) for u, m in zip(rest, mels)])
    judge = linear_probe(torch.cat(mels), heard, len(pool.speakers))
    spell = None if phones.keys().isdisjoint(rest) else linear_probe(
        *labelled(pool, rest, mels, phones, cfg), 1 + max(map(np.max, phones.values())))
    table = {}
    for name in ("conversion", "reconstruction", "copy"):
        mels = [hear(w) for w in waves[name]]
        heard = torch.stack([judge(m).exp().mean(0).argmax() for m in mels])
        kept = [spell(m).argmax(1) == stretch(phones[u], len(m), len(w), cfg)
                for u, m, w in zip(pairs[:, 0], mels, waves[name]) if spell and u in phones]
        target, source = ((heard == speaker[column]).float().mean().item() for column in pairs.T[::-1].copy())
        table[name] = {"target": target, "source": source,
                       "phones": torch.cat(kept).float().mean().item() if kept else None}
    return {"pairs": len(pairs), **table.pop("conversion"), **table}
# ==================== end shared: listen ====================

# ==================== shared: page ====================
def picture(wave, cfg):
    """(N,) -> <img>, an inlined 8-bit PNG, of its log-mel: low bands at the bottom, dark is loud, 70 dB."""
    mel = log_mel(wave[None], cfg)[0].T.flip(0)                              # (n_mels, T)
    gray = ((mel.max().clamp(min=-3) - mel) / 8 * 255).clamp(max=255).byte().numpy()
    rows = np.pad(gray, ((0, 0), (1, 0))).tobytes()                        # each begins with its filter: none
    word = lambda n: n.to_bytes(4, "big")
    chunk = lambda kind, data: word(len(data)) + kind + data + word(zlib.crc32(kind + data))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", word(mel.shape[1]) + word(len(mel)) + b"\x08\0\0\0\0")
    png = base64.b64encode(png + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")).decode()
    return f'<img height=96 src="data:image/png;base64,{png}">'

def page(out, result, table, log, cfg):
    """Writes out/index.html, which opens from disk, without script or network: the table, the curves of the
    log, and a player and a spectrogram of each file of out/samples, those of one number in a row."""
    figure = lambda body, note: f"<figure>{body}<figcaption>{escape(note).replace('_', '_<wbr>')}</figure>"
    rows = "<tr>".join("".join(f"<td>{escape(cell)} &nbsp;" for cell in row) for row in table)
    html = ["<!DOCTYPE html><meta charset=utf-8><style>body{font:13px sans-serif} img,audio,svg{width:100%}"
            "div{display:flex;flex-wrap:wrap} figure{width:17em;margin:4px} path{fill:none;stroke:red;stroke-"
            f"linecap:round}}</style><h1>{escape(result['command'])}</h1><table><tr>{rows}</table><div>"]
    for k in dict.fromkeys(k for line in log for k in line if k not in ("step", "seconds_left")):
        x, y = np.array([(line["step"], line[k]) for line in log if k in line]).T
        span = max(np.ptp(y), 1e-5 * abs(y).max(), 1e-9)                     # what is constant is a flat line
        dots = np.stack([5 + 180 * x / x[-1], 75 - 70 * (y - y.min()) / span], 1).round(1)
        path = f'<path d="M{" ".join(map(str, dots.ravel()))}h0"/>'
        html.append(figure(f'<svg viewBox="0 0 190 80">{path}</svg>', f"{k} {y.min():.4g} to {y.max():.4g}"))
    row = lambda path: re.match(r"\D*\d+|[^_]*", path.stem)[0]              # 0_.., grid_0_.., noise_..
    show = lambda path: figure(picture(read_audio(path, cfg.sample_rate), cfg) + "<audio controls "
                               f'src="samples/{quote(path.name)}"></audio>', path.name)
    for _, paths in itertools.groupby(sorted((out / "samples").glob("*.wav")), row):
        html += ["</div><div>", *map(show, paths)]
    (out / "index.html").write_text("\n".join(html) + "\n", "utf-8", "replace")
# ==================== end shared: page ====================

# ==================== shared: main ====================
NAME, BEGAN = Path(__file__).stem, time.time()
CODE = Path(__file__).read_text().split('"""', 2)[2]                         # the script below its docstring
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))           # set by torchrun

def parse(argv):
    """argv -> (mode, {field of Config: value} as far as given, other flags). Wrong usage: exit 2."""
    file_modes = ("checkpoint", "source", "output")
    needs = {"train": (), "evaluate": ("checkpoint",), "convert": file_modes, "encode": file_modes}
    mode, argv = (argv[0], argv[1:]) if argv and argv[0] in needs else ("train", argv)
    parser = argparse.ArgumentParser(usage=f"python {NAME}.py [{' | '.join(needs)}] [--flag value ..]",
                                     description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}; see python {NAME}.py --help\n")
    boolean = lambda text: ("false", "true").index(text.lower()) == 1
    notes = dict(re.findall(r"^    (\w+): .*?# (.+)$", CODE, re.M))
    for f in fields(Config):
        names = dict.fromkeys((f"--{f.name.replace('_', '-')}", f"--{f.name}"))
        parser.add_argument(*names, dest=f.name, nargs="?" if f.name == "data" else None,   # alone: the toy
                            type={bool: boolean, int: int, float: float}.get(f.type, str),
                            choices=get_args(f.type) or None,
                            help=f"{notes.get(f.name, '')} [{f.default}]".replace("%", "%%"))
    parser.add_argument("--checkpoint", help="run folder or model.pt")
    parser.add_argument("--source", help="audio file; or folder to encode")
    parser.add_argument("--target", help=TARGET or "not used here")
    parser.add_argument("--output", help="what to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --output")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--toy", action="store_true", help="with --data: TOY's small model and budget")
    flags = parser.parse_args(argv)
    given = {f.name: value for f in fields(Config) if (value := getattr(flags, f.name)) is not None}
    for name, value in given.items():
        zero = value == 0 and (name == "seed" or type(value) is float)
        if type(value) in (int, float) and not (zero or 0 < value < math.inf):
            parser.error(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    if given.get("device") == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here; leave the flag out")
    for name in (*needs[mode], *["out"] * flags.resume):
        if not getattr(flags, name):
            parser.error(f"{mode}{' --resume' * flags.resume} needs --{name}")
    return mode, given, flags

def save(path, model, optimizers, step, cfg, speakers):
    """Checkpoint of tensors and plain values; at every moment `path` is the old one or the new one, whole."""
    try:
        with once(path, anew=True) as part, open(part, "wb") as file:
            torch.save({"script": NAME, "step": step, "speakers": speakers, "model": model.state_dict(),
                        "config": {name: value for name, value in asdict(cfg).items() if name != "device"},
                        "optimizers": {name: o.state_dict() for name, o in optimizers.items()}}, file)
            file.flush()
            os.fsync(file.fileno())
    except RuntimeError as error:
        raise error.__context__ or error                 # torch wraps what the disk said

def load(path, **overrides):
    """Run folder or checkpoint file -> (model in eval mode on cfg.device, cfg, checkpoint), or UserError."""
    file = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; give a run folder or its model.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        script, saved = checkpoint["script"], checkpoint["config"]
    except Exception:                                                   # whatever torch makes of a wrong file
        raise UserError(f"{file}: not a checkpoint, or a damaged one; give another") from None
    if script != NAME:
        raise UserError(f"{file}: a checkpoint of {script}.py; use that script")
    try:
        cfg = Config(**saved | overrides)
        model = Model(cfg, len(checkpoint["speakers"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, KeyError, RuntimeError):
        raise UserError(f"{file}: another configuration; leave out the flags that change the model") from None
    return model.to(cfg.device).eval(), cfg, checkpoint

def train(given, flags):
    """Trains, then reports; leaves model.pt, log.jsonl, result.json, index.html and samples/ in --out."""
    checkpoint = None
    if WORLD > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))             # "cuda" now means this process's GPU
    free = (path for i in itertools.count(1) if not (path := Path(f"runs/{NAME}-{i}")).exists())
    out = Path(given.get("out") or next(free))
    if flags.resume and (out / "model.pt").exists():
        model, cfg, checkpoint = load(out, **given)
    elif not flags.resume and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists; add --resume to go on with it, or choose another --out")
    else:
        cfg = Config(**(TOY if flags.toy or not given.get("data") else {}) | given)
    if WORLD > 1:
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo")
    corpus = load_corpus(cfg)
    torch.manual_seed(cfg.seed)
    if not checkpoint:
        model = Model(cfg, corpus.known).to(cfg.device)
        prepare(model, corpus, cfg)
    elif checkpoint["speakers"] != corpus.speakers:
        raise UserError(f"{cfg.data}: not the speakers that {out} was trained on; choose another --out")
    optimizers = make_optimizers(model, cfg)
    for name in optimizers if checkpoint else ():
        optimizers[name].load_state_dict(checkpoint["optimizers"][name])
    if WORLD > 1:                                                 # one start; then every gradient is averaged
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(WORLD)))
    out.mkdir(parents=True, exist_ok=True)
    done, window, bad, last, stop = checkpoint["step"] if checkpoint else 0, [], 0, time.time(), []
    ask = lambda number, _: stop.append(signal.signal(number, signal.default_int_handler))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)                                   # asked once: after this step; twice: now
    for step in range(done, cfg.steps):
        torch.manual_seed(int(np.random.default_rng((cfg.seed, step, RANK)).integers(2 ** 62)))
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16 and cfg.device == "cuda",
                            cache_enabled=False):                 # its copies of weights could outlive a step
            window.append(train_step(model.train(), optimizers, corpus, step, cfg))
        finite = torch.stack([v.float().isfinite() for v in window[-1].values()]).all()
        bad, done = (bad + 1) * ~finite, step + 1                            # bad stays on the device
        end = done == cfg.steps or bool(stop)
        if done % cfg.log_every == 0 or end:
            spent, names = (time.time() - last) / len(window), dict.fromkeys(k for m in window for k in m)
            log = {k: torch.stack([m[k].float() for m in window if k in m]).mean().item() for k in names}
            log |= {"audio_seconds_per_second": cfg.batch_size * cfg.crop * WORLD / cfg.sample_rate / spent,
                    "seconds_left": (cfg.steps - done) * spent}
            print(f"step {done}/{cfg.steps}", *(f"{k} {v:.4g}" for k, v in log.items()), sep="  ", flush=True)
            with open(os.devnull if RANK else out / "log.jsonl", "a") as file:
                print(json.dumps({"step": done} | log), file=file)
            window, last = [], time.time()
        if (done % 20 == 0 or end) and (bad >= 20 or end and bad):
            raise UserError(f"the loss is not finite from step {done - int(bad) + 1} on; lower --lr")
        sound = (done % cfg.save_every == 0 or end) and not bad and not RANK
        if sound and all(t.isfinite().all() for t in model.state_dict().values()):
            save(out / "model.pt", model, optimizers, done, cfg, corpus.speakers)
        if end and stop:
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if WORLD > 1:
        dist.destroy_process_group()
    if not RANK:
        report(model, corpus, cfg, out, done)

def report(model, corpus, cfg, out, steps):
    """Measures everything -> out/result.json, samples/, index.html, and the table on the screen."""
    print("measuring what the representations know and what conversion does", flush=True)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    log = [json.loads(line) for line in open(out / "log.jsonl")] if (out / "log.jsonl").exists() else []
    speed = sorted(line["audio_seconds_per_second"] for line in log)[len(log) // 2:len(log) // 2 + 1]
    result = {"script": NAME, "sha256": hashlib.sha256(CODE.encode()).hexdigest(),
              "command": shlex.join(["python", Path(__file__).name, *sys.argv[1:]]), "config": asdict(cfg),
              "data": {"folder": cfg.data or "toy", "utterances": len(corpus.paths), "speakers": corpus.known,
                       "minutes": round(corpus.length.sum() / cfg.sample_rate / 60, 1)},
              "steps": steps, "torch": torch.__version__,
              "hardware": torch.cuda.get_device_name() if cfg.device == "cuda" else
              f"CPU, {torch.get_num_threads()} threads",
              "audio_seconds_per_second": speed[0] if speed else None, **evaluate(model.eval(), corpus, cfg),
              "conversion": listen(model, corpus, cfg, out / "samples"),
              "metrics": sample(model, corpus, cfg, out / "samples")}
    result["seconds"] = round(time.time() - BEGAN, 1)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    table, percent = [["", "phone", "speaker", "EER"]], lambda v: "-" if v is None else f"{v:.1%}"
    for name, row in {"chance": result["chance"], **result["representations"]}.items():
        table.append([name, *(percent(row[what]) for what in ("phone", "speaker", "eer"))])
    for p, name, value in ((p, *i) for p in ("conversion", "metrics") for i in (result[p] or {}).items()):
        value = value if isinstance(value, dict) else {"": value}
        table.append([f"{p} {name}", *(f"{k} {v:.4g}".strip() for k, v in value.items() if v is not None)])
    for name, *cells in table:
        print(f"{name:30}", *(f"{cell:>8}" for cell in cells))
    page(out, result, table, log, cfg)
    print(f"{result['seconds']:.0f} s; {out}/index.html, {out}/result.json, {out}/samples", flush=True)

def main(argv):
    """Runs one mode -> exit code."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        mode, given, flags = parse(argv)
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
        if mode == "train":
            train(given, flags)
            return 0
        output = Path(flags.output or tempfile.mkdtemp())
        if flags.output and output.exists() and not flags.overwrite:
            raise UserError(f"{output}: exists; add --overwrite to replace it")
        if mode == "convert" and output.suffix not in (".wav", ".flac", ".ogg"):
            raise UserError(f"{output}: unknown ending; end it in .wav, .flac or .ogg")
        fresh = {"test": "", "phones": ""} if "data" in given else {}  # those of the training data do not fit
        model, cfg, checkpoint = load(flags.checkpoint, **fresh | given)
        def read(path):
            wave = read_audio(path, cfg.sample_rate).to(cfg.device)
            if len(wave) < cfg.win or wave.abs().max() < 1e-4:
                what = "silence" if len(wave) >= cfg.win else f"shorter than a window of {cfg.win} samples"
                raise UserError(f"{path}: {what}; give another recording")
            return wave
        files = lambda root: audio_files(root) if root.is_dir() else [root]
        if mode == "evaluate":
            report(model, load_corpus(cfg, checkpoint["speakers"]), cfg, output, checkpoint["step"])
        elif mode == "convert":
            target, speakers = flags.target or None, checkpoint["speakers"]
            if target and not TARGET:
                raise UserError(f"--target: {NAME}.py does not convert between speakers; leave it out")
            if target and TARGET == "recording":            # several of one speaker, one after another
                target = torch.cat([read(path) for path in files(Path(target))])
            elif target and target not in speakers:
                raise UserError(f"--target {target}: unknown; the model knows {', '.join(speakers[:40])}")
            elif target:
                target = speakers.index(target)
            write_audio(output, convert(model, [read(flags.source)], [target], cfg)[0], cfg.sample_rate)
        else:
            root, lost = Path(flags.source), []
            for path in files(root):
                file = output / path.relative_to(root if root.is_dir() else root.parent)
                try:
                    for name, x in represent(model, read(path), cfg).items():
                        file.parent.mkdir(parents=True, exist_ok=True)
                        np.save(file.with_suffix(f".{name}.npy"), x.float().cpu().numpy())
                except UserError as error:
                    lost.append(error)
            if lost:
                raise UserError(f"{len(lost)} files could not be encoded, the first: {lost[0]}")
        return 0
    except UserError as error:
        message = error
    except torch.cuda.OutOfMemoryError:
        message = "out of GPU memory; lower --batch-size or --crop"
    except (OSError, sf.SoundFileError) as error:
        message = f"{error}; free space there or choose another place"
    except KeyboardInterrupt:
        return 130
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return 1

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
# ==================== end shared: main ====================
