"""A loss is run once for each training sample and timestep, and its gradients go to a store.

    training step -> Recorder: gradient -> checks -> row -> chunk -> store

`recorder` makes rows of losses: `checks` keeps them comparable, `chunks` writes them, `ranks` is where processes meet,
and `provenance` tells where they come from. Two drivers run the training steps: `recording`, for a loop of one's own,
and `accelerate`, for scripts. `pinning` fixes the timestep and the noise of a step. `launch` runs a script for a job.

This package imports nothing by itself: most of it needs torch.
"""
