"""The table of values in the chart's README, made from values.yaml and values.schema.json.

python charts/tools/table.py           # prints it
python charts/tools/table.py --write   # puts it into the README
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[1] / "tierkeep"
BEGIN, END = "<!-- values: made by charts/tools/table.py -->", "<!-- end of values -->"


def rows(schema: dict[str, Any], values: Any, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """Path, default and description of each value."""
    for key, inner in schema["properties"].items():
        if key == "global":  # Helm's own.
            continue
        here = f"{path}{key}"
        if "properties" in inner and values[key]:
            yield from rows(inner, values[key], f"{here}.")
        else:
            yield here, values[key], inner["description"]


def table() -> str:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = ["| value | default | what |", "|---|---|---|"]
    for path, default, what in rows(schema, values):
        if isinstance(default, list) and default:
            told = "see [values.yaml](values.yaml)"
        else:
            told = f"`{default if isinstance(default, str) and default else json.dumps(default)}`"
        lines.append(f"| `{path}` | {told} | {what.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:] not in ([], ["--write"]):
        raise SystemExit("usage: table.py [--write]")
    if not sys.argv[1:]:
        print(table())
        return
    page = CHART / "README.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
