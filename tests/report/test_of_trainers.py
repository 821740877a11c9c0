"""Runs that trainers made, reported and compared: the page's numbers are those of the trainers' models."""

import json
import math

import pytest
from test_page import Page
from trainers.tiny_runs import examples, make

from rlkd.evaluation.task_metrics import TASK_METRICS
from rlkd.records import Example
from rlkd.report import findings
from rlkd.report.page import report
from rlkd.report.reading import read_arms, read_side_by_side
from runs import HOSTILE


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Imitation and PPO on the same held-out rows, one of them hostile."""
    folder = tmp_path_factory.mktemp("job")
    held_out = [*examples(11), Example(f"row {HOSTILE}", "a b", (f"copy : {HOSTILE}",), (HOSTILE,))]
    options = {"eval_examples": held_out, "task_metric": TASK_METRICS["exact_match"], "max_steps": 4, "eval_steps": 2}
    for kind in ("supervised", "ppo"):
        trainer = make(kind, folder / kind, eval_strategy="steps", eval_on_start=True, **options)
        trainer.train()
        trainer.save_model()
    return folder, trainer


def test_the_arms_are_read_as_they_were_run(job):
    folder, trainer = job
    supervised, ppo = read_arms(folder)
    assert (supervised.kind, ppo.kind) == ("supervised", "rl")
    assert ppo.runs[0].record["settings"]["lam"] == 0.2
    assert sorted(ppo.runs[0].held_out) == [0, 4]
    # Lines of steps that began with a rollout batch give the length of its answers.
    rows = trainer.args.rows_per_rollout
    lengths = [line["length"] * rows for line in ppo.runs[0].train if "length" in line]
    assert ppo.runs[0].tokens == pytest.approx(sum(lengths))


def test_the_page_gives_what_the_last_model_scores(job):
    folder, trainer = job
    rows = trainer.evaluate_policy(None)
    regret = sum(row["regret"] for row in rows) / 12
    header, *table = Page(report(read_arms(folder), "job")).tables["Results"]
    shown = next(dict(zip(header, row, strict=True)) for row in table if row[0] == "ppo")
    assert shown["regret, nats"].split()[0] == f"{regret:.2f}"
    ended = sum(row["finish_rate"] for row in rows) / 12
    assert shown["finish rate, %"].split()[0] == f"{100 * ended:.1f}"
    found = findings.failures(read_arms(folder)[1])
    worst = max(rows, key=lambda row: row["regret"])
    assert found.worst[0]["regret"] == pytest.approx(worst["regret"], rel=1e-4)
    assert math.isclose(found.end_share, _end_share(rows), rel_tol=1e-3)


def _end_share(rows):
    rewards = [row["rewards"] for row in rows if len(row["rewards"]) > 1]
    return sum(r[-1] for r in rewards) / sum(map(sum, rewards))


def test_hostile_rows_of_a_real_run_stay_text(job):
    folder, _ = job
    page = Page(report(read_arms(folder), "job"))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [tag for tag, _ in page.elements if tag == "img"]


def test_settings_that_differ_are_named(job):
    folder, _ = job
    from rlkd.report.summary import differences

    found = differences(read_side_by_side([folder / "supervised", folder / "ppo"]))
    assert found["runs"] == ["supervised", "ppo"]
    assert found["settings"]["objective"]["supervised"] == "sequence"
    assert "max_new_tokens" not in found["settings"]
    evaluated = [json.loads(line) for line in (folder / "ppo" / "metrics.jsonl").read_text().splitlines()]
    final = [line["eval_regret"] for line in evaluated if "eval_regret" in line][-1]
    assert found["scores"]["ppo"]["regret"]["value"] == pytest.approx(final)
