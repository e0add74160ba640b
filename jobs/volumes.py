"""spark-submit jobs/volumes.py CONFIG [key=value ...]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    sys.exit(main(["volumes", *sys.argv[1:]]))
