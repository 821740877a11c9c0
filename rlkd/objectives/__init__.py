"""Pure torch functions: no configuration, no devices, no logging, no transformers."""
