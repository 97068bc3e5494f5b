"""`python -m sefi_fast.tiny_world.recipe`."""

import sys

from sefi_fast.tiny_world.recipe.train import main

if __name__ == "__main__":
    sys.exit(main())
