"""Modules with the interface of other libraries, for code that was written for those."""
