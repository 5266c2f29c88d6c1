# SPDX-License-Identifier: MIT
"""What conversions sound like: pairs of speakers, converted, and judged by probes of real speech.

A run is what tests/compare.py loads: script, model, cfg, and the names of the speakers it knows. A
pool is the corpus that sources and targets come from. Its speakers are numbered on their own, so
a model that takes the index of a speaker finds it by name.
"""

import collections
from dataclasses import dataclass

import numpy as np
import torch

import measure
from measure import UserError

CLIP_SECONDS = 3.0  # of an utterance that is converted
AT_ONCE = 50  # waves in one call of convert: an autoregressive decoder samples them together
SPOKEN = "target source target_posterior source_posterior phones vde ffe variance".split()


@dataclass(eq=False)
class Pair:
    """What is converted: an utterance, the target speaker, and a recording of that speaker."""

    source: int
    target: int | None = None
    recording: int | None = None


@dataclass(eq=False)
class Clip:
    """The loudest CLIP_SECONDS of an utterance, the second at which they begin, and what is known."""

    wave: torch.Tensor
    begin: float
    speaker: int
    labels: np.ndarray | None  # of the whole utterance, one per 10 ms
    f0: torch.Tensor = None  # (T,) Hz, of the sources of pairs


@dataclass(eq=False)
class Listening:
    """Pairs from one corpus, and probes of real speech that judge what is made from them."""

    pool: object  # the corpus
    judged: np.ndarray  # utterances that the probes are fitted on; disjoint from the pairs
    pairs: list
    labels: dict  # utterance -> labels, one per 10 ms
    classes: list  # names of the labels
    target_seconds: float = CLIP_SECONDS  # of a recording that is a target
    judge: object = None  # frames -> log posterior of the voices
    voices: list = ()  # the speaker of each class of the judge
    speller: object = None  # frames -> log posterior of the labels; None without labels
    variance: dict = None  # speaker -> variance over time of real speech (n_mels,)
    clips: dict = None  # source -> Clip
    copy: dict = None  # verdict on copy synthesis


# ---------- which utterances ----------


def name_of(corpus, utterance):
    """The path of an utterance below the data folder.

    A long recording is several utterances in a row, named long.wav, long#2.wav, long#3.wav ..
    """
    path = corpus.paths[utterance]
    name = path.relative_to(corpus.root)
    number = 1
    while utterance >= number and corpus.paths[utterance - number] == path:
        number += 1
    if number > 1:
        name = name.with_stem(f"{name.stem}#{number}")
    return name.as_posix()


def draw(corpus, utterances, limit, seed):
    """At most `limit` of the utterances, drawn evenly over speakers."""
    names = [name_of(corpus, u) for u in utterances]
    speakers = corpus.speaker[utterances].tolist()
    return utterances[measure.draw_evenly(names, speakers, limit, seed)]


def split_for_judge(pool, args):
    """-> utterances to fit the judge on, and utterances for pairs.

    The judge is fitted on training utterances. A corpus of --test has none, so the judge gets every
    second utterance of each speaker.
    """
    held = draw(pool, pool.held, len(pool.held), args.seed)
    if len(pool.train):
        return draw(pool, pool.train, args.probe, args.seed), held
    turns = collections.Counter()
    parts = ([], [])
    for u in held:
        speaker = pool.speaker[u]
        parts[turns[speaker] % 2].append(u)
        turns[speaker] += 1
    return np.array(parts[0][: args.probe], int), np.array(parts[1], int)


def draw_listening(pool, args, known=None):
    """Draws the pairs of one corpus. known: names of the only speakers that may be targets."""
    judged, rest = split_for_judge(pool, args)
    voices = sorted(set(pool.speaker[judged].tolist()))
    rest = [u for u in rest.tolist() if pool.speaker[u] in voices]
    recordings = {s: [u for u in rest if pool.speaker[u] == s] for s in voices}
    targets = [s for s in voices if recordings[s]]
    if known is not None:
        targets = [s for s in targets if pool.speakers[s] in known]

    uses = collections.Counter()
    pairs = []
    speakers = pool.speaker[rest].tolist()
    for position, target in measure.draw_pairs(speakers, targets, args.pairs):
        recording = recordings[target][uses[target] % len(recordings[target])]
        uses[target] += 1
        pairs.append(Pair(rest[position], target, recording))
    if not pairs:  # a single speaker can still be reconstructed
        pairs = [Pair(u) for u in rest[: args.pairs]]
    return Listening(pool, judged, pairs, {}, [], args.target_seconds)


