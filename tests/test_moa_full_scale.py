"""Configurations of the paper's size: real data sets' files on a loopback Hub, cut down, through the same programs to numbers."""
