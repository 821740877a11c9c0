"""Every number that trainers log, one row each: its unit, which direction is better, what it is averaged over, when and
by which trainers it is logged, and its meaning.

Alarms, the choice of the best checkpoint, model cards and reports read this table. `python -m rlkd.metrics FILE` writes
it into docs/metrics.md; without a file it is printed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .checks import check_settings


@dataclass(frozen=True)
class Occasion:
    """When a number is logged, the prefix of its name then, and what it describes."""

    when: Literal["log", "once", "evaluation", "end"]
    prefix: str
    what: str

    def __post_init__(self) -> None:
        check_settings(self)


LOG = Occasion("log", "", "training since the last log line (`logging_steps`)")
WEIGHTED = Occasion("log", "weighted_", "the same, times the weight of the term in the loss")
START = Occasion(
    "once",
    "start_",
    "sampled answers to the first rollout batch, before the first update (RL); to held-out inputs, at the end "
    "(`until_ready`)",
)
GREEDY = Occasion("evaluation", "eval_", "greedy answers to held-out inputs; predictions for held-out rows (TKD)")
SAMPLED = Occasion("evaluation", "eval_sample_", "one answer per held-out input, sampled at temperature 1")
END = Occasion("end", "", "the whole run")
OCCASIONS = (LOG, WEIGHTED, START, GREEDY, SAMPLED, END)

# Which trainers log a number.
ALL = "all"
GENERATING = "supervised and RL"
RL = "RL"
START_CHECKED = "RL, and supervised with `until_ready`"
TASKED = "RL with `task_reward`"
CRITIC = "RL with a critic"
ON_POLICY = "RL and GKD"
PPO = "PPO"
TRUNCATED = "RL and GKD with `rollout_top_p`"
GKD = "GKD"
IMITATING = "RL with `imitation_coef`"
LAYERS = "supervised with `hidden_coef` or `attention_coef`"
DUAL_CLIP = "PPO with `dual_clip`"
DROP = "RL with `cut_answers: drop`"
END_PRICE = "RL with `cut_answers: end_price`"
TKD = "TKD"
STARTS = {START: START_CHECKED}
HELD_OUT = {GREEDY: GENERATING, SAMPLED: GENERATING}
TERM = {LOG: TKD, WEIGHTED: TKD}


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    name     without the prefix of the occasion
    unit     of the logged value; `share` is a number from 0 to 1, empty if there is no unit
    better   the direction of an improvement; neither, if the number does not measure quality
    per      what the value is a mean over or, if it is not a mean, what it belongs to
    logged   occasion -> the trainers that log it then
    meaning  one sentence
    title    heading of its chart; empty for the name
    task     True for scores against references or labels, which measure how good a student is at its task
    """

    name: str
    unit: str
    better: Literal["up", "down", "neither"]
    per: Literal["token", "answer", "row", "batch", "log line", "evaluation", "run"]
    logged: Mapping[Occasion, str]
    meaning: str
    title: str = ""
    task: bool = False

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def names(self) -> list[str]:
        """The logged names, one per occasion."""
        return list(dict.fromkeys(occasion.prefix + self.name for occasion in self.logged))

    @property
    def quantity(self) -> str:
        """The unit with what it is per, as on an axis: `nats per token`, `share of answers`, `seconds`."""
        if not self.unit or self.per not in ("token", "answer", "row"):
            return self.unit
        return f"share of {self.per}s" if self.unit == "share" else f"{self.unit} per {self.per}"

    @property
    def lower_is_better(self) -> bool:
        """Whether less of it is an improvement."""
        return self.better == "down"

    @property
    def is_timing(self) -> bool:
        """Whether it measures duration or speed."""
        return "second" in self.unit


def _score(name: str, meaning: str, unit: str = "", better: Any = "up", per: Any = "evaluation") -> Metric:
    """A score of classifiers against the labels of held-out rows."""
    return Metric(name, unit, better, per, {GREEDY: TKD}, meaning, task=True)


