# SPDX-License-Identifier: MIT
"""FHVAE: a VAE with two priors, which separate what an utterance keeps from what changes in it.

Paper    Hsu, Zhang, Glass. Unsupervised Learning of Disentangled and Interpretable Representations
         from Sequential Data. NeurIPS 2017, arXiv:1709.07902.
         Hsu, Glass. Scalable Factorized Hierarchical Variational Autoencoder Training.
         Interspeech 2018, arXiv:1804.03201.
         Layer sizes, alpha and optimizer follow the authors' 2018 program. The text of the papers
         was not at hand: what is said of them is from the abstracts, slides and programs.

Idea     An utterance is cut into segments of 20 frames, and a VAE gives each segment two latent
         variables. The prior of z1 is the same for all segments. The prior of z2 is narrow and
         centered on mu2, a vector that all segments of one utterance share. It is costly to move
         z2 away from mu2, so z2 holds speaker and channel, and the changing content goes to z1. A
         discriminative term keeps the mu2 of different utterances apart: z2 must identify its
         utterance. No speaker labels are used. (The 2017 program swaps the names z1 and z2.)

Model    wave (B, N) -> log magnitude spectrum, standardized per bin      x     (B, T, F)
         LSTM over x:       q(z2|x) = N(m2, exp(l2))                      z2    (B, d2)
         LSTM over x, z2:   q(z1|x,z2) = N(m1, exp(l1))                   z1    (B, d1)
         LSTM that gets z1, z2 in every frame: p(x|z1,z2) = N(x_mu, exp(x_lv))
         priors: z1 ~ N(0, 1), z2 ~ N(mu2, 0.25), mu2 ~ N(0, 1); 0.25 is a variance
         s-vector of any utterance: mu2 = (sum of m2 over its S segments) / (S + 0.25)
         conversion: decode z1 and z2 + mu2(target) - mu2(source)

Loss     bound = log p(x|z1,z2) - KL(q(z1|x,z2) || p(z1)) - KL(q(z2|x) || p(z2|mu2))
                 + log p(mu2) / S
         log q(y|m2) = log softmax over j of -|m2 - mu2_j|^2 / (2 * 0.25), at the utterance's row y
         loss = -(bound + alpha log q(y|m2)), averaged over the batch
         The terms are sums over frames, bins and dimensions. The mu2_j are the rows of a table and
         are trained with the networks. Hierarchical sampling (2018) uses the table for K utterances
         at a time; its five steps are listed above `draw_pass`.

Symbols  m2, l2      model.z2_encoder  (B, d2)       mu2_j    model.table   (K, d2)
         m1, l1      model.z1_encoder  (B, d1)       S        n_segments    (B,), N in the papers
         x_mu, x_lv  model.decoder     (B, T, F)     alpha    cfg.alpha     10
         B segments in a batch, N samples, T frames in a segment, L in an utterance, F bins, H units
         in a layer, d1 and d2 sizes of z1 and z2, K utterances in the table, S segments in each

Differs from the paper
D1  The log variance of x is at least -6. In the authors' programs it is unbounded, so that digital
    silence can drive the likelihood to infinity.
D2  x has 201 linear bins of a Hann window. Magnitudes are at least 1e-5, deviations at least 0.01.
    The default of the 2018 program is 80 mel bands of a Hamming window, without a floor for
    deviations. Its pre-emphasis is left out, because standardization all but undoes it.
D3  Training segments are cut from the waveform with a margin, so that no frame sees an edge, and
    short utterances are repeated. The authors cut the spectrogram and discard short utterances.
D4  The model of the last step is kept. The authors keep the one with the best bound on a
    development set and stop when it no longer rises.
D5  `represent` and `convert` use the means of z1 and z2. The 2017 program samples both.
D6  The waveform comes from 60 iterations of Griffin-Lim with momentum. The 2017 program takes up
    to 1,000 plain ones, and the 2018 program makes no audio.
Not specified in the paper
U1  How the LSTMs are initialized: here Xavier weights, biases 0, and 1 for the forget gates.
U2  What mu1 is: here the formula of mu2 applied to z1, as in the 2017 program.
U3  Whether the discriminative term takes z2 or its mean: here the mean m2, as in both programs.

Usage    python fhvae.py                             toy corpus, two minutes on two CPU cores
         python fhvae.py --data DIR --test DIR2      any folder of audio, full size, for a GPU
         python fhvae.py convert --checkpoint RUN --source a.wav --target b.wav --output c.wav
         All runs in float32 (`train_step` says why). --alpha 0 omits the discriminative term.
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
    n_fft: int = 400  # points of the Fourier transform
    win: int = 400  # samples in an analysis window
    hop: int = 160  # samples between frames
    n_mels: int = 80  # mel bands
    crop: int = 3680  # samples in a training example
    batch_size: int = 256  # training examples in a batch, on each GPU
    steps: int = 500_000  # training steps
    lr: float = 1e-3  # learning rate of Adam
    seed: int = 0  # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True  # bfloat16 autocast on CUDA
    log_every: int = 100  # steps between log lines
    save_every: int = 5000  # steps between checkpoints

    alpha: float = 10.0  # weight of the discriminative term
    sequences: int = 2000  # K, utterances in the table at a time
    hidden: int = 256  # units in each LSTM layer
    layers: int = 2  # layers of each LSTM
    d_z1: int = 32  # size of z1
    d_z2: int = 32  # size of z2 and of mu2
    shift: int = 8  # frames between segments where they are counted, and in `represent`

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
        if segment_frames(self) < 1:
            raise UserError(f"--crop {self.crop}: no frame has its whole window in it; raise it")


# The same model, narrower, at 8 kHz, for two and a half minutes on two CPU cores.
TOY = dict(
    sample_rate=8000,
    n_fft=200,
    win=200,
    hop=80,
    n_mels=40,
    crop=1840,
    batch_size=64,
    steps=3200,
    save_every=500,
    sequences=256,
    hidden=128,
    layers=1,
    d_z1=24,
)
TARGET = "recording"  # kind of target that convert takes: any recording of the speaker
VARIANCE = 0.25  # of the prior of z2 around mu2; those of z1 and mu2 have a variance of 1


# ---------- model ----------
class Encoder(nn.Module):
    """x (B, T, F) -> mean and log variance (B, D) of a latent variable. The encoder of z1 also gets
    z2 (B, d2), which is appended to every frame."""

    def __init__(self, cfg, size, d_latent):
        super().__init__()
        self.lstm = initialize(nn.LSTM(size, cfg.hidden, cfg.layers, batch_first=True))
        self.mu = initialize(nn.Linear(cfg.layers * cfg.hidden, d_latent))
        self.log_var = initialize(nn.Linear(cfg.layers * cfg.hidden, d_latent))

    def forward(self, x, z2=None):
        if z2 is not None:
            z2 = z2[:, None].expand(-1, x.shape[1], -1)  # (B, T, d2)
            x = torch.cat([x, z2], -1)
        _, (h, _) = self.lstm(x)  # h after the last frame: (layers, B, H)
        h = h.transpose(0, 1).flatten(1)  # (B, layers * H): all layers of a segment side by side
        return self.mu(h), self.log_var(h)


class Decoder(nn.Module):
    """z1 (B, d1), z2 (B, d2) -> mean and log variance of x, (B, T, F) each. The LSTM gets the same
    input in every frame, and none of its output is fed back."""

    def __init__(self, cfg, bins):
        super().__init__()
        d_latents = cfg.d_z1 + cfg.d_z2
        self.lstm = initialize(nn.LSTM(d_latents, cfg.hidden, cfg.layers, batch_first=True))
        self.mu = initialize(nn.Linear(cfg.hidden, bins))
        self.log_var = initialize(nn.Linear(cfg.hidden, bins))

    def forward(self, z1, z2, frames):
        z = torch.cat([z1, z2], -1)
        h, _ = self.lstm(z[:, None].expand(-1, frames, -1))  # (B, T, H)
        return self.mu(h), self.log_var(h).clamp(min=-6)  # D1


def initialize(net):
    """U1: Xavier weights, biases 0, and 1 for the forget gates of an LSTM. Returns the network."""
    for name, p in net.named_parameters():
        if p.dim() == 2:
            nn.init.xavier_uniform_(p)
        else:
            nn.init.zeros_(p)
        if "bias_ih" in name:
            _, forget_gate, _, _ = p.data.chunk(4)
            forget_gate.fill_(1)
    return net


class Model(nn.Module):
    """The two encoders, the decoder, the table of mu2, and the mean and deviation of each bin.
    n_speakers is not used: the method needs no labels."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        bins = cfg.n_fft // 2 + 1
        self.cfg = cfg
        self.register_buffer("mean", torch.zeros(bins))
        self.register_buffer("std", torch.ones(bins))
        # The number of the current pass of hierarchical sampling, and the step at which it began.
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))
        self.z2_encoder = Encoder(cfg, bins, cfg.d_z2)
        self.z1_encoder = Encoder(cfg, bins + cfg.d_z2, cfg.d_z1)
        self.decoder = Decoder(cfg, bins)
        self.table = nn.Parameter(torch.randn(cfg.sequences, cfg.d_z2))  # mu2_j

    def features(self, wave):
        """wave (B, N) -> x (B, L, F), L = 1 + N // hop: log magnitudes, standardized per bin."""
        return (log_magnitude(wave, self.cfg) - self.mean) / self.std

    def cut(self, x, starts):
        """x (L, F) -> its segments (n, T, F) that begin at the frames `starts` (n,). An x shorter
        than a segment is repeated (D3)."""
        offsets = torch.arange(segment_frames(self.cfg), device=x.device)
        return x[(starts[:, None] + offsets) % len(x)]

    def encode(self, x):
        """Segments (n, T, F) -> means of z1 (n, d1) and z2 (n, d2). z1 is conditioned on the mean
        of z2 (D5)."""
        z2, _ = self.z2_encoder(x)
        z1, _ = self.z1_encoder(x, z2)
        return z1, z2

    def tile(self, x):
        """x (L, F) -> its S segments without overlap (S, T, F). Frames at the end that fill no
        segment are left out."""
        T = segment_frames(self.cfg)
        return self.cut(x, torch.arange(0, max(len(x) - T, 0) + 1, T, device=x.device))

    def summary(self, x):
        """x (L, F) -> mu1 (d1,) (U2) and mu2 (d2,), the s-vector."""
        z1, z2 = self.encode(self.tile(x))
        return closed_form(z1.sum(0), len(z1)), closed_form(z2.sum(0), len(z2))

    def rebuild(self, x, shift=0):
        """x (L, F) -> x_mu (L, F), decoded from z1 and z2 + shift, with shift (d2,). A segment
        begins at every frame. All frames of the first one are kept, and the last frame of every
        other."""
        T = segment_frames(self.cfg)
        frames = []
        for starts in torch.arange(max(len(x) - T, 0) + 1, device=x.device).split(2048):
            z1, z2 = self.encode(self.cut(x, starts))
            x_mu, _ = self.decoder(z1, z2 + shift, T)  # (n, T, F)
            if not frames:
                frames.append(x_mu[0, :-1])
            frames.append(x_mu[:, -1])
        return torch.cat(frames)[: len(x)]

    def vocode(self, x, samples):
        """x (B, L, F) -> wave (B, samples): approximately inverts `features`, with phases from
        Griffin-Lim (D6)."""
        # L frames make hop * (L - 1) samples, so one more frame is needed.
        x = torch.cat([x, x[:, -1:]], 1)
        return griffin_lim((x * self.std + self.mean).exp(), self.cfg)[:, :samples]


