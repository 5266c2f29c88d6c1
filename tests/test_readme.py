# SPDX-License-Identifier: MIT
"""The README's commands exist, its Python runs, and its figures are those of the kept runs.

python tests/test_readme.py --write      renders README.md and tests/results anew, see report.py
"""

import importlib
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import claims  # noqa: E402
import report  # noqa: E402
from report import FILES, README, RESULTS  # noqa: E402


def text(script):
    return (ROOT / f"{script}.py").read_text()


def test_pages_and_figures_are_of_the_kept_runs():
    """Every figure in README.md and in tests/results is what report.py makes of tests/results."""
    for path, expected in report.render().items():
        assert path.read_text("utf-8") == expected, f"{path.name}: run tests/test_readme.py --write"


def test_kept_runs_are_of_the_present_methods():
    for path in RESULTS.glob("*.json"):
        entry = claims.read_entry(path)
        assert entry["method_sha256"] == claims.method_hash(entry["script"]), path.name
        assert "/" not in entry["data"]["folder"].removeprefix("runs/").removesuffix("/train")


def test_readme_is_short():
    page = README.read_text()
    assert page.count("\n") <= 160
    assert len(re.findall(r"\S*\w\S*", page)) <= 1700


def test_tables_are_narrow():
    """No cell holds figures parted by slashes, and no table of the README more than seven columns."""
    for line in README.read_text().splitlines():
        if line.startswith("|"):
            assert line.count("|") <= 8, line
            assert not re.search(r"\d/\d", line), line


def test_first_screen_has_the_two_commands():
    assert "pip install -r requirements.txt && python adain_vc.py" in README.read_text()[:2000]
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
    assert sys.argv[1:] == ["--write"], "usage: python tests/test_readme.py --write"
    for path, content in report.render().items():
        path.write_text(content, "utf-8")
