"""What is written and read again: files, arrays and folders, complete or absent, checked when read, one writer at a time."""
