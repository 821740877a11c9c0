"""Files and processes: durable writes, locks, signals, progress, Markdown cards, redaction of secrets."""
