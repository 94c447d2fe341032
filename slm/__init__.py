__version__ = "0.1.0"


def __getattr__(name):
    """`slm.load` and `slm.LM` on first use: importing the package alone stays light."""
    if name in ("load", "LM"):
        from slm import sample

        return getattr(sample, name)
    raise AttributeError(f"module 'slm' has no attribute {name!r}")
