# SPDX-License-Identifier: MIT
"""The page and the figure: they parse, they show what the numbers say, and nothing breaks them."""

import base64
import math
import re
import struct
import sys
import urllib.parse
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import page  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"
# (phone, speaker) trained and untrained. None: a vector, which has no frames.
REPRESENTATIONS = {
    "vqvae": {"encoder": ((0.9, 0.69), (0.67, 0.88)), "codes": ((0.76, 0.45), (0.34, 0.57))},
    "fhvae": {
        "z1": ((0.86, 0.72), (0.44, 0.88)),
        "z2": ((0.74, 0.99), (0.5, 0.93)),
        "mu2": ((None, 0.99), (None, 0.92)),
    },
    "adversarial_vc": {"content": ((0.82, 0.31), (0.58, 0.33))},
    "adain_vc": {"content": ((0.83, 0.31), (0.59, 0.25)), "speaker": ((None, 0.98), (None, 0.99))},
    "cpc": {
        "z": ((0.85, 0.72), (0.41, 0.88)),
        "c": ((0.89, 0.68), (0.48, 0.91)),
        "units": ((0.75, 0.27), (0.36, 0.62)),
    },
    "dim": {"local": ((0.65, 1.0), (0.8, 0.84)), "global": ((None, 1.0), (None, 0.54))},
}
NASTY = '<b>"it\'s" & \udcff\x01 \u00fc'


def make_row(phone, speaker):
    """A row of probe results in which the last column is missing."""
    return {"phone": phone, "speaker": speaker, "eer": 0.4, "eer_lda": 0.3, "nearest": None}


def make_spoken(target):
    """What a judge says."""
    return {"pairs": 100, "target": target, "source": 0.1, "target_posterior": target, "vde": None}


def make_run(script, seed=0, shift=0.0, phones=True):
    """A run of a script with plausible numbers, all phone accuracies moved by shift."""

    def row(place):
        """(phone, speaker) -> a row of results."""
        known = phones and place[0] is not None
        return make_row(place[0] + shift if known else None, place[1])

    names = REPRESENTATIONS[script]
    return {
        "script": script,
        "method_sha256": "0123456789abcdef",
        "command": f"python {script}.py --seed {seed}",
        "config": {"seed": seed, "lr": 1e-3},
        "data": {"folder": "toy", "minutes": 32.9},
        "steps": 1000,
        "seconds": 130.0,
        "hardware": "CPU, 1 thread",
        "torch": "2.13.0",
        "metrics": {"nats": {"true": 3.21, "wrong": None}, "text": "<i>"},
        "chance": row((0.21, 0.125)),
        "log_mel": row((0.91, 0.97)),
        "untrained": {name: row(places[1]) for name, places in names.items()},
        "representations": {name: row(places[0]) for name, places in names.items()},
        "conversion": None if script == "dim" else make_spoken(0.7),
        "reconstruction": make_spoken(0.1),
        "copy": make_spoken(0.0),
    }


def make_result(runs):
    """A result as compare.py makes it."""
    compared = {"data": "runs/toy/train", "test": "runs/toy/test", "seed": 0, "pairs": 100}
    return {"runs": runs, "compared": compared}


def six_runs(**options):
    """A run of each script."""
    return make_result({f"{script}-1": make_run(script, **options) for script in REPRESENTATIONS})


def make_clip(run, kind, seconds, sample_rate, path):
    """A rising tone in noise."""
    n = int(seconds * sample_rate)
    t = np.arange(n) / sample_rate
    wave = np.sin(2 * math.pi * (200 + 300 * t) * t) + 0.01 * np.random.default_rng(n).normal(
        size=n
    )
    target = NASTY if kind == "conversion" else None
    return {
        "run": run,
        "kind": kind,
        "path": path,
        "wave": wave.astype(np.float32),
        "sample_rate": sample_rate,
        "target": target,
    }


