"""Host trainers: one file or folder for each, the only code that knows it."""
