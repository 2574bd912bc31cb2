"""What is particular to one host trainer: one file each, and the only code that knows it."""