def make_material(result, n_rows=2, n_speakers=12):
    """Clips, units, vectors, counts and logs for a result."""
    rows = []
    rng = np.random.default_rng(0)
    for i in range(n_rows):
        clips = [make_clip(None, "source", 1.0, 16000, f"audio/{i} source #1%.wav")]
        clips.append(make_clip(None, "target", 1.5, 16000, f"audio/{i}-target?&\u00fc.wav"))
        units = {}
        for name, run in result["runs"].items():
            clips.append(make_clip(name, "reconstruction", 1.0, 8000, f"audio/{i}-{name}-r.wav"))
            if run["conversion"]:
                clips.append(make_clip(name, "conversion", 1.0, 8000, f"audio/{i}-{name}-c.wav"))
            if run["script"] in ("vqvae", "cpc"):
                ids = rng.integers(0, 64, 50).repeat(2)
                units[name] = {"name": "ids", "ids": ids, "classes": 64}
        row = {
            "utterance": f"u{i} {NASTY}",
            "speaker": NASTY,
            "target_speaker": "s2",
            "seconds": 1.0,
        }
        row |= {"phones": [(0.0, 0.4, "a"), (0.4, 1.0, "<sil>")], "clips": clips, "units": units}
        rows.append(row)

    vectors = {}
    speakers = [f"{NASTY}{i % n_speakers}" for i in range(60)]
    for name, run in result["runs"].items():
        x = rng.normal(size=(60, 8))
        vectors[name] = {key: {"x": x, "speaker": speakers} for key in run["representations"]}
    log = [{"step": s, "loss": 1 / s, "seconds_left": 1.0, "nan": math.nan} for s in (1, 10, 100)]
    usage = {name: {"name": "ids", "counts": rng.integers(0, 9, 64)} for name in rows[0]["units"]}
    return {
        "logs": dict.fromkeys(result["runs"], log),
        "rows": rows,
        "vectors": vectors,
        "usage": usage,
    }


class Reader(HTMLParser):
    """Collects tags, attributes and text, and fails where a tag is not closed in order."""

    VOID = ("meta", "br", "img", "hr", "link", "input")

    def __init__(self, html):
        """Reads the whole text."""
        super().__init__()
        self.open = []
        self.tags = []
        self.words = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        """Remembers a tag."""
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        """A tag closes the last open one."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Remembers text."""
        self.words.append(data)


def decode_png(data):
    """The bytes of a PNG -> (height, width, levels), with all checksums and sizes verified."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = {}
    place = 8
    while place < len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        kind = data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + length]
        (crc,) = struct.unpack(">I", data[place + 8 + length : place + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        place += 12 + length
    assert place == len(data) and list(chunks) == [b"IHDR", b"PLTE", b"IDAT", b"IEND"]
    width, height, depth, color = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, color) == (8, 3)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any() and rows.max() < len(chunks[b"PLTE"]) // 3
    return height, width, rows[:, 1:]


def label_boxes(svg):
    """The boxes of the labels that were placed: {words: (left, top, right, bottom)}, as (words, box)."""
    texts = [t for t in ElementTree.fromstring(svg).iter(f"{SVG}text") if "data-box" in t.attrib]
    return [(t.text, np.array(t.get("data-box").split(), dtype=float)) for t in texts]


def point_centers(svg):
    """The titles of the points and the centers (x, y) of their markers, in px."""
    centers = {}
    for path in ElementTree.fromstring(svg).iter(f"{SVG}path"):
        if "point" in path.get("class", "").split():
            numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", path.get("d"))]
            if "a" in path.get("d"):
                center = (numbers[0] + numbers[2], numbers[1])
            else:
                center = tuple(np.reshape(numbers, (-1, 2)).mean(0))
            centers[path.find(f"{SVG}title").text] = center
    return centers


def overlapping(boxes):
    """The pairs of labels whose boxes share area."""
    pairs = []
    for i, (words, box) in enumerate(boxes):
        for other_words, other in boxes[:i]:
            if page.overlap(box[None], other[None])[0, 0] > 0:
                pairs.append((words, other_words))
    return pairs


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page of six runs: (folder, html, result, material)."""
    out = tmp_path_factory.mktemp("page")
    result = six_runs()
    material = make_material(result)
    page.write_page(out, result, material)
    return out, (out / "index.html").read_text("utf-8"), result, material


