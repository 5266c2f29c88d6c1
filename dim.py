# SPDX-License-Identifier: MIT
"""DIM: a critic in the decoder's place. An embedding is good if one can tell whose embedding it is.

Hjelm et al., "Learning deep representations by mutual information estimation and maximization", ICLR 2019,
arXiv:1808.06670 (DIM); --pair cross after Ravanelli and Bengio, "Learning Speaker Representations with
Mutual Information", Interspeech 2019, arXiv:1812.00271.

The idea. Show a critic an object x and an embedding y: is y that of x? Encoder and critic learn TOGETHER to
tell better, with one loss. The auto-encoder is the special case in which the critic decodes y and scores by
minus the error, so that every sample of x counts; a free critic asks y only for what tells x from others.
The best one is a log density ratio, and the loss bounds (a function of) the mutual information I of x and y.
What the critic is shown decides what y keeps: the whole map of features, DIM(G), or each cell of it alone,
DIM(L), and then what many cells SHARE: of speech the speaker and the channel, not the phone. CPC (cpc.py)
asks which cell comes k steps LATER, and may take the others from the same utterance, where the voice alone is
of no use; here time has no order and the others are other utterances. Only the prior's part is adversarial.

    wave (B, N) -> log-mel, each band standardised: x (B, T, M)
    x -> 3 convolutions -> local map C (B, T', D), T' = T / 4 -> 2 convolutions -> mean and deviation over
         time -> 2 dense layers -> global vector y (B, E)
    critic: y_i and cell t of C_j -> u (B, B, T');  P: all with i = j, matching;  Q: all with i != j

    jsd   E_P[log 2 - softplus(-u)] + E_Q[log 2 - softplus(u)]      2 JSD(P || Q) at best, no estimate of I
    dv    E_P[u] - log E_Q[exp u]                                   at most I (E over all pairs, not a batch)
    nce   log N + E_P[u - log(exp u + sum of exp u' over i's Q)]    at most log N, N = 1 + (B - 1) T'
    L = - beta local - alpha global + gamma E[softplus(-D(q))],  q = sigmoid(y);  against it, v uniform, the
    prior's critic lowers E[softplus(-D(v))] + E[softplus(D(q))] + penalty E |gradient of D|^2

    symbol   here                     shape           symbol   here                        shape
    C(x)     encoder: local           (B, T', D)      E(x)     encoder: y, global          (B, E)
    T(x, y)  critics["local"]: u      (B, B, T')      D        model.prior                 (B, 1)
             critics["global"]        (B, B, 1)       P, Q     u[match], u[~match]

Differs from the papers. Of them we had abstracts, parts of the introduction, and DIM's authors' code (there).
D1  Speech for images: convolutions over time, a cell per 4 frames which sees 14; decoders of log-mel, judged
    by R2, there by SSIM. Most sizes are ours (U 1024; there 2048), batch and learning rate are theirs.
D2  The dot critic's score is divided by sqrt(U); there it is not, and of order sqrt(U) from the start.
D3  y is pooled over time: a whole utterance goes in at any length. There the map is flattened.
D4  The object of DIM(G) is C pooled; there C goes through new layers like those from C to y.
D5  In dv and nce a y's own cells are left out by a mask; there, by a constant of -10 or so in their place.
D6  --pair cross is NOT DIM: y is of one crop, the cells of another of the same utterance, which may overlap
    it. Ravanelli and Bengio pair two local vectors, and have no y.
D7  The critic of `dependency` learns by JSD; there by KL, unbounded where all rows can be told apart.
The papers do not say, or not to us
U1  what of two utterances of a speaker in a batch: here objects like any others, and of one GPU's batch.
U2  the x of MINE: here the middle frame of the crop, the same for every encoder.

The log shows the bounds, 0 where the critic knows nothing, and their ceilings (dv has none: log of how many
do not match). A higher bound is not a better embedding. prior_critic_loss is 1.39 (and its penalty),
prior_loss 0.69 where the prior's critic knows nothing. In run.json metrics.mine is I of y and a frame,
metrics.dependency the total correlation of the dimensions of y, both by new critics; r2_*: what decoders
make of y; nearest: how often the nearest utterance is of the same speaker.

    python dim.py                                       a toy corpus, a minute on two CPU cores
    python dim.py --data DIR --test DIR2                any folder of audio, our full size, for a GPU
    python dim.py convert --checkpoint runs/a --source a.wav --output c.wav      what y retains of a.wav
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
    pair: Literal["same", "cross"] = "same"  # y and the cells are of one crop (DIM), or of two (D6)
    critic: Literal["dot", "concat"] = "dot"  # encode-and-dot, or concatenate-and-convolve
    alpha: float = 0.0  # weight of the global bound, DIM(G)
    beta: float = 1.0  # weight of the local bound, DIM(L)
    gamma: float = 0.1  # weight of matching sigmoid(y) to the uniform prior; 0: no prior
    penalty: float = 1.0  # weight of the prior critic's gradient penalty
    infomax_share: float = 0.98  # of the steps are for the encoder, the rest for the decoders
    channels: int = 256  # D, of the local map
    d_global: int = 64  # E, size of the global vector
    hidden: int = 1024  # of the dense layer before the global vector
    units: int = 1024  # U, of the dot critic
    concat_units: int = 512  # of the concatenating critics, that of MINE included
    decoder_channels: int = 128  # of the decoders

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
        if self.batch_size < 2 or self.crop < 8 * self.hop or not self.alpha + self.beta:
            raise UserError(
                "DIM needs --batch-size 2, --crop 8 times --hop, and --alpha or --beta above 0; raise it"
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
TARGET = ""  # there is one vector, not two: nothing to convert with


# ==================== the model ====================
def pool(h):
    """D3: (B, T, C) -> mean and deviation over time (B, 2 C): the order of things is dropped."""
    h = h.float()  # also under autocast
    return torch.cat([h.mean(1), (h.var(1, correction=0) + 1e-5).sqrt()], 1)


class Encoder(nn.Module):
    """x (B, T, M) -> local map C (B, T', D), a cell of which sees 14 frames (D1); global vector y (B, E)."""

    def __init__(self, cfg):
        super().__init__()
        D, H = cfg.channels, cfg.hidden

        def conv(c_in, c_out, kernel, stride=1):
            return nn.Sequential(
                nn.Conv1d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=False),
                nn.BatchNorm1d(c_out),
                nn.ReLU(),
            )

        self.local = nn.Sequential(conv(cfg.n_mels, D, 5), conv(D, D, 4, 2), conv(D, D, 4, 2))
        self.rest = nn.Sequential(conv(D, 2 * D, 3), conv(2 * D, 2 * D, 3, 2))
        self.dense = nn.Sequential(
            nn.Linear(4 * D, H, bias=False),
            nn.BatchNorm1d(H),
            nn.ReLU(),
            nn.Linear(H, cfg.d_global),
        )

    def forward(self, x):
        t = (
            torch.arange(max(4, x.shape[1]), device=x.device) % x.shape[1]
        )  # one cell at least: x repeated
        c = self.local(x[:, t].mT)  # (B, D, T')
        return c.mT, self.dense(pool(self.rest(c).mT)).float()


