# SPDX-License-Identifier: MIT
"""Speed of each script, at TOY and at the paper's configuration; not collected by pytest.

    python tests/bench.py [SCRIPT ..] [--threads 1] [--batch-size 1]
    python tests/bench.py [SCRIPT ..] --against DIR [--repeats 9]

On the CPU, and on CUDA where there is one. The paper's configuration is slow on a CPU; there it
runs few steps, at --batch-size.

The first form prints, for each script, milliseconds per training step, "bare" (forward and backward
of the networks alone, on random features), seconds of audio trained on per second, the share of a
step spent in get_batch, peak memory (of the GPU, or of the process), and the samples of waveform
that convert makes per second for one stream. Where training has phases, these steps are those of
the first; every kind of step and every costly part has a line of its own. The last line is of
reading: 60 files of 2 to 7 s at 48 kHz, as in VCTK, at 16 kHz.

The second form times the scripts here beside those in DIR, an earlier text, such as a `git
worktree`. Both are imported into one process and take turns, --repeats times, on the same threads,
batches and seed, both with the TOY of the new text. It prints the median milliseconds of each, and
the median of new / old with the range over the repeats: of CPU time where one thread computes, so
that other processes disturb little, else of wall-clock time. A part that one text lacks, or calls
by another name, is "-", and a note on stderr says why. If the ratio of the earlier text to the
authors' code is known, new / old times that ratio estimates the new text's.
"""

import argparse
import contextlib
import importlib.util
import io
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
SECONDS_A_TURN = 0.2  # at least, with --against
SMALLEST_BATCH = {"dim": 2}  # of a single utterance nothing can be told apart


# ---------- networks alone: forward and backward, x (B, T, F) ----------


def bare_adain_vc(script, model, cfg, x):
    mu, log_var = model.content(x)
    z = mu + (log_var / 2).exp()
    rebuilt = model.decode(z, model.speaker(x), x.shape[1])
    (rebuilt - x).abs().mean().backward()


def bare_adversarial_vc(script, model, cfg, x):
    speaker = torch.zeros(len(x), dtype=int, device=x.device)
    rebuilt = model.decode(model.encoder(x), speaker, x.shape[1], 1)
    (rebuilt - x).abs().mean().backward()


def bare_fhvae(script, model, cfg, x):
    x = x[:, 2:-1]  # 23 frames of a crop -> the 20 of a segment
    z2 = model.z2_encoder(x)
    z1 = model.z1_encoder(x, z2[0])
    outputs = [*z1, *z2, *model.decoder(z1[0], z2[0], x.shape[1])]
    sum(output.mean() for output in outputs).backward()


def bare_cpc(script, model, cfg, x):
    z, c = model(torch.randn(len(x), cfg.crop, device=x.device))
    (z.mean() + c.mean()).backward()


def bound_of_dim(script, u, cfg):
    """The bound of scores u; an earlier text returns its ceiling beside it."""
    value = script.bound(u, cfg.objective)
    return value[0] if isinstance(value, tuple) else value


def bare_dim(script, model, cfg, x):
    if cfg.pair == "cross":
        x = x.repeat(2, 1, 1)
    u, _ = script.scores(model, x, cfg)
    sum(bound_of_dim(script, score, cfg) for score in u.values()).backward()


BARE = {
    "fhvae": bare_fhvae,
    "adversarial_vc": bare_adversarial_vc,
    "adain_vc": bare_adain_vc,
    "cpc": bare_cpc,
    "dim": bare_dim,
}


# ---------- what training is made of: {name: function without arguments} ----------


