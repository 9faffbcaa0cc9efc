"""What must be set before anything imports Triton: its kernels run in the interpreter, on the CPU."""

import os

os.environ["TRITON_INTERPRET"] = "1"
