"""Microbenchmarks: ``python -m fastcam.bench``."""
