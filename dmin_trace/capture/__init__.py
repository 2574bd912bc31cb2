"""A loss is computed once for each training sample and timestep, and its projected gradients go to a store.

Two drivers run training steps, and one recorder makes rows of their losses:

    recording       the driver for a loop of one's own
    accelerate      the driver for scripts that train with accelerate; `launch` runs such a script
    step, guard     one run of a training step; models in eval mode meanwhile, and the checks that close it
    pinning         the timestep is pinned, and random calls are recorded
    random_state    the global random generators
    recorder        losses become rows; `checks` makes sure that they can be compared, `chunks` writes them
    ranks           the processes that fill one store together
    dataset         the readable columns, the samples that fail to load, and the fingerprint of the data
    host            what a family of training scripts must tell

Other stages may use `host.script_host`, and `recording.recording`. This package imports nothing by itself: most of it
needs torch.
"""
