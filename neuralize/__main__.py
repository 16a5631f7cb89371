"""``python -m neuralize``."""

from neuralize.cli import main

if __name__ == "__main__":
    main()
