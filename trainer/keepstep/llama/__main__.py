"""python -m keepstep.llama: one rank of the built-in trainer."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: ranks share the cores

from keepstep.llama.train import main

sys.exit(main())
