"""The training scripts of Hugging Face diffusers (its `examples/`, and scripts made after them): a host.

host        the averaged weights, weight files, runs that are refused
queries     folders with the queries, and the scripts' command lines pointed at them
generate    images from the model that a script saved

Nothing here imports diffusers unless the script has, or images are made.
"""

from __future__ import annotations

from dmin_trace.integrations.diffusers import host

from dmin_trace.capture.host import Host

HOST: Host = host
