"""`python -m moeflow`: the same command line as `moeflow`."""

import sys

from moeflow.cli.main import main

sys.exit(main())
