# SPDX-License-Identifier: MIT
"""VQ-VAE on speech: discrete units by vector quantisation, and a WaveNet that speaks them.

@@DOC@@
"""
import argparse
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import soundfile as sf
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class Config:
    data: str = ""                  # folder of audio; none: the toy corpus
    test: str = ""                  # another folder, for testing, usually of unseen speakers
    out: str = ""                   # run folder; none: the next free runs/NAME-N
    speaker: str = r"([^/]+)/"      # regex searched in the path below data; group 1 is the speaker
    phones: str = ""                # labels, "utterance-id label label ..", one per 10 ms; none: DATA/phones.txt
    sample_rate: int = 16000        # Hz
    n_fft: int = 512                # points of the Fourier transform
    win: int = 400                  # samples in an analysis window
    hop: int = 160                  # samples between frames
    n_mels: int = 80                # mel bands
    crop: int = 5120                # samples in a training example
    batch_size: int = 64            # training examples in a batch, on each GPU
    steps: int = 1_000_000          # training steps
    lr: float = 4e-4                # learning rate of Adam
    seed: int = 0                   # of weights, batches and noise
    device: Literal["auto", "cuda", "cpu"] = "auto"  # where to run
    bf16: bool = True               # bfloat16 autocast on CUDA
    probe: int = 1000               # utterances at most to fit the probes on, and to score them on
    log_every: int = 100            # steps between log lines
    save_every: int = 5000          # steps between checkpoints

    bottleneck: Literal["vq", "onehot", "binary", "none"] = "vq"  # what makes the code discrete; none: the control
    codebook: Literal["ema", "gradient"] = "ema"  # how VQ learns its codes; 1711.00937 A.1, or Eq. (3)
    codes: int = 512                # K, 1711.00937 4.3; binary: log2 K bits
    d_code: int = 64                # D, 1901.08810
    beta: float = 0.25              # weight of the commitment, 1711.00937 3.2
    decay: float = 0.99             # gamma of the moving averages, 1711.00937 A.1
    revive: float = 0.1             # D2: a code used less than this share of the average moves to a random latent
    usage: float = 0.1              # onehot, binary: weight that keeps the codes in use (U6)
    tau_rate: float = 3e-5          # onehot: temperature max(0.5, exp(-rate * step)), 1611.01144
    jitter: float = 0.12            # chance that a latent is replaced by a neighbour, 1901.08810
    channels: int = 768             # of the encoder, 1901.08810
    d_condition: int = 128          # of the convolution over the codes, 1901.08810
    residual: int = 368             # WaveNet: residual and gated channels, 1901.08810
    skip: int = 256                 # WaveNet: skip channels and output layers, 1901.08810
    cycles: int = 2                 # WaveNet: dilation cycles, 1901.08810
    depth: int = 10                 # WaveNet: layers in a cycle, dilations 1, 2, .. 512, 1901.08810
    temperature: float = 1.0        # of sampling


# The same model, narrower and at 8 kHz, for two CPU cores.
TOY = dict(sample_rate=8000, n_fft=256, win=200, hop=80, n_mels=40, crop=1920, batch_size=8, steps=700, lr=2e-3,
           log_every=50, save_every=500, codes=64, d_code=32, decay=0.98, tau_rate=3e-3, channels=128, d_condition=32,
           residual=32, skip=64, cycles=1, depth=8)
TARGET = "speaker"                  # what convert takes: a speaker of the training set


# ==================== the model ====================
class Encoder(nn.Module):
    """MFCC (B, T, 39) at 100 Hz -> latents (B, T / 2, D) at 50 Hz. Nine layers, each latent sees 16 frames (1901.08810)."""

    def __init__(self, cfg):
        super().__init__()
        c, conv = cfg.channels, lambda k: Residual(cfg.channels, k)
        self.layers = nn.Sequential(nn.Conv1d(39, c, 3, padding=1), nn.ReLU(), conv(3),
                                    nn.Conv1d(c, c, 4, stride=2, padding=1), nn.ReLU(), conv(3), conv(3),
                                    conv(1), conv(1), conv(1), conv(1))
        self.norm, self.project = nn.BatchNorm1d(c, affine=False), nn.Linear(c, cfg.d_code)

    def forward(self, x):
        return self.project(self.norm(self.layers(x.mT)).mT)             # D1: the norm; (B, T', D)


class Residual(nn.Conv1d):
    def __init__(self, channels, kernel):
        super().__init__(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x):
        return x + super().forward(x).relu()


# Four bottlenecks with one interface: z (B, T', D), tau -> (z_q (B, T', D), ids (B, T'), loss). No gradient passes an
# argmax or a threshold, so each copies one past it: straight_through(hard, soft) is hard forward, soft backward.
def straight_through(hard, soft):
    return hard.detach() + soft - soft.detach()


class VectorQuantizer(nn.Module):
    """Nearest of K codes; sections 3.1, 3.2 and A.1 of 1711.00937."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, K = cfg, cfg.codes
        self.e = nn.Parameter(torch.randn(K, cfg.d_code), requires_grad=cfg.codebook == "gradient")
        self.register_buffer("N", torch.ones(K))                         # moving average of the latents a code gets,
        self.register_buffer("M", self.e.detach().clone())               # and of their sum; A.1

    def forward(self, z, tau=None):
        with torch.autocast(z.device.type, enabled=False):               # in bfloat16 the nearest code is another one
            z = z.float()
            ids = (self.e.square().sum(1) - 2 * z @ self.e.T).argmin(-1)             # Eq. (1)-(2), |z|^2 left out
            e = self.e[ids]
            loss = self.cfg.beta * F.mse_loss(z, e.detach())             # commitment
            if self.cfg.codebook == "gradient":
                loss = loss + F.mse_loss(e, z.detach())                  # Eq. (3): sg[.] keeps the two apart
            # Eq. (3) adds |.|^2, the mean over latents of a sum over D, to the log-likelihood of ALL samples of x; ours is
            # a mean over samples, so both are divided by their number. U3: most code leaves out D / crop and weighs them
            # 100 times as much, which on the toy corpus presses the speaker out of the encoder itself.
            loss = loss * self.cfg.d_code / self.cfg.crop
            if self.training:
                self.update(z.detach().flatten(0, 1), ids.flatten())     # only now: e above is what the decoder sees
            return straight_through(e, z), ids, loss

    @torch.no_grad()
    def update(self, z, ids):
        """z (n, D), ids (n,): moves N, M (and e if EMA), then revives dead codes, all in float32."""
        K, g = self.cfg.codes, self.cfg.decay
        one_hot = F.one_hot(ids, K).float()
        n, m = one_hot.sum(0), one_hot.T @ z
        rest = z[torch.randint(len(z), (K,), device=z.device)]           # where dead codes would go
        if dist.is_initialized():                                        # statistics have no gradient to average
            dist.all_reduce(n), dist.all_reduce(m), dist.broadcast(rest, 0)
        self.N.lerp_(n, 1 - g)                                           # N <- g N + (1 - g) n
        self.M.lerp_(m, 1 - g)                                           # M <- g M + (1 - g) m
        if self.cfg.codebook == "ema":
            self.e.copy_(self.M / self.N.clamp(min=1e-5)[:, None])       # D3: the clamp, in place of Laplace smoothing
        share = n.sum() / K
        dead = self.N < self.cfg.revive * share                          # D2
        self.e[dead], self.N[dead], self.M[dead] = rest[dead], share, rest[dead] * share

    @torch.no_grad()
    def start(self, z):
        """Codes <- K of the latents z (n, D), N = 1, M = e: a code that no latent chooses then stays where it is."""
        self.e.copy_(z[torch.randperm(len(z), device=z.device)[:self.cfg.codes]])
        self.N.fill_(1)
        self.M.copy_(self.e)


class OneHot(nn.Module):
    """One of K by Gumbel-softmax (1611.01144), straight-through; a code is a row of a linear map, learned by the decoder."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.logits, self.e = cfg, nn.Linear(cfg.d_code, cfg.codes), nn.Linear(cfg.codes, cfg.d_code, bias=False)

    def forward(self, z, tau=None):
        with torch.autocast(z.device.type, enabled=False):
            a = self.logits(z.float())                                   # (B, T', K)
            y = F.gumbel_softmax(a, tau) if self.training else a.softmax(-1)
            ids = y.argmax(-1)                                           # without noise outside training
            loss = self.cfg.usage * kl_to_uniform(a.softmax(-1).mean((0, 1)))
            return self.e(straight_through(F.one_hot(ids, self.cfg.codes).float(), y)), ids, loss


