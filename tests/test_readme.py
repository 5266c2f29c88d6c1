# SPDX-License-Identifier: MIT
"""The README's commands exist, its Python runs, and its table of files is true.

python tests/test_readme.py --write      renders the table of files anew
"""

import hashlib
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
README = ROOT / "README.md"
RESULTS = ROOT / "tests" / "results"
BANNER = "# ==================== shared: "
BEGIN = "<!-- files: rendered by python tests/test_readme.py --write -->\n"
END = "<!-- end of files -->\n"
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
FILES = {  # script: papers, the idea, the loss
    "vqvae": (
        "1711.00937 1901.08810 1611.01144",
        "one of K codes per 20 ms, spoken by a WaveNet",
        "NLL of samples + code and commitment terms",
    ),
    "fhvae": (
        "1709.07902 1804.03201",
        "two priors: one shared by a sequence, one by all segments",
        "variational bound + log q(sequence given z2)",
    ),
    "adversarial_vc": (
        "1804.02812",
        "the encoder misleads a speaker classifier; then a GAN sharpens",
        "L1 - w cross-entropy; then WGAN-GP + cross-entropy",
    ),
    "adain_vc": (
        "1904.05742",
        "instance normalization removes the speaker, AdaIN puts another in",
        "L1 + KL",
    ),
    "cpc": (
        "1807.03748 2104.00355",
        "tell the future from other frames; decode clusters, F0, speaker",
        "InfoNCE; then L1 of a decoder",
    ),
    "dim": (
        "1808.06670 1812.00271",
        "a critic tells whose embedding it is; no decoder in training",
        "JSD, DV or InfoNCE bound",
    ),
}


def text(script):
    return (ROOT / f"{script}.py").read_text()


def files():
    """The table of the six files: papers, idea, loss, lines, parameters of the full size."""
    rows = ["| file | papers | idea | loss | lines: method, all | parameters |"]
    rows.append("|---|---|---|---|---|---|")
    for script, (ids, idea, loss) in FILES.items():
        m = importlib.import_module(script)
        model = m.Model(m.Config(device="cpu"), 100)
        million = sum(p.numel() for p in model.parameters()) / 1e6
        papers = ", ".join(f"[{PAPERS[i]}](https://arxiv.org/abs/{i})" for i in ids.split())
        method = text(script).split(BANNER)[0].count("\n")
        lines = f"{method}, {text(script).count(chr(10))}"
        link = f"[`{script}.py`]({script}.py)"
        rows.append(f"| {link} | {papers} | {idea} | {loss} | {lines} | {million:.1f} M |")
    return "\n".join(rows) + "\n"


def method_hash(script):
    """What a run of the script as it now stands writes into run.json as method_sha256."""
    source = text(script)
    method = source[
        source.index("@dataclass(frozen") : source.index("# ==================== shared")
    ]
    return hashlib.sha256(method.encode()).hexdigest()


def test_the_table_of_files_is_true():
    rendered = README.read_text().split(BEGIN)[1].split(END)[0]
    assert rendered == files(), "run python tests/test_readme.py --write"


def test_stale_results_are_marked():
    """Where a kept run is not of the present method, the README and the page of results say so."""
    runs = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    assert {run["script"] for run in runs} <= set(FILES)
    if any(run.get("method_sha256") != method_hash(run["script"]) for run in runs):
        assert re.search(r"^\*\*Stale:\*\*.*tests/results", README.read_text(), re.M)
        assert "**Stale:**" in (RESULTS / "README.md").read_text()[:500]


def test_first_screen_has_the_two_commands():
    assert "pip install -r requirements.txt && python vqvae.py" in README.read_text()[:2500]
    assert "pip install -r requirements.txt && python -m pytest" in README.read_text()


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("https://arxiv.org/abs/") or (ROOT / target).exists(), target


def commands():
    """The command lines of the README that call a script: (script, flags)."""
    pattern = r"    (?:.*&& )?(?:torchrun --nproc_per_node \d+ |python )(\w+)\.py\b(.*)"
    for line in README.read_text().splitlines():
        if found := re.match(pattern, line):
            yield found[1], re.split(r"\s{4,}", found[2])[0]


@pytest.mark.parametrize("script, rest", list(commands()))
def test_commands_parse(script, rest):
    """Each command line of the README is one that the script understands."""
    flags, _ = importlib.import_module(script).parse(shlex.split(rest))
    assert flags.mode in ("train", "convert", "encode")


def test_flags_that_the_text_names_exist():
    sources = "".join(map(text, FILES)) + (ROOT / "tests" / "compare.py").read_text()
    for flag in set(re.findall(r"`(--[a-z][a-z-]+)", README.read_text())):
        name = flag[2:].replace("-", "_")
        defined = rf'^    {name}: |"{name}"|"{flag}"'
        assert re.search(defined, sources, re.M) or name in ("spread", "figures"), flag


def test_the_python_example_runs(tmp_path, monkeypatch):
    """The example, as it stands, on a model of a few steps and a second of noise."""
    import vqvae

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for speaker in ("ann", "bob"):
        (tmp_path / "data" / speaker).mkdir(parents=True)
        for i in range(4):
            wave = 0.1 * rng.normal(size=8000)
            sf.write(tmp_path / "data" / speaker / f"{i}.wav", wave, 8000)
    monkeypatch.setattr(vqvae, "sample", lambda *_: {})
    tiny = "--toy --steps 1 --batch-size 2 --channels 8 --residual 8 --skip 8 --depth 3 --codes 4"
    assert vqvae.main(["--data", "data", "--out", "runs/a", *tiny.split()]) == 0
    sf.write("a.wav", 0.1 * rng.normal(size=8000), 8000)
    lines = README.read_text().split("    from vqvae import")[1].split("\n\n")[0]
    scope = {}
    exec("from vqvae import" + lines.replace("\n    ", "\n"), scope)
    assert scope["codes"].shape == (50, 64) and scope["ids"].shape == (50,)
    assert scope["other"].shape == (5000,)  # a second at the rate of TOY


def test_the_diffs_exist_and_differ_in_the_method_alone():
    """Each `diff A B` is of two scripts, and names functions and classes that stand in them."""
    pattern = r"`diff (\w+)\.py (\w+)\.py`(.*?)(?=\n\* |\n\n)"
    pairs = re.findall(pattern, README.read_text(), re.S)
    assert len(pairs) >= 5
    for a, b, about in pairs:
        assert a in FILES and b in FILES and a != b
        both = text(a) + text(b)
        for name in re.findall(r"`(\w+)`", about):
            assert re.search(rf"^ *(def|class) {name}\b", both, re.M), name


if __name__ == "__main__":
    page = README.read_text()
    README.write_text(page.split(BEGIN)[0] + BEGIN + files() + END + page.split(END)[1])
