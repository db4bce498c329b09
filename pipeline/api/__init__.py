"""The Python API, imported as `scholiast`: a joined cache, its batches, the loss, other trainers."""
