"""Recipe of the bundled model, its judge and its LoRA: `python -m evals.tiny_world --help`."""
