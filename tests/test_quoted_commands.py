"""Every command that README, docs and recipes quote runs as it stands there, in its smallest form: names of hub models
and of runs are local folders with tiny ones, and flags that make the work small are added. What another test or .ci/run
runs is listed with its place.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from rlkd.cli.main import app, main
from tiny import classifier_tokenizer, save_pretrained, tiny_classifier

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs/tutorial.md"  # runs as a whole, from an installed package: test_packaging
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted({*(ROOT / "docs").glob("*.md")} - {TUTORIAL}),
    ROOT / "prompts/README.md",
    ROOT / "benchmarks/README.md", ROOT / "docker/README.md", *sorted((ROOT / "recipes").rglob("*.md")),
]  # fmt: skip
SUBCOMMANDS = "|".join(info.name or "probe" for info in (*app.registered_commands, *app.registered_groups))
PROGRAMS = rf"(?:rlkd (?:{SUBCOMMANDS})|python|accelerate launch|make|pip|pytest|docker|[A-Z_]+=\S+)"

# Commands that run elsewhere: a pattern, and the file and the text there that runs them.
ELSEWHERE = {
    r"make quickstart( ARGS=--quick)?$": (".ci/run", 'make quickstart ARGS="--quick'),
    r"make test$": (".ci/run", "make test ARGS="),
    r"pytest( -m slow| --messages FILE)?$": (".ci/run", "--messages=runs/messages.tsv -m 'not gpu and not net"),
    r"pytest -m browser$": ("tests/report/test_report_browser.py", "pytest.mark.browser"),
    r"rlkd prompts download$": (".ci/run", "rlkd prompts download"),
    r"python benchmarks/\w+.py( --quick)?$": ("tests/test_benchmarks.py", "--quick"),
    r"rlkd estimate ": ("tests/jobs/test_estimate.py", 'main(["estimate"'),
    r"python -m rlkd.metrics docs/metrics.md$": ("tests/test_metrics_table.py", "docs"),
    r"python tests/trainers/golden_runs.py": ("tests/trainers/test_golden.py", "golden_runs"),
    # Its tests; of chaos.py a sample, in test_run_faults.
    r"make test-faults$": (".ci/run", "-m 'not gpu and not net"),
    r"python tests/trainers/chaos.py": ("tests/trainers/test_run_faults.py", "chaos"),
    r"make docs$": ("tests/test_docs_site.py", "make docs"),
    r"make notebooks$": ("tests/test_notebooks.py", "nbclient"),
    r"make docker-check$": ("tests/test_docker.py", "build stage"),
    r"docker (build|run)": ("tests/test_docker.py", "Dockerfile"),
    r"python recipes/studies/quora_agnews.py": ("tests/test_studies.py", "quora_agnews"),
    r"python recipes/studies/real_text.py": ("tests/test_real_text_study.py", "real_text.py"),
    r"python recipes/studies/tkd_presets.py": ("tests/test_tkd_study.py", "tkd_presets"),
    r"pip install": ("Makefile", "pip install"),
    r"rlkd data merge labels$": ("tests/test_quoted_commands.py", '_run("rlkd data merge labels"'),
    r"python tests/matrix.py --out": ("tests/test_quoted_commands.py", "tests/matrix.py"),
    r"python tests/faults_table.py --write$": ("tests/test_quoted_commands.py", "tests/faults_table.py"),
    r".* --task (rte|stsb) ": ("tests/data/test_glue.py", "stsb"),  # the flags; their data are on the hub
    r"rlkd train tkd --pseudo_labels": ("tests/jobs/test_label_folder_students.py", '["train", "tkd", "--config"'),
    r"PARTS=": ("tests/test_cluster.py", "recipes/cluster/submit.sh"),
    r"rlkd distill --teacher": ("tests/pipeline/test_distill.py", "^rlkd distill (.*)$"),
    r"TEACHER=": ("tests/test_recipes.py", '("classify_agnews", "agnews"'),
}
PLACEHOLDERS = {
    "FILE": "recipes/reinforce_t0_to_t5.tiny.yaml", "OUT": "runs/out", "RUN": "runs/ppo", "T": "google/flan-t5-large",
    "S": "runs/ppo", "spec": "quora_para", "ADAPTER": "runs/adapter",
}  # fmt: skip
SMALL = {
    "generate-pseudolabels": ["--limit", "4", "--max-new-tokens", "4", "--batch-tokens", "512", "--quiet"],
    "predict": ["--limit", "4", "--batch-tokens", "512", "--quiet"],
    "config": ["--bf16", "false"],
    "probe": ["--max-length", "16"],
    "train-vocabulary": ["--size", "270"],
}
SMALL_RUN = [
    *("--max_steps", "4", "--save_steps", "4", "--eval_steps", "4", "--report_to", "none", "--bf16", "false"),
    *("--use_cpu", "true", "--per_device_train_batch_size", "4", "--max_new_tokens", "4", "--eval_limit", "4"),
    *("--warmup_steps", "0", "--gradient_accumulation_steps", "1", "--teacher_dtype", "float32"),
]
SMALL_ENCODER = [
    *("--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "steps", "--save_steps"),
    *("4", "--student_layers", "2", "--teacher_epochs", "1", "--use_cpu", "true", "--max_length", "16"),
]


def quoted() -> dict[str, str]:
    """Command -> the page that quotes it: lines of code blocks, continued by a backslash, and code in a sentence."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        lines = re.findall(rf"^(?:    )?({PROGRAMS} .*)$", text, re.MULTILINE)
        inline = re.findall(rf"`({PROGRAMS} [^`\n]*)`", text)
        for line in lines + inline:
            command = re.sub(r"(?<=\S)\s+\[[^\]]*\]", "", re.sub(r"\s+#\s.*", "", line)).strip()
            if "|" not in command.split("`")[0] and "..." not in command:
                found.setdefault(command, str(page.relative_to(ROOT)))
    return found


