"""The version, alone in a file that setuptools can read without importing torch."""

VERSION = "0.1.0"
