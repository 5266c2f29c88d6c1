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
prior_loss 0.69 where the prior's critic knows nothing. In result.json metrics.mine is I of y and a frame,
metrics.dependency the total correlation of the dimensions of y, both by new critics; r2_*: what decoders
make of y; nearest: how often the nearest utterance is of the same speaker.

    python dim.py                                       a toy corpus, a minute on two CPU cores
    python dim.py --data DIR --test DIR2                any folder of audio, our full size, for a GPU
    python dim.py convert --checkpoint runs/a --source a.wav --output c.wav      what y retains of a.wav

Measured on CPU threads, not on a GPU, at TOY's size: EER of unseen voices by `global` on toy 16, 15, 18 %
for seeds 0, 1, 2, on which TOY was chosen (untrained 44, 35, 42, log-mel 43), 3.7 % on LibriSpeech (33, 26),
where a speaker is one recording, 18 % on words (31, 32). Negative: sigmoid(y) is uniform in no run, and
`dependency` is cut at its ceiling in all, trained or not.
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
    crop: int = 20480            # samples in a training example
    batch_size: int = 64         # training examples in a batch, on each GPU
    steps: int = 800_000         # training steps
    lr: float = 1e-4             # learning rate of Adam
    seed: int = 0                # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True            # bfloat16 autocast on CUDA
    probe: int = 1500            # utterances at most to fit the probes on, and to score them on
    log_every: int = 100         # steps between log lines
    save_every: int = 5000       # steps between checkpoints

    objective: Literal["jsd", "dv", "nce"] = "jsd"  # the bound that encoder and critics raise
    pair: Literal["same", "cross"] = "same"  # y and the cells are of one crop (DIM), or of two (D6)
    critic: Literal["dot", "concat"] = "dot"  # encode-and-dot, or concatenate-and-convolve
    alpha: float = 0.0           # weight of the global bound, DIM(G)
    beta: float = 1.0            # weight of the local bound, DIM(L)
    gamma: float = 0.1           # weight of matching sigmoid(y) to the uniform prior; 0: no prior
    penalty: float = 1.0         # weight of the prior critic's gradient penalty
    infomax_share: float = 0.98  # of the steps are for the encoder, the rest for the decoders
    channels: int = 256          # D, of the local map
    d_global: int = 64           # E, size of the global vector
    hidden: int = 1024           # of the dense layer before the global vector
    units: int = 1024            # U, of the dot critic
    concat_units: int = 512      # of the concatenating critics, that of MINE included
    decoder_channels: int = 128  # of the decoders

# The same model, narrower, at 8 kHz, for two CPU cores and one minute.
TOY = dict(sample_rate=8000, n_fft=256, win=200, hop=80, n_mels=40, crop=6400, batch_size=32, steps=1400,
           lr=1e-3, save_every=500, infomax_share=0.3, channels=32, hidden=256, units=128, concat_units=64,
           decoder_channels=64)
TARGET = ""                      # there is one vector, not two: nothing to convert with

# ==================== the model ====================
def pool(h):
    """D3: (B, T, C) -> mean and deviation over time (B, 2 C): the order of things is dropped."""
    h = h.float()                                                            # also under autocast
    return torch.cat([h.mean(1), (h.var(1, correction=0) + 1e-5).sqrt()], 1)

class Encoder(nn.Module):
    """x (B, T, M) -> local map C (B, T', D), a cell of which sees 14 frames (D1); global vector y (B, E)."""
    def __init__(self, cfg):
        super().__init__()
        D, H = cfg.channels, cfg.hidden

        def conv(c_in, c_out, kernel, stride=1):
            return nn.Sequential(nn.Conv1d(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=False),
                                 nn.BatchNorm1d(c_out), nn.ReLU())
        self.local = nn.Sequential(conv(cfg.n_mels, D, 5), conv(D, D, 4, 2), conv(D, D, 4, 2))
        self.rest = nn.Sequential(conv(D, 2 * D, 3), conv(2 * D, 2 * D, 3, 2))
        self.dense = nn.Sequential(nn.Linear(4 * D, H, bias=False), nn.BatchNorm1d(H), nn.ReLU(),
                                   nn.Linear(H, cfg.d_global))

    def forward(self, x):
        t = torch.arange(max(4, x.shape[1]), device=x.device) % x.shape[1]   # one cell at least: x repeated
        c = self.local(x[:, t].mT)                                           # (B, D, T')
        return c.mT, self.dense(pool(self.rest(c).mT)).float()

