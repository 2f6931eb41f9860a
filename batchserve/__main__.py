"""`python -m batchserve` is `batchserve`."""

if __name__ == "__main__":  # scoring processes import this module under another name
    from batchserve.cli import main

    main()
