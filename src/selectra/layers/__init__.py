"""Small known parts that models are assembled from."""
