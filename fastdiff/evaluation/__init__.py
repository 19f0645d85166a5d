"""What a trained run is worth: the metrics of ``python -m fastdiff.evaluate``."""
