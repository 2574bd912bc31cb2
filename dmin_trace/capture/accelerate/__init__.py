"""The loop driver: captures through the loop of a script that trains with accelerate. It starts at `attach`."""
