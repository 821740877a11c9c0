"""What rlkd relies on in TRL, name by name: the first place to look when a new TRL release breaks something."""

import argparse
import subprocess
import sys
from dataclasses import fields

import pytest
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from rlkd.settings import trl_compat
from rlkd.settings.trl_compat import ModelConfig, TrlParser, get_peft_config, get_quantization_config


def test_nothing_else_is_taken():
    assert set(trl_compat.__all__) == {*("ModelConfig", "TrlParser", "get_peft_config", "get_quantization_config")}


def test_trl_parser_is_an_argparse_parser_whose_defaults_can_be_suppressed():
    parser = TrlParser((ModelConfig,), allow_abbrev=False, exit_on_error=False)
    parser.set_defaults_with_config(**dict.fromkeys([field.name for field in fields(ModelConfig)], argparse.SUPPRESS))
    namespace, unknown = parser.parse_known_args(["--lora-r", "8", "--lora", "3"])
    assert (vars(namespace), unknown) == ({"lora_r": 8}, ["--lora", "3"])
    with pytest.raises(argparse.ArgumentError):
        parser.parse_known_args(["--lora_r", "eight"])


def test_model_config_has_the_fields_recipes_set():
    names = {field.name for field in fields(ModelConfig)}
    assert names >= {"model_name_or_path", "model_revision", "dtype", "attn_implementation", "use_peft", "lora_r"}
    assert names >= {"lora_alpha", "lora_dropout", "lora_target_modules", "lora_task_type", "load_in_8bit"}


def test_get_peft_config_keeps_the_encoder_decoder_task_type():
    config = get_peft_config(ModelConfig(use_peft=True, lora_task_type="SEQ_2_SEQ_LM", lora_r=8))
    assert isinstance(config, LoraConfig)
    assert (config.task_type, config.r) == ("SEQ_2_SEQ_LM", 8)
    assert get_peft_config(ModelConfig()) is None


def test_get_quantization_config_is_off_unless_asked_for():
    config = get_quantization_config(ModelConfig(load_in_8bit=True))
    assert isinstance(config, BitsAndBytesConfig)
    assert config.load_in_8bit
    assert get_quantization_config(ModelConfig(load_in_4bit=True)).bnb_4bit_quant_type == "nf4"
    assert get_quantization_config(ModelConfig()) is None


def test_importing_reports_nothing_to_anyone():
    script = """
import socket, sys, threading
def refuse(*_, **__): raise SystemExit("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
import huggingface_hub.utils as utils
utils.send_telemetry = refuse
import rlkd.settings.trl_compat
assert "trl.trainer.base_trainer" not in sys.modules, "the module that reports usage was loaded"
assert not any("telemetry" in thread.name.lower() for thread in threading.enumerate())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
