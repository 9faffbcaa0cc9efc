"""Run by SGLang's Python: its server, with a key that the command line, which other users can read, does not show."""

import os
import runpy
import sys

if __name__ == "__main__":  # its processes import this file again
    sys.argv += ["--api-key", os.environ["OPD_ENGINE_KEY"]]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
