# SPDX-License-Identifier: MIT
"""What the papers claim, as experiments that anybody can run, with the mechanism on and off.

    python tests/claims.py                            lists the claims
    python tests/claims.py adain-instance-norm        on the toy voices, one seed
    python tests/claims.py adain-instance-norm --seeds 10 11 12 --jobs 2
    python tests/claims.py adain-instance-norm --data DIR --test DIR2 --steps 20000

Trains what is missing under runs/, each arm and seed in a process of its own; measures it with
tests/compare.py, and keeps that as a file NAME.json for each run in --results; prints the figures,
with their range over the seeds, and a verdict. Runs that exist already are not trained again.
"""

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import compare  # noqa: E402
from measure import UserError  # noqa: E402
import page  # noqa: E402
from page import SCRIPTS  # noqa: E402

MARGIN = 0.01  # a difference below this counts as none: a point, or 0.01 nats; twice, of one seed
SLACK = 0.02  # what a figure that should stay may lose
HOLDS = "holds"
IN_PART = "holds in part"
FAILS = "does not hold here"
OPEN = "cannot be told at this size"


@dataclass(frozen=True)
class Arm:
    """One way to train or to measure. An arm with the same flags in another claim is the same run."""

    name: str
    flags: str = ""  # of the script
    options: str = ""  # of tests/compare.py


