"""The command line: parses, calls, prints. `app` is the program; each group of commands has a file."""