class Branch(nn.Module):
    """(.., d) -> (.., U), one side of the dot critic: two dense layers beside a shortcut, then LayerNorm."""

    def __init__(self, d, U):
        super().__init__()
        self.enter, self.norm, self.leave = (
            nn.Linear(d, U, bias=False),
            nn.BatchNorm1d(U),
            nn.Linear(U, U),
        )
        self.shortcut, self.layer_norm = nn.Linear(d, U, bias=False), nn.LayerNorm(U)
        self.shortcut.weight.data.uniform_(-0.01, 0.01).fill_diagonal_(
            1
        )  # at first nearly the identity

    def forward(self, x):
        h = self.norm(self.enter(x).flatten(0, -2)).relu().view(*x.shape[:-1], -1)
        return self.layer_norm(self.leave(h) + self.shortcut(x))


class DotCritic(nn.Module):
    """Encode-and-dot: cells (B, T, d), vectors (B, e) -> u (B, B, T), of vector i with cell t of object j."""

    def __init__(self, d, e, U):
        super().__init__()
        self.cell, self.vector = Branch(d, U), Branch(e, U)

    @torch.autocast("cuda", enabled=False)  # scores in float32
    def forward(self, c, y):
        c, y = self.cell(c.float()), self.vector(y)
        return torch.einsum("iu,jtu->ijt", y, c) / c.shape[-1] ** 0.5  # D2


