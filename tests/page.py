# SPDX-License-Identifier: MIT
"""The HTML page and the SVG figure that compare.py makes for any number of runs.

    write_page(out, result, material)    writes out/index.html and out/figure.svg
    figure(result)                       the figure alone, as SVG text

The page opens from disk and needs neither script nor network. Only the audio files are separate.
"""

import base64
import functools
import math
import os
import re
import time
import zlib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch

# One color and one marker per script. The colors stay apart under the three color vision
# deficiencies and have a contrast of at least 4.5 against white and against GitHub's dark theme.
SCRIPTS = ("vqvae", "fhvae", "adversarial_vc", "adain_vc", "cpc", "dim")
LIGHT = ("#2158e0", "#8a2a0c", "#0a8570", "#b04abe", "#857200", "#16203a")
DARK = ("#8590ff", "#d8803c", "#4fe3b4", "#e561b0", "#ffe14d", "#c3d9f2")
FONT = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif"
DASH = "\u2013"  # stands for a number that is missing
MINUS = "\u2212"

# Runs that differ only in these fields of Config are seeds of one configuration.
NOT_CONFIGURATION = ("seed", "out", "device", "log_every", "save_every")


# ---------------------------------------- text and elements ----------------------------------------
def text(value):
    """Any value as text that is safe in HTML and XML, in elements and in attributes."""
    unsafe = r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]"
    return escape(re.sub(unsafe, "\ufffd", str(value)))


def el(name, *inside, **attributes):
    """An element: el("path", class_="a", stroke_width=1.2) is <path class="a" stroke-width="1.2"></path>.

    Attributes are escaped, floats rounded to a tenth, None left out. What is inside must be safe already.
    """
    words = [name]
    for key, value in attributes.items():
        if isinstance(value, float):
            value = f"{value:.1f}".removesuffix(".0")
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{text(value)}"')
    return f"<{' '.join(words)}>{''.join(inside)}</{name}>"


def svg(width, height, *inside, **attributes):
    """A drawing of this size in px."""
    box = f"0 0 {width:.0f} {height:.0f}"
    size = {"width": round(width), "height": round(height), "viewBox": box}
    return el("svg", *inside, **size, **attributes)


def label(x, y, string, kind=None, anchor=None, **more):
    """A line of text in a drawing; its baseline begins, is centered or ends at (x, y)."""
    return el("text", text(string), x=x, y=y, class_=kind, text_anchor=anchor, **more)


def line(x0, y0, x1, y1, kind, **more):
    """A straight line in the color of a class."""
    path = f"M{x0:.1f} {y0:.1f}L{x1:.1f} {y1:.1f}"
    return el("path", d=path, class_=kind, stroke="currentColor", fill="none", **more)


def is_number(value):
    """True for a finite number that is not a boolean."""
    numeric = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return numeric and math.isfinite(value)


def short_number(value):
    """A number with three significant digits: 0.0123, 4.57, 1,234, 2.5e+08."""
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.1e}"
    return f"{value:.3g}"


def plain(value):
    """A fact of any type in one line."""
    if value is None or value == "":
        return DASH
    if isinstance(value, dict):
        return ", ".join(f"{k} {plain(v)}" for k, v in value.items() if not isinstance(v, dict))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return short_number(value) if isinstance(value, float) else str(value)


def ticks(low, high, count):
    """Round values from low to high, about count of them, in steps of 1, 2 or 5 times a power of 10."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda s: abs(span / s - count))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def text_width(string, size):
    """Estimated width in px of a string in a sans-serif font, on the generous side."""
    width = 0.0
    for letter in str(string):
        if letter in "ijlftI.,:;'|!()[]- ":
            width += 0.38
        elif letter in "mwMW%@\u2026" or ord(letter) > 0x2E80:
            width += 0.95
        else:
            width += 0.62
    return width * size


# ---------------------------------------- runs ----------------------------------------
@dataclass
class Group:
    """Runs of one script with one configuration, which differ in the seed."""

    label: str
    script: str
    style: int  # index of its color and marker
    names: list
    runs: list

    def values(self, *keys):
        """The numbers that stand under these keys in the runs, without those that are missing."""
        found = []
        for run in self.runs:
            for key in keys:
                run = run.get(key) if isinstance(run, dict) else None
            if is_number(run):
                found.append(float(run))
        return found

    def mean(self, *keys):
        """The mean over the runs, or None."""
        values = self.values(*keys)
        return sum(values) / len(values) if values else None

    def has(self, key):
        """True if any run has this part."""
        return any(run.get(key) for run in self.runs)

    def representations(self):
        """The names of the representations, in order."""
        return list(dict.fromkeys(n for run in self.runs for n in run.get("representations") or {}))

    def title(self, part):
        """The heading of a table row: marker, name, and what of it the row is about."""
        name = el("span", dot(self.style), text(self.label), class_="name")
        return f"{name} {el('b', text(part))}"


def script_of(run):
    """The name of the script without folder and ending."""
    return Path(str(run.get("script") or "unknown")).stem


def short_name(name, taken):
    """The name of a run as a label of at most about 30 letters, different from those taken."""
    if len(name) > 30:
        name = f"{name[:18]}\u2026{name[-8:]}"
    return f"{name} ({len(taken) + 1})" if name in taken else name


def make_groups(result):
    """Result -> the groups of runs, in the order of their first run."""
    members = {}
    for name, run in result["runs"].items():
        config = run.get("config") or {"name": name}
        fields = {k: v for k, v in config.items() if k not in NOT_CONFIGURATION}
        facts = (run.get("method_sha256"), run.get("steps"), sorted(fields.items()))
        key = (script_of(run), repr(facts))
        members.setdefault(key, []).append(name)

    scripts = [script for script, _ in members]
    known = list(SCRIPTS) + [script for script in dict.fromkeys(scripts) if script not in SCRIPTS]
    groups = []
    for (script, _), names in members.items():
        title = script
        if scripts.count(script) > 1:
            title = short_name(names[0], [group.label for group in groups])
            title += f" +{len(names) - 1}" if len(names) > 1 else ""
        style = known.index(script) % len(SCRIPTS)
        groups.append(Group(title, script, style, names, [result["runs"][name] for name in names]))
    return groups


# ---------------------------------------- figure: labels ----------------------------------------
def overlap(boxes, others):
    """Boxes (C, 4) and (M, 4) as left, top, right, bottom -> the area that each pair shares, (C, M)."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(2)


def label_candidates(anchor, size):
    """The boxes (C, 4) that a label of this size may take around its point, and their distances (C,)."""
    size = np.array(size)
    boxes = []
    distances = []
    for distance in (9, 14, 21, 30, 42, 58, 78, 100):
        for angle in np.arange(0, 2 * math.pi, math.pi / 8):
            direction = np.array([math.cos(angle), math.sin(angle)])
            center = anchor + direction * (distance + size / 2)
            boxes.append(np.concatenate([center - size / 2, center + size / 2]))
            distances.append(distance)
    return np.array(boxes), np.array(distances, dtype=float)


