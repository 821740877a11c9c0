"""Settings that arrive by environment, as accelerate's launcher passes them: refused as a setting is, or recorded and
compared.
"""

import logging
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from test_tkd import make as make_tkd

from rlkd import TKDArguments
from rlkd.errors import ConfigError
from rlkd.io.versions import VARIABLES
from rlkd.runs.record import RunRecord
from rlkd.trainers.environment import ACCUMULATION, COMPILER, MIXED_PRECISION, use_one_gpu
from tiny_runs import ARGUMENTS, differ, make, weights

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
        ("ACCELERATE_USE_FSDP", "true", "FSDP .*students are not sharded"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed .*students are not sharded"),
        ("ACCELERATE_USE_MEGATRON_LM", "True", "Megatron-LM .*students are not sharded"),
        (MIXED_PRECISION, "half", "ACCELERATE_MIXED_PRECISION = 'half': allowed are no, fp8, fp16, bf16"),
        (COMPILER, "fast", "ACCELERATE_DYNAMO_BACKEND = 'fast': allowed are no, "),
    ],
)
def test_what_no_trainer_can_do_is_refused_before_anything_loads(tmp_path, monkeypatch, kind, variable, value, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=said):
        kind(str(tmp_path), use_cpu=True)


def test_sharding_by_settings_is_refused_too(tmp_path):
    with pytest.raises(ConfigError, match=r"FSDP \(fsdp\)"):
        arguments("supervised", tmp_path, fsdp="full_shard")


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
