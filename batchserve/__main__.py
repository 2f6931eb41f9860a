"""`python -m batchserve` is `batchserve`."""


def main() -> None:
    """Runs the command line. Scoring processes import this module under another name, and not the command line."""
    from batchserve.cli import main as run

    run()


if __name__ == "__main__":
    main()
