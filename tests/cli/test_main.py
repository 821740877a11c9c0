import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlkd.cli.main import app, main
from rlkd.errors import DataError
from rlkd.labels.store import load_pseudolabels
from tiny import save_pair, save_pretrained, tiny_t5, tiny_tokenizer

ROWS = [{"source": "a b c", "target": "c b a"}, {"source": "d e", "target": "e d"}, {"source": "", "target": "x"}]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLKD_CACHE", str(tmp_path / "cache"))  # no templates that the user downloaded
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def arguments(teacher, *more):
    return [
        "generate-pseudolabels", "--teacher", teacher, "--dataset", "rows.jsonl", "--input-column", "source",
        "--out", "labels", "--max-new-tokens", "5", "--engine", "torch", *more,
    ]  # fmt: skip


def run(*args, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from rlkd.cli.main import main; main()", *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, **options)


def test_usage_errors_keep_secrets_and_exit_codes(folder, capsys):
    for command, said in (
        (["data", "verify", "https://me:hunter22@host/x"], "https:/<redacted>@host/x"),
        (["--hf_" + "Ab3" * 11], "No such option: --<redacted>"),
        (["nope"], "No such command 'nope'"),
        (["data", "verify"], "Missing argument"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == (3 if "https" in said else 2)
        assert said in capsys.readouterr().err


def test_labels_without_one_that_is_ok_have_no_score(folder, capsys, monkeypatch):
    monkeypatch.setattr("rlkd.labels.store.load_pseudolabels", lambda path: type("Rows", (), {"to_list": list})())
    with pytest.raises(SystemExit) as stopped:
        main(["data", "score", "labels"])
    assert stopped.value.code == 3
    assert "labels: no row has a label (status ok)" in capsys.readouterr().err


def test_json_on_stdout_is_json_whatever_the_environment(folder, teacher):
    """transformers prints a line on stdout when it is imported under WANDB_MODE=offline."""
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    code = "from rlkd.settings.parsing import run_main\nrun_main(lambda: __import__('transformers.integrations'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


def test_end_to_end(folder, teacher):
    more = ["--templates", "quora_para", "--templates", "asset:Complex and simple", "--reference-column", "target"]
    more += ["--strategy", "sample", "--labels-per-input", "2", "--seed", "3", "--no-input-eos"]
    result = CliRunner().invoke(app, arguments(teacher, *more), catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.startswith(
        "30 rows in 1 shard: 20 ok, 10 skipped, 0 failed; 0 prompts truncated; 0 bad input rows skipped\n"
        "  10 x no student input\n"
    )
    assert "  Complex and simple: 4 ok, 2 skipped\n" in result.stdout
    rows = load_pseudolabels("labels").to_list()
    # Two rows have an input; five templates, two samples.
    assert len(rows) == 2 * 5 * 2
    assert rows[0]["teacher_input"] == "Paraphrase this question: a b c"
    assert rows[-1]["teacher_input"] == "Complex: d e\nSimple:"
    assert {(row["student_input"], *row["references"]) for row in rows} == {("a b c", "c b a"), ("d e", "e d")}
    settings = json.loads((folder / "labels" / "manifest.jsonl").read_text().splitlines()[0])["settings"]
    assert (settings["append_eos"], settings["seed"], settings["max_new_tokens"]) == (False, 3, 5)


@pytest.mark.parametrize("strategy", ["greedy", "beam"])
def test_the_other_strategies_without_templates(folder, teacher, strategy):
    result = CliRunner().invoke(app, arguments(teacher, "--strategy", strategy, "--limit", "1"), catch_exceptions=False)
    assert result.exit_code == 0
    (row,) = load_pseudolabels("labels").to_list()
    assert (row["template"], row["teacher_input"], row["references"]) == ("none", "a b c", [])


def test_in_a_process_of_its_own(folder, teacher):
    done = run("prompts", "show", "nothing", cwd=folder)
    assert done.returncode == 3
    assert done.stderr.startswith("error: no templates for 'nothing'")
    assert "Traceback" not in done.stderr
    done = run(*arguments(teacher, "--templates", "quora_para", "--limit", "2"), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(load_pseudolabels(folder / "labels")) == 8
    assert "labels 8/8" in done.stderr


def failing(capsys, args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "wanted"),
    [
        (["--dataset", "row.jsonl"], 3, "Did you mean 'rows.jsonl'?"),
        (["--input-column", "sauce"], 3, "student_column: 'sauce'. Did you mean 'source'?"),
        (["--templates", "quora"], 3, "no templates for 'quora'"),
        (["--templates", "quora_para:Paraphrase"], 3, "Did you mean 'Paraphrase the question'?"),
        (["--templates", "agnews_names"], 3, "text in template 'Which section'"),
        (
            ["--templates", "x", "--templates-dir", "nowhere"],
            3,
            "templates_dir = 'nowhere': there is no such file or folder",
        ),
        (["--labels-per-input", "2"], 2, "labels_per_input = 2 with strategy = 'greedy'"),
        (["--teacher", "no/such-model"], 2, "teacher 'no/such-model' is neither a local folder"),
        (["--teacher-dtype", "float16"], 2, "float16 overflows"),
        (["--strategy", "rank"], 2, "no answer choices to rank"),
        (["--shard", "2/2"], 3, "allowed is i/n with 0 <= i < n"),
        (["--compute-type", "int8"], 2, "engine = 'torch': it computes in the precision of the teacher's weights"),
        (["--engine", "vllm"], 2, "--engine"),
        (["--strategy", "topk"], 2, "--strategy"),
        (["--limit", "0"], 2, "--limit"),
    ],
)
def test_mistakes_end_before_the_weights_load(folder, teacher, capsys, monkeypatch, more, code, wanted):
    def refuse(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", refuse)
    status, message = failing(capsys, arguments(teacher, *more))
    assert wanted in message
    assert status == code
    assert message.count("\n") < 24
    assert not (folder / "labels").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(folder, capsys):
    wrong = save_pretrained(folder / "wrong", tiny_t5(vocab=20), tiny_tokenizer())
    status, message = failing(capsys, arguments(wrong))
    assert status == 2
    assert "do not match" in message


def test_a_finished_folder_needs_overwrite(folder, teacher, capsys):
    invoke = CliRunner().invoke
    assert invoke(app, arguments(teacher)).exit_code == 0
    result = invoke(app, arguments(teacher))
    assert isinstance(result.exception, DataError)
    assert "--overwrite" in str(result.exception)
    assert invoke(app, arguments(teacher, "--overwrite", "--limit", "1")).exit_code == 0
    assert len(load_pseudolabels("labels")) == 1


FAILS = "templates:\n  1: !Template {name: t, jinja: 'copy {{ source }} {{ 1 // (target|length - 5) }}'}\n"


def test_failed_rows_end_with_exit_code_4_and_are_in_the_card(folder, teacher, capsys):
    (folder / "t.yaml").write_text(FAILS)
    status, _ = failing(
        capsys, arguments(teacher, "--templates", "t.yaml", "--limit", "2", "--reference-column", "target")
    )
    assert status == 4
    rows = load_pseudolabels("labels", statuses=None).to_list()
    assert [row["status"] for row in rows] == ["failed", "ok"]
    assert "ZeroDivisionError" in rows[0]["error"]
    card = (folder / "labels" / "README.md").read_text()
    assert "2 rows from 2 inputs: 1 ok, 0 skipped, 1 failed." in card
    assert "| t | 1 failed, 1 ok |" in card


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*", "ignore:.*4bit.*")
@pytest.mark.parametrize(
    ("package", "options"),
    [
        ("ctranslate2", ["--engine", "ctranslate2", "--compute-type", "int8"]),
        ("ctranslate2", ["--engine", "ctranslate2", "--compute-type", "float32"]),
        ("bitsandbytes", ["--teacher-quantization", "int8"]),
        # bitsandbytes' 4-bit kernels for processors refuse layers this small.
        pytest.param("bitsandbytes", ["--teacher-quantization", "nf4"], marks=pytest.mark.gpu),
    ],
    ids=["ct2 int8", "ct2 float32", "bnb int8", "bnb nf4"],
)
def test_lower_precision_is_measured_against_the_teacher(folder, teacher, monkeypatch, package, options):
    pytest.importorskip(package)
    monkeypatch.setenv("RLKD_CACHE", str(folder / "cache"))
    assert CliRunner().invoke(app, arguments(teacher, *options), catch_exceptions=False).exit_code == 0
    header = json.loads((folder / "labels" / "manifest.jsonl").read_text().splitlines()[0])
    card = (folder / "labels" / "README.md").read_text()
    if "float32" in options:
        assert "agreement" not in header
        assert "lower precision" not in card
        return
    # Two rows have an input; every answer and its log-probabilities are compared with those of a float32 run.
    assert header["agreement"]["prompts"] == 2
    rounded = load_pseudolabels("labels").to_list()
    assert CliRunner().invoke(app, arguments(teacher, "--overwrite"), catch_exceptions=False).exit_code == 0
    exact = load_pseudolabels("labels").to_list()
    same = [a["token_ids"] == b["token_ids"] for a, b in zip(rounded, exact, strict=True)]
    assert header["agreement"]["exact_match"] == sum(same) / 2
    assert 0 < header["agreement"]["mean_abs_delta_logprob"] < 0.5
    assert "full-precision teacher's" in card


def test_columns_and_labels_are_mapped_before_anything_reads_them(folder, teacher, capsys):
    (folder / "rows.jsonl").write_text('{"question": "a b", "class": 1}\n{"question": "c", "class": 0}\n')
    (folder / "t.yaml").write_text(
        "templates:\n  x: !Template\n    id: x\n    name: by label\n"
        "    jinja: '{{ label }} {{ source }} ||| t'\n    metadata: !TemplateMetadata {}\n"
    )
    mapped = ["--templates", "t.yaml:by label", "--column-map", "question=source,class=label", "--gold-input"]
    main_ok(arguments(teacher, *mapped, "--label-map", "1=a,0=b", "--quiet"))
    assert [row["teacher_input"] for row in load_pseudolabels("labels")] == ["a a b", "b c"]
    assert [row["student_input"] for row in load_pseudolabels("labels")] == ["a b", "c"]
    for more, place in (
        (["--label-map", "1=a"], "rows.jsonl:2: label_map: column 'label' has 0, which is not mapped"),
        (["--column-map", "wording=x"], "column_map: there is no column 'wording'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments(teacher, *mapped, *more), "--out", "other"])
        assert stopped.value.code == 3
        assert place in capsys.readouterr().err


def test_score_compares_labels_with_references_by_template(folder, teacher, capsys):
    more = ["--templates", "quora_para", "--reference-column", "target", "--quiet"]
    main_ok(arguments(teacher, *more))
    rows = load_pseudolabels("labels").to_list()
    main_ok(["data", "score", "labels", "--metric", "exact_match", "--json"])
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == list(dict.fromkeys(row["template"] for row in rows))
    for template, values in scores.items():
        mine = [row for row in rows if row["template"] == template]
        assert values["rows"] == len(mine) == 2
        assert values["exact_match"] == sum(row["label"] in row["references"] for row in mine) / 2
        assert values["tokens"] == sum(len(row["token_ids"]) for row in mine) / 2
        tokens = sum(len(row["token_ids"]) for row in mine)
        assert values["logprob"] == pytest.approx(sum(row["sum_logprob"] for row in mine) / tokens)
        assert values["finished"] == sum(row["token_ids"][-1] == 1 for row in mine) / 2
    main_ok(["data", "score", "labels"])
    assert capsys.readouterr().out.startswith("template\trows\texact_match\trouge1\t")
    with pytest.raises(SystemExit) as stopped:
        main(["data", "score", "labels", "--metric", "rogue"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "allowed are rouge, bleu, chrf, exact_match, token_f1, sari. Did you mean 'rouge'?" in said


def test_a_template_whose_choices_are_one_to_the_tokenizer_is_refused_at_once(folder, teacher, capsys, monkeypatch):
    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", weights)
    text = "templates:\n  1: !Template {name: is, jinja: '{{ source }} ||| x', answer_choices: '{ ||| <'}\n"
    (folder / "t.yaml").write_text(text)
    status, message = failing(capsys, arguments(teacher, "--strategy", "rank", "--templates", "t.yaml"))
    assert status == 2
    assert "strategy = 'rank': template 'is'" in message
    assert "the tokenizer has no tokens for the answer choice '{', so no answer can be chosen" in message
    assert not (folder / "labels").exists()


def test_parts_verify_and_repair(folder, teacher, capsys):
    (folder / "rows.jsonl").write_text("".join(json.dumps({"source": f"a {i}"}) + "\n" for i in range(9)))
    main_ok(arguments(teacher, "--shard-rows", "2", "--quiet"))
    whole = {file.name: file.read_bytes() for file in (folder / "labels").glob("*.parquet")}
    for i in range(2):
        main_ok([*arguments(teacher, "--shard-rows", "2", "--shard", f"{i}/2"), "--out", "parts"])
    capsys.readouterr()
    main_ok(["data", "merge", "parts", "--json"])
    assert json.loads(capsys.readouterr().out)["rows"] == 9
    assert {file.name: file.read_bytes() for file in (folder / "parts").glob("*.parquet")} == whole
    capsys.readouterr()
    main_ok(["data", "verify", "parts"])
    assert capsys.readouterr().out == "parts: 5 shards, 9 rows, all intact\n"
    main_ok(["data", "verify", "parts", "--quiet"])
    assert capsys.readouterr().out == ""
    (folder / "parts" / "labels-00002.parquet").write_bytes(b"damaged")
    status, message = failing(capsys, ["data", "verify", "parts"])
    assert status == 3
    assert "labels-00002.parquet differs from its checksum" in message
    with pytest.raises(SystemExit) as stopped:
        main(["data", "verify", "parts", "--json"])
    assert stopped.value.code == 3
    found = json.loads(capsys.readouterr().out)
    assert (found["shards"], found["rows"], len(found["problems"])) == (5, 9, 1)
    main_ok(["data", "repair", "parts", "--dry-run", "--json"])
    assert "labels-00002" in json.loads(capsys.readouterr().out)["dropped"][0]
    assert (folder / "parts" / "labels-00002.parquet").read_bytes() == b"damaged"
    # The recorded command names a teacher and data: it is shown, and runs only when asked for.
    status, message = failing(capsys, ["data", "repair", "parts"])
    assert status == 3
    assert f"rlkd generate-pseudolabels --teacher={teacher} --dataset=rows.jsonl" in message
    assert "repeat with --run" in message
    assert (folder / "parts" / "labels-00002.parquet").read_bytes() == b"damaged"
    main_ok(["data", "repair", "parts", "--quiet", "--run"])
    assert capsys.readouterr().out == ""
    assert {file.name: file.read_bytes() for file in (folder / "parts").glob("*.parquet")} == whole
    main_ok(["data", "verify", "parts"])


def main_ok(args):
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert not stop.value.code


def test_help_and_version_load_no_torch():
    code = (
        "import sys\nfrom rlkd.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules)\nassert not heavy, heavy"
    )
    for args in (["--help"], ["--version"], ["generate-pseudolabels", "--help"], ["prompts", "list", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
    # The last help text: what promptsource calls a subset is not taken for markup.
    assert "dataset[/subset][:name]" in " ".join(done.stdout.split())


def test_version():
    assert re.fullmatch(r"rlkd \d+\.\d+\.\d+\n", CliRunner().invoke(app, ["--version"]).stdout)
