"""Engines that decode labels; `registry.ENGINES` lists them."""