class Binary(nn.Module):
    """log2 K bits, each a sigmoid thresholded at 0.5, straight-through; a code is the sum of its bits' vectors."""

    def __init__(self, cfg):
        super().__init__()
        bits = math.ceil(math.log2(cfg.codes))
        self.cfg, self.logits, self.e = cfg, nn.Linear(cfg.d_code, bits), nn.Linear(bits, cfg.d_code)

    def forward(self, z, tau=None):
        with torch.autocast(z.device.type, enabled=False):
            p = self.logits(z.float()).sigmoid()                         # (B, T', log2 K)
            bits = p > 0.5
            ids = (bits * 2 ** torch.arange(bits.shape[-1], device=z.device)).sum(-1)
            mean = p.mean((0, 1))
            loss = self.cfg.usage * kl_to_uniform(torch.stack([mean, 1 - mean], -1)).sum()
            return self.e(2 * straight_through(bits.float(), p) - 1), ids, loss


class Nothing(nn.Module):
    """The plain auto-encoder: the control of the claim that discretising drops the speaker."""

    def __init__(self, cfg):
        super().__init__()

    def forward(self, z, tau=None):
        return z, torch.arange(z[..., 0].numel(), device=z.device).view(z.shape[:-1]), z.new_zeros(())    # all differ


def kl_to_uniform(p):
    """KL(p || uniform) in nats over the last axis: 0 for equal shares, ln K for a single code."""
    return torch.special.xlogy(p, p).sum(-1) + math.log(p.shape[-1])


def jitter(z, p):
    """Time jitter of 1901.08810: each latent of z (B, T', D) is, with chance p, its left or right neighbour instead."""
    B, T, _ = z.shape
    move = (torch.rand(B, T, device=z.device) < p) * (torch.randint(2, (B, T), device=z.device) * 2 - 1)
    index = (torch.arange(T, device=z.device) + move).clamp(0, T - 1)
    return z.gather(1, index[..., None].expand_as(z))                    # the gradient goes to the frame that was used


def mu_law(wave):
    """(..., N) in [-1, 1] -> int64 0..255: sgn(x) ln(1 + 255 |x|) / ln 256, in 256 equal steps."""
    f = wave.sign() * (255 * wave.abs()).log1p() / math.log(256)
    return ((f + 1) / 2 * 255 + 0.5).long().clamp(0, 255)


def inverse_mu_law(y):
    f = 2 * y.float() / 255 - 1
    return f.sign() * (256 ** f.abs() - 1) / 255


class WaveNet(nn.Module):
    """p(y_t | y_<t, condition) over 256 mu-law levels; dilated causal convolutions of kernel 2 (U4), gated, with residual
    and skip connections. Channels come last, so that a convolution of kernel 2 is one matrix product of [h_{t-d}, h_t]."""

    def __init__(self, cfg, d_condition):
        super().__init__()
        self.cfg, R, S = cfg, cfg.residual, cfg.skip
        self.dilations = [2 ** i for i in range(cfg.depth)] * cfg.cycles
        self.embed = nn.Embedding(256, R)                                # a 1x1 convolution of the one-hot sample
        self.dilated = nn.ModuleList(nn.Linear(2 * R, 2 * R) for _ in self.dilations)
        self.mix = nn.ModuleList(nn.Linear(R, S + R) for _ in self.dilations[1:])
        self.mix.append(nn.Linear(R, S))                                 # nothing follows the last residual
        self.condition = nn.Linear(d_condition, 2 * R * len(self.dilations), bias=False)             # all V_l at once
        self.output = nn.Sequential(nn.ReLU(), nn.Linear(S, S), nn.ReLU(), nn.Linear(S, 256))

    def forward(self, previous, condition):
        """previous (B, N): y_{t-1} at each t; condition (B, T', C) at the code rate -> logits (B, N, 256)."""
        R, S, L = self.cfg.residual, self.cfg.skip, len(self.dilations)
        h, skip, (B, N) = self.embed(previous), 0, previous.shape        # (B, N, R)
        # V_l is applied before repeating each code N / T' times: the same numbers, N / T' times cheaper
        v = self.condition(condition).view(B, -1, 1, L, 2 * R)
        for l, d in enumerate(self.dilations):
            past = F.pad(h, (0, 0, min(d, N), -min(d, N)))               # h_{t-d}
            u = self.dilated[l](torch.cat([past, h], -1))
            a, b = (u.view(B, v.shape[1], -1, 2 * R) + v[:, :, :, l]).view(B, N, 2 * R).chunk(2, -1)
            s, *r = self.mix[l](a.tanh() * b.sigmoid()).split([S, R] if l < L - 1 else [S], -1)
            skip, h = skip + s, (h + r[0]) * 0.5 ** 0.5 if r else None   # U5: scaled sums keep the variance
        return self.output(skip / L ** 0.5)

    @torch.no_grad()
    def generate(self, condition, hop, temperature):
        """condition (B, T', C) -> y (B, T' * hop), sampled one by one: O(layers) each, by ring buffers."""
        fast, B = (TorchSampler if condition.is_cuda else NumpySampler)(self, condition, hop), len(condition)
        return fast.run(condition.shape[1] * hop, temperature)


