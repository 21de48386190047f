"""What runs wrote down, as one page for a browser: the record of a run, its charts, the page."""
