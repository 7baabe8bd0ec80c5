"""Plan which GPU holds which expert: `moeflow place` without an installation.

    python scripts/plan_placement.py TRACE_OR_COUNTS --gpus 4 -o PLAN

docs/placement.md says what goes in and what comes out.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moeflow.cli import main

if __name__ == "__main__":
    sys.exit(main(["place", *sys.argv[1:]]))
