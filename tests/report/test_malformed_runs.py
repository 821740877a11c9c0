"""Run folders that are damaged, cut off, huge or of another make: a report with a note, or one line and a code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from markupsafe import Markup

from rlkd.cli import main as cli
from rlkd.report.lines import POINTS, Log, json_lines
from rlkd.report.reading import ROWS_KEPT, read_run
from runs import held_out, write_run

METRICS, HELD_OUT, ALARMS, RUN, SUMMARY = (
    "metrics.jsonl", "held_out.jsonl", "alarms.jsonl", "run.json", "summary.json",
)  # fmt: skip
DEEP = "[" * 5000 + "]" * 5000
HUGE = "1" * 5000


def code(command: list[str]) -> int:
    """The exit code of `rlkd COMMAND`."""
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    return end.value.code or 0


def run_folder(folder: Path) -> Path:
    rows = [*held_out(0, [0.0] * 12, [4.0] * 12), *held_out(100, [1.0] * 12, [2.0] * 12)]
    write_run(folder, "PPOTrainer", rows)
    (folder / ALARMS).write_text('{"step": 3, "alarm": "kl_high", "message": "KL", "value": 2.0, "threshold": 1.0}\n')
    return folder


def appended(name: str, *lines: str | bytes):
    def damage(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.writelines((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines)

    return damage


def replaced(name: str, content: str | bytes):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def a_folder(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return damage


def a_loop(name: str):
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(name)

    return damage


# What is done to a good run folder. Its report is made all the same.
DAMAGES = {
    "line cut off": appended(METRICS, '{"step": 100, "los'),
    "line that is a list": appended(METRICS, "[1, 2]"),
    "line that is a number": appended(METRICS, "7"),
    "step missing": appended(METRICS, '{"loss": 1.0}'),
    "step null": appended(METRICS, '{"step": null, "loss": 1.0}'),
    "step a text": appended(METRICS, '{"step": "12", "loss": 1.0}'),
    "step true": appended(METRICS, '{"step": true, "loss": 1.0}'),
    "step a fraction": appended(METRICS, '{"step": 1.5, "loss": 1.0}'),
    "step negative": appended(METRICS, '{"step": -5, "loss": 1.0}'),
    "step huge": appended(METRICS, '{"step": 1' + "0" * 400 + ', "loss": 1.0}'),
    "loss NaN": appended(METRICS, '{"step": 101, "loss": NaN}'),
    "loss infinite": appended(METRICS, '{"step": 101, "loss": Infinity, "regret": -Infinity}'),
    "loss a list": appended(METRICS, '{"step": 101, "loss": [1.0]}'),
    "loss huge": appended(METRICS, '{"step": 101, "loss": 1' + "0" * 400 + "}"),
    "number of 5,000 digits": appended(METRICS, '{"step": 101, "loss": ' + HUGE + "}"),
    "tokens a text": appended(METRICS, '{"step": 101, "loss": 1.0, "tokens": "many"}'),
    "end of texts": appended(METRICS, '{"step": 101, "train_runtime": "long", "train_cpu_seconds": [1], "tokens": {}}'),
    "nested too deep": appended(METRICS, DEEP, '{"step": 1, "loss": ' + DEEP + "}"),
    "bytes": appended(METRICS, bytes(range(128, 256)), b"\x00\x01\x02"),
    "evaluation of texts": appended(METRICS, '{"step": 101, "eval_accuracy": "good", "eval_regret": null}'),
    "half a surrogate": appended(HELD_OUT, json.dumps(held_out(100, [1.0], [99.0], input="\ud800")[0])),
    "metrics empty": replaced(METRICS, ""),
    "metrics binary": replaced(METRICS, bytes(range(256)) * 40),
    "metrics UTF-16": replaced(METRICS, '{"step": 1, "loss": 1.0}\n'.encode("utf-16")),
    "metrics with a byte order mark": replaced(METRICS, b"\xef\xbb\xbf" + b'{"step": 1, "loss": 1.0}\n'),
    "metrics a folder": a_folder(METRICS),
    "metrics a link to itself": a_loop(METRICS),
    "held out a folder": a_folder(HELD_OUT),
    "held out empty": replaced(HELD_OUT, ""),
    "id missing": appended(HELD_OUT, '{"step": 100, "regret": 1.0}'),
    "id a list": appended(HELD_OUT, '{"step": 100, "id": [1], "regret": 1.0}'),
    "id a number": appended(HELD_OUT, '{"step": 100, "id": 7, "regret": 1.0}'),
    "scores of other types": appended(HELD_OUT, '{"step": 100, "id": "x", "regret": "high", "accuracy": [1]}'),
    "scores huge": appended(HELD_OUT, '{"step": 100, "id": "x", "regret": 1e999, "accuracy": 1' + "0" * 400 + "}"),
    "tokens and rewards that differ": appended(
        HELD_OUT, json.dumps({**held_out(100, [1.0], [99.0])[0], "id": "x", "tokens": ["a"], "rewards": ["b", None]})
    ),
    "label a list": appended(HELD_OUT, '{"step": 100, "id": "x", "regret": 1.0, "label": [0], "predicted": {}}'),
    "input a number": appended(HELD_OUT, '{"step": 100, "id": "x", "regret": 99.0, "input": 5, "student": null}'),
    "alarms of other types": appended(ALARMS, '{"alarm": {"a": 1}, "step": [1], "message": 5}', "[]", "null"),
    "alarms nested": appended(ALARMS, '{"alarm": ' + DEEP + "}"),
    "alarm message long": appended(ALARMS, json.dumps({"alarm": "x", "message": "y" * 10**6})),
    "alarms a folder": a_folder(ALARMS),
    "run.json a folder": a_folder(RUN),
    "run.json empty": replaced(RUN, ""),
    "run.json cut off": replaced(RUN, '{"trainer": "PPO'),
    "run.json a list": replaced(RUN, "[]"),
    "run.json null": replaced(RUN, "null"),
    "run.json nested": replaced(RUN, '{"settings": ' + DEEP + "}"),
    "settings null": replaced(RUN, '{"trainer": "PPOTrainer", "settings": null}'),
    "settings a list": replaced(RUN, '{"trainer": ["PPO"], "settings": [1], "models": 3, "data": null}'),
    "settings of another version": replaced(RUN, '{"format": 99, "args": {"lr": 1}, "trainer": 7}'),
    "settings of all types": replaced(RUN, '{"settings": {"a": [1], "b": {"c": null}, "metric_for_best_model": 3}}'),
    "summary a list": replaced(SUMMARY, "[]"),
    "summary of other types": replaced(
        SUMMARY, '{"teacher": 5, "student": {"scores": [], "parameters": "x", "ms_per_sentence": 3}, "labels": {}}'
    ),
    "summary binary": replaced(SUMMARY, bytes(range(256))),
    "summary cut off": replaced(SUMMARY, '{"teacher": {"scores"'),
    "config.json of other types": replaced("config.json", '{"id2label": [1]}'),
}


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_reported_with_a_note(tmp_path, capsys, monkeypatch, kind, drawn):
    if not drawn:
        for module in ("charts", "forest"):
            monkeypatch.setattr(f"rlkd.report.{module}.drawing", lambda *_, **__: Markup("<svg></svg>"))
    good, bad = run_folder(tmp_path / "good"), run_folder(tmp_path / "bad")
    DAMAGES[kind](bad)
    for command in (["report", str(bad)], ["report", str(bad), "--json"], ["compare", str(good), str(bad)],
                    ["compare", str(bad), str(good), "--json", "--out", str(tmp_path / "page.html")]):  # fmt: skip
        assert code(command) == 0, command
        assert "Traceback" not in capsys.readouterr().err
    assert (bad / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")


def emptied(folder: Path, name: str) -> None:
    run_folder(folder)
    for file in folder.iterdir():
        if file.name != name:
            file.unlink()


def nothing(folder: Path) -> Path:
    folder.mkdir()
    return folder


def only(name: str, content: str | bytes):
    return lambda folder: (nothing(folder), replaced(name, content)(folder))


# What is no run at all: one line, code 3.
REFUSED = {
    "no folder": (lambda folder: None, "no such folder"),
    "a file": (lambda folder: folder.write_text("x"), "this is a file, not a folder"),
    "an empty folder": (nothing, "no run in it"),
    "empty files": (only(METRICS, ""), "hold nothing yet"),
    "binary metrics alone": (only(METRICS, bytes(range(256)) * 9), "hold nothing yet. metrics.jsonl: "),
    "run.json alone, cut off": (only(RUN, '{"settings"'), "hold nothing yet. run.json is not JSON"),
    "alarms alone, of lists": (only(ALARMS, "[]\n"), "hold nothing yet. alarms.jsonl: 1 line is not"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_run_is_one_line(tmp_path, capsys, kind):
    make, message = REFUSED[kind]
    make(tmp_path / "run")
    for command in (["report", str(tmp_path / "run")], ["compare", str(tmp_path / "run"), str(tmp_path / "run")]):
        assert code(command) == 3
        screen = capsys.readouterr().err
        assert message in " ".join(screen.split())
        assert "Traceback" not in screen
        assert len(screen.splitlines()) <= 6


def test_a_page_that_cannot_be_written(tmp_path, capsys):
    folder = run_folder(tmp_path / "run")
    (folder / "report.html").mkdir()
    assert code(["report", str(folder)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_series_is_thinned_and_its_ends_stay():
    log = Log()
    for step in range(50_000):
        log.add(step, {"step": step, "loss": float(step), "tokens": 2.0, **({"kl": 1.0} if step % 2 else {})})
    rows = log.rows()
    losses = [row["loss"] for row in rows if "loss" in row]
    assert POINTS / 2 <= len(losses) <= POINTS + 1
    assert (losses[0], losses[-1]) == (0.0, 49_999.0)
    assert len([row for row in rows if "kl" in row]) >= POINTS / 2  # logged at every second step only
    assert log.tokens == 100_000.0
    log.add(100, {"loss": -1.0, "tokens": 5.0})  # resumed from an earlier step
    assert [row["loss"] for row in log.rows() if "loss" in row][-1] == -1.0
    assert log.tokens == 100_003.0


def test_lines_longer_than_memory_should_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("rlkd.report.lines.LONGEST_LINE", 64)
    (tmp_path / "x").write_text('{"step": 1}\n{"a": "' + "x" * 500 + '"}\n{"step": 2}\n')
    notes: list[str] = []
    assert [row for _, row in json_lines(tmp_path / "x", notes)] == [{"step": 1}, {"step": 2}]
    assert notes == ["x: 1 line is not a JSON object and is left out (first: line 2)."]


def test_only_the_first_and_the_newest_evaluation_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("rlkd.report.reading.ROWS_KEPT", 3)
    rows = [row for step in (0, 10, 20) for row in held_out(step, [1.0] * 5, [2.0] * 5)]
    run = read_run(write_run(tmp_path, "PPOTrainer", rows), "x")
    assert {step: len(own) for step, own in run.held_out.items()} == {0: 3, 20: 3}
    assert any("of an evaluation 3 rows are read; 4 more" in note for note in run.notes)
    assert run.whole(run.newest[1])["tokens"] == ["a", " c"]
    (tmp_path / "held_out.jsonl").unlink()
    assert run.whole(run.newest[1]) is run.newest[1]
    assert ROWS_KEPT == 50_000


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_million_log_lines_take_less_than_300_mb(tmp_path, command):
    folder = run_folder(tmp_path / "long")
    with (folder / METRICS).open("w") as file:
        for step in range(1, 1_000_001):
            more = ', "regret": 1.5, "kl": 0.01, "length": 20.5, "finish_rate": 0.9' if step % 4 == 0 else ""
            file.write(f'{{"step": {step}, "time": {step}.5, "loss": {1 / step}, "grad_norm": 1.25, "entropy": 0.5, '
                       f'"tokens": 640.0, "tokens_per_second": 900.5{more}}}\n')  # fmt: skip
    script = (
        "import re, sys; from rlkd.cli.main import app; app(sys.argv[1:], standalone_mode=False);"
        # getrusage would count what the parent held when it started this process
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024)"
    )
    given = [str(folder)] if command == "report" else [str(folder), str(run_folder(tmp_path / "short"))]
    done = subprocess.run(
        [sys.executable, "-c", script, command, *given, "--out", str(tmp_path / "page.html"), "--quiet"],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 300
    assert (tmp_path / "page.html").stat().st_size < 5e6


def test_a_folder_that_cannot_be_listed(tmp_path, capsys, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    assert code(["report", str(tmp_path)]) == 3
    assert "cannot be read: Permission denied" in " ".join(capsys.readouterr().err.split())
