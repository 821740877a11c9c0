"""Everything that rlkd imports from TRL; `tests/settings/test_trl_compat.py` tests what it relies on, name by name.

TRL 1.13 to 1.16 has these four names. Its trainers are not used: they are written for decoder-only models, and their
base class sends telemetry when one is constructed. Nothing here does (see the test).
"""

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

__all__ = ["ModelConfig", "TrlParser", "get_peft_config", "get_quantization_config"]
