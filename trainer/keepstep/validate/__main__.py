"""python -m keepstep.validate: one rank of a validation."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks share the cores
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS adds in the same order each time

from keepstep.validate.run import main

sys.exit(main(sys.argv[1:]))
