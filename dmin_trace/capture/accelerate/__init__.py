"""The loop driver: captures through the loop of a script that trains with accelerate.

attach            the line in a script, and the capture of that script: its arguments, weights, store and errors
driver            wraps the accelerator: when the training ends, and what the script calls during the capture
capture_batches   the batches that the script's own training step runs on
training_run      the models, optimizers and dataloader that the script prepared
loop_variables    the variables of the script's loop, restored after the capture
"""
