# SPDX-License-Identifier: MIT
"""What compare.py measures, against closed forms and planted cases; and the command."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import compare
import measure
import numpy as np
import pytest
import soundfile as sf
import speech
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "dsp.json").read_text())
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TINY = "--toy --device cpu --batch-size 2 --crop 1920 --steps 2 --save-every 2 --log-every 1"
FLAGS = {
    "adain_vc": "--channels 8 --d-content 4 --d-speaker 8 --bank 2 "
    "--bank-channels 4 --blocks 2 --dense 1",
    "vqvae": "--d-code 8 --channels 16 --codes 8 --d-condition 8 --residual 8 --skip 8 --depth 4 "
    "--sample-rate 8000 --win 200 --hop 80",
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- reference values


def golden_layer(k, shape, scale=1.0, offset=0.0):
    """The array that the golden file's formula gives for layer k."""
    p = 1000003
    i = np.arange(math.prod(shape), dtype=np.int64) % p
    square = i * i % p
    terms = 271829 * (square * i % p) + 314159 * (k + 1) * square + 161803 * (k + 3) * i
    h = (terms + 577215 * (k + 1)) % p
    return torch.from_numpy(offset + scale * (2 * h / p - 1)).reshape(shape)


def layers_of(case):
    fields = [
        (layer["k"], layer["shape"], layer["scale"], layer["offset"]) for layer in case["layers"]
    ]
    return [golden_layer(*values) for values in fields]


def verification_rows(case):
    """The rows x of a golden case of the equal error rate, as its text says."""
    name = case["name"]
    speaker = torch.tensor(case["speaker"])
    layers = layers_of(case)
    if name.startswith("no ties"):
        weight = {"0": 0.7, "1": 0.5, "2": 1.2}[name[-1]]
        return layers[0] + weight * layers[1][speaker]
    if name == "ties: every row is one of 10":
        return layers[0].round()[3 * torch.arange(40) % 10]
    if name.startswith("ties: every row is one of 6"):
        return layers[0].round()[5 * torch.arange(40) % 6]
    if name == "ties: rounded to integers":
        return (layers[0] + layers[1][speaker]).round()
    if name == "perfect":
        return torch.eye(4, dtype=torch.float64)[speaker] + layers[0]
    return torch.ones(case["rows"], 3)


def test_golden_formula():
    for check in GOLDEN["fill_check"]:
        value = golden_layer(check["k"], (check["i"] + 1,))[-1].item()
        assert value == pytest.approx(check["value"], abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["equal_error_rate"]["cases"], ids=lambda case: case["name"])
def test_equal_error_rate(case):
    eer = measure.equal_error_rate(verification_rows(case), torch.tensor(case["speaker"]))
    assert min(abs(eer - point) for point in case["nearest_points"]) < 1e-9