def segment_frames(cfg):
    """T, the frames of a crop whose window lies inside the crop (D3): 20 of 3,680 samples."""
    return 1 + cfg.crop // cfg.hop - 2 * ceil(cfg.win / 2 / cfg.hop)


def log_magnitude(wave, cfg):
    """(B, N) -> (B, L, F): natural log of the linear spectrum, of max(magnitude, 1e-5) (D2)."""
    return stft(wave, cfg).abs().clamp(min=1e-5).log()


# ---------- loss and training step ----------
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Sets mean and deviation of every bin from at most 5,000 training utterances, and begins the
    first pass."""
    frames, total, squares = 0, 0, 0
    for u in corpus.train[:5000]:
        x = log_magnitude(corpus.wave(u)[None].to(cfg.device), cfg)[0].double()  # (L, F)
        frames += len(x)
        total += x.sum(0)
        squares += x.square().sum(0)

    mean = total / frames
    variance = squares / frames - mean.square()
    model.mean.copy_(mean)
    model.std.copy_(variance.clamp(min=0.01**2).sqrt())  # D2
    begin_pass(model, corpus, cfg, number=0, step=0)


def make_optimizers(model, cfg):
    """One Adam for the networks and the table, with the authors' betas."""
    adam = torch.optim.Adam(model.parameters(), cfg.lr, betas=(0.95, 0.999), fused=True)
    return {"autoencoder": adam}