def test_page_parses_and_needs_no_network(written):
    """All tags are balanced, there is no script, and no address but the namespace of SVG."""
    out, html, _, _ = written
    reader = Reader(html)
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "iframe", "object", "link", "img"}
    for tag, attributes in reader.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in ("src", "href"):
            if key in attributes:
                assert re.match(r"\./audio/|#|data:image/png;base64,", attributes[key])
    without_namespace = html.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//www|url\(|@import", without_namespace)
    ElementTree.fromstring((out / "figure.svg").read_text("utf-8"))


def test_every_clip_has_a_player_and_nothing_else_does(written):
    """The players name exactly the files of the material, whatever characters are in their names."""
    _, html, _, material = written
    players = [attributes for tag, attributes in Reader(html).tags if tag == "audio"]
    paths = [urllib.parse.unquote(a["src"]).removeprefix("./") for a in players]
    assert sorted(paths) == sorted(c["path"] for row in material["rows"] for c in row["clips"])
    assert all(a["preload"] == "none" and "controls" in a for a in players)
    assert not any(set('?#%" ') & set(a["src"].replace("%", "", 99)) for a in players)


def test_names_are_escaped(written):
    """Markup in a name is shown, not obeyed; characters that XML forbids are replaced."""
    _, html, _, _ = written
    reader = Reader(html)
    words = "".join(reader.words)
    assert 'u0 <b>"it\'s" & \ufffd\ufffd \u00fc' in words
    assert "<sil>" in words and "<i>" in words
    assert "i" not in [tag for tag, a in reader.tags if "style" not in a]
    assert not re.search("[\x00-\x08\ud800-\udfff]", html)


