# SPDX-License-Identifier: MIT
"""The blocks audio, spectrum, corpus and toy, which are the same text in all six scripts: from
files of any kind to batches, held to closed forms and to the numbers of librosa and soxr."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import adain_vc as m  # noqa: E402
import vqvae  # noqa: E402

GOLDEN = json.loads((ROOT / "tests" / "golden" / "dsp.json").read_text())


def case_name(case):
    """A short name of a golden case: its numbers."""
    return "-".join(str(value) for value in case.values() if isinstance(value, int))


def settings(**overrides):
    sizes = {"sample_rate": 8000, "n_fft": 256, "win": 200, "hop": 80, "n_mels": 40, "crop": 1920}
    return m.Config(**sizes | {"batch_size": 2, "device": "cpu"} | overrides)


def noise(seconds, rate=8000, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * rate))


def write(path, wave, rate=8000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(os.fsencode(path), wave, rate, **{"format": "WAV", **options})
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three speakers with twelve utterances of 0.5 s each, in tmp_path/data; works in tmp_path."""
    monkeypatch.chdir(tmp_path)
    for s, name in enumerate(("ann", "ben", "don")):
        for i in range(12):
            write(tmp_path / "data" / name / f"{name}_{i:02d}.wav", noise(0.5, seed=12 * s + i))
    return tmp_path / "data"


def load(folder, **overrides):
    return m.load_corpus(settings(data=str(folder), **overrides))


# ---- resampling


def tone(hertz, rate, samples):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)


def read_at(tmp_path, wave, rate, new_rate):
    write(tmp_path / "x.wav", wave, rate, subtype="FLOAT")
    return m.read_audio(tmp_path / "x.wav", new_rate).double().numpy()


