# SPDX-License-Identifier: MIT
"""Renders what README.md and tests/results/ say in figures, from the runs kept in tests/results.

`python tests/test_readme.py --write` writes it into the pages, between their markers, and draws
toy.svg and a figure of some claims; tests/test_readme.py holds the pages to it.
"""

import importlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import claims  # noqa: E402
import page  # noqa: E402

README = ROOT / "README.md"
RESULTS = ROOT / "tests" / "results"
MARKER = "<!-- {}: rendered by python tests/test_readme.py --write -->\n"
END = "<!-- end -->\n"
BANNER = "# ==================== shared: "
DASH = "\u2013"

DATA = {  # name: what it is
    "toy": "24 synthetic training voices, 33 minutes; 16 unseen ones; random strings of 12 phones",
    "words": "40 Arabic words by 18 speakers, 36 minutes; 6 unseen ones; word labels",
    "librispeech": "pieces of 3 s of 200 speakers, 41 minutes; 51 unseen ones; no labels",
    "digits": "strings of digits by 6 speakers, 19 minutes; other takes of the same 6; digit labels",
    "emodb": "188 acted German sentences by 6 speakers, 9 minutes; hand-made phone labels",
}
DRAWN = ("toy",)
DRAWN_CLAIMS = ("adversarial-weight", "cpc-negatives")

PAPERS = {
    "1711.00937": "van den Oord 2017",
    "1901.08810": "Chorowski 2019",
    "1611.01144": "Jang 2017",
    "1709.07902": "Hsu 2017",
    "1804.03201": "Hsu & Glass 2018",
    "1804.02812": "Chou 2018",
    "1904.05742": "Chou 2019",
    "1807.03748": "van den Oord 2018",
    "2104.00355": "Polyak 2021",
    "1808.06670": "Hjelm 2019",
    "1812.00271": "Ravanelli & Bengio 2019",
}
FILES = {  # script: papers, the idea, the loss, labels for training, target
    "vqvae": (
        "1711.00937 1901.08810 1611.01144",
        "one of K codes per 20 ms, spoken by a WaveNet",
        "NLL of samples + code and commitment terms",
        "speakers; target: a training speaker",
    ),
    "fhvae": (
        "1709.07902 1804.03201",
        "two priors: one shared by a sequence, one by all segments",
        "variational bound + log q(sequence given z2)",
        "no labels; target: any recording",
    ),
    "adversarial_vc": (
        "1804.02812",
        "the encoder misleads a speaker classifier; then a GAN sharpens",
        "L1 \u2212 w cross-entropy; then WGAN-GP + cross-entropy",
        "speakers; target: a training speaker",
    ),
    "adain_vc": (
        "1904.05742",
        "instance normalization removes the speaker, AdaIN puts another in",
        "L1 + KL",
        "no labels; target: any recording",
    ),
    "cpc": (
        "1807.03748 2104.00355",
        "tell the future from other frames; decode clusters, F0, speaker",
        "InfoNCE; then L1 of a decoder",
        "speakers, for the decoder; target: a training speaker",
    ),
    "dim": (
        "1808.06670 1812.00271",
        "a critic tells whose embedding it is; no decoder trains the encoder",
        "JSD, DV or InfoNCE bound + prior",
        "no labels; no target",
    ),
}


# ---------- the runs ----------


def load_runs():
    """-> {stem of a file in tests/results: the entry of its run}."""
    files = sorted(RESULTS.glob("*.json"), key=natural_order)
    return {file.stem: claims.read_entry(file) for file in files}


def natural_order(file):
    """A key that sorts vqvae-toy-9 before vqvae-toy-10, and the scripts in their order."""
    words = re.split(r"(\d+)", file.stem)
    script = [file.stem.startswith(name) for name in page.SCRIPTS].index(True)
    return script, [int(word) if word.isdigit() else word for word in words]


def seeds_of(runs, script, data, slug="", options=""):
    """The entries of one configuration, in the order of their seeds."""
    words = [script, data, slug]
    begin = re.escape("-".join(word for word in words if word))
    end = re.escape("-".join(word.lstrip("-") for word in ["", *options.split()]))
    return [entry for stem, entry in runs.items() if re.fullmatch(rf"{begin}-\d+{end}", stem)]


def arms_of(runs, claim, data):
    """-> {arm: entries} of a claim; an arm that was not run has none."""
    args = claims.parse(["--data", data] if data != "toy" else [])
    return {
        arm.name: seeds_of(
            runs,
            claim.script,
            data,
            claims.script_flags(args, claim.script, arm, 0)[1],
            arm.options,
        )
        for arm in claim.arms
    }


def mean(entries, figure, digits=1):
    """The mean over seeds in percent, as text."""
    numbers = claims.values(entries, figure)
    return f"{100 * sum(numbers) / len(numbers):.{digits}f}" if numbers else DASH


