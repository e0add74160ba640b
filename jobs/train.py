"""spark-submit jobs/train.py CONFIG [key=value ...]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
