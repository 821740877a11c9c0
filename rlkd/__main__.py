"""`python -m rlkd` and `accelerate launch -m rlkd`: the command `rlkd`."""

from .cli.main import main

if __name__ == "__main__":
    main()
