"""``python -m fusedvae``: the command line."""

import sys

from fusedvae.cli import main

sys.exit(main())
