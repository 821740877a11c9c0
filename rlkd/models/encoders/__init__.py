"""Encoder-only classifiers: attention and hidden states, students cut from a teacher, ONNX."""
