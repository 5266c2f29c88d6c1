# SPDX-License-Identifier: MIT
"""The command line: runs and what they leave, exact resume, interruption, bad inputs, several processes."""

import base64
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
import zlib
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile as sf
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    name
    for name in ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
    if (ROOT / f"{name}.py").exists()
]
COMMON = (
    "--toy --device cpu --batch-size 2 --crop 1920 --probe 8 --steps 4 --save-every 2 --log-every 2"
)
SMALL = {  # flags that make the model tiny; the first one changes its shape
    "vqvae": "--d-code 8 --channels 16 --codes 8 --d-condition 8 --residual 8 --skip 8 --depth 4",
    "adain_vc": "--channels 8 --d-content 4 --d-speaker 8 --bank 2 --bank-channels 4 --blocks 2 --dense 1",
    "adversarial_vc": "--channels 8 --bank 2 --bank-channels 4 --critic-channels 2 --classifier-steps 2 --critic-steps 2 "
    "--ae-share 1 --classifier-share 1 --joint-share 1 --gan-share 1 --hop 40",
    "fhvae": "--hidden 8 --d-z1 3 --d-z2 4 --sequences 5",
    "cpc": "--channels 8 --d-context 8 --prediction-steps 3 --units 4 --d-embedding 4 --hidden 8 --blocks 1 --cpc-share 0.5 "
    "--score-scale 4",
    "dim": "--channels 8 --d-global 6 --hidden 16 --units 8 --concat-units 8 --decoder-channels 8 --infomax-share 0.5",
}
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SPEAKERS = ("ann", "ben", "don")


def small(script, *more):
    return [*COMMON.split(), *SMALL[script].split(), *map(str, more)]


def run(script, *argv, cwd, **options):
    command = [sys.executable, ROOT / f"{script}.py", *map(str, argv)]
    return subprocess.run(
        command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=120, **options
    )


def speak(path, rng, pitch, rate, seconds, channels):
    t = np.arange(int(rate * seconds)) / rate
    wave = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 12))
    wave = wave + 0.1 * rng.standard_normal(len(t))
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.stack([0.2 * wave, 0.1 * wave], 1)[:, :channels], rate)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train: three speakers, four utterances each; test: two unseen speakers."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for part, names, count in (("train", SPEAKERS, 4), ("test", ("eve", "fay"), 2)):
        for s, name in enumerate(names):
            for i, rate in enumerate((8000, 16000, 22050, 44100)[:count]):
                path = root / part / name / f"{name}_{i}.{('wav', 'flac')[(i + s) % 2]}"
                speak(path, rng, 100 * 1.4**s, rate, 0.5 + 0.15 * i, 1 + i // 2 % 2)
                with open(root / part / "phones.txt", "a") as file:
                    print(path.stem, *rng.choice(list("aiu"), 50 + 15 * i), file=file)
    return root / "train"


@pytest.fixture(scope="module", params=SCRIPTS)
def script(request):
    return request.param


@pytest.fixture(scope="module")
def trained(script, data, tmp_path_factory):
    """One tiny run. `cwd` is where it ran, and keeps the cache of the decoded audio for the other tests."""
    cwd = tmp_path_factory.mktemp(script)
    sha256 = hashlib.sha256(
        (ROOT / f"{script}.py").read_text().split('"""', 2)[2].encode()
    ).hexdigest()
    done = run(script, *small(script, "--data", data, "--out", "run"), cwd=cwd)
    return SimpleNamespace(cwd=cwd, run=cwd / "run", done=done, sha256=sha256)


@pytest.fixture(scope="module")
def loaded(script):
    spec = importlib.util.spec_from_file_location(script, ROOT / f"{script}.py")
    m = importlib.util.module_from_spec(spec)
    threads, before, sys.modules[script] = torch.get_num_threads(), sys.modules.get(script), m
    spec.loader.exec_module(m)
    torch.set_num_threads(1)
    yield m
    torch.set_num_threads(threads)
    sys.modules.pop(script) if before is None else sys.modules.update({script: before})


@pytest.fixture
def m(loaded, trained, monkeypatch):
    """The script as a module, in the folder of the tiny run; main()'s signal handlers are put back."""
    assert trained.done.returncode == 0, trained.done.stderr
    monkeypatch.chdir(trained.cwd)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield loaded
    for number, handler in handlers.items():
        signal.signal(number, handler)


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
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, sub in items for k, v in tensors(sub, f"{prefix}/{name}").items()}
    return {prefix: torch.as_tensor(tree)} if isinstance(tree, (torch.Tensor, float, int)) else {}


def checkpoint(path):
    return torch.load(path, weights_only=True)


# ---- what a run leaves, and the modes


