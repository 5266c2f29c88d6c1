# SPDX-License-Identifier: MIT
"""Speed of each script, at TOY and at the paper's configuration; not collected by pytest.

    python tests/bench.py [SCRIPT ..] [--threads 1] [--batch-size 1]      on the CPU, and on CUDA where there is one

A row: milliseconds a training step, seconds of audio trained on per second, share of the step spent in get_batch, peak
memory (of the GPU, or of the process), and samples of waveform made per second by convert, for one stream. "bare": forward
and backward of the networks alone, on random features, where they were ready-made; the rest of the step is features, loss,
clipping and optimizer. Where training has phases, the steps are those of the first, and each kind of step has a row of its
own. The paper's configuration is slow on a CPU: there it runs five steps at --batch-size, stated in the row. The last row
is of reading: 60 files of 2 to 7 s at 48 kHz, as in VCTK, at 16 kHz.
"""

import argparse
import contextlib
import importlib
import io
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")


def bare_adain_vc(model, cfg, x):
    mu, log_var = model.content(x)
    (
        model.decode(mu + (log_var / 2).exp(), model.speaker(x), x.shape[1]) - x
    ).abs().mean().backward()


def bare_adversarial_vc(model, cfg, x):
    (
        model.decode(
            model.encoder(x), torch.zeros(len(x), dtype=int, device=x.device), x.shape[1], 1
        )
        - x
    ).abs().mean().backward()


def bare_fhvae(model, cfg, x):
    x = x[:, 2:-1]  # 23 frames of a crop -> the 20 of a segment
    z2 = model.z2_encoder(x)
    z1 = model.z1_encoder(x, z2[0])
    sum(h.mean() for h in (*z1, *z2, *model.decoder(z1[0], z2[0], x.shape[1]))).backward()


