"""Run records to the paper's tables. Reads ``runs/`` only: it never imports an experiment."""
