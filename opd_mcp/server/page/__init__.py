"""The dashboard's page: HTML, styles and scripts as they are read, and `assembly.py`, which makes one file of them.

`vendor/` holds uPlot as published, with its licence and checksums. Imports nothing of this project.
"""