class Branch(nn.Module):
    """(.., d) -> (.., U), one side of the dot critic: two dense layers beside a shortcut, then LayerNorm."""
    def __init__(self, d, U):
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(d, U, bias=False), nn.BatchNorm1d(U), nn.Linear(U, U)
        self.shortcut, self.layer_norm = nn.Linear(d, U, bias=False), nn.LayerNorm(U)
        self.shortcut.weight.data.uniform_(-0.01, 0.01).fill_diagonal_(1)    # at first nearly the identity

    def forward(self, x):
        h = self.norm(self.enter(x).flatten(0, -2)).relu().view(*x.shape[:-1], -1)
        return self.layer_norm(self.leave(h) + self.shortcut(x))

class DotCritic(nn.Module):
    """Encode-and-dot: cells (B, T, d), vectors (B, e) -> u (B, B, T), of vector i with cell t of object j."""
    def __init__(self, d, e, U):
        super().__init__()
        self.cell, self.vector = Branch(d, U), Branch(e, U)

    @torch.autocast("cuda", enabled=False)                                   # scores in float32
    def forward(self, c, y):
        c, y = self.cell(c.float()), self.vector(y)
        return torch.einsum("iu,jtu->ijt", y, c) / c.shape[-1] ** 0.5        # D2

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
    return nn.Sequential(nn.Linear(d, 1000), nn.ReLU(), nn.Linear(1000, 200), nn.ReLU(), nn.Linear(200, 1))

