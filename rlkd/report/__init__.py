"""What a run did, from the files it left: a page that answers whether it helped, and comparisons of runs."""