def amplitudes(wave, hertz, rate):
    """Of sine and cosine in the middle half of a wave, and the rms of what is left."""
    middle = slice(len(wave) // 4, 3 * len(wave) // 4)
    phase = (2 * np.pi * hertz * np.arange(len(wave)) / rate)[middle]
    basis = np.stack([np.sin(phase), np.cos(phase)], 1)
    found = np.linalg.lstsq(basis, wave[middle], rcond=None)[0]
    residual = wave[middle] - basis @ found
    return *found, np.sqrt(np.mean(residual**2))


@pytest.mark.parametrize("case", GOLDEN["resampling"]["settings"], ids=case_name)
def test_tones_below_the_new_limit_stay_and_others_vanish(tmp_path, case):
    rate = case["from_rate"]
    new_rate = case["to_rate"]
    for expected in case["pass_band"]:
        result = read_at(tmp_path, tone(expected["hertz"], rate, case["samples"]), rate, new_rate)
        assert len(result) == case["samples_out"]
        sine, cosine, residual = amplitudes(result, expected["hertz"], new_rate)
        tolerance = case["tolerance_absolute"]
        assert abs(sine - 0.5) < tolerance and abs(cosine) < tolerance and residual < tolerance
    for beyond in case["beyond"]:
        hertz = beyond["hertz"] if isinstance(beyond, dict) else beyond
        result = read_at(tmp_path, tone(hertz, rate, case["samples"]), rate, new_rate)
        level = np.sqrt(np.mean(result[len(result) // 4 : 3 * len(result) // 4] ** 2)) / 0.5**1.5
        assert 20 * np.log10(level + 1e-30) < case["max_level_db"]


@pytest.mark.parametrize("case", GOLDEN["resampling_of_a_chord"]["settings"], ids=case_name)
def test_a_chord_is_exact(tmp_path, case):
    rate = case["from_rate"]
    n = np.arange(2 * rate)
    partials = ((137, 0.3), (911, 1.1), (2203, 2.0), (3301, 0.7))
    chord = 0.1 * sum(np.sin(2 * np.pi * hertz * n / rate + phase) for hertz, phase in partials)
    result = read_at(tmp_path, chord, rate, case["to_rate"])
    np.testing.assert_allclose(result[case["index"]], case["value"], atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 16001, 15991])
@pytest.mark.parametrize("samples", [1, 2, 799, 8000, 60013])
def test_lengths_are_exact(rate, samples):
    wave = m.resample(torch.zeros(samples), rate, 16000)
    assert wave.shape == (math.ceil(samples * 16000 / rate),)


def test_equal_rates_change_nothing():
    wave = torch.randn(1000)
    assert torch.equal(m.resample(wave, 8000, 8000), wave)


def test_pieces_join_without_a_seam(tmp_path):
    """200 s are read in three pieces; at their borders a tone goes on as if there were none."""
    path = write(tmp_path / "long.wav", tone(440, 11025, 200 * 11025), 11025, subtype="FLOAT")
    pieces = m.find_pieces(path)
    assert [last - first for first, last in pieces] == [60 * 11025, 60 * 11025, 80 * 11025]
    result = m.read_audio(path, 8000)
    assert len(result) == 200 * 8000
    exact = torch.from_numpy(tone(440, 8000, len(result)))
    assert abs(result - exact)[100:-100].max() < 1e-5


@pytest.mark.parametrize("seconds, expected", [(0, [0]), (1, [1]), (60, [60]), (119, [119])])
def test_short_files_are_one_piece(tmp_path, seconds, expected):
    path = write(tmp_path / "x.wav", np.zeros(seconds * 8000))
    assert [last - first for first, last in m.find_pieces(path)] == [8000 * s for s in expected]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_long_files_need_little_memory(tmp_path):
    """Decoding a stereo file of 20 minutes at 44.1 kHz, which has 400 MiB as floats and takes
    almost 800 MiB if it is read whole, takes less than 600 MiB with the threads of two cores."""
    wave = (32768 * noise(10, 44100)).astype(np.int16)
    write(tmp_path / "data" / "x.wav", np.tile(wave[:, None], (120, 2)), 44100)
    code = (
        "import os, re; from pathlib import Path; import adain_vc as m\n"
        "os.cpu_count = os.process_cpu_count = lambda: 2\n"
        # ru_maxrss would not do: it begins with what the parent process had.
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', "
        "Path('/proc/self/status').read_text())[1]) / 1024\n"
        "before = peak(); m.decode([Path('data/x.wav')], 16000)\n"
        "print(peak() - before)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 600


# ---- files


@pytest.mark.parametrize(
    "ending, options",
    [
        ("wav", {}),
        ("WAV", {}),
        ("flac", {"format": "FLAC"}),
        ("ogg", {"format": "OGG"}),
        ("opus", {"format": "OGG", "subtype": "OPUS"}),
        ("mp3", {"format": "MP3"}),
        ("aiff", {"format": "AIFF"}),
        ("au", {"format": "AU"}),
        ("caf", {"format": "CAF"}),
        ("sph", {"format": "NIST"}),
    ],
)
def test_every_kind_of_file_is_found_and_read(tmp_path, ending, options):
    write(tmp_path / f"a.{ending}", np.stack([tone(440, 8000, 8000)] * 2, 1), **options)
    assert m.audio_names(tmp_path) == [f"a.{ending}"]
    wave = m.read_audio(tmp_path / f"a.{ending}", 8000)
    assert wave.dtype == torch.float32 and wave.ndim == 1 and 8000 <= len(wave) < 10500
    assert abs(wave.std() - 0.5 * 0.5**0.5) < 0.02


def test_channels_are_averaged(tmp_path):
    left = tone(440, 8000, 8000)
    write(tmp_path / "x.wav", np.stack([left, -0.5 * left], 1), subtype="FLOAT")
    wave = m.read_audio(tmp_path / "x.wav", 8000)
    np.testing.assert_allclose(wave, 0.25 * left, atol=1e-6)


@pytest.mark.parametrize("bad", ["missing", "text", "folder", "nan"])
def test_what_cannot_be_read_is_named(tmp_path, bad):
    path = tmp_path / "x.wav"
    if bad == "text":
        path.write_text("not audio")
    elif bad == "folder":
        path.mkdir()
    elif bad == "nan":
        write(path, np.full(100, np.nan), subtype="FLOAT")
    with pytest.raises(m.UserError, match=r"x\.wav: .*; give another"):
        m.read_audio(path, 8000)


def test_write_audio_makes_folders_and_clips(tmp_path):
    m.write_audio(tmp_path / "a" / "b.flac", torch.tensor([0.5, 3.0, -3.0]), 8000)
    wave, rate = sf.read(tmp_path / "a" / "b.flac")
    assert rate == 8000
    np.testing.assert_allclose(wave, [0.5, 1, -1], atol=1e-4)


def test_linked_folders_are_followed(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("ann", "ben", "don"):
        os.symlink(folder / name, linked / name)
    corpus = load(linked)
    assert len(corpus.paths) == 36 and corpus.speakers == ["ann", "ben", "don"]


def test_a_link_back_up_does_no_harm(folder):
    os.symlink(folder, folder / "ann" / "again")
    assert len(m.audio_names(folder)) == 36


def test_resource_forks_and_other_files_are_ignored(folder, capsys):
    for path in list(folder.rglob("*.wav")):
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7" + bytes(100))
    (folder / "notes.txt").touch()
    assert len(load(folder).train) == 30
    assert "36 of 37 files are audio" in capsys.readouterr().out


def test_names_that_are_not_utf8_or_very_long(folder, capfd):
    first = folder / "ann" / "ann_00.wav"
    os.rename(os.fsencode(first), os.fsencode(folder / "ann") + b"/J\xf6rg.wav")
    (folder / "ann" / "ann_01.wav").rename(folder / "ann" / ("n" * 236 + ".wav"))
    corpus = load(folder)
    assert len(corpus.train) + len(corpus.held) == 36
    assert all(len(corpus.wave(u)) == 4000 for u in corpus.train)


def test_float_files_of_integer_scale_are_named(folder, capsys):
    for path in folder.rglob("*.wav"):
        wave, rate = sf.read(path)
        write(path, 32768 * wave, rate, subtype="FLOAT")
    load(folder)
    out = capsys.readouterr().out
    assert "warning: 36 recordings go far beyond -1..1, such as " in out and "rescale" in out


# ---- corpus


def test_a_corpus_is_what_its_files_hold(folder):
    corpus = load(folder)
    assert corpus.root == folder and corpus.test is corpus
    assert corpus.speakers == ["ann", "ben", "don"]
    assert sorted([*corpus.train, *corpus.held]) == list(range(36))
    for u, path in enumerate(corpus.paths):
        wave = sf.read(path)[0]
        np.testing.assert_allclose(corpus.wave(u), wave, atol=1e-4)
        assert corpus.speakers[corpus.speaker[u]] == path.parent.name


def test_a_tenth_of_each_speaker_is_held_out(folder):
    corpus = load(folder)
    held = corpus.speaker[corpus.held]
    assert [int((held == s).sum()) for s in range(3)] == [2, 2, 2]
    again = load(folder)
    assert again.held.tolist() == corpus.held.tolist()


def test_a_single_utterance_is_only_trained_on(folder):
    write(folder / "eve" / "eve.wav", noise(0.5))
    corpus = load(folder)
    assert corpus.paths[-1].name == "eve.wav" and len(corpus.paths) - 1 in corpus.train


def test_both_microphones_of_a_take_stay_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for s in range(3):
        for i in range(12):
            for microphone in (1, 2):
                name = f"p{s}/p{s}_{i:03d}_mic{microphone}.flac"
                write(tmp_path / "data" / name, noise(0.5, seed=12 * s + i), format="FLAC")
    corpus = load("data")
    takes = [str(path).replace("_mic2", "_mic1") for path in corpus.paths]
    assert {takes[u] for u in corpus.held}.isdisjoint(takes[u] for u in corpus.train)
    assert len(corpus.held) == 12 and len(corpus.train) == 60
    assert len(load("data", include="_mic1").paths) == 36


def test_lost_recordings_are_left_out_and_named(folder, capsys):
    (folder / "ann" / "ann_03.wav").write_text("not audio")
    write(folder / "ben" / "ben_04.wav", noise(0.5)[:30])
    corpus = load(folder)
    lost = [u for u, path in enumerate(corpus.paths) if path.stem in ("ann_03", "ben_04")]
    assert not set(lost) & {*corpus.train, *corpus.held}
    assert "2 of 36 recordings are unreadable" in capsys.readouterr().out
    for i in range(3):
        write(folder / "don" / f"don_{i:02d}.wav", np.zeros(0))
    with pytest.raises(m.UserError, match=r"5 of 36 .* first: .*ann_03\.wav; fix or remove"):
        load(folder)


def test_a_speaker_without_a_usable_recording_is_none(folder):
    write(folder / "cat" / "cat.wav", noise(0.5)[:30])
    corpus = load(folder)
    assert corpus.speakers == ["ann", "ben", "don"]
    assert set(corpus.speaker[[*corpus.train, *corpus.held]]) == {0, 1, 2}


def test_a_long_recording_is_several_utterances(folder):
    wave = noise(130)
    write(folder / "ann" / "long.wav", wave)
    corpus = load(folder)
    pieces = [u for u, path in enumerate(corpus.paths) if path.name == "long.wav"]
    assert [int(corpus.length[u]) for u in pieces] == [60 * 8000, 70 * 8000]
    np.testing.assert_allclose(torch.cat([corpus.wave(u) for u in pieces]), wave, atol=1e-4)
    assert {u in corpus.held for u in pieces} in ({True}, {False})  # all on one side


def test_test_folder_is_a_corpus_of_its_own(folder, tmp_path):
    for i in range(3):
        write(tmp_path / "other" / "eve" / f"{i}.wav", noise(0.5, seed=i))
    corpus = load(folder, test=str(tmp_path / "other"))
    assert corpus.test.speakers == ["eve"] and len(corpus.test.held) == 3
    assert len(corpus.test.train) == 0


@pytest.mark.parametrize(
    "names, suggested",
    [
        (["ann_0.wav", "ann_1.wav", "ben_0.wav", "ben_1.wav"], "([^/_-]+)[_-][^/]*$"),
        (["wav/ann/0.wav", "wav/ann/1.wav", "wav/ben/0.wav", "wav/ben/1.wav"], "/([^/]+)/"),
        (["a/b/ann/0.wav", "a/b/ann/1.wav", "a/b/ben/0.wav"], "/([^/]+)/[^/]*$"),
    ],
)
def test_the_regex_that_fits_is_suggested(names, suggested):
    with pytest.raises(m.UserError) as error:
        m.find_speakers(names, settings(), "data", 2)
    assert f"--speaker '{suggested}' would find 2" in str(error.value)
    owners = m.find_speakers(names, settings(speaker=suggested), "data", 2)
    assert set(owners) == {"ann", "ben"}


def test_files_are_decoded_once(folder, monkeypatch):
    first = load(folder)
    monkeypatch.setattr(m, "read_piece", None)
    assert torch.equal(load(folder).audio, first.audio)
    monkeypatch.undo()
    os.chdir(folder.parent)
    write(folder / "ann" / "ann_00.wav", noise(0.7, seed=99))
    assert load(folder).length[0] == 5600  # a changed file is decoded anew


def test_nothing_half_made_is_left(tmp_path):
    def fail(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        m.make_once(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []
    m.make_once(tmp_path / "x", lambda part: part.write_text("whole"))
    m.make_once(tmp_path / "x", fail)  # it exists
    assert (tmp_path / "x").read_text() == "whole"


def test_two_that_make_the_same_do_not_collide(tmp_path):
    both = threading.Barrier(2)

    def write_folder(part):
        part.mkdir()
        (part / "a").write_text("whole")
        both.wait()

    threads = [
        threading.Thread(target=m.make_once, args=(tmp_path / "x", write_folder)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x" / "a").read_text() == "whole"
    assert len(list(tmp_path.iterdir())) == 1


def test_batches_are_crops_of_different_utterances(folder):
    cfg = settings(data=str(folder), batch_size=8)
    corpus = m.load_corpus(cfg)
    batch = m.get_batch(corpus, cfg, step=3)
    assert batch["wave"].shape == (8, cfg.crop) and batch["wave"].dtype == torch.float32
    utterances = batch["utterance"].tolist()
    assert len(set(utterances)) == 8 and set(utterances) <= set(corpus.train.tolist())
    for wave, speaker, u in zip(batch["wave"], batch["speaker"], utterances):
        assert speaker == corpus.speaker[u]
        windows = corpus.wave(u).unfold(0, cfg.crop, 1)
        assert (windows == wave).all(1).sum() == 1
    assert not torch.equal(m.get_batch(corpus, cfg, 4)["wave"], batch["wave"])
    assert not torch.equal(m.get_batch(corpus, cfg, 3, draw=1)["wave"], batch["wave"])
    assert torch.equal(m.get_batch(corpus, cfg, 3)["wave"], batch["wave"])


def test_short_utterances_are_repeated(folder):
    cfg = settings(data=str(folder), crop=10_000)
    corpus = m.load_corpus(cfg)
    batch = m.get_batch(corpus, cfg, 0)
    whole = corpus.wave(batch["utterance"][0])
    assert torch.equal(batch["wave"][0], whole.repeat(3)[:10_000])


# ---- spectra


def golden_wave(rate, samples):
    """The wave of golden/dsp.json; layer 600 is its formula for noise."""
    t = np.arange(samples) / rate
    wave = 0.3 * np.sin(2 * np.pi * 220 * t) + 0.2 * np.sin(2 * np.pi * (500 * t + 600 * t**2))
    return wave + layer(600, samples, 0.05)


def layer(k, n, scale):
    p = 1_000_003
    j = [i % p for i in range(n)]
    h = [
        (271829 * i**3 + 314159 * (k + 1) * i**2 + 161803 * (k + 3) * i + 577215 * (k + 1)) % p
        for i in j
    ]
    return scale * (2 * np.array(h) / p - 1)


def test_the_formula_of_the_golden_values():
    for check in GOLDEN["fill_check"]:
        assert abs(layer(check["k"], check["i"] + 1, 1)[-1] - check["value"]) < 1e-12


@pytest.mark.parametrize("case", GOLDEN["mel_filters"]["settings"], ids=case_name)
def test_mel_filters_are_those_of_librosa(case):
    filters = m.mel_filters(case["sample_rate"], case["n_fft"], case["n_mels"], "cpu").T
    assert list(filters.shape) == case["shape"]
    values = filters.flatten()[case["index"]].numpy()
    tolerance = case["tolerance_of_largest"] * case["largest"]
    np.testing.assert_allclose(values, case["value"], rtol=0, atol=tolerance)
    sums = filters.double().sum(1)[:: case["sum_of_each_band_step"]].numpy()
    bins = filters.shape[1]
    np.testing.assert_allclose(sums, case["sum_of_each_band"], rtol=0, atol=bins * tolerance)
    assert int((filters.amax(1) == 0).sum()) == case["empty_bands"]


def assert_golden(result, expected):
    """Sampled entries, mean and mean square, at the tolerance that the golden file states."""
    assert list(result.shape) == expected["shape"]
    tolerance = expected["tolerance"] * math.sqrt(expected["mean_square"])
    result = result.double()
    values = result.flatten()[expected["index"]].numpy()
    np.testing.assert_allclose(values, expected["value"], rtol=0, atol=tolerance)
    assert abs(result.mean() - expected["mean"]) < tolerance
    mean_square = result.square().mean() / expected["mean_square"]
    assert abs(mean_square - 1) < 2 * expected["tolerance"]


def golden_case(case):
    """-> the wave (1, N) of a golden case, in float32, and a Config with its sizes."""
    wave = torch.from_numpy(golden_wave(case["sample_rate"], case["samples"]))[None].float()
    sizes = ("sample_rate", "n_fft", "win", "hop", "n_mels")
    return wave, settings(**{name: case[name] for name in sizes if name in case})


@pytest.mark.parametrize("case", GOLDEN["spectra"]["settings"], ids=case_name)
def test_spectra_are_those_of_librosa(case):
    wave, cfg = golden_case(case)
    assert_golden(m.log_mel(wave, cfg)[0], case["log_mel"])
    assert_golden(m.stft(wave, cfg)[0].abs(), case["magnitude"])


CASES_WITH_MFCC = [case for case in GOLDEN["spectra"]["settings"] if "mfcc" in case]


@pytest.mark.parametrize("case", CASES_WITH_MFCC, ids=case_name)
def test_mfcc_are_those_of_librosa(case):
    wave, cfg = golden_case(case)
    mfcc = vqvae.mfcc(wave, cfg)[0]
    assert_golden(mfcc, case["mfcc"])
    assert_golden(mfcc[:, 13:], case["mfcc_deltas_only"])


@pytest.mark.parametrize("case", GOLDEN["griffin_lim"]["settings"], ids=case_name)
def test_griffin_lim_converges_as_well_as_librosas(case):
    wave, cfg = golden_case(case)
    magnitude = m.stft(wave, cfg).abs()
    rebuilt = m.stft(m.griffin_lim(magnitude, cfg), cfg).abs()
    assert (rebuilt - magnitude).norm() / magnitude.norm() < case["bound"]


def test_silence_is_at_the_floor_of_log_mel():
    x = m.log_mel(torch.zeros(1, 800), settings())
    torch.testing.assert_close(x, torch.full((1, 11, 40), math.log(1e-5)))


def test_istft_undoes_stft():
    cfg = settings()
    wave = torch.randn(2, 4000)
    rebuilt = m.istft(m.stft(wave, cfg), cfg)
    torch.testing.assert_close(rebuilt, wave[:, : rebuilt.shape[1]], atol=1e-5, rtol=0)


def test_mel_to_magnitude_undoes_the_filters():
    cfg = settings(n_mels=40)
    mel = torch.rand(1, 5, cfg.n_mels) + 0.5
    filters = m.mel_filters(cfg.sample_rate, cfg.n_fft, cfg.n_mels, mel.device)
    inverse = mel @ torch.linalg.pinv(filters)
    assert torch.equal(m.mel_to_magnitude(mel, cfg), inverse.clamp(min=0))
    torch.testing.assert_close(inverse @ filters, mel, atol=1e-4, rtol=0)


def test_the_functions_take_any_configuration():
    """Who copies log_mel needs no Config of ours: any object with these fields will do."""

    class Settings:
        sample_rate = 8000
        n_fft = 256
        win = 200
        hop = 80
        n_mels = 40
        __hash__ = None

    wave = torch.randn(1, 4000)
    assert torch.equal(m.log_mel(wave, Settings()), m.log_mel(wave, settings()))


# ---- toy voices


def test_toy_voices_are_reproducible_and_labelled(tmp_path, monkeypatch):
    wave, phones = m.toy_utterance(3, 5)
    again, same = m.toy_utterance(3, 5)
    assert torch.equal(wave, again) and list(phones) == list(same)
    assert len(wave) == 160 * len(phones) and phones[0] == phones[-1] == "sil"
    assert wave.isfinite().all() and abs(wave.std() - 0.08) < 1e-3
    assert not torch.equal(m.toy_utterance(4, 5)[0][:1000], wave[:1000])


def test_toy_phones_do_not_depend_on_the_speaker():
    """Across speakers every phone is about as frequent, and no two utterances are alike."""
    said = ["".join(m.toy_utterance(s, n)[1]) for s in range(1, 4) for n in range(3)]
    assert len(set(said)) == len(said)


def test_toy_traits_fill_their_ranges():
    voices = np.array([m.toy_voice(s) for s in range(1, 41)])
    spread = (voices - voices.min(0)) / np.ptp(voices, 0)
    for trait in spread[:24].T:
        gaps = np.diff(np.sort(trait))
        assert gaps.max() < 0.15 and trait.max() - trait.min() > 0.9
    assert abs(np.corrcoef(spread.T) - np.eye(5)).max() < 0.3


def test_pulses_have_their_pitch_and_no_aliases():
    f0 = np.full(16000, 201.0)
    f0[0] = (
        100.5  # so that no sample lies on the middle of a pulse, where the formula divides 0 by 0
    )
    spectrum = abs(np.fft.rfft(m.glottal_pulses(f0)))
    harmonics = np.arange(201, 7601, 201)
    assert np.ptp(spectrum[harmonics]) < 1e-6 * spectrum.max()
    others = np.delete(spectrum, harmonics)
    assert others.max() < 1e-6 * spectrum.max()
