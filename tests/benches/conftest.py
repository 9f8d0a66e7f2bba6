"""Makes the modules of benches/, which is no package, importable."""

import sys
from pathlib import Path

BENCHES = Path(__file__).parents[2] / "benches"
sys.path[:0] = [str(BENCHES), str(BENCHES / "peers")]
