"""Tree Knowledge Distillation of a fine-tuned BERT into a few layers, on a GLUE task or on your own labelled file; or
of a prompted LLM's labels into an encoder (--pseudo_labels).

python recipes/tkd_glue.py --config recipes/tkd_glue.yaml [--train_file reviews.csv] [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import (
    EncoderStudentArguments,
    EncoderTeacherArguments,
    LabelledDataArguments,
    TKDArguments,
    TKDTrainer,
    compare_with_teacher,
    parse_config,
    prepare_encoders,
    teacher_of_student,
)

SETTINGS = (LabelledDataArguments, EncoderTeacherArguments, EncoderStudentArguments, TKDArguments)


def main() -> None:
    data, teacher, student, training = parse_config(SETTINGS)
    setup = prepare_encoders(data, teacher, student, training)
    above = teacher_of_student(setup)
    trainer = TKDTrainer(setup.new_student(above), training, teacher=above, **setup.trainer_inputs())
    trainer.run(setup.settings)
    if trainer.is_world_process_zero():
        compare_with_teacher(setup)


if __name__ == "__main__":
    run_main(main)
