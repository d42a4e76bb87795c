"""`python -m benchmarks`."""

import sys

if __name__ == "__main__":
    from benchmarks.app import app
    from lstm_triton.cli.errors import UserError

    try:
        app(prog_name="python -m benchmarks")
    except UserError as error:  # a file that cannot be written
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
