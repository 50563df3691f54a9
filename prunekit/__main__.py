"""Runs the command line: `python -m prunekit`."""

from prunekit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