def place_labels(anchors, sizes, obstacles, specks, area):
    """Places labels such that they do not cover each other nor, as far as possible, anything else.

    anchors: the points (x, y) they name; sizes: (width, height); obstacles: boxes, (M, 4); specks:
    points along lines, (P, 2); area: the box that should hold them. Returns a box for each label.
    """
    obstacles = np.array(obstacles, dtype=float).reshape(-1, 4)
    specks = np.array(specks, dtype=float).reshape(-1, 2)
    specks = np.concatenate([specks - 1.5, specks + 1.5], 1)
    candidates = []
    for anchor, size in zip(anchors, sizes):
        boxes, cost = label_candidates(anchor, size)
        beyond = np.concatenate([area[:2] - boxes[:, :2], boxes[:, 2:] - area[2:]], 1)
        cost += 100 * np.clip(beyond, 0, None).sum(1)
        cost += 1.5 * overlap(boxes, obstacles).sum(1) + overlap(boxes, specks).sum(1)
        candidates.append((boxes, cost))

    chosen = [boxes[np.argmin(cost)] for boxes, cost in candidates]
    for _ in range(8):
        for i, (boxes, cost) in enumerate(candidates):
            others = np.array(chosen[:i] + chosen[i + 1 :]).reshape(-1, 4) + (-3, -1, 3, 1)
            crowding = (overlap(boxes, others) > 0).sum(1)
            chosen[i] = boxes[np.argmin(cost + 1000 * crowding)]
    return chosen


# ---------------------------------------- figure ----------------------------------------
@dataclass
class Point:
    """A representation: accuracies in 0..1 as (speaker, phone). The phone of a vector is None."""

    group: Group
    name: str
    trained: tuple
    untrained: tuple | None
    seeds: list  # where there are several

    def all(self):
        """Every place of the point."""
        return [self.trained] + [self.untrained] * (self.untrained is not None) + self.seeds


def make_points(groups, up):
    """The representations of all groups as points. up: the key of a row that goes up."""
    points = []
    for group in groups:
        for name in group.representations():
            trained = tuple(group.mean("representations", name, key) for key in ("speaker", up))
            untrained = tuple(group.mean("untrained", name, key) for key in ("speaker", up))
            if trained[0] is None:
                continue
            if untrained[0] is None or (untrained[1] is None) != (trained[1] is None):
                untrained = None
            seeds = []
            for run in group.runs if len(group.runs) > 1 else []:
                row = (run.get("representations") or {}).get(name) or {}
                if is_number(row.get("speaker")) and is_number(row.get(up)) == is_number(
                    trained[1]
                ):
                    seeds.append((row["speaker"], row.get(up)))
            points.append(Point(group, name, trained, untrained, seeds))
    return points


def axis_limits(values):
    """Limits in multiples of 0.05 around fractions, with some air, within 0..1."""
    values = [value for value in values if value is not None] or [0, 1]
    low = math.floor(max(min(values) - 0.03, 0) * 20) / 20
    high = math.ceil(min(max(values) + 0.02, 1) * 20 - 1e-9) / 20
    return low, max(high, low + 0.1)


class Plot:
    """Where things lie in the figure, in px: a main panel, and below it a lane for each vector."""

    def __init__(self, width, top, spots, n_lanes):
        """width and top in px; spots: all (x, y) that must find room, in 0..1 or None."""
        self.narrow = width < 600
        self.width = width
        self.left = 46 if self.narrow else 62
        self.right = width - (10 if self.narrow else 20)
        self.top = top
        self.bottom = top + 420
        self.strip = self.bottom + 8
        self.foot = self.lane(n_lanes) - 5 if n_lanes else self.bottom
        self.x_limits = axis_limits([x for x, _ in spots])
        self.y_limits = axis_limits([y for _, y in spots])

    def x(self, value):
        """Fraction -> px across."""
        low, high = self.x_limits
        return self.left + 12 + (value - low) / (high - low) * (self.right - self.left - 24)

    def y(self, value):
        """Fraction -> px down. The words in the corners have a band of their own."""
        low, high = self.y_limits
        return self.bottom - 22 - (value - low) / (high - low) * (self.bottom - self.top - 52)

    def lane(self, index):
        """The middle of the lane with this index, in px down."""
        return self.strip + 14 + 22 * index


def marker(style, x, y, radius=6.0):
    """The SVG path of the marker of a script around (x, y)."""
    if style == 0:
        radius *= 0.92
        arc = f"a{radius:.1f} {radius:.1f} 0 1 0"
        return f"M{x - radius:.1f} {y:.1f}{arc} {2 * radius:.1f} 0{arc} {-2 * radius:.1f} 0z"
    # Radii, one after the other around the center, and the direction of the first: square, diamond,
    # two triangles, and a cross, whose inner corners lie closer.
    shapes = {
        1: ([1.15] * 4, 45),
        2: ([1.15] * 4, 0),
        3: ([1.25] * 3, -90),
        4: ([1.25] * 3, 90),
        5: ([0.6, 1.25, 1.25] * 4, 0),
    }
    radii, turn = shapes[style]
    corners = []
    for i, share in enumerate(radii):
        angle = math.radians(turn + 360 * i / len(radii))
        corner_x = x + radius * share * math.cos(angle)
        corner_y = y + radius * share * math.sin(angle)
        corners.append(f"{corner_x:.1f} {corner_y:.1f}")
    return f"M{'L'.join(corners)}z"


def dot(style):
    """The marker of a script between words."""
    path = el("path", d=marker(style, 6, 6, 4.6), fill="currentColor")
    return svg(12, 12, path, class_=f"dot s{style}", aria_hidden="true") + " "


def plus(x, y):
    """The mark of log-mel."""
    return line(x - 5, y, x + 5, y, "gray", stroke_width=2) + line(
        x, y - 5, x, y + 5, "gray", stroke_width=2
    )


def arrow(start, end, kind):
    """From a hollow circle, the untrained model, to just before the marker of the trained one."""
    start = np.array(start, dtype=float)
    end = np.array(end, dtype=float)
    circle = {"fill": "none", "stroke": "currentColor", "class_": kind, "opacity": "0.75"}
    parts = [el("circle", cx=start[0], cy=start[1], r=3, **circle)]
    length = math.hypot(*(end - start))
    if length > 16:
        along = (end - start) / length
        across = along[::-1] * (-3, 3)
        tip = end - 8.5 * along
        parts.append(line(*(start + 3 * along), *(tip - 5 * along), kind, opacity="0.6"))
        corners = [tip, tip - 7 * along + across, tip - 7 * along - across]
        head = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in corners) + "z"
        parts.append(el("path", d=head, fill="currentColor", class_=kind, opacity="0.75"))
    return "".join(parts)


def figure_style():
    """Colors of the figure for both themes. Where media queries are unknown, the light ones hold."""

    def colors(names_and_colors, scripts, paper):
        """The rules of one theme."""
        rules = [pair.split(":") for pair in names_and_colors.split()]
        rules += [(f"s{i}", color) for i, color in enumerate(scripts)]
        css = "".join(f".fig .{name}{{color:{color}}}" for name, color in rules)
        return f"{css}.fig .paper{{color:{paper}}}.fig .point{{stroke:{paper}}}"

    grays = "ink:#1f2328 gray:#59636e faint:#7a838d grid:#e4e7eb strip:#f4f6f8"
    dark_grays = "ink:#e6edf3 gray:#9da7b3 faint:#7d8590 grid:#262c36 strip:#161b22"
    dark = f"@media (prefers-color-scheme:dark){{{colors(dark_grays, DARK, '#0d1117')}}}"
    fonts = (
        f".fig text{{font:12px {FONT};fill:currentColor}}.fig .name{{font-weight:600}}"
        ".fig .hint{font-size:13px;font-style:italic}.fig .small{font-size:11px}"
    )
    return el("style", fonts, colors(grays, LIGHT, "#ffffff"), dark)