# ---------- tables ----------


def markdown(header, rows, left=1):
    """A table; the first columns are aligned left, the others right."""
    rule = ["---" if i < left else "--:" for i in range(len(header))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [header, rule, *rows])


def source(script):
    return (ROOT / f"{script}.py").read_text("utf-8")


def files_table(runs):
    """The six files: papers, idea, loss, what they need, what is heard, lines."""
    header = ["file", "idea", "loss", "needs", "heard as target", "lines"]
    rows = []
    for script, (ids, idea, loss, needs) in FILES.items():
        papers = ", ".join(f"[{PAPERS[i]}](https://arxiv.org/abs/{i})" for i in ids.split())
        method = source(script).split(BANNER)[0].count("\n")
        heard = mean(seeds_of(runs, script, "toy"), "conversion.target", 0)
        heard = DASH if heard == DASH else f"{heard} %"
        link = f"[`{script}.py`]({script}.py)"
        rows.append([f"{link}: {papers}", idea, loss, needs, heard, str(method)])
    return markdown(header, rows, left=4)


def toy_table(runs):
    """One row a representation: trained, then untrained."""
    header = [
        "per cent",
        "phone",
        "speaker",
        "EER",
        "phone, untrained",
        "speaker, untrained",
        "EER, untrained",
    ]
    rows = []
    first = {script: seeds_of(runs, script, "toy") for script in page.SCRIPTS}
    first = {script: entries for script, entries in first.items() if entries}
    reference = first["fhvae"]
    for name, key in (("chance", "chance"), ("log-mel at 8 kHz", "log_mel")):
        rows.append(
            [name, *(mean(reference, f"{key}.{what}") for what in ("phone", "speaker", "eer"))]
        )
        rows[-1] += ["", "", ""]
    for script, entries in first.items():
        for name in entries[0]["representations"]:
            trained = [mean(entries, f"{name}.{what}") for what in ("phone", "speaker", "eer")]
            path = f"untrained.{name}"
            untrained = [mean(entries, f"{path}.{what}") for what in ("phone", "speaker", "eer")]
            rows.append([f"`{script}.py` {name.replace('_', ' ')}", *trained, *untrained])
    return markdown(header, rows)


def claim_lines(runs):
    """One line a claim: what it says, and the verdict on every corpus."""
    lines = []
    for name, claim in claims.CLAIMS.items():
        told = []
        for data in DATA:
            measured = arms_of(runs, claim, data)
            if is_told(claim, measured):
                told.append(f"{data}: {claims.verdict(claim, measured)}")
        link = f"[`{name}`](tests/results/README.md#{name})"
        lines.append(f"* {link} {claim.short}. **{'; '.join(told) or DASH}**\n")
    return "".join(lines)


def is_told(claim, measured):
    """True if all arms were run, and at least one expectation could be judged."""
    return all(measured.values()) and any(
        claims.judge(expect, measured) is not None for expect in claim.expects
    )


# ---------- tests/results/README.md ----------


def full_tables(runs):
    """For each corpus, all that compare.py measures of the default arms: mean (low to high)."""
    parts = []
    for data, about in DATA.items():
        entries = {script: seeds_of(runs, script, data) for script in page.SCRIPTS}
        entries = {script: found for script, found in entries.items() if found}
        if not entries:
            continue
        parts.append(f"### {data}\n\n{about[0].upper()}{about[1:]}.\n\n")
        parts.append(representation_table(entries) + "\n" + spoken_table(entries) + "\n")
    return "".join(parts)


def representation_table(entries):
    columns = ("phone", "speaker", "eer", "eer_lda", "nearest")
    rows = []
    seen = []
    for script, found in entries.items():
        rows += reference_rows(script, found, columns, seen)
        for name in found[0]["representations"]:
            for path, title in ((f"untrained.{name}", "untrained "), (name, "")):
                cells = [cell(found, f"{path}.{column}") for column in columns]
                rows.append([f"`{script}.py` {title}{name.replace('_', ' ')}", *cells])
    header = ["per cent", "phone", "speaker", "EER", "EER, LDA", "nearest"]
    return markdown(header, rows)


def reference_rows(script, found, columns, seen):
    """Chance, and log-mel, where no script before had the same."""
    rows = []
    for key, title in (("chance", "chance"), ("log_mel", f"log-mel of `{script}.py`")):
        cells = [cell(found[:1], f"{key}.{column}") for column in columns]
        if (key, cells) not in seen:
            seen.append((key, cells))
            rows.append([title, *cells])
    return rows


def cell(entries, figure):
    return claims.number_text(figure, claims.values(entries, figure))


