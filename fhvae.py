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
D6  Cosines are of vectors centred on the test set; LDA is regularised and goes to at most 24 dimensions
    (paper: 12 and 24); the baseline is the mean log-mel, not i-vectors.
D7  Griffin-Lim with momentum, 60 rounds. There: up to 1000 plain ones; the later program makes no audio.
The papers do not say, or not to us
U1  How the LSTMs start: here Xavier, biases 0, forget gates 1.
U2  mu1, "the s-vector of z1": the same formula, as in the earlier program, though z1 has no such prior.

The log shows the bound and its terms in nats a segment (log_pmu2 is not yet divided by N), and log_qy, of
which minus ln of the rows in use is chance. A model that knows nothing has a log_px of -5704 (20 frames of
201 bins, a unit Gaussian; toy, 101 bins: -2866). In result.json metrics.eer is the paper's table for this
alpha; metrics.log_spectral_distance in dB to the clean utterance: with white noise at 10 dB, rebuilt, and
denoised by converting to a clean recording. The claim of 2017: mu2 tells unseen speakers apart far better
than mu1, and better with a larger alpha.

    python fhvae.py                                     a toy corpus, two and a half minutes on two CPU cores
    python fhvae.py --data DIR --test DIR2              any folder of audio, the authors' size, for a GPU
    python fhvae.py convert --checkpoint runs/a --source a.wav --target b.wav --output c.wav

Measured on CPU threads, not on a GPU, at TOY's size. LibriSpeech, 51 speakers never heard, one recording
each, so the channel helps: EER of mu2 5.4 % (alpha 0: 8.6; untrained 24, log-mel 26), of mu1 29 % (20);
after LDA log-mel is as good, 5.9 %. Toy, four such speakers, seeds 0, 1, 2: 21, 23, 21 % (log-mel 43); 71,
96, 67 % of conversions heard as the target, 17, 4, 4 % as the source. Negative: these are 29 and 38 % on
words, 17 and 0 on LibriSpeech; and on toy mu2 has the lower EER without the discriminative term (alpha 0:
13, 15 %), which only clears mu1 (38, 43 to 47-49 %).
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
    n_fft: int = 400             # points of the Fourier transform
    win: int = 400               # samples in an analysis window
    hop: int = 160               # samples between frames
    n_mels: int = 80             # mel bands
    crop: int = 3680             # samples in a training example
    batch_size: int = 256        # training examples in a batch, on each GPU
    steps: int = 500_000         # training steps
    lr: float = 1e-3             # learning rate of Adam
    seed: int = 0                # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True            # bfloat16 autocast on CUDA
    probe: int = 1500            # utterances at most to fit the probes on, and to score them on
    log_every: int = 100         # steps between log lines
    save_every: int = 5000       # steps between checkpoints

    alpha: float = 10.0          # weight of the discriminative term; 0: the control of the paper's claim
    sequences: int = 2000        # K, utterances in the table at a time; as many as there are: all, always
    hidden: int = 256            # of each LSTM
    layers: int = 2              # of each LSTM
    d_z1: int = 32               # size of z1
    d_z2: int = 32               # size of z2 and of mu2
    shift: int = 8               # frames from segment to segment where they are counted, and in `represent`

# The same model, narrower, at 8 kHz, for two CPU cores and two and a half minutes; by trial, on seed 0.
TOY = dict(sample_rate=8000, n_fft=200, win=200, hop=80, n_mels=40, crop=1840, batch_size=64, steps=3200,
           save_every=500, sequences=256, hidden=128, layers=1, d_z1=24)
TARGET = "recording"             # what convert takes: any recording of the target speaker
VARIANCE = 0.25                  # of z2 about mu2; z1 and mu2 have variance 1

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
        h = self.lstm(x)[1][0]                                               # (layers, B, H)
        h = h.transpose(0, 1).flatten(1)                     # (B, layers H): of one item, hence the transpose
        return self.mu(h), self.log_var(h)

