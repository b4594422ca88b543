"""Measuring kernels: how a time is taken (``measure``) and which problems are compared (``layers``)."""
