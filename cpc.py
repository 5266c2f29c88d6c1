# SPDX-License-Identifier: MIT
"""CPC: speech features that predict their own future, and speech resynthesized from their units.

Paper    van den Oord, Li, Vinyals. Representation Learning with Contrastive Predictive Coding.
         arXiv:1807.03748. Equation numbers are those of this paper.
         Polyak et al. Speech Resynthesis from Discrete Disentangled Self-Supervised
         Representations. Interspeech 2021, arXiv:2104.00355.

Idea     An encoder turns every 10 ms of the waveform into a vector z, and a recurrent network
         summarizes all z so far in a vector c. From c, each of the next 12 z must be picked out
         among candidates. The candidates decide what is learned: among frames of other speakers
         the voice gives the right one away, among frames of the same utterance it does not. CPC
         has no decoder. To hear what c holds, k-means clusters it into discrete units, and a
         decoder, trained with everything else frozen, predicts a mel spectrogram from the units,
         F0 and the speaker.

Model    wave (B, N) -> encoder, convolutions with strides 5, 4, 2, 2, 2     z      (B, T, C)
         z -> GRU                                                            c      (B, T, D)
         c -> matrices W_1 .. W_K: predictions of z_{t+1} .. z_{t+K}         (B, T - K, K, C)
         c -> the nearest centroid of k-means                                units  (B, T)
         wave -> YIN -> bins of log F0, relative to the speaker's mean       f0     (B, T)
         units, f0, speaker -> embeddings (B, T, 3 E) -> convolutions        mel    (B, T, F)

Loss     f_k(x_{t+k}, c_t) = exp(z_{t+k}^T W_k c_t)                                       Eq. (3)
         L_k = -E log [f_k(x_{t+k}, c_t) / sum over all candidates x_j of f_k(x_j, c_t)]    Eq. (4)
         CPC minimizes the mean of L_k over k. With J independent candidates, log J - L_k is a lower
         bound on the mutual information of x_{t+k} and c_t; neighbors in time are not independent.
         The decoder minimizes the L1 error of the log-mel spectrogram.

Symbols  g_enc   model.encoder: z         W_k           model.predictors   (K C, D)
         g_ar    model.context: c         log f_k       score              contexts x candidates
         N       candidates, here J       z_c, z_F0     model.units, model.f0 (Polyak et al.)
         B crops, N samples, T = N / 160 frames, K prediction steps, F mel bands; sizes C, D, E

Differs from the paper
D1  After each convolution, every frame is normalized over its channels. The paper states no
    normalization for audio (--norm none). Batch normalization would let a frame see its future.
D2  The score is scaled by 1 / sqrt(512). --score-scale 1 is the score of the paper.
D3  The units are clusters of c, from a batch for every two units. Polyak et al. cluster an inner
    layer of a larger CPC, which was trained on 6,000 hours, and fit k-means on 100 hours.
D4  F0 comes from YIN, at the rate of c, in uniform bins, with a token for unvoiced frames. Polyak
    et al. use YAAPT and a VQ-VAE of 20 codes at 12.5 Hz. In their code, not in their text, an
    unvoiced frame has the mean F0, so flat F0 has no voicing; `sample` writes both kinds.
D5  The decoder predicts a log-mel spectrogram, and Griffin-Lim finds the phases. Polyak et al.
    train a HiFi-GAN. In their code, not in their text, the learning rate decays and a batch has
    16 crops of 0.56 s; here the rate is constant and the crops are those of CPC.
D6  The speaker is a row of a table, as in their code. Their text uses a d-vector, which they
    report as slightly worse, but it serves new speakers too.
D7  `convert` does not know the source speaker. It takes the mean of log F0 from the source itself,
    and the standard deviation of the training speakers on average.
Not specified in the paper
U1  How many candidates there are: here all frames of the batch, or of the sequence, that are k
    later than a context. With several GPUs each has its own batch, as in the paper.
U2  How the encoder pads: here so that T = N // 160.
U3  How the losses of the K steps are joined: here by their mean.
U4  Where the GRU starts: here from zeros.

Usage    python cpc.py                       toy corpus, two minutes on two CPU cores
         python cpc.py --data DIR            any folder of audio, full size, for a GPU
         python cpc.py convert --checkpoint RUN --source a.wav --target SPEAKER --output c.wav
         The log shows nats_k = log J - L_k, 0 by chance. z_{t+1}, z_{t+2} share samples with c_t.
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
    n_fft: int = 1024  # points of the Fourier transform
    win: int = 640  # samples in an analysis window
    hop: int = 160  # samples between frames
    n_mels: int = 80  # mel bands
    crop: int = 20480  # samples in a training example
    batch_size: int = 8  # training examples in a batch, on each GPU
    steps: int = 700_000  # training steps
    lr: float = 2e-4  # learning rate of Adam
    seed: int = 0  # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True  # bfloat16 autocast on CUDA
    log_every: int = 100  # steps between log lines
    save_every: int = 5000  # steps between checkpoints

    cpc_share: float = (
        0.43  # of the steps are for CPC, about 300,000 as in the paper; the decoder has the rest
    )
    channels: int = 512  # C, of the encoder: size of z
    d_context: int = 256  # D, of the GRU: size of c
    norm: Literal["channel", "none"] = "channel"  # after each convolution; none: the paper
    prediction_steps: int = 12  # K, frames ahead that are predicted
    # The candidates, in the terms of Table 2 of the CPC paper: mixed speaker, same speaker, current
    # sequence only, mixed speaker without the current sequence, which does worst there.
    negatives: Literal["batch", "same-speaker", "sequence", "other-sequences"] = "batch"
    score_scale: float = 0.044  # factor on the score z W c, here 1 / sqrt(512); 1: the paper
    units: int = 100  # clusters of k-means
    f0_tokens: int = 20  # 0: unvoiced; the others: bins of the speaker's normalized log F0
    d_embedding: int = 128  # E, of each of unit, F0 token and speaker
    hidden: int = 256  # H, channels of the decoder
    blocks: int = 6  # residual blocks of the decoder

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
        if self.hop not in HOPS:
            raise UserError(
                f"--hop {self.hop}: choose from {HOPS}, the products of the first strides"
            )
        if self.crop // self.hop < self.prediction_steps + 2:
            raise UserError("--crop is too short for --prediction-steps; raise it")
        if self.negatives == "other-sequences" and self.batch_size < 2:
            raise UserError("--negatives other-sequences needs --batch-size 2 or more")


# The same model, narrower, at 8 kHz with one convolution fewer, for two CPU cores and two minutes.
TOY = dict(
    sample_rate=8000,
    n_fft=512,
    win=320,
    hop=80,
    crop=10240,
    steps=1300,
    lr=2e-3,
    log_every=50,
    save_every=500,
    cpc_share=0.7,
    channels=64,
    d_context=64,
    negatives="sequence",
    score_scale=0.125,
    units=25,
    hidden=128,
)
TARGET = "speaker"  # kind of target that convert takes: a training speaker, by its index
STRIDES = (5, 4, 2, 2, 2)  # of the encoder; a layer for each, as many as make up cfg.hop
HOPS = (5, 20, 40, 80, 160)  # samples between frames after each layer


# ---------- model ----------
class ChannelNorm(nn.LayerNorm):
    """(B, C, T) -> (B, C, T), every frame with mean 0 and deviation 1 over its channels, then a
    gain and a bias for each channel (D1)."""

    def forward(self, x):
        return super().forward(x.mT).mT


class Encoder(nn.Sequential):
    """g_enc: wave (B, N) -> z (B, T, C), T = N // hop. Kernels are twice as long as the
    strides. With five layers z_t sees 465 samples, from 160 t - 153 to 160 t + 311."""

    def __init__(self, cfg):
        C = cfg.channels
        Norm = ChannelNorm if cfg.norm == "channel" else nn.Identity
        layers = []
        for stride in STRIDES[: HOPS.index(cfg.hop) + 1]:
            inputs = C if layers else 1
            padding = (stride + 1) // 2  # U2
            layers += [nn.Conv1d(inputs, C, 2 * stride, stride, padding), Norm(C), nn.ReLU()]
        super().__init__(*layers)
        self.hop = cfg.hop

    def forward(self, wave):
        frames = wave.shape[1] // self.hop
        return super().forward(wave[:, None, : frames * self.hop]).mT


class Residual(nn.Sequential):
    """h -> h + layers(h)."""

    def forward(self, h):
        return h + super().forward(h)


class Decoder(nn.Module):
    """units (B, T), F0 tokens (B, T), speaker (B,) -> standardized log-mel (B, T, F). The three
    embeddings are concatenated, as in Polyak et al.; residual blocks of dilated convolutions
    follow (D5). The speaker is a row of a table (D6)."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        E = cfg.d_embedding
        H = cfg.hidden
        self.unit = nn.Embedding(cfg.units, E)
        self.f0 = nn.Embedding(cfg.f0_tokens, E)
        self.speaker = nn.Embedding(n_speakers, E)
        layers = [nn.Conv1d(3 * E, H, 5, padding=2)]
        for i in range(cfg.blocks):
            dilated = nn.Conv1d(H, H, 5, padding="same", dilation=2 ** (i % 3))
            layers.append(Residual(nn.ReLU(), dilated, nn.ReLU(), nn.Conv1d(H, H, 1)))
        self.layers = nn.Sequential(*layers, nn.ReLU(), nn.Conv1d(H, cfg.n_mels, 1))

    def forward(self, units, f0, speaker):
        unit = self.unit(units)
        voice = self.speaker(speaker)[:, None].expand_as(unit)
        h = torch.cat([unit, self.f0(f0), voice], 2)  # (B, T, 3 E)
        return self.layers(h.mT).mT


