"""What the pages say can be followed: links lead somewhere, commands are ones that there are."""

from __future__ import annotations

import functools
import json
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import servers
from agents import COMMAND, Agent
from chart import ROOT, helm
from prometheus import until

import tierkeep

#: Built, fetched, or somebody else's.
NOT_OURS = {"target", "build", "node_modules"}


@functools.cache
def pages() -> list[Path]:
    found = []
    for path in ROOT.rglob("*.md"):
        folders = path.relative_to(ROOT).parts[:-1]
        if not any(name in NOT_OURS or name.startswith(".") for name in folders):
            found.append(path)
    assert len(found) > 10
    return sorted(found)


def blocks(page: Path) -> Iterator[str]:
    """What is set as code: fenced, or indented after a line that is empty."""
    text = page.read_text()
    yield from re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = r"(?:(?<=\n\n)|\A)((?: {4,}.*\n)+)"
    yield from (block for block in re.findall(indented, re.sub(r"```.*?```", "", text, flags=re.S)))


def prose(text: str) -> str:
    """Without what is set as code: there brackets mean something else."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.sub(r"``.+?``|`[^`\n]+`", "", text)


@functools.cache
def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to headings."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (one := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(one)
    return found


def test_links_between_files_lead_somewhere() -> None:
    lost, seen = [], 0
    for page in pages():
        text = prose(page.read_text())
        named = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"^\[[^]]+\]: (\S+)", text, re.M)
        for link in named:
            if re.match(r"[a-z]+:", link):
                continue
            seen += 1
            path, _, anchor = unquote(link).partition("#")
            to = (page.parent / path).resolve() if path else page
            if not to.exists() or not to.is_relative_to(ROOT):
                lost.append(f"{page.relative_to(ROOT)}: {link}: there is no such file")
            elif anchor and (to.suffix != ".md" or anchor not in anchors(to)):
                lost.append(f"{page.relative_to(ROOT)}: {link}: there is no such heading")
    assert lost == [] and seen > 40


def test_the_readme_leads_to_every_page_of_docs() -> None:
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\(docs/([\w-]+\.md)\)", readme))
    assert named == {page.name for page in (ROOT / "docs").glob("*.md")}


def lines(words: str) -> list[tuple[Path, str]]:
    """The lines of code that begin so, as a shell would join them."""
    found = []
    for page in pages():
        for block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                if line.strip().startswith(words):
                    found.append((page, line.strip()))
    return found


def test_helm_commands_are_ones_that_the_chart_takes() -> None:
    said = lines("helm install") + lines("helm upgrade")
    assert len(said) >= 5
    for page, line in said:
        words = shlex.split(line, comments=True)
        assert words[2:4] == ["tierkeep", "charts/tierkeep"], (page, line)
        flags = [str(ROOT / word) if word.endswith(".yaml") else word for word in words[4:]]
        done = helm("template", "tierkeep", str(ROOT / "charts" / "tierkeep"), *flags)
        assert done.returncode == 0, (page, line, done.stderr)
        # What other commands call it.
        assert re.search(r"^kind: DaemonSet\nmetadata:\n  name: tierkeep$", done.stdout, re.M), line
        kept = re.findall(r"^kind: Secret\nmetadata:\n  name: (\S+)$", done.stdout, re.M)
        assert {"tierkeep-cluster", "tierkeep-tls"} >= set(kept) >= {"tierkeep-cluster"}, line


def test_make_targets_are_there_and_files_that_commands_name_too() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    said = lines("make ")
    assert len(said) >= 3
    for page, line in said:
        target = shlex.split(line, comments=True)[1]
        assert target in targets, (page, line)
    for page, line in lines("docker build") + lines("podman build"):
        words = shlex.split(line, comments=True)
        assert (ROOT / words[words.index("--file") + 1]).is_file(), (page, line)
    for page, line in lines("sudo install -"):
        for word in shlex.split(line, comments=True)[2:]:
            if "/" in word and not word.startswith(("/", "target/")):
                assert (ROOT / word).is_file(), (page, line)


def test_the_certificates_and_settings_of_the_install_page_are_good(
    tmp_path: Path, ram: Path
) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("NO OPENSSL, the install page's certificates are not tried: `make lab-tools`")
    page = ROOT / "docs" / "install.md"
    _, _, after = page.read_text().partition("<!-- certificates")
    script = re.search(r"\n\n((?: {4}.*\n)+)", after)
    assert script
    done = subprocess.run(["sh", "-euc", script[1]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    [toml] = [block for block in blocks(page) if "cluster_key" in block and " = " in block]
    here = toml.replace("/etc/tierkeep", str(tmp_path)).replace("480GiB", "64MiB")
    free = servers.ports(3)
    agents = []
    try:
        for index, port in enumerate(free[:2]):
            own = here.replace("10.0.0.17:9178", f"127.0.0.1:{port}", 1)
            own = own.replace("10.0.0.17:9178", f"127.0.0.1:{free[0]}")
            own = own.replace("10.0.0.18:9178", f"127.0.0.1:{free[1]}")
            own = own.replace("127.0.0.1:9177", f"127.0.0.1:{free[2]}" if index == 0 else "off")
            place = ram / f"n{index}"
            place.mkdir()
            settings = tmp_path / f"agent{index}.toml"
            settings.write_text(own)
            agents.append(Agent(place, "--config", str(settings), "--node", place.name))

        def members() -> set[str]:
            status = [COMMAND, "status", "--cluster", "--json", "--agent", str(agents[0].socket)]
            said = subprocess.run(status, capture_output=True, text=True, check=True).stdout
            return {member["name"] for member in json.loads(said)["members"]}

        until("both agents see each other", lambda: members() == {"n0", "n1"})
        # Only then do the certificates count.
        state = {"weights": np.ones(1000, np.float32)}
        with tierkeep.Checkpointer(tmp_path / "run", agent=str(agents[0].socket)) as ckpt:
            ckpt.restore(state)
            ckpt.save(1, state).wait("peer", timeout_s=60)
    finally:
        for agent in agents:
            agent.stop(signal.SIGKILL)
