# SPDX-License-Identifier: MIT
"""What the six scripts share is the same text, and knows of the method no more than the contract says.

    python tests/test_shared.py --spread vqvae.py      copies vqvae.py's shared blocks and imports to the others
"""
import ast
import builtins
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
BLOCKS = ("audio", "spectrum", "corpus", "probe", "listen", "page", "main")
CONTRACT = {"Config", "TOY", "TARGET", "Model", "prepare", "make_optimizers", "train_step", "represent", "convert",
            "sample"}
COMMON = ("data test out speaker phones sample_rate n_fft win hop n_mels crop batch_size steps lr seed device bf16 "
          "probe log_every save_every").split()
ORDER = ["Config", "Encoder", "Model", "prepare", "make_optimizers", "train_step", "represent", "convert", "sample"]
METHOD_LINES, SHARED_LINES, COLUMNS = 500, 615, 110
BLOCK = re.compile(r"# =+ shared: (\w+) =+\n.*?# =+ end shared: \1 =+\n", re.S)
IMPORTS = re.compile(r"^import argparse\n.*?^import torch\.nn\.functional as F\n", re.S | re.M)


def text(name):
    return (ROOT / f"{name}.py").read_text()


def blocks(source):
    return {match[1]: match[0] for match in BLOCK.finditer(source)}


def spread(origin):
    """Copies the shared blocks and the imports of one script to the others; a block that a script lacks stays away."""
    source = Path(origin).read_text()
    for name in SCRIPTS:
        path, mine = ROOT / f"{name}.py", text(name)
        for block, new in blocks(source).items():
            if block in blocks(mine):
                mine = mine.replace(blocks(mine)[block], new)
        path.write_text(IMPORTS.sub(lambda _: IMPORTS.search(source)[0], mine, count=1))


def top_level(tree):
    """Names that a module defines at top level, imports aside."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name))


def imported(tree):
    return [alias.asname or alias.name.split(".")[0] for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]


@pytest.mark.parametrize("name", SCRIPTS)
def test_blocks_are_present_in_order_and_identical(name):
    mine, reference = blocks(text(name)), blocks(text(SCRIPTS[0]))
    assert list(mine) == [block for block in BLOCKS if block in mine]
    assert {"audio", "corpus", "probe", "page", "main"} <= set(mine)
    assert all(mine[block] == reference[block] for block in mine if block in reference)


@pytest.mark.parametrize("name", SCRIPTS)
def test_method_comes_first_and_plumbing_last(name):
    source = text(name)
    first = source.index("# ==================== shared: audio")
    tail = BLOCK.sub("", source[first:])
    assert not tail.strip(), f"between or below the shared blocks: {tail.strip()[:80]!r}"
    defined = list(top_level(ast.parse(source[:first])))
    assert [n for n in defined if n in ORDER] == ORDER


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_code_knows_the_contract_alone(name):
    """Every global that a shared block reads is its own, imported, built in or named by the contract."""
    source = text(name)
    shared = ast.parse("".join(blocks(source).values()))
    own = set(top_level(shared)) | set(imported(ast.parse(source))) | set(dir(builtins)) | {"__file__", "__doc__"}
    local = {n.id for n in ast.walk(shared) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    local |= {n.arg for n in ast.walk(shared) if isinstance(n, ast.arg)}
    local |= {n.name for n in ast.walk(shared) if isinstance(n, (ast.FunctionDef, ast.ExceptHandler)) and n.name}
    read = {n.id for n in ast.walk(shared) if isinstance(n, ast.Name)} - own - local
    assert read <= CONTRACT | {"__name__"}, read - CONTRACT
    fields = {n.attr for n in ast.walk(shared) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
              and n.value.id == "cfg"}
    assert fields <= set(COMMON), f"fields of the method in shared code: {fields - set(COMMON)}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_method_keeps_to_the_contract(name):
    names = set(top_level(ast.parse(text(name))))
    assert CONTRACT <= names, CONTRACT - names


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_are_the_same_lines_and_allowed(name):
    source = text(name)
    assert IMPORTS.search(source)[0] == IMPORTS.search(text(SCRIPTS[0]))[0]
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "soundfile"}
    for node in ast.walk(ast.parse(source)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
            [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(module.split(".")[0] in allowed for module in modules), modules


def test_tests_import_nothing_else_either():
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "soundfile", "pytest", *NAMES}
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(module.split(".")[0] in allowed for module in modules), (path.name, modules)


@pytest.mark.parametrize("name", SCRIPTS)
def test_common_fields_of_config(name):
    """Same names, types and comments in the same order; only the values are the method's own."""
    def common(source):
        lines = re.search(r"class Config:\n +\"\"\".*?\"\"\"\n(.*?)\n\n", source, re.S)[1].splitlines()
        return [re.sub(r" = .*?  #", "  #", line) for line in lines]
    assert common(text(name)) == common(text(SCRIPTS[0]))
    assert [line.split(":")[0].strip() for line in common(text(name))] == COMMON


@pytest.mark.parametrize("name", SCRIPTS)
def test_nothing_is_unused(name):
    tree = ast.parse(text(name))
    read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    unused = (set(top_level(tree)) | set(imported(tree))) - read - CONTRACT
    assert not unused, unused


@pytest.mark.parametrize("name", SCRIPTS)
def test_budget(name):
    source = text(name)
    shared = sum(block.count("\n") for block in blocks(source).values())
    assert shared <= SHARED_LINES
    assert source.count("\n") - shared <= METHOD_LINES
    wide = [i for i, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]
    assert not wide, f"lines wider than {COLUMNS}: {wide}"
    assert source.startswith("# SPDX-License-Identifier: MIT\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_departures_and_silences_are_tagged_in_docstring_and_code(name):
    source = text(name)
    doc = ast.get_docstring(ast.parse(source))
    code = source.replace(doc, "")
    tags = lambda part: set(re.findall(r"\b[DU]\d+\b", part))
    assert tags(doc) and tags(doc) == tags(code), tags(doc) ^ tags(code)
    for letter in "DU":
        numbers = sorted(int(tag[1:]) for tag in tags(doc) if tag[0] == letter)
        assert numbers == list(range(1, len(numbers) + 1)), f"{letter} tags are not 1, 2, ..: {numbers}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_say_what_they_do(name):
    """A docstring on every public function and class of more than five lines."""
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.end_lineno - node.lineno > 8:
            if node.name not in ("__init__", "forward", "closure"):
                assert ast.get_docstring(node), node.name


def test_spread_copies_blocks(tmp_path, monkeypatch):
    """--spread makes a drifted copy equal again and leaves its method alone."""
    source = text(SCRIPTS[0])
    (tmp_path / "vqvae.py").write_text(source)
    drifted = source.replace("def stft(wave, cfg):", "def stft(wave, cfg, drifted=0):").replace("lr=4e-3", "lr=5e-3")
    assert drifted != source
    (tmp_path / "cpc.py").write_text(drifted)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "SCRIPTS", ["vqvae", "cpc"])
    spread(tmp_path / "vqvae.py")
    assert (tmp_path / "cpc.py").read_text() == source.replace("lr=4e-3", "lr=5e-3")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--spread" or not Path(sys.argv[2]).is_file():
        sys.exit("usage: python tests/test_shared.py --spread SCRIPT.py")
    spread(sys.argv[2])