def log_normal(x, mu, log_var):
    """log N(x; mu, exp(log_var)), for each element."""
    return -0.5 * (math.log(2 * math.pi) + log_var + (x - mu).square() / log_var.exp())


def kl_to_normal(mu, log_var, prior_mean, variance):
    """KL(N(mu, exp(log_var)) || N(prior_mean, variance)) in nats, for each element."""
    ratio = ((mu - prior_mean).square() + log_var.exp()) / variance
    return 0.5 * (ratio - 1 + math.log(variance) - log_var)


def log_posterior(m2, table):
    """m2 (B, d2), table (K, d2) -> (B, K): log q(y|m2), the log softmax over the rows of
    -|m2 - mu2_j|^2 / (2 * 0.25)."""
    # |m2|^2 is the same for all rows and cancels, which leaves a matrix product.
    scores = m2 @ table.T - table.square().sum(1) / 2
    return (scores / VARIANCE).log_softmax(-1)


def closed_form(total, n_segments):
    """Sum of z2 over the segments of an utterance -> the mu2 that maximizes the sum of
    log N(z2; mu2, 0.25) plus log N(mu2; 0, 1). For z1 it only defines mu1 (U2)."""
    return total / (n_segments + VARIANCE)


def objective(model, x, y, n_segments, table):
    """Segments x (B, T, F), their rows y (B,) in table (K, d2), and S, the number of segments in
    the utterance of each, n_segments (B,) -> the terms of the loss, (B,) each, in nats."""
    m2, l2 = model.z2_encoder(x)
    z2 = m2 + (l2 / 2).exp() * torch.randn_like(m2)
    m1, l1 = model.z1_encoder(x, z2)  # conditioned on the sample of z2
    z1 = m1 + (l1 / 2).exp() * torch.randn_like(m1)
    x_mu, x_lv = model.decoder(z1, z2, x.shape[1])
    mu2 = table[y]

    log_px = log_normal(x, x_mu, x_lv).sum((1, 2))
    kl_z1 = kl_to_normal(m1, l1, 0, 1).sum(1)
    kl_z2 = kl_to_normal(m2, l2, mu2, VARIANCE).sum(1)
    log_pmu2 = log_normal(mu2, 0, torch.zeros_like(mu2)).sum(1)
    log_qy = log_posterior(m2, table).gather(1, y[:, None])[:, 0]  # U3: of the mean m2, not of z2
    return {
        "bound": log_px - kl_z1 - kl_z2 + log_pmu2 / n_segments,
        "log_px": log_px,
        "kl_z1": kl_z1,
        "kl_z2": kl_z2,
        "log_pmu2": log_pmu2,
        "log_qy": log_qy,
    }


