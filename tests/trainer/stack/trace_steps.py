"""Trace the plan's step for several sets of the trainer's flags, for a slice of TPUs.

    python -m tests.trainer.stack.trace_steps ACCELERATOR_TYPE {"NAME": [FLAG, ...], ...}

Prints {"NAME": the SHA-256 of the program's MLIR, ...}. It runs in a process of its own, which can
compute nothing after tracing for a TPU.
"""

import hashlib
import json
import os
import sys

from trainer.plan import compile as compiling
from trainer.tpu import parse_slice
from trainer.validation import parse

if __name__ == "__main__":
    os.environ |= compiling.ENVIRONMENT
    slice_ = parse_slice(sys.argv[1])
    programs = {}
    for name, flags in json.loads(sys.argv[2]).items():
        module = compiling.trace(parse(flags), slice_).module
        programs[name] = hashlib.sha256(module.encode()).hexdigest()
    print(json.dumps(programs))
