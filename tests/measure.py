# SPDX-License-Identifier: MIT
"""What is measured, as functions of tensors: probes, speaker verification, a judge of voices, F0.

Nothing here knows a model or a corpus; tests/compare.py brings both. Shapes: n utterances or
frames, D dimensions of a representation, T frames of a wave of N samples.
"""

import collections
import hashlib
import itertools
import math
import os
import re
from pathlib import PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F

FRAMES_TO_FIT = 40_000  # frames at most that a probe is fitted on
FRAMES_TO_SCORE = 10_000  # and scored on
LABELS_A_SECOND = 100  # of phones.txt: one label per 10 ms
LABEL_SLACK = 5  # labels that an utterance may have too many or too few
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au")
FLOOR = math.log(1e-3)  # log-mel below this is inaudible, and the judge does not see it
DECIBEL_SQUARED = (math.log(10) / 20) ** 2  # a variance of 1 dB^2, in squared natural logs


class UserError(Exception):
    """A mistake that the user can fix, shown as one line without a traceback."""


# ---------- probes ----------


def linear_probe(x, y, classes):
    """Softmax regression of y (n,) on x (n, D) -> function (m, D) -> (m, classes), log posteriors.

    The columns of x are standardized. L2 weight 1e-3, full-batch L-BFGS, at most 100 iterations.
    """
    mean = x.float().mean(0)
    std = x.float().std(0, correction=0).clamp(min=1e-5)
    standardized = (x.float() - mean) / std
    bias = torch.zeros(classes, requires_grad=True)
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(standardized @ weight + bias, y) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weight.requires_grad_(False)
    bias.requires_grad_(False)

    def log_posterior(x):
        return ((x.float() - mean) / std @ weight + bias).log_softmax(-1)

    return log_posterior


def probe_accuracy(fit, score):
    """Two pairs (x (n, D), y (n,)) -> the share of `score` that a probe fitted on `fit` names."""
    classes = 1 + int(max(fit[1].max(), score[1].max()))
    probe = linear_probe(*fit, classes)
    x, y = score
    return (probe(x).argmax(1) == y).float().mean().item()


def chance_accuracy(y):
    """The share of the commonest class among y (n,): what a probe reaches that sees nothing."""
    return (y.bincount().max() / len(y)).item()


def majority_map_accuracy(fit, score):
    """Two pairs (one-hot units (n, K), y (n,)) -> how well units stand for classes.

    Each unit is mapped to the class that is most frequent with it in `fit`, as in the VQ-VAE paper;
    a unit that does not occur there, to the commonest class. Returns the share of `score` where
    the map is right.
    """
    classes = 1 + int(max(fit[1].max(), score[1].max()))
    is_class = F.one_hot(fit[1], classes).float()
    counts = fit[0].T @ is_class  # (K, classes)
    counts = counts + is_class.mean(0)  # decides ties, and units that do not occur
    return (counts.argmax(1)[score[0].argmax(1)] == score[1]).float().mean().item()


# ---------- speaker verification ----------


def centered_cosines(x):
    """(n, D) -> (n, n): cosines of the rows, after the mean row is subtracted."""
    x = x.double()
    x = F.normalize(x - x.mean(0), dim=1)
    return x @ x.T


def equal_error_rate(x, speaker):
    """Speaker verification with all pairs of rows of x (n, D) by their centered cosine.

    Returns the error rate at the threshold where the share of same-speaker pairs that are rejected
    is nearest to the share of other pairs that are accepted. 0.5 is chance. None where x holds no
    pair of one speaker, or no pair of two.
    """
    first, second = torch.triu_indices(len(x), len(x), 1)
    # Rounding makes scores equal that differ by the order of a sum only.
    score = (centered_cosines(x)[first, second] * 1e5).round()
    score, order = score.sort()
    same = (speaker[first] == speaker[second])[order].double()
    if not 0 < same.sum() < len(same):
        return None

    rejected = same.cumsum(0) / same.sum()
    accepted = 1 - (1 - same).cumsum(0) / (1 - same).sum()
    # Equal scores fall on one side of a threshold together, so only the last of them can be one.
    is_last = F.pad(score[1:] != score[:-1], (0, 1), value=True)
    rejected = rejected[is_last]
    accepted = accepted[is_last]
    nearest = (rejected - accepted).abs().argmin()
    return ((rejected[nearest] + accepted[nearest]) / 2).item()