def is_elsewhere(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in ELSEWHERE)


COMMANDS = quoted()
# Mentioned, not to be typed as they stand.
NAMES = {
    "rlkd generate-pseudolabels", "rlkd config show", "rlkd probe", "rlkd train teacher", "rlkd data verify",
    "rlkd data score", "rlkd data filter", "rlkd predict", "python -m rlkd",
    "rlkd prompts lint --dataset", "rlkd inspect-rewards --labels", "python recipe.py", "accelerate launch --multi_gpu",
    "accelerate launch --quiet",
}  # fmt: skip
HERE = [command for command in COMMANDS if not is_elsewhere(command) and command not in NAMES]


def test_what_runs_elsewhere_does():
    assert len(HERE) > 25
    for pattern, (file, text) in ELSEWHERE.items():
        assert text in (ROOT / file).read_text(), pattern
        assert any(re.match(pattern, command) for command in COMMANDS), f"{pattern} is quoted nowhere"


TEMPLATE = """\
  NAME: !Template
    id: NAME
    name: NAME
    answer_choices: null
    reference: ''
    metadata: !TemplateMetadata {original_task: true}
    jinja: 'NAME {{ text }} ||| x'
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A user's folder in which every quoted name exists."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    _run_python(folder, "recipes/tiny_models.py", "--to", "runs/tiny")
    tiny = folder / "runs" / "tiny"
    for name, source in {
        "bigscience/T0_3B": "teacher", "google/flan-t5-large": "teacher", "google-t5/t5-base": "student",
        "runs/seqkd": "student", "runs/seqkd_t0_to_t5": "student", "google-bert/bert-base-uncased": "encoder",
    }.items():  # fmt: skip
        shutil.copytree(tiny / source, folder / name)
    notes = [json.loads(line) for line in (tiny / "train.jsonl").read_text().splitlines()]
    (folder / "knkarthick/dialogsum").mkdir(parents=True)
    rows = [{"dialogue": note["note"], "summary": note["answer"], "topic": "x"} for note in notes]
    pq.write_table(pa.Table.from_pylist(rows), folder / "knkarthick/dialogsum/train-0.parquet")
    _write(folder / "my.jsonl", [{"source": n["note"], "target": n["answer"]} for n in notes])
    (folder / "notes.csv").write_text(
        "text,dialogue,summary,topic\n" + "".join(f"{n['note']},{n['note']},{n['answer']},x\n" for n in notes)
    )
    (folder / "news.csv").write_text("body,topic\n" + "".join(f"{n['note']},{i % 4}\n" for i, n in enumerate(notes)))
    shutil.copy(tiny / "labelled.csv", folder / "reviews.csv")
    words = [note["note"].split() for note in notes]
    _write(folder / "news.jsonl", [{"tokens": own, "ner_tags": ["B-X", *"O" * (len(own) - 1)]} for own in words])
    (folder / "topics.csv").write_text(
        "text,label\n" + "".join(f"{i} x,{('a;b', 'a', '')[i % 3]}\n" for i in range(60))
    )
    (folder / "my").mkdir()
    shutil.copy(ROOT / "recipes/tiny_templates.yaml", folder / "my/templates.yaml")
    (folder / "mine.yaml").write_text("templates:\n" + "".join(TEMPLATE.replace("NAME", name) for name in "ab"))
    _classifiers(folder)
    return folder


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _classifiers(folder: Path) -> None:
    for name, seed in (("teacher", 0), ("student", 1), ("runs/teacher", 0), ("runs/student", 1), ("runs/tkd_glue", 2)):
        save_pretrained(folder / name, tiny_classifier(seed=seed), classifier_tokenizer())
    letters = ["a b c", "d e", "f g h", "a c", "d f", "b b"]
    rows = [(part, label, text) for part in ("tr", "va", "te") for label in ("0", "1") for text in letters]
    (folder / "past_present.txt").write_text("".join("\t".join(row) + "\n" for row in rows))
    for part in ("train", "test"):
        (folder / f"{part}.tsv").write_text(
            "text\tlabel\n" + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(letters * 3))
        )


def _run_python(folder: Path, *arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _run(command: str, folder: Path, monkeypatch) -> None:
    """The command in this process; SystemExit with another code than 0 fails."""
    monkeypatch.chdir(folder)
    command = command.replace("--task-file FILE", "--task-file past_present.txt")
    # Tiny tokenizers do not know the choices, and untrained teachers answer greedily with padding alone.
    command = re.sub("--strategy (rank|greedy)", "--strategy sample", command)
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    try:
        if words[0] == "python":
            small = SMALL_ENCODER if "tkd" in words[1] else SMALL_RUN
            where = [] if "--output_dir" in words else ["--output_dir", "runs/out"]
            monkeypatch.setattr(sys, "argv", [*words[1:], *small, *where])
            runpy.run_path(words[1], run_name="__main__")
        else:
            main([*words[1:], *SMALL.get(words[1], [])])
    except SystemExit as end:
        rows_failed = 4  # of labels: random models may answer with padding alone
        if end.code and (end.code != rows_failed or words[1] not in ("generate-pseudolabels", "predict")):
            pytest.fail(f"exit code {end.code}")


@pytest.fixture(scope="module")
def runs(world) -> Path:
    """What the quoted commands find: finished runs and labels, made by quoted commands."""
    with pytest.MonkeyPatch.context() as patch:
        twin = "python recipes/reinforce_t0_to_t5.py --config recipes/reinforce_t0_to_t5.tiny.yaml"
        _run(f"{twin} --output_dir runs/ppo", world, patch)
        patch.chdir(world)
        for name in ("runs/mine", "runs/a", "runs/b", "runs/quickstart/seed-0/ppo", "runs/quickstart/seed-0/seqkd"):
            shutil.copytree("runs/ppo", name)
        label = "rlkd generate-pseudolabels --teacher bigscience/T0_3B --dataset my.jsonl --input-column source"
        label += " --strategy sample"
        label += " --reference-column target --top-k-logprobs 2 --out"
        for name in (
            "runs/news",
            "runs/labels_t0",
            "labels --shard-rows 2 --shard 0/2",
            "labels --shard-rows 2 --shard 1/2",
        ):
            _run(f"{label} {name}", world, patch)
        _run("rlkd data merge labels", world, patch)
        adapter = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained("google-t5/t5-base"), LoraConfig(r=2))
        adapter.save_pretrained("runs/adapter")
        AutoTokenizer.from_pretrained("google-t5/t5-base").save_pretrained("runs/adapter")
    return world


@pytest.mark.slow
@pytest.mark.parametrize("command", HERE)
def test_a_quoted_command_runs(command, runs, monkeypatch, capsys):
    if "ag_news" in command and not _has_archive():
        pytest.skip("promptsource's archive is not here")
    for name in ["runs/out", *re.findall(r"--out(?:put_dir)? (\S+)", command)]:
        shutil.rmtree(runs / name, ignore_errors=True)
    _run(command, runs, monkeypatch)
    capsys.readouterr()


def _has_archive() -> bool:
    from rlkd.templates.sources import cached_archive

    return cached_archive().exists()


@pytest.mark.slow
def test_the_table_of_families_and_files_is_made(tmp_path):
    made = tmp_path / "families.md"
    command = [sys.executable, "tests/matrix.py", "--only", ".xlsx", "--out", str(made)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in made.read_text().splitlines() if line.startswith("| .xlsx"))
    assert line in (ROOT / "docs/families.md").read_text()
    assert line.count("refused (1)") == 6


@pytest.mark.slow
def test_the_table_of_faults_is_counted_again():
    command = [sys.executable, "tests/faults_table.py", "--only", "promptsource's archive"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.endswith("changed after it was fetched")]
    held, tried = map(int, re.findall(r"\d+", line)[:2])
    assert held == tried > 0
