"""On-policy distillation with the reference trainer, as a script to start from.

    python examples/train_opd.py CONFIG.yaml [KEY=VALUE ...]

`fused-distill train` does the same; the whole of it is in fused_distill/trainer/loop.py.
"""

from __future__ import annotations

import sys

from fused_distill.trainer.config import load_config
from fused_distill.trainer.loop import train

if __name__ == "__main__":
    print(train(load_config(sys.argv[1], sys.argv[2:])))