# Hierarchical sampling (Hsu & Glass 2018). Training is a series of passes, and in each of them:
#
# 1. Draw K training utterances. Utterance j owns row j of the table during this pass.
# 2. Draw S_j random segments of each utterance j and encode them, without gradients, to their m2.
# 3. Set row j to the closed form of mu2, the sum of these m2 over S_j + 0.25. The moments of Adam
#    are kept, as in the authors' program.
# 4. List row j as often as utterance j has segments, shuffle the list and cut it into batches. What
#    fills no batch is dropped.
# 5. For each batch of rows, draw a new random segment of each row's utterance, and take one Adam
#    step on the loss, for the networks and the table. The softmax of the discriminative term runs
#    over the K rows, and the label y of a segment is its row.
#
# S_j = 1 + (L_j - T) // shift, at least 1. If K is at least the number of training utterances,
# steps 2 and 3 are left out. Each utterance then keeps its row, which starts at random: the
# training of 2017.
@functools.lru_cache(maxsize=1)
def draw_pass(corpus, cfg, number):
    """Steps 1 and 4 of pass `number` -> utterances (K,), one for each row; n_segments (K,); and
    order, where each row occurs as often as it has segments, shuffled."""
    rng = np.random.default_rng((cfg.seed, number, 2**31))  # no stream of get_batch
    utterances = corpus.train
    if cfg.sequences < len(corpus.train):
        utterances = rng.choice(corpus.train, cfg.sequences, replace=False)
    frames = 1 + corpus.length[utterances] // cfg.hop
    n_segments = 1 + (frames - segment_frames(cfg)).clip(0) // cfg.shift
    rows = np.repeat(np.arange(len(utterances)), n_segments)
    return utterances, n_segments, rng.permutation(rows)


