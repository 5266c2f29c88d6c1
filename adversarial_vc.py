# SPDX-License-Identifier: MIT
"""Voice conversion to known voices: an adversary takes the speaker out of the latent, a GAN sharpens.

Chou, Yeh, Lee, Lee, "Multi-target Voice Conversion without Parallel Data by Adversarially Learning
Disentangled Audio Representations", Interspeech 2018, arXiv:1804.02812.

The idea. Stage 1: an auto-encoder whose decoder is told the speaker, so the latent need not carry it. To make
sure that it does not, a classifier learns to name the speaker of a latent, and the encoder is trained to make
it err. To convert, tell the decoder another speaker. Its output is blurred, as always with an L1. Stage 2:
encoder and decoder stay as they are, and a generator, given the same latent and speaker, adds a residual; a
critic judges whether the sum is like real speech, and a second classifier whether it is the target speaker.

    wave (B, N) -> pre-emphasis -> linear magnitude in dB, -80 to 20 as 0 to 1: x (B, T, F)
    x -> Enc: convolutions 1 to 7 wide, three halvings of T, GRU -> z (B, T', C), T' = ceil(T / 8)
    z, y -> Dec: three doublings of T, GRU; y enters by five tables -> Dec(z, y) (B, T, F)
    z -> classifier-1 -> logits of the speaker (B, S)
    z, y' -> Gen: as Dec -> residual (B, T, F);  x' = Dec(z, y') + Gen(z, y'), y' random
    x or x' -> critic: convolutions over T and F -> D, how real (B,), and classifier-2: logits (B, S)

    phase  steps    updates a step, a batch each  minimises
    0       8,000   1 of Enc and Dec              L_rec = |Dec(z, y) - x|, the mean over all elements
    1      20,000   1 of classifier-1             CE_1(z, y), the cross-entropy
    2      80,000   5 of classifier-1, then       CE_1(z, y)
                    1 of Enc and Dec              L_rec - w CE_1(z, y), w from 0 to 0.01 in 50,000 steps
    3      50,000   5 of critic and classifier-2  D(x') - D(x) + CE_2(x, y) + 10 mean (1 - |grad D(u)|)^2,
                    1 of Gen                      -D(x') + CE_2(x', y')     u between x and x' at random
    Phase 3 is stage 2. All are parts of `steps` and scale with --steps, also in a run that is resumed.

    symbol   here               shape         symbol        here                shape or value
    Enc(x)   model.encoder: z   (B, T', C)    CE_1          model.classifier    logits (B, S)
    Dec      model.decoder      (B, T, F)     D, CE_2       model.critic        (B,), logits (B, S)
    Gen      model.generator    (B, T, F)     w, its end    weight, adversary   0 to 0.01
    y, y'    speaker, aim       (B,)          10            cfg.penalty
    B batch, T frames, F bins, C channels, S speakers

Differs from the paper. Its text we did not have: sizes, weights and schedule are those of the authors' code.
D1  Every utterance is as likely, those of a batch differ, short ones are repeated, silence stays; segments
    are cut anew in each step, from the waveform. The authors: 20 speakers of VCTK; first the speaker, then an
    utterance, trimmed, over 128 frames; 500,000 segments, cut once; held out: the last tenth by name.
D2  Latents are detached where the encoder does not learn, and the frozen encoder of stage 2 has no dropout.
D3  A silent training segment is replaced: see `segments`.
D4  Any length is converted and comes out as long: x is repeated to 9 frames, a long output cut. The heads fit
    the training segment, 33 frames at least, and average over a longer one. The authors' fit 128 only.
D5  Griffin-Lim with momentum from a random phase, de-emphasis in the spectrum. The authors: 300 plain rounds
    from phase 0, a recursive filter, silence trimmed.
D6  The last layers of generator and critic start at zero: stage 2 begins with what stage 1 made. With the
    usual start the critic is steep and leads the generator astray (trial: mean penalty of 58 over 25 steps).
The paper does not say, or not to us
U1  Its batch: 32, as in the authors' configuration; their script takes 16.

The log shows reconstruction_loss, L_rec, in units of 100 dB (toy corpus: 0.06); classifier_loss, CE_1 in nats
(chance: ln S), and the accuracy of that classifier, which is no measure of what z knows; critic_distance,
D(x) - D(x'); penalty, |grad D| being near 1 when it is small; classifier_2_loss of real and generator_loss of
converted segments, both in nats. A step counts as one batch of audio; those of phases 2 and 3 draw several.
In result.json metrics.fresh_classifier, a new classifier-1 of the final z, and the linear probe of `content`
test the paper's claim, that --adversary 0 leaves more of the speaker in. Stage 2 should raise the variance
over time of each frequency (metrics.variance) and bring it nearer to real speech (variance_error lower).

    python adversarial_vc.py                            a toy corpus, two and a half minutes on two CPU cores
    python adversarial_vc.py --data DIR                 any folder of audio, the authors' size, for a GPU
    python adversarial_vc.py convert --checkpoint runs/a --source a.wav --target SPEAKER --output c.wav

Measured on CPU threads, not on a GPU, at TOY's size, seeds 0, 1. Words, --adversary 0.1 (beside 0): a fresh
classifier-1 names the speaker in 7, 7 % (18, 16; untrained 10, 6; chance 6), a linear probe in 36, 33 % (60,
59; untrained 18, 25), phones are read in 53, 53 % (56, 56; untrained 47, 47). Negative: conversions are
heard as the target in 75, 50 %, and without the adversary as often; on digits the linear probe still reads
94 % (98, a fresh classifier 16 for 72); on toy a fresh classifier is near chance, trained or not; stage 2
hardly helps.
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
    win: int = 800               # samples in an analysis window
    hop: int = 200               # samples between frames
    n_mels: int = 80             # mel bands
    crop: int = 25600            # samples in a training example
    batch_size: int = 32         # training examples in a batch, on each GPU
    steps: int = 158_000         # training steps
    lr: float = 1e-4             # learning rate of Adam
    seed: int = 0                # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True            # bfloat16 autocast on CUDA
    probe: int = 1500            # utterances at most to fit the probes on, and to score them on
    log_every: int = 100         # steps between log lines
    save_every: int = 5000       # steps between checkpoints

    adversary: float = 0.01      # weight of classifier-1's error in the encoder's objective; 0: the control
    instance_norm: bool = True   # in the encoder; false: leaves more of the speaker to the adversary
    ae_share: float = 8.0        # parts of the steps: auto-encoder alone
    classifier_share: float = 20.0  # then, in the same parts: classifier-1 alone
    joint_share: float = 80.0    # then both
    gan_share: float = 50.0      # then stage 2; 0: none, and convert leaves the generator out
    ramp: float = 50.0           # parts in which the adversary's weight rises from 0, once both learn
    classifier_steps: int = 5    # of classifier-1 in each joint step
    critic_steps: int = 5        # of the critic in each step of stage 2
    channels: int = 512          # of the latent and the blocks
    bank: int = 7                # kernels 1, 2 .. of the convolutions side by side at the bottom
    bank_channels: int = 128     # channels of each of the bank's kernels
    critic_channels: int = 64    # of the critic's first layer
    dropout: float = 0.5         # in the encoder
    classifier_dropout: float = 0.3  # in classifier-1
    penalty: float = 10.0        # weight of the gradient penalty
    clip: float = 5.0            # largest norm of a network's gradient
    generator_lr: float = 1e-4   # learning rate of Adam for the generator; lr: for the other networks

# Narrower, at 8 kHz, less dropout, other rates and shares (which are steps): three minutes on two CPU cores.
TOY = dict(sample_rate=8000, n_fft=256, win=200, hop=80, n_mels=40, crop=5120, batch_size=16, steps=880,
           lr=1.5e-3, save_every=500, ae_share=400.0, classifier_share=100.0, joint_share=300.0,
           gan_share=80.0, ramp=200.0, classifier_steps=3, channels=64, bank=4, bank_channels=16,
           critic_channels=8, dropout=0.1, classifier_dropout=0.0, generator_lr=2e-4)
TARGET = "speaker"               # what convert takes: the index of a training speaker

# ==================== the model ====================
class Conv(nn.Conv1d):
    """Over time, edges mirrored: T -> ceil(T / stride). An even kernel reaches one frame further back."""
    def forward(self, x):
        k = self.kernel_size[0]
        return super().forward(F.pad(x, (k // 2, (k - 1) // 2), mode="reflect"))

def pair(first, second, dropout, norm=True):
    """Two convolutions and what follows them everywhere but in the decoder, (B, C, T) -> (B, C', T')."""
    last = nn.InstanceNorm1d(second.out_channels) if norm else nn.Identity()
    return nn.Sequential(first, nn.LeakyReLU(), second, nn.LeakyReLU(), last, nn.Dropout(dropout))

class Encoder(nn.Module):
    """x (B, T, F) -> z (B, T', C), T' = ceil(T / 8): a bank of convolutions of many widths, three blocks that
    halve T, two dense ones, a GRU in both directions. InstanceNorm by itself removes much of the speaker."""
    def __init__(self, cfg):
        super().__init__()
        c, bins, options = cfg.channels, cfg.n_fft // 2 + 1, (cfg.dropout, cfg.instance_norm)
        self.bank = nn.ModuleList(Conv(bins, cfg.bank_channels, k + 1) for k in range(cfg.bank))
        self.mix = pair(nn.Identity(), nn.Conv1d(cfg.bank * cfg.bank_channels + bins, c, 1), *options)
        self.down = nn.ModuleList(pair(Conv(c, c, 5), Conv(c, c, 5, stride=2), *options) for _ in range(3))
        self.dense = nn.ModuleList(pair(nn.Conv1d(c, c, 1), nn.Conv1d(c, c, 1), *options) for _ in range(2))
        self.gru = nn.GRU(c, c // 4, batch_first=True, bidirectional=True)
        self.leave = nn.Linear(c + c // 4 * 2, c)

    def forward(self, x):
        T = max(x.shape[1], 9, len(self.bank) // 2 + 1)     # D4: of 9 frames 3 are left for the last halving
        x = x[:, torch.arange(T, device=x.device) % x.shape[1]].mT.contiguous()          # (B, F, T)
        h = self.mix(torch.cat([*(conv(x) for conv in self.bank), x], 1))
        for block in self.down:
            h = block(h) + F.avg_pool1d(F.pad(h, (0, h.shape[2] % 2), mode="reflect"), 2)
        for block in self.dense:
            h = h + block(h)
        h = h.mT                                                             # (B, T', C)
        return F.leaky_relu(self.leave(torch.cat([h, self.gru(h)[0]], 2)))

class Decoder(nn.Module):
    """z (B, T', C), speaker (B,) -> (B, 8 T', F). Five tables of speaker vectors: one for each block that
    doubles T, one for the two dense blocks, one for the GRU. The generator of stage 2 is another of these."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        c, bins = cfg.channels, cfg.n_fft // 2 + 1
        self.speaker = nn.ModuleList(nn.Embedding(n_speakers, c) for _ in range(5))
        self.up = nn.ModuleList(nn.ModuleList([Conv(c, 2 * c, 3), Conv(c, c, 3)]) for _ in range(3))
        self.dense = nn.ModuleList(nn.ModuleList(nn.Conv1d(c, c, 1) for _ in range(2)) for _ in range(2))
        self.gru = nn.GRU(c, c // 2, batch_first=True, bidirectional=True)
        self.leave = nn.Sequential(nn.Linear(2 * c + c // 2 * 2, c), nn.LeakyReLU(), nn.Linear(c, bins))

    def forward(self, z, speaker):
        h, e = z.mT, [table(speaker)[..., None] for table in self.speaker]   # (B, C, T'), five of (B, C, 1)
        for (first, second), e_i in zip(self.up, e):
            y = F.leaky_relu(first(h + e_i))                                 # (B, 2 C, T)
            y = y.unflatten(1, (-1, 2)).mT.flatten(2)                        # pixel shuffle: (B, C, 2 T)
            h = F.instance_norm(F.leaky_relu(second(y + e_i))) + h.repeat_interleave(2, 2)
        for first, second in self.dense:
            y = F.leaky_relu(second(F.leaky_relu(first(h + e[3])) + e[3]))
            h = F.instance_norm(y) + h
        recurrent, e_5 = self.gru((h + e[4]).mT)[0], e[4].mT.expand(-1, h.shape[2], -1)
        return self.leave(torch.cat([h.mT, recurrent, e_5], 2))

class Classifier(nn.Module):
    """Classifier-1: z (B, T', C) -> logits of the speaker (B, S). The last kernel is as long as the latent of
    a training segment; a longer latent gives several positions, which are averaged (D4)."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        c, dropout = cfg.channels, cfg.classifier_dropout
        self.blocks = nn.ModuleList(pair(Conv(c, c, 5), Conv(c, c, 5), dropout) for _ in range(3))
        self.narrow = pair(Conv(c, c // 2, 3), Conv(c // 2, c // 4, 3), dropout)
        self.head = nn.Conv1d(c // 4, n_speakers, -(-(cfg.crop // cfg.hop) // 8))

    def forward(self, z):
        h = self.blocks[0](z.mT)
        for block in self.blocks[1:]:
            h = h + block(h)
        return self.head(self.narrow(h)).mean(2)

class Critic(nn.Module):
    """x (B, T, F) -> how real (B,), and classifier-2's logits of the speaker (B, S): convolutions over time
    and frequency with two heads, whose kernels are as large as the map of a training segment (D4)."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        c, T, bins = cfg.critic_channels, cfg.crop // cfg.hop, cfg.n_fft // 2 + 1
        if min(T, bins) < 33:                          # less cannot be mirrored after four halvings
            raise UserError(f"{T} frames, {bins} bins: the critic needs 33 of each; raise --crop or --n-fft")
        after, layers = lambda n: (nn.LeakyReLU(), nn.InstanceNorm2d(n), nn.Dropout2d(0.1)), []
        for a, b in itertools.pairwise((1, c, 2 * c, 4 * c, 8 * c, 8 * c)):
            layers += [nn.Conv2d(a, b, 5, 2, 2, padding_mode="reflect"), *after(b)]
        self.trunk = nn.Sequential(*layers, nn.Conv2d(8 * c, c // 2, 1), *after(c // 2))
        shape = -(-bins // 32), -(-T // 32)
        self.value, self.classifier = nn.Conv2d(c // 2, 1, shape), nn.Conv2d(c // 2, n_speakers, shape)

    def forward(self, x):
        h = self.trunk(x.mT[:, None])                                        # (B, C, F / 32, T / 32)
        return self.value(h).mean((1, 2, 3)), self.classifier(h).mean((2, 3))

class Model(nn.Module):
    """The five networks. Stage 1 trains encoder, decoder and classifier, stage 2 generator and critic."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        if min(cfg.channels, 2 * cfg.critic_channels) < 4 or max(cfg.dropout, cfg.classifier_dropout) >= 1:
            raise UserError("--channels must be 4 or more, --critic-channels 2 or more, a dropout below 1")
        self.cfg, self.n_speakers = cfg, n_speakers
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg, n_speakers)
        self.classifier, self.critic = Classifier(cfg, n_speakers), Critic(cfg, n_speakers)
        self.generator = Decoder(cfg, n_speakers)
        for last in self.generator.leave[2], self.critic.value, self.critic.classifier:      # D6
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def features(self, wave):
        """(B, N) -> x (B, T, F), T = 1 + N // hop, on a scale that is fixed."""
        return decibels(wave, self.cfg)

    def decode(self, z, speaker, frames, stage):
        """z (B, T', C), speaker (B,) -> x^ (B, frames, F), the rest cut (D4): Dec, in stage 2 Dec + Gen."""
        x = self.decoder(z, speaker).float()
        return (x + self.generator(z, speaker) if stage == 2 else x)[:, :frames]

    def vocode(self, x, samples):
        """(B, T, F) -> (B, samples): undoes `features`, with phases by Griffin-Lim (D5)."""
        x = F.pad(x.mT, (0, 1), mode="replicate").mT                         # a frame more, for N samples
        angle = torch.linspace(0, math.pi, self.cfg.n_fft // 2 + 1, device=x.device)
        emphasis = (1 - torch.polar(torch.full_like(angle, 0.97), -angle)).abs()
        return griffin_lim(10 ** (5 * x.clamp(0, 1) - 4) / emphasis, self.cfg)[:, :samples]

def decibels(wave, cfg):
    """(B, N) -> (B, T, F): linear magnitude after a pre-emphasis of 0.97, -80 dB to 20 dB as 0 to 1."""
    wave = wave - 0.97 * F.pad(wave, (1, 0))[:, :-1]
    return ((20 * stft(wave, cfg).abs().clamp(min=1e-5).log10() + 80) / 100).clamp(1e-8, 1)

# ==================== the objective ====================
def prepare(model, corpus, cfg):
    """Nothing to measure: the scale of the features is fixed."""
    if not any((cfg.ae_share, cfg.classifier_share, cfg.joint_share, cfg.gan_share)):
        raise UserError("--ae-share, --classifier-share, --joint-share and --gan-share are 0: raise one")

def make_optimizers(model, cfg):
    """Four: each step below moves the networks of one and leaves the others as they are."""
    adam = lambda *nets, lr=cfg.lr: torch.optim.Adam([p for net in nets for p in net.parameters()], lr,
                                                     betas=(0.5, 0.9), fused=True)
    return {"autoencoder": adam(model.encoder, model.decoder), "classifier": adam(model.classifier),
            "critic": adam(model.critic), "generator": adam(model.generator, lr=cfg.generator_lr)}

def update(loss, optimizer, cfg, *nets):
    """A step of these networks on `loss`. No other gets a gradient: the speaker's error passes through
    classifier-1, and the critic's judgement through the critic, without being added up for their weights."""
    optimizer.zero_grad()
    loss.backward(inputs=[p for net in nets for p in net.parameters()])
    for net in nets:
        nn.utils.clip_grad_norm_(net.parameters(), cfg.clip)
    optimizer.step()

def schedule(step, cfg):
    """-> the phase that `step` is in, 0 to 3, and the adversary's weight: in phase 2 it rises from 0."""
    shares = cfg.ae_share, cfg.classifier_share, cfg.joint_share, cfg.gan_share
    ends = [round(end * cfg.steps / sum(shares)) for end in itertools.accumulate(shares)]
    phase, ramp = sum(step >= end for end in ends), cfg.ramp * cfg.steps / sum(shares)
    return phase, cfg.adversary * min(1, (step - ends[1]) / max(ramp, 1)) if phase == 2 else 0.0

def segments(model, corpus, cfg, step, draw=0, utterances=None):
    """-> x (B, T, F) of random segments, speaker (B,). U1: B is 32. D1: of utterances drawn alike."""
    batch = get_batch(corpus, cfg, step, draw, utterances)
    x, speaker = model.features(batch["wave"])[:, :cfg.crop // cfg.hop], batch["speaker"]
    # D3: in silence deviations are 0, each InstanceNorm multiplies the gradient by 1e-5 ** -0.5, and clipping
    # leaves nothing of the rest of the batch. So another segment takes the place of a silent one.
    heard = x.std(1).mean(1) > 0.01                                          # (B,), 1 dB
    keep = torch.where(heard, torch.arange(len(x), device=x.device), heard.int().argmax())
    return x[keep], speaker[keep]

def classifier_step(model, optimizers, x, speaker, cfg):
    """Classifier-1 learns to name the speaker of a latent; the encoder is not asked (D2)."""
    with torch.no_grad():
        z = model.encoder(x)
    logits = model.classifier(z).float()
    loss = F.cross_entropy(logits, speaker)
    update(loss, optimizers["classifier"], cfg, model.classifier)
    accuracy = (logits.argmax(1) == speaker).float().mean()
    return {"classifier_loss": loss.detach(), "classifier_accuracy": accuracy}

def autoencoder_step(model, optimizers, x, speaker, weight, cfg):
    """L_rec - weight * CE: encoder and decoder learn to rebuild x from z and its TRUE speaker, the encoder
    also to make classifier-1 err. The cheapest place for the speaker is then the decoder's tables."""
    z = model.encoder(x)
    rec = F.l1_loss(model.decode(z, speaker, x.shape[1], stage=1), x)
    loss = rec - weight * F.cross_entropy(model.classifier(z).float(), speaker) if weight else rec
    update(loss, optimizers["autoencoder"], cfg, model.encoder, model.decoder)
    return {"reconstruction_loss": rec.detach()}

def converted(model, x):
    """x (B, T, F) -> x' (B, T, F) and random speakers y' (B,), the true ones among them."""
    aim = torch.randint(model.n_speakers, (len(x),), device=x.device)
    with torch.no_grad():
        z = model.encoder(x)
    return model.decode(z, aim, x.shape[1], stage=2), aim

def gradient_penalty(critic, real, fake):
    """Mean of (1 - |gradient of the critic|)^2 at a random point between each real and fake segment, both
    (B, T, F). In float32, for bfloat16 spoils a gradient's gradient."""
    with torch.autocast(real.device.type, enabled=False):
        mix = torch.rand(len(real), 1, 1, device=real.device)
        u = (mix * real + (1 - mix) * fake).float().requires_grad_()                 # (B, T, F)
        gradient, = torch.autograd.grad(critic(u)[0].sum(), u, create_graph=True)
        return (1 - (gradient.square().sum((1, 2)) + 1e-12).sqrt()).square().mean()

def critic_step(model, optimizers, x, speaker, cfg):
    """The critic learns to tell real segments from converted ones, classifier-2 the speaker of real ones."""
    with torch.no_grad():
        fake = converted(model, x)[0]
    (real_value, logits), fake_value = model.critic(x), model.critic(fake)[0]
    distance = real_value.float().mean() - fake_value.float().mean()
    error, penalty = F.cross_entropy(logits.float(), speaker), gradient_penalty(model.critic, x, fake)
    update(error - distance + cfg.penalty * penalty, optimizers["critic"], cfg, model.critic)
    return {"critic_distance": distance.detach(), "penalty": penalty.detach(),
            "classifier_2_loss": error.detach()}

def generator_step(model, optimizers, x, cfg):
    """The generator learns a residual that the critic takes for real and classifier-2 for the target speaker.
    Nothing else keeps what was said: it is what the decoder's output has already."""
    fake, aim = converted(model, x)
    value, logits = model.critic(fake)
    error = F.cross_entropy(logits.float(), aim)
    update(error - value.float().mean(), optimizers["generator"], cfg, model.generator)
    return {"generator_loss": error.detach()}

def train_step(model, optimizers, corpus, step, cfg):
    """One step of the phase that `step` is in. Every inner step has a fresh batch."""
    phase, weight = schedule(step, cfg)
    model.encoder.train(phase < 3)                                         # D2: no dropout in what is frozen
    batch, log = lambda draw: segments(model, corpus, cfg, step, draw), {}
    if phase == 0:
        return autoencoder_step(model, optimizers, *batch(0), 0.0, cfg)
    if phase == 1:
        return classifier_step(model, optimizers, *batch(0), cfg)
    if phase == 2:
        for k in range(cfg.classifier_steps):
            log |= classifier_step(model, optimizers, *batch(k + 1), cfg)
        return log | autoencoder_step(model, optimizers, *batch(0), weight, cfg)
    for k in range(cfg.critic_steps):
        log |= critic_step(model, optimizers, *batch(k + 1), cfg)
    return log | generator_step(model, optimizers, batch(0)[0], cfg)

# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> content (T', C): the latent z, one vector for 8 frames."""
    return {"content": model.encoder(model.features(wave[None]))[0]}

@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,), each with the index of a training speaker -> waves (N,): what the source says, in that
    voice, by both stages, with gan_share 0 by the first alone. None reconstructs: of the training speakers it
    takes the one with whom the decoder comes closest to the source."""
    waves = []
    for wave, target in zip(sources, targets):
        x = model.features(wave[None])
        z, speakers = model.encoder(x), torch.arange(model.n_speakers, device=x.device)[:, None]
        if target is None:
            target = torch.stack([F.l1_loss(model.decode(z, s, x.shape[1], 1), x) for s in speakers]).argmin()
        y = model.decode(z, speakers[target], x.shape[1], 2 if cfg.gan_share else 1)
        waves.append(model.vocode(y, len(wave))[0])
    return waves

@torch.enable_grad()
def fresh_classifier(encoder, corpus, cfg):
    """The authors' probe: a new classifier-1, trained on the latents of a frozen encoder for a quarter of
    the run's steps, at most 20,000 -> the share of held-out segments whose speaker it names. The classifier
    that the encoder was trained against would be no judge: the encoder has learned to mislead that one."""
    torch.manual_seed(cfg.seed + 1)                    # not the weights that the run's classifier began with
    fresh = Model(cfg, len(corpus.speakers)).to(cfg.device).train()
    optimizers, fresh.encoder = make_optimizers(fresh, cfg), encoder.eval()
    rng, right = np.random.default_rng(cfg.seed), []
    for step in range(min(-(-cfg.steps // 4), 20_000)):
        us = corpus.train[rng.integers(len(corpus.train), size=cfg.batch_size)]
        classifier_step(fresh, optimizers, *segments(fresh, corpus, cfg, step, 1000, us), cfg)
    for draw, us in itertools.product(range(4), np.array_split(corpus.held, -(-len(corpus.held) // 64))):
        x, speaker = segments(fresh, corpus, cfg, 0, 1001 + draw, us)
        right.append(fresh.eval().classifier(encoder(x)).argmax(1) == speaker)
    return torch.cat(right).float().mean().item()

@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes what each stage makes of an utterance of four training speakers in the voice of each of them,
    and global_variance.npy (real, copy, stages; speakers; F): over time, of a frequency, in dB^2, the mean
    over held-out utterances, real, copied by Griffin-Lim alone, and converted by each stage. Returns
    `fresh_classifier`, also of an untrained encoder; means of those variances; and as variance_error how far
    they are from real speech of the speaker (of conversions: the target), the mean |ln ratio|."""
    torch.manual_seed(cfg.seed)
    nets = {"content": model.encoder, "untrained": Model(cfg, corpus.known).to(cfg.device).encoder}
    metrics = {"fresh_classifier": {name: fresh_classifier(net, corpus, cfg) for name, net in nets.items()}}
    us = corpus.held[(corpus.speaker[corpus.held] < corpus.known) & (corpus.length[corpus.held] > cfg.win)]
    who, stages = corpus.speaker[us], (1, 2)[:1 + (cfg.gan_share > 0)]
    of_stage = {n: Config(**asdict(cfg) | {"gan_share": n - 1.0}) for n in stages}
    by_stage = lambda wave, s, n: convert(model, [wave], [s], of_stage[n])[0]
    for a, b, n in itertools.product([*dict.fromkeys(who)][:4], [*dict.fromkeys(who)][:4], stages):
        wave = by_stage(corpus.wave(us[who == a][0]).to(cfg.device), b, n)
        name = f"grid_{corpus.speakers[a]}_as_{corpus.speakers[b]}_stage{n}.wav"
        write_audio(out / name, wave, cfg.sample_rate)
    names = ("real", "copy", "stage_1", "stage_2")[:2 + len(stages)]
    total = torch.zeros(len(names), corpus.known, cfg.n_fft // 2 + 1)
    count = torch.zeros(len(names), corpus.known, 1)
    for i, (u, own) in enumerate(zip(us[:cfg.probe], who)):
        wave, other = corpus.wave(u).to(cfg.device), (own + 1 + i % (corpus.known - 1)) % corpus.known
        copy = model.vocode(model.features(wave[None]), len(wave))[0]
        made = (own, wave), (own, copy), *((other, by_stage(wave, other, n)) for n in stages)
        for k, (s, y) in enumerate(made):
            total[k, s] += (100 * model.features(y[None])[0]).var(0, correction=0).cpu()             # (F,)
            count[k, s] += 1
    variance = (total / count)[:, (count > 0).all(0)[:, 0]].clamp(min=1)     # (names, S', F), at least 1 dB^2
    if variance.numel():
        np.save(out / "global_variance.npy", variance.numpy())
        mean = lambda v: v.mean((1, 2)).tolist()
        metrics["variance"] = dict(zip(names, mean(variance)))
        metrics["variance_error"] = dict(zip(names[1:], mean((variance[1:] / variance[0]).log().abs())))
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
