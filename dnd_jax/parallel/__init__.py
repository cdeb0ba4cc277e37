"""Devices and processes: the mesh, where arrays are kept and computed, and several hosts as one
program."""