class Decoder(nn.Module):
    """z1 (B, d1), z2 (B, d2) -> mean and log variance (B, T, F) of x. Every step of the LSTM gets the same
    input, both latents; nothing of its output is fed back."""
    def __init__(self, cfg, bins):
        super().__init__()
        self.lstm = xavier(nn.LSTM(cfg.d_z1 + cfg.d_z2, cfg.hidden, cfg.layers, batch_first=True))
        self.mu, self.log_var = (xavier(nn.Linear(cfg.hidden, bins)) for _ in range(2))

    def forward(self, z1, z2, frames):
        h = self.lstm(torch.cat([z1, z2], -1)[:, None].expand(-1, frames, -1))[0]    # (B, T, H)
        return self.mu(h), self.log_var(h).clamp(min=-6)                     # D1

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
        return x[(starts[:, None] + torch.arange(segment_frames(self.cfg), device=x.device)) % len(x)]

    def encode(self, x):
        """Segments (n, T, F) -> means of z1 (n, d1) and z2 (n, d2). D5: z1 is given the mean of z2."""
        z2 = self.z2_encoder(x)[0]
        return self.z1_encoder(x, z2)[0], z2

    def summary(self, x):
        """x (L, F) -> mu1 (d1,), U2, and mu2 (d2,), the s-vector: closed forms over segments end to end;
        frames at the end that fill no segment are left out."""
        T = segment_frames(self.cfg)
        z1, z2 = self.encode(self.cut(x, torch.arange(0, max(len(x) - T, 0) + 1, T, device=x.device)))
        return closed_form(z1.sum(0), len(z1)), closed_form(z2.sum(0), len(z2))

    def rebuild(self, x, shift=0):
        """x (L, F) -> x^ (L, F), z2 moved by `shift` (d2,): a segment from every frame on, of which the first
        gives all its frames and every other its last."""
        T, frames = segment_frames(self.cfg), []
        for starts in torch.arange(max(len(x) - T, 0) + 1, device=x.device).split(2048):
            z1, z2 = self.encode(self.cut(x, starts))
            y = self.decoder(z1, z2 + shift, T)[0]                           # (2048, T, F)
            frames += [y[:, -1]] if frames else [y[0, :-1], y[:, -1]]
        return torch.cat(frames)[:len(x)]

    def vocode(self, x, samples):
        """(B, L, F) -> (B, samples): undoes `features`, with phases by Griffin-Lim (D7)."""
        x = F.pad(x.mT, (0, 1), mode="replicate").mT                         # a frame more, for N samples
        return griffin_lim((x * self.std + self.mean).exp(), self.cfg)[:, :samples]

def segment_frames(cfg):
    """T: frames of a crop whose window lies inside it (D3), 20 of 3680 samples; UserError if none."""
    frames = 1 + cfg.crop // cfg.hop - 2 * math.ceil(cfg.win / 2 / cfg.hop)
    if frames < 1:
        raise UserError(f"--crop {cfg.crop}: no frame has its whole window in it; raise it")
    return frames

def log_magnitude(wave, cfg):
    """(B, N) -> (B, L, F): natural log of the linear magnitude, at least 1e-5 (D2)."""
    return stft(wave, cfg).abs().clamp(min=1e-5).log()

