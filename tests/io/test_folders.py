"""Commands and trainers do not write into folders, or over files, that are something else."""

import json
import shutil

import pytest
from typer.testing import CliRunner

import stub
from rlkd.cli.main import app
from rlkd.errors import ConfigError, DataError
from rlkd.inspection.reward_view import RewardView
from rlkd.io.folders import refuse_other_contents, write_page
from rlkd.labels.maintenance import merge
from rlkd.labels.manifest import Manifest
from rlkd.labels.pseudolabels import generate_pseudolabels
from rlkd.models.encoders import onnx_export
from rlkd.records import Example
from rlkd.runs.checkpoints import check_resumed_settings
from rlkd.sampling.engines.protocol import Decoding
from rlkd.trainers.arguments import SupervisedArguments
from rlkd.trainers.supervised import SupervisedTrainer
from tiny import save_pretrained, tiny_t5, tiny_teacher, tiny_tokenizer


def model(folder):
    save_pretrained(folder, tiny_t5())
    (folder / "README.md").write_text("a model")


def files(*names):
    def write(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    return write


OTHERS = {
    "model": model,
    "model without card": lambda folder: save_pretrained(folder, tiny_t5()),
    "sharded model": files("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"),
    "pickled model": files("pytorch_model.bin", "config.json"),
    "adapter": files("adapter_model.safetensors", "adapter_config.json"),
    "data set": files("train.jsonl", "test.csv"),
    "shards": files("train-00000-of-00001.parquet"),
    "saved data set": files("data-00000-of-00001.arrow", "dataset_info.json", "state.json"),
    "project": files("pyproject.toml", "README.md", "src/x.py"),
    "card": files("README.md"),
    "templates": files("templates/a.yaml", "promptsource.tar.gz"),
}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return stub.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 8)


@pytest.mark.parametrize("other", OTHERS)
def test_everything_that_writes_into_a_folder_refuses_another_ones(source, tmp_path, monkeypatch, other):
    out = tmp_path / "out"
    out.mkdir()
    OTHERS[other](out)
    before = contents(out)
    for i in range(2):
        stub.label(source, tmp_path / str(i), part=(i, 2))
    args = SupervisedArguments(str(out), use_cpu=True, report_to="none", max_steps=1)
    rows = [{"student_input": "a", "label": "b"}]
    trainer = SupervisedTrainer(tiny_t5(), args, tokenizer=tiny_tokenizer(), train_dataset=rows)
    monkeypatch.setattr(onnx_export, "require_onnx", lambda: None)
    examples = [Example("1", "a", ("a",))]
    decoding = Decoding("greedy", 2)
    writers = {
        "labels": lambda: stub.label(source, out),
        "labels again": lambda: stub.label(source, out, overwrite=True),
        "in Python": lambda: generate_pseudolabels(
            tiny_teacher(), examples, out=out, template_names=["t"], decoding=decoding
        ),
        "merge": lambda: merge(out, [tmp_path / "0", tmp_path / "1"]),
        "trainer": trainer.train,
        "job": trainer.run,
        "resumed": lambda: trainer.train(resume_from_checkpoint="auto"),
        "recipe": lambda: check_resumed_settings(args, ()),
        "export": lambda: onnx_export.export_onnx("no/model", out),
    }
    for name, write in writers.items():
        with pytest.raises(ConfigError, match=r"holds something else: .* Name a new or an empty") as error:
            write()
        assert "\n" not in str(error.value), name
        visible = {file: content for file, content in contents(out).items() if not file.startswith(".")}
        assert visible == before, name


def test_what_belongs_to_results_may_be_there(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("slurm-1.out", "run.log", "settings.yaml", "requirements.txt", ".gitignore"):
        (out / name).write_text(name)
    stub.label(source, out)
    (out / "notes.md").write_text("mine")  # later, too
    stub.label(source, out, overwrite=True)
    assert (out / "notes.md").read_text() == "mine"
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.log").write_text("x")
    (run / "teacher").mkdir()
    (run / "teacher" / "config.json").write_text("{}")
    args = SupervisedArguments(str(run), use_cpu=True, report_to="none", max_steps=1)
    rows = [{"student_input": "a", "label": "b"}]
    SupervisedTrainer(tiny_t5(), args, tokenizer=tiny_tokenizer(), train_dataset=rows).run()
    (run / "notes.md").write_text("mine")
    check_resumed_settings(args, ())
    refuse_other_contents(tmp_path / "nowhere", "--out", signs=())


def test_a_run_does_not_write_into_a_model_that_it_reads(tmp_path):
    """Even where that model is a student of an earlier run."""
    run = tmp_path / "run"
    save_pretrained(run, tiny_t5())
    (run / "run.json").write_text("{}")
    student = tiny_t5().from_pretrained(run)
    args = SupervisedArguments(str(run), use_cpu=True, report_to="none", max_steps=1)
    rows = [{"student_input": "a", "label": "b"}]
    trainer = SupervisedTrainer(student, args, tokenizer=tiny_tokenizer(), train_dataset=rows)
    for write in (
        trainer.run,
        lambda: check_resumed_settings(args, [type("Teacher", (), {"teacher": f"{tmp_path}/x/../run"})]),
        lambda: check_resumed_settings(args, [type("Student", (), {"model_name_or_path": str(run)})]),
    ):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(ConfigError, match=r"output_dir .*run is the folder of a model that the run reads"):
            write()


@pytest.mark.parametrize(
    "content", ["a manifest of speech files", '{"audio_filepath": "a.wav"}\n', '{"kind": "Header"}\n']
)
def test_another_manifest_is_not_continued(source, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.jsonl").write_text(content)
    with pytest.raises(DataError, match="its first line, the header, is not readable"):
        stub.label(source, out)
    assert (out / "manifest.jsonl").read_text() == content


def test_a_torn_header_is_a_run_that_was_killed_at_once(source, tmp_path):
    stub.label(source, tmp_path / "whole")
    line = (tmp_path / "whole" / "manifest.jsonl").read_bytes().splitlines()[0]
    for size in (0, 5, 300):
        out = tmp_path / str(size)
        out.mkdir()
        (out / "manifest.jsonl").write_bytes(line[:size])
        stub.label(source, out)
        assert Manifest.read(out / "manifest.jsonl").to_bytes() == (tmp_path / "whole" / "manifest.jsonl").read_bytes()


def test_pages_replace_pages_only(tmp_path):
    page = tmp_path / "page.html"
    for _ in range(2):
        RewardView([], "max", "a").to_html(page)
    mine = tmp_path / "mine.html"
    mine.write_text("<!doctype html><title>mine</title>")
    data = tmp_path / "rows.jsonl"
    data.write_text("{}")
    for path in (mine, data):
        before = path.read_text()
        with pytest.raises(ConfigError, match=rf"--out .*{path.name} exists and is not a page of rlkd"):
            write_page(path, page.read_text())
        assert path.read_text() == before
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 1.0, "loss": 1.0}) + "\n")
    shutil.copytree(run, tmp_path / "other")
    shutil.copy(mine, run / "report.html")
    for command in (
        ["report", str(run)],
        ["report", str(run), "--out", str(data)],
        ["compare", str(run), str(tmp_path / "other"), "--out", str(data)],
        # Before any model loads.
        ["inspect-rewards", "--teacher", "t", "--dataset", "d", "--input-column", "c", "--out", str(mine)],
    ):
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, ConfigError), command
        assert "is not a page of rlkd" in str(result.exception)
    assert data.read_text() == "{}"
