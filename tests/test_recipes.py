"""The recipes as a user runs them: tiny twins end to end, configurations that parse, bad input answered in one
screen.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models.chat_templates import chat_model, chat_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertConfig

from rlkd import (
    TRAINING_JOBS,
    DataArguments,
    GKDArguments,
    PPOArguments,
    ReinforceArguments,
    SupervisedArguments,
    TeacherArguments,
    load_pseudolabels,
    parse_config,
)
from rlkd.models.spec import ModelSpec
from rlkd.settings.trl_compat import ModelConfig
from tiny import save_pretrained, tiny_t5, tiny_tokenizer

RECIPES = Path(__file__).parents[1] / "recipes"
KINDS = {
    "ppo": PPOArguments,
    "reinforce": ReinforceArguments,
    "seqkd": SupervisedArguments,
    "opd": ReinforceArguments,
    "gkd": GKDArguments,
}
SCRIPTS = {"opd": "reinforce"}  # configurations that another recipe's script runs


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    """A folder as the tiny twins expect it: recipes/, and runs/tiny with models, rows and labels."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(RECIPES, folder / "recipes")
    _python(folder, "recipes/tiny_models.py", "--to", "runs/tiny")
    command = "generate-pseudolabels --teacher runs/tiny/teacher --dataset runs/tiny/train.jsonl --input-column note"
    command += " --templates recipes/tiny_templates.yaml --strategy sample --max-new-tokens 8 --out runs/tiny/labels"
    _python(folder, "-c", "from rlkd.cli.main import main; main()", *command.split())
    return folder


def _python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _recipe(kind: str, folder: Path, monkeypatch, *flags: str, config: str | None = None) -> None:
    """Run a recipe in this process with its tiny twin; SystemExit carries the exit code."""
    monkeypatch.chdir(folder)
    config = config or f"recipes/{kind}_t0_to_t5.tiny.yaml"
    script = f"recipes/{SCRIPTS.get(kind, kind)}_t0_to_t5.py"
    monkeypatch.setattr(sys, "argv", [script, "--config", config, *flags])
    runpy.run_path(script, run_name="__main__")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["", ".tiny"])
def test_shipped_configurations_parse(kind, size):
    path = RECIPES / f"{kind}_t0_to_t5{size}.yaml"
    types = (DataArguments, TeacherArguments, ModelConfig, KINDS[kind])
    parsed = parse_config(types, ["--config", str(path), "--bf16", "false"])
    values = {name: value for part in parsed for name, value in vars(part).items()}
    for name, value in yaml.safe_load(path.read_text()).items():
        if name not in ("bf16", "report_to"):
            assert values[name] == value or str(values[name]) == str(value), name


@pytest.mark.parametrize("kind", ["seqkd", "ppo", "reinforce", "opd"])
def test_the_configurations_of_a_prompted_llm(kind):
    """They parse, with the same models and prompts, and their first lines say how they are run."""
    path = RECIPES / f"{kind}_smollm2.yaml"
    job = TRAINING_JOBS[kind]
    data, teacher, model, _ = parse_config(job.settings, ["--config", str(path)], preset=job.preset)
    assert (teacher.teacher_chat, data.student_chat, teacher.teacher) == (True, True, "runs/smollm2/teacher")
    assert model.model_name_or_path == f"runs/smollm2/{'student' if kind == 'seqkd' else 'seqkd'}"
    assert f"rlkd train {kind} --config recipes/{path.name}" in path.read_text()


