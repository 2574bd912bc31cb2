"""Training scripts of several processes."""

from __future__ import annotations

from tiny import BODY

GATHER = BODY.replace("losses.append", "accelerator.gather(loss.detach()); losses.append")
