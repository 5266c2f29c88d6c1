# SPDX-License-Identifier: MIT
"""DIM: Deep InfoMax. Learns an utterance vector of speech with critics in place of a decoder.

Paper    Hjelm et al. Learning Deep Representations by Mutual Information Estimation and
         Maximization. ICLR 2019, arXiv:1808.06670, read as submitted to ICLR, without appendix.
         --pair cross is after Ravanelli, Bengio. Learning Speaker Representations with Mutual
         Information. Interspeech 2019, arXiv:1812.00271, known from abstract and notes (D6).

Idea     A representation is good if it tells which input it came from. The encoder turns a crop of
         speech into a map of local cells, and the map into one global vector y. A critic gets y
         and a cell and scores whether both are of the same crop. Encoder and critic are trained
         together, on one loss, which raises a lower bound on (a function of) the mutual
         information of the two. What the critic sees decides what y keeps. DIM(G) shows it the
         whole map, DIM(L) one cell at a time, which favors what all cells share: the speaker and
         the channel rather than the phones. Another critic, the only adversarial part, pushes the
         distribution of sigmoid(y) to a uniform prior. (CPC instead predicts the frame k later.)

Model    wave (B, N) -> log-mel spectrogram, each band standardized           x  (B, T, F)
         3 convolutions over time: the local map, T' = T/4                    c  (B, T', W)
         2 convolutions, mean and deviation over time, 2 dense layers         y  (B, S)
         critic: y_i with cell t of c_j, for all i and j of the batch         u  (B, B, T')

Loss     The bounds compare u+, the scores with i = j, to u-, those with i != j:
         jsd   2 log 2 - mean softplus(-u+) - mean softplus(u-)                     Eq. (4)
         dv    mean u+ - log mean exp(u-)                                           Eq. (2)
         nce   log K + mean[u+ - log(exp(u+) + sum of exp(u-) of the same y_i)]     Eq. (5)
         The constants 2 log 2 and log K, which the paper leaves out, make 0 the bound of a critic
         that knows nothing. jsd is at most 2 log 2 and does not estimate the mutual information;
         nce is at most log K, with K = 1 + (B - 1) T' candidates. Encoder and critics minimize
           L = - alpha bound(global) - beta bound(local) + gamma mean softplus(-D(q)),     Eq. (8)
         q = sigmoid(y). The prior's critic D minimizes, Eq. (7) and D7, with v uniform in [0, 1]^S,
           mean softplus(-D(v)) + mean softplus(D(q)) + penalty mean |gradient of D|^2.
         alpha, beta, gamma: DIM(L) 0, 1, 0.1 (default), DIM(G) 1, 0, 1, DIM(L+G) 0.5, 0.1, 0.1 (U1)

Symbols  C_psi(x)   model.encoder(x)[0]: c       I_hat(x, y)   bound(u, cfg.objective)
         E_psi(x)   model.encoder(x)[1]: y       D_phi         model.prior             (B, 1)
         T_omega    model.critics["local"]       (B, B, T'),   model.critics["global"] (B, B, 1)
         B crops, N samples, T frames, F mel bands, W channels of the map, S elements of y

Differs from the paper
D1  Speech replaces images: the encoder convolves over time, and a cell sees 14 frames. Most sizes
    are ours (U = 1024 in the dot critic, 2048 in the authors' code, whose batch and rate we use).
D2  The score of the dot critic is divided by sqrt(U). In the authors' code it is not, and by
    default the branch of y has no layer norm.
D3  y is pooled over time, so that an utterance may have any length. The paper flattens the map.
D4  For DIM(G) the critic gets the map pooled over time. The paper's gets the flattened map.
D5  In dv and nce a mask leaves out the cells with i = j. The authors' code uses a constant of 10.
D6  --pair cross is not DIM: y and the cells are of two crops of one utterance. Ravanelli and Bengio
    pair two local vectors, and minimize the binary cross-entropy, which is jsd up to constants.
D7  The encoder's prior loss and the gradient penalty are those of the authors' code. In Eq. (7)
    the encoder minimizes mean log(1 - sigmoid(D(q))), which is flat where the critic is sure.
D8  The paper measures y by MINE between the whole input and y, by the dependence of its elements,
    and by the MS-SSIM of a decoder. Here there is only a decoder of the frozen y, to listen to.
Not specified in the paper
U1  The gamma of DIM(L+G): here 0.1, as in DIM(L).
U2  Whether two utterances of one speaker are negatives of each other: here they are.

Usage    python dim.py                               toy corpus, under a minute on two CPU cores
         python dim.py --data DIR --test DIR2        any folder of audio, full size, for a GPU
         python dim.py convert --checkpoint RUN --source a.wav --output b.wav
         `convert` decodes y: one hears what y keeps. At a decoder_loss of 1 it keeps nothing.
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
    crop: int = 20480  # samples in a training example
    batch_size: int = 64  # training examples in a batch, on each GPU
    steps: int = 800_000  # training steps
    lr: float = 1e-4  # learning rate of Adam
    seed: int = 0  # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True  # bfloat16 autocast on CUDA
    log_every: int = 100  # steps between log lines
    save_every: int = 5000  # steps between checkpoints

    objective: Literal["jsd", "dv", "nce"] = "jsd"  # the bound that encoder and critics raise
    pair: Literal["same", "cross"] = "same"  # y and cells: of one crop (DIM), or of two (D6)
    critic: Literal["dot", "concat"] = "dot"  # encode-and-dot, or concatenate-and-convolve
    alpha: float = 0.0  # weight of the global bound; DIM(G): 1, DIM(L+G): 0.5
    beta: float = 1.0  # weight of the local bound; DIM(G): 0, DIM(L+G): 0.1
    gamma: float = 0.1  # weight of the prior, 0 for none; DIM(G): 1, DIM(L+G): see U1
    penalty: float = 1.0  # weight of the gradient penalty of the prior's critic
    infomax_share: float = 0.98  # share of the steps for the encoder; the decoder has the rest
    channels: int = 256  # W, of the local map
    d_global: int = 64  # S, size of the global vector
    hidden: int = 1024  # units of the dense layer before the global vector
    units: int = 1024  # U, of the dot critic
    concat_units: int = 512  # units of the concat critic
    decoder_channels: int = 128  # of the decoder

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
        if self.batch_size < 2 or self.crop < 8 * self.hop or not self.alpha + self.beta:
            raise UserError(
                "DIM needs --batch-size >= 2, --crop >= 8 hops, and --alpha or --beta above 0"
            )


# The same model, narrower, at 8 kHz, for two CPU cores and one minute.
TOY = dict(
    sample_rate=8000,
    n_fft=256,
    win=200,
    hop=80,
    n_mels=40,
    crop=6400,
    batch_size=32,
    steps=1400,
    lr=1e-3,
    save_every=500,
    infomax_share=0.3,
    channels=32,
    hidden=256,
    units=128,
    concat_units=64,
    decoder_channels=64,
)
TARGET = ""  # convert takes no target: there is one vector for an utterance, and only it is decoded


# ---------- model ----------
def pool(h):
    """h (B, T, C) -> mean and standard deviation over time (B, 2 C), which drop the order (D3)."""
    h = h.float()  # also under autocast
    variance = h.var(1, correction=0) + 1e-5
    return torch.cat([h.mean(1), variance.sqrt()], 1)


def conv(c_in, c_out, kernel, stride=1):
    """(B, c_in, T) -> (B, c_out, T / stride): convolution over time, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv1d(c_in, c_out, kernel, stride, padding=(kernel - 1) // 2, bias=False),
        nn.BatchNorm1d(c_out),
        nn.ReLU(),
    )


