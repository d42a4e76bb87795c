"""`python -m benchmarks`."""

if __name__ == "__main__":
    from benchmarks.app import app

    app(prog_name="python -m benchmarks")
