# SPDX-License-Identifier: MIT
"""The claims: which runs an arm stands for, when a claim holds, and the command from end to end."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import claims
import compare
import dim
import measure
import numpy as np
import pytest
import soundfile as sf
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent


def entry(speaker, phone=0.5):
    return {"representations": {"z": {"speaker": speaker, "phone": phone}}, "metrics": {"nats": 2}}


def judged(expect, low, high):
    measured = {"a": [entry(x) for x in low], "b": [entry(x) for x in high]}
    return claims.judge(expect, measured)


LOWER = claims.Expect("z.speaker of a", "z.speaker of b")


@pytest.mark.parametrize(
    "low, high, expected",
    [
        ([0.3, 0.4], [0.5, 0.6], 1),
        ([0.3, 0.4], [0.41, 0.6], 1),  # the ranges do not overlap
        ([0.3, 0.5], [0.4, 0.6], 0),  # they do
        ([0.5, 0.6], [0.3, 0.4], -1),  # the other way round
        ([0.4, 0.6], [0.3, 0.55], -1),
        ([0.3, 0.5], [0.31, 0.5], -1),  # no difference
        ([0.3, 0.304], [0.313, 0.316], 1),  # over a point, and the ranges do not overlap
        ([0.3, 0.304], [0.308, 0.31], -1),  # under a point
        ([0.3], [0.5], 1),
        ([0.3], [0.315], -1),  # of one seed two points are needed
        ([], [0.5], None),
        ([None], [0.5], None),
    ],
)
def test_an_expectation_is_judged_by_margin_and_range(low, high, expected):
    assert judged(LOWER, low, high) == expected


def test_slack_is_what_a_figure_may_lose():
    no_worse = claims.Expect("z.speaker of a", "z.speaker of b", slack=0.02)
    assert judged(no_worse, [0.5, 0.6], [0.5, 0.58]) == 1
    assert judged(no_worse, [0.5, 0.6], [0.4, 0.45]) == -1
    assert judged(no_worse, [0.5, 0.6], [0.4, 0.55]) == -1


@pytest.mark.parametrize(
    "of_a, of_b, expected",
    [
        ((0.1, 0.5), (0.9, 0.9), claims.HOLDS),
        ((0.1, 0.9), (0.9, 0.5), claims.IN_PART),
        ((0.9, 0.9), (0.1, 0.5), claims.FAILS),
    ],
)
def test_verdict(of_a, of_b, expected):
    both = (LOWER, claims.Expect("z.phone of a", "z.phone of b"))
    claim = SimpleNamespace(expects=both)
    assert claims.verdict(claim, {"a": [entry(*of_a)], "b": [entry(*of_b)]}) == expected


def test_verdict_where_seeds_disagree():
    claim = SimpleNamespace(expects=(LOWER,))
    measured = {"a": [entry(0.1), entry(0.5)], "b": [entry(0.3), entry(0.9)]}
    assert claims.verdict(claim, measured) == claims.OPEN


def test_what_was_not_measured_is_not_confirmed():
    both = (LOWER, claims.Expect("z.phone of a", "z.phone of b"))
    measured = {"a": [entry(0.1, None)], "b": [entry(0.9, None)]}
    assert claims.verdict(SimpleNamespace(expects=both), measured) == claims.IN_PART


def test_every_claim_is_well_formed():
    for name, claim in claims.CLAIMS.items():
        arms = [arm.name for arm in claim.arms]
        assert len(set(arms)) == len(arms), name
        assert len(claim.short.split()) <= 10, name
        for arm in claim.arms:
            claims.script_flags(claims.parse([]), claim.script, arm, 0)
            compare.parse(arm.options.split())
        for expect in claim.expects:
            for side in (expect.low, expect.high):
                assert side.split(" of ", 1)[1] in arms, side


def test_arms_with_the_same_flags_are_one_run():
    args = claims.parse([])
    default = claims.job_of(args, "cpc", claims.Arm("x"), 3)
    same = claims.job_of(args, "cpc", claims.Arm("y", "--units 25"), 3)
    other = claims.job_of(args, "cpc", claims.Arm("y", "--units 100"), 3)
    assert default == same and default.folder == Path("runs/cpc-toy-3")
    assert other.folder == Path("runs/cpc-toy-units-100-3")
    assert other.flags == ("--units", "100", "--seed", "3")

    args = claims.parse(["--data", "words/train", "--test", "words/test", "--steps", "9"])
    job = claims.job_of(args, "adain_vc", claims.Arm("x", "--instance-norm false"), 0)
    assert job.folder == Path("runs/adain_vc-words-instance-norm-false-0")
    assert " ".join(job.flags) == (
        "--data words/train --test words/test --toy --steps 9 --instance-norm false --seed 0"
    )


def test_a_run_is_known_again(tmp_path, monkeypatch):
    """A run of other flags or of another text is not taken for the one that is asked for."""
    monkeypatch.chdir(tmp_path)
    args = claims.parse(["--data", "words", "--steps", "9"])
    job = claims.job_of(args, "dim", claims.Arm("x"), 0)
    assert not claims.is_trained(job)
    config = vars(dim.Config(**dim.TOY | {"data": "words", "steps": 9}))
    run = {"config": config, "steps": 9, "method_sha256": claims.method_hash("dim")}
    job.folder.mkdir(parents=True)

    def written(**changes):
        (job.folder / "run.json").write_text(json.dumps(run | changes))
        return claims.is_trained(job)

    assert written()
    for name, other in (("seed", 1), ("steps", 5), ("channels", 256), ("gamma", 0.5)):
        with pytest.raises(measure.UserError, match=f"another --{name}"):
            written(config=config | {name: other})
    with pytest.raises(measure.UserError, match="another version"):
        written(method_sha256="0")

    (job.folder / "run.json").unlink()  # as after Ctrl-C: to be resumed, if it is the same
    torch.save({"config": config}, job.folder / "model.pt")
    assert not claims.is_trained(job)
    torch.save({"config": config | {"channels": 8}}, job.folder / "model.pt")
    with pytest.raises(measure.UserError, match="another --channels"):
        claims.is_trained(job)


def test_majority_map():
    """Unit 0 is mostly class 2, unit 1 class 0; unit 2 does not occur in the fit."""
    units = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    classes = torch.tensor([2, 2, 1, 0, 0, 0, 1])
    fit = (F.one_hot(units, 3).float(), classes)
    held = (F.one_hot(torch.tensor([0, 1, 2, 2]), 3).float(), torch.tensor([2, 1, 0, 2]))
    assert measure.majority_map_accuracy(fit, held) == 0.5
    shuffled = compare.majority_map(fit, fit)
    assert shuffled["majority"] == pytest.approx(5 / 7)
    assert shuffled["majority_shuffled"] < shuffled["majority"]


def test_probes_see_the_loudest_seconds_with_their_labels():
    rate = 8000
    wave = torch.zeros(4 * rate)
    wave[2 * rate : 3 * rate] = torch.randn(rate)
    corpus = SimpleNamespace(length=np.full(1, 4 * rate), wave=lambda u: wave)
    run = SimpleNamespace(name="x", cfg=SimpleNamespace(device="cpu", sample_rate=rate))
    labels = {0: np.arange(400)}

    def encode(part):
        return {"z": part.reshape(-1, rate // 10)}

    def frames(seconds):
        return compare.collect(run, encode, corpus, [0], labels, 99, seconds, compare.Screen())["z"]

    assert len(frames(math.inf).frames[0]) == 40
    cut = frames(1.0)
    assert torch.equal(cut.frames[0].flatten(), wave[2 * rate : 3 * rate])
    assert torch.allclose(cut.phones[0].float(), torch.arange(205.0, 300, 10), atol=1)


def test_clusters_with_and_without_what_is_constant_in_an_utterance():
    """Of two speakers apart by an offset, plain clusters tell the speaker, normalized ones do not."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(8, 600, generator=generator) + 20 * torch.arange(8)[:, None] % 40
    script = SimpleNamespace(
        represent=lambda model, wave, cfg: {"z": wave.reshape(-1, 2), "v": wave[:3]},
        log_mel=lambda wave, cfg: wave.reshape(1, -1, 4),
    )
    cfg = SimpleNamespace(device="cpu")
    corpus = SimpleNamespace(wave=lambda u: waves[u])
    run = SimpleNamespace(script=script, model=None, cfg=cfg, corpus=corpus)
    encode = compare.cluster_encoder(run, SimpleNamespace(fit=np.arange(8)), 2)
    units = [encode(wave) for wave in waves]
    names = {
        "z_clusters",
        "z_normalized_clusters",
        "log_mel_clusters",
        "log_mel_normalized_clusters",
    }
    assert set(units[0]) == names
    shares = torch.stack([x["z_clusters"].float().mean() for x in units])
    assert ((shares[::2] - shares[1::2]).abs() == 1).all()
    shares = torch.stack([x["z_normalized_clusters"].float().mean() for x in units])
    assert ((shares - 0.5).abs() < 0.1).all()


