"""Prints the sizes of a merge as a plan takes them: python -m tests.kit.inventories FILE"""

import sys
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_dam.estimate.inventory import take_inventory
from mergekit_dam.estimate.merge import plan_merge

if __name__ == "__main__":
    planned = plan_merge(Path(sys.argv[1]), MergeOptions(quiet=True), Path(sys.argv[1]).parent)
    print(take_inventory(planned))
