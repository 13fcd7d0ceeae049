"""``python -m optax_structure``."""

import sys

from optax_structure.cli import main

if __name__ == "__main__":
    sys.exit(main())