def test_an_llm_is_written_as_plain_weights_with_a_third_of_its_layers(tmp_path, monkeypatch):
    """All but the download: the model that its file gives cannot be saved as it is."""
    model = chat_model(seed=3, num_hidden_layers=6)
    want = model(torch.tensor([[3, 40, 50]])).logits
    model.config.quantization_config = {"quant_method": "gguf"}
    monkeypatch.syspath_prepend(str(RECIPES))
    import smollm2_models

    monkeypatch.setattr(smollm2_models, "fetch", lambda folder: folder / "weights.gguf")
    monkeypatch.setattr(smollm2_models, "load", lambda weights: (model, chat_tokenizer()))
    monkeypatch.setattr(sys, "argv", ["smollm2_models.py", "--to", str(tmp_path)])
    smollm2_models.main()
    teacher = ModelSpec(str(tmp_path / "teacher"), "teacher", chat=True)
    with torch.no_grad():
        torch.testing.assert_close(teacher.load()(torch.tensor([[3, 40, 50]])).logits, want)
    student = ModelSpec(str(tmp_path / "student"), "student", chat=True)
    assert student.config.num_hidden_layers == 2
    assert student.tokenizer.chat_template == chat_tokenizer().chat_template


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_twin_trains_saves_and_resumes(kind, tiny_run, monkeypatch):
    out = tiny_run / "runs" / "tiny" / kind
    _recipe(kind, tiny_run, monkeypatch)
    _, info = AutoModelForSeq2SeqLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = {key for line in (out / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {"loss", "eval_regret", "eval_match", "eval_exact_match", "eval_length", "eval_finish_rate"} <= names

    # Four steps in one run, or two and two more: the same student.
    short = out.with_name(f"{kind}-short")
    # Schedules that do not depend on the length of the run.
    constant = ("--lr_scheduler_type", "reduce_lr_on_plateau" if kind == "seqkd" else "constant")
    resume = ("--resume_from_checkpoint", str(short / "checkpoint-2"), "--max_steps", "4", *constant)
    straight, resumed = out.with_name(f"{kind}-straight"), out.with_name(f"{kind}-resumed")
    _recipe(kind, tiny_run, monkeypatch, "--output_dir", str(straight), "--max_steps", "4", *constant)
    _recipe(kind, tiny_run, monkeypatch, "--output_dir", str(short), *constant)
    _recipe(kind, tiny_run, monkeypatch, "--output_dir", str(resumed), *resume)
    models = [AutoModelForSeq2SeqLM.from_pretrained(folder) for folder in (straight, resumed)]
    for (name, one), (_, other) in zip(*(model.named_parameters() for model in models), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.slow
def test_the_ppo_recipe_takes_decoder_only_models(tiny_run, monkeypatch):
    _recipe("ppo", tiny_run, monkeypatch, config="recipes/ppo_decoder.tiny.yaml")
    out = tiny_run / "runs" / "tiny" / "ppo-decoder"
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = {key for line in (out / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {"loss", "start_regret", "eval_regret", "eval_exact_match", "eval_finish_rate"} <= names


@pytest.mark.multi
def test_accelerate_launch_runs_the_ppo_twin(tiny_run):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu", "recipes/ppo_t0_to_t5.py"]
    _python(tiny_run, *launch, "--config", "recipes/ppo_t0_to_t5.tiny.yaml", "--output_dir", "runs/tiny/launched")
    assert (tiny_run / "runs" / "tiny" / "launched" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_recipe_says_only_its_own_lines(tiny_run):
    """In a log file: no other library's lines, no box drawing, no carriage returns, no long numbers."""
    command = ["recipes/seqkd_t0_to_t5.py", "--config", "recipes/seqkd_t0_to_t5.tiny.yaml", "--use_cpu", "false"]
    done = _python(tiny_run, *command, "--output_dir", "runs/tiny/quiet")
    noise = "gemm_4bit|\\[transformers\\]|WANDB|Warning|pin_memory|[\u2500-\u257f]|\r|\\d\\.\\d{6}"
    assert not re.findall(noise, done.stdout + done.stderr)
    assert "samples at step 2\n" in done.stderr


@pytest.mark.slow
def test_the_flat_loop_runs_as_its_docstring_says(tiny_run):
    command = (RECIPES / "rl_loop.py").read_text().split("python recipes/rl_loop.py", 1)[1].split('"""', 1)[0]
    arguments = command.replace("\\\n", " ").split()
    done = _python(tiny_run, "recipes/rl_loop.py", *arguments, "--steps", "2", "--max_new_tokens", "8")
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == ["1", "2"]
    AutoModelForSeq2SeqLM.from_pretrained(tiny_run / "runs" / "tiny" / "rl_loop")
    wrong = [sys.executable, "recipes/rl_loop.py", *arguments, "--reward", "maxx"]
    refused = subprocess.run(wrong, cwd=tiny_run, capture_output=True, text=True, timeout=300)
    assert refused.returncode == 2
    assert "allowed are 'max', 'lse', 'softmax'. Did you mean 'max'?" in refused.stderr


def _bad_inputs(folder: Path) -> dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]]:
    """Flags, the exit code, and what the one screen must say."""
    tiny = folder / "runs" / "tiny"
    (tiny / "empty.jsonl").write_text("")
    BertConfig(vocab_size=8).save_pretrained(tiny / "encoder")
    words = [*tiny_tokenizer().get_vocab(), "extra"]
    save_pretrained(tiny / "foreign", tiny_t5(), tiny_tokenizer(words))
    return {
        "missing column": (("--input_column", "nota"), 3, ("train.jsonl", "nota", "note", "input_column")),
        "empty file": (("--dataset", str(tiny / "empty.jsonl")), 3, ("empty.jsonl", "empty")),
        "missing file": (("--dataset", str(tiny / "nowhere.jsonl")), 3, ("nowhere.jsonl",)),
        "unknown template": (
            ("--templates", "recipes/tiny_templates.yaml:what is lef"),
            3,
            ("tiny_templates.yaml", "what is lef", "what is left"),
        ),
        "vocabulary": (("--teacher", str(tiny / "foreign")), 2, ("another vocabulary", "one_step", "distribution")),
        "encoder as teacher": (("--teacher", str(tiny / "encoder")), 2, ("teacher", "bert", "an encoder", "llama")),
        "float16": (("--teacher_dtype", "float16"), 2, ("teacher_dtype", "bfloat16", "float32")),
        "no such teacher": (("--teacher", str(tiny / "nobody")), 2, ("teacher", "nobody")),
        "flag typo": (("--kl_coeff", "0.1"), 2, ("kl_coeff", "kl_coef")),
        "bad value": (("--reward_value", "maxx"), 2, ("reward_value", "max", "lse", "softmax")),
        "bad combination": (("--rollouts_per_prompt", "3"), 2, ("rollouts_per_prompt", "divide")),
    }


@pytest.mark.slow
def test_bad_input_is_one_screen_before_any_weights_load(tiny_run, monkeypatch, capsys):
    def weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("rlkd.models.loading.load_model", weights)
    for what, (flags, code, words) in _bad_inputs(tiny_run).items():
        with pytest.raises(SystemExit) as exit_info:
            _recipe("ppo", tiny_run, monkeypatch, "--output_dir", "runs/tiny/refused", *flags)
        screen = capsys.readouterr().err
        assert exit_info.value.code == code, (what, screen)
        assert "Traceback" not in screen, what
        assert len(screen.splitlines()) <= 24, (what, screen)
        for word in words:
            assert word in screen, (what, word, screen)


@pytest.mark.slow
def test_yaml_typo_names_file_line_and_nearest_key(tiny_run, monkeypatch, capsys):
    path = tiny_run / "recipes" / "typo.yaml"
    path.write_text((tiny_run / "recipes" / "ppo_t0_to_t5.tiny.yaml").read_text() + "learning_rat: 0.1\n")
    line = len(path.read_text().splitlines())
    with pytest.raises(SystemExit) as exit_info:
        _recipe("ppo", tiny_run, monkeypatch, "--config", str(path))
    screen = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "config" in screen  # two --config are refused

    monkeypatch.setattr(sys, "argv", ["recipes/ppo_t0_to_t5.py", "--config", str(path)])
    with pytest.raises(SystemExit):
        runpy.run_path("recipes/ppo_t0_to_t5.py", run_name="__main__")
    screen = capsys.readouterr().err
    assert f"typo.yaml:{line}" in screen
    assert "learning_rate" in screen


@pytest.mark.slow
def test_nan_in_the_teacher_is_refused(tiny_run, monkeypatch, capsys):
    broken = tiny_run / "runs" / "tiny" / "broken"
    shutil.copytree(tiny_run / "runs" / "tiny" / "teacher", broken)
    model = AutoModelForSeq2SeqLM.from_pretrained(broken)
    model.decoder.final_layer_norm.weight.data[0] = float("nan")
    model.save_pretrained(broken)
    with pytest.raises(SystemExit) as exit_info:
        _recipe("ppo", tiny_run, monkeypatch, "--teacher", str(broken), "--output_dir", str(tiny_run / "runs" / "nan"))
    screen = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert "decoder.final_layer_norm.weight holds values that are not finite" in screen
    assert not (tiny_run / "runs" / "nan" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "data", "row", "columns"),
    [
        ("classify_agnews", "agnews", {"text": "a b c", "label": "World"}, "template\trows\texact_match\t"),
        ("paraphrase_quora", "quora_para", {"source": "a b", "target": "b a"}, "template\trows\tbleu\trouge1\t"),
    ],
)
def test_worked_labelling_recipes(tiny_run, script, data, row, columns):
    """The scripts as a user runs them, with a tiny teacher and data in the same format."""
    folder = tiny_run / "data" / data
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    words = [*tiny_tokenizer().get_vocab(), "World", "Sports", "Business", "Sci/Tech"]  # else none could be ranked
    teacher = save_pretrained(tiny_run / "runs" / "tiny" / script, tiny_t5(vocab=len(words)), tiny_tokenizer(words))
    environment = {
        "TEACHER": teacher, "DATA": "data", "OUT": f"runs/{script}", "LIMIT": "3",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    command = ["bash", f"recipes/pseudolabels/{script}.sh", "--quiet"]
    done = subprocess.run(
        command, cwd=tiny_run, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    verified, head, *lines = done.stdout.splitlines()
    assert verified.endswith("all intact")
    assert head.startswith(columns)
    labels = load_pseudolabels(tiny_run / "runs" / script).to_list()
    assert len(labels) == sum(int(line.split("\t")[1]) for line in lines)
    if script == "classify_agnews":
        assert len(labels) == 3 * 4
        for label in labels:
            best = max(range(4), key=lambda i: label["choice_logprobs"][i])
            assert label["label"] == label["choices"][best]
    else:
        assert len(labels) == 3 * 2
