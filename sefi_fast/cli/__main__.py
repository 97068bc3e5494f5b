"""`python -m sefi_fast.cli` is the command `sefi-fast`."""

from __future__ import annotations

import sys

from sefi_fast.cli import main

sys.exit(main())
