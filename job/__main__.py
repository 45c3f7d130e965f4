"""`python -m job` is the command line."""

from job.cli import command

if __name__ == "__main__":
    command()