class ConcatCritic(nn.Module):
    """Concatenate-and-convolve, likewise. Its first layer, a sum, is computed B T + B times, not B B T."""

    def __init__(self, d, e, H):
        super().__init__()
        self.cell, self.vector = nn.Linear(d, H), nn.Linear(e, H, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, 1))

    @torch.autocast("cuda", enabled=False)
    def forward(self, c, y):
        return self.rest(self.cell(c.float())[None] + self.vector(y)[:, None, None])[..., 0]


def discriminator(d):
    """(B, d) -> (B, 1): the critic of the prior, and of the dependence of the dimensions of y."""
    return nn.Sequential(
        nn.Linear(d, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1)
    )


class Decoder(nn.Module):
    """y (B, E) -> x^ (B, T, M), T the frames of a crop. It only listens: no gradient reaches y. Standardised
    in front, for the untrained y varies by 1e-4 and less."""

    def __init__(self, cfg):
        super().__init__()
        self.frames, c = cfg.crop // cfg.hop, cfg.decoder_channels

        def up(out):
            return nn.ConvTranspose1d(c, out, 4, 2, 1)  # doubles T

        self.net = nn.Sequential(
            nn.BatchNorm1d(cfg.d_global, eps=1e-12, affine=False),
            nn.Linear(cfg.d_global, c * -(-self.frames // 8)),
            nn.ReLU(),
            nn.Unflatten(1, (c, -1)),
            up(c),
            nn.ReLU(),
            up(c),
            nn.ReLU(),
            up(cfg.n_mels),
        )

    def forward(self, y):
        return self.net(y).mT[:, : self.frames]


class Model(nn.Module):
    """Encoder, critics, and for listening a decoder of the frozen y; beside it the control: the encoder as it
    was before training, BatchNorm being the identity, with a decoder of its own."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg, D, E = cfg, cfg.channels, cfg.d_global
        self.register_buffer("mean", torch.zeros(cfg.n_mels))
        self.register_buffer("std", torch.ones(cfg.n_mels))
        self.encoder, self.control = Encoder(cfg), Encoder(cfg).requires_grad_(False)
        Critic, width = (
            (DotCritic, cfg.units) if cfg.critic == "dot" else (ConcatCritic, cfg.concat_units)
        )
        objects = (
            ("local", D, cfg.beta),
            ("global", 2 * D, cfg.alpha),
        )  # D4: the latter is C, pooled
        self.critics = nn.ModuleDict(
            {level: Critic(d, E, width) for level, d, weight in objects if weight}
        )
        self.prior = discriminator(E)
        self.decoder, self.control_decoder = Decoder(cfg), Decoder(cfg)

    def features(self, wave):
        """(B, N) -> x (B, T, M), T = 1 + N // hop: log-mel, each band standardised over the training set, not
        over the utterance, which would delete much of the speaker."""
        return (log_mel(wave, self.cfg) - self.mean) / self.std

    def crops(self, wave):
        """(B, crop) -> x (B, T, M), T = crop // hop."""
        return self.features(wave)[:, : self.cfg.crop // self.cfg.hop]

    def vocode(self, x, samples):
        """(B, T, M) -> (B, samples): undoes `features`, with phases by Griffin-Lim."""
        x = F.pad(x.mT, (0, 1), mode="replicate").mT  # a frame more, for N samples
        mel = (x * self.std + self.mean).exp()
        return griffin_lim(mel_to_magnitude(mel, self.cfg), self.cfg)[:, :samples]


# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of every mel band, over at most 5000 utterances."""
    n, total, squares = 0, 0, 0
    for u in corpus.train[:5000]:
        x = log_mel(corpus.wave(u)[None].to(cfg.device), cfg)[0].double()  # (T, M)
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    model.mean.copy_(total / n)
    model.std.copy_((squares / n - (total / n) ** 2).clamp(min=1e-2).sqrt())
    model.control.load_state_dict(model.encoder.state_dict())  # the encoder as it is untrained


def make_optimizers(model, cfg):
    """Encoder and critics work TOGETHER, the prior's critic against the encoder; the decoders only listen."""

    def adam(*nets):
        return torch.optim.Adam([p for net in nets for p in net.parameters()], cfg.lr, fused=True)

    return {
        "encoder": adam(model.encoder, model.critics),
        "prior": adam(model.prior),
        "decoder": adam(model.decoder, model.control_decoder),
    }


def bound(u, objective):
    """u (B, B, T), scores of vector i with cell t of object j, matching where i = j -> the bound, which is to
    be raised, and its ceiling; for dv, which has none, log of how many do not match, the most it can show."""
    B, T = u.shape[1:]
    match = torch.eye(B, dtype=torch.bool, device=u.device)  # U1: no look at who speaks
    p = u.diagonal(dim1=0, dim2=1).T  # (B, T)
    q = u.flatten(0, 1)[1:].view(B - 1, B + 1, T)[:, :-1]  # what lies between the diagonal's cells
    if objective == "jsd":  # at best 2 JSD(p || q)
        return (math.log(2) - F.softplus(-p)).mean() + (
            math.log(2) - F.softplus(q)
        ).mean(), 2 * math.log(2)
    if objective == "dv":
        return p.mean() - (q.flatten().logsumexp(0) - math.log(q.numel())), math.log(q.numel())
    others = (
        u.masked_fill(match[..., None], -math.inf).flatten(1).logsumexp(1)
    )  # D5: (B,), not its own
    log_n = math.log(1 + (B - 1) * T)
    return log_n - (torch.logaddexp(p, others[:, None]) - p).mean(), log_n


@torch.autocast("cuda", enabled=False)
def prior_critic_loss(critic, real, fake, weight):
    """(B, E) draws of the prior and of sigmoid(y), detached: y learns nothing here -> the loss of the prior's
    critic, 2 log 2 where it knows nothing, and on top the mean square of its gradient's norm."""
    real, fake = real.requires_grad_(), fake.requires_grad_()
    d_real, d_fake = critic(real), critic(fake)
    gradient = torch.autograd.grad(d_real.sum() + d_fake.sum(), [real, fake], create_graph=True)
    penalty = torch.cat(gradient).square().sum(1).mean()
    return F.softplus(-d_real).mean() + F.softplus(d_fake).mean() + weight * penalty


def prior_loss(critic, q):
    """What the encoder lowers, of q = sigmoid(y) (B, E): log 2 where the critic knows nothing. NOT minus what
    the critic lowers, which is flat where it is sure ("non-saturating"), nor plus, which flees the prior."""
    return F.softplus(-critic(q).float()).mean()


def scores(model, x, cfg):
    """x (B, T, M), or two crops of each utterance (2 B, T, M) -> scores by level {"local": (B, B, T'),
    "global": (B, B, 1)}, and y (B, E). Both crops go in at once, lest BatchNorm tell them apart."""
    c, y = model.encoder(x)
    B = len(x) // (2 if cfg.pair == "cross" else 1)
    c, y = c[-B:], y[:B]  # D6: of different crops
    objects = {"local": c, "global": pool(c)[:, None]}
    return {level: critic(objects[level], y) for level, critic in model.critics.items()}, y


def segments(model, corpus, cfg, step, draw=0, utterances=None):
    """-> x (B, T, M), with --pair cross (2 B, T, M): crops of a batch, then other crops of the same."""
    if cfg.pair == "cross" and utterances is None:
        rng = np.random.default_rng((cfg.seed, step, RANK, 2**31))  # not the numbers of get_batch
        utterances = rng.choice(corpus.train, cfg.batch_size, replace=False)
    x = model.crops(get_batch(corpus, cfg, step, draw, utterances)["wave"])
    if cfg.pair == "cross":
        again = get_batch(corpus, cfg, step, draw + 1, utterances)
        x = torch.cat([x, model.crops(again["wave"])])
    return x


def train_step(model, optimizers, corpus, step, cfg):
    """One step of encoder and critics, and before it one of the prior's critic; at last of the decoders."""
    if step >= max(1, round(cfg.infomax_share * cfg.steps)):
        return decoder_step(model, optimizers["decoder"], corpus, step, cfg)
    u, y = scores(model, segments(model, corpus, cfg, step), cfg)
    weight, loss, log = {"local": cfg.beta, "global": cfg.alpha}, 0, {}
    for level in u:
        value, ceiling = bound(u[level], cfg.objective)
        loss = loss - weight[level] * value
        log |= {level: value.detach(), f"{level}_ceiling": torch.full_like(value, ceiling)}
    if cfg.gamma:
        q = y.sigmoid()
        critic_loss = prior_critic_loss(model.prior, torch.rand_like(q), q.detach(), cfg.penalty)
        optimizers["prior"].zero_grad()
        critic_loss.backward()
        optimizers["prior"].step()
        prior = prior_loss(model.prior, q)
        loss = loss + cfg.gamma * prior
        log |= {"prior_critic_loss": critic_loss.detach(), "prior_loss": prior.detach()}
    optimizers["encoder"].zero_grad()
    loss.backward(inputs=[p for net in (model.encoder, model.critics) for p in net.parameters()])
    optimizers["encoder"].step()
    return {"loss": loss.detach()} | log


def decoder_step(model, optimizer, corpus, step, cfg):
    """One step of both decoders on the squared error, the encoders frozen, BatchNorm included."""
    x = model.crops(get_batch(corpus, cfg, step)["wave"])
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        y, untrained = model.encoder.eval()(x)[1], model.control.eval()(x)[1]
    loss = F.mse_loss(model.decoder(y).float(), x)
    control_loss = F.mse_loss(model.control_decoder(untrained).float(), x)
    optimizer.zero_grad()
    (loss + control_loss).backward()
    optimizer.step()
    return {"decoder_loss": loss.detach(), "untrained_decoder_loss": control_loss.detach()}


# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> local (T', D), a cell for 4 frames; global (E,), pooled over the whole utterance."""
    c, y = model.encoder(model.features(wave[None]))
    return {"local": c[0], "global": y[0]}


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,) -> waves (N,): what y retains of each crop's length of the source, decoded. No targets."""
    waves, frames = [], cfg.crop // cfg.hop
    for wave in sources:
        x = model.features(wave[None])[0]  # (T, M)
        at = torch.arange(-(-len(x) // frames) * frames, device=x.device) % len(x)
        y = model.encoder(x[at].unflatten(0, (-1, frames)))[1]  # (crops, E)
        waves.append(model.vocode(model.decoder(y).flatten(0, 1)[None, : len(x)], len(wave))[0])
    return waves


def retrieve(model, corpus, cfg, out):
    """Ranks held-out utterances, those of training speakers included, by the cosine of their centred vectors
    to that of an utterance of corpus.test. Writes the five nearest to and farthest from one of each of four
    speakers, and retrieval.txt. Returns how often the nearest, and one at random, is of the same speaker."""
    test, us = corpus.test, corpus.test.held[:200]
    rows = [(test, u) for u in us] + [(corpus, u) for u in corpus.held[:200] if test is not corpus]
    names = [c.speakers[c.speaker[u]] for c, u in rows]
    who = torch.from_numpy(np.unique(names, return_inverse=True)[1])
    same, found, lines = (who[: len(us), None] == who).fill_diagonal_(False), {}, []
    nets = {
        "log_mel": lambda x: (x, x.mean(1)),
        "untrained": model.control,
        "global": model.encoder,
    }
    for name, net in nets.items():
        y = torch.cat([net(model.features(c.wave(u)[None].to(cfg.device)))[1] for c, u in rows])
        y = F.normalize(y - y.mean(0), dim=1)
        cosine = (y[: len(us)] @ y.T).cpu().fill_diagonal_(2)  # first of all: the query itself
        ranked = cosine.argsort(1, descending=True)
        found[name] = same.gather(1, ranked[:, :2]).any(1).float().mean().item()
    for n, i in enumerate(np.unique(who[: len(us)], return_index=True)[1][:4]):
        order = ranked[i].tolist()
        for kind, js in (
            ("query", order[:1]),
            ("nearest", order[1:6]),
            ("farthest", order[:0:-1][:5]),
        ):
            for k, j in enumerate(js):
                c, u = rows[j]
                name = f"retrieval_{n}_{kind}_{k}_{c.speakers[c.speaker[u]]}.wav"
                write_audio(out / name, c.wave(u), cfg.sample_rate)
                lines.append(f"{name} {c.paths[u].stem} {cosine[i, j].clamp(max=1):.3f}\n")
    (out / "retrieval.txt").write_text("".join(lines), errors="replace")
    return found | {"chance": same.float().sum(1).mean().item() / max(1, len(rows) - 1)}


def train_critic(critic, gain, n, cfg):
    """A new critic of frozen vectors: 300 steps of Adam that raise gain(rows), random rows of 0 .. n - 1."""
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        with torch.enable_grad():
            (-gain(torch.randperm(n, device=cfg.device)[: cfg.batch_size])).backward()
        optimizer.step()


def mine(x, y, x_held, y_held, size, cfg):
    """Rows x (n, d), y (n, e) -> nats of I(x; y): DV of a new critic on batches of held-out rows; ceiling."""
    critic = ConcatCritic(x.shape[1], y.shape[1], cfg.concat_units).to(cfg.device)

    def judge(x, y):
        return bound(critic(x[:, None], y), "dv")

    train_critic(critic, lambda i: judge(x[i], y[i])[0], len(x), cfg)
    values, ceilings = zip(*map(judge, x_held.split(size), y_held.split(size)))
    return torch.stack(values).mean().item(), ceilings[0]


def shuffled(y):
    """(n, E) -> (n, E): every column in an order of its own: the same marginals, independent."""
    return y.gather(0, torch.rand_like(y).argsort(0))


def dependency(y, y_held, cfg):
    """Neural dependency measure, rows (n, E) -> nats of total correlation of the columns: DV of a new critic
    that tells held-out rows from shuffled ones (D7), cut at log of the number of these; and this ceiling."""
    critic = discriminator(y.shape[1]).to(cfg.device)
    train_critic(
        critic, lambda i: -prior_critic_loss(critic, y[i], shuffled(y[i]), 0.0), len(y), cfg
    )
    many = shuffled(y_held.repeat(8, 1))
    ceiling = math.log(len(many))
    return min(
        (critic(y_held).mean() - critic(many).logsumexp(0)).item() + ceiling, ceiling
    ), ceiling


def batch_of(utterances, i, cfg):
    """The i-th batch_size of them, round and round; all where there are fewer, but two at least."""
    size = max(2, min(cfg.batch_size, len(utterances)))
    return np.resize(np.roll(utterances, -i * size), size)


def gather(model, corpus, us, count, cfg):
    """`count` batches of crops of us -> x (n, T, M), {"untrained", "global": y (n, E)}."""
    xs = [
        model.crops(get_batch(corpus, cfg, i, 2000, batch_of(us, i, cfg))["wave"])
        for i in range(count)
    ]
    nets = {"untrained": model.control, "global": model.encoder}
    return torch.cat(xs), {name: torch.cat([net(x)[1] for x in xs]) for name, net in nets.items()}


def explained(x, rebuilt):
    """x (n, T, M), {name: x^} -> {part: {name: R2}}, R2 = 1 - squared error / variance about the mean of each
    band, of all, of the average over the crop, and of what varies about that."""

    def parts(e):
        return {
            "all": e,
            "long_term": e.mean(1),
            "time_varying": e - e.mean(1, keepdim=True),
        }

    def power(e):
        return {part: v.square().mean().item() for part, v in parts(e).items()}

    total = power(x - x.mean((0, 1)))
    error = {name: power(guess - x) for name, guess in rebuilt.items()}
    return {part: {name: 1 - e[part] / total[part] for name, e in error.items()} for part in total}


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """There is no p(x | y) to draw from. What there is: retrieval; test crops decoded from the frozen y, the
    untrained one and another utterance's (permuted); and, where the law of y is the prior, draws of it. All
    figures are of held-out speech, R2 also of --test; only the prior is compared with y of training."""
    torch.manual_seed(cfg.seed)
    metrics = {
        "nearest": retrieve(model, corpus, cfg, out),
        "bound": {},
        "mine": {},
        "dependency": {},
    }
    batches = [
        segments(model, corpus, cfg, i, 1000, batch_of(corpus.held, i, cfg)) for i in range(8)
    ]
    us = [scores(model, x, cfg)[0] for x in batches]
    for level in model.critics:
        values, ceilings = zip(*(bound(u[level], cfg.objective) for u in us))
        metrics["bound"] |= {
            level: sum(map(float, values)) / len(us),
            f"{level}_ceiling": ceilings[0],
        }

    x, ys = gather(model, corpus, corpus.train, 128, cfg)
    x_held, ys_held = gather(model, corpus, corpus.held, 16, cfg)
    x, x_held, size = (
        x[:, x.shape[1] // 2],
        x_held[:, x.shape[1] // 2],
        len(x_held) // 16,
    )  # U2: (n, M)
    for name, y in ys.items():
        mean, std = y.mean(0), y.std(0).clamp(min=1e-5)
        y, y_held = (y - mean) / std, (ys_held[name] - mean) / std
        metrics["mine"][name], metrics["mine"]["ceiling"] = mine(x, y, x_held, y_held, size, cfg)
        metrics["dependency"][name], metrics["dependency"]["ceiling"] = dependency(y, y_held, cfg)

    q = ys["global"].sigmoid()
    off = {
        "mean": (q.mean(0) - 0.5).abs().max().item(),
        "variance": (q.var(0) - 1 / 12).abs().max().item(),
    }
    uniform = off["mean"] < 0.05 and off["variance"] < 0.01 and metrics["dependency"]["global"] < 1
    metrics["prior"] = off | {"uniform": float(uniform)}
    drawn = model.decoder(torch.rand_like(q[: 3 if cfg.gamma and uniform else 0]).logit(1e-3))
    if not len(drawn):
        print(
            "no draws of the prior:", "sigmoid(y) is not uniform" if cfg.gamma else "--gamma is 0"
        )

    for c in [corpus] + [corpus.test] * (corpus.test is not corpus):
        us, suffix = c.held[:200], "" if c is corpus else "_test"
        x, ys = gather(model, c, us, -(-len(us) // cfg.batch_size), cfg)
        rebuilt = {
            "global": model.decoder(ys["global"]),
            "untrained": model.control_decoder(ys["untrained"]),
            "permuted": model.decoder(ys["global"].roll(1, 0)),
        }
        metrics |= {f"r2_{part}{suffix}": row for part, row in explained(x, rebuilt).items()}
    for name, mels in {"copy": x, **rebuilt, "prior": drawn}.items():
        for i, mel in enumerate(mels[:3]):
            wave = model.vocode(mel[None], cfg.crop)[0]
            write_audio(out / f"decoded_{i}_{name}.wav", wave, cfg.sample_rate)
    return metrics


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
