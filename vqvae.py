# SPDX-License-Identifier: MIT
"""VQ-VAE: discrete units of speech by vector quantization, and a WaveNet that decodes them.

Paper    van den Oord, Vinyals, Kavukcuoglu. Neural Discrete Representation Learning. NIPS 2017,
         arXiv:1711.00937v2. Chorowski, Weiss, Bengio, van den Oord. Unsupervised Speech
         Representation Learning Using WaveNet Autoencoders. 2019, arXiv:1901.08810, of which only
         summaries and later code were read. --bottleneck onehot: Jang, Gu, Poole. Categorical
         Reparameterization with Gumbel-Softmax. ICLR 2017, arXiv:1611.01144.

Idea     An autoencoder whose bottleneck is one integer per 20 ms: each latent is replaced by the
         nearest of K codes. The decoder is a WaveNet, which predicts every sample from those before
         it, and it is told the speaker. The codes need to carry only what it cannot guess, roughly
         the phones. Choosing a code is not differentiable, so the gradient at the code is copied to
         the latent (straight-through). Decoding with another speaker converts the voice.

Model    wave x (B, N) -> MFCC at 100 Hz, standardized                     (B, T, 39), T = N / 160
         encoder: 9 convolutions, one of stride 2; projection to D    z    (B, T', D), T' = T / 2
         nearest of K codes                                           z_q  (B, T', D), ids (B, T')
         jitter (training only), convolution over 3 codes, speaker    c    (B, T', C)
         WaveNet on mu-law levels: log p(y_t | y_1 .. y_(t-1), c)          (B, N, 256)

Loss     L = -log p(x|z_q) + |sg[z_e(x)] - e|^2 + beta |z_e(x) - sg[e]|^2    Eq. (3), 1711.00937
         sg stops the gradient. log p is a sum over the N samples of a crop; |.|^2 is a sum over D
         and an average over the T' latents (Sec. 3.2). Training divides L by N, so that its first
         term is in nats per sample. The second term moves the codes. By default it is left out, and
         code i is a moving average of the n_i latents z_ij that chose it (Appendix A.1):
         N_i <- g N_i + (1 - g) n_i,   m_i <- g m_i + (1 - g) sum_j z_ij,   e_i = m_i / N_i

Symbols  z_e(x)   z             (B, T', D)         N_i, m_i   bottleneck.N, .M   (K,), (K, D)
         z_q(x)   z_q           (B, T', D)         beta       cfg.beta           0.25
         e        bottleneck.e  (K, D)             gamma, g   cfg.decay          0.99
         B crops, N samples in each (N_i, with an index, is a count, as in A.1), T frames, T' codes,
         C channels of the condition, R residual and S skip channels of the WaveNet, L layers

Differs from the paper
D1  Encoder, size of the codes, jitter and WaveNet are those of 1901.08810: MFCC in, 50 codes a
    second. 1711.00937 encodes the wave by 6 strided convolutions, a code for every 64 samples.
D2  K = 512, as in the VCTK model of 1711.00937. 1901.08810 varies it.
D3  Batch normalization follows each convolution of the encoder and precedes its projection.
D4  The codes start as latents of the data. A code that is hardly used moves to a random latent.
D5  Counts are Laplace-smoothed in m_i / N_i, so that nothing is divided by 0.
D6  The codes are moving averages, which 1711.00937 proposes but did not use in its experiments.
    --codebook gradient trains them by the second term of L.
D7  The WaveNet's table of sample embeddings starts as sines and cosines of the level, not at
    random: neighboring levels start alike, and the decoder need not learn their order.
D8  The speaker's one-hot vector is multiplied by sqrt(n_speakers): its mean square is then 1, as
    that of the embeddings. Otherwise a short training hardly uses the speaker.
D9  The weights are not Polyak-averaged: one set of them is trained, evaluated and saved.
Not specified in the paper
U1  The MFCC: here Slaney scale, magnitudes, no pre-emphasis, 5-frame differences, standardized.
U2  The edges of a crop: here zeros, silence before the first sample, repeated frames in the MFCC.
U3  The kernel of the WaveNet's convolutions: here 2.
U4  Scaling in the WaveNet: here residual sums by sqrt(1/2), the sum of the skips by sqrt(1/L).
U5  One-hot and binary codes in this autoencoder: here straight-through (1611.01144, Sec. 2.2), with
    the temperature of its Sec. 4.3, lowered at every step, and a loss that keeps codes in use.
U6  The number of steps: here a million, with the rate halved after 0.4, 0.6 and 0.8 of them.
U7  How codes are upsampled to samples: here each is repeated.

Usage    python vqvae.py                toy corpus, three minutes on two CPU cores
         python vqvae.py --data DIR     full size; a GPU of 24 GB takes --batch-size 48 (estimate)
         python vqvae.py convert --checkpoint RUN --source a.wav --target SPEAKER --output c.wav
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
    """Settings of a run: first those that all six scripts have, then those of the method."""

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

    # What makes the latents discrete; none: an ordinary autoencoder, as a control.
    bottleneck: Literal["vq", "onehot", "binary", "none"] = "vq"
    codebook: Literal["ema", "gradient"] = "ema"  # how VQ learns its codes (D6)
    codes: int = 512  # K, 1711.00937 Sec. 4.3 (D2); binary: log2 K bits, rounded up
    d_code: int = 64  # D, 1901.08810
    beta: float = 0.25  # weight of the commitment, 1711.00937 Sec. 3.2
    decay: float = 0.99  # gamma of the moving averages, 1711.00937 A.1
    revive: float = 0.1  # a code used less than this times the average counts as dead (D4)
    usage: float = 0.1  # onehot, binary: weight of the term that keeps codes in use (U5)
    tau_rate: float = 3e-5  # onehot: temperature max(0.5, exp(-rate * step)), 1611.01144 Sec. 4.3
    jitter: float = 0.12  # chance that a code is replaced by a neighbor, 1901.08810
    channels: int = 768  # of the encoder, 1901.08810
    d_condition: int = 128  # channels of the convolution over the codes, 1901.08810
    residual: int = 368  # R, even: residual and gated channels; ae-wavenet has 368 and 256
    skip: int = 256  # S, channels of skips and output layers, as in ae-wavenet
    cycles: int = 2  # of dilations, as in ae-wavenet
    depth: int = 10  # layers in a cycle, with dilations 1, 2, 4 .. 512, as in ae-wavenet
    temperature: float = 1.0  # of sampling

    def __post_init__(self):
        for name, value in asdict(self).items():
            may_be_zero = isinstance(value, float) or name == "seed"
            above_zero = isinstance(value, str | bool) or 0 < value < math.inf
            if not (above_zero or (value == 0 and may_be_zero)):
                raise UserError(f"--{name} {value}: must be a number above 0")
        if not self.hop < self.win <= self.n_fft:
            raise UserError("--hop, --win, --n-fft: need hop < win <= n_fft")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: there is no CUDA device; leave the flag out")
        if self.crop % (2 * self.hop) or self.residual % 2:
            raise UserError("--crop must be a multiple of twice --hop, and --residual even")


# The same model, narrower, for two CPU cores and three minutes. At 5 kHz a period of the voice has
# fewer samples than at 8, which the WaveNet learns sooner. beta and temperature were chosen by
# trial, batch and rate for many short steps.
TOY = dict(
    sample_rate=5000,
    n_fft=256,
    win=125,
    hop=50,
    n_mels=40,
    crop=1200,
    batch_size=3,
    steps=6500,
    lr=4e-3,
    log_every=250,
    save_every=1000,
    codes=64,
    beta=0.01,
    tau_rate=4e-4,
    channels=128,
    d_condition=32,
    residual=32,
    skip=64,
    cycles=1,
    depth=8,
    temperature=0.85,
)
TARGET = "speaker"  # kind of target that convert takes: a training speaker, by its index
SILENCE = 128  # of 256 levels, the one that encodes an amplitude of 0


# ---------- model ----------
def convolution(channels_in, channels, kernel, stride=1):
    """(B, C_in, T) -> (B, C, T / stride), with zeros beyond the edges (U2)."""
    return nn.Sequential(
        nn.Conv1d(channels_in, channels, kernel, stride, padding=(kernel - 1) // 2),
        nn.BatchNorm1d(channels, affine=False),  # D3
        nn.ReLU(),
    )


class Residual(nn.Sequential):
    """h -> h + layers(h)."""

    def forward(self, h):
        return h + super().forward(h)


class Encoder(nn.Module):
    """MFCC (B, T, 39), at 100 Hz -> latents z (B, T', D), at 50 Hz. Each sees 16 frames (D1)."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.channels
        self.layers = nn.Sequential(
            convolution(39, C, 3),
            Residual(*convolution(C, C, 3)),
            convolution(C, C, 4, stride=2),
            *(Residual(*convolution(C, C, kernel)) for kernel in (3, 3, 1, 1, 1, 1)),
            nn.BatchNorm1d(C, affine=False),  # D3: otherwise the residual sums grow in training
        )
        self.project = nn.Linear(C, cfg.d_code)

    def forward(self, mfcc):
        return self.project(self.layers(mfcc.mT).mT)


class VectorQuantizer(nn.Module):
    """Replaces each vector by the nearest of K codes, and learns the codes: Sections 3.1, 3.2 and
    A.1 of 1711.00937. Of this script it needs only the imports torch, nn, F and dist.

    codes      K
    dim        D
    beta       weight of the commitment
    decay      gamma of the moving averages, which move in training mode only
    smoothing  of the counts (D5)
    revive     a code used less than this times the average is replaced; 0: none is (D4)
    codebook   "ema": moving averages set the codes; "gradient": an optimizer does (D6)
    """

    def __init__(
        self, codes, dim, beta=0.25, decay=0.99, smoothing=1e-5, revive=0.1, codebook="ema"
    ):
        super().__init__()
        self.beta = beta
        self.decay = decay
        self.smoothing = smoothing
        self.revive = revive
        self.by_gradient = codebook == "gradient"
        self.e = nn.Parameter(torch.randn(codes, dim), requires_grad=self.by_gradient)
        # Each code starts with a count of 1. With 0, the first M / N would throw it far away.
        self.register_buffer("N", torch.ones(codes))
        self.register_buffer("M", self.e.detach().clone())

    @torch.no_grad()
    def start(self, z):
        """The codes become K of the latents z (n, D), n >= K (D4)."""
        self.e.copy_(z[torch.randperm(len(z))[: len(self.e)]])
        self.M.copy_(self.e)

    def forward(self, z):
        """z (.., D) -> z_q (.., D), ids (..), and the commitment term of Eq. (3), with "gradient"
        also its second term: sums over D, averaged over the latents. All is in the precision of
        the codes, also under autocast."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would pick other codes
            z = z.to(self.e.dtype)
            latents = z.detach().reshape(-1, z.shape[-1])  # (n, D)
            ids = torch.cdist(latents, self.e).argmin(1).view(z.shape[:-1])  # Eq. (1)
            e = self.e[ids]  # Eq. (2)

            loss = self.beta * (z - e.detach()).square().sum(-1).mean()  # moves z only
            if self.by_gradient:
                loss = loss + (z.detach() - e).square().sum(-1).mean()  # moves e only
            # Straight-through: the value of e, the gradient of z.
            z_q = e.detach() + (z - z.detach())
            if self.training:  # after z_q: the decoder sees the codes that were compared
                self.update(latents, ids.flatten())
        return z_q, ids, loss

    @torch.no_grad()
    def update(self, z, ids):
        """Moves N, M and, with "ema", e toward the latents z (n, D) that chose the codes ids (n,),
        then replaces dead codes. No shape depends on a value, so a GPU need not wait."""
        K = len(self.e)
        chosen = F.one_hot(ids, K).to(z.dtype)  # (n, K)
        n = chosen.sum(0)
        m = chosen.T @ z
        random = z[torch.randint(len(z), (K,), device=z.device)]
        if dist.is_initialized():  # all GPUs keep the same codes
            dist.all_reduce(n)
            dist.all_reduce(m)
            dist.broadcast(random, 0)

        self.N.lerp_(n, 1 - self.decay)  # N <- g N + (1 - g) n
        self.M.lerp_(m, 1 - self.decay)
        if not self.by_gradient:
            total = self.N.sum()
            smoothed = (self.N + self.smoothing) / (total + K * self.smoothing) * total  # D5
            self.e.copy_(self.M / smoothed[:, None])

        # D4: where `dead` is 1, a code is replaced, with N and M, or the next M / N would undo it.
        average = self.N.mean()
        dead = (self.N < self.revive * average).to(z.dtype)
        self.N.lerp_(average, dead)
        self.M.lerp_(average * random, dead[:, None])
        self.e.lerp_(random, dead[:, None])


class OneHot(nn.Module):
    """One of K by straight-through Gumbel-softmax, Section 2.2 of 1611.01144 (U5). Like the next
    two, it has the interface of VectorQuantizer. Its loss is the KL of the average softmax to
    uniform shares."""

    def __init__(self, codes, dim):
        super().__init__()
        self.logits = nn.Linear(dim, codes)
        self.e = nn.Linear(codes, dim, bias=False)
        self.tau = 1.0  # the temperature, lowered in train_step

    def forward(self, z):
        logits = self.logits(z).float()  # (.., K)
        if self.training:  # straight-through: soft values would let more information through
            one_hot = F.gumbel_softmax(logits, self.tau, hard=True)
        else:
            one_hot = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        loss = kl_to_uniform(logits.softmax(-1).flatten(0, -2).mean(0))
        return self.e(one_hot), one_hot.argmax(-1), loss


class Binary(nn.Module):
    """log2 K bits, rounded up: sigmoids cut at 0.5, straight-through (U5)."""

    def __init__(self, codes, dim):
        super().__init__()
        bits = ceil(math.log2(codes))
        self.logits = nn.Linear(dim, bits)
        self.e = nn.Linear(bits, dim)

    def forward(self, z):
        p = self.logits(z).float().sigmoid()  # (.., log2 K)
        bits = (p > 0.5).float()
        ids = (bits @ 2.0 ** torch.arange(p.shape[-1], device=z.device)).long()
        average = p.flatten(0, -2).mean(0)
        loss = kl_to_uniform(torch.stack([average, 1 - average], -1)).sum()
        bits = bits + (p - p.detach())  # straight-through
        return self.e(2 * bits - 1), ids, loss


class Nothing(nn.Identity):
    """No bottleneck: the latents as they are, without codes."""

    def forward(self, z):
        return z, torch.zeros_like(z[..., 0]).long(), z.new_zeros(())


def make_bottleneck(cfg):
    """The module that --bottleneck names."""
    if cfg.bottleneck == "vq":
        return VectorQuantizer(
            cfg.codes, cfg.d_code, cfg.beta, cfg.decay, revive=cfg.revive, codebook=cfg.codebook
        )
    kinds = {"onehot": OneHot, "binary": Binary, "none": Nothing}
    return kinds[cfg.bottleneck](cfg.codes, cfg.d_code)


def kl_to_uniform(p):
    """p (.., K) -> KL(p || uniform) in nats (..): 0 for equal shares, ln K for a single code."""
    return math.log(p.shape[-1]) - torch.special.entr(p).sum(-1)


def jitter(z, chance):
    """z (B, T', D) with each vector replaced, with this chance, by its left or right neighbor."""
    u = torch.rand_like(z[..., 0])  # (B, T')
    T = z.shape[1]
    step = (u > 1 - chance / 2).long() - (u < chance / 2).long()  # 1, 0 or -1
    index = (torch.arange(T, device=z.device) + step).clamp(0, T - 1)
    return z.gather(1, index[..., None].expand_as(z))


def mu_law(wave):
    """(..) in [-1, 1] -> levels (..) int64: sgn(x) ln(1 + 255 |x|) / ln 256 in equal steps."""
    compressed = wave.sign() * (255 * wave.abs()).log1p() / math.log(256)
    return ((compressed + 1) / 2 * 255 + 0.5).long().clamp(0, 255)


def inverse_mu_law(y):
    """Levels (..) -> amplitudes (..) in [-1, 1]."""
    compressed = 2 * y.float() / 255 - 1
    return compressed.sign() * (256 ** compressed.abs() - 1) / 255


def level_waves(levels, channels):
    """-> (levels, channels): sines and cosines of the level u in [-1, 1], of 1 to 16 half periods,
    with a mean square of 1, as that of N(0, 1) (D7)."""
    u = torch.linspace(-1, 1, levels)[:, None]
    angle = math.pi / 2 * u * torch.linspace(1, 16, channels // 2)
    return 2**0.5 * torch.cat([angle.sin(), angle.cos()], 1)


class Decoder(nn.Module):
    """A WaveNet: log p(y_t | y_1 .. y_(t-1), c) of all t at once, by dilated causal convolutions.
    With channels last, a convolution of kernel 2 (U3) is a matrix product with [h_(t-d), h_t]."""

    def __init__(self, cfg, d_condition):
        super().__init__()
        R, S = cfg.residual, cfg.skip
        self.sizes = (S, R)
        self.dilations = [2**i for i in range(cfg.depth)] * cfg.cycles
        L = len(self.dilations)
        self.embed = nn.Embedding.from_pretrained(level_waves(256, R), freeze=False)
        self.project = nn.Linear(d_condition, L * 2 * R, bias=False)
        self.dilated = nn.ModuleList(nn.Linear(2 * R, 2 * R) for _ in range(L))
        # To the skips and to the next layer; of the last layer the second part is not used.
        self.mix = nn.ModuleList(nn.Linear(R, S + R) for _ in range(L))
        self.output = nn.Sequential(nn.ReLU(), nn.Linear(S, S), nn.ReLU(), nn.Linear(S, 256))

    def condition(self, c):
        """c (B, T', C) -> v (B, T', L, 2R), what each layer adds before its gate. Projecting
        first and repeating the codes afterwards (U7) gives the same numbers at less cost."""
        return self.project(c).unflatten(-1, (len(self.dilations), -1))

    def layer(self, i, past, h, v):
        """Layer i: its inputs h_(t-d) and h_t (.., R), and its condition v (.., 2R) -> its skip
        output (.., S) and the input of the next layer (.., R)."""
        a, b = (self.dilated[i](torch.cat([past, h], -1)) + v).chunk(2, -1)
        skip, residual = self.mix[i](a.tanh() * b.sigmoid()).split(self.sizes, -1)
        return skip, (h + residual) * 0.5**0.5  # U4

    def head(self, skips):
        """Sum of the skips (.., S) -> logits (.., 256)."""
        return self.output(skips / len(self.dilations) ** 0.5)  # U4

    def forward(self, previous, c):
        """previous (B, N): y_(t-1) for each t; c (B, T', C) -> logits (B, N, 256)."""
        repeats = (c.shape[1], -1)  # samples as (T', N / T')
        v = self.condition(c)[:, :, None]  # (B, T', 1, L, 2R)
        h = self.embed(previous).unflatten(1, repeats)  # (B, T', N / T', R)
        skips = 0
        for i, dilation in enumerate(self.dilations):
            # h_(t-d), with zeros before the start
            past = F.pad(h.flatten(1, 2), (0, 0, dilation, 0))[:, :-dilation]
            skip, h = self.layer(i, past.unflatten(1, repeats), h, v[:, :, :, i])
            skips = skips + skip.to(h.dtype)  # float32, also under autocast
        return self.head(skips).flatten(1, 2)


class Model(nn.Module):
    """Encoder, bottleneck and decoder, and the mean and deviation of the MFCC."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg = cfg
        self.n_speakers = n_speakers
        self.samples_per_code = 2 * cfg.hop
        self.register_buffer("mean", torch.zeros(39))
        self.register_buffer("std", torch.ones(39))
        self.encoder = Encoder(cfg)
        self.bottleneck = make_bottleneck(cfg)
        self.context = nn.Conv1d(cfg.d_code, cfg.d_condition, 3, padding=1)
        self.decoder = Decoder(cfg, cfg.d_condition + n_speakers)

    def features(self, wave):
        """(B, N) -> (B, T, 39), T = N // hop: MFCC, standardized."""
        return (mfcc(wave, self.cfg) - self.mean) / self.std

    def encode(self, wave):
        """(B, N) -> z (B, T', D), z_q (B, T', D), ids (B, T'), the bottleneck's loss. The wave is
        padded with zeros to a whole number of codes."""
        wave = F.pad(wave, (0, -wave.shape[1] % self.samples_per_code))
        z = self.encoder(self.features(wave))
        return z, *self.bottleneck(z)

    def condition(self, z_q, speaker):
        """z_q (B, T', D), speaker (B,) -> c (B, T', C): codes with their neighbors, and the speaker
        one-hot."""
        if self.training:
            z_q = jitter(z_q, self.cfg.jitter)
        h = self.context(z_q.mT).mT
        one_hot = F.one_hot(speaker, self.n_speakers)[:, None] * self.n_speakers**0.5  # D8
        return torch.cat([h, one_hot.expand(-1, h.shape[1], -1)], -1)

    def forward(self, z_q, speaker, wave):
        """z_q (B, T', D), speaker (B,), wave (B, N) -> -log p(wave | z_q, speaker) of each crop
        (B,), divided by its samples, in nats."""
        y = mu_law(wave)
        previous = F.pad(y, (1, 0), value=SILENCE)[:, :-1]  # U2
        logits = self.decoder(previous, self.condition(z_q, speaker))
        nats = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="none")
        return nats.view_as(y).mean(1)


def mfcc(wave, cfg):
    """(B, N) -> (B, N // hop, 39): 13 cepstra, the orthonormal DCT-II of the log-mel spectrum, with
    their first and second differences (U1)."""
    mel = log_mel(wave, cfg)[:, : wave.shape[1] // cfg.hop]  # (B, T, n_mels)
    n = torch.arange(cfg.n_mels, device=wave.device) + 0.5
    k = torch.arange(13, device=wave.device)
    dct = (2 / cfg.n_mels) ** 0.5 * (math.pi / cfg.n_mels * n[:, None] * k).cos()
    dct[:, 0] /= 2**0.5
    with torch.autocast(wave.device.type, enabled=False):
        cepstra = mel @ dct
        first = differences(cepstra)
        return torch.cat([cepstra, first, differences(first)], -1)


def differences(x):
    """(B, T, C) -> (B, T, C): slope of the regression line over 5 frames. The edges repeat (U2)."""
    frames = F.pad(x.mT, (2, 2), mode="replicate").unfold(-1, 5, 1)  # (B, C, T, 5)
    return (frames @ (torch.arange(-2.0, 3, device=x.device) / 10)).mT


# ---------- loss and training step ----------
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of the MFCC, and codes drawn from the latents."""
    n_crops = 512 + 4 * cfg.codes * model.samples_per_code // cfg.crop  # more than 4 K latents
    utterances = np.random.default_rng(cfg.seed).choice(corpus.train, n_crops)
    wave = get_batch(corpus, cfg, 0, draw=1, utterances=utterances)["wave"]
    x = mfcc(wave, cfg)  # (n, T, 39)
    model.mean.copy_(x.mean((0, 1)))
    model.std.copy_(x.std((0, 1)) + 1e-5)

    x = model.features(wave)
    encoder = model.encoder.train()
    if cfg.bottleneck == "vq":
        model.bottleneck.start(encoder(x).flatten(0, 1))
    # The norms get their averages, so that the untrained model can be evaluated, too.
    torch.optim.swa_utils.update_bn([x], encoder)


def make_optimizers(model, cfg):
    """One Adam for all parameters that have a gradient; codes that are moving averages have none.
    The trained weights are the final ones (D9)."""
    return {"autoencoder": torch.optim.Adam(model.parameters(), cfg.lr, fused=True)}


def train_step(model, optimizers, corpus, step, cfg):
    """One update on L of Eq. (3), divided by the samples of a crop."""
    model.bottleneck.tau = max(0.5, math.exp(-cfg.tau_rate * step))  # for OneHot (U5)
    batch = get_batch(corpus, cfg, step)
    _, z_q, ids, code_loss = model.encode(batch["wave"])
    nats = model(z_q, batch["speaker"], batch["wave"]).mean()
    code_loss = code_loss * (1 / cfg.crop if cfg.bottleneck == "vq" else cfg.usage)

    # The rate is halved after 400,000, 600,000 and 800,000 of a million steps (U6).
    halvings = sum(step >= share * cfg.steps for share in (0.4, 0.6, 0.8))
    optimizer = optimizers["autoencoder"]
    for group in optimizer.param_groups:
        group["lr"] = cfg.lr * 0.5**halvings
    optimizer.zero_grad()
    (nats + code_loss).backward()
    optimizer.step()
    return {
        "nats": nats.detach(),
        "code_loss": code_loss.detach(),
        "perplexity": perplexity(ids),
    }


def perplexity(ids):
    """Integers of any shape -> exp of the entropy of their use: K if K are used alike, 1 if a
    single one is. No shape depends on a value, so a GPU need not wait."""
    ids = ids.flatten().sort().values
    count = torch.searchsorted(ids, ids, right=True) - torch.searchsorted(ids, ids)  # of each one
    return (-(count / len(ids)).log().mean()).exp()


# ---------- representation, conversion, sampling ----------
@torch.no_grad()
def represent(model, wave, cfg):
    """wave (N,) -> encoder (T', D), the latents before quantization; codes (T', D), after it; ids
    (T',), their integers, unless there is no bottleneck."""
    z, z_q, ids, _ = model.encode(wave[None])
    representations = {"encoder": z[0], "codes": z_q[0]}
    if cfg.bottleneck != "none":
        representations["ids"] = ids[0]
    return representations


@torch.no_grad()
def generate(net, c, samples_per_code, steps, temperature):
    """Draws from a WaveNet sample by sample: c (B, T', C) -> levels (B, steps). A layer needs its
    own input of d samples ago, so each keeps its last d inputs in a ring, and a new sample costs
    one pass through the layers."""
    B = len(c)
    v = net.condition(c).permute(1, 2, 0, 3).contiguous()  # (T', L, B, 2R)
    R = net.embed.embedding_dim
    rings = [c.new_zeros(dilation, B, R) for dilation in net.dilations]  # zeros before the start
    t = c.new_zeros(1, dtype=torch.long)
    y = t.new_full((B,), SILENCE)
    levels = t.new_zeros(steps, B)

    def draw():
        """One sample of each stream."""
        h = net.embed(y)  # (B, R)
        v_t = v[t // samples_per_code][0]  # (L, B, 2R)
        skips = 0
        for i, ring in enumerate(rings):
            oldest = t % len(ring)
            past = ring[oldest][0]  # h_(t-d)
            ring[oldest] = h
            skip, h = net.layer(i, past, h, v_t[i])
            skips = skips + skip
        logits = net.head(skips)  # (B, 256)

        # argmax(logits + temperature * Gumbel noise) is a draw from softmax(logits / temperature),
        # and -log of exponential noise is Gumbel noise.
        noise = torch.empty_like(logits).exponential_().clamp(min=1e-9)
        y.copy_((logits - temperature * noise.log()).argmax(-1))
        levels[t] = y
        t.add_(1)

    repeat(draw, steps, c.device)
    return levels.T


def repeat(action, times, device):
    """Calls action() so many times. On a GPU it is recorded as a CUDA graph and replayed, because
    launching the kernels of one sample takes longer than running them. So what changes from one
    call to the next must be in tensors that are changed in place, including the time."""
    if device.type != "cuda":
        for _ in range(times):
            action()
        return

    torch.cuda.synchronize()  # what was launched on the default stream is finished
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The first calls on a stream allocate memory of libraries, which cannot be recorded.
        for _ in range(3):
            action()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            action()  # recorded, not run
        for _ in range(times - 3):
            graph.replay()
    torch.cuda.synchronize()


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,), each with the index of a training speaker -> waves (N,) of the same codes in that
    voice. None as a target reconstructs: the speaker is the one who fits the source best."""
    conditions = []
    for wave, target in zip(sources, targets):
        _, z_q, _, _ = model.encode(wave[None])
        if target is None:
            speaker = likeliest_speaker(model, wave, cfg)
        else:
            speaker = torch.tensor([target], device=wave.device)
        conditions.append(model.condition(z_q, speaker)[0])  # (T', C)

    # All are sampled together; the shorter ones go on to the length of the longest.
    c = nn.utils.rnn.pad_sequence(conditions, batch_first=True)  # (B, T', C)
    steps = max(len(wave) for wave in sources)
    levels = generate(model.decoder, c, model.samples_per_code, steps, cfg.temperature)
    return [row[: len(wave)] for row, wave in zip(inverse_mu_law(levels), sources)]


def likeliest_speaker(model, wave, cfg):
    """wave (N,) -> (1,): the training speaker with the least nats on a crop from the middle. All of
    them are one batch; with thousands, a smaller --crop saves memory."""
    first = max(0, len(wave) - cfg.crop) // 2
    crop = wave[first : first + cfg.crop]
    crop = F.pad(crop, (0, -len(crop) % model.samples_per_code))[None]
    _, z_q, _, _ = model.encode(crop)
    speakers = torch.arange(model.n_speakers, device=wave.device)
    z_q = z_q.expand(model.n_speakers, -1, -1)
    return model(z_q, speakers, crop.expand(model.n_speakers, -1)).argmin()[None]


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Returns the nats per sample of held-out crops with their own codes and speaker, with the
    codes of another crop, and with another speaker: how much the decoder relies on each."""
    nats = defaultdict(float)
    utterances = corpus.held[:500]
    for some in np.array_split(utterances, ceil(len(utterances) / cfg.batch_size)):
        batch = get_batch(corpus, cfg, 0, draw=1000, utterances=some)
        wave, speaker = batch["wave"], batch["speaker"]
        _, z_q, _, _ = model.encode(wave)
        cases = {
            "true": (z_q, speaker),
            "shuffled": (z_q.roll(1, 0), speaker),
            "wrong_speaker": (z_q, (speaker + 1) % model.n_speakers),
        }
        for name, (codes, voice) in cases.items():
            nats[name] += model(codes, voice, wave).sum().item() / len(utterances)
    return {"nats": nats}


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
    optimize(model, optimizers, corpus, cfg, out, first)

    if RANK == 0:
        write_examples(model.eval(), corpus, cfg, out / "samples")
        metrics = sample(model, corpus, cfg, out / "samples")
        run = dict(run, seconds=time.time() - began, metrics=metrics)
        (out / "run.json").write_text(json.dumps(run, indent=1))
        print(json.dumps(metrics, indent=1))
        print(f"measure, see and hear it: python tests/compare.py {out}")
    if WORLD_SIZE > 1:
        dist.barrier()  # all wait for rank 0, which samples
        dist.destroy_process_group()


def write_examples(model, corpus, cfg, out):
    """Writes the first 3 s of an utterance of four test speakers: as it is, reconstructed, and, if
    the method converts, in the voice of the next speaker."""
    test = corpus.test
    _, first = np.unique(test.speaker[test.held], return_index=True)
    utterances = test.held[first[:4]]
    speakers = test.speaker[utterances]
    sources = [test.wave(u)[: 3 * cfg.sample_rate].to(cfg.device) for u in utterances]
    targets = []
    if TARGET == "recording":
        targets = sources[1:] + sources[:1]
    elif TARGET == "speaker":
        targets = [(s + 1) % len(corpus.speakers) for s in speakers]

    # In one call, because the WaveNet takes hardly longer for eight waves than for one.
    given = sources + sources[: len(targets)]
    made = convert(model, given, [None] * len(sources) + targets, cfg)
    for i, wave in enumerate(sources + made):
        kind = ("source", "reconstruction", "conversion")[i // len(sources)]
        speaker = test.speakers[speakers[i % len(sources)]]
        write_audio(out / f"{speaker[:60]}_{kind}.wav", wave, cfg.sample_rate)


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
    target = flags.target or None
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