def spoken_table(entries):
    columns = ("target", "source", "target_posterior", "phones", "vde", "ffe", "variance")
    rows = []
    for script, found in entries.items():
        for kind in ("conversion", "reconstruction", "copy"):
            if found[0][kind]:
                cells = [cell(found, f"{kind}.{column}") for column in columns]
                rows.append([f"`{script}.py` {kind}", *cells])
    header = ["per cent", "as target", "as source", "posterior", "phones", "VDE", "FFE", "variance"]
    return markdown(header, rows)


def claim_sections(runs):
    """A section a claim: statement, the paper's figure, the command, the tables, the verdicts."""
    return "".join(claim_section(name, claim, runs) for name, claim in claims.CLAIMS.items())


def claim_section(name, claim, runs):
    paper = re.sub(r"(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", claim.paper)
    parts = [f"### {name}\n\n{claim.statement}\n\n**Paper** ({paper}): {claim.reported}\n\n"]
    differ = [arm for arm in claim.arms if arm.flags or arm.options]
    for arm in differ:
        parts.append(f"* {arm.name}: `{' '.join([arm.flags, arm.options]).strip()}`\n")
    parts.append("\n" * bool(differ))
    if name in DRAWN_CLAIMS:
        parts.append(f"![{claim.short}]({name}.svg)\n\n")
    for data in DATA:
        measured = arms_of(runs, claim, data)
        if not is_told(claim, measured):
            continue
        header, rows = claims.table(claim, measured)
        header[0] = f"{data}, {seed_count(measured)}"
        command = f"python tests/claims.py {name}{claim_flags(data, measured)}"
        parts.append(f"```\n{command}\n```\n\n")
        parts.append(markdown(header, rows) + "\n")
        why = claim.why.get(data, "")
        parts.append(f"On {data}: **{claims.verdict(claim, measured)}**. {why}".rstrip() + "\n\n")
    return "".join(parts)


def seed_count(measured):
    """How many seeds the arms have, in words."""
    counts = sorted({len(entries) for entries in measured.values()})
    return f"{' or '.join(map(str, counts))} seed{'s' * (counts[-1] > 1)}"


def claim_flags(data, measured):
    """The flags of tests/claims.py with which the arms were run."""
    entries = max(measured.values(), key=len)
    config = entries[0]["config"]
    flags = ""
    if data != "toy":
        flags = f" --data {config['data']}" + f" --test {config['test']}" * bool(config["test"])
        flags += f" --steps {config['steps']}"
    return f"{flags} --seeds {' '.join(str(entry['config']['seed']) for entry in entries)}"


def run_list(runs):
    """Every run: the command, steps, time, hardware."""
    rows = []
    seen = set()
    for stem, entry in runs.items():
        if entry["command"] in seen:
            continue
        seen.add(entry["command"])
        command = re.sub(r" --out \S+", "", entry["command"])
        minutes = f"{entry['seconds'] / 60:.1f}"
        link = f"[`{command.removeprefix('python ')}`]({stem}.json)"
        rows.append([link, str(entry["steps"]), minutes, entry["hardware"]])
    return markdown(["python ..", "steps", "minutes", "hardware"], rows)


# ---------- pages ----------


def figure(runs, data):
    """SVG text: every representation of the default arms of one corpus."""
    drawn = {}
    for script in page.SCRIPTS:
        for entry in seeds_of(runs, script, data):
            drawn[f"{script}-{entry['config']['seed']}"] = entry
    return page.figure({"runs": drawn})


def claim_figure(runs, name, data):
    """SVG text: the representations of all arms of a claim."""
    drawn = {}
    for arm, entries in arms_of(runs, claims.CLAIMS[name], data).items():
        drawn |= {f"{arm}{' ' * number}": entry for number, entry in enumerate(entries)}
    return page.figure({"runs": drawn})


def fill(text, blocks):
    """A page with what stands between its markers rendered anew."""
    for name, content in blocks.items():
        begin = MARKER.format(name)
        before, rest = text.split(begin)
        text = before + begin + content + rest[rest.index(END) :]
    return text


def render():
    """-> {path: its text as it should be}."""
    runs = load_runs()
    blocks = {
        README: {"files": files_table(runs), "toy": toy_table(runs), "claims": claim_lines(runs)},
        RESULTS / "README.md": {
            "claims": claim_sections(runs),
            "tables": full_tables(runs),
            "runs": run_list(runs),
        },
    }
    pages = {path: fill(path.read_text("utf-8"), block) for path, block in blocks.items()}
    drawings = {f"{data}.svg": figure(runs, data) for data in DRAWN}
    drawings |= {f"{name}.svg": claim_figure(runs, name, "toy") for name in DRAWN_CLAIMS}
    return pages | {RESULTS / name: drawing for name, drawing in drawings.items()}


def parameters(script):
    """Millions of parameters of the full size, with 100 training speakers."""
    module = importlib.import_module(script)
    model = module.Model(module.Config(device="cpu"), 100)
    return sum(p.numel() for p in model.parameters()) / 1e6
