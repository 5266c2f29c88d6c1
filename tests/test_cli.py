# SPDX-License-Identifier: MIT
"""The command line of all six scripts: what a run leaves, exact resume, interruption, bad inputs,
several processes. The models are tiny, and a run takes a second."""

import hashlib
import importlib.util
import json
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile as sf
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
COMMON = "--toy --device cpu --batch-size 2 --crop 1920 --steps 4 --save-every 2 --log-every 2"
SMALL = {  # flags that make the model tiny; the first one changes its shape
    "vqvae": "--d-code 8 --channels 16 --codes 8 --d-condition 8 --residual 8 --skip 8 --depth 4 "
    "--sample-rate 8000 --win 200 --hop 80",
    "adain_vc": "--channels 8 --d-content 4 --d-speaker 8 --bank 2 --bank-channels 4 --blocks 2 "
    "--dense 1",
    "adversarial_vc": "--channels 8 --bank 2 --bank-channels 4 --critic-channels 2 "
    "--classifier-steps 2 --critic-steps 2 --ae-share 1 --classifier-share 1 --joint-share 1 "
    "--gan-share 1 --hop 40",
    "fhvae": "--hidden 8 --d-z1 3 --d-z2 4 --sequences 5",
    "cpc": "--channels 8 --d-context 8 --prediction-steps 3 --units 4 --d-embedding 4 --hidden 8 "
    "--blocks 1 --cpc-share 0.5 --score-scale 4",
    "dim": "--channels 8 --d-global 6 --hidden 16 --units 8 --concat-units 8 "
    "--decoder-channels 8 --infomax-share 0.5",
}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SPEAKERS = ["ann", "ben", "don"]


def small(script, *more):
    return [*COMMON.split(), *SMALL[script].split(), *map(str, more)]


def run(script, *argv, cwd, **options):
    command = [sys.executable, ROOT / f"{script}.py", *map(str, argv)]
    options = {"env": ENV, "capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command, cwd=cwd, **options)


def speak(path, rng, pitch, rate, seconds, channels):
    """Writes a buzz with some noise, on one or two channels."""
    t = np.arange(int(rate * seconds)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 12))
    wave = wave + 0.1 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.stack([0.2 * wave, 0.1 * wave], 1)[:, :channels], rate)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train: three speakers, four utterances each; test: two unseen speakers."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for part, names, rates in (
        ("train", SPEAKERS, (8000, 16000, 22050, 44100)),
        ("test", ("eve", "fay"), (8000, 16000)),
    ):
        for s, name in enumerate(names):
            for i, rate in enumerate(rates):
                ending = ("wav", "flac")[(i + s) % 2]
                path = root / part / name / f"{name}_{i}.{ending}"
                speak(path, rng, 100 * 1.4**s, rate, 0.5 + 0.15 * i, 1 + i // 2 % 2)
    return root / "train"


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def trained(script, data, tmp_path_factory):
    """One tiny run. `cwd` is where it ran, and keeps the decoded audio for the other tests."""
    cwd = tmp_path_factory.mktemp(script)
    argv = small(script, "--data", data, "--test", data.parent / "test", "--out", "run")
    done = run(script, *argv, cwd=cwd)
    return SimpleNamespace(cwd=cwd, run=cwd / "run", done=done)


@pytest.fixture(scope="module")
def loaded(script):
    """The script as a module of its own, on one thread."""
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    before = sys.modules.get(script)
    sys.modules[script] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)
    if before is None:
        sys.modules.pop(script)
    else:
        sys.modules[script] = before


@pytest.fixture
def m(loaded, trained, monkeypatch):
    """The module in the folder of the tiny run; main()'s signal handlers are put back."""
    assert trained.done.returncode == 0, trained.done.stderr
    monkeypatch.chdir(trained.cwd)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield loaded
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def quick(m, monkeypatch):
    """The module without examples and figures, for tests that only train."""
    monkeypatch.setattr(m, "sample", lambda model, corpus, cfg, out: {})
    monkeypatch.setattr(m, "write_examples", lambda model, corpus, cfg, out: None)
    return m


def main(m, *argv):
    """-> exit code, whether main() returns it or argparse leaves by SystemExit."""
    try:
        return m.main([str(a) for a in argv])
    except SystemExit as stop:
        return stop.code


def one_line(stderr, fragment):
    assert stderr.count("\n") == 1 and stderr.startswith("error: "), stderr
    assert fragment in stderr, stderr


