"""The pages: their numbers are those of the files, data stay text, nothing is loaded from elsewhere."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from markupsafe import Markup
from typer.testing import CliRunner

from rlkd.cli.main import app
from rlkd.metrics import metric
from rlkd.report.charts import PANELS
from rlkd.report.page import comparison, report
from rlkd.report.reading import FILES, read_arms, read_side_by_side
from runs import HOSTILE, arms, held_out, lines, write_run


class Page(HTMLParser):
    """Elements with their attributes, and the text of table cells by table label."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.row, self.cell, self.label = [], {}, None, None, None
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.elements.append((tag, given))
        if tag == "table":
            self.label = given["aria-label"]
            self.tables[self.label] = []
        if tag == "tr":
            self.tables[self.label].append([])
        if tag in ("td", "th"):
            self.tables[self.label][-1].append("")
            self.cell = self.tables[self.label][-1]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.cell[-1] += data


@pytest.fixture
def no_drawing(monkeypatch):
    """For tests that look at no chart: matplotlib takes most of a page's time."""
    for module in ("charts", "forest"):
        monkeypatch.setattr(f"rlkd.report.{module}.drawing", lambda *_, **__: Markup("<svg></svg>"))


def read(folder):
    return Page(report(read_arms(folder), folder.name))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The folder of a job with two arms and two seeds, its page as text and read."""
    folder = arms(tmp_path_factory.mktemp("job"), shift=1.0)
    text = report(read_arms(folder), "x")
    return folder, text, Page(text)


def test_the_page_answers_first(job):
    page = job[2]
    headings = re.findall(r"Did reinforcement learning help\?\s*Yes", page.text)
    assert len(headings) == 1
    order = [
        page.text.index(words) for words in ("Did reinforcement", "At what cost?", "Where does it fail?", "Curves")
    ]
    assert order == sorted(order)


def test_the_numbers_of_the_curves_are_those_of_the_log(job):
    folder, _, page = job
    header, *rows = page.tables["Regret, numbers"]
    logged = [json.loads(line) for line in (folder / "seed-2" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    column = header.index("ppo, seed 2, training")
    shown = {float(row[0]): float(row[column]) for row in rows if row[column]}
    assert shown == pytest.approx({line["step"]: line["regret"] for line in logged if "regret" in line}, rel=1e-4)
    column = header.index("ppo, seed 2, held out, greedy")
    (final,) = [line for line in logged if "eval_regret" in line]
    assert [float(row[column]) for row in rows if row[column]] == pytest.approx([final["eval_regret"]], rel=1e-4)


def test_charts_are_headed_by_the_table_of_metrics(job):
    captions = re.findall(r'<figcaption><b>(.*?)</b> <span class="soft">(.*?)</span>', job[1].split('id="curves"')[1])
    rows = [metric(name) for name in ("eval_accuracy", *PANELS)]
    assert captions == [(row.title or row.name, row.quantity) for row in rows]
    assert ("Regret", "nats per answer") in captions
    assert ("KL to the reference policy", "nats per token") in captions


def test_the_results_are_means_of_the_held_out_rows(job):
    folder, _, page = job
    header, *rows = page.tables["Results"]
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    for arm in ("seqkd", "ppo"):
        kept = [
            json.loads(line)["regret"]
            for seed in (1, 2)
            for line in (folder / f"seed-{seed}" / arm / "held_out.jsonl").read_text().splitlines()
        ]
        value, low, high = map(float, re.findall(r"[\d.]+", rows[arm]["regret, nats"]))
        assert value == pytest.approx(np.mean(kept), abs=0.006)
        assert low < value < high
    assert "60 held-out rows and 2 seeds" in page.text
    pairs = page.tables["Reinforcement learning against imitation"][1:]
    assert {(one, other) for one, other, *_ in pairs} == {("ppo", "seqkd")}
    assert {row[2] for row in pairs} == {
        "accuracy", "accuracy of samples", "regret (lower is better)", "regret of samples (lower is better)",
    }  # fmt: skip
    assert {row[-1] for row in pairs} == {"better"}


@pytest.mark.parametrize("missing", [*FILES, "all but run.json", "all but metrics.jsonl"])
def test_a_page_is_made_of_what_there_is(tmp_path, missing, no_drawing):
    rows = [*held_out(0, [0.0] * 12, [4.0] * 12), *held_out(100, [1.0] * 12, [2.0] * 12)]
    write_run(tmp_path, "PPOTrainer", rows)
    lines(tmp_path / "alarms.jsonl", [{"step": 3, "alarm": "kl_high", "message": "KL", "value": 2, "threshold": 1}])
    for name in FILES:
        if name == missing or (missing.startswith("all but") and name not in missing):
            (tmp_path / name).unlink()
    page = read(tmp_path)
    unknown = "Not known" in page.text.split("At what cost?")[0]
    assert unknown == (missing == "held_out.jsonl" or missing.startswith("all but"))
    assert ("kl_high" in page.text) == (missing != "alarms.jsonl" and not missing.startswith("all but"))


def test_hostile_text_is_text(tmp_path):
    name = "arm <img src=x>"
    rows = [row | {"id": f"{HOSTILE}{i}", "input": HOSTILE, "teacher": HOSTILE, "tokens": [HOSTILE, HOSTILE]}
            for i, row in enumerate(held_out(100, [1.0] * 12, [2.0] * 12))]  # fmt: skip
    rows = [row | {HOSTILE: 1.0} for row in rows]
    write_run(
        tmp_path / name, "PPOTrainer", rows, settings={HOSTILE: HOSTILE}, command=[HOSTILE],
        versions={HOSTILE: HOSTILE}, models={"teacher": HOSTILE}, data={"train": {"source": HOSTILE}},
        templates=[{"name": HOSTILE}],
    )  # fmt: skip
    write_run(tmp_path / "other", "SupervisedTrainer", rows, settings={HOSTILE: "else"})
    lines(tmp_path / name / "alarms.jsonl", [{"step": HOSTILE, "alarm": HOSTILE, "message": HOSTILE, "value": HOSTILE}])
    with (tmp_path / name / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 100, f"eval_{HOSTILE}": 1.0}) + "\n")
    for page in (read(tmp_path), Page(comparison(read_side_by_side([tmp_path])))):
        tags = [tag for tag, _ in page.elements]
        assert tags.count("script") == 1
        assert not {"img", "iframe", "object", "link", "form"} & set(tags)
        attributes = {key for _, given in page.elements for key in given}
        assert not [key for key in attributes if key.startswith("on") or key == "style"]
        assert "<img src=x>" in page.text
        assert "49" not in page.text.split("{{")[1][:8]


def test_nothing_comes_from_elsewhere(job):
    _, text, page = job
    links = [given[key] for _, given in page.elements for key in ("src", "href", "xlink:href") if key in given]
    assert all(link.startswith("#") for link in links)
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#)", text)
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len(set(ids))
    used = {link[1:] for link in links} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(ids)


def test_every_chart_has_a_name_and_its_numbers(job):
    page = job[2]
    names = [given["aria-label"] for tag, given in page.elements if tag == "svg" and given.get("role") == "img"]
    assert {"accuracy", "Regret", "Loss", "Clipped tokens", "Speed"} <= set(names)
    assert {f"{name}, numbers" for name in names} <= set(page.tables)


def invoke(*given):
    return CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)


def test_the_report_command(tmp_path, no_drawing):
    arms(tmp_path, shift=1.0)
    result = invoke("report", tmp_path)
    assert "Did reinforcement learning help? Yes" in result.stdout
    assert "ppo: 100 steps, 50.0 s of CPU time" in result.stdout
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    found = json.loads(invoke("report", tmp_path, "--json", "--out", tmp_path / "new" / "x.html").stdout)
    assert (tmp_path / "new" / "x.html").exists()
    assert found["helped"] == "Yes"
    assert {c["verdict"] for c in found["comparisons"]} == {"better"}
    assert invoke("report", tmp_path, "--quiet").stdout == ""


def test_the_compare_command(tmp_path, no_drawing):
    arms(tmp_path, shift=1.0, seeds=1)
    seqkd, ppo = (tmp_path / "seed-1" / name for name in ("seqkd", "ppo"))
    shown = invoke("compare", seqkd, ppo).stdout
    assert "differences from seqkd" in shown
    assert re.search(r"lam\s*│ null\s*│ 0\.2", shown)
    found = json.loads(invoke("compare", seqkd, ppo, "--json", "--out", tmp_path / "c.html").stdout)
    assert found["settings"] == {"lam": {"seqkd": "null", "ppo": "0.2"}}
    (regret,) = [d for d in found["differences"] if d["score"] == "regret"]
    assert regret["interval"][0] <= -1.0 <= regret["interval"][1]
    assert regret["verdict"] == "better"
    page = Page((tmp_path / "c.html").read_text())
    assert page.tables["Settings that differ"] == [["", "seqkd", "ppo"], ["lam", "null", "0.2"]]
    assert "Regret, numbers" in page.tables
    assert invoke("compare", seqkd, ppo, "--quiet").stdout == ""


def test_a_page_that_cannot_be_written_is_an_error(tmp_path, no_drawing):
    from rlkd.errors import ConfigError

    arms(tmp_path, shift=1.0, seeds=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*x\.html: cannot be written"):
        invoke("report", tmp_path, "--out", tmp_path / "file" / "x.html")


def test_size_latency_and_score_of_encoder_students(tmp_path):
    summary = {
        role: {
            "folder": role, "parameters": p, "megabytes": mb,
            "scores": {"dev": {"score": s}, "mm": {"score": s - 0.1}, "other": {"score": 0.0}},
            "ms_per_sentence": {"batch_1": ms},
        }
        for role, p, mb, s, ms in (("teacher", 1_000_000, 4.0, 0.9, 3.0), ("student", 1000, 0.5, 0.8, 0.25))
    }  # fmt: skip
    summary["data"] = {"dev": {"dev": 20, "mm": 20}, "test": {"other": 20}}
    rows = [
        {"step": 10, "id": str(i), "label": i % 2, "predicted": 0, "accuracy": float(i % 2 == 0)} for i in range(20)
    ]
    lines(tmp_path / "held_out.jsonl", rows)
    lines(
        tmp_path / "metrics.jsonl", [{"step": 10, "loss": 1.0, "weighted_ce": 1.0}, {"step": 10, "eval_accuracy": 0.5}]
    )
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = read(tmp_path)
    assert page.tables["Models"][1:] == [
        [f"teacher of {tmp_path.name}", "1,000,000", "4.00", "3.000", "0.8500"],
        [tmp_path.name, "1,000", "0.50", "0.250", "0.7500"],
    ]
    assert page.tables["Score against size, numbers"][2][1:] == ["0.5", "0.75"]
    assert "Score against latency, numbers" in page.tables
    groups = page.tables[f"Groups, {tmp_path.name}"]
    assert ["rows labelled 0", "10", "100.0 %"] in groups
    assert ["rows labelled 1", "10", "0.0 %"] in groups
    assert "Did training help?" in page.text
