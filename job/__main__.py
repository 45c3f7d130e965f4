"""Run the command line as `python -m job`."""

from job.cli import command

if __name__ == "__main__":
    command()