def lda(x, speaker):
    """Linear discriminant analysis: x (n, D), speaker (n,) -> (D, D'), D' at most 24.

    The directions in which the means of the speakers differ most, relative to how the utterances of
    one speaker differ. A ridge keeps the covariance within speakers away from singular.
    """
    x = x.double()
    _, y = speaker.unique(return_inverse=True)
    means = torch.stack([x[y == s].mean(0) for s in range(int(y.max()) + 1)])
    within = (x - means[y]).T @ (x - means[y]) / len(x)
    ridge = 1e-3 * within.diagonal().mean() + 1e-6
    within = within + ridge * torch.eye(len(within), dtype=within.dtype)

    # The covariance of x @ whiten within speakers is the identity.
    whiten = torch.linalg.cholesky(within).inverse().T
    directions = torch.linalg.svd((means - means.mean(0)) @ whiten, full_matrices=False)[2]
    return whiten @ directions[: min(24, len(means) - 1)].T


def nearest_neighbor_accuracy(x, speaker):
    """Share of rows of x (n, D) whose nearest row, by centered cosine, is of their speaker.

    Rows whose speaker has no other row are not asked. None where no speaker has two rows.
    """
    cosines = centered_cosines(x).fill_diagonal_(-2)
    found = speaker[cosines.argmax(1)] == speaker
    has_another = speaker.bincount()[speaker] > 1
    if not has_another.any():
        return None
    return found[has_another].float().mean().item()


def nearest_neighbor_chance(speaker):
    """What nearest_neighbor_accuracy would be if the neighbor were drawn at random."""
    rows = speaker.bincount()[speaker]
    rows = rows[rows > 1]
    if len(rows) == 0:
        return None
    return ((rows - 1) / (len(speaker) - 1)).mean().item()


# ---------- spectra of converted speech ----------


def audible(mel):
    """Log-mel (T, n_mels) with everything inaudible raised to one level."""
    return mel.clamp(min=FLOOR)


def verdict(judge, frames):
    """A probe of frames, applied to an utterance (T, D) -> (classes,): mean posterior over time."""
    return judge(frames).exp().mean(0)


def variance_over_time(frames):
    """(T, D) -> (D,)."""
    return frames.var(0, correction=0)


def log_variance_ratio(made, real):
    """Mean over bands of |ln(made / real)|, two variances over time (D,) of log-mel; 0 is best.

    Oversmoothed speech has too little variance (the measure is that of Chou et al. 2018). Variances
    below 1 dB^2 count as 1 dB^2.
    """
    made = made.clamp(min=DECIBEL_SQUARED)
    real = real.clamp(min=DECIBEL_SQUARED)
    return (made / real).log().abs().mean().item()


# ---------- fundamental frequency ----------


