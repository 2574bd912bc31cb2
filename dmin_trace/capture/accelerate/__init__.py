"""The loop driver: captures through the loop of a script that trains with accelerate.

`attach` is the way in; `driver` makes the script's loop go on with capture batches; `loop_variables` puts the loop's
variables back.
"""