def legend(groups, width, has_arrows, has_seeds):
    """The lines of the legend above the panel -> SVG, and the height that they take in px."""
    styles = {group.script: group.style for group in groups}
    entries = list(styles) + ["log-mel", "chance"]
    entries += ["untrained \u2192 trained"] * has_arrows + ["seeds, and their mean"] * has_seeds
    x = 12
    y = 18
    parts = []
    for entry in entries:
        needed = 38 + text_width(entry, 12)
        if x + needed > width and x > 12:
            x = 12
            y += 21
        if entry in styles:
            kind = f"s{styles[entry]}"
            path = marker(styles[entry], x + 8, y, 5.5)
            parts.append(el("path", d=path, class_=kind, fill="currentColor"))
            parts.append(label(x + 23, y + 4, entry, f"{kind} name"))
        else:
            if entry == "log-mel":
                parts.append(plus(x + 8, y))
            elif entry == "chance":
                parts.append(line(x, y, x + 18, y, "gray", stroke_dasharray="4 3"))
            elif entry.startswith("seeds"):
                for dx, dy in ((2, 3), (9, -3), (16, 2)):
                    parts.append(seed_dot(x + dx, y + dy, "gray"))
            else:
                parts.append(arrow((x - 2, y), (x + 25, y), "gray"))
            parts.append(label(x + 23, y + 4, entry, "gray"))
        x += needed
    return "".join(parts), y + 16


def seed_dot(x, y, kind):
    """A single seed among several."""
    return el("circle", cx=x, cy=y, r="2.2", class_=kind, fill="currentColor", opacity="0.7")


def axes(plot, x_title, y_title):
    """The strip of the vectors, grid, ticks and titles."""
    parts = []
    if plot.foot > plot.bottom:
        size = {"width": plot.right - plot.left, "height": plot.foot - plot.strip}
        strip = {"class_": "strip", "fill": "currentColor"}
        parts.append(el("rect", x=plot.left, y=plot.strip, **size, **strip))
        middle = (plot.strip + plot.foot) / 2
        parts.append(label(plot.left - 7, middle - 2, "no", "gray small", "end"))
        parts.append(label(plot.left - 7, middle + 11, "frames", "gray small", "end"))
    for value in ticks(*plot.x_limits, 5 if plot.narrow else 10):
        x = plot.x(value)
        parts.append(line(x, plot.top, x, plot.foot, "grid"))
        parts.append(label(x, plot.foot + 17, f"{100 * value:.0f}", "gray", "middle"))
    for value in ticks(*plot.y_limits, 8):
        y = plot.y(value)
        parts.append(line(plot.left, y, plot.right, y, "grid"))
        parts.append(label(plot.left - 7, y + 4, f"{100 * value:.0f}", "gray", "end"))
    middle = (plot.top + plot.bottom) / 2
    turn = f"rotate(-90 16 {middle:.1f})"
    parts.append(label((plot.left + plot.right) / 2, plot.foot + 37, x_title, "ink", "middle"))
    parts.append(label(16, middle, y_title, "ink", "middle", transform=turn))
    return "".join(parts)


class Panel:
    """Collects what the main panel shows, and what its labels must not cover."""

    def __init__(self, plot):
        """An empty panel."""
        self.plot = plot
        self.back = []
        self.front = []
        self.obstacles = []
        self.specks = []
        self.names = []  # (x, y, words, class)

    def add_chance(self, x, y):
        """Dashed lines at the accuracies of chance, each of which may be None."""
        plot = self.plot
        dashes = {"kind": "gray", "stroke_dasharray": "4 3"}
        if x is not None:
            self.back.append(line(plot.x(x), plot.top, plot.x(x), plot.foot, **dashes))
            self.obstacles.append((plot.x(x) - 3, plot.top, plot.x(x) + 3, plot.bottom))
        if y is not None:
            self.back.append(line(plot.left, plot.y(y), plot.right, plot.y(y), **dashes))
            self.obstacles.append((plot.left, plot.y(y) - 2, plot.right, plot.y(y) + 2))
        if x is not None and y is not None:
            self.names.append((plot.x(x), plot.y(y), "chance", "gray"))

    def add_hints(self, words, chance):
        """A word in each corner: top left, top right, bottom left, bottom right."""
        plot = self.plot
        left = plot.left + 10
        if chance is not None and plot.x(chance) < plot.left + 120:
            left = plot.x(chance) + 8  # beside the line
        for i, word in enumerate(words):
            width = text_width(word, 13)
            x = left if i % 2 == 0 else plot.right - 10 - width
            y = plot.top + 19 if i < 2 else plot.bottom - 8
            end = i % 2 * width
            self.back.append(label(x + end, y, word, "faint hint", "end" if end else None))
            self.obstacles.append((x, y - 13, x + width, y + 4))

    def add_log_mel(self, spots):
        """A plus sign for each log-mel, and one name for all."""
        places = list(dict.fromkeys((self.plot.x(x), self.plot.y(y)) for x, y in spots))
        for x, y in places:
            self.back.append(plus(x, y))
            self.obstacles.append((x - 6, y - 6, x + 6, y + 6))
        if places:
            self.names.append((*places[0], "log-mel", "gray"))

    def add_point(self, point):
        """A marker, its arrow, its seeds, and its name for later."""
        x, y = self.plot.x(point.trained[0]), self.plot.y(point.trained[1])
        others = [(self.plot.x(a), self.plot.y(b)) for a, b in point.all()[1:]]
        self.front.append(draw_point(point, (x, y), others))
        self.obstacles.append((x - 7, y - 7, x + 7, y + 7))
        for other in others:
            count = int(math.dist(other, (x, y)) / 4) + 2
            self.specks += np.linspace(other, (x, y), count).tolist()
        self.names.append((x, y, point_name(point, self.plot), f"s{point.group.style} name"))

    def draw(self):
        """Places the labels -> SVG."""
        plot = self.plot
        area = np.array([plot.left + 2, plot.top + 2, plot.right - 2, plot.bottom - 2])
        sizes = [(text_width(words, 12.5), 15) for _, _, words, _ in self.names]
        anchors = [(x, y) for x, y, *_ in self.names]
        boxes = place_labels(anchors, sizes, self.obstacles, self.specks, area)
        for (x, y, words, kind), box in zip(self.names, boxes):
            near = np.clip((x, y), box[:2], box[2:])
            if math.dist(near, (x, y)) > 26:
                self.back.append(line(x, y, *near, kind, opacity="0.5"))
            data = " ".join(f"{edge:.1f}" for edge in box)
            middle = (box[0] + box[2]) / 2
            self.front.append(label(middle, box[3] - 4, words, kind, "middle", data_box=data))
        return "".join(self.back + self.front)


def point_name(point, plot):
    """How a point is labeled: on a narrow figure its color alone tells the script."""
    return point.name if plot.narrow else f"{point.group.label} {point.name}"


def draw_point(point, end, others):
    """A marker at end, and those of its other places: the untrained one, if any, and the seeds."""
    kind = f"s{point.group.style}"
    parts = []
    if point.untrained:
        parts.append(arrow(others[0], end, kind))
    for x, y in others[bool(point.untrained) :]:
        parts.append(line(x, y, *end, kind, opacity="0.4"))
        parts.append(seed_dot(x, y, kind))
    title = el("title", text(f"{point.group.label} {point.name}"))
    path = marker(point.group.style, *end)
    parts.append(el("path", title, d=path, class_=f"{kind} point", fill="currentColor"))
    return "".join(parts)


