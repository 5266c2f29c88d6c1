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

The log shows nats_k = log N - L_k: 0 is chance; z_{t+1} and z_{t+2} share samples with c_t. In result.json
metrics.nats are of held-out speech; vde: share of frames of wrong voicing, ffe: of these and where F0 is off
by over 20 %, for Griffin-Lim copies, for the speaker's own resynthesis, and for it with flat_f0, which shows
what units say of F0. The paper reads speakers per frame, here they are read per utterance.

    python cpc.py                                       a toy corpus, two minutes on two CPU cores
    python cpc.py --data DIR --negatives same-speaker   any folder of audio, the paper's size, for a GPU
    python cpc.py convert --checkpoint runs/a --source a.wav --target SPEAKER --output c.wav

Measured on CPU threads, not on a GPU, at TOY's size. Toy corpus, seeds 0, 1, 2 (TOY was chosen on 0 and 1):
phones are read from c in 89, 88, 88 % of frames (untrained 48, 44, 46, log-mel 91), the speaker from c in
68, 67, 77 %, from units in 27, 27, 26 % (untrained 62, 55, 59); 92, 96, 92 % of conversions are heard as the
target, none as the source. Negative: on real speech training brings the speaker INTO c (words 52 to 63,
digits 90 to 100, LibriSpeech 15 to 29 %) and units; on LibriSpeech 4 % of conversions are heard as the
target; voicing is wrong in 17 to 30 % of frames.
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
    n_fft: int = 1024            # points of the Fourier transform
    win: int = 640               # samples in an analysis window
    hop: int = 160               # samples between frames
    n_mels: int = 80             # mel bands
    crop: int = 20480            # samples in a training example
    batch_size: int = 8          # training examples in a batch, on each GPU
    steps: int = 700_000         # training steps
    lr: float = 2e-4             # learning rate of Adam
    seed: int = 0                # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True            # bfloat16 autocast on CUDA
    probe: int = 1500            # utterances at most to fit the probes on, and to score them on
    log_every: int = 100         # steps between log lines
    save_every: int = 5000       # steps between checkpoints

    cpc_share: float = 0.43      # of the steps are for CPC, the rest for the decoder
    channels: int = 512          # C, of the encoder: size of z
    d_context: int = 256         # D, of the GRU: size of c
    norm: Literal["channel", "none"] = "channel"  # after each convolution; none: the paper
    prediction_steps: int = 12   # K, frames ahead that are predicted
    negatives: Literal["batch", "same-speaker", "sequence", "other-sequences"] = "batch"  # who they are
    score_scale: float = 0.044   # factor on the score z W c, here 1 / sqrt(512); 1: the paper
    units: int = 100             # clusters of k-means
    normalise: bool = False      # c to mean 0 and deviation 1 over the utterance before k-means
    f0_tokens: int = 20          # 0: unvoiced; the others: bins of the speaker's normalised log F0
    d_embedding: int = 128       # E, of each of unit, F0 token and speaker
    hidden: int = 256            # H, channels of the decoder
    blocks: int = 6              # residual blocks of the decoder

# The same model, narrower, at 8 kHz with a convolution less, for two CPU cores and two minutes.
TOY = dict(sample_rate=8000, n_fft=512, win=320, hop=80, crop=10240, steps=1300, lr=2e-3, log_every=50,
           save_every=500, cpc_share=0.7, channels=64, d_context=64, negatives="sequence", score_scale=0.125,
           units=25, hidden=128)
