"""The status page in all kinds of states, with data that is made up: what a person reads, and how.

`test_page.py` has it with a real agent. Screenshots go to `build/screenshots`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from browser import PHONE, WIDE, Tab, chromium
from page_data import RUN, Canned, across, cluster, document, eight_nodes, history, peers, rank
from playwright.sync_api import Browser, expect

THREE = ["n1", "n2", "n3"]
HELD = [(0, "n1", "ram", 100), (0, "n1", "disk", 90), (0, "n2", "ram", 100)]
HOSTILE = '/runs/<img src=x onerror="document.title=`owned`"></h2><script>alert(1)</script>'
HOSTILE_NODE = '"><svg onload=alert(2)>'


def one(**more: Any) -> dict[str, Any]:
    """A node without others, with one rank."""
    return document([rank(**more)])


def three(
    newest: int | None,
    without: dict[str, int | None],
    *,
    copies: tuple[int, int] = (1, 1),
    told: tuple[str, ...] = (),
    trouble: str | None = None,
    lost: int = 0,
    held: list[tuple[int, str, str, int]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Three nodes; the one that is asked has rank 0."""
    alive = THREE[: 3 - lost]
    run = across(newest, without, HELD if held is None else held, trouble=told)
    own = rank(peer=100, copies=copies, **more)
    around = cluster(alive, run)
    return document([own], around, peers=peers(3 - lost, lost), trouble=trouble)


