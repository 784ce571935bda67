"""`python -m ostler` is the `ostler` command."""

from ostler.cli import main

if __name__ == "__main__":
    main()