# fmt: off
SECTIONS: dict[str, tuple[Metric, ...]] = {
    "Loss and optimizer": (
        Metric(name="loss", unit="", better="down", per="batch", logged={LOG: ALL, GREEDY: TKD}, title="Loss",
               meaning="The full loss; `eval_loss` is the mean `ce` of labelled held-out rows."),
        Metric(name="grad_norm", unit="", better="neither", per="batch", logged={LOG: ALL},
               meaning="Norm of the gradient before clipping, at the last update."),
        Metric(name="learning_rate", unit="", better="neither", per="batch", logged={LOG: ALL},
               meaning="Learning rate of the last update."),
        Metric(name="epoch", unit="", better="neither", per="run", logged={LOG: ALL},
               meaning="Passes over the training data so far; also in the lines of evaluations and of the end."),
        Metric(name="alarms", unit="", better="down", per="run", logged={LOG: ALL},
               meaning="Alarms fired so far, this line included; absent with `alarms: off` ([guards.md](guards.md))."),
    ),
    "Answers and their regret": (
        Metric(name="regret", unit="nats", better="down", per="answer", logged={LOG: RL, **STARTS, **HELD_OUT},
               title="Regret",
               meaning="-sum_t A_max(s_t, a_t): the cost of an answer relative to the teacher's greedy token at every "
                       "state it visits; 0 is best."),
        Metric(name="logprob", unit="nats", better="up", per="answer", logged=HELD_OUT,
               meaning="log p(answer) under the teacher."),
        Metric(name="teacher_logprob", unit="nats", better="up", per="answer", logged={LOG: RL},
               meaning="The same for the answers sampled in training."),
        Metric(name="length", unit="tokens", better="neither", per="answer",
               logged={LOG: ON_POLICY, **STARTS, **HELD_OUT},
               title="Length of answers", meaning="Tokens of an answer, end-of-sequence included."),
        Metric(name="finish_rate", unit="share", better="up", per="answer",
               logged={LOG: ON_POLICY, **STARTS, **HELD_OUT}, title="Finished answers",
               meaning="Answers that ended before `max_new_tokens`."),
        Metric(name="entropy", unit="nats", better="neither", per="token", logged={LOG: GENERATING, **HELD_OUT},
               title="Entropy of the student",
               meaning="Entropy of the student's next-token distribution; in training, over the tokens in the loss."),
        Metric(name="teacher_entropy", unit="nats", better="neither", per="token", logged={LOG: RL},
               meaning="Entropy of the teacher's next-token distribution at the states that sampled answers visit."),
        Metric(name="kl", unit="nats", better="down", per="token", logged={LOG: RL, **HELD_OUT},
               title="KL to the reference policy",
               meaning="KL from the student to the reference policy: in training the k1 estimate log pi - log pi_ref "
                       "when sampled (it can be slightly negative; 0 if `kl_coef` is 0), in evaluations the k3 "
                       "estimate (0 in supervised runs, which have no reference policy)."),
        Metric(name="match", unit="share", better="up", per="answer", logged={GREEDY: GENERATING},
               meaning="Greedy answers equal, as text, to the teacher's greedy answer under its first template."),
        Metric(name="eos_price", unit="nats", better="neither", per="token", logged={**STARTS},
               meaning="Regret of ending an answer where the student continued; a start is weak when `start_regret` "
                       "exceeds half of it."),
    ),
    "Policy updates": (
        Metric(name="task_reward", unit="", better="up", per="answer", logged={LOG: TASKED}, title="Task reward",
               meaning="Score of sampled answers by `task_reward`, in its own unit, before its weight."),
        Metric(name="kl_coef", unit="", better="neither", per="batch", logged={LOG: RL},
               meaning="Weight of the KL penalty to the reference policy; it moves only with `kl_target`."),
        Metric(name="advantage_std", unit="nats", better="neither", per="batch", logged={LOG: RL},
               meaning="Standard deviation of the advantages that enter the loss."),
        Metric(name="dropped", unit="share", better="neither", per="answer", logged={LOG: DROP},
               meaning="Answers left out of the loss because `max_new_tokens` cut them."),
        Metric(name="end_price", unit="nats", better="neither", per="answer", logged={LOG: END_PRICE},
               meaning="What answers were charged for a missing end, 0 for those that ended."),
        Metric(name="ratio_mean", unit="", better="neither", per="token", logged={LOG: ON_POLICY},
               meaning="pi / pi_old, the probability under the student over that under the policy that sampled; 1 "
                       "at the first update after the behaviour policy is synchronised."),
        Metric(name="ratio_max", unit="", better="neither", per="log line", logged={LOG: ON_POLICY},
               meaning="The largest such ratio since the last line."),
        Metric(name="weight_mean", unit="", better="neither", per="token", logged={LOG: RL},
               meaning="Importance weight after truncation (`importance_weight`, `importance_cap`): of the student "
                       "over what answers were drawn from; in PPO, whose ratio does the rest, of pi_old over that."),
        Metric(name="weight_max", unit="", better="neither", per="log line", logged={LOG: RL},
               meaning="The largest weight before truncation since the last line."),
        Metric(name="weight_truncated", unit="share", better="down", per="token", logged={LOG: RL},
               title="Truncated weights", meaning="Tokens whose weight was above `importance_cap`."),
        Metric(name="effective_sample_size", unit="share", better="up", per="token", logged={LOG: RL},
               title="Effective sample size",
               meaning="(sum w)^2 / (n sum w^2) of the n tokens since the last line: the share of them that, weighted "
                       "equally, would give as precise a mean."),
        Metric(name="cut_mass", unit="share", better="down", per="token", logged={LOG: TRUNCATED},
               title="Probability cut by top-p",
               meaning="The student's probability of the tokens that `rollout_top_p` leaves out. No weight corrects "
                       "for it: what is never drawn is never credited."),
        Metric(name="clip_fraction", unit="share", better="neither", per="token", logged={LOG: PPO},
               title="Clipped tokens", meaning="Tokens whose ratio is outside 1 +- `clip_range`."),
        Metric(name="imitation_loss", unit="nats", better="down", per="token", logged={LOG: IMITATING},
               meaning="-log pi of the labels that an update imitates beside its answers."),
        Metric(name="hidden_loss", unit="value^2", better="down", per="row", logged={LOG: LAYERS},
               title="Distance of layers",
               meaning="Squared distance of the layers' outputs to the teacher's, mean over tokens and dimensions; of "
               "encoder and decoder, added."),
        Metric(name="attention_loss", unit="value^2", better="down", per="row", logged={LOG: LAYERS},
               title="Distance of attention", meaning="The same of self-attention scores, mean over heads and pairs."),
        Metric(name="on_policy", unit="share", better="neither", per="batch", logged={LOG: GKD},
               meaning="Batches whose answers were the student's, the others being labels."),
        Metric(name="dual_clip_fraction", unit="share", better="neither", per="token", logged={LOG: DUAL_CLIP},
               meaning="Tokens of negative advantage whose ratio is above `dual_clip`: they have no gradient."),
        Metric(name="value_loss", unit="nats^2", better="down", per="token", logged={LOG: CRITIC},
               meaning="The critic's squared error, clipped, divided by 2."),
        Metric(name="explained_variance", unit="share", better="up", per="batch", logged={LOG: CRITIC},
               title="Explained variance of the critic",
               meaning="1 - Var(target - value) / Var(target), which a constant error of the critic does not change."),
        Metric(name="value_gain", unit="share", better="up", per="batch", logged={LOG: CRITIC},
               meaning="1 - mean (target - value)^2 / mean target^2, 0.01 nats^2 added to both: constant errors lower "
                       "it; 0 for no critic (the teacher baseline), below 0 the critic adds variance."),
    ),
    "Task scores": (
        Metric(name="exact_match", unit="share", better="up", per="answer", logged=HELD_OUT, task=True,
               meaning="Answers equal to one of the references, stripped and lower-cased."),
        Metric(name="rouge1", unit="", better="up", per="answer", logged=HELD_OUT, task=True,
               meaning="ROUGE-1 F1 (0 to 100) against the best of the references."),
        Metric(name="rouge2", unit="", better="up", per="answer", logged=HELD_OUT, task=True,
               meaning="ROUGE-2 F1 (0 to 100) against the best of the references."),
        Metric(name="rougeL", unit="", better="up", per="answer", logged=HELD_OUT, task=True,
               meaning="ROUGE-L F1 (0 to 100) against the best of the references."),
        Metric(name="bleu", unit="", better="up", per="evaluation", logged=HELD_OUT, task=True,
               meaning="Corpus BLEU (0 to 100, sacrebleu)."),
        Metric(name="chrf", unit="", better="up", per="evaluation", logged=HELD_OUT, task=True,
               meaning="Corpus chrF2 (0 to 100, sacrebleu)."),
        Metric(name="token_f1", unit="", better="up", per="answer", logged=HELD_OUT, task=True,
               meaning="F1 of words (0 to 100) against the best of the references, as SQuAD scores answers."),
        Metric(name="sari", unit="", better="up", per="answer", logged=HELD_OUT, task=True,
               meaning="SARI (0 to 100) of a rewritten input: n-grams rightly added, kept and deleted."),
        _score("accuracy", "Labelled rows whose largest logit is that of their label.", unit="share", per="row"),
        _score("score", "Mean of the `metrics` of the data (`recipes/tkd_glue.py`)."),
        _score("f1", "F1 of label 1 (0 to 1), as GLUE scores QQP and MRPC."),
        _score("matthews", "Matthews correlation (-1 to 1)."),
        _score("micro_f1", "Multi-label: F1 of all pairs of row and label together (0 to 1)."),
        _score("macro_f1", "Multi-label: mean over labels of the F1 of each (0 to 1)."),
        _score("subset_accuracy", "Multi-label: rows with exactly the right labels.", unit="share", per="row"),
        _score("pearson", "Regression: linear correlation with the numbers (-1 to 1)."),
        _score("spearman", "Regression: correlation of ranks (-1 to 1)."),
        _score("mean_squared_error", "Regression: squared difference.", unit="value^2", better="down", per="row"),
        _score("entity_f1", "Token classification: F1 of the entities of all types (0 to 1, seqeval)."),
        _score("entity_precision", "Token classification: predicted entities that are right (0 to 1, seqeval)."),
        _score("entity_recall", "Token classification: entities that are found (0 to 1, seqeval)."),
        _score("token_accuracy", "Token classification: words that have their tag.", unit="share"),
        _score("sequence_accuracy", "Token classification: rows with the right tags.", unit="share", per="row"),
    ),
    "Terms of the TKD loss": (
        Metric(name="ce", unit="nats", better="down", per="row", logged=TERM,
               meaning="Loss on the labels: cross-entropy, binary, or squared error ([tkd.md](tkd.md))."),
        Metric(name="kd", unit="nats", better="down", per="row", logged=TERM,
               meaning="Divergence from the teacher's softened labels; from its numbers, squared error."),
        Metric(name="pt", unit="", better="down", per="row", logged=TERM,
               meaning="Patient-KD term: distance of the [CLS] states at matched layers."),
        Metric(name="td_student", unit="", better="down", per="row", logged=TERM,
               meaning="Distance of the states of the tree grown in the student's attention."),
        Metric(name="td_teacher", unit="", better="down", per="row", logged=TERM,
               meaning="Distance of the states of the tree grown in the teacher's attention."),
        Metric(name="td_random", unit="", better="down", per="row", logged=TERM,
               meaning="Distance of the states of equally many random tokens."),
        Metric(name="all", unit="", better="down", per="row", logged=TERM,
               meaning="Distance of the states of all tokens."),
        Metric(name="mse", unit="", better="down", per="row", logged=TERM,
               meaning="Squared difference to the teacher's logits."),
        Metric(name="noisy", unit="", better="down", per="row", logged=TERM,
               meaning="Squared difference to the teacher's logits with noise."),
        Metric(name="embedding", unit="", better="down", per="row", logged=TERM,
               meaning="TinyBERT: squared difference of what the first layers read."),
        Metric(name="hidden", unit="", better="down", per="row", logged=TERM,
               meaning="TinyBERT: squared difference of hidden states, summed over layers."),
        Metric(name="attention", unit="", better="down", per="row", logged=TERM,
               meaning="TinyBERT: squared difference of attention scores, summed over layers."),
        Metric(name="relations", unit="nats", better="down", per="row", logged=TERM,
               meaning="MiniLM: divergence of relations among queries, keys and values of the last layer."),
        Metric(name="gram", unit="", better="down", per="row", logged=TERM,
               meaning="NST: squared difference of Gram matrices of hidden states, summed over layers."),
        Metric(name="boundaries", unit="", better="down", per="row", logged=TERM,
               meaning="Feed-forward neurons on the wrong side of the teacher's boundary, squared margin."),
        Metric(name="gradient", unit="", better="down", per="row", logged=TERM,
               meaning="Squared difference of normalised gradients by the word embeddings."),
    ),
    "Volume and speed": (
        Metric(name="tokens", unit="tokens", better="neither", per="log line",
               logged={LOG: GENERATING, END: GENERATING},
               meaning="Answer tokens sampled, scored and trained on (supervised: label tokens trained on) since the "
                       "last line, over all processes; at the end, those after the last log line."),
        Metric(name="tokens_per_second", unit="tokens per second", better="up", per="log line",
               logged={LOG: GENERATING}, title="Speed", meaning="`tokens` divided by the time since the last line."),
        Metric(name="rollout_seconds", unit="seconds", better="down", per="batch", logged={LOG: ON_POLICY},
               meaning="Wall-clock seconds to sample and score one rollout batch."),
        Metric(name="seconds", unit="seconds", better="down", per="evaluation", logged={GREEDY: GENERATING},
               meaning="Wall-clock seconds of the evaluation."),
        Metric(name="runtime", unit="seconds", better="down", per="evaluation", logged={GREEDY: TKD},
               meaning="Wall-clock seconds of the evaluation, as transformers measures them."),
        Metric(name="samples_per_second", unit="rows per second", better="up", per="evaluation", logged={GREEDY: TKD},
               meaning="Held-out rows divided by `eval_runtime`."),
        Metric(name="steps_per_second", unit="batches per second", better="up", per="evaluation", logged={GREEDY: TKD},
               meaning="Held-out batches divided by `eval_runtime`."),
        Metric(name="train_loss", unit="", better="down", per="run", logged={END: ALL},
               meaning="Mean of `loss` over the run."),
        Metric(name="train_runtime", unit="seconds", better="down", per="run", logged={END: ALL},
               meaning="Wall-clock seconds of the training."),
        Metric(name="train_cpu_seconds", unit="seconds", better="down", per="run", logged={END: ALL},
               meaning="CPU seconds of process 0, all its threads, since the trainer was made."),
        Metric(name="train_samples_per_second", unit="rows per second", better="up", per="run", logged={END: ALL},
               meaning="Rows of the schedule divided by `train_runtime`, as transformers counts them."),
        Metric(name="train_steps_per_second", unit="updates per second", better="up", per="run", logged={END: ALL},
               meaning="Optimizer steps divided by `train_runtime`."),
        Metric(name="total_flos", unit="", better="neither", per="run", logged={END: ALL},
               meaning="A field of transformers, not computed here (0)."),
    ),
}
# fmt: on