def draw_lane(plot, point, index):
    """A vector in its lane of the strip, with its name on the side that has room."""
    y = plot.lane(index)
    places = [(plot.x(x), y) for x, _ in point.all()]
    drawn = draw_point(point, places[0], places[1:])
    words = point_name(point, plot)
    kind = f"s{point.group.style} name"
    left = min(x for x, _ in places) - 12
    if left - text_width(words, 12.5) > plot.left:
        return drawn + label(left, y + 4, words, kind, "end")
    return drawn + label(max(x for x, _ in places) + 12, y + 4, words, kind)


def mean_of(groups, *keys):
    """The mean of a number over all runs, or None."""
    values = [value for group in groups for value in group.values(*keys)]
    return sum(values) / len(values) if values else None


def has_phones(groups):
    """True if the phone accuracy of any representation is known."""
    return any(point.trained[1] is not None for point in make_points(groups, "phone"))


def figure(result, width=940):
    """Result -> SVG text: every representation as a point, speaker accuracy across, phone accuracy up.

    Without any phone accuracy, the equal error rate of unseen speakers goes up instead.
    """
    groups = make_groups(result)
    up = "phone"
    y_title = "phone accuracy of a frame, %"
    words = ("content only", "both", "neither", "speaker only")
    if not has_phones(groups):
        up = "eer"
        y_title = "equal error rate of unseen speakers, %"
        words = ("hides the speaker", "knows only trained voices", "", "knows the speaker")
    points = make_points(groups, up)
    vectors = [point for point in points if point.trained[1] is None]

    chance = (mean_of(groups, "chance", "speaker"), mean_of(groups, "chance", up))
    log_mel = [(g.mean("log_mel", "speaker"), g.mean("log_mel", up)) for g in groups]
    log_mel = [spot for spot in log_mel if None not in spot]
    spots = [spot for point in points for spot in point.all()] + log_mel + [chance]

    has_arrows = any(point.untrained for point in points)
    key, top = legend(groups, width, has_arrows, any(point.seeds for point in points))
    plot = Plot(width, top, spots, len(vectors))
    panel = Panel(plot)
    panel.add_chance(*chance)
    panel.add_hints(words, chance[0])
    panel.add_log_mel(log_mel)
    for point in points:
        if point.trained[1] is not None:
            panel.add_point(point)

    x_title = "speaker accuracy, %"
    if not plot.narrow:
        x_title += ": a linear probe of the mean over an utterance"
    height = plot.foot + 48
    paper = el("rect", class_="paper", width=width, height=height, rx=8, fill="currentColor")
    lanes = [draw_lane(plot, point, i) for i, point in enumerate(vectors)]
    title = el("title", f"Representations: {x_title} across, {y_title} up")
    parts = [title, figure_style(), paper, key, axes(plot, x_title, y_title), panel.draw(), *lanes]
    namespace = "http://www.w3.org/2000/svg"
    return svg(width, height, *parts, xmlns=namespace, class_="fig", role="img") + "\n"


# ---------------------------------------- tables ----------------------------------------
# Key, title, explanation, and whether high or low values mean that more is kept.
ROW_COLUMNS = (
    ("phone", "phone", "accuracy of a linear probe of a frame", max),
    ("speaker", "speaker", "accuracy of a linear probe of the mean over an utterance", max),
    ("eer", "EER", "equal error rate of unseen speakers, by cosine", min),
    ("eer_lda", "EER, LDA", "the same after LDA on the training speakers", min),
    ("nearest", "nearest", "unseen speakers: the nearest utterance is of the same one", max),
)

# Key, title, explanation, which value is the best of several, decimals, factor.
SPOKEN_COLUMNS = (
    ("pairs", "pairs", "measured", None, 0, 1),
    ("target", "as target", "a judge of real speech hears the target, %", max, 0, 100),
    ("target_posterior", "posterior", "its mean probability of the target, %", max, 1, 100),
    ("source", "as source", "the judge hears the source, %", min, 0, 100),
    ("source_posterior", "posterior", "its mean probability of the source, %", min, 1, 100),
    ("phones", "phones", "frames in which a probe hears the phone of the source, %", max, 1, 100),
    ("vde", "VDE", "frames voiced wrongly, %", min, 1, 100),
    ("ffe", "FFE", "voiced wrongly or F0 off by over a fifth, %", min, 1, 100),
    ("variance", "variance", "over time, log ratio to real speech; 0 is equal", None, 2, 1),
)


def cell(values, digits=1, scale=100, kind=""):
    """Numbers -> a table cell: their mean, below it their range if there are several, or a dash."""

    def shown(value):
        """A number with the typographic minus."""
        return f"{scale * value:.{digits}f}".replace("-", MINUS)

    words = [DASH]
    if values:
        words = [shown(sum(values) / len(values))]
    if len(set(values)) > 1:
        words.append(el("small", f"{shown(min(values))} {DASH} {shown(max(values))}"))
    return el("td", *words, class_=f"n {kind}".strip())


def table(head, body, kind=None):
    """A table in a container that scrolls sideways by itself on narrow screens."""
    whole = el("table", el("thead", *head), el("tbody", *body), class_=kind)
    return el("div", whole, class_="scroll", tabindex="0")


def header(title, columns, **attributes):
    """The first row of a table: (title, explanation) for each column of numbers."""
    cells = [el("th", title, rowspan=attributes.get("colspan"))]
    for name, note in columns:
        cells.append(el("th", text(name), el("small", text(note)), class_="n", **attributes))
    return el("tr", *cells)


def reference_rows(groups, title, cells_of):
    """Rows of chance, log-mel or copies: one for all groups that agree. cells_of: group -> cells."""
    labels = {}
    for group in groups:
        labels.setdefault(cells_of(group), []).append(group.label)
    rows = []
    for cells, names in labels.items():
        of = "" if len(labels) == 1 else f"of {', '.join(names)}"
        heading = el("th", title, " ", el("span", text(of), class_="of"))
        rows.append(el("tr", heading, cells, class_="before"))
    return rows


def row_cells(group, part):
    """The cells of chance or log-mel. Every second one is empty, since nothing here is trained."""
    empty = el("td", class_="before")
    return "".join(cell(group.values(part, key)) + empty for key, *_ in ROW_COLUMNS)


def representation_table(groups):
    """What probes read from each representation, beside the same representation untrained."""
    entries = [(group, name) for group in groups for name in group.representations()]
    body = []
    body += reference_rows(groups, "chance", lambda group: row_cells(group, "chance"))
    body += reference_rows(groups, "log-mel", lambda group: row_cells(group, "log_mel"))
    for group, name in entries:
        cells = []
        for key, _, _, most in ROW_COLUMNS:
            means = [g.mean("representations", n, key) for g, n in entries]
            means = [mean for mean in means if mean is not None]
            mean = group.mean("representations", name, key)
            kind = ""
            if len(means) > 1 and mean == most(means):
                kind = "best"
            elif len(means) > 2 and key != "phone" and mean in (min(means), max(means)):
                kind = "least"
            cells.append(cell(group.values("representations", name, key), kind=kind))
            cells.append(cell(group.values("untrained", name, key), kind="before"))
        first = "first" if name == group.representations()[0] else None
        body.append(el("tr", el("th", group.title(name)), *cells, class_=first))

    head = header("representation", [column[1:3] for column in ROW_COLUMNS], colspan=2)
    pair = el("th", "trained", class_="n") + el("th", "untrained", class_="n before")
    return table([head, el("tr", pair * len(ROW_COLUMNS), class_="pair")], body)


