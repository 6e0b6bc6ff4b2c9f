"""`python -m fastcam.pipelines` is the command `fastcam`."""

import sys

from fastcam.pipelines.cli import main

if __name__ == "__main__":
    sys.exit(main())
