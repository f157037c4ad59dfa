"""What `import paper` finds when a script here is run as a file: it says how to run it."""

import sys
from pathlib import Path

script = Path(sys.argv[0]).stem
module = "paper" if script in ("paper", "__main__") else f"paper.{script}"
print(f"error: run it from the project's folder: python -m {module}", file=sys.stderr)
sys.exit(2)
