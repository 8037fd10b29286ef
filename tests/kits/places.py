"""Where things lie: the checkout, and what the project keeps beside it (a clone may lack it)."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("SURGVQA_SHARED") or ROOT.parent / "shared")
REAL_DATA = SHARED / "data/real-colon-vqa"
