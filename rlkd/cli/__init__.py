"""The command line: flags in, jobs run, results printed."""
