"""Token rewards to look at: views from models, runs and labels; in a notebook, on a page, in a terminal, as JSON."""
