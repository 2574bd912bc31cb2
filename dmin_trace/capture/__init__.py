"""A loss is run once for each training sample and timestep, and its gradients go to a store.

`recorder` turns losses into rows of a store. Two drivers feed it: `recording`, for a loop of one's own, and
`accelerate`, for scripts that train with accelerate. This package imports nothing by itself: most of it needs torch.
"""