TARGET = "speaker"               # what convert takes: the index of a training speaker
STRIDES = (5, 4, 2, 2, 2)        # of the encoder; a layer for each, as many as make up cfg.hop

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
        if cfg.hop not in hops:
            raise UserError(f"--hop {cfg.hop}: no product of strides; choose from {hops}")
        for stride in STRIDES[:hops.index(cfg.hop) + 1]:                     # U2: the padding
            layers += [nn.Conv1d(C if layers else 1, C, 2 * stride, stride, padding=(stride + 1) // 2),
                       Norm(C), nn.ReLU()]
        super().__init__(*layers)
        self.hop = cfg.hop

    def forward(self, wave):
        samples = max(1, wave.shape[1] // self.hop) * self.hop               # else T is not always N // hop
        return super().forward(F.pad(wave, (0, samples - wave.shape[1]))[:, None]).mT    # cut, or padded

class Decoder(nn.Module):
    """units (B, T), F0 tokens (B, T), speaker (B,) -> log-mel (B, T, M), standardised. Their embeddings side
    by side, as Polyak et al. have it; then residual blocks of dilated convolutions (D5)."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        e, h = cfg.d_embedding, cfg.hidden
        self.unit, self.f0 = nn.Embedding(cfg.units, e), nn.Embedding(cfg.f0_tokens, e)
        self.speaker = nn.Embedding(n_speakers, e)
        self.enter = nn.Conv1d(3 * e, h, 5, padding=2)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.ReLU(), nn.Conv1d(h, h, 5, padding=2 * 2 ** (i % 3), dilation=2 ** (i % 3)),
            nn.ReLU(), nn.Conv1d(h, h, 1)) for i in range(cfg.blocks))
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
        if (frames := cfg.crop // cfg.hop) < cfg.prediction_steps + 2:
            raise UserError(f"--crop {cfg.crop}: {frames} frames leave no two with a future of "
                            f"{cfg.prediction_steps}; raise it or lower --prediction-steps")
        if cfg.cpc_share > 1:
            raise UserError(f"--cpc-share {cfg.cpc_share}: is a share of the steps; give 1 at most")
        if cfg.negatives == "other-sequences" and cfg.batch_size == 1:
            raise UserError("--batch-size 1: has no other sequences; raise it or choose other --negatives")
        self.register_buffer("mean", torch.zeros(cfg.n_mels))
        self.register_buffer("std", torch.ones(cfg.n_mels))
        self.register_buffer("f0_mean", torch.zeros(n_speakers))
        self.register_buffer("f0_std", torch.ones(n_speakers))
        self.encoder = Encoder(cfg)
        self.context = nn.GRU(cfg.channels, cfg.d_context, batch_first=True)     # g_ar; U4: from zeros
        self.predictors = nn.Linear(cfg.d_context, cfg.prediction_steps * cfg.channels, bias=False)  # W_k
        self.decoder = Decoder(cfg, n_speakers)
        self.register_buffer("centroids", torch.zeros(cfg.units, cfg.d_context))
        self.register_buffer("fitted", torch.zeros(()))                     # 1 where they are those of this c

    def forward(self, wave):
        """(B, N) -> z (B, T, C), c (B, T, D), float32; c_t knows of z_1 .. z_t only."""
        z = self.encoder(wave).float()
        with torch.autocast(wave.device.type, enabled=False):
            return z, self.context(z)[0]

    @torch.autocast("cuda", enabled=False)                                   # as in convert: float32
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
        f0 = yin(wave, self.cfg)[:, :max(1, wave.shape[1] // self.cfg.hop)]      # (B, T) Hz
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
        x = F.pad(x.mT, (0, 2), mode="replicate").mT                         # two frames more, for N samples
        mel = (x * self.std + self.mean).exp()
        return griffin_lim(mel_to_magnitude(mel, self.cfg), self.cfg)[:, :samples]

def yin(wave, cfg):
    """(B, N) -> F0 (B, T) in Hz, 0 where unvoiced; T = 1 + N // hop, frame t centred on sample t * hop.
    YIN (de Cheveigne & Kawahara, JASA 2002), 50 to 400 Hz: the first minimum of d' below 0.2, if any."""
    W, low = math.ceil(cfg.sample_rate / 50), cfg.sample_rate // 400
    middle = 2 * W // 3              # of what is compared, x[:W] and x[tau:tau + W], where F0 is 150 Hz
    x = F.pad(wave.double(), (middle, 2 * W - middle)).unfold(1, 2 * W, cfg.hop)     # (B, T, 2 W)
    energy = F.pad(x.square().cumsum(-1), (1, 0))
    energy = energy[..., W:] - energy[..., :W + 1]                           # of x[tau:tau + W], tau = 0 .. W
    spectrum, start = torch.fft.rfft(x), torch.fft.rfft(x[..., :W], 2 * W)
    product = torch.fft.irfft(start.conj() * spectrum, 2 * W)[..., :W + 1]   # sum of x[j] x[j + tau], j < W
    d = (energy[..., :1] + energy - 2 * product)[..., 1:].clamp(min=0)      # sum of (x[j] - x[j + tau]) ** 2
    tau = torch.arange(1, W + 1, device=x.device)
    d = d * tau / d.cumsum(-1).clamp(min=1e-12)                              # d', over the mean so far
    before, here, after = d[..., :-2], d[..., 1:-1], d[..., 2:]              # tau = 1 .., 2 .., 3 ..
    dip = (here < before) & (here <= after) & (here < 0.2) & (tau[1:-1] >= low)
    dip &= x.var(-1, keepdim=True) > 1e-6                                    # -60 dB of full scale
    at = dip.int().argmax(-1, keepdim=True)                                  # the first, not the deepest
    before, here, after = (y.gather(-1, at) for y in (before, here, after))
    period = at + 2 + (before - after) / 2 / (before - 2 * here + after).clamp(min=1e-12)    # by a parabola
    f0 = (cfg.sample_rate / period * dip.any(-1, keepdim=True)).squeeze(-1)
    return F.pad(f0, (2, 2)).unfold(1, 5, 1).median(-1)[0].float()           # one or two alone are errors

# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of mel bands and of speakers' log F0, from at most 25
    utterances of each, and units of the untrained c (those that count are fitted when CPC is done)."""
    mels, pitch = [], collections.defaultdict(list)
    for u in corpus.train:
        if len(pitch[s := corpus.speaker[u]]) < 25:
            wave = corpus.wave(u)[None].to(cfg.device)
            mel, f0 = log_mel(wave, cfg)[0], yin(wave, cfg)[0]
            mels.append(torch.stack([mel.mean(0), mel.square().mean(0)]))
            pitch[s].append(f0[f0 > 0].log())
    mean, square = torch.stack(mels).double().mean(0)
    model.mean.copy_(mean)
    model.std.copy_((square - mean ** 2).clamp(min=1e-4).sqrt())
    every = torch.cat([torch.tensor([4.6, 5.1], device=cfg.device), *itertools.chain(*pitch.values())])
    for s in range(model.n_speakers):
        x = torch.cat([every[:0], *pitch[s]])
        x = x if len(x) > 1 else every                  # never voiced: as all are, at worst 99 to 164 Hz
        model.f0_mean[s], model.f0_std[s] = x.mean(), x.std().clamp(min=0.02)
    fit_units(model, corpus, cfg)

def make_optimizers(model, cfg):
    """One for CPC; and one, as in HiFi-GAN, for the decoder."""
    cpc = nn.ModuleList([model.encoder, model.context, model.predictors])
    return {"cpc": torch.optim.Adam(cpc.parameters(), cfg.lr, fused=True),
            "decoder": torch.optim.AdamW(model.decoder.parameters(), cfg.lr, (0.8, 0.99), fused=True)}

@torch.autocast("cuda", enabled=False)                                       # scores have no bound: float32
def info_nce(z, c, predictors, cfg):
    """z (B, T, C), c (B, T, D) -> Eq. (4) for k = 1 .. K, (K,) in nats, and N, the number of candidates: one
    is z_{t + k}, k frames after c_t, the others stand k frames after the other contexts (U1)."""
    B, T, C = z.shape
    K, S = cfg.prediction_steps, T - cfg.prediction_steps                    # S contexts have all K futures
    losses, groups = [], B if cfg.negatives == "sequence" else 1
    prediction = predictors(c[:, :S]).unflatten(2, (K, C)) * cfg.score_scale     # D2: W_k c_t (B, S, K, C)
    for k in range(1, K + 1):                                                # k = 1 is the next frame
        w, future = (x.reshape(groups, -1, C) for x in (prediction[:, :, k - 1], z[:, k:k + S]))
        score = w @ future.mT                                                # z_j W_k c_i: row i, column j
        if cfg.negatives == "other-sequences":
            own = torch.kron(torch.eye(B, device=z.device), 1 - torch.eye(S, device=z.device)).bool()
            score = score.masked_fill(own, -math.inf)                        # the positive stays a candidate
        losses.append((score.logsumexp(-1) - score.diagonal(dim1=1, dim2=2)).mean())
    return torch.stack(losses), S * B // groups - (S - 1) * (cfg.negatives == "other-sequences")

def assign(x, centroids):
    """(.., D) -> index of the nearest of (K, D), and the square of its distance, (..) each."""
    d, ids = (x.square().sum(-1, keepdim=True) - 2 * x @ centroids.T + centroids.square().sum(-1)).min(-1)
    return ids, d.clamp(min=0)

def kmeans(x, K, seed, starts=5, rounds=100):
    """x (n, D) -> centroids (K, D), and the sum of squares in each round of Lloyd's algorithm, from the best
    of some starts by k-means++ (Arthur & Vassilvitskii, SODA 2007). A cluster that has lost all its members
    moves to the point that is worst off."""
    rng, runs = np.random.default_rng(seed), []
    for _ in range(starts):
        centroids = x[rng.integers(len(x))][None]
        d = assign(x, centroids)[1]
        for _ in range(K - 1):                                               # drawn in proportion to d
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
            centroids = torch.zeros_like(centroids).index_add(0, ids, x) / count.clamp(min=1)[:, None]
            worst = d.topk(min(len(x), K)).indices.repeat(K)
            centroids[count == 0] = x[worst[:int((count == 0).sum())]]
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
        dist.broadcast(model.centroids, 0)                                   # ranks may differ in rounding

def train_step(model, optimizers, corpus, step, cfg):
    """CPC for a share of the steps, at their end k-means, then the decoder, with all else frozen."""
    last = max(1, round(cfg.cpc_share * cfg.steps)) - 1
    if step <= last:
        log = cpc_step(model, optimizers["cpc"], corpus, step, cfg)
    if step >= last and not model.fitted:    # a run may also be resumed beyond `last`, with fewer --steps
        fit_units(model, corpus, cfg)
    if step > last:
        log = decoder_step(model, optimizers["decoder"], corpus, step, cfg)
    return log

def of_one_speaker(corpus, utterances, step, cfg):
    """A batch of different `utterances` of one speaker, all of them if they are fewer than batch_size."""
    rng = np.random.default_rng((cfg.seed, step, RANK, 2 ** 31))             # not the numbers of get_batch
    utterances = utterances[corpus.speaker[utterances] == corpus.speaker[rng.choice(utterances)]]
    return rng.permutation(utterances)[:cfg.batch_size]

def cpc_step(model, optimizer, corpus, step, cfg):
    """One step on the mean of Eq. (4) over k."""
    batch = get_batch(corpus, cfg, step)
    if cfg.negatives == "same-speaker":
        batch = get_batch(corpus, cfg, step, utterances=of_one_speaker(corpus, corpus.train, step, cfg))
    loss, candidates = info_nce(*model(batch["wave"]), model.predictors, cfg)
    optimizer.zero_grad()
    loss.mean().backward()                                                   # U3
    optimizer.step()
    model.fitted.fill_(0)                                                    # c has moved
    gain = math.log(candidates) - loss.detach()
    return {"loss": loss.mean().detach(), "nats": gain.mean(),
            **{f"nats_{k}": value for k, value in enumerate(gain, 1)}}

def decoder_step(model, optimizer, corpus, step, cfg):
    batch = get_batch(corpus, cfg, step)
    with torch.no_grad():
        units, f0 = model.units(batch["wave"]), model.f0(batch["wave"], batch["speaker"])
    loss = F.l1_loss(model.decoder(units, f0, batch["speaker"]).float(), model.features(batch["wave"]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"decoder_loss": loss.detach()}

# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> z (T', C); c (T', D); units (T', cfg.units), one-hot."""
    z, c = model(wave[None])
    units = assign(model.normalised(c), model.centroids)[0]
    return {"z": z[0], "c": c[0], "units": F.one_hot(units[0], cfg.units).float()}

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
            target = torch.stack([F.l1_loss(model.decoder(units, f0, s), mel) for s in speakers]).argmin()
        waves.append(model.vocode(model.decoder(units, f0, speakers[target]), len(wave))[0])
    return waves

def f0_errors(f0, truth):
    """(T,) each, Hz, 0 unvoiced -> which frames are wrong in voicing (VDE); in that or by over 20 % (FFE)."""
    voicing = (f0 > 0) != (truth > 0)
    return voicing, voicing | ((f0 - truth).abs() > 0.2 * truth)

@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes units.txt, the units of held-out utterances, and three of these resynthesised by their own
    speaker, also with F0 flattened to the speaker's mean. Returns, of held-out speech: how far InfoNCE is
    below log N; units in use, their perplexity and bits a second; errors of F0."""
    held, nats, log_n, errors = corpus.held[:cfg.probe], [], [], collections.defaultdict(list)
    ids = [model.units(corpus.wave(u)[None].to(cfg.device))[0] for u in held]
    (out / "units.txt").write_text("".join(f"{corpus.paths[u].stem} {' '.join(map(str, k.tolist()))}\n"
                                           for u, k in zip(held, ids)))
    for i in range(8):
        chosen = np.roll(corpus.held, -i * cfg.batch_size)[:cfg.batch_size]
        if cfg.negatives == "same-speaker":
            chosen = of_one_speaker(corpus, corpus.held, i, cfg)
        batch = get_batch(corpus, cfg, i, draw=1000, utterances=chosen)
        loss, candidates = info_nce(*model(batch["wave"]), model.predictors, cfg)
        log_n.append(math.log(candidates))
        nats.append(log_n[-1] - loss)
    for i, u in enumerate(corpus.held[corpus.speaker[corpus.held] < model.n_speakers][:24]):
        wave = corpus.wave(u)[None, :3 * cfg.sample_rate].to(cfg.device)
        s = torch.tensor([corpus.speaker[u]], device=cfg.device)
        units, f0 = model.units(wave), model.f0(wave, s)
        mels = {"copy": model.features(wave), "resynthesis": model.decoder(units, f0, s),
                "flat_f0": model.decoder(units, (f0 > 0) * (cfg.f0_tokens // 2), s)}
        for name, mel in mels.items():
            rebuilt = model.vocode(mel, wave.shape[1])
            errors[name].append(torch.stack(f0_errors(yin(rebuilt, cfg)[0], yin(wave, cfg)[0])))
            if i < 3:
                write_audio(out / f"resynthesis_{i}_{name}.wav", rebuilt[0], cfg.sample_rate)
    every, nats = torch.cat(ids), torch.stack(nats).mean(0).tolist()
    share = every.unique(return_counts=True)[1] / len(every)                 # of frames, of each unit in use
    perplexity = torch.special.entr(share).sum().exp().item()
    rate = len(every) / (corpus.length[held].sum() / cfg.sample_rate)        # units a second
    return {"nats": sum(nats) / len(nats), "log_n": sum(log_n) / len(log_n),
            "nats_by_step": {f"{k}": g for k, g in enumerate(nats, 1)}, "units_used": len(share),
            "perplexity": perplexity, "bits_per_second": rate * math.log2(perplexity),
            "vde": {name: torch.cat(parts, 1)[0].float().mean().item() for name, parts in errors.items()},
            "ffe": {name: torch.cat(parts, 1)[1].float().mean().item() for name, parts in errors.items()}}

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
