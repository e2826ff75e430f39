"""The package's version, for whoever needs it without the package's names."""

__version__ = "0.1.0"