def segments(model, corpus, cfg, step, draw, utterances):
    """-> x (n, T, F): a segment from a random place of each of n utterances, without the frames
    whose window reaches beyond the crop (D3)."""
    T = segment_frames(cfg)
    x = model.features(get_batch(corpus, cfg, step, draw, utterances)["wave"])
    margin = (x.shape[1] - T) // 2
    return x[:, margin : margin + T]


@torch.no_grad()
def begin_pass(model, corpus, cfg, number, step):
    """Steps 2 and 3: fills the table for pass `number`, which begins at this training step."""
    model.progress.copy_(torch.tensor([number, step]))
    if cfg.sequences >= len(corpus.train):
        return

    utterances, n_segments, _ = draw_pass(corpus, cfg, number)
    rows = np.repeat(np.arange(len(utterances)), n_segments)
    total = torch.zeros_like(model.table)
    for i in range(0, len(rows), 2048):
        y = rows[i : i + 2048]
        # Draw 0 is reserved for the training batch.
        x = segments(model, corpus, cfg, step, 1 + i, utterances[y])
        m2, _ = model.z2_encoder(x)
        total.index_add_(0, torch.tensor(y, device=cfg.device), m2)
    n_segments = torch.tensor(n_segments, device=cfg.device)
    model.table.copy_(closed_form(total, n_segments[:, None]))

    if dist.is_initialized():  # every GPU has drawn its own segments: take the average
        dist.all_reduce(model.table.div_(WORLD_SIZE))


def next_batch(model, corpus, cfg, step):
    """-> segments x (B, T, F), their rows y (B,), n_segments (B,). Begins a new pass when the
    current one has no full batch left."""
    size = WORLD_SIZE * cfg.batch_size
    number, first_step = model.progress.tolist()
    utterances, n_segments, order = draw_pass(corpus, cfg, number)
    if (step - first_step + 1) * size > len(order):
        number += 1
        first_step = step
        begin_pass(model, corpus, cfg, number, first_step)
        utterances, n_segments, order = draw_pass(corpus, cfg, number)
    if size > len(order):
        advice = "lower --batch-size or raise --sequences"
        raise UserError(f"{len(order)} segments fill no batch; {advice}")

    begin = (step - first_step) * size + RANK * cfg.batch_size
    rows = order[begin : begin + cfg.batch_size]
    x = segments(model, corpus, cfg, step, 0, utterances[rows])
    y = torch.tensor(rows, device=cfg.device)
    return x, y, torch.tensor(n_segments[rows], device=cfg.device)


