# SPDX-License-Identifier: MIT
"""The README's commands exist, its Python runs, and its figures are those of the runs kept in tests/results.

    python tests/test_readme.py --write      renders the result tables anew from tests/results/*.json
"""
import hashlib
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
NAMES = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
MARKS = "<!-- results: rendered by tests/test_readme.py --write -->\n", "<!-- end of results -->\n"


def current(script):
    """What a run of the script as it now stands writes into result.json as sha256."""
    return hashlib.sha256((ROOT / f"{script}.py").read_text().split('"""', 2)[2].encode()).hexdigest()


def render():
    """Markdown of every run in tests/results: for each script and data a table, and a line on each run. Runs that differ
    by their seed alone share a row, and the line is of the first. A run of an older text of its script is marked stale."""
    groups, parts = {}, []
    for path in sorted((ROOT / "tests" / "results").glob("*.json"), key=lambda path: (len(path.stem), path.stem)):
        run = json.loads(path.read_text())
        groups.setdefault((run["script"], run["data"]["folder"], run["config"]["sample_rate"]), []).append(run)
    percent = lambda values: "" if None in values else ", ".join(f"{value:.1%}" for value in values).replace("%,", ",")
    for (script, folder, rate), runs in sorted(groups.items(), key=lambda item: NAMES.index(item[0][0])):
        data, alike = runs[0]["data"], {}
        for run in runs:
            alike.setdefault(str({k: v for k, v in run["config"].items() if k not in ("seed", "out")}), []).append(run)
        parts += [f"### `{script}.py` on {folder}", "", f"{data['minutes']} minutes of {data['speakers']} speakers, at "
                  f"{rate} Hz.", "", "| run | | phone | speaker | EER |", "|---|---|---|---|---|"]
        for same in alike.values():
            names = [*same[0]["representations"]]
            names = ["chance", *names] if same[0] is runs[0] else [name for name in names if name != "log-mel"]
            for i, name in enumerate(names):
                rows = [run["chance"] if name == "chance" else run["representations"][name] for run in same]
                rows = rows[:1] if name in ("chance", "log-mel") else rows
                cells = [percent([row[k] for row in rows]) for k in ("phone", "speaker", "eer")]
                parts += [f"| {title(same) if i == 0 else ''} | {name} | {' | '.join(cells)} |"]
        parts += [""]
        for run, *more in alike.values():
            line = [f"{run['steps']} steps, {run['seconds']:.0f} s in all, {run['hardware']}, torch {run['torch']}"]
            if voice := run["conversion"]:
                line += [f"of {voice['pairs']} conversions {voice['target']:.0%} heard as the target, "
                         f"{voice['source']:.0%} as the source (copy synthesis: {voice['copy']['source']:.0%} as themselves)"]
                line += [f"{voice['phones']:.0%} of their frames keep the phone ({voice['copy']['phones']:.0%})"] \
                    if voice["phones"] is not None else []
            for name, value in run["metrics"].items():
                value = ", ".join(f"{k} {v:.2f}" for k, v in value.items()) if isinstance(value, dict) else f"{value:.4g}"
                line += [f"{name} {value}".replace("_", " ")]
            fresh = all(r["sha256"] == current(script) for r in (run, *more))
            parts += [f"* {title([run])}{'' if fresh else ' **(stale: the script has changed since)**'}: {'; '.join(line)}."]
        parts += [""]
    return "\n".join(parts)


def title(runs):
    seeds = ", ".join(str(run["config"]["seed"]) for run in runs[1:])
    return f"`{runs[0]['command']}`" + f" and seeds {seeds}" * bool(seeds)


def section():
    return README.read_text().split(MARKS[0])[1].split(MARKS[1])[0]


def test_results_are_those_of_the_runs():
    assert section() == render(), "run python tests/test_readme.py --write"


def test_every_script_is_listed_and_no_other():
    listed = re.findall(r"^\| \[`(\w+)\.py`\]", README.read_text(), re.M)
    assert listed == SCRIPTS


def test_first_screen_has_the_two_commands():
    head = README.read_text()[:2500]
    assert "pip install -r requirements.txt && python vqvae.py" in head
    assert "pip install -r requirements.txt && python -m pytest" in README.read_text()


def commands():
    for line in README.read_text().splitlines():
        found = re.match(r"    (?:.*&& )?(?:torchrun --nproc_per_node \d+ |python )(\w+)\.py\b(.*)", line)
        if found:
            yield found[1], re.split(r"\s{4,}", found[2])[0]


@pytest.mark.parametrize("script, rest", list(commands()))
def test_commands_parse(script, rest):
    """Each command line of the README is one that the script understands."""
    mode, given, flags = importlib.import_module(script).parse(shlex.split(rest))
    assert mode in ("train", "convert", "encode", "evaluate")


def test_flags_that_the_text_names_exist():
    text = README.read_text()
    help_text = "".join((ROOT / f"{s}.py").read_text() for s in SCRIPTS)
    for flag in set(re.findall(r"`(--[a-z-]+)", text)):
        name = flag[2:].replace("-", "_")
        assert re.search(rf'^    {name}: |"{name}"', help_text, re.M) or name == "spread", flag


def test_the_python_example_runs(tmp_path, monkeypatch):
    """The example, as it stands, on a model of a few steps and a second of noise."""
    import numpy as np
    import soundfile as sf
    import vqvae
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for speaker in ("ann", "bob"):
        (tmp_path / "data" / speaker).mkdir(parents=True)
        for i in range(4):
            sf.write(tmp_path / "data" / speaker / f"{i}.wav", 0.1 * rng.normal(size=8000), 8000)
    monkeypatch.setattr(vqvae, "report", lambda *args: None)
    tiny = "--toy --steps 1 --batch-size 2 --channels 8 --residual 8 --skip 8 --depth 3 --codes 4"
    assert vqvae.main(["--data", "data", "--out", "runs/a", *tiny.split()]) == 0
    sf.write("a.wav", 0.1 * rng.normal(size=8000), 8000)
    lines = README.read_text().split("    from vqvae import")[1].split("\n\n")[0]
    scope = {}
    exec("from vqvae import" + lines.replace("\n    ", "\n"), scope)
    assert scope["codes"].shape == (50, 64) and scope["other"].shape == (8000,)


if __name__ == "__main__":
    before, after = README.read_text().split(MARKS[0])[0], README.read_text().split(MARKS[1])[1]
    README.write_text(before + MARKS[0] + render() + MARKS[1] + after)
    print(f"{README.name} rendered", file=sys.stderr)
