"""Files of token rewards and views that are damaged, of other types or of another version: one line and code 3."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlkd.cli import main as cli
from rlkd.errors import DataError
from rlkd.inspection.reward_view import RewardView
from rlkd.inspection.saved import from_run

ROW = {
    "step": 10, "value": "max", "id": "0", "input": "copy : a", "source": "student", "text": "a", "tokens": ["a", ""],
    "ids": [3, 1], "prompts": {"t": "copy : a"}, "finished": True, "rewards": [-0.5, 0.0], "logprobs": [-1.0, -0.1],
    "max_logprobs": [-0.5, -0.1], "top": [[["b", -0.5]], [["", -0.1]]],
}  # fmt: skip


def run_with(folder: Path, *lines: str | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    encoded = [line.encode() if isinstance(line, str) else line for line in (json.dumps(ROW), *lines)]
    (folder / "token_rewards.jsonl").write_bytes(b"\n".join(encoded) + b"\n")
    return folder


def changed(**fields):
    return json.dumps({name: value for name, value in (ROW | fields).items() if value != "absent"})


BAD = {
    "cut off": '{"step": 10, "val',
    "a list": "[1]",
    "a number": "7",
    "null": "null",
    "binary": bytes(range(128, 256)),
    "UTF-16": json.dumps(ROW).encode("utf-16"),
    "nested too deep": '{"value": ' + "[" * 100_000,
    "5,000 digits": '{"value": "max", "step": ' + "1" * 5000 + "}",
    "value missing": changed(value="absent"),
    "value of another version": changed(value="median"),
    "value a list": changed(value=["max"]),
    "field of another version": changed(colour="red"),
    **{f"{name} missing": changed(**{name: "absent"}) for name in ("id", "input", "source", "text", "tokens", "ids")},
    "id a number": changed(id=7),
    "input null": changed(input=None),
    "tokens a text": changed(tokens="ab"),
    "tokens of numbers": changed(tokens=[1, 2]),
    "ids of texts": changed(ids=["3", "1"]),
    "ids too few": changed(ids=[3]),
    "rewards of texts": changed(rewards=["a", "b"]),
    "rewards too many": changed(rewards=[0.0, 0.0, 0.0]),
    "rewards a number": changed(rewards=0.5),
    "rewards huge": changed(rewards=[10**400, 0]),
    "top of numbers": changed(top=[1, 2]),
    "top of triples": changed(top=[[["a", 1.0, 2.0]], []]),
    "top of words": changed(top=[[["a", "b"]], []]),
    "prompts a list": changed(prompts=["a"]),
    "prompts of numbers": changed(prompts={"t": 5}),
    "facts a text": changed(facts="x"),
    "step a text": changed(step="10"),
    "step huge": changed(step=10**400),
    "finished a text": changed(finished="yes"),
}


def screen_of(command, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    return end.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("kind", BAD)
def test_a_line_that_is_no_sample_is_named(tmp_path, capsys, kind):
    folder = run_with(tmp_path / "run", BAD[kind])
    code, screen = screen_of(["inspect-rewards", "--run", str(folder), "--out", str(tmp_path / "x.html")], capsys)
    assert code == 3
    assert "token_rewards.jsonl:2" in screen.replace("\n", "")
    assert "Traceback" not in screen
    assert len(screen) < 700


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_finite_are_unknown(tmp_path, capsys, number):
    line = changed(id="1", rewards="X", logprobs="X").replace('"X"', f"[{number}, 0.0]")
    view = from_run(run_with(tmp_path / "run", line))
    assert view.samples[1].rewards == [None, 0.0]
    code, _ = screen_of(["inspect-rewards", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "x.html")], capsys)
    assert code == 0
    assert "NaN" not in view.to_json()


def test_folders_in_place_of_files(tmp_path, capsys):
    (tmp_path / "run" / "token_rewards.jsonl").mkdir(parents=True)
    code, screen = screen_of(["inspect-rewards", "--run", str(tmp_path / "run")], capsys)
    assert (code, "has a folder in place of" in " ".join(screen.split())) == (3, True)
    (tmp_path / "page.html").mkdir()
    run_with(tmp_path / "good")
    code, screen = screen_of(
        ["inspect-rewards", "--run", str(tmp_path / "good"), "--out", str(tmp_path / "page.html")], capsys
    )
    assert (code, "cannot be written" in " ".join(screen.split())) == (2, True)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format": "rlkd reward view 9", "samples": []}', '{"format": "rlkd reward view 1"}',
             '{"format": "rlkd reward view 1", "samples": [7]}', '{"format": "rlkd reward view 1", "samples": {}}'],
)  # fmt: skip
def test_views_that_are_none(text):
    with pytest.raises(DataError, match=r"is not a reward view|a sample must be an object"):
        RewardView.from_json(text)


def test_the_worst_are_taken_from_all_held_out_rows(tmp_path):
    """token_rewards.jsonl has the answers to a few inputs in full, held_out.jsonl the rewards of all."""
    folder = run_with(tmp_path / "run")
    rows = [
        {"step": step, "id": str(i), "input": f"input {i}", "student": "x y", "tokens": ["x", " y"],
         "rewards": [-i / 8, -i / 8], "regret": i / 4, "finish_rate": float(i % 2)}
        for step in (0, 10) for i in range(30)
    ]  # fmt: skip
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view = from_run(folder)
    assert len(view.cases()) == 30
    worst = view.worst(10).cases()
    assert [case.id for case in worst] == [str(i) for i in range(29, 19, -1)]
    assert worst[0].regret == pytest.approx(7.25)
    assert worst[0].samples[0].total_reward == pytest.approx(-7.25)
    assert worst[0].samples[0].finished is True
    assert [case.id for case in view.cases()].count("0") == 1
    (folder / "held_out.jsonl").write_text((folder / "held_out.jsonl").read_text() + "{\n")
    with pytest.raises(DataError, match=r"held_out\.jsonl:61 is not a sample"):
        from_run(folder)


def test_a_file_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    folder = run_with(tmp_path / "run")
    opened = Path.open

    def denied(self, *args, **options):
        if self.name == "token_rewards.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    code, screen = screen_of(["inspect-rewards", "--run", str(folder)], capsys)
    assert (code, "cannot be read: Permission denied" in " ".join(screen.split())) == (3, True)
