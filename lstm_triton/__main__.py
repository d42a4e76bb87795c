"""`python -m lstm_triton`: the program `lstm-triton`."""

import sys

from lstm_triton.cli import main

sys.exit(main())