class Model(nn.Module):
    """For CPC: encoder, context network and predictors. For the resynthesis: centroids of the
    units, decoder, mean and deviation of each mel band and of each training speaker's log F0."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg = cfg
        self.n_speakers = n_speakers
        self.register_buffer("mean", torch.zeros(cfg.n_mels))
        self.register_buffer("std", torch.ones(cfg.n_mels))
        self.register_buffer("f0_mean", torch.full((n_speakers,), 4.8))  # 122 Hz
        self.register_buffer("f0_std", torch.full((n_speakers,), 0.25))
        self.register_buffer("centroids", torch.zeros(cfg.units, cfg.d_context))
        self.encoder = Encoder(cfg)
        self.context = nn.GRU(cfg.channels, cfg.d_context, batch_first=True)
        self.predictors = nn.Linear(cfg.d_context, cfg.prediction_steps * cfg.channels, bias=False)
        self.decoder = Decoder(cfg, n_speakers)

    def forward(self, wave):
        """(B, N) -> z (B, T, C), c (B, T, D), float32; c_t depends on z_0 .. z_t only."""
        z = self.encoder(wave).float()
        with torch.autocast(wave.device.type, enabled=False):
            return z, self.context(z)[0]  # U4: no state is given, so it starts from zeros

    @torch.autocast("cuda", enabled=False)  # as in `convert`, which runs in float32
    def units(self, wave):
        """(B, N) -> units (B, T): the index of the centroid that is nearest to c."""
        _, c = self(wave)
        return assign(c, self.centroids)[0]

    def f0(self, wave, speaker=None):
        """wave (B, N), speaker (B,) -> F0 tokens (B, T): 0 for unvoiced frames, otherwise a bin of
        log F0 between -2.5 and 2.5 deviations from the speaker's mean (D4)."""
        hertz = yin(wave, self.cfg)[:, :-1]
        log_f0 = torch.where(hertz > 0, hertz, math.nan).log()
        if speaker is None:  # D7
            mean = log_f0.nanmean(1, keepdim=True)
            std = self.f0_std.mean()
        else:
            mean = self.f0_mean[speaker, None]
            std = self.f0_std[speaker, None]

        bins = self.cfg.f0_tokens - 1
        place = (log_f0 - mean) / std / 5 + 0.5  # 0 .. 1
        token = 1 + (place * bins).long().clamp(0, bins - 1)
        return torch.where(hertz > 0, token, 0)

    def features(self, wave):
        """(B, N) -> (B, T, F): standardized log-mel, with as many frames as z."""
        return (log_mel(wave, self.cfg)[:, :-1] - self.mean) / self.std

    def vocode(self, x, samples):
        """x (B, T, F) -> wave (B, samples): approximately inverts `features`, with phases from
        Griffin-Lim (D5)."""
        # Two more frames, so that the wave is long enough.
        x = F.pad(x.mT, (0, 2), mode="replicate").mT
        mel = (x * self.std + self.mean).exp()
        return griffin_lim(mel_to_magnitude(mel, self.cfg), self.cfg)[:, :samples]


