"""`python -m fastcompat`."""

from fastcompat.commands.app import main

if __name__ == "__main__":
    main()
