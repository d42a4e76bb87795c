"""`python -m lstm_triton.cli`."""

from lstm_triton.cli import main

main()
