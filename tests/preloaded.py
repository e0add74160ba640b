"""Our daemon of Python workers, with MONAI too: else each worker of the tests that loads a model spends seconds on importing it."""

import runpy

if __name__ == "__main__":
    import monai.inferers
    import monai.networks.nets  # noqa: F401

    runpy.run_module("sparkmed.spark.daemon", run_name="__main__")
