"""``python -m billhook``: the command, where its script is not on the path."""

from billhook.cli import main

if __name__ == "__main__":
    main()
