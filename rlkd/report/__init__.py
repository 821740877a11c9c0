"""Reports from the files of a run: a page on whether training helped, and comparisons of runs."""
