# SPDX-License-Identifier: MIT
"""Adversarial VC: voice conversion between known speakers with a latent adversary and a GAN.

Paper    Chou, Yeh, Lee, Lee. Multi-target Voice Conversion without Parallel Data by Adversarially
         Learning Disentangled Audio Representations. Interspeech 2018, arXiv:1804.02812.
         Sizes, weights and schedule follow the authors' code. Of the paper only the abstract was
         at hand, so the items below compare with the code.

Idea     Stage 1 is an autoencoder whose decoder is told the speaker, so the latent need not carry
         it. To keep it out, classifier-1 learns to predict the speaker from the latent, and the
         encoder is trained to raise its error. To convert, the decoder is told another speaker.
         Its output is blurred, because it minimizes an L1 error. Stage 2 freezes encoder and
         decoder. A generator, built like the decoder, adds a residual. A critic judges how real
         the sum is, and classifier-2 whether it sounds like the target speaker.

Model    wave (B, N) -> pre-emphasis, linear magnitude: -80 to 20 dB as 0 to 1   x    (B, T, F)
         encoder, with instance normalization (IN), T' = ceil(T / 8)             z    (B, T', C)
         decoder, with IN; the speaker y enters through five embedding tables    Dec  (B, T, F)
         generator: a second decoder, whose output is a residual                 Gen  (B, T, F)
         converted segment: x' = Dec(z, y') + Gen(z, y'), y' a random speaker    x'   (B, T, F)
         classifier-1 on z: logits of the speaker                                     (B, S)
         critic on x or x': D, how real it is (B,); classifier-2, a second head       (B, S)

Loss     Stage 1   8,000 steps   encoder and decoder       L_rec = |Dec(z, y) - x|
                  20,000 steps   classifier-1              CE_1(z, y)
                  80,000 steps   5 x classifier-1          CE_1(z, y)
                                 1 x encoder and decoder   L_rec - w CE_1(z, y)
         Stage 2  50,000 steps   5 x critic                D(x') - D(x) + CE_2(x, y) + 10 GP
                                 1 x generator             -D(x') + CE_2(x', y')
         GP is the mean of (1 - |grad D(u)|)^2, where u is a random point between x and x'. The
         weight w rises linearly from 0 to 0.01 in the first 50,000 joint steps. L_rec is a mean
         over all elements, the other terms are means over the batch. Every update draws its batch.

Symbols  Dec, Gen   model.decoder, .generator            z      model.encoder(x)
         D, CE_2    model.critic(x): D and logits        CE_1   model.classifier(z): logits
         y, y'      speaker, target (B,)                 w      weight, at most cfg.adversary
         CE is the cross-entropy in nats. B segments, N samples, T frames, F bins, C channels,
         S speakers. The phases share cfg.steps in the ratio of the cfg.*_share.

Differs from the paper
D1  Every training utterance is equally likely, and segments are cut anew for every update. The
    authors draw the speaker first, trim silence and cut 500,000 segments in advance.
D2  In stage 2 the frozen encoder has no dropout. The authors leave its dropout on.
D3  A silent training segment is replaced by another one of its batch. In silence each IN divides
    by sqrt(1e-5), and the gradient of one such segment would drown that of all the others.
D4  Every length is accepted and kept: fewer than 9 frames are repeated, and the output is cut to
    T frames. The authors need 9 frames and return a multiple of 8. Here the heads of classifier-1
    and critic are made for cfg.crop / cfg.hop frames. The authors' are fixed: classifier-1 takes
    121 to 128 frames, the critic 97 to 128.
D5  The waveform comes from Griffin-Lim with momentum, and de-emphasis is done in the spectrum. The
    authors use 300 plain iterations and a recursive filter, and trim silence.
D6  The last layers of generator and critic start at zero, so stage 2 begins with the output of
    stage 1. With the default initialization the critic's large gradients soon spoil that output.
Not specified in the paper
U1  The batch size: here 32, as in the authors' configuration. Their script ignores it and uses 16.

Usage    python adversarial_vc.py                    toy corpus, two minutes on two CPU cores
         python adversarial_vc.py --data DIR         any folder of audio, full size, for a GPU
         python adversarial_vc.py convert --checkpoint RUN --source a.wav --target p5 --output b.wav
         To test the paper's claim, train again with --adversary 0. The logged classifier_loss (ln S
         by chance) says little about z: the encoder has learned to mislead that one classifier.
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
    win: int = 800  # samples in an analysis window
    hop: int = 200  # samples between frames
    n_mels: int = 80  # mel bands
    crop: int = 25600  # samples in a training example
    batch_size: int = 32  # training examples in a batch, on each GPU
    steps: int = 158_000  # training steps
    lr: float = 1e-4  # learning rate of Adam
    seed: int = 0  # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True  # bfloat16 autocast on CUDA
    log_every: int = 100  # steps between log lines
    save_every: int = 5000  # steps between checkpoints

    adversary: float = 0.01  # final weight w of classifier-1's error; 0: the control
    instance_norm: bool = True  # in the encoder; false: leaves more to the adversary
    ae_share: float = 8.0  # parts of the steps: encoder and decoder alone
    classifier_share: float = 20.0  # parts: classifier-1 alone
    joint_share: float = 80.0  # parts: both
    gan_share: float = 50.0  # parts: stage 2; 0: none
    ramp: float = 50.0  # parts over which w rises linearly, from the first joint step on
    classifier_steps: int = 5  # updates of classifier-1 in a joint step
    critic_steps: int = 5  # updates of the critic in a step of stage 2
    channels: int = 512  # C, of the latent and the blocks
    bank: int = 7  # kernels 1, 2 .. of the convolutions side by side at the bottom
    bank_channels: int = 128  # channels of each of the bank's kernels
    critic_channels: int = 64  # of the critic's first layer
    dropout: float = 0.5  # in the encoder
    classifier_dropout: float = 0.3  # in classifier-1
    penalty: float = 10.0  # weight of GP
    clip: float = 5.0  # largest norm of the gradient of a network
    generator_lr: float = 1e-4  # learning rate of the generator; lr is that of the others

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
        if min(self.crop // self.hop, self.n_fft // 2 + 1) < 33:
            raise UserError("the critic needs 33 frames and bins; raise --crop or --n-fft")
        if self.channels % 4 or self.critic_channels % 2:
            raise UserError("--channels must be a multiple of 4, --critic-channels of 2")
        if max(self.dropout, self.classifier_dropout) >= 1:
            raise UserError("--dropout and --classifier-dropout must be below 1")
        if not max(self.ae_share, self.classifier_share, self.joint_share, self.gan_share):
            raise UserError("--ae-share and the other three shares are 0: raise one")


# The same model, narrower, at 8 kHz, for two CPU cores and two minutes; the shares are steps.
TOY = dict(
    sample_rate=8000,
    n_fft=256,
    win=200,
    hop=80,
    n_mels=40,
    crop=5120,
    batch_size=16,
    steps=880,
    lr=1.5e-3,
    save_every=500,
    ae_share=400.0,
    classifier_share=100.0,
    joint_share=300.0,
    gan_share=80.0,
    ramp=200.0,
    classifier_steps=3,
    channels=64,
    bank=4,
    bank_channels=16,
    critic_channels=8,
    dropout=0.1,
    classifier_dropout=0.0,
    generator_lr=2e-4,
)
PHASES = ("autoencoder", "classifier", "joint", "stage 2")
TARGET = "speaker"  # kind of target that convert takes: a training speaker, by its index
PRE_EMPHASIS = 0.97
SCALES = (2, 2, 2, 1, 1)  # by which the encoder's blocks divide T and the decoder's multiply it


# ---------- model ----------
class Conv(nn.Conv1d):
    """Convolution over time with reflected edges: (B, C_in, T) -> (B, C_out, ceil(T / stride)).
    An even kernel sees one more frame of the past than of the future."""

    def forward(self, x):
        kernel = self.kernel_size[0]
        return super().forward(F.pad(x, (kernel // 2, (kernel - 1) // 2), mode="reflect"))


class BiGRU(nn.GRU):
    """h (B, T, C) -> (B, T, 2 * units), both directions of time. It runs in float32, because under
    autocast cuDNN's GRU runs in float16, even if bfloat16 is asked for, and its gradients would
    underflow."""

    def __init__(self, channels, units):
        super().__init__(channels, units, batch_first=True, bidirectional=True)

    def forward(self, h):
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(h.float())[0]


def conv_block(convs, dropout, Norm=nn.InstanceNorm1d, Dropout=nn.Dropout):
    """Convolutions, each followed by a LeakyReLU, then IN and dropout."""
    layers = []
    for conv in convs:
        layers += [conv, nn.LeakyReLU()]
    return nn.Sequential(*layers, Norm(convs[-1].out_channels), Dropout(dropout))


def apply_head(head, h):
    """h (B, C, *map) -> (B, n) in float32. A head is a convolution as large as the map of a
    training segment (D4)."""
    size = tuple(h.shape[2:])
    if size != head.kernel_size:
        raise ValueError(
            f"a map of {size} meets a head for {head.kernel_size}: the segment is not as long as "
            "those of training, cfg.crop"
        )
    return head(h).flatten(1).float()


class Encoder(nn.Module):
    """x (B, T, F) -> z (B, T', C), T' = ceil(T / 8). A bank of convolutions with kernels of 1, 2 ..
    7 frames, three blocks that halve T, two blocks of kernel 1 and a GRU. IN removes a part of the
    speaker; the adversary works on what is left."""

    def __init__(self, cfg):
        super().__init__()
        C = cfg.channels
        bins = cfg.n_fft // 2 + 1
        Norm = nn.InstanceNorm1d if cfg.instance_norm else nn.Identity
        self.bank = nn.ModuleList(
            Conv(bins, cfg.bank_channels, kernel) for kernel in range(1, cfg.bank + 1)
        )
        mix = nn.Conv1d(cfg.bank * cfg.bank_channels + bins, C, 1)
        self.mix = conv_block([mix], cfg.dropout, Norm)
        self.blocks = nn.ModuleList()
        for scale in SCALES:
            kernel = 5 if scale == 2 else 1
            convs = [Conv(C, C, kernel), Conv(C, C, kernel, stride=scale)]
            self.blocks.append(conv_block(convs, cfg.dropout, Norm))
        self.gru = BiGRU(C, C // 4)
        self.leave = nn.Linear(C + C // 2, C)

    def forward(self, x):
        # D4: halving needs 9 frames, because edges are reflected. The longest kernel of the bank
        # needs more than half its own length.
        while x.shape[1] < max(9, len(self.bank)):
            x = torch.cat([x, x], 1)
        x = x.mT  # (B, F, T)

        bank = [conv(x) for conv in self.bank]
        h = self.mix(F.leaky_relu(torch.cat([*bank, x], 1)))  # (B, C, T)
        for block, scale in zip(self.blocks, SCALES):
            whole = F.pad(h, (0, -h.shape[2] % scale), mode="reflect")
            h = block(h) + F.avg_pool1d(whole, scale)

        h = h.mT  # (B, T', C)
        return F.leaky_relu(self.leave(torch.cat([h, self.gru(h)], 2)))


class DecoderBlock(nn.Module):
    """h (B, C, T), e (B, C, 1) -> (B, C, scale * T). The speaker's vector e is added before each
    convolution; the skip connection carries h without it."""

    def __init__(self, C, scale):
        super().__init__()
        kernel = 3 if scale == 2 else 1
        self.scale = scale
        self.conv_1 = Conv(C, C * scale, kernel)
        self.conv_2 = Conv(C, C, kernel)

    def forward(self, h, e):
        y = F.leaky_relu(self.conv_1(h + e))  # (B, C * scale, T)
        y = y.unflatten(1, (-1, self.scale)).mT.flatten(2)  # pixel shuffle: (B, C, scale * T)
        y = F.leaky_relu(self.conv_2(y + e))
        return F.instance_norm(y) + h.repeat_interleave(self.scale, 2)


class Decoder(nn.Module):
    """z (B, T', C), speaker (B,) -> (B, 8 T', F): the decoder of stage 1 and the generator of stage
    2. Of the five tables of speaker vectors three belong to the blocks that double T, one to the
    two blocks of kernel 1, and one to the GRU and the last layers."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        C = cfg.channels
        self.speaker = nn.ModuleList(nn.Embedding(n_speakers, C) for _ in range(5))
        self.blocks = nn.ModuleList(DecoderBlock(C, scale) for scale in SCALES)
        self.gru = BiGRU(C, C // 2)
        self.leave = nn.Sequential(
            nn.Linear(3 * C, C), nn.LeakyReLU(), nn.Linear(C, cfg.n_fft // 2 + 1)
        )

    def forward(self, z, speaker):
        e = [table(speaker)[..., None] for table in self.speaker]  # (B, C, 1) each
        h = z.mT
        for block, e_block in zip(self.blocks, [*e[:4], e[3]]):
            h = block(h, e_block)

        recurrent = self.gru((h + e[4]).mT)  # (B, 8 T', C)
        e_frames = e[4].mT.expand(-1, h.shape[2], -1)
        return self.leave(torch.cat([h.mT, recurrent, e_frames], 2)).float()


class Classifier(nn.Module):
    """Classifier-1, the adversary: z (B, T', C) -> logits of the speaker (B, S). Its last kernel is
    as long as the latent of a training segment (D4)."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        C = cfg.channels
        self.blocks = nn.ModuleList(
            conv_block([Conv(C, C, 5), Conv(C, C, 5)], cfg.classifier_dropout) for _ in range(3)
        )
        narrow = [Conv(C, C // 2, 3), Conv(C // 2, C // 4, 3)]
        self.narrow = conv_block(narrow, cfg.classifier_dropout)
        self.head = nn.Conv1d(C // 4, n_speakers, ceil(cfg.crop // cfg.hop / 8))

    def forward(self, z):
        first, *others = self.blocks
        h = first(z.mT)
        for block in others:
            h = h + block(h)
        return apply_head(self.head, self.narrow(h))


class Critic(nn.Module):
    """x (B, T, F) -> D, how real x is (B,), and classifier-2's logits of the speaker (B, S). The
    kernels of both heads cover the whole map of a training segment (D4)."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        c = cfg.critic_channels
        widths = (1, c, 2 * c, 4 * c, 8 * c, 8 * c)
        convs = [
            nn.Conv2d(before, after, 5, stride=2, padding=2, padding_mode="reflect")
            for before, after in itertools.pairwise(widths)
        ]
        convs.append(nn.Conv2d(8 * c, c // 2, 1))
        self.trunk = nn.Sequential(
            *[conv_block([conv], 0.1, nn.InstanceNorm2d, nn.Dropout2d) for conv in convs]
        )
        shape = (cfg.n_fft // 64 + 1, ceil(cfg.crop // cfg.hop / 32))  # F / 32, T / 32, rounded up
        self.value = nn.Conv2d(c // 2, 1, shape)
        self.classifier = nn.Conv2d(c // 2, n_speakers, shape)

    def forward(self, x):
        h = self.trunk(x.mT[:, None])  # (B, c / 2, F / 32, T / 32)
        return apply_head(self.value, h)[:, 0], apply_head(self.classifier, h)


class Model(nn.Module):
    """The five networks. Stage 1 trains encoder, decoder and classifier, stage 2 generator and
    critic."""

    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg = cfg
        self.n_speakers = n_speakers
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg, n_speakers)
        self.classifier = Classifier(cfg, n_speakers)
        self.critic = Critic(cfg, n_speakers)
        self.generator = Decoder(cfg, n_speakers)
        for last in (self.generator.leave[-1], self.critic.value, self.critic.classifier):  # D6
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def features(self, wave):
        """(B, N) -> x (B, T, F), T = 1 + N // hop: magnitudes after pre-emphasis, with -80 dB ..
        20 dB as 0 .. 1."""
        wave = wave - PRE_EMPHASIS * F.pad(wave, (1, 0))[:, :-1]
        level = 20 * stft(wave, self.cfg).abs().clamp(min=1e-5).log10()
        return ((level + 80) / 100).clamp(1e-8, 1)

    def decode(self, z, speaker, frames, stage):
        """z (B, T', C), speaker (B,) -> (B, frames, F), cut to `frames` (D4): Dec in stage 1,
        Dec + Gen in stage 2, where Dec is frozen and gets no gradient."""
        if stage == 1:
            return self.decoder(z, speaker)[:, :frames]
        with torch.no_grad():
            x = self.decoder(z, speaker)
        return (x + self.generator(z, speaker))[:, :frames]

    def vocode(self, x, samples):
        """x (B, T, F) -> wave (B, samples): approximately inverts `features`, with phases from
        Griffin-Lim (D5)."""
        # T frames make hop * (T - 1) samples, so one more frame is needed.
        x = torch.cat([x, x[:, -1:]], 1)
        magnitude = 10 ** ((100 * x.clamp(0, 1) - 80) / 20)

        # Undo the pre-emphasis in the spectrum, where it is the gain of a filter of two taps.
        taps = torch.tensor([1, -PRE_EMPHASIS], device=x.device)
        gain = torch.fft.rfft(taps, self.cfg.n_fft).abs()  # (F,)
        return griffin_lim(magnitude / gain, self.cfg)[:, :samples]


# ---------- loss and training step ----------
def prepare(model, corpus, cfg):
    """Does nothing: the features have a fixed scale."""


def make_optimizers(model, cfg):
    """One Adam for encoder and decoder together, and one for each of the other networks."""

    def adam(*networks, lr=cfg.lr):
        parameters = nn.ModuleList(networks).parameters()
        return torch.optim.Adam(parameters, lr, betas=(0.5, 0.9), fused=True)

    return {
        "autoencoder": adam(model.encoder, model.decoder),
        "classifier": adam(model.classifier),
        "critic": adam(model.critic),
        "generator": adam(model.generator, lr=cfg.generator_lr),
    }


def update(loss, optimizer, cfg, *networks):
    """One step of `networks` on `loss`; the gradient of each is clipped by itself. No other network
    gets a gradient, though the error of classifier-1 passes through it on its way to the encoder,
    and the judgment of the critic on its way to the generator."""
    optimizer.zero_grad()
    loss.backward(inputs=[*nn.ModuleList(networks).parameters()])
    for network in networks:
        nn.utils.clip_grad_norm_(network.parameters(), cfg.clip)
    optimizer.step()


def schedule(step, cfg):
    """-> the phase of `step`, and the weight w of classifier-1's error, which rises from 0 from the
    first joint step on."""
    shares = (cfg.ae_share, cfg.classifier_share, cfg.joint_share, cfg.gan_share)
    steps_per_part = cfg.steps / sum(shares)
    ends = np.rint(np.cumsum(shares) * steps_per_part)
    phase = PHASES[np.searchsorted(ends, step, side="right")]
    rise = np.clip((step - ends[1]) / max(1, cfg.ramp * steps_per_part), 0, 1)
    return phase, cfg.adversary * float(rise)


def segments(model, corpus, cfg, step, draw, utterances=None):
    """-> x (B, T, F), speaker (B,): a segment of T = crop / hop frames from each utterance of a
    batch (U1), all utterances being equally likely (D1)."""
    # The crop has a margin, so that the window of every frame that is kept lies inside the crop.
    margin = ceil(cfg.win / 2 / cfg.hop)
    with_margin = replace(cfg, crop=cfg.crop + 2 * margin * cfg.hop)
    batch = get_batch(corpus, with_margin, step, draw, utterances)
    x = model.features(batch["wave"])[:, margin : margin + cfg.crop // cfg.hop]

    # D3: a segment is silent if its deviation over time, averaged over the bins, is at most 1 dB.
    audible = x.std(1).mean(1) > 0.01  # (B,)
    own = torch.arange(len(x), device=x.device)
    chosen = torch.where(audible, own, audible.int().argmax())
    return x[chosen], batch["speaker"][chosen]


def classifier_step(model, optimizers, x, speaker, cfg):
    """Stage 1: classifier-1 learns to predict the speaker from the latent."""
    with torch.no_grad():  # the encoder is not updated
        z = model.encoder(x)
    loss = F.cross_entropy(model.classifier(z), speaker)
    update(loss, optimizers["classifier"], cfg, model.classifier)
    return {"classifier_loss": loss.detach()}


def autoencoder_step(model, optimizers, x, speaker, weight, cfg):
    """Stage 1: encoder and decoder learn to rebuild x from z and its true speaker, the encoder also
    to make classifier-1 err."""
    z = model.encoder(x)
    reconstruction = F.l1_loss(model.decode(z, speaker, x.shape[1], stage=1), x)
    loss = reconstruction
    if weight:
        loss = loss - weight * F.cross_entropy(model.classifier(z), speaker)
    update(loss, optimizers["autoencoder"], cfg, model.encoder, model.decoder)
    return {"reconstruction_loss": reconstruction.detach()}


def converted(model, x):
    """x (B, T, F) -> x' (B, T, F), its targets y' (B,): random speakers, their own among them."""
    target = torch.randint(model.n_speakers, (len(x),), device=x.device)
    with torch.no_grad():
        z = model.encoder(x)
    return model.decode(z, target, x.shape[1], stage=2), target


@contextlib.contextmanager
def full_float32(device):
    """Switches off autocast and TF32, whose 10 bits of mantissa are too few for the gradient of a
    gradient."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = cuda.allow_tf32, cudnn.allow_tf32
    cuda.allow_tf32 = cudnn.allow_tf32 = False
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        cuda.allow_tf32, cudnn.allow_tf32 = before


def gradient_penalty(critic, real, fake):
    """GP: the mean of (1 - |grad D(u)|)^2, where u is a random point between a real and a fake
    segment (B, T, F). Compute it and its backward pass in `full_float32`."""
    mix = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device, dtype=real.dtype)
    u = fake.lerp(real, mix).requires_grad_()  # (B, T, F)
    value, _ = critic(u)
    (gradient,) = torch.autograd.grad(value.sum(), u, create_graph=True)
    return (1 - gradient.flatten(1).norm(dim=1)).square().mean()


def critic_step(model, optimizers, x, speaker, cfg):
    """Stage 2: the critic learns to tell real segments from converted ones, classifier-2 to predict
    the speaker of real ones."""
    with torch.no_grad():
        fake, _ = converted(model, x)
    real_value, logits = model.critic(x)
    fake_value, _ = model.critic(fake)
    distance = real_value.mean() - fake_value.mean()
    error = F.cross_entropy(logits, speaker)

    with full_float32(x.device.type):
        penalty = gradient_penalty(model.critic, x, fake)
        # Backward too, because it differentiates the gradient in the penalty.
        update(error - distance + cfg.penalty * penalty, optimizers["critic"], cfg, model.critic)
    return {
        "critic_distance": distance.detach(),
        "penalty": penalty.detach(),
        "classifier_2_loss": error.detach(),
    }


def generator_step(model, optimizers, x, cfg):
    """Stage 2: the generator learns a residual with which the critic takes the sum for real and
    classifier-2 for the target speaker. No term keeps what was said; only the output of the
    frozen decoder does."""
    fake, target = converted(model, x)
    value, logits = model.critic(fake)
    error = F.cross_entropy(logits, target)
    update(error - value.mean(), optimizers["generator"], cfg, model.generator)
    return {"generator_classifier_2_loss": error.detach()}


def train_step(model, optimizers, corpus, step, cfg):
    """The updates of one step of the schedule, each on a batch of its own."""
    phase, weight = schedule(step, cfg)
    model.encoder.train(phase != "stage 2")  # D2
    batch = functools.partial(segments, model, corpus, cfg, step)
    log = {}

    if phase == "classifier":
        return classifier_step(model, optimizers, *batch(0), cfg)
    if phase == "stage 2":
        for draw in range(cfg.critic_steps):
            log |= critic_step(model, optimizers, *batch(draw + 1), cfg)
        return log | generator_step(model, optimizers, batch(0)[0], cfg)
    if phase == "joint":
        for draw in range(cfg.classifier_steps):
            log |= classifier_step(model, optimizers, *batch(draw + 1), cfg)
    return log | autoencoder_step(model, optimizers, *batch(0), weight, cfg)


# ---------- representation, conversion, sampling ----------
@torch.no_grad()
def represent(model, wave, cfg):
    """wave (N,) -> content (T', C): the latent z, one vector for 8 frames."""
    return {"content": model.encoder(model.features(wave[None]))[0]}


@torch.no_grad()
def convert(model, sources, targets, cfg, stage=2):
    """Waves (N,), each with the index of a training speaker -> waves (N,) that say the same in that
    voice, by stage 1 alone or by both. None as a target reconstructs the source,
    with the training speaker who fits it best."""
    waves = []
    for source, target in zip(sources, targets):
        x = model.features(source[None])
        z = model.encoder(x)
        if target is None:
            # Take the training speaker with whom the decoder comes closest to the first 512
            # frames. z broadcasts over the speakers.
            speakers = torch.arange(model.n_speakers, device=x.device)
            guesses = model.decode(z[:, :64], speakers, x.shape[1], stage=1)  # (S, 512, F)
            target = (guesses - x[:, :512]).abs().mean((1, 2)).argmin()
        speaker = torch.tensor([target], device=x.device)
        x_hat = model.decode(z, speaker, x.shape[1], stage)
        waves.append(model.vocode(x_hat, len(source))[0])
    return waves


@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes up to eight held-out utterances in the voice of the next speaker, by stage 1 alone and
    by both stages: stage 2 should make them sharper. Returns L_rec of 32 held-out segments, in
    units of 100 dB."""
    for u in corpus.held[:8]:
        wave = corpus.wave(u).to(cfg.device)
        target = (corpus.speaker[u] + 1) % model.n_speakers
        for stage in (1, 2):
            (made,) = convert(model, [wave], [target], cfg, stage)
            stem = out / corpus.paths[u].stem[:60]
            write_audio(f"{stem}_stage_{stage}.wav", made, cfg.sample_rate)

    x, speaker = segments(model, corpus, cfg, 0, 0, corpus.held[:32])
    loss = F.l1_loss(model.decode(model.encoder(x), speaker, x.shape[1], stage=1), x)
    return {"reconstruction_loss": loss.item()}


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