def parts_fhvae(script, model, optimizers, cfg, x):
    """The discriminative term, and the table of 2048 segments that a pass begins with."""
    x = x[:, 2:-1]
    m2 = model.z2_encoder(x)[0].detach().float().requires_grad_()
    many = x.repeat(2048 // len(x) + 1, 1, 1)[:2048]

    def discriminative():
        script.log_posterior(m2, model.table)[:, 0].mean().backward()

    @torch.no_grad()
    def fill():
        model.z2_encoder(many)

    return {"discriminative": discriminative, "fill from 2048": fill}


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


def parts_cpc(script, model, optimizers, cfg, x):
    """InfoNCE, a step of the decoder, F0 of a batch, and k-means of 20,000 frames."""
    wave = torch.randn(len(x), cfg.crop, device=x.device)
    z, c = (h.detach().requires_grad_() for h in model(wave))
    mel = model.features(wave)
    speaker = torch.arange(len(x), device=x.device) % model.n_speakers
    frames = c.detach().flatten(0, 1)
    many = frames.repeat(20_000 // len(frames) + 1, 1)[:20_000]
    many = many + torch.randn_like(many)

    def info_nce():
        script.info_nce(z, c, model.predictors, cfg)[0].mean().backward()

    def decoder():
        with torch.no_grad():
            units = model.units(wave)
            f0 = model.f0(wave, speaker)
        rebuilt = model.decoder(units, f0, speaker).float()
        torch.nn.functional.l1_loss(rebuilt, mel).backward()
        optimizers["decoder"].step()

    return {
        "InfoNCE": info_nce,
        "decoder": decoder,
        "F0": lambda: script.yin(wave, cfg),
        "k-means": lambda: script.kmeans(many, cfg.units, starts=1),
    }


def parts_dim(script, model, optimizers, cfg, x):
    """The scores by both critics of all pairs; a step of the prior's critic and of the decoder."""
    c, y = (h.detach().requires_grad_() for h in model.encoder(x))
    concat = script.ConcatCritic(cfg.channels, cfg.d_global, cfg.concat_units).to(x.device)

    def score(critic):
        return lambda: bound_of_dim(script, critic(c, y), cfg).backward()

    def prior():
        q = y.detach().sigmoid()
        script.prior_critic_loss(model.prior, torch.rand_like(q), q, cfg.penalty).backward()
        optimizers["prior"].step()

    def decoder():
        script.decoder_step(model, optimizers, x)

    return {
        "dot critic": score(model.critics["local"]),
        "concat critic": score(concat),
        "prior critic": prior,
        "decoder": decoder,
    }


PARTS = {
    "fhvae": parts_fhvae,
    "adversarial_vc": parts_adversarial_vc,
    "cpc": parts_cpc,
    "dim": parts_dim,
}


# ---------- one text of a script, ready to be timed ----------


@dataclass
class Text:
    """A script at one configuration: its module, and what its train_step takes."""

    script: object
    cfg: object
    corpus: object
    model: object
    optimizers: dict
    steps: int = 0  # trained so far

    def autocast(self):
        is_on = self.cfg.bf16 and self.cfg.device == "cuda"
        return torch.autocast(self.cfg.device, torch.bfloat16, enabled=is_on)

    def train_step(self):
        model = self.model.train()
        self.script.train_step(model, self.optimizers, self.corpus, self.steps, self.cfg)
        self.steps += 1

    def parts(self):
        """-> {name: function} of what training is made of, "bare" first.

        Empty, with a note, if this text lacks what bench.py calls.
        """
        name = self.script.NAME
        cfg = self.cfg
        parts = {}
        try:
            wave = torch.randn(cfg.batch_size, cfg.crop, device=cfg.device)
            x = torch.rand_like(self.model.features(wave))[:, : cfg.crop // cfg.hop]
            if name in BARE:
                parts["bare"] = lambda: self.bare(x)
            if name in PARTS:
                args = self.script, self.model.train(), self.optimizers, cfg, x
                parts |= PARTS[name](*args)
        except Exception as error:
            note(self, "the parts", error)
        return parts

    def bare(self, x):
        BARE[self.script.NAME](self.script, self.model.train(), self.cfg, x)
        self.model.zero_grad()

    def seconds(self, work, times, clock=time.perf_counter):
        """How long each of so many calls takes."""
        self.wait()
        began = clock()
        for _ in range(times):
            with self.autocast():
                work()
        self.wait()
        return (clock() - began) / times

    def wait(self):
        if self.cfg.device == "cuda":
            torch.cuda.synchronize()

    def warm(self, part, work):
        """Runs a part twice -> seconds of the second call, or None if this text lacks it."""
        try:
            self.seconds(work, 1)
            return self.seconds(work, 1)
        except Exception as error:
            note(self, part, error)
            return None


def note(text, part, error):
    """Says why a part is not timed: its name is another in this text, or it is at fault."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    print(f"note: {text.script.__file__}: not timed, {part}: {reason}", file=sys.stderr)


def import_script(name, folder, text):
    """The module of folder/name.py; `text` is new or old, so that both have names of their own."""
    spec = importlib.util.spec_from_file_location(f"{text}_{name}", Path(folder) / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def overrides_of(script, config, device, batch_size):
    """Fields of Config that make it TOY, or the paper's, which on a CPU has small batches."""
    if config == "toy":
        return script.TOY | {"device": device}
    overrides = {"device": device}
    if device == "cpu":
        overrides["batch_size"] = max(batch_size, SMALLEST_BATCH.get(script.NAME, 1))
    return overrides


def prepare(script, overrides):
    """-> a Text. Fields that its Config lacks are left out."""
    known = {field.name for field in fields(script.Config)}
    cfg = script.Config(**{name: value for name, value in overrides.items() if name in known})
    with contextlib.redirect_stdout(io.StringIO()):
        corpus = script.load_corpus(cfg)
    torch.manual_seed(0)
    model = script.Model(cfg, len(corpus.speakers)).to(cfg.device)
    script.prepare(model, corpus, cfg)
    return Text(script, cfg, corpus, model, script.make_optimizers(model, cfg))


# ---------- the first form: one text ----------


def share_of_batches(text, times):
    """Runs so many steps -> seconds per step, share of them spent waiting for get_batch."""
    load = text.script.get_batch
    waited = []

    def timed_load(*args, **options):
        began = time.perf_counter()
        batch = load(*args, **options)
        waited.append(time.perf_counter() - began)
        return batch

    text.script.get_batch = timed_load
    seconds = text.seconds(text.train_step, times)
    text.script.get_batch = load
    return seconds, sum(waited) / (seconds * times)


def peak_memory(device):
    """In GiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def samples_per_second(text, seconds):
    """Of waveform that convert makes from one stream of so many seconds."""
    cfg = text.cfg
    wave = text.corpus.wave(0)[: int(cfg.sample_rate * seconds)].to(cfg.device)
    target = 0 if text.script.TARGET == "speaker" else wave
    model = text.model.eval()

    def convert(wave):
        text.script.convert(model, [wave], [target], cfg)

    convert(wave[: 2 * cfg.win])  # warm
    return len(wave) / text.seconds(lambda: convert(wave), 1)


def measure(name, config, device, batch_size):
    """Prints the lines of one script and configuration."""
    script = import_script(name, ROOT, "new")
    text = prepare(script, overrides_of(script, config, device, batch_size))
    is_slow = config == "paper" and device == "cpu"
    warm, times = (1, 5) if is_slow else (3, 20)
    label = f"{config:6} {device:5}"

    text.seconds(text.train_step, warm)
    seconds, share = share_of_batches(text, times)
    audio = text.cfg.batch_size * text.cfg.crop / text.cfg.sample_rate
    parts = text.parts()
    columns = [f"{name:15} {label} batch {text.cfg.batch_size:3}  {1000 * seconds:9.1f} ms/step"]
    bare = parts.pop("bare", None)
    if bare and text.warm("bare", bare) is not None:
        columns.append(f"bare {1000 * text.seconds(bare, times):9.1f} ms")
    columns.append(f"{audio / seconds:8.1f} x real time  data {share:6.2%}")
    columns.append(f"{peak_memory(device):5.2f} GiB")
    if script.TARGET:
        rate = samples_per_second(text, 0.1 if is_slow else 1.0)
        columns.append(f"convert {rate:9.0f} samples/s")
    print("  ".join(columns), flush=True)

    text.model.train()
    for part, work in parts.items():
        if text.warm(part, work) is not None:
            milliseconds = 1000 * text.seconds(work, times)
            print(f"{'':15} {label} {part:15} {milliseconds:9.1f} ms", flush=True)


def measure_reading(name):
    """Prints a line: files at three times the sample rate, read one after another."""
    script = import_script(name, ROOT, "new")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{i:02d}.wav") for i in range(61)]
        for path in paths:
            noise = 0.1 * rng.standard_normal(int(48000 * rng.uniform(2, 7)))
            soundfile.write(path, noise, 48000)
        script.read_audio(paths.pop(), 16000)  # warm
        began = time.perf_counter()
        heard = sum(len(script.read_audio(path, 16000)) for path in paths) / 16000
        seconds = time.perf_counter() - began
    speed = f"{seconds:.2f} s  {heard / seconds:8.1f} x real time"
    print(f"{'reading':15} 60 files of 48 kHz at 16 kHz  {speed}", flush=True)


# ---------- the second form: two texts ----------


def take_turns(texts, works, part, repeats):
    """Two texts and a function of each -> [(seconds per call of old, of new)], one a repeat.

    None if a text lacks the part. Who goes first alternates, and both make equally many calls.
    """
    warm = [text.warm(part, work) if work else None for text, work in zip(texts, works)]
    if None in warm:
        return None
    is_serial = texts[0].cfg.device == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_serial else time.perf_counter
    times = math.ceil(SECONDS_A_TURN / max(warm))

    rows = []
    for repeat in range(repeats):
        row = [0.0, 0.0]
        order = (0, 1) if repeat % 2 == 0 else (1, 0)
        for i in order:
            row[i] = texts[i].seconds(works[i], times, clock)
        rows.append(row)
    return rows


def differences(old, new):
    """Fields of the two Configs that are not equal, as text."""
    values = [{field.name: getattr(cfg, field.name) for field in fields(cfg)} for cfg in (old, new)]
    lines = []
    for name in dict.fromkeys([*values[0], *values[1]]):
        before = values[0].get(name, "no such field")
        now = values[1].get(name, "no such field")
        if before != now:
            lines.append(f"{name}: {before} -> {now}")
    return "; ".join(lines)


def print_turns(label, rows):
    """The medians of both texts in milliseconds, and new / old; "-" without rows."""
    if rows is None:
        print(f"{label}  {'-':>12}", flush=True)
        return
    old, new = (1000 * statistics.median(row[i] for row in rows) for i in (0, 1))
    ratios = [row[1] / row[0] for row in rows]
    ratio = f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    print(f"{label}  {old:9.1f} ms old  {new:9.1f} ms new  new / old {ratio}", flush=True)


def measure_against(name, config, device, batch_size, folder, repeats):
    """Prints the lines of one script and configuration, this text beside that of `folder`."""
    scripts = [import_script(name, folder, "old"), import_script(name, ROOT, "new")]
    overrides = overrides_of(scripts[1], config, device, batch_size)
    texts = [prepare(script, overrides) for script in scripts]
    different = differences(*[text.cfg for text in texts])
    if different:
        print(f"note: {name} {config}: {different}", file=sys.stderr)
    label = f"{name:15} {config:6} {device:5} batch {texts[1].cfg.batch_size:3}"

    steps = [text.train_step for text in texts]
    rows = take_turns(texts, steps, "step", repeats)
    print_turns(f"{label}  {'step':15}", rows)
    parts = [text.parts() for text in texts]
    for part in dict.fromkeys([*parts[1], *parts[0]]):
        works = [of_text.get(part) for of_text in parts]
        rows = take_turns(texts, works, part, repeats)
        print_turns(f"{label}  {part:15}", rows)


# ---------- the command ----------


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=f"of {', '.join(NAMES)} [all]")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU [1]")
    parser.add_argument("--batch-size", type=int, default=1, help="paper's, on a CPU [1]")
    parser.add_argument("--against", metavar="DIR", help="folder of an earlier text of the scripts")
    parser.add_argument("--repeats", type=int, default=9, help="turns with --against [9]")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # what a process of its own measures
    flags = parser.parse_args()
    for name in flags.scripts:
        if name not in NAMES:
            parser.error(f"{name}: no such script; choose of {', '.join(NAMES)}")
    flags.scripts = flags.scripts or list(NAMES)
    for name in flags.scripts:
        if flags.against and not Path(flags.against, f"{name}.py").is_file():
            parser.error(f"--against {flags.against}: there is no {name}.py")
    return flags


def measure_case(flags):
    """In a process of its own, so that peak memory is that of one script and configuration."""
    (name,) = flags.scripts
    config, device = flags.case.split("-")
    if flags.against:
        measure_against(name, config, device, flags.batch_size, flags.against, flags.repeats)
    else:
        measure(name, config, device, flags.batch_size)


def main():
    flags = parse()
    torch.set_num_threads(flags.threads)
    if flags.case:
        measure_case(flags)
        return

    devices = ["cpu"]
    gpu = "no GPU: not measured on one"
    if torch.cuda.is_available():
        devices.append("cuda")
        gpu = torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {flags.threads} CPU threads, {gpu}", flush=True)

    options = [f"--threads={flags.threads}", f"--batch-size={flags.batch_size}"]
    options.append(f"--repeats={flags.repeats}")
    if flags.against:
        options.append(f"--against={flags.against}")
    for name in flags.scripts:
        for device in devices:
            for config in ("toy", "paper"):
                case = f"--case={config}-{device}"
                command = [sys.executable, __file__, name, case, *options]
                if subprocess.run(command).returncode:
                    print(f"{name} {config} {device} failed", flush=True)
    if not flags.against:
        measure_reading(flags.scripts[0])


if __name__ == "__main__":
    main()
