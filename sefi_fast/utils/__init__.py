"""Files, text and memory of the process."""