def tensors(tree, prefix=""):
    """Nested dicts and lists -> {path: leaf}."""
    if isinstance(tree, torch.Tensor | float | int):
        return {prefix: torch.as_tensor(tree)}
    if not isinstance(tree, dict | list | tuple):
        return {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    leaves = {}
    for name, sub in items:
        leaves |= tensors(sub, f"{prefix}/{name}")
    return leaves


def checkpoint(path):
    return torch.load(path, weights_only=True)


# ---- what a run leaves, and the modes


def test_training_leaves_its_files(script, trained):
    done = trained.done
    assert (done.returncode, done.stderr) == (0, "")
    left = {p.name for p in trained.run.iterdir()}
    assert left == {"log.jsonl", "model.pt", "run.json", "samples"}
    steps = [json.loads(line)["step"] for line in open(trained.run / "log.jsonl")]
    assert steps == [1, 2, 4]
    assert re.search(r"^run: from step 0 to 4 in batches of 2$", done.stdout, re.M)
    assert re.search(r"^step 4/4 .*loss.* 0:00:00 left$", done.stdout, re.M)
    assert done.stdout.endswith("python tests/compare.py run\n")
    saved = checkpoint(trained.run / "model.pt")
    assert (saved["script"], saved["step"], saved["speakers"]) == (script, 4, SPEAKERS)
    samples = list((trained.run / "samples").glob("*.wav"))
    kinds = {"source", "reconstruction"} | ({"conversion"} if script != "dim" else set())
    for kind in kinds:
        assert any(path.stem.endswith(kind) for path in samples), kind
    for path in samples:
        wave, rate = sf.read(path)
        assert rate == saved["config"]["sample_rate"]
        assert len(wave) and np.isfinite(wave).all()


def test_run_json(script, trained):
    result = json.loads((trained.run / "run.json").read_text())
    assert set(result) == set(
        "script method_sha256 command config steps hardware torch seconds metrics".split()
    )
    assert (result["script"], result["steps"]) == (script, 4)
    assert result["config"]["batch_size"] == 2 and f"{script}.py" in result["command"]
    assert result["metrics"] and result["seconds"] > 0


def test_the_hash_is_of_the_method_alone(m, trained, tmp_path, monkeypatch):
    """It covers Config, TOY and the method, not the docstring, the imports and the plumbing."""
    cfg = m.load(trained.run)[1]
    source = Path(m.__file__).read_text()
    method = source[
        source.index("@dataclass(frozen") : source.index("# ==================== shared")
    ]
    expected = hashlib.sha256(method.encode()).hexdigest()
    saved = json.loads((trained.run / "run.json").read_text())["method_sha256"]
    assert m.describe_run(cfg)["method_sha256"] == saved == expected

    def hash_of(text):
        (tmp_path / "copy.py").write_text(text)
        monkeypatch.setattr(m, "__file__", str(tmp_path / "copy.py"))
        return m.describe_run(cfg)["method_sha256"]

    assert hash_of(source.replace("def parse(", "def parse_flags(")) == expected
    assert hash_of(source.replace("import json\n", "")) == expected
    assert hash_of(source.replace("def train_step(", "def train_one(", 1)) != expected
    assert hash_of(source.replace("TOY = dict(", "TOY = dict( ")) != expected


def test_convert(script, m, data, trained, tmp_path):
    """To a speaker or a recording as a command of its own; the reconstruction in this process."""
    cfg = checkpoint(trained.run / "model.pt")["config"]
    source = next(data.glob("ann/ann_3.*"))
    argv = ["convert", "--checkpoint", trained.run, "--source", source, "--output"]
    outputs = [tmp_path / "b.flac"]
    target = {"speaker": "ben", "recording": next(data.glob("ben/ben_1.*"))}.get(m.TARGET)
    if target:
        outputs.append(tmp_path / "new" / "a.wav")
        done = run(script, *argv, outputs[1], "--target", target, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert main(m, *argv, outputs[0]) == 0
    for path in outputs:
        wave, rate = sf.read(path)
        assert rate == cfg["sample_rate"] and wave.ndim == 1
        assert np.isfinite(wave).all() and wave.std() > 0
        assert abs(len(wave) - sf.info(source).duration * rate) <= cfg["hop"]


def test_the_target_is_what_the_method_takes(m, data, trained, tmp_path, monkeypatch):
    """A recording, the index of a speaker, or nothing at all."""
    seen = []
    cfg = m.load(trained.run)[1]
    monkeypatch.setattr(
        m, "convert", lambda model, waves, targets, cfg: seen.extend(targets) or waves
    )
    path = next(data.glob("ben/ben_1.*"))
    source = next(data.glob("ann/ann_3.*"))
    argv = [
        "convert",
        "--checkpoint",
        trained.run,
        "--source",
        source,
        "--output",
        tmp_path / "a.wav",
    ]
    target = {"speaker": "don", "recording": path, "": "don"}[m.TARGET]
    code = main(m, *argv, "--target", target)
    assert code == (0 if m.TARGET else 1)
    if m.TARGET == "recording":
        assert torch.equal(seen[0].cpu(), m.read_audio(path, cfg.sample_rate))
    elif m.TARGET == "speaker":
        assert seen == [2]


def test_encode_a_file_and_a_folder(m, data, trained, tmp_path):
    model, cfg, _ = m.load(trained.run)
    first = next(data.glob("ann/ann_0.*"))
    with torch.no_grad():
        expected = m.represent(model, m.read_audio(first, cfg.sample_rate), cfg)
    argv = ["encode", "--checkpoint", trained.run, "--source"]
    assert main(m, *argv, first, "--output", tmp_path / "one") == 0
    assert main(m, *argv, data / "ann", "--output", tmp_path / "many") == 0
    assert main(m, *argv, data, "--output", tmp_path / "tree") == 0

    def names(folder):
        found = (tmp_path / folder).rglob("*.npy")
        return sorted(p.relative_to(tmp_path / folder).as_posix() for p in found)

    assert names("one") == sorted(f"ann_0.{name}.npy" for name in expected)
    assert names("many") == sorted(f"ann_{i}.{name}.npy" for i in range(4) for name in expected)
    assert len(names("tree")) == 12 * len(expected) and (tmp_path / "tree" / "ben").is_dir()
    for name, x in expected.items():
        for folder in ("one", "many", "tree/ann"):
            saved = np.load(tmp_path / folder / f"ann_0.{name}.npy")
            assert saved.dtype == x.numpy().dtype
            np.testing.assert_allclose(saved, x.numpy(), atol=1e-5)


def test_discrete_units_are_integers(script, m, data, trained, tmp_path):
    name = {"vqvae": "ids", "cpc": "units"}.get(script)
    if not name:
        pytest.skip("this method has no discrete units")
    argv = [
        "encode",
        "--checkpoint",
        trained.run,
        "--source",
        data / "ann",
        "--output",
        tmp_path / "o",
    ]
    assert main(m, *argv) == 0
    units = np.load(tmp_path / "o" / f"ann_0.{name}.npy")
    assert units.dtype == np.int64 and units.ndim == 1 and 0 <= units.min() <= units.max() < 8


def test_long_recordings_are_taken_in_pieces(m, data, trained, tmp_path, monkeypatch):
    """130 s become three equal pieces; sequences are joined, vectors averaged."""
    lengths = []

    def represent(model, wave, cfg):
        lengths.append(len(wave) / cfg.sample_rate)
        value = float(len(lengths))
        return {
            "vector": torch.full((2,), value),
            "sequence": torch.full((4, 2), value),
            "units": torch.full((4,), len(lengths)),
        }

    monkeypatch.setattr(m, "represent", represent)
    monkeypatch.setattr(m, "convert", lambda model, waves, targets, cfg: waves)
    speak(tmp_path / "long.wav", np.random.default_rng(0), 100, 8000, 130, 1)
    argv = ["--checkpoint", trained.run, "--source", tmp_path / "long.wav", "--output"]
    assert main(m, "encode", *argv, tmp_path / "o") == 0
    np.testing.assert_allclose(lengths, 130 / 3, atol=0.01)
    vector, sequence, units = (
        np.load(tmp_path / "o" / f"long.{name}.npy") for name in ("vector", "sequence", "units")
    )
    assert vector.tolist() == [2, 2] and sequence[:, 0].tolist() == units.tolist()
    assert units.tolist() == [1] * 4 + [2] * 4 + [3] * 4 and units.dtype == np.int64
    assert main(m, "convert", *argv, tmp_path / "o.wav") == 0
    assert sf.info(tmp_path / "o.wav").duration == 130


def test_no_data_is_the_toy_corpus(m, data, monkeypatch):
    for argv in ([], ["--data"], ["--data", "--steps", "3"]):
        flags, given = m.parse(argv)
        assert flags.mode == "train" and not given.get("data")
    assert m.parse(["--data", "x"])[1] == {"data": "x"}

    def write_toy(root):
        shutil.copytree(data, root / "train")
        shutil.copytree(data.parent / "test", root / "test")

    monkeypatch.setattr(m, "write_toy", write_toy)
    cfg = m.Config(**m.TOY | {"device": "cpu"})
    corpus = m.load_corpus(cfg)
    assert len(corpus.paths) == 12 and len(corpus.test.held) == 4
    shutil.rmtree("runs/toy-24")


@pytest.mark.parametrize("text, value", [("true", True), ("False", False)])
def test_booleans(m, text, value):
    assert m.parse(["--bf16", text])[1] == {"bf16": value}
    with pytest.raises(SystemExit):
        m.parse(["--bf16", "1"])


def test_help_shows_every_flag(m, capsys):
    assert main(m, "--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in m.Config.__dataclass_fields__)
    assert "--checkpoint" in text and "--resume" in text


def test_out_defaults_to_the_next_free_folder(script, quick, data):
    for i in (1, 2):
        assert main(quick, *small(script, "--data", data, "--steps", 1)) == 0
        assert Path("runs", f"{script}-{i}", "model.pt").exists()


@pytest.mark.parametrize("out", [None, "same"])
def test_runs_started_together_have_folders_of_their_own(loaded, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    both = threading.Barrier(8)
    claimed = []

    def claim():
        both.wait()
        try:
            claimed.append(loaded.claim_folder(SimpleNamespace(out=out, resume=False)))
        except loaded.UserError:
            pass

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == (1 if out else 8)


def test_full_size_without_a_gpu_says_how_long_it_takes(script, quick, data, capsys):
    """An estimate after the first step. Here the full size is made small by flags."""
    argv = small(script, "--data", data, "--win", "200", "--n-fft", "256", "--sample-rate", 8000)
    argv = [a for a in argv if a != "--toy"]
    if script == "cpc":
        argv += ["--hop", "80"]
    assert main(quick, *argv, "--hop", {"adversarial_vc": 40}.get(script, 80)) == 0
    out = capsys.readouterr().out
    assert "million parameters on" in out
    assert re.search(r"^step 1/4 .* s a step, 0:00:0\d left$", out, re.M)


# ---- resume, interruption


def test_resume_is_exact(script, quick, data, tmp_path, monkeypatch):
    whole = tmp_path / "a"
    halves = tmp_path / "b"
    halves.mkdir()
    save = quick.save

    def keep(path, **content):
        save(path, **content)
        if content["step"] == 2:
            shutil.copy(path, halves / "model.pt")

    monkeypatch.setattr(quick, "save", keep)
    assert main(quick, *small(script, "--data", data, "--out", whole)) == 0
    half = checkpoint(halves / "model.pt")
    assert main(quick, *small(script, "--data", data, "--out", halves, "--resume")) == 0
    a = checkpoint(whole / "model.pt")
    b = checkpoint(halves / "model.pt")
    assert (half["step"], a["step"], b["step"]) == (2, 4, 4)
    for part in ("model", "optimizers"):
        then, one, two = (tensors(saved[part]) for saved in (half, a, b))
        assert one.keys() == two.keys() and one
        assert [k for k in one if not torch.equal(one[k], two[k])] == []
        assert any(k not in then or not torch.equal(one[k], then[k]) for k in one)


def test_resume_without_a_checkpoint_starts_and_says_so(script, quick, data, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(quick, *small(script, "--data", data, "--out", out, "--resume", "--steps", 1)) == 0
    assert checkpoint(out / "model.pt")["step"] == 1
    assert f"{out}: from step 0 to 1" in capsys.readouterr().out


def test_resume_of_a_finished_run_reports_again(script, quick, data, trained, tmp_path):
    shutil.copytree(trained.run, tmp_path / "run")
    before = (tmp_path / "run" / "model.pt").read_bytes()
    assert main(quick, *small(script, "--data", data, "--out", tmp_path / "run", "--resume")) == 0
    assert (tmp_path / "run" / "model.pt").read_bytes() == before


KILL = """
import io, os, signal, sys
sys.path.insert(0, {root!r})
import torch, {script} as m
checkpoint = m.load({path!r})[2]
whole = torch.save
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(tree, file):
    whole(tree, buffer := io.BytesIO())
    file.write(buffer.getvalue()[:buffer.tell() // 2])
    file.flush()
    die()
{patch}
m.save(m.Path({path!r}), **checkpoint | {{"step": 999}})
"""


def test_kill_while_saving(script, m, trained, tmp_path):
    """The old checkpoint stays whole, and the next save leaves nothing of the broken one. The
    plumbing is the same text in all scripts, so each is killed at another moment."""
    moments = ("torch.save = half", "os.fsync = die", "os.replace = die")
    patch = moments[SCRIPTS.index(script) % 3]
    path = tmp_path / "model.pt"
    shutil.copy(trained.run / "model.pt", path)
    code = KILL.format(root=str(ROOT), script=script, path=str(path), patch=patch)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == (trained.run / "model.pt").read_bytes()
    m.save(path, **m.load(path)[2] | {"step": 5})
    assert m.load(tmp_path)[2]["step"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


def test_a_signal_saves_and_exits_130(script, m, trained, data, tmp_path):
    number = signal.SIGINT if script == "adain_vc" else signal.SIGTERM
    argv = small(script, "--data", data, "--out", tmp_path / "run", "--steps", 100_000)
    argv += ["--save-every", "100000", "--log-every", "1"]
    command = [sys.executable, ROOT / f"{script}.py", *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=trained.cwd, env=ENV, text=True, **pipes) as process:
        try:
            assert any(line.startswith("step ") for line in process.stdout)
            process.send_signal(number)
            rest, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (130, "")
    step = m.load(tmp_path / "run")[2]["step"]
    assert 0 < step < 100_000
    said = re.search(r"^saved at step (\d+); continue with: python (\S+) (.*)$", rest, re.M)
    assert said and int(said[1]) == step
    assert m.parse(shlex.split(said[3]))[0].resume
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == step
    assert not (tmp_path / "run" / "run.json").exists()


def test_ctrl_c_while_sampling_stops_at_once(script, m, data, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "sample", lambda *_: signal.raise_signal(signal.SIGINT))
    assert main(m, *small(script, "--data", data, "--out", tmp_path / "run")) == 130
    assert m.load(tmp_path / "run")[2]["step"] == 4


# ---- bad inputs


class Evil:
    """A pickle that writes a file when it is read carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def bad(script, data, trained, tmp_path_factory):
    """A folder of everything that can be wrong."""
    root = tmp_path_factory.mktemp("bad")
    saved = checkpoint(trained.run / "model.pt")
    for folder in ("empty", "documents"):
        (root / folder).mkdir()
    for name in ("documents/a.doc", "documents/b.pdf", "file", "text.wav", "text.pt"):
        (root / name).write_text("no audio\n")
    (root / "empty.pt").touch()
    (root / "cut.pt").write_bytes((trained.run / "model.pt").read_bytes()[:-2000])
    torch.save(saved | {"config": Evil(str(root / "executed"))}, root / "evil.pt")
    torch.save(saved | {"script": "another"}, root / "another.pt")
    torch.save({"model": saved["model"]}, root / "bare.pt")
    torch.save({k: saved[k] for k in ("script", "config", "model")}, root / "nobody.pt")
    torch.save(list(saved["speakers"]), root / "list.pt")
    rng = np.random.default_rng(0)
    for path in ("single/ann/a.wav", "single/ben/b.wav", "flat/ann_0.wav", "flat/ann_1.wav",
                 "flat/ben_0.wav", "flat/ben_1.wav"):  # fmt: skip
        speak(root / path, rng, 100, 8000, 1, 1)
    for ending in ("wav", "flac"):
        speak(root / "twins" / f"a.{ending}", rng, 100, 8000, 1, 1)
    noise = rng.standard_normal(16000) * 0.1
    waves = {
        "zero": noise[:0],
        "nan": np.where(np.arange(16000) == 9, np.nan, noise),
        "good": noise,
        "silence": 0 * noise,
        "short": noise[:300],
    }
    for name, wave in waves.items():
        sf.write(root / f"{name}.wav", wave, 16000, "FLOAT")
    shutil.copytree(data, root / "many")
    for i in range(2):
        (root / "many" / "ann" / f"broken_{i}.wav").write_text("no audio\n")
    return root


CONVERT = "convert --checkpoint {run} --output {tmp}/o.wav --source "
ENCODE = "encode --checkpoint {run} --output {tmp}/o --source "
LOAD = "convert --output {tmp}/o.wav --source {bad}/good.wav --checkpoint "
TRAIN = "--data {data} --out {tmp}/run "
BAD = {
    "data missing": ("--data {bad}/nowhere", 1, "nowhere: 0 of 0 files are audio"),
    "data is a file": ("--data {bad}/file", 1, "bad0/file: 0 of 0 files"),
    "data empty": ("--data {bad}/empty", 1, "give a folder of recordings"),
    "data without audio": ("--data {bad}/documents", 1, "0 of 2 files are audio"),
    "one speaker": (TRAIN + "--speaker (n)", 1, "does not find 2 speakers"),
    "regex without a match": (
        TRAIN + "--speaker ([0-9]+)/",
        1,
        "--speaker '([^/]+)/' would find 3",
    ),
    "regex without a group": (TRAIN + "--speaker [a-z]+", 1, "--speaker"),
    "regex broken": (TRAIN + "--speaker (", 1, "--speaker"),
    "include broken": (TRAIN + "--include (", 1, "--include"),
    "include nothing": (TRAIN + "--include nothing", 1, "--include"),
    "flat folder": ("--data {bad}/flat", 1, "--speaker '([^/_-]+)[_-][^/]*$' would find 2"),
    "fewer utterances than a batch": (TRAIN + "--batch-size 99", 1, "--batch-size; lower it"),
    "many unreadable": ("--data {bad}/many", 1, "2 of 14 recordings are unreadable"),
    "one utterance a speaker": ("--data {bad}/single", 1, "none to test on"),
    "test missing": (TRAIN + "--test {bad}/nowhere", 1, "nowhere: 0 of 0 files are audio"),
    "steps 0": (TRAIN + "--steps 0", 1, "--steps 0: must be"),
    "steps abc": (TRAIN + "--steps abc", 2, "abc"),
    "lr nan": (TRAIN + "--lr nan", 1, "--lr nan: must be"),
    "lr negative": (TRAIN + "--lr -1", 1, "--lr -1.0: must be"),
    "hop above win": (TRAIN + "--hop 5000", 1, "need hop < win <= n_fft"),
    "hop equal to win": (TRAIN + "--hop 100 --win 100", 1, "need hop < win <= n_fft"),
    "win above n-fft": (TRAIN + "--win 9000", 1, "need hop < win <= n_fft"),
    "unknown flag": (TRAIN + "--bogus 1", 2, "--bogus"),
    "abbreviated flag": (TRAIN + "--step 1", 2, "--step"),
    "unknown choice": (TRAIN + "--device tpu", 2, "tpu"),
    "not a boolean": (TRAIN + "--bf16 maybe", 2, "maybe"),
    "unknown mode": ("transform --data {data}", 2, "transform"),
    "no cuda": (TRAIN + "--device cuda", 1, "no CUDA device"),
    "out below a file": ("--data {data} --out {bad}/file/run", 1, "bad0/file"),
    "out exists": ("--data {data} --out {run}", 1, "add --resume"),
    "resume without out": ("--data {data} --resume", 2, "--out"),
    "resume other model": ("--data {data} --out {run} --resume {other}", 1, "with these flags"),
    "resume other speakers": (
        "--data {data} --out {run} --resume --speaker (.)[^/]*/",
        1,
        "choose another --out",
    ),
    "no checkpoint flag": (
        "convert --source {bad}/good.wav --output {tmp}/o.wav",
        2,
        "--checkpoint",
    ),
    "checkpoint missing": (LOAD + "{bad}/nowhere.pt", 1, "nowhere.pt: not a checkpoint of"),
    "folder without one": (LOAD + "{bad}/documents", 1, "model.pt: not a checkpoint of"),
    "checkpoint empty": (LOAD + "{bad}/empty.pt", 1, "empty.pt: not a checkpoint of"),
    "checkpoint truncated": (LOAD + "{bad}/cut.pt", 1, "cut.pt: not a checkpoint of"),
    "checkpoint text": (LOAD + "{bad}/text.pt", 1, "text.pt: not a checkpoint of"),
    "checkpoint unsafe": (LOAD + "{bad}/evil.pt", 1, "evil.pt: not a checkpoint of"),
    "checkpoint bare": (LOAD + "{bad}/bare.pt", 1, "bare.pt: not a checkpoint of"),
    "checkpoint without speakers": (LOAD + "{bad}/nobody.pt", 1, "nobody.pt: not a checkpoint of"),
    "checkpoint a list": (LOAD + "{bad}/list.pt", 1, "list.pt: not a checkpoint of"),
    "checkpoint of another script": (LOAD + "{bad}/another.pt", 1, "another.py"),
    "checkpoint of another model": (LOAD + "{run} {other}", 1, "with these flags"),
    "source missing": (CONVERT + "{bad}/nowhere.wav", 1, "nowhere.wav: not a readable audio"),
    "source not audio": (CONVERT + "{bad}/text.wav", 1, "text.wav: not a readable audio"),
    "source a folder": (CONVERT + "{data}", 1, "not a readable audio"),
    "source of 0 samples": (CONVERT + "{bad}/zero.wav", 1, "zero.wav: silent, or shorter"),
    "source NaN": (CONVERT + "{bad}/nan.wav", 1, "nan.wav: has NaN"),
    "source silence": (CONVERT + "{bad}/silence.wav", 1, "silence.wav: silent"),
    "source short": (CONVERT + "{bad}/short.wav", 1, "short.wav: silent, or shorter"),
    "output exists": (CONVERT + "{bad}/good.wav --output {bad}/nan.wav", 2, "nan.wav: exists"),
    "output of unknown ending": (CONVERT + "{bad}/good.wav --output {tmp}/o.doc", 1, "must end in"),
    "output below a file": (ENCODE + "{bad}/good.wav --output {bad}/file/o", 1, "bad0/file"),
    "encode source missing": (ENCODE + "{bad}/nowhere", 1, "nowhere"),
    "encode folder without audio": (ENCODE + "{bad}/empty", 1, "empty"),
    "encode twins": (ENCODE + "{bad}/twins", 1, "a.*: two files would write one output"),
}


def fill(script, template, **paths):
    """A template of BAD -> argv."""
    shape = " ".join(SMALL[script].split()[:2])
    other = re.sub(r"\d+", lambda number: str(2 * int(number[0])), shape)
    text = template.replace("(", r"\(").replace(")", r"\)").format(other=other, **paths)
    argv = shlex.split(text)
    return argv if argv[0] in ("convert", "encode", "transform") else small(script, *argv)


@pytest.mark.parametrize("case", BAD)
def test_bad_input(script, quick, case, data, bad, trained, tmp_path, capsys):
    template, code, fragment = BAD[case]
    if script not in ("vqvae", "adain_vc", "dim"):
        pytest.skip("the plumbing is the same text; one script for each kind of target will do")
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = (trained.run / "model.pt").read_bytes()
    runs = set(Path("runs").glob("*"))
    argv = fill(script, template, data=data, bad=bad, run=trained.run, tmp=tmp_path)
    assert main(quick, *argv) == code
    one_line(capsys.readouterr().err, fragment.replace("bad0", bad.name))
    assert not (bad / "executed").exists() and not list(tmp_path.glob("*"))
    assert (trained.run / "model.pt").read_bytes() == before
    assert set(Path("runs").glob("*")) == runs


def test_bad_input_as_a_command(script, data, bad, trained, tmp_path):
    cases = ("data missing", "steps abc", "checkpoint unsafe")
    template, code, fragment = BAD[cases[SCRIPTS.index(script) % 3]]
    argv = fill(script, template, data=data, bad=bad, run=trained.run, tmp=tmp_path)
    done = run(script, *argv, cwd=tmp_path)
    assert done.returncode == code
    one_line(done.stderr, fragment)
    assert not (bad / "executed").exists()


def test_the_pickle_is_unsafe(bad):
    """The counterpart of "checkpoint unsafe": read carelessly, it does write its file."""
    torch.load(bad / "evil.pt", weights_only=False)
    assert (bad / "executed").exists()
    (bad / "executed").unlink()


def test_unknown_target(m, data, trained, tmp_path, capsys):
    fragment = {"speaker": "choose from ann, ben, don", "recording": "zoe: not a readable"}
    argv = ["convert", "--checkpoint", trained.run, "--source", next(data.glob("ann/ann_0.*"))]
    assert main(m, *argv, "--target", "zoe", "--output", tmp_path / "o.wav") == 1
    one_line(capsys.readouterr().err, fragment.get(m.TARGET, "--target zoe"))
    assert not (tmp_path / "o.wav").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_disk_full(script, quick, data, trained, tmp_path, capsys, earlier):
    """No file may grow beyond 8 KiB, which is less than a checkpoint."""
    out = tmp_path / "run"
    if earlier:
        shutil.copytree(trained.run, out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = small(script, "--data", data, "--out", out, "--steps", 6, *["--resume"] * earlier)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        code = main(quick, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    one_line(capsys.readouterr().err, "File too large; free space there")
    left = {p.name for p in out.iterdir()}
    assert left - {"run.json", "samples"} == {"log.jsonl", *["model.pt"] * earlier}
    assert not earlier or quick.load(out)[2]["step"] == 4


@pytest.mark.parametrize("error", [MemoryError("alloc"), RuntimeError("CUDA: cannot allocate")])
def test_out_of_memory_names_the_flag(script, quick, data, tmp_path, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(quick, "train_step", fail)
    assert main(quick, *small(script, "--data", data, "--out", tmp_path / "run")) == 1
    one_line(capsys.readouterr().err, "lower --batch-size")


def test_other_errors_keep_their_traceback(script, quick, data, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(quick, "train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(quick, *small(script, "--data", data, "--out", tmp_path / "run"))


@pytest.mark.parametrize("every", [1, 1000])
def test_diverging_loss(script, quick, data, tmp_path, capsys, every):
    argv = ["--data", data, "--out", tmp_path / "run", "--lr", 1e30, "--steps", 45]
    assert main(quick, *small(script, *argv, "--save-every", every)) == 1
    one_line(capsys.readouterr().err, "lower --lr")
    path = tmp_path / "run" / "model.pt"
    assert every == 1 or not path.exists()
    if path.exists():
        state = tensors(checkpoint(path)["model"])
        assert [k for k, v in state.items() if not v.isfinite().all()] == []


def test_a_bad_step_is_not_saved(script, quick, data, trained, tmp_path, capsys, monkeypatch):
    """Neither where the loss is not finite nor where only the weights are not."""
    step = quick.train_step

    def bad_loss(*arguments):
        return step(*arguments) | {"loss": torch.tensor(float("nan"))}

    def bad_weights(model, *arguments):
        metrics = step(model, *arguments)
        next(model.parameters()).data.fill_(float("inf"))
        return metrics

    for i, spoiled in enumerate((bad_loss, bad_weights)):
        out = tmp_path / f"run{i}"
        shutil.copytree(trained.run, out)
        monkeypatch.setattr(quick, "train_step", spoiled)
        argv = small(script, "--data", data, "--out", out, "--steps", 5, "--resume")
        assert main(quick, *argv) == 1
        one_line(capsys.readouterr().err, "step 5: ")
        assert quick.load(out)[2]["step"] == 4


# ---- small corpora that broke programs of this kind


def odd_folder(name, root):
    """36 utterances of three speakers, with something odd about them."""
    for s in range(3):
        for i in range(12):
            speak(
                root / f"s{s}" / f"s{s}_{i:02d}.wav",
                np.random.default_rng(12 * s + i),
                100,
                8000,
                0.5,
                1,
            )
    first = root / "s0" / "s0_00.wav"
    if name == "clip under a hop":
        speak(first, np.random.default_rng(0), 100, 16000, 0.01, 1)
        speak(root / "s1" / "s1_01.wav", np.random.default_rng(0), 100, 16000, 0.002, 1)
    elif name == "not UTF-8":
        os.rename(os.fsencode(first), os.fsencode(root / "s0") + b"/J\xf6rg.wav")
    elif name == "240 bytes":
        first.rename(root / "s0" / ("A talk with a very long title " * 8)[:236].__add__(".wav"))
    elif name == "speaker not UTF-8":
        os.rename(os.fsencode(root / "s0"), os.fsencode(root) + b"/J\xf6rg")
    return root


def test_odd_folders_are_trained_on(script, loaded, tmp_path, monkeypatch, capsys):
    """Whole runs, with samples. Each script gets another of the four oddities."""
    oddities = ("clip under a hop", "not UTF-8", "240 bytes", "speaker not UTF-8")
    name = oddities[SCRIPTS.index(script) % 4]
    folder = odd_folder(name, tmp_path / "odd")
    argv = small(script, "--data", folder, "--steps", 2)
    done = run(script, *argv, cwd=tmp_path, text=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"36 utterances" in done.stdout
    argv = ("--checkpoint", f"runs/{script}-1", "--source", folder, "--output", "o")
    monkeypatch.chdir(tmp_path)
    lost = 2 if name == "clip under a hop" else 0
    assert main(loaded, "encode", *argv) == bool(lost)
    assert (f"{lost} of 36 files" in capsys.readouterr().err) == bool(lost)
    encoded = {p.stem.split(".")[0] for p in (tmp_path / "o").rglob("*.npy")}
    assert len(encoded) == 36 - lost


# ---- several processes

PLAIN = """
def plain(model, cfg):
    def parameters(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]
    return {name: torch.optim.SGD(parameters(optimizer), cfg.lr)
            for name, optimizer in adaptive(model, cfg).items()}
"""  # plain gradient descent, because Adam's first step is all but the sign
RANKS = """
import sys
sys.path.insert(0, {root!r})
import torch, {script} as m
adaptive, train_step = m.make_optimizers, m.train_step
{plain}
def keep(model, optimizers, corpus, step, cfg):
    torch.save(model.state_dict(), f"before{{m.RANK}}-{{step}}.pt")
    metrics = train_step(model, optimizers, corpus, step, cfg)
    torch.save(model.state_dict(), f"after{{m.RANK}}-{{step}}.pt")
    return metrics
m.make_optimizers, m.train_step = plain, keep
sys.exit(m.main(sys.argv[1:]))
"""


def averaged(m, before, corpus, cfg, optimizers_of):
    """One step of both ranks from the state `before`, every gradient averaged by hand -> states,
    the ranks' gradients. The ranks run one after the other, so the averages are filled in by
    repetition: each round is right up to one optimizer step further, until nothing changes."""
    average = []
    for _ in range(12):
        own = ([], [])
        states = []
        for rank in (0, 1):
            model = m.Model(cfg, len(SPEAKERS))
            model.load_state_dict(before)

            def hook(p, own=own[rank]):
                own.append(p.grad.clone())
                if len(own) <= len(average):
                    p.grad.copy_(average[len(own) - 1])

            optimizers = optimizers_of(model, cfg)
            for p in model.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(hook)
            m.RANK = rank
            torch.manual_seed(cfg.seed * 1_000_003 * 2 + rank)
            m.train_step(model.train(), optimizers, corpus, 0, cfg)
            states.append(model.state_dict())
        last = average
        average = [(a + b) / 2 for a, b in zip(*own, strict=True)]
        if len(last) == len(average) and all(map(torch.equal, last, average)):
            return states, own
    raise AssertionError("the replay does not settle")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_processes_average_their_gradients(script, m, data, tmp_path, monkeypatch):
    ranks = RANKS.format(root=str(ROOT), script=script, plain=PLAIN)
    (tmp_path / "ranks.py").write_text(ranks)
    argv = small(script, "--data", data, "--out", "run", "--steps", 2, "--lr", 0.1)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    options = {"env": ENV, "capture_output": True, "text": True, "timeout": 120}
    # On a loaded machine a thread of gloo now and then aborts a rank that has finished and is about
    # to exit. Only that is tried again.
    for _ in range(3):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        port = ["--master_port", str(free_port())]
        done = subprocess.run([*command, *port, "ranks.py", *argv], cwd=tmp_path, **options)
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1  # rank 0 alone speaks
    assert (tmp_path / "run" / "run.json").exists()
    state = {
        (when, rank, step): checkpoint(tmp_path / f"{when}{rank}-{step}.pt")
        for when in ("before", "after")
        for rank in (0, 1)
        for step in (0, 1)
    }
    _, cfg, saved = m.load(tmp_path / "run")

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    assert saved["step"] == 2 and same(saved["model"], state["after", 0, 1])
    assert same(state["before", 0, 0], state["before", 1, 0])  # one start

    scope = {"torch": torch, "adaptive": m.make_optimizers}
    exec(PLAIN, scope)
    monkeypatch.setattr(m, "RANK", 0)
    corpus = m.load_corpus(cfg)
    states, own = averaged(m, state["before", 0, 0], corpus, cfg, scope["plain"])
    apart = max((a - b).abs().max() for a, b in zip(*own))
    assert apart > 1e-4  # the ranks see different batches
    parameters = m.Model(cfg, len(SPEAKERS)).named_parameters()
    learned = [k for k, p in parameters if p.requires_grad]
    for k in learned:
        assert torch.equal(state["after", 0, 1][k], state["after", 1, 1][k]), k
        expected = states[0][k]
        torch.testing.assert_close(state["after", 0, 0][k], expected, atol=1e-5, rtol=0, msg=k)
    moved = [(state["after", 0, 0][k] - state["before", 0, 0][k]).abs().max() for k in learned]
    assert max(moved) > 1e-3  # else the tolerance says nothing
    for k in ("bottleneck.e", "bottleneck.N", "bottleneck.M") if script == "vqvae" else ():
        assert torch.equal(state["after", 0, 1][k], state["after", 1, 1][k]), k
        assert not torch.equal(state["before", 0, 0][k], state["after", 0, 1][k]), k


# ---- import


def test_import_has_no_side_effects(script, tmp_path):
    code = (
        "import signal, sys, torch; sys.argv = ['x', '--bogus', 'convert']; "
        f"sys.path.insert(0, {str(ROOT)!r}); torch.manual_seed(7); state = torch.get_rng_state(); "
        f"from {script} import Config, Model, load; print(sys.argv, "
        "torch.equal(state, torch.get_rng_state()), "
        "signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    command = [sys.executable, "-B", "-c", code]
    options = {"env": ENV, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run(command, cwd=tmp_path, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['x', '--bogus', 'convert'] True True\n"
    assert list(tmp_path.iterdir()) == []