@dataclass(frozen=True)
class Expect:
    """The paper's claim in figures: "FIGURE of ARM" is lower than "FIGURE of ARM".

    A figure is a path in what compare.py writes, such as content.speaker for a representation, or
    conversion.target. With slack, low may exceed high by so much: it is no worse.
    """

    low: str
    high: str
    slack: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A statement of a paper, the runs that test it, and what would confirm it."""

    short: str  # in at most ten words
    script: str
    paper: str
    statement: str
    reported: str  # the paper's own figures, and where they were read
    arms: tuple
    figures: tuple  # that are shown, as paths
    expects: tuple
    why: dict = field(default_factory=dict)  # {data: explanation of what was measured}


def arms(*pairs):
    """Pairs (name, flags), or (name, flags, options of compare.py) -> Arms."""
    return tuple(Arm(*pair) for pair in pairs)


CLAIMS = {
    "vqvae-codes-are-phones": Claim(
        short="codes map to phones, shuffled codes do not",
        script="vqvae",
        paper="van den Oord 2017, 1711.00937 Sec. 4.3",
        statement="Codes learned without labels stand for phones: a map from each code to its most "
        "frequent phone is far better than the same map of shuffled codes.",
        reported="49.3 % with 128 codes at 25 Hz, 7.2 % with random codes.",
        arms=arms(("vq", "")),
        figures=("ids.majority", "ids.majority_shuffled", "ids.phone"),
        expects=(
            Expect("ids.majority_shuffled of vq", "ids.majority of vq"),
            Expect("untrained.ids.majority of vq", "ids.majority of vq"),
        ),
        why={
            "words": "The labels are whole words here, and half of the frames are silence: single "
            "frames of log-mel itself tell them hardly better than chance, so codes of 20 ms "
            "cannot.",
        },
    ),
    "vqvae-bottleneck-removes-speaker": Claim(
        short="quantization removes the speaker and keeps phones",
        script="vqvae",
        paper="Chorowski 2019, 1901.08810",
        statement="Quantization takes the speaker out of the latents, which an ordinary autoencoder "
        "keeps, and costs few phones.",
        reported="By a summary of the paper: the speaker falls to about 0 % and phones stay.",
        arms=arms(("vq", ""), ("autoencoder", "--bottleneck none")),
        figures=("codes.speaker", "codes.phone", "encoder.speaker", "encoder.phone", "codes.eer"),
        expects=(
            Expect("codes.speaker of vq", "codes.speaker of autoencoder"),
            Expect("codes.phone of autoencoder", "codes.phone of vq", slack=0.1),
        ),
        why={
            "toy": "The codes lose most of the speaker, and 18 points of phones: 64 codes that a "
            "probe reads one at a time. Some of the loss of phones is of neighbors of 20 ms, "
            "since the phones of codes rise to 78 % in the loudest half second, below.",
        },
    ),
    "vqvae-decoder-uses-codes-and-speaker": Claim(
        short="the WaveNet listens to codes and to the speaker index",
        script="vqvae",
        paper="van den Oord 2017, 1711.00937 Sec. 4.3",
        statement="The decoder takes the content from the codes and the voice from the speaker "
        "index, so another index converts the voice.",
        reported="Samples only.",
        arms=arms(("vq", "")),
        figures=(
            "metrics.nats.true",
            "metrics.nats.shuffled",
            "metrics.nats.wrong_speaker",
            "conversion.target",
            "conversion.source",
            "conversion.phones",
        ),
        expects=(
            Expect("metrics.nats.true of vq", "metrics.nats.shuffled of vq"),
            Expect("metrics.nats.true of vq", "metrics.nats.wrong_speaker of vq"),
            Expect("conversion.source of vq", "conversion.target of vq"),
        ),
    ),
    "vqvae-short-context": Claim(
        short="short stretches of few codes hide the speaker",
        script="vqvae",
        paper="Chorowski 2019, 1901.08810",
        statement="Where a probe cannot pool them over a long recording, codes hide more of the "
        "speaker than k-means of the spectrum does, and the more so the fewer there are a second.",
        reported="An experiment of our own. By a summary of the paper: best at 25 or 50 codes a "
        "second.",
        arms=arms(
            ("whole utterance", "", "--clusters 64"),
            ("half a second", "", "--seconds 0.5 --clusters 64"),
            ("25 codes a second, half a second", "--hop 100", "--seconds 0.5 --clusters 64"),
        ),
        figures=(
            "codes.speaker",
            "log_mel_clusters.speaker",
            "log_mel.speaker",
            "codes.phone",
            "log_mel_clusters.phone",
        ),
        expects=(
            Expect("codes.speaker of half a second", "log_mel_clusters.speaker of half a second"),
            Expect(
                "codes.speaker of 25 codes a second, half a second",
                "codes.speaker of half a second",
            ),
        ),
        why={
            "toy": "What a probe reads of the speaker from codes falls from 30 to 13 % in half a "
            "second, where k-means of log-mel keeps 41 %: so pooling explains much, and the "
            "bottleneck still hides more than clusters do. Halving the rate changes little "
            "beyond that.",
        },
    ),
    "fhvae-two-factors": Claim(
        short="mu2 tells the speaker, mu1 hides it",
        script="fhvae",
        paper="Hsu 2017, 1709.07902",
        statement="mu2 tells the speaker and mu1 hides it, without speaker labels; phones are in z1.",
        reported="By slides on the paper, EER on TIMIT without LDA: mu2 2.38 %, mu1 above 20 %, "
        "i-vectors 9.52 to 10.12 %.",
        arms=arms(("alpha 10", "")),
        figures=("mu2.eer", "mu1.eer", "mu2.speaker", "mu1.speaker", "z1.phone", "z2.phone"),
        expects=(
            Expect("mu2.eer of alpha 10", "log_mel.eer of alpha 10"),
            Expect("mu2.eer of alpha 10", "untrained.mu2.eer of alpha 10"),
            Expect("log_mel.eer of alpha 10", "mu1.eer of alpha 10"),
            Expect("z2.phone of alpha 10", "z1.phone of alpha 10"),
        ),
        why={
            "toy": "z1 has more phones than z2 in the mean, but the ranges overlap: with 24 voices "
            "z2 is free to keep some of the content.",
        },
    ),
    "fhvae-alpha": Claim(
        short="a higher alpha lowers the EER of mu2",
        script="fhvae",
        paper="Hsu 2017, 1709.07902",
        statement="The discriminative term sharpens mu2: with alpha 10 its EER is lower than with 0. "
        "It also takes the speaker out of mu1.",
        reported="By slides on the paper, EER of mu2 on TIMIT without LDA, for alpha 0, 0.1, 1, 10: "
        "5.06, 4.91, 3.87, 2.38 %.",
        arms=arms(
            ("alpha 0", "--alpha 0"),
            ("alpha 0.1", "--alpha 0.1"),
            ("alpha 1", "--alpha 1"),
            ("alpha 10", ""),
        ),
        figures=("mu2.eer", "mu2.eer_lda", "mu1.eer", "mu2.speaker", "mu1.speaker"),
        expects=(
            Expect("mu2.eer of alpha 10", "mu2.eer of alpha 0"),
            Expect("mu1.eer of alpha 0", "mu1.eer of alpha 10"),
        ),
    ),
    "fhvae-hierarchical-sampling": Claim(
        short="a small table of utterances does as well",
        script="fhvae",
        paper="Hsu & Glass 2018, 1804.03201",
        statement="A table of a few utterances at a time, often redrawn, does as well as one of all "
        "utterances.",
        reported="No EER was at hand.",
        arms=arms(("256 of the utterances", ""), ("all at once", "--sequences 2000")),
        figures=("mu2.eer", "mu1.eer", "z1.phone", "conversion.target"),
        expects=(
            Expect("mu2.eer of 256 of the utterances", "mu2.eer of all at once", slack=SLACK),
            Expect("z1.phone of all at once", "z1.phone of 256 of the utterances", slack=SLACK),
        ),
        why={
            "toy": "The small table does better at separating: with all utterances in it at once, "
            "mu1 keeps the speaker (EER 25 %) and conversion fails. A likely reason: a table "
            "is refilled by the closed form when it has been passed through, which is rare "
            "for a large one in 3,200 steps, so its rows follow the encoder late. Longer "
            "training was not tried.",
        },
    ),
    "adversarial-weight": Claim(
        short="the adversary removes the speaker and helps conversion",
        script="adversarial_vc",
        paper="Chou 2018, 1804.02812",
        statement="The classifier that the encoder works against takes the speaker out of the "
        "latent, leaves the phones, and lets a conversion sound like the target.",
        reported="No figure was at hand.",
        arms=arms(
            ("weight 0", "--adversary 0"),
            ("weight 0.01", ""),
            ("weight 0.1", "--adversary 0.1"),
            ("weight 1", "--adversary 1"),
        ),
        figures=(
            "content.speaker",
            "content.phone",
            "conversion.target",
            "conversion.source",
            "conversion.phones",
        ),
        expects=(
            Expect("content.speaker of weight 0.01", "content.speaker of weight 0"),
            Expect("content.speaker of weight 0.1", "content.speaker of weight 0"),
            Expect("content.phone of weight 0", "content.phone of weight 0.1", slack=SLACK),
            Expect("conversion.target of weight 0", "conversion.target of weight 0.1"),
        ),
        why={
            "toy": "The adversary has little to remove: instance normalization in the encoder leaves "
            "13 % at weight 0. Weights of 0.1 and 1 lower that to 9 and 8 %, but cost 8 and "
            "14 points of phones, and the conversion gains nothing, since the decoder's "
            "speaker table settles the voice either way.",
        },
    ),
    "adversarial-without-norm": Claim(
        short="without instance normalization the adversary removes the speaker",
        script="adversarial_vc",
        paper="Chou 2018, 1804.02812",
        statement="Where the encoder has no instance normalization, the adversary alone takes the "
        "speaker out of the latent, and leaves the phones.",
        reported="An experiment of our own; the encoder in the authors' code has the norm.",
        arms=arms(
            ("weight 0", "--adversary 0 --instance-norm false"),
            ("weight 0.1", "--adversary 0.1 --instance-norm false"),
        ),
        figures=(
            "content.speaker",
            "content.eer",
            "content.phone",
            "conversion.target",
            "conversion.source",
            "conversion.phones",
        ),
        expects=(
            Expect("content.speaker of weight 0.1", "content.speaker of weight 0"),
            Expect("content.phone of weight 0", "content.phone of weight 0.1", slack=SLACK),
            Expect("conversion.target of weight 0", "conversion.target of weight 0.1"),
        ),
        why={
            "toy": "Even without the norm the adversary has little to do: training alone brings the "
            "speaker in the latent from 94 % (untrained) to 26 %. The decoder is given the "
            "speaker, so the latent need not carry it.",
        },
    ),
    "adversarial-stage-2": Claim(
        short="the GAN restores the variance of speech",
        script="adversarial_vc",
        paper="Chou 2018, 1804.02812",
        statement="The GAN of stage 2 brings the variance over time of conversions nearer to that of "
        "real speech.",
        reported="No figure was at hand.",
        arms=arms(("both stages", ""), ("stage 1 alone", "--gan-share 0 --steps 800")),
        figures=("conversion.variance", "conversion.target", "conversion.phones"),
        expects=(
            Expect("conversion.variance of both stages", "conversion.variance of stage 1 alone"),
        ),
        why={
            "toy": "Stage 2 of the small model is 80 steps with 8 channels in the critic. It changes "
            "nothing here; what differs between seeds comes from stage 1.",
        },
    ),
    "adain-instance-norm": Claim(
        short="instance normalization removes the speaker, not phones",
        script="adain_vc",
        paper="Chou 2019, 1904.05742",
        statement="Instance normalization in the content encoder takes the speaker out of the "
        "content, and leaves the phones.",
        reported="By a reader's notes, a classifier of speakers on the content: 65.8 % without, "
        "37.5 % with it.",
        arms=arms(("with", ""), ("without", "--instance-norm false")),
        figures=("content.speaker", "content.phone", "content.eer", "speaker.speaker"),
        expects=(
            Expect("content.speaker of with", "content.speaker of without"),
            Expect("content.phone of without", "content.phone of with", slack=SLACK),
        ),
    ),
    "adain-one-shot": Claim(
        short="one recording is a target, thanks to the norm",
        script="adain_vc",
        paper="Chou 2019, 1904.05742",
        statement="One recording of an unseen speaker suffices as target, and the norm is what "
        "makes the conversion sound like it.",
        reported="By a summary: variance, spectrograms and a listening test; no figure was at hand.",
        arms=arms(
            ("with", ""),
            ("without", "--instance-norm false"),
            ("with, target of half a second", "", "--target-seconds 0.5"),
            ("without, target of half a second", "--instance-norm false", "--target-seconds 0.5"),
            ("with, content of 64 channels", "--d-content 64"),
            ("without, content of 64 channels", "--d-content 64 --instance-norm false"),
        ),
        figures=(
            "conversion.target",
            "conversion.source",
            "conversion.target_posterior",
            "conversion.phones",
            "content.speaker",
        ),
        expects=(
            Expect("conversion.source of with", "conversion.target of with"),
            Expect("conversion.target of without", "conversion.target of with"),
            Expect(
                "conversion.target of without, target of half a second",
                "conversion.target of with, target of half a second",
            ),
            Expect(
                "conversion.target of without, content of 64 channels",
                "conversion.target of with, content of 64 channels",
            ),
        ),
        why={
            "toy": "Without the norm the content keeps 79 % of the speaker, yet conversion is as "
            "good, with short targets too: the decoder normalizes as well, and AdaIN then "
            "sets the statistics of every channel, so what the content knows of the speaker "
            "is overwritten. The norm buys a content that can be used by itself. A target of "
            "half a second costs phones rather than the voice.",
            "words": "As on the toy voices, conversion is nearly as good without the norm; it is heard "
            "as the target 4 points more often with it, of one seed and 100 pairs.",
        },
    ),
    "cpc-learns-phones": Claim(
        short="c tells phones and speakers, better than spectra and untrained",
        script="cpc",
        paper="van den Oord 2018, 1807.03748 Table 1",
        statement="A linear probe reads phones from c better than from an untrained network and from "
        "spectral features, and speakers better than from an untrained network.",
        reported="Phones: random 27.6, MFCC 39.7, CPC 64.6 %. Speakers, of single frames: 1.87, 17.6, "
        "97.4 %. The negatives are mixed.",
        arms=arms(
            ("mixed negatives", "--negatives batch"),
            ("current sequence only", "--negatives sequence"),
        ),
        figures=("c.phone", "z.phone", "c.speaker", "z.speaker", "c.eer"),
        expects=(
            Expect("untrained.c.phone of mixed negatives", "c.phone of mixed negatives"),
            Expect("log_mel.phone of mixed negatives", "c.phone of mixed negatives"),
            Expect("untrained.c.speaker of mixed negatives", "c.speaker of mixed negatives"),
        ),
        why={
            "toy": "c is far above the untrained network in phones. It does not pass log-mel, which "
            "tells these synthetic phones at 88 % already. The speaker does not rise: the "
            "probe reads the mean over an utterance, where the untrained network keeps the "
            "long-term spectrum.",
        },
    ),
    "cpc-prediction-steps": Claim(
        short="predicting 12 steps ahead beats 2",
        script="cpc",
        paper="van den Oord 2018, 1807.03748 Table 2",
        statement="Predicting twelve steps ahead teaches more phones than predicting two.",
        reported="Phones for 2, 4, 8, 12, 16 steps: 28.5, 57.6, 63.6, 64.6, 63.8 %.",
        arms=arms(("12 steps", ""), ("2 steps", "--prediction-steps 2")),
        figures=("c.phone", "z.phone", "units.phone", "c.speaker"),
        expects=(Expect("c.phone of 2 steps", "c.phone of 12 steps"),),
    ),
    "cpc-negatives": Claim(
        short="leaving the current sequence out of mixed negatives costs phones",
        script="cpc",
        paper="van den Oord 2018, 1807.03748 Table 2",
        statement="With mixed negatives, leaving out the current sequence costs phones.",
        reported="Phones: same speaker 65.5, current sequence only 65.2, mixed 64.6, same speaker "
        "without the current sequence 64.6, mixed without it 57.3 %.",
        arms=arms(
            ("current sequence only", "--negatives sequence"),
            ("same speaker", "--negatives same-speaker"),
            ("mixed", "--negatives batch"),
            ("mixed without the current sequence", "--negatives other-sequences"),
        ),
        figures=("c.phone", "c.speaker", "units.phone", "units.speaker"),
        expects=(
            Expect("c.phone of mixed without the current sequence", "c.phone of mixed"),
            Expect(
                "c.phone of mixed without the current sequence", "c.phone of current sequence only"
            ),
            Expect("c.phone of mixed", "c.phone of same speaker", slack=SLACK),
        ),
        why={
            "toy": "Phones fall by a point only, but the speaker in c rises from 29 to 52 %, and in "
            "the units from 14 to 26 %: negatives from other utterances alone can be told by "
            "the voice.",
        },
    ),
    "cpc-units": Claim(
        short="units hide the speaker, so a decoder can convert",
        script="cpc",
        paper="Polyak 2021, 2104.00355",
        statement="Clusters of CPC features say what is said and hide who says it, so that a decoder "
        "given another speaker converts the voice. More clusters keep more phones (our addition).",
        reported="Table 2, EER of conversions 4.83 % on VCTK (natural speech 3.25 %), PER 23.58 % "
        "(natural 17.16 %), with 100 units.",
        arms=arms(("25 units", "--units 25"), ("100 units", "--units 100")),
        figures=(
            "c.speaker",
            "units.speaker",
            "units.phone",
            "conversion.target",
            "conversion.source",
            "conversion.phones",
        ),
        expects=(
            Expect("units.speaker of 25 units", "c.speaker of 25 units"),
            Expect("conversion.source of 25 units", "conversion.target of 25 units"),
            Expect("units.phone of 25 units", "units.phone of 100 units"),
        ),
    ),
    "cpc-normalized-units": Claim(
        short="units of c normalized per utterance hide the speaker",
        script="cpc",
        paper="Polyak 2021, 2104.00355",
        statement="The speaker in k-means units comes from the mean and variance of c over an "
        "utterance. Units of standardized c hide it and keep phones.",
        reported="Not in the paper, which clusters an inner layer of a larger CPC.",
        arms=arms(
            ("25 clusters", "", "--clusters 25"),
            ("100 clusters", "", "--clusters 100"),
            ("100 clusters, mixed negatives", "--negatives batch", "--clusters 100"),
        ),
        figures=(
            "c_clusters.speaker",
            "c_normalized_clusters.speaker",
            "c_clusters.phone",
            "c_normalized_clusters.phone",
            "log_mel_clusters.speaker",
            "log_mel_clusters.phone",
        ),
        expects=(
            Expect(
                "c_normalized_clusters.speaker of 100 clusters",
                "c_clusters.speaker of 100 clusters",
            ),
            Expect(
                "c_clusters.phone of 100 clusters",
                "c_normalized_clusters.phone of 100 clusters",
                slack=SLACK,
            ),
        ),
        why={
            "toy": "Standardizing c lowers the speaker in 100 clusters by 3 points in the mean, with "
            "overlapping ranges. More is gained by negatives of the current sequence (29 to "
            "20 %) and by fewer clusters (20 to 10 %).",
        },
    ),
    "dim-local": Claim(
        short="the local objective beats the global one",
        script="dim",
        paper="Hjelm 2019, 1808.06670 Table 3",
        statement="The local objective makes better features to classify than the global one.",
        reported="In the submission, CIFAR10 by an SVM on y: local 49.62, global 29.08, both "
        "18.63 %.",
        arms=arms(
            ("local", ""),
            ("global", "--alpha 1 --beta 0 --gamma 1"),
            ("both", "--alpha 0.5 --beta 0.1"),
        ),
        figures=("global.speaker", "global.eer", "local.speaker", "local.phone"),
        expects=(
            Expect("global.speaker of global", "global.speaker of local"),
            Expect("global.eer of local", "global.eer of global"),
            Expect("local.speaker of global", "local.speaker of local"),
            Expect("local.phone of global", "local.phone of local"),
        ),
        why={
            "toy": "For the speaker local is far above global, as in the paper. Phones of the local "
            "map are the reverse: local lowers them below the untrained network, because a "
            "cell is scored with a vector of the whole crop, and phones do not help to tell "
            "the crop.",
        },
    ),
    "dim-bounds": Claim(
        short="InfoNCE and JSD beat DV",
        script="dim",
        paper="Hjelm 2019, 1808.06670 Tables 1 and 2",
        statement="InfoNCE and the Jensen-Shannon bound classify better than Donsker-Varadhan.",
        reported="In the submission, InfoNCE (there NCE) is best in most cells of Tables 1 and 2; with "
        "few negatives JSD wins; DV is last.",
        arms=arms(("jsd", ""), ("nce", "--objective nce"), ("dv", "--objective dv")),
        figures=("global.speaker", "global.eer", "local.speaker", "local.phone"),
        expects=(
            Expect("global.eer of nce", "global.eer of dv"),
            Expect("global.eer of jsd", "global.eer of dv"),
        ),
        why={
            "toy": "JSD is better than DV by 5 points of EER, with batches of 32; InfoNCE is not.",
        },
    ),
    "dim-pairs": Claim(
        short="pairs of two crops teach the speaker",
        script="dim",
        paper="Ravanelli & Bengio 2019, 1812.00271",
        statement="Pairs of chunks from one utterance make the encoder learn the speaker, which both "
        "share.",
        reported="No figure was at hand.",
        arms=arms(("two crops", "--pair cross"), ("one crop", "")),
        figures=("global.speaker", "global.eer", "local.phone"),
        expects=(
            Expect("global.eer of two crops", "log_mel.eer of two crops"),
            Expect("global.eer of two crops", "global.eer of one crop"),
        ),
        why={
            "toy": "Two crops are better by a point in the mean; the ranges of the seeds overlap.",
        },
    ),
}


# ---------- runs ----------


def data_name(data):
    """The folder of audio -> a word for it in names: words/train is "words", none is "toy"."""
    parts = [part for part in Path(data).parts if part not in ("train", "/", "..")]
    return parts[-1] if parts else "toy"


@dataclass(frozen=True)
class Job:
    """One training: a script, its flags, and the run folder."""

    script: str
    flags: tuple
    folder: Path


def script_flags(args, script, arm, seed):
    """The command line of an arm without --out, and the part of the run's name that tells it apart.

    A flag that repeats the default is left out, so that arms of several claims share a run.
    """
    module = importlib.import_module(script)
    base = vars(module)["TOY"] if args.toy else {}
    _, given = module.parse(arm.flags.split())
    typed = [word[2:].replace("-", "_") for word in arm.flags.split() if word.startswith("--")]
    defaults = {name: base.get(name, getattr(module.Config, name)) for name in typed}
    changed = {name: given[name] for name in typed if given[name] != defaults[name]}

    words = []
    for name, value in changed.items():
        shown = f"{value:g}" if isinstance(value, float) else str(value).lower()
        words += [f"--{name.replace('_', '-')}", shown]
    slug = "-".join(word.lstrip("-") for word in words)
    common = []
    if args.data:
        common += ["--data", args.data]
        common += ["--test", args.test] if args.test else []
        common += ["--toy"] if args.toy else []
    common += ["--steps", str(args.steps)] if args.steps else []
    return (*common, *words, "--seed", str(seed)), slug


def job_of(args, script, arm, seed):
    flags, slug = script_flags(args, script, arm, seed)
    words = [script, data_name(args.data), slug, str(seed)]
    return Job(script, flags, Path("runs", "-".join(word for word in words if word)))


def check_config(job, config):
    """Raises UserError unless this is the configuration that the job asks for."""
    module = importlib.import_module(job.script)
    flags, given = module.parse(list(job.flags))
    toy = module.TOY if flags.toy or not flags.data else {}
    for name, wanted in vars(module.Config(**toy | given)).items():
        if name not in page.NOT_CONFIGURATION and config[name] != wanted:
            raise UserError(f"{job.folder}: trained with another --{name}; move it away")
    if config["seed"] != given["seed"]:
        raise UserError(f"{job.folder}: trained with another --seed; move it away")


def is_trained(job):
    """True if the run is complete, False if it is not or not begun; UserError if it is another."""
    file = job.folder / "run.json"
    if not file.exists():
        if (job.folder / "model.pt").exists():
            checkpoint = torch.load(job.folder / "model.pt", map_location="cpu", weights_only=True)
            check_config(job, checkpoint["config"])
        return False
    run = json.loads(file.read_text("utf-8"))
    check_config(job, run["config"])
    if run["method_sha256"] != method_hash(job.script):
        raise UserError(f"{job.folder}: trained by another version of the method; move it away")
    return True


def method_hash(script):
    """What a run of the script as it now stands writes into run.json as method_sha256."""
    source = (ROOT / f"{script}.py").read_text("utf-8")
    first = source.index("@dataclass(frozen")
    method = source[first : source.index("# ==================== shared")]
    return hashlib.sha256(method.encode()).hexdigest()


def train(job, threads):
    """Trains a run in a process of its own, or goes on with one that was stopped."""
    command = [sys.executable, os.path.relpath(ROOT / f"{job.script}.py"), *job.flags]
    command += ["--out", str(job.folder)]
    if job.folder.exists():
        command.append("--resume")
    print(f"training {job.folder}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{job.folder}: {(done.stderr or done.stdout).strip()[-400:]}")


def train_missing(jobs, at_once):
    """Trains all runs that are not there, so many at once that the cores are shared evenly."""
    missing = [job for job in dict.fromkeys(jobs) if not is_trained(job)]
    threads = max(1, (os.cpu_count() or 1) // at_once)
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(train, job, threads) for job in missing]:
            future.result()


# ---------- figures ----------


def result_file(results, job, options):
    slug = "-".join(word.lstrip("-") for word in options.split())
    return Path(results) / f"{job.folder.name}{'-' * bool(slug)}{slug}.json"


def is_measured(file, folder):
    """True if the file holds the figures of the run as it now is."""
    if not file.exists():
        return False
    run = json.loads((folder / "run.json").read_text("utf-8"))
    kept = read_entry(file)
    return all(kept[name] == run[name] for name in ("method_sha256", "steps", "seconds"))


@torch.no_grad()
def measure_missing(jobs, options, args):
    """Measures all runs whose figures are not there, and writes a file for each."""
    files = {job.folder: result_file(args.results, job, options) for job in jobs}
    missing = [str(folder) for folder, file in files.items() if not is_measured(file, folder)]
    if not missing:
        return
    scripts = {name: importlib.import_module(name) for name in SCRIPTS}
    given = compare.parse([*missing, *options.split()])
    screen = compare.Screen()
    runs, settings = compare.open_runs(given, scripts, screen)
    for number, run in enumerate(runs, 1):
        screen.run = f"[{number}/{len(runs)}] {run.name}"
        entry, _ = compare.measure_run(run, settings[run.name], screen)
        facts = compare.facts([run], given)
        result = {"runs": {run.name: entry}, "seeds": [], "compared": facts}
        file = files[Path("runs", run.name)]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def value(entry, figure):
    """An entry of result.json, a path -> the number, or None where it does not apply.

    "content.speaker" is of a representation; other paths begin with a part of the entry.
    """
    parts = figure.split(".")
    if parts[0] not in entry:
        entry = entry["representations"]
    for part in parts:
        entry = entry.get(part) if isinstance(entry, dict) else None
    return entry


def values(entries, figure):
    """The numbers of several seeds; none if one of them lacks it."""
    numbers = [value(entry, figure) for entry in entries]
    return [] if None in numbers else numbers


def judge(expect, measured):
    """-> 1 if confirmed, -1 if refuted, 0 if it cannot be told, None if it was not measured.

    measured: {arm: entries, one a seed}. Refuted is what differs by less than the margin, or in the
    other direction. Confirmed is what differs by more, with ranges of the seeds that do not overlap.
    """
    low_figure, low_arm = expect.low.split(" of ", 1)
    high_figure, high_arm = expect.high.split(" of ", 1)
    low = values(measured.get(low_arm, []), low_figure)
    high = values(measured.get(high_arm, []), high_figure)
    if not low or not high:
        return None
    difference = sum(high) / len(high) - sum(low) / len(low)
    if expect.slack:
        return 1 if difference >= -expect.slack else -1
    margin = MARGIN if min(len(low), len(high)) > 1 else 2 * MARGIN
    if difference < margin:
        return -1
    return 1 if max(low) < min(high) else 0


def verdict(claim, measured):
    """-> one of the four verdicts. What could not be measured, as without labels, is not confirmed."""
    judged = [judge(expect, measured) for expect in claim.expects]
    if all(one == 1 for one in judged):
        return HOLDS
    if 1 in judged:
        return IN_PART
    return FAILS if -1 in judged else OPEN


def figure_title(figure):
    """A path -> the head of a column."""
    names = {
        "majority": "phone by map",
        "majority_shuffled": "the same, shuffled",
        "target": "heard as target",
        "source": "heard as source",
        "target_posterior": "posterior of target",
        "phones": "phones kept",
        "eer": "EER",
        "eer_lda": "EER, LDA",
        "true": "nats",
        "shuffled": "nats, codes shuffled",
        "wrong_speaker": "nats, wrong speaker",
    }
    *path, last = figure.split(".")
    name = names.get(last, last)
    if path[0] in ("conversion", "metrics"):
        return name
    return f"{path[0].replace('log_mel', 'log-mel').replace('_', ' ')}: {name}"


def is_percent(figure):
    return not figure.startswith("metrics.") and not figure.endswith("variance")


def number_text(figure, numbers):
    """Numbers of several seeds -> mean (low to high)."""
    if not numbers:
        return "\u2013"
    scale, digits = (100, 1) if is_percent(figure) else (1, 2)
    mean = f"{scale * sum(numbers) / len(numbers):.{digits}f}"
    low, high = (f"{scale * end(numbers):.{digits}f}" for end in (min, max))
    if low == high:
        return mean
    return f"{mean} ({low}\u2013{high})"


def references(claim, entries):
    """-> {row: texts}: what the figures are untrained, of log-mel or a copy, and at chance."""
    rows = {"untrained, as the first row": [], "log-mel, or copy synthesis": [], "chance": []}
    for figure in claim.figures:
        path, _, last = figure.rpartition(".")
        is_row = path in entries[0]["representations"]
        untrained = f"untrained.{figure}" if is_row else "none"
        log_mel = f"log_mel.{last}" if is_row else "none"
        if path == "conversion" and last not in ("source", "target_posterior"):
            log_mel = f"copy.{last}"
        chance = f"chance.{last}" if is_row or path == "log_mel" else "none"
        for row, what in zip(rows.values(), (untrained, log_mel, chance)):
            row.append(number_text(figure, values(entries, what)))
    return rows


def table(claim, measured):
    """-> the header and the rows of the figures of a claim, as texts."""
    header = ["", *map(figure_title, claim.figures)]
    rows = []
    for arm in claim.arms:
        entries = measured[arm.name]
        if entries:
            texts = [number_text(figure, values(entries, figure)) for figure in claim.figures]
            rows.append([arm.name, *texts])
    reference = next(entries for entries in measured.values() if entries)
    for name, texts in references(claim, reference).items():
        if set(texts) != {"\u2013"}:
            rows.append([name, *texts])
    return header, rows


def print_table(header, rows):
    """Columns as wide as their widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    for first, *cells in lines:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *numbers]))


