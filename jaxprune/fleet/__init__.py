"""Sweeps on other machines: engines that exist run chunks, the directory has the last word."""
