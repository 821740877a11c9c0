"""`rlkd train`: the training jobs, from an installed package."""

from __future__ import annotations

from collections.abc import Callable

import typer

# Name -> one line of help; a test holds it equal to `TRAINING_JOBS`, whose import takes seconds.
JOBS = {
    "seqkd": "Warm a student up on the teacher's answers (generate-pseudolabels), or distil on their prefixes.",
    "reinforce": "REINFORCE on the reward that the teacher induces.",
    "ppo": "PPO on the reward that the teacher induces.",
    "opd": "Exact on-policy distillation: reverse KL at the student's own prefixes.",
    "gkd": "GKD: a divergence at the prefixes of the student's own answers or of labels.",
    "tkd": "Distil an encoder classifier, its teacher's fine-tuning included.",
    "teacher": "Train a model on the references of your own rows under templates: a teacher where there is none.",
}
# The settings are those of the job's dataclasses, whose own parser reads the flags and prints --help.
PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

app = typer.Typer(
    help="Train a student. Settings: --config FILE.yaml, then --name value; `rlkd train JOB --help` lists them.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _command(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        from ..jobs.training import TRAINING_JOBS

        TRAINING_JOBS[name].main(context.args)

    return run


for _name, _help in JOBS.items():
    app.command(_name, help=_help, context_settings=PASS_ON)(_command(_name))
