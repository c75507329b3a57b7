#!/usr/bin/env python
r"""python jobs/pretrain.py --config configs/demo.yaml [a.b=c …]

Train 4M on the token shards of a dataset. The same as `fourmill pretrain`; on all GPUs of a machine, or on a cluster:

    torchrun --nproc-per-node 8 jobs/pretrain.py --config C.yaml pretrain.strategy=fsdp
    ray job submit --working-dir . -- \
        python jobs/pretrain.py --config C.yaml dataset=s3://bucket/x pretrain.out=s3://bucket/model pretrain.workers=16
"""

import os.path
import sys

# jobs/ holds tokenize.py, which would hide the standard library's: keep this folder off the path, import from the root.
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [os.path.dirname(_here)] + [
    p for p in sys.path if os.path.abspath(p or ".") not in (_here, os.path.dirname(_here))
]

from fourmill.cli import main

if __name__ == "__main__":
    main("pretrain")
