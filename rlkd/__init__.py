"""rlkd: distil a large prompted language model into a small fast one by reinforcement learning on the teacher's own
log-probs.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names and where they live; loaded on first use so that `import rlkd` costs nothing.
_PUBLIC = {
    "Example": "records",
    "PseudoLabel": "records",
    "RlkdError": "errors",
    "Examples": "data.examples",
    "supervised_pairs": "data.examples",
    "load_rows": "data.rows",
    "load_labelled": "data.glue",
    "load_task": "data.glue",
    "write_submission": "data.glue",
    "classification_metrics": "metrics",
    "load_templates": "data.prompts",
    "EncoderDecoder": "models.architectures",
    "load_encoder_decoder": "models.architectures",
    "load_tokenizer": "models.vocabulary",
    "Teacher": "models.teacher",
    "Policy": "models.student",
    "generate_pseudolabels": "generation.pseudolabels",
    "labels_finished": "generation.pseudolabels",
    "load_pseudolabels": "generation.pseudolabels",
    "Evaluator": "evaluation",
    "TASK_METRICS": "metrics",
    "RowMean": "metrics",
    "RewardView": "inspection.reward_view",
    "reward_view": "inspection.build",
    "SupervisedArguments": "trainers.arguments",
    "ReinforceArguments": "trainers.arguments",
    "PPOArguments": "trainers.arguments",
    "SupervisedTrainer": "trainers.supervised",
    "ReinforceTrainer": "trainers.reinforce",
    "PPOTrainer": "trainers.ppo",
    "TKDArguments": "trainers.tkd_arguments",
    "TKDTrainer": "trainers.tkd",
    "check_distillation": "trainers.tkd",
    "distil_chain": "trainers.tkd",
    "build_student": "models.encoders",
    "pooled_layers": "models.representations",
    "linear_probe": "probing",
    "majority_baseline": "probing",
    "BiLSTMConfig": "models.bilstm",
    "BiLSTMForSequenceClassification": "models.bilstm",
    "DataArguments": "trainers.setup",
    "TeacherArguments": "trainers.setup",
    "prepare": "trainers.setup",
    "LabelledDataArguments": "trainers.encoder_data",
    "EncoderTeacherArguments": "trainers.encoder_setup",
    "EncoderStudentArguments": "trainers.encoder_setup",
    "prepare_encoders": "trainers.encoder_setup",
    "fine_tuned_teacher": "trainers.encoder_setup",
    "compare_with_teacher": "trainers.encoder_report",
    "export_onnx": "models.onnx_export",
    "parse_config": "config",
    "run_main": "config",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlkd' has no attribute '{name}'")
    return getattr(importlib.import_module(f"rlkd.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
