"""Device, process groups and the one table of patches: everything that depends on the machine."""
