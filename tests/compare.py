# SPDX-License-Identifier: MIT
"""Measures runs side by side, and writes a page to look at and to listen to.

    python tests/compare.py                           the newest run of each script under runs/
    python tests/compare.py runs/a runs/b             these runs, on the data they were trained on
    python tests/compare.py runs/a --data DIR --test DIR --phones FILE

Every representation is probed beside log-mel, chance and the same model untrained. Conversions are
judged by probes of real speech, beside copy synthesis: Griffin-Lim of the source's own log-mel.
Leaves index.html, figure.svg, result.json and audio/ in --out, and prints the tables.
"""

import argparse
import collections
import contextlib
import importlib
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import measure  # noqa: E402
import page  # noqa: E402
import speech  # noqa: E402
from measure import UserError  # noqa: E402
from page import SCRIPTS  # noqa: E402
from speech import SPOKEN  # noqa: E402

SHOWN = 6  # rows of the page
RECORD = "script method_sha256 command config data steps seconds hardware torch metrics".split()
ROW = "phone speaker eer eer_lda nearest".split()


@dataclass(eq=False)
class Run:
    """A trained model, the corpus it is measured on, and what it left in its folder."""

    name: str
    script: object  # the module
    model: object
    cfg: object
    speakers: list  # names of those that the model knows, by its index
    corpus: object
    record: dict  # of run.json
    log: list  # of log.jsonl


