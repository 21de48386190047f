"""A trained model as other software reads it. Only writes out; nothing else in the project leans on it."""
