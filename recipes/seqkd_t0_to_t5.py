"""Sequence-level distillation: a T5 student learns the answers T0 wrote (`rlkd generate-pseudolabels`). The warm
start of RL.

python recipes/seqkd_t0_to_t5.py --config recipes/seqkd_t0_to_t5.yaml [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import (
    DataArguments,
    ModelConfig,
    SupervisedArguments,
    SupervisedTrainer,
    TeacherArguments,
    parse_config,
    prepare,
)

SETTINGS = (DataArguments, TeacherArguments, ModelConfig, SupervisedArguments)


def main() -> None:
    data, teacher, student, training = parse_config(SETTINGS)
    setup = prepare(data, teacher, student, training)
    trainer = SupervisedTrainer(setup.student, training, train_dataset=setup.pseudo_labels, **setup.trainer_inputs())
    trainer.run(setup.settings)


if __name__ == "__main__":
    run_main(main)
