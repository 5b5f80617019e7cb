"""`python -m fastcompat`."""

from fastcompat.cli import main

if __name__ == "__main__":
    main()
