"""`python -m nemo_fiberpo.cli`, the same as `fiberpo`."""

import sys

from nemo_fiberpo.cli import main

sys.exit(main())
