"""What every command needs: its errors and exit codes, its arguments, its configuration, its progress lines."""
