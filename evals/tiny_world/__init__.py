"""How the bundled model is made: `python -m evals.tiny_world --out FOLDER`."""