class Encoder(nn.Module):
    """x (B, T, F) -> local map c (B, T', W) and global vector y (B, S)."""

    def __init__(self, cfg):
        super().__init__()
        W = cfg.channels
        # D1: a cell sees 5 + 3 + 2 * 3 = 14 frames, and there is one every 4 frames.
        self.local = nn.Sequential(
            conv(cfg.n_mels, W, 5), conv(W, W, 4, stride=2), conv(W, W, 4, stride=2)
        )
        self.rest = nn.Sequential(conv(W, 2 * W, 3), conv(2 * W, 2 * W, 3, stride=2))
        self.dense = nn.Sequential(
            nn.Linear(4 * W, cfg.hidden, bias=False),
            nn.BatchNorm1d(cfg.hidden),
            nn.ReLU(),
            nn.Linear(cfg.hidden, cfg.d_global),
        )

    def forward(self, x):
        if x.shape[1] < 4:  # repeated, so that there is one cell
            x = x.repeat(1, 4, 1)[:, :4]
        c = self.local(x.mT)  # (B, W, T')
        y = self.dense(pool(self.rest(c).mT))
        return c.mT, y.float()


class Branch(nn.Module):
    """One side of the dot critic: (.., d) -> (.., U). A hidden layer beside a linear shortcut,
    which starts near the identity, then layer norm."""

    def __init__(self, d, U):
        super().__init__()
        self.enter = nn.Linear(d, U, bias=False)
        self.norm = nn.BatchNorm1d(U)
        self.leave = nn.Linear(U, U)
        self.shortcut = nn.Linear(d, U, bias=False)
        self.layer_norm = nn.LayerNorm(U)
        self.shortcut.weight.data.uniform_(-0.01, 0.01).fill_diagonal_(1)

    def forward(self, x):
        h = self.enter(x)
        h = self.norm(h.flatten(0, -2)).view_as(h).relu()
        return self.layer_norm(self.leave(h) + self.shortcut(x))


