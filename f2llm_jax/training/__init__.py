"""The training job: its run page, its step, its optimizer, its checkpoints and its metrics."""
