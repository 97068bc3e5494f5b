"""`python -m evals.tiny_world`."""

import sys

from evals.tiny_world.train import main

if __name__ == "__main__":
    sys.exit(main())
