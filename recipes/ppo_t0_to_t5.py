"""PPO of a warmed-up T5 student on the reward a prompted T0 induces.

python recipes/ppo_t0_to_t5.py --config recipes/ppo_t0_to_t5.yaml [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import DataArguments, ModelConfig, PPOArguments, PPOTrainer, TeacherArguments, parse_config, prepare

SETTINGS = (DataArguments, TeacherArguments, ModelConfig, PPOArguments)


def main() -> None:
    data, teacher, student, training = parse_config(SETTINGS)
    setup = prepare(data, teacher, student, training)
    trainer = PPOTrainer(
        setup.student,
        training,
        train_examples=setup.train_examples,
        labels=setup.pseudo_labels,
        **setup.trainer_inputs(),
    )
    trainer.run(setup.settings)


if __name__ == "__main__":
    run_main(main)
