"""Programs that show the library. This file makes them a package before any other `examples` that is installed."""
