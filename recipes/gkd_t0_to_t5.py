"""GKD for a warmed-up T5 student: a divergence to a prompted T0 at every prefix of the student's own answers or of
labels. `rlkd train gkd`, for a launcher.

accelerate launch recipes/gkd_t0_to_t5.py --config recipes/gkd_t0_to_t5.yaml [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import TRAINING_JOBS

JOB = TRAINING_JOBS["gkd"]
SETTINGS = JOB.settings  # for `rlkd config`

if __name__ == "__main__":
    run_main(JOB.main)
