#!/usr/bin/env python
r"""python jobs/train_tokenizer.py --config configs/train_tokenizer.yaml [a.b=c …]

Train one tokenizer from the label shards of a dataset. The same as `fourmill train-tokenizer`; on a cluster:

    ray job submit --working-dir . -- \
        python jobs/train_tokenizer.py --config configs/train_tokenizer.yaml dataset=s3://bucket/x
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
    main("train-tokenizer")
