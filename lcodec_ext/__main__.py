"""``python -m lcodec_ext`` is ``lcodec-ext``."""

import sys

from lcodec_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
