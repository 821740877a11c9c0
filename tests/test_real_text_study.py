"""The study of objectives on real text: its parts share nothing, its statistics hold, its methods are treated alike."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlkd import TASK_METRICS, ConfigError, Example, read_plan
from rlkd.jobs.study import Done, write_record

ROOT = Path(__file__).resolve().parents[1]
STUDIES = ROOT / "recipes" / "studies"
FOODS, AREAS = ("French", "Indian", "Chinese", "English", "Italian", "Japanese"), ("riverside", "city centre")
PRICES, MORE = ("cheap", "moderate", "high"), ("", ", near[Inn]", ", familyFriendly[yes]", ", familyFriendly[no]")


@pytest.fixture(scope="module")
def module():
    sys.path.insert(0, str(STUDIES))
    yield importlib.import_module
    sys.path.pop(0)


@pytest.fixture(scope="module")
def task(module):
    return module("real_text_task")


@pytest.fixture(scope="module")
def results(module):
    return module("real_text_report")


@pytest.fixture
def study(module, monkeypatch):
    study = module("real_text")
    monkeypatch.setattr(study, "file_digests", lambda folder, names: dict.fromkeys(names, "digest"))
    return study


@pytest.fixture
def plan():
    return read_plan(STUDIES / "real_text.yaml", quick=False)


def restaurants() -> list[dict[str, str]]:
    """Two rows, under different names, for two in three of the 144 things that can be said."""
    rows = []
    for i, (food, area, price, more) in enumerate(itertools.product(FOODS, AREAS, PRICES, MORE)):
        for name in ("The Mill", "Inn by the Mill") if i % 3 else ():
            mr = f"name[{name}], food[{food}], priceRange[{price}], area[{area}]{more}"
            rows.append({"mr": mr, "ref": f"{name} has {price} {food} food in the {area}."})
    return rows


def pairs(count: int, name: str = "question") -> list[dict[str, str]]:
    return [{"source": f"{name} {i} ?", "target": f"{name} {i} or {j} ?"} for i in range(count) for j in (1, 2)]


# Data


def test_proper_names_are_hidden_the_longer_first(task):
    representation, text = task.delexicalised(
        "near[Mill], name[Inn by the Mill], area[riverside]", "Inn by the Mill is near Mill."
    )
    assert representation == (("name", "NAME"), ("area", "riverside"), ("near", "NEAR"))
    assert text == "NAME is near NEAR."
    assert task.written(representation) == "name[NAME], area[riverside], near[NEAR]"
    assert task.parse(task.written(representation)) == dict(representation)


def test_no_representation_is_in_two_parts(task):
    splits = task.split_e2e(restaurants(), {"test": 10, "validation": 5, "unlabeled": 30})
    assert all(len(e.references) == 2 for e in (*splits.test, *splits.validation))  # both names' references
    texts = [{e.student_input for e in part} for part in (splits.test, splits.validation, splits.unlabeled)]
    texts.append({text for text, _ in splits.pairs})
    assert [len(part) for part in texts] == [10, 5, 30, 96 - 15]
    assert len(set.union(*texts)) == sum(map(len, texts))
    assert task.split_e2e(restaurants()[::-1], {"test": 10, "validation": 5, "unlabeled": 30}).test[
        0
    ].student_input in {e.student_input for e in splits.test}


def test_composed_representations_recombine_the_values_of_known_ones(task):
    foods, areas = (("food", "French"), ("food", "Indian")), (("area", "city centre"), ("area", "riverside"))
    known = [(foods[0], areas[1]), (foods[1],), (areas[0],)]
    new = {(foods[0],), (areas[1],), (foods[0], areas[0]), (foods[1], areas[0]), (foods[1], areas[1])}
    assert set(task.composed(known, set(known), 5)) == new
    assert (foods[0],) not in task.composed(known, {*known, (foods[0],)}, 4)
    with pytest.raises(ConfigError, match="only about 5 new"):
        task.composed(known, set(known), 6)


@pytest.mark.parametrize(
    ("text", "slot", "stated"),
    [
        ("NAME is a pub.", ("name", "NAME"), True),
        ("A pub near NEAR.", ("name", "NAME"), False),
        ("It serves fast-food.", ("food", "Fast food"), True),
        ("It serves Indian food.", ("food", "French"), False),
        ("It is child friendly.", ("familyFriendly", "yes"), True),
        ("It is not child friendly.", ("familyFriendly", "yes"), False),
        ("It is not child friendly.", ("familyFriendly", "no"), True),
        ("A kids friendly pub, not expensive.", ("familyFriendly", "no"), False),
        ("An adult pub.", ("familyFriendly", "no"), True),
        ("It is rated 1 out of 5.", ("customer rating", "5 out of 5"), False),
        ("It is rated five out of five.", ("customer rating", "5 out of 5"), True),
        ("It is by the river.", ("area", "riverside"), True),
        ("In the centre.", ("area", "riverside"), False),
        ("Dinner costs 20 to 25 pounds.", ("priceRange", "£20-25"), True),
    ],
)
def test_what_a_sentence_says(task, text, slot, stated):
    assert task.says(text, *slot) is stated


def test_slots_are_the_share_of_the_inputs_attributes(task):
    asked = [task.example("e2e-1", "name[NAME], food[French]"), task.example("e2e-2", "name[NAME], near[NEAR]")]
    assert task.slots(["NAME serves food", "NAME, near NEAR"], asked).rows == (50, 100)


def test_no_question_is_in_two_parts(task):
    train = [*pairs(30), {"source": "question 3 or 1 ?", "target": "question 4 ?"}]  # joins two groups
    test = [*pairs(2, "fresh"), {"source": "question 5 ?", "target": "fresh 9 ?"}]
    test += [{"source": "new ?", "target": "question 6 or 1 ?"}, {"source": "very " * 12 + "?", "target": "long ?"}]
    sizes = {"question_words": 12, "validation": 4, "unlabeled": 8, "test": 10}
    splits = task.split_quora(train, test, sizes)
    assert [(e.student_input, len(e.references)) for e in splits.test] == [("fresh 0 ?", 2), ("fresh 1 ?", 2)]
    held_out = [
        {t for e in part for t in (e.student_input, *e.references)} for part in (splits.validation, splits.test)
    ]
    unlabeled = {e.student_input for e in splits.unlabeled}
    parts = [{question for pair in splits.pairs for question in pair}, unlabeled, *held_out]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert [len(splits.validation), len(splits.unlabeled)] == [4, 8]
    assert all(not e.references for e in splits.unlabeled)


def test_the_vocabulary_gives_texts_back(task):
    texts = ["NAME is a pub near NEAR .", "name[NAME], near[NEAR]", "a café, £20-25"]
    tokenizer = task.train_tokenizer(texts, 80)
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_metrics_of_the_tasks(task):
    assert task.distinct_2(["a b a b", "a b"]) == pytest.approx(100 * 2 / 4)
    question = [task.example("quora-test-0", "how do i learn to cook ?", ["what is a way to learn to cook ?"])]
    scores = task.task_metric(["how do i learn to cook ?"], question)
    assert (scores["copies"], scores["self_bleu"]) == pytest.approx((100, 100))
    assert 0 < scores["bleu"] < 100
    assert "slots" in task.task_metric(["x"], [task.example("e2e-1", "food[French]", ["x"])])


# Statistics


def test_summed_counts_give_the_corpus_bleu(results):
    texts = ["the cat sat on the mat today", "a dog runs", "nothing at all here is right", ""]
    references = [
        ("the cat sat on a mat", "a cat sat on the mat"),
        ("the dog runs fast",),
        ("no", "thing at all"),
        ("x y",),
    ]
    examples = [Example(str(i), "", ("",), of_row) for i, of_row in enumerate(references)]
    counts = results.bleu_counts(texts, references)
    for rows in ([0, 1, 2, 3], [2, 2, 0], [1], [2]):
        expected = TASK_METRICS["bleu"]([texts[i] for i in rows], [examples[i] for i in rows])["bleu"]
        assert results.corpus_bleu(counts[rows].sum(0)) == pytest.approx(float(expected), abs=1e-9)


def mean(sums):
    """Of rows (value, 1)."""
    return sums[0] / sums[1]


def rows_of(values):
    return np.stack([values, np.ones_like(values)], -1)


def test_bootstrap_of_a_constant_difference_has_no_width(results):
    values = np.random.default_rng(0).normal(0, 100, (3, 50))  # of rows and seeds: paired, so they cancel
    found = results.paired_bootstrap(rows_of(values + 2), rows_of(values), mean, 99)
    assert [found["mean"], found["low"], found["high"]] == pytest.approx([2, 2, 2])
    assert (found["p"], found["above_0"], found["seeds"]) == (2 / 100, 3, 3)
    same = results.paired_bootstrap(rows_of(values), rows_of(values), mean, 99)
    assert (same["mean"], same["p"], same["above_0"]) == (0, 1, 0)


def test_bootstrap_has_the_standard_error_of_rows_and_of_seeds(results):
    generator = np.random.default_rng(1)
    noise, nothing = generator.normal(0, 3, 400), np.zeros((6, 400))
    of_rows = results.paired_bootstrap(rows_of(nothing + noise), rows_of(nothing), mean, 1000)
    assert (of_rows["high"] - of_rows["low"]) / 2 == pytest.approx(1.96 * noise.std() / 20, rel=0.1)
    levels = np.array([-2.0, -1, 0, 1, 2, 6])[:, None]
    of_seeds = results.paired_bootstrap(rows_of(nothing + levels), rows_of(nothing), mean, 1000)
    assert (of_seeds["high"] - of_seeds["low"]) / 2 == pytest.approx(1.96 * levels.std() / 6**0.5, rel=0.15)
    back = results.paired_bootstrap(rows_of(nothing), rows_of(nothing + levels), mean, 1000)
    assert (back["mean"], back["p"]) == (-of_seeds["mean"], of_seeds["p"])


def test_bootstrap_rejects_a_true_null_as_often_as_it_says(results):
    generator = np.random.default_rng(2)
    tries = [
        results.paired_bootstrap(rows_of(generator.normal(0, 1, (1, 40))), rows_of(np.zeros((1, 40))), mean, 99, seed)
        for seed in range(100)
    ]
    rejected = np.mean([found["p"] < 0.2 for found in tries])
    assert 0.12 < rejected < 0.30


def test_holm(results):
    assert results.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert results.holm([0.5, 0.6]) == [1, 1]


# Arms


WIDER = ("seqkd", "seqkd-sampled", "gkd-reverse", "seqkd-10")  # rivals of RL: more trials for them count against it


def test_methods_are_treated_alike(study, plan, tmp_path):
    for name, of_task in plan["tasks"].items():
        grid = study.study(plan, name, tmp_path, tmp_path / "out")
        for method, settings in plan["methods"].items():
            if name not in settings.get("tasks", plan["tasks"]):
                assert not any(cell.arm.startswith(method) for cell in grid.cells.values())
                continue
            trials = [cell for cell in grid.cells.values() if cell.arm.startswith(f"{method}-trial-")]
            tried = [cell.settings["training"] for cell in trials]
            assert tried[:3] == plan["trials"]
            assert len(tried) == (7 if method in WIDER else 3)
            assert {(c.seed, c.settings["split"], c.settings["budget"]["seconds"]) for c in trials} == {
                (1, "validation", of_task["seconds"]["trial"])
            }
            budgets = {"": {"seconds": of_task["seconds"]["arm"]}, "-updates": {"updates": of_task["updates"]["arm"]}}
            for suffix, budget in budgets.items():
                if suffix and not plan["methods"][method].get("equal_updates", True):
                    continue
                cell = grid.cells[f"{name}/seed-3/{method}{suffix}"]
                assert (cell.settings["split"], cell.settings["budget"]) == ("test", budget)
                needed = grid.needed(cell)
                assert needed[plan["methods"][method]["start"]].seed == 3
                assert [arm for arm in needed if "-trial-" in arm] == [f"{method}-trial-{i}" for i in range(len(tried))]


def test_a_method_on_an_unknown_task_is_refused(study, plan, tmp_path):
    plan["methods"]["ppo"]["tasks"] = ["e2e", "news"]
    with pytest.raises(ConfigError, match=r"methods\.ppo\.tasks = 'news'"):
        study.study(plan, "quora", tmp_path, tmp_path / "out")


def test_a_method_with_fewer_trials_is_refused(study, plan, tmp_path):
    plan["methods"]["ppo"]["trials"] = plan["trials"][1:]
    with pytest.raises(ConfigError, match=r"methods\.ppo\.trials: must be 3 or more, as for the others"):
        study.study(plan, "e2e", tmp_path, tmp_path / "out")


def test_an_unknown_setting_of_a_method_is_refused(study, plan, tmp_path):
    plan["methods"]["ppo"]["lam"] = 0.1
    with pytest.raises(ConfigError, match=r"methods\.ppo\.lam: not a setting of a method; those are title"):
        study.study(plan, "e2e", tmp_path, tmp_path / "out")


def test_tables_are_of_what_is_finished(study, results, task, plan, tmp_path, monkeypatch, capsys):
    """Without a second axis, and with seeds that have only some of the methods; SeqKD fails in one row."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    plan["tasks"]["e2e"]["updates"]["arm"], plan["draws"] = None, 50
    rows = [task.example(f"e2e-test-{i}", "food[French]", ["the one and only right answer"]) for i in range(3)]
    grid = study.study(plan, "e2e", tmp_path, tmp_path / "out")
    for cell in grid.cells.values():
        if (cell.arm, cell.seed) == ("ppo", 3) or cell.arm == "reverse-kl" or (cell.seed or 0) > 3:
            continue
        write_record(cell, grid.digests(cell), {"bleu": 10.0 + (cell.seed or 0), "training": {}})
        texts = ["the one and only right answer"] * 3
        texts[0] = "no such answer at all" if cell.arm == "seqkd" else texts[0]
        cell.folder.mkdir(parents=True)
        lines = [{"id": e.id, "student": text, "sample_student": text} for e, text in zip(rows, texts, strict=True)]
        (cell.folder / results.ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    results.report({"e2e": grid}, {"e2e": rows}, plan, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| REINFORCE (3) | 12.0 [11.0, 13.0] |" in table
    assert "| PPO (2) | 11.5 [11.0, 12.0] |" in table
    assert "reverse KL on policy" not in table
    found = {
        (c["first"], c["second"], c["metric"]): c
        for c in json.loads((tmp_path / "out" / "results.json").read_text())["comparisons"]
    }
    worse, same = found["ppo", "seqkd", "BLEU"], found["ppo", "reinforce", "BLEU of samples"]
    assert (worse["seeds"], worse["above_0"]) == (same["seeds"], 2) == (2, 2)
    assert worse["mean"] > 20
    assert same["mean"] == 0 < worse["p"] <= worse["p_holm"]


def test_the_best_trial_has_the_best_bleu_greedy_and_sampled(study, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "start_of", lambda cell, method: "start")
    monkeypatch.setattr(
        study, "train_student", lambda cell, model, method, training: (model, method["trainer"], training)
    )
    cell = study.study(plan, "e2e", tmp_path, tmp_path / "out").cells["e2e/seed-2/ppo"]
    scores = [(60.0, 50.0), (59.0, 55.0), (61.0, 40.0)]
    inputs = {f"ppo-trial-{i}": {"bleu": a, "sample_bleu": b, "training": i} for i, (a, b) in enumerate(scores)}
    inputs["warm-up"] = {"bleu": 99.0, "sample_bleu": 99.0, "training": "none"}
    cell = replace(cell, inputs={arm: Done(tmp_path, result) for arm, result in inputs.items()})
    assert study.main_arm(cell) == ("start", "ppo", 1)


def test_seconds_are_updates_at_the_measured_price(study, plan, tmp_path, monkeypatch):
    """What else the machine does while an arm runs changes nothing."""
    built = []
    monkeypatch.setattr(study, "start_of", lambda cell, method: SimpleNamespace(num_parameters=lambda: 7))
    monkeypatch.setattr(study, "student_trainer", lambda *args: built.append(args[3]))
    monkeypatch.setattr(study, "train", lambda trainer, cell: {"updates": built[-1]["max_steps"]})
    monkeypatch.setattr(study, "evaluate", lambda trainer, cell: {"bleu": 1.0})
    cells = study.study(plan, "e2e", tmp_path, tmp_path / "out").cells
    inputs = {f"ppo-trial-{i}": {"bleu": i, "sample_bleu": 0, "training": {"learning_rate": i}} for i in range(3)}
    inputs = {arm: Done(tmp_path, result) for arm, result in (inputs | {"prices": {"ppo": 0.15, "seqkd": 9.0}}).items()}
    timed = study.main_arm(replace(cells["e2e/seed-2/ppo"], inputs=inputs))
    assert timed["updates"] == round(plan["tasks"]["e2e"]["seconds"]["arm"] / 0.15)
    assert (timed["seconds_per_update"], timed["training"]) == (0.15, {"learning_rate": 2})
    del inputs["prices"]
    alike = study.main_arm(replace(cells["e2e/seed-2/ppo-updates"], inputs=inputs))
    assert alike["updates"] == plan["tasks"]["e2e"]["updates"]["arm"]
    assert "seconds_per_update" not in alike


# The command


@pytest.mark.slow
def test_quick_run(tmp_path):
    """Every arm runs, is skipped when it is done, and the tables are printed again."""
    for name, rows in (("devset", restaurants()[:100]), ("testset", restaurants()[100:])):
        path = tmp_path / "e2e" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(STUDIES / "real_text.py"), "--quick", "--data", str(tmp_path), "--tasks", "e2e"]
    command += ["--out", str(tmp_path / "out")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert first.returncode == 0, first.stdout + first.stderr
    again = subprocess.run([*command, "--table"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    tables = (tmp_path / "out" / "table.md").read_text()
    assert first.stdout.endswith(again.stdout)
    assert tables in again.stdout
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    plan = read_plan(STUDIES / "real_text.yaml", quick=True)
    for method in plan["methods"]:
        if "e2e" not in plan["methods"][method].get("tasks", ["e2e"]):
            continue
        arms = [method, f"{method}-updates"] if plan["methods"][method].get("equal_updates", True) else [method]
        for arm in arms:
            result = record["e2e"]["results"][arm]["1"]
            assert result["training"] == plan["trials"][0]
            assert ("start_regret" in result) == (plan["methods"][method]["trainer"] in ("reinforce", "ppo"))
            if arm != method:
                assert result["updates"] == 2
    assert {(c["first"], c["equal"]) for c in record["comparisons"]} > {("ppo", "updates"), ("ppo-5", "CPU seconds")}
