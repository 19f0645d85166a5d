"""Random calls, files, kills and signals, from a seed and within a time (`budget.py`)."""
