"""How the bundled model is made: `python -m sefi_fast.tiny_world.recipe --out FOLDER`."""
