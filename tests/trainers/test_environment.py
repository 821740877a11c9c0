"""Settings that arrive by environment, as accelerate's launcher passes them: refused as a setting is, or recorded and
compared.
"""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.state import AcceleratorState
from test_tkd import make as make_tkd

from rlkd import TKDArguments
from rlkd.errors import ConfigError
from rlkd.io.versions import VARIABLES
from rlkd.runs.record import RunRecord
from rlkd.trainers.environment import ACCUMULATION, COMPILER, MIXED_PRECISION, use_one_gpu
from rlkd.trainers.parallel import check_student
from tiny_runs import ARGUMENTS, differ, make, weights

RECIPE = Path(__file__).parents[2] / "recipes" / "accelerate" / "fsdp2.yaml"
KINDS = list(ARGUMENTS)


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate keeps its first precision for the life of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(kind, tmp_path, **options):
    return ARGUMENTS[kind](output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("origin", ["setting", "environment"])
def test_float16_is_refused_whichever_way_it_comes(tmp_path, monkeypatch, kind, origin):
    named = {"setting": "fp16 = True", "environment": r"mixed_precision: fp16 .*ACCELERATE_MIXED_PRECISION"}
    if origin == "environment":
        monkeypatch.setenv(MIXED_PRECISION, "fp16")
    with pytest.raises(ConfigError, match=named[origin] + ".*overflows to inf in T5"):
        arguments(kind, tmp_path, fp16=origin == "setting")


def test_fp8_that_a_device_turns_into_float16_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    with pytest.raises(ConfigError, match="overflows to inf in T5"):
        make("supervised", tmp_path)


def run(kind, folder, **options):
    build = make_tkd if kind == "tkd" else lambda folder, **o: make(kind, folder, **o)
    trainer = build(folder, max_steps=2, save_strategy="steps", save_steps=1, **options)
    return trainer


@pytest.mark.parametrize("kind", ["supervised", "reinforce", "tkd"])
def test_bfloat16_of_the_environment_is_recorded_and_compared(tmp_path, monkeypatch, kind):
    plain = run(kind, tmp_path / "plain")
    plain.train()
    assert RunRecord.read(tmp_path / "plain").environment["mixed_precision"] == "no"
    monkeypatch.setenv(MIXED_PRECISION, "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    rounded = run(kind, tmp_path / "rounded")
    rounded.train()
    assert differ(weights(plain.trained), weights(rounded.trained))
    assert RunRecord.read(tmp_path / "rounded").environment["mixed_precision"] == "bf16"
    again = run(kind, tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"environment\.mixed_precision: no -> bf16"):
        again.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-1"))


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (COMPILER, "EAGER", "environment.compiler: no -> eager, mode default"),
        *((name, "1", f"environment.{name}: none -> 1") for name in VARIABLES),
    ],
)
def test_variables_that_change_numbers_are_compared(tmp_path, monkeypatch, variable, value, said):
    run("supervised", tmp_path, learning_rate=0.1).train()
    monkeypatch.setenv(variable, value)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = run("supervised", tmp_path, learning_rate=0.1)
    with pytest.raises(ConfigError) as caught:
        again.train(resume_from_checkpoint="auto")
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", [TKDArguments, *ARGUMENTS.values()])
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        (
            "ACCELERATE_USE_DEEPSPEED",
            "true",
            "DeepSpeed .* is not supported. Shard the student with FSDP2: `acc",
        ),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "Megatron-LM .* is not supported"),
        (MIXED_PRECISION, "half", "ACCELERATE_MIXED_PRECISION = 'half': allowed are no, fp8, fp16, bf16"),
        (COMPILER, "fast", "ACCELERATE_DYNAMO_BACKEND = 'fast': allowed are no, "),
    ],
)
def test_what_no_trainer_can_do_is_refused_before_anything_loads(tmp_path, monkeypatch, kind, variable, value, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=said):
        kind(str(tmp_path), use_cpu=True)


@pytest.fixture
def sharded(monkeypatch):
    """The variables of recipes/accelerate/fsdp2.yaml, in one of two processes; they can be changed."""
    environment = {"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2"}
    for name, value in yaml.safe_load(RECIPE.read_text())["fsdp_config"].items():
        environment[name.upper()] = str(value).lower() if isinstance(value, bool) else str(value)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FSDP_VERSION", "1", "fsdp_version = 1 .*FSDP1 is not supported: set it to 2"),
        ("FSDP_VERSION", None, "fsdp_version = 1 "),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "fsdp_auto_wrap_policy = .*set it to TRANSFORMER_BASED_WRAP"),
        ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "fsdp_state_dict_type = .*set it to FULL_STATE_DICT"),
        ("FSDP_STATE_DICT_TYPE", None, "fsdp_state_dict_type = .*set it to FULL_STATE_DICT"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "teacher and reference policy need their weights in every process"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params = true "),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "fsdp_reshard_after_forward = false "),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing of the trainer does it"),
        ("FSDP_IGNORED_MODULES", "value_head", "fsdp_ignored_modules = value_head "),
        ("WORLD_SIZE", "1", "one process has nothing to shard. Use `accelerate launch --config_file"),
        (COMPILER, "EAGER", "ACCELERATE_DYNAMO_BACKEND = 'EAGER': not with FSDP2"),
    ],
)
def test_what_fsdp2_does_not_do_here_is_refused_before_anything_loads(tmp_path, sharded, variable, value, said):
    sharded.setenv(variable, value) if value else sharded.delenv(variable)
    with pytest.raises(ConfigError, match=said):
        arguments("supervised", tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("ppo", {"optim": "adafactor"}, "optim = adafactor: not with FSDP2: set it to one of adamw_torch, "),
        ("gkd", {"torch_compile": True}, "torch_compile = True: not with FSDP2"),
        ("reinforce", {"auto_find_batch_size": True}, "auto_find_batch_size = True: not with FSDP2"),
        ("supervised", {"hidden_coef": 1.0}, "hidden_coef = 1.0: not with FSDP2"),
        ("supervised", {"attention_coef": 1.0}, "attention_coef = 1.0: not with FSDP2"),
    ],
)
def test_settings_that_a_sharded_student_has_not(tmp_path, sharded, kind, options, said):
    with pytest.raises(ConfigError, match=said):
        arguments(kind, tmp_path, **options)


def test_other_ways_to_shard_and_other_students_are_refused(tmp_path, sharded):
    with pytest.raises(ConfigError, match="TKDArguments trains students that are not sharded"):
        TKDArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ConfigError, match="fsdp = 'full_shard': the launcher says how to shard"):
        arguments("supervised", tmp_path, fsdp="full_shard")
    with pytest.raises(ConfigError, match="use_peft: an adapter is small"):
        check_student(SimpleNamespace(peft_config={}))
    sharded.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ConfigError, match="use_cpu = False: FSDP2 finds no GPU"):
        ARGUMENTS["supervised"](output_dir=str(tmp_path))


def test_accumulation_of_accelerates_configuration_is_said_to_be_ignored(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(ACCUMULATION, "4")
    with caplog.at_level(logging.WARNING, logger="rlkd"):
        run("supervised", tmp_path).train()
    assert "gradient_accumulation_steps 4 of accelerate's configuration is not used" in caplog.text


def test_one_process_uses_one_of_several_gpus(caplog):
    """transformers would wrap the student in DataParallel and multiply the batch."""

    args = SimpleNamespace(n_gpu=4)
    with caplog.at_level(logging.WARNING, logger="rlkd"):
        use_one_gpu(args)
    assert args._n_gpu == 1
    assert "4 GPUs are visible, and this process uses the first" in caplog.text
