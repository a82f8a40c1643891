"""python -m keepstep.validate: one rank of a validation."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks share the cores

from keepstep.validate.run import main

sys.exit(main(sys.argv[1:]))
