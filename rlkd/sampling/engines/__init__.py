"""Label engines: PyTorch and CTranslate2."""