def yin(wave, cfg, low=65, high=400):
    """wave (B, N) -> F0 (B, T) in Hz, 0 where unvoiced; T = 1 + N // hop, and frame t is centered
    on sample t * hop. YIN (de Cheveigne and Kawahara, JASA 2002) between `low` and `high` Hz: the
    first dip of the normalized difference below 0.2, or else the deepest dip. The frame is voiced
    if that dip is below 0.35. The floor is above the hum of the mains."""
    W = ceil(cfg.sample_rate / low) + 1  # longest lag, and number of samples that are compared
    middle = (W + cfg.sample_rate // 150) // 2  # of all samples that a lag of 150 Hz compares
    x = F.pad(wave.double(), (middle, 2 * W - middle)).unfold(1, 2 * W, cfg.hop)  # (B, T, 2 W)

    # difference[lag] = sum over j < W of (x[j] - x[j + lag])^2, for lag = 0 .. W
    energy = F.pad(x.square().cumsum(-1), (1, 0))
    energy = energy[..., W:] - energy[..., :-W]  # of x[lag : lag + W]
    start = torch.fft.rfft(x[..., :W], 2 * W)
    product = torch.fft.irfft(start.conj() * torch.fft.rfft(x), 2 * W)[..., : W + 1]
    difference = energy[..., :1] + energy - 2 * product

    # Divided by its mean over all lags so far, it begins at 1 and dips at the period. The constant
    # is that of noise at -60 dB of full scale: anything quieter has no pitch.
    difference = difference[..., 1:] + 2e-6 * W
    lag = torch.arange(1, W + 1, device=x.device)
    d = difference * lag / difference.cumsum(-1)
    before, here, after = d.unfold(-1, 3, 1).unbind(-1)
    lag = lag[1:-1]  # of `here`
    is_dip = (here < before) & (here <= after) & (lag >= cfg.sample_rate // high)

    # Clear dips rank before all others, in the order of their lags; the others by their depth.
    rank = torch.where(here < 0.2, lag - W, here).masked_fill(~is_dip, math.inf)
    best, at = rank.min(-1, keepdim=True)  # (B, T, 1)
    before, here, after = (y.gather(-1, at) for y in (before, here, after))
    # The vertex of the parabola through the dip and its neighbors is the period.
    period = at + 2 + (before - after) / 2 / (before - 2 * here + after)
    f0 = torch.where(best < 0.35, cfg.sample_rate / period, 0.0)[..., 0]

    # A median over 5 frames removes isolated outliers.
    return F.pad(f0, (2, 2)).unfold(1, 5, 1).median(-1)[0].float()


# ---------- loss and training step ----------
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Sets mean and deviation of every mel band, from crops of 200 training utterances, and of
    every speaker's log F0, from 25 utterances. The units are those of the untrained c until CPC
    has been trained."""
    wave = get_batch(corpus, cfg, 0, utterances=corpus.train[:200])["wave"]
    mel = log_mel(wave, cfg)
    model.mean.copy_(mel.mean((0, 1)))
    model.std.copy_(mel.std((0, 1)).clamp(min=0.01))

    for s in range(model.n_speakers):
        utterances = corpus.train[corpus.speaker[corpus.train] == s][:25]
        f0 = torch.cat([yin(corpus.wave(u)[None].to(cfg.device), cfg)[0] for u in utterances])
        log_f0 = f0[f0 > 0].log()
        if len(log_f0) > 1:  # otherwise the initial values stay
            model.f0_mean[s] = log_f0.mean()
            model.f0_std[s] = log_f0.std().clamp(min=0.02)
    fit_units(model, corpus, cfg)


def make_optimizers(model, cfg):
    """Adam for CPC, and for the decoder AdamW as in HiFi-GAN."""
    cpc = nn.ModuleList([model.encoder, model.context, model.predictors])
    return {
        "cpc": torch.optim.Adam(cpc.parameters(), cfg.lr, fused=True),
        "decoder": torch.optim.AdamW(model.decoder.parameters(), cfg.lr, (0.8, 0.99), fused=True),
    }


@torch.autocast("cuda", enabled=False)  # large scores would lose too many digits in bfloat16
def info_nce(z, c, predictors, cfg):
    """z (B, T, C), c (B, T, D) -> L_k of Eq. (4) for k = 1 .. K, (K,) in nats, and the number of
    candidates. z_{t+k} is the positive of c_t; the other candidates stand k frames after the other
    contexts (U1)."""
    B, T, C = z.shape
    K = cfg.prediction_steps
    S = T - K  # contexts in a sequence: those with all K futures
    sets = B if cfg.negatives == "sequence" else 1  # of contexts that share their candidates
    predicted = predictors(c[:, :S]) * cfg.score_scale  # D2
    predicted = predicted.view(sets, -1, K, C)  # W_k c_t for all k

    losses = []
    for k in range(1, K + 1):
        future = z[:, k : k + S].reshape(sets, -1, C)
        score = predicted[:, :, k - 1] @ future.mT  # log f_k, Eq. (3): (sets, contexts, candidates)
        if cfg.negatives == "other-sequences":
            sequence = torch.arange(B * S, device=z.device) // S
            is_hidden = sequence[:, None] == sequence
            score = score.masked_fill(is_hidden.fill_diagonal_(False), -math.inf)
        positive = score.diagonal(dim1=1, dim2=2)
        losses.append((score.logsumexp(-1) - positive).mean())

    candidates = score.shape[-1]
    if cfg.negatives == "other-sequences":
        candidates -= S - 1
    return torch.stack(losses), candidates


def assign(x, centroids):
    """x (.., D), centroids (M, D) -> index of the nearest centroid and squared distance, (..)."""
    # The shift changes no distance, but far from the origin cdist would lose its precision.
    center = centroids.mean(0)
    distance, ids = torch.cdist(x - center, centroids - center).min(-1)
    return ids, distance.square()


def spread_centroids(x, n_clusters):
    """Greedy k-means++ (Arthur and Vassilvitskii, SODA 2007): x (n, D) -> first centroids (M, D).
    Points are drawn in proportion to their squared distance from the centroids so far. The best of
    2 + log M draws, by what is left of the distances, is the next centroid."""
    centroids = x[torch.randint(len(x), (1,), device=x.device)]
    distance = assign(x, centroids)[1]
    for _ in range(n_clusters - 1):
        weight = distance.nan_to_num() + 1e-20  # all distances may be 0
        drawn = x[weight.multinomial(2 + int(math.log(n_clusters)), replacement=True)]
        left = torch.minimum(distance, torch.cdist(drawn, x).square())  # (draws, n)
        best = left.sum(1).argmin()
        distance = left[best]
        centroids = torch.cat([centroids, drawn[best][None]])
    return centroids


def kmeans(x, n_clusters, starts=5, rounds=50):
    """Lloyd's algorithm: x (n, D) -> centroids (M, D) and the sum of squared distances in the last
    round, of the best of several starts. A cluster that loses all members keeps its centroid."""
    center = x.mean(0)
    x = x - center
    runs = []
    for _ in range(starts):
        centroids = spread_centroids(x, n_clusters)
        for _ in range(rounds):
            ids, distance = assign(x, centroids)
            member = F.one_hot(ids, n_clusters).to(x.dtype)  # (n, M)
            count = member.sum(0)[:, None]
            centroids = torch.where(count > 0, member.T @ x / count, centroids)
        runs.append((centroids + center, distance.sum().item()))
    return min(runs, key=lambda run: run[1])


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
def fit_units(model, corpus, cfg):
    """Sets the centroids by k-means of c in random training crops, a batch for every two units
    (D3)."""
    batches = [get_batch(corpus, cfg, i, draw=2000) for i in range(ceil(cfg.units / 2))]
    c = torch.cat([model(batch["wave"])[1].flatten(0, 1) for batch in batches])
    model.centroids.copy_(kmeans(c, cfg.units)[0])
    if dist.is_initialized():
        dist.broadcast(model.centroids, 0)  # each rank has drawn other crops


def train_step(model, optimizers, corpus, step, cfg):
    """One update: of CPC in the first share of the steps, then of the decoder, with units that are
    fitted once, before its first step."""
    decoder = optimizers["decoder"]
    if step < round(cfg.cpc_share * cfg.steps):
        metrics = cpc_step(model, optimizers["cpc"], corpus, step, cfg)
        decoder.state.clear()  # c has moved, so the next decoder step must fit the units again
        if step + 1 == cfg.steps:  # no decoder will follow
            fit_units(model, corpus, cfg)
        return metrics

    # An optimizer has no state before its first step. A checkpoint keeps it, so this holds in a
    # resumed run too, and needs no wait for the GPU.
    if not decoder.state:
        fit_units(model, corpus, cfg)
    return decoder_step(model, decoder, corpus, step, cfg)


def draw_losses(model, corpus, utterances, cfg, step, draw=0):
    """InfoNCE of a batch of `utterances`, all of one speaker if the negatives are same-speaker ->
    L_k and log J - L_k for k = 1 .. K, (K,) each, in nats."""
    rng = np.random.default_rng((cfg.seed, step, RANK, 2**31))  # no stream of get_batch
    if cfg.negatives == "same-speaker":
        chosen = corpus.speaker[utterances] == corpus.speaker[rng.choice(utterances)]
        utterances = utterances[chosen]
    utterances = rng.choice(utterances, min(cfg.batch_size, len(utterances)), replace=False)
    z, c = model(get_batch(corpus, cfg, step, draw, utterances)["wave"])
    losses, candidates = info_nce(z, c, model.predictors, cfg)
    return losses, math.log(candidates) - losses.detach()


def cpc_step(model, optimizer, corpus, step, cfg):
    """One update of encoder, GRU and W_k on the mean of Eq. (4) over k (U3)."""
    losses, nats = draw_losses(model, corpus, corpus.train, cfg, step)
    loss = losses.mean()

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    by_step = {f"nats_{k}": value for k, value in enumerate(nats, 1)}
    return {"loss": loss.detach(), "nats": nats.mean(), **by_step}


def decoder_step(model, optimizer, corpus, step, cfg):
    """One update of the decoder on the L1 error of the log-mel spectrogram (D5)."""
    batch = get_batch(corpus, cfg, step)
    wave = batch["wave"]
    with torch.no_grad():
        units = model.units(wave)
        f0 = model.f0(wave, batch["speaker"])
    mel = model.decoder(units, f0, batch["speaker"])
    loss = F.l1_loss(mel, model.features(wave))

    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"decoder_loss": loss.detach()}


# ---------- representation, conversion, sampling ----------
@torch.no_grad()
def represent(model, wave, cfg):
    """wave (N,) -> z (T, C); c (T, D); units (T,), integers."""
    z, c = model(wave[None])
    return {"z": z[0], "c": c[0], "units": assign(c[0], model.centroids)[0]}


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,) of any speakers, each with the index of a training speaker -> waves (N,): units
    and F0 of the source in the voice of the target. None resynthesizes the source in the voice of
    the training speaker that comes closest to it."""
    speakers = torch.arange(model.n_speakers, device=sources[0].device)
    waves = []
    for source, target in zip(sources, targets):
        wave = source[None]
        if target is None:
            opening = wave[:, : 10 * cfg.sample_rate]  # enough to choose by
            error = resynthesize(model, opening, speakers) - model.features(opening)
            target = error.abs().mean((1, 2)).argmin(0, keepdim=True)
        mel = resynthesize(model, wave, speakers[target].view(1))
        waves.append(model.vocode(mel, len(source))[0])
    return waves


def resynthesize(model, wave, speakers):
    """wave (1, N), speakers (S,) -> standardized log-mel (S, T, F): the units and F0 of the wave in
    the voice of each, in one batch."""
    units = model.units(wave).expand(len(speakers), -1)
    f0 = model.f0(wave).expand(len(speakers), -1)
    return model.decoder(units, f0, speakers)


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes three held-out utterances, resynthesized with their own F0, with the speaker's mean F0
    in voiced frames (flat_f0), and with it in all frames (hidden_voicing, D4). Returns
    log J - L_k of held-out speech in nats, the mean and for each k."""
    for i, u in enumerate(corpus.held[:3]):
        wave = corpus.wave(u)[None, : 3 * cfg.sample_rate].to(cfg.device)
        speaker = torch.tensor([corpus.speaker[u]], device=cfg.device)
        f0 = model.f0(wave, speaker)
        mean = torch.full_like(f0, cfg.f0_tokens // 2)
        flat = torch.where(f0 > 0, mean, 0)
        contours = {"resynthesis": f0, "flat_f0": flat, "hidden_voicing": mean}
        for name, contour in contours.items():
            mel = model.decoder(model.units(wave), contour, speaker)
            resynthesis = model.vocode(mel, wave.shape[1])
            write_audio(out / f"held_out_{i}_{name}.wav", resynthesis[0], cfg.sample_rate)

    nats = [draw_losses(model, corpus, corpus.held, cfg, i, draw=1000)[1] for i in range(8)]
    nats = torch.stack(nats).mean(0)
    return {"nats": nats.mean().item(), "nats_by_step": dict(enumerate(nats.tolist(), 1))}


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
