"""spark-submit jobs/catalog.py CONFIG [key=value ...]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    sys.exit(main(["catalog", *sys.argv[1:]]))