def spoken_table(groups):
    """Copy synthesis, conversion and reconstruction, as a judge and probes hear them."""
    best = {}
    for key, _, _, choose, *_ in SPOKEN_COLUMNS:
        means = [group.mean("conversion", key) for group in groups]
        means = [mean for mean in means if mean is not None]
        if choose and len(means) > 1:
            best[key] = choose(means)

    def cells_of(group, part="copy"):
        """The cells of one kind of speech."""
        cells = []
        for key, _, _, _, digits, scale in SPOKEN_COLUMNS:
            is_best = part == "conversion" and key in best and group.mean(part, key) == best[key]
            kind = "best" if is_best else ""
            cells.append(cell(group.values(part, key), digits, scale, kind))
        return "".join(cells)

    body = reference_rows([group for group in groups if group.has("copy")], "copy", cells_of)
    for group in groups:
        kind = "first"
        for part in ("conversion", "reconstruction"):
            if group.has(part):
                heading = el("th", group.title(part))
                body.append(el("tr", heading, cells_of(group, part), class_=kind))
                kind = "before"
    return table([header("speech", [column[1:3] for column in SPOKEN_COLUMNS])], body)


def duration(seconds):
    """Seconds as a person says them."""
    if not is_number(seconds):
        return DASH
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run_table(result):
    """What was run: script, steps, time, hardware, data, command."""
    body = []
    for name, run in result["runs"].items():
        script = el("span", f"{text(script_of(run))}.py", class_="of")
        steps = f"{run['steps']:,}" if is_number(run.get("steps")) else DASH
        cells = [el("th", text(name), " ", script), el("td", steps, class_="n")]
        cells.append(el("td", duration(run.get("seconds")), class_="n"))
        cells += [el("td", text(plain(run.get(key)))) for key in ("hardware", "torch", "data")]
        words = plain(run.get("command")).split(" ")  # a line must not break inside --flag
        command = " ".join(el("span", text(word)) for word in words)
        cells.append(el("td", el("code", command)))
        cells.append(el("td", el("code", text(plain(run.get("method_sha256"))[:10]))))
        body.append(el("tr", *cells))
    titles = ("run", "steps", "time", "hardware", "torch", "data", "command", "hash")
    numeric = ("steps", "time")
    head = [el("th", title, class_="n" if title in numeric else None) for title in titles]
    return table([el("tr", *head)], body, "facts")


def flatten(tree, prefix=""):
    """A nested dict -> (path, value) of each leaf."""
    leaves = []
    for key, value in tree.items():
        path = f"{prefix} \u203a {key}" if prefix else str(key)
        leaves += flatten(value, path) if isinstance(value, dict) else [(path, value)]
    return leaves


def metric_tables(result):
    """The numbers that only one method has, a list for each run."""
    cards = []
    for name, run in result["runs"].items():
        rows = []
        for path, value in flatten(run.get("metrics") or {}):
            rows.append(el("tr", el("th", text(path)), el("td", text(plain(value)), class_="n")))
        if rows:
            whole = el("table", el("tbody", *rows))
            cards.append(el("div", el("h3", text(name)), whole, class_="card metrics"))
    return el("div", *cards, class_="cards") if cards else ""


# ---------------------------------------- spectrograms ----------------------------------------
# The same settings for all clips, whatever their sample rate.
WINDOW_SECONDS = 0.032
HOP_SECONDS = 0.008
MAX_FRAMES = 320  # of a picture; a longer clip gets a longer hop
BANDS = 72
TOP_HZ = 8000  # or the lowest Nyquist frequency of the utterance's clips
RANGE_DB = 65
SHADES = 48
MAGMA = "000004 1d1147 51127c 822681 b63679 e65164 fb8861 fec287 fcfdbf"


def hz_to_mel(hz):
    """Frequency in Hz -> mel."""
    return 2595 * np.log10(1 + np.asarray(hz) / 700)


