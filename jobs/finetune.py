#!/usr/bin/env python
r"""python jobs/finetune.py --config finetune.yaml [a=b …]

Fine-tune a pretrained 4M's encoder on RGB for one task. The same as `fourmill finetune`; on a cluster:

    ray job submit --working-dir . -- \
        python jobs/finetune.py --config finetune.yaml dataset=s3://bucket/x out=s3://bucket/finetuned
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
    main("finetune")