def noise_corpus(folder, speakers, rate=8000):
    rng = np.random.default_rng(0)
    for speaker in speakers:
        (folder / speaker).mkdir(parents=True)
        for i in range(8):
            sf.write(folder / speaker / f"{i}.wav", 0.1 * rng.normal(size=rate), rate)


def test_the_command_trains_measures_and_judges(tmp_path):
    """dim-pairs in two steps of training: runs, result files and a table; the second time nothing is trained."""
    noise_corpus(tmp_path / "data", ("ann", "bob"))
    words = ["dim-pairs", "--data", "data", "--steps", "2", "--seeds", "1", "2"]
    command = [sys.executable, str(ROOT / "tests" / "claims.py"), *words]

    def run():
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    # Batches of 32 need as many utterances.
    failed = run()
    assert failed.returncode == 1 and failed.stderr.startswith("error: runs/dim-data-pair-cross-1")
    assert "--batch-size" in failed.stderr and "Traceback" not in failed.stderr
    noise_corpus(tmp_path / "data", ("fay", "gus", "hal"))
    done = run()
    assert done.returncode == 0, done.stderr
    names = {f"dim-data-{arm}{seed}" for arm in ("", "pair-cross-") for seed in (1, 2)}
    assert {path.stem for path in (tmp_path / "runs" / "claims").glob("*.json")} == names
    kept = json.loads((tmp_path / "runs" / "claims" / "dim-data-1.json").read_text())
    assert kept["runs"]["dim-data-1"]["command"].endswith("--seed 1 --out runs/dim-data-1")
    assert kept["compared"]["seconds"] is None
    lines = done.stdout.splitlines()
    assert lines[-1] in (claims.HOLDS, claims.IN_PART, claims.FAILS, claims.OPEN)
    assert any(line.startswith("two crops") for line in lines)

    again = run()
    assert "training" not in again.stdout and "trained" not in again.stdout.split("dim-pairs")[0]
    assert again.stdout.splitlines()[-1] == lines[-1]


def test_mistakes_are_one_line(capsys):
    with pytest.raises(SystemExit):
        claims.parse(["no-such-claim"])
    assert "no-such-claim: no such claim" in capsys.readouterr().err
    assert claims.main([]) == 0
    assert "adain-instance-norm" in capsys.readouterr().out
