# SPDX-License-Identifier: MIT
"""One-shot voice conversion: instance normalisation takes the speaker out, AdaIN puts another one in.

Chou, Yeh, Lee, "One-shot Voice Conversion by Separating Speaker and Content Representations with Instance
Normalization", Interspeech 2019, arXiv:1904.05742.

The idea. What stays the same throughout an utterance is mostly the speaker, what changes is what is said.
Instance normalisation (IN) subtracts from each channel its mean over time and divides by its deviation: in
the content encoder this removes much of what stays the same. The speaker encoder has no IN and averages over
time, which removes what changes. The decoder normalises too, and is given the speaker as the new mean and
deviation of its channels (AdaIN). All three learn as one variational auto-encoder, from single segments,
without labels; so neither voice of a conversion needs to be known, and one recording of the target will do.

    wave (B, N) -> pre-emphasis -> mel spectrum in dB, each band standardised: x (B, T, F)
    x -> content encoder, with IN -> mu, log sigma^2 (B, T', D); z = mu + sigma * noise; T' = T / 8 (TOY: / 4)
    x -> speaker encoder, average over T -> e (B, E)
    z -> conv, IN, ReLU -> 6 blocks (TOY: 4), each two times: conv, AdaIN, ReLU -> conv -> x^ (B, T, F)
    AdaIN(h, e) = IN(h) * scale(e) + shift(e)        IN(h) = (h - mean over T) / sqrt(variance over T + 1e-5)

    L = l1 |x - x^| + kl min(1, (step + 1) / kl_steps) KL(N(mu, sigma^2) || N(0, 1)), means over all elements

    symbol   here                 shape         symbol        here             shape or value
    E_c(x)   model.content: mu    (B, T', D)    gamma, beta   scale, shift     (B, C, 1), of AdaIN
    E_s(x)   model.speaker: e     (B, E)        lambda_rec    cfg.l1           10
    D(z, e)  model.decoder: x^    (B, T, F)     lambda_kl     cfg.kl           1 (TOY: 0.1)
    B batch, T frames, F mel bands, C channels in the blocks, D and E sizes of z and e

Differs from the paper. Of it we had what the authors say beside their published code, not the text: sizes,
weights and schedule here are those of that code in its last state.
D1  IN comes before the ReLU. In the paper: after it.
D2  The posterior's variance is learned, and its KL rises to weight 1 in 20,000 steps. In the paper the
    variance is 1, so the KL is half the mean square of mu; the authors' earlier code: 0.01 times that square.
D3  No dropout; AdaIN's scale and shift are linear in e; kernels of 5. The authors' earlier code has dropout
    of 0.5 in the encoders, an MLP on e, kernels of 3 in the speaker encoder and more layers in the decoder.
D4  Any length goes in and the same comes out: a short x is repeated, a long x^ cut. Silence stays, but not a
    silent training segment. The authors trim silence, need 17 frames (9 of the target), return 8 T' frames.
D5  Griffin-Lim with momentum from a random phase, on the pseudo-inverse of the mel filters, de-emphasis in
    the spectrum. The authors: 100 plain rounds from phase 0, a scaled transpose, a recursive filter.
D6  Mean and deviation of a mel band are of utterances of all speakers, the deviation at least 1 dB; segments
    are cut from the waveform, anew in every step. The authors: of the first 5000 files by name, which in VCTK
    are a dozen speakers; cut from the spectrogram (so that edges see what is beyond), 10 million, once.
The paper does not say, or not to us
U1  Over what L averages: here, as in the authors' code, both terms are means over all elements.
U2  What several recordings of the target give: here they are joined, so that the average over time is of all.

The log shows l1 in deviations of a mel band, of z on segments: 0.8 for a model that knows only the means,
0.21 to 0.33 reported by users of the authors' code; and kl in nats per element of z. In result.json
metrics.l1 is of mu on whole test utterances, decoded with their own embedding, with that of ANOTHER
recording of the speaker, and with another speaker's: if e held only the speaker, the first two would be
equal. metrics.active: channels of z with more than 0.01 nats. The paper's claim: from `content` the speaker
is read worse than in a run with --instance-norm false.

    python adain_vc.py                                  a toy corpus, two minutes on two CPU cores
    python adain_vc.py --data DIR --test DIR2           any folder of audio, the authors' size, for a GPU
    python adain_vc.py convert --checkpoint runs/a --source a.wav --target b.wav --output c.wav

Measured on CPU threads, not on a GPU, at TOY's size. Toy corpus, seeds 0, 1, 2: from `content` the speaker
is read in 31, 24, 28 % (chance 12, untrained 25, 18, 25), without instance norm in 91, 74, 76 % (untrained
89, 90, 94): it is the norm that drops the speaker, not the training, which brings back the phones, 59 to 83
% (83 to 87). Seed 0, unseen speakers: EER of `speaker` 34 % on toy (untrained 43, log-mel 44), 11 % on
LibriSpeech (20, 23), 20 % on words (28, 31); heard as the target 71, 50, 33 %, as the source 8, 0, 4 %.
Negative: without the norm as many are (67 % on toy, 54 % on LibriSpeech); e also tells what was said (l1 on
toy: own 0.14, same speaker 0.34, another speaker 0.37); no word is read from a frame of `content` of words;
and on digits the speaker is, in 94 %.
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
    sample_rate: int = 24000     # Hz
    n_fft: int = 2048            # points of the Fourier transform
    win: int = 1200              # samples in an analysis window
    hop: int = 300               # samples between frames
    n_mels: int = 512            # mel bands
    crop: int = 38400            # samples in a training example
    batch_size: int = 128        # training examples in a batch, on each GPU
    steps: int = 500_000         # training steps
    lr: float = 5e-4             # learning rate of Adam
    seed: int = 0                # of weights, batches and noise
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to run
    bf16: bool = True            # bfloat16 autocast on CUDA
    probe: int = 1500            # utterances at most to fit the probes on, and to score them on
    log_every: int = 100         # steps between log lines
    save_every: int = 5000       # steps between checkpoints

    instance_norm: bool = True   # in the content encoder; false: the control of the paper's claim
    channels: int = 128          # of the blocks, and of the speaker encoder's dense layers
    d_content: int = 128         # D, channels of the latent
    d_speaker: int = 128         # E, size of the speaker embedding
    bank: int = 8                # kernels 1, 2 .. of the convolutions side by side at the bottom
    bank_channels: int = 128     # channels of each of the bank's kernels
    blocks: int = 6              # blocks in each encoder and in the decoder; every second halves or doubles T
    dense: int = 6               # residual blocks of the speaker encoder after the average over time
    l1: float = 10.0             # weight of the reconstruction
    kl: float = 1.0              # weight of the KL term
    kl_steps: int = 20_000       # steps in which that weight rises from 0
    weight_decay: float = 1e-4   # of Adam: L2, added to the gradient
    clip: float = 5.0            # largest norm of the gradient of all parameters

# The same model, narrower, at 16 kHz, for two CPU cores and two minutes; kl was chosen by trial.
TOY = dict(sample_rate=16000, n_fft=512, win=400, hop=200, n_mels=64, crop=12800, batch_size=16, steps=2200,
           lr=2e-3, save_every=500, channels=64, d_content=16, bank=4, bank_channels=16, blocks=4, dense=2,
           kl=0.1, kl_steps=375)
TARGET = "recording"             # what convert takes: any recording of the target speaker

# ==================== the model ====================
class Conv(nn.Conv1d):
    """Over time, edges mirrored: T -> ceil(T / stride). An even kernel reaches one frame further back."""
    def forward(self, x):
        k = self.kernel_size[0]
        return super().forward(F.pad(x, (k // 2, (k - 1) // 2), mode="reflect"))

class Encoder(nn.Module):
    """What both encoders have, x (B, T, F) -> h (B, C, T'): a bank of convolutions of many widths, then
    residual blocks. With `norm`, InstanceNorm takes mean and deviation over time from every channel, and with
    them much of what does not change in an utterance: the speaker."""
    def __init__(self, cfg, norm):
        super().__init__()
        c, Norm = cfg.channels, nn.InstanceNorm1d if norm else nn.Identity
        # of this many frames 3 are left at the lowest rate, as few as can be mirrored by 2
        self.min_frames = max(2 ** (cfg.blocks // 2 + 1), cfg.bank // 2) + 1
        self.bank = nn.ModuleList(Conv(cfg.n_mels, cfg.bank_channels, k + 1) for k in range(cfg.bank))
        self.mix = nn.Sequential(
            nn.Conv1d(cfg.bank * cfg.bank_channels + cfg.n_mels, c, 1), Norm(c), nn.ReLU())
        self.blocks = nn.ModuleList(nn.Sequential(                           # D1: ReLU last; D3: no dropout
            Conv(c, c, 5), Norm(c), nn.ReLU(),
            Conv(c, c, 5, stride=1 + i % 2), Norm(c), nn.ReLU()) for i in range(cfg.blocks))

    def trunk(self, x):
        T = max(x.shape[1], self.min_frames)                                 # D4: x again and again
        x = x[:, torch.arange(T, device=x.device) % x.shape[1]].mT.contiguous()          # (B, F, T)
        h = self.mix(torch.cat([*(conv(x).relu() for conv in self.bank), x], 1))
        for i, block in enumerate(self.blocks):
            h = block(h) + (F.avg_pool1d(h, 2, ceil_mode=True) if i % 2 else h)
        return h

class ContentEncoder(Encoder):
    """x (B, T, F) -> mean and log variance of q(z | x), (B, T', D) each."""
    def __init__(self, cfg):
        super().__init__(cfg, cfg.instance_norm)
        self.mu, self.log_var = (nn.Conv1d(cfg.channels, cfg.d_content, 1) for _ in range(2))

    def forward(self, x):
        h = self.trunk(x)
        return self.mu(h).mT, self.log_var(h).mT

class SpeakerEncoder(Encoder):
    """x (B, T, F) -> e (B, E). No norm: it would remove what is wanted. The average over time drops the
    order of things; no label and no loss but the reconstruction says what e should be."""
    def __init__(self, cfg):
        super().__init__(cfg, norm=False)
        c = cfg.channels
        self.dense = nn.ModuleList(nn.Sequential(nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU())
                                   for _ in range(cfg.dense))
        self.project = nn.Linear(c, cfg.d_speaker)

    def forward(self, x):
        h = self.trunk(x).mean(-1)                                           # (B, C)
        for block in self.dense:
            h = h + block(h)
        return self.project(h)

class AdaIN(nn.Module):
    """h (B, C, T), e (B, E) -> IN(h) * scale(e) + shift(e): over time, channel c gets the mean shift_c and
    the deviation |scale_c|, whatever it had. (In AdaIN for images they are statistics of another image.)"""
    def __init__(self, cfg):
        super().__init__()
        self.affine = nn.Linear(cfg.d_speaker, 2 * cfg.channels)

    def forward(self, h, e):
        shift, scale = self.affine(e)[..., None].chunk(2, 1)                 # (B, C, 1) each, in this order
        return F.instance_norm(h) * scale + shift

class DecoderBlock(nn.Module):
    """h (B, C, T), e (B, E) -> (B, C, up T): conv, AdaIN, ReLU, twice, and a residual."""
    def __init__(self, cfg, up):
        super().__init__()
        self.up, c = up, cfg.channels
        self.first, self.adain_1 = Conv(c, c, 5), AdaIN(cfg)
        self.second, self.adain_2 = Conv(c, c * up, 5), AdaIN(cfg)

    def forward(self, h, e):
        y = self.second(self.adain_1(self.first(h), e).relu())               # (B, up C, T)
        y = y.unflatten(1, (-1, self.up)).mT.flatten(2)                      # pixel shuffle: (B, C, up T)
        return self.adain_2(y, e).relu() + h.repeat_interleave(self.up, 2)

class Decoder(nn.Module):
    """z (B, T', D), e (B, E) -> x^ (B, 8 T', F). By the first InstanceNorm a constant added to z, and what of
    the speaker hides in it, is not seen. Of the voice it is told by e, in every block."""
    def __init__(self, cfg):
        super().__init__()
        c = cfg.channels
        self.enter = nn.Sequential(nn.Conv1d(cfg.d_content, c, 1), nn.InstanceNorm1d(c), nn.ReLU())
        self.blocks = nn.ModuleList(DecoderBlock(cfg, up=1 + i % 2) for i in reversed(range(cfg.blocks)))
        self.leave = nn.Conv1d(c, cfg.n_mels, 1)

    def forward(self, z, e):
        h = self.enter(z.mT)
        for block in self.blocks:
            h = block(h, e)
        return self.leave(h).mT

class Model(nn.Module):
    """Three networks, and mean and deviation of each mel band. The number of speakers is of no use here."""
    def __init__(self, cfg, n_speakers):
        super().__init__()
        self.cfg = cfg
        self.register_buffer("mean", torch.zeros(cfg.n_mels))
        self.register_buffer("std", torch.ones(cfg.n_mels))
        self.content, self.speaker, self.decoder = ContentEncoder(cfg), SpeakerEncoder(cfg), Decoder(cfg)

    def features(self, wave):
        """(B, N) -> x (B, T, F), T = 1 + N // hop, standardised."""
        return (decibels(wave, self.cfg) - self.mean) / self.std

    def decode(self, z, e, frames):
        """z (B, T', D), e (B, E) -> x^ (B, frames, F). D4: what is more than the source has is cut off."""
        return self.decoder(z, e)[:, :frames]

    def vocode(self, x, samples):
        """(B, T, F) -> (B, samples): undoes `features`, with phases by Griffin-Lim (D5)."""
        x = F.pad(x.mT, (0, 1), mode="replicate").mT                         # a frame more, for N samples
        mel = 10 ** (5 * (x * self.std + self.mean).clamp(0, 1) - 4)         # 100 dB x - 80 dB
        angle = torch.linspace(0, math.pi, self.cfg.n_fft // 2 + 1, device=x.device)
        emphasis = (1 - torch.polar(torch.full_like(angle, 0.97), -angle)).abs()
        return griffin_lim(mel_to_magnitude(mel, self.cfg) / emphasis, self.cfg)[:, :samples]

def decibels(wave, cfg):
    """(B, N) -> (B, T, F): mel magnitude after a pre-emphasis of 0.97, -80 dB to 20 dB as 0 to 1."""
    wave = wave - 0.97 * F.pad(wave, (1, 0))[:, :-1]
    return ((20 / math.log(10) * log_mel(wave, cfg) + 80) / 100).clamp(1e-8, 1)

# ==================== the objective ====================
@torch.no_grad()
def prepare(model, corpus, cfg):
    """Before the first step: mean and deviation of every mel band, over at most 5000 utterances. D6: at least
    1 dB, or a band that is silent in training would blow up what is not quite silent later."""
    n, total, squares = 0, 0, 0
    for u in corpus.train[:5000]:
        x = decibels(corpus.wave(u)[None].to(cfg.device), cfg)[0].double()   # (T, F)
        n, total, squares = n + len(x), total + x.sum(0), squares + x.square().sum(0)
    model.mean.copy_(total / n)
    model.std.copy_((squares / n - (total / n) ** 2).clamp(min=1e-4).sqrt())

def make_optimizers(model, cfg):
    """One for the three networks."""
    return {"autoencoder": torch.optim.Adam(model.parameters(), cfg.lr, amsgrad=True, fused=True,
                                            weight_decay=cfg.weight_decay)}

def kl_to_normal(mu, log_var):
    """KL(N(mu, exp(log_var)) || N(0, 1)) in nats, per element: zero at mu = 0, log_var = 0."""
    return 0.5 * (log_var.exp() + mu.square() - 1 - log_var)

def train_step(model, optimizers, corpus, step, cfg):
    """One step on L. The same segment goes into both encoders."""
    batch, optimizer = get_batch(corpus, cfg, step), optimizers["autoencoder"]
    x = model.features(batch["wave"])[:, :cfg.crop // cfg.hop]               # (B, T, F)
    # D4: in silence deviations are 0, each InstanceNorm multiplies the gradient by 1e-5 ** -0.5, and clipping
    # leaves nothing of the rest of the batch. So another segment takes the place of a silent one.
    heard = x.std(1).mean(1) > 0.1                                           # (B,), 0.1 of a deviation
    keep = torch.where(heard, torch.arange(len(x), device=x.device), heard.int().argmax())
    x = x[keep]
    mu, log_var = (h.float() for h in model.content(x))                      # (B, T', D)
    z = mu + (log_var / 2).exp() * torch.randn_like(mu)
    l1 = F.l1_loss(model.decode(z, model.speaker(x), x.shape[1]).float(), x)     # U1: means over all elements
    kl = kl_to_normal(mu, log_var).mean()
    loss = cfg.l1 * l1 + cfg.kl * min(1, (step + 1) / cfg.kl_steps) * kl     # D2
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    optimizer.step()
    return {"loss": loss.detach(), "l1": l1.detach(), "kl": kl.detach()}

# ==================== what it is good for ====================
@torch.no_grad()
def represent(model, wave, cfg):
    """(N,) -> content (T', D): the mean of q(z | x); speaker (E,): the embedding e."""
    x = model.features(wave[None])
    return {"content": model.content(x)[0][0], "speaker": model.speaker(x)[0]}

@torch.no_grad()
def convert(model, sources, targets, cfg):
    """Waves (N,), each with a recording (N',) of any speaker -> waves (N,): what the source says, in that
    voice. Several recordings of the target, joined to one, are averaged by the speaker encoder (U2). None
    reconstructs: the source is its own target."""
    waves = []
    for wave, target in zip(sources, targets):
        x = model.features(wave[None])
        e = model.speaker(x if target is None else model.features(target[None]))
        waves.append(model.vocode(model.decode(model.content(x)[0], e, x.shape[1]), len(wave))[0])
    return waves

@torch.no_grad()
def sample(model, corpus, cfg, out):
    """Writes a grid of one-shot conversions, grid_SOURCE_as_TARGET.wav, between at most four speakers of the
    test set, which with --test were never heard in training. Returns, over test utterances: the L1 with the
    utterance's own embedding, with that of another recording of its speaker, and with another speaker's, as
    far as there are any; the KL in nats per element; how many of the D channels have more than 0.01 of it."""
    pool, us, l1, kl = corpus.test, corpus.test.held, collections.defaultdict(list), []
    voices = {pool.speakers[s]: us[pool.speaker[us] == s] for s in dict.fromkeys(pool.speaker[us])}
    for a, b in itertools.product([*voices][:4], repeat=2):
        source, target = (pool.wave(u).to(cfg.device) for u in (voices[a][0], voices[b][-1]))
        write_audio(out / f"grid_{a}_as_{b}.wav", convert(model, [source], [target], cfg)[0], cfg.sample_rate)
    features = lambda u: model.features(pool.wave(u)[None].to(cfg.device))
    for u in us[:cfg.probe]:
        x, same = features(u), pool.speaker[us] == pool.speaker[u]
        mu, log_var = model.content(x)
        kl.append(kl_to_normal(mu, log_var).mean((0, 1)))                    # (D,)
        for name, vs in ("own", [u]), ("same_speaker", us[same & (us != u)]), ("another_speaker", us[~same]):
            if len(vs):                                                      # u picks one, always the same
                y = model.decode(mu, model.speaker(features(vs[u % len(vs)])), x.shape[1])
                l1[name].append(F.l1_loss(y, x).item())
    kl = torch.stack(kl).mean(0)
    return {"l1": {name: sum(values) / len(values) for name, values in l1.items()},
            "kl": kl.mean().item(), "active": int((kl > 0.01).sum())}

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
