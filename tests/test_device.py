# SPDX-License-Identifier: MIT
"""Device discipline without a GPU. Tensors on the `meta` device have shapes but no values: a step
on them fails where a tensor was left on the CPU, and where a value is asked for, which on a GPU
would be a wait. And bfloat16: fifty toy steps under CPU autocast stay finite and near float32."""

import contextlib
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
from test_cli import SMALL  # noqa: E402

SCRIPTS = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
PHASES = {  # steps that lie in the phases of training, of 8 steps in all
    "vqvae": [0],
    "fhvae": [0],
    "adversarial_vc": [0, 2, 4, 6],
    "adain_vc": [0],
    "cpc": [0, 6],
    "dim": [0, 6],
}
VARIANTS = {  # further settings, each with steps of its own
    "vqvae": ["codebook=gradient", "bottleneck=onehot", "bottleneck=binary", "bottleneck=none"],
    "cpc": ["negatives=batch", "negatives=other-sequences", "negatives=same-speaker", "norm=none"],
    "dim": [
        "objective=dv",
        "objective=nce",
        "critic=concat",
        "pair=cross",
        "alpha=1.0",
        "gamma=0.0",
    ],
}
CASES = [
    (script, step, variant)
    for script in SCRIPTS
    for step in PHASES[script]
    for variant in ("", *VARIANTS.get(script, ()))
]


def config(m, script, **overrides):
    """A tiny configuration on the CPU."""
    words = SMALL[script].split()
    flags = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2])}
    kinds = {name: type(value) for name, value in vars(m.Config()).items()}
    small = {name: kinds[name](float(value)) for name, value in flags.items()}
    sizes = {"batch_size": 4, "crop": 1920, "steps": 8, "device": "cpu"}
    return m.Config(**m.TOY | sizes | small | overrides)


def corpus_of_noise(m):
    """Four speakers with five utterances of 0.5 s each, in memory."""
    rng = np.random.default_rng(0)
    audio = torch.from_numpy((rng.standard_normal(20 * 8000) * 3000).astype(np.int16))
    start = 8000 * np.arange(20)
    train = np.array([u for u in range(20) if u % 5])
    held = np.arange(0, 20, 5)
    paths = [Path(f"{u}.wav") for u in range(20)]
    speakers = ["a", "b", "c", "d"]
    length = np.full(20, 8000)
    speaker = np.arange(20) // 5
    corpus = m.Corpus(Path(), paths, audio, start, length, speakers, speaker, train, held)
    corpus.test = corpus
    return corpus


def setup(m, script, variant=""):
    """-> model, ready to train on the CPU, corpus, cfg."""
    name, _, value = variant.partition("=")
    overrides = {name: float(value) if "." in value else value} if name else {}
    cfg = config(m, script, **overrides)
    corpus = corpus_of_noise(m)
    torch.manual_seed(0)
    model = m.Model(cfg, len(corpus.speakers))
    m.prepare(model, corpus, cfg)
    return model.train(), corpus, cfg


def to_meta(m, script, model, cfg, monkeypatch):
    """Moves a model to the meta device. What is not method, or is known to wait, is stubbed."""
    batch = {
        "wave": torch.zeros(cfg.batch_size, cfg.crop, device="meta"),
        "speaker": torch.zeros(cfg.batch_size, dtype=torch.long, device="meta"),
        "utterance": torch.zeros(cfg.batch_size, dtype=torch.long, device="meta"),
    }
    monkeypatch.setattr(m, "get_batch", lambda *arguments, **options: batch)
    monkeypatch.setattr(torch, "autocast", NoAutocast)
    for name in ("Adam", "AdamW"):
        monkeypatch.setattr(torch.optim, name, Stepless)
    progress = model.progress.clone() if script == "fhvae" else None
    model = model.to("meta")
    m.mel_filters.cache_clear()
    if script == "fhvae":
        # One wait a step is meant: the number of the pass is asked before its batch is drawn.
        model.progress = progress
    if script == "cpc":
        monkeypatch.setattr(m, "fit_units", lambda *_: None)
    return model, replace(cfg, device="meta")


class Stepless(torch.optim.SGD):
    """An optimizer that does nothing: fused Adam does not know the meta device."""

    def __init__(self, parameters, *_, **__):
        super().__init__(parameters, lr=0.0)

    def step(self, closure=None):
        pass


class NoAutocast(contextlib.ContextDecorator):
    """torch.autocast does not know the meta device."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("script, step, variant", CASES)
def test_a_step_keeps_to_its_device(script, step, variant, monkeypatch):
    m = importlib.import_module(script)
    model, corpus, cfg = setup(m, script, variant)
    model, cfg = to_meta(m, script, model, cfg, monkeypatch)
    optimizers = m.make_optimizers(model, cfg)
    metrics = m.train_step(model, optimizers, corpus, step, cfg)
    assert metrics and all(value.device.type == "meta" for value in metrics.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_representations_keep_to_their_device(script, monkeypatch):
    m = importlib.import_module(script)
    model, _, cfg = setup(m, script)
    model, cfg = to_meta(m, script, model.eval(), cfg, monkeypatch)
    result = m.represent(model, torch.zeros(4000, device="meta"), cfg)
    assert result and all(x.device.type == "meta" for x in result.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_conversion_keeps_to_its_device(script, monkeypatch):
    m = importlib.import_module(script)
    model, _, cfg = setup(m, script)
    model, cfg = to_meta(m, script, model.eval(), cfg, monkeypatch)
    # torch.istft checks its window by value; once per conversion, which does not matter.
    samples = []

    def istft(spectrum, cfg):
        samples.append(spectrum.shape)
        return torch.zeros(spectrum.shape[0], cfg.hop * (spectrum.shape[1] - 1), device="meta")

    monkeypatch.setattr(m, "istft", istft)
    if script == "vqvae":
        # On a GPU one sample is recorded as a graph and replayed.
        monkeypatch.setattr(m, "repeat", lambda draw, times, device: draw())
    wave = torch.zeros(4000, device="meta")
    targets = {"speaker": [1, None], "recording": [wave, None], "": [None]}[m.TARGET]
    for target in targets:
        (converted,) = m.convert(model, [wave], [target], cfg)
        assert converted.shape == wave.shape and converted.device.type == "meta"


@pytest.mark.parametrize("script, step", [(s, p) for s in SCRIPTS for p in PHASES[s]])
def test_bfloat16_stays_near_float32(script, step):
    """Fifty steps from the same weights on the same batches, with and without autocast. Rounding
    errors grow, above all where two networks play against each other, so means are compared."""
    m = importlib.import_module(script)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, corpus, cfg = setup(m, script)
        optimizers = m.make_optimizers(model, cfg)
        losses[dtype] = []
        for i in range(50):
            torch.manual_seed(i)
            with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16, cache_enabled=False):
                metrics = m.train_step(model, optimizers, corpus, step, replace(cfg, seed=i))
            losses[dtype].append(next(iter(metrics.values())).item())
        assert all(p.isfinite().all() for p in model.state_dict().values())
    exact, rough = (np.array(losses[dtype]) for dtype in (torch.float32, torch.bfloat16))
    assert np.isfinite(rough).all()
    # A single loss is too noisy to compare: these models are tiny, and an instance norm over six
    # frames makes much of a rounding error. The first five show errors before they accumulate.
    for steps in (5, 50):
        difference = abs(rough[:steps].mean() - exact[:steps].mean())
        assert difference < 0.1 * abs(exact[:steps]).mean() + 0.05, steps
