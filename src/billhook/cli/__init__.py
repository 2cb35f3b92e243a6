"""The command line: arguments in, tables and files out, nothing else."""

from billhook.cli.app import app, main

__all__ = ["app", "main"]
