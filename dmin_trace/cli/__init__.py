"""The command line: parses, calls, prints. `app` holds the commands; one file for each group of them."""
