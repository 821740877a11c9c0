"""REINFORCE for a warmed-up T5 student on the reward a prompted T0 induces: `rlkd train reinforce`, for a launcher.

accelerate launch recipes/reinforce_t0_to_t5.py --config recipes/reinforce_t0_to_t5.yaml [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import TRAINING_JOBS

JOB = TRAINING_JOBS["reinforce"]
SETTINGS = JOB.settings  # for `rlkd config`

if __name__ == "__main__":
    run_main(JOB.main)
