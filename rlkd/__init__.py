"""rlkd: distil a large prompted language model into a small fast one by reinforcement learning on the teacher's own
log-probs.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# bitsandbytes on a CPU warns of an optional kernel whenever it is imported.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Public names by the module they live in. They are imported on first use, so that `import rlkd` costs nothing; type
# checkers and editors read the imports below, which a test holds equal to this table.
_MODULES = {
    "checks": ("check_choice", "check_settings", "OneOf"),
    "cli.distill": ("distill",),
    "data.answered": ("supervised_pairs",),
    "data.examples": ("Examples",),
    "data.glue": ("load_labelled", "load_task", "TableLayout", "write_submission"),
    "data.label_columns": ("find_labels",),
    "data.rows": ("load_rows",),
    "data.text": ("TextFormat",),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DivergenceError",
        "InterruptedRunError",
        "LockedError",
        "ModelError",
        "RlkdError",
        "ServerError",
    ),
    "evaluation.evaluator": ("Evaluator",),
    "evaluation.problems": ("classification_metrics",),
    "evaluation.probing": ("linear_probe", "majority_baseline", "ProbeScore", "Split"),
    "evaluation.samples": ("Sample",),
    "evaluation.task_metrics": ("RowMean", "TASK_METRICS"),
    "inspection.build": ("reward_view",),
    "inspection.reward_view": ("RewardView",),
    "jobs.encoder_data_arguments": ("LabelledDataArguments",),
    "jobs.encoder_report": ("compare_with_teacher",),
    "jobs.encoder_setup": ("EncoderStudentArguments", "EncoderTeacherArguments", "prepare_encoders"),
    "jobs.encoder_teachers": ("fine_tuned_teacher", "teacher_of_student"),
    "jobs.setup": ("DataArguments", "prepare", "TeacherArguments"),
    "jobs.study": ("Arm", "Cell", "file_digests", "read_plan", "Study", "write_json"),
    "jobs.study_results": ("markdown_table", "paired_test", "spread_text", "spreads"),
    "jobs.study_runner": ("run_study",),
    "jobs.timed_training": ("timed_training",),
    "jobs.training": ("TRAINING_JOBS", "TrainingJob"),
    "labels.options": ("RunOptions",),
    "labels.recorded": ("RecordedTeacher",),
    "labels.pseudolabels": ("generate_pseudolabels",),
    "labels.store": ("labels_finished", "load_pseudolabels"),
    "metrics": ("Metric",),
    "models.architectures": ("Architecture", "language_model", "LANGUAGE_MODELS"),
    "models.encoders.bilstm": ("BiLSTMConfig", "BiLSTMForSequenceClassification"),
    "models.encoders.classifiers": ("build_student",),
    "models.encoders.onnx_export": ("export_onnx",),
    "models.encoders.representations": ("pooled_layers",),
    "models.heads": ("Head", "HeadOverStates"),
    "models.language_model": ("DecodingState", "LanguageModel"),
    "models.loading": ("load_model",),
    "models.other_tokenizer": ("OtherTokenizer",),
    "models.policy": ("Policy",),
    "models.served": ("ServerTeacher",),
    "models.server": ("ServerSettings",),
    "models.several": ("AveragedTeachers", "RoutedTeachers"),
    "models.signals": ("LocalSource", "SignalSource"),
    "models.spec": ("ModelSource", "ModelSpec", "TeacherSpec"),
    "models.teacher": ("Teacher",),
    "models.chat": ("with_chat",),
    "models.cut_layers": ("write_small",),
    "models.vocabulary": ("load_tokenizer", "valid_vocab"),
    "objectives.advantages": ("Baseline", "BASELINES", "CreditInputs"),
    "objectives.attention_tree": ("attention_tree", "rows_of_map"),
    "objectives.divergences": ("Divergence", "DIVERGENCES"),
    "objectives.encoder": ("token_distance",),
    "objectives.policy": ("ppo_loss", "reduce_tokens", "reinforce_loss", "token_statistics"),
    "objectives.rewards": (
        "induced",
        "induced_advantage",
        "induced_reward",
        "Reward",
        "REWARDS",
        "teacher_value",
        "token_scores",
    ),
    "pipeline.arguments": ("DistillArguments",),
    "records": (
        "Answers",
        "Batched",
        "Distribution",
        "Example",
        "Minibatch",
        "Prompt",
        "PromptedRow",
        "PseudoLabel",
        "select_rows",
        "TeacherSignal",
    ),
    "runs.alarms": ("Alarm", "ALARMS"),
    "sampling.engines.protocol": ("Answer", "Decoding", "Engine", "EngineKind", "EngineSettings"),
    "sampling.engines.registry": ("ENGINES",),
    "sampling.proposal": ("Proposal",),
    "sampling.rollouts": ("greedy_answers", "sample_rollouts"),
    "settings.parsing": ("parse_config", "run_main"),
    "settings.paths": ("refuse_missing_paths",),
    "settings.trl_compat": ("ModelConfig",),
    "templates.template": ("load_templates", "Rendered", "Template"),
    "trainers.arguments": (
        "GKDArguments",
        "OnPolicyArguments",
        "PPOArguments",
        "ReinforceArguments",
        "RLArguments",
        "SupervisedArguments",
    ),
    "trainers.encoders.arguments": ("TKDArguments",),
    "trainers.encoders.checks": ("check_distillation",),
    "trainers.encoders.terms": ("PRESETS", "Term", "TERMS"),
    "trainers.encoders.tkd": ("TKDTrainer",),
    "trainers.gkd": ("GKDTrainer",),
    "trainers.objective": ("Evidence", "Objective", "StudentTokens"),
    "trainers.on_policy": ("OnPolicyTrainer",),
    "trainers.policy_gradient": ("Credit", "PolicyGradient", "PolicyGradientTrainer"),
    "trainers.ppo": ("PPOTrainer",),
    "trainers.reinforce": ("ReinforceTrainer",),
    "trainers.reward_function": ("teacher_reward_func",),
    "trainers.supervised": ("SupervisedTrainer",),
}
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_PUBLIC, "__version__"]

if TYPE_CHECKING:
    from .checks import OneOf as OneOf
    from .checks import check_choice as check_choice
    from .checks import check_settings as check_settings
    from .cli.distill import distill as distill
    from .data.answered import supervised_pairs as supervised_pairs
    from .data.examples import Examples as Examples
    from .data.glue import TableLayout as TableLayout
    from .data.glue import load_labelled as load_labelled
    from .data.glue import load_task as load_task
    from .data.glue import write_submission as write_submission
    from .data.label_columns import find_labels as find_labels
    from .data.rows import load_rows as load_rows
    from .data.text import TextFormat as TextFormat
    from .errors import CheckpointError as CheckpointError
    from .errors import ConfigError as ConfigError
    from .errors import DataError as DataError
    from .errors import DivergenceError as DivergenceError
    from .errors import InterruptedRunError as InterruptedRunError
    from .errors import LockedError as LockedError
    from .errors import ModelError as ModelError
    from .errors import RlkdError as RlkdError
    from .errors import ServerError as ServerError
    from .evaluation.evaluator import Evaluator as Evaluator
    from .evaluation.probing import ProbeScore as ProbeScore
    from .evaluation.probing import Split as Split
    from .evaluation.probing import linear_probe as linear_probe
    from .evaluation.probing import majority_baseline as majority_baseline
    from .evaluation.problems import classification_metrics as classification_metrics
    from .evaluation.samples import Sample as Sample
    from .evaluation.task_metrics import TASK_METRICS as TASK_METRICS
    from .evaluation.task_metrics import RowMean as RowMean
    from .inspection.build import reward_view as reward_view
    from .inspection.reward_view import RewardView as RewardView
    from .jobs.encoder_data_arguments import LabelledDataArguments as LabelledDataArguments
    from .jobs.encoder_report import compare_with_teacher as compare_with_teacher
    from .jobs.encoder_setup import EncoderStudentArguments as EncoderStudentArguments
    from .jobs.encoder_setup import EncoderTeacherArguments as EncoderTeacherArguments
    from .jobs.encoder_setup import prepare_encoders as prepare_encoders
    from .jobs.encoder_teachers import fine_tuned_teacher as fine_tuned_teacher
    from .jobs.encoder_teachers import teacher_of_student as teacher_of_student
    from .jobs.setup import DataArguments as DataArguments
    from .jobs.setup import TeacherArguments as TeacherArguments
    from .jobs.setup import prepare as prepare
    from .jobs.study import Arm as Arm
    from .jobs.study import Cell as Cell
    from .jobs.study import Study as Study
    from .jobs.study import file_digests as file_digests
    from .jobs.study import read_plan as read_plan
    from .jobs.study import write_json as write_json
    from .jobs.study_results import markdown_table as markdown_table
    from .jobs.study_results import paired_test as paired_test
    from .jobs.study_results import spread_text as spread_text
    from .jobs.study_results import spreads as spreads
    from .jobs.study_runner import run_study as run_study
    from .jobs.timed_training import timed_training as timed_training
    from .jobs.training import TRAINING_JOBS as TRAINING_JOBS
    from .jobs.training import TrainingJob as TrainingJob
    from .labels.options import RunOptions as RunOptions
    from .labels.pseudolabels import generate_pseudolabels as generate_pseudolabels
    from .labels.recorded import RecordedTeacher as RecordedTeacher
    from .labels.store import labels_finished as labels_finished
    from .labels.store import load_pseudolabels as load_pseudolabels
    from .metrics import Metric as Metric
    from .models.architectures import LANGUAGE_MODELS as LANGUAGE_MODELS
    from .models.architectures import Architecture as Architecture
    from .models.architectures import language_model as language_model
    from .models.chat import with_chat as with_chat
    from .models.cut_layers import write_small as write_small
    from .models.encoders.bilstm import BiLSTMConfig as BiLSTMConfig
    from .models.encoders.bilstm import BiLSTMForSequenceClassification as BiLSTMForSequenceClassification
    from .models.encoders.classifiers import build_student as build_student
    from .models.encoders.onnx_export import export_onnx as export_onnx
    from .models.encoders.representations import pooled_layers as pooled_layers
    from .models.heads import Head as Head
    from .models.heads import HeadOverStates as HeadOverStates
    from .models.language_model import DecodingState as DecodingState
    from .models.language_model import LanguageModel as LanguageModel
    from .models.loading import load_model as load_model
    from .models.other_tokenizer import OtherTokenizer as OtherTokenizer
    from .models.policy import Policy as Policy
    from .models.served import ServerTeacher as ServerTeacher
    from .models.server import ServerSettings as ServerSettings
    from .models.several import AveragedTeachers as AveragedTeachers
    from .models.several import RoutedTeachers as RoutedTeachers
    from .models.signals import LocalSource as LocalSource
    from .models.signals import SignalSource as SignalSource
    from .models.spec import ModelSource as ModelSource
    from .models.spec import ModelSpec as ModelSpec
    from .models.spec import TeacherSpec as TeacherSpec
    from .models.teacher import Teacher as Teacher
    from .models.vocabulary import load_tokenizer as load_tokenizer
    from .models.vocabulary import valid_vocab as valid_vocab
    from .objectives.advantages import BASELINES as BASELINES
    from .objectives.advantages import Baseline as Baseline
    from .objectives.advantages import CreditInputs as CreditInputs
    from .objectives.attention_tree import attention_tree as attention_tree
    from .objectives.attention_tree import rows_of_map as rows_of_map
    from .objectives.divergences import DIVERGENCES as DIVERGENCES
    from .objectives.divergences import Divergence as Divergence
    from .objectives.encoder import token_distance as token_distance
    from .objectives.policy import ppo_loss as ppo_loss
    from .objectives.policy import reduce_tokens as reduce_tokens
    from .objectives.policy import reinforce_loss as reinforce_loss
    from .objectives.policy import token_statistics as token_statistics
    from .objectives.rewards import REWARDS as REWARDS
    from .objectives.rewards import Reward as Reward
    from .objectives.rewards import induced as induced
    from .objectives.rewards import induced_advantage as induced_advantage
    from .objectives.rewards import induced_reward as induced_reward
    from .objectives.rewards import teacher_value as teacher_value
    from .objectives.rewards import token_scores as token_scores
    from .pipeline.arguments import DistillArguments as DistillArguments
    from .records import Answers as Answers
    from .records import Batched as Batched
    from .records import Distribution as Distribution
    from .records import Example as Example
    from .records import Minibatch as Minibatch
    from .records import Prompt as Prompt
    from .records import PromptedRow as PromptedRow
    from .records import PseudoLabel as PseudoLabel
    from .records import TeacherSignal as TeacherSignal
    from .records import select_rows as select_rows
    from .runs.alarms import ALARMS as ALARMS
    from .runs.alarms import Alarm as Alarm
    from .sampling.engines.protocol import Answer as Answer
    from .sampling.engines.protocol import Decoding as Decoding
    from .sampling.engines.protocol import Engine as Engine
    from .sampling.engines.protocol import EngineKind as EngineKind
    from .sampling.engines.protocol import EngineSettings as EngineSettings
    from .sampling.engines.registry import ENGINES as ENGINES
    from .sampling.proposal import Proposal as Proposal
    from .sampling.rollouts import greedy_answers as greedy_answers
    from .sampling.rollouts import sample_rollouts as sample_rollouts
    from .settings.parsing import parse_config as parse_config
    from .settings.parsing import run_main as run_main
    from .settings.paths import refuse_missing_paths as refuse_missing_paths
    from .settings.trl_compat import ModelConfig as ModelConfig
    from .templates.template import Rendered as Rendered
    from .templates.template import Template as Template
    from .templates.template import load_templates as load_templates
    from .trainers.arguments import GKDArguments as GKDArguments
    from .trainers.arguments import OnPolicyArguments as OnPolicyArguments
    from .trainers.arguments import PPOArguments as PPOArguments
    from .trainers.arguments import ReinforceArguments as ReinforceArguments
    from .trainers.arguments import RLArguments as RLArguments
    from .trainers.arguments import SupervisedArguments as SupervisedArguments
    from .trainers.encoders.arguments import TKDArguments as TKDArguments
    from .trainers.encoders.checks import check_distillation as check_distillation
    from .trainers.encoders.terms import PRESETS as PRESETS
    from .trainers.encoders.terms import TERMS as TERMS
    from .trainers.encoders.terms import Term as Term
    from .trainers.encoders.tkd import TKDTrainer as TKDTrainer
    from .trainers.gkd import GKDTrainer as GKDTrainer
    from .trainers.objective import Evidence as Evidence
    from .trainers.objective import Objective as Objective
    from .trainers.objective import StudentTokens as StudentTokens
    from .trainers.on_policy import OnPolicyTrainer as OnPolicyTrainer
    from .trainers.policy_gradient import Credit as Credit
    from .trainers.policy_gradient import PolicyGradient as PolicyGradient
    from .trainers.policy_gradient import PolicyGradientTrainer as PolicyGradientTrainer
    from .trainers.ppo import PPOTrainer as PPOTrainer
    from .trainers.reinforce import ReinforceTrainer as ReinforceTrainer
    from .trainers.reward_function import teacher_reward_func as teacher_reward_func
    from .trainers.supervised import SupervisedTrainer as SupervisedTrainer
else:

    def __getattr__(name):
        if name not in _PUBLIC:
            raise AttributeError(f"module 'rlkd' has no attribute '{name}'")
        return getattr(importlib.import_module(f"rlkd.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