def yin(wave, sample_rate, low=65, high=400):
    """(N,) -> F0 (T,) in Hz, one value per 10 ms, 0 where unvoiced; T = 1 + N // hop.

    YIN (de Cheveigne & Kawahara, JASA 2002) from `low` to `high` Hz. The period is the first dip of
    the normalized difference d' below 0.2, else the deepest dip; a frame is voiced where d' there
    is below 0.35.
    """
    hop = sample_rate // 100
    width = math.ceil(sample_rate / low) + 1  # longest lag, and samples compared
    before_middle = 2 * width // 3
    padded = F.pad(wave.double(), (before_middle, 2 * width - before_middle))
    x = padded.unfold(0, 2 * width, hop)  # (T, 2 width)

    # d = sum over j < width of (x[j] - x[j + lag])^2, for lag = 1 .. width
    energy = F.pad(x.square().cumsum(-1), (1, 0))
    energy = energy[:, width:] - energy[:, : width + 1]  # of x[lag : lag + width]
    start_spectrum = torch.fft.rfft(x[:, :width], 2 * width)
    product = torch.fft.irfft(start_spectrum.conj() * torch.fft.rfft(x), 2 * width)[:, : width + 1]
    d = (energy[:, :1] + energy - 2 * product)[:, 1:].clamp(min=0)
    lag = torch.arange(1, width + 1)
    d = d * lag / d.cumsum(-1).clamp(min=1e-12)  # d': over its mean up to this lag

    before, here, after = d[:, :-2], d[:, 1:-1], d[:, 2:]
    is_dip = (here < before) & (here <= after) & (lag[1:-1] >= sample_rate // high)
    depth = here.masked_fill(~is_dip, math.inf)
    first_clear = (depth < 0.2).int().argmax(-1, keepdim=True)
    deepest = depth.argmin(-1, keepdim=True)
    at = torch.where((depth < 0.2).any(-1, keepdim=True), first_clear, deepest)

    before, here, after = before.gather(-1, at), here.gather(-1, at), after.gather(-1, at)
    curvature = (before - 2 * here + after).clamp(min=1e-12)
    period = at + 2 + (before - after) / 2 / curvature  # vertex of a parabola through three points
    is_loud = x.var(-1, keepdim=True) > 1e-6  # -60 dB of full scale
    is_voiced = (depth.gather(-1, at) < 0.35) & is_loud
    f0 = torch.where(is_voiced, sample_rate / period, 0.0)[:, 0]

    # A median over 5 frames removes values that stand alone.
    return F.pad(f0, (2, 2)).unfold(0, 5, 1).median(-1)[0].float()


def f0_errors(f0, truth):
    """F0 (T,) in Hz, 0 where unvoiced, against that of the source -> (VDE, FFE), shares of frames.

    VDE: the frame is voiced in one and unvoiced in the other. FFE: that, or F0 is off by more than
    20 %. A conversion changes the pitch on purpose, so FFE compares with the contour of the source
    after a shift that makes the medians of log F0 agree, over the frames that are voiced in both.
    """
    frames = min(len(f0), len(truth))
    f0, truth = f0[:frames], truth[:frames]
    is_wrong = (f0 > 0) != (truth > 0)
    vde = is_wrong.float().mean().item()

    both = (f0 > 0) & (truth > 0)
    if both.any():
        shift = f0[both].log().median() - truth[both].log().median()
        ratio = f0[both] / (truth[both] * shift.exp())
        is_wrong[both] = (ratio - 1).abs() > 0.2
    return vde, is_wrong.float().mean().item()


# ---------- choosing utterances, windows and pairs ----------


def draw_evenly(names, groups, limit, seed):
    """At most `limit` positions of `names`, as many of each group as there are, or nearly so.

    Members of a group come in the order of a hash of the seed and their name, and groups take
    turns. So the choice depends on names alone, not on how a corpus numbers its utterances.
    """

    def rank(i):
        return hashlib.sha256(f"{seed} ".encode() + os.fsencode(names[i])).digest()

    turns = collections.Counter()
    order = []
    for i in sorted(range(len(names)), key=rank):
        order.append((turns[groups[i]], groups[i], i))
        turns[groups[i]] += 1
    return [i for _, _, i in sorted(order)[:limit]]


def draw_pairs(source_speakers, targets, count):
    """Speaker of each source, target speakers -> at most `count` pairs (source position, target).

    No source is paired with its own speaker, none twice with one target. Every source is used
    before one is used again, and targets are spread evenly, over each source speaker and over all.
    """
    pairs = []
    taken = collections.defaultdict(set)  # source -> its targets
    uses = collections.Counter()  # of a target, and of a source speaker with a target
    for _ in targets:
        for i, speaker in enumerate(source_speakers):
            if len(pairs) == count:
                return pairs
            free = [t for t in targets if t != speaker and t not in taken[i]]
            if not free:
                continue
            target = min(free, key=lambda t: (uses[speaker, t], uses[t]))
            pairs.append((i, target))
            taken[i].add(target)
            uses[target] += 1
            uses[speaker, target] += 1
    return pairs


def loudest_window(wave, sample_rate, seconds=3.0):
    """(N,) -> (start, end) in samples of its loudest `seconds`; the whole wave if it is not longer.

    Windows begin at multiples of 0.1 s, so that copies of a recording at several rates are cut
    alike.
    """
    length = int(seconds * sample_rate)
    if len(wave) <= length:
        return 0, len(wave)
    energy = F.pad((wave.double() - wave.double().mean()).square().cumsum(0), (1, 0))
    tenths = int((len(wave) - length) / sample_rate * 10 + 1e-6) + 1
    starts = (torch.arange(tenths).double() * sample_rate / 10).long()
    start = int(starts[(energy[starts + length] - energy[starts]).argmax()])
    return start, start + length


def evenly_spaced(count, limit):
    """At most `limit` of the indices 0 .. count - 1, evenly spaced."""
    if count <= limit:
        return torch.arange(count)
    return ((torch.arange(limit) + 0.5) * count / limit).long()


# ---------- labels ----------


def labels_of_frames(labels, frames, seconds, begin=0.0):
    """Labels (M,), one per 10 ms -> (frames,): the label in the middle of each frame.

    The frames divide the stretch of `seconds` that starts at `begin` seconds into equal parts.
    """
    middle = begin + (np.arange(frames) + 0.5) * seconds / frames
    at = (middle * LABELS_A_SECOND).astype(int).clip(0, len(labels) - 1)
    return torch.from_numpy(labels[at])


def label_segments(labels, begin, seconds):
    """Labels, one per 10 ms -> [(start, end, label)] of a window, in seconds from its begin."""
    first = round(begin * LABELS_A_SECOND)
    last = first + math.ceil(seconds * LABELS_A_SECOND - 1e-6)
    segments = []
    at = 0
    for label, run in itertools.groupby(labels[first:last]):
        end = at + len(list(run))
        segments.append((at / LABELS_A_SECOND, min(end / LABELS_A_SECOND, seconds), label))
        at = end
    return segments


def utterance_ids(names):
    """Paths below the data folder -> ({id: position}, ids that could mean several utterances).

    The id of an utterance is its path without the ending, or the stem of the file where that is
    unique.
    """
    paths = [PurePosixPath(name).with_suffix("") for name in names]
    ids = {}
    ambiguous = set()
    for candidates in ([p.as_posix() for p in paths], [p.name for p in paths]):
        count = collections.Counter(candidates)
        for position, candidate in enumerate(candidates):
            if candidate in ids:
                continue
            if count[candidate] == 1:
                ids[candidate] = position
            else:
                ambiguous.add(candidate)
    return ids, ambiguous - ids.keys()


def check_id(word, ambiguous, where):
    """Raises UserError if the id of a line, which names no utterance, shows a wrong format."""
    if word in ambiguous:
        raise UserError(
            f"{where}: several files are called {word!r}; write the path below the folder"
        )
    if "|" in word:
        raise UserError(f"{where}: {word!r} contains '|'; separate the id and the labels by spaces")
    if word.lower().endswith(AUDIO_ENDINGS):
        raise UserError(f"{where}: leave out the ending of {word!r}; an id has none")


def check_labels(labels, seconds, where):
    """Raises UserError unless there is one label per 10 ms of an utterance of `seconds`."""
    if any(re.fullmatch(r"\d+\.\d+", label) for label in labels):
        raise UserError(f"{where}: has times; write one label per 10 ms and no times")
    expected = seconds * LABELS_A_SECOND
    if abs(len(labels) - expected) <= LABEL_SLACK:
        return
    reason = "write one label per 10 ms"
    if abs(len(labels) - expected / 2) <= LABEL_SLACK:
        reason = "this looks like one per 20 ms; write each label twice"
    elif len(labels) < expected / 3:
        reason = "this looks like one per phone; repeat each label for every 10 ms"
    count = f"{len(labels)} labels for {seconds:.2f} s, where {expected:.0f} are needed"
    raise UserError(f"{where}: {count}; {reason}")


def lines_of(file):
    """Yields (line number, words) of a UTF-8 file, with or without a byte order mark."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:
                raise UserError(f"{file}: line {number} is not UTF-8; save the file as UTF-8")
            words = text.split()
            if words:
                yield number, words


def read_labels(file, names, seconds, needed):
    """Reads the lines "utterance-id label label .." of a label file, checked line by line.

    names: path below the data folder of every recording; seconds: how long each is; needed:
    positions of those whose labels are kept. Returns ({position: (M,) int array}, sorted names of
    the classes); UserError with the file, the line and the remedy if the file has another format.
    """
    ids, ambiguous = utterance_ids(names)
    needed = set(needed)
    rows = {}
    for number, (word, *labels) in lines_of(file):
        where = f"{file}: line {number}"
        position = ids.get(word)
        if position is None:
            check_id(word, ambiguous, where)
        elif position in needed:
            check_labels(labels, seconds[position], where)
            rows[position] = labels
    classes = sorted(set().union(*rows.values()))
    index = {label: i for i, label in enumerate(classes)}
    return {u: np.array([index[label] for label in row]) for u, row in rows.items()}, classes