def xavier(net):
    """U1: Xavier, biases 0, but 1 for the forget gates of an LSTM (they come second of i, f, g, o)."""
    for name, p in net.named_parameters():
        nn.init.xavier_uniform_(p) if p.dim() == 2 else nn.init.zeros_(p)
        if name.startswith("bias_ih"):
            nn.init.ones_(p[len(p) // 4:len(p) // 2])
    return net

# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of every bin, over 5000 utterances at most; pass 0."""
    n, total, squares = 0, 0, 0
    for u in corpus.train[:5000]:
        x = log_magnitude(corpus.wave(u)[None].to(cfg.device), cfg)[0].double()      # (L, F)
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    model.mean.copy_(total / n)
    model.std.copy_((squares / n - (total / n) ** 2).clamp(min=1e-4).sqrt())      # D2
    begin_pass(model, corpus, cfg, 0, 0)

def make_optimizers(model, cfg):
    """One for the networks and the table; both betas are the authors'."""
    return {"autoencoder": torch.optim.Adam(model.parameters(), cfg.lr, betas=(0.95, 0.999), fused=True)}

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
    m1, l1 = model.z1_encoder(x, z2)                                         # given the SAMPLE of z2
    z1 = m1 + (l1 / 2).exp() * torch.randn_like(m1)
    x_mu, x_lv = model.decoder(z1, z2, x.shape[1])
    mu2 = table[y]
    terms = {"log_px": log_normal(x, x_mu, x_lv).sum((1, 2)), "kl_z1": kl(m1, l1, 0, 1).sum(1),
             "kl_z2": kl(m2, l2, mu2, VARIANCE).sum(1),
             "log_pmu2": log_normal(mu2, 0, torch.zeros_like(mu2)).sum(1)}
    terms["bound"] = terms["log_px"] - terms["kl_z1"] - terms["kl_z2"] + terms["log_pmu2"] / n
    terms["log_qy"] = log_posterior(m2, table).gather(1, y[:, None])[:, 0]   # of the MEAN of z2
    return terms

@functools.lru_cache(maxsize=1)
def draw_pass(corpus, cfg, number):
    """-> sequences (K,), the utterance of each row of the table in this pass; counts (K,), N of each;
    order: every row N times, shuffled. A function of (seed, number) alone."""
    rng, U = np.random.default_rng((cfg.seed, number, 2 ** 31)), len(corpus.train)  # not a key of get_batch
    sequences = corpus.train if cfg.sequences >= U else rng.choice(corpus.train, cfg.sequences, replace=False)
    frames = 1 + corpus.length[sequences] // cfg.hop
    counts = (frames - segment_frames(cfg)).clip(0) // cfg.shift + 1
    return sequences, counts, rng.permutation(np.repeat(np.arange(len(sequences)), counts))

def segments(model, corpus, cfg, step, draw=0, utterances=None):
    """x (n, T, F): a segment from a random place of each of the n utterances."""
    x, T = model.features(get_batch(corpus, cfg, step, draw, utterances)["wave"]), segment_frames(cfg)
    margin = (x.shape[1] - T) // 2
    return x[:, margin:margin + T]

@torch.no_grad()
def begin_pass(model, corpus, cfg, number, step):
    """Hierarchical sampling: each row of the table passes on to another sequence, with the closed form of its
    mu2; Adam's moments stay, as the authors'. A table with a row for every sequence is never refilled."""
    model.progress.copy_(torch.tensor([number, step]))
    sequences, counts, _ = draw_pass(corpus, cfg, number)
    if cfg.sequences < len(corpus.train):
        total, rows = torch.zeros_like(model.table), np.repeat(np.arange(len(sequences)), counts)
        for i in range(0, len(rows), 2048):                                  # draw 0 is train_step's
            y = rows[i:i + 2048]
            m2 = model.z2_encoder(segments(model, corpus, cfg, step, 1 + i, sequences[y]))[0]
            total.index_add_(0, torch.from_numpy(y).to(cfg.device), m2)
        model.table.copy_(closed_form(total, torch.from_numpy(counts).to(cfg.device)[:, None]))
        if dist.is_initialized():                                     # every GPU drew its own: the average
            dist.all_reduce(model.table.div_(WORLD))

@torch.autocast("cuda", enabled=False)           # LSTMs and long sums in float32: --bf16 does nothing here
def train_step(model, optimizers, corpus, step, cfg):
    """One of --steps (D4) on -(bound + alpha ln q(y | m2)): the next batch of the pass, or of a new one."""
    number, first = model.progress.tolist()
    if (step - first + 1) * WORLD * cfg.batch_size > len(draw_pass(corpus, cfg, number)[2]):
        number, first = number + 1, step
        begin_pass(model, corpus, cfg, number, first)
    sequences, counts, order = draw_pass(corpus, cfg, number)
    if WORLD * cfg.batch_size > len(order):
        raise UserError(f"{len(order)} segments fill no batch; lower --batch-size or raise --sequences")
    rows = order[((step - first) * WORLD + RANK) * cfg.batch_size:][:cfg.batch_size]
    x = segments(model, corpus, cfg, step, 0, sequences[rows])
    y, n = (torch.from_numpy(v).to(cfg.device) for v in (rows, counts[rows]))
    terms = objective(model, x, y, n, model.table[:len(sequences)])
    loss = -(terms["bound"] + cfg.alpha * terms["log_qy"]).mean()
    optimizers["autoencoder"].zero_grad()
    loss.backward()
    optimizers["autoencoder"].step()
    return {"loss": loss.detach(), **{name: term.detach().mean() for name, term in terms.items()}}

# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> z1 (T', d1) and z2 (T', d2): means of T' = L / shift segments, evenly spread, the first and the
    last given again where the middle is too near an end; mu2 (d2,), the s-vector."""
    x, T = model.features(wave[None])[0], segment_frames(cfg)
    n = math.ceil(len(x) / cfg.shift)                                        # T'
    middle = ((torch.arange(n, device=x.device) + 0.5) * len(x) / n).long()
    z1, z2 = model.encode(model.cut(x, (middle - (T - 1) // 2).clamp(0, max(len(x) - T, 0))))
    return {"z1": z1, "z2": z2, "mu2": model.summary(x)[1]}

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

def lda(x, speaker):
    """Linear discriminant analysis: x (n, D), speaker (n,) -> (D, D'), the at most 24 directions in which the
    means of the speakers differ most, measured by how the utterances of one speaker differ."""
    x, (_, y) = x.double(), speaker.unique(return_inverse=True)
    means = torch.stack([x[y == s].mean(0) for s in range(y.max() + 1)])     # (S, D)
    within = (x - means[y]).T @ (x - means[y]) / len(x)                      # D6: kept away from singular
    within += (1e-3 * within.diagonal().mean() + 1e-6) * torch.eye(len(within)).to(within)
    whiten = torch.linalg.cholesky(within).inverse().T                       # x @ whiten: covariance 1 within
    directions = torch.linalg.svd((means - means.mean(0)) @ whiten, full_matrices=False)[2]
    return (whiten @ directions[:min(24, len(means) - 1)].T).float()

def verify(model, corpus, cfg):
    """The paper's table: equal error rates of mu1, of mu2 and, for a baseline, of the mean log-mel of test
    utterances, raw and after LDA fitted on the speakers of training utterances."""
    who, parts, eer = [], [], {}
    for c, us in (corpus, corpus.train[:cfg.probe]), (corpus.test, corpus.test.held[:cfg.probe]):
        waves = (c.wave(u).to(cfg.device)[None] for u in us)
        rows = [(*model.summary(model.features(w)[0]), log_mel(w, cfg)[0].mean(0)) for w in waves]
        parts.append([torch.stack(column) for column in zip(*rows)])         # mu1, mu2, log-mel: (n, D) each
        who.append(torch.from_numpy(c.speaker[us]).to(cfg.device))
    for name, fit, x in zip(("mu1", "mu2", "log_mel"), *parts):
        eer[name] = equal_error_rate(x, who[1])                              # D6: it centres them
        eer[f"{name}_lda"] = equal_error_rate(x @ lda(fit, who[0]), who[1])
    return eer

def denoise(model, pool, cfg, out):
    """At most 16 test utterances with white noise 10 dB below them, converted to a clean recording, another
    of the speaker if there is; the first is written to out -> mean distance in dB of log spectra from the
    clean utterance: of the noisy one, of both as the model rebuilds them, and of the conversion."""
    us, table, generator = pool.held[:16], collections.defaultdict(list), torch.Generator().manual_seed(0)
    for u in us:
        other = min(pool.held, key=lambda i: (i == u, pool.speaker[i] != pool.speaker[u]))
        clean, target = (pool.wave(i).to(cfg.device) for i in (u, other))
        noise = torch.randn(len(clean), generator=generator).to(cfg.device)
        noisy = clean + noise * clean.std() * 10 ** (-10 / 20)
        x, y, z = (model.features(wave[None])[0] for wave in (clean, noisy, target))
        made = {"noisy": y, "noisy_rebuilt": model.rebuild(y), "clean_rebuilt": model.rebuild(x),
                "denoised": model.rebuild(y, model.summary(z)[1] - model.summary(y)[1])}
        for name, made_x in made.items():
            decibel = (made_x - x) * model.std * 20 / math.log(10)           # (L, F)
            table[name].append(decibel.square().mean(1).sqrt().mean().item())
        if u == us[0]:
            done = model.vocode(made["denoised"][None], len(clean))[0]
            for name, wave in {"clean": clean, "noisy": noisy, "denoised": done}.items():
                write_audio(out / f"noise_{name}.wav", wave, cfg.sample_rate)
    return {name: sum(values) / len(values) for name, values in table.items()}

@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes speech from the prior, prior_I.wav; rows of the grid, grid_I.wav: z1 of the middle segment of
    test utterance I with z2 of those of utterances 0, 1, 2, 3; and what `denoise` does. Returns what `verify`
    and `denoise` say."""
    T, generator, speech = segment_frames(cfg), torch.Generator().manual_seed(0), {}
    normal = lambda *shape: torch.randn(shape, generator=generator).to(cfg.device)
    for i in range(3):                                                       # ten segments of one mu2
        z2 = normal(cfg.d_z2) + VARIANCE ** 0.5 * normal(10, cfg.d_z2)
        speech[f"prior_{i}.wav"] = model.decoder(normal(10, cfg.d_z1), z2, T)[0]
    xs = [model.features(corpus.test.wave(u)[None].to(cfg.device))[0] for u in corpus.test.held[:4]]
    middle = [model.cut(x, torch.tensor([max(len(x) - T, 0) // 2], device=x.device)) for x in xs]
    z1, z2 = model.encode(torch.cat(middle))                                 # (4, d1), (4, d2)
    for i in range(len(xs)):
        speech[f"grid_{i}.wav"] = model.decoder(z1[i].expand(len(xs), -1), z2, T)[0]
    for name, x in speech.items():                                           # (n, T, F), one after another
        wave = model.vocode(x.flatten(0, 1)[None], cfg.hop * T * len(x))[0]
        write_audio(out / name, wave, cfg.sample_rate)
    return {"eer": verify(model, corpus, cfg), "log_spectral_distance": denoise(model, corpus.test, cfg, out)}

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
