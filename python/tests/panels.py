"""The chart's dashboard: its queries as Grafana sends them, and its panels drawn.

Grafana itself is in no package registry that tests can use. What an operator has to be able to read
is drawn from the same file: titles, units, legends, thresholds, what is a number and what a graph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from prometheus import Prometheus, Series

Panel = dict[str, Any]

#: Samples are a second apart here: four of them, as Grafana has it.
RATE_INTERVAL = "4s"


def variables(board: dict[str, Any], server: Prometheus) -> dict[str, str]:
    """What Grafana puts in the place of each variable while "All" is chosen."""
    found: dict[str, str] = {}
    for one in board["templating"]["list"]:
        if one["type"] != "query":
            continue
        text = fill(one["query"]["query"], found)
        asked = re.fullmatch(r"label_values\((.+), (\w+)\)", text)
        assert asked, f"a query of another kind: {text}"
        values = server.values(*asked.groups())
        assert values, f"nothing to choose from: {text}"
        every = "|".join(re.sub(r"([$^*{}\[\]'+?.()|])", r"\\\\\1", value) for value in values)
        found[one["name"]] = one.get("allValue") or f"({every})"
    return found


def fill(text: str, values: Mapping[str, str]) -> str:
    for name, value in {**values, "__rate_interval": RATE_INTERVAL}.items():
        text = re.sub(rf"\${name}\b", value.replace("\\", r"\\"), text)
    assert "$" not in re.sub(r'"[^"]*"', "", text), f"a variable that there is not: {text}"
    return text


def legend(form: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda m: labels.get(m[1], ""), form)


@dataclass
class Drawn:
    """A panel with what its targets answered: names, and points."""

    panel: Panel
    lines: list[tuple[str, list[tuple[float, float]]]]


def ask(
    panel: Panel, server: Prometheus, values: Mapping[str, str], start: float, end: float
) -> dict[str, list[Series]]:
    """By its letter, what each target of a panel has; one that is `instant` at the end alone."""
    answers = {}
    for target in panel["targets"]:
        first = end if target.get("instant") else start
        answers[target["refId"]] = server.range(fill(target["expr"], values), first, end)
    return answers


def drawn(panel: Panel, answers: Mapping[str, list[Series]]) -> Drawn:
    """Points that are numbers, under the names that their legends give."""
    lines = []
    for target in panel["targets"]:
        for labels, points in answers[target["refId"]]:
            numbers = [(at, value) for at, value in points if math.isfinite(value)]
            lines.append((legend(target["legendFormat"], labels), numbers))
    return Drawn(panel, lines)


# -- numbers ------------------------------------------------------------------------------------


def _scaled(value: float, base: float, units: tuple[str, ...]) -> str:
    size = 0
    while abs(value) >= base and size + 1 < len(units):
        value, size = value / base, size + 1
    value = round(value, 6)
    digits = 0 if value == int(value) else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}{units[size]}"


_IEC = (" B", " KiB", " MiB", " GiB", " TiB")


def number(value: float, unit: str) -> str:
    """As Grafana writes it, in the units that the dashboard uses; another unit is a mistake."""
    if unit == "short":
        return _scaled(value, 1000, ("", " K", " Mil", " Bil"))
    if unit == "percentunit":
        return f"{_scaled(value * 100, math.inf, ('',))}%"
    if unit == "s":
        if 0 < abs(value) < 1:
            return f"{value * 1e3:.1f} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.0f} \u00b5s"
        return _scaled(value, math.inf, (" s",))
    return _scaled(value, 1024, {"bytes": _IEC, "binBps": tuple(f"{u}/s" for u in _IEC)}[unit])


# -- the page -----------------------------------------------------------------------------------

_COLUMN, _ROW, _GAP = 66, 38, 8
_COLOURS = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#5794f2", "#b877d9", "#ffee52")
_NAMED = {"green": "#37872d", "red": "#c4162a", "blue": "#1f60c4", "orange": "#c15c00"}
_STYLE = """
body { margin: 0; background: #111217; color: #ccccdc; font: 13px sans-serif; position: relative; }
section { position: absolute; box-sizing: border-box; background: #181b1f; overflow: hidden;
  border: 1px solid #2c3235; border-radius: 2px; padding: 6px 8px; display: flex;
  flex-direction: column; }
h2 { font-size: 14px; font-weight: 500; margin: 0 0 4px; }
.legend { line-height: 18px; max-height: 72px; overflow: auto; }
.legend span { display: inline-block; margin-right: 14px; }
.legend i { display: inline-block; width: 14px; height: 4px; margin: 3px 5px; border-radius: 2px; }
.tiles { flex: 1; display: flex; gap: 4px; min-height: 0; }
.tiles.list { flex-flow: row wrap; align-content: flex-start; }
.tile { flex: 1; display: flex; align-items: center; justify-content: center; color: #fff;
  font-size: 30px; }
.list .tile { flex: 0 1 auto; font-size: 14px; padding: 5px 10px; }
svg { flex: 1; min-height: 0; } svg text { fill: #9a9ba5; font-size: 11px; }
"""


def page(all_of_them: list[Drawn], start: float, end: float, title: str) -> str:
    """Where the dashboard has them."""
    parts, bottom = [], 0
    for one in all_of_them:
        at = one.panel["gridPos"]
        x, y, w, h = (at["x"] * _COLUMN, at["y"] * _ROW, at["w"] * _COLUMN, at["h"] * _ROW)
        bottom = max(bottom, y + h)
        inner = _stat(one) if one.panel["type"] == "stat" else _graph(one, w, h, start, end)
        parts.append(
            f'<section data-panel="{one.panel["id"]}" style="left:{x}px;top:{y}px;'
            f'width:{w - _GAP}px;height:{h - _GAP}px"><h2>{escape(one.panel["title"])}</h2>'
            f"{inner}</section>"
        )
    style = f"{_STYLE} body {{ width: {24 * _COLUMN}px; height: {bottom}px; }}"
    return (
        f'<!doctype html><html lang="en"><title>{escape(title)}</title><style>{style}</style>'
        f"<body>{''.join(parts)}</body></html>"
    )


def _stat(one: Drawn) -> str:
    defaults, options = one.panel["fieldConfig"]["defaults"], one.panel["options"]
    last = [(name, points[-1][1]) for name, points in one.lines if points]
    if not last:
        return f'<div class="tiles"><div class="tile">{escape(defaults["noValue"])}</div></div>'
    tiles = []
    for name, value in last:
        colour = defaults.get("color", {}).get("fixedColor")
        for step in defaults.get("thresholds", {}).get("steps", []):
            if step["value"] is None or value >= step["value"]:
                colour = step["color"]
        named = options["textMode"] == "name"
        text = name if named else number(value, defaults["unit"])
        tiles.append(f'<div class="tile" style="background:{_NAMED[colour]}">{escape(text)}</div>')
    shape = "tiles list" if options["textMode"] == "name" else "tiles"
    return f'<div class="{shape}">{"".join(tiles)}</div>'


def _ticks(top: float, unit: str) -> list[float]:
    """Some four round numbers up to `top`."""
    base = 1024.0 if unit in ("bytes", "binBps") else 10.0
    size = base ** math.floor(math.log(top, base))
    steps = [size * n / 10 for n in (0.1, 0.2, 0.5, 1, 2, 2.5, 5, 10, 20, 50, 100, 200, 500, 1000)]
    step = next(step for step in steps if top / step <= 5)
    return [step * n for n in range(int(top / step) + 1)]


def _graph(one: Drawn, width: int, height: int, start: float, end: float) -> str:
    defaults = one.panel["fieldConfig"]["defaults"]
    unit = defaults["unit"]
    wide, high, left, low = width - 30, height - 70, 74, 24
    highest = max((v for _, points in one.lines for _, v in points), default=0)
    top = defaults.get("max") or highest * 1.05 or 1

    def place(at: float, value: float) -> str:
        x = left + (at - start) / (end - start) * (wide - left)
        return f"{x:.1f},{(high - low) * (1 - value / top) + 8:.1f}"

    drawing = []
    for tick in _ticks(top, unit):
        if defaults.get("decimals") == 0 and tick != int(tick):
            continue
        x, y = place(start, tick).split(",")
        drawing.append(f'<path d="M{x},{y}H{wide}" stroke="#2c3235"/>')
        words = escape(number(tick, unit))
        drawing.append(f'<text x="{left - 6}" y="{float(y) + 4}" text-anchor="end">{words}</text>')
    for second in range(0, int(end - start) + 1, 5):
        x = place(start + second, 0).split(",")[0]
        drawing.append(f'<text x="{x}" y="{high}" text-anchor="middle">{second} s</text>')
    keys = []
    for index, (name, points) in enumerate(one.lines):
        colour = _COLOURS[index % len(_COLOURS)]
        # A gap is a gap: where two points are more than a second apart nothing is drawn.
        runs: list[list[tuple[float, float]]] = []
        for point in points:
            if runs and point[0] - runs[-1][-1][0] <= 1.5:
                runs[-1].append(point)
            else:
                runs.append([point])
        for run in runs:
            line = " ".join(place(*point) for point in run)
            drawing.append(
                f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
        value = f" &nbsp;{escape(number(points[-1][1], unit))}" if points else ""
        keys.append(f'<span><i style="background:{colour}"></i>{escape(name)}{value}</span>')
    return (
        f'<svg viewBox="0 0 {wide} {high}" preserveAspectRatio="none">{"".join(drawing)}</svg>'
        f'<div class="legend">{"".join(keys) or "No data"}</div>'
    )
