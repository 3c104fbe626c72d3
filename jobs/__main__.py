"""`python -m jobs COMMAND`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
