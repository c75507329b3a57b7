#!/usr/bin/env python
r"""python jobs/tokenize.py --config configs/demo.yaml [a.b=c …]

Turn the labels of a dataset into tokens. The same as `fourmill tokenize`; on a cluster:

    ray job submit --working-dir . -- \
        python jobs/tokenize.py --config configs/demo.yaml dataset=s3://bucket/x
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
    main("tokenize")