def test_training_leaves_its_files(script, trained):
    assert trained.done.returncode == 0, trained.done.stderr
    assert trained.done.stderr == ""
    assert {p.name for p in trained.run.iterdir()} == {
        "index.html",
        "log.jsonl",
        "model.pt",
        "result.json",
        "samples",
    }
    steps = [json.loads(line)["step"] for line in open(trained.run / "log.jsonl")]
    assert steps == [2, 4] and re.search(r"^step 4/4 .*loss", trained.done.stdout, re.M)
    saved = checkpoint(trained.run / "model.pt")
    assert (saved["script"], saved["step"], saved["speakers"]) == (script, 4, list(SPEAKERS))
    for wave, rate in map(sf.read, (trained.run / "samples").glob("*.wav")):
        assert rate == saved["config"]["sample_rate"] and len(wave) and np.isfinite(wave).all()


def test_page_opens_from_disk(trained):
    """Each sample has a player that finds it and a whole PNG; each log key a curve; each representation a row."""
    html = (trained.run / "index.html").read_text().replace("<wbr>", "")
    assert not re.search(
        r"<script|http|//|src=\"(?!data:|samples/)", re.sub(r"base64,[^\"]*", "", html)
    )
    players = [unquote(name) for name in re.findall(r'<audio controls src="(.*?)">', html)]
    assert (
        sorted(players)
        == sorted(f"samples/{p.name}" for p in (trained.run / "samples").glob("*.wav"))
        and players
    )
    pictures = [
        base64.b64decode(code) for code in re.findall(r'src="data:image/png;base64,(.*?)"', html)
    ]
    assert len(pictures) == len(players)
    config = json.loads((trained.run / "result.json").read_text())["config"]
    for png, name in zip(pictures, players):
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        chunks, at = {}, 8
        while at < len(png):
            size, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
            chunks[kind] = png[at + 8 : at + 8 + size]
            assert zlib.crc32(kind + chunks[kind]) == int.from_bytes(
                png[at + 8 + size : at + 12 + size], "big"
            )
            at += 12 + size
        assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
        width, height = (int.from_bytes(chunks[b"IHDR"][i : i + 4], "big") for i in (0, 4))
        assert (width, height) == (
            1 + sf.info(trained.run / name).frames // config["hop"],
            config["n_mels"],
        )
        rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width)
        assert not rows[:, 0].any() and rows[:, 1:].min() < 32  # no filter; something is loud
    log = [json.loads(line) for line in open(trained.run / "log.jsonl")]
    curves = re.findall(r'd="M(.*?)h0"/></svg><figcaption>(\w+) ', html)
    assert {name for _, name in curves} == {k for line in log for k in line} - {
        "step",
        "seconds_left",
    }
    assert all(0 <= float(number) <= 240 for dots, _ in curves for number in dots.split())
    assert all(
        f"<td>{name} " in html
        for name in json.loads((trained.run / "result.json").read_text())["representations"]
    )


