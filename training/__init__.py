"""The plumbing of a run: what it begins from, its optimizer, processes, checkpoints, record, and what it prints."""
