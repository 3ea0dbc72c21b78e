"""Write mlxft/study/catalogue.json: what follows from mlxft/study/catalogue.yaml by the memory plan.

python benchmarks/catalogue.py
"""

from __future__ import annotations

import json
from pathlib import Path

import mlxft.study.catalogue as study

if __name__ == "__main__":
    place = Path(study.__file__).with_suffix(".json")
    place.write_text(json.dumps(study.compute_catalogue(), indent=1) + "\n", "utf-8")
    print(f"wrote {place}")