class Model(nn.Module):
    """Encoder, bottleneck and WaveNet, and the mean and deviation of the MFCC."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg, self.n_speakers = cfg, n_speakers
        self.register_buffer("mean", torch.zeros(39))
        self.register_buffer("std", torch.ones(39))
        self.encoder = Encoder(cfg)
        self.bottleneck = {"vq": VectorQuantizer, "onehot": OneHot, "binary": Binary, "none": Nothing}[cfg.bottleneck](cfg)
        self.context = nn.Conv1d(cfg.d_code, cfg.d_condition, 3, padding=1)
        self.decoder = WaveNet(cfg, cfg.d_condition + n_speakers)

    def features(self, wave):
        """(B, N) -> MFCC with first and second differences (B, N // hop, 39), standardised."""
        return (mfcc(wave, self.cfg) - self.mean) / self.std

    def encode(self, wave, tau=None):
        """(B, N), N a multiple of 2 * hop -> z (B, T', D), z_q (B, T', D), ids (B, T'), loss; T' = N / (2 * hop)."""
        z = self.encoder(self.features(wave))
        return z, *self.bottleneck(z, tau)

    def condition(self, z_q, speaker):
        """z_q (B, T', D), speaker (B,) -> (B, T', C): three codes, and the speaker as one-hot."""
        z_q = jitter(z_q, self.cfg.jitter) if self.training else z_q
        h = self.context(z_q.mT).mT
        who = F.one_hot(speaker, self.n_speakers).to(h.dtype)
        return torch.cat([h, who[:, None].expand(-1, h.shape[1], -1)], -1)

    def forward(self, z_q, speaker, wave):
        """-> the cross-entropy of wave (B, N) given the codes and the speaker, in nats a sample."""
        y = mu_law(wave)
        previous = F.pad(y, (1, 0), value=128)[:, :-1]                   # 128 is silence
        logits = self.decoder(previous, self.condition(z_q, speaker))
        return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


def fold(net, condition, hop):
    """The WaveNet's weights and its conditioning, arranged so that one time step of one layer is two matrix products:
    h @ W gives what the layer needs of h now and, stored for d steps, later; gate @ V adds to [h, skip]. Folded in: both
    scalings, and sigmoid(b) = (1 + tanh(b / 2)) / 2, so that one tanh serves both halves. -> dict of float32 tensors."""
    R, S, L, s = net.cfg.residual, net.cfg.skip, len(net.dilations), 0.5 ** 0.5
    half = torch.tensor([1.0] * R + [0.5] * R, device=condition.device)
    bias = torch.stack([layer.bias for layer in net.dilated])                        # (L, 2R)
    C = (net.condition(condition).unflatten(-1, (L, 2 * R)) + bias) * half           # (B, T', L, 2R)
    W = [torch.cat([w.weight[:, R:], w.weight[:, :R]]).T * torch.cat([half, half]) * s ** l for l, w in enumerate(net.dilated)]
    scale = [torch.tensor([0.5 / L ** 0.5] * S + [0.5 * s ** -l] * R, device=condition.device) for l in range(L)]
    mix = [(F.pad(m.weight.T, (0, S + R - m.out_features)), F.pad(m.bias, (0, S + R - m.out_features))) for m in net.mix]
    return {"embed": F.pad(net.embed.weight, (S, 0)), "C": C.permute(1, 2, 0, 3).contiguous(), "W": torch.stack(W),
            "V": torch.stack([v * x for (v, _), x in zip(mix, scale)]), "v": torch.stack([2 * b * x for (_, b), x in zip(mix, scale)]),
            "P": net.output[1].weight.T.contiguous(), "p": net.output[1].bias, "Q": net.output[3].weight.T.contiguous(),
            "q": net.output[3].bias}


class NumpySampler:
    """One stream or a batch of them on the CPU. numpy, because at this size torch spends its time on overhead."""

    def __init__(self, net, condition, hop):
        self.w = {k: v.detach().float().numpy() for k, v in fold(net, condition, hop).items()}
        self.R, self.S, self.B, self.hop, self.t = net.cfg.residual, net.cfg.skip, len(condition), hop, 0
        self.rings = [np.zeros((d, self.B, 2 * self.R), np.float32) for d in net.dilations]          # the zero padding

    def step(self, y):
        """y (B,): the previous sample -> logits (B, 256) of the next."""
        w, R, S = self.w, self.R, self.S
        state, now = w["embed"][y], w["C"][self.t // self.hop]           # (B, S + R) skip and h; (L, B, 2R)
        for l, ring in enumerate(self.rings):
            u = state[:, S:] @ w["W"][l]                                 # (B, 4R)
            slot, gate = ring[self.t % len(ring)], u[:, :2 * R]
            gate += slot
            gate += now[l]
            slot[:] = u[:, 2 * R:]                                       # read before it is written
            np.tanh(gate, out=gate)
            state += (gate[:, :R] * (gate[:, R:] + 1)) @ w["V"][l]
            state += w["v"][l]
        self.t += 1
        hidden = np.maximum(np.maximum(state[:, :S], 0) @ w["P"] + w["p"], 0)
        return hidden @ w["Q"] + w["q"]

    def run(self, steps, temperature):
        """-> (B, steps) int64. Adding Gumbel noise and taking the largest is sampling from the softmax."""
        y, out = np.full(self.B, 128), np.empty((steps, self.B), np.int64)
        rng = np.random.default_rng(torch.randint(2 ** 62, ()).item())
        for t in range(steps):
            if t % 256 == 0:
                noise = rng.gumbel(size=(256, self.B, 256)).astype(np.float32) * temperature
            out[t] = y = (self.step(y) + noise[t % 256]).argmax(1)
        return torch.from_numpy(out.T.copy())


class TorchSampler:
    """The same on a GPU, where launching hundreds of small kernels would dominate: one time step is recorded as a CUDA
    graph and replayed. All of its state, time included, therefore lives in tensors on the device."""

    def __init__(self, net, condition, hop):
        self.w, self.hop, self.S, R, B = fold(net, condition, hop), hop, net.cfg.skip, net.cfg.residual, len(condition)
        self.rings = [condition.new_zeros(d, B, 2 * R, dtype=torch.float32) for d in net.dilations]
        self.t = torch.zeros(1, dtype=torch.long, device=condition.device)
        self.y = torch.full((B,), 128, device=condition.device)

    def step(self):
        """-> logits (B, 256) of the sample after self.y."""
        w, S = self.w, self.S
        state, now = w["embed"][self.y], w["C"].index_select(0, self.t // self.hop)[0]
        for l, ring in enumerate(self.rings):
            u, later = (state[:, S:] @ w["W"][l]).chunk(2, -1)
            slot = self.t % len(ring)
            a, b = (u + ring.index_select(0, slot)[0] + now[l]).tanh().chunk(2, -1)
            ring.index_copy_(0, slot, later[None])
            state = state + torch.addmm(w["v"][l], a * (b + 1), w["V"][l])
        self.t += 1
        return (state[:, :S].relu() @ w["P"] + w["p"]).relu() @ w["Q"] + w["q"]

    def run(self, steps, temperature):
        """-> (B, steps) int64."""
        out = self.y.new_empty(steps, len(self.y))

        def advance():
            logits = self.step()
            uniform = torch.rand_like(logits).clamp(1e-20, 1 - 1e-7)
            self.y.copy_((logits - temperature * (-uniform.log()).log()).argmax(1))
            out.index_copy_(0, self.t - 1, self.y[None])
        if self.y.is_cuda:
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):                                       # warm up, then back to the start
                    advance()
            torch.cuda.current_stream().wait_stream(stream)
            for tensor in (self.t, *self.rings):
                tensor.zero_()
            self.y.fill_(128)
            with torch.cuda.graph(graph):
                advance()
        for _ in range(steps):
            graph.replay() if self.y.is_cuda else advance()
        return out.T.contiguous()


def mfcc(wave, cfg):
    """(B, N) -> (B, N // hop, 39): 13 cepstra of the log-mel spectrum (orthonormal DCT-II), and their first and second
    differences by regression over two frames on either side (U1)."""
    mel = log_mel(wave, cfg)[:, :wave.shape[1] // cfg.hop]               # (B, T, n_mels)
    n = torch.arange(cfg.n_mels, device=wave.device) + 0.5
    dct = (n[:, None] * torch.arange(13, device=wave.device) * math.pi / cfg.n_mels).cos() * (2 / cfg.n_mels) ** 0.5
    dct[:, 0] /= 2 ** 0.5
    x = [mel @ dct]
    for _ in range(2):
        ahead = F.pad(x[-1].mT, (2, 2), mode="replicate").mT
        x.append((2 * ahead[:, 4:] + ahead[:, 3:-1] - ahead[:, 1:-3] - 2 * ahead[:, :-4]) / 10)
    return torch.cat(x, -1)


# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of the features, and codes drawn from the latents."""
    n = 8 + 4 * cfg.codes * 2 * cfg.hop // (cfg.crop * cfg.batch_size)   # at least 4 K latents
    waves = [get_batch(corpus, cfg, 0, draw=1 + i)["wave"] for i in range(n)]
    x = torch.cat([mfcc(wave, cfg).flatten(0, 1) for wave in waves])
    model.mean.copy_(x.mean(0))
    model.std.copy_(x.std(0) + 1e-5)
    if cfg.bottleneck == "vq":
        model.bottleneck.start(torch.cat([model.encoder(model.features(wave)).flatten(0, 1) for wave in waves]))


def make_optimizers(model, cfg):
    return {"autoencoder": torch.optim.Adam([p for p in model.parameters() if p.requires_grad], cfg.lr)}


def train_step(model, optimizers, corpus, step, cfg):
    """One step on  L = -log p(x | z_q, speaker) + |sg[z] - e|^2 + beta |z - sg[e]|^2,  Eq. (3) of 1711.00937."""
    batch, optimizer = get_batch(corpus, cfg, step), optimizers["autoencoder"]
    for group in optimizer.param_groups:                                 # halved at 400k, 600k, 800k of 1M, 1901.08810
        group["lr"] = cfg.lr * 0.5 ** sum(step >= share * cfg.steps for share in (0.4, 0.6, 0.8))
    tau = max(0.5, math.exp(-cfg.tau_rate * step))                       # OneHot alone
    z, z_q, ids, code_loss = model.encode(batch["wave"], tau)
    nats = model(z_q, batch["speaker"], batch["wave"])
    optimizer.zero_grad()
    (nats + code_loss).backward()
    optimizer.step()
    return {"loss": (nats + code_loss).detach(), "nats": nats.detach(), "code_loss": code_loss.detach(),
            "perplexity": perplexity(ids)}


def perplexity(ids):
    """exp of the entropy of the codes in use: K when all are used alike, 1 when only one is. A batch understates it."""
    p = ids.unique(return_counts=True)[1] / ids.numel()
    return torch.special.entr(p).sum().exp()


# ==================== what it is good for ====================
def pad(wave, cfg):
    """(N,) -> (1, N') with zeros to a whole number of codes."""
    return F.pad(wave, (0, -len(wave) % (2 * cfg.hop)))[None]


def represent(model, wave, cfg):
    """(N,) -> encoder (T', D): latents before quantisation; codes (T', D): after. 50 a second."""
    z, z_q, _, _ = model.encode(pad(wave, cfg))
    return {"encoder": z[0], "codes": z_q[0]}


@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,) of any speaker, each with the index of a training speaker -> waves (N,): the same codes, another speaker. A
    target of None reconstructs, as the training speaker under whom the decoder finds the source most probable."""
    model.eval()
    conditions = []
    for wave, target in zip(sources, targets):
        z_q = model.encode(pad(wave, cfg))[1]
        if target is None:                                               # judged on a crop from the middle
            first = max(0, (z_q.shape[1] - cfg.crop // (2 * cfg.hop)) // 2)
            part = slice(first, first + cfg.crop // (2 * cfg.hop))
            heard = pad(wave, cfg)[:, part.start * 2 * cfg.hop:part.stop * 2 * cfg.hop]
            nats = [model(z_q[:, part], torch.full((1,), s, device=wave.device), heard) for s in range(model.n_speakers)]
            target = int(torch.stack(nats).argmin())
        conditions.append(model.condition(z_q, torch.full((1,), target, device=wave.device))[0])     # (T', C)
    y = model.decoder.generate(nn.utils.rnn.pad_sequence(conditions, batch_first=True), 2 * cfg.hop, cfg.temperature)
    return [inverse_mu_law(row[:len(wave)]).to(wave.device) for row, wave in zip(y, sources)]


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes units.txt (the codes of held-out utterances, as text) and returns what the codes are worth: nats and bits a
    sample with the true, another utterance's, no codes, and the wrong speaker; perplexity; bits a second."""
    lines, ids, seconds = [], [], 0
    for u in corpus.held[:cfg.probe]:
        codes = model.encode(pad(corpus.wave(u).to(cfg.device), cfg))[2][0]
        ids.append(codes)
        lines.append(f"{corpus.paths[u].stem} {' '.join(map(str, codes.tolist()))}\n")
        seconds += corpus.length[u] / cfg.sample_rate
    (out / "units.txt").write_text("".join(lines))
    nats = collections.defaultdict(list)
    for i in range(8):
        held = corpus.held[(np.arange(cfg.batch_size) + i * cfg.batch_size) % len(corpus.held)]
        batch = get_batch(corpus, cfg, i, draw=1000, utterances=held)
        wave, who = batch["wave"], batch["speaker"] % model.n_speakers
        z_q = model.encode(wave)[1]
        others = (who + 1 + torch.arange(len(who), device=who.device) % max(1, model.n_speakers - 1)) % model.n_speakers
        for name, code, speaker in (("true", z_q, who), ("shuffled", z_q.roll(1, 0), who), ("wrong speaker", z_q, others),
                                    ("absent", z_q.mean((0, 1), keepdim=True).expand_as(z_q), who)):
            nats[name].append(model(code, speaker, wave).item())
    nats = {name: float(np.mean(values)) for name, values in nats.items()}
    runs, flat = torch.cat([i[F.pad(i[1:] != i[:-1], (1, 0), value=True)] for i in ids]), torch.cat(ids)
    rate = lambda ids: len(ids) / seconds * math.log2(perplexity(ids))   # symbols a second times their entropy
    return {"nats": nats, "bits": {k: v / math.log(2) for k, v in nats.items()}, "perplexity": perplexity(flat).item(),
            "codes_used": len(flat.unique()), "codes": cfg.codes, "bits_per_second": rate(flat), "bits_per_second_runs": rate(runs)}


# ==================== shared: audio ====================
class UserError(Exception):
    """What the user can mend: shown as one line, `error: ...`, without a traceback."""

def read_audio(path, sample_rate):
    """Any file that libsndfile reads -> (N,) float32, mono, in [-1, 1], at sample_rate. UserError names the file."""
    try:
        wave, rate = sf.read(path, dtype="float32", always_2d=True)                  # (N, channels)
    except (sf.SoundFileError, OSError):
        what = "not readable as audio; give wav, flac, ogg or mp3" if Path(path).is_file() else "no such audio file"
        raise UserError(f"{path}: {what}") from None
    wave = torch.from_numpy(wave).mean(1)
    if not len(wave) or not wave.isfinite().all():
        raise UserError(f"{path}: {'NaN or infinite samples' if len(wave) else '0 samples'}; give another recording")
    if rate == sample_rate:
        return wave
    # Band-limited, by Fourier: append zeros up to a whole number of periods of both rates (which also keeps the end
    # from wrapping round into the beginning), cut or extend the spectrum, fade its last 5 % against ringing.
    period = rate // math.gcd(rate, sample_rate)
    padded = -(-(len(wave) + rate // 20) // period) * period
    n = padded * sample_rate // rate
    spectrum = torch.fft.rfft(wave, padded)[:n // 2 + 1]
    spectrum *= (torch.arange(len(spectrum), 0, -1) / (0.05 * len(spectrum))).clamp(max=1)
    return torch.fft.irfft(spectrum, n)[:-(-len(wave) * sample_rate // rate)] * (n / padded)

def write_audio(path, wave, sample_rate):
    """(N,) in [-1, 1] -> 16-bit audio file; the ending, .wav .flac or .ogg, is the format."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        sf.write(path, wave.detach().float().cpu().clamp(-1, 1).numpy(), sample_rate)
    except sf.SoundFileError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another path") from None
# ==================== end shared: audio ====================


# ==================== shared: spectrum ====================
def stft(wave, cfg):
    """(B, N) -> (B, T, F) complex: Hann window of `win`, T = 1 + N // hop, frame t centred on sample t * hop, zeros
    beyond the ends, F = n_fft // 2 + 1. Its .abs() is the linear magnitude."""
    window = torch.hann_window(cfg.win, device=wave.device)
    return torch.stft(wave.float(), cfg.n_fft, cfg.hop, cfg.win, window, pad_mode="constant", return_complex=True).mT

@functools.lru_cache(maxsize=8)
def mel_filters(cfg, device):
    """(F, n_mels) triangles of unit area on Slaney's mel scale, linear to 1 kHz, then 27 bands per factor of 6.4, from
    0 to half the sample rate: scale and norm of librosa's default."""
    top = cfg.sample_rate / 2
    mel = torch.linspace(0, 15 + 27 * math.log(top / 1000, 6.4), cfg.n_mels + 2, dtype=torch.float64)
    edge = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))     # (n_mels + 2,) Hz
    low, mid, high, hertz = edge[:-2], edge[1:-1], edge[2:], torch.linspace(0, top, cfg.n_fft // 2 + 1)[:, None]
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
    """A folder of audio: utterance u is audio[start[u]:start[u] + length[u]] of ONE memory-mapped int16 vector, spoken
    by speakers[speaker[u]]. `held` is a tenth of each speaker's utterances, `train` the rest, both in the order of a
    hash of the path. `test` is the Corpus of --test, or this one. The model knows the first `known` speakers."""

    def __init__(self, folder, cfg, speakers=(), is_test=False):
        root = Path(folder)
        files = sorted(p for p in root.rglob("*") if p.is_file())
        paths = [p for p in files if p.suffix.lower() in (".wav", ".flac", ".ogg", ".mp3")]
        if not paths:
            seen = ", ".join(sorted({p.suffix or p.name for p in files})[:5]) or "nothing"
            raise UserError(f"{root}: " + ("no such folder" if not root.exists() else "not a folder" if root.is_file() else
                            f"no wav, flac, ogg or mp3 below it, but {seen}") + "; give a folder of audio")
        names = [p.relative_to(root).as_posix() for p in paths]
        who = [m and m[1] for m in map(re.compile(cfg.speaker).search, names)]
        if None in who:
            raise UserError(f"{paths[who.index(None)]}: --speaker {cfg.speaker!r} finds no speaker in its path")
        length, self.audio = decode(paths, cfg.sample_rate)
        good, bad = np.flatnonzero(length), np.flatnonzero(length == 0)
        if len(bad):
            lost = f"{root}: {len(bad)} of {len(paths)} files unreadable, the first is {paths[bad[0]]}"
            if len(bad) > 0.1 * len(paths):
                raise UserError(f"{lost}; mend or remove them")
            print(f"{lost}; left out")
        names, who, self.paths = [names[i] for i in good], [who[i] for i in good], [paths[i] for i in good]
        self.length, self.start, self.test, self.seconds = length[good], (length.cumsum() - length)[good], self, 0.0
        self.speakers = [*speakers, *sorted(set(who) - set(speakers))]
        self.speaker = np.array([*map({s: i for i, s in enumerate(self.speakers)}.get, who)])
        self.known, self.labels = len(speakers or self.speakers), Path(not is_test and cfg.phones or root / "phones.txt")
        total, count, parts = collections.Counter(who), collections.Counter(), ([], [])
        for u in sorted(range(len(names)), key=lambda u: hashlib.md5(names[u].encode("utf8", "replace")).digest()):
            count[who[u]] += 1
            parts[is_test or count[who[u]] <= -(-total[who[u]] // 10) < total[who[u]]].append(u)
        self.train, self.held = (np.array(part, int) for part in parts)
        print(f"{root}: {len(names)} utterances, {len(total)} speakers, {length.sum() / cfg.sample_rate / 60:.1f} minutes; "
              f"{(self.length < cfg.crop).sum()} are shorter than a crop and will be repeated",
              *(f"{name} -> {s}" for name, s in zip(names[:3], who)), sep="\n    ", flush=True)
        if len(total) < 2 and not is_test:
            raise UserError(f"{root}: one speaker, {who[0]!r}, where two are needed; see --speaker {cfg.speaker!r}")

    def wave(self, u):
        """Utterance u, whole -> (N,) float32 in [-1, 1]."""
        return self.audio[self.start[u]:self.start[u] + self.length[u]].float() / 32768

    def phones(self, utterances):
        """-> {u: (M,) class of every 10 ms} for those in the label file, which is read line by line: it may be large."""
        wanted, rows = {self.paths[u].stem: u for u in utterances}, {}
        for line in open(self.labels if self.labels.exists() else os.devnull):
            if line.split(maxsplit=1)[:1] and (u := wanted.get(line.split(maxsplit=1)[0])) is not None:
                rows[u] = line.split()[1:]
        index = {p: i for i, p in enumerate(sorted(set().union(*rows.values())))}
        return {u: np.array([index[p] for p in row]) for u, row in rows.items() if row}

@contextlib.contextmanager
def once(path):
    """Yields a temporary path, renamed to `path` at the end, or None where `path` exists. Of the processes on one machine
    (torchrun) the first writes and the others wait."""
    while int(os.environ.get("LOCAL_RANK", 0)) and not path.exists():
        time.sleep(0.2)
    if path.exists():
        yield None
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            yield Path(folder) / path.name
            os.replace(Path(folder) / path.name, path)

def decode(paths, sample_rate):
    """Decodes each file once, in threads -> (lengths (U,), 0 where unreadable; audio (N,) int16), memory-mapped from a
    file in runs/cache/ that begins with the lengths. Holds at most 256 files in memory, however many there are."""
    stamp = "".join(f"{p} {p.stat().st_size} {p.stat().st_mtime_ns}\n" for p in paths).encode("utf8", "surrogateescape")
    cache = Path("runs/cache") / f"{sample_rate}-{hashlib.sha256(stamp).hexdigest()[:16]}.i16"

    def read(path):
        try:
            return (read_audio(path, sample_rate) * 32768).round().clamp(-32768, 32767).short().numpy()
        except UserError:
            return np.zeros(0, np.int16)
    with once(cache) as part:
        if part:
            with open(part, "wb") as file, ThreadPoolExecutor() as pool:
                lengths = np.zeros(len(paths), np.int64)
                file.write(lengths)
                for i in range(0, len(paths), 256):
                    for j, wave in enumerate(pool.map(read, paths[i:i + 256]), i):
                        lengths[j] = len(wave)
                        file.write(wave)
                    print(f"decoded {j + 1} of {len(paths)} files", flush=True)
                file.write(b"\0\0")                                      # an empty file cannot be mapped
                file.seek(0)
                file.write(lengths)
    return np.fromfile(cache, np.int64, len(paths)), torch.from_numpy(np.memmap(cache, np.int16, "c", 8 * len(paths)))

def load_corpus(cfg, speakers=()):
    """The Corpus of cfg.data and cfg.test, or the toy corpus; `speakers` come first in the numbering. On CUDA its audio
    moves to the GPU if that takes less than a quarter of the free memory."""
    data, test = (cfg.data, cfg.test) if cfg.data else toy_corpus()
    corpus = Corpus(data, cfg, speakers)
    if test:
        corpus.test = Corpus(test, cfg, corpus.speakers, is_test=True)
    if cfg.device == "cuda" and corpus.audio.nbytes < torch.cuda.mem_get_info()[0] / 4:
        corpus.audio = corpus.audio.cuda()
    return corpus

def get_batch(corpus, cfg, step, draw=0, utterances=None):
    """-> wave (B, crop) float32 in [-1, 1], speaker (B,), utterance (B,) on cfg.device: a crop from a random place of each
    of `utterances`, or of batch_size different training ones. A function of (seed, step, draw, rank) alone."""
    began, rng = time.perf_counter(), np.random.default_rng((cfg.seed, step, draw, RANK))
    if utterances is None:
        if len(corpus.train) < cfg.batch_size:
            raise UserError(f"{len(corpus.train)} training utterances, fewer than a batch of {cfg.batch_size}; lower --batch-size")
        utterances = corpus.train[rng.choice(len(corpus.train), cfg.batch_size, replace=False)]
    length = corpus.length[utterances]
    first = (rng.random(len(length)) * (length - cfg.crop + 1).clip(1)).astype(np.int64)
    index = corpus.start[utterances, None] + (first[:, None] + np.arange(cfg.crop)) % length[:, None]    # short: repeated
    wave = corpus.audio[torch.from_numpy(index).to(corpus.audio.device)].to(cfg.device).float() / 32768
    speaker, utterance = (torch.from_numpy(i).to(cfg.device) for i in (corpus.speaker[utterances], utterances))
    corpus.seconds += time.perf_counter() - began
    return {"wave": wave, "speaker": speaker, "utterance": utterance}

def toy_corpus():
    """Writes runs/toy/train and runs/toy/test once and returns them: 8 and 4 speakers, 60 and 20 utterances of 1.5 s each,
    16 kHz, phones.txt. A pulse train of gliding f0, and noise, shaped by formants. Speaker = f0, vocal-tract length, tilt,
    breathiness; content = random phones. The two are drawn independently: the true factors of variation are known."""
    table = {"a": (800, 1250, 2500, 1, 0), "e": (480, 1900, 2600, 1, 0), "i": (280, 2300, 3000, 1, 0),
             "o": (480, 850, 2400, 1, 0), "u": (300, 700, 2200, .8, 0), "m": (250, 1100, 2100, .4, 0),
             "l": (360, 1300, 2900, .6, 0), "z": (250, 1700, 4500, .4, .3), "s": (250, 1700, 5500, 0, .6),
             "sh": (300, 1800, 3000, 0, .7), "f": (350, 1100, 6500, 0, .25), "sil": (450, 1400, 2500, 0, 0)}
    names, freq = list(table), np.linspace(0, 8000, 257)[:, None]                    # F1, F2, F3 in Hz, voice, noise
    cfg, shuffle = Config(n_fft=512, win=512, hop=160), np.random.default_rng(0)
    with once(Path("runs/toy")) as root:
        for s, (pitch, tract, tilt, breath, level, offset) in enumerate(np.stack([shuffle.permutation(12) / 11 for _ in range(6)], 1)):
            folder = (root or Path()) / ("test" if s % 3 == 1 else "train") / f"voice{s:02d}"
            for n in range(0 if not root else 20 if s % 3 == 1 else 80):
                rng = np.random.default_rng((s, n))
                phones = np.repeat(np.r_[11, rng.integers(0, 12, 12), 11], rng.integers(6, 17, 14))     # (T,) per 10 ms
                track = np.pad(np.array(list(table.values()))[phones], ((2, 2), (0, 0)), "edge").T
                track = np.stack([np.convolve(row, np.full(5, 0.2), "valid") for row in track])          # coarticulation
                f0 = np.linspace(-1, 1, len(phones)) * rng.uniform(-0.2, 0.2) + rng.normal(0, 0.08)
                f0 = np.repeat(90 * 2 ** (1.5 * pitch + f0), 160)                                        # (N,) Hz
                turn, h = np.pi * f0.cumsum() / 16000, int(7600 / f0.max())
                pulse = (np.sin((2 * h + 1) * turn) / (np.sin(turn) + 1e-9) - 1) / math.sqrt(4 * h)       # h cosines
                pulse, noise = (stft(torch.from_numpy(x)[None], cfg)[0, :-1].T.numpy()                   # (F, T)
                                for x in (pulse, rng.normal(0, 1, len(f0))))
                ratio = freq[..., None] / (track[:3] * (1.15 - 0.3 * tract)).T                           # (F, T, 3)
                shape = ((1 - ratio ** 2) ** 2 + 0.02 * ratio ** 2).prod(-1) ** -0.5 * (1 + freq / 500) ** -(tilt + 0.2)
                hiss = track[4] * np.exp(-((ratio[..., 2] - 1) * 3) ** 2) + 2e-3
                mixed = track[3] * shape * (pulse * (1 - breath ** 2) ** 0.5 + breath * noise) + hiss * noise
                wave = torch.istft(F.pad(torch.from_numpy(mixed).cfloat(), (0, 1)), 512, 160, 512, torch.hann_window(512))
                write_audio(folder / f"voice{s:02d}_{n:02d}.wav", wave * 0.05 * 2 ** level * 10 ** rng.uniform(-.05, .05) / wave.std() + 0.01 * offset, 16000)
                with open(folder.parent / "phones.txt", "a") as file:
                    print(f"voice{s:02d}_{n:02d}", *(names[i] for i in phones), file=file)
    return "runs/toy/train", "runs/toy/test"
# ==================== end shared: corpus ====================


# ==================== shared: probe ====================
def linear_probe(x, y, classes):
    """Softmax regression of y (n,) in 0..classes-1 on x (n, D), every 2nd, 3rd.. row beyond 50,000, standardised, L2
    1e-3, full-batch L-BFGS -> function (m, D) -> (m, classes) log posteriors. Deterministic, nothing to tune."""
    x, y = x[::-(-len(y) // 50_000)], y[::-(-len(y) // 50_000)]
    mean, std = x.mean(0), x.std(0).clamp(min=1e-5)
    w = torch.zeros(x.shape[1] + 1, classes, device=x.device, requires_grad=True)
    predict = lambda x: ((x - mean) / std @ w[1:] + w[0]).log_softmax(-1)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.nll_loss(predict(x), y) + 1e-3 * w[1:].square().sum()
        loss.backward()
        return loss
    with torch.enable_grad():
        optimizer.step(closure)
    w.requires_grad_(False)
    return predict

def equal_error_rate(x, speaker):
    """Speaker verification by the cosine of centred rows of x (n, D), all pairs -> the error rate where as large a share
    of same-speaker pairs is rejected as of different-speaker pairs accepted; 0.5 is chance, None without both kinds."""
    x = F.normalize(x - x.mean(0), dim=1)
    a, b = torch.triu_indices(len(x), len(x), 1, device=x.device)
    same = (speaker[a] == speaker[b])[(x @ x.T)[a, b].argsort()].double()            # by rising score
    if not 0 < same.sum() < len(same):
        return None
    rejected, accepted = same.cumsum(0) / same.sum(), 1 - (1 - same).cumsum(0) / (1 - same).sum()
    i = (rejected - accepted).abs().argmin()
    return ((rejected[i] + accepted[i]) / 2).item()

def stretch(labels, frames, samples, cfg):
    """(M,) labels, one per 10 ms -> (frames,) tensor: the label at the middle of each equal part of `samples` samples."""
    at = (np.arange(frames) + 0.5) * samples / frames / cfg.sample_rate * 100
    return torch.from_numpy(labels[at.astype(int).clip(0, len(labels) - 1)]).to(cfg.device)

def labelled(corpus, utterances, xs, phones, cfg):
    """Of the (T', D) of each utterance, those with labels -> all their frames (n, D), all their phones (n,)."""
    rows = [(x, stretch(phones[u], len(x), corpus.length[u], cfg)) for u, x in zip(utterances, xs) if u in phones]
    return [torch.cat(column) for column in zip(*rows)]

@torch.no_grad()
def evaluate(model, corpus, cfg):
    """What each representation knows -> {"chance": row, "representations": {name: row}}, row = {"phone", "speaker", "eer"},
    fractions, None where it does not apply. Linear probes of the phone of a frame and of the speaker of an utterance mean,
    fitted on training, scored on held-out utterances (chance: the most frequent class); eer on corpus.test."""
    torch.manual_seed(cfg.seed)
    untrained = Model(cfg, corpus.known).to(cfg.device)
    prepare(untrained, corpus, cfg)                                      # the control: everything but the training
    fit, held, test = parts = [us[:cfg.probe] for us in (corpus.train, corpus.held, corpus.test.held)]
    who = [torch.from_numpy(c.speaker[us]).to(cfg.device) for c, us in zip((corpus, corpus, corpus.test), parts)]
    phones, chance, table = corpus.phones([*fit, *held]), {"phone": None, "eer": 0.5}, {}

    def accuracy(what, x, y):                                            # x, y: (fit, held)
        chance[what] = (y[1].bincount().max() / len(y[1])).item()
        return (linear_probe(x[0], y[0], int(torch.cat(y).max()) + 1)(x[1]).argmax(1) == y[1]).float().mean().item()
    for source, net in {"log-mel": None, "untrained": untrained.eval(), "": model.eval()}.items():
        encode = lambda wave: represent(net, wave, cfg) if net else {"": log_mel(wave[None], cfg)[0]}
        encoded = [[encode(c.wave(u).to(cfg.device)) for u in us] for c, us in zip((corpus, corpus, corpus.test), parts)]
        for name in encoded[0][0]:
            x = [[e[name].float() for e in part] for part in encoded]    # (T', D) or (D,) each
            mean = [torch.stack([v if v.dim() == 1 else v.mean(0) for v in part]) for part in x]
            row = {"phone": None, "speaker": accuracy("speaker", mean[:2], who[:2]), "eer": equal_error_rate(mean[2], who[2])}
            if phones and x[0][0].dim() == 2:
                row["phone"] = accuracy("phone", *zip(*(labelled(corpus, us, v, phones, cfg) for us, v in zip(parts, x[:2]))))
            table[f"{name} {source}".strip()] = row
    return {"chance": chance, "representations": table}
# ==================== end shared: probe ====================


# ==================== shared: listen ====================
@torch.no_grad()
def listen(model, corpus, cfg, out):
    """Converts 24 held-out utterances (their first 3 s) to other speakers, writes six of the pairs to out, and has linear
    probes of log-mel frames, fitted on OTHER real utterances, judge them (posteriors averaged over the utterance) ->
    "target", "source": share of conversions heard as that speaker; "phones": share of frames whose phone survives; the
    same for the reconstruction and for the copy, which is what Griffin-Lim alone does. None without a TARGET."""
    pool, rng = corpus.test if TARGET == "recording" else corpus, np.random.default_rng(cfg.seed)
    aims = pool.held[(pool.speaker[pool.held] < corpus.known) | (TARGET == "recording")]
    others = [(u, aims[pool.speaker[aims] != pool.speaker[u]]) for u in pool.held[:24]]
    pairs = np.array([(u, rng.choice(vs)) for u, vs in others if len(vs)])           # (24, 2): source, target
    if not TARGET or not len(pairs):
        return None
    clips = [[pool.wave(u)[:3 * cfg.sample_rate].to(cfg.device) for u in column] for column in pairs.T]
    aims = clips[1] if TARGET == "recording" else pool.speaker[pairs[:, 1]].tolist()
    copies = [griffin_lim(mel_to_magnitude(log_mel(w[None], cfg).exp(), cfg), cfg)[0] for w in clips[0]]
    waves = {"source": clips[0], "target": clips[1], "conversion": convert(model, clips[0], aims, cfg), "copy": copies,
             "reconstruction": convert(model, clips[0], [None] * len(pairs), cfg)}
    for name, i in itertools.product(waves, range(min(6, len(pairs)))):
        who = f"{pool.paths[pairs[i, 0]].stem}_to_{pool.speakers[pool.speaker[pairs[i, 1]]]}"
        write_audio(out / f"{i}_{who}_{name}.wav", waves[name][i], cfg.sample_rate)
    rest = np.setdiff1d(np.r_[pool.train[:cfg.probe], pool.held[:cfg.probe]], pairs)
    phones, speaker = pool.phones([*rest, *pairs[:, 0]]), torch.from_numpy(pool.speaker).to(cfg.device)
    mels = [log_mel(pool.wave(u).to(cfg.device)[None], cfg)[0] for u in rest]
    heard = torch.cat([speaker[u].expand(len(m)) for u, m in zip(rest, mels)])
    judge = linear_probe(torch.cat(mels), heard, len(pool.speakers))
    spell = phones and linear_probe(*labelled(pool, rest, mels, phones, cfg), 1 + max(map(np.max, phones.values())))

    def verdict(name):
        mels = [log_mel(w[None], cfg)[0] for w in waves[name]]
        heard = torch.stack([judge(m).exp().mean(0).argmax() for m in mels])
        kept = [spell(m).argmax(1) == stretch(phones[u], len(m), len(w), cfg)
                for u, m, w in zip(pairs[:, 0], mels, waves[name]) if u in phones]
        source, target = ((heard == speaker[column]).float().mean().item() for column in pairs.T)
        return {"target": target, "source": source, "phones": torch.cat(kept).float().mean().item() if kept else None}
    return {"pairs": len(pairs)} | verdict("conversion") | {name: verdict(name) for name in ("reconstruction", "copy")}
# ==================== end shared: listen ====================


# ==================== shared: main ====================
NAME, RANK, WORLD = Path(__file__).stem, *(int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))

def parse(argv):
    """argv -> (mode, {field of Config: value} as far as given, the other flags). Wrong usage: one line, exit code 2."""
    needs = {"train": (), "convert": ("checkpoint", "source", "output"), "encode": ("checkpoint", "source", "output"),
             "evaluate": ("checkpoint",)}
    mode, argv = (argv[0], argv[1:]) if argv and argv[0] in needs else ("train", argv)
    parser = argparse.ArgumentParser(f"{NAME}.py [{' | '.join(needs)}]", description=__doc__.split("\n")[0], allow_abbrev=False)

    def fail(message):
        print(f"error: {message}; see python {NAME}.py --help", file=sys.stderr)
        sys.exit(2)

    def boolean(text):
        return ("false", "true").index(text.lower()) == 1
    parser.error, notes = fail, dict(re.findall(r"^    (\w+): .*?# (.+)$", Path(__file__).read_text(), re.M))
    for f in fields(Config):
        kind = {bool: boolean, int: int, float: float}.get(f.type, str)
        parser.add_argument(*{f"--{f.name.replace('_', '-')}", f"--{f.name}"}, dest=f.name, type=kind,
                            **{"nargs": "?", "const": ""} if f.name == "data" else {}, choices=get_args(f.type) or None,
                            help=f"{notes[f.name]} [{f.default}]".replace("%", "%%"))
    for name, note in (("checkpoint", "run folder or its model.pt"), ("source", "audio file; for encode also a folder"),
                       ("target", "speaker, or a recording of one"), ("output", "file or folder to write")):
        parser.add_argument(f"--{name}", help=note)
    for name, note in (("resume", "go on from the last checkpoint in --out"), ("overwrite", "--output may replace a file"),
                       ("toy", "with --data: TOY's small model and budget, for a CPU")):
        parser.add_argument(f"--{name}", help=note, action="store_true")
    flags = parser.parse_args(argv)
    given = {f.name: value for f in fields(Config) if (value := getattr(flags, f.name)) is not None}
    for name, value in given.items():
        if type(value) in (int, float) and not (0 < value < math.inf or value == 0 and (name == "seed" or type(value) is float)):
            fail(f"--{name.replace('_', '-')} {value}: must be a number above 0")
    for name in (*needs[mode], *["out"] * flags.resume):
        if not getattr(flags, name):
            fail(f"{mode}{' --resume' * flags.resume} needs --{name}")
    return mode, given, flags

def save(path, model, optimizers, step, cfg, speakers):
    """Checkpoint of tensors and plain values; atomic: at every moment `path` is the old one or the new one, whole."""
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save({"script": NAME, "step": step, "config": asdict(cfg) | {"device": "auto"}, "speakers": speakers,
                        "model": model.state_dict(), "optimizers": {k: o.state_dict() for k, o in optimizers.items()}}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def load(path, **overrides):
    """Run folder or checkpoint file -> (model in eval mode on cfg.device, cfg, the checkpoint). UserError where unfit."""
    file = Path(path) / "model.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; give a run folder or its model.pt")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        script, saved = checkpoint["script"], checkpoint["config"]
    except Exception:                                                    # whatever torch makes of a wrong file
        raise UserError(f"{file}: not a checkpoint, or a damaged one; give another") from None
    if script != NAME:
        raise UserError(f"{file}: a checkpoint of {script}.py; use that script")
    try:
        cfg = resolve(Config(**saved | overrides))
        model = Model(cfg, len(checkpoint["speakers"])).to(cfg.device)
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError):
        raise UserError(f"{file}: of another configuration; leave out the flags that change the model") from None
    return model.eval(), cfg, checkpoint

def resolve(cfg):
    """cfg with its device decided."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; leave the flag out")
    return replace(cfg, device="cuda" if cfg.device != "cpu" and torch.cuda.is_available() else "cpu")

def train(given, flags):
    """Trains, then reports; leaves model.pt, log.jsonl, result.json and samples/ in the run folder."""
    began, checkpoint = time.time(), None
    out = Path(given.get("out") or next(p for i in itertools.count(1) if not (p := Path(f"runs/{NAME}-{i}")).exists()))
    if flags.resume and (out / "model.pt").exists():
        model, cfg, checkpoint = load(out, **given)
    elif not flags.resume and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: exists; add --resume to go on with it, or choose another --out")
    else:
        cfg = resolve(Config(**(TOY if flags.toy or not given.get("data") else {}) | given))
    if WORLD > 1:
        cfg.device == "cuda" and torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
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
    if WORLD > 1:                                                        # one start; then every gradient is averaged
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad.div_(WORLD)))
    out.mkdir(parents=True, exist_ok=True)
    done, window, bad, last, stop = checkpoint["step"] if checkpoint else 0, [], 0, time.time(), []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stop.append(signal.signal(number, signal.default_int_handler)))
    for step in range(done, cfg.steps):
        torch.manual_seed(int(np.random.default_rng((cfg.seed, step, RANK)).integers(2 ** 62)))      # noise, dropout, jitter
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16 and cfg.device == "cuda"):
            window.append(train_step(model.train(), optimizers, corpus, step, cfg))
        bad = (bad + 1) * ~torch.stack([v.float().isfinite() for v in window[-1].values()]).all()    # stays on the device
        done, end = step + 1, step + 1 == cfg.steps or bool(stop)
        if done % cfg.log_every == 0 or end:
            log = {k: torch.stack([m[k].float() for m in window if k in m]).mean().item() for m in window for k in m}
            spent = (time.time() - last) / len(window)
            log |= {"audio_seconds_per_second": cfg.batch_size * cfg.crop * WORLD / cfg.sample_rate / spent,
                    "data_share": corpus.seconds / len(window) / spent, "seconds_left": (cfg.steps - done) * spent}
            print(f"step {done}/{cfg.steps}", *(f"{k} {v:.4g}" for k, v in log.items()), sep="  ", flush=True)
            with open(os.devnull if RANK else out / "log.jsonl", "a") as file:
                print(json.dumps({"step": done} | log), file=file)
            window, last, corpus.seconds = [], time.time(), 0.0
        if (done % 20 == 0 or end) and (bad >= 20 or end and bad):
            raise UserError(f"the loss is not finite since step {done - int(bad) + 1}; lower --lr; nothing bad was saved")
        if (done % cfg.save_every == 0 or end) and not bad and not RANK:
            save(out / "model.pt", model, optimizers, done, cfg, corpus.speakers)
        if stop:
            raise KeyboardInterrupt
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if WORLD > 1:
        dist.destroy_process_group()
    if not RANK:
        report(model, corpus, cfg, out, done, began)

def report(model, corpus, cfg, out, steps, began):
    """Measures everything -> out/result.json, out/samples and the table on the screen."""
    print("measuring what the representations know and what conversion does", flush=True)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    log = [json.loads(line) for line in open(out / "log.jsonl")] if (out / "log.jsonl").exists() else []
    speed = sorted(line["audio_seconds_per_second"] for line in log)[len(log) // 2:len(log) // 2 + 1]
    result = {"script": NAME, "sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), "torch": torch.__version__,
              "command": shlex.join(["python", Path(__file__).name, *sys.argv[1:]]), "config": asdict(cfg), "steps": steps,
              "hardware": torch.cuda.get_device_name() if cfg.device == "cuda" else f"{torch.get_num_threads()} CPU threads",
              "data": {"utterances": len(corpus.paths), "speakers": corpus.known, "test_utterances": len(corpus.test.held),
                       "minutes": round(corpus.length.sum() / cfg.sample_rate / 60, 1)},
              "audio_seconds_per_second": speed[0] if speed else None, **evaluate(model.eval(), corpus, cfg),
              "conversion": listen(model, corpus, cfg, out / "samples"), "metrics": sample(model, corpus, cfg, out / "samples")}
    result["seconds"] = round(time.time() - began, 1)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    number = lambda v: f"{v:9.1%}" if v is not None else f"{'-':>9}"
    print(f"{'':24}{'phone':>9}{'speaker':>9}{'EER':>9}")
    for name, row in {"chance": result["chance"], **result["representations"]}.items():
        print(f"{name:24}{number(row['phone'])}{number(row['speaker'])}{number(row['eer'])}")
    for name in ("conversion", "metrics"):
        print(f"{name}: {json.dumps(result[name])}")
    print(f"{result['seconds']:.0f} s; {out}/result.json, {out}/samples", flush=True)

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
        began = time.time()
        model, cfg, checkpoint = load(flags.checkpoint, **({"test": "", "phones": ""} if "data" in given else {}) | given)

        def read(path):
            wave = read_audio(path, cfg.sample_rate).to(cfg.device)
            if len(wave) < cfg.win or wave.abs().max() < 1e-4:
                what = "silence" if len(wave) >= cfg.win else f"shorter than a window of {cfg.win} samples"
                raise UserError(f"{path}: {what}; give another recording")
            return wave
        if mode == "evaluate":
            report(model, load_corpus(cfg, checkpoint["speakers"]), cfg, output, checkpoint["step"], began)
        elif mode == "convert":
            target, speakers = flags.target, checkpoint["speakers"]
            if target and not TARGET:
                raise UserError(f"--target: {NAME}.py does not convert between speakers; leave it out")
            if target and TARGET == "speaker" and target not in speakers:
                raise UserError(f"--target {target}: not a speaker of this model, which knows {', '.join(speakers[:40])}")
            target = None if not target else read(target) if TARGET == "recording" else speakers.index(target)
            write_audio(output, convert(model, [read(flags.source)], [target], cfg)[0], cfg.sample_rate)
        else:
            root, lost = Path(flags.source), []
            for path in sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]:
                try:
                    with torch.no_grad():
                        found = represent(model, read(path), cfg)
                except UserError as error:
                    lost.append(error)
                    continue
                for name, x in found.items():
                    file = output / path.relative_to(root if root.is_dir() else root.parent).with_suffix(f".{name}.npy")
                    file.parent.mkdir(parents=True, exist_ok=True)
                    np.save(file, x.float().cpu().numpy())
            if lost:
                raise UserError(f"{len(lost)} files could not be encoded, the first: {lost[0]}")
        return 0
    except UserError as error:
        message = error
    except torch.cuda.OutOfMemoryError:
        message = "out of GPU memory; lower --batch-size or --crop"
    except OSError as error:
        message = f"{error.filename or 'writing'}: {error.strerror}; free space there or choose another place"
    except KeyboardInterrupt:
        return 130
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return 1

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
# ==================== end shared: main ====================
