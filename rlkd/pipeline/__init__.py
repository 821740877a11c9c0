"""From a file and a prompt to a student: the stages of `rlkd distill`, each of them another command of rlkd."""
