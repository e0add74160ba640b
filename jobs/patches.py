"""spark-submit jobs/patches.py CONFIG [key=value ...]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    sys.exit(main(["patches", *sys.argv[1:]]))
