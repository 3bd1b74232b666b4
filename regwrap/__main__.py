"""`python -m regwrap`."""

import sys

from regwrap.cli import main

sys.exit(main())
