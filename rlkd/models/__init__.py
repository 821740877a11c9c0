"""Language models behind one protocol, their heads and vocabularies, the frozen teacher and the trained policy."""
