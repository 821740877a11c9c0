"""What is seen of the method: token rewards as numbers, in a notebook, on a page and in a terminal."""
