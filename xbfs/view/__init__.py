"""Random-access images of restore points: synthetic raw and VHD."""
