"""The largest of many numbers as device functions, shared by the choice of blocks and the choice of channels."""
