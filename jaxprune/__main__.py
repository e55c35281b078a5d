"""`python -m jaxprune`, the same as `jaxprune`."""

import sys

from jaxprune.cli import main

sys.exit(main())
