"""A teacher of one's own: a T5 model learns the references of rows as it reads them under prompt templates. `rlkd train
teacher`, for a launcher.

accelerate launch recipes/teacher_t5.py --config recipes/teacher_t5.yaml [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import TRAINING_JOBS

JOB = TRAINING_JOBS["teacher"]
SETTINGS = JOB.settings  # for `rlkd config`

if __name__ == "__main__":
    run_main(JOB.main)
