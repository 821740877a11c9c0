"""What is said of a run changes with its data, and is silent where they are."""

import numpy as np
import pytest

from rlkd.report import findings, words
from rlkd.report.reading import read_arms
from runs import arms, held_out, lines, write_run


def sentences(folder):
    found = findings.headline_comparisons(read_arms(folder))
    return words.headline(found), [words.verdict(c) for c in found]


@pytest.mark.parametrize(
    ("shift", "headline", "word"),
    [(1.0, "Yes", "better by"), (-1.0, "No, results got worse", "worse by"), (0.0, "Within noise", "within noise")],
)
def test_the_verdict_flips_with_the_data(tmp_path, shift, headline, word):
    said, (on_accuracy, on_regret) = sentences(arms(tmp_path, shift=shift))
    assert said == headline
    assert word in on_accuracy
    assert word in on_regret
    assert on_regret.endswith("60 held-out rows and 2 seeds).")


def test_the_numbers_of_the_verdict(tmp_path):
    arms(tmp_path, shift=1.0, seeds=1)
    seqkd, ppo = ([row["regret"] for row in read_arms(tmp_path)[i].runs[0].newest] for i in (0, 1))
    difference = np.mean(seqkd) - np.mean(ppo)
    spread = 1.96 * np.std(np.subtract(seqkd, ppo)) / np.sqrt(60)
    _, (_, on_regret) = sentences(tmp_path)
    assert (
        f"regret {np.mean(ppo):.2f} nats against {np.mean(seqkd):.2f} nats, better by {difference:.2f} nats"
        in on_regret
    )
    (found,) = [c for c in findings.headline_comparisons(read_arms(tmp_path)) if c.score == "regret"]
    low, high = found.difference.interval.low, found.difference.interval.high
    assert (low, high) == pytest.approx((-difference - spread, -difference + spread), abs=0.2 * spread)


def test_scores_that_disagree_are_reported_one_by_one(tmp_path):
    n = 60
    flat = held_out(100, [1.0] * n, np.full(n, 3.0))
    write_run(tmp_path / "seqkd", "SupervisedTrainer", flat)
    write_run(tmp_path / "ppo", "PPOTrainer", held_out(100, [1.0] * n, np.linspace(0.5, 1.5, n)))
    assert sentences(tmp_path)[0] == "accuracy: within noise; regret: better"


def test_rl_is_compared_with_the_strongest_imitation_arm(tmp_path):
    arms(tmp_path, shift=0.5, seeds=1)
    best = held_out(100, [1.0] * 60, [0.1] * 60)
    write_run(tmp_path / "seed-1" / "longer", "SupervisedTrainer", best)
    write_run(tmp_path / "teacher", "SupervisedTrainer", held_out(100, [1.0] * 60, [0.0] * 60))
    found = findings.headline_comparisons(read_arms(tmp_path))
    assert {c.other for c in found} == {"longer"}
    assert {c.verdict for c in found} == {"worse"}


def test_a_run_alone_is_compared_with_its_start(tmp_path):
    rows = [*held_out(0, [0.0] * 30, [4.0] * 30), *held_out(100, [1.0] * 30, [2.0] * 30)]
    write_run(tmp_path, "PPOTrainer", rows)
    headline, (on_accuracy, on_regret) = sentences(tmp_path)
    assert headline == "Yes"
    assert "against its start: accuracy 100.0 % against 0.0 %, better by 100.0 points" in on_accuracy
    assert "regret 2.00 nats against 4.00 nats, better by 2.00 nats" in on_regret


def test_without_a_start_nothing_is_claimed(tmp_path):
    rows = [*held_out(50, [0.0] * 30, [4.0] * 30), *held_out(100, [1.0] * 30, [2.0] * 30)]
    write_run(tmp_path, "PPOTrainer", rows)
    arms_found = read_arms(tmp_path)
    assert findings.headline_comparisons(arms_found) == []
    assert words.headline([]) == "Not known"
    said = " ".join(words.why_unknown(arms_found))
    assert "eval_on_start" in said
    assert "went from 0.0 % at step 50 to 100.0 % at step 100; the uncertainty of the difference is not known" in said
    (tmp_path / "held_out.jsonl").unlink()
    assert "There are no held-out rows" in " ".join(words.why_unknown(read_arms(tmp_path)))


