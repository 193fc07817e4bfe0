"""The dashboard's queries and the alerts on a real Prometheus, with samples of real agents."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import panels
import panels_story
import pytest
from browser import Tab, chromium
from chart import NAMESPACE, ROOT, render, the
from panels_story import PROVOKED, VALUES, Story
from prometheus import Series, promtool, tool

#: The panel that is empty while nothing is wrong: its targets, with the alert that says the same.
#: Those that the story does not bring about have samples that are made up, as their alerts have.
WRONG = "What is wrong now"
WRONG_BY_ALERT: dict[str, str | None] = {
    "A": "AgentDown",
    "B": "DiskTrouble",
    "C": "BucketTrouble",
    "D": "CopiesMissing",
    "E": "SavesFail",
    "F": "DamageFound",
    "G": "RamFull",
    "H": None,  # A node that is to go away wakes nobody: what it has goes on by itself.
}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    tool("prometheus")
    with panels_story.told(tmp_path_factory.mktemp("panels")) as story:
        yield story


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    data = the(render(VALUES), "ConfigMap", "-dashboard")["data"]
    found: dict[str, Any] = json.loads(data["tierkeep.json"])
    return found


def has_numbers(series: list[Series]) -> bool:
    return any(math.isfinite(value) for _, points in series for _, value in points)


def test_every_query_of_a_panel_has_numbers(story: Story, board: dict[str, Any]) -> None:
    values = panels.variables(board, story.server)
    assert values["job"] == f"({NAMESPACE}/tierkeep)"
    empty = set()
    for panel in board["panels"]:
        healthy = panels.ask(panel, story.server, values, story.began, story.healthy)
        ill = panels.ask(panel, story.server, values, story.began, story.ended)
        for letter, series in ill.items():
            where = (panel["title"], letter)
            if panel["title"] == WRONG:
                assert not has_numbers(healthy[letter]), where
                if WRONG_BY_ALERT[letter] in PROVOKED:
                    assert has_numbers(series), where
            elif not has_numbers(healthy[letter]):
                empty.add(where)
    assert empty == set()


def test_what_went_wrong_is_seen_in_the_numbers(story: Story, board: dict[str, Any]) -> None:
    values = panels.variables(board, story.server)
    stats: dict[str, list[float]] = {}
    for panel in board["panels"]:
        if panel["type"] == "stat" and panel["title"] != WRONG:
            stats[panel["title"]] = []
            for end in (story.healthy, story.ended):
                answers = panels.ask(panel, story.server, values, story.began, end)
                [(_, points)] = panels.drawn(panel, answers).lines
                stats[panel["title"]].append(points[-1][1])
    assert all(0 < value < 1 for value in stats.pop("Fullest RAM tier"))
    # How much of it is seen is a matter of time: each rank learns it from its next step.
    for title, least in (("Copies missing", 2), ("Ranks in trouble", 1)):
        before, after = stats.pop(title)
        assert before == 0 and after >= least, title
    assert stats == {
        "Agents up": [3, 2],
        "Agents down": [0, 1],
        "Agents lost": [0, 1],
        "Ranks": [3, 3],
        "Trainers up": [3, 3],
    }


def test_a_healthy_cluster_fires_nothing_and_an_ill_one_says_what_is_wrong(story: Story) -> None:
    firing = 'ALERTS{alertstate="firing"}'
    assert story.server.range(firing, story.began, story.ended) == []
    alerts = story.server.alerts()
    assert {a["labels"]["alertname"] for a in alerts} == {f"Tierkeep{name}" for name in PROVOKED}
    for alert in alerts:
        text = json.dumps(alert["annotations"])
        assert "no value" not in text and "error" not in text and "{{" not in text, alert
    summaries = sorted(a["annotations"]["summary"] for a in alerts)
    assert "No agent answers on gpu-2" in summaries
    assert "Agents that were there and are not any more: 1" in summaries
    assert sum("fewer copies on other nodes" in summary for summary in summaries) >= 2


def test_panels_are_drawn_and_can_be_read(story: Story, board: dict[str, Any]) -> None:
    values = panels.variables(board, story.server)
    with chromium() as browser:
        for name, end in (("grafana-healthy", story.healthy), ("grafana-trouble", story.ended)):
            every = []
            for panel in board["panels"]:
                answers = panels.ask(panel, story.server, values, story.began, end)
                every.append(panels.drawn(panel, answers))
            tab = Tab(browser, viewport={"width": 1600, "height": 900})
            try:
                tab.page.set_content(panels.page(every, story.began, end, name))
                tab.screenshot(name)
                assert tab.page.locator("h2").all_inner_texts() == [
                    p["title"] for p in board["panels"]
                ]
                wrong = tab.page.locator("section", has_text=WRONG).locator(".tile")
                if end == story.healthy:
                    assert wrong.all_inner_texts() == ["nothing"]
                else:
                    assert "gpu-2: no agent answers" in wrong.all_inner_texts()
                looked = tab.look()
                assert looked["out"] == [] and tab.complaints == []
                faint = [t for t in looked["texts"] if t["contrast"] < 4.5]
                assert faint == []
            finally:
                tab.close()


def test_panels_lie_side_by_side_and_their_targets_can_be_told_apart(board: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not own & taken, panel["title"]
        taken |= own
        for target in panel["targets"]:
            # Each series of a target has a name of its own: labels that it is grouped by are in it.
            grouped = re.match(r"\w+ by \(([\w, ]+)\)", target["expr"])
            kept = set(grouped[1].split(", ")) if grouped else set()
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert kept <= named, (panel["title"], target["refId"])
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert len(set(legends)) == len(legends), panel["title"]
    assert [p["title"] for p in board["panels"] if p["type"] == "stat"][-1] == WRONG


# -- alerts, with samples that are made up --------------------------------------------------------

_WHERE = f'namespace="{NAMESPACE}",pod="tierkeep-0000a",job="{NAMESPACE}/tierkeep",node="n"'
_RANK = f'{_WHERE},run="/r",rank="0"'


def _of(metric: str, values: str, labels: str = _RANK) -> dict[str, str]:
    return {"series": f"{metric}{{{labels}}}", "values": values}


def _step(tier: str, values: str) -> dict[str, str]:
    return _of("tierkeep_step", values, f'{_RANK},tier="{tier}"')


#: Of each alert: samples, one a minute, under which it fires, and the label that says where.
ILL: dict[str, tuple[list[dict[str, str]], str]] = {
    "AgentDown": ([_of("up", "1x10 0x80", _WHERE)], "node"),
    "CopiesMissing": (
        [_of("tierkeep_copies_wanted", "2x90"), _of("tierkeep_copies_there", "2x10 1x80")],
        "rank",
    ),
    "DiskTrouble": ([_of("tierkeep_disk_trouble", "0x10 1x80")], "rank"),
    "BucketTrouble": ([_of("tierkeep_object_trouble", "0x10 1x80")], "run"),
    "TierStands": ([_step("disk", "0+10x9 90x81"), _step("ram", "0+10x90")], "tier"),
    "SavesFail": ([_of("tierkeep_saves_failed_total", "0x80 1x10")], "rank"),
    "RamFull": (
        [
            _of("tierkeep_ram_bytes", "50x10 96x80", _WHERE),
            _of("tierkeep_ram_limit_bytes", "100x90", _WHERE),
        ],
        "node",
    ),
    # The rank is first seen when its restore is over.
    "DamageFound": ([_of("tierkeep_checksum_failures_total", "_x70 1x20")], "run"),
    "NodesLost": ([_of("tierkeep_nodes_lost", "0x10 3x80", _WHERE)], "namespace"),
}

#: The same series while nothing is wrong, or not for long.
WELL = [
    _of("up", "1x10 0x3 1x77", _WHERE),
    _of("tierkeep_copies_wanted", "2x90"),
    _of("tierkeep_copies_there", "2x10 1x3 2x77"),
    _of("tierkeep_disk_trouble", "0x10 1x2 0x78"),
    _of("tierkeep_object_trouble", "0x10 1x12 0x68"),
    _step("disk", "0+10x90"),
    _step("peer", "0+10x90"),
    _step("ram", "0+10x90"),
    _of("tierkeep_saves_failed_total", "3x90"),
    _of("tierkeep_ram_bytes", "90x90", _WHERE),
    _of("tierkeep_ram_limit_bytes", "100x90", _WHERE),
    _of("tierkeep_checksum_failures_total", "7x90"),
    _of("tierkeep_nodes_lost", "0x10 1x9 0x71", _WHERE),
]


def _expected(alert: str) -> dict[str, Any]:
    """That this one fires after 90 minutes, and no other."""
    name = f'{{alertname="Tierkeep{alert}"}}'
    return {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "90m",
        "exp_samples": [{"labels": name, "value": 1}] if alert else [],
    }


def test_each_alert_fires_when_it_should_and_only_then(
    tmp_path: Path, board: dict[str, Any]
) -> None:
    found = render(VALUES)
    rules = panels_story.rule_file(found, tmp_path)
    checked = promtool("check", "rules", str(rules), cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    every = the(found, "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert {rule["alert"] for rule in every} == {f"Tierkeep{name}" for name in ILL}

    [wrong] = [panel for panel in board["panels"] if panel["title"] == WRONG]
    values = {"job": f"({NAMESPACE}/tierkeep)", "run": ".*"}
    cases = [{"interval": "1m", "input_series": WELL, "promql_expr_test": [_expected("")]}]
    for alert, (series, label) in ILL.items():
        asked = [_expected(alert)]
        # What its words name is there to be named.
        asked.append(
            {
                "expr": f'count(ALERTS{{alertname="Tierkeep{alert}",{label}!=""}})',
                "eval_time": "90m",
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        )
        [words] = [rule["annotations"] for rule in every if rule["alert"] == f"Tierkeep{alert}"]
        for named in set(re.findall(r"\$labels\.(\w+)", json.dumps(words))):
            asked.append(
                asked[-1] | {"expr": asked[-1]["expr"].replace(f"{label}!=", f"{named}!=")}
            )
        # The dashboard says it too.
        for target in wrong["targets"]:
            if WRONG_BY_ALERT[target["refId"]] == alert:
                query = panels.fill(target["expr"], values)
                asked.append(asked[1] | {"expr": f"count({query})"})
        cases.append({"interval": "1m", "input_series": series, "promql_expr_test": asked})
    assert set(WRONG_BY_ALERT) == {target["refId"] for target in wrong["targets"]}
    [leaving] = [t["expr"] for t in wrong["targets"] if WRONG_BY_ALERT[t["refId"]] is None]
    seen = {"expr": f"count({panels.fill(leaving, values)})", "eval_time": "90m",
            "exp_samples": [{"labels": "{}", "value": 1}]}  # fmt: skip
    series = [_of("tierkeep_node_leaving", "0x10 1x80", _WHERE)]
    cases.append(
        {"interval": "1m", "input_series": series, "promql_expr_test": [_expected(""), seen]}
    )

    tests = {"rule_files": [rules.name], "evaluation_interval": "1m", "tests": cases}
    (tmp_path / "tests.yml").write_text(json.dumps(tests))
    done = promtool("test", "rules", "tests.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_runbooks_are_sections_of_the_page() -> None:
    page = (ROOT / "docs" / "operate.md").read_text()
    [group] = the(render(VALUES), "PrometheusRule")["spec"]["groups"]
    named = [rule["annotations"]["runbook_url"].partition("#")[2] for rule in group["rules"]]
    _, _, alerts = page.partition("\n## Alerts\n")
    assert named == re.findall(r"^### (.+)$", alerts.partition("\n## ")[0], re.M)