def test_equal_error_rate_does_not_depend_on_the_order_of_rows():
    for case in GOLDEN["equal_error_rate"]["cases"]:
        x, speaker = verification_rows(case), torch.tensor(case["speaker"])
        order = normal(len(x)).argsort()
        shuffled = measure.equal_error_rate(x[order], speaker[order])
        assert shuffled == measure.equal_error_rate(x, speaker)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_equal_error_rate_of_identical_rows(scale):
    """Also where the mean of equal rows is not quite the row, for rounding."""
    x = (scale * normal(1, 37)).repeat(50, 1)
    for speaker in (torch.arange(50) % 7, torch.arange(50) // 5):
        assert measure.equal_error_rate(x, speaker) == 0.5


def test_equal_error_rate_needs_both_kinds_of_pairs():
    x = normal(4, 3)
    assert measure.equal_error_rate(x, torch.tensor([0, 1, 2, 3])) is None
    assert measure.equal_error_rate(x, torch.zeros(4, dtype=torch.long)) is None
    assert measure.equal_error_rate(x[:1], torch.zeros(1, dtype=torch.long)) is None


def test_lda():
    golden = GOLDEN["lda"]
    noise, means, mixing = layers_of(golden)
    speaker = torch.arange(300) % 12
    x = (noise + means[speaker]) @ (torch.eye(20, dtype=torch.float64) + 0.5 * mixing)
    directions = measure.lda(x, speaker)
    assert directions.shape == (20, 11)

    basis = golden["basis"]
    reference = torch.zeros(220, dtype=torch.float64)
    reference[basis["index"]] = torch.tensor(basis["value"], dtype=torch.float64)
    ours = torch.linalg.qr(directions)[0]
    theirs = torch.linalg.qr(reference.reshape(20, 11))[0]
    cosines = torch.linalg.svdvals(ours.T @ theirs)
    assert cosines.min() > golden["min_cosine"]

    golden = golden["with_ridge"]["directions"]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    signed = (directions * largest.sign()).flatten()
    expected = torch.tensor(golden["value"], dtype=torch.float64)
    tolerance = golden["tolerance"] * golden["mean_square"] ** 0.5
    assert (signed[golden["index"]] - expected).abs().max() < tolerance


def test_lda_of_fewer_rows_than_dimensions():
    speaker = torch.arange(20) % 4
    assert measure.lda(normal(20, 60), speaker).shape == (60, 3)


# ---- probes and neighbors


def test_probe_on_separable_data():
    y = torch.arange(300) % 3
    x = 8 * torch.eye(3)[y] + normal(300, 3)
    assert measure.probe_accuracy((x[:200], y[:200]), (x[200:], y[200:])) > 0.98
    posterior = measure.linear_probe(x, y, 3)(x).exp()
    assert torch.allclose(posterior.sum(1), torch.ones(300), atol=1e-5)


def test_probe_on_noise_is_at_chance():
    y = torch.arange(4000) % 4
    x = normal(4000, 5)
    assert measure.probe_accuracy((x[:2000], y[:2000]), (x[2000:], y[2000:])) == pytest.approx(
        0.25, abs=0.05
    )
    assert measure.chance_accuracy(torch.tensor([0, 1, 1, 2])) == 0.5


def test_probe_ignores_scale_and_a_constant_column():
    y = torch.arange(200) % 2
    x = torch.stack([y + 0.1 * normal(200), torch.ones(200)], 1)
    plain = measure.linear_probe(x, y, 2)(x)
    scaled = measure.linear_probe(1000 * x + 7, y, 2)(1000 * x + 7)
    assert torch.allclose(plain, scaled, atol=1e-2)


def test_nearest_neighbor():
    # Rows 0, 1 are near each other and of one speaker; rows 2, 3 are near, and of two.
    x = torch.tensor([[5.0, 0], [5, 0.1], [-5, 4], [-5, 4.1], [0, -8]])
    speaker = torch.tensor([0, 0, 1, 2, 2])
    # Speaker 1 has one row, which is not asked. Of the four others 0 and 1 find their own.
    assert measure.nearest_neighbor_accuracy(x, speaker) == 0.5
    assert measure.nearest_neighbor_chance(speaker) == pytest.approx(1 / 4)
    assert measure.nearest_neighbor_accuracy(x[:3], torch.tensor([0, 1, 2])) is None
    assert measure.nearest_neighbor_chance(torch.tensor([0, 1, 2])) is None


def test_judge_on_planted_spectra():
    mean = 4 * normal(3, 10)
    y = torch.arange(600) % 3
    judge = measure.linear_probe(mean[y] + normal(600, 10, seed=1), y, 3)
    of_one = measure.verdict(judge, mean[2] + normal(50, 10, seed=2))
    assert of_one.argmax() == 2 and of_one[2] > 0.95
    half = torch.cat([mean[0].expand(50, 10), mean[1].expand(50, 10)])
    assert torch.allclose(measure.verdict(judge, half), torch.tensor([0.5, 0.5, 0.0]), atol=0.03)


def test_variance_ratio():
    real = normal(5000, 6) * torch.tensor([1.0, 2, 3, 1, 2, 3])
    variance = measure.variance_over_time(real)
    assert measure.log_variance_ratio(variance, variance) == 0
    halved = measure.variance_over_time(real / 2)
    assert measure.log_variance_ratio(halved, variance) == pytest.approx(math.log(4), rel=1e-5)
    silent = torch.zeros(6)
    assert measure.log_variance_ratio(silent, silent) == 0


# ---- F0


def tone(hertz, rate, kind, seconds=1.0):
    t = torch.arange(int(seconds * rate)).double() / rate
    if kind == "sine":
        return 0.3 * torch.sin(2 * math.pi * hertz * t)
    return 0.1 * sum(
        torch.sin(2 * math.pi * hertz * h * t + h) / h for h in range(1, int(3500 / hertz) + 1)
    )


def test_yin_on_tones():
    for case in GOLDEN["yin"]["tones"]:
        hertz = case["hertz"]
        if 70 <= hertz <= 395:
            f0 = measure.yin(tone(hertz, case["sample_rate"], case["kind"]), case["sample_rate"])[
                10:-10
            ]
            error = (f0 / hertz - 1).abs().max().item()
            assert error < GOLDEN["yin"]["max_relative_error"], (case, error)


def test_yin_on_noise_and_silence():
    assert len(measure.yin(torch.zeros(16000), 16000)) == 101
    assert (measure.yin(torch.zeros(16000), 16000) == 0).all()
    assert (measure.yin(0.1 * normal(16000), 16000) > 0).float().mean() < 0.05
    assert len(measure.yin(torch.zeros(5), 16000)) == 1


def test_f0_errors():
    truth = torch.tensor([0.0, 0, 100, 110, 120, 100, 110, 120, 0, 0])
    assert measure.f0_errors(truth, truth) == (0, 0)
    assert measure.f0_errors(2 * truth, truth) == (0, 0)  # a higher voice with the same contour
    vde, ffe = measure.f0_errors(torch.zeros(10), truth)
    assert vde == ffe == pytest.approx(0.6)

    octave = truth.clone()
    octave[3] *= 2
    assert measure.f0_errors(octave, truth) == (0, pytest.approx(0.1))
    octave[0] = 100
    assert measure.f0_errors(octave, truth) == (pytest.approx(0.1), pytest.approx(0.2))
    assert measure.f0_errors(truth[:8], truth) == (0, 0)  # of unequal length


# ---- which utterances, windows and pairs


def test_draw_is_even_over_speakers():
    groups = ["a"] * 10_000 + ["b"] * 2 + ["c"] * 2 + ["d"] * 2
    names = [f"{group}/{i}.wav" for i, group in enumerate(groups)]
    drawn = measure.draw_evenly(names, groups, 100, seed=0)
    count = {group: [groups[i] for i in drawn].count(group) for group in "abcd"}
    assert count == {"a": 94, "b": 2, "c": 2, "d": 2}
    assert len(set(drawn)) == 100

    even = measure.draw_evenly(names[:20] * 1, ["x", "y"] * 10, 10, seed=0)
    assert sum(i % 2 for i in even) == 5


def test_draw_depends_on_names_alone():
    names = [f"{i}.wav" for i in range(30)]
    groups = [str(i % 3) for i in range(30)]
    forward = measure.draw_evenly(names, groups, 8, seed=1)
    backward = measure.draw_evenly(names[::-1], groups[::-1], 8, seed=1)
    assert [names[i] for i in forward] == [names[::-1][i] for i in backward]
    assert forward != measure.draw_evenly(names, groups, 8, seed=2)
    measure.draw_evenly([os.fsdecode(b"J\xf6rg.wav")], ["0"], 1, seed=0)


def test_pairs_are_even_and_never_of_one_speaker():
    speakers = ["abcd"[i % 4] for i in range(40)]
    pairs = measure.draw_pairs(speakers, list("abcd"), 100)
    assert len(pairs) == len(set(pairs)) == 100
    assert all(speakers[source] != target for source, target in pairs)
    targets = [target for _, target in pairs]
    assert max(map(targets.count, "abcd")) - min(map(targets.count, "abcd")) <= 2
    of_a = [target for source, target in pairs if speakers[source] == "a"]
    assert max(map(of_a.count, "bcd")) - min(map(of_a.count, "bcd")) <= 2
    sources = [source for source, _ in pairs]
    assert max(map(sources.count, range(40))) == 3 and min(map(sources.count, range(40))) == 2


def test_pairs_where_there_are_few():
    assert measure.draw_pairs(["a", "a"], ["a"], 10) == []
    few = measure.draw_pairs(["a", "b"], ["a", "b", "c"], 10)
    assert few == [(0, "b"), (1, "a"), (0, "c"), (1, "c")]
    assert len(measure.draw_pairs(["a"] * 50, ["b"], 10)) == 10


def test_loudest_window():
    seconds = torch.arange(160_000) / 16000
    loudness = 0.2 * torch.exp(-((seconds - 6) ** 2))
    wave = 0.3 + loudness * torch.sin(2 * math.pi * 100 * seconds)  # an offset is not loud
    start, end = measure.loudest_window(wave, 16000)
    assert end - start == 48000 and start % 1600 == 0
    assert start == 4.5 * 16000
    again, _ = measure.loudest_window(wave[::2], 8000)
    assert again * 2 == start
    assert measure.loudest_window(wave[:40000], 16000) == (0, 40000)
    assert measure.loudest_window(wave[: 48000 + 5], 16000)[1] <= 48005


def test_evenly_spaced():
    assert measure.evenly_spaced(3, 10).tolist() == [0, 1, 2]
    assert measure.evenly_spaced(100, 4).tolist() == [12, 37, 62, 87]


def corpus_of(counts, train=0):
    """{speaker: utterances} -> a Corpus without audio; the first `train` of each to train on."""
    names = [f"{s}/{s}_{i}.wav" for s, count in counts.items() for i in range(count)]
    speakers = sorted(counts)
    speaker = np.array([speakers.index(name.split("/")[0]) for name in names])
    is_train = np.array([int(Path(name).stem.split("_")[1]) < train for name in names])
    return SimpleNamespace(
        root=Path("data"),
        paths=[Path("data") / name for name in names],
        speaker=speaker,
        speakers=speakers,
        train=np.flatnonzero(is_train),
        held=np.flatnonzero(~is_train),
    )


ARGS = SimpleNamespace(seed=0, probe=1500, pairs=100, target_seconds=3.0)


def test_judge_and_pairs_are_disjoint():
    for pool in (
        corpus_of({"a": 20, "b": 20, "c": 3}),
        corpus_of({"a": 20, "b": 9, "c": 30}, train=8),
    ):
        listening = speech.draw_listening(pool, ARGS)
        used = {u for pair in listening.pairs for u in (pair.source, pair.recording)}
        assert not used & set(listening.judged.tolist())
        for pair in listening.pairs:
            assert pool.speaker[pair.recording] == pair.target != pool.speaker[pair.source]
        assert len(listening.pairs) > 10


def test_closed_targets_are_known_and_lone_speakers_are_reconstructed():
    pool = corpus_of({"a": 20, "b": 20, "c": 20}, train=10)
    pairs = speech.draw_listening(pool, ARGS, known=["c", "x", "b"]).pairs
    assert {pair.target for pair in pairs} == {1, 2}
    alone = speech.draw_listening(corpus_of({"a": 8}), ARGS)
    assert len(alone.pairs) == 4 and all(pair.target is None for pair in alone.pairs)
    single = speech.draw_listening(corpus_of({"a": 1, "b": 1}), ARGS)
    assert single.pairs == []


def test_speakers_are_found_by_name():
    """A model that takes the index of a speaker knows speakers in an order of its own."""
    script = SimpleNamespace(TARGET="speaker")
    run = SimpleNamespace(script=script, speakers=["c", "a"])
    listening = SimpleNamespace(pool=corpus_of({"a": 1, "b": 1, "c": 1}))
    pairs = [speech.Pair(0, target) for target in (None, 0, 1, 2)]
    assert [speech.target_of(run, listening, pair) for pair in pairs] == [None, 1, None, 0]


def test_half_of_each_voice_is_left_to_the_judge():
    """The toy corpus: 16 unseen voices of 15 utterances; 100 pairs."""
    pool = corpus_of({f"voice{s}": 15 for s in range(16)})
    listening = speech.draw_listening(pool, ARGS)
    assert len(listening.pairs) == len({pair.source for pair in listening.pairs}) == 100
    judged = pool.speaker[listening.judged].tolist()
    assert [judged.count(s) for s in range(16)] == [8] * 16


def long_recordings():
    """A corpus in which ann/long.wav is three utterances, and ben/lost.wav has no sample."""
    names = ["ann/a.wav"] + ["ann/long.wav"] * 3 + ["ben/lost.wav", "ben/x.wav"]
    length = np.array([100, 6000, 6000, 6050, 0, 200])
    return SimpleNamespace(
        root=Path("data"),
        paths=[Path("data") / name for name in names],
        start=length.cumsum() - length,
        length=length,
        speaker=np.array([0, 0, 0, 0, 1, 1]),
        speakers=["ann", "ben"],
    )


def test_pieces_of_long_recordings(tmp_path):
    """Pieces have names and labels of their own; a line of labels is for the whole recording."""
    corpus = long_recordings()
    names = [speech.name_of(corpus, u) for u in range(6)]
    assert names[:4] == ["ann/a.wav", "ann/long.wav", "ann/long#2.wav", "ann/long#3.wav"]
    assert names[4:] == ["ben/lost.wav", "ben/x.wav"]
    drawn = speech.draw(corpus, np.array([1, 2, 3, 5]), 2, 0)
    assert corpus.speaker[drawn].tolist() == [0, 1]

    cfg = SimpleNamespace(sample_rate=100)
    row = [f"p{i // 6000}" for i in range(18050)]
    file = label_file(tmp_path, f"long {' '.join(row)}\nx {'p1 ' * 200}\nlost p0\n")
    labels, classes = compare.read_labels(corpus, file, cfg, [0, 2, 3, 5])
    assert classes == ["p0", "p1", "p2", "p3"] and labels.keys() == {2, 3, 5}
    assert labels[2].tolist() == [1] * 6000
    assert labels[3].tolist() == [2] * 6000 + [3] * 50
    assert labels[5].tolist() == [1] * 200
    file = label_file(tmp_path, f"long {' '.join(row[:6000])}\n")
    with pytest.raises(measure.UserError, match="6000 labels for 180.50 s"):
        compare.read_labels(corpus, file, cfg, [1])


def test_features_stay_small():
    """Long recordings leave an average and a share of the frames; units become shares."""
    corpus = SimpleNamespace(length=np.full(50, 160_000), wave=lambda u: torch.zeros(160_000))
    run = SimpleNamespace(name="x", cfg=SimpleNamespace(device="cpu", sample_rate=16000))
    labels = {u: np.full(1000, u % 2) for u in range(0, 50, 2)}

    def encode(wave):
        ids = torch.arange(500) % 3
        return {
            "z": torch.ones(1000, 4),
            "v": torch.ones(7),
            "ids": ids,
            "half": torch.ones(9, 2).half(),
        }

    def part(encode):
        return compare.collect(
            run, encode, corpus, range(50), labels, 200, math.inf, compare.Screen()
        )

    first = part(encode)
    second = part(lambda wave: encode(wave) | {"ids": torch.full((500,), 4)})
    for name in first:
        compare.join([first[name], second[name]])
    assert first["z"].average.shape == (50, 4) and first["z"].frames.shape == (200, 4)
    assert first["v"].average.shape == (50, 7) and len(first["v"].frames) == 0
    assert first["ids"].frames.shape == second["ids"].frames.shape == (200, 5)
    assert torch.allclose(first["ids"].average.sum(1), torch.ones(50))
    assert second["ids"].counts.tolist() == [0, 0, 0, 0, 25_000]
    assert first["z"].phones.tolist() == [0] * 200


# ---- labels

NAMES = ["ann/one.wav", "ann/two.flac", "ben/one.wav", "ben/three.x.wav"]
SECONDS = [1.0, 0.5, 1.2, 0.8]


def label_file(folder, text, encoding="utf-8"):
    file = folder / "phones.txt"
    file.write_bytes(text.encode(encoding))
    return file


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_labels_are_read(tmp_path, encoding):
    text = f"ann/one {'a ' * 98}b b\n\ntwo {'é ' * 53}\nother x x\nthree.x {'a ' * 80}\n"
    file = label_file(tmp_path, text, encoding)
    labels, classes = measure.read_labels(file, NAMES, SECONDS, needed=[0, 1])
    assert classes == ["a", "b", "é"]
    assert labels.keys() == {0, 1}
    assert labels[0].tolist() == [0] * 98 + [1, 1] and len(labels[1]) == 53


BAD_LABELS = {
    "utf-16": ("two " + "a " * 50, "utf-16", "line 1 is not UTF-8"),
    "utf-16 without a mark": ("two " + "a " * 50, "utf-16-le", "line 1 is not UTF-8"),
    "latin-1": ("two " + "a " * 50 + "\nann/one é\n", "latin-1", "line 2 is not UTF-8"),
    "times": ("two 0.00 0.25 a 0.25 0.50 b", "utf-8", "line 1: has times"),
    "one per phone": ("two a b c d", "utf-8", "one per phone"),
    "one per 20 ms": ("two " + "a " * 25, "utf-8", "one per 20 ms"),
    "too many": ("two " + "a " * 60, "utf-8", "60 labels for 0.50 s, where 50 are needed"),
    "an ending": (
        "ann/one " + "a " * 100 + "\ntwo.wav " + "a " * 50,
        "utf-8",
        "line 2: leave out the ending",
    ),
    "a bar": ("two|ann|a b c", "utf-8", "contains '|'"),
    "an ambiguous stem": ("one " + "a " * 100, "utf-8", "several files are called 'one'"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_bad_labels(tmp_path, kind):
    text, encoding, fragment = BAD_LABELS[kind]
    file = label_file(tmp_path, text, encoding)
    with pytest.raises(measure.UserError) as caught:
        measure.read_labels(file, NAMES, SECONDS, needed=range(4))
    assert str(caught.value).startswith(str(file)) and fragment in str(caught.value)


def test_ambiguous_stems_that_are_not_used():
    ids, ambiguous = measure.utterance_ids(
        ["a/x.wav", "b/x.wav", "y.wav", "c/y.wav", "z.wav", "z.flac"]
    )
    assert ids == {"a/x": 0, "b/x": 1, "y": 2, "c/y": 3}
    assert ambiguous == {"x", "z"}


def test_labels_follow_the_window():
    labels = np.arange(300)
    assert measure.labels_of_frames(labels, 4, 2.0).tolist() == [25, 75, 125, 175]
    assert measure.labels_of_frames(labels, 4, 2.0, begin=1.0).tolist() == [125, 175, 225, 275]
    assert measure.labels_of_frames(labels[:150], 4, 2.0)[-1] == 149

    names = ["a"] * 100 + ["b"] * 50 + ["c"] * 50
    segments = measure.label_segments(names, 0.5, 1.25)
    assert segments == [(0, 0.5, "a"), (0.5, 1.0, "b"), (1.0, 1.25, "c")]


# ---- small parts of the command


def test_free_folders_under_a_race(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(compare.reserve, [None] * 32))
    assert sorted(map(str, folders)) == sorted(f"runs/compare-{i}" for i in range(1, 33))

    def claim(_):
        try:
            return compare.reserve("new/deep")
        except measure.UserError as error:
            assert str(error).startswith("--out new/deep: exists")

    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(claim, range(32)))
    assert len(folders) - folders.count(None) == 1
    (tmp_path / "empty").mkdir()
    assert compare.reserve("empty").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(measure.UserError, match="--out file"):
        compare.reserve("file")


def test_names_of_runs(tmp_path):
    for name in ("x/run", "y/run", "x/other"):
        (tmp_path / name).mkdir(parents=True)
    folders = [tmp_path / name for name in ("x/run", "y/run", "x/other")]
    assert compare.unique_names(folders) == ["x/run", "y/run", "x/other"]
    assert compare.unique_names(folders[1:]) == ["run", "other"]
    with pytest.raises(measure.UserError, match="twice"):
        compare.unique_names([tmp_path / "x/run", tmp_path / "x/run/"])


def test_mean_and_range():
    values = [{"a": 1.0, "b": {"c": None}}, {"a": 3.0, "b": {"c": 1.0}}]
    assert compare.spread(values) == {"a": {"mean": 2.0, "min": 1.0, "max": 3.0}, "b": {"c": None}}
    assert compare.spread([None, {"a": 1.0}]) is None
    row = {"phone": None, "eer": {"mean": 0.2, "min": 0.1, "max": 0.3}, "variance": 0.25}
    assert compare.cells(row, row) == ["-", "20.0 (10.0-30.0)", "0.250"]


def test_names_that_are_not_text(tmp_path):
    script = SimpleNamespace(write_audio=lambda path, wave, rate: None)
    run = SimpleNamespace(name="x/run", script=script, cfg=SimpleNamespace(sample_rate=8000))
    name = compare.printable(os.fsdecode(b"ann/J\xf6rg"))
    row = {"number": 3, "utterance": name, "target_speaker": "ben", "clips": []}
    compare.add_clip(row, run, "conversion", torch.zeros(8), tmp_path)
    compare.add_clip(row, run, "source", torch.zeros(8), tmp_path)
    first, second = row["clips"]
    assert first["path"] == "audio/3_J_rg_x_run_conversion.wav" and first["target"] == "ben"
    assert second["run"] is None and second["target"] is None


# ---- the command, on two scripts and three tiny runs


def speak(path, rng, pitch, seconds):
    t = np.arange(int(16000 * seconds)) / 16000
    glide = pitch * (1 + 0.1 * np.sin(2 * np.pi * 2 * t))
    phase = 2 * np.pi * glide.cumsum() / 16000
    wave = sum(np.sin(k * phase) / k for k in range(1, 12)) + 0.05 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, 0.1 * wave, 16000)


def shell(cwd, script, *words):
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data: three speakers of eight utterances; test: two others; runs: two seeds, a vqvae."""
    root = tmp_path_factory.mktemp("compare")
    rng = np.random.default_rng(0)
    voices = [
        ("data", "ann", 8),
        ("data", "ben", 8),
        ("data", "don", 8),
        ("test", "eve", 4),
        ("test", "fay", 4),
    ]
    for s, (part, name, count) in enumerate(voices):
        for i in range(count):
            seconds = 0.4 + 0.05 * i
            speak(root / part / name / f"{name}_{i}.wav", rng, 100 * 1.25**s, seconds)
            with open(root / part / "phones.txt", "a") as file:
                print(f"{name}_{i}", *rng.choice(list("aiu"), round(100 * seconds)), file=file)

    def train(script, out, seed):
        flags = f"--data data --test test --out runs/{out} --seed {seed} {TINY} {FLAGS[script]}"
        return shell(root, f"{script}.py", *flags.split())

    runs = (("adain_vc", "a0", 0), ("adain_vc", "a1", 1), ("vqvae", "v0", 0))
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda run: train(*run), runs):
            assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def compared(folder):
    """One comparison of the three runs, in a process of its own."""
    words = "runs/a0 runs/a1 runs/v0 --out seen --pairs 7 --probe 20".split()
    done = shell(folder, "tests/compare.py", *words)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, out=folder / "seen")


def test_result(compared):
    result = json.loads((compared.out / "result.json").read_text())
    assert list(result["runs"]) == ["a0", "a1", "v0"]
    date = result["compared"].pop("date")
    assert time.strptime(date, "%Y-%m-%d")
    assert result["compared"] == {
        "data": "data",
        "test": "test",
        "seed": 0,
        "pairs": 7,
        "probe": 20,
        "seconds": None,
        "target_seconds": 3.0,
        "clusters": None,
    }
    names = {
        "a0": {"content", "speaker"},
        "a1": {"content", "speaker"},
        "v0": {"encoder", "codes", "ids"},
    }
    for run, entry in result["runs"].items():
        measured = ["chance", "log_mel", "untrained", "representations"]
        assert list(entry) == [*compare.RECORD, *measured, "conversion", "reconstruction", "copy"]
        assert entry["steps"] == 2 and entry["command"] and entry["method_sha256"]
        assert entry["data"]["speakers"] == 3 and entry["data"]["utterances"] == 24
        assert entry["representations"].keys() == entry["untrained"].keys() == names[run]
        rows = [entry["chance"], entry["log_mel"], *entry["untrained"].values()]
        for row in rows + list(entry["representations"].values()):
            assert [name for name in row if not name.startswith("majority")] == compare.ROW
            assert all(value is None or 0 <= value <= 1 for value in row.values())
        for kind in ("conversion", "reconstruction", "copy"):
            assert entry[kind].keys() == {"pairs", *compare.SPOKEN}
            assert None not in [
                entry[kind][name] for name in ("target", "phones", "vde", "variance")
            ]
        assert entry["conversion"]["pairs"] > 0 and entry["conversion"]["source"] is not None
        assert entry["reconstruction"]["source"] is None
    a0, a1 = result["runs"]["a0"], result["runs"]["a1"]
    assert a0["representations"]["speaker"]["phone"] is None
    assert a0["representations"]["content"]["phone"] is not None
    assert a0["log_mel"] == a1["log_mel"] and a0["copy"] == a1["copy"]  # measured once

    (seeds,) = result["seeds"]
    assert seeds["runs"] == ["a0", "a1"] and seeds["seeds"] == [0, 1]
    speaker = seeds["representations"]["content"]["speaker"]
    assert speaker["min"] <= speaker["mean"] <= speaker["max"]


def test_what_is_left_and_shown(compared):
    page = (compared.out / "index.html").read_text()
    assert (compared.out / "figure.svg").exists()
    files = sorted((compared.out / "audio").iterdir())
    assert len(files) > 6 * 3 and all(sf.info(file).subtype == "PCM_16" for file in files)
    assert all(f"audio/{file.name}" in page for file in files)
    screen = compared.done.stdout
    for words in ("a0: trained", "v0: reconstructing", "untrained content", "mean of 2 adain_vc"):
        assert words in screen
    assert compared.done.stderr == ""


def run_main(folder, monkeypatch, capsys, *words):
    """-> exit code and the text on stderr of compare.main in `folder`."""
    monkeypatch.chdir(folder)
    try:
        code = compare.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    "words, code, fragment",
    [
        ("runs/none", 1, "runs/none: no such checkpoint"),
        ("data/phones.txt", 1, "not a checkpoint"),
        ("runs/a0 runs/a0/model.pt", 1, "named twice"),
        ("runs/a0 --data none", 1, "none"),
        ("runs/a0 --phones none.txt", 1, "none.txt"),
        ("runs/a0 --phones utf16.txt", 1, "utf16.txt: line 1 is not UTF-8"),
        ("runs/a0 --phones strange.txt", 1, "strange.txt: no line begins with an utterance id"),
        ("runs/a0 --include (", 1, "--include"),
        ("runs/a0 --include nothing", 1, "--include"),
        ("runs/broken", 1, "runs/broken/log.jsonl: damaged"),
        ("runs/a0 --out data", 1, "--out data: exists"),
        ("runs/a0 --pairs 0", 2, "--pairs"),
        ("runs/a0 --probes 3", 2, "--probes"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, words, code, fragment):
    (folder / "utf16.txt").write_text("ann_0 a a a", "utf-16")
    (folder / "strange.txt").write_text("x a a a\n")
    broken = folder / "runs" / "broken"
    broken.mkdir(exist_ok=True)
    (broken / "model.pt").write_bytes((folder / "runs" / "a0" / "model.pt").read_bytes())
    (broken / "log.jsonl").write_text('{"step": 1}\n{"st')
    got, error = run_main(folder, monkeypatch, capsys, *words.split())
    assert got == code, error
    assert error.startswith("error: ") and error.count("\n") == 1 and fragment in error, error
    assert not list((folder / "runs").glob("compare-*"))


@pytest.mark.parametrize("out", [None, "new", "empty"])
def test_a_folder_without_a_result_is_removed(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyboardInterrupt):
        with compare.reserved(out) as folder:
            assert folder.is_dir()
            raise KeyboardInterrupt
    assert folder.exists() == (out == "empty") and not (folder / "audio").exists()

    with pytest.raises(KeyboardInterrupt):
        with compare.reserved(out) as folder:
            (folder / "result.json").write_text("{}")
            raise KeyboardInterrupt
    assert (folder / "result.json").exists()


def test_interrupt(folder):
    command = [sys.executable, "-u", str(ROOT / "tests" / "compare.py"), "runs/a0"]
    process = subprocess.Popen(
        command, cwd=folder, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "a0: log-mel" in line:
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == ""
    assert not list((folder / "runs").glob("compare-*"))
