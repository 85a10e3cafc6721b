"""`mergekit-dam demo`: three tiny specialists made on the spot, merged and compared.

settings    every size and rate
texts       the three domains, from the standard library, `arithmetic` and `records`
tokenizer   byte-level BPE
training    base and specialists, with `muon`
recipes     the YAML files
merging     mergekit's own command
result      the table
run         these steps in a row
"""

from mergekit_dam.demo.result import DemoResult
from mergekit_dam.demo.run import run_demo
from mergekit_dam.demo.settings import DemoSettings

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