# Name, data, how bad it is, all of the verdict, more words that are somewhere on the page.
STATES: list[tuple[str, dict[str, Any], str, str, tuple[str, ...]]] = [
    ("no_ranks", document([]), "good", "No trainer has come yet", ()),
    (
        "no_checkpoint",
        one(ram=None, disk=None, attempt=None),
        "good",
        "No checkpoint yet",
        ("rank 0 of 1 here", "not begun"),
    ),
    (
        "one_node",
        one(),
        "warn",
        f"If this node were lost now, {RUN} would lose everything",
        ("in RAM 100", "on disk 90 10 steps behind", "attempt 1 \u00b7 training"),
    ),
    (
        "ram_only",
        one(disk=None, carrying=100),
        "warn",
        f"If this node were lost now, {RUN} would lose everything",
        ("on disk \u2013 step 100 on its way",),
    ),
    (
        "bucket_behind",
        one(bucket="s3://b/r", object_step=60, sending=90),
        "warn",
        f"If this node were lost now, {RUN} would lose 40 steps",
        ("in the bucket 60 step 90 on its way",),
    ),
    (
        "bucket_has_all",
        one(disk=100, bucket="s3://b/r", object_step=100),
        "good",
        "This node can be lost: its newest steps are in the bucket",
        ("in the bucket 100 up to date",),
    ),
    (
        "disk_full",
        one(trouble="could not write step 100: No space left on device (os error 28)"),
        "bad",
        f"Nothing goes to disk: see below. If this node were lost now, {RUN} would lose everything",
        ("rank 0: nothing goes to disk: could not write step 100: No space left on device",),
    ),
    (
        "bucket_away",
        three(
            100,
            dict.fromkeys(THREE, 100),
            bucket="s3://b/r",
            object_step=60,
            object_trouble="403 Forbidden",
            object_trouble_s=300.0,
        ),
        "bad",
        "Nothing goes to the bucket: see below",
        ("rank 0: the bucket has not answered for 5 min: 403 Forbidden",),
    ),
    (
        "disk_and_bucket",
        one(trouble="full", bucket="s3://b/r", object_step=100, object_trouble="down"),
        "bad",
        "Nothing goes to disk: see below. Nothing goes to the bucket: see below",
        (),
    ),
    (
        "trainer_gone",
        one(pid=None, gone_s=130.0),
        "warn",
        f"If this node were lost now, {RUN} would lose everything",
        ("0 of 1 trainer alive", "rank 0: its trainer has been gone for 2 min"),
    ),
    (
        "healthy",
        three(100, dict.fromkeys(THREE, 100)),
        "good",
        "Any one node can be lost: no step is lost with it",
        ("on other nodes 100 up to date", "3 agents alive, as n1 sees it", "n1 (this one)"),
    ),
    (
        "copy_on_its_way",
        three(100, {"n1": 90, "n2": 100, "n3": 100}),
        "warn",
        f"If n1 were lost now, {RUN} would lose 10 steps",
        (f"{RUN} would lose 10 steps",),
    ),
    (
        "two_would_cost",
        three(100, {"n1": None, "n2": 90, "n3": 100}),
        "warn",
        f"If n1 were lost now, {RUN} would lose everything; 1 other node would cost steps too",
        (),
    ),
    (
        "bucket_behind_nodes",
        three(100, {"n1": None, "n2": 100}, bucket="s3://b/r", object_step=80),
        "warn",
        f"If n1 were lost now, {RUN} would lose 20 steps",
        (),
    ),
    (
        "fewer_copies",
        three(100, dict.fromkeys(THREE, 100), copies=(1, 2)),
        "warn",
        "Any one node can be lost, but fewer copies are on other nodes than are wanted: see below",
        ("on other nodes 100 copies missing", "rank 0: 1 of 2 copies on other nodes"),
    ),
    (
        "one_did_not_answer",
        three(100, {"n1": None, "n3": 100}, told=("n2: no answer within 10 s",)),
        "warn",
        "Not known what the loss of a node would cost: see below",
        (f"{RUN}: n2: no answer within 10 s", "not known"),
    ),
    (
        "none_was_asked",
        three(None, {}, trouble="the host did not answer within 5 s"),
        "warn",
        "Not known what the loss of a node would cost: see below",
        ("not all is known: the host did not answer within 5 s",),
    ),
    (
        "lost_and_made_again",
        three(100, {"n1": 100, "n2": 100}, lost=1),
        "good",
        "Any one node can be lost: no step is lost with it",
        ("2 agents alive, 1 lost, as n1 sees it",),
    ),
    (
        "lost_with_its_copies",
        three(100, {"n1": None}, lost=2, copies=(0, 1), held=HELD[:2]),
        "warn",
        f"If n1 were lost now, {RUN} would lose everything",
        ("1 agent alive, 2 lost, as n1 sees it", "rank 0: 0 of 1 copy on other nodes"),
    ),
    (
        "lost_with_its_ranks",
        three(None, {"n1": None, "n2": None}, lost=1, world=8),
        "bad",
        f"No live node has ranks 1-7 of {RUN}: nothing of it can be restored",
        (),
    ),
    (
        "lost_but_in_the_bucket",
        three(None, {}, lost=1, world=2, bucket="s3://b/r", object_step=80),
        "bad",
        f"No live node has rank 1 of {RUN}: it can go on from step 80 in the bucket",
        (),
    ),
    (
        "still_named",
        three(100, {"n1": 90, "n2": 100, "n4": 90}, held=[*HELD, (0, "n4", "ram", 90)]),
        "warn",
        f"If n1 were lost now, {RUN} would lose 10 steps; 1 other node would cost steps too",
        ("not alive",),
    ),
    (
        "replaced",
        document([], cluster(THREE, replaced=True, refused_packets=1), peers=peers(3)),
        "bad",
        "Another agent, which began later, has this node's name",
        ("1 packet of gossip had not this cluster's key",),
    ),
    (
        "to_go_away",
        document(
            [rank(peer=100, copies=(1, 1))],
            cluster(
                THREE,
                across(100, dict.fromkeys(THREE, 100), HELD),
                leaving={"n1": "it is cordoned", "n3": "Karpenter takes it down"},
            ),
            peers=peers(3),
            leaving="it is cordoned",
        ),
        "good",
        "Any one node can be lost: no step is lost with it",
        (
            "This node is to go away: it is cordoned. What is newest goes to disk and bucket",
            "to go away: Karpenter takes it down",
        ),
    ),
    (
        "only_holds",
        document(
            [],
            cluster(THREE, across(100, dict.fromkeys(THREE, 100), HELD)),
            peers=peers(3, shards=2),
        ),
        "good",
        "Any one node can be lost: no step is lost with it",
        ("step 100 can be restored; its ranks are on other nodes", "2 shards (6.0 GiB) for ranks"),
    ),
    (
        "hostile",
        document(
            [rank(destination=HOSTILE, trouble=f"<b>{HOSTILE_NODE}</b>")],
            cluster(
                ["n1", HOSTILE_NODE],
                across(100, {HOSTILE_NODE: 90, "n1": 100}, HELD, run=HOSTILE, trouble=()),
            ),
            peers=peers(2),
        ),
        "bad",
        "Nothing goes to disk: see below. "
        f"If {HOSTILE_NODE} were lost now, {HOSTILE} would lose 10 steps",
        (HOSTILE, HOSTILE_NODE, f"rank 0: nothing goes to disk: <b>{HOSTILE_NODE}</b>"),
    ),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def canned() -> Iterator[Canned]:
    canned = Canned()
    yield canned
    canned.close()


@pytest.fixture(scope="module")
def shared(browser: Browser) -> Iterator[Tab]:
    tab = Tab(browser)
    yield tab
    tab.close()


def words(tab: Tab) -> str:
    """All that is on the page, on one line."""
    return " ".join(tab.text("body").split())


@pytest.mark.parametrize(
    ("data", "how", "verdict", "more"), [s[1:] for s in STATES], ids=[s[0] for s in STATES]
)
def test_what_a_person_reads(
    shared: Tab,
    canned: Canned,
    data: dict[str, Any],
    how: str,
    verdict: str,
    more: tuple[str, ...],
) -> None:
    canned.data = data
    shared.requests.clear()
    shared.open(canned.url)
    said = shared.page.locator("#verdict")
    expect(said).to_have_text(verdict)
    expect(said).to_have_class(f"verdict {how}")
    found = words(shared)
    assert all(text in found for text in more), found
    assert not any(word in found for word in ("undefined", "NaN", "null", "[object")), found
    assert shared.page.title().startswith("tierkeep: ")
    assert shared.page.locator("img").count() == 0 and shared.complaints == []
    assert all(url.startswith(canned.url) for url in shared.requests), shared.requests


def test_what_is_not_known_is_not_told_of_a_node(shared: Tab, canned: Canned) -> None:
    canned.data = next(s[1] for s in STATES if s[0] == "one_did_not_answer")
    shared.open(canned.url)
    for node in ("n1", "n2", "n3"):
        expect(shared.page.locator(f"[data-node={node}] td").nth(3)).to_have_text("not known")


def test_an_agent_that_cannot_say_is_told_in_its_words(browser: Browser, canned: Canned) -> None:
    canned.data = "the host did not answer within 5 s\n"
    tab = Tab(browser)
    tab.page.goto(canned.url)
    said = tab.page.locator("#verdict")
    expect(said).to_have_text("The agent does not answer: the host did not answer within 5 s")
    assert tab.text("main") == ""
    # It goes on asking.
    canned.data = one()
    expect(said).to_have_text(STATES[2][3], timeout=60_000)
    assert tab.page.title().startswith("tierkeep: 127.0.0.1")
    tab.close()


def test_each_rank_is_there_and_stays_open_while_the_page_is_drawn_anew(
    browser: Browser, canned: Canned
) -> None:
    canned.data = eight_nodes()
    tab = Tab(browser)
    tab.open(canned.url)
    tab.page.get_by_text("each rank").click()
    row = tab.page.locator("[data-rank='5'] td")
    expect(row).to_have_text(["5", "pid 4716", "4820", "4800", "4810", "4740"])
    canned.data["status"]["ranks"][5] |= {"ram_step": 4830, "pid": None}
    wanted = ["5", "gone", "4830", "4800", "4810", "4740"]
    expect(row).to_have_text(wanted, timeout=60_000)
    assert row.first.is_visible()
    assert tab.page.evaluate("document.activeElement.textContent") == "each rank"
    tab.close()


LOOKS: dict[str, dict[str, Any]] = {
    "cluster": eight_nodes(),
    "node": document([rank(peer=None)], history={RUN: history()}),
    "trouble": next(s[1] for s in STATES if s[0] == "disk_full"),
    "hostile": next(s[1] for s in STATES if s[0] == "hostile"),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["phone", "wide"])
@pytest.mark.parametrize("name", LOOKS)
def test_it_can_be_read(
    browser: Browser, canned: Canned, name: str, size: str, scheme: str
) -> None:
    canned.data = LOOKS[name]
    phone = {"viewport": PHONE, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
    tab = Tab(browser, color_scheme=scheme, **(phone if size == "phone" else {"viewport": WIDE}))
    tab.open(canned.url)
    for details in tab.page.locator("summary").all():
        details.click()
    tab.screenshot(f"{name}-{size}-{scheme}")
    looked = tab.look()
    assert looked["wide"] == (PHONE if size == "phone" else WIDE)["width"]
    assert looked["scroll"] <= looked["wide"] and looked["out"] == []
    faint = [text for text in looked["texts"] if text["contrast"] < 4.5]
    small = [text for text in looked["texts"] if text["px"] < 12]
    assert len(looked["texts"]) > 10 and faint == [] and small == []
    dark = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == ("rgb(20, 23, 26)" if scheme == "dark" else "rgb(251, 251, 249)")
    assert tab.complaints == []
    tab.close()
