"""``python -m pybroker``: the command line."""

from pybroker.cli import main

if __name__ == "__main__":
    main()
