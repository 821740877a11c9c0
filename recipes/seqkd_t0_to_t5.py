"""Sequence-level distillation: a T5 student learns the answers T0 wrote (`rlkd generate-pseudolabels`). The warm
start of RL. `rlkd train seqkd`, for a launcher.

accelerate launch recipes/seqkd_t0_to_t5.py --config recipes/seqkd_t0_to_t5.yaml [--field value ...]
"""

from rlkd import refuse_missing_paths, run_main

if __name__ == "__main__":
    run_main(refuse_missing_paths)  # before the imports that take seconds

from rlkd import TRAINING_JOBS

JOB = TRAINING_JOBS["seqkd"]
SETTINGS = JOB.settings  # for `rlkd config`

if __name__ == "__main__":
    run_main(JOB.main)
