"""The one reader of files that users bring: every command that takes a file takes every form of it, and reads the same in it."""