def test_picture_shows_low_bands_at_the_bottom_and_loud_ones_dark(loaded):
    m, cfg = loaded, loaded.Config(**loaded.TOY | {"device": "cpu"})
    wave = 0.5 * torch.sin(2 * torch.pi * 300 * torch.arange(cfg.sample_rate) / cfg.sample_rate)
    png = base64.b64decode(re.search(r"base64,(.*?)\"", m.picture(wave, cfg))[1])
    rows = np.frombuffer(zlib.decompress(png[41:-16]), np.uint8).reshape(cfg.n_mels, -1)[:, 1:]
    middle = rows[:, rows.shape[1] // 2]
    loudest = (m.log_mel(wave[None], cfg)[0].mean(0)).argmax().item()
    assert middle.argmin() == cfg.n_mels - 1 - loudest > cfg.n_mels / 2 and middle.max() == 255


def test_result_json(script, trained):
    result = json.loads((trained.run / "result.json").read_text())
    keys = (
        "script sha256 command config data steps seconds hardware torch audio_seconds_per_second chance "
        "representations conversion metrics"
    )
    assert set(result) >= set(keys.split())
    assert (result["script"], result["sha256"], result["steps"]) == (script, trained.sha256, 4)
    assert result["config"]["batch_size"] == 2 and f"{script}.py" in result["command"]
    assert (result["data"]["utterances"], result["data"]["speakers"]) == (12, 3)
    rows, conversion = result["representations"], result["conversion"]
    trained_rows = {name for name in rows if name != "log-mel" and not name.endswith(" untrained")}
    assert trained_rows and set(rows) == {"log-mel"} | trained_rows | {
        f"{n} untrained" for n in trained_rows
    }
    parts = (result["chance"], *rows.values())
    fractions = [part[key] for part in parts for key in ("phone", "speaker", "eer")]
    if conversion:
        assert list((trained.run / "samples").glob("*_conversion.wav"))
        parts = (conversion, conversion["copy"])
        fractions += [part[key] for part in parts for key in ("target", "source", "phones")]
    assert all(0 <= v <= 1 for v in fractions if v is not None)
    assert (
        all(rows[name]["speaker"] is not None for name in rows)
        and rows["log-mel"]["phone"] is not None
    )


def test_convert(script, m, data, trained, tmp_path):
    """To a known speaker as a command of its own, the reconstruction in this process."""
    cfg, source = checkpoint(trained.run / "model.pt")["config"], next(data.glob("ann/ann_3.*"))
    target = {"speaker": "ben", "recording": next(data.glob("ben/ben_1.*"))}.get(m.TARGET)
    argv = ["convert", "--checkpoint", trained.run, "--source", source, "--output"]
    if target:
        done = run(script, *argv, tmp_path / "new" / "a.wav", "--target", target, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert main(m, *argv, tmp_path / "b.flac") == 0
    for path in [tmp_path / "new" / "a.wav"] * bool(target) + [tmp_path / "b.flac"]:
        wave, rate = sf.read(path)
        assert (
            rate == cfg["sample_rate"]
            and wave.ndim == 1
            and np.isfinite(wave).all()
            and wave.std() > 0
        )
        assert abs(len(wave) - sf.info(source).duration * rate) <= cfg["hop"]
    if not m.TARGET:
        assert main(m, *argv, tmp_path / "c.wav", "--target", "ben") == 1


@pytest.mark.parametrize("target", ["ben/ben_0.flac", "ben"])
def test_convert_to_one_recording_or_several(m, data, trained, tmp_path, monkeypatch, target):
    """Where targets are recordings, a folder stands for all that is in it, one after another."""
    seen, source, cfg = [], next(data.glob("ann/ann_3.*")), m.load(trained.run, device="cpu")[1]
    monkeypatch.setattr(m, "TARGET", "recording")
    monkeypatch.setattr(
        m, "convert", lambda model, waves, targets, cfg: seen.extend(targets) or waves
    )
    assert (
        main(
            m,
            "convert",
            "--checkpoint",
            trained.run,
            "--source",
            source,
            "--target",
            data / target,
            "--output",
            tmp_path / "a.wav",
        )
        == 0
    )
    paths = sorted((data / target).iterdir()) if target == "ben" else [data / target]
    assert torch.equal(
        seen[0].cpu(), torch.cat([m.read_audio(path, cfg.sample_rate) for path in paths])
    )


def test_output_may_be_replaced_on_request(m, data, trained, tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_text("old")
    monkeypatch.setattr(m, "convert", lambda model, sources, targets, cfg: sources)
    source, output = next(data.glob("ann/ann_0.*")), tmp_path / "a.wav"
    assert (
        main(
            m,
            "convert",
            "--checkpoint",
            trained.run / "model.pt",
            "--source",
            source,
            "--output",
            output,
            "--overwrite",
        )
        == 0
    )
    assert sf.info(tmp_path / "a.wav").duration == 0.5


def test_encode_a_file_and_a_folder(m, data, trained, tmp_path):
    model, cfg, _ = m.load(trained.run)
    wave = m.read_audio(next(data.glob("ann/ann_0.*")), cfg.sample_rate)
    with torch.no_grad():
        expected = {name: x.numpy() for name, x in m.represent(model, wave, cfg).items()}
    argv = ["encode", "--checkpoint", trained.run, "--source"]
    assert main(m, *argv, next(data.glob("ann/ann_0.*")), "--output", tmp_path / "one") == 0
    assert main(m, *argv, data / "ann", "--output", tmp_path / "many") == 0
    assert main(m, *argv, data, "--output", tmp_path / "tree") == 0  # phones.txt lies there too
    names = lambda folder: sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.npy"))
    assert names(tmp_path / "one") == sorted(f"ann_0.{name}.npy" for name in expected)
    assert names(tmp_path / "many") == sorted(
        f"ann_{i}.{name}.npy" for i in range(4) for name in expected
    )
    assert (
        len(names(tmp_path / "tree")) == 12 * len(expected) and (tmp_path / "tree" / "ben").is_dir()
    )
    for name, x in expected.items():
        for folder in ("one", "many", "tree/ann"):
            np.testing.assert_allclose(
                np.load(tmp_path / folder / f"ann_0.{name}.npy"), x, atol=1e-5
            )


def test_evaluate_prints_a_table(m, data, trained, tmp_path, capsys):
    assert (
        main(
            m,
            "evaluate",
            "--checkpoint",
            trained.run,
            "--data",
            data,
            "--test",
            data.parent / "test",
            "--output",
            tmp_path / "eval",
        )
        == 0
    )
    table = capsys.readouterr().out
    assert re.search(r"^ +phone +speaker +EER$", table, re.M)
    result = json.loads((tmp_path / "eval" / "result.json").read_text())
    for name in ("chance", *result["representations"]):
        assert re.search(rf"^{re.escape(name)} +(-|[\d.]+%) +[\d.]+% +(-|[\d.]+%)$", table, re.M), (
            name
        )
    assert result["data"]["utterances"] == 12 and result["steps"] == 4
    assert re.search(r"/test: 4 utterances", table)


@pytest.mark.parametrize("labelled", [["ann_1"], ["eve_0"], []])
def test_labels_of_a_part_of_the_data(m, data, trained, tmp_path, labelled):
    """Where labels are too few to fit or to score a probe, the phones are None and the rest is measured."""
    (tmp_path / "phones.txt").write_text("".join(f"{name} a i u\n" for name in labelled))
    model, cfg, checkpoint = m.load(
        trained.run, data=str(data), phones=str(tmp_path / "phones.txt"), device="cpu"
    )
    corpus = m.load_corpus(cfg, checkpoint["speakers"])
    table, heard = m.evaluate(model, corpus, cfg), m.listen(model, corpus, cfg, tmp_path)
    assert all(
        row["phone"] is None and row["speaker"] is not None
        for row in table["representations"].values()
    )
    assert heard is None or heard["phones"] is None or labelled


def test_no_data_is_the_toy_corpus(m, data, monkeypatch):
    for argv in ([], ["--data"], ["--data", "--steps", "3"]):
        mode, given, _ = m.parse(argv)
        assert mode == "train" and not given.get("data")
    assert m.parse(["--data", "x"])[1] == {"data": "x"}
    monkeypatch.setattr(m, "toy_corpus", lambda: (str(data), str(data.parent / "test")))
    corpus = m.load_corpus(m.Config(data="", sample_rate=8000, crop=1920, device="cpu"))
    assert len(corpus.paths) == 12 and len(corpus.test.held) == 4


def test_hyphens_and_underscores(m):
    assert (
        m.parse(["--batch-size", "3"])[1] == m.parse(["--batch_size", "3"])[1] == {"batch_size": 3}
    )


def test_help_names_every_flag(m, capsys):
    assert main(m, "--help") == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in m.Config.__dataclass_fields__)


def test_out_defaults_to_the_next_free_folder(script, m, data, monkeypatch):
    monkeypatch.setattr(m, "report", lambda *_: None)
    for i in (1, 2):
        assert main(m, *small(script, "--data", data, "--steps", 1)) == 0
        assert (Path("runs") / f"{script}-{i}" / "model.pt").exists()


# ---- resume, interruption


def test_resume_is_exact(script, m, data, tmp_path, monkeypatch):
    (a, b), save = (tmp_path / "a", tmp_path / "b"), m.save
    b.mkdir()

    def keep(path, model, optimizers, step, *rest):
        save(path, model, optimizers, step, *rest)
        if step == 2:
            shutil.copy(path, b / "model.pt")

    monkeypatch.setattr(m, "report", lambda *_: None)
    monkeypatch.setattr(m, "save", keep)
    assert main(m, *small(script, "--data", data, "--out", a)) == 0
    half = checkpoint(b / "model.pt")
    assert main(m, *small(script, "--data", data, "--out", b, "--resume")) == 0
    a, b = checkpoint(a / "model.pt"), checkpoint(b / "model.pt")
    assert (half["step"], a["step"], b["step"]) == (2, 4, 4)
    for part in ("model", "optimizers"):
        half[part], a[part], b[part] = tensors(half[part]), tensors(a[part]), tensors(b[part])
        assert a[part].keys() == b[part].keys() and len(a[part])
        assert [k for k in a[part] if not torch.equal(a[part][k], b[part][k])] == []
        assert any(
            k not in half[part] or not torch.equal(a[part][k], half[part][k]) for k in a[part]
        )


def test_resume_without_a_checkpoint_starts(script, m, data, tmp_path, monkeypatch):
    monkeypatch.setattr(m, "report", lambda *_: None)
    assert (
        main(m, *small(script, "--data", data, "--out", tmp_path / "new", "--resume", "--steps", 1))
        == 0
    )
    assert checkpoint(tmp_path / "new" / "model.pt")["step"] == 1


KILL = """
import io, os, signal, sys
sys.path.insert(0, {root!r})
import torch, {script} as m
model, cfg, old = m.load({path!r})
whole = torch.save
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(tree, file):
    whole(tree, buffer := io.BytesIO())
    file.write(buffer.getvalue()[:buffer.tell() // 2])
    file.flush()
    die()
{patch}
m.save(m.Path({path!r}), model, m.make_optimizers(model, cfg), 999, cfg, old["speakers"])
"""


@pytest.mark.parametrize("patch", ["torch.save = half", "os.fsync = die", "os.replace = die"])
def test_kill_while_saving(script, m, trained, tmp_path, patch):
    path = tmp_path / "model.pt"
    shutil.copy(trained.run / "model.pt", path)
    code = KILL.format(root=str(ROOT), script=script, path=str(path), patch=patch)
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert path.read_bytes() == (trained.run / "model.pt").read_bytes()
    model, cfg, old = m.load(path)
    assert old["step"] == 4
    m.save(
        path, model, m.make_optimizers(model, cfg), 5, cfg, old["speakers"]
    )  # leftovers do not hinder
    assert m.load(tmp_path)[2]["step"] == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_130(script, m, trained, data, tmp_path, number):
    argv = small(
        script,
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--steps",
        100_000,
        "--save-every",
        100_000,
        "--log-every",
        1,
    )
    command = [sys.executable, ROOT / f"{script}.py", *argv]
    with subprocess.Popen(
        command, cwd=trained.cwd, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert any(line.startswith("step ") for line in process.stdout)
            process.send_signal(number)
            rest, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (130, "")
    saved, log = (
        m.load(tmp_path / "run")[2],
        (tmp_path / "run" / "log.jsonl").read_text().splitlines(),
    )
    assert 0 < saved["step"] < 100_000 and json.loads(log[-1])["step"] == saved["step"]
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_signal_between_logging_and_saving(script, m, data, tmp_path, monkeypatch):
    def talk(*words, **options):
        print(*words, **options)
        str(words[0]).startswith("step 1/") and signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(m, "print", talk, raising=False)
    argv = [
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--steps",
        9,
        "--save-every",
        9,
        "--log-every",
        1,
    ]
    assert main(m, *small(script, *argv)) == 130
    assert m.load(tmp_path / "run")[2]["step"] in (1, 2)


# ---- bad inputs


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(scope="module")
def bad(script, data, trained, tmp_path_factory):
    """A folder of everything that can be wrong."""
    root, saved = tmp_path_factory.mktemp("bad"), checkpoint(trained.run / "model.pt")
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
    for path in ("single/ann/a.wav", "single/ben/b.wav", "twins/ann/1.wav", "twins/ben/1.wav"):
        speak(root / path, np.random.default_rng(0), 100, 8000, 1, 1)
    (root / "twins/phones.txt").write_text("1 a i u\n")
    torch.save(list(saved["speakers"]), root / "list.pt")
    noise = np.random.default_rng(0).standard_normal(16000) * 0.1
    for name, wave in {
        "zero": noise[:0],
        "nan": np.where(np.arange(16000) == 9, np.nan, noise),
        "good": noise,
        "silence": 0 * noise,
        "short": noise[:300],
    }.items():
        sf.write(root / f"{name}.wav", wave, 16000, "FLOAT")
    for folder, count in (("some", 1), ("many", 2)):
        shutil.copytree(data, root / folder)
        for i in range(count):
            (root / folder / "ann" / f"broken_{i}.wav").write_text("no audio\n")
    return root


CONVERT = "convert --checkpoint {run} --output {tmp}/o.wav --source "
ENCODE = "encode --checkpoint {run} --output {tmp}/o --source "
LOAD = "convert --output {tmp}/o.wav --source {bad}/good.wav --checkpoint "
TRAIN = "--data {data} --out {tmp}/run "
BAD = {
    "data missing": ("--data {bad}/nowhere", 1, "nowhere: no such folder"),
    "data is a file": ("--data {bad}/file", 1, "bad0/file: no"),
    "data empty": ("--data {bad}/empty", 1, "but nothing"),
    "data without audio": ("--data {bad}/documents", 1, ".doc, .pdf"),
    "one speaker": (TRAIN + "--speaker (n)", 1, "one speaker, 'n'"),
    "regex without a match": (TRAIN + "--speaker ([0-9]+)/", 1, "finds no speaker"),
    "regex without a group": (TRAIN + "--speaker [a-z]+", 1, "--speaker"),
    "regex broken": (TRAIN + "--speaker (", 1, "--speaker"),
    "fewer utterances than a batch": (TRAIN + "--batch-size 99", 1, "lower --batch-size"),
    "many unreadable": ("--data {bad}/many", 1, "2 of 14 files unreadable, the first is"),
    "one utterance a speaker": ("--data {bad}/single", 1, "none to test on"),
    "two files of a label": ("--data {bad}/twins", 1, "twins/phones.txt finds them; rename one"),
    "test missing": (TRAIN + "--test {bad}/nowhere", 1, "nowhere: no such folder"),
    "phones missing": (TRAIN + "--phones {bad}/nowhere.txt", 1, "nowhere.txt"),
    "steps 0": (TRAIN + "--steps 0", 2, "--steps 0"),
    "steps abc": (TRAIN + "--steps abc", 2, "abc"),
    "lr nan": (TRAIN + "--lr nan", 2, "--lr nan"),
    "lr negative": (TRAIN + "--lr -1", 2, "--lr"),
    "unknown flag": (TRAIN + "--bogus 1", 2, "--bogus"),
    "abbreviated flag": (TRAIN + "--step 1", 2, "--step"),
    "unknown choice": (TRAIN + "--device tpu", 2, "tpu"),
    "not a boolean": (TRAIN + "--bf16 maybe", 2, "maybe"),
    "unknown mode": ("transform --data {data}", 2, "transform"),
    "no cuda": (TRAIN + "--device cuda", 2, "no CUDA device"),
    "out below a file": ("--data {data} --out {bad}/file/run", 1, "bad0/file"),
    "out exists": ("--data {data} --out {run}", 1, "add --resume"),
    "resume without out": ("--data {data} --resume", 2, "--out"),
    "resume other configuration": (
        "--data {data} --out {run} --resume {other}",
        1,
        "configuration",
    ),
    "resume other speakers": (
        "--data {data} --out {run} --resume --speaker (.)[^/]*/",
        1,
        "another --out",
    ),
    "no checkpoint flag": (
        "convert --source {bad}/good.wav --output {tmp}/o.wav",
        2,
        "--checkpoint",
    ),
    "checkpoint missing": (LOAD + "{bad}/nowhere.pt", 1, "nowhere.pt: no such checkpoint"),
    "folder without a checkpoint": (LOAD + "{bad}/documents", 1, "model.pt: no such checkpoint"),
    "checkpoint empty": (LOAD + "{bad}/empty.pt", 1, "empty.pt: not a checkpoint"),
    "checkpoint truncated": (LOAD + "{bad}/cut.pt", 1, "cut.pt: not a checkpoint"),
    "checkpoint text": (LOAD + "{bad}/text.pt", 1, "text.pt: not a checkpoint"),
    "checkpoint unsafe": (LOAD + "{bad}/evil.pt", 1, "evil.pt: not a checkpoint"),
    "checkpoint bare": (LOAD + "{bad}/bare.pt", 1, "bare.pt: not a checkpoint"),
    "checkpoint without speakers": (
        LOAD + "{bad}/nobody.pt",
        1,
        "nobody.pt: another configuration",
    ),
    "checkpoint a list": (LOAD + "{bad}/list.pt", 1, "list.pt: not a checkpoint"),
    "checkpoint of another script": (LOAD + "{bad}/another.pt", 1, "another.py"),
    "checkpoint of another configuration": (LOAD + "{run} {other}", 1, "configuration"),
    "source missing": (CONVERT + "{bad}/nowhere.wav", 1, "nowhere.wav: no such"),
    "source not audio": (CONVERT + "{bad}/text.wav", 1, "text.wav: not readable as audio"),
    "source a folder": (CONVERT + "{data}", 1, "no such"),
    "source of 0 samples": (CONVERT + "{bad}/zero.wav", 1, "zero.wav: 0 samples"),
    "source NaN": (CONVERT + "{bad}/nan.wav", 1, "nan.wav: NaN"),
    "source silence": (CONVERT + "{bad}/silence.wav", 1, "silence.wav: silence"),
    "source short": (CONVERT + "{bad}/short.wav", 1, "short.wav: shorter than a window"),
    "output exists": (CONVERT + "{bad}/good.wav --output {bad}/nan.wav", 1, "--overwrite"),
    "output of unknown ending": (
        CONVERT + "{bad}/good.wav --output {tmp}/o.doc",
        1,
        ".wav, .flac or .ogg",
    ),
    "output below a file": (ENCODE + "{bad}/good.wav --output {bad}/file/o", 1, "bad0/file"),
    "encode source missing": (ENCODE + "{bad}/nowhere", 1, "nowhere"),
    "encode folder without audio": (ENCODE + "{bad}/empty", 1, "empty"),
    "evaluate data missing": (
        "evaluate --checkpoint {run} --data {bad}/nowhere",
        1,
        "no such folder",
    ),
}


def fill(script, template, **paths):
    other = re.sub(
        r"\d+", lambda number: str(2 * int(number[0])), " ".join(SMALL[script].split()[:2])
    )
    argv = shlex.split(
        template.replace("(", r"\(").replace(")", r"\)").format(other=other, **paths)
    )
    return (
        argv if argv[0] in ("convert", "encode", "evaluate", "transform") else small(script, *argv)
    )


@pytest.mark.parametrize("case", BAD)
def test_bad_input(script, m, case, data, bad, trained, tmp_path, capsys):
    template, code, fragment = BAD[case]
    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    if "{other}" in template and not SMALL[script]:
        pytest.skip("no flags of this script yet")
    before = (trained.run / "model.pt").read_bytes()
    assert (
        main(m, *fill(script, template, data=data, bad=bad, run=trained.run, tmp=tmp_path)) == code
    )
    one_line(capsys.readouterr().err, fragment.replace("bad0", bad.name))
    assert not (bad / "executed").exists() and not list(tmp_path.glob("o.*"))
    assert (trained.run / "model.pt").read_bytes() == before and not (
        tmp_path / "run" / "model.pt"
    ).exists()


@pytest.mark.parametrize("case", ["data missing", "steps abc", "checkpoint unsafe", "source short"])
def test_bad_input_as_a_command(script, case, data, bad, trained, tmp_path):
    template, code, fragment = BAD[case]
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


def test_few_unreadable_files_are_left_out(m, bad, capsys):
    corpus = m.load_corpus(
        m.Config(data=str(bad / "some"), sample_rate=8000, crop=1920, device="cpu")
    )
    assert len(corpus.paths) == 12 and (corpus.length > 0).all()
    out, err = capsys.readouterr()
    assert "1 of 13 files unreadable, the first is" in out and "broken_0.wav" in out and err == ""


def test_unknown_target(m, data, trained, tmp_path, capsys):
    fragment = {"speaker": "ann, ben, don", "recording": "zoe: no such"}.get(m.TARGET, "--target")
    assert (
        main(
            m,
            "convert",
            "--checkpoint",
            trained.run,
            "--source",
            next(data.glob("ann/ann_0.*")),
            "--target",
            "zoe",
            "--output",
            tmp_path / "o.wav",
        )
        == 1
    )
    one_line(capsys.readouterr().err, fragment)
    assert not (tmp_path / "o.wav").exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_disk_full(script, m, data, trained, tmp_path, capsys, monkeypatch, earlier):
    """No file may grow beyond 8 KiB, which is less than a checkpoint."""
    if earlier:
        shutil.copytree(trained.run, tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(m, "report", lambda *_: None)
    argv = small(
        script, "--data", data, "--out", tmp_path / "run", "--steps", 6, *["--resume"] * earlier
    )
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        code = main(m, *argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 1
    one_line(capsys.readouterr().err, "space")
    left = {p.name for p in (tmp_path / "run").iterdir()}
    assert left == (
        {"index.html", "log.jsonl", "model.pt", "result.json", "samples"}
        if earlier
        else {"log.jsonl"} & left
    )
    assert not earlier or m.load(tmp_path / "run")[2]["step"] == 4


@pytest.mark.parametrize("every", [1, 1000])
def test_diverging_loss(script, m, data, tmp_path, capsys, monkeypatch, every):
    monkeypatch.setattr(m, "report", lambda *_: None)
    argv = [
        "--data",
        data,
        "--out",
        tmp_path / "run",
        "--lr",
        1e30,
        "--steps",
        45,
        "--save-every",
        every,
    ]
    assert main(m, *small(script, *argv)) == 1
    one_line(capsys.readouterr().err, "lower --lr")
    path = tmp_path / "run" / "model.pt"
    assert every == 1 or not path.exists()
    if path.exists():
        state = tensors(checkpoint(path)["model"])
        assert [k for k, v in state.items() if not v.isfinite().all()] == []


def test_diverging_last_step_is_not_saved(script, m, data, trained, tmp_path, capsys, monkeypatch):
    """Fewer than 20 steps, over a good checkpoint."""
    shutil.copytree(trained.run, tmp_path / "run")
    step = m.train_step
    monkeypatch.setattr(m, "train_step", lambda *a: step(*a) | {"loss": torch.tensor(float("nan"))})
    assert (
        main(m, *small(script, "--data", data, "--out", tmp_path / "run", "--steps", 6, "--resume"))
        == 1
    )
    one_line(capsys.readouterr().err, "step 5")
    assert m.load(tmp_path / "run")[2]["step"] == 4


# ---- several processes

PLAIN = """
def plain(model, cfg):
    flat = lambda o: [p for group in o.param_groups for p in group["params"]]
    return {name: torch.optim.SGD(flat(o), cfg.lr) for name, o in adaptive(model, cfg).items()}
"""  # plain gradient descent, because Adam's first step is all but the sign
RANKS = """
import sys
sys.path.insert(0, {root!r})
import torch, {script} as m
adaptive, train_step = m.make_optimizers, m.train_step
{plain}
def keep(model, optimizers, corpus, step, cfg):
    torch.save(model.state_dict(), f"before{{m.RANK}}-{{step}}.pt")
    log = train_step(model, optimizers, corpus, step, cfg)
    torch.save(model.state_dict(), f"after{{m.RANK}}-{{step}}.pt")
    return log
m.make_optimizers, m.train_step = plain, keep
sys.exit(m.main(sys.argv[1:]))
"""


def averaged(m, before, corpus, cfg, optimizers_of):
    """One step of both ranks from the state `before`, every gradient averaged by hand -> states, the ranks'
    gradients. The ranks run one after the other, so the averages are filled in by repetition: each round is
    right up to one optimizer step further, until nothing changes."""
    average = []
    for _ in range(12):
        own, states = ([], []), []
        for rank in (0, 1):
            model = m.Model(cfg, len(SPEAKERS))
            model.load_state_dict(before)

            def hook(p):
                own[rank].append(p.grad.clone())
                if len(own[rank]) <= len(average):
                    p.grad.copy_(average[len(own[rank]) - 1])

            optimizers = optimizers_of(model, cfg)
            for p in model.parameters():
                p.requires_grad and p.register_post_accumulate_grad_hook(hook)
            m.RANK = rank
            torch.manual_seed(int(np.random.default_rng((cfg.seed, 0, rank)).integers(2**62)))
            m.train_step(model.train(), optimizers, corpus, 0, cfg)
            states.append(model.state_dict())
        last, average = average, [(a + b) / 2 for a, b in zip(*own, strict=True)]
        if len(last) == len(average) and all(map(torch.equal, last, average)):
            return states, own
    raise AssertionError("the replay does not settle")


def test_two_processes_average_their_gradients(script, m, data, tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text(RANKS.format(root=str(ROOT), script=script, plain=PLAIN))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    argv = small(script, "--data", data, "--out", "run", "--steps", 2, "--lr", 0.1)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(port),
        "ranks.py",
        *argv,
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 2/2") == 1  # rank 0 alone speaks
    assert (tmp_path / "run" / "result.json").exists()
    state = {
        (when, rank, step): checkpoint(tmp_path / f"{when}{rank}-{step}.pt")
        for when in ("before", "after")
        for rank in (0, 1)
        for step in (0, 1)
    }
    _, cfg, saved = m.load(tmp_path / "run")
    same = lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert saved["step"] == 2 and same(saved["model"], state["after", 0, 1])
    assert same(state["before", 0, 0], state["before", 1, 0])  # one start

    scope = {"torch": torch, "adaptive": m.make_optimizers}
    exec(PLAIN, scope)
    monkeypatch.setattr(m, "RANK", 0)
    states, own = averaged(m, state["before", 0, 0], m.load_corpus(cfg), cfg, scope["plain"])
    assert max((a - b).abs().max() for a, b in zip(*own)) > 1e-4  # the ranks see different batches
    learned = [k for k, p in m.Model(cfg, len(SPEAKERS)).named_parameters() if p.requires_grad]
    for k in learned:
        assert torch.equal(state["after", 0, 1][k], state["after", 1, 1][k]), k
        torch.testing.assert_close(state["after", 0, 0][k], states[0][k], atol=1e-5, rtol=0, msg=k)
    moved = max((state["after", 0, 0][k] - state["before", 0, 0][k]).abs().max() for k in learned)
    assert moved > 1e-3  # else the tolerance says nothing
    for k in ("bottleneck.e", "bottleneck.N", "bottleneck.M") if script == "vqvae" else ():
        assert torch.equal(state["after", 0, 1][k], state["after", 1, 1][k]), k
        assert not torch.equal(state["before", 0, 0][k], state["after", 0, 1][k]), k


# ---- import


def test_import_has_no_side_effects(script, tmp_path):
    code = (
        "import signal, sys, torch; sys.argv = ['x', '--bogus', 'convert']; "
        f"sys.path.insert(0, {str(ROOT)!r}); torch.manual_seed(7); state = torch.get_rng_state(); "
        f"from {script} import Config, Model, load; print(sys.argv, "
        "torch.equal(state, torch.get_rng_state()), signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    )
    command = [sys.executable, "-B", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['x', '--bogus', 'convert'] True True\n"
    assert list(tmp_path.iterdir()) == []