class DotCritic(nn.Module):
    """Encode-and-dot: cells (B, T, d), vectors (B, S) -> u (B, B, T), u[i, j, t] of vector i with
    cell t of j."""

    def __init__(self, d, S, U):
        super().__init__()
        self.cell = Branch(d, U)
        self.vector = Branch(S, U)

    @torch.autocast("cuda", enabled=False)  # scores in float32
    def forward(self, c, y):
        c = self.cell(c.float())
        y = self.vector(y)
        return torch.einsum("iu,jtu->ijt", y, c) / c.shape[-1] ** 0.5  # D2


class ConcatCritic(nn.Module):
    """Concatenate-and-convolve: cells (B, T, d), vectors (B, S) -> u (B, B, T), as DotCritic. Two
    hidden layers. The first is a sum, of which each part is computed once and not for each pair."""

    def __init__(self, d, S, hidden):
        super().__init__()
        self.cell = nn.Linear(d, hidden)
        self.vector = nn.Linear(S, hidden, bias=False)
        self.rest = nn.Sequential(
            nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    @torch.autocast("cuda", enabled=False)
    def forward(self, c, y):
        h = self.cell(c.float()) + self.vector(y)[:, None, None]  # (B, B, T, hidden)
        return self.rest(h)[..., 0]


def prior_critic(S):
    """q (B, S) -> (B, 1): high for draws of the prior."""
    return nn.Sequential(
        nn.Linear(S, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1)
    )


class Decoder(nn.Module):
    """y (B, S) -> x_hat (B, T, F), with the T frames of a crop. It lets us hear what y keeps (D8).
    No gradient of it reaches the encoder."""

    def __init__(self, cfg):
        super().__init__()
        self.frames = cfg.crop // cfg.hop
        C = cfg.decoder_channels
        eighth = ceil(self.frames / 8)
        self.net = nn.Sequential(
            nn.BatchNorm1d(cfg.d_global, affine=False),
            nn.Linear(cfg.d_global, C * eighth),
            nn.ReLU(),
            nn.Unflatten(1, (C, eighth)),
            nn.ConvTranspose1d(C, C, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose1d(C, C, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose1d(C, cfg.n_mels, 4, stride=2, padding=1),
        )

    def forward(self, y):
        return self.net(y).mT[:, : self.frames]


class Model(nn.Module):
    """Encoder, critics and decoder, and the mean and deviation of each mel band. n_speakers is not
    used: the method needs no labels."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("mean", torch.zeros(cfg.n_mels))
        self.register_buffer("std", torch.ones(cfg.n_mels))
        self.encoder = Encoder(cfg)
        self.critics = nn.ModuleDict()
        if cfg.beta:
            self.critics["local"] = make_critic(cfg, cfg.channels)
        if cfg.alpha:
            self.critics["global"] = make_critic(cfg, 2 * cfg.channels)  # D4: mean and deviation
        self.prior = prior_critic(cfg.d_global)
        self.decoder = Decoder(cfg)

    def features(self, wave):
        """(B, N) -> x (B, T, F), T = 1 + N // hop: log-mel, each band standardized over the corpus.
        Statistics of the utterance itself would remove much of the speaker."""
        return (log_mel(wave, self.cfg) - self.mean) / self.std

    def crops(self, wave):
        """(B, crop) -> x (B, T, F), T = crop // hop."""
        return self.features(wave)[:, : self.cfg.crop // self.cfg.hop]

    def vocode(self, x, samples):
        """x (B, T, F) -> wave (B, samples): approximately inverts `features`, with phases from
        Griffin-Lim."""
        # T frames make hop * (T - 1) samples, so one more frame is needed.
        x = torch.cat([x, x[:, -1:]], 1)
        mel = (x * self.std + self.mean).exp()
        return griffin_lim(mel_to_magnitude(mel, self.cfg), self.cfg)[:, :samples]


def make_critic(cfg, d):
    """The critic of --critic, for cells (B, T, d) or, with T = 1, whole maps."""
    if cfg.critic == "dot":
        return DotCritic(d, cfg.d_global, cfg.units)
    return ConcatCritic(d, cfg.d_global, cfg.concat_units)


# ---------- loss and training step ----------
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Sets mean and deviation of every mel band from at most 5,000 training utterances."""
    frames, total, squares = 0, 0, 0
    for u in corpus.train[:5000]:
        x = log_mel(corpus.wave(u)[None].to(cfg.device), cfg)[0].double()  # (T, F)
        frames += len(x)
        total += x.sum(0)
        squares += x.square().sum(0)

    mean = total / frames
    variance = squares / frames - mean.square()
    model.mean.copy_(mean)
    model.std.copy_(variance.clamp(min=0.1**2).sqrt())


def make_optimizers(model, cfg):
    """One Adam for encoder and critics, which cooperate, one for the prior's critic, which plays
    against the encoder, and one for the decoder."""
    trained = {
        "encoder": [*model.encoder.parameters(), *model.critics.parameters()],
        "prior": model.prior.parameters(),
        "decoder": model.decoder.parameters(),
    }
    return {name: torch.optim.Adam(p, cfg.lr, fused=True) for name, p in trained.items()}


def bound(u, objective):
    """The bound of --objective, which is to be raised, from scores u (B, B, T') of vector i with
    cell t of crop j."""
    B, _, T = u.shape
    matching = u.diagonal(dim1=0, dim2=1).T  # (B, T')
    # D5: a masked score is -inf, and adds 0 to every sum. U2: nothing but i = j is masked.
    own = torch.eye(B, dtype=torch.bool, device=u.device)[..., None]
    others = u.masked_fill(own, -math.inf)
    n_others = B * (B - 1) * T

    if objective == "jsd":  # Eq. (4)
        negative = F.softplus(others).sum() / n_others
        return 2 * math.log(2) - F.softplus(-matching).mean() - negative

    if objective == "dv":  # Eq. (2): one logarithm of one mean over the batch
        return matching.mean() - (others.flatten().logsumexp(0) - math.log(n_others))

    # Eq. (5): the K candidates for cell t are itself and all cells of the other crops.
    log_k = math.log(1 + (B - 1) * T)
    log_sum = others.flatten(1).logsumexp(1, keepdim=True)  # (B, 1)
    return log_k + (matching - torch.logaddexp(matching, log_sum)).mean()


@torch.autocast("cuda", enabled=False)  # in float32, as is prior_loss
def prior_critic_loss(critic, real, fake, penalty):
    """What the prior's critic minimizes: minus Eq. (7), plus the weighted penalty (D7). `real` are
    draws of the prior (B, S), `fake` is sigmoid(y). With D = 0 everywhere it is 2 log 2."""
    real = real.detach().requires_grad_()  # new tensors, so that the caller's stay as they are
    fake = fake.detach().requires_grad_()
    d_real = critic(real)
    d_fake = critic(fake)
    gradients = torch.autograd.grad(d_real.sum() + d_fake.sum(), [real, fake], create_graph=True)
    squared_norm = torch.cat(gradients).square().sum(1)  # (2 B,)
    loss = F.softplus(-d_real).mean() + F.softplus(d_fake).mean()
    return loss + penalty * squared_norm.mean()


@torch.autocast("cuda", enabled=False)
def prior_loss(critic, q):
    """What the encoder minimizes, of q = sigmoid(y) (B, S). The critic gives a logit, so this is
    - log sigmoid(D(q)), in place of the log(1 - sigmoid(D(q))) of Eq. (7) (D7)."""
    return F.softplus(-critic(q)).mean()


def draw_crops(model, corpus, cfg, step, draw=0, utterances=None):
    """-> x (B, T, F): a crop of each utterance of a batch. With --pair cross x (2 B, T, F): another
    crop of each comes after them (D6); the two may overlap."""
    if cfg.pair == "cross":
        if utterances is None:
            rng = np.random.default_rng((cfg.seed, step, RANK, 2**31))  # no stream of get_batch
            utterances = rng.choice(corpus.train, cfg.batch_size, replace=False)
        utterances = np.tile(utterances, 2)
    return model.crops(get_batch(corpus, cfg, step, draw, utterances)["wave"])


def scores(model, x, cfg):
    """x of draw_crops -> {"local": u (B, B, T'), "global": u (B, B, 1)}, those whose weight is not
    0, and y (B, S)."""
    c, y = model.encoder(x)  # both crops in one call, so that batch norm cannot tell them apart
    B = len(x) // 2 if cfg.pair == "cross" else len(x)
    y = y[:B]
    c = c[-B:]  # D6: with --pair cross, of the other crops
    seen = {"local": c, "global": pool(c)[:, None]}  # D4
    return {level: critic(seen[level], y) for level, critic in model.critics.items()}, y


def train_step(model, optimizers, corpus, step, cfg):
    """One step of DIM or, in the last steps of training, of the decoder of the frozen y."""
    if step >= max(1, round(cfg.infomax_share * cfg.steps)):
        x = model.crops(get_batch(corpus, cfg, step)["wave"])
        return decoder_step(model, optimizers, x)
    return infomax_step(model, optimizers, draw_crops(model, corpus, cfg, step), cfg)


def infomax_step(model, optimizers, x, cfg):
    """One update of the prior's critic, then one of encoder and critics, Eq. (8)."""
    u, y = scores(model, x, cfg)
    weights = {"local": cfg.beta, "global": cfg.alpha}
    log = {level: bound(u[level], cfg.objective) for level in u}
    loss = -sum(weights[level] * value for level, value in log.items())

    if cfg.gamma:
        q = y.sigmoid()
        critic_loss = prior_critic_loss(model.prior, torch.rand_like(q), q, cfg.penalty)
        optimizers["prior"].zero_grad()
        critic_loss.backward()
        optimizers["prior"].step()

        log["prior_critic_loss"] = critic_loss
        log["prior_loss"] = prior_loss(model.prior, q)
        loss = loss + cfg.gamma * log["prior_loss"]

    optimizers["encoder"].zero_grad()
    # `inputs` keeps the gradient of the encoder's loss out of the prior's critic.
    loss.backward(inputs=[*model.encoder.parameters(), *model.critics.parameters()])
    optimizers["encoder"].step()
    return {name: value.detach() for name, value in {"loss": loss, **log}.items()}


def decoder_step(model, optimizers, x):
    """One update of the decoder on the squared error of x (B, T, F)."""
    with torch.no_grad():
        _, y = model.encoder.eval()(x)  # eval: frozen, batch norm included
    loss = F.mse_loss(model.decoder(y).float(), x)
    optimizers["decoder"].zero_grad()
    loss.backward()
    optimizers["decoder"].step()
    return {"decoder_loss": loss.detach()}


# ---------- representation, conversion, sampling ----------
@torch.no_grad()
def represent(model, wave, cfg):
    """wave (N,) -> local (T', W), the map; global (S,), the y of the whole utterance."""
    c, y = model.encoder(model.features(wave[None]))
    return {"local": c[0], "global": y[0]}


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,) -> waves (N,): what y keeps of each source. The source is cut into crops, the last
    one filled up from the beginning, and each is encoded and decoded. There are no targets."""
    frames = cfg.crop // cfg.hop
    waves = []
    for wave in sources:
        x = model.features(wave[None])[0]  # (T, F)
        crops = ceil(len(x) / frames)
        index = torch.arange(crops * frames, device=x.device) % len(x)
        _, y = model.encoder(x[index].unflatten(0, (crops, frames)))  # (crops, S)
        x_hat = model.decoder(y).flatten(0, 1)[: len(x)]
        waves.append(model.vocode(x_hat[None], len(wave))[0])
    return waves


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Decodes three draws of the prior, where there is one. (`write_examples` writes what y keeps
    of test utterances.) Returns the bounds, over at most 8 batches of held-out speech, and the
    largest deviation, over the elements of sigmoid(y), of the mean from 1/2 and of the variance
    from 1/12, their values under the prior."""
    held = np.resize(
        corpus.held, max(2, len(corpus.held))
    )  # one utterance has no negatives: repeat it
    size = min(cfg.batch_size, len(held))
    batches = []
    for i in range(min(8, len(held) // size)):
        utterances = held[i * size : (i + 1) * size]
        x = draw_crops(model, corpus, cfg, i, 1000, utterances)
        batches.append(scores(model, x, cfg))

    bounds = {}
    for level in model.critics:
        values = [bound(u[level], cfg.objective).item() for u, _ in batches]
        bounds[level] = sum(values) / len(values)

    q = torch.cat([y for _, y in batches]).sigmoid()
    mean_error = (q.mean(0) - 1 / 2).abs().max().item()
    variance_error = (q.var(0) - 1 / 12).abs().max().item()

    if cfg.gamma:
        torch.manual_seed(cfg.seed)
        y = torch.rand(3, cfg.d_global, device=q.device).logit(eps=1e-3)
        for i, wave in enumerate(model.vocode(model.decoder(y), cfg.crop)):
            write_audio(out / f"prior_{i}.wav", wave, cfg.sample_rate)
    return {"bound": bounds, "prior": {"mean": mean_error, "variance": variance_error}}


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
