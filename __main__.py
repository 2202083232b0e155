"""``python -m stepladder`` is the command ``stepladder``."""

from .launch.cli import main

if __name__ == "__main__":
    main()
