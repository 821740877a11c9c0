"""Tree Knowledge Distillation of a fine-tuned BERT into a few layers, on a GLUE task or on your own labelled file, or
of a prompted LLM's labels into an encoder: `rlkd train tkd`, for a launcher.

accelerate launch recipes/tkd_glue.py --config recipes/tkd_glue.yaml [--train_file reviews.csv] [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import TRAINING_JOBS

JOB = TRAINING_JOBS["tkd"]
SETTINGS = JOB.settings  # for `rlkd config`

if __name__ == "__main__":
    run_main(JOB.main)
