"""sparkmed: medical and microscopy images from archive to scored cohort on Spark."""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "Config": "sparkmed.config",
    "InputError": "sparkmed.rejection",
    "Model": "sparkmed.learning.model",
    "PatchLoader": "sparkmed.training.loader",
    "Preprocess": "sparkmed.config",
    "Refused": "sparkmed.rejection",
    "Rejection": "sparkmed.rejection",
    "Volume": "sparkmed.imaging.volume",
    "load_config": "sparkmed.config",
    "load_model": "sparkmed.tracking",
    "read_archive": "sparkmed.formats",
    "run": "sparkmed.pipeline",
}
_NAMES = {"load_config": "load"}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    """Public names are imported when they are first used: reading a file must not need torch, nor training Spark."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sparkmed' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), _NAMES.get(name, name))


def __dir__():
    return __all__
