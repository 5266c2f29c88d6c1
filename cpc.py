# SPDX-License-Identifier: MIT
"""CPC: what is said is what helps to predict the future; and speech again from its discrete units.

van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748;
Polyak et al., "Speech Resynthesis from Discrete Disentangled Self-Supervised Representations", Interspeech
2021, arXiv:2104.00355.

The idea. An encoder turns every 10 ms of waveform into a vector z, a recurrent network sums up all z so far
in c, and with c each of the next 12 z is to be picked out among others. WHICH others decides what is learned:
against frames of other speakers it is enough to know the voice, against frames of the same utterance the
voice alone is of no use. There is no decoder. To hear what c holds it is clustered into discrete units, and a
decoder, trained with all else frozen, makes speech of units, F0 and speaker; another speaker converts it.

    wave (B, samples) -> 5 convolutions (TOY: 4), strides 5, 4, 2, 2, 2 -> z (B, T, C), T = samples / hop
    z -> GRU -> c (B, T, D) -> matrices W_1 .. W_K -> predictions of z_{t+1} .. z_{t+K} (B, T - K, K, C)
    c -> k-means -> units (B, T)      wave -> YIN -> F0 tokens (B, T)      speaker (B,)
    their embeddings (B, T, 3 E) -> convolutions -> log-mel (B, T, M) -> Griffin-Lim -> wave

    f_k(x_{t+k}, c_t) = exp(z_{t+k} W_k c_t)                                                        Eq. (3)
    L_k = - E log f_k(x_{t+k}, c_t) / sum over N candidates x_j of f_k(x_j, c_t)                    Eq. (4)
    log N - L_k, in nats, is at most log N and bounds the mutual information of x_{t+k} and c_t from below
    if candidates are independent, which neighbours in time are not.

    symbol   here                   shape             symbol         here                  shape or value
    g_enc    model.encoder: z       (B, T, C)         K              cfg.prediction_steps  12
    g_ar     model.context: c       (B, T, D)         N              candidates (U1)       B (T - K) = 928
    W_k      model.predictors       (K C, D)          z_c, z_F0      model.units, .f0      (B, T)
    f_k      exp(score)             (.., N, N)        z_spk          decoder.speaker       (S, E)

Table 2 of the paper, phone accuracy: --negatives batch 64.6 %, same-speaker 65.5, sequence 65.2 and, the
harmful choice, other-sequences 57.3 (not here: the speaker's other sequences, 64.6); --prediction-steps 2,
4, 8, 12, 16: 28.5, 57.6, 63.6, 64.6, 63.8.

Differs from the papers
D1  After each convolution every frame is normalised over its channels. The paper states no norm (--norm
    none); BatchNorm would let a frame know its future.
D2  The score is scaled, by 1 / sqrt(C); --score-scale 1 is the paper.
D3  Units are clusters of c of this CPC, from 50,000 frames at most. Polyak et al. take an inner layer of a
    larger CPC, trained on 6000 hours, and k-means of 100 hours.
D4  F0 by YIN, at the rate of c, in uniform bins, and a token for unvoiced. There: YAAPT, and 20 codes of a
    VQ-VAE, 12.5 a second; an unvoiced frame is one at the speaker's mean.
D5  The decoder makes a log-mel spectrum, trained with L1 at a constant rate on crops as long as those of
    CPC, Griffin-Lim the wave. There: HiFi-GAN, its rate decaying, on 16 crops of 0.56 s.
D6  `convert` does not know who speaks: the source's own mean of log F0 and an average deviation stand in
    for those of the speaker, with which the decoder was trained.
The papers do not say, or not to us
U1  how many candidates there are. Here all frames of the minibatch, or of the sequence, that are k later
    than a context. Under torchrun those of one GPU, as in the paper, which had 8 with 8 sequences each.
U2  how the encoder pads: here so that T = samples // 160.
U3  how the losses of the K steps are joined: here by their mean.
U4  where the GRU starts: here from zeros, in each crop and in each utterance.

The log shows nats_k = log N - L_k: 0 is chance; z_{t+1} and z_{t+2} share samples with c_t. In run.json
metrics.nats are of held-out speech; vde: share of frames of wrong voicing, ffe: of these and where F0 is off
by over 20 %, for Griffin-Lim copies, for the speaker's own resynthesis, and for it with flat_f0, which shows
what units say of F0. The paper reads speakers per frame, here they are read per utterance.

    python cpc.py                                       a toy corpus, two minutes on two CPU cores
    python cpc.py --data DIR --negatives same-speaker   any folder of audio, the paper's size, for a GPU
    python cpc.py convert --checkpoint runs/a --source a.wav --target SPEAKER --output c.wav
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

    cpc_share: float = 0.43  # of the steps are for CPC, the rest for the decoder
    channels: int = 512  # C, of the encoder: size of z
    d_context: int = 256  # D, of the GRU: size of c
    norm: Literal["channel", "none"] = "channel"  # after each convolution; none: the paper
    prediction_steps: int = 12  # K, frames ahead that are predicted
    negatives: Literal["batch", "same-speaker", "sequence", "other-sequences"] = (
        "batch"  # who they are
    )
    score_scale: float = 0.044  # factor on the score z W c, here 1 / sqrt(512); 1: the paper
    units: int = 100  # clusters of k-means
    normalise: bool = False  # c to mean 0 and deviation 1 over the utterance before k-means
    f0_tokens: int = 20  # 0: unvoiced; the others: bins of the speaker's normalised log F0
    d_embedding: int = 128  # E, of each of unit, F0 token and speaker
    hidden: int = 256  # H, channels of the decoder
    blocks: int = 6  # residual blocks of the decoder

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
        hops = np.cumprod(STRIDES).tolist()
        if self.hop not in hops:
            raise UserError(f"--hop {self.hop}: no product of strides; choose from {hops}")
        if self.crop // self.hop < self.prediction_steps + 2:
            raise UserError(f"--crop {self.crop}: too short for --prediction-steps; raise it")
        if self.cpc_share > 1:
            raise UserError(
                f"--cpc-share {self.cpc_share}: is a share of the steps; give 1 at most"
            )
        if self.negatives == "other-sequences" and self.batch_size == 1:
            raise UserError("--batch-size 1: has no other sequences; raise it")


# The same model, narrower, at 8 kHz with a convolution less, for two CPU cores and two minutes.
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
TARGET = "speaker"  # what convert takes: the index of a training speaker
STRIDES = (5, 4, 2, 2, 2)  # of the encoder; a layer for each, as many as make up cfg.hop


# ==================== the model ====================
class ChannelNorm(nn.LayerNorm):
    """D1: (B, C, T) -> each frame to mean 0 and deviation 1 over its channels, times a gain, plus a bias."""

    def forward(self, x):
        return super().forward(x.mT).mT


class Encoder(nn.Sequential):
    """g_enc: wave (B, N) -> z (B, T, C), T = N // hop, at least 1: strided convolutions, kernels twice the
    strides. With five layers z_t sees 465 samples, from 160 t - 153 to 160 t + 311."""

    def __init__(self, cfg):
        C, Norm = cfg.channels, ChannelNorm if cfg.norm == "channel" else nn.Identity
        layers, hops = [], np.cumprod(STRIDES).tolist()
        for stride in STRIDES[: hops.index(cfg.hop) + 1]:  # U2: the padding
            layers += [
                nn.Conv1d(C if layers else 1, C, 2 * stride, stride, padding=(stride + 1) // 2),
                Norm(C),
                nn.ReLU(),
            ]
        super().__init__(*layers)
        self.hop = cfg.hop

    def forward(self, wave):
        samples = max(1, wave.shape[1] // self.hop) * self.hop  # else T is not always N // hop
        return (
            super().forward(F.pad(wave, (0, samples - wave.shape[1]))[:, None]).mT
        )  # cut, or padded


class Decoder(nn.Module):
    """units (B, T), F0 tokens (B, T), speaker (B,) -> log-mel (B, T, M), standardised. Their embeddings side
    by side, as Polyak et al. have it; then residual blocks of dilated convolutions (D5)."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        e, h = cfg.d_embedding, cfg.hidden
        self.unit, self.f0 = nn.Embedding(cfg.units, e), nn.Embedding(cfg.f0_tokens, e)
        self.speaker = nn.Embedding(n_speakers, e)
        self.enter = nn.Conv1d(3 * e, h, 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(),
                nn.Conv1d(h, h, 5, padding=2 * 2 ** (i % 3), dilation=2 ** (i % 3)),
                nn.ReLU(),
                nn.Conv1d(h, h, 1),
            )
            for i in range(cfg.blocks)
        )
        self.leave = nn.Sequential(nn.ReLU(), nn.Conv1d(h, cfg.n_mels, 1))

    def forward(self, units, f0, speaker):
        voice = self.speaker(speaker)[:, None].expand(-1, units.shape[1], -1)
        h = self.enter(torch.cat([self.unit(units), self.f0(f0), voice], 2).mT)
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h).mT