METRICS = tuple(row for rows in SECTIONS.values() for row in rows)
# A task score may come from any trainer's evaluation.
_BY_NAME = {name: row for row in METRICS for name in row.names} | {
    occasion.prefix + row.name: row for row in METRICS if row.task for occasion in (GREEDY, SAMPLED)
}


def metric(name: str) -> Metric:
    """The row of a logged name, prefix included.

    A name that is not in the table is a user's own score: up is better, unless it ends in `loss` (as in transformers).
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    own = name.removeprefix(GREEDY.prefix).removeprefix("sample_")
    return Metric(
        name=own,
        unit="",
        better="down" if own.endswith("loss") else "up",
        per="evaluation",
        logged=HELD_OUT,
        meaning="A score of your own.",
        task=True,
    )


def in_order(names: Iterable[str]) -> list[str]:
    """Logged names in the order of the table, those of sampled answers after the others, unknown ones last."""
    place = {row.name: i for i, row in enumerate(METRICS)}

    def key(name: str) -> tuple[bool, int, str]:
        return name.startswith(SAMPLED.prefix), place.get(metric(name).name, len(METRICS)), name

    return sorted(names, key=key)


def held_out(score: str) -> Metric:
    """The row of a held-out score, `regret` or `sample_regret`; a leading `eval_` may be there or not."""
    return metric(GREEDY.prefix + score.removeprefix(GREEDY.prefix))


# The tables of docs/metrics.md

BEGIN = "<!-- written by: python -m rlkd.metrics docs/metrics.md -->\n"
END_OF_TABLES = "<!-- end of the tables -->\n"
COLUMNS = ("name", "unit", "better", "per", "logged", "meaning")


def markdown() -> str:
    """The table as Markdown: the occasions, then one table per section."""
    lines = ["| logged | prefix | describes |", "|---|---|---|"]
    lines += [f"| {o.when} | {f'`{o.prefix}`' if o.prefix else 'none'} | {o.what} |" for o in OCCASIONS]
    for title, rows in SECTIONS.items():
        lines += ["", f"## {title}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def _line(row: Metric) -> str:
    names = ", ".join(f"`{name}`" for name in row.names)
    by_trainers: dict[str, list[str]] = {}
    for occasion, trainers in row.logged.items():
        occasions = by_trainers.setdefault(trainers, [])
        occasions += [occasion.when] if occasion.when not in occasions else []
    logged = "; ".join(f"{', '.join(occasions)}: {trainers}" for trainers, occasions in by_trainers.items())
    return f"| {names} | {row.unit or '–'} | {row.better} | {row.per} | {logged} | {row.meaning} |"


def main(arguments: list[str]) -> None:
    """Print the tables, or write them into a file in place of those between its two marks."""
    if not arguments:
        print(markdown(), end="")
        return
    path = Path(arguments[0])
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END_OF_TABLES)
    path.write_text(f"{before}{BEGIN}{markdown()}{END_OF_TABLES}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
