"""Files and processes: durable writes, locks, signals, progress, Markdown of cards, redaction of secrets."""
