"""Data that ships with the package: presets, named machines, the embedded tiny checkpoint."""