def utterances_of(listening):
    return [*listening.judged, *(pair.source for pair in listening.pairs)]


# ---------- the judge ----------


def mel_of(run, wave):
    """(N,) -> (T, n_mels) log-mel as the judge sees it."""
    return measure.audible(run.script.log_mel(wave[None].to(run.cfg.device), run.cfg)[0].cpu())


def cut(run, listening, utterance, seconds=CLIP_SECONDS):
    """An utterance -> the Clip that is converted and judged."""
    wave = listening.pool.wave(utterance).cpu()
    start, end = measure.loudest_window(wave, run.cfg.sample_rate, seconds)
    speaker = int(listening.pool.speaker[utterance])
    labels = listening.labels.get(utterance)
    return Clip(wave[start:end], start / run.cfg.sample_rate, speaker, labels)


def labels_of(run, clip, frames):
    seconds = len(clip.wave) / run.cfg.sample_rate
    return measure.labels_of_frames(clip.labels, frames, seconds, clip.begin)


def fit_judge(run, listening, screen):
    """Fits the judge of voices and the speller on real speech; keeps its variance over time."""
    listening.voices = sorted(set(listening.pool.speaker[listening.judged].tolist()))
    frames_each = max(1, measure.FRAMES_TO_FIT // len(listening.judged))
    spectra = []
    voices = []
    labeled = []  # the spectra that have labels
    phones = []
    variances = collections.defaultdict(list)
    for done, u in enumerate(listening.judged.tolist()):
        screen.progress(done, len(listening.judged))
        clip = cut(run, listening, u)
        mel = mel_of(run, clip.wave)
        variances[clip.speaker].append(measure.variance_over_time(mel))
        at = measure.evenly_spaced(len(mel), frames_each)
        spectra.append(mel[at])
        voices.append(torch.full((len(at),), listening.voices.index(clip.speaker)))
        if clip.labels is not None:
            labeled.append(mel[at])
            phones.append(labels_of(run, clip, len(mel))[at])
    listening.variance = {s: torch.stack(rows).mean(0) for s, rows in variances.items()}
    n_voices = len(listening.voices)
    listening.judge = measure.linear_probe(torch.cat(spectra), torch.cat(voices), n_voices)
    if labeled:
        n_phones = len(listening.classes)
        listening.speller = measure.linear_probe(torch.cat(labeled), torch.cat(phones), n_phones)


def judge_wave(run, listening, clip, wave, target, source):
    """One wave made from a clip -> its figures, and its variance. Source None: not asked."""
    mel = mel_of(run, wave)
    posterior = measure.verdict(listening.judge, mel)
    heard = listening.voices[int(posterior.argmax())]
    vde, ffe = measure.f0_errors(measure.yin(wave, run.cfg.sample_rate), clip.f0)
    figures = {
        "target": float(heard == target),
        "target_posterior": posterior[listening.voices.index(target)].item(),
        "vde": vde,
        "ffe": ffe,
    }
    if source is not None:
        figures["source"] = float(heard == source)
        figures["source_posterior"] = posterior[listening.voices.index(source)].item()
    if listening.speller and clip.labels is not None:
        is_kept = listening.speller(mel).argmax(1) == labels_of(run, clip, len(mel))
        figures["phones"] = is_kept.float().mean().item()
    return figures, measure.variance_over_time(mel)


def judge_waves(run, listening, clips, waves, targets=None):
    """Waves made from clips -> SPOKEN. Without targets each is judged as its own speaker."""
    figures = collections.defaultdict(list)
    variances = collections.defaultdict(list)
    for i, (clip, wave) in enumerate(zip(clips, waves)):
        target = targets[i] if targets else clip.speaker
        source = clip.speaker if targets else None
        of_wave, variance = judge_wave(run, listening, clip, wave, target, source)
        for name, value in of_wave.items():
            figures[name].append(value)
        variances[target].append(variance)
    for speaker, rows in variances.items():
        made = torch.stack(rows).mean(0)
        ratio = measure.log_variance_ratio(made, listening.variance[speaker])
        figures["variance"].append(ratio)
    means = {name: float(np.mean(figures[name])) if figures[name] else None for name in SPOKEN}
    return {"pairs": len(waves)} | means


# ---------- what is judged ----------


def convert(run, clips, targets, screen):
    """Clips, with a target each -> waves on the CPU, made in batches."""
    torch.manual_seed(run.cfg.seed)  # some decoders sample
    waves = []
    for first in range(0, len(clips), AT_ONCE):
        screen.progress(first, len(clips))
        sources = [clip.wave.to(run.cfg.device) for clip in clips[first : first + AT_ONCE]]
        waves += run.script.convert(run.model, sources, targets[first : first + AT_ONCE], run.cfg)
    if not all(wave.isfinite().all() for wave in waves):
        raise UserError(
            f"{run.name}: converted speech is not finite; train it anew with a lower --lr"
        )
    return [wave.float().cpu() for wave in waves]


def copy_synthesis(run, wave):
    """(N,) -> (N',): Griffin-Lim of its own log-mel, a bound for methods that use it."""
    mel = run.script.log_mel(wave[None].to(run.cfg.device), run.cfg)
    magnitude = run.script.mel_to_magnitude(mel.exp(), run.cfg)
    return run.script.griffin_lim(magnitude, run.cfg)[0].cpu()


def target_of(run, listening, pair):
    """What `convert` of this method takes as the target of a pair; None where it has none."""
    if pair.target is None:
        return None
    name = listening.pool.speakers[pair.target]
    if run.script.TARGET == "speaker" and name in run.speakers:
        return run.speakers.index(name)
    if run.script.TARGET == "recording":
        recording = cut(run, listening, pair.recording, listening.target_seconds)
        return recording.wave.to(run.cfg.device)
    return None


def prepare_listening(run, listening, screen):
    """Fits the judge, cuts the sources and judges their copies, once for all runs of a setting."""
    screen.begin("fitting the judge")
    fit_judge(run, listening, screen)
    screen.begin("copy synthesis")
    listening.clips = {}
    copies = []
    sources = list(dict.fromkeys(pair.source for pair in listening.pairs))
    for done, u in enumerate(sources):
        screen.progress(done, len(sources))
        clip = cut(run, listening, u)
        clip.f0 = measure.yin(clip.wave, run.cfg.sample_rate)
        listening.clips[u] = clip
        copies.append(copy_synthesis(run, clip.wave))
    listening.copy = judge_waves(run, listening, listening.clips.values(), copies)


def measure_speech(run, setting, screen):
    """-> SPOKEN of conversion, reconstruction and copy synthesis."""
    listening = setting.closed if run.script.TARGET == "speaker" else setting.open
    if not listening.pairs:
        screen.note(f"{listening.pool.root}: one utterance a speaker, so none to convert")
        return {"conversion": None, "reconstruction": None, "copy": None}
    if listening.judge is None:
        prepare_listening(run, listening, screen)
    screen.begin("reconstructing and converting")
    clips = list(listening.clips.values())
    rebuilt = convert(run, clips, [None] * len(clips), screen)
    table = {"conversion": None, "reconstruction": judge_waves(run, listening, clips, rebuilt)}
    targets = [target_of(run, listening, pair) for pair in listening.pairs]
    has_targets = all(target is not None for target in targets)
    if run.script.TARGET and has_targets:
        clips = [listening.clips[pair.source] for pair in listening.pairs]
        waves = convert(run, clips, targets, screen)
        speakers = [pair.target for pair in listening.pairs]
        table["conversion"] = judge_waves(run, listening, clips, waves, speakers)
    elif run.script.TARGET:
        screen.note(f"{listening.pool.root}: no second speaker known, so none to convert to")
    return table | {"copy": listening.copy}
