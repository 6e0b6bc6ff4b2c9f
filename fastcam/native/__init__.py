"""Launchers that hand pointers to the compiled modules."""