# Nothing runs in bfloat16: spectra, LSTMs and losses are float32, and --bf16 has no effect. The
# LSTMs are nearly all of the work, and under autocast PyTorch runs those of cuDNN in float16, also
# where bfloat16 is asked for; their gradients would underflow. The losses, sums over thousands of
# elements, need float32 anyway.
@torch.autocast("cuda", enabled=False)
def train_step(model, optimizers, corpus, step, cfg):
    """Step 5: one update of the networks and the table. The model of the last step is kept (D4)."""
    x, y, n_segments = next_batch(model, corpus, cfg, step)
    table = model.table[: len(corpus.train)]  # K may exceed the number of utterances
    terms = objective(model, x, y, n_segments, table)
    loss = -(terms["bound"] + cfg.alpha * terms["log_qy"]).mean()

    optimizer = optimizers["autoencoder"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    means = {name: term.detach().mean() for name, term in terms.items()}
    return {"loss": loss.detach(), **means}


# ---------- representation, conversion, sampling ----------
@torch.no_grad()
def represent(model, wave, cfg):
    """wave (N,) -> z1 (ceil(L / shift), d1) and z2 (ceil(L / shift), d2), the means of evenly
    spread segments; mu1 (d1,) and mu2 (d2,), the s-vector."""
    T = segment_frames(cfg)
    x = model.features(wave[None])[0]  # (L, F)
    n = ceil(len(x) / cfg.shift)
    middles = ((torch.arange(n, device=x.device) + 0.5) * len(x) / n).long()
    # Near the ends, where a segment does not fit, the first or the last one is taken.
    starts = (middles - (T - 1) // 2).clamp(0, max(len(x) - T, 0))
    z1, z2 = model.encode(model.cut(x, starts))
    mu1, mu2 = model.summary(x)
    return {"z1": z1, "z2": z2, "mu1": mu1, "mu2": mu2}


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,), each with a recording (N',) of its target speaker -> waves (N,) that say the same
    in the voice of the target. z1 is kept, and z2 of every segment moves by
    mu2(target) - mu2(source). None as a target reconstructs the source."""
    waves = []
    for source, target in zip(sources, targets):
        x = model.features(source[None])[0]
        shift = 0
        if target is not None:
            _, mu2 = model.summary(x)
            _, mu2_of_target = model.summary(model.features(target[None])[0])
            shift = mu2_of_target - mu2
        waves.append(model.vocode(model.rebuild(x, shift)[None], len(source))[0])
    return waves


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes speech from the prior and a denoised utterance. Returns the bound in nats,
    averaged over the segments of at most 200 test utterances, with mu2 by the closed form."""
    torch.manual_seed(0)
    write_prior(model, cfg, out)
    write_denoised(model, corpus.test, cfg, out)

    bounds = []
    for u in corpus.test.held[:200]:
        x = model.features(corpus.test.wave(u)[None].to(cfg.device))[0]
        _, mu2 = model.summary(x)
        x = model.tile(x)
        y = torch.zeros(len(x), dtype=torch.long, device=cfg.device)
        bounds.append(objective(model, x, y, len(x), table=mu2[None])["bound"])
    return {"bound": torch.cat(bounds).mean().item()}


def write_prior(model, cfg, out):
    """Writes three utterances from the prior: ten segments each, which share one mu2."""
    T = segment_frames(cfg)
    for i in range(3):
        mu2 = torch.randn(cfg.d_z2, device=cfg.device)
        z2 = mu2 + VARIANCE**0.5 * torch.randn(10, cfg.d_z2, device=cfg.device)
        z1 = torch.randn(10, cfg.d_z1, device=cfg.device)
        x_mu, _ = model.decoder(z1, z2, T)  # (10, T, F)
        wave = model.vocode(x_mu.flatten(0, 1)[None], 10 * T * cfg.hop)[0]
        write_audio(out / f"prior_{i}.wav", wave, cfg.sample_rate)


def write_denoised(model, pool, cfg, out):
    """Writes a test utterance, the same with white noise 10 dB below it, and the noisy one
    converted to a clean recording of the same speaker."""
    u = pool.held[0]
    recordings = pool.held[pool.speaker[pool.held] == pool.speaker[u]]
    target = pool.wave(recordings[-1]).to(cfg.device)  # u itself if there is no other

    clean = pool.wave(u).to(cfg.device)
    noisy = clean + torch.randn_like(clean) * clean.std() * 10 ** (-10 / 20)
    (denoised,) = convert(model, [noisy], [target], cfg)
    for name, wave in {"clean": clean, "noisy": noisy, "denoised": denoised}.items():
        write_audio(out / f"noise_{name}.wav", wave, cfg.sample_rate)


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
