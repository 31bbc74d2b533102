"""What the commands share: options, exit codes and terminal output."""
