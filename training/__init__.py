"""The training room: pictures → contrastive pretraining → models/NAME. May import service, never the reverse."""

import os

# torch gives each large buffer back to the kernel. With pages of 2 MB a new one costs an eighth of the page faults,
# which took up to half of a step. torch reads this variable when it first needs memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
