"""The public functions of the ops, one file each."""
