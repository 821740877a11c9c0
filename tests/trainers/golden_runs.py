"""Twenty optimizer steps of every objective on tiny models; golden.json holds what they gave.

python tests/trainers/golden_runs.py [CASE ...]      runs these cases (default: all) and writes their numbers again
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":  # pytest has them on its path
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from test_tkd import make as make_tkd
from test_tkd import rows

from rlkd import BiLSTMConfig, BiLSTMForSequenceClassification, Teacher, build_student, language_model
from tiny import CLASSIFIER_WORDS, tiny_bart, tiny_classifier, tiny_tokenizer
from tiny_runs import PADDED, WORDS, examples, labels, logged, make, tiny_teacher

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 20
# Plain descent in small steps, so that the numbers hold on other CPUs: large steps let rounding errors grow, and Adam
# makes whole steps of those of a gradient that is 0 (key biases).
PLAIN = {"optim": "sgd", "max_steps": STEPS, "alarms": "off"}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}
PRESETS = (
    "ft", "kd", "pkd", "tkd", "teacher-tkd", "t-s-tkd", "rand", "all", "all-tkd", "all-t-tkd", "all-t-s-tkd",
)  # fmt: skip

SUPERVISED: dict[str, dict[str, Any]] = {
    "sequence": {"evaluate": True},
    "forward_kl": {"objective": "forward_kl"},
    "reverse_kl": {"objective": "reverse_kl"},
    "jensen_shannon": {"objective": "jensen_shannon"},
    "total_variation": {"objective": "total_variation"},
    "skew_forward_kl": {"objective": "skew_forward_kl", "evaluate": True},
    "skew_reverse_kl": {"objective": "skew_reverse_kl"},
    "alpha_beta": {"objective": "alpha_beta"},
    "best_token": {"objective": "best_token"},
    "accumulation": {"objective": "forward_kl", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "bart": {"objective": "forward_kl", "bart": True, "evaluate": True},
    "adam": {"objective": "reverse_kl", **ADAM},
}
REINFORCE: dict[str, dict[str, Any]] = {
    "default": {"evaluate": True},
    "baseline_none": {"baseline": "none"},
    "baseline_teacher": {"baseline": "teacher", "lam": 0.7},
    "baseline_closed_form": {"baseline": "closed_form"},
    "baseline_leave_one_out": {"baseline": "leave_one_out", "rollouts_per_prompt": 4},
    "baseline_critic": {"baseline": "critic"},
    "reward_lse": {"reward_value": "lse", "baseline": "teacher", "lam": 0.7},
    "reward_softmax": {"reward_value": "softmax", "baseline": "teacher", "lam": 0.7},
    "one_step_sampled": {"one_step": "sampled"},
    "one_step_sampled_closed_form": {"one_step": "sampled", "baseline": "closed_form"},
    "lag_none": {"sync_every": 3, "importance_weight": "none"},
    "lag_token": {"sync_every": 3, "importance_weight": "token"},
    "lag_cumulative": {"sync_every": 3, "importance_weight": "cumulative", "evaluate": True},
    "lag_cumulative_k_step": {"sync_every": 3, "baseline": "none", "k_step": 2, "lam": 0.9, "one_step": "sampled"},
    "lam_0": {"lam": 0.0},
    "lam_1": {"lam": 1.0},
    "gamma": {"gamma": 0.9, "lam": 0.9},
    "k_step": {"k_step": 2, "lam": 0.8},
    "whiten": {"whiten_advantages": True},
    "sequence_mean": {"loss_reduction": "sequence_mean"},
    "sequence_sum": {"loss_reduction": "sequence_sum"},
    "entropy": {"entropy_coef": 0.1},
    "no_leash": {"kl_coef": 0.0},
    "kl_in_reward": {"kl_in": "reward", "kl_coef": 0.5},
    "kl_target": {"kl_target": 0.02, "kl_coef": 0.1},
    "credit": {"kl_estimator": "k2", "length_normalised": True, "cut_answers": "end_price", "lam": 0.9},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "templates_average": {"templates": "average", "evaluate": True},
    "templates_pool": {"templates": "pool"},
    "bart": {"bart": True, "evaluate": True},
    "entropy_in_reward": {"entropy_in": "reward", "entropy_coef": 0.3, "reward_value": "lse", "lam": 0.9},
    "imitation": {"imitation_coef": 0.5, "labels": 6},
    "adam": ADAM,
}
PPO: dict[str, dict[str, Any]] = {
    "default": {"evaluate": True},
    "leave_one_out": {"baseline": "leave_one_out"},
    "closed_form": {"baseline": "closed_form"},
    "one_step_sampled": {"one_step": "sampled"},
    "gamma": {"gamma": 0.9, "lam": 0.9},
    "whiten": {"whiten_advantages": True},
    "entropy": {"entropy_coef": 0.1},
    "kl_target": {"kl_target": 0.02, "kl_coef": 0.1},
    "kl_in_reward": {"kl_in": "reward", "kl_coef": 0.5},
    "critic": {"value_learning_rate": 0.1, "value_warmup_updates": 6, "dual_clip": 1.01, "cut_answers": "drop"},
    "narrow_clips": {"clip_range": 0.02, "value_clip_range": 0.05, "loss_reduction": "sequence_mean"},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "evaluate": True},
    "adam": ADAM,
}
GKD: dict[str, dict[str, Any]] = {
    "half": {"on_policy_fraction": 0.5, "labels": 6},
    "reverse_kl": {"objective": "reverse_kl", "sync_every": 2},
}
TKD: dict[str, dict[str, Any]] = {
    **{preset: {"preset": preset, "evaluate": preset in ("ft", "tkd")} for preset in PRESETS},
    "auto_scale": {"preset": "all-tkd", "auto_scale": True, "tree_start_epoch": 1.0},
    "noisy_squares": {"preset": "noisy-logits"},
    "states_as_they_are": {
        "preset": "all-tkd", "normalise": False, "distance_reduction": "sum", "beta": 0.01, "gamma_s": 0.02,
        "eta": 0.01,
    },
    "patience_map": {"preset": "pkd", "patience_last_layer": False, "layer_map": [1, 4]},
    "tree_abstract": {"preset": "t-s-tkd", "tree_variant": "abstract", "tree_m": 3, "tree_exclude": ["self", "cls"]},
    "tree_flow": {"preset": "tkd", "tree_variant": "flow", "tree_multiplicity": True},
    "cache": {"preset": "tkd", "teacher_cache": "hidden"},
    "projections": {"preset": "pkd", "narrow": True},
    "dropout": {"preset": "rand", "dropout": 0.1},
    "accumulation": {"preset": "kd", "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "bilstm": {"preset": "pkd", "bilstm": True, **ADAM},
}  # fmt: skip
CASES = {
    f"{kind}-{name}": (kind, options)
    for kind, group in (("supervised", SUPERVISED), ("reinforce", REINFORCE), ("ppo", PPO), ("gkd", GKD), ("tkd", TKD))
    for name, options in group.items()
}

# Of the log lines.
KEPT = (
    "loss", "grad_norm", "regret", "kl", "kl_coef", "entropy", "length", "advantage_std", "ratio_max", "clip_fraction",
    "value_loss", "explained_variance", "ce", "kd", "pt", "td_student", "td_teacher", "td_random", "all", "noisy",
)  # fmt: skip
CLOCKS = ("seconds", "per_second", "runtime")


def generating(kind: str, folder: Path, *, bart: bool = False, templates: str | None = None, **options: Any) -> Any:
    """A supervised, gkd, reinforce or ppo trainer; `labels`, how many there are."""
    if bart:
        tokenizer = tiny_tokenizer(WORDS)
        teacher = Teacher(language_model(tiny_bart(seed=2, vocab=PADDED), tokenizer), tokenizer)
        options |= {"model": tiny_bart(seed=11, vocab=PADDED), "teacher": teacher}
    if templates:
        options["data"] = [replace(e, teacher_inputs=(*e.teacher_inputs, e.student_input)) for e in examples(12)]
        options["teacher"] = tiny_teacher(combination=templates)
    if "labels" in options:
        options["labels"] = labels(options["labels"])
    return make(kind, folder, n=12, **{**PLAIN, "learning_rate": 0.1 if kind == "supervised" else 0.03, **options})


def encoding(
    folder: Path, *, narrow: bool = False, bilstm: bool = False, dropout: float = 0.0, evaluate: bool = False, **options
) -> Any:
    """A TKD trainer."""
    teacher, model = tiny_classifier(dropout=dropout), None
    if narrow:
        model = build_student(teacher, 2, "random", hidden_size=8)
    if bilstm:
        torch.manual_seed(0)
        shape = {"embedding_size": 8, "hidden_size": 6, "classifier_size": 5, "num_hidden_layers": 2}
        model = BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=len(CLASSIFIER_WORDS), **shape))
    dev = rows(10, seed=1) if evaluate else None
    return make_tkd(folder, model=model, teacher=teacher, dev=dev, **{**PLAIN, "learning_rate": 0.01, **options})


def run(name: str, folder: Path) -> dict[str, Any]:
    """What golden.json holds of a case: logged numbers, sums over the trained weights, and the last evaluation."""
    kind, options = CASES[name]
    evaluate = options.get("evaluate", False)
    if kind == "tkd":
        trainer = encoding(folder, **options)
    else:
        held_out = {"eval_examples": examples(5)} if evaluate else {}
        trainer = generating(kind, folder, **{k: v for k, v in options.items() if k != "evaluate"}, **held_out)
    trainer.train()
    lines = [line for line in logged(folder) if "loss" in line]
    assert len(lines) == STEPS
    series = {key: [line[key] for line in lines if key in line] for key in KEPT}
    found: dict[str, Any] = {key: values for key, values in series.items() if values}
    trained = [p.detach().double() for p in trainer.model.parameters() if p.requires_grad]
    # fsum is exact: the order of the weights does not matter.
    found["weights"] = math.fsum(float(p.sum()) for p in trained)
    found["squared_weights"] = math.fsum(float(p.square().sum()) for p in trained)
    if evaluate:
        scores = trainer.evaluate()
        found |= {key: value for key, value in sorted(scores.items()) if not key.endswith((*CLOCKS, "epoch"))}
    return found


def write(cases: dict[str, dict[str, Any]]) -> None:
    """golden.json, a line for each series. JSON keeps every digit of a float: it is written as its repr."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    blocks = [
        f"{json.dumps(name)}: {{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in case.items()) + "\n}"
        for name, case in cases.items()
    ]
    GOLDEN.write_text(f'{{"versions": {json.dumps(versions)},\n"cases": {{\n' + ",\n".join(blocks) + "\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    asked = parser.parse_args().cases or list(CASES)
    torch.set_num_threads(1)
    known = json.loads(GOLDEN.read_text())["cases"] if GOLDEN.exists() else {}
    for name in asked:
        with tempfile.TemporaryDirectory() as folder:
            known[name] = run(name, Path(folder))
    write({name: known[name] for name in CASES})


if __name__ == "__main__":
    main()