@dataclass(eq=False)
class Setting:
    """What runs with the same corpora and the same log-mel share, and what is measured but once."""

    fit: np.ndarray  # utterances that probes are fitted on
    held: np.ndarray  # and scored on
    unseen: np.ndarray  # of corpus.test, for speaker verification
    closed: speech.Listening  # in the corpus; targets are training speakers
    open: speech.Listening  # in corpus.test; sources and targets are recordings of it
    seconds: float = math.inf  # of each utterance that probes see
    n_clusters: int | None = None  # of k-means of every representation; None: no k-means
    chance: dict = None
    log_mel: dict = None

    def shown(self):
        """(Listening, Pair) of each row of the page, those with unseen speakers last.

        Where there is one corpus, or no speaker that the model knows, all rows are of open pairs,
        which are the same for all runs.
        """
        known = [pair for pair in self.closed.pairs if pair.target is not None]
        is_open = self.open.pairs and (not known or self.open.pool is self.closed.pool)
        unseen = [(self.open, pair) for pair in self.open.pairs[: SHOWN if is_open else SHOWN // 3]]
        return [(self.closed, pair) for pair in self.closed.pairs[: SHOWN - len(unseen)]] + unseen


@dataclass(eq=False)
class Features:
    """A representation of some utterances, reduced to what the probes need."""

    average: list | torch.Tensor  # (U, D): mean over time; of units, the share of each
    frames: list | torch.Tensor  # (n, D): of utterances with labels
    phones: list | torch.Tensor  # (n,): the labels of the frames
    kind: str = ""  # vector, sequence or units
    counts: torch.Tensor = None  # (K,): how often each unit occurs


class Screen:
    """Prints what is measured and how far it is, at most every five seconds; and each note once."""

    def __init__(self):
        self.run = ""
        self.stage = ""
        self.last = 0.0
        self.notes = set()

    def begin(self, stage):
        self.stage = f"{self.run}: {stage}"
        self.last = time.monotonic()
        print(self.stage, flush=True)

    def progress(self, done, total):
        if time.monotonic() - self.last > 5:
            self.last = time.monotonic()
            print(f"{self.stage}: {done} of {total}", flush=True)

    def note(self, text):
        if text not in self.notes:
            self.notes.add(text)
            print(f"note: {text}", flush=True)


# ---------- runs ----------


def checkpoint_of(folder):
    return Path(folder) / "model.pt" if Path(folder).is_dir() else Path(folder)


def script_of(folder):
    """Run folder or model.pt -> the name of the script that wrote it."""
    file = checkpoint_of(folder)
    if not file.is_file():
        raise UserError(f"{file}: no such checkpoint; give run folders, such as runs/vqvae-1")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        name = checkpoint["script"]
    except Exception:  # torch raises many kinds for a file that is not a checkpoint
        raise UserError(f"{file}: not a checkpoint, or a damaged one; give another run") from None
    if name not in SCRIPTS:
        raise UserError(f"{file}: written by {name}, which is not one of {', '.join(SCRIPTS)}")
    return name


def newest_runs():
    """The folder of the newest run of each script under runs/."""
    newest = {}
    files = sorted(Path("runs").glob("*/model.pt"), key=lambda file: file.stat().st_mtime)
    for file in files:
        try:
            newest[script_of(file)] = file.parent
        except UserError as error:
            print(f"left out: {error}")
    if not newest:
        raise UserError("runs: no run in it; train one with `python adain_vc.py`, or name a folder")
    return [newest[name] for name in SCRIPTS if name in newest]


def unique_names(folders):
    """Folders -> names: the last parts of each path, as many as make them differ."""
    paths = [checkpoint_of(folder).resolve().parent for folder in folders]
    if len(set(paths)) < len(paths):
        raise UserError("RUN: a run is named twice; name each once")
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def open_run(folder, name, scripts, args, corpora):
    """Loads the model, the corpus that it is measured on, and the records of its training.

    corpora: those that other runs have loaded, to which this one is added if it is another.
    """
    overrides = {"device": "cuda" if torch.cuda.is_available() else "cpu"}
    if args.data is not None:
        overrides |= {"data": args.data, "test": ""}  # the old test folder need not fit
    for flag in ("test", "include"):
        if getattr(args, flag) is not None:
            overrides[flag] = getattr(args, flag)
    script = scripts[script_of(folder)]
    model, cfg, checkpoint = script.load(folder, **overrides)
    if args.test and not cfg.data:
        raise UserError(f"--test: {folder} was trained on the toy corpus; give --data, too")
    key = (cfg.data, cfg.test, cfg.include, cfg.speaker, cfg.sample_rate, cfg.win)
    if key not in corpora:
        corpora[key] = script.load_corpus(cfg)
    corpus = corpora[key]

    record = {
        "script": script.__name__,
        "steps": checkpoint["step"],
        "config": checkpoint["config"],
        "data": describe(corpus, cfg),
    }
    folder = checkpoint_of(folder).parent
    for line in read_json(folder / "run.json", by_line=False):
        record |= line
    log = read_json(folder / "log.jsonl", by_line=True)
    return Run(name, script, model, cfg, checkpoint["speakers"], corpus, record, log)


def read_json(file, by_line):
    """The values of a file, one or one a line; none if there is no file, as if unfinished."""
    if not file.is_file():
        return []
    text = file.read_text("utf-8", "replace")
    try:
        return [json.loads(part) for part in (text.splitlines() if by_line else [text])]
    except ValueError:
        raise UserError(f"{file}: damaged; remove it to measure the run without it") from None


def describe(corpus, cfg):
    """What a run is measured on, in numbers."""
    utterances = np.concatenate([corpus.train, corpus.held])
    return {
        "folder": str(corpus.root),
        "utterances": len(utterances),
        "speakers": len(corpus.speakers),
        "minutes": round(float(corpus.length[utterances].sum() / cfg.sample_rate / 60), 1),
    }


# ---------- which utterances ----------


def read_labels(corpus, file, cfg, needed):
    """-> {utterance: (M,) labels, one per 10 ms}, and the names of the classes.

    The utterances of a long recording lie one after another, and share a line of the file.
    """
    first = {}  # path -> its first utterance
    for u, path in enumerate(corpus.paths):
        first.setdefault(path, u)
    position = {path: i for i, path in enumerate(first)}
    names = [path.relative_to(corpus.root).as_posix() for path in first]
    recording = np.array([position[path] for path in corpus.paths])  # (U,)
    seconds = np.bincount(recording, corpus.length) / cfg.sample_rate

    rows, classes = measure.read_labels(file, names, seconds, recording[needed].tolist())
    labels = {}
    for u in needed:
        if recording[u] in rows:
            begin = corpus.start[u] - corpus.start[first[corpus.paths[u]]]
            end = begin + corpus.length[u]
            labels_a_sample = measure.LABELS_A_SECOND / cfg.sample_rate
            part = slice(round(begin * labels_a_sample), math.ceil(end * labels_a_sample))
            labels[u] = rows[recording[u]][part]
    return labels, classes


def draw_setting(run, args, screen):
    """Draws all utterances that are measured, and reads their labels."""
    corpus = run.corpus
    test = corpus.test
    fit = speech.draw(corpus, corpus.train, args.probe, args.seed)
    held = speech.draw(corpus, corpus.held, args.probe, args.seed)
    unseen = speech.draw(test, test.held, args.probe, args.seed)
    closed = speech.draw_listening(corpus, args, known=run.speakers)
    if test is corpus and set(corpus.speakers) <= set(run.speakers):
        opened = closed
    else:
        opened = speech.draw_listening(test, args)
    if test is corpus:
        screen.note(f"{corpus.root}: no --test, so the EER is of its own held-out utterances")
    setting = Setting(fit, held, unseen, closed, opened, args.seconds, args.clusters)
    read_data_labels(run, setting, args, screen)
    read_test_labels(run, setting, args, screen)
    return setting


def read_data_labels(run, setting, args, screen):
    """Labels of the data corpus: from --phones, else from its own phones.txt if there is one."""
    corpus = run.corpus
    closed = setting.closed
    file = Path(args.phones or Path(corpus.root) / "phones.txt")
    if args.phones and not file.is_file():
        raise UserError(f"--phones {file}: no such file; give a label file")
    if file.is_file():
        needed = [*setting.fit, *setting.held, *speech.utterances_of(closed)]
        if corpus.test is corpus:
            needed += speech.utterances_of(setting.open)
        closed.labels, closed.classes = read_labels(corpus, file, run.cfg, needed)
        if not closed.labels:
            example = corpus.paths[0].relative_to(corpus.root).with_suffix("")
            raise UserError(f"{file}: no line begins with an utterance id, such as {example}")
    else:
        screen.note(f"{file}: no such file, so no figures of phones; name one with --phones")


def read_test_labels(run, setting, args, screen):
    """Labels of the test corpus: from its own phones.txt, else from --phones if it has them."""
    test = run.corpus.test
    opened = setting.open
    file = Path(test.root) / "phones.txt"
    if args.phones and not file.exists():
        file = Path(args.phones)
    if test is run.corpus:
        opened.labels = setting.closed.labels
        opened.classes = setting.closed.classes
    elif file.exists():
        needed = speech.utterances_of(opened)
        opened.labels, opened.classes = read_labels(test, file, run.cfg, needed)
    else:
        screen.note(f"{file}: no such file, so phones kept are not counted in {test.root}")


def setting_key(run):
    cfg = run.cfg
    corpora = (str(run.corpus.root), str(run.corpus.test.root), cfg.speaker, cfg.include)
    spectrum = (cfg.sample_rate, cfg.n_fft, cfg.win, cfg.hop, cfg.n_mels)
    return *corpora, *spectrum, *run.speakers


# ---------- what representations know ----------


def collect(run, encode, corpus, utterances, labels, limit, seconds, screen):
    """Represents every utterance once -> {representation: Features}.

    Of each utterance the loudest `seconds` are represented. They are reduced at once, to their
    average and to evenly spaced frames, of which there are at most `limit` over all utterances. So
    memory does not grow with the length of the recordings.
    """
    frames_each = max(1, limit // max(1, sum(u in labels for u in utterances)))
    collected = collections.defaultdict(lambda: Features([], [], []))
    for done, u in enumerate(utterances):
        screen.progress(done, len(utterances))
        wave = corpus.wave(u)
        start, end = 0, len(wave)
        if seconds < math.inf:
            start, end = measure.loudest_window(wave, run.cfg.sample_rate, seconds)
        for name, x in encode(wave[start:end].to(run.cfg.device)).items():
            x = x.cpu()
            if not x.isfinite().all():
                raise UserError(
                    f"{run.name}: {name} is not finite; train it anew with a lower --lr"
                )
            features = collected[name]
            features.kind = "vector" if x.dim() == 1 else "sequence"
            if not x.is_floating_point():
                features.kind = "units"
            features.average.append(average_over_time(x, features.kind))
            if features.kind != "vector" and u in labels:
                begin = start / run.cfg.sample_rate
                length = (end - start) / run.cfg.sample_rate
                phones = measure.labels_of_frames(labels[u], len(x), length, begin)
                at = measure.evenly_spaced(len(x), frames_each)
                features.frames.append(x[at])
                features.phones.append(phones[at])
    return collected


def average_over_time(x, kind):
    """(T', D), (D,) or units (T',) -> (D,) mean over time, or how often each unit occurs."""
    if kind == "units":
        return x.bincount().float()
    return x.float().mean(0) if kind == "sequence" else x.float()


def join(parts):
    """Lists of Features become tensors; units become one-hot vectors, of one width in all parts."""
    width = max(len(row) for part in parts for row in part.average)
    for part in parts:
        part.average = torch.stack([F.pad(row, (0, width - len(row))) for row in part.average])
        if part.frames:
            part.frames = torch.cat(part.frames)
            part.phones = torch.cat(part.phones)
        if part.kind == "units":
            part.counts = part.average.sum(0)
            part.average = part.average / part.average.sum(1, keepdim=True)
            if len(part.frames):
                part.frames = F.one_hot(part.frames.long(), width).float()


def majority_map(fit, score):
    """Accuracy of the majority map from units to phones, and of one from shuffled units."""
    order = torch.Generator().manual_seed(0)
    shuffled = [(x[torch.randperm(len(x), generator=order)], y) for x, y in (fit, score)]
    return {
        "majority": measure.majority_map_accuracy(fit, score),
        "majority_shuffled": measure.majority_map_accuracy(*shuffled),
    }


def measure_row(run, setting, parts):
    """Features of three sets of utterances -> ROW."""
    fit, held, unseen = parts
    fit_speaker = torch.from_numpy(run.corpus.speaker[setting.fit])
    held_speaker = torch.from_numpy(run.corpus.speaker[setting.held])
    unseen_speaker = torch.from_numpy(run.corpus.test.speaker[setting.unseen])
    projected = unseen.average.double() @ measure.lda(fit.average, fit_speaker)
    row = {"phone": None}
    if len(fit.frames) and len(held.frames):
        frames = (fit.frames, fit.phones), (held.frames, held.phones)
        row["phone"] = measure.probe_accuracy(*frames)
        if held.kind == "units":
            row |= majority_map(*frames)
    return row | {
        "speaker": measure.probe_accuracy((fit.average, fit_speaker), (held.average, held_speaker)),
        "eer": measure.equal_error_rate(unseen.average, unseen_speaker),
        "eer_lda": measure.equal_error_rate(projected, unseen_speaker),
        "nearest": measure.nearest_neighbor_accuracy(unseen.average, unseen_speaker),
    }


def measure_representations(run, setting, encode, screen):
    """-> {representation: ROW}, and {representation: Features to fit, held-out, unseen}."""
    corpus, test = run.corpus, run.corpus.test
    labels = setting.closed.labels
    seconds = setting.seconds
    collected = [
        collect(run, encode, corpus, setting.fit, labels, measure.FRAMES_TO_FIT, seconds, screen),
        collect(
            run, encode, corpus, setting.held, labels, measure.FRAMES_TO_SCORE, seconds, screen
        ),
    ]
    if test is not corpus:
        collected.append(collect(run, encode, test, setting.unseen, {}, 0, seconds, screen))

    rows = {}
    table = {}
    for name in collected[0]:
        parts = [features[name] for features in collected]
        join(parts)
        table[name] = (parts[0], parts[1], parts[-1])  # without --test, held-out ones are unseen
        rows[name] = measure_row(run, setting, table[name])
        for part in parts:
            part.frames = []  # the largest part, and not needed any more
    return rows, table


def standardized(x):
    """(T', D) -> the same with a mean of 0 and a variance of 1 over time in every dimension."""
    return (x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-5)


def cluster_encoder(run, setting, n_clusters):
    """-> encode(wave) -> {name: units (T',)}: k-means of all that the run represents over time, and
    of log-mel; plain, and standardized over the utterance, which removes what is constant in it."""
    cpc = importlib.import_module("cpc")

    def sequences(wave):
        x = run.script.represent(run.model, wave, run.cfg)
        x = {name: z.cpu() for name, z in x.items() if z.dim() == 2 and z.is_floating_point()}
        x["log_mel"] = run.script.log_mel(wave[None], run.cfg)[0].cpu()
        normalized = {f"{name}_normalized": standardized(z) for name, z in x.items()}
        return x | normalized

    samples = collections.defaultdict(list)
    for u in setting.fit[measure.evenly_spaced(len(setting.fit), 300)]:
        for name, x in sequences(run.corpus.wave(u).to(run.cfg.device)).items():
            samples[name].append(x[measure.evenly_spaced(len(x), 100)])
    torch.manual_seed(0)
    centroids = {name: cpc.kmeans(torch.cat(x), n_clusters)[0] for name, x in samples.items()}

    def encode(wave):
        x = sequences(wave)
        return {f"{name}_clusters": cpc.assign(x[name], centroids[name])[0] for name in x}

    return encode


def measure_reference(run, setting, screen):
    """Fills in chance and log-mel, once for all runs of a setting."""
    screen.begin("log-mel")

    def encode(wave):
        return {"log_mel": run.script.log_mel(wave[None], run.cfg)[0]}

    rows, table = measure_representations(run, setting, encode, screen)
    setting.log_mel = rows["log_mel"]
    held = table["log_mel"][1]
    unseen_speaker = torch.from_numpy(run.corpus.test.speaker[setting.unseen])
    is_verified = setting.log_mel["eer"] is not None
    if not is_verified:
        screen.note(
            f"{run.corpus.test.root}: no EER, which needs two speakers, one with two utterances"
        )
    setting.chance = {
        "phone": measure.chance_accuracy(held.phones) if len(held.phones) else None,
        "speaker": measure.chance_accuracy(torch.from_numpy(run.corpus.speaker[setting.held])),
        "eer": 0.5 if is_verified else None,
        "eer_lda": 0.5 if is_verified else None,
        "nearest": measure.nearest_neighbor_chance(unseen_speaker),
    }


def untrained_model(run):
    """The same model as it was before its first step."""
    torch.manual_seed(run.cfg.seed)
    model = run.script.Model(run.cfg, len(run.speakers)).to(run.cfg.device)
    run.script.prepare(model, run.corpus, run.cfg)
    return model.eval()


# ---------- the page ----------


def printable(name):
    """A name from a path of any bytes, with '?' for what is not text."""
    return name.encode("utf-8", "replace").decode("utf-8")


def row_key(listening, pair):
    """What identifies a row of several runs: folder, utterance, target speaker."""
    pool = listening.pool
    target = "" if pair.target is None else pool.speakers[pair.target]
    return str(pool.root), speech.name_of(pool, pair.source), target


def add_clip(row, run, kind, wave, out):
    """Writes a wave to out/audio, and adds it to a row of the page."""
    is_given = kind in ("source", "copy", "target")  # the same for all runs
    run_name = None if is_given else run.name
    words = [str(row["number"]), Path(row["utterance"]).name[-60:], run_name or "", kind]
    path = f"audio/{re.sub(r'[^a-zA-Z0-9.-]+', '_', '_'.join(words))}.wav"
    run.script.write_audio(out / path, wave, run.cfg.sample_rate)
    clip = {"run": run_name, "kind": kind, "path": path, "sample_rate": run.cfg.sample_rate}
    clip["wave"] = wave.numpy().astype(np.float32)
    clip["target"] = row["target_speaker"] if kind in ("target", "conversion") else None
    row["clips"].append(clip)


def new_row(run, listening, pair, number, out):
    """A row of the page, with the source, its copy and a recording of the target."""
    _, name, target = row_key(listening, pair)
    clip = speech.cut(run, listening, pair.source)
    seconds = len(clip.wave) / run.cfg.sample_rate
    row = {
        "number": number,
        "utterance": printable(Path(name).with_suffix("").as_posix()),
        "speaker": printable(listening.pool.speakers[clip.speaker]),
        "target_speaker": printable(target) or None,
        "seconds": seconds,
        "phones": [],
        "clips": [],
        "units": {},
    }
    if clip.labels is not None:
        names = np.array(listening.classes)[clip.labels].tolist()
        row["phones"] = measure.label_segments(names, clip.begin, seconds)
    add_clip(row, run, "source", clip.wave, out)
    add_clip(row, run, "copy", speech.copy_synthesis(run, clip.wave), out)
    if pair.recording is not None:
        add_clip(row, run, "target", speech.cut(run, listening, pair.recording).wave, out)
    return row


def read_units(run, wave, n_units):
    """(N,) -> the units that a run reads from it, {run name: ..}; empty if the method has none."""
    units = {}
    for name, x in run.script.represent(run.model, wave.to(run.cfg.device), run.cfg).items():
        if not x.is_floating_point():
            ids = x.cpu().numpy().astype(np.int64)
            units[run.name] = {"name": name, "ids": ids, "classes": max(n_units, ids.max() + 1)}
    return units


def show_run(run, setting, rows, n_units, out, screen):
    """Adds what a run makes of the utterances of the page, and the units it reads from them."""
    screen.begin("the page")
    shown = [(rows[row_key(*where)], *where) for where in setting.shown()]
    clips = [speech.cut(run, listening, pair.source) for _, listening, pair in shown]
    rebuilt = speech.convert(run, clips, [None] * len(clips), screen)
    for (row, _, _), clip, wave in zip(shown, clips, rebuilt):
        add_clip(row, run, "reconstruction", wave, out)
        row["units"] |= read_units(run, clip.wave, n_units)

    # A method that knows its speakers by index has no target in the rows of unseen ones.
    targets = [speech.target_of(run, listening, pair) for _, listening, pair in shown]
    with_target = [i for i, target in enumerate(targets) if target is not None]
    sources = [clips[i] for i in with_target]
    converted = speech.convert(run, sources, [targets[i] for i in with_target], screen)
    for i, wave in zip(with_target, converted):
        add_clip(shown[i][0], run, "conversion", wave, out)


def rows_of_page(runs, settings, usage, out, screen):
    """The rows of the page. The run of the highest sample rate gives source, copy, target."""
    rows = {}
    for run in sorted(runs, key=lambda run: -run.cfg.sample_rate):
        for listening, pair in settings[run.name].shown():
            key = row_key(listening, pair)
            if key not in rows:
                rows[key] = new_row(run, listening, pair, len(rows), out)
    for run in runs:
        n_units = len(usage[run.name]["counts"]) if run.name in usage else 0
        screen.run = run.name
        show_run(run, settings[run.name], rows, n_units, out, screen)
    return list(rows.values())


def vectors_and_usage(run, setting, table):
    """-> {representation: vectors of unseen speakers}, and how often each unit is used."""
    vectors = {}
    usage = None
    test = run.corpus.test
    for name, (_, held, unseen) in table.items():
        if held.kind != "units":
            speakers = [printable(test.speakers[s]) for s in test.speaker[setting.unseen]]
            vectors[name] = {"x": unseen.average.numpy(), "speaker": speakers}
        else:
            usage = {"name": name, "counts": held.counts.numpy().astype(np.int64)}
    return vectors, usage


# ---------- the result ----------


def spread(values):
    """The same figure, or dict of figures, of several runs -> its mean and range."""
    if None in values:
        return None
    if isinstance(values[0], dict):
        return {name: spread([value[name] for value in values]) for name in values[0]}
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def seeds_of(result):
    """Runs that differ in nothing but their seed -> mean and range of their figures."""
    measured = ("untrained", "representations", "conversion", "reconstruction", "copy")
    summaries = []
    for group in page.make_groups(result):
        if len(group.runs) > 1:
            facts = {"script": group.script, "runs": group.names}
            facts["seeds"] = [run["config"]["seed"] for run in group.runs]
            figures = spread([{key: run[key] for key in measured} for run in group.runs])
            summaries.append(facts | figures)
    return summaries


def cells(row, figures):
    """Figures of a row -> texts, in percent except the variance; of seeds mean and range."""
    texts = []
    for figure in figures:
        scale, digits = (1, 3) if figure == "variance" else (100, 1)
        value = row[figure]
        if value is None:
            texts.append("-")
        elif isinstance(value, dict):
            mean, low, high = (f"{scale * value[of]:.{digits}f}" for of in ("mean", "min", "max"))
            texts.append(f"{mean} ({low}-{high})")
        else:
            texts.append(f"{scale * value:.{digits}f}")
    return texts


def representation_lines(name, entry):
    """The lines of the table of representations for one run, or for the mean of several."""
    rows = {what: entry[what] for what in ("chance", "log_mel") if what in entry}
    for representation, row in entry["representations"].items():
        if representation in entry["untrained"]:
            rows[f"untrained {representation}"] = entry["untrained"][representation]
        rows[representation] = row
    return [[name, what, *cells(row, ROW)] for what, row in rows.items()]


def speech_lines(name, entry):
    """The lines of the table of speech."""
    lines = []
    for what in ("conversion", "reconstruction", "copy"):
        if entry[what]:
            lines.append([name, what, *cells(entry[what], SPOKEN)])
    return lines


def print_table(header, lines):
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    print()
    for line in [header, *lines]:
        names = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2])]
        numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]
        print("  ".join(names + numbers))


