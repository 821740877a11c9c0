"""All that rlkd takes from TRL, in one place; `tests/models/test_trl_compat.py` checks what we rely on, name by name.

TRL 1.13 to 1.16 has these four under the same names. Its trainers are not used: they are written for decoder-only
models, and their base class reports usage when one is built. Nothing here does (see the test).
"""

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

__all__ = ["ModelConfig", "TrlParser", "get_peft_config", "get_quantization_config"]