@functools.lru_cache
def band_weights(sample_rate, n_fft, top_hz):
    """Triangular bands, evenly spaced in mel up to top_hz, each with the sum 1: (BANDS, n_fft / 2 + 1)."""
    mels = np.linspace(0, hz_to_mel(top_hz), BANDS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    bins = np.arange(n_fft // 2 + 1) * sample_rate / n_fft
    # A band reaches at least to the next bin, so that none is empty.
    reach = np.maximum((edges[2:] - edges[:-2]) / 2, sample_rate / n_fft)
    weights = np.clip(1 - np.abs(bins - edges[1:-1, None]) / reach[:, None], 0, None)
    return torch.tensor(weights / weights.sum(1, keepdims=True), dtype=torch.float32)


def spectrogram_db(wave, sample_rate, top_hz):
    """A wave (N,) -> dB of its mel bands, low ones first: (BANDS, T)."""
    wave = torch.as_tensor(np.nan_to_num(np.asarray(wave, np.float32)))
    window = max(int(WINDOW_SECONDS * sample_rate), 16)
    hop = max(int(HOP_SECONDS * sample_rate), math.ceil(len(wave) / MAX_FRAMES), 1)
    n_fft = 2 ** math.ceil(math.log2(2 * window))
    taper = torch.hann_window(window)
    padded = torch.nn.functional.pad(wave, (n_fft // 2, n_fft // 2))
    spectrum = torch.stft(padded, n_fft, hop, window, taper, center=False, return_complex=True)
    power = (spectrum.abs() * 2 / taper.sum()) ** 2
    mel = band_weights(sample_rate, n_fft, top_hz) @ power
    return 10 * torch.log10(mel + 1e-12).numpy()


def palette():
    """The colors of the pictures from quiet to loud, (SHADES, 3) bytes."""
    anchors = np.array([list(bytes.fromhex(color)) for color in MAGMA.split()], dtype=float)
    places = np.linspace(0, len(anchors) - 1, SHADES)
    channels = [np.interp(places, np.arange(len(anchors)), anchors[:, i]) for i in range(3)]
    return np.stack(channels, 1).round().astype(np.uint8)


def png(levels, colors):
    """Levels (H, W) that index colors (K, 3) -> the bytes of a PNG with a palette."""

    def word(number):
        """Four bytes, the highest first."""
        return number.to_bytes(4, "big")

    def chunk(kind, data):
        """A part of the file, with its length and checksum."""
        return word(len(data)) + kind + data + word(zlib.crc32(kind + data))

    height, width = levels.shape
    head = word(width) + word(height) + b"\x08\x03\x00\x00\x00"
    rows = np.pad(levels.astype(np.uint8), ((0, 0), (1, 0))).tobytes()  # a row's filter: none
    body = chunk(b"IHDR", head) + chunk(b"PLTE", colors.tobytes())
    body += chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def spectrogram_png(decibels, loudest):
    """dB (BANDS, T) -> PNG, low bands at the bottom. loudest: the dB of the brightest color."""
    share = np.clip((decibels - loudest + RANGE_DB) / RANGE_DB, 0, 1)
    levels = (share * (SHADES - 1)).round().astype(np.uint8)
    return png(levels[::-1], palette())


# ---------------------------------------- listening ----------------------------------------
WIDEST_CLIP = 290  # px
PICTURE_HEIGHT = 108  # px
LEFT = 32  # px beside a picture for the labels of its frequency axis


def runs_of(ids):
    """Ids (T,) -> (first frame, end, id) of each run of equal ids."""
    ids = np.asarray(ids).reshape(-1)
    if len(ids) == 0:
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(ids)) + 1])
    ends = np.append(starts[1:], len(ids))
    return [(int(start), int(end), int(ids[start])) for start, end in zip(starts, ends)]


def token_color(index):
    """A color for a unit: neighbors in number lie far apart in hue, and lightness varies as well."""
    saturation = 60 + 25 * (index % 2)
    lightness = 60 + 9 * (index // 2 % 3)
    return f"hsl({index * 137.508 % 360:.0f} {saturation}% {lightness}%)"


def strip(tokens, y, width):
    """A row of tokens below a picture. tokens: (left, right, words, color), in px from its left edge."""
    parts = []
    for left, right, words, color in tokens:
        right = min(right, width)
        if right <= left:
            continue
        box = {"x": float(LEFT + left), "y": y, "width": float(right - left), "height": 16}
        inside = [el("title", text(words))]
        inside.append(el("rect", class_=None if color else "phone", fill=color, **box))
        if text_width(words, 9.5) < right - left:
            kind = "token" if color else None
            inside.append(label(LEFT + (left + right) / 2, y + 11.5, words, kind, "middle"))
        parts.append(el("g", *inside))
    return "".join(parts)


def picture(clip, decibels, scale, loudest, top_hz):
    """A spectrogram with its axes, and its width in px. scale: px a second."""
    seconds = len(clip["wave"]) / clip["sample_rate"]
    width = max(seconds * scale, 4.0)
    bottom = PICTURE_HEIGHT + 4
    data = base64.b64encode(spectrogram_png(decibels, loudest)).decode()
    size = {"x": LEFT, "y": 4, "width": width, "height": PICTURE_HEIGHT}
    href = f"data:image/png;base64,{data}"
    parts = [el("image", **size, preserveAspectRatio="none", href=href)]
    for hz in (0, 500, 1000, 2000, 4000, 8000):
        if hz <= top_hz:
            y = bottom - PICTURE_HEIGHT * float(hz_to_mel(hz) / hz_to_mel(top_hz))
            words = f"{hz // 1000}k" if hz >= 1000 else str(hz) if hz else "0 Hz"
            parts.append(el("path", class_="tick", d=f"M{LEFT - 4} {y:.1f}h4"))
            parts.append(label(LEFT - 6, y + 3, words, anchor="end"))
    for value in ticks(0, seconds, max(width / 55, 1)):
        x = LEFT + value * scale
        parts.append(el("path", class_="tick", d=f"M{x:.1f} {bottom}v4"))
        parts.append(label(x, bottom + 14, f"{value:g}" if value else "0 s", anchor="middle"))
    return "".join(parts), width


def clip_figure(row, clip, drawing, width, scale, ids, room_for_units):
    """A clip: its kind, spectrogram, phones, units and player."""
    parts = [drawing]
    height = PICTURE_HEIGHT + 22
    if row.get("phones"):
        phones = [(start * scale, end * scale, name, None) for start, end, name in row["phones"]]
        if clip["kind"] != "target":
            parts.append(strip(phones, height, width))
        height += 19
    if ids is not None:
        frame = row["seconds"] * scale / max(len(ids), 1)
        units = [(a * frame, b * frame, str(i), token_color(i)) for a, b, i in runs_of(ids)]
        parts.append(strip(units, height, width))
    height += 20 * room_for_units

    title = clip["kind"]
    if clip.get("target") is not None and clip["kind"] != "target":
        title += f" \u2192 {clip['target']}"
    path = quote(os.fsencode(str(clip["path"])).replace(os.sep.encode(), b"/"))
    player = el("audio", controls="controls", preload="none", src=f"./{path}")
    whole = svg(LEFT + max(width, 30) + 12, height, *parts, class_="spectrogram")
    return el("figure", el("figcaption", text(title)), whole, player, class_="clip")


def unit_note(unit):
    """The units as numbers, folded away."""
    tokens = [index for _, _, index in runs_of(unit["ids"])]
    counts = f"{len(tokens)} tokens, {len(set(tokens))} of {unit['classes']} in use"
    summary = el("summary", text(f"{unit['name']}: {counts}"))
    return el("details", summary, el("p", " ".join(map(str, tokens))), class_="units")


def utterance_section(row, titles):
    """One test utterance: source, copy and target first, then a card for each run.

    titles: run name -> its heading, in the order of the cards.
    """
    clips = row["clips"]
    units = row.get("units") or {}
    if not clips:
        return ""
    top_hz = min([TOP_HZ] + [clip["sample_rate"] / 2 for clip in clips])
    pictures = [spectrogram_db(clip["wave"], clip["sample_rate"], top_hz) for clip in clips]
    loudest = max(decibels.max() for decibels in pictures)
    longest = max(len(clip["wave"]) / clip["sample_rate"] for clip in clips)
    scale = WIDEST_CLIP / max(longest, 0.5)

    shown = {}
    for clip, decibels in zip(clips, pictures):
        run = clip["run"]
        first = run not in shown
        ids = units[run]["ids"] if run in units and first else None
        drawing, width = picture(clip, decibels, scale, loudest, top_hz)
        # The first clips of all cards are equally high, so that the second ones are level.
        room = bool(units) and first and run is not None
        clip_html = clip_figure(row, clip, drawing, width, scale, ids, room)
        shown.setdefault(run, []).append(clip_html)

    cards = [el("div", *shown.pop(None, []), class_="card speech")]
    for run in [run for run in titles if run in shown] + [
        run for run in shown if run not in titles
    ]:
        note = unit_note(units[run]) if run in units else ""
        heading = el("h4", titles.get(run, text(run)))
        cards.append(el("div", heading, *shown[run], note, class_="card"))
    target = row.get("target_speaker")
    title = row["speaker"] if target is None else f"{row['speaker']} \u2192 {target}"
    note = el("small", text(f"{row['utterance']}, {row['seconds']:.2f} s"))
    heading = el("h3", text(title), " ", note)
    return el("section", heading, el("div", *cards, class_="cards"), class_="utterance")


# ---------------------------------------- maps, codes, curves ----------------------------------------
def principal_components(x):
    """Vectors (U, D) -> their first two principal components (U, 2), and the variance share of each."""
    x = np.asarray(x, dtype=np.float64).reshape(len(x), -1)
    x = np.nan_to_num(x)
    x = x - x.mean(0)
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    plane = np.zeros((len(x), 2))
    shares = np.zeros(2)
    count = min(2, len(s))
    plane[:, :count] = x @ vt[:count].T
    shares[:count] = s[:count] ** 2 / max((s**2).sum(), 1e-30)
    return plane, shares


def scatter(plane, names, colors, size=250):
    """A map of utterances: a color for each speaker, the name where one points at it."""
    center = (plane.max(0) + plane.min(0)) / 2
    half = max(np.abs(plane - center).max(), 1e-9)  # one scale for both directions
    places = size / 2 + (plane - center) / half * (size / 2 - 8) * (1, -1)
    parts = [el("rect", class_="phone", width=size, height=size)]
    for speaker in dict.fromkeys(names):
        dots = [f"M{x:.1f} {y:.1f}h0" for (x, y), name in zip(places, names) if name == speaker]
        title = el("title", text(speaker))
        parts.append(el("path", title, d="".join(dots), stroke=colors[speaker], class_="dots"))
    return svg(size, size, *parts)


def captioned(title, note, drawing, kind=None):
    """A small drawing with its heading."""
    heading = el("figcaption", text(title), " ", el("small", text(note)))
    return el("figure", heading, drawing, class_=kind)


def maps(vectors):
    """PCA maps of the utterance vectors of each run, and one legend for all."""
    items = [item for run in vectors.values() for item in run.values()]
    speakers = sorted({str(speaker) for item in items for speaker in item["speaker"]})
    colors = {}
    for i, speaker in enumerate(speakers):
        colors[speaker] = f"hsl({360 * i / len(speakers):.0f} 70% {42 + 18 * (i % 2)}%)"

    cards = []
    for name, representations in vectors.items():
        figures = []
        for representation, item in representations.items():
            n_vectors = len(item["x"])
            if n_vectors < 3:
                continue
            keep = np.unique(np.linspace(0, n_vectors - 1, 600).astype(int))
            plane, shares = principal_components(np.asarray(item["x"])[keep])
            drawing = scatter(plane, [str(item["speaker"][i]) for i in keep], colors)
            note = f"{100 * shares.sum():.0f} %"
            figures.append(captioned(representation, note, drawing, "map"))
        if figures:
            row = el("div", *figures, class_="row")
            cards.append(el("div", el("h3", text(name)), row, class_="card"))
    if not cards:
        return ""

    key = el("p", f"{len(speakers)} speakers. Point at a dot to see whose it is.")
    if len(speakers) <= 20:
        entries = []
        for speaker, color in colors.items():
            mark = el("i", style=f"background:{color}")
            entries.append(el("li", mark, text(speaker)))
        key = el("ul", *entries, class_="speakers")
    return key + el("div", *cards, class_="cards")


def chart(draw, x_range, y_range, x_title, log_y=False):
    """A small panel with axes. draw: a function of the two scales that returns SVG."""
    width, height = 270, 140
    left, right, top, bottom = 46, 262, 8, 108
    low, high = np.log10(y_range) if log_y else y_range

    def across(value):
        """Value -> px."""
        share = (value - x_range[0]) / max(x_range[1] - x_range[0], 1e-12)
        return left + share * (right - left)

    def down(value):
        """Value -> px."""
        value = math.log10(value) if log_y else value
        return bottom - (value - low) / max(high - low, 1e-12) * (bottom - top)

    values = ticks(low, high, 3)
    if log_y:
        powers = range(math.ceil(low), math.floor(high) + 1)
        values = [10.0**power for power in powers][:: math.ceil(len(powers) / 4)]
    parts = []
    for value in values:
        y = down(value)
        parts.append(el("path", class_="grid", d=f"M{left} {y:.1f}H{right}"))
        parts.append(label(left - 5, y + 3.5, short_number(value), anchor="end"))
    for value in ticks(*x_range, 3):
        x = across(value)
        parts.append(el("path", class_="tick", d=f"M{x:.1f} {bottom}v4"))
        parts.append(label(x, bottom + 14, short_number(value), anchor="middle"))
    parts.append(el("path", class_="tick", d=f"M{left} {bottom}H{right}"))
    parts.append(label((left + right) / 2, bottom + 29, x_title, anchor="middle"))
    return svg(width, height, *parts, draw(across, down), class_="chart")


def usage_chart(counts):
    """How often each code is used, the commonest first, in per cent of the frames."""
    shares = np.sort(counts)[::-1] * 100 / counts.sum()

    def bars(across, down):
        """The outline of the bars."""
        path = f"M{across(0):.1f} {down(0):.1f}"
        for i, share in enumerate(shares):
            path += f"V{down(share):.1f}H{across(i + 1):.2f}"
        return el("path", class_="bars", d=f"{path}V{down(0):.1f}z")

    title = "codes, the commonest first; % of frames"
    return chart(bars, (0, len(shares)), (0, shares[0]), title)


def usages(usage):
    """The use of the codes of every run that has some."""
    parts = []
    for name, item in usage.items():
        counts = np.asarray(item["counts"], dtype=float)
        if counts.sum() > 0:
            shares = counts[counts > 0] / counts.sum()
            perplexity = math.exp(-(shares * np.log(shares)).sum())
            note = f"{len(shares)} of {len(counts)} in use, perplexity {perplexity:.1f}"
            drawing = captioned(f"{name} {item['name']}", note, usage_chart(counts))
            parts.append(el("div", drawing, class_="card"))
    return el("div", *parts, class_="cards") if parts else ""


def curve(points, title):
    """One metric of a log. points: (step, value), at least one."""
    keep = np.unique(np.linspace(0, len(points) - 1, 300).astype(int))
    points = [points[i] for i in keep]
    values = [value for _, value in points]
    low, high = min(values), max(values)
    log_y = low > 0 and high / low > 50
    if not log_y:
        air = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        low, high = low - air, high + air

    def path(across, down):
        """The curve; a single point is a dot."""
        places = " ".join(f"{across(step):.1f} {down(value):.1f}" for step, value in points)
        return el("path", class_="curve", d=f"M{places}h0")

    note = f"{short_number(values[-1])} at the end" + (", log scale" if log_y else "")
    last = max(points[-1][0], 1)
    return captioned(title, note, chart(path, (0, last), (low, high), "step", log_y))


def curves(logs):
    """The training curves of every run, those of the first one unfolded."""
    parts = []
    for name, lines in logs.items():
        series = {}
        for entry in lines:
            for key, value in entry.items():
                if is_number(value) and is_number(entry.get("step")):
                    series.setdefault(key, []).append((entry["step"], value))
        for key in ("step", "seconds_left", "audio_seconds_per_second"):
            series.pop(key, None)
        if series:
            drawn = [curve(points, key) for key, points in series.items()]
            row = el("div", *drawn, class_="row")
            opened = None if parts else "open"
            parts.append(el("details", el("summary", text(name)), row, open=opened))
    return "".join(parts)


# ---------------------------------------- page ----------------------------------------
STYLE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:24px 20px 64px;max-width:1180px;background:var(--paper);color:var(--ink)}
h1{font-size:26px;line-height:1.2;margin:0 0 8px}
h2{font-size:20px;margin:48px 0 4px;padding-top:12px;border-top:1px solid var(--line)}
h3{font-size:16px;margin:0 0 8px}
h4{font-size:14px;margin:0 0 6px;max-width:334px}
p{margin:4px 0 12px;max-width:46em;text-wrap:pretty}
h1,h2,h3,h4,p,summary,figcaption,li,.metrics th,code{overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:12px 0 18px}
a{color:inherit;text-underline-offset:3px}
small,.of{color:var(--gray);font-weight:400;font-size:12px}
code,.units p{font:12px/1.4 ui-monospace,Menlo,Consolas,monospace}
svg{display:block;max-width:100%;height:auto}
.fig{margin:8px 0 12px;border:1px solid var(--line);border-radius:8px}
.narrow{display:none}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:4px 8px;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td{min-width:4em}
tbody th{font-weight:400}
.of{display:block;max-width:16em;line-height:1.3}
.facts td:not(.n){min-width:9em}
.metrics{align-self:flex-start}
.metrics th{padding-left:0}
thead th{vertical-align:bottom;border-bottom-color:var(--gray)}
thead small,td small{display:block;font-size:11.5px;line-height:1.25}
thead small{min-width:70px}
.n{text-align:right}
td.n{white-space:nowrap}
.pair th{font-weight:400;font-size:12px;padding-top:0}
.before,.before td,.before th{color:var(--gray)}
.before b{font-weight:400}
.best{font-weight:700;background:var(--mark)}
.least{text-decoration:underline dotted;text-underline-offset:3px}
.first>*{border-top:1px solid var(--gray)}
.facts td code{display:block;max-width:28em}
.facts code span{display:inline-block;max-width:100%}
.scroll tbody th,.scroll tr:first-child>th:first-child{position:sticky;left:0;background:var(--paper)}
tbody th .name{white-space:nowrap}
@media(min-width:701px){.scroll tbody th{white-space:nowrap}.scroll .of{white-space:normal}}
.dot{display:inline;vertical-align:-1px}
.cards,.row{display:flex;flex-wrap:wrap;gap:14px}
.card{background:var(--raised);border:1px solid var(--line);border-radius:8px;padding:10px 12px;max-width:100%}
.speech{display:flex;flex-wrap:wrap;gap:12px 40px;flex-basis:100%}
.utterance{margin:20px 0 36px}
figure{margin:0;font-size:13px}
figcaption{margin-bottom:3px}
h4~.clip~.clip{margin-top:12px}
audio{display:block;width:100%;min-width:230px;height:34px;margin-top:2px}
.spectrogram{overflow:visible}
.spectrogram text,.chart text{font:10px FONT;fill:var(--gray);font-variant-numeric:tabular-nums}
.spectrogram g text{fill:var(--ink)}
.spectrogram .token{fill:#111}
.tick{stroke:var(--gray);fill:none}
.grid{stroke:var(--line);fill:none}
.phone{fill:var(--paper);stroke:var(--line)}
.map{width:250px}
.dots{stroke-width:6.4;stroke-linecap:round;opacity:.8}
.bars{fill:var(--gray)}
.curve{fill:none;stroke:#3b82d6;stroke-width:1.6;stroke-linejoin:round;stroke-linecap:round}
.units{max-width:320px;font-size:12px;margin-top:6px}
summary{cursor:pointer;padding:3px 0}
.speakers{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;padding:0;margin:8px 0 14px;font-size:13px}
.speakers i{display:inline-block;width:10px;height:10px;border-radius:5px;margin-right:6px}
@media(max-width:700px){
body{padding:16px 12px 48px}
.wide{display:none}
.narrow{display:block}
.speech{flex-direction:column}
.map{width:162px}
th,td{padding:4px 7px}
tbody th{min-width:8em}
}
"""

# Key, heading and explanation of each section.
SECTIONS = (
    (
        "knows",
        "What each representation knows",
        "In per cent, on held-out utterances. Green marks the one that keeps most of the phones or of "
        "the speaker, a dotted line the one that keeps least of the speaker.",
    ),
    (
        "speech",
        "How the speech comes out",
        "Copies went through the spectrogram and Griffin-Lim alone: they show what the judge and the "
        "probes hear at best. The target of a copy or a reconstruction is its own speaker. Green "
        "marks the best conversion.",
    ),
    (
        "listen",
        "Listen",
        "A section for each test utterance. All spectrograms of a section share one gain and one time scale.",
    ),
    (
        "maps",
        "Maps of utterances",
        "The first two principal components of a vector for each utterance, and the share of the "
        "variance that they hold. The vector is the mean over time where a representation has frames.",
    ),
    ("codes", "Use of the codes", "How often each code occurs."),
    ("curves", "Training", "What each run logged."),
    (
        "runs",
        "Runs",
        "What was run, and the figures that only one method has. The hash is that of the method's code.",
    ),
)


def style_sheet():
    """The style sheet of the page for both themes."""

    def theme(name, variables, scripts):
        """A variable for each color, a class for each script."""
        classes = "".join(f".s{i}{{color:{color}}}" for i, color in enumerate(scripts))
        return f":root{{color-scheme:{name};{variables}}}{classes}"

    light = (
        "--ink:#1f2328;--gray:#59636e;--line:#d9dee3;--paper:#fff;--raised:#f6f8fa;--mark:#dcefe2"
    )
    dark = "--ink:#e6edf3;--gray:#9da7b3;--line:#30363d;--paper:#0d1117;--raised:#151b23;--mark:#17402a"
    dark_theme = f"@media(prefers-color-scheme:dark){{{theme('dark', dark, DARK)}}}"
    body = f"body{{font:15px/1.5 {FONT}}}"
    return el("style", theme("light", light, LIGHT), dark_theme, body, STYLE.replace("FONT", FONT))


def introduction(result, has_phones):
    """What is compared, and when, and how to read the figure."""
    compared = result.get("compared") or {}
    n_runs = len(result["runs"])
    facts = [f"{n_runs} run{'s' * (n_runs != 1)}"]
    if n_runs > 1 and isinstance(compared.get("data"), str):
        facts[0] += " on the same utterances"
    if compared.get("date"):
        date = time.strptime(compared["date"], "%Y-%m-%d")
        facts[0] += f", measured on {time.strftime('%d %B %Y', date).lstrip('0')}"
    if compared.get("data"):
        facts.append(f"probes fitted on {plain(compared['data'])}")
    if compared.get("test") and compared["test"] != compared.get("data"):
        facts.append(f"unseen speakers from {plain(compared['test'])}")
    if compared.get("pairs") is not None:
        facts.append(f"{compared['pairs']} pairs for each kind of speech")
    if compared.get("seed") is not None:
        facts.append(f"seed {compared['seed']}")
    up = "the more unseen speakers are confused"
    if has_phones:
        up = "the more content a linear probe reads from it"
    reading = (
        f"In the figure, each point is a representation. The farther up it lies, {up}; the farther "
        "right, the more a probe knows the speaker. An arrow comes from the same representation of "
        "the untrained model."
    )
    return el("p", text("; ".join(facts) + ".")) + el("p", reading)


def write_page(out, result, material):
    """Writes out/index.html and out/figure.svg. result and material: see compare.py."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    groups = make_groups(result)
    styles = {name: group.style for group in groups for name in group.names}
    titles = {name: dot(styles[name]) + text(name) for name in result["runs"]}
    rows = material.get("rows") or []
    contents = {
        "knows": representation_table(groups),
        "speech": spoken_table(groups),
        "listen": "".join(utterance_section(row, titles) for row in rows),
        "maps": maps(material.get("vectors") or {}),
        "codes": usages(material.get("usage") or {}),
        "curves": curves(material.get("logs") or {}),
        "runs": run_table(result) + metric_tables(result),
    }
    links = []
    sections = []
    for key, heading, note in SECTIONS:
        if contents[key]:
            links.append(el("a", heading, href=f"#{key}"))
            sections.append(el("h2", heading, id=key) + el("p", note) + contents[key])

    title = el("title", text(f"Speech disentanglement: {', '.join(result['runs'])}"))
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"{title}{style_sheet()}</head><body><h1>Speech disentanglement, side by side</h1>",
        introduction(result, has_phones(groups)) + el("nav", *links),
        el("div", figure(result, 1138), class_="wide"),
        el("div", figure(result, 366), class_="narrow"),
        *sections,
        "</body></html>\n",
    ]
    (out / "figure.svg").write_text(figure(result), "utf-8")
    (out / "index.html").write_text("\n".join(parts), "utf-8")