class Model(nn.Module):
    """Of CPC: encoder, context, predictors. Of the resynthesis: centroids of the units, decoder, mean and
    deviation of each mel band and of each training speaker's log F0."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg, self.n_speakers = cfg, n_speakers
        self.register_buffer("mean", torch.zeros(cfg.n_mels))
        self.register_buffer("std", torch.ones(cfg.n_mels))
        self.register_buffer("f0_mean", torch.zeros(n_speakers))
        self.register_buffer("f0_std", torch.ones(n_speakers))
        self.encoder = Encoder(cfg)
        self.context = nn.GRU(cfg.channels, cfg.d_context, batch_first=True)  # g_ar; U4: from zeros
        self.predictors = nn.Linear(
            cfg.d_context, cfg.prediction_steps * cfg.channels, bias=False
        )  # W_k
        self.decoder = Decoder(cfg, n_speakers)
        self.register_buffer("centroids", torch.zeros(cfg.units, cfg.d_context))
        self.register_buffer("fitted", torch.zeros(()))  # 1 where they are those of this c

    def forward(self, wave):
        """(B, N) -> z (B, T, C), c (B, T, D), float32; c_t knows of z_1 .. z_t only."""
        z = self.encoder(wave).float()
        with torch.autocast(wave.device.type, enabled=False):
            return z, self.context(z)[0]

    @torch.autocast("cuda", enabled=False)  # as in convert: float32
    def units(self, wave):
        """(B, N) -> (B, T): which centroid is the nearest to c."""
        return assign(self.normalised(self(wave)[1]), self.centroids)[0]

    def normalised(self, c):
        """(B, T, D), with cfg.normalise without what stays the same over T: much of the speaker."""
        x = (c - c.mean(1, keepdim=True)) / c.std(1, keepdim=True, unbiased=False).clamp(min=1e-5)
        return x if self.cfg.normalise else c

    def f0(self, wave, speaker=None):
        """(B, N), speaker (B,), or None (D6) -> tokens (B, T): 0 is unvoiced, the others bins of log F0, from
        -2.5 to 2.5 of the speaker's deviations (D4)."""
        f0 = yin(wave, self.cfg)[:, : max(1, wave.shape[1] // self.cfg.hop)]  # (B, T) Hz
        voiced, x = f0 > 0, f0.clamp(min=1).log()
        if speaker is None:
            mean = (x * voiced).sum(1, keepdim=True) / voiced.sum(1, keepdim=True).clamp(min=1)
            std = self.f0_std.mean()
        else:
            mean, std = self.f0_mean[speaker, None], self.f0_std[speaker, None]
        bins = self.cfg.f0_tokens - 1
        return ((((x - mean) / std + 2.5) / 5 * bins).long().clamp(0, bins - 1) + 1) * voiced

    def features(self, wave):
        """(B, N) -> (B, T, M): log-mel, standardised; T as of z."""
        frames = max(1, wave.shape[1] // self.cfg.hop)
        return (log_mel(wave, self.cfg)[:, :frames] - self.mean) / self.std

    def vocode(self, x, samples):
        """(B, T, M) -> (B, samples): undoes `features`, with phases by Griffin-Lim (D5)."""
        x = F.pad(x.mT, (0, 2), mode="replicate").mT  # two frames more, for N samples
        mel = (x * self.std + self.mean).exp()
        return griffin_lim(mel_to_magnitude(mel, self.cfg), self.cfg)[:, :samples]


def yin(wave, cfg):
    """(B, N) -> F0 (B, T) in Hz, 0 where unvoiced; T = 1 + N // hop, frame t centred on sample t * hop.
    YIN (de Cheveigne & Kawahara, JASA 2002), 50 to 400 Hz: the first minimum of d' below 0.2, if any."""
    W, low = ceil(cfg.sample_rate / 50), cfg.sample_rate // 400
    middle = 2 * W // 3  # of what is compared, x[:W] and x[tau:tau + W], where F0 is 150 Hz
    x = F.pad(wave.double(), (middle, 2 * W - middle)).unfold(1, 2 * W, cfg.hop)  # (B, T, 2 W)
    energy = F.pad(x.square().cumsum(-1), (1, 0))
    energy = energy[..., W:] - energy[..., : W + 1]  # of x[tau:tau + W], tau = 0 .. W
    spectrum, start = torch.fft.rfft(x), torch.fft.rfft(x[..., :W], 2 * W)
    product = torch.fft.irfft(start.conj() * spectrum, 2 * W)[
        ..., : W + 1
    ]  # sum of x[j] x[j + tau], j < W
    d = (energy[..., :1] + energy - 2 * product)[..., 1:].clamp(
        min=0
    )  # sum of (x[j] - x[j + tau]) ** 2
    tau = torch.arange(1, W + 1, device=x.device)
    d = d * tau / d.cumsum(-1).clamp(min=1e-12)  # d', over the mean so far
    before, here, after = d[..., :-2], d[..., 1:-1], d[..., 2:]  # tau = 1 .., 2 .., 3 ..
    dip = (here < before) & (here <= after) & (here < 0.2) & (tau[1:-1] >= low)
    dip &= x.var(-1, keepdim=True) > 1e-6  # -60 dB of full scale
    at = dip.int().argmax(-1, keepdim=True)  # the first, not the deepest
    before, here, after = (y.gather(-1, at) for y in (before, here, after))
    period = (
        at + 2 + (before - after) / 2 / (before - 2 * here + after).clamp(min=1e-12)
    )  # by a parabola
    f0 = (cfg.sample_rate / period * dip.any(-1, keepdim=True)).squeeze(-1)
    return F.pad(f0, (2, 2)).unfold(1, 5, 1).median(-1)[0].float()  # one or two alone are errors


# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of mel bands and of speakers' log F0, from at most 25
    utterances of each, and units of the untrained c (those that count are fitted when CPC is done)."""
    mels, pitch = [], defaultdict(list)
    for u in corpus.train:
        if len(pitch[s := corpus.speaker[u]]) < 25:
            wave = corpus.wave(u)[None].to(cfg.device)
            mel, f0 = log_mel(wave, cfg)[0], yin(wave, cfg)[0]
            mels.append(torch.stack([mel.mean(0), mel.square().mean(0)]))
            pitch[s].append(f0[f0 > 0].log())
    mean, square = torch.stack(mels).double().mean(0)
    model.mean.copy_(mean)
    model.std.copy_((square - mean**2).clamp(min=1e-4).sqrt())
    every = torch.cat(
        [torch.tensor([4.6, 5.1], device=cfg.device), *itertools.chain(*pitch.values())]
    )
    for s in range(model.n_speakers):
        x = torch.cat([every[:0], *pitch[s]])
        x = x if len(x) > 1 else every  # never voiced: as all are, at worst 99 to 164 Hz
        model.f0_mean[s], model.f0_std[s] = x.mean(), x.std().clamp(min=0.02)
    fit_units(model, corpus, cfg)


def make_optimizers(model, cfg):
    """One for CPC; and one, as in HiFi-GAN, for the decoder."""
    cpc = nn.ModuleList([model.encoder, model.context, model.predictors])
    return {
        "cpc": torch.optim.Adam(cpc.parameters(), cfg.lr, fused=True),
        "decoder": torch.optim.AdamW(model.decoder.parameters(), cfg.lr, (0.8, 0.99), fused=True),
    }


@torch.autocast("cuda", enabled=False)  # scores have no bound: float32
def info_nce(z, c, predictors, cfg):
    """z (B, T, C), c (B, T, D) -> Eq. (4) for k = 1 .. K, (K,) in nats, and N, the number of candidates: one
    is z_{t + k}, k frames after c_t, the others stand k frames after the other contexts (U1)."""
    B, T, C = z.shape
    K, S = cfg.prediction_steps, T - cfg.prediction_steps  # S contexts have all K futures
    losses, groups = [], B if cfg.negatives == "sequence" else 1
    prediction = (
        predictors(c[:, :S]).unflatten(2, (K, C)) * cfg.score_scale
    )  # D2: W_k c_t (B, S, K, C)
    for k in range(1, K + 1):  # k = 1 is the next frame
        w, future = (x.reshape(groups, -1, C) for x in (prediction[:, :, k - 1], z[:, k : k + S]))
        score = w @ future.mT  # z_j W_k c_i: row i, column j
        if cfg.negatives == "other-sequences":
            own = torch.kron(
                torch.eye(B, device=z.device), 1 - torch.eye(S, device=z.device)
            ).bool()
            score = score.masked_fill(own, -math.inf)  # the positive stays a candidate
        losses.append((score.logsumexp(-1) - score.diagonal(dim1=1, dim2=2)).mean())
    return torch.stack(losses), S * B // groups - (S - 1) * (cfg.negatives == "other-sequences")


def assign(x, centroids):
    """(.., D) -> index of the nearest of (K, D), and the square of its distance, (..) each."""
    d, ids = (
        x.square().sum(-1, keepdim=True) - 2 * x @ centroids.T + centroids.square().sum(-1)
    ).min(-1)
    return ids, d.clamp(min=0)


def kmeans(x, K, seed, starts=5, rounds=100):
    """x (n, D) -> centroids (K, D), and the sum of squares in each round of Lloyd's algorithm, from the best
    of some starts by k-means++ (Arthur & Vassilvitskii, SODA 2007). A cluster that has lost all its members
    moves to the point that is worst off."""
    rng, runs = np.random.default_rng(seed), []
    for _ in range(starts):
        centroids = x[rng.integers(len(x))][None]
        d = assign(x, centroids)[1]
        for _ in range(K - 1):  # drawn in proportion to d
            total = d.double().cumsum(0)
            i = torch.searchsorted(total, rng.random() * total[-1]).clamp(max=len(x) - 1)
            centroids = torch.cat([centroids, x[i][None]])
            d = torch.minimum(d, assign(x, centroids[-1:])[1])
        inertia = []
        for _ in range(rounds):
            ids, d = assign(x, centroids)
            inertia.append(d.double().sum().item())
            if len(inertia) > 1 and inertia[-2] - inertia[-1] <= 1e-4 * inertia[-1]:
                break
            count = ids.bincount(minlength=K)
            centroids = (
                torch.zeros_like(centroids).index_add(0, ids, x) / count.clamp(min=1)[:, None]
            )
            worst = d.topk(min(len(x), K)).indices.repeat(K)
            centroids[count == 0] = x[worst[: int((count == 0).sum())]]
        runs.append((centroids, inertia))
    return min(runs, key=lambda run: run[1][-1])


@torch.no_grad()
@torch.autocast("cuda", enabled=False)
def fit_units(model, corpus, cfg):
    """Centroids of c (D3) of at most 500 training utterances, every 2nd, 3rd .. frame beyond 50,000."""
    us, frames = corpus.train[:500], []
    every = -(-int((corpus.length[us] // cfg.hop).sum()) // 50_000) or 1
    for u in us:
        frames.append(model.normalised(model(corpus.wave(u)[None].to(cfg.device))[1])[0, ::every])
    model.centroids.copy_(kmeans(torch.cat(frames), cfg.units, cfg.seed)[0])
    model.fitted.fill_(1)
    if dist.is_initialized():
        dist.broadcast(model.centroids, 0)  # ranks may differ in rounding


def train_step(model, optimizers, corpus, step, cfg):
    """CPC for a share of the steps, at their end k-means, then the decoder, with all else frozen."""
    last = max(1, round(cfg.cpc_share * cfg.steps)) - 1
    if step <= last:
        log = cpc_step(model, optimizers["cpc"], corpus, step, cfg)
    if (
        step >= last and not model.fitted
    ):  # a run may also be resumed beyond `last`, with fewer --steps
        fit_units(model, corpus, cfg)
    if step > last:
        log = decoder_step(model, optimizers["decoder"], corpus, step, cfg)
    return log


def of_one_speaker(corpus, utterances, step, cfg):
    """A batch of different `utterances` of one speaker, all of them if they are fewer than batch_size."""
    rng = np.random.default_rng((cfg.seed, step, RANK, 2**31))  # not the numbers of get_batch
    utterances = utterances[corpus.speaker[utterances] == corpus.speaker[rng.choice(utterances)]]
    return rng.permutation(utterances)[: cfg.batch_size]


def cpc_step(model, optimizer, corpus, step, cfg):
    """One step on the mean of Eq. (4) over k."""
    batch = get_batch(corpus, cfg, step)
    if cfg.negatives == "same-speaker":
        batch = get_batch(
            corpus, cfg, step, utterances=of_one_speaker(corpus, corpus.train, step, cfg)
        )
    loss, candidates = info_nce(*model(batch["wave"]), model.predictors, cfg)
    optimizer.zero_grad()
    loss.mean().backward()  # U3
    optimizer.step()
    model.fitted.fill_(0)  # c has moved
    gain = math.log(candidates) - loss.detach()
    return {
        "loss": loss.mean().detach(),
        "nats": gain.mean(),
        **{f"nats_{k}": value for k, value in enumerate(gain, 1)},
    }


def decoder_step(model, optimizer, corpus, step, cfg):
    """One step of the decoder on the L1 of log-mel spectra; everything else is frozen."""
    batch = get_batch(corpus, cfg, step)
    with torch.no_grad():
        units, f0 = model.units(batch["wave"]), model.f0(batch["wave"], batch["speaker"])
    loss = F.l1_loss(
        model.decoder(units, f0, batch["speaker"]).float(), model.features(batch["wave"])
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"decoder_loss": loss.detach()}


# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> z (T', C); c (T', D); units (T',), integers."""
    z, c = model(wave[None])
    units = assign(model.normalised(c), model.centroids)[0]
    return {"z": z[0], "c": c[0], "units": units[0]}


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,) of any speakers, each with the index of a training speaker -> waves (N,): the source's units
    and F0 in that voice. None resynthesises, with the training speaker who comes closest to the source."""
    waves = []
    for wave, target in zip(sources, targets):
        units, f0 = model.units(wave[None]), model.f0(wave[None])
        speakers = torch.arange(model.n_speakers, device=wave.device)[:, None]
        if target is None:
            mel = model.features(wave[None])
            target = torch.stack(
                [F.l1_loss(model.decoder(units, f0, s), mel) for s in speakers]
            ).argmin()
        waves.append(model.vocode(model.decoder(units, f0, speakers[target]), len(wave))[0])
    return waves


def f0_errors(f0, truth):
    """(T,) each, Hz, 0 unvoiced -> which frames are wrong in voicing (VDE); in that or by over 20 % (FFE)."""
    voicing = (f0 > 0) != (truth > 0)
    return voicing, voicing | ((f0 - truth).abs() > 0.2 * truth)


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
    """Writes units.txt, the units of held-out utterances, and three of these resynthesised by their own
    speaker, also with F0 flattened to the speaker's mean. Returns, of held-out speech: how far InfoNCE is
    below log N; units in use, their perplexity and bits a second; errors of F0."""
    write_examples(model, corpus, cfg, out)
    held, nats, log_n, errors = corpus.held[:200], [], [], defaultdict(list)
    ids = [model.units(corpus.wave(u)[None].to(cfg.device))[0] for u in held]
    lines = [
        f"{corpus.paths[u].stem} {' '.join(map(str, k.tolist()))}\n" for u, k in zip(held, ids)
    ]
    (out / "units.txt").write_text("".join(lines), errors="replace")
    for i in range(8):
        chosen = np.roll(corpus.held, -i * cfg.batch_size)[: cfg.batch_size]
        if cfg.negatives == "same-speaker":
            chosen = of_one_speaker(corpus, corpus.held, i, cfg)
        batch = get_batch(corpus, cfg, i, draw=1000, utterances=chosen)
        loss, candidates = info_nce(*model(batch["wave"]), model.predictors, cfg)
        log_n.append(math.log(candidates))
        nats.append(log_n[-1] - loss)
    for i, u in enumerate(corpus.held[corpus.speaker[corpus.held] < model.n_speakers][:24]):
        wave = corpus.wave(u)[None, : 3 * cfg.sample_rate].to(cfg.device)
        s = torch.tensor([corpus.speaker[u]], device=cfg.device)
        units, f0 = model.units(wave), model.f0(wave, s)
        mels = {
            "copy": model.features(wave),
            "resynthesis": model.decoder(units, f0, s),
            "flat_f0": model.decoder(units, (f0 > 0) * (cfg.f0_tokens // 2), s),
        }
        for name, mel in mels.items():
            rebuilt = model.vocode(mel, wave.shape[1])
            errors[name].append(torch.stack(f0_errors(yin(rebuilt, cfg)[0], yin(wave, cfg)[0])))
            if i < 3:
                write_audio(out / f"resynthesis_{i}_{name}.wav", rebuilt[0], cfg.sample_rate)
    every, nats = torch.cat(ids), torch.stack(nats).mean(0).tolist()
    share = every.unique(return_counts=True)[1] / len(every)  # of frames, of each unit in use
    perplexity = torch.special.entr(share).sum().exp().item()
    rate = len(every) / (corpus.length[held].sum() / cfg.sample_rate)  # units a second
    return {
        "nats": sum(nats) / len(nats),
        "log_n": sum(log_n) / len(log_n),
        "nats_by_step": {f"{k}": g for k, g in enumerate(nats, 1)},
        "units_used": len(share),
        "perplexity": perplexity,
        "bits_per_second": rate * math.log2(perplexity),
        "vde": {
            name: torch.cat(parts, 1)[0].float().mean().item() for name, parts in errors.items()
        },
        "ffe": {
            name: torch.cat(parts, 1)[1].float().mean().item() for name, parts in errors.items()
        },
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
