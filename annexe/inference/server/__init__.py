"""`annexe serve`: a predictor behind HTTP, with a queue, batches, and a worker for every GPU."""