class Decoder(nn.Module):
    """y (B, E) -> x^ (B, T, M), T the frames of a crop. It only listens: no gradient reaches y. Standardised
    in front, for the untrained y varies by 1e-4 and less."""
    def __init__(self, cfg):
        super().__init__()
        self.frames, c = cfg.crop // cfg.hop, cfg.decoder_channels
        up = lambda out: nn.ConvTranspose1d(c, out, 4, 2, 1)                 # doubles T
        self.net = nn.Sequential(
            nn.BatchNorm1d(cfg.d_global, eps=1e-12, affine=False),
            nn.Linear(cfg.d_global, c * -(-self.frames // 8)), nn.ReLU(), nn.Unflatten(1, (c, -1)),
            up(c), nn.ReLU(), up(c), nn.ReLU(), up(cfg.n_mels))

    def forward(self, y):
        return self.net(y).mT[:, :self.frames]

class Model(nn.Module):
    """Encoder, critics, and for listening a decoder of the frozen y; beside it the control: the encoder as it
    was before training, BatchNorm being the identity, with a decoder of its own."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        if cfg.batch_size < 2 or cfg.crop < 8 * cfg.hop or not cfg.alpha + cfg.beta:
            raise UserError("DIM needs a --batch-size of 2 (one matches, one does not), a --crop of 8 times "
                            "--hop, and --alpha or --beta above 0; raise what is less")
        self.cfg, D, E = cfg, cfg.channels, cfg.d_global
        self.register_buffer("mean", torch.zeros(cfg.n_mels))
        self.register_buffer("std", torch.ones(cfg.n_mels))
        self.encoder, self.control = Encoder(cfg), Encoder(cfg).requires_grad_(False)
        Critic, width = (DotCritic, cfg.units) if cfg.critic == "dot" else (ConcatCritic, cfg.concat_units)
        objects = ("local", D, cfg.beta), ("global", 2 * D, cfg.alpha)       # D4: the latter is C, pooled
        self.critics = nn.ModuleDict({level: Critic(d, E, width) for level, d, weight in objects if weight})
        self.prior = discriminator(E)
        self.decoder, self.control_decoder = Decoder(cfg), Decoder(cfg)

    def features(self, wave):
        """(B, N) -> x (B, T, M), T = 1 + N // hop: log-mel, each band standardised over the training set, not
        over the utterance, which would delete much of the speaker."""
        return (log_mel(wave, self.cfg) - self.mean) / self.std

    def crops(self, wave):
        """(B, crop) -> x (B, T, M), T = crop // hop."""
        return self.features(wave)[:, :self.cfg.crop // self.cfg.hop]

    def vocode(self, x, samples):
        """(B, T, M) -> (B, samples): undoes `features`, with phases by Griffin-Lim."""
        x = F.pad(x.mT, (0, 1), mode="replicate").mT                         # a frame more, for N samples
        mel = (x * self.std + self.mean).exp()
        return griffin_lim(mel_to_magnitude(mel, self.cfg), self.cfg)[:, :samples]

# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of every mel band, over at most 5000 utterances."""
    n, total, squares = 0, 0, 0
    for u in corpus.train[:5000]:
        x = log_mel(corpus.wave(u)[None].to(cfg.device), cfg)[0].double()    # (T, M)
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    model.mean.copy_(total / n)
    model.std.copy_((squares / n - (total / n) ** 2).clamp(min=1e-2).sqrt())
    model.control.load_state_dict(model.encoder.state_dict())                # the encoder as it is untrained

def make_optimizers(model, cfg):
    """Encoder and critics work TOGETHER, the prior's critic against the encoder; the decoders only listen."""
    adam = lambda *nets: torch.optim.Adam([p for net in nets for p in net.parameters()], cfg.lr, fused=True)
    return {"encoder": adam(model.encoder, model.critics), "prior": adam(model.prior),
            "decoder": adam(model.decoder, model.control_decoder)}

def bound(u, objective):
    """u (B, B, T), scores of vector i with cell t of object j, matching where i = j -> the bound, which is to
    be raised, and its ceiling; for dv, which has none, log of how many do not match, the most it can show."""
    B, T = u.shape[1:]
    match = torch.eye(B, dtype=torch.bool, device=u.device)                  # U1: no look at who speaks
    p, q = u[match], u[~match]                                               # (B, T), (B (B - 1), T)
    if objective == "jsd":                                                   # at best 2 JSD(p || q)
        return (math.log(2) - F.softplus(-p)).mean() + (math.log(2) - F.softplus(q)).mean(), 2 * math.log(2)
    if objective == "dv":
        return p.mean() - (q.flatten().logsumexp(0) - math.log(q.numel())), math.log(q.numel())
    others = u.masked_fill(match[..., None], -math.inf).flatten(1).logsumexp(1)      # D5: (B,), not its own
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
    c, y = c[-B:], y[:B]                                                     # D6: of different crops
    objects = {"local": c, "global": pool(c)[:, None]}
    return {level: critic(objects[level], y) for level, critic in model.critics.items()}, y

def segments(model, corpus, cfg, step, draw=0, utterances=None):
    """-> x (B, T, M), with --pair cross (2 B, T, M): crops of a batch, then other crops of the same."""
    batch = get_batch(corpus, cfg, step, draw, utterances)
    x = model.crops(batch["wave"])
    if cfg.pair == "cross":
        batch = get_batch(corpus, cfg, step, draw + 1, batch["utterance"].cpu().numpy())
        x = torch.cat([x, model.crops(batch["wave"])])
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
        x = model.features(wave[None])[0]                                    # (T, M)
        at = torch.arange(-(-len(x) // frames) * frames, device=x.device) % len(x)
        y = model.encoder(x[at].unflatten(0, (-1, frames)))[1]               # (crops, E)
        waves.append(model.vocode(model.decoder(y).flatten(0, 1)[None, :len(x)], len(wave))[0])
    return waves

def retrieve(model, corpus, cfg, out):
    """Ranks held-out utterances, those of training speakers included, by the cosine of their centred vectors
    to that of an utterance of corpus.test. Writes the five nearest to and farthest from one of each of four
    speakers, and retrieval.txt. Returns how often the nearest, and one at random, is of the same speaker."""
    test, us = corpus.test, corpus.test.held[:cfg.probe]
    rows = [(test, u) for u in us] + [(corpus, u) for u in corpus.held[:cfg.probe] if test is not corpus]
    who = torch.tensor([c.speaker[u] for c, u in rows])
    same, found, lines = (who[:len(us), None] == who).fill_diagonal_(False), {}, []
    nets = {"log_mel": lambda x: (x, x.mean(1)), "untrained": model.control, "global": model.encoder}
    for name, net in nets.items():
        y = torch.cat([net(model.features(c.wave(u)[None].to(cfg.device)))[1] for c, u in rows])
        y = F.normalize(y - y.mean(0), dim=1)
        cosine = (y[:len(us)] @ y.T).cpu().fill_diagonal_(2)                 # first of all: the query itself
        ranked = cosine.argsort(1, descending=True)
        found[name] = same.gather(1, ranked[:, :2]).any(1).float().mean().item()
    for n, i in enumerate(np.unique(who[:len(us)], return_index=True)[1][:4]):
        order = ranked[i].tolist()
        for kind, js in ("query", order[:1]), ("nearest", order[1:6]), ("farthest", order[:0:-1][:5]):
            for k, j in enumerate(js):
                c, u = rows[j]
                name = f"retrieval_{n}_{kind}_{k}_{c.speakers[c.speaker[u]]}.wav"
                write_audio(out / name, c.wave(u), cfg.sample_rate)
                lines.append(f"{name} {c.paths[u].stem} {cosine[i, j].clamp(max=1):.3f}\n")
    (out / "retrieval.txt").write_text("".join(lines))
    return found | {"chance": same.float().sum(1).mean().item() / max(1, len(rows) - 1)}

def train_critic(critic, gain, n, cfg):
    """A new critic of frozen vectors: 300 steps of Adam that raise gain(rows), random rows of 0 .. n - 1."""
    optimizer = torch.optim.Adam(critic.parameters(), 1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        with torch.enable_grad():
            (-gain(torch.randperm(n, device=cfg.device)[:cfg.batch_size])).backward()
        optimizer.step()

def mine(x, y, x_held, y_held, size, cfg):
    """Rows x (n, d), y (n, e) -> nats of I(x; y): DV of a new critic on batches of held-out rows; ceiling."""
    critic = ConcatCritic(x.shape[1], y.shape[1], cfg.concat_units).to(cfg.device)
    judge = lambda x, y: bound(critic(x[:, None], y), "dv")
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
    train_critic(critic, lambda i: -prior_critic_loss(critic, y[i], shuffled(y[i]), 0.0), len(y), cfg)
    many = shuffled(y_held.repeat(8, 1))
    ceiling = math.log(len(many))
    return min((critic(y_held).mean() - critic(many).logsumexp(0)).item() + ceiling, ceiling), ceiling

def batch_of(utterances, i, cfg):
    """The i-th batch_size of them, round and round; all where there are fewer, but two at least."""
    size = max(2, min(cfg.batch_size, len(utterances)))
    return np.resize(np.roll(utterances, -i * size), size)

def gather(model, corpus, us, count, cfg):
    """`count` batches of crops of us -> x (n, T, M), {"untrained", "global": y (n, E)}."""
    xs = [model.crops(get_batch(corpus, cfg, i, 2000, batch_of(us, i, cfg))["wave"]) for i in range(count)]
    nets = {"untrained": model.control, "global": model.encoder}
    return torch.cat(xs), {name: torch.cat([net(x)[1] for x in xs]) for name, net in nets.items()}

def explained(x, rebuilt):
    """x (n, T, M), {name: x^} -> {part: {name: R2}}, R2 = 1 - squared error / variance about the mean of each
    band, of all, of the average over the crop, and of what varies about that."""
    parts = lambda e: {"all": e, "long_term": e.mean(1), "time_varying": e - e.mean(1, keepdim=True)}
    power = lambda e: {part: v.square().mean().item() for part, v in parts(e).items()}
    total = power(x - x.mean((0, 1)))
    error = {name: power(guess - x) for name, guess in rebuilt.items()}
    return {part: {name: 1 - e[part] / total[part] for name, e in error.items()} for part in total}

@torch.no_grad()
def sample(model, corpus, cfg, out):
    """There is no p(x | y) to draw from. What there is: retrieval; test crops decoded from the frozen y, the
    untrained one and another utterance's (permuted); and, where the law of y is the prior, draws of it. All
    figures are of held-out speech, R2 also of --test; only the prior is compared with y of training."""
    torch.manual_seed(cfg.seed)
    metrics = {"nearest": retrieve(model, corpus, cfg, out), "bound": {}, "mine": {}, "dependency": {}}
    batches = [segments(model, corpus, cfg, i, 1000, batch_of(corpus.held, i, cfg)) for i in range(8)]
    us = [scores(model, x, cfg)[0] for x in batches]
    for level in model.critics:
        values, ceilings = zip(*(bound(u[level], cfg.objective) for u in us))
        metrics["bound"] |= {level: sum(map(float, values)) / len(us), f"{level}_ceiling": ceilings[0]}

    x, ys = gather(model, corpus, corpus.train, 128, cfg)
    x_held, ys_held = gather(model, corpus, corpus.held, 16, cfg)
    x, x_held, size = x[:, x.shape[1] // 2], x_held[:, x.shape[1] // 2], len(x_held) // 16       # U2: (n, M)
    for name, y in ys.items():
        mean, std = y.mean(0), y.std(0).clamp(min=1e-5)
        y, y_held = (y - mean) / std, (ys_held[name] - mean) / std
        metrics["mine"][name], metrics["mine"]["ceiling"] = mine(x, y, x_held, y_held, size, cfg)
        metrics["dependency"][name], metrics["dependency"]["ceiling"] = dependency(y, y_held, cfg)

    q = ys["global"].sigmoid()
    off = {"mean": (q.mean(0) - 0.5).abs().max().item(), "variance": (q.var(0) - 1 / 12).abs().max().item()}
    uniform = off["mean"] < 0.05 and off["variance"] < 0.01 and metrics["dependency"]["global"] < 1
    metrics["prior"] = off | {"uniform": float(uniform)}
    drawn = model.decoder(torch.rand_like(q[:3 if cfg.gamma and uniform else 0]).logit(1e-3))
    if not len(drawn):
        print("no draws of the prior:", "sigmoid(y) is not uniform" if cfg.gamma else "--gamma is 0")

    for c in [corpus] + [corpus.test] * (corpus.test is not corpus):
        us, suffix = c.held[:cfg.probe], "" if c is corpus else "_test"
        x, ys = gather(model, c, us, -(-len(us) // cfg.batch_size), cfg)
        rebuilt = {"global": model.decoder(ys["global"]), "untrained": model.control_decoder(ys["untrained"]),
                   "permuted": model.decoder(ys["global"].roll(1, 0))}
        metrics |= {f"r2_{part}{suffix}": row for part, row in explained(x, rebuilt).items()}
    for name, mels in {"copy": x, **rebuilt, "prior": drawn}.items():
        for i, mel in enumerate(mels[:3]):
            wave = model.vocode(mel[None], cfg.crop)[0]
            write_audio(out / f"decoded_{i}_{name}.wav", wave, cfg.sample_rate)
    return metrics

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