# ---------- the command ----------


def list_claims():
    for name, claim in CLAIMS.items():
        print(f"{name}\n    {claim.statement}\n    {claim.paper}: {claim.reported}")
        for arm in claim.arms:
            print(f"    {arm.name}: {' '.join(['', arm.flags, arm.options]).strip() or 'default'}")


def run_claim(name, args):
    """Trains and measures what is missing, and prints the table and the verdict."""
    claim = CLAIMS[name]
    jobs = {
        arm.name: [job_of(args, claim.script, arm, seed) for seed in args.seeds]
        for arm in claim.arms
    }
    train_missing([job for of_arm in jobs.values() for job in of_arm], args.jobs)
    for options in dict.fromkeys(arm.options for arm in claim.arms):
        same = [job for arm in claim.arms if arm.options == options for job in jobs[arm.name]]
        measure_missing(same, options, args)

    measured = {}
    for arm in claim.arms:
        files = [result_file(args.results, job, arm.options) for job in jobs[arm.name]]
        measured[arm.name] = [read_entry(file) for file in files]
    print(f"\n{name}: {claim.statement}\n{claim.paper}: {claim.reported}")
    print_table(*table(claim, measured))
    print(f"\n{verdict(claim, measured)}")


def read_entry(file):
    """A file of one run -> its entry."""
    (entry,) = json.loads(Path(file).read_text("utf-8"))["runs"].values()
    return entry


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="none: list them")
    parser.add_argument("--data", default="", help="folder of audio [the toy voices]")
    parser.add_argument("--test", default="", help="folder of unseen speakers")
    parser.add_argument("--full", action="store_true", help="the full size, which needs a GPU")
    parser.add_argument("--steps", type=int, help="of each training [that of the script]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="[0]")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once [1]")
    parser.add_argument("--results", default="runs/claims", help="folder [runs/claims]")
    args = parser.parse_args(argv)
    args.toy = not args.full
    unknown = [name for name in args.claims if name not in CLAIMS]
    if unknown:
        parser.error(f"{unknown[0]}: no such claim; choose from {', '.join(CLAIMS)}")
    if (args.full or args.test) and not args.data:
        parser.error("--full and --test need --data")
    return args


def main(argv):
    """-> exit code."""
    args = parse(argv)
    if not args.claims:
        list_claims()
    try:
        for name in args.claims:
            run_claim(name, args)
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
