"""Every op in plain PyTorch: its specification, fallback and oracle."""