def parts_fhvae(script, model, optimizers, cfg, x):
    """The discriminative term, and what a pass costs beside its steps: the table filled from 2048 segments."""
    x = x[:, 2:-1]
    m2 = model.z2_encoder(x)[0].detach().float().requires_grad_()
    many = x.repeat(2048 // len(x) + 1, 1, 1)[:2048]
    return {
        "discriminative": lambda: script.log_posterior(m2, model.table)[:, 0].mean().backward(),
        "fill from 2048": torch.no_grad()(lambda: model.z2_encoder(many)),
    }


def parts_adversarial_vc(script, model, optimizers, cfg, x):
    speaker = torch.arange(len(x), device=x.device) % model.n_speakers

    def step(name, *rest):
        return lambda: getattr(script, f"{name}_step")(model, optimizers, x, *rest, cfg)

    return {
        "auto-encoder": step("autoencoder", speaker, 0.0),
        "with adversary": step("autoencoder", speaker, 0.01),
        "classifier": step("classifier", speaker),
        "critic": step("critic", speaker),
        "generator": step("generator"),
    }


def bare_cpc(model, cfg, x):
    z, c = model(torch.randn(len(x), cfg.crop, device=x.device))
    (z.mean() + c.mean()).backward()


def parts_cpc(script, model, optimizers, cfg, x):
    """InfoNCE by itself, forward and backward; a step of the decoder's phase; F0 of a batch; k-means of 20,000 frames."""
    wave = torch.randn(len(x), cfg.crop, device=x.device)
    z, c = (h.detach().requires_grad_() for h in model(wave))
    mel, who = model.features(wave), torch.arange(len(x), device=x.device) % model.n_speakers
    many, optimizer = c.detach().flatten(0, 1).repeat(20, 1)[:20_000], optimizers["decoder"]
    many = many + torch.randn_like(many)

    def decoder():
        with torch.no_grad():
            units, f0 = model.units(wave), model.f0(wave, who)
        torch.nn.functional.l1_loss(model.decoder(units, f0, who).float(), mel).backward()
        optimizer.step()

    return {
        "InfoNCE": lambda: script.info_nce(z, c, model.predictors, cfg)[0].mean().backward(),
        "decoder": decoder,
        "F0": lambda: script.yin(wave, cfg),
        "k-means": lambda: script.kmeans(many, cfg.units, 0, starts=1),
    }


def bare_dim(model, cfg, x):
    import dim

    u, y = dim.scores(model, x.repeat(1 + (cfg.pair == "cross"), 1, 1), cfg)
    sum(dim.bound(score, cfg.objective)[0] for score in u.values()).backward()


def parts_dim(script, model, optimizers, cfg, x):
    """Both critics' scores of all pairs, forward and backward; the prior's critic; a step of the decoders."""
    c, y = (h.detach().requires_grad_() for h in model.encoder(x))
    concat = script.ConcatCritic(cfg.channels, cfg.d_global, cfg.concat_units).to(x.device)

    def prior():
        q = y.detach().sigmoid()
        script.prior_critic_loss(model.prior, torch.rand_like(q), q, cfg.penalty).backward()
        optimizers["prior"].step()

    def decoders():
        with torch.no_grad():
            vectors = model.encoder.eval()(x)[1], model.control.eval()(x)[1]
        sum(
            (net(v) - x).square().mean()
            for net, v in zip((model.decoder, model.control_decoder), vectors)
        ).backward()
        optimizers["decoder"].step()

    def score(critic):
        return lambda: script.bound(critic(c, y), cfg.objective)[0].backward()

    return {
        "dot critic": score(model.critics["local"]),
        "concat critic": score(concat),
        "prior critic": prior,
        "decoders": decoders,
    }


BARE = {
    "dim": bare_dim,
    "cpc": bare_cpc,
    "adain_vc": bare_adain_vc,
    "adversarial_vc": bare_adversarial_vc,
    "fhvae": bare_fhvae,
}
PARTS = {
    "dim": parts_dim,
    "cpc": parts_cpc,
    "adversarial_vc": parts_adversarial_vc,
    "fhvae": parts_fhvae,
}  # what training is made of, each timed by itself


def bench(name, config, device, batch_size):
    """Prints one row; run in a process of its own, so that peak memory is its own."""
    import torch

    script = importlib.import_module(name)
    paper = config == "paper"
    overrides = {"device": device} | ({} if paper else script.TOY)
    if paper and device == "cpu":
        overrides["batch_size"] = max(
            batch_size, 2 if name == "dim" else 1
        )  # of one nothing can be told apart
    cfg = script.Config(**overrides)
    with contextlib.redirect_stdout(io.StringIO()):
        corpus = script.load_corpus(cfg)
    torch.manual_seed(0)
    model = script.Model(cfg, len(corpus.speakers)).to(cfg.device)
    script.prepare(model, corpus, cfg)
    optimizers, warm, steps = (
        script.make_optimizers(model, cfg),
        *((3, 20) if not paper or device == "cuda" else (1, 5)),
    )
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(first, number):
        for step in range(first, first + number):
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16 and device == "cuda"):
                script.train_step(model.train(), optimizers, corpus, step, cfg)
        wait()

    run(0, warm)
    load, waited = script.get_batch, []

    def timed_batch(*args, **options):  # what share of a step is waiting for data
        start = time.perf_counter()
        batch = load(*args, **options)
        waited.append(time.perf_counter() - start)
        return batch

    script.get_batch, began = timed_batch, time.perf_counter()
    run(warm, steps)
    step_seconds, share = (
        (time.perf_counter() - began) / steps,
        sum(waited) / (time.perf_counter() - began),
    )
    script.get_batch = load
    bare = ""
    if name in BARE:
        x = torch.rand_like(
            model.features(torch.randn(cfg.batch_size, cfg.crop, device=cfg.device))
        )[:, : cfg.crop // cfg.hop]
        for timed in (False, True):
            began = time.perf_counter()
            for _ in range(steps if timed else 2):
                with torch.autocast(
                    cfg.device, torch.bfloat16, enabled=cfg.bf16 and device == "cuda"
                ):
                    BARE[name](model.train(), cfg, x)
                model.zero_grad()
            wait()
        bare = f"  bare {(time.perf_counter() - began) / steps * 1000:9.1f} ms"
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    row = (
        f"{name:15} {config:6} {device:5} batch {cfg.batch_size:3}  {step_seconds * 1000:9.1f} ms/step{bare}  "
        f"{cfg.batch_size * cfg.crop / cfg.sample_rate / step_seconds:8.1f} x real time  data {share:6.2%}  "
        f"{peak / 2**30:5.2f} GiB"
    )
    if script.TARGET:
        wave = corpus.wave(0)[: cfg.sample_rate // (10 if paper and device == "cpu" else 1)].to(
            cfg.device
        )
        target = 0 if script.TARGET == "speaker" else wave
        script.convert(model.eval(), [wave[: cfg.win * 2]], [target], cfg)
        wait()
        began = time.perf_counter()
        script.convert(model, [wave], [target], cfg)
        wait()
        row += f"  convert {len(wave) / (time.perf_counter() - began):9.0f} samples/s"
    print(row, flush=True)
    for part, step in (
        PARTS[name](script, model.train(), optimizers, cfg, x).items() if name in PARTS else ()
    ):
        for timed in (False, True):
            began = time.perf_counter()
            for _ in range(steps if timed else 2):
                with torch.autocast(
                    cfg.device, torch.bfloat16, enabled=cfg.bf16 and device == "cuda"
                ):
                    step()
            wait()
        print(
            f"{'':15} {config:6} {device:5} {part:15} {(time.perf_counter() - began) / steps * 1000:9.1f} ms",
            flush=True,
        )


def bench_reading(name):
    """Prints a row: files at three times the sample rate, decoded and resampled one after another."""
    import numpy as np
    import soundfile as sf

    script = importlib.import_module(name)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i:02d}.wav") for i in range(61)]
        for path in paths:
            noise = 0.1 * rng.standard_normal(int(48000 * rng.uniform(2, 7)))
            sf.write(path, noise, 48000)
        script.read_audio(paths.pop(), 16000)  # warm
        began = time.perf_counter()
        heard = sum(len(script.read_audio(path, 16000)) for path in paths) / 16000
        seconds = time.perf_counter() - began
    print(
        f"{'reading':15} 60 files of 48 kHz at 16 kHz  {seconds:.2f} s  "
        f"{heard / seconds:8.1f} x real time",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scripts", nargs="*", help="default: all that exist")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--batch-size", type=int, default=1, help="of the paper's configuration on a CPU"
    )
    parser.add_argument("--only", help="CONFIG-DEVICE: what the bench runs in a child process")
    flags = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(flags.threads)
    if flags.only:
        bench(flags.scripts[0], *flags.only.split("-"), flags.batch_size)
        sys.exit()
    print(
        f"torch {torch.__version__}, {flags.threads} CPU threads"
        + (
            f", {torch.cuda.get_device_name()}"
            if torch.cuda.is_available()
            else ", no GPU: not measured on one"
        )
    )
    for name in flags.scripts or [n for n in NAMES if (ROOT / f"{n}.py").exists()]:
        for case in [
            f"{c}-{d}"
            for d in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
            for c in ("toy", "paper")
        ]:
            command = [
                sys.executable,
                __file__,
                name,
                "--only",
                case,
                "--threads",
                str(flags.threads),
                "--batch-size",
                str(flags.batch_size),
            ]
            if os.spawnv(os.P_WAIT, sys.executable, command):
                print(f"{name} {case} failed")
    bench_reading(flags.scripts[0] if flags.scripts else NAMES[0])
