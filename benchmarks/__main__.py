"""`python -m benchmarks`."""

if __name__ == "__main__":  # the processes that measure import this module as well
    from benchmarks.app import app

    app(prog_name="python -m benchmarks")
