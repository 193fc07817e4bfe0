"""The status page of real agents, in a real browser.

`test_page_states.py` has what is hard to bring about: nodes lost, disks full, buckets away.
"""

from __future__ import annotations

import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import page_data
import pytest
import servers
from agents import Agent
from browser import Tab, chromium
from playwright.sync_api import Browser, expect

import tierkeep

# The page asks every 5 s, and takes an agent for gone after 20 s; the rest is for a busy machine.
PATIENCE_MS = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def served(ram: Path, *settings: str) -> tuple[Agent, str]:
    """An agent with a page, and where that is."""
    port = servers.ports(1)[0]
    agent = Agent(ram, "--http", f"127.0.0.1:{port}", *settings)
    url = f"http://127.0.0.1:{port}/"
    try:
        until(f"{url} answers", lambda: answers(url + "readyz"))
    except BaseException:
        agent.stop(signal.SIGKILL)
        raise
    return agent, url


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def until(what: str, so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not so():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def state(step: int) -> dict[str, Any]:
    return {"w": np.full(300_000, step, np.float32), "step": step}


def shown(n: float) -> str:
    """Bytes, as the page has them."""
    unit = 0
    while n >= 1024:
        n, unit = n / 1024, unit + 1
    return f"{n:.1f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def box(tab: Tab, tier: str) -> Any:
    """The number of a tier."""
    return tab.page.locator(f".tier.{tier} b")


def agrees(tab: Tab, data: dict[str, Any], run: Path) -> None:
    """What is on the page is what the agent said."""
    (rank,) = data["status"]["ranks"]
    card = tab.page.locator("section[data-run]")
    expect(card.locator("h2")).to_have_text(str(run))
    expect(card).to_contain_text("rank 0 of 1 here")
    expect(card).to_contain_text("training")
    assert rank["destination"] == str(run) and rank["pid"] is not None
    for tier in ("ram", "disk"):
        expect(box(tab, tier)).to_have_text(str(rank[f"{tier}_step"]))
    ram, limit = data["status"]["ram_bytes"], data["status"]["ram_limit_bytes"]
    expect(tab.page.locator("#ram")).to_have_text(f"RAM tier: {shown(ram)} of {shown(limit)}")
    meter = tab.page.locator("[role=meter]")
    assert meter.get_attribute("aria-valuenow") == str(round(100 * ram / limit))


def form(value: Any) -> Any:
    """Names only: what a document looks like, whatever is in it."""
    if isinstance(value, dict):
        return {name: form(part) for name, part in value.items()}
    return [form(part) for part in value[:1]] if isinstance(value, list) else None


def test_a_node_is_told_live_and_an_agent_that_is_gone_is_not_taken_for_one(
    browser: Browser, ram: Path, run: Path
) -> None:
    agent, url = served(ram)
    tab = Tab(browser)
    try:
        data = tab.open(url)
        said = tab.page.locator("#verdict")
        expect(said).to_have_text("No trainer has come yet")
        assert data["status"]["ranks"] == [] and data["cluster"] is None
        with tierkeep.Checkpointer(run, disk_every=2) as ckpt:
            ckpt.restore(state(0))
            for step in (1, 2):
                ckpt.save(step, state(step)).wait("ram", timeout_s=60)
            ckpt.save(3, state(3)).wait("ram", timeout_s=60)
            # It is not loaded anew: what is new comes by itself.
            expect(box(tab, "ram")).to_have_text("3", timeout=PATIENCE_MS)
            expect(box(tab, "disk")).to_have_text("2", timeout=PATIENCE_MS)
            agrees(tab, tab.next(), run)
            expect(said).to_have_text(f"If this node were lost now, {run} would lose everything")
            expect(said).to_have_class("verdict warn")
            ckpt.save(4, state(4)).wait("disk", timeout_s=60)
            expect(box(tab, "disk")).to_have_text("4", timeout=PATIENCE_MS)
            # What is drawn over time has come meanwhile.
            expect(tab.page.locator("svg")).to_have_count(2, timeout=PATIENCE_MS)
            tab.screenshot("real-node")
            # Nothing is asked of anybody else, and nothing is amiss.
            assert {u.removeprefix(url) for u in tab.requests} == {"", "status.json"}
            assert tab.complaints == []

            agent.stop(signal.SIGKILL)
            when = tab.page.locator("#when")
            expect(when).to_contain_text("no answer; as of", timeout=PATIENCE_MS)
            expect(said).to_contain_text("The agent does not answer: ", timeout=PATIENCE_MS)
            expect(said).to_contain_text("What is below is old")
            expect(said).to_have_class("verdict bad")
            expect(tab.page.locator("main")).to_have_class("stale")
            assert tab.page.title() == "tierkeep: no answer"
            tab.screenshot("real-node-gone")

            agent.start()
            ckpt.save(5, state(5)).wait("ram", timeout_s=60)
            expect(box(tab, "ram")).to_have_text("5", timeout=PATIENCE_MS)
            expect(said).to_have_class("verdict warn")
            expect(when).not_to_contain_text("no answer")
            assert tab.page.locator(".stale").count() == 0
            assert tab.page.title().startswith("tierkeep: 127.0.0.1")
            agrees(tab, tab.next(), run)
            # All that it complained of is the agent that was away.
            away = "Failed to load resource: net::ERR_"
            assert tab.complaints and all(c.startswith(away) for c in tab.complaints)
    finally:
        tab.close()
        agent.stop(signal.SIGKILL)
        agent.log.unlink()


def test_nodes_are_told_of_each_other_and_of_one_that_is_lost(
    browser: Browser, ram: Path, run: Path, tmp_path: Path
) -> None:
    key = tmp_path / "cluster.key"
    key.write_text("a key of this test's own")
    ports = servers.ports(2)
    seeds = ",".join(f"127.0.0.1:{port}" for port in ports)
    agents, urls = [], []
    tab = Tab(browser)
    try:
        for index, port in enumerate(ports):
            place = ram / f"ram{index}"
            place.mkdir()
            agent, url = served(
                place, "--insecure", "--cluster-key", str(key), "--seeds", seeds,
                "--gossip", f"127.0.0.1:{port}", "--node", f"n{index}",
                "--labels", f"host=h{index}",
            )  # fmt: skip
            agents.append(agent)
            urls.append(url)
        tab.open(urls[0])
        nodes = tab.page.locator("#nodes")
        expect(nodes).to_contain_text("2 agents alive, as n0 sees it", timeout=PATIENCE_MS)
        more: dict[str, Any] = {"agent": str(agents[0].socket), "disk_every": 1000}
        with tierkeep.Checkpointer(run, replicas=1, **more) as ckpt:
            ckpt.restore(state(0))
            ckpt.save(1, state(1)).wait("peer", timeout_s=60)
            said = tab.page.locator("#verdict")
            safe = "Any one node can be lost: no step is lost with it"
            expect(said).to_have_text(safe, timeout=PATIENCE_MS)
            expect(box(tab, "peer")).to_have_text("1", timeout=PATIENCE_MS)
            row = tab.page.locator("[data-node=n1] td")
            words = ["n1", "step 1 (1 shard)", "\u2013", "nothing", "host h1"]
            expect(row).to_have_text(words, timeout=PATIENCE_MS)
            while not (data := tab.next())["history"]:
                pass  # It is looked at every few seconds.
            # The form of data that other tests make up is this one.
            wanted = page_data.document(
                [page_data.rank(destination=str(run))],
                page_data.cluster(
                    ["n0", "n1"],
                    page_data.across(1, {"n0": 1, "n1": 1}, [(0, "n0", "ram", 1)], run=str(run)),
                ),
                peers=page_data.peers(2),
                history={str(run): page_data.history()},
            )
            for made in (data, wanted):
                for member in made["cluster"]["members"]:
                    member["labels"] = {}
            assert form(data) == form(wanted)

            agents[1].stop(signal.SIGKILL)
            lost = f"If n0 were lost now, {run} would lose everything"
            expect(said).to_have_text(lost, timeout=PATIENCE_MS)
            expect(tab.page.locator(".tier.peer")).to_contain_text("copies missing")
            expect(nodes).to_contain_text("1 agent alive, 1 lost, as n0 sees it")
            expect(tab.page.locator("body")).to_contain_text("rank 0: 0 of 1 copy on other nodes")
            tab.screenshot("real-nodes-one-lost")
            agents[1].start()
            expect(said).to_have_text(safe, timeout=PATIENCE_MS)
            assert tab.complaints == []
    finally:
        tab.close()
        for agent in agents:
            agent.stop(signal.SIGKILL)


def test_the_browser_is_told_to_run_nothing_but_the_page(ram: Path) -> None:
    agent, url = served(ram)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            assert answer.headers["content-security-policy"] == page_data.POLICY
            # The wheel has this tree's page.
            assert answer.read() == page_data.HTML.read_bytes()
    finally:
        agent.stop(signal.SIGKILL)
        agent.log.unlink()


def test_without_a_browser_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import browser as module

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TIERKEEP_LAB", "require")
    with pytest.raises(pytest.fail.Exception, match="NO CHROMIUM"):
        module.executable()
    monkeypatch.delenv("TIERKEEP_LAB")
    with pytest.raises(pytest.skip.Exception, match="NO CHROMIUM"):
        module.executable()
