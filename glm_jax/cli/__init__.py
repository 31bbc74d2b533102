"""Shared parts of the commands: options, exit codes, and output on the terminal."""