def print_tables(result):
    """The tables of result.json, in percent; the variance as the mean absolute log ratio."""
    entries = dict(result["runs"])
    for summary in result["seeds"]:
        entries[f"mean of {len(summary['runs'])} {summary['script']}"] = summary
    rows = [line for name, entry in entries.items() for line in representation_lines(name, entry)]
    spoken = [line for name, entry in entries.items() for line in speech_lines(name, entry)]
    print_table(["run", "percent", *ROW], rows)
    print_table(["run", "percent", *SPOKEN], spoken)


# ---------- the command ----------


def reserve(out):
    """Makes the output folder, --out or the next free one, so that nobody else can take it."""
    if out:
        folder = Path(out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not any(folder.iterdir()):
                (folder / "audio").mkdir()  # fails if another comparison was faster
                return folder
        except FileExistsError:
            pass
        raise UserError(f"--out {out}: exists and is not empty; choose another folder")
    Path("runs").mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            folder = Path(f"runs/compare-{number}")
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


@contextlib.contextmanager
def reserved(out):
    """The output folder; what is left of it without a result, as by Ctrl-C, is removed again."""
    is_new = not (out and Path(out).exists())
    folder = reserve(out)
    try:
        yield folder
    finally:
        if not (folder / "result.json").exists():
            # rmdir removes nothing that holds a file.
            with contextlib.suppress(OSError):
                if (folder / "audio").exists():
                    (folder / "audio").rmdir()
                if is_new:
                    folder.rmdir()


def measure_run(run, setting, screen):
    """-> the entry of a run in result.json, and the Features of its representations."""
    if setting.log_mel is None:
        measure_reference(run, setting, screen)
    screen.begin("untrained")
    fresh = untrained_model(run)
    represent = run.script.represent
    untrained, _ = measure_representations(
        run, setting, lambda wave: represent(fresh, wave, run.cfg), screen
    )
    screen.begin("trained")
    trained, table = measure_representations(
        run, setting, lambda wave: represent(run.model, wave, run.cfg), screen
    )
    if setting.n_clusters:
        screen.begin("clusters")
        encode = cluster_encoder(run, setting, setting.n_clusters)
        trained |= measure_representations(run, setting, encode, screen)[0]
    entry = {name: run.record.get(name) for name in RECORD}
    entry |= {"chance": setting.chance, "log_mel": setting.log_mel}
    entry |= {"untrained": untrained, "representations": trained}
    return entry | speech.measure_speech(run, setting, screen), table


def settings_of(runs, args, screen):
    """-> {name of a run: its Setting}, the same object for all runs that can share it."""
    by_key = {}
    settings = {}
    for run in runs:
        key = setting_key(run)
        if key not in by_key:
            by_key[key] = draw_setting(run, args, screen)
        settings[run.name] = by_key[key]
    return settings


def only_or_all(values):
    """One value if all agree, else the list of them."""
    values = list(dict.fromkeys(values))
    return values[0] if len(values) == 1 else values


def measure_all(runs, settings, args, screen):
    """-> the content of result.json, and the material of the page."""
    result = {"runs": {}}
    material = {"logs": {}, "vectors": {}, "usage": {}}
    for number, run in enumerate(runs, 1):
        screen.run = f"[{number}/{len(runs)}] {run.name}"
        entry, table = measure_run(run, settings[run.name], screen)
        result["runs"][run.name] = entry
        vectors, usage = vectors_and_usage(run, settings[run.name], table)
        material["logs"][run.name] = run.log
        material["vectors"][run.name] = vectors
        if usage:
            material["usage"][run.name] = usage
    result["seeds"] = seeds_of(result)
    result["compared"] = facts(runs, args)
    return result, material


def facts(runs, args):
    """What all figures depend on, beside the runs."""
    return {
        "data": only_or_all(str(run.corpus.root) for run in runs),
        "test": only_or_all(str(run.corpus.test.root) for run in runs),
        "seed": args.seed,
        "pairs": args.pairs,
        "probe": args.probe,
        "seconds": args.seconds if args.seconds < math.inf else None,
        "target_seconds": args.target_seconds,
        "clusters": args.clusters,
        "date": time.strftime("%Y-%m-%d"),
    }


def open_runs(args, scripts, screen):
    """-> the runs, and {name of a run: its Setting}; everything is read that can be wrong."""
    folders = args.runs or newest_runs()
    names = unique_names(folders)
    corpora = {}
    runs = [open_run(*run, scripts, args, corpora) for run in zip(folders, names)]
    return runs, settings_of(runs, args, screen)


@torch.no_grad()
def compare(args, scripts):
    """Opens the runs, reads all labels, measures; writes result.json, audio and the page."""
    screen = Screen()
    runs, settings = open_runs(args, scripts, screen)
    with reserved(args.out) as out:
        result, material = measure_all(runs, settings, args, screen)
        print_tables(result)
        (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        material["rows"] = rows_of_page(runs, settings, material["usage"], out, screen)
        page.write_page(out, result, material)
    print(f"\nopen {out}/index.html; figures in {out}/result.json, the drawing in {out}/figure.svg")


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def seconds(text):
    number = float(text)
    if not number >= 0.1:
        raise ValueError
    return number


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}; see compare.py --help\n")


def parse(argv):
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder or model.pt")
    parser.add_argument("--data", help="folder of audio [that of the run]")
    parser.add_argument("--test", help="folder of unseen speakers [that of the run]")
    parser.add_argument("--phones", help="label file [DATA/phones.txt]")
    parser.add_argument("--include", help="regex of the paths to keep [that of the run]")
    parser.add_argument("--pairs", type=positive, default=100, help="to convert [100]")
    parser.add_argument("--probe", type=positive, default=1500, help="utterances at most [1500]")
    parser.add_argument(
        "--seconds", type=seconds, default=math.inf, help="of an utterance that probes see [all]"
    )
    parser.add_argument(
        "--target-seconds", type=seconds, default=3.0, help="of a recording as the target [3]"
    )
    parser.add_argument("--clusters", type=positive, help="probe k-means of everything, too [no]")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn [0]")
    parser.add_argument("--out", help="new folder [the next free runs/compare-N]")
    return parser.parse_args(argv)


def main(argv):
    """-> exit code."""
    args = parse(argv)
    sys.stdout.reconfigure(errors="replace")
    mistakes = [UserError]
    try:
        scripts = {name: importlib.import_module(name) for name in SCRIPTS}
        mistakes += [script.UserError for script in scripts.values()]
        compare(args, scripts)
        return 0
    except KeyboardInterrupt:
        return 130
    except tuple(mistakes) as error:
        message = error
    except re.error as error:
        message = f"--include, or --speaker of the run: {error}; give a regular expression"
    except (OSError, soundfile.SoundFileError) as error:
        message = f"{error}; choose another place, or free space there"
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        message = "out of memory; lower --probe, or set CUDA_VISIBLE_DEVICES= to measure on the CPU"
    print("error:", " ".join(str(message).split())[:600], file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
