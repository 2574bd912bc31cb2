"""A loss is computed once for each training sample and timestep, and its projected gradients go to a store.

    recording, accelerate    the drivers: for a loop of one's own, and for scripts, which `launch` runs
    step, pinning, probe     one run of a training step: its timestep is found and pinned, its random calls are recorded
    recorder                 losses become rows; `checks` makes sure that they can be compared, `chunk_queue` writes
                             them to the store
    run_checks               frozen models (`used_models`), precision and device (`conditions`) are those of the trace
    host                     what a family of training scripts must tell

Other stages may use `host.script_host`, and `recording.recording`. This package imports nothing by itself: most of it
needs torch.
"""
