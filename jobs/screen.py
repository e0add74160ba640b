"""spark-submit jobs/screen.py CONFIG [key=value ...]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    status = main(["screen", *sys.argv[1:]])
    if status:  # Databricks takes even an exit with status 0 for a failure
        sys.exit(status)
