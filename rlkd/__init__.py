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
    "ConfigError": "errors",
    "RlkdError": "errors",
    "Examples": "data.examples",
    "supervised_pairs": "data.examples",
    "load_rows": "data.rows",
    "find_labels": "data.glue",
    "load_labelled": "data.glue",
    "load_task": "data.glue",
    "write_submission": "data.glue",
    "classification_metrics": "evaluation.task_metrics",
    "load_templates": "templates.template",
    "LanguageModel": "models.language_model",
    "language_model": "models.architectures",
    "load_model": "models.loading",
    "load_tokenizer": "models.vocabulary",
    "Teacher": "models.teacher",
    "Policy": "models.policy",
    "REWARDS": "objectives.rewards",
    "Reward": "objectives.rewards",
    "BASELINES": "objectives.advantages",
    "Baseline": "objectives.advantages",
    "CreditInputs": "objectives.advantages",
    "DIVERGENCES": "objectives.divergences",
    "Divergence": "objectives.divergences",
    "TeacherSignal": "records",
    "PRESETS": "objectives.encoder",
    "kl_k3": "objectives.policy",
    "reduce_tokens": "objectives.policy",
    "reinforce_loss": "objectives.policy",
    "token_statistics": "objectives.policy",
    "sample_rollouts": "sampling.rollouts",
    "Objective": "trainers.objective",
    "OnPolicyTrainer": "trainers.on_policy",
    "PolicyGradient": "trainers.policy_gradient",
    "SignalSource": "models.signals",
    "generate_pseudolabels": "labels.pseudolabels",
    "labels_finished": "labels.pseudolabels",
    "load_pseudolabels": "labels.pseudolabels",
    "Evaluator": "evaluation.evaluator",
    "TASK_METRICS": "evaluation.task_metrics",
    "RowMean": "evaluation.task_metrics",
    "RewardView": "inspection.reward_view",
    "reward_view": "inspection.build",
    "SupervisedArguments": "trainers.arguments",
    "ReinforceArguments": "trainers.arguments",
    "PPOArguments": "trainers.arguments",
    "SupervisedTrainer": "trainers.supervised",
    "ReinforceTrainer": "trainers.reinforce",
    "PPOTrainer": "trainers.ppo",
    "TKDArguments": "trainers.encoders.arguments",
    "TKDTrainer": "trainers.encoders.tkd",
    "check_distillation": "trainers.encoders.tkd",
    "distil_chain": "trainers.encoders.tkd",
    "build_student": "models.encoders.classifiers",
    "pooled_layers": "models.encoders.representations",
    "linear_probe": "evaluation.probing",
    "majority_baseline": "evaluation.probing",
    "BiLSTMConfig": "models.encoders.bilstm",
    "BiLSTMForSequenceClassification": "models.encoders.bilstm",
    "DataArguments": "jobs.setup",
    "TeacherArguments": "jobs.setup",
    "prepare": "jobs.setup",
    "LabelledDataArguments": "jobs.encoder_data",
    "EncoderTeacherArguments": "jobs.encoder_setup",
    "EncoderStudentArguments": "jobs.encoder_setup",
    "prepare_encoders": "jobs.encoder_setup",
    "fine_tuned_teacher": "jobs.encoder_setup",
    "compare_with_teacher": "jobs.encoder_report",
    "Arm": "jobs.study",
    "Cell": "jobs.study",
    "Study": "jobs.study",
    "file_digests": "jobs.study",
    "read_plan": "jobs.study",
    "write_json": "jobs.study",
    "run_study": "jobs.study_runner",
    "timed_training": "jobs.timed_training",
    "spread_text": "jobs.study_results",
    "spreads": "jobs.study_results",
    "paired_test": "jobs.study_results",
    "markdown_table": "jobs.study_results",
    "export_onnx": "models.encoders.onnx_export",
    "parse_config": "settings.parsing",
    "run_main": "settings.parsing",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rlkd' has no attribute '{name}'")
    return getattr(importlib.import_module(f"rlkd.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