def test_costs_are_those_logged(tmp_path):
    arms(tmp_path, shift=1.0)
    write_run(tmp_path / "seed-1" / "ppo", "PPOTrainer", held_out(100, [1.0] * 60, [1.0] * 60), cpu=100.0)
    ppo = findings.cost(read_arms(tmp_path)[1])
    assert (ppo.steps, ppo.cpu_seconds, ppo.seconds, ppo.tokens) == (100, 75.0, 60.0, 405)
    assert words.price(ppo) == "ppo: 100 steps, 75.0 s of CPU time, 60.0 s of wall-clock time, 405 answer tokens"
    seqkd = findings.cost(read_arms(tmp_path)[0])
    assert words.fairness(ppo, seqkd) == "ppo took 1.50 times the CPU time of seqkd."
    lines(tmp_path / "seed-1" / "ppo" / "metrics.jsonl", [])
    lines(tmp_path / "seed-2" / "ppo" / "metrics.jsonl", [])
    assert words.price(findings.cost(read_arms(tmp_path)[1])) == "ppo: not logged"


def test_where_it_fails(tmp_path):
    regrets = [0.0] * 36 + [1.0, 1.0, 2.0, 6.0]
    write_run(tmp_path, "PPOTrainer", held_out(100, [0.0] * 40, regrets))
    found = findings.failures(read_arms(tmp_path)[0], worst=2)
    assert [row["id"] for row in found.worst] == ["row 39", "row 38"]
    assert (found.half, found.rows, found.total) == (1, 40, 0.25)
    assert (found.first_share, found.end_share) == pytest.approx((0.25, 0.75))
    groups = {group.name: group for group in found.groups}
    assert groups["truncated answers"].rows == 10
    assert groups["answers that differ from the teacher's"].scores["regret"] == 2.5
    assert sum(group.rows for name, group in groups.items() if name.startswith("inputs")) == 40
    assert "1 of 40 held-out rows account for half of the regret (mean 0.25 nats)." in words.weak_spots(found)[0]


def test_rows_that_are_not_shared_are_not_compared(tmp_path):
    write_run(tmp_path / "a", "SupervisedTrainer", held_out(100, [1.0] * 40, [2.0] * 40))
    rows = held_out(100, [1.0] * 40, [1.0] * 40)
    write_run(tmp_path / "b", "PPOTrainer", [row | {"id": f"x{row['id']}"} for row in rows[:20]] + rows[20:])
    a, b = read_arms(tmp_path)
    assert findings.compare(b, a, "regret").difference.interval.rows == 20


def test_a_seed_without_rows_is_left_out_and_noted(tmp_path):
    arms(tmp_path, shift=1.0, seeds=3)
    (tmp_path / "seed-2" / "ppo" / "held_out.jsonl").unlink()
    metrics = tmp_path / "seed-2" / "ppo" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    found = read_arms(tmp_path)
    comparisons = findings.headline_comparisons(found)
    said = words.helped(found, comparisons)
    assert all("60 held-out rows and 2 seeds" in line for line in said[:2])
    assert said[2:] == ["Left out: ppo, seed 2, which has no held-out rows."]
    assert words.price(findings.cost(found[1])).endswith("(1 unfinished)")
    # Only its other seeds are compared with.
    seqkd = [np.mean([row["regret"] for row in found[0].runs[i].newest]) for i in (0, 2)]
    (regret,) = [c for c in comparisons if c.score == "regret"]
    assert regret.means[1] == pytest.approx(np.mean(seqkd))


def test_arms_with_other_seeds_are_compared_by_their_means(tmp_path):
    arms(tmp_path, shift=1.0, seeds=1)
    (tmp_path / "seed-1" / "ppo").rename(tmp_path / "ppo")
    (found,) = [c for c in findings.headline_comparisons(read_arms(tmp_path)) if c.score == "regret"]
    assert (found.difference.interval.seeds, found.verdict) == (1, "better")
