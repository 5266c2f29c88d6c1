# SPDX-License-Identifier: MIT
"""What the six scripts share is the same text, and knows no more of the method than the contract says.

python tests/test_shared.py --spread vqvae.py   copies vqvae.py's shared blocks to the others
python tests/test_shared.py --figures           prints how large and how dense each script is
"""

import ast
import builtins
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
BLOCKS = ("audio", "spectrum", "corpus", "toy", "main")
BANNER = "# ==================== shared: "
CONTRACT = set(
    "Config TOY TARGET Model prepare make_optimizers train_step represent convert sample".split()
)
HEADER = {"NAME", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
COMMON = (
    "data test out include speaker sample_rate n_fft win hop n_mels crop batch_size steps lr seed "
    "device bf16 log_every save_every"
).split()
ORDER = "Config Model prepare make_optimizers train_step represent convert sample".split()

# Size is counted in syntax-tree nodes, expressions and statements, which no way of writing can
# shrink. The toy voices are the data of the quick start, and are counted by themselves.
PLUMBING_NODES = 3740
TOY_NODES = 420
NODES_PER_LINE = 8.5
METHOD_NODES = dict.fromkeys(SCRIPTS, 2600) | {"vqvae": 3000, "adain_vc": 1800}

DOCSTRING_LINES = 60
SECTIONS = (
    "Paper",
    "Idea",
    "Model",
    "Loss",
    "Symbols",
    "Differs from the paper",
    "Not specified in the paper",
    "Usage",
)
PARTS = (
    "# ---------- model ----------",
    "# ---------- loss and training step ----------",
    "# ---------- representation, conversion, sampling ----------",
)


def text(name):
    return (ROOT / f"{name}.py").read_text()


def method_part(source):
    return source[: source.index(BANNER)]


def shared_part(source):
    return source[source.index(BANNER) :]


def blocks(source):
    """The shared blocks by name; each goes on to the next banner."""
    parts = shared_part(source).split(BANNER)[1:]
    return {part.split(" ")[0]: BANNER + part for part in parts}


def imports(source):
    """From the first import to the last line of the header."""
    end = source.index("LOCAL_RANK = ")
    return source[source.index("import argparse\n") : source.index("\n", end)]


def spread(origin):
    """Copies the shared blocks and the header of one script to the others."""
    source = Path(origin).read_text()
    for name in SCRIPTS:
        path = ROOT / f"{name}.py"
        if path.exists():
            mine = method_part(path.read_text()) + shared_part(source)
            path.write_text(mine.replace(imports(mine), imports(source)))


def nodes(source):
    """How many expressions and statements there are in a text."""
    tree = ast.walk(ast.parse(source))
    return sum(isinstance(node, ast.expr | ast.stmt) for node in tree)


def nodes_per_line(source):
    """Nodes per line of code: without blank lines, comments, docstrings and imports."""
    tree = ast.parse(source)
    lines = {i for i, line in enumerate(source.splitlines(), 1) if line.strip()}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            lines.discard(token.start[0])
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    counted = [n for n in ast.walk(tree) if isinstance(n, ast.expr | ast.stmt)]
    return sum(node.lineno in lines for node in counted) / len(lines)


def top_level(tree):
    """Names that a module defines at top level, imports aside."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def imported(tree):
    """Names that import statements bring in."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    return [alias.asname or alias.name.split(".")[0] for node in found for alias in node.names]


def modules(path):
    """Names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_blocks_are_in_order_and_identical(name):
    mine = blocks(text(name))
    assert tuple(mine) == BLOCKS
    assert mine == blocks(text(SCRIPTS[0]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_method_comes_first_and_plumbing_last(name):
    defined = list(top_level(ast.parse(method_part(text(name)))))
    assert [n for n in defined if n in ORDER] == ORDER
    assert CONTRACT <= set(defined)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shared_code_knows_the_contract_alone(name):
    """Every global that a shared block reads is its own, imported, built in or of the contract."""
    source = text(name)
    shared = ast.parse(shared_part(source))
    names = [node for node in ast.walk(shared) if isinstance(node, ast.Name)]
    own = set(top_level(shared)) | set(imported(ast.parse(source))) | set(dir(builtins))
    local = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    local |= {node.arg for node in ast.walk(shared) if isinstance(node, ast.arg)}
    definitions = ast.FunctionDef | ast.ExceptHandler
    local |= {node.name for node in ast.walk(shared) if isinstance(node, definitions)}
    read = {node.id for node in names} - own - local - HEADER - {"__name__", "__file__", "__doc__"}
    assert read <= CONTRACT, read - CONTRACT

    of_cfg = {
        node.attr
        for node in ast.walk(shared)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "cfg"
    }
    assert of_cfg <= set(COMMON), f"fields of the method in shared code: {of_cfg - set(COMMON)}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_are_the_same_lines_and_allowed(name):
    assert imports(text(name)) == imports(text(SCRIPTS[0]))
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "soundfile"}
    assert set(modules(ROOT / f"{name}.py")) <= allowed


def test_tests_import_nothing_else_either():
    own = {path.stem for path in (ROOT / "tests").glob("*.py")}
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "soundfile", "pytest"} | own
    for path in (ROOT / "tests").glob("*.py"):
        assert set(modules(path)) <= allowed | set(SCRIPTS), path.name


@pytest.mark.parametrize("name", SCRIPTS)
def test_common_part_of_config(name):
    """Same names, types and comments in the same order, and the same check of the values."""

    def common(source):
        config = source[source.index("class Config:") :]
        fields = config.split("\n\n")[1].splitlines()
        check = config[config.index("    def __post_init__") :].splitlines()[:10]
        return [re.sub(r" = .*?  #", "  #", line) for line in fields], check

    assert common(text(name)) == common(text(SCRIPTS[0]))
    fields = common(text(name))[0]
    assert [line.split(":")[0].strip() for line in fields] == COMMON


def unused(name):
    """Names that a script defines or imports and never reads."""
    tree = ast.parse(text(name))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    read = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    return (set(top_level(tree)) | set(imported(tree))) - read - CONTRACT


def test_nothing_is_unused():
    """A shared function may be of no use to one method, but not to all six."""
    of_all = set.intersection(*(unused(name) for name in SCRIPTS))
    assert not of_all, of_all
    for name in SCRIPTS:
        own = unused(name) - set(top_level(ast.parse(shared_part(text(name)))))
        assert not own, (name, own)


@pytest.mark.parametrize("name", SCRIPTS)
def test_budgets(name):
    source = text(name)
    toy = nodes(blocks(source)["toy"])
    assert toy <= TOY_NODES
    assert nodes(shared_part(source)) - toy <= PLUMBING_NODES
    assert nodes(method_part(source)) <= METHOD_NODES[name]
    assert nodes_per_line(source) <= NODES_PER_LINE
    assert nodes_per_line(shared_part(source)) <= NODES_PER_LINE
    wide = [line for line in source.splitlines() if len(line) > 100]
    assert not wide, wide
    assert source.startswith("# SPDX-License-Identifier: MIT\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_docstring_and_method_have_the_same_sections(name):
    """At most 60 lines with the same titles in the same order, and three parts below it."""
    source = text(name)
    doc = ast.get_docstring(ast.parse(source)).splitlines()
    assert len(doc) <= DOCSTRING_LINES
    titles = [title for line in doc for title in SECTIONS if re.match(rf"{title}(  |$)", line)]
    assert titles == list(SECTIONS)
    parts = [line for line in method_part(source).splitlines() if line.startswith("# ----")]
    assert parts == list(PARTS)


def test_size_counts_what_is_there():
    """A line that is split counts the same; a denser line counts more."""
    assert nodes("x = f(a, b)") == nodes("x = f(\n    a,\n    b,\n)") == 6
    assert nodes_per_line('"""doc"""\n\n# note\nx = f(a, b)\n') == 6
    assert nodes_per_line("import os\nx = 1\ny = 2\n") == 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_departures_and_silences_are_tagged_in_docstring_and_code(name):
    source = text(name)
    doc = ast.get_docstring(ast.parse(source))
    code = source.replace(doc, "")

    def tags(part):
        return set(re.findall(r"\b[DU]\d+\b", part))

    assert tags(doc) and tags(doc) == tags(code), tags(doc) ^ tags(code)
    for letter in "DU":
        numbers = sorted(int(tag[1:]) for tag in tags(doc) if tag[0] == letter)
        assert numbers == list(range(1, len(numbers) + 1)), f"{letter} tags skip one: {numbers}"


@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_say_what_they_do(name):
    """A docstring on every function and class of more than eight lines."""
    for node in ast.walk(ast.parse(text(name))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[:2] != "__":
            if node.end_lineno - node.lineno > 8 and node.name != "forward":
                assert ast.get_docstring(node), node.name


def test_spread_copies_blocks(tmp_path, monkeypatch):
    """--spread makes a drifted copy equal again and leaves its method alone."""
    source = text("vqvae")
    (tmp_path / "vqvae.py").write_text(source)
    drifted = source.replace("def stft(wave, cfg):", "def stft(wave, cfg, drifted=0):")
    drifted = drifted.replace("codes: int = 512", "codes: int = 513")
    drifted = drifted.replace("import json\n", "")
    assert drifted.count("\n") == source.count("\n") - 1
    (tmp_path / "cpc.py").write_text(drifted)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    spread(tmp_path / "vqvae.py")
    expected = source.replace("codes: int = 512", "codes: int = 513")
    assert (tmp_path / "cpc.py").read_text() == expected


def figures():
    """Prints lines, nodes and nodes per line of each script."""
    print("file              lines  method  plumbing  toy  nodes a line")
    for name in SCRIPTS:
        source = text(name)
        toy = nodes(blocks(source)["toy"])
        counts = nodes(method_part(source)), nodes(shared_part(source)) - toy, toy
        lines = source.count("\n")
        print(f"{name + '.py':17} {lines:5}  {counts[0]:6}  {counts[1]:8}  {counts[2]:3}", end="  ")
        print(f"{nodes_per_line(source):12.1f}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--figures"]:
        figures()
    elif len(sys.argv) == 3 and sys.argv[1] == "--spread" and Path(sys.argv[2]).is_file():
        spread(sys.argv[2])
    else:
        sys.exit("usage: python tests/test_shared.py --spread SCRIPT.py | --figures")
