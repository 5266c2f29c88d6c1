# SPDX-License-Identifier: MIT
"""Factorized hierarchical VAE: what changes from segment to segment and what stays, told apart by priors.

Hsu, Zhang, Glass, "Unsupervised Learning of Disentangled and Interpretable Representations from Sequential
Data", NeurIPS 2017, arXiv:1709.07902; Hsu, Glass, "Scalable Factorized Hierarchical Variational Autoencoder
Training", Interspeech 2018, arXiv:1804.03201.

The idea. An utterance is cut into segments of 20 frames, and a variational auto-encoder gives each two
latents. z1 has one prior for all segments. The prior of z2 is narrow and stands about mu2, a vector that
the segments of ONE utterance share: what stays the same costs little there, so speaker and channel go to
z2, the rest to z1. Lest all utterances share one mu2, z2 has to tell, besides, which utterance it is from.
No speaker label is used. mu2, the "s-vector", has a closed form for an utterance never seen; to convert, z2
is moved from one mu2 to another. (Beware: z1 is the SEGMENT, z2 the SEQUENCE; the earlier code swaps them.)

    wave (B, N) -> log magnitude of the linear spectrum, each bin standardised: x (B, T = 20, F)
    x     -> LSTM -> mean m2, log variance l2 (B, d2);  z2 = m2 + exp(l2 / 2) * noise
    x, z2 -> LSTM -> mean m1, log variance l1 (B, d1);  z1 = m1 + exp(l1 / 2) * noise
    z1, z2, the same at every step -> LSTM -> mean and log variance of x (B, T, F)

    priors     mu2 ~ N(0, 1), one of each sequence;  z2 ~ N(mu2, 0.25);  z1 ~ N(0, 1);  0.25 is a variance
    bound      = ln p(x | z1, z2) - KL(q(z1 | x, z2) || p(z1)) - KL(q(z2 | x) || p(z2 | mu2)) + ln p(mu2) / N
    ln q(y|m2) = log softmax over the table's rows j of -|m2 - mu2_j|^2 / (2 * 0.25), at the segment's row y
    minimised  = -(bound + alpha ln q(y|m2)), mean over the batch; terms: sums over frames, bins, dimensions
    mu2 of any sequence = sum of m2 over its N segments / (N + 0.25)
    N          in training 1 + (L - 20) // 8 segments, at random; of a whole recording, those end to end
    conversion z2 + mu2(target) - mu2(source), z1 as it is; a segment from every frame on gives its last frame

Hierarchical sampling (2018), for more utterances than a table can hold. A pass: draw K utterances; fill the
table with their closed forms, from random segments; train, the table too, on as many fresh ones, each with
its row for a label. With K (--sequences) of at least the number of utterances it is, in essence, the
training of 2017: one row each, random at first, learned throughout.

    symbol        here                    shape        symbol       here            shape or value
    q(z2 | x)     model.z2_encoder        (B, d2)      M            model.table     (K, d2)
    q(z1 | x,z2)  model.z1_encoder        (B, d1)      N            counts, n       (K,), (B,)
    p(x | z1,z2)  model.decoder           (B, T, F)    alpha        cfg.alpha       10
    B segments, T frames of each, L frames of an utterance, F bins, d1 and d2 sizes of z1 and z2, K rows;
    N is the number of segments of a sequence, but in a wave (B, N) that of samples

Differs from the papers, of which we had the abstracts, slides and what their two published programs do, not
the text; sizes, weights and schedule are those of the later program, K of its TIMIT example.
D1  Log variance of x at least -6. There: unbounded, so that in digital silence the likelihood is, too.
D2  201 linear bins (there an option beside 80 mel bands), Hann window, magnitude at least 1e-5, deviation of
    a bin at least 0.01, no pre-emphasis: standardising all but undoes it. There: Hamming, e^-50, none, 0.97.
D3  Segments of training are cut from the waveform, with a margin, so that no frame sees an edge (in whole
    utterances the first and last do); an utterance shorter than that crop is repeated. There: from the
    spectrogram; utterances shorter than a segment are discarded.
D4  The last of --steps steps is kept. There: the best, at most 500,000, until the bound on a development
    set has not risen for ten times 5000.
D5  `represent` gives z1 at the MEAN of z2, conversion uses the means of both. The earlier program samples.
D6  Griffin-Lim with momentum, 60 rounds. There: up to 1000 plain ones; the later program makes no audio.
The papers do not say, or not to us
U1  How the LSTMs start: here Xavier, biases 0, forget gates 1.
U2  mu1, "the s-vector of z1": the same formula, as in the earlier program, though z1 has no such prior.

The log shows the bound and its terms in nats a segment (log_pmu2 is not yet divided by N), and log_qy, of
which minus ln of the rows in use is chance. A model that knows nothing has a log_px of -5704 (20 frames of
201 bins, a unit Gaussian; toy, 101 bins: -2866). In run.json metrics.log_spectral_distance is in dB
to the clean utterance: with white noise at 10 dB, rebuilt, and denoised by converting to a clean recording.
The claim of 2017: mu2 tells unseen speakers apart far better than mu1, and better with a larger alpha.

    python fhvae.py                                     a toy corpus, two and a half minutes on two CPU cores
    python fhvae.py --data DIR --test DIR2              any folder of audio, the authors' size, for a GPU
    python fhvae.py convert --checkpoint runs/a --source a.wav --target b.wav --output c.wav
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

    alpha: float = 10.0  # weight of the discriminative term; 0: the control of the paper's claim
    sequences: int = 2000  # K, utterances in the table at a time; as many as there are: all, always
    hidden: int = 256  # of each LSTM
    layers: int = 2  # of each LSTM
    d_z1: int = 32  # size of z1
    d_z2: int = 32  # size of z2 and of mu2
    shift: int = 8  # frames from segment to segment where they are counted, and in `represent`

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
        if segment_frames(self) < 1:
            raise UserError(f"--crop {self.crop}: no frame has its whole window in it; raise it")


# The same model, narrower, at 8 kHz, for two CPU cores and two and a half minutes; by trial, on seed 0.
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
TARGET = "recording"  # what convert takes: any recording of the target speaker
VARIANCE = 0.25  # of z2 about mu2; z1 and mu2 have variance 1


# ==================== the model ====================
class Encoder(nn.Module):
    """x (B, T, F), and for z1 a vector beside every frame, z (B, D) -> mean and log variance (B, D') of the
    latent, from what an LSTM holds in ALL its layers after the last frame."""

    def __init__(self, cfg, size, d):
        super().__init__()
        self.lstm = xavier(nn.LSTM(size, cfg.hidden, cfg.layers, batch_first=True))
        self.mu, self.log_var = (xavier(nn.Linear(cfg.layers * cfg.hidden, d)) for _ in range(2))

    def forward(self, x, z=None):
        if z is not None:
            x = torch.cat([x, z[:, None].expand(-1, x.shape[1], -1)], -1)
        h = self.lstm(x)[1][0]  # (layers, B, H)
        h = h.transpose(0, 1).flatten(1)  # (B, layers H): of one item, hence the transpose
        return self.mu(h), self.log_var(h)


class Decoder(nn.Module):
    """z1 (B, d1), z2 (B, d2) -> mean and log variance (B, T, F) of x. Every step of the LSTM gets the same
    input, both latents; nothing of its output is fed back."""

    def __init__(self, cfg, bins):
        super().__init__()
        self.lstm = xavier(nn.LSTM(cfg.d_z1 + cfg.d_z2, cfg.hidden, cfg.layers, batch_first=True))
        self.mu, self.log_var = (xavier(nn.Linear(cfg.hidden, bins)) for _ in range(2))

    def forward(self, z1, z2, frames):
        h = self.lstm(torch.cat([z1, z2], -1)[:, None].expand(-1, frames, -1))[0]  # (B, T, H)
        return self.mu(h), self.log_var(h).clamp(min=-6)  # D1


class Model(nn.Module):
    """Two encoders, the decoder, the table of mu2, mean and deviation of each bin; `progress` is the number
    of the pass and the step at which it began. The number of speakers is of no use here."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg, bins = cfg, cfg.n_fft // 2 + 1
        self.register_buffer("mean", torch.zeros(bins))
        self.register_buffer("std", torch.ones(bins))
        self.register_buffer("progress", torch.zeros(2, dtype=torch.int64))
        self.z2_encoder = Encoder(cfg, bins, cfg.d_z2)
        self.z1_encoder = Encoder(cfg, bins + cfg.d_z2, cfg.d_z1)
        self.decoder = Decoder(cfg, bins)
        self.table = nn.Parameter(torch.randn(cfg.sequences, cfg.d_z2))

    def features(self, wave):
        """(B, N) -> x (B, L, F), L = 1 + N // hop: the log spectrum, standardised."""
        return (log_magnitude(wave, self.cfg) - self.mean) / self.std

    def cut(self, x, starts):
        """x (L, F) -> its segments (n, T, F) from the frames `starts` (n,) on. D3: a short x is repeated."""
        return x[
            (starts[:, None] + torch.arange(segment_frames(self.cfg), device=x.device)) % len(x)
        ]

    def encode(self, x):
        """Segments (n, T, F) -> means of z1 (n, d1) and z2 (n, d2). D5: z1 is given the mean of z2."""
        z2 = self.z2_encoder(x)[0]
        return self.z1_encoder(x, z2)[0], z2

    def summary(self, x):
        """x (L, F) -> mu1 (d1,), U2, and mu2 (d2,), the s-vector: closed forms over segments end to end;
        frames at the end that fill no segment are left out."""
        T = segment_frames(self.cfg)
        z1, z2 = self.encode(
            self.cut(x, torch.arange(0, max(len(x) - T, 0) + 1, T, device=x.device))
        )
        return closed_form(z1.sum(0), len(z1)), closed_form(z2.sum(0), len(z2))

    def rebuild(self, x, shift=0):
        """x (L, F) -> x^ (L, F), z2 moved by `shift` (d2,): a segment from every frame on, of which the first
        gives all its frames and every other its last."""
        T, frames = segment_frames(self.cfg), []
        for starts in torch.arange(max(len(x) - T, 0) + 1, device=x.device).split(2048):
            z1, z2 = self.encode(self.cut(x, starts))
            y = self.decoder(z1, z2 + shift, T)[0]  # (2048, T, F)
            frames += [y[:, -1]] if frames else [y[0, :-1], y[:, -1]]
        return torch.cat(frames)[: len(x)]

    def vocode(self, x, samples):
        """(B, L, F) -> (B, samples): undoes `features`, with phases by Griffin-Lim (D6)."""
        x = F.pad(x.mT, (0, 1), mode="replicate").mT  # a frame more, for N samples
        return griffin_lim((x * self.std + self.mean).exp(), self.cfg)[:, :samples]


def segment_frames(cfg):
    """T: frames of a crop whose window lies inside it (D3), 20 of 3680 samples."""
    return 1 + cfg.crop // cfg.hop - 2 * ceil(cfg.win / 2 / cfg.hop)


def log_magnitude(wave, cfg):
    """(B, N) -> (B, L, F): natural log of the linear magnitude, at least 1e-5 (D2)."""
    return stft(wave, cfg).abs().clamp(min=1e-5).log()


def xavier(net):
    """U1: Xavier, biases 0, but 1 for the forget gates of an LSTM (they come second of i, f, g, o)."""
    for name, p in net.named_parameters():
        nn.init.xavier_uniform_(p) if p.dim() == 2 else nn.init.zeros_(p)
        if name.startswith("bias_ih"):
            nn.init.ones_(p[len(p) // 4 : len(p) // 2])
    return net


# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of every bin, over 5000 utterances at most; pass 0."""
    n, total, squares = 0, 0, 0
    for u in corpus.train[:5000]:
        x = log_magnitude(corpus.wave(u)[None].to(cfg.device), cfg)[0].double()  # (L, F)
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    model.mean.copy_(total / n)
    model.std.copy_((squares / n - (total / n) ** 2).clamp(min=1e-4).sqrt())  # D2
    begin_pass(model, corpus, cfg, 0, 0)


def make_optimizers(model, cfg):
    """One for the networks and the table; both betas are the authors'."""
    return {
        "autoencoder": torch.optim.Adam(model.parameters(), cfg.lr, betas=(0.95, 0.999), fused=True)
    }


def log_normal(x, mu, log_var):
    """log N(x; mu, exp(log_var)), elementwise."""
    return -0.5 * (math.log(2 * math.pi) + log_var + (x - mu).square() / log_var.exp())


def kl(mu, log_var, p, variance):
    """KL(N(mu, exp(log_var)) || N(p, variance)), elementwise."""
    return 0.5 * (math.log(variance) - log_var - 1 + ((mu - p).square() + log_var.exp()) / variance)


def log_posterior(m2, table):
    """m2 (B, D), table (K, D) -> (B, K): ln q(y | m2), the log softmax of -|m2 - mu2|^2 / (2 * 0.25). |m2|^2
    is the same for all rows and cancels, so a matrix product does, instead of (B, K, D)."""
    return ((m2 @ table.T - table.square().sum(1) / 2) / VARIANCE).log_softmax(-1)


def closed_form(total, n):
    """The sum of z over n segments -> the maximum of sum ln N(z; mu, 0.25) + ln N(mu; 0, 1)."""
    return total / (n + VARIANCE)


def objective(model, x, y, n, table):
    """x (B, T, F), the row y (B,) of each in table (K, d2), N of its sequence n (B,) -> the terms, (B,) each,
    in nats: sums over frames, bins and dimensions. `bound` is the variational lower bound of the segment."""
    m2, l2 = model.z2_encoder(x)
    z2 = m2 + (l2 / 2).exp() * torch.randn_like(m2)
    m1, l1 = model.z1_encoder(x, z2)  # given the SAMPLE of z2
    z1 = m1 + (l1 / 2).exp() * torch.randn_like(m1)
    x_mu, x_lv = model.decoder(z1, z2, x.shape[1])
    mu2 = table[y]
    terms = {
        "log_px": log_normal(x, x_mu, x_lv).sum((1, 2)),
        "kl_z1": kl(m1, l1, 0, 1).sum(1),
        "kl_z2": kl(m2, l2, mu2, VARIANCE).sum(1),
        "log_pmu2": log_normal(mu2, 0, torch.zeros_like(mu2)).sum(1),
    }
    terms["bound"] = terms["log_px"] - terms["kl_z1"] - terms["kl_z2"] + terms["log_pmu2"] / n
    terms["log_qy"] = log_posterior(m2, table).gather(1, y[:, None])[:, 0]  # of the MEAN of z2
    return terms


@functools.lru_cache(maxsize=1)
def draw_pass(corpus, cfg, number):
    """-> sequences (K,), the utterance of each row of the table in this pass; counts (K,), N of each;
    order: every row N times, shuffled. A function of (seed, number) alone."""
    rng, U = (
        np.random.default_rng((cfg.seed, number, 2**31)),
        len(corpus.train),
    )  # not a key of get_batch
    sequences = (
        corpus.train
        if cfg.sequences >= U
        else rng.choice(corpus.train, cfg.sequences, replace=False)
    )
    frames = 1 + corpus.length[sequences] // cfg.hop
    counts = (frames - segment_frames(cfg)).clip(0) // cfg.shift + 1
    return sequences, counts, rng.permutation(np.repeat(np.arange(len(sequences)), counts))


def segments(model, corpus, cfg, step, draw=0, utterances=None):
    """x (n, T, F): a segment from a random place of each of the n utterances."""
    x, T = (
        model.features(get_batch(corpus, cfg, step, draw, utterances)["wave"]),
        segment_frames(cfg),
    )
    margin = (x.shape[1] - T) // 2
    return x[:, margin : margin + T]


@torch.no_grad()
def begin_pass(model, corpus, cfg, number, step):
    """Hierarchical sampling: each row of the table passes on to another sequence, with the closed form of its
    mu2; Adam's moments stay, as the authors'. A table with a row for every sequence is never refilled."""
    model.progress.copy_(torch.tensor([number, step]))
    sequences, counts, _ = draw_pass(corpus, cfg, number)
    if cfg.sequences < len(corpus.train):
        total, rows = torch.zeros_like(model.table), np.repeat(np.arange(len(sequences)), counts)
        for i in range(0, len(rows), 2048):  # draw 0 is train_step's
            y = rows[i : i + 2048]
            m2 = model.z2_encoder(segments(model, corpus, cfg, step, 1 + i, sequences[y]))[0]
            total.index_add_(0, torch.from_numpy(y).to(cfg.device), m2)
        model.table.copy_(closed_form(total, torch.from_numpy(counts).to(cfg.device)[:, None]))
        if dist.is_initialized():  # every GPU drew its own: the average
            dist.all_reduce(model.table.div_(WORLD_SIZE))


@torch.autocast("cuda", enabled=False)  # LSTMs and long sums in float32: --bf16 does nothing here
def train_step(model, optimizers, corpus, step, cfg):
    """One of --steps (D4) on -(bound + alpha ln q(y | m2)): the next batch of the pass, or of a new one."""
    number, first = model.progress.tolist()
    if (step - first + 1) * WORLD_SIZE * cfg.batch_size > len(draw_pass(corpus, cfg, number)[2]):
        number, first = number + 1, step
        begin_pass(model, corpus, cfg, number, first)
    sequences, counts, order = draw_pass(corpus, cfg, number)
    if WORLD_SIZE * cfg.batch_size > len(order):
        raise UserError(
            f"{len(order)} segments fill no batch; lower --batch-size or raise --sequences"
        )
    rows = order[((step - first) * WORLD_SIZE + RANK) * cfg.batch_size :][: cfg.batch_size]
    x = segments(model, corpus, cfg, step, 0, sequences[rows])
    y, n = (torch.from_numpy(v).to(cfg.device) for v in (rows, counts[rows]))
    terms = objective(model, x, y, n, model.table[: len(sequences)])
    loss = -(terms["bound"] + cfg.alpha * terms["log_qy"]).mean()
    optimizers["autoencoder"].zero_grad()
    loss.backward()
    optimizers["autoencoder"].step()
    return {"loss": loss.detach(), **{name: term.detach().mean() for name, term in terms.items()}}


# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> z1 (T', d1) and z2 (T', d2): means of T' = L / shift segments, evenly spread, the first and the
    last given again where the middle is too near an end; mu1 (d1,); mu2 (d2,), the s-vector."""
    x, T = model.features(wave[None])[0], segment_frames(cfg)
    n = ceil(len(x) / cfg.shift)  # T'
    middle = ((torch.arange(n, device=x.device) + 0.5) * len(x) / n).long()
    z1, z2 = model.encode(model.cut(x, (middle - (T - 1) // 2).clamp(0, max(len(x) - T, 0))))
    mu1, mu2 = model.summary(x)
    return {"z1": z1, "z2": z2, "mu1": mu1, "mu2": mu2}


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,), each with a recording (N',) of any speaker -> waves (N,): z1 is kept, and z2 of every
    segment moved by mu2 of the target less mu2 of the source. None reconstructs."""
    waves = []
    for wave, target in zip(sources, targets):
        x, shift = model.features(wave[None])[0], 0
        if target is not None:
            shift = model.summary(model.features(target[None])[0])[1] - model.summary(x)[1]
        waves.append(model.vocode(model.rebuild(x, shift)[None], len(wave))[0])
    return waves


def denoise(model, pool, cfg, out):
    """At most 16 test utterances with white noise 10 dB below them, converted to a clean recording, another
    of the speaker if there is; the first is written to out -> mean distance in dB of log spectra from the
    clean utterance: of the noisy one, of both as the model rebuilds them, and of the conversion."""
    us, table, generator = pool.held[:16], defaultdict(list), torch.Generator().manual_seed(0)
    for u in us:
        other = min(pool.held, key=lambda i: (i == u, pool.speaker[i] != pool.speaker[u]))
        clean, target = (pool.wave(i).to(cfg.device) for i in (u, other))
        noise = torch.randn(len(clean), generator=generator).to(cfg.device)
        noisy = clean + noise * clean.std() * 10 ** (-10 / 20)
        x, y, z = (model.features(wave[None])[0] for wave in (clean, noisy, target))
        made = {
            "noisy": y,
            "noisy_rebuilt": model.rebuild(y),
            "clean_rebuilt": model.rebuild(x),
            "denoised": model.rebuild(y, model.summary(z)[1] - model.summary(y)[1]),
        }
        for name, made_x in made.items():
            decibel = (made_x - x) * model.std * 20 / math.log(10)  # (L, F)
            table[name].append(decibel.square().mean(1).sqrt().mean().item())
        if u == us[0]:
            done = model.vocode(made["denoised"][None], len(clean))[0]
            for name, wave in {"clean": clean, "noisy": noisy, "denoised": done}.items():
                write_audio(out / f"noise_{name}.wav", wave, cfg.sample_rate)
    return {name: sum(values) / len(values) for name, values in table.items()}


def write_examples(model, corpus, cfg, out):
    """Writes the first 3 s of four held-out utterances, each as it is, reconstructed, and in the
    voice of the next speaker."""
    utterances = corpus.held[:4]
    waves = [corpus.wave(u)[: 3 * cfg.sample_rate].to(cfg.device) for u in utterances]
    voices = [(s + 1) % len(corpus.speakers) for s in corpus.speaker[utterances]]
    known = corpus.speaker[corpus.train]
    targets = [corpus.wave(corpus.train[known == s][0]).to(cfg.device) for s in voices]
    made = convert(model, waves + waves, [None] * len(waves) + targets, cfg)
    for i, u in enumerate(utterances):
        name = f"{corpus.paths[u].stem[:60]}_as_{corpus.speakers[voices[i]][:60]}"
        for kind, wave in zip(
            ("source", "reconstruction", "conversion"), (waves + made)[i :: len(waves)]
        ):
            write_audio(out / f"{name}_{kind}.wav", wave, cfg.sample_rate)


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes speech from the prior, prior_I.wav; rows of the grid, grid_I.wav: z1 of the middle segment of
    test utterance I with z2 of those of utterances 0, 1, 2, 3; and what `denoise` does. Returns what `denoise`
    says."""
    write_examples(model, corpus, cfg, out)
    T, generator, speech = segment_frames(cfg), torch.Generator().manual_seed(0), {}

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(cfg.device)

    for i in range(3):  # ten segments of one mu2
        z2 = normal(cfg.d_z2) + VARIANCE**0.5 * normal(10, cfg.d_z2)
        speech[f"prior_{i}.wav"] = model.decoder(normal(10, cfg.d_z1), z2, T)[0]
    xs = [model.features(corpus.test.wave(u)[None].to(cfg.device))[0] for u in corpus.test.held[:4]]
    middle = [model.cut(x, torch.tensor([max(len(x) - T, 0) // 2], device=x.device)) for x in xs]
    z1, z2 = model.encode(torch.cat(middle))  # (4, d1), (4, d2)
    for i in range(len(xs)):
        speech[f"grid_{i}.wav"] = model.decoder(z1[i].expand(len(xs), -1), z2, T)[0]
    for name, x in speech.items():  # (n, T, F), one after another
        wave = model.vocode(x.flatten(0, 1)[None], cfg.hop * T * len(x))[0]
        write_audio(out / name, wave, cfg.sample_rate)
    return {"log_spectral_distance": denoise(model, corpus.test, cfg, out)}


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