def test_pictures_decode(written):
    """Each spectrogram is a whole PNG with a row for each band and a column for each hop."""
    _, html, _, material = written
    pictures = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", html)
    clips = [clip for row in material["rows"] for clip in row["clips"]]
    assert len(pictures) == len(clips)
    lengths = sorted(decode_png(base64.b64decode(p))[:2] for p in pictures)
    frames = [len(c["wave"]) / c["sample_rate"] / page.HOP_SECONDS for c in clips]
    assert all(height == page.BANDS for height, _ in lengths)
    np.testing.assert_allclose([w for _, w in lengths], sorted(frames), atol=5)


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050])
def test_a_tone_stands_at_its_frequency(sample_rate):
    """A sine of 1 kHz is brightest in the band at 1 kHz, at the same level for every sample rate."""
    wave = np.sin(2 * math.pi * 1000 * np.arange(sample_rate) / sample_rate)
    decibels = page.spectrogram_db(wave, sample_rate, 4000)
    expected = page.hz_to_mel(1000) / page.hz_to_mel(4000) * (page.BANDS + 1) - 1
    middle = decibels[:, decibels.shape[1] // 2]
    assert abs(middle.argmax() - expected) <= 1
    assert -9 < middle.max() < 0
    levels = decode_png(page.spectrogram_png(decibels, decibels.max()))[2]
    assert abs(page.BANDS - 1 - levels[:, levels.shape[1] // 2].argmax() - expected) <= 1


def test_points_land_where_the_numbers_say():
    """Centers are an affine function of the accuracies; vectors stand below all others."""
    centers = point_centers(page.figure(six_runs()))
    places = {}
    for script, names in REPRESENTATIONS.items():
        places |= {f"{script} {name}": trained for name, (trained, _) in names.items()}
    assert centers.keys() == places.keys()
    x = [centers[name][0] for name in places]
    slope, offset = np.polyfit([speaker for _, speaker in places.values()], x, 1)
    np.testing.assert_allclose(x, [slope * s + offset for _, s in places.values()], atol=0.2)
    framed = [name for name, (phone, _) in places.items() if phone is not None]
    y = [centers[name][1] for name in framed]
    slope, offset = np.polyfit([places[name][0] for name in framed], y, 1)
    assert slope < 0
    np.testing.assert_allclose(y, [slope * places[n][0] + offset for n in framed], atol=0.2)
    assert all(centers[name][1] > max(y) for name in places.keys() - set(framed))


@pytest.mark.parametrize("width", [940, 366])
@pytest.mark.parametrize("phones", [True, False])
def test_labels_do_not_overlap(width, phones):
    """Neither for six runs nor without phones, where all points crowd into one panel."""
    boxes = label_boxes(page.figure(six_runs(phones=phones), width))
    n_vectors = 3 if phones else 0
    assert len(boxes) == 13 - n_vectors + 2
    assert overlapping(boxes) == []
    assert all(box[0] >= 0 and box[2] <= width for _, box in boxes)


def test_twenty_crowded_labels_find_room():
    """Twenty points within a small square."""
    anchors = np.random.default_rng(0).uniform(300, 420, (20, 2))
    sizes = [(100, 15)] * 20
    area = np.array([0, 0, 800, 500])
    boxes = page.place_labels(anchors, sizes, [], [], area)
    assert overlapping([(str(i), box) for i, box in enumerate(boxes)]) == []


def test_seeds_become_one_point():
    """Three seeds of one configuration are drawn as their mean; another configuration is not."""
    runs = {f"cpc-{i}": make_run("cpc", seed=i, shift=0.02 * i) for i in range(3)}
    runs["cpc-b"] = make_run("cpc")
    runs["cpc-b"]["config"]["lr"] = 1.0
    groups = page.make_groups(make_result(runs))
    assert [group.names for group in groups] == [["cpc-0", "cpc-1", "cpc-2"], ["cpc-b"]]
    assert groups[0].mean("representations", "c", "phone") == pytest.approx(0.91)
    centers = point_centers(page.figure(make_result(runs)))
    assert len(centers) == 6 and "cpc-0 +2 c" in centers
    assert f"91.0<small>89.0 {page.DASH} 93.0</small>" in page.representation_table(groups)


def test_long_names_are_shortened_and_stay_different():
    """Two runs whose names differ in the middle alone."""
    names = [f"a run with a long name {letter} and a long end" for letter in "xy"]
    runs = {name: make_run("cpc", shift=0.01) for name in names}
    runs[names[1]]["config"]["lr"] = 1.0
    labels = [group.label for group in page.make_groups(make_result(runs))]
    assert len(set(labels)) == 2 and max(map(len, labels)) < 35
    assert overlapping(label_boxes(page.figure(make_result(runs)))) == []


def test_tables_mark_the_best_and_dash_what_is_missing():
    """The highest phone accuracy is marked once; missing numbers are dashes, never None or nan."""
    groups = page.make_groups(six_runs())
    table = page.representation_table(groups)
    best = re.findall(r'<td class="n best">([^<]*)', table)
    assert best.count("90.0") == 1 and best.count("100.0") == 2
    assert f'<td class="n">{page.DASH}</td>' in table
    everything = table + page.spoken_table(groups) + page.run_table(six_runs())
    assert not re.search(r"\bNone\b|\bnan\b", everything)
    assert "2.2 min" in everything and "dim</span> <b>conversion" not in everything


def test_principal_components_separate_planted_clusters():
    """Two clusters in 20 dimensions lie apart along the first component, which holds most variance."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 20))
    x[:20] += 10 * rng.normal(size=20)
    plane, shares = page.principal_components(x)
    first, second = plane[:20, 0], plane[20:, 0]
    assert max(first.min() - second.max(), second.min() - first.max()) > 5
    assert shares[0] > 0.8 and shares.sum() <= 1
    assert page.principal_components(np.ones((5, 1)))[0].tolist() == [[0, 0]] * 5


def test_units_are_merged():
    """Runs of equal ids; each token once, as wide as its frames."""
    assert page.runs_of([3, 3, 5, 3]) == [(0, 2, 3), (2, 3, 5), (3, 4, 3)]
    assert page.runs_of([]) == []
    note = page.unit_note({"name": "ids", "ids": np.array([3, 3, 5, 3]), "classes": 8})
    assert "3 tokens, 2 of 8 in use" in note


def test_perplexity_and_ticks():
    """Uniform counts over 16 codes have the perplexity 16; ticks are round numbers."""
    assert "16 of 20 in use, perplexity 16.0" in page.usages(
        {"a": {"name": "ids", "counts": np.array([5] * 16 + [0] * 4)}}
    )
    assert page.ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert page.ticks(13, 97, 4) == [20, 40, 60, 80]


def test_curves_leave_out_what_is_not_a_number():
    """Only finite metrics are drawn, over more than a factor of 50 on a log scale."""
    log = [{"step": s, "loss": 1 / s, "flat": 2.0, "bad": math.nan} for s in (1, 10, 100)]
    html = page.curves({"a": log, "b": []})
    assert html.count("<figure") == 2 and "loss <small>0.01 at the end, log scale" in html
    assert "bad" not in html and "nan" not in html
    # The loss falls: its curve runs to the right and down, which is where y grows.
    numbers = re.search(r'd="M([^"]*)h0" class="curve"|class="curve" d="M([^"]*)h0"', html)
    places = np.array((numbers[1] or numbers[2]).split(), dtype=float).reshape(-1, 2)
    assert (np.diff(places, axis=0) > 0).all()


@pytest.mark.parametrize("n_speakers", [2, 12, 40])
def test_legend_only_for_few_speakers(n_speakers):
    """Up to 20 speakers are listed once, more are counted."""
    result = make_result({"dim-1": make_run("dim")})
    vectors = make_material(result, 1, n_speakers)["vectors"]
    html = page.maps(vectors)
    assert html.count("<li>") == (n_speakers if n_speakers <= 20 else 0)
    assert (f"{n_speakers} speakers." in html) == (n_speakers > 20)


def test_a_result_full_of_gaps(tmp_path):
    """Empty runs, missing parts, silence and no material at all still make a page."""
    empty = {"script": "new.py", "representations": None, "config": None, "metrics": None}
    bare = make_run("cpc")
    bare["representations"]["c"] = dict.fromkeys(bare["representations"]["c"])
    bare |= {"chance": {}, "log_mel": {}, "untrained": {}, "copy": None, "steps": None}
    result = {"runs": {NASTY: empty, "cpc": bare}, "compared": {}}
    page.write_page(tmp_path / "a", result, {})
    silence = make_clip(NASTY, "reconstruction", 0.001, 8000, "audio/a.wav")
    silence["wave"][:] = np.nan
    row = {"utterance": "u", "speaker": "s", "target_speaker": None, "seconds": 0.001}
    row |= {"phones": [], "clips": [silence], "units": {}}
    vectors = {"cpc": {"c": {"x": np.full((4, 1), np.nan), "speaker": ["a"] * 4}}}
    material = {"rows": [row, row | {"clips": []}], "vectors": vectors, "logs": {}, "usage": {}}
    page.write_page(tmp_path / "b", result, material)
    for name in ("a", "b"):
        html = (tmp_path / name / "index.html").read_text("utf-8")
        Reader(html)
        assert not re.search(r"\bNone\b|\bnan\b", html)


def test_page_is_small(tmp_path):
    """Six utterances of three seconds and six runs: less than 3 MB."""
    result = six_runs()
    material = make_material(result, 6)
    for row in material["rows"]:
        row["seconds"] = 3.0
        for clip in row["clips"]:
            noise = np.random.default_rng(0).normal(size=3 * clip["sample_rate"])
            clip["wave"] = noise.astype(np.float32)
    page.write_page(tmp_path, result, material)
    assert (tmp_path / "index.html").stat().st_size < 3e6


def contrast(color, paper):
    """The contrast of two colors, #rrggbb, as the W3C defines it."""

    def luminance(code):
        """The relative luminance, 0..1."""
        channels = np.array(list(bytes.fromhex(code[1:]))) / 255
        linear = np.where(channels < 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    dark, light = sorted((luminance(color), luminance(paper)))
    return (light + 0.05) / (dark + 0.05)


def test_colors_are_readable_in_both_themes():
    """At least 4.5 to 1 against white and against the dark paper, which the figure paints itself."""
    assert min(contrast(color, "#ffffff") for color in page.LIGHT) > 4.5
    assert min(contrast(color, "#0d1117") for color in page.DARK) > 4.5
    svg = page.figure(six_runs())
    assert "prefers-color-scheme:dark" in svg and 'class="paper"' in svg
